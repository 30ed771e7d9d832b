"""The table of a run and its control arms, W/report.md and W/report.json."""

import os
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import html
from opsd_jax.inputs import checks
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import scores as scores_lib
from opsd_jax.run import screening
from opsd_jax.run.scores import (
    BASELINE,
    START,
    TEACHER,
    TRAINED,
    Scores,
    arm_key,
    closure_text,
    label,
    last_summary,
    percent,
    split_of,
    words_of,
)
from opsd_jax.runtime import files, run_folder


def write(workdir: str, shown: Mapping[str, Scores], arms: Sequence[str]) -> str:
    """Writes W/report.md and W/report.json, and returns the text of the former, Markdown.

    An accuracy without visual thoughts is shown with that of the same weights given the true ones,
    if the final evaluation measured it: training changes how well a model reads them.

    Args:
      shown: what `collect` returned for these arms.
    """
    config = load_config(workdir)
    words = words_of(config)
    header = ["arm", "task", "accuracy", "95 % interval", words.given]
    header += ["n", "tokens", "KL to teacher", "closure"]
    lines = [_line(header), "|---" * len(header) + "|"]
    lines += [
        _row(label(who, words), task, b)
        for who, tasks in shown.items()
        for task, b in tasks.items()
    ]
    sentences = [
        *verdict(shown, arms, config, workdir),
        *screening.lines(workdir, arms),
        *other_arms(workdir, arms),
    ]
    text = "\n".join([*lines, "", *(f"- {line}" for line in sentences)]) + "\n"
    files.write(run_folder.report(workdir), text)
    files.write_json(
        run_folder.report_data(workdir),
        [{"who": who, "arm": label(who, words), "tasks": tasks} for who, tasks in shown.items()],
    )
    return text


def other_arms(workdir: str, arms: Sequence[str]) -> list[str]:
    """A line about finished arms of a run that its table does not have, if there are any."""
    folder = os.path.dirname(run_folder.arm(workdir, "_"))
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    done = [
        name
        for name in names
        if name not in {*arms, *load_config(workdir).run_arms}
        and os.path.exists(last_summary(run_folder.arm(workdir, name)))
    ]
    if not done:
        return []
    every = ", ".join(f"'{name}'" for name in sorted({*arms, *done}))
    return [
        f"Not shown: the finished arms {', '.join(done)}, which config.run_arms does not name; "
        f'--config.run_arms="({every},)" shows all.'
    ]


def in_terminal(
    shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict, workdir: str
) -> str:
    """The main columns of the table, aligned, and the verdict, as plain text.

    workdir: folder of the run, here and in `verdict`.
    """
    words = words_of(config)
    rows: list[tuple[str, ...]] = [("answers of", "task", "accuracy", "95 % interval", "closure")]
    for what, tasks in shown.items():
        for task, b in tasks.items():
            interval = _interval(b) if "interval_95" in b else ""
            name = label(what, words).replace("`", "")
            rows.append((name, task, percent(b), interval, closure_text(b)))
    found = cautions_lib.cautions(shown, arms, config, workdir)
    warned = [f"caution: {plain(line)}" for line in found]
    said = map(plain, statements(shown, arms, config))
    return "\n".join([checks.table(rows), "", *warned, *said])


def plain(line: str) -> str:
    """A line of Markdown without its marks, for the terminal."""
    return line.replace("`", "").replace("**", "")


def verdict(
    shown: Mapping[str, Scores], arms: Sequence[str], config: ConfigDict, workdir: str
) -> list[str]:
    """What the numbers say, as Markdown, one line per statement; first the cautions, in bold."""
    bold = [f"**{line}**" for line in cautions_lib.cautions(shown, arms, config, workdir)]
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
                f"be right in {percent(always)}."
            )
    lines += _missing_arms(arms, config)
    if "none" in arms:
        lines.append(
            "The teacher of the arm none sees its texts without "
            f"{words_of(config).no_part}, which is the evaluation mode `remove`."
        )
    return lines


def _missing_arms(arms: Sequence[str], config: ConfigDict) -> list[str]:
    """A line about the arms that the run should have and that are not done, if there are any."""
    if not (missing := [arm for arm in config.run_arms if arm not in arms]):
        return []
    rest = ",".join(arm for arm in config.run_arms if arm in arms) or "'()'"
    logs = " and ".join(f"arms/{arm}/log" for arm in missing)
    if len(missing) == 1:
        named, says, them = f"it is not done: the arm {missing[0]}", "says", "it"
    else:
        named, says, them = f"they are not done: the arms {', '.join(missing)}", "say", "them"
    return [
        f"**Not shown, because {named}.** In the folder of the run, {logs} {says} why. The same "
        f"command tries again; `--config.run_arms={rest}` leaves {them} out."
    ]


def _gain(shown: Mapping[str, Scores], task: str, config: ConfigDict) -> str:
    """What the student gained on a task."""
    trained, words = shown[TRAINED][task], words_of(config)
    parts = [f"**{task}**, {trained['n']} {split_of(config)} examples, seed {config.seed}."]
    if with_thoughts := shown.get(TEACHER, {}).get(task):
        share = percent(with_thoughts)
        parts.append(f"The teacher answers {share} {words.given}.")
    if before := shown.get(START, {}).get(task):
        parts.append(
            f"{words.instead} the student answers {percent(before)} before OPSD and "
            f"{percent(trained)} after."
        )
    else:
        parts.append(f"After OPSD the student answers {percent(trained)} {words.without}.")
    if with_thoughts and "real" in trained and not cautions_lib.reads_worse(shown, task, words):
        parts.append(
            f"With {words.true} the same weights now answer {percent(trained['real'])}, "
            f"before OPSD {percent(with_thoughts)}."
        )
    return " ".join(parts)


def _controls(
    shown: Mapping[str, Scores], task: str, arms: Sequence[str], config: ConfigDict
) -> str:
    """The accuracies of the control arms, and the distance to the best one."""
    of = {arm: shown[arm_key(arm)][task] for arm in arms}
    text = f"Control arms: {', '.join(f'{arm} {percent(b)}' for arm, b in of.items())}."
    if lead := scores_lib.lead(shown, task, arms, config):
        what = f"the best control{'s' * (len(lead.over) > 1)}, {' and '.join(lead.over)}"
        points = round(100 * lead.points, 1)
        if points == 0:
            text += f" OPSD is no better than {what}"
        else:
            text += f" OPSD is {abs(points):.1f} points {'above' if points > 0 else 'below'} {what}"
        interval = html.between([100 * limit for limit in lead.interval_95], 1)
        text += f" (95 % interval of the difference: {interval})."
    return text


def _row(what: str, task: str, b: dict) -> str:
    """The line of a task. what: the weights that answered."""
    real = b.get("real")
    return _line(
        (
            what,
            task,
            percent(b),
            _interval(b) if "interval_95" in b else "",
            f"{100 * real['overall']:.1f} % ({_interval(real)})" if real else "",
            f"{b['n']}",
            f"{b['mean_output_tokens']:.1f}" if "mean_output_tokens" in b else "",
            f"{b['kl_before']:.3f} -> {b['kl']:.3f}" if "kl" in b else "",
            closure_text(b),
        )
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(b: dict) -> str:
    low, high = b["interval_95"]
    return f"{100 * low:.1f}–{100 * high:.1f}"
