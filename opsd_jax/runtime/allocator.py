"""How this process's C library keeps memory."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# Parameters of mallopt(3), malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_LARGEST_THRESHOLD = 1 << 25  # up to which the library itself raises that for mmap

_keeps = False  # whether `keep_freed_memory` was called


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
    global _keeps
    _keeps = True
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


@contextlib.contextmanager
def returning_blocks(size: int) -> Iterator[None]:
    """Hands blocks of at least `size` bytes back to the system as soon as they are freed.

    By default the library keeps freed blocks of up to 32 MiB: buffers of the pieces of a checkpoint
    would stay beside its arrays, more than half as much again. What is kept of smaller blocks is
    handed back at the end, and then the library keeps what it would have kept before long. Does
    nothing after `keep_freed_memory`, and where the C library is not GNU's.
    """
    if _keeps or platform.libc_ver()[0] != "glibc":
        yield
        return
    _set({_M_MMAP_THRESHOLD: size})
    try:
        yield
    finally:
        # A threshold that was set no longer rises by itself, and nor does that for trimming.
        _set({_M_MMAP_THRESHOLD: _LARGEST_THRESHOLD, _M_TRIM_THRESHOLD: 2 * _LARGEST_THRESHOLD})
        ctypes.CDLL(None).malloc_trim(0)


def _set(parameters: dict[int, int]) -> None:
    """Sets parameters of mallopt(3)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
