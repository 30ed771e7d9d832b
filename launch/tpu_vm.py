"""A run on Cloud TPU VMs, from your own machine: queued resources, one slice or several.

  launch/tpu_vm.sh types                 lists types, their runtimes and zones
  launch/tpu_vm.sh create                asks for the TPU and waits until it is there
  launch/tpu_vm.sh setup                 copies this checkout to all workers, installs it, mounts
                                         BUCKET as runs/
  launch/tpu_vm.sh run -- COMMAND...     starts the command on all workers; again continues the run,
                                         also where only some workers lost it
  launch/tpu_vm.sh status                state of the TPU, and of the run on each worker
  launch/tpu_vm.sh logs                  follows the log of a worker
  launch/tpu_vm.sh ssh [-- COMMAND...]   a shell on a worker, or a command
  launch/tpu_vm.sh wait [--delete]       waits until the run has ended; --delete gives the TPU back
  launch/tpu_vm.sh stop                  all workers save and stop, and are not started again
  launch/tpu_vm.sh delete                gives the TPU back, and asks until it is gone; the bucket
                                         stays
  launch/tpu_vm.sh job -- COMMAND...     create, setup, run and wait --delete; another TPU if this
                                         one is taken away

  launch/tpu_vm.sh run -- python -m opsd_jax.train --config=configs/mini.py --workdir=runs/mini \\
      --config.run_arms="()"
  WORKER=0 launch/tpu_vm.sh run -- python -m opsd_jax.data prepare --source=A --target=runs/data

Variables of the environment:

  PROJECT      your Google Cloud project
  TYPE         v5e-16 (default; the API calls it v5litepod-16), v5p-8, v6e-16, ...
  ZONE         default: the first zone that `types` lists for the type
  BUCKET       of the runs; with hierarchical namespace, see docs/guides/several-machines.md
  NAME         of the queued resource and of its nodes (opsd)
  SLICES       more than 1: multislice, put config.mesh.data across them
  SPOT         1: cheaper, may be taken away
  VERSION      runtime; default: the usual one of the type
  EXTRAS       further extras of the package, such as wandb
  CREATE_ARGS  further options of `queued-resources create`, such as --reserved --internal-ips
  SSH_ARGS     further options of ssh and scp, such as --internal-ip or --tunnel-through-iap
  WORKER       one worker (0, 1, ...) or all. logs, ssh: 0; run, status, wait, stop: all
  NODE         slice of that worker (0)
  RESTARTS     how often a worker starts a lost command again, and `job` a lost TPU (10)
  WAIT_S       how long `create` waits (7200); the request ends then, so that no TPU comes unseen
  MAX_S        how long `wait` and `job` wait for the end of a command (86400; 0: for ever); then
               `wait --delete` and `job` stop it and give the TPU back
  POLL_S       seconds between two questions for a state (30)
  DRY_RUN      1: prints the gcloud commands and runs none

Exit codes of wait and job: 0 done, 1 failed, 42 stopped, 43 lost, 124 not done within MAX_S; after
the last three the same command continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import calls
from calls import Answer, LaunchError

FAILED, STOPPED, LOST, OVER = calls.FAILED, 42, 43, 124
_GONE = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")  # states from which no TPU comes back
_PATIENCE_S = 120  # for an answer of gcloud
_COMMAND_S = 1800  # for any other command of gcloud that nobody watches
_DELETE_S = 3600  # as long a deletion is tried again
_SILENT = 10  # so many times in a row a worker may not answer
_PACK_MB = 50  # of the checkout; without tests and documentation it has less than 5
_NO_ANSWER = -1
_ALIVE = "-oServerAliveInterval=30"  # ssh ends 90 s after its host has gone
_WORKER = "bash opsd/launch/tpu_worker.sh"


class StateUnknownError(LaunchError):
    """gcloud cannot say whether there is a TPU: no network, or no valid login."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A generation of TPUs.

    runtime: of its VMs. cores: TensorCores that a type's name counts for each chip. sizes: of
    slices, in chips. zones: in the US, for all customers; the first one is the default.
    """

    runtime: str
    cores: int
    sizes: Sequence[int]
    zones: Sequence[str]


_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)
_CUBES = (4, 8, 16, 32, *range(64, 6145, 64))
# Zones: https://cloud.google.com/tpu/docs/regions-zones, as of summer 2026.
FAMILIES = {
    "v5litepod": Family(
        "v2-alpha-tpuv5-lite",
        1,
        _FLAT,
        ("us-west4-a", "us-central1-a", "us-south1-a", "us-west1-c"),
    ),
    "v5p": Family("v2-alpha-tpuv5", 2, _CUBES, ("us-east5-a", "us-central1-a")),
    "v6e": Family(
        "v2-alpha-tpuv6e", 1, _FLAT, ("us-east5-b", "us-east5-a", "us-east1-d", "us-central1-b")
    ),
    "v4": Family("tpu-ubuntu2204-base", 2, _CUBES, ("us-central2-b",)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment asks for, checked.

    hosts: number of hosts of a slice. Arguments and lists are split into words.
    """

    name: str
    project: str
    type: str
    zone: str
    runtime: str
    hosts: int
    slices: int
    spot: bool
    bucket: str
    extras: str
    create_args: Sequence[str]
    ssh_args: Sequence[str]
    worker: str
    node: int
    restarts: int
    wait_s: int
    max_s: int
    poll_s: int
    dry: bool

    @property
    def place(self) -> list[str]:
        """Options that name the place, for every command of gcloud."""
        return [f"--zone={self.zone}", f"--project={self.project}"]

    @property
    def one_worker(self) -> bool:
        """Whether WORKER names a single one."""
        return self.worker not in ("", "all")

    @property
    def nodes(self) -> list[str]:
        """Names of the slices."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{n}" for n in range(self.slices)]


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings; LaunchError names the variable that is wrong, and what it may be."""

    def number(name: str, default: int, least: int = 0) -> int:
        return calls.number(environment, name, default, least)

    project = environment.get("PROJECT", "")
    if not project:
        raise LaunchError("PROJECT is not set: PROJECT=my-project launch/tpu_vm.sh ...")
    slices, node = number("SLICES", 1, 1), number("NODE", 0)
    if node >= slices:
        raise LaunchError(f"NODE={node}: with SLICES={slices} nodes go from 0 to {slices - 1}")
    kind, family, hosts = read_type(environment.get("TYPE") or "v5litepod-16")
    zone = environment.get("ZONE") or family.zones[0]
    if zone not in family.zones:
        print(f"note: {kind} is known in {', '.join(family.zones)}, not in {zone}", file=sys.stderr)
    worker = environment.get("WORKER", "")
    if worker not in ("", "all") and not (re.fullmatch(r"\d+", worker) and int(worker) < hosts):
        raise LaunchError(f"WORKER={worker}: a slice of {kind} has 0 to {hosts - 1}, or give all")
    bucket = environment.get("BUCKET", "").removeprefix("gs://").rstrip("/")
    if not re.fullmatch(r"[\w.-]*", bucket):
        raise LaunchError(
            f"BUCKET={bucket}: give the name of a bucket alone; folders in it belong into "
            "--workdir=runs/..."
        )
    return Settings(
        name=environment.get("NAME") or "opsd",
        project=project,
        type=kind,
        zone=zone,
        runtime=environment.get("VERSION") or family.runtime,
        hosts=hosts,
        slices=slices,
        spot=environment.get("SPOT", "0") == "1",
        bucket=bucket,
        extras=environment.get("EXTRAS", ""),
        create_args=shlex.split(environment.get("CREATE_ARGS", "")),
        ssh_args=shlex.split(environment.get("SSH_ARGS", "")),
        worker=worker,
        node=node,
        restarts=number("RESTARTS", 10),
        wait_s=number("WAIT_S", 7200),
        max_s=number("MAX_S", 86400),
        poll_s=number("POLL_S", 30),
        dry=environment.get("DRY_RUN", "0") == "1",
    )


def read_type(text: str) -> tuple[str, Family, int]:
    """(name as the API has it, family, number of hosts of a slice) of a type such as v5e-16."""
    name, _, size = text.partition("-")
    name = "v5litepod" if name == "v5e" else name
    if name not in FAMILIES or not re.fullmatch(r"\d+", size):
        raise LaunchError(
            f"TYPE={text}: give one such as v5e-16, v5p-8, v6e-16 or v4-8 (launch/tpu_vm.sh types)"
        )
    family, count = FAMILIES[name], int(size)
    if count % family.cores or count // family.cores not in family.sizes:
        sizes = [f"{name}-{chips * family.cores}" for chips in family.sizes[:9]]
        raise LaunchError(
            f"TYPE={text}: there are {', '.join(sizes)}"
            f"{', ... (TensorCores, two a chip)' if family.cores > 1 else ''}"
        )
    chips = count // family.cores
    one_host = chips <= (8 if family.sizes is _FLAT else 4)
    return f"{name}-{count}", family, 1 if one_host else chips // 4


def outcome(reports: Sequence[str]) -> int | None:
    """How the run ended, from what the workers say of it; None while it goes on.

    Args:
      reports: of each worker, as `tpu_worker.sh status` prints it after the name of the host.

    Returns:
      0, FAILED, STOPPED, or LOST: a worker knows of no command, or lost it without a code, as by a
      reboot. The others then wait for it.
    """
    found = set(reports)
    if found <= {"ended 0", "ended 42"} and found:
        return STOPPED if "ended 42" in found else 0
    if any(report.startswith("ended") for report in found - {"ended 0", "ended 42"}):
        return FAILED
    if not found or found & {"lost", "idle"}:
        return LOST
    return None


@dataclasses.dataclass(frozen=True)
class Tpu:
    """The queued resource with its nodes, of these settings.

    unattended: nobody watches: no command of gcloud may take longer than _COMMAND_S, or ask.
    """

    settings: Settings
    unattended: bool = False

    def create(self) -> None:
        """Asks for the TPU, unless that was done, and waits until it is there."""
        s = self.settings
        if s.dry or not self.state():
            shape = [f"--node-id={s.name}"]
            if s.slices > 1:
                shape = [f"--node-count={s.slices}", f"--node-prefix={s.name}"]
            self._tpus(
                ["queued-resources", "create", s.name, *shape, *s.place]
                + [f"--accelerator-type={s.type}", f"--runtime-version={s.runtime}"]
                + ["--scopes=https://www.googleapis.com/auth/cloud-platform"]
                + [f"--valid-until-duration={s.wait_s}s"]
                + (["--spot"] if s.spot else [])
                + list(s.create_args)
            )
        started = time.monotonic()
        while (now := self._state_or_why()) != "ACTIVE" and not s.dry:
            waited = time.monotonic() - started
            if now in _GONE:
                raise LaunchError(
                    f"{s.name} is {now}: launch/tpu_vm.sh delete, then create again "
                    f"(gcloud compute tpus queued-resources describe {s.name} tells why)"
                )
            if waited >= s.wait_s:
                raise LaunchError(
                    f"{s.name} is still {now or 'not there'} after {s.wait_s} s, which was the "
                    "life of the request: delete, then create, with another ZONE or a longer WAIT_S"
                )
            print(f"{s.name} is {now}; waited {waited:.0f} of {s.wait_s} s", flush=True)
            time.sleep(s.poll_s)
        if not s.dry:
            print(f"{s.name} is ACTIVE")

    def setup(self) -> None:
        """Copies and installs the checkout on all workers, and mounts the bucket there."""
        s = self.settings
        if s.one_worker:
            raise LaunchError(f"WORKER={s.worker}: setup is for all workers")
        if not s.bucket and s.slices * s.hosts > 1:
            raise LaunchError(
                f"BUCKET is not set: the {s.slices * s.hosts} hosts of {s.slices} x {s.type} keep "
                "a run in a bucket, which all of them see"
            )
        root = pathlib.Path(__file__).resolve().parents[1]
        with tempfile.TemporaryDirectory() as folder:
            pack = os.path.join(folder, "opsd.tar.gz")
            if not s.dry:
                _pack(root, pack)
            for node in s.nodes:
                target = f"{node}:opsd.tar.gz"
                options = [*s.place, *s.ssh_args, f"--scp-flag={_ALIVE}", "--worker=all"]
                self._tpus(["tpu-vm", "scp", pack, target, *options])
        extras = f"EXTRAS={shlex.quote(s.extras)} " if s.extras else ""
        self._on_workers(
            "mkdir -p opsd && tar -xzf opsd.tar.gz -C opsd && "
            f"{extras}{_WORKER} setup {s.bucket}".rstrip()
        )

    def run(self, words: Sequence[str]) -> None:
        """Starts a command on all workers, or on one."""
        s = self.settings
        if s.slices * s.hosts > 1 and s.one_worker:
            # A TPU would wait for the processes of the other hosts.
            words = ["env", "JAX_PLATFORMS=cpu", "OPSD_NUM_PROCESSES=1", *words]
        else:
            calls.refuse_on_several_hosts(
                words,
                s.slices * s.hosts,
                "WORKER=0 launch/tpu_vm.sh run -- ... starts it on that host alone, on its CPU",
            )
        self._on_workers(f"RESTARTS={s.restarts} {_WORKER} run {shlex.join(words)}")

    def status(self) -> None:
        """Prints the state of the TPU and of the run."""
        now = self.state()
        if not self.settings.dry:
            print(f"{self.settings.name} is {now or 'not there'}")
        if self.settings.dry or now == "ACTIVE":
            print(self._on_workers(f"{_WORKER} status", capture=True), end="")

    def logs(self) -> None:
        """Follows the log of a worker, or of all of a slice."""
        s = self.settings
        command = "tail -n 100 -F opsd/log.txt"
        self._tpus(self._ssh(s.nodes[s.node], s.worker or "0", command))

    def ssh(self, words: Sequence[str]) -> None:
        """A shell on a worker, or a command: one line for its shell, or several words."""
        s = self.settings
        if not words and s.worker == "all":
            raise LaunchError("WORKER=all: a shell is on one worker; give ssh -- COMMAND...")
        line = words[0] if len(words) == 1 else shlex.join(words)
        self._gcloud([self._ssh(s.nodes[s.node], s.worker or "0", line)], interactive=True)

    def stop(self) -> None:
        """All workers save, stop, and are not started again."""
        self._on_workers(f"{_WORKER} stop")

    def delete(self) -> None:
        """Gives the TPU back, and asks again until there is none.

        Raises LaunchError if there may still be one after an hour.
        """
        s, now = self.settings, ""
        command = ["queued-resources", "delete", s.name, *s.place, "--force", "--quiet"]
        tpu = dataclasses.replace(self, unattended=True)
        end = time.monotonic() + _DELETE_S
        while True:
            if now != "DELETING":
                with contextlib.suppress(LaunchError):  # gcloud has said why
                    tpu._tpus(command)
            now = self._state_or_why()
            if not now:
                if not s.dry:
                    print(f"there is no {s.name} in {s.zone} now")
                return
            if time.monotonic() >= end:
                raise LaunchError(
                    f"STILL BILLED: {s.name} in {s.zone} is {now}, and could not be deleted within "
                    f"{_DELETE_S} s. Give it back: launch/tpu_vm.sh delete, or "
                    f"https://console.cloud.google.com/compute/tpus?project={s.project}"
                )
            print(f"{s.name} is {now}, and may be billed; trying again", flush=True)
            time.sleep(s.poll_s)

    def wait(self, end: float = math.inf) -> int:
        """Waits until the run has ended: 0, FAILED, STOPPED or LOST; OVER at a monotonic time.

        Silence of a worker counts only while gcloud can say that there is a TPU: otherwise it is
        this machine that is cut off, and the run may go on well.
        """
        s, silent, noted = self.settings, 0, False
        while True:
            try:
                now, noted = self.state(), False
            except StateUnknownError as error:
                now = None
                if not noted:
                    print(f"{error}; waiting until it can be asked", flush=True)
                    noted = True
            if now in _GONE or (now == "" and not s.dry):
                print(f"{s.name} is {now or 'not there'}: the TPU was taken away")
                return LOST
            if now is not None:
                ended = self._ended()
                silent = silent + 1 if ended == _NO_ANSWER else 0
                if silent >= _SILENT:
                    print(f"{s.name} is {now}, and a worker does not answer")
                    return LOST
                if ended not in (None, _NO_ANSWER):
                    return ended
            if time.monotonic() >= end:
                print(f"{s.name}: the command has not ended within MAX_S={s.max_s} s")
                return OVER
            time.sleep(s.poll_s)

    def _ended(self) -> int | None:
        """How the run ended, which is printed; None while it goes on; _NO_ANSWER of a worker."""
        try:
            said = self._on_workers(f"{_WORKER} status", capture=True)
        except LaunchError:
            return _NO_ANSWER
        reports = re.findall(r"^worker \S+ (.+?)\s*$", said, flags=re.MULTILINE)
        ended = 0 if self.settings.dry else outcome(reports)
        if ended is not None:
            print(said, end="", flush=True)
        if ended == FAILED and "running" in reports:
            print("the other workers wait for it: launch/tpu_vm.sh stop, before the next run")
        return ended

    def end_of_waiting(self) -> float:
        """The monotonic time at which MAX_S, counted from now, are over."""
        return time.monotonic() + (self.settings.max_s or math.inf)

    def wait_and_delete(self) -> int:
        """`wait`, at most MAX_S; then gives the TPU back."""
        tpu = dataclasses.replace(self, unattended=True)
        return tpu._give_back(tpu.wait(tpu.end_of_waiting()))

    def _give_back(self, ended: int) -> int:
        """Deletes the TPU, a command that still runs being asked to save before; `ended`."""
        if ended == OVER:
            with contextlib.suppress(LaunchError):  # it hangs
                self.stop()
        self.delete()
        return ended

    def job(self, words: Sequence[str]) -> int:
        """The whole life of a run, on one TPU after another; `wait`'s code of its end."""
        return dataclasses.replace(self, unattended=True)._job(words)

    def _job(self, words: Sequence[str]) -> int:
        s, ended, end = self.settings, LOST, self.end_of_waiting()
        now = "" if s.dry else self.state()  # not known: it ends here, and has begun nothing
        for start in range(s.restarts + 1):
            try:
                if start:
                    print(f"starting again, {start} of at most {s.restarts}", flush=True)
                    now = self._known_state()
                if now == "ACTIVE":
                    self._continue(words)
                else:
                    if now in _GONE:
                        self.delete()
                    self.create()
                    self.setup()
                    self.run(words)
            except LaunchError:
                if now == "ACTIVE" and start == 0:
                    raise  # it was there before this job, and may do something else
                self.delete()
                if now != "ACTIVE":
                    raise  # it does not start on a new TPU: another one would not help
                continue  # a worker does not come back
            ended = self.wait(end)
            if ended != LOST:
                break
        return self._give_back(ended)

    def _continue(self, words: Sequence[str]) -> None:
        """Starts the command where it does not run; first installs it, if that was not done."""
        try:
            self.run(words)
        except LaunchError:
            self.setup()
            self.run(words)

    def state(self) -> str:
        """State of the queued resource; "" if there is none.

        Raises StateUnknownError if gcloud cannot say.
        """
        s = self.settings
        command = ["queued-resources", "describe", s.name, *s.place, "--format=value(state.state)"]
        for answer in self._ask([command], capture=True):
            if answer.code == 0:
                return answer.out.strip()
            if not re.search(r"\bNOT_FOUND\b", answer.err):
                lines = answer.err.strip().splitlines() or ["gcloud said nothing"]
                raise StateUnknownError(f"the state of {s.name} cannot be asked: {lines[-1]}")
        return ""

    def _state_or_why(self) -> str:
        """`state`, or "unknown (...)" with what gcloud said."""
        try:
            return self.state()
        except StateUnknownError as error:
            return f"unknown ({error})"

    def _known_state(self) -> str:
        """`state`, asked until gcloud can say; StateUnknownError after an hour."""
        end = time.monotonic() + _DELETE_S
        while True:
            try:
                return self.state()
            except StateUnknownError:
                if time.monotonic() >= end:
                    raise
            time.sleep(self.settings.poll_s)

    def _ssh(self, node: str, worker: str, command: str) -> list[str]:
        s = self.settings
        # ssh takes the first value of an option: that of SSH_ARGS, if it has one.
        options = [*s.place, *s.ssh_args, f"--ssh-flag={_ALIVE}", f"--worker={worker}"]
        return ["tpu-vm", "ssh", node, *options] + ([f"--command={command}"] if command else [])

    def _tpus(self, words: Sequence[str]) -> None:
        self._gcloud([words])

    def _on_workers(self, command: str, *, capture: bool = False) -> str:
        """A command on one worker, or at the same time on all of all slices; what they print."""
        s = self.settings
        nodes, worker = (
            (s.nodes[s.node : s.node + 1], s.worker) if s.one_worker else (s.nodes, "all")
        )
        return self._gcloud([self._ssh(node, worker, command) for node in nodes], capture=capture)

    def _gcloud(
        self,
        several: Sequence[Sequence[str]],
        *,
        capture: bool = False,
        interactive: bool = False,
    ) -> str:
        """What commands print that run at the same time; LaunchError if one fails."""
        answers = self._ask(several, capture=capture, interactive=interactive)
        if any(answer.code for answer in answers):
            for answer in answers:
                print(answer.out, answer.err, sep="", end="", file=sys.stderr)
            raise LaunchError("gcloud failed, or the command on a worker, see above")
        return "".join(answer.out for answer in answers)

    def _ask(
        self,
        several: Sequence[Sequence[str]],
        *,
        capture: bool,
        interactive: bool = False,
    ) -> list[Answer]:
        """The answers to `gcloud compute tpus ...`, all called at the same time."""
        # Only the alpha track of ssh and scp knows this option.
        commands = [
            ["gcloud", *(["alpha"] * ("--tunnel-through-iap" in words)), "compute", "tpus", *words]
            for words in several
        ]
        if self.settings.dry:
            print(*map(shlex.join, commands), sep="\n")
            return []
        limit = _PATIENCE_S if capture else _COMMAND_S if self.unattended else None
        return calls.answers(commands, capture=capture, limit_s=limit, interactive=interactive)


def _pack(root: pathlib.Path, target: str) -> None:
    """Writes an archive of what git tracks, as it is now, and of new files it does not ignore.

    Tests and documentation, nine tenths of the bytes, stay here. Raises LaunchError for more than
    _PACK_MB, which are no code.
    """
    names = subprocess.run(
        ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        + ["--", ":!tests", ":!docs"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.split(b"\0")
    there = [name for name in names if name and os.path.lexists(root / os.fsdecode(name))]
    sizes = {os.fsdecode(name): _size(root / os.fsdecode(name)) for name in there}
    if sum(sizes.values()) > _PACK_MB * 1e6:
        largest = sorted(sizes, key=sizes.get, reverse=True)[:3]
        raise LaunchError(
            f"{sum(sizes.values()) / 1e6:,.0f} MB of {root} would be copied to every host, which "
            f"is more than code has ({_PACK_MB} MB). The largest: "
            + ", ".join(f"{name} ({sizes[name] / 1e6:,.0f} MB)" for name in largest)
            + ". Move such files elsewhere, or name them in .gitignore"
        )
    command = ["tar", "-C", root, "--null", "-T", "-", "-czf", target]
    subprocess.run(command, input=b"\0".join(there), check=True)


def _size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files of a folder, which git names where it holds another one."""
    if path.is_dir() and not path.is_symlink():
        return sum(_size(inner) for inner in path.iterdir())
    return path.lstat().st_size


def _types() -> str:
    lines = []
    for name, family in FAMILIES.items():
        count = f"{name}-{family.sizes[0] * family.cores} ... {family.sizes[-1] * family.cores}"
        lines.append(f"{count:22} {family.runtime:20} {', '.join(family.zones)}")
    return "\n".join(lines)


def _after_dashes(words: Sequence[str]) -> list[str]:
    if len(words) < 2 or words[0] != "--":
        raise LaunchError("usage: launch/tpu_vm.sh run | job | ssh -- COMMAND...")
    return list(words[1:])


def main(words: Sequence[str]) -> int:
    """The command; its exit code."""
    goes_on = (
        "a TPU that was asked for stays, and is billed (launch/tpu_vm.sh status, wait --delete, "
        "delete)"
    )
    return calls.ended(_main, words, goes_on)


def _main(words: Sequence[str]) -> int:
    verb, rest = (words[0], list(words[1:])) if words else ("", [])
    if verb == "types":
        print(_types())
        return 0
    simple = ("create", "setup", "status", "logs", "stop", "delete")
    if verb not in (*simple, "run", "job", "ssh", "wait"):
        raise LaunchError(f"usage:\n{__doc__}")
    if (verb in simple and rest) or (verb == "wait" and rest not in ([], ["--delete"])):
        raise LaunchError(f"{verb} takes no {' '.join(rest)}")
    tpu = Tpu(read_settings(os.environ))
    if verb == "run":
        tpu.run(_after_dashes(rest))
    elif verb == "job":
        return tpu.job(_after_dashes(rest))
    elif verb == "ssh":
        tpu.ssh(_after_dashes(rest) if rest else [])
    elif verb == "wait":
        return tpu.wait_and_delete() if rest else tpu.wait(tpu.end_of_waiting())
    else:
        getattr(tpu, verb)()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
