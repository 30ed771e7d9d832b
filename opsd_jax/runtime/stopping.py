"""Stopping where nothing is lost: a run that is asked to stop finishes its step and saves.

It then ends with exit code 42 (`distributed.EXIT_STOPPED`), and the same command continues it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from opsd_jax.runtime import distributed

# What long work calls before each of its batches: `StopRequest.check`, which raises Stopped if the
# process was asked to stop, or `never_stop`.
BeforeBatch = Callable[[], None]


def never_stop() -> None:
    """The `BeforeBatch` of work that always continues to its end."""


class Stopped(SystemExit):
    """The process was asked to stop and does so, with code 42.

    What it did is saved, and the same command continues.
    """

    def __init__(self):
        super().__init__(distributed.EXIT_STOPPED)


class StopRequest:
    """Whether the process was asked to stop; see `install_sigterm`.

    As a context manager it restores the signal handlers at the end.

    Attributes:
      is_set: whether a signal came.
      promise: what the log message at the signal says will happen. Set it where the next phase of
        the work begins, so that it is true.
    """

    def __init__(self):
        self.is_set = False
        self.promise = "stopping before the next step"
        self._asked = 0
        self._previous = {}

    def reached(self) -> bool:
        """Whether to save and stop now.

        All processes of a run get the same answer if they ask equally often.
        """
        if jax.distributed.is_initialized():
            # Not the step: the processes stop at the number after the largest that one has asked
            # for. If a signal comes before the first question that is 1, which is below the steps
            # of a continued run.
            self._asked += 1
            self.is_set |= multihost_utils.reached_preemption_sync_point(self._asked)
        return self.is_set

    def check(self) -> None:
        """Raises Stopped if it is time to stop.

        To be called between batches, by all processes equally often.
        """
        if self.reached():
            raise Stopped

    def restore(self) -> None:
        """Restores the signal handlers that were installed before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_) -> None:
        self.restore()


def install_sigterm() -> StopRequest:
    """Lets a program end between two steps or batches when it is asked to stop.

    SIGTERM (preemption) and the first SIGINT (Ctrl-C) set the request that the loops poll; a second
    SIGINT raises KeyboardInterrupt. In a run of several processes JAX's own SIGTERM service stays
    in charge, because the processes must agree on the step: poll `StopRequest.reached()` or
    `StopRequest.check()`, which cover both. A program that never polls is not stopped. Outside of
    the main thread Python allows no handlers: the request is then never set, and a warning says so.
    """
    request = StopRequest()

    def handle(number, frame):
        if number == signal.SIGINT and request.is_set:
            raise KeyboardInterrupt
        request.is_set = True
        logging.warning(
            "%s: %s%s",
            signal.Signals(number).name,
            request.promise,
            " (again to abort at once)" if number == signal.SIGINT else "",
        )

    if threading.current_thread() is not threading.main_thread():
        logging.warning(
            "not in the main thread: SIGTERM and Ctrl-C will not save a checkpoint first"
        )
    elif not jax.distributed.is_initialized():
        request._previous = {
            number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
    return request


@contextlib.contextmanager
def stoppable(again: str) -> Iterator[StopRequest]:
    """The stop request of a command that works batch by batch.

    Args:
      again: what the same command does next time, for the message.
    """
    with install_sigterm() as stop:
        stop.promise = "stopping after this batch"
        try:
            yield stop
        except Stopped:
            print(f"stopped as asked; {again}", file=sys.stderr)
            raise
