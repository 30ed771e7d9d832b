"""The interleaved visual reasoning rows: from released parquet to TFDS folders, and random access to either.

    SOURCE/<Task>/data/train-*.parquet  --prepare-->  TARGET/visual_opsd/<task>/1.0.0/
        rows of                                  visual_opsd-train.array_record-00000-of-00003   one per file
        problem_image_0 {bytes, path}            dataset_info.json features.json   what plain TFDS reads
        question, answer, pid, task              progress.json   finished shards: a rerun keeps them
        resoning_thought_0..7   (sic)            report.json     rows, bad rows, warnings; written last
        reasoning_image_0..7 {bytes, path}
        full_text_only_thought, metadata

`open_source` reads the prepared folder and is what training wants. `ParquetSource` reads parquet as it is: no
preparation, but a random row costs the reading of its row group. Both give `Example`s by the same rules.
TensorFlow is never imported. Encoded pictures pass through bit by bit.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import operator
import os
from pathlib import Path
import re
import sys
import time
from typing import Any, NamedTuple

from absl import logging
from PIL import Image

from opsd_jax import files as files_lib
from opsd_jax import images, json_files, locks, paths, tags, tasks

NAME, VERSION = "visual_opsd", "1.0.0"
SPLITS = ("train", "validation", "test")
ROUNDS = 8  # thoughts and visual thoughts a row can hold

_PROBLEM = "problem_image_0"
_THOUGHTS = tuple(f"resoning_thought_{i}" for i in range(ROUNDS))  # spelt so in the released files
_VISUALS = tuple(f"reasoning_image_{i}" for i in range(ROUNDS))
_REQUIRED = ("question", "answer", _PROBLEM, _THOUGHTS[0])
_COLUMNS = (
    "pid",
    "task",
    *_REQUIRED[:3],
    *_THOUGHTS,
    *_VISUALS,
    "full_text_only_thought",
    "metadata",
)
_IMAGES = ("problem_image", "reasoning_images")  # features of encoded pictures
_TEXTS = (
    "pid",
    "task",
    "question",
    "answer",
    "full_text_only_thought",
)  # fields both here and in TFDS
_NO_PICTURE = {"bytes": None, "path": None}  # some writers' None
_SURPLUS = re.compile(
    r"(resoning_thought|reasoning_image)_(\d+)"
)  # beyond _THOUGHTS and _VISUALS: see `_is_surplus`
_BATCH_ROWS, _BATCH_BYTES = (
    32,
    64 << 20,
)  # of parquet in memory at a time: rows, or fewer where they are large
_PREPARE = "python -m opsd_jax.data prepare --source=PARQUET_DIR --target=DIR"


@dataclasses.dataclass(frozen=True)
class Example:
    """One row.

    Attributes:
      pid: name of the row; "<file stem>:<row>" where the source has none.
      task: the row's task column, else the name of its folder.
      question, answer: as in the source, never blank.
      problem_image: the encoded picture (PNG, JPEG, ...).
      visual_thoughts: the encoded pictures of the reasoning, in order; may be empty.
      thoughts: the texts of the reasoning, in order; at least one.
      full_text_only_thought: a reasoning without pictures; "" where there is none.
      metadata: facts about the row (the procedural tasks write them); {} where there are none.
    """

    pid: str
    task: str
    question: str
    answer: str
    problem_image: bytes
    visual_thoughts: tuple[bytes, ...]
    thoughts: tuple[str, ...]
    full_text_only_thought: str = ""
    metadata: dict = dataclasses.field(default_factory=dict)


class Note(NamedTuple):
    """Something to know about a row (row None: about the whole file); rows count from 0."""

    file: str
    row: int | None
    pid: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.file}"
            + (f", row {self.row}, pid {self.pid!r}" if self.row is not None else "")
            + f": {self.reason}"
        )


class BadSource(ValueError):
    """A folder or file that holds no usable parquet rows."""


class BadRow(ValueError):
    """A row that cannot be trained on."""

    def __init__(self, file: str, row: int, pid: str, column: str, fault: str):
        super().__init__(
            file, row, pid, column, fault
        )  # all arguments: so that it survives pickling
        self.note = Note(file, row, pid, f"{column} {fault}")

    def __str__(self) -> str:
        return (
            f"{self.note}. Mend the row in the parquet file, or leave bad rows out with "
            f"`{_PREPARE} --on_bad_row=skip`, which counts and names them"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `prepare` did; `str()` gives a summary for people.

    Attributes:
      rows: rows written, by "<task>/<split>".
      bad_rows: every row left out, with the reason.
      warnings: every oddity in rows that were kept; reasons start with `no_visual_thought`,
        `dropped_visual_thought`, `dropped_thought`, `unused_visual_thought`, `duplicate_pid`, `ignored_column` or
        `ignored_file`.
      bytes: of the written records.
      seconds: of the run that finished the work.
    """

    rows: dict[str, int]
    bad_rows: tuple[Note, ...]
    warnings: tuple[Note, ...]
    bytes: int
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{sum(self.rows.values())} rows ({', '.join(f'{k} {n}' for k, n in self.rows.items())}), "
            f"{self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s"
        ]
        if self.bad_rows:
            lines += [
                f"{len(self.bad_rows)} bad rows left out:",
                *(f"  {note}" for note in self.bad_rows),
            ]
        kinds: dict[str, list[Note]] = {}
        for note in self.warnings:
            kinds.setdefault(note.reason.split(":")[0], []).append(note)
        lines += [
            f"warning {kind}: {len(notes)} (first: {notes[0]}; all in report.json)"
            for kind, notes in kinds.items()
        ]
        return "\n".join(lines)


# -------------------------------------------------------------------------------- rows


def read_row(
    row: Mapping[str, Any], *, file: str, index: int, task: str
) -> tuple[Example, tuple[Note, ...]]:
    """One parquet row as an Example, by the rules of the official loader.

    Args:
      row: column name -> value; pictures are {bytes, path} or None.
      file, index, task: where the row stands, for messages and for a missing pid or task column.

    Returns:
      The example and its warnings: visual thoughts that are missing between others, cannot be decoded, or follow
      the last that a row can hold are left out with a warning, and a row left without any gets one; likewise surplus
      thoughts.

    Raises:
      BadRow: blank question or answer, no thought, a problem picture that training could not open, a value of a
        wrong type, metadata that is no JSON object or cannot score, an answer that no completion matches.
    """
    pid = str(row["pid"]) if row.get("pid") is not None else f"{Path(file).stem}:{index}"

    def bad(column: str, fault: str) -> BadRow:
        return BadRow(file, index, pid, column, fault)

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise bad(column, f"is of type {type(value).__name__}, not text")
        return value or ""

    for column in ("question", "answer"):
        if tasks.is_blank(text(column)):
            raise bad(column, "is empty")
    thoughts = tuple(t for t in map(text, _THOUGHTS) if t.strip())
    if not thoughts:
        raise bad(_THOUGHTS[0], f"and its successors to {_THOUGHTS[-1]} hold no thought")
    if fault := _picture_fault(row.get(_PROBLEM)):
        raise bad(_PROBLEM, fault)

    warnings, visual_thoughts = [], []
    present = [i for i, column in enumerate(_VISUALS) if row.get(column) not in (None, _NO_PICTURE)]
    for column in _VISUALS[: max(present, default=-1) + 1]:
        if fault := _picture_fault(row.get(column)):
            warnings.append(Note(file, index, pid, f"dropped_visual_thought: {column} {fault}"))
        else:
            visual_thoughts.append(row[column]["bytes"])
    for column in filter(_is_surplus, row):
        if row[column] not in (None, "", _NO_PICTURE):
            kind = "dropped_thought" if column.startswith("resoning") else "dropped_visual_thought"
            warnings.append(
                Note(file, index, pid, f"{kind}: {column} is not read, a row holds {ROUNDS}")
            )
    if not visual_thoughts:
        warnings.append(
            Note(file, index, pid, "no_visual_thought: the teacher sees what the student sees")
        )
    if len(visual_thoughts) >= len(
        thoughts
    ):  # in an interleaved trace, each follows a thought and precedes another
        warnings.append(
            Note(
                file,
                index,
                pid,
                f"unused_visual_thought: between {len(thoughts)} thoughts interleaved traces "
                f"show {len(thoughts) - 1} of {len(visual_thoughts)}; the teacher sees all",
            )
        )

    stored = text("metadata")
    try:
        metadata = json.loads(stored or "{}")
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
        raise bad("metadata", f"is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise bad("metadata", "is JSON, but not an object {...}")
    if fault := tasks.fault(metadata, tags.wrap_answer(text("answer"))):
        raise bad(*fault.split(" ", 1))
    example = Example(
        pid,
        text("task") or task,
        text("question"),
        text("answer"),
        row[_PROBLEM]["bytes"],
        tuple(visual_thoughts),
        thoughts,
        text("full_text_only_thought"),
        metadata,
    )
    return example, tuple(warnings)


def _picture_fault(value: Any) -> str | None:
    if value in (None, _NO_PICTURE):
        return "is missing"
    if not isinstance(value, Mapping) or not isinstance(value.get("bytes"), bytes | None):
        return "is not a picture {bytes, path}"
    if not value.get("bytes"):
        return (
            f"holds no bytes (path: {value.get('path')!r}); embed the pictures in the parquet file"
        )
    try:
        images.open_rgb(value["bytes"])  # the function that training opens it with
    except images.UnreadableImage as error:
        return f"cannot be decoded: {error}"
    return None


def features():
    """The TFDS features of a row; see `Example` for their meaning. Text comes back from TFDS as bytes."""
    import tensorflow_datasets as tfds

    text, image = tfds.features.Text, functools.partial(tfds.features.Image, shape=(None, None, 3))
    return tfds.features.FeaturesDict(
        {name: text() for name in (*_TEXTS, "metadata")}
        | {
            "problem_image": image(),
            "reasoning_thoughts": tfds.features.Sequence(text()),
            "reasoning_images": tfds.features.Sequence(image()),
        }
        | {f"{name}_original": tfds.features.Sequence(text()) for name in _IMAGES}
    )


def to_features(example: Example) -> dict[str, Any]:
    """The example as TFDS encodes it. Pictures as files, which it stores verbatim; arrays need TensorFlow.

    Plain TFDS would show RGBA or CMYK with four channels and a palette as numbers. So a file that is neither RGB nor grey
    is stored as RGB, and beside it, in `<feature>_original`, as it was: [] where all are as they were.
    """
    record = {name: getattr(example, name) for name in _TEXTS} | {
        "metadata": json.dumps(example.metadata) if example.metadata else "",
        "reasoning_thoughts": list(example.thoughts),
    }
    for name, files in zip(_IMAGES, ((example.problem_image,), example.visual_thoughts)):
        shown = [_as_rgb(data) for data in files]
        changed = any(one is not other for one, other in zip(shown, files))
        record[name], record[f"{name}_original"] = (
            [io.BytesIO(data) for data in shown],
            list(files) if changed else [],
        )
    return record | {"problem_image": record["problem_image"][0]}


def _as_rgb(data: bytes) -> bytes:
    """The same encoded picture where plain TFDS shows it with three channels, else a PNG of what training sees by default."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("RGB", "L"):
            return data
    file = io.BytesIO()
    images.open_rgb(data, transparency="drop").save(file, "PNG")
    return file.getvalue()


# -------------------------------------------------------------------------------- parquet


def task_folders(source: str | os.PathLike) -> dict[str, Path]:
    """Task name -> its folder of parquet files: SOURCE itself, or folders in it; files may lie under data/.

    Raises:
      BadSource: nothing found, or two tasks that would share a name.
    """
    source = Path(os.path.abspath(source))  # links keep their name: it may be the task's
    if not source.is_dir():
        raise BadSource(
            f"{source} is not a folder; --source is the folder with <Task>/data/train-*.parquet"
        )
    named = source.parent if source.name == "data" else source  # someone pointed at <Task>/data
    folders = [named] if _parquet_files(source) else []
    children = [
        child
        for child in sorted(source.iterdir())
        if child.is_dir() and child.name != "data" and _parquet_files(child)
    ]
    if folders and children:
        raise BadSource(
            f"{source} holds parquet files and so do its folders {[c.name for c in children]}: "
            "is it one task or several? Move the files, or prepare the folders one by one"
        )
    tasks = {folder.name: folder for folder in folders + children}
    if not tasks:
        inside = [path.name for path in sorted(source.iterdir())][:10]
        raise BadSource(
            f"{source} holds no parquet: looked for *.parquet and data/*.parquet in it and in "
            f"its folders; it holds {inside}. File names start with {', '.join(SPLITS)}"
        )
    for task in tasks:
        if not re.fullmatch(r"[\w.-]+", task):
            raise BadSource(
                f"{tasks[task]}: TFDS takes letters, digits, _ - . in a name; rename the folder"
            )
    if len({task.lower() for task in tasks}) < len(tasks):
        raise BadSource(
            f"{source}: {list(tasks)} differ in upper and lower case only; rename a folder"
        )
    return tasks


def _parquet_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])


def _split_files(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """The parquet files of one task: {split: files in order}, and those whose name starts with no split."""
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    others = []
    for path in _parquet_files(folder):
        split = re.match(rf"(?:({'|'.join(SPLITS)})(?![a-z]))?", path.name)[1]
        (files[split] if split else others).append(path)
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise BadSource(
            f"{folder}: no parquet file is named after a split "
            f"({', '.join(f'{split}-*.parquet' for split in SPLITS)}); "
            f"found {[path.name for path in others][:10]}. Rename the files"
        )
    return files, others


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open parquet file. What goes wrong inside is put down to the file: do nothing there but read it."""
    import pyarrow
    import pyarrow.parquet

    try:  # pre_buffer, on by default, would hold the whole file in memory
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadSource(
            f"{path} cannot be read as parquet ({error}): download or write it again"
        ) from error


def _columns(path: Path, present: list[str]) -> list[str]:
    """The columns to read. Raises BadSource where a needed one is missing or a name looks misspelt."""
    missing = [column for column in _REQUIRED if column not in present]
    awaited = [
        column
        for column in dict.fromkeys((*missing, *_THOUGHTS, *_VISUALS))
        if column not in present
    ]
    hints = [
        f"{column!r} is not read: did you mean {close[0]!r}?"
        for column in present
        if column not in _COLUMNS and not _is_surplus(column)
        if (close := difflib.get_close_matches(column, awaited, 1, cutoff=0.85))
    ]
    if missing or hints:
        fault = (
            f"has no column {', '.join(map(repr, missing))}" if missing else "has unknown columns"
        )
        raise BadSource(
            f"{path} {fault}; its columns: {', '.join(present)}. "
            + " ".join(hints or ["Rename or add the column"])
            + " (the released files do spell 'resoning_thought_0' but 'reasoning_image_0')"
        )
    return [*filter(present.__contains__, _COLUMNS), *filter(_is_surplus, present)]


def _is_surplus(column: str) -> bool:
    """Whether a column holds a thought or visual thought beyond the last that a row can hold."""
    found = _SURPLUS.fullmatch(column)
    return bool(found) and int(found[2]) >= ROUNDS


def _one_by_one(file, columns: list[str], **options) -> Iterator[Any]:
    """Arrow batches of one row each. Arrow cannot give more than 2 GiB of a picture column in one batch, and only the
    row itself tells how large it is."""
    return file.iter_batches(1, columns=columns, **options)


def _read_batches(path: Path, stop: int) -> Iterator[list[tuple[int, dict]]]:
    """Rows 0 .. stop-1 as lists of (row number, row): a batch and its row group in memory, never a file."""
    rows, size = [], 0
    with _parquet(path) as file:
        for index, batch in zip(
            range(stop), _one_by_one(file, _columns(path, file.schema_arrow.names))
        ):
            rows.append((index, batch.to_pylist()[0]))
            size += batch.nbytes
            if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows


def read_examples(path: str | os.PathLike, *, task: str) -> Iterator[Example]:
    """The rows of one parquet file in order. Raises BadSource, BadRow."""
    for batch in _read_batches(Path(path), sys.maxsize):
        for index, row in batch:
            yield read_row(row, file=str(path), index=index, task=task)[0]


# -------------------------------------------------------------------------------- prepare


class _Shard(NamedTuple):
    """One output file to write, from the first `rows` rows of one parquet file, whose checksum is `blake2b`."""

    split: str
    name: str
    file: str
    blake2b: str
    rows: int


def prepare(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    on_bad_row: str = "fail",
    splits: tuple[str, ...] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    limit: int | None = None,
) -> Report:
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
      BadSource, BadRow: see there.
      FileExistsError: the target folder holds rows of other files, splits or another limit, or of a file that has been
        edited since.
      locks.FolderInUse: another command is writing there.
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
        for task, folder in task_folders(source).items()
    }
    rows = sum(shard.rows for _, _, shards, _ in work.values() for shard in shards)
    with locks.only_writer(target), _bar(progress, rows) as tick:
        reports = [
            _prepare_task(task, *plan, on_bad_row == "skip", overwrite, tick)
            for task, plan in work.items()
        ]
    return Report(
        rows={name: n for report in reports for name, n in report.rows.items()},
        bad_rows=sum((report.bad_rows for report in reports), ()),
        warnings=sum((report.warnings for report in reports), ()),
        bytes=sum(report.bytes for report in reports),
        seconds=sum(report.seconds for report in reports),
    )


def version_folder(target: str | os.PathLike, task: str) -> Path:
    """Where a task lies below a TFDS data_dir."""
    return Path(target) / NAME / task.lower() / VERSION


def digest(target: str | os.PathLike, task: str) -> str:
    """A checksum of the prepared rows of a task: of the content of its shards, wherever the folder is stored and whenever
    it was written. What a cache of the rows depends on.

    `prepare` left the shards' own checksums in progress.json; where they are not there, as in a folder made by the TFDS
    builder, or a shard has another size by now, the shard is read. What is broken is `open_source`'s to tell.
    """
    folder, found = version_folder(target, task), hashlib.blake2b(digest_size=16)
    try:
        records = _read_progress(folder / "progress.json")
    except (FileNotFoundError, ValueError):
        records = {}
    for path in sorted(folder.glob(f"{NAME}-*.array_record-*")):
        record = records.get(path.name, {})
        known = "blake2b" in record and record["file_bytes"] == path.stat().st_size
        found.update(f"{path.name} {record['blake2b'] if known else _checksum(path)}\n".encode())
    return found.hexdigest()


def _checksum(path: Path) -> str:
    if (size := path.stat().st_size) > 1 << 28:  # seconds, on a mounted bucket perhaps a minute
        logging.info("%s: reading %.1f GB for a checksum", path, size / 1e9)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _plan_shards(
    task: str, folder: Path, target: Path, splits: tuple[str, ...] | None, limit: int | None
) -> tuple[Path, list[_Shard], list[Note]]:
    """Target folder, shards to write, and warnings about files and columns. Decodes nothing but the pids."""
    files, others = _split_files(folder)
    if absent := set(splits or ()) - set(files):
        raise BadSource(
            f"{folder} has no split {', '.join(sorted(absent))}, only {', '.join(files)}"
        )
    notes = [
        Note(str(path), None, "", f"ignored_file: its name starts with none of {', '.join(SPLITS)}")
        for path in others
    ]
    pids: dict[str, tuple[str, int]] = {}  # every pid and where it stands first
    shards = []
    for split in dict.fromkeys(splits or files):
        left, takes = limit or sys.maxsize, []
        for path in files[split]:
            with _parquet(path) as file:
                present, rows = file.schema_arrow.names, min(left, file.metadata.num_rows)
                _columns(path, present)
                pids_here = file.iter_batches(columns=["pid"]) if "pid" in present else ()
                found = [pid for batch in pids_here for pid in batch["pid"].to_pylist()][:rows]
            left -= rows
            if rows:
                takes.append((path, rows))
                notes += [
                    Note(str(path), None, "", f"ignored_column: {column} is not read")
                    for column in present
                    if column not in _COLUMNS and not _is_surplus(column)
                ]
            for row, pid in enumerate(found):
                here = (str(path), row)
                if pid is not None and (there := pids.setdefault(str(pid), here)) != here:
                    notes.append(
                        Note(*here, str(pid), f"duplicate_pid: first in {there[0]}, row {there[1]}")
                    )
        if not takes:
            raise BadSource(
                f"{folder}: the {split} files hold no row: write them again, or leave them out"
            )
        shards += [
            _Shard(
                split,
                f"{NAME}-{split}.array_record-{i:05d}-of-{len(takes):05d}",
                path.relative_to(folder).as_posix(),
                _checksum(path),
                rows,
            )
            for i, (path, rows) in enumerate(takes)
        ]
    return version_folder(target, task), shards, notes


def _prepare_task(
    task: str,
    folder: Path,
    directory: Path,
    shards: list[_Shard],
    notes: list[Note],
    skip: bool,
    overwrite: bool,
    tick: Callable[[int], None],
) -> Report:
    start = time.monotonic()
    report_file, progress_file = directory / "report.json", directory / "progress.json"
    if overwrite:
        for pattern in ("*.json", f"{NAME}-*.array_record-*"):
            for path in directory.glob(pattern):
                path.unlink()
    if progress_file.exists():
        try:
            done = _read_progress(progress_file)
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
            raise BadRow(file, index, pid, *reason.split(" ", 1))
    finished = {
        name: record for name, record in done.items() if _is_whole(directory / name, record)
    }
    if len(finished) == len(shards) and _metadata_fits(directory, shards, finished):
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
    report = Report(
        rows,
        tuple(Note(*note) for _, record in records for note in record["bad_rows"]),
        tuple(notes) + tuple(Note(*note) for _, record in records for note in record["warnings"]),
        sum(record["bytes"] for _, record in records),
        time.monotonic() - start,
    )
    for name, n in rows.items():
        if not n:
            raise BadSource(f"{folder}: no row of {name} is usable:\n{report}")
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
    task: str, source: Path, shard: _Shard, directory: Path, skip: bool, tick: Callable[[int], None]
) -> dict:
    """Converts one parquet file; gives the shard's record for progress.json."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer

    schema = features()
    serializer = example_serializer.ExampleSerializer(schema.get_serialized_info())

    def serialized(example: Example) -> bytes:
        record = serializer.get_tf_example(schema.encode_example(to_features(example)))
        return record.SerializeToString(
            deterministic=True
        )  # else each process has an order of fields, and a digest, of its own

    def convert(item: tuple[int, dict]) -> tuple[bytes | None, tuple[Note, ...]]:
        try:
            example, warnings = read_row(item[1], file=str(source), index=item[0], task=task)
        except BadRow as error:
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
            for batch in _read_batches(source, shard.rows):
                for blob, notes in threads.map(convert, batch):
                    tick(1)
                    record["warnings" if blob else "bad_rows"] += notes
                    if blob:
                        writer.write(blob)
                        record["rows"] += 1
                        record["bytes"] += len(blob)
        writer.close()
        if _count_records(unfinished) != record["rows"]:
            raise OSError(f"{record['rows']} rows were written and cannot all be read back")
        record |= {"file_bytes": unfinished.stat().st_size, "blake2b": _checksum(unfinished)}
        os.replace(unfinished, directory / shard.name)
    finally:
        with contextlib.suppress(RuntimeError):  # the first error is the one to tell
            writer.close()
        unfinished.unlink(missing_ok=True)
    return record


def _count_records(shard: Path) -> int:
    """Rows of an ArrayRecord file, 0 where it is missing or truncated."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(shard))
    rows = reader.num_records()
    with contextlib.suppress(RuntimeError):  # where close tells that there was nothing to read
        reader.close()
    return rows


def _write_metadata(directory: Path, records: list[tuple[str, dict]]) -> None:
    import tensorflow_datasets as tfds

    infos = []
    for split in dict.fromkeys(split for split, _ in records):
        mine = [record for s, record in records if s == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
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
        features=features(),
        split_infos=infos,
        version=VERSION,
        check_data=False,
        filename_template=template.replace(split=None),
        description="Questions about a picture with interleaved textual and visual reasoning.",
    )


def _read_progress(path: Path) -> dict[str, dict]:
    """The records of finished shards by name. FileNotFoundError; ValueError with the path where it is damaged."""
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        for record in done.values():
            _Shard(*record["shard"]), record["rows"] + record["bytes"]
            [Note(*note) for note in (*record["bad_rows"], *record["warnings"])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return done


def _is_of(record: dict, shard: _Shard, folder: Path) -> bool:
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
        and _checksum(path) == record["blake2b"]
    )


def _read_report(path: Path) -> Report:
    fields = json_files.read(str(path))
    notes = {key: tuple(Note(**note) for note in fields[key]) for key in ("bad_rows", "warnings")}
    return Report(**fields | notes)


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


# -------------------------------------------------------------------------------- reading


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
                if _count_records(path) != rows:
                    raise FileNotFoundError(
                        f"{path} is missing or truncated (it should hold {rows} rows): copy it again, or run "
                        f"`{_PREPARE}` again, which remakes what is broken"
                    )
        with _naming(directory, split):
            self._rows = builder.as_data_source(
                split, decoders={"problem_image": RawBytes(), "reasoning_images": RawBytes()}
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        index = _in_range(index, len(self))
        try:
            return _of_features(self._rows[index])
        except Exception as error:  # TFDS and protobuf raise many types
            raise ValueError(
                f"{self.directory}, row {index} of {self.split}: it cannot be read ({error}): its file, or "
                f"features.json, is damaged; delete the folder and run `{_PREPARE}` again"
            ) from error

    def __reduce__(self):
        return Source, (self.directory, self.split)


def _of_features(row: dict) -> Example:
    """The Example of a row as TFDS reads it."""
    # Older folders have no originals: everything there is one.
    (problem,), visual_thoughts = (
        list(row.get(f"{name}_original", ())) or shown
        for name, shown in (
            ("problem_image", [row["problem_image"]]),
            ("reasoning_images", row["reasoning_images"]),
        )
    )
    return Example(
        **{name: row[name].decode() for name in _TEXTS},
        problem_image=problem,
        visual_thoughts=tuple(visual_thoughts),
        thoughts=tuple(thought.decode() for thought in row["reasoning_thoughts"]),
        metadata=json.loads(row["metadata"] or "{}"),
    )


def _builder(directory: Path):
    """The TFDS builder of a prepared folder. ValueError that names the damaged file."""
    import tensorflow_datasets as tfds

    fix = f"run `{_PREPARE}` again, which writes it again"
    for name in ("features.json", "dataset_info.json"):  # the builder reads both
        try:
            if name == "features.json":
                absent = {*_TEXTS, *_IMAGES} - {
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


def _metadata_fits(directory: Path, shards: list[_Shard], finished: dict[str, dict]) -> bool:
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
            f"{directory} is not finished: run `{_PREPARE}` again, it goes on where it stopped"
        )
    if not (directory / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no prepared data: make it with `{_PREPARE}`, and give "
            f"DIR/{NAME}/<task>/{VERSION}, or DIR and the task"
        )
    return Source(directory, split)


class ParquetSource:
    """As `Source`, on parquet as it is: for looking around, evaluation, small data, reading in order.

    A random row reads its row group, of which the last four stay in memory. Bad rows raise BadRow when read.

    Args:
      folder: one task: <split>-*.parquet, or data/<split>-*.parquet.
      split: as for `open_source`.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train"):
        import tensorflow_datasets as tfds

        self.directory, self.split = Path(folder), split
        tasks = task_folders(folder)
        if len(tasks) > 1:
            raise BadSource(
                f"{folder} holds {len(tasks)} tasks: give the folder of one: {', '.join(tasks)}"
            )
        ((self._task, task_folder),) = tasks.items()
        files, _ = _split_files(task_folder)
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

    def __getitem__(self, index: int) -> Example:
        index = _in_range(index, len(self))
        piece = bisect.bisect_right(self._starts, index) - 1
        path, group, first, skip = self._pieces[piece]
        row = index - self._starts[piece] + skip
        (values,) = self._table(path, group).slice(row, 1).to_pylist()
        return read_row(values, file=str(path), index=first + row, task=self._task)[0]

    def __reduce__(self):
        return ParquetSource, (self.directory, self.split)


def _row_groups(path: Path) -> Iterator[tuple[Path, int, int, int]]:
    """(path, row group, its first row in the file, its rows)."""
    first = 0
    with _parquet(path) as file:
        _columns(path, file.schema_arrow.names)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    for group, size in enumerate(sizes):
        yield path, group, first, size
        first += size


def _read_group(path: Path, group: int):
    import pyarrow

    with _parquet(path) as file:
        columns = _columns(path, file.schema_arrow.names)
        return pyarrow.Table.from_batches(_one_by_one(file, columns, row_groups=[group]))


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
