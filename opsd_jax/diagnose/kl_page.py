"""The page of the analysis `kl`."""

from collections.abc import Sequence

import numpy as np

from opsd_jax.diagnose import output
from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import charts, html, statistics
from opsd_jax.run import cautions as cautions_lib

SPANS = {  # parts of an "official" record that are measured again by themselves
    "answer": "The answer with its eos, by which the released script decides "
    "(`answer_span_avg_kl`):",
    "tail": "The shared end, the last positions whose tokens are the same in both texts:",
}
COMPLETION_TEXTS = {  # kind: (heading, what is compared; {without} is of the run's `Words`)
    "data": (
        "Closure on the examples' text traces (data)",
        "**This is the closure of the paper's Eq. 9 as `W/report.md` and the page of the run give "
        "it**, there on all examples of the run's final split. Both read the example's own text "
        "trace, which is the same before and after training.",
    ),
    "base": (
        "Closure on samples from before training (base)",
        "Both read what the model said {without} before training.",
    ),
    "student": (
        "Closure on samples of the trained student (student)",
        "Both read what the trained student says {without}. A change of format alone changes this "
        "one.",
    ),
    "official": (
        "What the released script computes (official)",
        "For comparison, and **not** Eq. 4: the two read different texts. After image and question "
        "the teacher reads thought, visual thought, thought and answer, the student the text-only "
        "thought and the answer: each the raw text of its column in a block of its own, with no "
        "tags added. Positions are matched from the end, so most of them compare different words. "
        "Image sizes are the run's own. The paper's 4.64 nats before and 1.93 after, a closure of "
        "58 %, compare with this one, if with any.",
    ),
}
_COLOURS = (
    "Samples: the colour of a token is its K. It is full from the number at the right of the scale "
    "on, the 95th percentile of all tokens of this kind: the largest 5 % look the same. Point at a "
    "token to see its own."
)
_MOST_SAMPLES = 4  # of each task
_NATS = 3  # decimal places


def parts(diagnosis: Diagnosis, summary: dict, found: dict[str, list[dict]]) -> list[str]:
    """The parts of a summary's page.

    Args:
      found: {kind of completion: its records, see `kl.divergences`}.
    """
    words = diagnosis.words
    shown = [
        html.paragraph(
            f"How much {words.verb('do', 'does')} {words.content} change what the model says, and "
            "how much of that did training put into the student? **K** is the difference: "
            f"KL(teacher with {words.content} ‖ student without) on the same completion, full "
            "vocabulary, nats per token, mean over the tokens of a completion, then over examples "
            "(the paper's Eq. 4). "
            "**Closure** = 1 − K after / K before is the share of it that training removed (Eq. "
            "9): at 100 % the student says what the teacher says; it is negative where the student "
            "moved away. The teacher has the weights of the start, before and after."
        ),
        html.note(
            f"Samples are drawn at temperature {summary['temperature']:g} (0: the most likely "
            f"token). Intervals hold 95 %: {summary['bootstrap']} resamples of the examples within "
            "their task, before and after together."
        ),
    ]
    for kind, s in summary["completions"].items():
        heading, text = COMPLETION_TEXTS[kind]
        shown += [
            html.heading(heading),
            html.paragraph(text.format(without=words.without)),
            _table(s),
        ]
        if kind == "data":  # what the closure is to be compared with
            of_run = cautions_lib.closures_of(diagnosis.session.workdir)
            shown += [html.paragraph(f"{line}.") for line in of_run]
        for span, text in SPANS.items():
            if s.get(span):
                shown += [html.paragraph(text), _table(s[span])]
        names = ["before", *(["after"] if "after" in s["macro"] else [])]
        series = {
            f"K {name}": _by_token([record[name] for record in found[kind]]) for name in names
        }
        shown += [
            html.note("K at each token, a mean over the completions that are so long:"),
            charts.lines(series, x="token of the completion", y="nats"),
            html.note(_COLOURS),
            _samples(diagnosis, found[kind], names),
        ]
    return shown


def in_words(summary: dict, of_run: Sequence[str]) -> list[str]:
    """The closures, one line per kind of completion and task.

    of_run: those in the table of the run, see `cautions_lib.closures_of`; after kind "data".
    """
    lines = []
    for kind, s in summary["completions"].items():
        for task, x in s["tasks"].items():
            values = f"K {html.fixed(x['before'], _NATS)}"
            if "after" in x:
                values += f" -> {html.fixed(x['after'], _NATS)} nats, {_closure_in_words(x)}"
            lines.append(f"{task}, {kind}: {values}")
        lines += of_run if kind == "data" else []
    return lines


def _closure_in_words(x: dict) -> str:
    if x["closure"] is None:
        return f"no closure (K before is below {statistics.LEAST_KL:g} nats)"
    return f"closure {html.fixed(100 * x['closure'], 1)} % ({_percent_interval(x)})"


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
    """Some examples of each task, with K at each token."""
    every = np.concatenate([record[name] for record in records for name in names])
    top = float(np.percentile(every, 95)) or None
    items = []
    for source, task in enumerate(diagnosis.tasks):
        for r in [r for r in records if r["task"] == task][:_MOST_SAMPLES]:
            shown = [
                html.paragraph(diagnosis.examples(source, r["index"]).example.question),
                html.row(*output.images(diagnosis, source, r["index"], "real")),
            ]
            for name in names:
                mean = html.fixed(float(np.mean(r[name])), _NATS)
                shown += [
                    html.note(f"K {name}: {mean} nats per token"),
                    html.tokens(
                        pieces(diagnosis, r["labels"]),
                        r[name],
                        unit="nats",
                        top=top,
                        digits=_NATS,
                    ),
                ]
            items.append(html.Sample(title=f"{task} {r['pid']}", parts=shown))
    return html.samples(items)


def _table(s: dict) -> str:
    """Means with their intervals, by task and, of several tasks, over all."""
    lines = dict(s["tasks"])
    if len(lines) > 1:
        lines |= {"mean of the tasks": s["macro"], "mean of the examples": s["samples"]}
    rows = [
        [
            name,
            x["n"],
            html.fixed(x["before"], _NATS),
            html.between(x["before_95"], _NATS),
            html.fixed(x.get("after"), _NATS),
            html.between(x.get("after_95"), _NATS),
            html.fixed(None if x.get("closure") is None else 100 * x["closure"], 1),
            _percent_interval(x),
        ]
        for name, x in lines.items()
    ]
    columns = ["task", "examples", "K before", "95 %", "K after", "95 %", "closure %", "95 %"]
    spread = {name: html.fixed(value, _NATS) for name, value in s["spread"].items()}
    return html.stack(
        html.table(columns, rows),
        html.note(
            f"K before, over the examples: median {spread['median']}, standard deviation "
            f"{spread['std']}, largest {spread['max']}."
        ),
    )


def _percent_interval(x: dict) -> str:
    """The interval of a closure, in per cent."""
    limits = x.get("closure_95")
    return html.between(limits and [100 * limit for limit in limits], 1)
