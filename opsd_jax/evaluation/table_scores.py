"""Scores of a public table as the public harness computes them, and its answers as it reads them.

`scoring` has the rules for one answer. No judge model is asked.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from opsd_jax.evaluation import scoring, tables
from opsd_jax.evaluation.tables import KINDS, LETTERED, Table, TableRow, is_missing
from opsd_jax.runtime import files

Index = int | str


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of one benchmark.

    Attributes:
      name: name of the benchmark.
      unit: "fraction", or "percent" for the chart sets.
      overall: see `score`.
      per_category: {category: score}.
      extras: the same answers by other published definitions, see `score`.
      split: split of the rows, where the table has a single one.
      rows: dicts with index, hit, needs_judge, and what the rule found: option, path or extracted.
      groups: circular: {question: hit}.
      orphans: circular: questions without a main row, which the harness leaves out of the score.
      missing: indices without a prediction, if `partial`.
      dropped: indices of rows without an image.
      parts: (hits, n) of the proportions whose mean `overall` is: one, or one for each source
        (CV-Bench-2D).
    """

    name: str
    unit: str
    overall: float
    per_category: dict[str, float]
    extras: dict[str, float]
    split: str | None
    rows: tuple[dict, ...]
    groups: dict[int, int]
    orphans: tuple[int, ...]
    missing: tuple[Index, ...]
    dropped: tuple[Index, ...]
    parts: tuple[tuple[int, int], ...]


def score(table: Table, predictions: Mapping[Index, str], partial: bool = False) -> Scores:
    """Scores texts of the model by the rules of `scoring`.

    The harness keeps predictions in a table before it looks at them, so they go through the same
    reader here:
    empty ones and texts like "None" become "nan" (in mazes, where the harness would stop, this is a
    plain miss), and if all of them are numbers they are typed as one column.

    Overall is the mean over rows; over questions (circular); over the accuracies of the sources
    (CV-Bench-2D).
    Categories: `l2-category` and `category`; CV-Bench-2D the sources; charts `split`, if there is
    one, else `category`; none for mazes. Rows with a missing category count in `overall` alone.
    Extras: overall_exact_matching_run (circular: the harness run without a judge),
    pair_accuracy_newer_harness (MMVP: rows 2i and 2i+1 in index order both right),
    overall_official_relaxed (charts: error relative to the truth), overall_if_options_kept_as_text
    (CV-Bench-2D: without the typing of option columns).

    Args:
      predictions: index -> text, of every row.
      partial: score the rows that have one; the others are listed in `missing`, and questions
        (circular) and pairs (MMVP) with one of them take no part.
    Raises:
      ValueError: predictions that are missing (unless partial), of unknown rows, or not texts.
    """
    texts, missing = texts_as_read(table, predictions, partial)
    rows = [row for row in table.rows if row.index in texts]
    details = [_score_row(row, texts[row.index]) for row in rows]
    hits = {d["index"]: d["hit"] for d in details}
    overall, per_category, extras, groups = _mean(hits.values()), {}, {}, {}
    orphans: tuple[int, ...] = ()
    parts = ((sum(hits.values()), len(hits)),)

    def by(column, scores=hits, measure=_mean):
        values = [
            (row.cells[column], scores[row.index])
            for row in rows
            if row.index in scores and not is_missing(row.cells.get(column))
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
        )  # a group has the index of its main row
    elif table.kind != "vsp":
        per_category = by("l2-category") | by("category")
    if table.name == "MMVP":
        order = sorted(row.index for row in table.rows)
        pairs = [(a, b) for a, b in zip(order[::2], order[1::2]) if a in hits and b in hits]
        if pairs:
            extras["pair_accuracy_newer_harness"] = _mean(hits[a] * hits[b] for a, b in pairs)
    splits = {str(row.cells["split"]) for row in rows if not is_missing(row.cells.get("split"))}
    return Scores(
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


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise ValueError(
            "nothing to score: give predictions, of whole questions in a circular table"
        )
    return sum(values) / len(values)


def _hit(row: TableRow, option: str) -> int:
    return int(option == str(row.cells["answer"]))


def _score_row(row: TableRow, text: str) -> dict:
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


def _circular(
    table: Table, texts: Mapping[Index, str]
) -> tuple[dict[int, int], dict[int, int], tuple[int, ...]]:
    """({question: hit}, {question: hit of the first pass alone}, questions without a main row)."""
    turns = {}
    for row in table.rows:
        turns.setdefault(tables.question(row), []).append(row)
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


def texts_as_read(
    table: Table, predictions: Mapping[Index, str], partial: bool
) -> tuple[dict[Index, str], tuple[Index, ...]]:
    """({index: prediction as the harness reads it back}, indices without one).

    Arguments and errors as in `score`.
    """
    import pandas

    indices = [row.index for row in table.rows]
    unknown = list(predictions.keys() - set(indices))
    if unknown:
        raise ValueError(
            f"{len(unknown)} predictions for rows that {table.path} does not have or dropped "
            f"because they have no image, such as {unknown[:3]}; its indices are like "
            f"{indices[0]!r}"
        )
    bad = [i for i, text in predictions.items() if not isinstance(text, str)]
    if bad:
        raise ValueError(
            f"the prediction for row {bad[0]} is {type(predictions[bad[0]]).__name__}: give texts"
        )
    bad = [i for i, text in predictions.items() if re.search("[\ud800-\udfff]", text)]
    if bad:
        raise ValueError(
            f"the prediction for row {bad[0]} holds half a surrogate pair, which no UTF-8 file "
            f"can: {predictions[bad[0]][:40]!r}: replace it with U+FFFD"
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
    # A text that pandas reads as missing becomes "nan".
    return {i: str(text) for i, text in zip(indices, column, strict=True)}, missing


def export(path: str | os.PathLike, table: Table, predictions: Mapping[Index, str]) -> None:
    """Writes predictions as the TSV that the public harness judges.

    It has every column but `image`, and `prediction`.

    All cells are quoted, so that tabs, line breaks and backspaces arrive, which a spreadsheet would
    lose. An empty answer to a maze is written too, although the harness stops at it.

    Raises:
      ValueError: as `score`.
    """
    texts_as_read(table, predictions, False)
    columns = [c for c in table.rows[0].cells if c != "prediction"]
    lines = [
        ["" if is_missing(row.cells[c]) else row.cells[c] for c in columns]
        + [predictions[row.index]]
        for row in table.rows
    ]
    files.write(path, _tsv([*columns, "prediction"], lines))


def _tsv(columns: list[str], lines: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([columns, *lines])
    return text.getvalue()


def unmatchable(table: Table) -> dict[Index, str]:
    """{index: what is wrong} of rows for which no answer would be right."""
    found = {}
    for row in table.rows:
        column, why = _fault_of_answer(row)
        if why:
            found[row.index] = (
                f"{row.file}: row {row.index}, column {column}: {row.cells.get(column)!r}: {why}"
            )
    return found


def _fault_of_answer(row: TableRow) -> tuple[str, str]:
    """(column, why no answer can be right), ("", "") where one can."""
    kind, cells = KINDS[row.name], row.cells
    if kind == "vsp":
        return _fault_of_maze(cells["maze_map"], int(cells["maze_size"]))
    if row.name == "CV-Bench-2D" and is_missing(cells["source"]):
        return (
            "source",
            "the score is the mean over the sources, so this row would not count: fill the cell",
        )
    if is_missing(cells["answer"]):
        return "answer", "there is no right answer: fill the cell"
    if kind in LETTERED:
        return (
            ("", "")
            if tables.option_letter(row)
            else (
                "answer",
                f"it is none of the row's options {', '.join(row.options) or '(none)'} (cells "
                "such as None and NA count as empty): give the letter of one",
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


def _fault_of_maze(maze: Any, size: int) -> tuple[str, str]:
    """As `_fault_of_answer`, of a maze of size x size cells: a route must lead from S to G."""
    lines = [] if is_missing(maze) else scoring.maze_rows(maze)
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
