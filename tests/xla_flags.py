"""XLA flags of this process and of those that tests start.

jaxlib 0.10 compiles for CPUs in less than half the time without its newer emitters of fused loops.
Later ones have no such flag, and XLA ends a process that sets a flag it does not know.
"""

import importlib.metadata

_RELEASE = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
QUICK = "--xla_cpu_use_fusion_emitters=false" if _RELEASE < (0, 11) else ""


def devices(count: int) -> str:
    """The flags of a process with `count` devices."""
    return f"--xla_force_host_platform_device_count={count} {QUICK}".strip()
