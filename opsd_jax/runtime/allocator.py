"""How this process's C library keeps memory."""

import ctypes
import platform

# Parameters of mallopt(3), malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def share_one_arena() -> None:
    """Makes threads that start from now on allocate from the process's main arena.

    By default each thread has an arena of its own, which hands every large block that is freed back
    to the system, whatever `keep_freed_memory` says. Does nothing where the C library is not GNU's.
    """
    _set({_M_ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """Keeps freed memory for later use instead of handing it back to the system.

    XLA programs on CPUs allocate their temporary buffers anew at every call. By default such large
    blocks come from the system and go back to it, so that every step waits for the system to clear
    their pages. From this call on the process keeps the most memory that it ever used. This holds
    for threads that started after `share_one_arena`. Does nothing where the C library is not GNU's.
    """
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def _set(parameters: dict[int, int]) -> None:
    """Sets parameters of mallopt(3)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
