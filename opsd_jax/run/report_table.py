"""The table of a run and its control arms, W/report.md and W/report.json."""

import collections
import math
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

OF_THE_RUN = "Cautions of the run, from its own results (W/report.md):"  # on other pages

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
_SHOWN = ("overall", "interval_95", "n", "mean_output_tokens", "seconds_per_sample")
_RATES = ("image_skip_rate", "eos_rate")

# From where on a number is worth a caution.
FEW = 200  # steps of a stage, or test examples: with fewer, 95 % intervals reach 7 points each way
_MOST = 0.9  # share of the questions: what is left can hardly change an accuracy
_FEW_ANSWERS = 0.5  # of as many different answers as the right ones are: half of them never come
_CUT = 0.1  # of the answers: as many may be wrong for that reason alone
_NEAR = 0.1  # between two closures: their own intervals are up to so wide (docs/results.md)


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
    sentences = [
        *verdict(shown, arms, load_config(workdir)),
        *screening.lines(workdir, arms),
        *other_arms(workdir, arms),
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in sentences)]) + "\n"
    files.write(run_folder.report(workdir), text)
    files.write_json(
        run_folder.report_data(workdir),
        [{"arm": what, "tasks": tasks} for what, tasks in shown.items()],
    )
    return text


def other_arms(workdir: str, arms: Sequence[str]) -> list[str]:
    """A line about finished arms of a run that its table does not have, if there are any."""
    folder = os.path.dirname(run_folder.arm(workdir, "_"))
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    done = [
        name
        for name in names
        if name not in arms and os.path.exists(_last_summary(run_folder.arm(workdir, name)))
    ]
    if not done:
        return []
    every = ", ".join(f"'{name}'" for name in sorted({*arms, *done}))
    return [
        f"Not shown: the finished arms {', '.join(done)}, which config.run_arms does not name; "
        f'--config.run_arms="({every},)" shows all.'
    ]


def in_terminal(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> str:
    """The main columns of the table, aligned, and the verdict, as plain text."""
    rows: list[tuple[str, ...]] = [("answers of", "task", "accuracy", "95 % interval", "closure")]
    for what, tasks in shown.items():
        for task, b in tasks.items():
            interval = _interval(b) if "interval_95" in b else ""
            closure = f"{100 * b['closure']:.0f} %" if "kl" in b else ""
            rows.append((what.replace("`", ""), task, _percent(b), interval, closure))
    warned = [f"caution: {plain(line)}" for line in cautions(shown, arms, config)]
    said = map(plain, statements(shown, arms, config))
    return "\n".join([checks.table(rows), "", *warned, *said])


def plain(line: str) -> str:
    """A line of Markdown without its marks, for the terminal."""
    return line.replace("`", "").replace("**", "")


def verdict(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> list[str]:
    """What the numbers say, as Markdown, one line per statement; first the cautions, in bold."""
    bold = [f"**{line}**" for line in cautions(shown, arms, config)]
    return bold + statements(shown, arms, config)


def statements(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> list[str]:
    """What was learned, as Markdown, task by task: the verdict without its cautions."""
    lines = []
    for task in shown[TRAINED]:
        lines.append(_gain(shown, task, config))
        if arms:
            lines.append(_controls(shown, task, arms, config))
        if always := shown.get(BASELINE, {}).get(task):
            lines.append(
                f"The most frequent answer, `{always['answer']}`, given to every question would "
                f"be right in {_percent(always)}."
            )
    if "none" in arms:
        lines.append(
            "The teacher of the arm none sees its texts without any image, which is the "
            "evaluation mode `remove`."
        )
    return lines


def cautions(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> list[str]:
    """Why the numbers mean less than they seem to, a line each; [] where nothing speaks for it.

    What holds for the whole run comes first, once. Where a run has several tasks, every other line
    begins with the name of its task.
    """
    trained = shown[TRAINED]
    lines: list[str] = []
    few = [task for task, b in trained.items() if min(config.opsd.steps, b["n"]) < FEW]
    if len(few) == len(trained):
        lines.append(_too_short(config, sorted({b["n"] for b in trained.values()})))
    for task, b in trained.items():
        found = [
            *([_too_short(config, [b["n"]])] if task in few and len(few) < len(trained) else []),
            *_teacher_knows_little(shown, task),
            *_reads_worse(shown, task),
            *_like_a_control(shown, task, arms, config),
            *_closure_without_content(shown, task, arms, config),
            *_start_asks(shown, task, config),
            *_hardly_differing(shown, task),
            *_cut_off(shown, task, config),
        ]
        lines += [f"{task}: {line}" for line in found] if len(trained) > 1 else found
    return lines


def cautions_of(workdir: str) -> list[str]:
    """The cautions of a run with the arms in its run_arms that are done, for other pages.

    [] while its results are not complete, or where it has no OPSD stage.
    """
    shown, arms = _finished(workdir)
    return cautions(shown, arms, load_config(workdir)) if shown else []


def closures_of(workdir: str) -> list[str]:
    """A line for each task with the closures of a run and of its arms that are done.

    [] where none was measured for an arm: there is nothing to compare.
    """
    shown, arms = _finished(workdir)
    lines = []
    for task in shown.get(TRAINED, {}):
        rows = {"OPSD": TRAINED} | {f"arm {arm}": arm_label(arm) for arm in arms}
        found = {name: shown[row][task].get("closure") for name, row in rows.items()}
        measured = [f"{name} {100 * x:.0f} %" for name, x in found.items() if x is not None]
        if len(measured) > 1:
            lines.append(f"{task}, closures in the run's table: {', '.join(measured)}")
    return lines


def _finished(workdir: str) -> tuple[dict[str, Scores], list[str]]:
    """(what `collect` returns, the arms in it) of a run; ({}, []) while results are missing."""
    config = load_config(workdir)
    if "opsd" not in config.stages or not config.eval.final_split:
        return {}, []
    folders = {arm: run_folder.arm(workdir, arm) for arm in config.run_arms}
    arms = [arm for arm, folder in folders.items() if os.path.exists(_last_summary(folder))]
    try:
        return collect(workdir, arms), arms
    except (FileNotFoundError, ValueError):  # a page of one result must not fail for another one
        return {}, []


def _last_summary(workdir: str) -> str:
    """The scores of the final evaluation of a run, or of an arm; "" where there is no run."""
    if not os.path.exists(run_folder.config(workdir)):
        return ""
    return _summary_path(workdir, max(config_lib.stage_ends(load_config(workdir)).values()), "none")


def _too_short(config: ConfigDict, counts: Sequence[int]) -> str:
    examples = " and ".join(map(str, counts))
    return (
        "These numbers mean little: a run this short shows that everything works "
        f"({config.opsd.steps} OPSD steps, {examples} test examples)."
    )


def _teacher_knows_little(shown: Mapping[str, Scores], task: str) -> list[str]:
    """Where the interval of the teacher reaches down to what one answer to all would get."""
    always, teacher = shown.get(BASELINE, {}).get(task), shown.get(TEACHER, {}).get(task)
    if not (always and teacher and teacher["interval_95"][0] <= always["overall"]):
        return []
    return [
        "The teacher is not clearly better than the most frequent answer: it has little to teach. "
        "Train the warm-up longer, or look at its answers."
    ]


def _reads_worse(shown: Mapping[str, Scores], task: str) -> list[str]:
    """Where the intervals before and after training, with true visual thoughts, do not overlap."""
    before, after = shown.get(TEACHER, {}).get(task), shown[TRAINED][task].get("real")
    if not (before and after and after["interval_95"][1] < before["interval_95"][0]):
        return []
    return [
        "Training made the model worse at reading true visual thoughts: with them the same weights "
        f"now answer {_percent(after)}, before OPSD {_percent(before)}."
    ]


def _closure_without_content(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> list[str]:
    """Where a control, whose teacher saw other content, has nearly the closure of OPSD."""
    own = shown[TRAINED][task].get("closure")
    if own is None:
        return []
    found = {
        arm: shown[arm_label(arm)][task].get("closure") for arm in _content_controls(arms, config)
    }
    near = [
        f"{arm} {100 * closure:.0f} %"
        for arm, closure in found.items()
        if closure is not None and own - closure < _NEAR
    ]
    if not near:
        return []
    return [
        "The closure shows nothing about the content of visual thoughts: it is "
        f"{100 * own:.0f} %, and nearly so where the teacher saw other content ({', '.join(near)})."
    ]


def _like_a_control(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> list[str]:
    """Where OPSD is not clearly better than the best arm whose teacher saw other content.

    The 95 % interval of the difference of two independent shares of the same number of questions
    reaches 0. The answers are to the same questions, so the true interval is narrower at most.
    """
    others = {arm: shown[arm_label(arm)][task] for arm in _content_controls(arms, config)}
    if not others:
        return []
    name, best = max(others.items(), key=lambda pair: pair[1]["overall"])
    own = shown[TRAINED][task]
    lift = own["overall"] - best["overall"]
    reach = 1.96 * math.sqrt(
        sum(b["overall"] * (1 - b["overall"]) / max(b["n"], 1) for b in (own, best))
    )
    if lift > reach:
        return []
    return [
        f"OPSD is not clearly better than the control {name}, whose teacher saw other content: "
        f"{_percent(own)} and {_percent(best)}, {100 * lift:.1f} points apart, where chance alone "
        f"makes up to {100 * reach:.1f}."
    ]


def _cut_off(shown: Mapping[str, Scores], task: str, config: ConfigDict) -> list[str]:
    """Where many answers of the trained student did not end within the budget."""
    share = 1 - shown[TRAINED][task].get("eos_rate", 1)
    if share < _CUT:
        return []
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return [
        f"{100 * share:.0f} % of the student's answers are cut off at {budget} tokens "
        "(`rollout.max_new_tokens`, of evaluations `eval.max_new_tokens`): raise it, or look at "
        "them; `python -m opsd_jax.data sizes` says what the text traces need."
    ]


def _start_asks(shown: Mapping[str, Scores], task: str, config: ConfigDict) -> list[str]:
    """Where nearly all answers of the start without visual thoughts ask for an image."""
    start = shown.get(START, {}).get(task, {})
    share = start.get("image_skip_rate", 0)
    if share < _MOST:
        return []
    line = (
        f"The start asks for an image in {100 * share:.0f} % of its text-only answers, and gets "
        "none."
    )
    if shown[TRAINED][task]["overall"] > start["overall"]:
        line = f"{line[:-1]}: a part of what OPSD gains over it may be the format."
    if START_BANNED not in shown:
        ends = config_lib.stage_ends(config)
        step = max([ends[stage] for stage in ends if ends[stage] < ends["opsd"]], default=0)
        line += (
            f" `eval --checkpoint=W/checkpoints/{step} --ban_marker` shows what it answers where "
            "it cannot ask."
        )
    return [line]


def _hardly_differing(shown: Mapping[str, Scores], task: str) -> list[str]:
    """Whose answers hardly depend on the question."""
    nothing: list[str] = []
    same: list[str] = []
    few: list[str] = []
    right = 0
    for who, tasks in shown.items():
        b = tasks.get(task, {})
        most, common = b.get("most_given"), b.get("common")
        if most and most["share"] >= _MOST:
            share = f"{100 * most['share']:.0f} % of them"
            if most["answer"] is None:
                nothing.append(f"{who}, {share}")
            else:
                same.append(f"{who}, `{most['answer']}` to {share}")
        elif common and 1 < len(common["given"]) <= _FEW_ANSWERS * common["right"]:
            few.append(f"{who}, {' and '.join(f'`{answer}`' for answer in common['given'])}")
            right = common["right"]
    lines = []
    if nothing:
        lines.append(
            f"No answer was found in nearly all texts of: {'; '.join(nothing)}. An answer stands "
            "between <answer> and </answer>."
        )
    if same:
        lines.append(
            f"The same answer to nearly all questions: {'; '.join(same)}. Such an accuracy shows "
            "how often that answer is right, not what was learned; a closure beside it says little."
        )
    if few:
        lines.append(
            f"The same few answers to nearly all questions: {'; '.join(few)}. Of the right answers "
            f"it takes {right} to cover as many. Questions with another right answer are missed."
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
            f"Without them the student answers {_percent(before)} before OPSD and "
            f"{_percent(trained)} after."
        )
    else:
        parts.append(f"After OPSD the student answers {_percent(trained)} without visual thoughts.")
    if with_thoughts and "real" in trained and not _reads_worse(shown, task):
        parts.append(
            f"With true visual thoughts the same weights now answer {_percent(trained['real'])}, "
            f"before OPSD {_percent(with_thoughts)}."
        )
    return " ".join(parts)


def _controls(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> str:
    """The accuracies of the control arms, and the distance to the best one."""
    of = {arm: shown[arm_label(arm)][task] for arm in arms}
    text = f"Control arms: {', '.join(f'{arm} {_percent(b)}' for arm, b in of.items())}."
    others = {arm: of[arm]["overall"] for arm in _content_controls(arms, config)}
    if others:
        best = max(others.values())
        names = [arm for arm, accuracy in others.items() if accuracy == best]
        what = f"the best control{'s' * (len(names) > 1)} ({' and '.join(names)})"
        lift = round(100 * (shown[TRAINED][task]["overall"] - best), 1)
        if lift == 0:
            text += f" OPSD is no better than {what}."
        else:
            text += f" OPSD is {abs(lift):.1f} points {'above' if lift > 0 else 'below'} {what}."
    return text


def _content_controls(arms: Sequence[str], config: ConfigDict) -> list[str]:
    """The arms without those that have another objective: they control what the teacher sees."""
    return [arm for arm in arms if "stages" not in config.arms[arm]]


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
        given = [p["answer"] for p in predictions]
        answer, share = _most_frequent(given)
        found[task]["most_given"] = {"answer": answer, "share": share}
        if any(answer is not None for answer in given):
            found[task]["common"] = {
                "given": _common([answer for answer in given if answer is not None]),
                "right": len(_common([p["expected"] for p in predictions])),
            }
        measured = summary["benchmarks"][task]
        found[task] |= {key: measured[key] for key in _RATES if key in measured}
    return found


def _predictions(workdir: str, step: int, name: str) -> dict[str, list[dict]]:
    """{task: predictions} of a final evaluation."""
    folder, found = os.path.dirname(_summary_path(workdir, step, name)), {}
    for prediction in results.read_predictions(folder):
        found.setdefault(prediction["benchmark"], []).append(prediction)
    return found


def _most_frequent(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """(the most frequent of some answers, its share)."""
    ((answer, count),) = collections.Counter(answers).most_common(1)
    return answer, count / len(answers)


def _common(answers: Sequence[str]) -> list[str]:
    """The fewest different answers that make up `_MOST` of some, the most frequent first."""
    needed, common = _MOST * len(answers), []
    for answer, count in collections.Counter(answers).most_common():
        if needed <= 0:
            break
        common.append(answer)
        needed -= count
    return common


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
