"""The report page of an evaluation: scores, the comparison with earlier results, samples."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from opsd_jax.evaluation import charts, comparison, html, statistics, tables
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation.benchmark import Benchmark, Key

_MOST_SAMPLES = 30  # of each benchmark
_Shown = Callable[[Benchmark, Key], Sequence[tuple[str, np.ndarray | Image.Image]]]


def page(
    name: str,
    summary: dict,
    results: Sequence[results_lib.Result],
    benchmarks: Mapping[str, Benchmark],
    shown: _Shown,
    compared: comparison.Compared | None = None,
) -> str:
    """HTML of one evaluation.

    Args:
      name: name of the evaluation, shown as the title.
      summary: content of summary.json.
      results: the answers to each benchmark, of which at most 30 are shown, spread evenly.
      benchmarks: {name: benchmark} of the results.
      shown: (benchmark, key) -> [(caption, image)], what the model saw of a question.
      compared: earlier results of the same questions.
    """
    parts = _scores(summary)
    if compared:
        parts += _comparison(results, benchmarks, compared)
    for result in results:
        parts += _samples(result, benchmarks[result.name], shown)
    return html.page(f"Evaluation {name}", *parts)


def _scores(summary: dict) -> list[str]:
    """The scores of all benchmarks, and those by category."""
    scores = summary["benchmarks"]
    subsets = "".join(
        f" {task}: a random subset, {results_lib.counted(s)}, chosen with seed {s['rows']['seed']}."
        for task, s in scores.items()
        if "rows" in s
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
    columns = [
        "benchmark",
        "score %",
        "n",
        "tokens",
        "s/sample",
        "timed",
        "generated images",
        "no rule applied",
        "questions left out",
        "paper: ThinkMorph",
        "paper: Visual-OPSD",
    ]
    parts = [
        html.paragraph(
            f"Checkpoint `{summary['checkpoint']}`, protocol `{summary['protocol']}`, "
            f"seed {summary['seed']}. Intervals hold 95 % (Wilson). Seconds leave out batches that "
            f"compiled a program; “timed” is the number of answers that are left.{subsets}"
        ),
        charts.intervals(
            [
                (task, results_lib.percent(s), *(100 * limit for limit in s["interval_95"]))
                for task, s in scores.items()
            ]
        ),
        html.table(columns, rows),
    ]
    for task, s in scores.items():
        if details := {**s["categories"], **s.get("extras", {})}:
            parts += [html.heading(task, 3), html.table(["by", "value"], list(details.items()))]
    return parts


def _comparison(
    results: Sequence[results_lib.Result],
    benchmarks: Mapping[str, Benchmark],
    compared: comparison.Compared,
) -> list[str]:
    """Paired comparison with earlier results, for the benchmarks and questions of both."""
    rows: list[list[html.Cell]] = []
    for result in results:
        if result.name not in compared.hits:
            continue
        hits, identify = compared.hits[result.name], benchmarks[result.name].identify
        both = [
            (bool(p["hit"]), hits[identify(p["index"])])
            for p in result.predictions
            if identify(p["index"]) in hits
        ]
        wins = sum(now and not before for now, before in both)
        losses = sum(before and not now for now, before in both)
        alike = len(both) - wins - losses
        p_value = statistics.mcnemar(wins, losses)
        rows.append([result.name, len(both), wins, losses, alike, p_value])
    columns = ["benchmark", "questions of both", "won", "lost", "alike", "p (McNemar, exact)"]
    return [html.heading(f"Against {compared.name}"), html.table(columns, rows)]


def _samples(result: results_lib.Result, benchmark: Benchmark, shown: _Shown) -> list[str]:
    """Up to 30 answers to a benchmark, spread evenly."""
    items = []
    for p in result.predictions[:: max(1, -(-len(result.predictions) // _MOST_SAMPLES))]:
        key = p["index"]
        images = [html.image(image, caption=caption) for caption, image in shown(benchmark, key)]
        items.append(
            html.Sample(
                title=f"{result.name} {p.get('pid', key)}",
                hit=bool(p["hit"]),
                parts=[
                    html.row(*images),
                    html.paragraph(benchmark.question(key)[1]),
                    html.paragraph(p["prediction"]),
                ],
                note=f"expected {p['expected']}; {p['tokens']} tokens",
            )
        )
    title = f"{result.name}: {len(items)} of {len(result.predictions)} answers"
    return [html.heading(title), html.samples(items)]
