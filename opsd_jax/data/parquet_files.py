"""Parquet files in the released layout: columns, and rows one by one."""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_jax.data import schema, shards
from opsd_jax.inputs import columns as columns_lib

if TYPE_CHECKING:
    import pyarrow.parquet


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


def scan(path: Path, stop: int, further: Sequence[str] = ()) -> schema.Scan:
    """The columns and pids of rows 0 .. stop-1; nothing else is decoded.

    further: see `columns`. Raises BadSourceError.
    """
    with open_parquet(path) as file:
        present, rows = file.schema_arrow.names, min(stop, file.metadata.num_rows)
        columns(path, present, further)  # raises for wrong ones
        optional = _lacks_images(path, file, further)
        batches = file.iter_batches(columns=["pid"]) if "pid" in present else ()
        pids = [pid for batch in batches for pid in batch["pid"].to_pylist()]
    checksum = shards.checksum(path) if rows else ""
    several = any(schema.is_problem_image(column) for column in _numbered(present))
    return schema.Scan("parquet", present, pids[:rows], rows, checksum, several, optional)


def _lacks_images(path: Path, file: "pyarrow.parquet.ParquetFile", further: Sequence[str]) -> bool:
    """Whether rows of a file have no problem image: all without the column, or some.

    Raises BadSourceError for a file without the column that seems to have it under another name.
    """
    import pyarrow

    arrow, first = file.schema_arrow, f"{schema.PROBLEM_COLUMNS}0"
    if first not in arrow.names:
        asked = [columns_lib.of_files(name) for name in further]
        for field in arrow:
            own = field.name in asked or schema.is_of_schema(field.name)
            if not own and pyarrow.types.is_struct(field.type) and "bytes" in field.type.names:
                raise schema.BadSourceError(
                    f"{path} has no column {first!r}, but {field.name!r} seems to hold images: "
                    f"rename it to {first!r}, or drop it for questions without an image"
                )
        return True
    kind = arrow.field(first).type
    if not pyarrow.types.is_struct(kind) or "bytes" not in kind.names:
        return False  # no image {bytes, path}: reading its rows says so
    leaves = [file.schema.column(n).path for n in range(len(file.schema))]
    leaf = leaves.index(f"{first}.bytes")
    for n in range(file.metadata.num_row_groups):
        statistics = file.metadata.row_group(n).column(leaf).statistics
        if statistics is not None and statistics.has_null_count and not statistics.null_count:
            continue
        for batch in file.iter_batches(schema.BATCH_ROWS, row_groups=[n], columns=[first]):
            if any(value in (None, schema.NO_IMAGE) for value in batch[first].to_pylist()):
                return True
    return False


def columns(path: Path, present: list[str], further: Sequence[str] = ()) -> list[str]:
    """The columns to read, of those that are present in a file.

    further: names of further columns to read, "text:COLUMN" or "images:COLUMN".

    Raises BadSourceError if a required one is missing or a name looks misspelt.
    """
    asked = [columns_lib.of_files(name) for name in further]
    missing = [column for column in schema.REQUIRED_COLUMNS if column not in present]
    hints = misspelt(present, further)
    if missing or hints:
        fault = (
            f"has no column {', '.join(map(repr, missing))}" if missing else "has unknown columns"
        )
        raise schema.BadSourceError(
            f"{path} {fault}; its columns: {', '.join(present)}. "
            + " ".join(hints or ["Rename or add the column"])
            + " (the released files do spell 'resoning_thought_0' but 'reasoning_image_0')"
        )
    schema.check_further(path, present, further, "column")
    own = filter(present.__contains__, schema.COLUMNS)
    return [*own, *_numbered(present), *asked]


def _numbered(present: Sequence[str]) -> list[str]:
    """Columns of the schema that `schema.COLUMNS` does not list, as their numbers have no end."""
    return [c for c in present if schema.is_of_schema(c) and c not in schema.COLUMNS]


def misspelt(present: Sequence[str], further: Sequence[str] = ()) -> list[str]:
    """Sentences about columns that are not read and look like columns of the schema."""
    asked = [columns_lib.of_files(name) for name in further]
    first = f"{schema.PROBLEM_COLUMNS}0"
    own = (*schema.THOUGHT_COLUMNS, *schema.VISUAL_THOUGHT_COLUMNS)
    known = (*schema.REQUIRED_COLUMNS, first, *own)
    expected = [column for column in dict.fromkeys(known) if column not in present]
    return [
        f"{column!r} is not read: did you mean {close[0]!r}?"
        for column in present
        if column not in asked and not schema.is_of_schema(column)
        if (close := difflib.get_close_matches(column, expected, 1, cutoff=0.85))
    ]


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
            if len(rows) == schema.BATCH_ROWS or size >= schema.BATCH_BYTES:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows
