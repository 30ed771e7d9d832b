"""What the jobs of a study share: the cores of this machine, or its devices.

On CPUs each job has cores of its own: two small programs that both spread over all cores wait for
each other at every matrix product. An accelerator belongs to one process. GPUs are divided by
CUDA_VISIBLE_DEVICES; on TPUs one job at a time has all chips of the host.
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

_PRINT_DEVICES = (
    "import jax; print('devices', jax.default_backend(), jax.local_device_count(), flush=True)"
)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Place for one job at a time.

    Attributes:
      cores: the cores that it may use; () for all.
      environment: variables that its process has in addition.
    """

    cores: tuple[int, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def divide(parallel: int, configs: Sequence[ConfigDict]) -> list[Slot]:
    """The slots of a study on this machine.

    Args:
      parallel: number of slots; 0 for one per core, or as many as the devices are enough for.
      configs: settings of the runs, whose `mesh` says how many devices a job needs.
    Raises:
      ValueError: more slots than devices, or several on TPUs. RuntimeError: JAX finds no device.
    """
    backend, count = devices()
    if backend == "cpu":
        return of_cores(parallel, _cores())
    sizes = [tuple(config.mesh.values()) for config in configs]
    needed = max(count if -1 in size else math.prod(size) for size in sizes)
    return of_devices(parallel, backend, count, needed)


def devices() -> tuple[str, int]:
    """(backend, number of devices) of JAX here, asked in a process that frees them again."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu", 0
    command = [sys.executable, "-c", _PRINT_DEVICES]
    asked = subprocess.run(command, capture_output=True, text=True)
    found = [line.split() for line in asked.stdout.splitlines() if line.startswith("devices ")]
    if asked.returncode or not found:
        why = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"JAX finds no device: {why}")
    return found[0][1], int(found[0][2])


def of_cores(parallel: int, cores: Sequence[int | None]) -> list[Slot]:
    """Slots that share the cores; None for each core where the system lets nobody choose."""
    count = parallel or len(cores)
    if None in cores or count > len(cores):
        return [Slot() for _ in range(count)]
    chosen = [core for core in cores if core is not None]
    return [Slot(tuple(chosen[n::count])) for n in range(count)]


def of_devices(parallel: int, backend: str, count: int, needed: int) -> list[Slot]:
    """Slots of accelerators.

    count: number of devices. needed: number that a job needs.
    """
    if backend != "gpu":
        if parallel > 1:
            raise ValueError(
                f"config.parallel is {parallel}, but on {backend} one job at a time has all "
                "devices: set it to 1, or 0"
            )
        return [Slot()]
    slots = parallel or max(count // needed, 1)
    if slots > count:
        raise ValueError(f"config.parallel is {slots} with {count} devices: give at most {count}")
    if slots == 1:
        return [Slot()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    names, each = visible.split(","), count // slots
    return [
        Slot(environment={"CUDA_VISIBLE_DEVICES": ",".join(names[n * each : (n + 1) * each])})
        for n in range(slots)
    ]


def _cores() -> Sequence[int | None]:
    """Cores that this process may use; None for each where the system lets nobody choose."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * (os.cpu_count() or 1)
