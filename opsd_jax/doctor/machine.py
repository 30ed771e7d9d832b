"""Checks of devices, versions and memory."""

import glob
import importlib.metadata
import os
import platform
import re
import socket
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import jax

from opsd_jax.doctor.result import FAILED, OK, SKIPPED, Result, judge
from opsd_jax.plan import topology as topology_lib
from opsd_jax.runtime.chips import GIB

LEAST_MEMORY = 0.6  # share of the data sheet's memory; JAX takes 75 % of a free GPU's
LEAST_HOST_GIB = 2.0  # that compiling the 7B step takes, see docs/performance/plan.md
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_CUDA = ("jax-cuda12-plugin", "jax-cuda13-plugin")
# Files by which Linux offers accelerators to programs, and what makes JAX use them.
_HARDWARE = {
    "/dev/nvidia[0-9]*": 'an NVIDIA GPU: pip install -e ".[cuda]"',
    "/dev/accel[0-9]*": 'a TPU: pip install -e ".[tpu]"',
}


def devices(found: Sequence[jax.Device]) -> Iterator[Result]:
    """Kind and number of the devices of this process; fails if an accelerator is not used.

    found: `jax.local_devices()`.
    """
    kinds = sorted({device.device_kind for device in found})
    values = {
        "host": socket.gethostname(),
        "platform": found[0].platform,
        "platform_version": _platform_version(found[0]),
        "kinds": kinds,
        "local": len(found),
        "all": jax.device_count(),
        "processes": jax.process_count(),
    }
    summary = f"{len(found)} x {', '.join(kinds)} ({found[0].platform})"
    if jax.process_count() > 1:
        summary += f", {jax.device_count()} in {jax.process_count()} processes"
    if len(kinds) > 1:
        yield Result("devices", FAILED, f"{summary}: of several kinds; use one kind", values)
        return
    unused = [
        advice
        for pattern, advice in _HARDWARE.items()
        if found[0].platform == "cpu" and glob.glob(pattern)
    ]
    if unused and os.environ.get("JAX_PLATFORMS") != "cpu":
        yield Result("devices", FAILED, f"JAX runs on the CPU, but here is {unused[0]}", values)
        return
    yield Result("devices", OK, summary, values)


def _platform_version(device: jax.Device) -> str:
    """What the runtime says of itself, in one line: versions of libtpu or CUDA."""
    return " ".join(str(getattr(device.client, "platform_version", "")).split())


def versions(platform_name: str) -> Iterator[Result]:
    """Versions of Python and packages; fails if libtpu or the CUDA plugin is not that of jax.

    platform_name: "cpu", "gpu" or "tpu".
    """
    found = {name: version for name in (*_PACKAGES, *_CUDA) if (version := _version(name))}
    found = {"python": platform.python_version(), **found}
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Result("versions", OK, shown, found)
    if platform_name == "tpu":
        yield libtpu_match(found.get("libtpu"), topology_lib.wanted_libtpu())
    elif platform_name == "gpu":
        yield plugin_match({name: found[name] for name in _CUDA if name in found}, found["jaxlib"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def libtpu_match(installed: str | None, wanted: str) -> Result:
    """Whether libtpu is the one that jax asks for.

    Args:
      installed: its version; None if no such package is installed.
      wanted: jax's requirement, such as "libtpu==0.0.42.*".
    """
    values = {"installed": installed, "wanted": wanted}
    pattern = re.fullmatch(r"libtpu==(\S+)", wanted)
    if installed is None or pattern is None:
        summary = f"not compared: libtpu {installed} is installed, jax asks for {wanted}"
        return Result("versions/libtpu", SKIPPED, summary, values)
    return judge(
        "versions/libtpu",
        fnmatch(installed, pattern[1]),
        f"{installed} is what jax asks for ({wanted})",
        f"{installed} is installed, jax asks for {wanted}: pip install '{wanted}'",
        values,
    )


def plugin_match(installed: dict[str, str], jaxlib: str) -> Result:
    """Whether the CUDA plugin has the version of jaxlib.

    installed: {package: version} of the plugins that are installed.
    """
    values = {"installed": installed, "jaxlib": jaxlib}
    if not installed:
        summary = "not compared: the GPU is used by another plugin than JAX's for CUDA"
        return Result("versions/cuda", SKIPPED, summary, values)
    wrong = {name: version for name, version in installed.items() if version != jaxlib}
    several = len(installed) > 1
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    return judge(
        "versions/cuda",
        not wrong and not several,
        f"{shown} belongs to jaxlib {jaxlib}",
        f"{shown} with jaxlib {jaxlib}: install one plugin, of that version",
        values,
    )


def memory(found: Sequence[jax.Device]) -> Iterator[Result]:
    """Memory of the devices against the data sheet, and of the host.

    found: `jax.local_devices()`.
    """
    limits = [limit for device in found if (limit := memory_limit(device)) is not None]
    topology = topology_lib.of_devices(found)
    yield device_memory(limits, topology.hbm if topology else None)
    total, available = host_memory()
    values = {"total_gib": total, "available_gib": available, "cpus": os.cpu_count()}
    if total is None or available is None:
        yield Result("memory/host", SKIPPED, "this system does not say", values)
        return
    yield judge(
        "memory/host",
        found[0].platform == "cpu" or available >= LEAST_HOST_GIB,
        f"{available:.1f} of {total:.1f} GiB available, {os.cpu_count()} CPUs",
        f"{available:.1f} of {total:.1f} GiB available: compiling takes {LEAST_HOST_GIB:g} GiB",
        values,
    )


def memory_limit(device: jax.Device) -> int | None:
    """Bytes that programs may take of a device; None where it does not say, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def device_memory(limits: Sequence[int], sheet: float | None) -> Result:
    """Whether programs may take most of the devices' memory.

    Args:
      limits: bytes of each device. sheet: GiB of the data sheet; None if there is none.
    """
    if not limits:
        return Result("memory/device", SKIPPED, "the device does not say, as a CPU")
    least = min(limits) / GIB
    values = {"limits_gib": [limit / GIB for limit in limits], "sheet_gib": sheet}
    if sheet is None:
        return Result("memory/device", OK, f"{least:.1f} GiB a device, no data sheet", values)
    return judge(
        "memory/device",
        least >= LEAST_MEMORY * sheet,
        f"{least:.1f} of {sheet:g} GiB a device for programs",
        f"{least:.1f} of {sheet:g} GiB a device for programs, at least {LEAST_MEMORY:.0%} "
        "expected: another process uses it, or XLA_PYTHON_CLIENT_MEM_FRACTION is low",
        values,
    )


def host_memory() -> tuple[float | None, float | None]:
    """(total, available) GiB of the host's memory; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", file.read(), flags=re.MULTILINE))
        return int(sizes["MemTotal"]) * 1024 / GIB, int(sizes["MemAvailable"]) * 1024 / GIB
    except (OSError, KeyError):  # no Linux
        return None, None
