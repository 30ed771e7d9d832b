"""Several processes as one run: how they find each other, and what one reports when another is
lost.

On any machines, set the first three variables by hand:

    OPSD_COORDINATOR=HOST:PORT   address of process 0, with a free port
    OPSD_NUM_PROCESSES=N         number of processes of the run
    OPSD_PROCESS_ID=I            number of this process, 0..N-1
    OPSD_TIMEOUT_S=300           how long a process waits for the others to arrive, and to leave

Slurm steps and Cloud TPUs of several hosts (TPU VMs, GKE, one slice or several) need none of them:
JAX finds the others. OPSD_NUM_PROCESSES=1 alone forbids the search. A single process starts no
service and opens no port.

Exit codes of a process of a run:

    0     done
    1     it failed by itself; the traceback says why
    42    asked to stop (SIGTERM to any process); all have saved the same step, or the same batches
          of an evaluation
    43    another process is gone or never came (`EXIT_PEER_LOST`); that one's log has the cause
    134   JAX aborted it, because another process sent no sign of life; the message has the number
          of that process

After 42, 43 and 134 the same command continues from the last complete checkpoint.
"""

import glob
import importlib.util
import os
import re
import socket
import sys
import threading
import urllib.request

import jax
from absl import logging

from opsd_jax import sharding

EXIT_STOPPED = 42
EXIT_PEER_LOST = 43
_ENVIRONMENT = ("OPSD_COORDINATOR", "OPSD_NUM_PROCESSES", "OPSD_PROCESS_ID")
_HEARTBEAT_S = 100  # silence after which a process counts as dead; less if OPSD_TIMEOUT_S is less


def initialize() -> bool:
    """Joins this process to its run, if the run has several; call it before anything uses a device.

    Ends the process with EXIT_PEER_LOST if the others do not arrive in time. Afterwards an uncaught
    error ends the process at once instead of waiting for the others, which may be waiting for it.

    Returns:
      Whether the run has several processes.

    Raises:
      ValueError: an environment variable is missing or wrong; the message has its name.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    timeout = _number("OPSD_TIMEOUT_S", 300, least=1)
    by_hand = _by_hand()
    count = by_hand["num_processes"] if by_hand else cluster_size()
    if count == 1:
        sharding.start_devices()
        return False
    heartbeat = min(timeout, _HEARTBEAT_S)
    where = f"coordinator {by_hand['coordinator_address']}" if by_hand else "cluster found by JAX"
    who = (
        f"process {by_hand['process_id'] if by_hand else '?'} of {count} on {socket.gethostname()}"
    )
    logging.info("%s: waiting for the others (%s), at most %d s", who, where, timeout)
    # JAX would abort the process without saying who waits for whom: this timer comes first.
    alarm = threading.Timer(
        timeout,
        _give_up,
        [
            f"{who} waited {timeout} s for the other processes ({where}). Were all {count} "
            "started, with the same OPSD_NUM_PROCESSES, and can they reach process 0? "
            "OPSD_TIMEOUT_S sets the time"
        ],
    )
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **by_hand,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=timeout,
        )
        who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    finally:
        alarm.cancel()
    logging.info("%s: %d of %d devices are here", who, jax.local_device_count(), jax.device_count())
    sys.excepthook = _ending(who, heartbeat, sys.excepthook)
    return True


def _by_hand() -> dict:
    """The arguments of jax.distributed.initialize from the environment; {} if it has none."""
    given = [name for name in _ENVIRONMENT if os.environ.get(name)]
    if not given:
        return {}
    if given == ["OPSD_NUM_PROCESSES"] and os.environ["OPSD_NUM_PROCESSES"] == "1":
        return {"num_processes": 1}
    if absent := [name for name in _ENVIRONMENT if name not in given]:
        raise ValueError(
            f"{', '.join(given)} set, {', '.join(absent)} not: a run of several processes needs "
            "all three (python -m pydoc opsd_jax.runtime.distributed)"
        )
    address = os.environ["OPSD_COORDINATOR"]
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(
            f"OPSD_COORDINATOR={address}: give HOST:PORT of process 0, such as 10.0.0.1:8476"
        )
    count = _number("OPSD_NUM_PROCESSES", None, least=1)
    process = _number("OPSD_PROCESS_ID", None, least=0)
    if process >= count:
        raise ValueError(
            f"OPSD_PROCESS_ID={process}: with OPSD_NUM_PROCESSES={count} they go from 0 to "
            f"{count - 1}"
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": process}


def _number(name: str, default, least: int) -> int:
    text = os.environ.get(name) or default
    if not re.fullmatch(r"\d+", str(text)) or int(text) < least:
        raise ValueError(f"{name}={text}: give a whole number, at least {least}")
    return int(text)


def cluster_size() -> int:
    """Number of processes that Slurm or Cloud TPUs started for this run; 1 elsewhere."""
    slurm_step = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}  # not the batch script
    if slurm_step <= os.environ.keys():
        return _number("SLURM_NTASKS", 1, least=1)
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not importlib.util.find_spec("libtpu"):
        return 1
    if hosts := os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get(
        "TPU_WORKER_HOSTNAMES"
    ):  # GKE
        return len(hosts.split(",")) * _number("MEGASCALE_NUM_SLICES", 1, least=1)
    if not glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"):
        return 1
    hosts = _metadata("worker-network-endpoints").split(",")  # a TPU VM; "" elsewhere
    slices = re.search(
        r"^\s*MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env"), flags=re.MULTILINE
    )
    return len(hosts) * (int(slices[1]) if slices else 1)


def _metadata(key: str) -> str:
    """An attribute of this Google Cloud machine; "" on other machines."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def end_with_error(error: Exception | str) -> None:
    """Ends a command whose arguments, files or data are wrong: one line on stderr and code 1.

    A process of several ends at once, without waiting for the others.
    """
    print(f"error: {error}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(1)
    sys.exit(1)


def _give_up(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_PEER_LOST)


def _ending(who: str, heartbeat: int, previous):
    """An excepthook that ends the process at once.

    Python's own end would wait for all processes to agree to leave, which those that wait for this
    one never do.
    """

    def hook(kind, error, trace):
        previous(kind, error, trace)
        if peer_is_lost(error):
            code, story = (
                EXIT_PEER_LOST,
                (
                    "another process is gone: the log of the one that ended first has the "
                    "cause. The same command continues from the last checkpoint"
                ),
            )
        else:
            code = 130 if kind is KeyboardInterrupt else 1
            story = (
                f"failed by itself; the others end when they miss it, within about {heartbeat} s"
            )
        print(f"{who}: {story}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return hook


def peer_is_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is JAX's about a process that does not answer."""
    signs = (
        r"UNAVAILABLE|DEADLINE_EXCEEDED|gloo|heartbeat|coordination service|"
        r"connection (reset|closed)|socket closed"
    )
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and re.search(
            signs, str(error), flags=re.IGNORECASE
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
