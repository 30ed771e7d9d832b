"""Numbers of bytes in messages: the memory of this process, and how a size is written."""

import re
import resource
import sys


def peak() -> int:
    """The most host memory, in bytes, that this process has held so far."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) << 10
    except OSError:  # not Linux; macOS counts bytes, the other systems KiB
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used << 10


def format_bytes(count: int) -> str:
    """A number of bytes in MiB or GiB, human-readable."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"
