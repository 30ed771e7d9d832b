"""A progress bar for long work."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO


class Progress:
    """A bar on a terminal, otherwise a plain line every `interval` seconds; a context manager.

    Args:
      total: amount of work.
      description, stage: shown at the left.
      start: amount that was done before (on resume).
      primary: whether this process shows anything; the others of a run do not.
      interval: seconds between lines.
      file: where to write; stderr by default.
    """

    def __init__(
        self,
        total: int,
        description: str = "",
        stage: str = "",
        *,
        start: int = 0,
        primary: bool = True,
        interval: float = 10.0,
        file: TextIO | None = None,
    ):
        self._file = file or sys.stderr
        self._total, self._start, self._interval, self._primary = total, start, interval, primary
        self._title = " ".join(filter(None, (description, stage)))
        self._began = time.monotonic()
        self._shown = -math.inf
        self._bar = None
        if primary and self._file.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                "{task.description}",
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                "{task.fields[numbers]}",
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(file=self._file))
            self._task = self._bar.add_task(self._title, total=total, completed=start, numbers="")
            self._bar.start()

    def update(self, done: int, **fields: float | str) -> None:
        """Shows that `done` of the total is done, and the fields after it."""
        numbers = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in fields.items()
        )
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif self._primary and (now - self._shown >= self._interval or done >= self._total):
            self._shown = now
            left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
            print(
                f"{self._title}  {done}/{self._total}  {numbers}  elapsed "
                f"{_hms(now - self._began)}  left {_hms(left) if done > self._start else '?'}",
                file=self._file,
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar and restores the terminal."""
        if self._bar:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _hms(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
