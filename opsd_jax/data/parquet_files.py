"""Parquet files in the released layout: folders of tasks, splits, columns, and rows one by one."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_jax.data import schema
from opsd_jax.inputs import columns as columns_lib

if TYPE_CHECKING:
    import pyarrow.parquet

# Parquet rows in memory at a time, or fewer where they are large.
_BATCH_ROWS, _BATCH_BYTES = 32, 64 << 20


def task_folders(source: str | os.PathLike) -> dict[str, Path]:
    """{name of a task: its folder of parquet files}: `source` itself, or folders in it.

    The files of a task are in its folder or in the folder data/ in it.

    Raises:
      BadSourceError: there are no parquet files, or two tasks would share a name.
    """
    source = Path(os.path.abspath(source))  # a link keeps its name, which may be the task's
    if not source.is_dir():
        raise schema.BadSourceError(
            f"{source} is not a folder; --source is the folder with <Task>/data/train-*.parquet"
        )
    named = source.parent if source.name == "data" else source  # `source` is <Task>/data
    folders = [named] if _parquet_files(source) else []
    children = [
        child
        for child in sorted(source.iterdir())
        if child.is_dir() and child.name != "data" and _parquet_files(child)
    ]
    if folders and children:
        raise schema.BadSourceError(
            f"{source} holds parquet files and so do its folders {[c.name for c in children]}: "
            "is it one task or several? Move the files, or prepare the folders one by one"
        )
    tasks = {folder.name: folder for folder in folders + children}
    if not tasks:
        inside = [path.name for path in sorted(source.iterdir())][:10]
        raise schema.BadSourceError(
            f"{source} holds no parquet: looked for *.parquet and data/*.parquet in it and in "
            f"its folders; it holds {inside}. File names start with {', '.join(schema.SPLITS)}"
        )
    for task in tasks:
        if not re.fullmatch(r"[\w.-]+", task):
            raise schema.BadSourceError(
                f"{tasks[task]}: TFDS takes letters, digits, _ - . in a name; rename the folder"
            )
    if len({task.lower() for task in tasks}) < len(tasks):
        raise schema.BadSourceError(
            f"{source}: {list(tasks)} differ in upper and lower case only; rename a folder"
        )
    return tasks


def _parquet_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def split_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The parquet files of one task: {split: files in order}, and the files of no split.

    A file belongs to the split that its name starts with. Raises BadSourceError if there is none.
    """
    files: dict[str, list[Path]] = {split: [] for split in schema.SPLITS}
    others = []
    for path in _parquet_files(folder):
        split = re.match(rf"(?:({'|'.join(schema.SPLITS)})(?![a-z]))?", path.name)[1]
        (files[split] if split else others).append(path)
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise schema.BadSourceError(
            f"{folder}: no parquet file is named after a split "
            f"({', '.join(f'{split}-*.parquet' for split in schema.SPLITS)}); "
            f"found {[path.name for path in others][:10]}. Rename the files"
        )
    return files, others


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Opens a parquet file.

    Errors inside the block are reported as faults of the file, so nothing but reading belongs
    there. Raises BadSourceError.
    """
    import pyarrow
    import pyarrow.parquet

    try:  # pre_buffer, on by default, would hold the whole file in memory
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise schema.BadSourceError(
            f"{path} cannot be read as parquet ({error}): download or write it again"
        ) from error


def columns(path: Path, present: list[str], further: Sequence[str] = ()) -> list[str]:
    """The columns to read, of those that are present in a file.

    further: names of further columns to read, "text:COLUMN" or "images:COLUMN".

    Raises BadSourceError if a required one is missing or a name looks misspelt.
    """
    asked = [columns_lib.of_files(name) for name in further]
    missing = [column for column in (*schema.REQUIRED_COLUMNS, *asked) if column not in present]
    expected = [
        column
        for column in dict.fromkeys(
            (*missing, *schema.THOUGHT_COLUMNS, *schema.VISUAL_THOUGHT_COLUMNS)
        )
        if column not in present
    ]
    hints = [
        f"{column!r} is not read: did you mean {close[0]!r}?"
        for column in present
        if column not in (*schema.COLUMNS, *asked) and not schema.is_surplus(column)
        if (close := difflib.get_close_matches(column, expected, 1, cutoff=0.85))
    ]
    if missing or hints:
        fault = (
            f"has no column {', '.join(map(repr, missing))}" if missing else "has unknown columns"
        )
        raise schema.BadSourceError(
            f"{path} {fault}; its columns: {', '.join(present)}. "
            + " ".join(hints or ["Rename or add the column"])
            + " (the released files do spell 'resoning_thought_0' but 'reasoning_image_0')"
        )
    own = filter(present.__contains__, schema.COLUMNS)
    return [*own, *filter(schema.is_surplus, present), *asked]


def read_batches(
    path: Path, stop: int, further: Sequence[str] = ()
) -> Iterator[list[tuple[int, dict]]]:
    """Rows 0 .. stop-1 as lists of (row number, row).

    further: see `columns`. A batch and its row group are in memory, never the whole file.
    """
    rows, size = [], 0
    with open_parquet(path) as file:
        # One row at a time: Arrow cannot return more than 2 GiB of an image column in one batch,
        # and only the row itself tells how large it is.
        single = file.iter_batches(1, columns=columns(path, file.schema_arrow.names, further))
        for index, batch in zip(range(stop), single):
            rows.append((index, batch.to_pylist()[0]))
            size += batch.nbytes
            if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows


def read_examples(
    path: str | os.PathLike, *, task: str, further: Sequence[str] = ()
) -> Iterator[schema.Example]:
    """The examples of one parquet file in order, with further columns (`columns`).

    Raises:
      BadSourceError: the file cannot be read, or lacks a column.
      BadRowError: a row cannot be trained on.
    """
    for batch in read_batches(Path(path), sys.maxsize, further):
        for index, row in batch:
            yield schema.read_row(row, file=str(path), index=index, task=task, columns=further)[0]
