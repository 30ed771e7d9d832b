"""The C library keeps freed memory once it is asked to."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from opsd_jax.runtime import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(64 * 2**20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
faults()
print(faults())
"""


def page_faults(how: str) -> int:
    """Times that the system clears memory for a block of 64 MiB, allocated for the second time."""
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing here")
def test_freed_memory_is_used_again():
    assert 10 * page_faults("keep") < page_faults("no")
