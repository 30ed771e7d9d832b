"""The report page of an evaluation."""

from opsd_jax.evaluation import html, statistics, tables
from opsd_jax.evaluation import results as results_lib


def page(
    name: str, summary: dict, results, benchmarks: dict, shown, compared=None, most: int = 30
) -> str:
    """HTML of one evaluation: scores, comparison, and up to `most` rows of each benchmark, spread evenly.

    shown: (benchmark, key) -> list of (caption, picture). compared: a `Compared`.
    """
    scores = summary["benchmarks"]
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, protocol `{summary['protocol']}`, seed {summary['seed']}. Intervals hold "
            "95 % (Wilson). Seconds leave out batches that compiled a program; “timed” says how many rows are left."
            + "".join(
                f" {task}: a random subset, {results_lib.counted(s)}, chosen with seed {s['rows']['seed']}."
                for task, s in scores.items()
                if "rows" in s
            )
        )
    ]
    parts.append(
        html.intervals(
            [
                (task, results_lib.percent(s), 100 * s["interval_95"][0], 100 * s["interval_95"][1])
                for task, s in scores.items()
            ]
        )
    )
    rows = []
    for task, s in scores.items():
        teacher, student = tables.PAPER.get(task, (None, None))
        rows.append(
            [
                task,
                results_lib.percent(s),
                results_lib.counted(s),
                s["mean_output_tokens"],
                s["seconds_per_sample"],
                s["timed_samples"],
                s.get("pictures_per_sample"),
                s.get("needs_judge"),
                len(s.get("bad_rows", ())),
                teacher,
                student,
            ]
        )
    parts.append(
        html.table(
            [
                "benchmark",
                "score %",
                "n",
                "tokens",
                "s/sample",
                "timed",
                "pictures",
                "no rule applied",
                "rows left out",
                "paper: ThinkMorph",
                "paper: Visual-OPSD",
            ],
            rows,
        )
    )
    for task, s in scores.items():
        if s["categories"] or s.get("extras"):
            parts += [
                html.heading(task, 3),
                html.table(
                    ["by", "value"],
                    [[k, v] for k, v in {**s["categories"], **s.get("extras", {})}.items()],
                ),
            ]
    if compared:
        lines = []
        for result in (r for r in results if r.name in compared.hits):
            hits, asked = compared.hits[result.name], benchmarks[result.name].asked
            both = [
                (bool(p["hit"]), hits[asked(p["index"])])
                for p in result.predictions
                if asked(p["index"]) in hits
            ]
            wins, losses = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
            lines.append(
                [
                    result.name,
                    len(both),
                    wins,
                    losses,
                    len(both) - wins - losses,
                    statistics.mcnemar(wins, losses),
                ]
            )
        parts += [
            html.heading(f"Against {compared.name}"),
            html.table(
                ["benchmark", "rows of both", "won", "lost", "alike", "p (McNemar, exact)"], lines
            ),
        ]
    for result in results:
        step = max(1, -(-len(result.predictions) // most))
        items = []
        for p in result.predictions[::step]:
            text = benchmarks[result.name].question(p["index"])[1]
            pictures = [
                html.picture(picture, caption=caption)
                for caption, picture in shown(benchmarks[result.name], p["index"])
            ]
            items.append(
                {
                    "title": f"{result.name} {p.get('pid', p['index'])}",
                    "hit": bool(p["hit"]),
                    "parts": [
                        html.row(*pictures),
                        html.paragraph(text),
                        html.paragraph(p["prediction"]),
                    ],
                    "note": f"expected {p['expected']}; {p['tokens']} tokens",
                }
            )
        parts += [
            html.heading(f"{result.name}: {len(items)} of {len(result.predictions)} rows"),
            html.samples(items),
        ]
    return html.page(f"Evaluation {name}", *parts)
