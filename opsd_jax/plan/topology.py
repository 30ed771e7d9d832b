"""Slices of TPU chips that a program can be compiled for without having them."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from opsd_jax.runtime.chips import CHIPS, GPUS, Chip

DCN = 6.25e9  # bytes per second and chip between slices, over the data-centre network


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices.

    family: a key of `CHIPS` or `GPUS`, or "cpu". grid: number of chips along each axis of a slice.
    """

    family: str
    grid: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip | None:
        """The data sheet; None for a CPU."""
        return (CHIPS | GPUS).get(self.family)

    @property
    def name(self) -> str:
        """Name of a slice, as libtpu spells it: v5p:2x2x2."""
        return f"{self.family}:{'x'.join(map(str, self.grid))}"

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.grid) * self.slices

    @property
    def devices(self) -> int:
        """Number of devices of all slices."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def hbm(self) -> float | None:
        """GiB per device; None for a CPU, which has no bound of its own."""
        return self.chip.hbm if self.chip else None

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes of the torus are closed: full cubes of 4 in three dimensions, 16 in two."""
        closed = (
            self.chip is not None and self.chip.axes == 3 and all(n % 4 == 0 for n in self.grid)
        ) or self.grid == (16, 16)
        return (closed,) * len(self.grid) + (False,) * (3 - len(self.grid))


def of_a_host(topology: Topology, devices: Sequence[jax.Device]) -> tuple[Topology, int]:
    """(the first host of a slice as a slice of its own, number of hosts).

    A program of one host is compiled for the former: libtpu 0.0.50 refuses one for some devices of
    a larger slice, whose numbers are not 0, 1, 2 and so on.

    devices: those of the whole topology.
    """
    hosts = {device.process_index for device in devices}
    if topology.chip is None or len(hosts) == 1:
        return topology, 1
    own = [d.coords for d in devices if d.process_index == devices[0].process_index]
    grid = tuple(max(along) - min(along) + 1 for along in zip(*own))
    return Topology(topology.family, grid[: len(topology.grid)]), len(hosts)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Topology from v5p:2x2x2 (chips along each axis), v5p-16 (as clouds name it) or cpu:8.

    Names of v4, v5p and tpu7x count TensorCores, two per chip: v5p-16 is 8 chips. Names of v5e and
    v6e count chips. Raises ValueError, which says what is possible.
    """
    choices = f"use FAMILY:GRID or FAMILY-COUNT with FAMILY of {', '.join(CHIPS)}, or cpu:N"
    match = re.fullmatch(r"(\w+)([:-])(\d+(?:x\d+)*)", text)
    if not match or slices < 1:
        raise ValueError(
            f"--topology={text!r} with --slices={slices}: {choices}, and at least one slice"
        )
    name, mark, sizes = match.groups()
    family = next((key for key, chip in CHIPS.items() if name in (key, *chip.aliases)), name)
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
    grids = _usual_grids(chip.axes)
    chips = grid[0] / chip.cores
    if len(grid) > 1 or chips not in grids:
        names = ", ".join(f"{family}-{n * chip.cores}" for n in sorted(grids))
        raise ValueError(
            f"--topology={text!r}: {family} comes as {names}"
            f"{' (TensorCores, two a chip)' if chip.cores > 1 else ''}; or name its grid, "
            f"{family}:..."
        )
    return Topology(family, grids[int(chips)], slices)


def of_devices(devices: Sequence[jax.Device]) -> Topology | None:
    """The topology of devices that are here, as one axis; None where no data sheet is known.

    devices: of one kind, all in one slice or machine.
    """
    for family, chip in (CHIPS | GPUS).items():
        if devices[0].device_kind in chip.kinds:
            return Topology(family, (max(len(devices) // chip.devices, 1),))
    return None


@functools.cache
def _usual_grids(axes: int) -> dict[int, tuple[int, ...]]:
    """{number of chips: grid} of the slices that clouds offer.

    Each doubling makes the shortest axis longer, the last one first.
    """
    grid = [1] * axes if axes == 2 else [2, 2, 1]
    largest = 256 if axes == 2 else 4096
    found = {math.prod(grid): tuple(grid)}
    while math.prod(grid) < largest:
        shortest = max(n for n in range(axes) if grid[n] == min(grid))
        grid[shortest] *= 2
        found[math.prod(grid)] = tuple(grid)
    found.pop(2, None)
    return found


def devices_of(topology: Topology) -> list[jax.Device]:
    """Devices to compile for, slice by slice. They hold no arrays.

    Needs a process in which no JAX backend has started. Raises ValueError if libtpu is missing or
    does not know the slice.
    """
    # Nothing here runs on an accelerator, and a program must not wait for one that is in use.
    jax.config.update("jax_platforms", "cpu")
    if topology.family == "cpu":
        return _cpu_devices(topology.devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(_missing_libtpu())
    _configure_libtpu()
    # A program compiled for absent devices can be written to the cache but not be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    options = {"wrap": topology.wrap, "num_slices": topology.slices}
    if topology.chip.cores > topology.chip.devices:
        options["chip_config_name"] = "megacore"
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


def _cpu_devices(count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend has started already
        pass
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(
            f"--topology=cpu:{count} needs a process of its own: JAX already runs with "
            f"{len(devices)} devices"
        )
    return devices[:count]


def _configure_libtpu() -> None:
    """Environment variables with which libtpu looks for no TPU and writes no logs."""
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)


def wanted_libtpu() -> str:
    """The requirement of the installed jax for libtpu, such as "libtpu==0.0.42.*"."""
    wanted = [
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("jax") or ()
        if requirement.startswith("libtpu")
    ]
    return wanted[0] if wanted else "libtpu"


def _missing_libtpu() -> str:
    """What to install to compile for a TPU."""
    return (
        "compiling for a TPU needs its compiler, libtpu, which is not installed here. No TPU is "
        "needed:\n"
        f"    pip install '{wanted_libtpu()}'\n"
        f"is the version that jax {importlib.metadata.version('jax')} asks for (Linux x86-64, some "
        "200 MB). Without it, --topology=cpu:8 compiles for fake devices."
    )
