"""Answers to the same rows with something else in the places of the visual thoughts, compared in pairs."""

import json
import os

import jax

from opsd_jax.diagnose import attention, runs
from opsd_jax.evaluation import charts, html, statistics
from opsd_jax.runtime import files

MODES = ("none", "real", "noise", "swap", "remove")


def compare(hits, reference) -> dict:
    """Two lists of hits of the same rows: discordant counts and McNemar's exact p-value."""
    gained = sum(a and not b for a, b in zip(hits, reference, strict=True))
    lost = sum(b and not a for a, b in zip(hits, reference, strict=True))
    return {"only_this": gained, "only_reference": lost, "p": statistics.mcnemar(gained, lost)}


def summarise(found: dict, tasks) -> dict:
    """{task, or "all": {mode: accuracy, interval_95, n, and against "real" and "none" what `compare` finds}}."""
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


def measure(run: runs.Run, folder: str, *, checkpoint: str) -> tuple[str, list[str]]:
    """Measures and writes `interventions`."""
    params = runs.load(run, checkpoint)
    found = runs.answers(run, params, MODES, os.path.basename(folder))
    shares_of = {}
    for mode in MODES:
        layout = "student" if mode == "none" else "teacher"
        shares = attention.shares_by_row(run, params, layout, mode, found[mode])
        shares_of[mode] = attention.named(attention.mean_over_rows(shares).mean(axis=0))[
            "completion"
        ]
    files.write(
        os.path.join(folder, "predictions.jsonl"),
        "".join(
            json.dumps({"mode": mode, "task": task, **p}) + "\n"
            for mode, by_task in found.items()
            for task, predictions in by_task.items()
            for p in predictions
        ),
        primary=jax.process_index() == 0,
    )
    summary = {
        "analysis": "interventions",
        "checkpoint": checkpoint,
        **run.facts(),
        "tasks": summarise(found, run.tasks),
        "attention_of_the_answers": shares_of,
    }
    return runs.finish(folder, summary, lambda s: page(run, s, found))


def page(run: runs.Run, summary: dict, found: dict, most: int = 12) -> tuple[str, list[str]]:
    """(title, HTML parts) of a summary and its answers; `most` samples of each task."""
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, split {runs.rows_text(summary)}, greedy answers to the same rows. **none**: "
            "the student's context, picture and question; the others are the teacher's: **real** with the row's own visual "
            "thoughts, **noise** and **swap** (another row's) in their places, **remove** with its texts and no picture."
        ),
        html.note(
            "Bars: 95 % intervals by Wilson. p: McNemar's exact test on the rows that one mode answers right "
            "and the other does not. Paper, ThinkMorph on nine benchmarks: noise −1.5 points, text only −1.0."
        ),
    ]
    for task, modes in summary["tasks"].items():
        if task == "all" and len(run.tasks) == 1:
            continue
        parts += [
            html.heading("All tasks" if task == "all" else task),
            charts.intervals(
                [
                    (m, 100 * s["accuracy"], *(100 * x for x in s["interval_95"]))
                    for m, s in modes.items()
                ]
            ),
        ]
        rows = []
        for mode, s in modes.items():
            for other in ("real", "none"):
                if c := s.get(f"against_{other}"):
                    rows.append(
                        [
                            f"{mode} against {other}",
                            s["n"],
                            100 * (s["accuracy"] - modes[other]["accuracy"]),
                            c["only_this"],
                            c["only_reference"],
                            f"{c['p']:.2g}",
                        ]
                    )
        parts.append(
            html.table(
                [
                    "",
                    "rows",
                    "difference, points",
                    "only the first right",
                    "only the second right",
                    "p",
                ],
                rows,
            )
        )
    shares = summary["attention_of_the_answers"]
    parts += [
        html.heading("Where the answers look"),
        html.note(
            "Share of attention in per cent, mean over heads, layers and tokens of each mode's own answers."
        ),
        html.heat(
            list(shares),
            list(attention.KEYS),
            [[100 * shares[m][k] for k in attention.KEYS] for m in shares],
        ),
    ]
    for source, task in enumerate(run.tasks):
        items = []
        for k, p in enumerate(found["real"][task][:most]):
            row = run.rows(source, p["index"])
            texts = [
                [
                    mode,
                    "right" if by_task[task][k]["hit"] else "wrong",
                    by_task[task][k]["prediction"],
                ]
                for mode, by_task in found.items()
            ]
            items.append(
                html.Sample(
                    title=p["pid"],
                    hit=bool(p["hit"]),
                    parts=[
                        html.row(*runs.pictures(run, row)),
                        html.paragraph(row.example.question),
                        html.table(["visual thoughts", "answer is", "answer"], texts, texts=3),
                    ],
                    note=f"expected {p['expected']}; hit or miss is that of `real`",
                )
            )
        parts += [html.heading(f"{task}: samples"), html.samples(items)]
    return "Interventions", parts
