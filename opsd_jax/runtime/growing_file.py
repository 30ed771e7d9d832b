"""Files that grow while a run goes on, also on storage that shows a file only once it is closed.

A mounted bucket is such storage: gcsfuse 3 keeps what is written to an open file from all other
machines, whatever is flushed or synchronised, and it is lost with the machine ("FSync operation
does not finalize the object" in its docs/semantics.md). So a file that grows is closed soon after a
write, and opened again, to append, by the next one. gcsfuse then uploads the file anew, or from
2 MB on what was appended to it; hence not for every line.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable

from opsd_jax.runtime import files

PERIOD = 30.0  # seconds after a write within which a file is closed

Timer = Callable[[float, Callable[[], None]], threading.Timer]


class GrowingFile:
    """A file to which one process appends, from any of its threads.

    It is closed at most `period` seconds after a write that opened it.

    Args:
      path: the file; its folder exists.
      timer: makes what closes the file later; tests give another.
    """

    def __init__(
        self, path: str | os.PathLike, period: float = PERIOD, timer: Timer = threading.Timer
    ):
        self.path, self._period, self._make_timer = os.fspath(path), period, timer
        self._lock = threading.RLock()
        self._file = self._timer = self._failed = None
        self._end: int | None = None  # position after the last byte that was written

    def write(self, data: bytes) -> None:
        """Appends bytes; a process that is killed afterwards does not lose them.

        Raises:
          OSError: these bytes, or those before them, cannot be written.
          FileNotFoundError: the file was deleted or replaced since it was written to.
        """
        with self._lock:
            self._raise_failed()
            if self._file is None:
                self.check_kept()
                self._file = open(self.path, "ab")
                self._timer = self._make_timer(self._period, self._close_later)
                self._timer.daemon = True
                self._timer.start()
            self._file.write(data)
            self._file.flush()
            self._end = self._file.tell()

    def publish(self) -> None:
        """Closes the file, so that others see what was written. Raises OSError as `write` does."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                self._timer.cancel()
                file.close()
            self._raise_failed()

    def check_kept(self) -> None:
        """Raises FileNotFoundError if the file was deleted or replaced since the last write.

        Writing to a deleted file succeeds, and what is written is lost.
        """
        with self._lock:
            if self._end is None:
                return
            if not os.path.exists(self.path) or os.path.getsize(self.path) < self._end:
                raise FileNotFoundError(
                    f"{self.path} was deleted or replaced while the run was writing it. What the "
                    "run has not saved elsewhere is lost: start it again, and keep the folder "
                    "until it ends"
                )

    def _close_later(self) -> None:
        try:
            self.publish()
        except OSError as error:  # of a thread that nobody waits for: the next call raises it
            self._failed = error

    def _raise_failed(self) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed


class EventFiles:
    """Lets tensorboardX write its event files as `GrowingFile`s: `writer_factory` of its registry.

    A folder is given to it as `EventFiles.folder(path)`.
    """

    PREFIX = "growing"

    @classmethod
    def folder(cls, path: str) -> str:
        """The name of a folder under which tensorboardX finds this factory."""
        return f"{cls.PREFIX}:{path}"

    def open(self, path: str) -> "_EventFile":
        """Called by tensorboardX for a new event file."""
        return _EventFile(self._path(path))

    def directory_check(self, path: str) -> None:
        """Called by tensorboardX: makes the folder."""
        os.makedirs(self._path(path), exist_ok=True)

    def _path(self, path: str) -> str:
        return path.removeprefix(f"{self.PREFIX}:")


class _EventFile(GrowingFile):
    """What tensorboardX calls a file. It flushes every few seconds if something is new."""

    def flush(self) -> None:
        self.publish()

    close = flush


class LogFile(logging.Handler):
    """Appends log messages to a file, each with its time.

    A message that cannot be written is lost, as Python's own handlers have it: the run goes on.
    """

    def __init__(self, path: str):
        files.make_folder(os.path.dirname(path))  # first: logging keeps every handler
        super().__init__()
        self._file = GrowingFile(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        try:
            self._file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Called by logging at its end."""
        with contextlib.suppress(OSError):  # as in `emit`: the run does not end with its log
            self._file.publish()
        super().close()
