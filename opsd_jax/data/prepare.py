"""Parquet files of the released layout become ArrayRecord files that TFDS reads."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from opsd_jax.data import arrayrecord, parquet_files
from opsd_jax.data import schema as schema_lib
from opsd_jax.inputs import json_files, paths
from opsd_jax.runtime import files as files_lib
from opsd_jax.runtime import locks


def prepare(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    on_bad_row: str = "fail",
    splits: tuple[str, ...] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    limit: int | None = None,
) -> schema_lib.PrepareReport:
    """Writes TARGET/visual_opsd/<task>/1.0.0/ for every task in SOURCE, in memory of a few rows.

    Interrupted, it goes on where it stopped when run again: finished shards are kept. Run on finished work it
    changes nothing and gives the report again; what is damaged there is written again. Files are compared by their
    content. All footers and columns are checked before a byte is written.

    Args:
      source: a folder of <Task>/data/<split>-*.parquet, or one such task.
      target: the TFDS data_dir.
      on_bad_row: "fail" raises at the first bad row; "skip" leaves bad rows out and names them in the report.
      splits: which splits; None: all that are there.
      overwrite: throw away a different preparation in the target folder.
      progress: a bar on a terminal, a log line per shard elsewhere.
      limit: take only so many first rows of every split, in file order; bad ones count (as the official
        loader's num_used_data).

    Returns:
      The report over all tasks; every task's own is in its report.json.

    Raises:
      BadSourceError, BadRowError: see there.
      FileExistsError: the target folder holds rows of other files, splits or another limit, or of a file that has been
        edited since.
      locks.FolderInUseError: another command is writing there.
      OSError: a failing write, e.g. a full disk; no half shard counts as finished.
    """
    paths.check_given("--source", source)
    paths.check_given("--target", target)
    if on_bad_row not in ("fail", "skip"):
        raise ValueError(f"on_bad_row must be 'fail' or 'skip', got {on_bad_row!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 row, or None for all, got {limit}")
    work = {
        task: (folder, *_plan_shards(task, folder, Path(target), splits, limit))
        for task, folder in parquet_files.task_folders(source).items()
    }
    rows = sum(shard.rows for _, _, shards, _ in work.values() for shard in shards)
    with locks.only_writer(target), _bar(progress, rows) as tick:
        reports = [
            _prepare_task(task, *plan, on_bad_row == "skip", overwrite, tick)
            for task, plan in work.items()
        ]
    return schema_lib.PrepareReport(
        rows={name: n for report in reports for name, n in report.rows.items()},
        bad_rows=sum((report.bad_rows for report in reports), ()),
        warnings=sum((report.warnings for report in reports), ()),
        bytes=sum(report.bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
    )


def _plan_shards(
    task: str, folder: Path, target: Path, splits: tuple[str, ...] | None, limit: int | None
) -> tuple[Path, list[parquet_files.Shard], list[schema_lib.Note]]:
    """Target folder, shards to write, and warnings about files and columns. Decodes nothing but the pids."""
    files, others = parquet_files.split_files(folder)
    if absent := set(splits or ()) - set(files):
        raise schema_lib.BadSourceError(
            f"{folder} has no split {', '.join(sorted(absent))}, only {', '.join(files)}"
        )
    notes = [
        schema_lib.Note(
            str(path),
            None,
            "",
            f"ignored_file: its name starts with none of {', '.join(schema_lib.SPLITS)}",
        )
        for path in others
    ]
    pids: dict[str, tuple[str, int]] = {}  # every pid and where it stands first
    shards = []
    for split in dict.fromkeys(splits or files):
        left, takes = limit or sys.maxsize, []
        for path in files[split]:
            with parquet_files.open_parquet(path) as file:
                present, rows = file.schema_arrow.names, min(left, file.metadata.num_rows)
                parquet_files.columns(path, present)
                pids_here = file.iter_batches(columns=["pid"]) if "pid" in present else ()
                found = [pid for batch in pids_here for pid in batch["pid"].to_pylist()][:rows]
            left -= rows
            if rows:
                takes.append((path, rows))
                notes += [
                    schema_lib.Note(str(path), None, "", f"ignored_column: {column} is not read")
                    for column in present
                    if column not in schema_lib.COLUMNS and not schema_lib.is_surplus(column)
                ]
            for row, pid in enumerate(found):
                here = (str(path), row)
                if pid is not None and (there := pids.setdefault(str(pid), here)) != here:
                    notes.append(
                        schema_lib.Note(
                            *here, str(pid), f"duplicate_pid: first in {there[0]}, row {there[1]}"
                        )
                    )
        if not takes:
            raise schema_lib.BadSourceError(
                f"{folder}: the {split} files hold no row: write them again, or leave them out"
            )
        shards += [
            parquet_files.Shard(
                split,
                f"{schema_lib.NAME}-{split}.array_record-{i:05d}-of-{len(takes):05d}",
                path.relative_to(folder).as_posix(),
                arrayrecord.checksum(path),
                rows,
            )
            for i, (path, rows) in enumerate(takes)
        ]
    return arrayrecord.version_folder(target, task), shards, notes


def _prepare_task(
    task: str,
    folder: Path,
    directory: Path,
    shards: list[parquet_files.Shard],
    notes: list[schema_lib.Note],
    skip: bool,
    overwrite: bool,
    tick: Callable[[int], None],
) -> schema_lib.PrepareReport:
    start = time.monotonic()
    report_file, progress_file = directory / "report.json", directory / "progress.json"
    if overwrite:
        for pattern in ("*.json", f"{schema_lib.NAME}-*.array_record-*"):
            for path in directory.glob(pattern):
                path.unlink()
    if progress_file.exists():
        try:
            done = arrayrecord.read_progress(progress_file)
        except ValueError as error:
            raise ValueError(
                f"{error}: which rows the folder holds is not known, so prepare {folder} again with "
                "--overwrite"
            ) from error
        foreign = [
            name
            for name, record in done.items()
            if not any(_is_of(record, shard, folder) for shard in shards)
        ]
    else:
        done = {}
        foreign = [path.name for path in directory.glob("*") if path.suffix != ".tmp"]
    if foreign:
        raise FileExistsError(
            f"{directory} holds something else than {folder} as it is and as asked for now "
            f"(other or edited files, splits or limit), e.g. {min(foreign)}: choose another target, "
            "or replace it with --overwrite"
        )
    for file, index, pid, reason in (
        note for record in done.values() for note in record["bad_rows"]
    ):
        if not skip:  # skipped by an earlier run
            raise schema_lib.BadRowError(file, index, pid, *reason.split(" ", 1))
    finished = {
        name: record for name, record in done.items() if _is_whole(directory / name, record)
    }
    if len(finished) == len(shards) and arrayrecord.metadata_fits(directory, shards, finished):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # absent or damaged: written again
            return _read_report(report_file)

    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        report_file.unlink(missing_ok=True)
        files_lib.write_json(progress_file, finished)
    for shard in shards:
        if shard.name in finished:
            tick(shard.rows)
            continue
        with _writing(directory / shard.name):
            finished[shard.name] = _write_shard(
                task, folder / shard.file, shard, directory, skip, tick
            )
            files_lib.write_json(progress_file, finished)
        logging.info("%s: %d rows", directory / shard.name, finished[shard.name]["rows"])

    records = [(shard.split, finished[shard.name]) for shard in shards]
    rows = {
        f"{task.lower()}/{split}": sum(record["rows"] for s, record in records if s == split)
        for split, _ in records
    }
    report = schema_lib.PrepareReport(
        rows,
        tuple(schema_lib.Note(*note) for _, record in records for note in record["bad_rows"]),
        tuple(notes)
        + tuple(schema_lib.Note(*note) for _, record in records for note in record["warnings"]),
        sum(record["bytes"] for _, record in records),
        time.monotonic() - start,
    )
    for name, n in rows.items():
        if not n:
            raise schema_lib.BadSourceError(f"{folder}: no row of {name} is usable:\n{report}")
    with _writing(report_file):
        _write_metadata(directory, records)
        files_lib.write_json(
            report_file,
            vars(report)
            | {
                key: [note._asdict() for note in getattr(report, key)]
                for key in ("bad_rows", "warnings")
            },
        )
    return report


def _write_shard(
    task: str,
    source: Path,
    shard: parquet_files.Shard,
    directory: Path,
    skip: bool,
    tick: Callable[[int], None],
) -> dict:
    """Converts one parquet file; gives the shard's record for progress.json."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    schema = schema_lib.features()
    serializer = example_serializer.ExampleSerializer(schema.get_serialized_info())

    def serialized(example: schema_lib.Example) -> bytes:
        record = serializer.get_tf_example(schema.encode_example(schema_lib.to_features(example)))
        return record.SerializeToString(
            deterministic=True
        )  # else each process has an order of fields, and a digest, of its own

    def convert(item: tuple[int, dict]) -> tuple[bytes | None, tuple[schema_lib.Note, ...]]:
        try:
            example, warnings = schema_lib.read_row(
                item[1], file=str(source), index=item[0], task=task
            )
        except schema_lib.BadRowError as error:
            if not skip:
                raise
            return None, (error.note,)
        return serialized(example), warnings

    record: dict[str, Any] = {
        "shard": list(shard),
        "rows": 0,
        "bytes": 0,
        "bad_rows": [],
        "warnings": [],
    }
    unfinished = directory / (shard.name + ".tmp")
    writer = array_record_module.ArrayRecordWriter(
        str(unfinished), "group_size:1"
    )  # 1: cheap random access
    try:
        with ThreadPoolExecutor() as threads:  # Pillow decodes without the interpreter lock
            for batch in parquet_files.read_batches(source, shard.rows):
                for blob, notes in threads.map(convert, batch):
                    tick(1)
                    record["warnings" if blob else "bad_rows"] += notes
                    if blob:
                        writer.write(blob)
                        record["rows"] += 1
                        record["bytes"] += len(blob)
        writer.close()
        if arrayrecord.count_records(unfinished) != record["rows"]:
            raise OSError(f"{record['rows']} rows were written and cannot all be read back")
        record |= {
            "file_bytes": unfinished.stat().st_size,
            "blake2b": arrayrecord.checksum(unfinished),
        }
        os.replace(unfinished, directory / shard.name)
    finally:
        with contextlib.suppress(RuntimeError):  # the first error is the one to tell
            writer.close()
        unfinished.unlink(missing_ok=True)
    return record


def _write_metadata(directory: Path, records: list[tuple[str, dict]]) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for split in dict.fromkeys(split for split, _ in records):
        mine = [record for s, record in records if s == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=schema_lib.NAME,
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
    tfds.folder_dataset.write_metadata(  # check_data would read with TensorFlow
        data_dir=directory,
        features=schema_lib.features(),
        split_infos=infos,
        version=schema_lib.VERSION,
        check_data=False,
        filename_template=template.replace(split=None),
        description="Questions about a picture with interleaved textual and visual reasoning.",
    )


def _is_of(record: dict, shard: parquet_files.Shard, folder: Path) -> bool:
    """Whether a record of progress.json is of this shard; before there were checksums it held the parquet's size."""
    is_old = isinstance(record["shard"][3], int)
    return record["shard"] == list(
        shard._replace(blake2b=(folder / shard.file).stat().st_size) if is_old else shard
    )


def _is_whole(path: Path, record: dict) -> bool:
    """Whether a shard holds what was written. Without its checksum (older versions) nobody knows."""
    return (
        "blake2b" in record
        and isinstance(record["shard"][3], str)
        and path.exists()
        and path.stat().st_size == record["file_bytes"]
        and arrayrecord.checksum(path) == record["blake2b"]
    )


def _read_report(path: Path) -> schema_lib.PrepareReport:
    fields = json_files.read(str(path))
    notes = {
        key: tuple(schema_lib.Note(**note) for note in fields[key])
        for key in ("bad_rows", "warnings")
    }
    return schema_lib.PrepareReport(**fields | notes)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError, and only on close
        raise OSError(
            f"{path} could not be written ({error}). If the disk is full, free space; then run the "
            "same command again: finished shards are kept"
        ) from error


@contextlib.contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the number of rows just done."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda rows: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        job = bar.add_task("preparing rows", total=total)
        yield lambda rows: bar.advance(job, rows)
