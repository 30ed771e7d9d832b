"""The public benchmarks of the paper: their TSV files -> rows, prompts and pictures; predictions -> reports.

Read, prompted and scored as the public harness does, quirks included, but with no judge model: `scoring` has the
rules for one answer. pandas is imported where a table is read; its typing of whole columns is part of the protocol.

    table = read("data/MMVP.tsv")
    for row in table.rows:
        text, pictures = wrapper(messages(row))    # what the model is given, with images(row)[k] for k in pictures
    report = score(table, {row.index: answer, ...})
"""

import ast
import base64
import csv
import dataclasses
import hashlib
import io
import math
import pathlib
import re
import string
import warnings

from PIL import Image

from opsd_jax.data import randomness
from opsd_jax.evaluation import scoring
from opsd_jax.images import open_rgb
from opsd_jax.runtime import files as files_lib

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
"""The paper's Table 2 in per cent: ThinkMorph, Visual-OPSD. Its one ChartQA and its one CV-Bench stand at both parts."""
_COLUMNS = {
    "mcq": ("question", "A", "answer"),
    "circular": ("question", "A", "answer"),
    "cvbench": ("prompt", "A", "answer"),
    "chartqa": ("question", "answer"),
    "vsp": ("question", "maze_map", "maze_size"),
}
_LETTERED = ("mcq", "circular", "cvbench")  # kinds whose answer is a letter
_REFERENCE = 64  # characters: an image cell up to this length is the index of the row whose picture it shares
_TURN = 1_000_000  # row g + j * _TURN of a circular table is turn j of question g, where no g_index says it


@dataclasses.dataclass(frozen=True)
class Row:
    """One question."""

    file: str  # the path of the table, for messages
    name: str  # of the benchmark
    index: int | str
    cells: dict  # column -> value as pandas typed it, missing ones NaN; all columns but `image`
    pictures: tuple  # base64 texts, or pathlib.Path of files
    stored: tuple[
        str, ...
    ]  # the file names under which the harness keeps the pictures of base64 texts
    untyped: dict[str, str]  # CV-Bench-2D: the option texts as they stand in the file

    @property
    def options(self) -> dict[str, str]:
        """Letter -> text of the options that the row has, in letter order."""
        return {
            x: str(self.cells[x])
            for x in string.ascii_uppercase
            if not _missing(self.cells.get(x, math.nan))
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """A benchmark file. Rows whose image cell is empty take no part, as in the harness; `dropped` lists them."""

    name: str
    path: str
    md5: str  # of the file: published scores belong to a version of it
    rows: tuple[Row, ...]
    dropped: tuple  # indices
    respelt: dict = dataclasses.field(
        default_factory=dict
    )  # index -> the answer cell, "(A)", where `cells` has "A" for it

    @property
    def kind(self) -> str:
        return KINDS[self.name]


@dataclasses.dataclass(frozen=True)
class Report:
    """The scores of one benchmark."""

    name: str
    unit: str  # "fraction", or "percent" for the chart sets
    overall: float
    per_category: dict[str, float]
    extras: dict[str, float]  # the same answers by other published definitions, see `score`
    split: str | None  # of the rows, where the table has a single one
    rows: tuple[
        dict, ...
    ]  # index, hit, and what the rule found: option, path or extracted; needs_judge
    groups: dict[int, int]  # circular: question -> hit
    orphans: (
        tuple  # circular: questions without a main row, which the harness leaves out of the score
    )
    missing: tuple  # indices without a prediction, if `partial`
    dropped: tuple  # indices of rows without an image
    parts: tuple  # (hits, n) of the proportions whose mean `overall` is: one, or one for each source (CV-Bench-2D)


def find(data_dir) -> dict[str, pathlib.Path]:
    """The benchmark files in a folder, {name: path}. FileNotFoundError if there is none."""
    paths = {name: pathlib.Path(data_dir) / f"{name}.tsv" for name in KINDS}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        raise FileNotFoundError(
            f"no benchmark file in {data_dir}: put NAME.tsv there, NAME one of {', '.join(KINDS)}"
        )
    return paths


def read(path) -> Table:
    """Reads NAME.tsv, NAME being one of KINDS. Pictures are only looked up; `images` decodes them.

    Columns are typed as a whole, as pandas does by default: a column of numbers with a blank turns "3" into 3.0,
    and cells like "None" or "N/A" are missing.

    Raises ValueError that names file, row and column: unknown NAME, no table, missing columns, doubled indices,
    references to rows that are not there.
    """
    import pandas

    path = pathlib.Path(path)
    name = path.name.removesuffix(".tsv")
    if name not in KINDS:
        raise ValueError(
            f"{path}: no known benchmark: name the file NAME.tsv, NAME one of {', '.join(KINDS)}"
        )
    with open(path, "rb") as f:
        md5 = hashlib.file_digest(f, "md5").hexdigest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", pandas.errors.ParserWarning
            )  # rows longer than the header
            frame = pandas.read_csv(
                path, sep="\t", index_col=False
            )  # else such rows would be shifted, unseen
    except (
        ValueError,
        pandas.errors.ParserWarning,
    ) as e:  # also quotes left open, no columns, another encoding
        raise ValueError(
            f"{path} is no table of tab-separated UTF-8 text ({str(e).strip()}): download it again"
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
            f"{path}: no column {', '.join(lacking)} among {', '.join(frame)[:200]}: check that this is "
            f"{name} and separated by tabs"
        )
    letters = [c for c in frame if c in set(string.ascii_uppercase)]
    untyped = [{}] * len(frame)
    if name == "CV-Bench-2D":
        untyped = pandas.read_csv(path, sep="\t", usecols=letters, dtype=str)[letters].to_dict(
            "records"
        )
    records = frame.to_dict("records")  # values become Python's own
    _check_index(path, name, records)
    dropped = tuple(r["index"] for r in records if _missing(r.get("image", "")))
    cells = {
        str(r["index"]): str(r["image"])
        for r in records
        if "image" in r and not _missing(r["image"])
    }
    rows, respelt = [], {}
    for record, texts in zip(records, untyped):
        if _missing(record.get("image", "")):
            continue
        pictures, stored = _pictures(path, name, record, cells)
        texts = {x: t for x, t in texts.items() if not _missing(t)}
        record = {c: value for c, value in record.items() if c != "image"}
        if KINDS[name] == "vsp":
            _whole(path, record, "maze_size")
        row = Row(str(path), name, record["index"], record, pictures, stored, texts)
        if (letter := _letter(row)) and letter != record["answer"]:
            respelt[row.index] = str(record["answer"])
            row = dataclasses.replace(row, cells=record | {"answer": letter})
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no row has an image: download it again")
    return Table(name, str(path), md5, tuple(rows), dropped, respelt)


def _letter(row: Row) -> str | None:
    """The option letter that a row's answer cell names: itself, by the option's whole text, or between marks; else None.

    CV-Bench as its authors publish it has "(A)", which equals no letter, so that the harness counts every answer wrong.
    """
    if KINDS[row.name] not in _LETTERED or _missing(row.cells["answer"]):
        return None
    answer = str(row.cells["answer"])
    if answer in row.options:
        return answer
    by_text = [letter for letter, option in row.options.items() if option == answer]
    between = re.fullmatch(r"[\s().:\[\]]*([A-Z])[\s().:\[\]]*", answer)
    letter = by_text[0] if len(by_text) == 1 else between and between[1]
    return letter if letter in row.options else None


def unmatchable(table: Table) -> dict:
    """{index: what is wrong} of rows for which no answer would be right, whatever a model says."""
    found = {}
    for row in table.rows:
        column, why = _fault_of_answer(row)
        if why:
            found[row.index] = (
                f"{row.file}: row {row.index}, column {column}: {row.cells.get(column)!r}: {why}"
            )
    return found


def _fault_of_answer(row: Row) -> tuple[str, str]:
    """(column, why no answer can be right), ("", "") where one can."""
    kind, cells = KINDS[row.name], row.cells
    if kind == "vsp":
        return _fault_of_maze(cells["maze_map"], int(cells["maze_size"]))
    if row.name == "CV-Bench-2D" and _missing(cells["source"]):
        return (
            "source",
            "the score is the mean over the sources, so this row would not count: fill the cell",
        )
    if _missing(cells["answer"]):
        return "answer", "there is no right answer: fill the cell"
    if kind in _LETTERED:
        return (
            ("", "")
            if _letter(row)
            else (
                "answer",
                f"it is none of the row's options {', '.join(row.options) or '(none)'} (cells such as None and NA count as "
                "empty): give the letter of one",
            )
        )
    good = [truth for truth in scoring.accepted(cells["answer"]) if truth.strip()]
    good = [truth for truth in good if scoring.relaxed(truth.strip(), truth, fork=True)]
    return (
        ("", "")
        if good
        else (
            "answer",
            "answers are compared without blanks around them, so none equals it: correct the cell",
        )
    )


def _fault_of_maze(maze, size: int) -> tuple[str, str]:
    lines = [] if _missing(maze) else scoring.maze_rows(maze)
    if not lines or {len(line) for line in lines} != {len(lines)}:
        return "maze_map", "not a square maze written as ['SF', 'FG']: correct the cell"
    if len(lines) != size:
        return "maze_size", f"the maze has {len(lines)} rows: give that number"
    cells = {(r, c): cell for r, line in enumerate(lines) for c, cell in enumerate(line)}
    if strange := sorted(set(cells.values()) - set("SGFH")):
        return (
            "maze_map",
            f"it holds {strange[0]!r}: use S (start), G (goal), F (free) and H (hole)",
        )
    places = {cell: place for place, cell in cells.items()}
    if absent := [cell for cell in "SG" if cell not in places]:
        return "maze_map", f"it has no {absent[0]}: give it a start S and a goal G"
    reached, edge = {places["S"]}, [places["S"]]
    while edge:
        r, c = edge.pop()
        new = {
            place
            for place in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
            if cells.get(place, "H") != "H"
        } - reached
        reached |= new
        edge += new
    return (
        ("", "")
        if places["G"] in reached
        else ("maze_map", "no route leads from S to G: correct the cell")
    )


def _check_index(path, name, records):
    """Raises ValueError unless every row has an index of its own; numbers where the circular groups need them."""
    seen = {}
    for n, record in enumerate(records):
        index = record["index"]
        if _missing(index) or isinstance(index, float):
            raise ValueError(
                f"{path}: data row {n}, column index: {index!r} is no whole number and no name (one blank "
                "cell makes the column fractions): give each row its own"
            )
        if index in seen:
            raise ValueError(
                f"{path}: index {index} stands in data rows {seen[index]} and {n}: number them anew or "
                "leave one out"
            )
        seen[index] = n
        if KINDS[name] == "circular":
            _whole(path, record, "index")
            if "g_index" in record:
                _whole(path, record, "g_index")


def _whole(path, record, column):
    value = record[column]
    if isinstance(value, str) or _missing(value) or value != int(value):
        raise ValueError(
            f"{path}: row {record['index']}, column {column}: {value!r} is no whole number: mend the cell"
        )


def _pictures(path, name, record, cells) -> tuple[tuple, tuple]:
    """(pictures, stored) of a record: see Row. cells: index as text -> image cell, of rows that have one."""

    def fail(column, why, mend):
        raise ValueError(f"{path}: row {record['index']}, column {column}: {why}: {mend}")

    def items(column, cell):
        if not (cell.startswith("[") and cell.endswith("]")):
            return [cell]
        try:
            found = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = []
        if not found or not all(isinstance(item, str) and item for item in found):
            fail(column, f"no list of texts, {cell[:40]!r}...", "write it as ['...', '...']")
        return found

    named = record.get("image_path")
    named = items("image_path", named) if isinstance(named, str) else None
    if "image" not in record:
        if named is None:
            fail("image_path", "the cell is empty", "name the file of the picture")
        folder = path.parent / "images"
        files = [
            next((f for f in (folder / name / item, folder / item) if f.is_file()), None)
            for item in named
        ]
        if None in files:
            fail(
                "image_path",
                f"there is no {named[files.index(None)]!r} in {folder} or {folder / name}",
                "put the picture there",
            )
        return tuple(files), ()
    cell, seen = cells[str(record["index"])], set()
    while len(cell) <= _REFERENCE:
        if cell in seen or cell not in cells:
            fail(
                "image",
                f"it refers to row {cell!r}, which has no picture",
                f"give a row's index or a base64 text (of more than {_REFERENCE} characters)",
            )
        seen.add(cell)
        cell = cells[cell]
    pictures = items("image", cell)
    if "image_path" in record:
        if named is None or len(named) != len(pictures):
            fail(
                "image_path",
                f"{len(named or ())} file names for {len(pictures)} pictures",
                "name one for each or leave the column out",
            )
        return tuple(pictures), tuple(named)
    single = len(pictures) == 1
    index = record["index"]
    return tuple(pictures), (f"{index}.jpg",) if single else tuple(
        f"{index}_{k}.png" for k in range(len(pictures))
    )


def _missing(value) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def digest_of_files(table: Table) -> str:
    """Checksum of the image files that a table names, "" where it holds all images itself."""
    files = dict.fromkeys(
        p for row in table.rows for p in row.pictures if isinstance(p, pathlib.Path)
    )
    found = hashlib.blake2b(digest_size=16)
    for path in files:
        found.update(hashlib.blake2b(path.read_bytes()).digest())
    return found.hexdigest() if files else ""


def images(row: Row, cache: str = "lossless") -> list:
    """The row's pictures as Pillow RGB images, in order; transparency is dropped, not blended.

    Args:
      cache: "lossless": as they are. "jpeg75": as they come out of the harness's files, which keep a single
        picture as NAME.jpg, JPEG of quality 75 and halved chroma, and lists without loss. A file named by
        `image_path` alone is nobody's copy and stays as it is.

    Raises ValueError, naming file, row and column, if no picture comes out of a cell.
    """

    if cache not in ("lossless", "jpeg75"):
        raise ValueError(f"cache is {cache!r}: choose 'lossless' or 'jpeg75'")
    found = []
    for k, source in enumerate(row.pictures):
        try:
            data = source if isinstance(source, pathlib.Path) else _decode(source)
            image = open_rgb(data, transparency="drop")
        except ValueError as e:
            column = "image_path" if isinstance(source, pathlib.Path) else "image"
            raise ValueError(
                f"{row.file}: row {row.index}, column {column}, picture {k}: {e} (or download the file "
                "again)"
            ) from e
        if cache == "jpeg75" and row.stored and row.stored[k].lower().endswith((".jpg", ".jpeg")):
            stored = io.BytesIO()
            image.save(stored, "JPEG", quality=75, subsampling="4:2:0")
            image = Image.open(stored).convert("RGB")
        found.append(image)
    return found


def _decode(text: str) -> bytes:
    """The bytes of a base64 text, also in the forms that other tools write: after "data:image/png;base64,", as Python's
    b'...', with the alphabet for URLs, without padding."""
    text = "".join(text.split())
    text = re.sub(r"^data:[\w/+.-]*;base64,", "", text)
    text = re.sub(r"""^b(['"])(.*)\1$""", r"\2", text)
    padded = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    padded += "=" * (-len(padded) % 4)
    try:
        return base64.b64decode(padded, validate=True)
    except ValueError as e:
        raise ValueError(f"broken base64 text of {len(text):,} characters ({e}): replace it") from e


def messages(row: Row) -> list[int | str]:
    """The parts of the prompt in order: a number is the picture at that place in `images(row)`, from 0; a text, text.

    Multiple choice: the pictures, then hint, question and options. CV-Bench and charts: the pictures, then the
    table's own text. Mazes: the question cut at <IMAGE-n> (n from 1) and <TEST-IMAGE> (the last picture); markers
    out of range vanish, pictures without a marker are not shown; a question without markers follows its pictures.
    A missing question is printed as "nan".
    """
    pictures, cells = list(range(len(row.pictures))), row.cells
    kind = KINDS[row.name]
    if kind in ("mcq", "circular"):
        text = "" if _missing(cells.get("hint")) else f"Hint: {cells['hint']}\n"
        text += f"Question: {cells['question']}\n"
        if row.options:
            text += "Options:\n" + "".join(
                f"{letter}. {option}\n" for letter, option in row.options.items()
            )
            text += "Please select the correct answer from the options above. \n"
        return [*pictures, text]
    text = str(cells["prompt" if kind == "cvbench" else "question"])
    if kind != "vsp" or ("<IMAGE-" not in text and "<TEST-IMAGE>" not in text):
        return [*pictures, text]
    parts = []
    for piece in re.split(r"(<IMAGE-\d+>|<TEST-IMAGE>)", text):
        if marker := re.fullmatch(r"<IMAGE-(\d+)>|<TEST-IMAGE>", piece):
            k = int(marker[1]) - 1 if marker[1] else len(pictures) - 1
            parts += [k] if k in pictures else []
        elif piece:
            parts.append(piece)
    return parts


def wrapper(parts) -> tuple[str, list[int]]:
    """(text, pictures): what the harness's wrapper makes of `messages`: all pictures go first, then one text.

    The text is the parts joined by blanks, where the j-th picture (from 1, repeats counted) has become
    "<img><|image_j|></img>"; pictures are their places in `images(row)`, in that order.

    Raises ValueError if no picture is left, as the harness does.
    """
    pictures = [part for part in parts if isinstance(part, int)]
    if not pictures:
        raise ValueError(
            f"a prompt without a picture ({str(parts)[:80]}): mend the markers of the question"
        )
    tags = (f"<img><|image_{j}|></img>" for j in range(1, len(pictures) + 1))
    return " ".join(next(tags) if isinstance(part, int) else part for part in parts), pictures


def score(table: Table, predictions: dict, partial: bool = False) -> Report:
    """Scores texts of the model by the rules of `scoring`.

    The harness keeps predictions in a table before it looks at them, so they go through the same reader here:
    empty ones and texts like "None" become "nan" (so in mazes, where the harness would stop, a plain miss), and if
    all of them are numbers they are typed as one column.

    Overall is the mean over rows; over questions (circular); over the accuracies of the sources (CV-Bench-2D).
    Categories: `l2-category` and `category`; CV-Bench-2D the sources; charts `split`, if there is one, else
    `category`; none for mazes. Rows with a missing category count in `overall` alone.
    Extras: overall_exact_matching_run (circular: the harness run without a judge), pair_accuracy_newer_harness
    (MMVP: rows 2i and 2i+1 in index order both right), overall_official_relaxed (charts: error relative to the
    truth), overall_if_options_kept_as_text (CV-Bench-2D: without the typing of option columns).

    Args:
      predictions: index -> text, of every row.
      partial: score the rows that have one; the others are listed in the report, and questions (circular) and
        pairs (MMVP) with one of them take no part.

    Raises ValueError for predictions that are missing (unless partial), of unknown rows, or no text.
    """
    texts, missing = _texts(table, predictions, partial)
    rows = [row for row in table.rows if row.index in texts]
    details = [_score_row(row, texts[row.index]) for row in rows]
    hits = {d["index"]: d["hit"] for d in details}
    overall, per_category, extras, groups, orphans = _mean(hits.values()), {}, {}, {}, ()
    parts = ((sum(hits.values()), len(hits)),)

    def by(column, scores=hits, measure=_mean):
        values = [
            (row.cells[column], scores[row.index])
            for row in rows
            if row.index in scores and not _missing(row.cells.get(column))
        ]
        return {
            str(v): measure([s for value, s in values if value == v])
            for v in dict.fromkeys(v for v, _ in values)
        }

    if table.kind == "chartqa":
        per_category = by("split" if "split" in rows[0].cells else "category")
        extras["overall_official_relaxed"] = 100 * _mean(d["score_official"] for d in details)
        overall, per_category = 100 * overall, {c: 100 * value for c, value in per_category.items()}
    elif table.name == "CV-Bench-2D":
        per_category = by("source")
        overall = _mean(per_category.values())
        parts = tuple(by("source", measure=lambda scores: (sum(scores), len(scores))).values())
        as_text = {
            row.index: _hit(row, scoring.choose(texts[row.index], row.untyped)[0]) for row in rows
        }
        extras["overall_if_options_kept_as_text"] = _mean(by("source", as_text).values())
    elif table.kind == "circular":
        groups, first, orphans = _circular(table, texts)
        parts = ((sum(groups.values()), len(groups)),)
        overall, extras["overall_exact_matching_run"] = (
            _mean(groups.values()),
            _mean(first.values()),
        )
        per_category = by("l2-category", groups) | by(
            "category", groups
        )  # a group bears its main row's index
    elif table.kind != "vsp":
        per_category = by("l2-category") | by("category")
    if table.name == "MMVP":
        order = sorted(row.index for row in table.rows)
        pairs = [(a, b) for a, b in zip(order[::2], order[1::2]) if a in hits and b in hits]
        if pairs:
            extras["pair_accuracy_newer_harness"] = _mean(hits[a] * hits[b] for a, b in pairs)
    splits = {str(row.cells["split"]) for row in rows if not _missing(row.cells.get("split"))}
    return Report(
        table.name,
        "percent" if table.kind == "chartqa" else "fraction",
        overall,
        per_category,
        extras,
        splits.pop() if len(splits) == 1 else None,
        tuple(details),
        groups,
        orphans,
        missing,
        table.dropped,
        parts,
    )


def _mean(values) -> float:
    values = list(values)
    if not values:
        raise ValueError(
            "nothing to score: give predictions, of whole questions in a circular table"
        )
    return sum(values) / len(values)


def _hit(row, option) -> int:
    return int(option == str(row.cells["answer"]))


def _score_row(row: Row, text: str) -> dict:
    kind, cells = KINDS[row.name], row.cells
    if kind == "vsp":
        path = scoring.boxed_path(text)
        hit = scoring.walk(cells["maze_map"], int(cells["maze_size"]), path)
        return {"index": row.index, "path": path, "hit": int(hit), "needs_judge": False}
    if kind == "chartqa":
        found, needs_judge = scoring.extract(text)
        fork, official = (
            scoring.chart_score(found, cells["answer"], fork=fork) for fork in (True, False)
        )
        return {
            "index": row.index,
            "extracted": found,
            "hit": int(fork),
            "score_fork": fork,
            "score_official": official,
            "needs_judge": needs_judge,
        }
    option, needs_judge = scoring.choose(text, row.options)
    return {
        "index": row.index,
        "option": option,
        "hit": _hit(row, option),
        "needs_judge": needs_judge,
    }


def questions(table: Table) -> set:
    """What is asked, told apart by index: each row, or in a circular table each question with all its turns."""
    return set(map(_question, table.rows))


def size(table: Table) -> int:
    """Number of questions."""
    return len(questions(table))


def subset(table: Table, count: int, seed: int) -> Table:
    """A table with `count` of the questions (all for 0), chosen at random by the seed, in the order of the table."""
    asked = list(dict.fromkeys(map(_question, table.rows)))
    chosen = {asked[n] for n in randomness.subset(len(asked), count, seed)}
    return dataclasses.replace(
        table, rows=tuple(row for row in table.rows if _question(row) in chosen)
    )


def _question(row) -> int | str:
    """The index of a row, or of the question that it turns in a circular table."""
    return (
        int(row.cells.get("g_index", row.index % _TURN))
        if KINDS[row.name] == "circular"
        else row.index
    )


def _circular(table, texts):
    """({question: hit}, {question: hit of the first pass alone}, questions without a main row)."""
    turns = {}
    for row in table.rows:
        turns.setdefault(_question(row), []).append(row)
    hits, first, orphans = {}, {}, []
    for g, rows in sorted(turns.items()):
        if all(row.index != g for row in rows):
            orphans.append(g)
        elif all(row.index in texts for row in rows):
            hit, decided = scoring.circular(
                [(texts[r.index], r.options, str(r.cells["answer"])) for r in rows]
            )
            hits[g], first[g] = int(hit), int(decided or False)
    return hits, first, tuple(orphans)


def _texts(table, predictions, partial) -> tuple[dict, tuple]:
    """({index: text as the harness reads it back}, indices without one)."""
    import pandas

    indices = [row.index for row in table.rows]
    unknown = list(predictions.keys() - set(indices))
    if unknown:
        raise ValueError(
            f"{len(unknown)} predictions for rows that {table.path} does not have or dropped for want of "
            f"an image, such as {unknown[:3]}; its indices are like {indices[0]!r}"
        )
    bad = [i for i, text in predictions.items() if not isinstance(text, str)]
    if bad:
        raise ValueError(
            f"the prediction for row {bad[0]} is {type(predictions[bad[0]]).__name__}: give texts"
        )
    bad = [i for i, text in predictions.items() if re.search("[\ud800-\udfff]", text)]
    if bad:
        raise ValueError(
            f"the prediction for row {bad[0]} holds half a surrogate pair, which no UTF-8 file can: "
            f"{predictions[bad[0]][:40]!r}: replace it with U+FFFD"
        )
    missing = tuple(i for i in indices if i not in predictions)
    if missing and not partial or len(missing) == len(indices):
        raise ValueError(
            f"{len(missing)} of {len(indices)} rows of {table.path} have no prediction, such as "
            f"{list(missing[:3])}: answer them, or score what is there with partial=True"
        )
    indices = [i for i in indices if i in predictions]
    column = io.StringIO(_tsv(["prediction"], [[predictions[i]] for i in indices]))
    column = pandas.read_csv(column, sep="\t")["prediction"].tolist()
    return {
        i: str(text) for i, text in zip(indices, column, strict=True)
    }, missing  # a missing one is "nan"


def export(path, table: Table, predictions: dict) -> None:
    """Writes predictions as the TSV that the public harness judges: every column but `image`, and `prediction`.

    All cells are quoted, so that tabs, line breaks and backspaces arrive, which a spreadsheet would lose. An empty
    answer to a maze is written too, although the harness stops at it.
    Raises ValueError as `score` does.
    """
    _texts(table, predictions, False)
    columns = [c for c in table.rows[0].cells if c != "prediction"]
    lines = [
        ["" if _missing(row.cells[c]) else row.cells[c] for c in columns] + [predictions[row.index]]
        for row in table.rows
    ]
    files_lib.write(path, _tsv([*columns, "prediction"], lines))


def _tsv(columns, lines) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([columns, *lines])
    return text.getvalue()
