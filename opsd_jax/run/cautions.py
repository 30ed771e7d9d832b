"""Why the numbers of a run mean less than they seem to."""

import os
import shlex
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import html, statistics
from opsd_jax.evaluation.wording import Words
from opsd_jax.run import scores as scores_lib
from opsd_jax.run.evaluation_request import Request
from opsd_jax.run.scores import (
    BASELINE,
    MOST,
    START,
    START_BANNED,
    TEACHER,
    TRAINED,
    Scores,
    arm_key,
    closure_text,
    collect,
    content_controls,
    label,
    last_summary,
    percent,
    split_of,
    words_of,
)
from opsd_jax.runtime import run_folder

OF_THE_RUN = "Cautions of the run, from its own results (W/report.md):"  # on other pages

# From where on a number is worth a caution.
FEW = 200  # steps of a stage, or test examples: with fewer, 95 % intervals reach 7 points each way
_FEW_ANSWERS = 0.5  # of as many different answers as the right ones are: half of them never come
_CUT = 0.1  # of the answers: as many may be wrong for that reason alone
_NEAR = 0.1  # between two closures: their own intervals are up to so wide (docs/results.md)


def cautions(
    shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict, workdir: str
) -> list[str]:
    """Why the numbers mean less than they seem to, a line each; [] where nothing speaks for it.

    What holds for the whole run comes first, once. Where a run has several tasks, every other line
    begins with the name of its task.

    workdir: folder of the run, for commands.
    """
    trained, words = shown[TRAINED], words_of(config)
    lines: list[str] = []
    if not config_lib.block_names(config).privileged:
        lines.append(f"Nothing is privileged: {config_check.NOT_PRIVILEGED}.")
    if split_of(config) == "train":
        lines.append(
            f"The final evaluation is of the split `{config.eval.final_split}`, on which the run "
            "trained: these accuracies say little about other questions."
        )
    few = [task for task, b in trained.items() if min(config.opsd.steps, b["n"]) < FEW]
    if len(few) == len(trained):
        lines.append(_too_short(config, sorted({b["n"] for b in trained.values()})))
    for task, b in trained.items():
        found = [
            *([_too_short(config, [b["n"]])] if task in few and len(few) < len(trained) else []),
            *_answers_worse(shown, task, words),
            *_teacher_knows_little(shown, task),
            *reads_worse(shown, task, words),
            *_like_a_control(shown, task, arms, config),
            *_no_closure(shown, task),
            *_closure_without_content(shown, task, arms, config),
            *_start_asks(shown, task, config, workdir),
            *_hardly_differing(shown, task, words),
            *_cut_off(shown, task, config, workdir),
        ]
        lines += [f"{task}: {line}" for line in found] if len(trained) > 1 else found
    return lines


def _too_short(config: ConfigDict, counts: Sequence[int]) -> str:
    examples = " and ".join(map(str, counts))
    return (
        "These numbers mean little: a run this short shows that everything works "
        f"({config.opsd.steps} OPSD steps, {examples} {split_of(config)} examples)."
    )


def _teacher_knows_little(shown: Mapping[str, Scores], task: str) -> list[str]:
    """Where the interval of the teacher reaches down to what one answer to all would get."""
    always, teacher = (
        shown.get(BASELINE, {}).get(task),
        shown.get(TEACHER, {}).get(task),
    )
    if not (always and teacher and teacher["interval_95"][0] <= always["overall"]):
        return []
    return [
        "The teacher is not clearly better than the most frequent answer: it has little to teach. "
        "Train the warm-up longer, or look at its answers."
    ]


def _answers_worse(shown: Mapping[str, Scores], task: str, words: Words) -> list[str]:
    """Where OPSD ends below its start, and their intervals do not overlap."""
    before, after = shown.get(START, {}).get(task), shown[TRAINED][task]
    if not (before and after["interval_95"][1] < before["interval_95"][0]):
        return []
    return [
        f"OPSD made the answers worse: {words.without} {percent(after)} are right, before OPSD "
        f"{percent(before)}. See docs/guides/read-a-run.md for what to try."
    ]


def reads_worse(shown: Mapping[str, Scores], task: str, words: Words) -> list[str]:
    """Where the intervals before and after training, with true visual thoughts, do not overlap.

    words: of the run, as below.
    """
    before, after = (
        shown.get(TEACHER, {}).get(task),
        shown[TRAINED][task].get("real"),
    )
    if not (before and after and after["interval_95"][1] < before["interval_95"][0]):
        return []
    return [
        f"Training made the model worse at reading {words.true}: with {words.them} the same "
        f"weights now answer {percent(after)}, before OPSD {percent(before)}."
    ]


def _no_closure(shown: Mapping[str, Scores], task: str) -> list[str]:
    """Where the KL to the teacher before training was too small for a closure."""
    trained = shown[TRAINED][task]
    if "kl_before" not in trained or trained["closure"] is not None:
        return []
    before = f"{trained['kl_before']:.1g}".replace("-", "−")
    return [
        "There is no closure: before training, the student already said what the teacher says (KL "
        f"{before} nats per token, less than {statistics.LEAST_KL:g})."
    ]


def _closure_without_content(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> list[str]:
    """Where a control, whose teacher saw other content, has nearly the closure of OPSD."""
    trained = shown[TRAINED][task]
    own = trained.get("closure")
    if own is None:
        return []
    found = {arm: shown[arm_key(arm)][task] for arm in content_controls(arms, config)}
    near = [
        f"{arm} {closure_text(b)}"
        for arm, b in found.items()
        if b.get("closure") is not None and own - b["closure"] < _NEAR
    ]
    if not near:
        return []
    return [
        f"The closure shows nothing about {words_of(config).subject}: it is "
        f"{closure_text(trained)}, and nearly so where the teacher saw other content "
        f"({', '.join(near)})."
    ]


def _like_a_control(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> list[str]:
    """Where the interval of the lead over the best control of the content reaches 0."""
    lead = scores_lib.lead(shown, task, arms, config)
    if lead is None or lead.interval_95[0] > 0:
        return []
    best = shown[arm_key(lead.over[0])][task]
    interval = html.between([100 * limit for limit in lead.interval_95], 1)
    return [
        f"OPSD is not clearly better than the control {lead.over[0]}, whose teacher saw other "
        f"content: {percent(shown[TRAINED][task])} and {percent(best)}, "
        f"{html.fixed(100 * lead.points, 1)} points apart (95 % interval: {interval})."
    ]


def _cut_off(shown: Mapping[str, Scores], task: str, config: ConfigDict, workdir: str) -> list[str]:
    """Where many answers of the trained student did not end within the budget."""
    share = 1 - shown[TRAINED][task].get("eos_rate", 1)
    if share < _CUT:
        return []
    options = (
        f"--config={run_folder.config(workdir)}",
        f"--workdir={run_folder.run_of(workdir) or workdir}",  # where the data are, of an arm, too
    )
    command = shlex.join(["python", "-m", "opsd_jax.data", "sizes", *options])
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return [
        f"{100 * share:.0f} % of the student's answers are cut off at {budget} tokens "
        "(`rollout.max_new_tokens`, of evaluations `eval.max_new_tokens`): raise it, or look at "
        f"them; `{command}` says what the text traces need."
    ]


def _start_asks(
    shown: Mapping[str, Scores], task: str, config: ConfigDict, workdir: str
) -> list[str]:
    """Where nearly all answers of the start without visual thoughts ask for an image."""
    start, banned = (shown.get(who, {}).get(task, {}) for who in (START, START_BANNED))
    share = start.get("image_skip_rate", 0)
    if share < MOST:
        return []
    asks = f"The start asks for an image in {100 * share:.0f} % of its {words_of(config).answers}"
    gains = shown[TRAINED][task]["overall"] > start["overall"]
    format_counts = "a part of what OPSD gains over it may be the format"
    if banned:
        is_better = banned["overall"] > start["overall"]
        why = f": {format_counts}" if gains and is_better else ""
        return [
            f"{asks}, and gets none. Where it cannot ask, it answers {percent(banned)} in the "
            f"place of {percent(start)}{why}."
        ]
    step = config_lib.start_of(config, "opsd")
    checkpoint = run_folder.checkpoint(workdir, step)
    command = Request(workdir, checkpoint=checkpoint, ban_marker=True).command
    return [
        f"{asks}, and gets none{f': {format_counts}' if gains else ''}. `{command}` shows what it "
        "answers where it cannot ask."
    ]


def _hardly_differing(shown: Mapping[str, Scores], task: str, words: Words) -> list[str]:
    """Whose answers hardly depend on the question."""
    nothing: list[str] = []
    same: list[str] = []
    few: list[str] = []
    right = 0
    for key, tasks in shown.items():
        who = label(key, words)
        b = tasks.get(task, {})
        most, common = b.get("most_given"), b.get("common")
        if most and most["share"] >= MOST:
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


# --- for other pages -----------------------------------------------------------------------------


def of_run(workdir: str) -> list[str]:
    """The cautions of a run with the arms in its run_arms that are done, for other pages.

    [] while its results are not complete, or where it has no OPSD stage.
    """
    shown, arms = _finished(workdir)
    return cautions(shown, arms, load_config(workdir), workdir) if shown else []


def closures_of(workdir: str) -> list[str]:
    """A line for each task with the closures of a run and of its arms that are done.

    [] where none was measured for an arm: there is nothing to compare.
    """
    shown, arms = _finished(workdir)
    lines = []
    for task in shown.get(TRAINED, {}):
        texts = {who: closure_text(shown[who][task]) for who in (TRAINED, *map(arm_key, arms))}
        measured = [f"{who} {text}" for who, text in texts.items() if text]
        if len(measured) > 1:
            lines.append(f"{task}, closures in the run's table: {', '.join(measured)}")
    return lines


def _finished(workdir: str) -> tuple[dict[str, Scores], list[str]]:
    """(what `collect` returns, the arms in it) of a run; ({}, []) while results are missing."""
    config = load_config(workdir)
    if "opsd" not in config.stages or not config.eval.final_split:
        return {}, []
    folders = {arm: run_folder.arm(workdir, arm) for arm in config.run_arms}
    arms = [arm for arm, folder in folders.items() if os.path.exists(last_summary(folder))]
    try:
        return collect(workdir, arms), arms
    except (FileNotFoundError, ValueError):  # a page of one result must not fail for another one
        return {}, []
