"""The page of a study, S/study.html: results, differences, curves, answers side by side.

It is made from the files of the runs alone, without a device: commands may be using them.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from opsd_jax import images
from opsd_jax.data import arrayrecord
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import charts, html, shown_answers
from opsd_jax.evaluation.wording import OF_VISUAL_THOUGHTS, Words
from opsd_jax.runtime import files, metrics, provenance, run_folder
from opsd_jax.study import scores as scores_lib
from opsd_jax.study import table
from opsd_jax.study.grid import Job, Study
from opsd_jax.study.scores import Scores

Points = list[tuple[float, float]]

_MOST_SAMPLES = 8  # of each group
_MOST_LINES = 8  # of a chart


def write(study: Study, scores: Scores, rows: Sequence[Mapping], command: str = "") -> str:
    """Writes S/study.html and returns its path.

    Args:
      rows: see `scores.rows`.
      command: the command of the study; "" leaves it out.
    """
    done = sum(job.is_done() for job in study.jobs)
    facts = [
        ("folder", f"`{study.workdir}`"),
        ("jobs", f"{done} of {len(study.jobs)} done"),
        ("seeds", "; ".join(f"{g}: {', '.join(map(str, study.seeds(g)))}" for g in study.groups)),
        ("reference", f"the arm **{study.reference}**"),
        *provenance.facts(command),
    ]
    parts = [html.facts(facts), *_result(study, rows)]
    for group in study.groups:
        parts += [html.section(f"Group {group}", *_curves(study, group))]
    for group in study.groups:
        parts += _samples(study, group)
    parts += [*_runs(study)]
    path = os.path.join(study.workdir, "study.html")
    title = f"Study {os.path.basename(study.workdir)}"
    files.write(path, html.page(title, *parts))
    return path


def _result(study: Study, rows: Sequence[Mapping]) -> list[str]:
    """What is missing, and the tables."""
    missing = [f"{r['group']} {r['arm']}: {r['status']}" for r in rows if r["status"] != "done"]
    parts = [html.heading("Result")]
    parts += [html.paragraph(f"**Missing**: {text}") for text in dict.fromkeys(missing)]
    parts += [html.paragraph(text) for text in table.caution(rows)]
    parts += [html.note(table.meaning(study.reference, study.words))]
    for title, own in table.by_question(study, rows):
        of_question = _table(study, own)
        parts += [html.section(title, *of_question)] if title else of_question
    return parts


def _table(study: Study, rows: Sequence[Mapping]) -> list[str]:
    """One table, and its differences as a chart."""
    cells = [table.cells(row)[:-1] for row in rows]  # without the status, which is above
    parts = [html.table(table.header(study.words)[:-1], cells, texts=table.TEXTS)]
    bars: list[tuple[str, float | None, float | None, float | None]] = []
    for row in rows:
        if versus := row["difference"]:
            mean = 100 * versus["mean"]
            low, high = (100 * limit for limit in versus["interval_95"])
            label = f"{row['group']}: {row['arm']} ({row['task']})"
            bars.append((label, mean, min(low, mean), max(high, mean)))
    if bars:
        top = max(1.0, 1.1 * max(bar[3] or 0.0 for bar in bars))
        parts += [
            html.heading(f"Difference to {study.reference}", 3),
            charts.intervals(bars, unit="points", top=top),
        ]
    return parts


def _curves(study: Study, group: str) -> list[str]:
    """Accuracy and loss from the start of OPSD on: mean over seeds, and each seed as a thin line.

    Losses of arms whose last stage is another one have charts of their own.
    """
    found: dict[tuple[str, str], dict[str, list[Points]]] = {}  # {(title, unit): {arm: seeds}}
    for job in study.jobs:
        path = run_folder.metrics(job.workdir)
        if job.group != group or not os.path.exists(path):
            continue
        for key, points in _series(job, metrics.read(path), study.words).items():
            found.setdefault(key, {}).setdefault(job.arm, []).append(points)
    parts = []
    for (title, unit), arms in sorted(found.items(), key=lambda item: item[0][0]):
        means = {arm: _mean(seeds) for arm, seeds in arms.items()}
        names = [arm for arm, points in means.items() if len(points) > 1]
        for first in range(0, len(names), _MOST_LINES):
            part = names[first : first + _MOST_LINES]
            thin = {arm: arms[arm] for arm in part if len(arms[arm]) > 1}
            lines = {arm: means[arm] for arm in part}
            parts += [
                html.heading(title, 3),
                charts.lines(lines, x="step of the stage", y=unit, thin=thin),
            ]
    return parts or [html.note("– no curves yet")]


def _series(job: Job, records: Sequence[Mapping], words: Words) -> dict[tuple[str, str], Points]:
    """{(title, unit): points} of a job, from the start of its OPSD stage on.

    words: of the study.
    """
    found: dict[tuple[str, str], Points] = {}
    for record in records:
        if record["step"] <= job.start:
            continue
        for key, value in record.items():
            if not isinstance(value, int | float):
                continue
            point = record["step"] - job.start, float(value)
            if key == "loss":
                found.setdefault((f"Loss, stage {record['stage']}", "loss"), []).append(point)
            elif key.startswith("eval/") and key.endswith("/none"):
                name = f"Accuracy on {key.split('/')[1]}, {words.without}"
                points = found.setdefault((name, "accuracy in %"), [])
                points.append((point[0], 100 * point[1]))
    return found


def _mean(seeds: Sequence[Points]) -> Points:
    """The mean over seeds at the steps that all have."""
    values = [dict(points) for points in seeds]
    steps = sorted(set.intersection(*map(set, values)))
    return [(step, float(np.mean([own[step] for own in values]))) for step in steps]


def _samples(study: Study, group: str) -> list[str]:
    """Answers of the reference and of all arms to the same questions, of the first seed.

    Questions that some answer right and others wrong come first.
    """
    for seed in study.seeds(group):
        jobs = [j for j in study.jobs if (j.group, j.seed) == (group, seed) and j.is_done()]
        jobs.sort(key=lambda job: job.arm != study.reference)  # the reference first
        if len(jobs) > 1 and jobs[0].arm == study.reference:
            break
    else:
        return []
    answers: dict[tuple[str, int], dict[str, dict]] = {}
    for job in jobs:
        for p in scores_lib.predictions(job, job.last, "none"):
            answers.setdefault((p["benchmark"], p["index"]), {})[job.arm] = p

    def agree(key: tuple[str, int]) -> bool:
        return len({bool(p["hit"]) for p in answers[key].values()}) == 1

    differing = [key for key in answers if not agree(key)]
    chosen = shown_answers.spread(differing, _MOST_SAMPLES, lambda key: key[0])
    alike = [key for key in answers if agree(key)]
    chosen += shown_answers.spread(alike, _MOST_SAMPLES - len(chosen), lambda key: key[0])
    items = [_sample(study, jobs[0], key, answers[key]) for key in chosen]
    return [
        html.section(
            f"Answers side by side, {group}, seed {seed}",
            html.note(
                f"{len(items)} of {len(answers)} questions, evenly spaced in each task; "
                f"{len(differing)} are answered right by some and wrong by others, and these come "
                f"first. All answer {study.words.without}, "
                f"{_compared(study.words)}. ✓ and ✗ are those of the reference."
            ),
            html.samples(items),
        )
    ]


def _compared(words: Words) -> str:
    """What the samples show besides the questions."""
    if words == OF_VISUAL_THOUGHTS:
        return "which are shown for comparison"
    return "and visual thoughts are shown where an example has them"


def _sample(
    study: Study, job: Job, key: tuple[str, int], answers: Mapping[str, Mapping]
) -> html.Sample:
    """One question with its images, and a table of answers."""
    (task, index), reference = key, answers[study.reference]
    folder = workdir_lib.found_data_dir(job.config, job.workdir)
    source = arrayrecord.open_source(folder, job.config.eval.final_split, task)
    example = source[index]
    shown = [("problem", data) for data in example.problem_images]
    shown += [(f"visual thought {n}", data) for n, data in enumerate(example.visual_thoughts, 1)]
    pictures = [html.image(images.open_rgb(data), size=160, caption=name) for name, data in shown]
    cells = [
        [arm, p["answer"], "✓" if p["hit"] else "✗", p["tokens"], p["prediction"]]
        for arm, p in answers.items()
    ]
    return html.Sample(
        title=f"{task} {reference['pid']}",
        hit=bool(reference["hit"]),
        parts=[
            html.row(*pictures),
            html.paragraph(example.question),
            html.table(["arm", "answer", "right", "tokens", "whole text"], cells, texts=5),
        ],
        note=f"expected {reference['expected']}",
    )


def _runs(study: Study) -> list[str]:
    """Links to the pages of the runs, and the commands' logs."""
    links = []
    for job in study.jobs:
        for name, path in (("page", run_folder.page(job.workdir)), ("log", job.log)):
            if os.path.exists(path):
                links.append((f"{job.name}, {name}", os.path.relpath(path, study.workdir)))
    return [html.heading("Runs"), html.links(links)] if links else []
