"""The result of a check, and how checks are run one after the other."""

import contextlib
import dataclasses
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
_EVERY = 20  # seconds between two lines about a check that is running


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check found.

    name: of the check, with its part after a slash: "files/rename".
    status: OK, FAILED or SKIPPED.
    summary: one line: what was measured, what is wrong and how to fix it, or why it was skipped.
    values: what was measured, for JSON; units are in the names.
    """

    name: str
    status: str
    summary: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class SkipError(Exception):
    """A check, or the rest of it, does not apply here; the message says why."""


Check = Callable[[], Iterator[Result]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long measurements may take.

    end: time (of `time.monotonic`) after which no further measurement starts.
    measurement: seconds of repeated runs of one program.
    """

    end: float
    measurement: float

    def left(self) -> float:
        """Seconds until `end`; negative after it."""
        return self.end - time.monotonic()

    def check(self, seconds: float = 0.0) -> None:
        """Raises SkipError unless so many seconds are left."""
        if self.left() <= seconds:
            raise SkipError("the time of the command is used up: measure it alone with --only")


def judge(name: str, holds: bool, good: str, bad: str, values: Mapping[str, Any]) -> Result:
    """OK with the summary `good` if `holds`, else FAILED with `bad`."""
    return Result(name, OK if holds else FAILED, good if holds else bad, values)


def run(checks: Mapping[str, Check]) -> list[Result]:
    """The results of all checks, in order.

    A check that raises SkipError is skipped. One that raises anything else has failed, with the
    first line of its message; the others still run.
    """
    found: list[Result] = []
    for name, check in checks.items():
        with _announced(name):
            try:
                found.extend(check())
            except SkipError as reason:
                found.append(Result(name, SKIPPED, str(reason)))
            except Exception as error:  # whatever a driver, compiler or file system raises
                said = (str(error).strip() or "without a message").splitlines()[0]
                found.append(Result(name, FAILED, f"{type(error).__name__}: {said}"))
        gc.collect()  # of a check that raised, arrays on the device
    return found


@contextlib.contextmanager
def _announced(name: str) -> Iterator[None]:
    """Says on stderr that a check runs, at its start and every `_EVERY` seconds."""
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(_EVERY):
            _say(f"doctor: {name}, for {time.monotonic() - began:.0f} s")

    _say(f"doctor: {name}")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def seconds_of(call: Callable[[], Any], budget: float, most: int = 5) -> float:
    """Median seconds of a call until its result is ready, after one call that does not count.

    Args:
      call: what is timed.
      budget: seconds after which it is not called again. It is timed at least once.
      most: calls that are timed.
    """
    jax.block_until_ready(call())
    times: list[float] = []
    while not times or (len(times) < most and sum(times) < budget):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def holds(results: Sequence[Result]) -> bool:
    """Whether all checks that ran hold."""
    return all(result.status != FAILED for result in results)
