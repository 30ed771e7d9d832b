"""The wall time of a run by phase, and the programs that XLA compiled.

`jax.monitoring` reports each compilation with its duration, on the thread that compiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# What phases of a run count as in the shares of its time; all others are "other".
SHARES = {
    "sample": "steps",
    "update": "steps",
    "compile": "compile",
    "data": "input",
    "checkpoint": "checkpoint",
    "eval": "eval",
}
_COMPILED = "/jax/core/compile/backend_compile_duration"


class TooManyCompilesError(RuntimeError):
    """A function is compiled again and again, instead of once for each bucket of shapes."""


class Clock:
    """What the wall time of a run was spent on.

        clock = Clock()
        with clock("update"):           3 s, of which XLA compiled 1 s: update 2.0, compile 1.0
            with clock("checkpoint"):   0.5 s of them: update 1.5, checkpoint 0.5

    The time of an inner phase is subtracted from the outer one, so phases add up to the total; time
    outside of all phases is `other`. XLA compilation on the thread that made the clock counts as
    `compile`, in whichever phase it happens. JAX returns before the device is done: the device's
    time counts to the phase that waits for it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._began = now, now()
        self._seconds: dict[str, float] = {}
        self._reported: dict[str, float] = {}  # seconds by share at the last call of `shares`
        self._inner = [0.0]  # seconds that belong to inner phases, for each open phase
        self_ref = weakref.ref(self)

        def compiled(seconds: float) -> None:
            if clock := self_ref():
                clock._spend("compile", seconds)
                clock._inner[-1] += seconds

        weakref.finalize(self, _listen(compiled))

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the time within the block under `phase`: sample, update, data, eval, ...

        Where the run is traced (`profile.Profile`), the block is in the trace under that name.
        """
        began = self._now()
        self._inner.append(0.0)
        try:
            with jax.profiler.TraceAnnotation(phase):  # in a trace of the run
                yield
        finally:
            elapsed = self._now() - began
            self._spend(phase, elapsed - self._inner.pop())
            self._inner[-1] += elapsed

    def report(self) -> dict[str, float]:
        """Seconds of each phase, longest first, then `other` and `total`, their sum.

        The time of phases that are still open counts as `other`.
        """
        total = self._now() - self._began
        phases = dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
        return phases | {
            "other": total - sum(phases.values()) + phases.get("other", 0.0),
            "total": total,
        }

    def shares(self) -> dict[str, float]:
        """Shares of the wall time since the last call, for the metrics; they add up to 1.

        Returns:
          {"time/steps", "time/compile", "time/input", "time/checkpoint", "time/eval",
          "time/other"}, and "goodput": the share of "steps" in all time of this process.
        """
        seconds, now = self.report(), dict.fromkeys([*SHARES.values(), "other"], 0.0)
        total = seconds.pop("total")
        for phase, spent in seconds.items():
            now[SHARES.get(phase, "other")] += spent
        since = {name: spent - self._reported.get(name, 0.0) for name, spent in now.items()}
        self._reported, elapsed = now, sum(since.values())
        found = {
            f"time/{name}": spent / elapsed if elapsed else 0.0 for name, spent in since.items()
        }
        return found | {"goodput": now["steps"] / total if total else 0.0}

    def _spend(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


def waiting(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the time of steps in which the device waited for the host.

    For input, a checkpoint, or whatever else the host did between steps. Compilation and evaluation
    are left out, and so are records during which a program was compiled.

    Args:
      records: of metrics.jsonl, with what `Clock.shares` returns.
    Returns:
      None if no record says.
    """
    waited = worked = 0.0
    logged = [record for record in records if "time/steps" in record]
    for before, record in itertools.pairwise(logged):
        if record["time/compile"] > 0:
            continue
        seconds = record["time"] - before["time"]
        waited += seconds * sum(record[f"time/{name}"] for name in ("input", "checkpoint", "other"))
        worked += seconds * record["time/steps"]
    return waited / (waited + worked) if worked > 0 else None


def added(report: Mapping[str, float], earlier: Mapping[str, float]) -> dict[str, float]:
    """A report of a continued run, with what the commands before reported, phase by phase."""
    phases = {
        phase: report.get(phase, 0.0) + earlier.get(phase, 0.0) for phase in {**report, **earlier}
    }
    last = {phase: phases.pop(phase) for phase in ("other", "total")}
    return dict(sorted(phases.items(), key=lambda item: -item[1])) | last


def table(report: Mapping[str, float]) -> str:
    """A report as text: seconds and per cent of the wall time, a line for each phase."""
    share = 100 / report["total"] if report["total"] else 0.0
    width = max(map(len, report))
    return "\n".join(
        f"{phase:<{width}} {seconds:10.1f} s {seconds * share:6.1f} %"
        for phase, seconds in report.items()
    )


@dataclasses.dataclass
class Compilations:
    """What XLA compiled in a block.

    Attributes:
      programs: number of programs, those read from the compilation cache included.
      seconds: time that compiling (or reading) them took.
    """

    programs: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts what XLA compiles on this thread while the block runs.

    with compilations() as compiled:
        sample(params, context, key)
    first_call = compiled.programs > 0
    """
    found = Compilations()

    def compiled(seconds: float) -> None:
        found.programs += 1
        found.seconds += seconds

    stop = _listen(compiled)
    try:
        yield found
    finally:
        stop()


class CompileGuard:
    """Raises when a jitted function is compiled for more signatures than it has buckets.

    A shape that is not padded to a bucket costs minutes of compilation per step, without an error.
    """

    def __init__(self):
        self._limits: dict[str, int] = {}
        self._programs: dict[str, int] = {}

    def watch(self, name: str, function: Callable[..., Any], limit: int) -> Callable[..., Any]:
        """The function, with the programs counted that its calls compile.

        Args:
          name: name of the function, in metrics and in the error.
          function: a jitted function. Only calls of the returned function are counted.
          limit: number of programs that it may need.
        """
        self._limits[name], self._programs[name] = limit, 0

        @functools.wraps(function)
        def watched(*arguments, **named):
            with compilations() as compiled:
                result = function(*arguments, **named)
            self._programs[name] += compiled.programs
            return result

        return watched

    def check(self) -> dict[str, int]:
        """`{"compiles": total, "compiles/<name>": programs of each function}`, for the metrics.

        Raises:
          TooManyCompilesError: a function exceeds its limit.
        """
        counts, limits = self._programs, self._limits
        if over := [name for name, count in counts.items() if count > limits[name]]:
            each = ", ".join(f"{name} {counts[name]} times, limit {limits[name]}" for name in over)
            raise TooManyCompilesError(
                f"compiled too often: {each}. The arguments change in shape, dtype, weak type, "
                "sharding or static value. JAX_EXPLAIN_CACHE_MISSES=1 shows which: pad them to the "
                "buckets and place them alike, or allow more buckets"
            )
        return {
            "compiles": sum(counts.values()),
            **{f"compiles/{name}": count for name, count in counts.items()},
        }


def _listen(compiled: Callable[[float], None]) -> Callable[[], None]:
    """Calls `compiled(seconds)` for each program compiled on this thread; returns what ends
    that."""
    thread = threading.get_ident()

    def listen(event: str, seconds: float, **_) -> None:
        if event == _COMPILED and threading.get_ident() == thread:
            compiled(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return functools.partial(jax.monitoring.unregister_event_duration_listener, listen)
