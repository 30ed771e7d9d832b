"""Where the time of a run went, and how many programs were compiled."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import jax


class TooManyCompilesError(RuntimeError):
    """A function is compiled again and again, instead of once for each bucket of shapes."""


class Clock:
    """What the wall time went into.

        clock = Clock()
        with clock("update"):           update 3 s, of which XLA compiled 1 s  ->  update 2.0, compile 1.0
            with clock("checkpoint"):   0.5 s inside                           ->  update 1.5, checkpoint 0.5

    An inner phase is subtracted from the outer one, so phases add up to the total; what is in none
    is `other`. XLA compilation on this thread counts as `compile`, in whichever phase it happens.
    JAX returns before the device is done: the device's time falls to the phase that waits for it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._began = now, now()
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds that belong to inner phases, for each open phase
        thread, self_ref = threading.get_ident(), weakref.ref(self)

        def listen(event: str, seconds: float, **_) -> None:
            if (
                event == "/jax/core/compile/backend_compile_duration"
                and threading.get_ident() == thread
                and (clock := self_ref())
            ):
                clock._spend("compile", seconds)
                clock._inner[-1] += seconds

        jax.monitoring.register_event_duration_secs_listener(listen)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, listen)

    def _spend(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the time within under `phase`: sample, update, data, eval, checkpoint, ..."""
        began = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - began
            self._spend(phase, elapsed - self._inner.pop())
            self._inner[-1] += elapsed

    def report(self) -> dict[str, float]:
        """Seconds of each phase, longest first, then `other` (open phases too) and `total`, their sum."""
        total = self._now() - self._began
        phases = dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
        return phases | {
            "other": total - sum(phases.values()) + phases.get("other", 0.0),
            "total": total,
        }

    def table(self) -> str:
        """The report as text, with per cent of the wall time."""
        report = self.report()
        share = 100 / report["total"] if report["total"] else 0.0
        width = max(map(len, report))
        return "\n".join(
            f"{phase:<{width}} {seconds:10.1f} s {seconds * share:6.1f} %"
            for phase, seconds in report.items()
        )


class CompileGuard:
    """Raises when a jitted function is compiled for more signatures than it has buckets.

    A shape that is not padded to a bucket costs minutes of compilation a step, without an error.
    """

    def __init__(self):
        self._watched = {}

    def watch(self, name: str, jitted: Callable, limit: int) -> None:
        """Watches `jitted` (what `jax.jit` returned), which may have `limit` signatures."""
        if not hasattr(jitted, "_cache_size"):
            raise TypeError(f"{name!r} is not a jitted function: give what jax.jit returned")
        self._watched[name] = jitted, limit

    def check(self) -> dict[str, int]:
        """`{"compiles": of all, "compiles/<name>": of each}`, for the metrics. Raises TooManyCompilesError."""
        counts = {name: jitted._cache_size() for name, (jitted, _) in self._watched.items()}
        if over := [name for name, count in counts.items() if count > self._watched[name][1]]:
            each = ", ".join(
                f"{name} {counts[name]} times, limit {self._watched[name][1]}" for name in over
            )
            raise TooManyCompilesError(
                f"compiled too often: {each}. The arguments change in shape, dtype, weak type, sharding, "
                "static value, or between host and device. JAX_EXPLAIN_CACHE_MISSES=1 shows which: pad them "
                "to the buckets and place them alike, or allow more buckets"
            )
        return {
            "compiles": sum(counts.values()),
            **{f"compiles/{name}": n for name, n in counts.items()},
        }
