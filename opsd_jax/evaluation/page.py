"""The report page of an evaluation: scores, the comparison with earlier results, samples."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from opsd_jax.evaluation import charts, html, shown_answers, tables
from opsd_jax.evaluation import results as results_lib
from opsd_jax.evaluation.benchmark import Benchmark, Key
from opsd_jax.evaluation.wording import OF_VISUAL_THOUGHTS, Words
from opsd_jax.runtime import provenance

_MOST_MISSES, _MOST_HITS = 100, 20  # that are shown of each benchmark
_Shown = Callable[[Benchmark, Key], Sequence[tuple[str, np.ndarray | Image.Image]]]


def page(
    name: str,
    summary: dict,
    results: Sequence[results_lib.Result],
    benchmarks: Mapping[str, Benchmark],
    shown: _Shown,
    cautions: Sequence[str] = (),
    words: Words = OF_VISUAL_THOUGHTS,
) -> str:
    """HTML of one evaluation.

    Args:
      name: name of the evaluation, in the title.
      summary: content of summary.json.
      results: the answers to each benchmark. Up to 100 misses and 20 hits of each are shown.
      benchmarks: {name: benchmark} of the results.
      shown: (benchmark, key) -> [(caption, image)], what the model saw of a question.
      cautions: HTML of the cautions of the run whose weights answered; () of other weights.
      words: of the run that was asked.
    """
    mode = words.modes[summary["mode"]]
    parts = [_facts(summary, mode), *cautions, html.heading("Scores"), *_scores(summary)]
    if "against" in summary:
        parts += _comparison(summary["against"])
    for result in results:
        parts += _samples(result, benchmarks[result.name], shown)
    return html.page(f"Evaluation {name}: {mode}", *parts)


def _facts(summary: dict, mode: str) -> str:
    """Which model was asked what, and what made the page. mode: in words."""
    scores = summary["benchmarks"]
    decoding = "greedy"
    if "samples" in summary:
        decoding = f"{summary['samples']} answers sampled at temperature {summary['temperature']:g}"
    asked = f"as in training: the run's own prompts and image sizes, {decoding}"
    if summary["asked_by"] != "run":
        asked = f"by the protocol `{summary['asked_by']}`"
    if summary["ban_marker"]:
        asked += "; `<image_start>` is never sampled"
    examples = "\n".join(
        f"{task}: "
        + (
            f"a random subset, {results_lib.counted(s)}, chosen with seed {s['rows']['seed']}"
            if "rows" in s
            else f"all {s['n']}"
        )
        for task, s in scores.items()
    )
    return html.facts(
        [
            ("the model answers", f"{mode} ({_mode(summary['mode'])})"),
            ("asked", asked),
            ("weights", f"`{summary['checkpoint']}`"),
            ("examples", examples),
            *([("split", f"`{summary['split']}`")] if summary["split"] else []),
            ("seed", str(summary["seed"])),
            *provenance.facts(summary["command"]),
        ]
    )


def _mode(mode: str) -> str:
    """The name of a mode; with what tells the two meanings of "none" apart."""
    others = {
        "none": ", the student's context; not what the teacher of the arm none sees",
        "remove": ", which the teacher of the arm none sees",
    }
    return f"mode `{mode}`{others.get(mode, '')}"


def _scores(summary: dict) -> list[str]:
    """The scores of all benchmarks, and those by category."""
    scores = summary["benchmarks"]
    columns: dict[str, tuple[str, Callable[[str, dict], html.Cell]]] = {
        "benchmark": ("", lambda task, s: task),
        "score %": (
            "of the first answer" if "samples" in summary else "",
            lambda task, s: html.fixed(results_lib.percent(s), 1),
        ),
        **_pass_at_k(scores),
        "examples": ("", lambda task, s: results_lib.counted(s)),
        "tokens": ("mean length of an answer", lambda task, s: _one(s["mean_output_tokens"])),
        "s/example": (
            "seconds, without batches that compiled a program",
            lambda task, s: html.fixed(s["seconds_per_sample"], 4),
        ),
        "timed": ("examples that the seconds cover", lambda task, s: s["timed_samples"]),
        "generated images": ("per example", lambda task, s: _one(s.get("pictures_per_sample"))),
        "no rule applied": (
            "answers that no rule could read: misses",
            lambda task, s: s.get("needs_judge"),
        ),
        "left out": (
            "questions that could not be asked",
            lambda task, s: len(s["bad_rows"]) if "bad_rows" in s else None,
        ),
        "ThinkMorph %": ("in the paper", lambda task, s: _paper(task)[0]),
        "Visual-OPSD %": ("in the paper", lambda task, s: _paper(task)[1]),
    }
    rows = [[cell(task, s) for _, cell in columns.values()] for task, s in scores.items()]
    meanings = [
        f"**{head}**: {meaning}"
        for n, (head, (meaning, _)) in enumerate(columns.items())
        if meaning and any(row[n] is not None for row in rows)
    ]
    parts = [
        charts.intervals(
            [
                (task, results_lib.percent(s), *(100 * limit for limit in s["interval_95"]))
                for task, s in scores.items()
            ]
        ),
        html.table(list(columns), rows),
        html.note("; ".join(meanings) + "."),
    ]
    for task, s in scores.items():
        if details := {**s["categories"], **s.get("extras", {})}:
            parts += [html.heading(task, 3), html.table(["by", "value"], list(details.items()))]
    return parts


def _pass_at_k(
    scores: Mapping[str, dict],
) -> dict[str, tuple[str, Callable[[str, dict], html.Cell]]]:
    """The columns of several sampled answers, {head: (meaning, cell)}; {} where there are none."""

    def column(k: str):
        return lambda task, s: html.fixed(100 * s["pass_at_k"][k], 1) if "pass_at_k" in s else None

    ks = {k: None for s in scores.values() for k in s.get("pass_at_k", ())}
    texts = {k: f"probability that one of {k} answers is right" for k in ks if k != "1"}
    return {f"pass@{k} %": (texts.get(k, "share of right answers"), column(k)) for k in ks}


def _one(value: float | None) -> str | None:
    return None if value is None else html.fixed(value, 1)


def _paper(task: str) -> tuple[str | None, str | None]:
    """What the paper reports of a benchmark in per cent: ThinkMorph, Visual-OPSD."""
    teacher, student = tables.PAPER.get(task, (None, None))
    return (f"{teacher:.2f}", f"{student:.2f}") if teacher else (None, None)


def _comparison(against: dict) -> list[str]:
    """Paired comparison with earlier results."""
    rows = [
        [
            task,
            x["n"],
            *(html.fixed(100 * x[side], 1) for side in ("here", "there")),
            x["only_here"],
            x["only_there"],
            html.p_value(x["p"]),
        ]
        for task, x in against["benchmarks"].items()
    ]
    columns = ["benchmark", "examples of both", "here %", "there %"]
    columns += ["right only here", "right only there", "p"]
    return [
        html.heading(f"Against {against['name']}"),
        html.table(columns, rows),
        html.note(
            f"**here**: this evaluation; **there**: {against['name']}, on the same examples; "
            "**p**: McNemar's exact test."
        ),
    ]


def _samples(result: results_lib.Result, benchmark: Benchmark, shown: _Shown) -> list[str]:
    """The misses, then some hits."""
    misses, hits = (
        [p for p in result.predictions if bool(p["hit"]) == right] for right in (False, True)
    )
    chosen = [
        p
        for some, most in ((misses, _MOST_MISSES), (hits, _MOST_HITS))
        for p in shown_answers.spread(some, most, lambda _: result.name)
    ]
    return [
        html.heading(f"Answers to {result.name}"),
        html.paragraph(benchmark.rule),
        html.note(
            f"Shown: {_portion('misses', len(misses), _MOST_MISSES)}, then "
            f"{_portion('hits', len(hits), _MOST_HITS)}. All {len(result.predictions)} answers are "
            "in predictions.jsonl."
        ),
        html.samples([_sample(p, benchmark, shown) for p in chosen]),
    ]


def _portion(kind: str, count: int, most: int) -> str:
    if count <= most:
        return f"all {count} {kind}" if count else f"no {kind}"
    return f"{most} of {count} {kind}, evenly spaced"


def _sample(p: dict, benchmark: Benchmark, shown: _Shown) -> html.Sample:
    """An answer with the images that the model saw."""
    key = p["index"]
    size = 320 if benchmark.table else 160
    images = [html.image(image, size=size, caption=text) for text, image in shown(benchmark, key)]
    texts = html.stack(
        html.paragraph(benchmark.text(key)),
        html.paragraph(p["prediction"]),
        html.note(shown_answers.note(p)),
    )
    title = shown_answers.title(p)
    return html.Sample(title=title, hit=bool(p["hit"]), parts=[html.row(*images, texts)])
