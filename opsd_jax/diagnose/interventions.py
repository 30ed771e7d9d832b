"""Answers to the same examples with something else in place of the visual thoughts, in pairs."""

import os
from collections.abc import Sequence

from opsd_jax.diagnose import attention, output
from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import charts, html, statistics

MODES = ("none", "real", "noise", "swap", "remove")
_MOST_SAMPLES = 12  # of each task


def measure(diagnosis: Diagnosis, folder: str, checkpoint: str) -> output.Page:
    """Measures and writes the analysis `interventions` of a step folder; its page."""
    params = diagnosis.session.restore_params(checkpoint)
    found = diagnosis.answers(params, MODES, os.path.basename(folder))
    shares_of = {}
    for mode in MODES:
        layout = "student" if mode == "none" else "teacher"
        shares = attention.shares_by_example(diagnosis, params, layout, mode, found[mode])
        mean = attention.mean_over_examples(shares).mean(axis=0)
        shares_of[mode] = attention.named(mean)["completion"]
    output.write_lines(
        folder,
        "predictions.jsonl",
        [
            {"mode": mode, "task": task, **p}
            for mode, by_task in found.items()
            for task, predictions in by_task.items()
            for p in predictions
        ],
    )
    summary = {
        "analysis": "interventions",
        "checkpoint": checkpoint,
        **diagnosis.facts(),
        "tasks": summarise(found, diagnosis.tasks),
        "attention_of_the_answers": shares_of,
    }
    return output.write(folder, summary, lambda s: page(diagnosis, s, found))


def summarise(found: dict, tasks: Sequence[str]) -> dict:
    """Accuracies and paired tests.

    Args:
      found: {mode: {task: predictions}}.

    Returns:
      {task, or "all": {mode: accuracy, interval_95, n, and what `compare` finds against "real" and
      "none"}}.
    """
    summary = {}
    for task in (*tasks, "all"):
        hits = {
            mode: [
                bool(p["hit"]) for t in (tasks if task == "all" else (task,)) for p in by_task[t]
            ]
            for mode, by_task in found.items()
        }
        summary[task] = {}
        for mode, own in hits.items():
            summary[task][mode] = {
                "accuracy": sum(own) / len(own),
                "interval_95": list(statistics.wilson(sum(own), len(own))),
                "n": len(own),
                **{
                    f"against_{other}": compare(own, hits[other])
                    for other in ("real", "none")
                    if other != mode
                },
            }
    return summary


def compare(hits: Sequence[bool], reference: Sequence[bool]) -> dict:
    """Two lists of hits of the same examples: discordant counts and McNemar's exact p-value."""
    gained = sum(a and not b for a, b in zip(hits, reference, strict=True))
    lost = sum(b and not a for a, b in zip(hits, reference, strict=True))
    return {"only_this": gained, "only_reference": lost, "p": statistics.mcnemar(gained, lost)}


def page(diagnosis: Diagnosis, summary: dict, found: dict) -> output.Page:
    """The page of a summary and its answers."""
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, split {output.examples_text(summary)}, "
            "greedy answers to the same examples. **none**: the student's context, image and "
            "question; the others are the teacher's: **real** with the example's own visual "
            "thoughts, **noise** and **swap** (another example's) in their places, **remove** "
            "with its texts and no image."
        ),
        html.note(
            "Bars: 95 % intervals by Wilson. p: McNemar's exact test on the examples that one mode "
            "answers correctly and the other does not. Paper, ThinkMorph on nine benchmarks: noise "
            "−1.5 points, text only −1.0."
        ),
    ]
    for task, modes in summary["tasks"].items():
        if task != "all" or len(diagnosis.tasks) > 1:
            parts += _accuracies("All tasks" if task == "all" else task, modes)
    shares = summary["attention_of_the_answers"]
    parts += [
        html.heading("Where the answers look"),
        html.note(
            "Share of attention in per cent, mean over heads, layers and tokens of each mode's own "
            "answers."
        ),
        html.heat(
            list(shares),
            list(attention.KEYS),
            [[100 * shares[m][k] for k in attention.KEYS] for m in shares],
        ),
    ]
    for source, task in enumerate(diagnosis.tasks):
        parts += _samples(diagnosis, source, {mode: of[task] for mode, of in found.items()})
    return "Interventions", parts


def _accuracies(title: str, modes: dict) -> list[str]:
    """The accuracies of all modes, and how they differ from "real" and "none"."""
    bars = [
        (mode, 100 * s["accuracy"], *(100 * limit for limit in s["interval_95"]))
        for mode, s in modes.items()
    ]
    rows = []
    for mode, s in modes.items():
        for other in ("real", "none"):
            if c := s.get(f"against_{other}"):
                difference = 100 * (s["accuracy"] - modes[other]["accuracy"])
                counts = c["only_this"], c["only_reference"]
                rows.append(
                    [f"{mode} against {other}", s["n"], difference, *counts, f"{c['p']:.2g}"]
                )
    columns = [
        "",
        "examples",
        "difference, points",
        "only the first right",
        "only the second right",
    ]
    return [html.heading(title), charts.intervals(bars), html.table([*columns, "p"], rows)]


def _samples(diagnosis: Diagnosis, source: int, found: dict[str, list[dict]]) -> list[str]:
    """Some examples of a task with the answers in all modes."""
    items = []
    for k, p in enumerate(found["real"][:_MOST_SAMPLES]):
        answers = [
            [mode, "right" if of[k]["hit"] else "wrong", of[k]["prediction"]]
            for mode, of in found.items()
        ]
        items.append(
            html.Sample(
                title=p["pid"],
                hit=bool(p["hit"]),
                parts=[
                    output.images(diagnosis, source, p["index"]),
                    html.paragraph(diagnosis.examples(source, p["index"]).example.question),
                    html.table(["visual thoughts", "answer is", "answer"], answers, texts=3),
                ],
                note=f"expected {p['expected']}; hit or miss is that of `real`",
            )
        )
    return [html.heading(f"{diagnosis.tasks[source]}: samples"), html.samples(items)]
