"""Metrics of a stage: collected at every step, written every few steps."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from opsd_jax.run.session import Session
from opsd_jax.run.stage import Stage
from opsd_jax.runtime import metrics
from opsd_jax.runtime.clock import CompileGuard
from opsd_jax.runtime.health import Health
from opsd_jax.runtime.progress import Progress

# What the progress bar shows: {label: metric}.
_SHOWN = {
    "loss": "loss",
    "mse": "mse",
    "accuracy per token": "accuracy",
    "completion_len": "completion_len",
    "tokens/s": "tokens_per_sec",
}


class StageLog:
    """Means since the last line of metrics.jsonl, and the time that their steps took.

    Args:
      start: the step that this process continues from.
      guard: counts the compiled programs. health: checks every line.
    """

    def __init__(self, run: Session, stage: Stage, start: int, guard: CompileGuard, health: Health):
        self._run, self._stage, self._guard, self._health = run, stage, guard, health
        self._means, self._written, self._since = metrics.Means(), start, time.perf_counter()

    def add(self, values: dict) -> None:
        """Adds the metrics of a step; arrays of more than one number are left out."""
        self._means.add({name: (x, 1) for name, x in values.items() if np.ndim(x) == 0})

    def write(self, step: int, progress: Progress) -> None:
        """Writes the means of the steps since the last line, and shows some of them.

        Raises UnhealthyRunError, and TooManyCompilesError.
        """
        values, now = self._means.take(), time.perf_counter()
        rate = (step - self._written) * self._stage.batches.size / (now - self._since)
        values["samples_per_sec"] = rate
        self._written, self._since = step, now
        if "completion_len" in values:
            values["tokens_per_sec"] = rate * values["completion_len"]
        values |= self._guard.check() | self._run.clock.shares()
        self._run.writer.scalars(step, self._stage.name, values)
        self._health.check(step, values)
        shown = {label: values[name] for label, name in _SHOWN.items() if name in values}
        progress.update(step, **shown)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside does not count as time of the steps."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before
