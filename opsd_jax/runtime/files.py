"""Atomic writes: a reader finds the old content or the new one, even after a power failure.

Every file that a command writes next to others that it may have to replace is written here.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


def write(path: str | os.PathLike, content: str | bytes, *, primary: bool = True) -> None:
    """Writes a whole file.

    Args:
      path: the file, which is replaced if it exists; missing folders are made.
      content: bytes, or text, which is written as UTF-8. Characters that UTF-8 cannot encode (from
        a file name that is not UTF-8) are written as escapes.
      primary: whether this process writes, `jax.process_index() == 0` in a run of several
        processes; the others do nothing.
    """
    if primary:
        with replacing(path) as file:
            file.write(
                content.encode(errors="backslashreplace") if isinstance(content, str) else content
            )


def write_json(path: str | os.PathLike, value: Any, *, primary: bool = True) -> None:
    """Writes a value as JSON with one entry per line; path and primary as in `write`."""
    write(path, json.dumps(value, indent=1), primary=primary)


def make_folder(folder: str | os.PathLike) -> None:
    """Makes a folder that may exist. Raises OSError, with what to do, where there can be none."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{os.fspath(folder)}: the folder cannot be made ({error.strerror}): give another path"
        ) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yields a new file, open for writing, that replaces `path` when the block ends.

    Missing folders are made. If the block raises, the new file is removed; a process that is killed
    within the block leaves `<path>.<process id>.tmp`.
    """
    path = os.fspath(path)
    make_folder(os.path.dirname(os.path.abspath(path)))
    unfinished = f"{path}.{os.getpid()}.tmp"  # two commands may write the same table at once
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with an empty file
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise
