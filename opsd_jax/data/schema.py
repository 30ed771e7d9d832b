"""One example of the released data, and how a source's row becomes one."""

import dataclasses
import functools
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from opsd_jax import images, tags, tasks

NAME, VERSION = "visual_opsd", "1.0.0"
SPLITS = ("train", "validation", "test")
ROUNDS = 8  # thoughts and visual thoughts a row can hold
_PROBLEM = "problem_image_0"
THOUGHTS_COLUMNS = tuple(
    f"resoning_thought_{i}" for i in range(ROUNDS)
)  # spelt so in the released files
VISUALS_COLUMNS = tuple(f"reasoning_image_{i}" for i in range(ROUNDS))
REQUIRED_COLUMNS = ("question", "answer", _PROBLEM, THOUGHTS_COLUMNS[0])
COLUMNS = (
    "pid",
    "task",
    *REQUIRED_COLUMNS[:3],
    *THOUGHTS_COLUMNS,
    *VISUALS_COLUMNS,
    "full_text_only_thought",
    "metadata",
)
IMAGE_COLUMNS = ("problem_image", "reasoning_images")  # features of encoded pictures
TEXT_COLUMNS = (
    "pid",
    "task",
    "question",
    "answer",
    "full_text_only_thought",
)  # fields both here and in TFDS
_NO_PICTURE = {"bytes": None, "path": None}  # some writers' None
SURPLUS_COLUMNS = re.compile(
    r"(resoning_thought|reasoning_image)_(\d+)"
)  # beyond _THOUGHTS and _VISUALS: see `_is_surplus`
PREPARE_COMMAND = "python -m opsd_jax.data prepare --source=PARQUET_DIR --target=DIR"


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


class BadSourceError(ValueError):
    """A folder or file that holds no usable parquet rows."""


class BadRowError(ValueError):
    """A row that cannot be trained on."""

    def __init__(self, file: str, row: int, pid: str, column: str, fault: str):
        super().__init__(
            file, row, pid, column, fault
        )  # all arguments: so that it survives pickling
        self.note = Note(file, row, pid, f"{column} {fault}")

    def __str__(self) -> str:
        return (
            f"{self.note}. Mend the row in the parquet file, or leave bad rows out with "
            f"`{PREPARE_COMMAND} --on_bad_row=skip`, which counts and names them"
        )


@dataclasses.dataclass(frozen=True)
class PrepareReport:
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
      BadRowError: blank question or answer, no thought, a problem picture that training could not open, a value of a
        wrong type, metadata that is no JSON object or cannot score, an answer that no completion matches.
    """
    pid = str(row["pid"]) if row.get("pid") is not None else f"{Path(file).stem}:{index}"

    def bad(column: str, fault: str) -> BadRowError:
        return BadRowError(file, index, pid, column, fault)

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise bad(column, f"is of type {type(value).__name__}, not text")
        return value or ""

    for column in ("question", "answer"):
        if tasks.is_blank(text(column)):
            raise bad(column, "is empty")
    thoughts = tuple(t for t in map(text, THOUGHTS_COLUMNS) if t.strip())
    if not thoughts:
        raise bad(
            THOUGHTS_COLUMNS[0], f"and its successors to {THOUGHTS_COLUMNS[-1]} hold no thought"
        )
    if fault := _picture_fault(row.get(_PROBLEM)):
        raise bad(_PROBLEM, fault)

    warnings, visual_thoughts = [], []
    present = [
        i for i, column in enumerate(VISUALS_COLUMNS) if row.get(column) not in (None, _NO_PICTURE)
    ]
    for column in VISUALS_COLUMNS[: max(present, default=-1) + 1]:
        if fault := _picture_fault(row.get(column)):
            warnings.append(Note(file, index, pid, f"dropped_visual_thought: {column} {fault}"))
        else:
            visual_thoughts.append(row[column]["bytes"])
    for column in filter(is_surplus, row):
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
        {name: text() for name in (*TEXT_COLUMNS, "metadata")}
        | {
            "problem_image": image(),
            "reasoning_thoughts": tfds.features.Sequence(text()),
            "reasoning_images": tfds.features.Sequence(image()),
        }
        | {f"{name}_original": tfds.features.Sequence(text()) for name in IMAGE_COLUMNS}
    )


def to_features(example: Example) -> dict[str, Any]:
    """The example as TFDS encodes it. Pictures as files, which it stores verbatim; arrays need TensorFlow.

    Plain TFDS would show RGBA or CMYK with four channels and a palette as numbers. So a file that is neither RGB nor grey
    is stored as RGB, and beside it, in `<feature>_original`, as it was: [] where all are as they were.
    """
    record = {name: getattr(example, name) for name in TEXT_COLUMNS} | {
        "metadata": json.dumps(example.metadata) if example.metadata else "",
        "reasoning_thoughts": list(example.thoughts),
    }
    for name, files in zip(IMAGE_COLUMNS, ((example.problem_image,), example.visual_thoughts)):
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


def is_surplus(column: str) -> bool:
    """Whether a column holds a thought or visual thought beyond the last that a row can hold."""
    found = SURPLUS_COLUMNS.fullmatch(column)
    return bool(found) and int(found[2]) >= ROUNDS
