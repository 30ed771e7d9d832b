"""Progress bars for long work, several at a time."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from opsd_jax.runtime.terminal_bars import Bars

_lock = threading.Lock()
_bars: dict[TextIO, tuple[Bars, int]] = {}  # {terminal: (its bars, number of open ones)}


def _open_bars(file: TextIO) -> Bars:
    """The bars of a terminal, which has one live display for all of them."""
    from rich.console import Console

    from opsd_jax.runtime.terminal_bars import Bars

    with _lock:
        if file not in _bars:
            bars = Bars(Console(file=file), _hms)
            bars.start()
            _bars[file] = bars, 0
        bars, count = _bars[file]
        _bars[file] = bars, count + 1
    return bars


def _close_bars(file: TextIO) -> None:
    """Ends the display of a terminal when its last bar is closed."""
    with _lock:
        bars, count = _bars.pop(file)
        if count > 1:
            _bars[file] = bars, count - 1
        else:
            bars.stop()


class Progress:
    """A bar on a terminal, otherwise a plain line every `interval` seconds; a context manager.

    Several can be open at a time, also in several threads. The time that is left is estimated
    without the first update, which may have compiled a program.

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
        # While bars are shown, sys.stderr is a proxy that prints above them.
        self._file = file or getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        self._total, self._interval, self._primary = total, interval, primary
        self._title = " ".join(filter(None, (description, stage)))
        self._began = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and amount at the first update
        self._shown = -math.inf
        self._bars: Bars | None = None
        if primary and self._file.isatty():
            self._bars = _open_bars(self._file)
            self._task = self._bars.add_task(
                self._title, total=total, completed=start, numbers=(), left="?"
            )

    def update(self, done: int, **fields: float | str) -> None:
        """Shows that `done` of the total is done, and the fields after it."""
        numbers = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in fields.items()
        ]
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        left = self._left(now, done)
        if self._bars:
            self._bars.update(self._task, completed=done, numbers=numbers, left=left)
        elif self._primary and (now - self._shown >= self._interval or done >= self._total):
            self._shown = now
            times = f"elapsed {_hms(now - self._began)}  left {left}"
            parts = filter(None, (self._title, f"{done}/{self._total}", *numbers, times))
            print("  ".join(parts), file=self._file, flush=True)

    def _left(self, now: float, done: int) -> str:
        """Time for the rest at the rate since the first update; "?" before it is known."""
        then, before = self._first or (now, done)
        if done >= self._total:
            return _hms(0)
        return _hms((now - then) / (done - before) * (self._total - done)) if done > before else "?"

    def close(self) -> None:
        """Ends the bar, and with the last one the display; may be called again."""
        if self._bars:
            self._bars.stop_task(self._task)
            self._bars = None
            _close_bars(self._file)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _hms(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
