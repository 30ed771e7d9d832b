"""Scores of a finished run and of its control arms, read from its evaluations."""

import collections
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import html, results, statistics, wording
from opsd_jax.evaluation.wording import Words
from opsd_jax.runtime import run_folder

Scores = dict[str, dict]
"""{task: scores}"""
# Whose answers a row of the table holds; those of a control arm have `arm_key`. See `label`.
TEACHER = "teacher"
START = "start"
START_BANNED = "start, banned"
TRAINED = "OPSD"
BASELINE = "baseline"
# Final evaluations of a run's start, and the names of their results.
_STARTS = {TEACHER: "real", START: "none", START_BANNED: "none-banned"}
_SHOWN = ("overall", "interval_95", "n", "mean_output_tokens", "seconds_per_sample")
_RATES = ("image_skip_rate", "eos_rate")

# Share of the questions: what is left can hardly change an accuracy.
MOST = 0.9


def arm_key(name: str) -> str:
    """Whose answers the row of a control arm holds."""
    return f"arm {name}"


def split_of(config: ConfigDict) -> str:
    """The split of the final evaluation without a slice: "train" of "train[:64]"."""
    return config.eval.final_split.partition("[")[0]


def words_of(config: ConfigDict) -> Words:
    """What the tables and pages of a run call what its teacher sees and its student lacks."""
    return wording.of_blocks(config_lib.block_names(config))


def label(who: str, words: Words) -> str:
    """Label of a row, as Markdown. who: `TEACHER` etc., or `arm_key`. words: of the run."""
    labels = {
        TEACHER: f"teacher: start, {words.given}",
        START_BANNED: f"{START}, {words.alone}, `<image_start>` banned",
        BASELINE: "always the most frequent answer",
    }
    return labels.get(who, f"{who}, {words.alone}")


def collect(workdir: str, arms: Sequence[str]) -> dict[str, Scores]:
    """{whose answers (`label`): their scores} of a run's start, the trained run and its arms.

    And of the answer that is expected most often, given to every question: it is right where the
    expected answer equals it (where a task accepts several answers, it may be right more often).

    Raises:
      FileNotFoundError: an evaluation is missing. ValueError: its summary is damaged.
    """
    config = load_config(workdir)
    start, last = config_lib.start_of(config, "opsd"), max(config_lib.stage_ends(config).values())
    shown = {
        what: _scores(workdir, start, name)
        for what, name in _STARTS.items()
        if os.path.exists(_summary_path(workdir, start, name))
    }
    shown[TRAINED] = _trained_scores(workdir)
    for arm in arms:
        shown[arm_key(arm)] = _trained_scores(run_folder.arm(workdir, arm))
    for task, b in shown[TRAINED].items():
        if best := _best_controls(shown, task, content_controls(arms, config)):
            b["lead_interval_95"] = _paired_lead(workdir, best[0], task)
    shown[BASELINE] = {}
    for task, predictions in _predictions(workdir, last, "none").items():
        answer, share = _most_frequent([p["expected"] for p in predictions])
        shown[BASELINE][task] = {"overall": share, "n": len(predictions), "answer": answer}
    return shown


class Lead(NamedTuple):
    """How far a trained run is ahead of the controls whose teacher saw other content.

    Attributes:
      over: the arms with the highest accuracy among them.
      points: accuracy of the run minus theirs, in -1..1.
      interval_95: of `points`, over questions. That the best of several arms was chosen widens it
        no further.
    """

    over: list[str]
    points: float
    interval_95: tuple[float, float]


def lead(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> Lead | None:
    """The lead on a task over the best of these arms; None without a control of the content.

    shown: what `collect` returned. Without "lead_interval_95", the answers are to other questions.
    """
    best, own = _best_controls(shown, task, content_controls(arms, config)), shown[TRAINED][task]
    if not best:
        return None
    theirs = shown[arm_key(best[0])][task]
    interval = own.get("lead_interval_95") or statistics.unpaired_difference(
        *((round(b["overall"] * b["n"]), b["n"]) for b in (own, theirs))
    )
    return Lead(best, own["overall"] - theirs["overall"], tuple(interval))


def _best_controls(shown: Mapping[str, Scores], task: str, arms: Sequence[str]) -> list[str]:
    """Those of some arms that have the highest accuracy on a task, [] of no arm."""
    accuracies = {arm: shown[arm_key(arm)][task]["overall"] for arm in arms}
    return [arm for arm, accuracy in accuracies.items() if accuracy == max(accuracies.values())]


def _paired_lead(workdir: str, arm: str, task: str) -> tuple[float, float] | None:
    """95 % interval of the accuracy of a trained run minus that of an arm.

    Answers to the same question are a pair. None where run and arm answered other questions.
    """
    own, theirs = (_hits(folder, task) for folder in (workdir, run_folder.arm(workdir, arm)))
    if own.keys() != theirs.keys():
        return None
    pairs = collections.Counter((hit, theirs[question]) for question, hit in own.items())
    return statistics.paired_difference(pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0])


def _hits(workdir: str, task: str) -> dict[tuple, int]:
    """{question: 1 for a right answer, 0 for a wrong one} of a task in the last evaluation."""
    last = max(config_lib.stage_ends(load_config(workdir)).values())
    predictions = _predictions(workdir, last, "none")[task]
    return {(p["pid"], p["index"], p["expected"]): int(p["hit"]) for p in predictions}


def last_summary(workdir: str) -> str:
    """The scores of the final evaluation of a run, or of an arm; "" where there is no run."""
    if not os.path.exists(run_folder.config(workdir)):
        return ""
    return _summary_path(workdir, max(config_lib.stage_ends(load_config(workdir)).values()), "none")


def content_controls(arms: Sequence[str], config: ConfigDict) -> list[str]:
    """The arms without those that have another objective: they control what the teacher sees."""
    return [arm for arm in arms if "stages" not in config.arms[arm]]


def _trained_scores(workdir: str) -> Scores:
    """The final scores of a run, or of a control arm.

    If it was measured, with the KL to the teacher before and after the stage, and the part of it
    that training removed: the closure, None where the KL before was too small for one.
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
    """The fewest different answers that make up `MOST` of some, the most frequent first."""
    needed, common = MOST * len(answers), []
    for answer, count in collections.Counter(answers).most_common():
        if needed <= 0:
            break
        common.append(answer)
        needed -= count
    return common


def percent(b: dict) -> str:
    """The accuracy of scores, as text."""
    return f"{100 * b['overall']:.1f} %"


def closure_text(b: dict) -> str:
    """The closure of scores, as text; "" where there is none."""
    closure = b.get("closure")
    return "" if closure is None else f"{html.fixed(100 * closure, 0)} %"
