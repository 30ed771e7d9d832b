"""Becomes another command, on some cores, which is asked to stop when the study is gone.

  python launch.py STUDY CORES COMMAND ...

STUDY is the process id of the study. CORES are numbers separated by commas, "" for all. A small
program of its own, because the study must not run Python between fork and exec: its process may
have threads. Where a system has no prctl (it is Linux's), commands outlive a study that is killed.
"""

import ctypes
import os
import signal
import sys

_SET_PDEATHSIG = 1  # of prctl(2); it outlives exec


def main(study: int, cores: str, command: list[str]) -> None:
    """Does not return."""
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != study:  # it was killed before the line above
            sys.exit("the study is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
