"""The analysis `all`: answers in all modes, then the other analyses, on one page."""

import dataclasses
import os

from opsd_jax.diagnose import attention, interventions, kl, output, selection
from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import charts, contexts, html, results
from opsd_jax.run import evaluate
from opsd_jax.run.evaluation_request import Request
from opsd_jax.runtime import checkpoint as checkpoint_lib


def measure(diagnosis: Diagnosis, folder: str, checkpoint: str) -> output.Page:
    """Evaluates a step folder in every mode that the model and its examples allow, then diagnoses
    it.

    The weights that training started from are evaluated, too. The page holds the pages of the
    analyses.
    """
    session = diagnosis.session
    base = selection.start_checkpoint(session.workdir)
    summaries, before = _evaluate(diagnosis, os.path.basename(folder), checkpoint, base)
    kinds = tuple(k for k in kl.COMPLETIONS if k != "data" or diagnosis.without_trace() is None)
    comparison = kl.Comparison(teacher=base, student=checkpoint, base=base, kinds=kinds)
    place = {name: os.path.join(folder, name) for name in ("kl", "interventions", "attention")}
    pages = [
        kl.measure(diagnosis, place["kl"], comparison),
        interventions.measure(diagnosis, place["interventions"], checkpoint),
        attention.measure(diagnosis, place["attention"], checkpoint),
    ]
    summary = {
        "analysis": "all",
        "checkpoint": checkpoint,
        **diagnosis.facts(),
        "evaluations": [*summaries, *before],
        "analyses": list(place),
    }
    return output.write(
        folder, summary, lambda s: page(diagnosis, s, _by_mode(summaries, before), pages)
    )


def _evaluate(
    diagnosis: Diagnosis, name: str, checkpoint: str, base: str
) -> tuple[dict[str, dict], dict[str, dict]]:
    """{name of the results: summary} of a checkpoint, and of the start if that is another one."""
    session, chosen = diagnosis.session, diagnosis.selection
    generated = contexts.GENERATED if session.config.model.generation.on else ()
    request = Request(
        session.workdir,
        ("none", *contexts.CONTEXTS, *generated),
        checkpoint=checkpoint,
        benchmarks=diagnosis.tasks,
        split=diagnosis.split,
        rows=chosen.limit,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
        name="" if checkpoint_lib.is_of_run(checkpoint, session.workdir) else name,
    )
    summaries, before = evaluate.evaluate(request, diagnosis.before_batch), {}
    if os.path.realpath(base) != os.path.realpath(checkpoint):
        start = dataclasses.replace(request, modes=("none", "real"), checkpoint=base, name="")
        before = evaluate.evaluate(start, diagnosis.before_batch)
    return summaries, before


def _by_mode(summaries: dict[str, dict], before: dict[str, dict]) -> dict[str, dict]:
    """{what the model sees: summary}, those of the weights before training last."""
    found = {s["mode"]: s for s in summaries.values()}
    return found | {f"{s['mode']}, before training": s for s in before.values()}


def page(
    diagnosis: Diagnosis, summary: dict, evaluations: dict[str, dict], pages: list[output.Page]
) -> output.Page:
    """Accuracies, tokens and seconds of all modes, then the pages of the analyses.

    Args:
      evaluations: {what the model sees: summary of the evaluation}.
    """
    workdir = diagnosis.session.workdir
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, split {output.examples_text(summary)}. One "
            "model answers the same questions: from the image alone (**none**, the student); as "
            "the teacher with the examples' own visual thoughts (**real**), with **noise**, "
            "another example's (**swap**), the problem once more (**image**) or nothing "
            "(**remove**) in their places; and, if it generates images, with images that it "
            "generates itself (**generated**), or again with something else in the places of "
            "those. **Before training**: the weights that the run's training started from, on the "
            "same examples; **real** beside it is what training did to how the model reads true "
            "visual thoughts."
        ),
        html.heading("Answers"),
    ]
    for task in diagnosis.tasks:
        scores = {mode: s["benchmarks"][task] for mode, s in evaluations.items()}
        parts += [html.heading(task, 3), *_answers(scores, workdir)]
    for title, inner in pages:
        parts += [html.heading(title, 1), *inner]
    return f"Evaluation and diagnosis of {os.path.basename(os.path.normpath(workdir))}", parts


def _answers(scores: dict[str, dict], workdir: str) -> list[str]:
    """The scores of a task in all modes."""
    text = scores["none"]["seconds_per_sample"]
    rows = [
        [
            mode,
            results.percent(b),
            b["n"],
            b["mean_output_tokens"],
            b["seconds_per_sample"],
            b["seconds_per_sample"] and text and b["seconds_per_sample"] / text,
            b["timed_samples"],
            b.get("pictures_per_sample"),
        ]
        for mode, b in scores.items()
    ]
    columns = [
        "sees",
        "accuracy %",
        "examples",
        "tokens",
        "s/sample",
        "times none",
        "timed",
        "generated images",
    ]
    return [
        charts.intervals(
            [
                (mode, results.percent(b), *(100 * limit for limit in b["interval_95"]))
                for mode, b in scores.items()
            ]
        ),
        html.table(columns, rows),
        html.note(
            "Seconds leave out batches that compiled a program. Paper: generating images takes "
            f"14.3 times as long as answering in text. All answers: {workdir}/eval/*/report.html"
        ),
    ]
