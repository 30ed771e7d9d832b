"""The public benchmarks of the paper: their TSV files as tables of questions.

Tables are read as the public harness reads them, quirks included. pandas is imported where a table
is read; its typing of whole columns is part of the protocol.

    table = read("data/MMVP.tsv")
    for row in table.rows:
        text, places = prompts.wrapper(prompts.messages(row))  # the prompt; prompts.images(row)[k]
        for k in places
    scores = table_scores.score(table, {row.index: answer, ...})
"""

import ast
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import string
import warnings
from typing import Any, NoReturn

from opsd_jax.data import randomness

KINDS = {
    "VSP_maze_task_main_original": "vsp",
    "VisPuzzle": "mcq",
    "ChartQA_h_bar": "chartqa",
    "ChartQA_v_bar": "chartqa",
    "VStarBench": "mcq",
    "BLINK_Jigsaw": "mcq",
    "MMVP": "mcq",
    "BLINK": "mcq",
    "SAT_circular": "circular",
    "CV-Bench-2D": "cvbench",
    "CV-Bench-3D": "cvbench",
}
"""How each benchmark is prompted and scored; the file of NAME is NAME.tsv."""
PAPER = {
    "VSP_maze_task_main_original": (75.83, 85.83),
    "VisPuzzle": (77.50, 86.00),
    "ChartQA_h_bar": (78.00, 78.79),
    "ChartQA_v_bar": (78.00, 78.79),
    "VStarBench": (67.01, 64.92),
    "BLINK_Jigsaw": (66.00, 77.33),
    "MMVP": (78.33, 77.33),
    "SAT_circular": (52.67, 54.00),
    "BLINK": (59.49, 61.44),
    "CV-Bench-2D": (80.86, 80.64),
    "CV-Bench-3D": (80.86, 80.64),
}
"""The paper's Table 2 in per cent: ThinkMorph, Visual-OPSD. Both parts of ChartQA and of CV-Bench
have the number that the paper gives for the whole."""
_COLUMNS = {
    "mcq": ("question", "A", "answer"),
    "circular": ("question", "A", "answer"),
    "cvbench": ("prompt", "A", "answer"),
    "chartqa": ("question", "answer"),
    "vsp": ("question", "maze_map", "maze_size"),
}
LETTERED = ("mcq", "circular", "cvbench")  # kinds whose answer is a letter
_REFERENCE = (
    64  # characters: an image cell up to this length is the index of the row whose image it shares
)
# row g + j * _TURN of a circular table is turn j of question g, without a g_index column
_TURN = 1_000_000


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One question.

    Attributes:
      file: path of the table, for messages.
      name: name of the benchmark.
      index: index of the row.
      cells: {column: value as pandas typed it, NaN for a missing one}, of all columns but `image`.
      images: base64 texts, or paths of image files.
      stored: file names under which the harness keeps the images of base64 texts.
      untyped: CV-Bench-2D: the option texts as they are in the file.
    """

    file: str
    name: str
    index: int | str
    cells: dict[str, Any]
    images: tuple[str | pathlib.Path, ...]
    stored: tuple[str, ...]
    untyped: dict[str, str]

    @property
    def options(self) -> dict[str, str]:
        """Letter -> text of the options that the row has, in letter order."""
        return {
            x: str(self.cells[x])
            for x in string.ascii_uppercase
            if not is_missing(self.cells.get(x, math.nan))
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """A benchmark file.

    Attributes:
      name: name of the benchmark.
      path: path of the file.
      md5: of the file. Published scores belong to a version of it.
      rows: questions. Rows whose image cell is empty take no part, as in the harness.
      dropped: indices of the rows without an image.
      respelt: {index: the answer cell as it is in the file, "(A)", where `cells` has "A" instead}.
    """

    name: str
    path: str
    md5: str
    rows: tuple[TableRow, ...]
    dropped: tuple[int | str, ...]
    respelt: dict[int | str, str] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        return KINDS[self.name]


def find(data_dir: str | os.PathLike) -> dict[str, pathlib.Path]:
    """The benchmark files in a folder, {name: path}. FileNotFoundError if there is none."""
    paths = {name: pathlib.Path(data_dir) / f"{name}.tsv" for name in KINDS}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        raise FileNotFoundError(
            f"no benchmark file in {data_dir}: put NAME.tsv there, NAME one of {', '.join(KINDS)}"
        )
    return paths


def read(path: str | os.PathLike) -> Table:
    """Reads NAME.tsv, where NAME is one of KINDS.

    Images are only looked up; `prompts.images` decodes them.

    Columns are typed as a whole, as pandas does by default: a column of numbers with a blank turns
    "3" into 3.0, and cells like "None" or "N/A" are missing.

    Raises:
      ValueError: names file, row and column: unknown NAME, not a table, missing columns, an index
        that occurs twice, references to rows that do not exist.
    """
    import pandas

    path = pathlib.Path(path)
    name = path.name.removesuffix(".tsv")
    if name not in KINDS:
        raise ValueError(
            f"{path}: not a known benchmark: name the file NAME.tsv, NAME one of {', '.join(KINDS)}"
        )
    with open(path, "rb") as f:
        md5 = hashlib.file_digest(f, "md5").hexdigest()
    try:
        with warnings.catch_warnings():
            # Rows longer than the header would otherwise be shifted without a message.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(path, sep="\t", index_col=False)
    except (ValueError, pandas.errors.ParserWarning) as e:
        # Also quotes that are left open, no columns, another encoding.
        raise ValueError(
            f"{path} is not a table of tab-separated UTF-8 text ({str(e).strip()}): download it "
            "again"
        ) from e
    lacking = [
        c
        for c in ("index", *_COLUMNS[KINDS[name]], *(["source"] if name == "CV-Bench-2D" else []))
        if c not in frame
    ]
    if not {"image", "image_path"} & set(frame):
        lacking.append("image")
    if lacking:
        raise ValueError(
            f"{path}: no column {', '.join(lacking)} among {', '.join(frame)[:200]}: check that "
            f"this is {name} and separated by tabs"
        )
    letters = [c for c in frame if c in set(string.ascii_uppercase)]
    untyped = [{}] * len(frame)
    if name == "CV-Bench-2D":
        untyped = pandas.read_csv(path, sep="\t", usecols=letters, dtype=str)[letters].to_dict(
            "records"
        )
    records = frame.to_dict("records")  # values become Python's own
    _check_index(path, name, records)
    dropped = tuple(r["index"] for r in records if is_missing(r.get("image", "")))
    cells = {
        str(r["index"]): str(r["image"])
        for r in records
        if "image" in r and not is_missing(r["image"])
    }
    rows, respelt = [], {}
    for record, texts in zip(records, untyped):
        if is_missing(record.get("image", "")):
            continue
        found, stored = _images(path, name, record, cells)
        texts = {x: t for x, t in texts.items() if not is_missing(t)}
        record = {c: value for c, value in record.items() if c != "image"}
        if KINDS[name] == "vsp":
            _whole(path, record, "maze_size")
        row = TableRow(str(path), name, record["index"], record, found, stored, texts)
        if (letter := option_letter(row)) and letter != record["answer"]:
            respelt[row.index] = str(record["answer"])
            row = dataclasses.replace(row, cells=record | {"answer": letter})
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no row has an image: download it again")
    return Table(name, str(path), md5, tuple(rows), dropped, respelt)


def option_letter(row: TableRow) -> str | None:
    """The option letter that a row's answer cell names, or None.

    The cell is the letter itself, the option's whole text, or the letter between marks.

    CV-Bench as its authors publish it has "(A)", which equals no letter, so the harness counts
    every answer wrong.
    """
    if KINDS[row.name] not in LETTERED or is_missing(row.cells["answer"]):
        return None
    answer = str(row.cells["answer"])
    if answer in row.options:
        return answer
    by_text = [letter for letter, option in row.options.items() if option == answer]
    between = re.fullmatch(r"[\s().:\[\]]*([A-Z])[\s().:\[\]]*", answer)
    letter = by_text[0] if len(by_text) == 1 else between and between[1]
    return letter if letter in row.options else None


def _check_index(path: pathlib.Path, name: str, records: list[dict]) -> None:
    """Raises ValueError unless every row has an index of its own.

    Numbers where the circular groups need them.
    """
    seen = {}
    for n, record in enumerate(records):
        index = record["index"]
        if is_missing(index) or isinstance(index, float):
            raise ValueError(
                f"{path}: data row {n}, column index: {index!r} is neither a whole number nor a "
                "name (one blank cell makes the column fractions): give each row its own"
            )
        if index in seen:
            raise ValueError(
                f"{path}: index {index} is in data rows {seen[index]} and {n}: renumber them or "
                "leave one out"
            )
        seen[index] = n
        if KINDS[name] == "circular":
            _whole(path, record, "index")
            if "g_index" in record:
                _whole(path, record, "g_index")


def _whole(path: pathlib.Path, record: dict, column: str) -> None:
    value = record[column]
    if isinstance(value, str) or is_missing(value) or value != int(value):
        raise ValueError(
            f"{path}: row {record['index']}, column {column}: {value!r} is not a whole number: "
            "correct the cell"
        )


def _images(
    path: pathlib.Path, name: str, record: dict, cells: dict[str, str]
) -> tuple[tuple, tuple]:
    """(images, stored) of a record: see TableRow.

    Cells: {index as text: image cell} of rows that have one.
    """

    def fail(column, why, fix) -> NoReturn:
        raise ValueError(f"{path}: row {record['index']}, column {column}: {why}: {fix}")

    def items(column, cell):
        if not (cell.startswith("[") and cell.endswith("]")):
            return [cell]
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = []
        if not found or not all(isinstance(item, str) and item for item in found):
            fail(column, f"not a list of texts, {cell[:40]!r}...", "write it as ['...', '...']")
        return found

    named = record.get("image_path")
    named = items("image_path", named) if isinstance(named, str) else None
    if "image" not in record:
        if named is None:
            fail("image_path", "the cell is empty", "name the image file")
        folder = path.parent / "images"
        files = [
            next((f for f in (folder / name / item, folder / item) if f.is_file()), None)
            for item in named
        ]
        if None in files:
            fail(
                "image_path",
                f"there is no {named[files.index(None)]!r} in {folder} or {folder / name}",
                "put the image there",
            )
        return tuple(files), ()
    cell, seen = cells[str(record["index"])], set()
    while len(cell) <= _REFERENCE:
        if cell in seen or cell not in cells:
            fail(
                "image",
                f"it refers to row {cell!r}, which has no image",
                f"give a row's index or a base64 text (of more than {_REFERENCE} characters)",
            )
        seen.add(cell)
        cell = cells[cell]
    found = items("image", cell)
    if "image_path" in record:
        if named is None or len(named) != len(found):
            fail(
                "image_path",
                f"{len(named or ())} file names for {len(found)} images",
                "name one for each or leave the column out",
            )
        return tuple(found), tuple(named)
    index = record["index"]
    if len(found) == 1:
        return tuple(found), (f"{index}.jpg",)
    return tuple(found), tuple(f"{index}_{k}.png" for k in range(len(found)))


def is_missing(value: Any) -> bool:
    """Whether pandas read a cell as missing."""
    return value is None or isinstance(value, float) and math.isnan(value)


def digest_of_files(table: Table) -> str:
    """Checksum of the image files that a table names, "" where it holds all images itself."""
    files = dict.fromkeys(
        p for row in table.rows for p in row.images if isinstance(p, pathlib.Path)
    )
    found = hashlib.blake2b(digest_size=16)
    for path in files:
        found.update(hashlib.blake2b(path.read_bytes()).digest())
    return found.hexdigest() if files else ""


def questions(table: Table) -> set[int | str]:
    """Indices of what is asked: rows, or in a circular table questions with all their turns."""
    return set(map(question, table.rows))


def size(table: Table) -> int:
    """Number of questions."""
    return len(questions(table))


def subset(table: Table, count: int, seed: int) -> Table:
    """A table with `count` of the questions (all for 0), in the order of the table.

    They are chosen at random by the seed.
    """
    asked = list(dict.fromkeys(map(question, table.rows)))
    chosen = {asked[n] for n in randomness.subset(len(asked), count, seed)}
    return dataclasses.replace(
        table, rows=tuple(row for row in table.rows if question(row) in chosen)
    )


def question(row: TableRow) -> int | str:
    """The index of a row, or of the question of which it is a turn in a circular table."""
    return (
        int(row.cells.get("g_index", row.index % _TURN))
        if KINDS[row.name] == "circular"
        else row.index
    )
