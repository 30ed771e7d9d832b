"""One example of the released data set, its columns, and how a row becomes an example."""

import dataclasses
import difflib
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from opsd_jax import images, tags, tasks
from opsd_jax.inputs import columns as columns_lib

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

NAME, VERSION = "visual_opsd", "1.0.0"  # of the TFDS data set
DESCRIPTION = "Questions about an image with interleaved textual and visual reasoning."
SPLITS = ("train", "validation", "test")
ROUNDS = 8  # thoughts, and visual thoughts, that an example can hold

# Columns of the parquet files. The first name is misspelt in the released files.
THOUGHT_COLUMNS = tuple(f"resoning_thought_{i}" for i in range(ROUNDS))
VISUAL_THOUGHT_COLUMNS = tuple(f"reasoning_image_{i}" for i in range(ROUNDS))
_PROBLEM = "problem_image_0"
PROBLEM_COLUMNS = "problem_image_"  # and a number from 0: further problem images are numbered, too
REQUIRED_COLUMNS = ("question", "answer", THOUGHT_COLUMNS[0])
COLUMNS = (
    "pid",
    "task",
    *REQUIRED_COLUMNS[:2],
    _PROBLEM,
    *THOUGHT_COLUMNS,
    *VISUAL_THOUGHT_COLUMNS,
    "full_text_only_thought",
    "metadata",
)
_NUMBERED_COLUMN = re.compile(r"(resoning_thought|reasoning_image)_(\d+)")
_PROBLEM_COLUMN = re.compile(PROBLEM_COLUMNS + r"(0|[1-9]\d{0,3})")
NO_IMAGE = {"bytes": None, "path": None}  # what some writers store for None

# Rows of a source file in memory at a time, or fewer where their images are large.
BATCH_ROWS, BATCH_BYTES = 32, 64 << 20

# Features of the prepared files: encoded images, and texts that have the same name in `Example`.
IMAGE_FEATURES = ("problem_image", "reasoning_images")
# The problem images after the first; only where a task has rows with several.
MORE_PROBLEMS = "more_problem_images"
# All problem images, in the place of both; only where a task has rows without any.
PROBLEMS = "problem_images"
TEXT_FEATURES = ("pid", "task", "question", "answer", "full_text_only_thought")


def prepare_command(source: object = "SOURCE_DIR", target: object = "DIR") -> str:
    """The command that prepares files, for messages; the names in capitals are not known there."""
    return f"python -m opsd_jax.data prepare --source={source} --target={target}"


@dataclasses.dataclass(frozen=True, repr=False)
class Example:
    """A question, mostly about images, with the interleaved reasoning that leads to its answer.

    Attributes:
      pid: identifier of the example; "<file stem>:<row>" where the source has none.
      task: the value of the task column, or else the name of the task's folder.
      question, answer: texts as in the source, never blank. The question may have as many places of
        images (`tags.PLACE`) as there are problem images.
      problem_image: the encoded image (PNG, JPEG, ...) of the question, or the first of several;
        None for a question without one.
      visual_thoughts: the encoded images of the reasoning, in order; may be empty.
      thoughts: the texts of the reasoning, in order; at least one.
      full_text_only_thought: a reasoning without images; "" where there is none.
      metadata: facts about the example, which the procedural tasks write; {} where there are none.
      columns: further columns of the data, {"text:COLUMN": text, "images:COLUMN": encoded images}.
      more_problem_images: the encoded images of the question after the first.
    """

    pid: str
    task: str
    question: str
    answer: str
    problem_image: bytes | None
    visual_thoughts: tuple[bytes, ...]
    thoughts: tuple[str, ...]
    full_text_only_thought: str = ""
    metadata: dict = dataclasses.field(default_factory=dict)
    columns: dict[str, str | tuple[bytes, ...]] = dataclasses.field(default_factory=dict)
    more_problem_images: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        """Without the encoded images."""
        return (
            f"<example {self.pid} of {self.task}: {self.question!r}, answer {self.answer!r}, "
            f"images {len(self.problem_images)}, visual thoughts {len(self.visual_thoughts)}>"
        )

    @property
    def problem_images(self) -> tuple[bytes, ...]:
        """All encoded images of the question, in order; () for a question without any."""
        if self.problem_image is None:
            return ()
        return self.problem_image, *self.more_problem_images

    @property
    def image(self) -> Image.Image:
        """The problem image, or the first of several, decoded as training does by default.

        Raises images.UnreadableImageError, and ValueError for a question without an image.
        """
        if self.problem_image is None:
            raise ValueError(
                f"example {self.pid} has no image: its question is asked without one, as "
                "answer(model, example) does"
            )
        return images.open_rgb(self.problem_image, transparency="drop")

    @property
    def opened_images(self) -> list[Image.Image]:
        """All problem images, decoded, as `opsd_jax.answer` takes them for questions with several.

        Raises images.UnreadableImageError.
        """
        return [images.open_rgb(data, transparency="drop") for data in self.problem_images]

    @property
    def visual_images(self) -> tuple[Image.Image, ...]:
        """The visual thoughts, decoded. Raises images.UnreadableImageError."""
        return tuple(images.open_rgb(data, transparency="drop") for data in self.visual_thoughts)

    @property
    def trace_answer(self) -> str:
        """The answer that traces end with: the gold one, unless the metadata name another."""
        return self.metadata.get("trace_answer", self.answer)

    def column(self, name: str) -> str | tuple[bytes, ...]:
        """The text or the encoded images of a column: a further one, or one that all data have.

        Raises KeyError if the example has no such column.
        """
        if name in columns_lib.OWN_TEXTS:
            return getattr(self, columns_lib.of_files(name))
        return self.columns[name]


def check_columns(shown: str, names: Sequence[str]) -> None:
    """Raises ValueError unless these are names of further columns (`inputs.columns`).

    shown: the setting or flag, for the message.
    """
    columns_lib.check(shown, names)
    for name in names:
        if is_of_schema(column := columns_lib.of_files(name)):
            raise ValueError(
                f"{shown} names {name}, but {column} is a column of the schema itself: leave it out"
            )


class Note(NamedTuple):
    """A remark about a row of a parquet or JSONL file, or about the whole file.

    Rows count from 0; the row is None for the whole file. The message about a row of a JSONL file
    names its line, as editors count them: from 1.
    """

    file: str
    row: int | None
    pid: str
    reason: str

    def __str__(self) -> str:
        row = ""
        if self.row is not None:
            row = f", {place(self.file, self.row)}, pid {self.pid!r}"
        return f"{self.file}{row}: {self.reason}"


def place(file: str, row: int) -> str:
    """A row in messages: "line 1" is the first of a JSONL file, "row 0" that of a parquet file."""
    return f"line {row + 1}" if file.endswith(".jsonl") else f"row {row}"


class BadSourceError(ValueError):
    """A folder or file that holds no usable rows."""


class BadRowError(ValueError):
    """A row of a parquet or JSONL file that cannot be trained on.

    command: what prepares the files; `prepare` puts its own folders here.
    """

    command = prepare_command()

    def __init__(self, file: str, row: int, pid: str, column: str, fault: str):
        super().__init__(file, row, pid, column, fault)  # all arguments, so that it can be pickled
        self.note = Note(file, row, pid, f"{column} {fault}")

    def __str__(self) -> str:
        return (
            f"{self.note}. Fix the row in the file, or leave bad rows out with "
            f"`{self.command} --on_bad_row=skip`, which counts and names them"
        )

    def under(self, names: Mapping[str, str]) -> "BadRowError":
        """The error with the file's own names of columns (`Row.names`)."""
        *where, column, fault = self.args
        return BadRowError(*where, names.get(column, column), in_file(fault, names))


def in_file(text: str, names: Mapping[str, str]) -> str:
    """A message with the file's own names of columns (`Row.names`); quoted texts stay."""
    if not names:
        return text
    every = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w./'\"])({every})(?![\w./'\"])", lambda found: names[found[1]], text)


class Row(NamedTuple):
    """A row as a file gives it.

    Attributes:
      index: its number, from 0.
      values: {column of the schema, or further column: value}, as `read_row` takes them.
      remarks: reasons of warnings that reading gave.
      fault: why there are no values, if there are none.
      names: {column: what the file calls it}, for messages, where the file has another name.
    """

    index: int
    values: dict[str, Any]
    remarks: tuple[str, ...] = ()
    fault: BadRowError | None = None
    names: Mapping[str, str] = {}


class Scan(NamedTuple):
    """What is known of a file's rows before they are read.

    Attributes:
      format: human-readable name of the format.
      columns: names of the columns, by the schema.
      pids: the pid of each row, None where it has none; [] if the file has no such column.
      rows: number of rows.
      checksum: of the file and of the images that it names.
      several_images: whether a row may have several problem images.
      optional_image: whether a row may have none.
    """

    format: str
    columns: list[str]
    pids: list
    rows: int
    checksum: str
    several_images: bool = False
    optional_image: bool = False


def read_row(
    row: Mapping[str, Any], *, file: str, index: int, task: str, columns: Sequence[str] = ()
) -> tuple[Example, tuple[Note, ...]]:
    """One row as an Example, by the rules of the official loader.

    Args:
      row: {column name: value}; images are {bytes, path} or None.
      file, index: file and number of the row, for messages and for a missing pid.
      task: name for a missing task column.
      columns: names of further columns, "text:COLUMN" or "images:COLUMN".

    Returns:
      The example and its warnings. Visual thoughts that are missing between others, cannot be
      decoded, or come after the last that an example can hold are left out with a warning, and an
      example left without any gets one, too; surplus thoughts are treated in the same way. A row
      without a problem image, without a text trace, or with an empty further column, gets one.

    Raises:
      BadRowError: blank question or answer, no thought, a problem image that is named and has no
        bytes, that is missing before others, or that training could not open, another number of
        places in the question than of problem images, a value of a wrong type, metadata that are
        not a JSON object or cannot be scored, an answer that no completion matches, an image of a
        further column that training could not open.
    """
    pid = str(row["pid"]) if row.get("pid") is not None else f"{Path(file).stem}:{index}"

    def bad(column: str, fault: str) -> BadRowError:
        return BadRowError(file, index, pid, column, fault)

    def text(column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str | None):
            raise bad(column, f"is of type {type(value).__name__}, not text")
        return value or ""

    for column, value in (
        ("question", text("question").replace(tags.PLACE, "")),
        ("answer", text("answer")),
    ):
        if tasks.is_blank(value):
            raise bad(column, "is empty")
    thoughts = tuple(t for t in map(text, THOUGHT_COLUMNS) if t.strip())
    if not thoughts:
        raise bad(
            THOUGHT_COLUMNS[0],
            f"and the columns up to {THOUGHT_COLUMNS[-1]} hold no thought: give one at least",
        )
    problems = _problem_images(row, bad)
    if fault := tags.places_fault(text("question"), len(problems)):
        raise bad("question", fault)
    visual_thoughts, reasons = _visual_thoughts(row, len(thoughts), columns)
    if not problems:
        reasons.insert(0, "no_image: the question is asked without an image")
    if not text("full_text_only_thought").strip():
        reasons.append("no_text_trace: full_text_only_thought is empty")

    stored = text("metadata")
    try:
        metadata = json.loads(stored or "{}")
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of open brackets
        raise bad("metadata", f"is not JSON ({error})") from None
    if not isinstance(metadata, dict):
        raise bad("metadata", "is JSON, but not an object {...}")
    if fault := tasks.fault(metadata, tags.wrap_answer(text("answer"))):
        raise bad(*fault.split(" ", 1))
    further: dict[str, str | tuple[bytes, ...]] = {}
    for name in columns:
        column = columns_lib.of_files(name)
        if name.startswith(columns_lib.TEXT):
            value = text(column)
            further[name] = "" if tasks.is_blank(value) else value
        else:
            further[name] = _images(row.get(column), functools.partial(bad, column))
        if not further[name]:
            reasons.append(f"empty_column: {name} is empty, contexts leave it out")
    example = Example(
        pid,
        text("task") or task,
        text("question"),
        text("answer"),
        problems[0] if problems else None,
        visual_thoughts,
        thoughts,
        text("full_text_only_thought"),
        metadata,
        further,
        problems[1:],
    )
    return example, tuple(Note(file, index, pid, reason) for reason in reasons)


def _problem_images(
    row: Mapping[str, Any], bad: Callable[[str, str], BadRowError]
) -> tuple[bytes, ...]:
    """The encoded problem images of a row, up to the last that it has; () where it has none."""
    numbers = [int(found[1]) for found in map(_PROBLEM_COLUMN.fullmatch, row) if found]
    given = [n for n in numbers if row[f"{PROBLEM_COLUMNS}{n}"] not in (None, NO_IMAGE)]
    shown = []
    for n in range(max(given, default=-1) + 1):
        value = row.get(column := f"{PROBLEM_COLUMNS}{n}")
        if isinstance(value, list):
            raise bad(column, f"is a list: give its images in {PROBLEM_COLUMNS}0, ..._1 and so on")
        if fault := _image_fault(value):
            raise bad(column, fault)
        shown.append(value["bytes"])
    return tuple(shown)


def _visual_thoughts(
    row: Mapping[str, Any], num_thoughts: int, columns: Sequence[str]
) -> tuple[tuple[bytes, ...], list[str]]:
    """The encoded visual thoughts of a row, and the reasons of its warnings."""
    found, reasons = [], []
    present = [
        i
        for i, column in enumerate(VISUAL_THOUGHT_COLUMNS)
        if row.get(column) not in (None, NO_IMAGE)
    ]
    for column in VISUAL_THOUGHT_COLUMNS[: max(present, default=-1) + 1]:
        if fault := _image_fault(row.get(column)):
            reasons.append(f"dropped_visual_thought: {column} {fault}")
        else:
            found.append(row[column]["bytes"])
    for column in filter(is_surplus, row):
        if row[column] not in (None, "", NO_IMAGE):
            kind = "dropped_thought" if column.startswith("resoning") else "dropped_visual_thought"
            reasons.append(f"{kind}: {column} is not read, a row holds {ROUNDS}")
    if not found:
        unless = f", unless its blocks show {' or '.join(columns)}" if columns else ""
        reasons.append(f"no_visual_thought: the teacher sees what the student sees{unless}")
    # In an interleaved trace, each visual thought follows a thought and precedes another.
    if len(found) >= num_thoughts:
        reasons.append(
            f"unused_visual_thought: {_count(len(found), 'visual thought')} and "
            f"{_count(num_thoughts, 'thought')}: interleaved traces show those between two "
            f"thoughts, here {num_thoughts - 1 or 'none'}; the teacher sees all"
        )
    return tuple(found), reasons


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def check_further(path: Path, present: Iterable[str], further: Sequence[str], kind: str) -> None:
    """Raises BadSourceError if a file lacks a further column.

    Args:
      present: names that the file has. further: the columns, "text:COLUMN" or "images:COLUMN".
      kind: what the file's format calls a column, for the message.
    """
    asked = {columns_lib.of_files(name): name for name in further}
    free = [name for name in present if name not in asked]
    for column, name in asked.items():
        if column in present:
            continue
        type_of = name.removesuffix(column)
        close = difflib.get_close_matches(column, free, 1)
        hint = f"did you mean {type_of}{close[0]}?" if close else f"it has {', '.join(free)}"
        raise BadSourceError(f"{path} has no {kind} {column!r}, as --columns={name} asks: {hint}")


def _images(value: Any, bad: Callable[[str], BadRowError]) -> tuple[bytes, ...]:
    """The encoded images of a further column's value: a list of images, one image, or none."""
    if value in (None, NO_IMAGE):
        return ()
    for n, image in enumerate(value := value if isinstance(value, list) else [value]):
        if fault := _image_fault(image):
            raise bad(f"{fault} (image {n})")
    return tuple(image["bytes"] for image in value)


def is_of_schema(column: str) -> bool:
    """Whether the schema has a column: one of `COLUMNS`, or one with a higher number."""
    return column in COLUMNS or is_surplus(column) or is_problem_image(column)


def is_problem_image(column: str) -> bool:
    """Whether a column holds a problem image: the first, or one of several."""
    return _PROBLEM_COLUMN.fullmatch(column) is not None


def is_surplus(column: str) -> bool:
    """Whether a column holds a thought or visual thought beyond the last that is read."""
    found = _NUMBERED_COLUMN.fullmatch(column)
    return found is not None and int(found[2]) >= ROUNDS


def _image_fault(value: Any) -> str | None:
    """What is wrong with the value of an image column; None for an image that training can open."""
    if value in (None, NO_IMAGE):
        return "is missing"
    if not isinstance(value, Mapping) or not isinstance(value.get("bytes"), bytes | None):
        given = "bare bytes" if isinstance(value, bytes) else f"of type {type(value).__name__}"
        return (
            f'is {given}, not an image {{bytes, path}}: give {{"bytes": the encoded file, "path": '
            "None}"
        )
    if not value.get("bytes"):
        return f"holds no bytes (path: {value.get('path')!r}); embed the images in the parquet file"
    try:
        images.open_rgb(value["bytes"])  # the function that training opens it with
    except images.UnreadableImageError as error:
        return f"cannot be decoded: {error}"
    return None


def features(
    columns: Sequence[str] = (), several_images: bool = False, optional_image: bool = False
) -> "tfds.features.FeaturesDict":
    """The TFDS features of an example; `Example` documents them. TFDS returns texts as bytes.

    Args:
      columns: names of the further columns, "text:COLUMN" or "images:COLUMN".
      several_images: whether an example may have several problem images.
      optional_image: whether an example may have none. Then one feature has all of them.
    """
    import tensorflow_datasets as tfds

    text, image = tfds.features.Text, functools.partial(tfds.features.Image, shape=(None, None, 3))
    first, thoughts = IMAGE_FEATURES
    lists = [PROBLEMS] if optional_image else [MORE_PROBLEMS] if several_images else []
    single = [] if optional_image else [first]
    return tfds.features.FeaturesDict(
        {name: text() for name in (*TEXT_FEATURES, "metadata")}
        | {name: image() for name in single}
        | {"reasoning_thoughts": tfds.features.Sequence(text())}
        | {
            f"{name}_original": tfds.features.Sequence(text())
            for name in (*single, thoughts, *lists)
        }
        | {name: text() for name in columns if name.startswith(columns_lib.TEXT)}
        | {
            name: tfds.features.Sequence(image())
            for name in (thoughts, *lists, *further_images(columns))
        }
        | {f"{name}{_ORIGINAL}": tfds.features.Sequence(text()) for name in further_images(columns)}
    )


_ORIGINAL = "@original"  # no name of a column has an @


def further_images(columns: Iterable[str]) -> list[str]:
    """The names of further columns that hold images."""
    return [name for name in columns if name.startswith(columns_lib.IMAGES)]


def further_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The further columns among the names of the features of prepared files, sorted.

    TFDS reads the features of a folder in an order that differs between processes.
    """
    return tuple(sorted(filter(columns_lib.is_column, names)))


def to_features(
    example: Example, several_images: bool = False, optional_image: bool = False
) -> dict[str, Any]:
    """The example as TFDS encodes it. Images are given as files, which it stores verbatim; arrays
    would need TensorFlow.

    Plain TFDS would decode RGBA or CMYK to four channels and a palette to its indices. So a file
    that is neither RGB nor grey is stored as RGB, and the original files are stored in
    `<feature>_original`, which is [] if no file was changed.

    several_images, optional_image: see `features`. ValueError where these features do not hold the
      example's problem images.
    """
    record = {name: getattr(example, name) for name in TEXT_FEATURES} | {
        "metadata": json.dumps(example.metadata) if example.metadata else "",
        "reasoning_thoughts": list(example.thoughts),
    }
    first, thoughts = IMAGE_FEATURES
    problems, more = example.problem_images[:1], example.problem_images[1:]
    parts = {thoughts: example.visual_thoughts}
    if optional_image:
        parts[PROBLEMS] = example.problem_images
    elif several_images:
        parts |= {first: problems, MORE_PROBLEMS: more}
    else:
        parts[first] = problems
    if not optional_image and (not problems or more and not several_images):
        fix = "several_images=True" if more else "optional_image=True"
        raise ValueError(
            f"example {example.pid} has {len(example.problem_images)} problem images, and these "
            f"features hold one: prepare it with {fix}"
        )
    for name, files in parts.items():
        record[name], record[f"{name}_original"] = _stored(files)
    for name, value in example.columns.items():
        if isinstance(value, str):
            record[name] = value
        else:
            record[name], record[f"{name}{_ORIGINAL}"] = _stored(value)
    return record if optional_image else record | {first: record[first][0]}


def _stored(files: Sequence[bytes]) -> tuple[list[io.BytesIO], list[bytes]]:
    """(images for TFDS, the original files or [] if none was changed) of encoded images."""
    shown = [_as_rgb(data) for data in files]
    changed = any(one is not other for one, other in zip(shown, files))
    return [io.BytesIO(data) for data in shown], list(files) if changed else []


def from_features(record: Mapping[str, Any]) -> Example:
    """The example of a record that TFDS read with its images left encoded."""
    # Folders of older versions have no originals: there, every image is the original.

    def files(name: str, shown: Iterable[bytes]) -> list[bytes]:
        return [*record.get(f"{name}_original", ())] or [*shown]

    first, thoughts = IMAGE_FEATURES
    if PROBLEMS in record:
        problems = files(PROBLEMS, record[PROBLEMS])
    else:
        problems = files(first, [record[first]])
        problems += files(MORE_PROBLEMS, record.get(MORE_PROBLEMS, ()))
    return Example(
        **{name: record[name].decode() for name in TEXT_FEATURES},
        problem_image=problems[0] if problems else None,
        visual_thoughts=tuple(files(thoughts, record[thoughts])),
        thoughts=tuple(thought.decode() for thought in record["reasoning_thoughts"]),
        metadata=json.loads(record["metadata"] or "{}"),
        columns={
            name: record[name].decode()
            if name.startswith(columns_lib.TEXT)
            else tuple(list(record[f"{name}{_ORIGINAL}"]) or record[name])
            for name in further_columns(record)
        },
        more_problem_images=tuple(problems[1:]),
    )


def _as_rgb(data: bytes) -> bytes:
    """The encoded image itself where plain TFDS decodes it to three channels; otherwise, as a PNG,
    what training sees by default."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("RGB", "L"):
            return data
    file = io.BytesIO()
    images.open_rgb(data, transparency="drop").save(file, "PNG")
    return file.getvalue()
