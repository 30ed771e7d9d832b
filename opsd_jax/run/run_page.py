"""The page of a run, W/report.html: what it learned, as a table, curves and sampled answers.

It is made from the files of the run and of its control arms alone, so it can be made at any time.
"""

import os
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import params as params_lib
from opsd_jax.blocks import BlockNames
from opsd_jax.data.workdir import load_config
from opsd_jax.evaluation import charts, html, results, shown_answers, wording
from opsd_jax.evaluation.contexts import Selection
from opsd_jax.evaluation.wording import OF_NOTHING, OF_VISUAL_THOUGHTS, Words
from opsd_jax.inputs import json_files
from opsd_jax.model import bagel
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.run import report_table, screening
from opsd_jax.run import scores as scores_lib
from opsd_jax.run import session as session_lib
from opsd_jax.run.checks import images_caution
from opsd_jax.run.report_table import Scores
from opsd_jax.runtime import clock, files, metrics, provenance, run_folder

Points = list[tuple[float, float]]

_MOST_SAMPLES = 12  # of wrong answers, and of right ones
_EXAMPLES = {  # of the visual thoughts of `BlockNames`, in words
    OF_VISUAL_THOUGHTS: "the images of the intermediate steps",
    OF_NOTHING: "what the teacher is given; no block of the example is privileged",
}


def meaning(names: BlockNames, *, images: bool) -> str:
    """What the words of the table mean, with **bold** as in Markdown.

    Args:
      names: the blocks of the run. images: whether its examples have problem images.
    """
    words = wording.of_blocks(names)
    given = _EXAMPLES.get(words) or wording.listed(names.privileged, images=images)
    seen = wording.listed(_contents(names.student), images=images)
    noise = "**noise**"
    if images and blocks_lib.replaces_images(names):
        noise += "; **image**, the problem image once more"
    return (
        f"**{_capital(words.given)}**: the model is given {given}. "
        f"**{_capital(words.alone)}**: it is not; it always sees {seen}. **Arms** are "
        "controls: the same training from the same weights, except that the teacher sees something "
        f"else ({noise}; **swap**, another example's {words.content}; **none**, the teacher's "
        f"texts without {words.no_part}: the evaluation mode `remove`, not the mode `none`), or "
        "that the objective is another one (**sft**, **offline**). What "
        f"{words.subject} teaches is the accuracy of OPSD minus that of the best arm whose teacher "
        "sees something else. "
        "**n** is the number of questions, **tokens** the mean length of an answer. "
        f"**KL** compares the starting teacher, {words.given}, with the student, "
        "without, on reference traces, before and after training; **closure** is the share of it "
        "that training removed, and it is negative where the student moved away. It is no "
        "accuracy: where the KL before is small, or the teacher is wrong, it says little. "
        "Intervals hold 95 %, over questions (Wilson's; of a difference Newcombe's, for pairs of "
        "answers). They say nothing about other seeds, nor about the choice of the best of several "
        "arms."
    )


def _contents(blocks: Iterable[str]) -> list[str]:
    """The blocks of the example among these."""
    return [name for name in blocks if name not in blocks_lib.FIXED_TEXTS]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def write(workdir: str, shown: Mapping[str, Scores], arms: Sequence[str], command: str = "") -> str:
    """Writes W/report.html and returns its path.

    Args:
      shown: what `scores_lib.collect` returned; {} for a run without a final evaluation.
      arms: control arms of the run that are done.
      command: the command that trained the run; "" leaves it out.
    """
    config = load_config(workdir)
    folders = {"run": workdir} | {f"arm {arm}": run_folder.arm(workdir, arm) for arm in arms}
    selection = _selection(workdir, config.eval.final_split) if shown else None
    parts = [html.facts([*_settings(workdir, config), *provenance.facts(command)])]
    if selection:
        parts += _result(workdir, shown, arms, selection)
    parts += [html.note(line) for line in report_table.other_arms(workdir, arms)]
    parts += _screening(workdir, arms)
    parts += _curves(folders, config)
    if "opsd" in config.stages:
        first, last = config_lib.start_of(config, "opsd"), config_lib.stage_ends(config)["opsd"]
        parts += _divergence(workdir, first, last, config)
        if selection:
            parts += _samples(workdir, last, selection, scores_lib.split_of(config))
    parts += [*_seconds(folders), *_pages(workdir)]
    name, path = os.path.basename(os.path.abspath(workdir)), run_folder.page(workdir)
    files.write(path, html.page(f"Run {name}", *parts))
    return path


def _settings(workdir: str, config: ConfigDict) -> list[tuple[str, str]]:
    """(name, content with `code`) of the settings that say what kind of run it is."""
    model = config_lib.model(config)
    params = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    steps = [
        f"{stage} {config[stage].steps} with batches of {config[stage].batch_size}"
        for stage in config.stages
    ]
    return [
        ("folder", f"`{workdir}`, settings in config.json"),
        ("model", f"{params_lib.count(params)['total']:,} parameters"),
        ("steps", ", ".join(steps)),
        *([("teacher", config.teacher.kind)] if "opsd" in config.stages else []),
        ("seed", str(config.seed)),
    ]


def caution_pages(workdir: str) -> None:
    """Puts the cautions of a finished run on the pages of its evaluations and analyses.

    The evaluations of a stage are written before the results of the run are complete.
    """
    cautions = cautions_lib.of_run(workdir)
    for _, page in _found_pages(workdir):
        with open(page, encoding="utf-8") as file:
            before = file.read()
        after = html.with_cautions(before, cautions, cautions_lib.OF_THE_RUN)
        if after != before:
            files.write(page, after)


def _selection(workdir: str, split: str) -> Selection:
    """The examples of a split of a run."""
    session = session_lib.open_run(workdir)
    return Selection(session.examples(split), session.packer, session.mesh, batch_size=1)


def _have_images(selection: Selection) -> bool:
    """Whether an example of the selection has a problem image."""
    return len(selection.examples.without(("image",))) < len(selection.tasks)


def _result(
    workdir: str, shown: Mapping[str, Scores], arms: Sequence[str], selection: Selection
) -> list[str]:
    """Accuracies with their intervals: in words, as a chart and as a table."""
    config, names = load_config(workdir), selection.packer.names
    words = wording.of_blocks(names)
    several = max(map(len, shown.values())) > 1
    cautions = cautions_lib.cautions(shown, arms, config, workdir)
    cautions.append(images_caution(config, selection.examples))
    bars, cells = [], []
    for who, tasks in shown.items():
        for task, b in tasks.items():
            name = report_table.plain(scores_lib.label(who, words))
            low, high = _limits(b) or (None, None)
            bars.append((f"{name} ({task})" if several else name, 100 * b["overall"], low, high))
            cells.append([name, *([task] if several else []), *_numbers(b)])
    columns = ["answers of", *(["task"] if several else []), "accuracy %", "95 % interval"]
    columns += [f"{words.given} %", "n", "tokens", "KL before", "KL after", "closure %"]
    return [
        html.heading("Result"),
        html.cautions(list(filter(None, cautions))),
        *(html.paragraph(line) for line in report_table.statements(shown, arms, config)),
        charts.intervals(bars),
        html.table(columns, cells, texts=1 + several),
        html.note(meaning(names, images=_have_images(selection))),
    ]


def _screening(workdir: str, arms: Sequence[str]) -> list[str]:
    """Which training examples were left out, [] where none were screened."""
    cells = [
        [
            name,
            task,
            *(counts[key] for key in ("examples", "kept", "left_out", "too_long")),
            *(html.fixed(counts[f"mean_gain_{key}"], 4) for key in ("kept", "left_out")),
        ]
        for name, one in screening.of_runs(workdir, arms).items()
        for task, counts in one["tasks"].items()
    ]
    if not cells:
        return []
    columns = ["run", "task", "examples", "kept", "left out", "fit no bucket"]
    columns += ["mean gain of the kept", "of those left out"]
    return [
        html.heading("Training examples"),
        *(html.paragraph(line) for line in screening.lines(workdir, arms)),
        html.table(columns, cells, texts=2),
        html.note(
            "The gain of an example is what the teacher's context adds to the mean log-probability "
            "of its reference, in nats per token, for the weights that OPSD starts from. Examples "
            "below the margin are left out; screen.json has the gain of each."
        ),
    ]


def _limits(b: dict) -> tuple[float, float] | None:
    """Both ends of the interval of an accuracy in per cent; None for one without."""
    if "interval_95" not in b:
        return None
    low, high = b["interval_95"]
    return 100 * low, 100 * high


def _numbers(b: dict) -> list:
    """Cells of the table of results."""
    return [
        html.fixed(100 * b["overall"], 1),
        html.between(_limits(b), 1),
        html.fixed(100 * b["real"]["overall"], 1) if "real" in b else None,
        b["n"],
        html.fixed(b.get("mean_output_tokens"), 1),
        html.fixed(b.get("kl_before"), 3),
        html.fixed(b.get("kl"), 3),
        html.fixed(100 * b["closure"], 0) if b.get("closure") is not None else None,
    ]


Series = dict[str, dict[str, dict[str, Points]]]
"""{stage: {metric: {name of the line: its points}}}"""


def _curves(folders: Mapping[str, str], config: ConfigDict) -> list[str]:
    """Loss of each stage; accuracy and length of the samples in the OPSD stage, and of the arms.

    Args:
      folders: {"run": W, "arm NAME": W/arms/NAME, ...}.
    """
    parts, words = [html.heading("Curves")], scores_lib.words_of(config)
    if config.eval.every and config.eval.final_split:
        parts.append(
            html.note(
                f"Accuracies while a stage goes on are of {config.eval.rows or 'all'} examples of "
                f"the split `{config.eval.split}`, those at its start and its end of all of "
                f"`{config.eval.final_split}`."
            )
        )
    if len(folders) > 1:
        parts.append(
            html.note(
                "Each arm's loss is that to its own teacher, so a lower one is no better result: a "
                "teacher that sees little is easy to imitate. Compare accuracies and closures."
            )
        )
    # OPSD first: it is what the run is about, and where the arms are.
    for stage, found in sorted(
        _series(folders, config).items(), key=lambda item: item[0] != "opsd"
    ):
        shown = []
        for key, title, unit in _charts_of(stage, found, words):
            # A share becomes per cent.
            scale = 100 if key.startswith("eval/") else 1
            lines = {
                name: [(step, scale * value) for step, value in points]
                for name, points in found[key].items()
            }
            if max(map(len, lines.values())) > 1:
                chart = charts.lines(
                    lines, x="step of the stage", y=unit, percent=key.startswith("eval/")
                )
                shown.append(html.stack(html.heading(f"{title}, stage {stage}", 3), chart))
        if shown:
            parts.append(html.row(*shown))
    return parts


def _series(folders: Mapping[str, str], config: ConfigDict) -> Series:
    """The numbers in metrics.jsonl of a run and its arms, by step of the stage.

    An arm of another stage is compared with OPSD, except for its loss.
    """
    series: Series = {}
    starts = {stage: config_lib.start_of(config, stage) for stage in config.stages}
    for name, folder in folders.items():
        for row in metrics.read(run_folder.metrics(folder)):
            step = row["step"] - (starts.get(row["stage"], 0) if name == "run" else 0)
            for key, value in row.items():
                stage = row["stage"] if name == "run" or key == "loss" else "opsd"
                if not isinstance(value, int | float):
                    continue
                if name == "run" and key.startswith("eval/") and row["step"] == starts.get("opsd"):
                    for other in folders:  # the arms begin with the same weights
                        of_opsd = series.setdefault("opsd", {}).setdefault(key, {})
                        of_opsd[_line(other, "opsd")] = [(0, value)]
                of_stage = series.setdefault(stage, {}).setdefault(key, {})
                of_stage.setdefault(_line(name, stage), []).append((step, value))
    return series


def _line(name: str, stage: str) -> str:
    """The name of a line in the charts of a stage, as the table calls it.

    name: "run", or that of an arm.
    """
    return scores_lib.TRAINED if (name, stage) == ("run", "opsd") else name


def _charts_of(stage: str, found: Iterable[str], words: Words) -> list[tuple[str, str, str]]:
    """(metric, title, unit) of the charts of a stage that has these metrics."""
    charted, modes = [], {"none": words.alone, "real": words.given}
    for key in found:
        if key.startswith("eval/") and (shown := modes.get(key.split("/")[2])):
            charted.append((key, f"Accuracy on {key.split('/')[1]}, {shown}", "accuracy in %"))
    if "loss" in found:
        charted.append(("loss", "Loss", "loss"))
    if stage == "opsd" and "completion_len" in found:
        charted.append(("completion_len", "Length of the student's samples", "tokens"))
    return charted


def _divergence(workdir: str, start: int, last: int, config: ConfigDict) -> list[str]:
    """Divergence along the student's samples, of the first and the last step that were kept."""
    kept: dict[str, Points] = {}
    for step in (start + 1, last):
        path = os.path.join(run_folder.samples(workdir, step), "jsd-by-position.txt")
        if os.path.exists(path):
            kept[f"step {step - start}"] = [(n, y) for n, y in np.loadtxt(path, ndmin=2)]
    if not kept:
        return []
    return [
        html.heading("Divergence along the answer"),
        html.note(
            "Mean between teacher and student at each token of the samples: "
            f"{divergence_in_words(config.divergence, config.model.llm.vocab_size)}."
        ),
        charts.lines(kept, x="token of the answer", y="divergence in nats"),
    ]


def divergence_in_words(c: ConfigDict, vocabulary: int) -> str:
    """Which divergence a run measures. c: config.divergence. vocabulary: number of its entries."""
    at = "" if c.temperature == 1 else f", at temperature {c.temperature:g}"
    if c.kind == "sampled_reverse_kl":
        return (
            "the loss at the sampled token whose gradient is the policy gradient of the reverse "
            f"KL(student ‖ teacher), over the whole vocabulary{at}"
        )
    kinds = {0: "forward KL(teacher ‖ student)", 1: "reverse KL(student ‖ teacher)"}
    kind = kinds.get(c.beta, f"generalised Jensen-Shannon divergence with β = {c.beta:g}")
    over = "the whole vocabulary"
    if 0 < c.top_k < vocabulary:
        whose = {"teacher": "teacher", "student": "student", "union": "teacher or the student"}
        rest = "one more for all others" if c.tail else "renormalised"
        over = f"the {c.top_k} most probable tokens of the {whose[c.support]}, {rest}"
    bounded = {"entry": "each vocabulary entry's part", "token": "the sum of each token"}
    most = f"; {bounded[c.clip_unit]} is at most {c.clip:g} nats" if c.clip else ""
    return f"the {kind} over {over}{at and at + ', times its square'}{most}"


def _samples(workdir: str, last: int, selection: Selection, split: str) -> list[str]:
    """Answers of the trained student with their images, wrong ones first."""
    folder = run_folder.evaluation(workdir, run_folder.evaluation_name(last, "none"))
    predictions = results.read_predictions(folder)
    names, images = selection.packer.names, _have_images(selection)
    words, items = wording.of_blocks(names), []
    for hit in (False, True):
        some = [p for p in predictions if bool(p["hit"]) == hit]
        chosen = shown_answers.spread(some, _MOST_SAMPLES, lambda p: p["benchmark"])
        items += [_sample(p, selection) for p in chosen]
    wrong = sum(not p["hit"] for p in predictions)
    shown = min(wrong, _MOST_SAMPLES)
    return [
        html.heading(f"Answers of the trained student, {words.alone}"),
        html.note(
            f"{len(items)} of {len(predictions)} {split} examples: {shown} of the {wrong} wrong "
            f"answers, then {len(items) - shown} right ones, evenly spaced in each task. "
            f"{_shown(names, images)} An answer that differs from the expected one can be right "
            "where several are, as for paths in a maze."
        ),
        html.samples(items),
    ]


def _shown(names: BlockNames, images: bool) -> str:
    """What of a sample the student sees. images: whether examples have problem images."""
    seen, more = _contents(names.student), ""
    if wording.of_blocks(names) == OF_VISUAL_THOUGHTS:
        more = "; the visual thoughts are shown for comparison"
    elif any(map(blocks_lib.holds_images, names.privileged)):
        more = "; other images are shown for comparison"
    return f"The student sees {wording.listed(seen, images=images)}{more}."


def _sample(prediction: dict, selection: Selection) -> html.Sample:
    """An answer with its images."""
    source, n = selection.tasks.index(prediction["benchmark"]), prediction["index"]
    shown = [
        html.image(image, size=160, caption=caption.removesuffix(" (real)"))
        for caption, image in selection.shown_images(source, n, "real")
    ]
    example = selection.examples.sources[source][n]
    return html.Sample(
        title=f"{prediction['benchmark']} {shown_answers.title(prediction)}",
        hit=bool(prediction["hit"]),
        parts=[
            html.row(*shown),
            html.paragraph(example.question),
            html.paragraph(prediction["prediction"]),
        ],
        note=shown_answers.note(prediction),
    )


def _seconds(folders: Mapping[str, str]) -> list[str]:
    """Where the time of the run and of its arms went, in seconds."""
    times = {
        name: json_files.read(run_folder.time(path), fix="delete it")
        for name, path in folders.items()
        if os.path.exists(run_folder.time(path))
    }
    phases = list(dict.fromkeys(phase for time in times.values() for phase in time))
    cells = [[phase, *(time.get(phase) for time in times.values())] for phase in phases]
    waited = [_waiting(folders[name]) for name in times]
    cells.append(["the device waited between steps, %", *waited])
    return [
        html.heading("Where the time went"),
        html.table(["phase, seconds", *times], cells),
        html.note(
            "All commands of the run; arms run beside it where there are cores for them. The last "
            "row is the share of the steps' time in which the device waited for input, a "
            "checkpoint, or the host."
        ),
    ]


def _waiting(folder: str) -> float | None:
    """Per cent of the steps' time of a run in which the device waited; None if nothing says."""
    share = clock.waiting(metrics.read(run_folder.metrics(folder)))
    return None if share is None else 100 * share


def _pages(workdir: str) -> list[str]:
    """Links to the pages of the run's evaluations and analyses."""
    found = [(name, os.path.relpath(page, workdir)) for name, page in _found_pages(workdir)]
    return [html.heading("More pages"), html.links(found)] if found else []


def _found_pages(workdir: str) -> list[tuple[str, str]]:
    """(name, path) of the pages of the run's evaluations and analyses."""
    found = []
    for folder in (run_folder.evaluations(workdir), run_folder.diagnosis(workdir, "")):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        pages = [(name, os.path.join(folder, name, run_folder.PAGE)) for name in names]
        found += [(name, page) for name, page in pages if os.path.exists(page)]
    return found
