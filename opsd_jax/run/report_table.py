"""The table of a run and its control arms, W/report.md and W/report.json."""

import os
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import results
from opsd_jax.runtime import files, run_folder

Scores = dict[str, dict]
"""{task: scores}"""

# Whose answers a row of the table holds.
TEACHER = "teacher: start, with visual thoughts"
START = "start, text only"
START_BANNED = "start, text only, `<image_start>` banned"
TRAINED = "OPSD, text only"

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
_FEW = 200  # a stage of fewer steps, or a test split of fewer examples, says little
_SHOWN = ("overall", "interval_95", "n", "mean_output_tokens", "seconds_per_sample")


def arm_label(name: str) -> str:
    """Label of the row of a control arm."""
    return f"arm {name}, text only"


def collect(workdir: str, arms: Sequence[str]) -> dict[str, Scores]:
    """{whose answers: their scores} of a run's start, of the trained run and of its control arms.

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
    return shown


def write(workdir: str, shown: Mapping[str, Scores], arms: Sequence[str]) -> str:
    """Writes W/report.md and W/report.json, and returns the text of the former.

    An accuracy without visual thoughts is shown with that of the same weights given the true ones,
    if the final evaluation measured it: training changes how well a model reads them.

    Args:
      shown: what `collect` returned for these arms.
    """
    lines = [_line(_HEADER), "|---" * len(_HEADER) + "|"]
    lines += [_row(what, task, b) for what, tasks in shown.items() for task, b in tasks.items()]
    text = "\n".join([*lines, "", verdict(shown, arms, load_config(workdir))]) + "\n"
    files.write(run_folder.report(workdir), text)
    files.write_json(
        run_folder.report_data(workdir),
        [{"arm": what, "tasks": tasks} for what, tasks in shown.items()],
    )
    return text


def verdict(shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict) -> str:
    """What the numbers say, in sentences, one line per task.

    A caution follows where a short stage or few examples make the numbers mean little.
    """
    lines = []
    for task, trained in shown[TRAINED].items():
        parts = [f"**{task}**, {trained['n']} test examples, seed {config.seed}."]
        if with_thoughts := shown.get(TEACHER, {}).get(task):
            parts.append(f"The teacher answers {_percent(with_thoughts)} with visual thoughts.")
        if before := shown.get(START, {}).get(task):
            parts.append(
                f"Without them it answers {_percent(before)} before OPSD and {_percent(trained)} "
                "after."
            )
        else:
            parts.append(f"After OPSD it answers {_percent(trained)} without visual thoughts.")
        controls = [f"{arm} {_percent(shown[arm_label(arm)][task])}" for arm in arms]
        if controls:
            parts.append(f"Control arms: {', '.join(controls)}.")
        others = {  # arms with another objective are not controls of what the teacher sees
            arm: shown[arm_label(arm)][task]["overall"]
            for arm in arms
            if "stages" not in config.arms[arm]
        }
        if others:
            best = max(others, key=others.__getitem__)
            lift = 100 * (trained["overall"] - others[best])
            parts.append(
                f"OPSD is {abs(lift):.1f} points {'above' if lift >= 0 else 'below'} the best arm "
                f"whose teacher saw something else, {best}."
            )
        if min(config.opsd.steps, trained["n"]) < _FEW:
            parts.append(
                "**These numbers mean little: a run this short shows that everything works "
                f"({config.opsd.steps} OPSD steps, {trained['n']} test examples).**"
            )
        lines.append(" ".join(parts))
    return "\n".join(lines)


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
    return {task: {key: b[key] for key in _SHOWN} for task, b in summary["benchmarks"].items()}


def _row(what: str, task: str, b: dict) -> str:
    """The line of a task. what: the weights that answered."""
    real = b.get("real")
    return _line(
        (
            what,
            task,
            _percent(b),
            _interval(b),
            f"{100 * real['overall']:.1f} % ({_interval(real)})" if real else "",
            f"{b['n']}",
            f"{b['mean_output_tokens']:.1f}",
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
