"""The analysis `all`: answers in all modes, then the other analyses, on one page."""

import os

from opsd_jax.diagnose import attention, interventions, kl, output, selection
from opsd_jax.diagnose.selection import Answers, Diagnosis
from opsd_jax.evaluation import charts, contexts, html, results
from opsd_jax.evaluation.wording import Words

_TIMED = 0.01  # seconds: shorter answers of a toy are mostly overhead, whose ratios say nothing


def measure(diagnosis: Diagnosis, folder: str, checkpoint: str) -> output.Analysis:
    """Evaluates a step folder in every mode that the model and its examples allow, then diagnoses
    it.

    The weights that training started from are evaluated, too. Each analysis has a folder with its
    summary and its arrays; the page has them all.
    """
    session, name = diagnosis.session, os.path.basename(folder)
    base = selection.start_checkpoint(session.workdir)
    generated = contexts.GENERATED if session.config.model.generation.on else ()
    modes = ("none", *contexts.modes_of(diagnosis.selection), *generated)
    answers = diagnosis.answers(checkpoint, modes, name)
    before = {}
    if os.path.realpath(base) != os.path.realpath(checkpoint):
        before = diagnosis.answers(base, ("none", "real"))
    kinds = tuple(
        k
        for k in kl.completions(session.config)
        if k != "data" or diagnosis.without_trace() is None
    )
    comparison = kl.Comparison(teacher=base, student=checkpoint, base=base, kinds=kinds)
    place = {name: os.path.join(folder, name) for name in ("kl", "interventions", "attention")}
    found = [
        kl.measure(diagnosis, place["kl"], comparison),
        interventions.measure(diagnosis, checkpoint, answers),
        attention.measure(diagnosis, place["attention"], checkpoint, answers),
    ]
    for path, analysis in zip(place.values(), found, strict=True):
        output.write_summary(path, analysis.summary)
    summary = {
        "analysis": "all",
        "checkpoint": checkpoint,
        "base": base,
        **diagnosis.facts(),
        "evaluations": [a.name for a in (*answers.values(), *before.values())],
        "analyses": list(place),
    }
    by_mode = answers | {f"{mode}, before training": a for mode, a in before.items()}

    def parts():
        return [
            html.section(
                f"Answers: with and without {diagnosis.words.content}",
                *_answers(diagnosis, by_mode),
            ),
            *(html.section(analysis.title, *analysis.parts()) for analysis in found),
        ]

    return output.Analysis(
        title=f"Diagnosis of {os.path.basename(os.path.abspath(session.workdir))}",
        summary=summary,
        parts=parts,
        words=[line for analysis in found for line in analysis.words],
    )


def _answers(diagnosis: Diagnosis, answers: dict[str, Answers]) -> list[str]:
    """Accuracies, tokens and seconds of all modes.

    Args:
      answers: {what the table calls them: answers}.
    """
    parts = [
        html.paragraph(
            "How well does the model answer the same questions, depending on what it is given "
            "besides image and question? **none** is the student, **real** to **remove** are the "
            "teacher's context (**remove** is what the teacher of the arm none sees). **Before "
            "training** are the weights that training started from. OPSD works where **none** is "
            "as accurate as **real, before training**."
        )
    ]
    for task in diagnosis.tasks:
        if len(diagnosis.tasks) > 1:
            parts.append(html.heading(task))
        parts += _scores(task, answers, diagnosis.words)
    return parts


def _scores(task: str, answers: dict[str, Answers], words: Words) -> list[str]:
    """The scores of a task in all modes. words: of the run."""
    scores = {label: a.summary["benchmarks"][task] for label, a in answers.items()}
    text = scores["none"]["seconds_per_sample"]
    is_timed = bool(text) and text >= _TIMED
    rows = []
    for label, a in answers.items():
        b = scores[label]
        seconds, pictures = b["seconds_per_sample"], b.get("pictures_per_sample")
        rows.append(
            [
                output.evaluation_link(a.name, label),
                words.modes[a.summary["mode"]],
                html.fixed(results.percent(b), 1),
                results.counted(b),
                html.fixed(b["mean_output_tokens"], 1),
                html.fixed(seconds, 4),
                html.fixed(seconds / text, 1) if seconds and is_timed else None,
                b["timed_samples"],
                html.fixed(pictures, 1),
            ]
        )
    columns = ["mode", "the model answers", "accuracy %", "examples", "tokens", "s/example"]
    columns += ["times none", "timed", "generated images"]
    bars = [
        (label, results.percent(b), *(100 * limit for limit in b["interval_95"]))
        for label, b in scores.items()
    ]
    return [
        charts.intervals(bars),
        html.table(columns, rows, texts=2),
        html.note(
            "Each mode links to the page of its evaluation, with all misses. Intervals hold 95 % "
            "(Wilson). Seconds leave out batches that compiled a program."
            + (" Paper: generating images takes 14.3 times as long as text." if is_timed else "")
        ),
    ]
