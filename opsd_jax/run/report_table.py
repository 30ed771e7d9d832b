"""The table of a run and its control arms, W/report.md and W/report.json."""

import collections
import json
import os
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import results
from opsd_jax.inputs import checks
from opsd_jax.run import screening
from opsd_jax.runtime import files, run_folder

Scores = dict[str, dict]
"""{task: scores}"""

# Whose answers a row of the table holds.
TEACHER = "teacher: start, with true visual thoughts"
START = "start, text only"
START_BANNED = "start, text only, `<image_start>` banned"
TRAINED = "OPSD, text only"
BASELINE = "always the most frequent answer"

# Final evaluations of a run's start, and the names of their results.
_STARTS = {TEACHER: "real", START: "none", START_BANNED: "none-banned"}
_HEADER = (
    "arm",
    "task",
    "accuracy",
    "95 % interval",
    "with true visual thoughts",
    "n",
    "tokens",
    "KL to teacher",
    "closure",
)
_SAME = 0.9  # share of the questions from which on one answer to all of them is worth a caution
FEW = 200  # a stage of fewer steps, or a test split of fewer examples, says little
_SHOWN = ("overall", "interval_95", "n", "mean_output_tokens", "seconds_per_sample")


def arm_label(name: str) -> str:
    """Label of the row of a control arm."""
    return f"arm {name}, text only"


def collect(workdir: str, arms: Sequence[str]) -> dict[str, Scores]:
    """{whose answers: their scores} of a run's start, of the trained run and of its control arms.

    And of the answer that is expected most often, given to every question: it is right where the
    expected answer equals it (where a task accepts several answers, it may be right more often).

    Raises:
      FileNotFoundError: an evaluation is missing. ValueError: its summary is damaged.
    """
    start = config_lib.start_of(load_config(workdir), "opsd")
    shown = {
        what: _scores(workdir, start, name)
        for what, name in _STARTS.items()
        if os.path.exists(_summary_path(workdir, start, name))
    }
    shown[TRAINED] = _trained_scores(workdir)
    for arm in arms:
        shown[arm_label(arm)] = _trained_scores(run_folder.arm(workdir, arm))
    last = max(config_lib.stage_ends(load_config(workdir)).values())
    shown[BASELINE] = {}
    for task, predictions in _predictions(workdir, last, "none").items():
        answer, share = _most_frequent([p["expected"] for p in predictions])
        shown[BASELINE][task] = {"overall": share, "n": len(predictions), "answer": answer}
    return shown


def write(workdir: str, shown: Mapping[str, Scores], arms: Sequence[str]) -> str:
    """Writes W/report.md and W/report.json, and returns the text of the former, Markdown.

    An accuracy without visual thoughts is shown with that of the same weights given the true ones,
    if the final evaluation measured it: training changes how well a model reads them.

    Args:
      shown: what `collect` returned for these arms.
    """
    lines = [_line(_HEADER), "|---" * len(_HEADER) + "|"]
    lines += [_row(what, task, b) for what, tasks in shown.items() for task, b in tasks.items()]
    sentences = [*verdict(shown, arms, load_config(workdir)), *screening.lines(workdir, arms)]
    text = "\n".join([*lines, "", *(f"- {line}" for line in sentences)]) + "\n"
    files.write(run_folder.report(workdir), text)
    files.write_json(
        run_folder.report_data(workdir),
        [{"arm": what, "tasks": tasks} for what, tasks in shown.items()],
    )
    return text


def in_terminal(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> str:
    """The main columns of the table, aligned, and the verdict, as plain text."""
    rows: list[tuple[str, ...]] = [("answers of", "task", "accuracy", "95 % interval", "closure")]
    for what, tasks in shown.items():
        for task, b in tasks.items():
            interval = _interval(b) if "interval_95" in b else ""
            closure = f"{100 * b['closure']:.0f} %" if "kl" in b else ""
            rows.append((what.replace("`", ""), task, _percent(b), interval, closure))
    words = "\n".join(verdict(shown, arms, config)).replace("`", "").replace("**", "")
    return f"{checks.table(rows)}\n\n{words}"


def verdict(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> list[str]:
    """What the numbers say, as Markdown, one line per statement.

    The lines of a task begin with cautions where its numbers mean little: a short stage, few
    examples, a teacher no better than the most frequent answer. Answers that hardly differ between
    questions are named at the end.
    """
    lines = []
    for task, trained in shown[TRAINED].items():
        if min(config.opsd.steps, trained["n"]) < FEW:
            lines.append(
                "**These numbers mean little: a run this short shows that everything works "
                f"({config.opsd.steps} OPSD steps, {trained['n']} test examples).**"
            )
        always, teacher = shown.get(BASELINE, {}).get(task), shown.get(TEACHER, {}).get(task)
        if always and teacher and teacher["interval_95"][0] <= always["overall"]:
            lines.append(
                "**The teacher is not clearly better than the most frequent answer: it has little "
                "to teach. Train the warm-up longer, or look at its answers.**"
            )
        lines.append(_gain(shown, task, config))
        if arms:
            lines.append(_controls(shown, task, arms, config))
        if "none" in arms:
            lines.append(
                "The teacher of the arm none sees its texts without any image, which is the "
                "evaluation mode `remove`."
            )
        if always:
            lines.append(
                f"The most frequent answer, `{always['answer']}`, given to every question would "
                f"be right in {_percent(always)}."
            )
        if without := _given_most(shown, task, nothing=True):
            lines.append(
                f"No answer was found in nearly all texts of: {'; '.join(without)}. An answer "
                "stands between <answer> and </answer>."
            )
        if same := _given_most(shown, task, nothing=False):
            lines.append(
                f"The same answer to nearly all questions: {'; '.join(same)}. Such an accuracy "
                "shows how often that answer is right, not what was learned; a closure beside it "
                "says little."
            )
    return lines


def _gain(shown: Mapping[str, Scores], task: str, config: ConfigDict) -> str:
    """What the student gained on a task."""
    trained = shown[TRAINED][task]
    parts = [f"**{task}**, {trained['n']} test examples, seed {config.seed}."]
    if with_thoughts := shown.get(TEACHER, {}).get(task):
        share = _percent(with_thoughts)
        parts.append(f"The teacher answers {share} with true visual thoughts.")
    if before := shown.get(START, {}).get(task):
        parts.append(
            f"Without them it answers {_percent(before)} before OPSD and {_percent(trained)} after."
        )
    else:
        parts.append(f"After OPSD it answers {_percent(trained)} without visual thoughts.")
    return " ".join(parts)


def _controls(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> str:
    """The accuracies of the control arms, and the distance to the best one."""
    of = {arm: shown[arm_label(arm)][task] for arm in arms}
    text = f"Control arms: {', '.join(f'{arm} {_percent(b)}' for arm, b in of.items())}."
    # arms with another objective are not controls of what the teacher sees
    others = {arm: b["overall"] for arm, b in of.items() if "stages" not in config.arms[arm]}
    if others:
        best = max(others, key=others.__getitem__)
        lift = 100 * (shown[TRAINED][task]["overall"] - others[best])
        text += (
            f" OPSD is {abs(lift):.1f} points {'above' if lift >= 0 else 'below'} the best control "
            f"({best})."
        )
    return text


def _given_most(shown: Mapping[str, Scores], task: str, *, nothing: bool) -> list[str]:
    """Whose answers to a task hardly depend on the question, and what they are.

    nothing: those in whose texts no answer was found, or else the others.
    """
    same = []
    for who, tasks in shown.items():
        found = tasks.get(task, {}).get("most_given")
        if found and found["share"] >= _SAME and (found["answer"] is None) == nothing:
            what = "" if nothing else f"`{found['answer']}` to "
            same.append(f"{who}, {what}{100 * found['share']:.0f} % of them")
    return same


def _trained_scores(workdir: str) -> Scores:
    """The final scores of a run, or of a control arm.

    If it was measured, with the KL to the teacher before and after the stage, and the part of it
    that training removed (the closure).
    """
    last = max(config_lib.stage_ends(load_config(workdir)).values())
    scores = _scores(workdir, last, "none")
    path = _summary_path(workdir, last, "kl")
    if os.path.exists(path):
        for task, kl in results.read_summary(path)["tasks"].items():
            scores[task] |= {
                "kl": kl["after"],
                "kl_before": kl["before"],
                "closure": kl["closure"],
            }
    return scores


def _summary_path(workdir: str, step: int, name: str) -> str:
    """The scores of an evaluation of the run's checkpoint of a step."""
    return os.path.join(
        run_folder.evaluation(workdir, run_folder.evaluation_name(step, name)), run_folder.SUMMARY
    )


def _scores(workdir: str, step: int, name: str) -> Scores:
    """Scores of a final evaluation.

    Those without visual thoughts also have `real`: how the same weights answer with the true ones.
    """
    found = _read(workdir, step, name)
    if name == "none" and os.path.exists(_summary_path(workdir, step, "real")):
        for task, b in _read(workdir, step, "real").items():
            found[task]["real"] = {key: b[key] for key in ("overall", "interval_95")}
    return found


def _read(workdir: str, step: int, name: str) -> Scores:
    summary = results.read_summary(_summary_path(workdir, step, name))
    found = {task: {key: b[key] for key in _SHOWN} for task, b in summary["benchmarks"].items()}
    for task, predictions in _predictions(workdir, step, name).items():
        answer, share = _most_frequent([p["answer"] for p in predictions])
        found[task]["most_given"] = {"answer": answer, "share": share}
    return found


def _predictions(workdir: str, step: int, name: str) -> dict[str, list[dict]]:
    """{task: predictions} of a final evaluation."""
    folder, found = os.path.dirname(_summary_path(workdir, step, name)), {}
    with open(os.path.join(folder, run_folder.PREDICTIONS), encoding="utf-8") as lines:
        for prediction in map(json.loads, lines):
            found.setdefault(prediction["benchmark"], []).append(prediction)
    return found


def _most_frequent(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """(the most frequent of some answers, its share)."""
    ((answer, count),) = collections.Counter(answers).most_common(1)
    return answer, count / len(answers)


def _row(what: str, task: str, b: dict) -> str:
    """The line of a task. what: the weights that answered."""
    real = b.get("real")
    return _line(
        (
            what,
            task,
            _percent(b),
            _interval(b) if "interval_95" in b else "",
            f"{100 * real['overall']:.1f} % ({_interval(real)})" if real else "",
            f"{b['n']}",
            f"{b['mean_output_tokens']:.1f}" if "mean_output_tokens" in b else "",
            f"{b['kl_before']:.3f} -> {b['kl']:.3f}" if "kl" in b else "",
            f"{100 * b['closure']:.0f} %" if "kl" in b else "",
        )
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(b: dict) -> str:
    low, high = b["interval_95"]
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _percent(b: dict) -> str:
    return f"{100 * b['overall']:.1f} %"
