"""Answers to the same examples with something else in place of the visual thoughts, in pairs."""

from collections.abc import Sequence

from opsd_jax.diagnose import attention, output
from opsd_jax.diagnose.selection import Answers, Diagnosis
from opsd_jax.evaluation import html, statistics
from opsd_jax.evaluation.wording import Words

MODES = ("none", "real", "noise", "swap", "remove")
_MOST_SAMPLES = 12  # of each task


def measure(diagnosis: Diagnosis, checkpoint: str, answers: dict[str, Answers]) -> output.Analysis:
    """Measures the analysis `interventions` of a step folder.

    Args:
      answers: those of the step folder in the modes of `MODES`, and maybe more.
    """
    params = diagnosis.session.restore_params(checkpoint)
    found = {mode: answers[mode].predictions for mode in MODES}
    shares_of = {}
    for mode in MODES:
        layout = "student" if mode == "none" else "teacher"
        shares = attention.shares_by_example(diagnosis, params, layout, mode, found[mode])
        mean = attention.mean_over_examples(shares).mean(axis=0)
        shares_of[mode] = attention.named(mean)["completion"]
    summary = {
        "analysis": "interventions",
        "checkpoint": checkpoint,
        **diagnosis.facts(),
        "evaluations": {mode: answers[mode].name for mode in MODES},
        "tasks": summarise(found, diagnosis.tasks),
        "attention_of_the_answers": shares_of,
    }
    return output.Analysis(
        title=f"Interventions: does the model use its {diagnosis.words.content}?",
        summary=summary,
        parts=lambda: _parts(diagnosis, summary, found),
        words=in_words(summary, diagnosis.words),
    )


def summarise(found: dict, tasks: Sequence[str]) -> dict:
    """Accuracies and paired tests.

    Args:
      found: {mode: {task: predictions}}.

    Returns:
      {task, or "all": {mode: accuracy, interval_95, n, and what `compare` finds}}. "real" is
      compared with "none", every other mode with both.
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
            references = {"none": (), "real": ("none",)}.get(mode, ("real", "none"))
            summary[task][mode] = {
                "accuracy": sum(own) / len(own),
                "interval_95": list(statistics.wilson(sum(own), len(own))),
                "n": len(own),
                **{f"against_{other}": compare(own, hits[other]) for other in references},
            }
    return summary


def compare(hits: Sequence[bool], reference: Sequence[bool]) -> dict:
    """Two lists of hits of the same examples: discordant counts and McNemar's exact p-value."""
    gained = sum(a and not b for a, b in zip(hits, reference, strict=True))
    lost = sum(b and not a for a, b in zip(hits, reference, strict=True))
    return {"only_this": gained, "only_reference": lost, "p": statistics.mcnemar(gained, lost)}


def in_words(summary: dict, words: Words) -> list[str]:
    """The accuracies with their 95 % intervals, one line per task. words: of the run."""
    lines = []
    for task, modes in _shown_tasks(summary).items():
        count = next(iter(modes.values()))["n"]
        shown = [
            f"{mode} {_percent(s['accuracy'])} ({' to '.join(map(_percent, s['interval_95']))})"
            for mode, s in modes.items()
        ]
        lines.append(
            f"{task}, correct of {count} examples with {words.verb('these', 'this')} "
            f"{words.content}, %: {', '.join(shown)}"
        )
    return lines


def _shown_tasks(summary: dict) -> dict[str, dict]:
    """{task: what was found}, and of several tasks also of all examples."""
    *tasks, (_, together) = summary["tasks"].items()
    return dict(tasks) | ({"all tasks": together} if len(tasks) > 1 else {})


def _parts(diagnosis: Diagnosis, summary: dict, found: dict) -> list[str]:
    """The parts of the page of a summary and its answers."""
    words = diagnosis.words
    parts = [
        html.paragraph(
            f"Does the model use what its {words.content} {words.verb('show', 'shows')}? It "
            "answers the same examples again with something else in "
            f"{words.verb('their places', 'its place')}. A fall from **real** to **noise** or "
            f"**swap** says that it reads {words.them}; no fall from **real** to **none** says "
            f"that it does not need {words.them}."
        ),
        html.note(
            "; ".join(f"**{mode}**: {words.modes[mode]}" for mode in MODES)
            + ". Greedy answers, those of the evaluations that are linked. p: McNemar's exact test "
            "on the examples that only one of the two answers right. Paper, ThinkMorph on nine "
            "benchmarks: noise −1.5 points, text only −1.0."
        ),
    ]
    for task, modes in _shown_tasks(summary).items():
        parts += [html.heading(task), _comparisons(modes, summary["evaluations"])]
    shares = summary["attention_of_the_answers"]
    parts += [
        html.heading("Where the answers look"),
        html.note(
            "Share of attention in per cent that each mode's own answers pay to a part of the "
            "context, mean over heads, layers and tokens."
        ),
        html.heat(
            list(shares),
            list(attention.KEYS),
            [[100 * shares[m][k] for k in attention.KEYS] for m in shares],
        ),
    ]
    for source, task in enumerate(diagnosis.tasks):
        parts += _samples(diagnosis, source, {mode: of[task] for mode, of in found.items()})
    return parts


def _comparisons(modes: dict, evaluations: dict[str, str]) -> str:
    """How the modes differ, one pair per row, with links to their evaluations."""
    linked = {mode: output.evaluation_link(name, mode) for mode, name in evaluations.items()}
    rows = []
    for mode, s in modes.items():
        for other in ("real", "none"):
            if c := s.get(f"against_{other}"):
                first, second = s["accuracy"], modes[other]["accuracy"]
                rows.append(
                    [
                        html.Part(f"{linked[mode]} against {linked[other]}"),
                        s["n"],
                        _percent(first),
                        _percent(second),
                        _percent(first - second),
                        c["only_this"],
                        c["only_reference"],
                        html.p_value(c["p"]),
                    ]
                )
    columns = ["compared", "examples", "first %", "second %", "difference, points"]
    return html.table([*columns, "only the first right", "only the second right", "p"], rows)


def _samples(diagnosis: Diagnosis, source: int, found: dict[str, list[dict]]) -> list[str]:
    """Some examples of a task with what each mode showed and the answers to it."""
    items = []
    for k, p in enumerate(found["real"][:_MOST_SAMPLES]):
        rows, example = [], diagnosis.examples(source, p["index"])
        for mode, of in found.items():
            images = output.images(diagnosis, source, p["index"], mode, 96)
            images = images[len(example.problems) :]
            verdict = "right" if of[k]["hit"] else "wrong"
            cell = html.Part(html.row(*images)) if images else None
            rows.append([mode, cell, verdict, of[k]["prediction"]])
        problems = output.images(diagnosis, source, p["index"], "none")[: len(example.problems)]
        columns = [diagnosis.words.content, "shown", "answer is", "answer"]
        items.append(
            html.Sample(
                title=p["pid"],
                hit=bool(p["hit"]),
                parts=[
                    *problems,
                    html.paragraph(example.example.question),
                    html.table(columns, rows, texts=len(columns)),
                ],
                note=f"expected {p['expected']}; hit or miss is that of `real`",
            )
        )
    return [html.heading(f"Samples of {diagnosis.tasks[source]}"), html.samples(items)]


def _percent(share: float) -> str:
    return html.fixed(100 * share, 1)
