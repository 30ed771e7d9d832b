"""Parquet and JSONL files become ArrayRecord files that TFDS reads.

`shards` describes the folder that is written. Encoded images are copied bit by bit.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from opsd_jax.data import arrayrecord, jsonl_files, schema, source_files
from opsd_jax.data import shards as shards_lib
from opsd_jax.data.schema import Note
from opsd_jax.data.shards import Shard
from opsd_jax.inputs import columns as columns_lib
from opsd_jax.inputs import json_files, paths
from opsd_jax.runtime import files, locks
from opsd_jax.runtime.progress import Progress

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did; `str()` gives a human-readable summary.

    Attributes:
      rows: {"<task>/<split>": number of rows written}.
      bad_rows: every row that was left out, with the reason.
      warnings: every oddity in rows that were kept; reasons start with `no_image`,
        `no_visual_thought`, `no_text_trace`, `dropped_visual_thought`, `dropped_thought`,
        `unused_visual_thought`, `duplicate_pid`, `empty_column`, `ignored_column` or
        `ignored_file`, and for chat messages with `no_thought`, `ignored_turn`, `ignored_text` or
        `ignored_key`.
      bytes: size of the written records.
      seconds: duration of the run that finished the work.
      formats: {"<task>/<split>": name of the format that was read}; {} of older versions.
    """

    rows: dict[str, int]
    bad_rows: tuple[Note, ...]
    warnings: tuple[Note, ...]
    bytes: int
    seconds: float
    formats: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{sum(self.rows.values())} rows "
            f"({', '.join(f'{k} {n}' for k, n in self.rows.items())}), {_size(self.bytes)} "
            f"in {self.seconds:.1f} s"
        ]
        for found in dict.fromkeys(self.formats.values()):
            names = [name for name, other in self.formats.items() if other == found]
            lines.append(f"read as {found}: {', '.join(names)}")
        if self.bad_rows:
            lines += [
                f"{len(self.bad_rows)} bad rows left out:",
                *(f"  {note}" for note in self.bad_rows),
            ]
        kinds: dict[str, list[Note]] = {}
        for note in self.warnings:
            kinds.setdefault(note.reason.split(":")[0], []).append(note)
        lines += [
            f"warning {kind}: {len(notes)} (first: {_without_kind(notes[0])}; all in report.json)"
            for kind, notes in kinds.items()
        ]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        notes = {
            key: [note._asdict() for note in getattr(self, key)] for key in ("bad_rows", "warnings")
        }
        files.write_json(path, vars(self) | notes)

    @classmethod
    def read(cls, path: Path) -> "PrepareReport":
        """Reads what `write` wrote.

        Raises FileNotFoundError; ValueError, KeyError or TypeError if the file is damaged.
        """
        fields = json_files.read(str(path))
        notes = {
            key: tuple(Note(**note) for note in fields[key]) for key in ("bad_rows", "warnings")
        }
        if not isinstance(fields.get("formats", {}), dict):
            raise TypeError(f"formats is {fields['formats']!r}, not a dict")
        return cls(**fields | notes)


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a source that is prepared.

    Attributes:
      splits: which splits; None for all that the source has.
      limit: number of rows taken from the start of every split, in file order, bad rows included
        (as num_used_data of the official loader); None for all.
      columns: further columns to keep, "text:COLUMN" for a text and "images:COLUMN" for an image or
        a list of images.
    """

    splits: tuple[str, ...] | None = None
    limit: int | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 row, or None for all, got {self.limit}")
        schema.check_columns("--columns", self.columns)


def prepare(
    source: str | os.PathLike,
    target: str | os.PathLike,
    part: Part = Part(),
    *,
    on_bad_row: str = "fail",
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Writes TARGET/visual_opsd/<task>/1.0.0/ for every task in SOURCE, with few rows in memory.

    After an interruption, the same call continues where it stopped: finished shards are kept. A
    call after the work is finished changes nothing and returns the report again, except that
    damaged files are written again. Files are compared by their content. The footers and columns of
    all files are checked before a byte is written.

    Args:
      source: a folder of <Task>/data/<split>-*.parquet or .jsonl, or one such task.
      target: the TFDS data_dir.
      part: what of the source is prepared.
      on_bad_row: "fail" raises at the first bad row; "skip" leaves bad rows out and names them in
        the report.
      overwrite: whether to replace a different preparation in the target folder.
      progress: whether to show a progress bar on a terminal. Elsewhere a line is logged per shard.

    Returns:
      The report over all tasks. The report of each task is in its report.json.

    Raises:
      BadSourceError, BadRowError: see there.
      FileExistsError: the target folder holds rows of other files, splits or columns, of another
        limit, or of a file that has been edited since.
      locks.FolderInUseError: another command is writing there.
      OSError: a write failed, for example because the disk is full. Unfinished shards do not count.
    """
    paths.check_given("--source", source)
    paths.check_given("--target", target)
    if os.path.realpath(source) == os.path.realpath(target):
        raise ValueError(
            f"--target={target} is the --source: prepared files would lie between the rows that "
            "they are made of. Give another folder"
        )
    if on_bad_row not in ("fail", "skip"):
        raise ValueError(f"on_bad_row must be 'fail' or 'skip', got {on_bad_row!r}")
    jobs = [
        _Job(task, folder, shards_lib.version_folder(target, task), on_bad_row == "skip", part)
        for task, folder in source_files.task_folders(source).items()
    ]
    plans = [_plan_shards(job) for job in jobs]
    total = sum(shard.rows for shards, *_ in plans for shard in shards)
    try:
        with locks.only_writer(target), _progress_bar(total, progress) as advance:
            reports = [
                _prepare_task(job, *plan, overwrite, advance) for job, plan in zip(jobs, plans)
            ]
    except schema.BadRowError as error:
        error.command = schema.prepare_command(source, target)
        if part.columns:
            error.command += f" --columns={','.join(part.columns)}"
        raise
    return PrepareReport(
        rows={name: n for report in reports for name, n in report.rows.items()},
        bad_rows=sum((report.bad_rows for report in reports), ()),
        warnings=sum((report.warnings for report in reports), ()),
        bytes=sum(report.bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
        formats={name: f for report in reports for name, f in report.formats.items()},
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One task to prepare.

    Attributes:
      task: name of the task.
      source: its folder of files.
      target: the version folder to write.
      skip_bad_rows: whether bad rows are left out instead of raised.
      part: what is prepared of it.
    """

    task: str
    source: Path
    target: Path
    skip_bad_rows: bool
    part: Part


@contextlib.contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of rows that were done since the last call."""
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        bar.update(done)

    shown = wanted and sys.stderr.isatty()
    with Progress(total, "preparing rows", primary=shown) as bar:
        yield advance


# --- what to write -------------------------------------------------------------------------------


def _plan_shards(
    job: _Job,
) -> tuple[list[Shard], list[Note], dict[str, str]]:
    """The shards of a task to write, warnings about files, columns and pids, and the formats.

    Nothing is decoded but the pids.
    """
    folder, asked = job.source, [*map(columns_lib.of_files, job.part.columns)]
    paths_of, others = source_files.split_files(folder)
    if absent := set(job.part.splits or ()) - set(paths_of):
        raise schema.BadSourceError(
            f"{folder} has no split {', '.join(sorted(absent))}, only {', '.join(paths_of)}"
        )
    reason = f"ignored_file: its name starts with none of {', '.join(schema.SPLITS)}"
    notes = [Note(str(path), None, "", reason) for path in others]
    first_places: dict[str, tuple[str, int]] = {}  # {pid: file and row of its first occurrence}
    shards, formats, several, optional = [], {}, False, False
    for split in dict.fromkeys(job.part.splits or paths_of):
        left, takes = job.part.limit or sys.maxsize, []
        for path in paths_of[split]:
            scan = source_files.scan(path, left, job.part.columns)
            left -= scan.rows
            if scan.rows:
                takes.append((path, scan))
                several |= scan.several_images
                optional |= scan.optional_image
                notes += [
                    Note(str(path), None, "", f"ignored_column: {column} is not read{hint}")
                    for column in scan.columns
                    if column not in asked and not schema.is_of_schema(column)
                    for hint in [_hint(column)]
                ]
            for row, pid in enumerate(scan.pids):
                here = (str(path), row)
                if pid is not None and (there := first_places.setdefault(str(pid), here)) != here:
                    reason = (
                        f"duplicate_pid: first in {there[0]}, {schema.place(*there)}; comparisons "
                        "of evaluations cannot pair the two where they have the same answer"
                    )
                    notes.append(Note(*here, str(pid), reason))
        if not takes:
            raise schema.BadSourceError(
                f"{folder}: the {split} files hold no row: write them again, or leave them out"
            )
        shards += [
            Shard(
                split=split,
                name=f"{schema.NAME}-{split}.array_record-{i:05d}-of-{len(takes):05d}",
                file=path.relative_to(folder).as_posix(),
                blake2b=scan.checksum,
                rows=scan.rows,
                columns=job.part.columns,
            )
            for i, (path, scan) in enumerate(takes)
        ]
        formats[f"{job.task}/{split}"] = " and ".join(
            dict.fromkeys(scan.format for _, scan in takes)
        )
    # All files of a task have the same features.
    shards = [s._replace(several_images=several, optional_image=optional) for s in shards]
    return shards, notes, formats


def _without_kind(note: Note) -> Note:
    """The note with its reason alone, where the kind is said already."""
    return note._replace(reason=note.reason.partition(": ")[2] or note.reason)


def _size(count: int) -> str:
    """A number of bytes in MB, or a small one in kB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _hint(column: str) -> str:
    """How to keep a column that chats often have; "" for another."""
    name = jsonl_files.OPTIONAL.get(column)
    return f", --columns={name} keeps it" if name else ""


# --- writing a task ------------------------------------------------------------------------------


def _prepare_task(
    job: _Job,
    shards: list[Shard],
    notes: list[Note],
    formats: dict[str, str],
    overwrite: bool,
    advance: Callable[[int], None],
) -> PrepareReport:
    """Writes a task's missing or damaged shards, the files for TFDS, and the report."""
    start = time.monotonic()
    report_file, progress_file = job.target / shards_lib.REPORT, job.target / "progress.json"
    if overwrite:
        for pattern in ("*.json", "buckets-*.npy", f"{schema.NAME}-*.array_record-*"):
            for path in job.target.glob(pattern):
                path.unlink()
    finished = _finished_shards(job, shards)
    if len(finished) == len(shards):
        lengths = {split: [] for split in dict.fromkeys(shard.split for shard in shards)}
        for shard in shards:
            lengths[shard.split].append(finished[shard.name]["rows"])
        if arrayrecord.describes(job.target, lengths):
            # If the report is missing or damaged, it is written again.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return PrepareReport.read(report_file)

    with _failures_explained(job.target):
        job.target.mkdir(parents=True, exist_ok=True)
        report_file.unlink(missing_ok=True)
        files.write_json(progress_file, finished)
    for shard in shards:
        if shard.name in finished:
            advance(shard.rows)
            continue
        with _failures_explained(job.target / shard.name):
            finished[shard.name] = _write_shard(job, shard, advance)
            files.write_json(progress_file, finished)
        rows = finished[shard.name]["rows"]
        logging.info("wrote %s rows of the split %s: %s", f"{rows:,}", shard.split, shard.name)

    records = [(shard.split, finished[shard.name]) for shard in shards]
    rows = {
        f"{job.task}/{split}": sum(record["rows"] for s, record in records if s == split)
        for split, _ in records
    }
    report = PrepareReport(
        rows,
        tuple(Note(*note) for _, record in records for note in record["bad_rows"]),
        tuple(notes) + tuple(Note(*note) for _, record in records for note in record["warnings"]),
        sum(record["bytes"] for _, record in records),
        time.monotonic() - start,
        formats,
    )
    for name, n in rows.items():
        if not n:
            raise schema.BadSourceError(f"{job.source}: no row of {name} is usable:\n{report}")
    with _failures_explained(report_file):
        features = _features(shards[0])
        _write_metadata(job, records, features)
        report.write(report_file)
    return report


def _finished_shards(job: _Job, shards: list[Shard]) -> dict[str, dict]:
    """{shard name: record} of the whole shards in the target folder (see `shards.read_progress`).

    Raises:
      FileExistsError: the folder holds something else than these shards.
      ValueError: progress.json is damaged.
      BadRowError: an earlier run left out a bad row, and this one is to fail there.
    """
    if (path := job.target / "progress.json").exists():
        try:
            done = shards_lib.read_progress(path)
        except ValueError as error:
            raise ValueError(
                f"{error}: which rows the folder holds is not known, so prepare {job.source} again "
                "with --overwrite"
            ) from error
        foreign = [
            name
            for name, record in done.items()
            if not any(_is_record_of(record, shard, job.source) for shard in shards)
        ]
    else:
        done = {}
        foreign = [path.name for path in job.target.glob("*") if path.suffix != ".tmp"]
    if foreign:
        raise FileExistsError(
            f"{job.target} holds something else than {job.source} as it is and as asked for now "
            f"(other or edited files, splits, columns or limit), e.g. {min(foreign)}: choose "
            "another target, or replace it with --overwrite"
        )
    if not job.skip_bad_rows:
        for file, index, pid, reason in (
            note for record in done.values() for note in record["bad_rows"]
        ):
            raise schema.BadRowError(file, index, pid, *reason.split(" ", 1))
    return {name: record for name, record in done.items() if _is_whole(job.target / name, record)}


def _is_record_of(record: dict, shard: Shard, folder: Path) -> bool:
    """Whether a record of progress.json is that of a shard.

    Older versions recorded the size of the parquet file where its checksum is now.
    """
    fields = shard.record()
    if isinstance(record["shard"][3], int):
        fields[3] = (folder / shard.file).stat().st_size
    return record["shard"] == fields


def _is_whole(path: Path, record: dict) -> bool:
    """Whether a shard holds what was written.

    It counts as damaged if an older version wrote its record, without a checksum.
    """
    return (
        "blake2b" in record
        and isinstance(record["shard"][3], str)
        and path.exists()
        and path.stat().st_size == record["file_bytes"]
        and shards_lib.checksum(path) == record["blake2b"]
    )


def _write_shard(job: _Job, shard: Shard, advance: Callable[[int], None]) -> dict[str, Any]:
    """Converts one file. Returns the shard's record for progress.json."""
    from array_record.python import array_record_module

    source, serialized = job.source / shard.file, _serializer(shard)

    def convert(row: schema.Row) -> tuple[bytes | None, tuple[Note, ...]]:
        try:
            example, warnings = source_files.to_example(
                row, file=str(source), task=job.task, columns=job.part.columns
            )
        except schema.BadRowError as error:
            if not job.skip_bad_rows:
                raise
            return None, (error.note,)
        return serialized(example), warnings

    record: dict[str, Any] = {
        "shard": shard.record(),
        "rows": 0,
        "bytes": 0,
        "bad_rows": [],
        "warnings": [],
    }
    unfinished = job.target / (shard.name + ".tmp")
    # Groups of one record make random access cheap.
    writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
    try:
        with ThreadPoolExecutor() as threads:  # Pillow decodes without the interpreter lock
            for batch in source_files.read_batches(source, shard.rows, job.part.columns):
                for blob, notes in threads.map(convert, batch):
                    advance(1)
                    record["warnings" if blob else "bad_rows"] += notes
                    if blob:
                        writer.write(blob)
                        record["rows"] += 1
                        record["bytes"] += len(blob)
        writer.close()
        if shards_lib.count_records(unfinished) != record["rows"]:
            raise OSError(f"{record['rows']} rows were written and cannot all be read back")
        record |= {
            "file_bytes": unfinished.stat().st_size,
            "blake2b": shards_lib.checksum(unfinished),
        }
        os.replace(unfinished, job.target / shard.name)
    finally:
        with contextlib.suppress(RuntimeError):  # the first error is the one to report
            writer.close()
        unfinished.unlink(missing_ok=True)
    return record


def _features(shard: Shard) -> "tfds.features.FeaturesDict":
    return schema.features(shard.columns, shard.several_images, shard.optional_image)


def _serializer(shard: Shard) -> Callable[[schema.Example], bytes]:
    """A function that turns an example of a shard into the bytes of its record."""
    from tensorflow_datasets.core import example_serializer

    several, optional = shard.several_images, shard.optional_image
    features = _features(shard)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialized(example: schema.Example) -> bytes:
        values = features.encode_example(schema.to_features(example, several, optional))
        record = serializer.get_tf_example(values)
        # Without this, each process would have its own order of fields and so its own digest.
        return record.SerializeToString(deterministic=True)

    return serialized


def _write_metadata(
    job: _Job, records: list[tuple[str, dict]], features: "tfds.features.FeaturesDict"
) -> None:
    """Writes the files that TFDS reads.

    records: (split, record for progress.json) of every shard.
    """
    import tensorflow_datasets as tfds

    infos = []
    for split in dict.fromkeys(split for split, _ in records):
        mine = [record for s, record in records if s == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=job.target,
            dataset_name=schema.NAME,
            split=split,
            filetype_suffix="array_record",
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[record["rows"] for record in mine],
                num_bytes=sum(record["bytes"] for record in mine),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=job.target,
        features=features,
        split_infos=infos,
        version=schema.VERSION,
        check_data=False,  # the check reads with TensorFlow
        filename_template=template.replace(split=None),
        description=schema.DESCRIPTION,
    )


@contextlib.contextmanager
def _failures_explained(path: Path) -> Iterator[None]:
    """Turns a failed write into an OSError that names the file and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError, and only on close
        raise OSError(
            f"{path} could not be written ({error}). If the disk is full, free space; then run the "
            "same command again: finished shards are kept"
        ) from error
