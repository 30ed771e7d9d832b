"""The C library keeps freed memory once it is asked to."""

import os
import platform
import subprocess
import sys

import pytest

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


def page_faults(*calls: str) -> list[int]:
    """Times that the system clears memory for a block of 64 MiB, allocated for the second time.

    In the main thread and in another one.
    """
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *calls],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in ran.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing here")
def test_freed_memory_is_used_again():
    ordinary, own, shared = page_faults(), page_faults("keep"), page_faults("share", "keep")
    assert 10 * own[0] < ordinary[0]
    assert 10 * own[1] > ordinary[1]  # a thread with an arena of its own hands it back
    assert 10 * shared[0] < ordinary[0] and 10 * shared[1] < ordinary[1]
