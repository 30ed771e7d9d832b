"""Files that are written whole or not at all: a reader sees the old content or the new, even where the power fails."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` at the end; its folders are made.

    Where the block fails, nothing is left of it; a process that is killed in it leaves `<path>.<process>.tmp`.
    """
    path = os.fspath(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
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


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file. Text is UTF-8; what is no text, as in the name of a file that is no UTF-8, becomes an escape."""
    with replacing(path) as file:
        file.write(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a value as JSON, a line for each entry."""
    write(path, json.dumps(value, indent=1))
