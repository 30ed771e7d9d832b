"""The page of the analysis `kl`."""

from collections.abc import Sequence

import numpy as np

from opsd_jax.diagnose import output
from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import charts, html

SPANS = {  # parts of an "official" record that are measured again by themselves
    "answer": "The answer with its eos, by which the released script decides "
    "(`answer_span_avg_kl`):",
    "tail": "Shared tail, the last positions whose tokens are the same in both texts:",
}
COMPLETION_TEXTS = {
    "base": "What the model said without visual thoughts before training.",
    "student": "What the trained student says without visual thoughts.",
    "data": "The examples' own text traces.",
    "official": (
        "What the released script computes, for comparison: **not** Eq. 4. After image and "
        "question the teacher reads thought, visual thought, thought and answer, the student the "
        "text-only thought and the answer: each the raw text of its column in a block of its own, "
        "with no tags added. Positions are matched from the end, so most of them compare different "
        "words. Image sizes are the run's own."
    ),
}
_MOST_SAMPLES = 4  # of each task


def page(diagnosis: Diagnosis, summary: dict, found: dict[str, list[dict]]) -> output.Page:
    """The page of a summary.

    Args:
      found: {kind of completion: its records, see `kl.divergences`}.
    """
    parts = [
        html.paragraph(
            "K = KL(teacher with visual thoughts ‖ student without) on the same completion, full "
            "vocabulary, mean over the tokens of a completion, then over examples (paper Eq. 4). "
            f"**before**: the student is `{summary['base']}`, **after**: `{summary['student']}`; "
            f"the teacher is `{summary['teacher']}` both times. Closed = 1 − after / before (Eq. "
            "9)."
        ),
        html.note(
            f"Split {output.examples_text(summary)}; sampled completions at temperature "
            f"{summary['temperature']:g} (0: the most likely token). Intervals hold 95 %: "
            f"{summary['bootstrap']} resamples of the examples within their task, before and after "
            f"together, seed {summary['seed']}. Paper, on its own examples: 4.64 before, 1.93 "
            "after, 58 % closed."
        ),
    ]
    for kind, s in summary["completions"].items():
        parts += [
            html.heading(f"Completions: {kind}"),
            html.paragraph(COMPLETION_TEXTS[kind]),
            _table(s),
        ]
        for span, text in SPANS.items():
            if s.get(span):
                parts += [html.paragraph(text), _table(s[span])]
        names = ["before", *(["after"] if "after" in s["macro"] else [])]
        series = {name: _by_token([record[name] for record in found[kind]]) for name in names}
        parts += [
            charts.lines(series, x="token of the completion", y="nats"),
            _samples(diagnosis, found[kind], names),
        ]
    return "Divergence that visual thoughts make", parts


def pieces(diagnosis: Diagnosis, ids: Sequence[int]) -> list[str]:
    """The text of each token."""
    return [diagnosis.tokenizer.decode([i]) for i in ids]


def _by_token(values: list[list[float]]) -> list[tuple[float, float]]:
    """(number of the token, from 1; mean over the completions that have it)."""
    longest = max(map(len, values))
    return [
        (n + 1, float(np.mean([of_one[n] for of_one in values if len(of_one) > n])))
        for n in range(longest)
    ]


def _samples(diagnosis: Diagnosis, records: list[dict], names: list[str]) -> str:
    """Some examples of each task, with the divergence at each token."""
    every = np.concatenate([record[name] for record in records for name in names])
    top = float(np.percentile(every, 95)) or None
    items = []
    for source, task in enumerate(diagnosis.tasks):
        for r in [r for r in records if r["task"] == task][:_MOST_SAMPLES]:
            parts = [
                html.paragraph(diagnosis.examples(source, r["index"]).example.question),
                output.images(diagnosis, source, r["index"]),
            ]
            for name in names:
                parts += [
                    html.note(f"{name}: {np.mean(r[name]):.4g} nats per token"),
                    html.tokens(pieces(diagnosis, r["labels"]), r[name], unit="nats", top=top),
                ]
            items.append(html.Sample(title=f"{task} {r['pid']}", parts=parts))
    return html.samples(items)


def _table(s: dict) -> str:
    """Means with their intervals, by task and over all."""
    lines = {**s["tasks"], "mean of the tasks": s["macro"], "mean of the examples": s["samples"]}
    rows = []
    for name, x in lines.items():
        closed = x.get("closure")
        rows.append(
            [
                name,
                x["n"],
                x["before"],
                _interval(x["before_95"]),
                x.get("after"),
                _interval(x.get("after_95")),
                None if closed is None else 100 * closed,
                _interval(x.get("closure_95"), 100),
            ]
        )
    spread = s["spread"]
    return html.stack(
        html.table(
            ["task", "examples", "before", "95 %", "after", "95 %", "closed %", "95 %"], rows
        ),
        html.note(
            f"Examples before training: median {spread['median']:.4g}, standard deviation "
            f"{spread['std']:.4g}, largest {spread['max']:.4g}."
        ),
    )


def _interval(limits: Sequence[float] | None, scale: float = 1) -> str:
    """ "0.1 to 0.2"; a dash for None."""
    if limits is None:
        return "–"
    return f"{scale * limits[0]:.4g} to {scale * limits[1]:.4g}"
