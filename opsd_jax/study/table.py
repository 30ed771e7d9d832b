"""The table of a study: S/study.json, S/study.md, and its main columns for the terminal."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from opsd_jax.evaluation import html
from opsd_jax.evaluation.wording import Words
from opsd_jax.inputs import checks
from opsd_jax.run.cautions import FEW
from opsd_jax.runtime import files
from opsd_jax.study.grid import Study
from opsd_jax.study.scores import START, TEACHER

TEXTS = 3  # columns at the left that are texts
_IN_TERMINAL = ("group", "arm", "task", "accuracy %", "each seed", "difference", "95 % interval")

Rows = Sequence[Mapping]
"""Rows of the table, see `scores.rows`."""


def header(words: Words) -> tuple[str, ...]:
    """The heads of the columns. words: of the study."""
    return (
        "group",
        "arm",
        "task",
        "accuracy %",
        "each seed",
        "difference",
        "95 % interval",
        "over start",
        "interval over start",
        f"{words.given} %",
        "tokens",
        "KL before",
        "KL after",
        "closure %",
        "status",
    )


def meaning(reference: str, words: Words) -> str:
    """What the columns mean, with **bold** as in Markdown. words: of the study."""
    return (
        f"**Accuracy** is {words.without}, the mean over seeds. **Difference** is the "
        f"accuracy minus that of {reference}, in percentage points, of the same seeds and "
        "questions, with the interval of a bootstrap over seeds and questions. With few seeds that "
        "interval is too narrow, with one it is about the questions alone. **start** and "
        "**teacher** are the weights that OPSD and all arms start from, "
        f"{words.without} and with {words.them}. **Over start** is the accuracy minus that of the "
        "start. **KL** is that between teacher and student, before and after; **closure** is the "
        "share of it that training removed."
    )


def caution(rows: Rows) -> list[str]:
    """A sentence where the accuracies are of few questions; [] where they are not."""
    counts = [row["difference"]["rows"] for row in rows if row["difference"]]
    least = min((int(np.min(count)) for count in counts), default=FEW)
    if least >= FEW:
        return []
    return [f"These numbers mean little: they are of {least} test examples."]


def by_question(study: Study, rows: Rows) -> list[tuple[str, Rows]]:
    """(title, rows) of each table of a study; those of the start are in all of their group."""
    return [
        (
            question.title,
            [
                row
                for group, arms in question.arms.items()
                for row in rows
                if row["group"] == group and row["arm"] in (START, TEACHER, *arms)
            ],
        )
        for question in study.questions
    ]


def write(study: Study, rows: Rows, failed: Mapping[str, str]) -> None:
    """Writes S/study.json and S/study.md.

    failed: {name of a job: why it is not done}.
    """
    jobs = [
        {
            "group": job.group,
            "seed": job.seed,
            "arm": job.arm,
            "workdir": os.path.relpath(job.workdir, study.workdir),
            "status": "done" if job.is_done() else failed.get(job.name, "not done"),
        }
        for job in study.jobs
    ]
    questions = {question.title: question.arms for question in study.questions if question.title}
    record = {"reference": study.reference, "questions": questions, "rows": list(rows)}
    files.write_json(os.path.join(study.workdir, "study.json"), record | {"jobs": jobs})
    lines: list[str] = []
    heads = header(study.words)
    for title, own in by_question(study, rows):
        lines += [f"## {title}", ""] if title else []
        lines += [_line(heads), "|---" * len(heads) + "|", *(_line(cells(row)) for row in own)]
        lines.append("")
    text = "\n".join([*lines, *caution(rows), meaning(study.reference, study.words)]) + "\n"
    files.write(os.path.join(study.workdir, "study.md"), text)


def in_terminal(study: Study, rows: Rows) -> str:
    """The main columns of all tables, and what is missing, as plain text."""
    heads, lines = header(study.words), []
    columns = [heads.index(name) for name in _IN_TERMINAL]
    for title, own in by_question(study, rows):
        table = [_IN_TERMINAL, *(tuple(cells(row)[n] for n in columns) for row in own)]
        lines += [*([title] if title else []), checks.table(table)]
    missing = [
        f"{row['group']} {row['arm']}: {row['status']}" for row in rows if row["status"] != "done"
    ]
    return "\n".join([*lines, *dict.fromkeys(missing), *caution(rows)])


def cells(row: Mapping) -> list[str]:
    """The cells of a row, as texts."""
    return [
        row["group"],
        row["arm"],
        row["task"],
        _percent(row["accuracy"]),
        ", ".join(_percent(accuracy) for accuracy in row["seeds"].values()) or _percent(None),
        *_points(row["difference"]),
        *_points(row["over_start"]),
        _percent(row["real"]),
        _number(row["tokens"], 1),
        _number(row["kl_before"], 3),
        _number(row["kl"], 3),
        _percent(row["closure"], 0),
        row["status"],
    ]


def _points(versus: Mapping | None) -> tuple[str, str]:
    """A difference and its interval, in percentage points."""
    if versus is None:
        return _percent(None), html.between(None, 1)
    limits = [100 * limit for limit in versus["interval_95"]]
    return _percent(versus["mean"]), html.between(limits, 1)


def _percent(share: float | None, digits: int = 1) -> str:
    return _number(None if share is None else 100 * share, digits)


def _number(value: float | None, digits: int) -> str:
    return html.fixed(value, digits)


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
