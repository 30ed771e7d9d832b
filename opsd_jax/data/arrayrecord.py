"""Random access to prepared ArrayRecord files."""

import bisect
import contextlib
import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from opsd_jax.data import parquet_files, schema


def version_folder(target: str | os.PathLike, task: str) -> Path:
    """Where a task lies below a TFDS data_dir."""
    return Path(target) / schema.NAME / task.lower() / schema.VERSION


def digest(target: str | os.PathLike, task: str) -> str:
    """A checksum of the prepared rows of a task: of the content of its shards, wherever the folder is stored and whenever
    it was written. What a cache of the rows depends on.

    `prepare` left the shards' own checksums in progress.json; where they are not there, as in a folder made by the TFDS
    builder, or a shard has another size by now, the shard is read. What is broken is `open_source`'s to tell.
    """
    folder, found = version_folder(target, task), hashlib.blake2b(digest_size=16)
    try:
        records = read_progress(folder / "progress.json")
    except (FileNotFoundError, ValueError):
        records = {}
    for path in sorted(folder.glob(f"{schema.NAME}-*.array_record-*")):
        record = records.get(path.name, {})
        known = "blake2b" in record and record["file_bytes"] == path.stat().st_size
        found.update(f"{path.name} {record['blake2b'] if known else checksum(path)}\n".encode())
    return found.hexdigest()


def checksum(path: Path) -> str:
    if (size := path.stat().st_size) > 1 << 28:  # seconds, on a mounted bucket perhaps a minute
        logging.info("%s: reading %.1f GB for a checksum", path, size / 1e9)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def count_records(shard: Path) -> int:
    """Rows of an ArrayRecord file, 0 where it is missing or truncated."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(shard))
    rows = reader.num_records()
    with contextlib.suppress(RuntimeError):  # where close tells that there was nothing to read
        reader.close()
    return rows


def read_progress(path: Path) -> dict[str, dict]:
    """The records of finished shards by name. FileNotFoundError; ValueError with the path where it is damaged."""
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        for record in done.values():
            parquet_files.Shard(*record["shard"]), record["rows"] + record["bytes"]
            [schema.Note(*note) for note in (*record["bad_rows"], *record["warnings"])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return done


class RawBytes:
    """TFDS decoder that leaves pictures encoded: `decoders={"reasoning_images": RawBytes()}`.

    In place of tfds.decode.SkipDecoding, which in 4.9.10 cannot do a Sequence(Image) without TensorFlow.
    Holds nothing, so threads may share it.
    """

    def setup(self, *, feature) -> None:
        pass

    def decode_example_np(self, image: bytes) -> bytes:
        return image

    def decode_batch_example_np(self, images) -> list[bytes]:
        return list(images)


class Source:
    """Random access to a prepared split: `len(source)`, `source[i] -> Example`. For threads and pickle.

    Attributes:
      directory: the version folder.
      split: as given.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        builder = _builder(directory)
        for info in builder.info.splits.values():
            for path, rows in zip(info.filepaths, info.shard_lengths):
                if count_records(path) != rows:
                    raise FileNotFoundError(
                        f"{path} is missing or truncated (it should hold {rows} rows): copy it again, or run "
                        f"`{schema.PREPARE_COMMAND}` again, which remakes what is broken"
                    )
        with _naming(directory, split):
            self._rows = builder.as_data_source(
                split, decoders={"problem_image": RawBytes(), "reasoning_images": RawBytes()}
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> schema.Example:
        index = _in_range(index, len(self))
        try:
            return _of_features(self._rows[index])
        except Exception as error:  # TFDS and protobuf raise many types
            raise ValueError(
                f"{self.directory}, row {index} of {self.split}: it cannot be read ({error}): its file, or "
                f"features.json, is damaged; delete the folder and run `{schema.PREPARE_COMMAND}` again"
            ) from error

    def __reduce__(self):
        return Source, (self.directory, self.split)


def _of_features(row: dict) -> schema.Example:
    """The Example of a row as TFDS reads it."""
    # Older folders have no originals: everything there is one.
    (problem,), visual_thoughts = (
        list(row.get(f"{name}_original", ())) or shown
        for name, shown in (
            ("problem_image", [row["problem_image"]]),
            ("reasoning_images", row["reasoning_images"]),
        )
    )
    return schema.Example(
        **{name: row[name].decode() for name in schema.TEXT_COLUMNS},
        problem_image=problem,
        visual_thoughts=tuple(visual_thoughts),
        thoughts=tuple(thought.decode() for thought in row["reasoning_thoughts"]),
        metadata=json.loads(row["metadata"] or "{}"),
    )


def _builder(directory: Path):
    """The TFDS builder of a prepared folder. ValueError that names the damaged file."""
    import tensorflow_datasets as tfds

    fix = f"run `{schema.PREPARE_COMMAND}` again, which writes it again"
    for name in ("features.json", "dataset_info.json"):  # the builder reads both
        try:
            if name == "features.json":
                absent = {*schema.TEXT_COLUMNS, *schema.IMAGE_COLUMNS} - {
                    *tfds.features.FeatureConnector.from_config(directory)
                }
                if absent:
                    raise ValueError(f"it lacks {', '.join(sorted(absent))}")
            else:
                builder = tfds.builder_from_directory(directory)
                for split in builder.info.splits.values():
                    _ = split.filenames  # worked out from the entries only now
        except Exception as error:  # TFDS and protobuf raise many types
            raise ValueError(
                f"{directory / name} is missing or damaged ({error}): {fix}"
            ) from error
    return builder


def metadata_fits(
    directory: Path, shards: list[parquet_files.Shard], finished: dict[str, dict]
) -> bool:
    """Whether the files that TFDS reads tell of these shards."""
    try:
        told = {name: info.shard_lengths for name, info in _builder(directory).info.splits.items()}
    except ValueError:
        return False
    return told == {
        split: [finished[shard.name]["rows"] for shard in shards if shard.split == split]
        for split in {shard.split for shard in shards}
    }


def open_source(
    directory: str | os.PathLike, split: str = "train", task: str | None = None
) -> Source:
    """Opens a prepared split.

    Args:
      directory: the version folder (.../visual_opsd/<task>/1.0.0), or with `task` the target of `prepare`.
      split: "train", or a TFDS slice such as "train[:512]", "train[10%:20%]", "train+validation".
      task: e.g. "chart_refocus", in upper or lower case.

    Raises:
      FileNotFoundError: nothing there, an unfinished preparation, or a missing or truncated shard.
      ValueError: an unknown split, or a damaged file, which is named.
    """
    directory = version_folder(directory, task) if task is not None else Path(directory)
    started, finished = (directory / "progress.json").exists(), (directory / "report.json").exists()
    if started and not finished:
        raise FileNotFoundError(
            f"{directory} is not finished: run `{schema.PREPARE_COMMAND}` again, it goes on where it stopped"
        )
    if not (directory / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no prepared data: make it with `{schema.PREPARE_COMMAND}`, and give "
            f"DIR/{schema.NAME}/<task>/{schema.VERSION}, or DIR and the task"
        )
    return Source(directory, split)


class ParquetSource:
    """As `Source`, on parquet as it is: for looking around, evaluation, small data, reading in order.

    A random row reads its row group, of which the last four stay in memory. Bad rows raise BadRowError when read.

    Args:
      folder: one task: <split>-*.parquet, or data/<split>-*.parquet.
      split: as for `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train"):
        import tensorflow_datasets as tfds

        self.directory, self.split = Path(folder), split
        tasks = parquet_files.task_folders(folder)
        if len(tasks) > 1:
            raise schema.BadSourceError(
                f"{folder} holds {len(tasks)} tasks: give the folder of one: {', '.join(tasks)}"
            )
        ((self._task, task_folder),) = tasks.items()
        files, _ = parquet_files.split_files(task_folder)
        groups = {
            name: [group for path in paths for group in _row_groups(path)]
            for name, paths in files.items()
        }
        sizes = {name: [size for *_, size in groups[name]] for name in groups}
        infos = {
            name: tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=0)
            for name, lengths in sizes.items()
        }
        # Pieces of row groups that make up the split: [(path, group, first row in file, first row in group)].
        self._pieces: list[tuple[Path, int, int, int]] = []
        self._starts = [0]  # of the pieces, in rows of this source; at the end its length
        with _naming(self.directory, split):
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        for part in parts:
            start, stop = (
                part.from_ or 0,
                sum(sizes[part.splitname]) if part.to is None else part.to,
            )
            for path, group, first, size in groups[part.splitname]:
                if (low := max(start, 0)) < (high := min(stop, size)):
                    self._pieces.append((path, group, first, low))
                    self._starts.append(self._starts[-1] + high - low)
                start, stop = start - size, stop - size
        self._table = functools.lru_cache(maxsize=4)(_read_group)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> schema.Example:
        index = _in_range(index, len(self))
        piece = bisect.bisect_right(self._starts, index) - 1
        path, group, first, skip = self._pieces[piece]
        row = index - self._starts[piece] + skip
        (values,) = self._table(path, group).slice(row, 1).to_pylist()
        return schema.read_row(values, file=str(path), index=first + row, task=self._task)[0]

    def __reduce__(self):
        return ParquetSource, (self.directory, self.split)


def _row_groups(path: Path) -> Iterator[tuple[Path, int, int, int]]:
    """(path, row group, its first row in the file, its rows)."""
    first = 0
    with parquet_files.open_parquet(path) as file:
        parquet_files.columns(path, file.schema_arrow.names)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    for group, size in enumerate(sizes):
        yield path, group, first, size
        first += size


def _read_group(path: Path, group: int):
    import pyarrow

    with parquet_files.open_parquet(path) as file:
        columns = parquet_files.columns(path, file.schema_arrow.names)
        return pyarrow.Table.from_batches(
            parquet_files.one_by_one(file, columns, row_groups=[group])
        )


@contextlib.contextmanager
def _naming(directory: Path, split: str) -> Iterator[None]:
    """TFDS says what is wrong with a split, but not with which, nor where."""
    try:
        yield
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"split {split!r} (--split, or a setting) of {directory}: {error}"
        ) from error


def _in_range(index: int, length: int) -> int:
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a source of {length} rows")
    return index
