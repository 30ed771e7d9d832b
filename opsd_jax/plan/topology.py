"""TPU chips and slices."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

GIB = 2**30
UTILIZATION = 0.5  # share of the peak that matrix products are assumed to reach


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of TPUs, for each device that JAX sees (half a chip on tpu7x).

    hbm: GiB that libtpu lets a program have. flops: bfloat16 peak a second. bandwidth: HBM, bytes a second.
    link: one ICI link one way, bytes a second. axes: of the torus. counted: what a name like v5p-16 counts for each
    chip. devices: of a chip. Sources: Google's pages of the generations; hbm as libtpu 0.0.42 enforces it.
    """

    hbm: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    counted: int = 1
    devices: int = 1


CHIPS = {
    "v4": Chip(30.75, 275e12, 1.2e12, 4.5e10, 3, counted=2),
    "v5e": Chip(15.75, 197e12, 8.1e11, 4.5e10, 2),
    "v5p": Chip(95.74, 459e12, 2.77e12, 9e10, 3, counted=2),
    "v6e": Chip(31.25, 918e12, 1.64e12, 9e10, 2),
    "tpu7x": Chip(94.75, 1153e12, 3.69e12, 9e10, 3, counted=2, devices=2),
}
DCN = 6.25e9  # bytes a second and chip between slices
_OTHER_NAMES = {"v5litepod": "v5e", "7x": "tpu7x", "v7x": "tpu7x"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices. family: a key of CHIPS, or "cpu". grid: chips along each axis of a slice."""

    family: str
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}:{'x'.join(map(str, self.grid))}"

    @property
    def chips(self) -> int:
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * (CHIPS[self.family].devices if self.family in CHIPS else 1)

    @property
    def hbm(self) -> float | None:
        """GiB a device; None for a CPU, which has no bound of its own."""
        return CHIPS[self.family].hbm if self.family in CHIPS else None

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of the torus are closed: full cubes of 4 in three dimensions, 16 in two."""
        closed = (
            CHIPS[self.family].axes == 3 and all(n % 4 == 0 for n in self.grid)
        ) or self.grid == (16, 16)
        return (closed,) * len(self.grid) + (False,) * (3 - len(self.grid))


def parse_topology(text: str, slices: int = 1) -> Topology:
    """v5p:2x2x2 (chips along each axis), v5p-16 (as clouds name it), cpu:8. ValueError that says what is possible.

    Names of v4, v5p and tpu7x count TensorCores, two a chip: v5p-16 is 8 chips. Names of v5e and v6e count chips.
    """
    choices = f"use FAMILY:GRID or FAMILY-COUNT with FAMILY of {', '.join(CHIPS)}, or cpu:N"
    match = re.fullmatch(r"(\w+)([:-])(\d+(?:x\d+)*)", text)
    if not match or slices < 1:
        raise ValueError(
            f"--topology={text!r} with --slices={slices}: {choices}, and at least one slice"
        )
    family, mark, sizes = match.groups()
    family = _OTHER_NAMES.get(family, family)
    grid = tuple(map(int, sizes.split("x")))
    if family == "cpu" and len(grid) == 1 and grid[0] > 0 and slices == 1:
        return Topology("cpu", grid)
    if family not in CHIPS:
        raise ValueError(
            f"--topology={text!r}: {choices}{'; a CPU has one slice' if family == 'cpu' else ''}"
        )
    chip = CHIPS[family]
    if mark == ":":
        if len(grid) != chip.axes or min(grid) < 1:
            raise ValueError(
                f"--topology={text!r}: {family} has a grid of {chip.axes} axes, such as "
                f"{family}:{'x'.join(['2'] * chip.axes)}"
            )
        return Topology(family, grid, slices)
    chips = grid[0] / chip.counted
    if len(grid) > 1 or chips not in _sizes(chip.axes):
        names = ", ".join(f"{family}-{n * chip.counted}" for n in sorted(_sizes(chip.axes)))
        raise ValueError(
            f"--topology={text!r}: {family} comes as {names}"
            f"{' (TensorCores, two a chip)' if chip.counted > 1 else ''}; or name its grid, {family}:..."
        )
    return Topology(family, _sizes(chip.axes)[int(chips)], slices)


@functools.cache
def _sizes(axes: int) -> dict[int, tuple[int, ...]]:
    """Chips of a slice -> its usual grid: each doubling makes the shortest axis longer, the last one first."""
    grid = [1] * axes if axes == 2 else [2, 2, 1]
    largest = 256 if axes == 2 else 4096
    found = {math.prod(grid): tuple(grid)}
    while math.prod(grid) < largest:
        shortest = max(n for n in range(axes) if grid[n] == min(grid))
        grid[shortest] *= 2
        found[math.prod(grid)] = tuple(grid)
    found.pop(2, None)
    return found


def devices_of(topology: Topology) -> list:
    """Devices to compile for, slice by slice. They hold no arrays. Needs a process without a started JAX backend."""
    # Nothing here runs on an accelerator, and a program must not be held up by one that is in use.
    jax.config.update("jax_platforms", "cpu")
    if topology.family == "cpu":
        _start_cpu(topology.devices)
        return jax.devices()[: topology.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(missing_libtpu())
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    # A program compiled for absent devices can be written to the cache but not be read back.
    jax.config.update("jax_enable_compilation_cache", False)

    options = {"wrap": topology.wrap, "num_slices": topology.slices}
    if topology.family in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # two TensorCores as one device
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except Exception as error:  # libtpu raises its own types
        raise ValueError(
            f"libtpu knows no slice {topology.name}: {str(error).splitlines()[0]}"
        ) from error
    return sorted(found, key=lambda device: (getattr(device, "slice_index", 0), device.id))


def _start_cpu(count):
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend is there already
        pass
    if len(jax.devices()) < count:
        raise ValueError(
            f"--topology=cpu:{count} needs a process of its own: JAX already runs with "
            f"{len(jax.devices())} devices"
        )


def missing_libtpu() -> str:
    """What to install to compile for a TPU."""
    wanted = [
        r.split(";")[0] for r in importlib.metadata.requires("jax") or () if r.startswith("libtpu")
    ]
    wants = wanted[0] if wanted else "libtpu"
    return (
        "compiling for a TPU needs its compiler, libtpu, which is not installed here. No TPU is needed:\n"
        f"    pip install '{wants}'\n"
        f"is the version that jax {importlib.metadata.version('jax')} asks for (Linux x86-64, some 200 MB). "
        "Without it, --topology=cpu:8 compiles for fake devices."
    )
