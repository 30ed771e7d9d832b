"""The C library keeps freed memory, or hands it back, once it is asked to."""

import os
import platform
import subprocess
import sys

import pytest

# Buffers as of pieces of a checkpoint: several at a time, then the next ones. Prints what of them
# is still in memory at the end.
PIECES = """
import sys
import numpy as np
from opsd_jax.runtime import allocator

def resident():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096 >> 20

def read():
    for _ in range(3):
        buffers, kept = [], []
        for _ in range(8):
            buffers.append(np.ones(16 * 2**20, np.uint8))
            kept.append(np.ones(2**16, np.uint8))  # so that a freed block is not the heap's last
    return kept

if "keep" in sys.argv:
    allocator.keep_freed_memory()
before = resident()
if "return" in sys.argv:
    with allocator.returning_blocks(8 * 2**20):
        kept = read()
else:
    kept = read()
print(resident() - before)
"""
PROGRAM = """
import resource, sys, threading
import numpy as np
from opsd_jax.runtime import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 * 2**20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def measure():
    faults()
    print(faults())

if "share" in sys.argv:
    allocator.share_one_arena()
if "keep" in sys.argv:
    allocator.keep_freed_memory()
measure()
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


def printed(program: str, *calls: str) -> list[int]:
    """The numbers that a program prints."""
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", program, *calls],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in ran.stdout.split()]


def page_faults(*calls: str) -> list[int]:
    """Times that the system clears memory for a block of 64 MiB, allocated for the second time.

    In the main thread and in another one.
    """
    return printed(PROGRAM, *calls)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing here")
def test_freed_memory_is_used_again():
    ordinary, own, shared = page_faults(), page_faults("keep"), page_faults("share", "keep")
    assert 10 * own[0] < ordinary[0]
    assert 10 * own[1] > ordinary[1]  # a thread with an arena of its own hands it back
    assert 10 * shared[0] < ordinary[0] and 10 * shared[1] < ordinary[1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing here")
def test_freed_blocks_are_handed_back():
    """MiB of 128 that stay: by default, where they are handed back, and where all are kept."""
    (default,), (returned,), (kept,) = (
        printed(PIECES, *calls) for calls in ((), ("return",), ("return", "keep"))
    )
    assert default > 100 and returned < 20 and kept > 100, (default, returned, kept)
