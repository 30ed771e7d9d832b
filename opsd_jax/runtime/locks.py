"""One writer for each folder: a second command is told which process writes there.

The lock is the system's (flock), which frees it however the process ends; the lock file names the
last process that had it.
"""

import contextlib
import contextvars
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from absl import logging

from opsd_jax.inputs import paths
from opsd_jax.runtime import files

_held: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "folders whose lock a caller in this thread has", default=frozenset()
)


class FolderInUseError(OSError):
    """Another command is writing into the folder."""


@contextlib.contextmanager
def only_writer(
    folder: str | os.PathLike, *, inside: bool = False, wait: bool = False, primary: bool = True
) -> Iterator[None]:
    """Reserves `folder` for the caller and for what it calls.

    Args:
      folder: it need not exist.
      inside: the lock file is <folder>/lock (of a workdir, which is made) and stays. Otherwise it
        is .<name>.lock beside the folder, so that a command that fails leaves no folder, and is
        removed at the end.
      wait: waits until the other command is done, instead of raising.
      primary: whether this process locks; of the processes of one run the first one locks for all.

    Raises:
      FolderInUseError: names the process that writes there and its machine.
      OSError: a workdir cannot be made.
    """
    paths.check_given("folder", folder)
    folder = os.path.realpath(folder)
    if not primary or not inside and folder in _held.get():
        yield
        return
    parent, name = os.path.split(folder)
    if inside:
        files.make_folder(folder)
    path = os.path.join(folder, "lock") if inside else os.path.join(parent, f".{name}.lock")
    file = _lock(path, folder, wait)
    held = _held.set(_held.get() | {folder})
    try:
        yield
    finally:
        _held.reset(held)
        if file:
            if not inside:
                with contextlib.suppress(OSError):
                    os.remove(path)
            file.close()


def _lock(path: str, folder: str, wait: bool) -> TextIO | None:
    """The open and locked lock file; None, with a warning, if there can be none (a read-only
    disk)."""
    told = False
    while True:
        file = None
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # its last owner removed it after we opened it
                file.close()
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another command"
            file.close()
            if not wait:
                raise FolderInUseError(
                    f"{folder} is being written by {owner}: wait until that is done, stop it, or "
                    "use another folder. Where that machine is gone and its network disk still "
                    f"keeps the lock, delete {path}"
                ) from None
            if not told:
                logging.warning(
                    "%s is being written by %s: waiting until that is done", folder, owner
                )
                told = True
            time.sleep(0.2)
        except OSError as error:
            if file:
                file.close()
            logging.warning(
                "%s: no lock there (%s): make sure that no other command writes into %s",
                path,
                error,
                folder,
            )
            return None


def _is_at(file: TextIO, path: str) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
