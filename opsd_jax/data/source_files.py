"""Files of examples that users write, parquet or JSONL: folders of tasks, splits, and rows."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from opsd_jax.data import jsonl_files, parquet_files, schema

JSONL = ".jsonl"
SUFFIXES = (".parquet", JSONL)
_NOT_READ = (".csv", ".tsv", ".json", ".xlsx", ".arrow", ".feather", ".tar", ".zip", ".gz")


def task_folders(source: str | os.PathLike) -> dict[str, Path]:
    """{name of a task: its folder of files}: `source` itself, or folders in it.

    The files of a task are in its folder or in the folder data/ in it.

    Raises:
      BadSourceError: there are no parquet or JSONL files, or two tasks would share a name.
    """
    source = Path(os.path.abspath(source))  # a link keeps its name, which may be the task's
    if not source.is_dir():
        fault = "is not a folder" if source.exists() else "does not exist"
        raise schema.BadSourceError(
            f"{source} {fault}; --source is the folder with <Task>/data/train-*.parquet "
            "or <Task>/train.jsonl"
        )
    named = source.parent if source.name == "data" else source  # `source` is <Task>/data
    folders = [named] if _files(source) else []
    children = [
        child
        for child in sorted(source.iterdir())
        if child.is_dir() and child.name != "data" and _files(child)
    ]
    if folders and children:
        raise schema.BadSourceError(
            f"{source} holds files of rows and so do its folders {[c.name for c in children]}: "
            "is it one task or several? Move the files, or prepare the folders one by one"
        )
    tasks = {folder.name: folder for folder in folders + children}
    if not tasks:
        inside = [path.name for path in sorted(source.iterdir())][:10]
        raise schema.BadSourceError(
            f"{source} holds no parquet and no JSONL: looked for *.parquet, *.jsonl, "
            f"data/*.parquet and data/*.jsonl in it and in its folders; it holds {inside}. "
            f"{_other_files(source)}File names start with {', '.join(schema.SPLITS)}"
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


def _other_files(source: Path) -> str:
    """A sentence about the first file of rows in a format that is not read; "" without one."""
    for place in ("", "*/", "data/", "*/data/"):
        for path in sorted(source.glob(f"{place}*")):
            if path.name.lower().endswith(_NOT_READ):
                return (
                    f"{path.relative_to(source)} is in a format that is not read: write its rows "
                    "as JSON objects, one a line, to a .jsonl file, or as parquet. "
                )
    return ""


def _files(folder: Path) -> list[Path]:
    patterns = [f"{data}*{suffix}" for suffix in SUFFIXES for data in ("", "data/")]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def split_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The files of one task: {split: files in order}, and the files of no split.

    A file belongs to the split that its name starts with. Files of no split are those of the same
    kind, parquet or JSONL, as the others. Raises BadSourceError if no file belongs to a split, or
    if files of both kinds do.
    """
    files: dict[str, list[Path]] = {split: [] for split in schema.SPLITS}
    others = []
    for path in _files(folder):
        split = re.match(rf"(?:({'|'.join(schema.SPLITS)})(?![a-z]))?", path.name)[1]
        (files[split] if split else others).append(path)
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise schema.BadSourceError(
            f"{folder}: no parquet or JSONL file is named after a split "
            f"({', '.join(f'{split}-*.parquet' for split in schema.SPLITS)}, or train.jsonl); "
            f"found {[path.name for path in others][:10]}. Rename the files"
        )
    kinds = {path.suffix for paths in files.values() for path in paths}
    if len(kinds) > 1:
        names = [path.name for paths in files.values() for path in paths]
        raise schema.BadSourceError(
            f"{folder} holds parquet and JSONL files ({', '.join(names[:6])}): are they the same "
            "rows twice? Keep one kind in the folder"
        )
    return files, [path for path in others if path.suffix in kinds]


def scan(path: Path, stop: int, further: Sequence[str] = ()) -> schema.Scan:
    """What is known of rows 0 .. stop-1 of a file before they are read.

    further: names of further columns that the file must have. Raises BadSourceError.
    """
    reader = jsonl_files if path.suffix == JSONL else parquet_files
    return reader.scan(path, stop, further)


def read_batches(path: Path, stop: int, further: Sequence[str] = ()) -> Iterator[list[schema.Row]]:
    """Rows 0 .. stop-1 of a file, a few at a time."""
    if path.suffix == JSONL:
        yield from jsonl_files.read_batches(path, stop, further)
    else:
        for batch in parquet_files.read_batches(path, stop, further):
            yield [schema.Row(*row) for row in batch]


def to_example(
    row: schema.Row, *, file: str, task: str, columns: Sequence[str] = ()
) -> tuple[schema.Example, tuple[schema.Note, ...]]:
    """The example of a row and its warnings; arguments and errors of `schema.read_row`."""
    if row.fault is not None:
        raise row.fault
    try:
        example, notes = schema.read_row(
            row.values, file=file, index=row.index, task=task, columns=columns
        )
    except schema.BadRowError as error:
        raise error.under(row.names) from None
    own = (note._replace(reason=schema.in_file(note.reason, row.names)) for note in notes)
    remarks = (schema.Note(file, row.index, example.pid, remark) for remark in row.remarks)
    return example, (*own, *remarks)


def read_examples(
    path: str | os.PathLike, *, task: str, further: Sequence[str] = ()
) -> Iterator[schema.Example]:
    """The examples of one file in order, with further columns.

    Raises:
      BadSourceError: the file cannot be read, or lacks a column.
      BadRowError: a row cannot be trained on.
    """
    for batch in read_batches(Path(path), sys.maxsize, further):
        for row in batch:
            yield to_example(row, file=str(path), task=task, columns=further)[0]
