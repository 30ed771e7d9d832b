"""How this process's C library keeps memory."""

import ctypes
import platform

# Parameters of mallopt(3), malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Keeps freed memory for later use instead of handing it back to the system.

    XLA programs on CPUs allocate their temporary buffers anew at every call. By default such large
    blocks come from the system and go back to it, so that every step waits for the system to clear
    their pages. From this call on the process keeps the most memory that it ever used. Does nothing
    where the C library is not GNU's.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)  # else each thread allocates from a small arena of its own
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
