"""Tables of several summaries: scores, means over seeds, the cost of image generation."""

import collections
import os
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from opsd_jax.evaluation import tables
from opsd_jax.evaluation.results import counted, percent, read_summary
from opsd_jax.runtime import files, run_folder

_MOST_IN_TERMINAL = 6  # results that a terminal shows all of


def write_table(workdir: str, new: Sequence[str] = ()) -> str:
    """Writes W/eval/summary.md, the tables of all summaries in W/eval; returns its text.

    new: names of the summaries that a command has just made. Where there are many others, the text
      that is returned has these alone, and says where all are.
    """
    summaries = read_all(workdir)
    text = _tables(summaries, summaries, summaries)
    path = os.path.join(run_folder.evaluations(workdir), "summary.md")
    files.write(path, text, primary=jax.process_index() == 0)
    shown = {name: summaries[name] for name in new if name in summaries}
    if not shown or len(summaries) <= max(len(shown), _MOST_IN_TERMINAL):
        return text
    found = []
    for asked in (_asked_in_any_seed, _asked_alike):  # what they are compared with
        wanted = [asked(summary) for summary in shown.values()]
        found.append({name: s for name, s in summaries.items() if asked(s) in wanted})
    return f"{_tables(shown, *found)}\nall {len(summaries)} results of {workdir}: {path}\n"


def _tables(scored: dict[str, dict], in_seeds: dict[str, dict], in_modes: dict[str, dict]) -> str:
    """The three tables, each of some summaries by name; one without lines is left out."""
    return "\n\n".join(filter(None, [table(scored), seeds(in_seeds), speeds(in_modes)])) + "\n"


def read_all(workdir: str) -> dict[str, dict]:
    """{name: content of its summary.json} of the finished evaluations in W/eval, by name.

    A summary that cannot be read is left out, with a warning.
    """
    folder, summaries = run_folder.evaluations(workdir), {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name, run_folder.SUMMARY)
        if os.path.exists(path):
            try:
                summary = read_summary(path)
            except (OSError, ValueError) as error:
                logging.warning("an evaluation is left out: %s", error)
                continue
            if "benchmarks" in summary:  # a summary of the KL has none
                summaries[name] = summary
    return summaries


def table(summaries: dict[str, dict]) -> str:
    """Markdown table of summaries by name: score with its 95 % interval, tokens, seconds.

    Public benchmarks also have the paper's scores, and sampled answers pass@k.
    """
    found = [(name, b) for s in summaries.values() for name, b in s["benchmarks"].items()]
    public = any(name in tables.PAPER for name, _ in found)
    sampled = any("pass_at_k" in b for _, b in found)
    accuracy = "accuracy (first answer)" if sampled else "accuracy"
    head = ["run", "task", accuracy, "95 % interval", "n", "tokens", "s/sample"]
    head += ["pass@k"] if sampled else []
    head += ["paper: ThinkMorph", "paper: Visual-OPSD"] if public else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, summary in summaries.items():
        for task, b in summary["benchmarks"].items():
            low, high = b["interval_95"]
            seconds = "–" if b["seconds_per_sample"] is None else f"{b['seconds_per_sample']:.4f}"
            line = (
                f"| {name} | {task} | {percent(b):.1f} % | {100 * low:.1f}–{100 * high:.1f} "
                f"| {counted(b)} | {b['mean_output_tokens']:.1f} | {seconds} |"
            )
            if sampled:
                shares = b.get("pass_at_k", {}).items()
                line += f" {', '.join(f'{k}: {100 * x:.1f} %' for k, x in shares)} |"
            if public:
                teacher, student = tables.PAPER.get(task, (None, None))
                line += f" {teacher} | {student} |" if teacher else " | |"
            lines.append(line)
    return "\n".join(lines)


def _model_of(summary: dict) -> str:
    """Fingerprint of the weights of a summary; the checkpoint's path if it has none."""
    return summary.get("weights") or summary["checkpoint"]


def seeds(summaries: dict[str, dict]) -> str:
    """Markdown table of mean and standard deviation of summaries that differ only in the seed."""
    groups = collections.defaultdict(dict)
    for summary in summaries.values():
        alike = _asked_in_any_seed(summary)
        for task, b in summary["benchmarks"].items():
            groups[task, counted(b), *map(str, [*alike, b.get("rows")])].setdefault(
                summary["seed"], (summary, b)
            )
    lines = []
    for (task, n, _, protocol, *_), by_seed in groups.items():
        if len(by_seed) > 1:
            scores = [percent(b) for _, b in by_seed.values()]
            checkpoint = next(iter(by_seed.values()))[0]["checkpoint"]
            lines.append(
                f"| {protocol} | {os.path.basename(checkpoint)} | {task} | {np.mean(scores):.1f} ± "
                f"{np.std(scores, ddof=1):.1f} % | {', '.join(map(str, sorted(by_seed)))} | {n} |"
            )
    head = "| protocol | checkpoint | task | accuracy, mean ± standard deviation | seeds | n |"
    return "\n".join([head, "|---" * 6 + "|", *lines]) if lines else ""


def speeds(summaries: dict[str, dict]) -> str:
    """Markdown table of how much longer image generation takes than answering in text.

    It compares pairs of summaries that differ only in the mode.
    """
    generated = {k: s for k, s in summaries.items() if s.get("mode") == "generated"}
    in_text = {k: s for k, s in summaries.items() if s.get("mode") == "none"}
    lines = []
    for name, slow in generated.items():
        for other, fast in in_text.items():
            if _asked_alike(slow) == _asked_alike(fast):
                lines += _speed_lines(name, slow["benchmarks"], other, fast["benchmarks"])
    if not lines:
        return ""
    head = (
        "| task | image generation | text alone | images per sample | s/sample | s/sample | "
        "speed-up (paper: 14.3x) | accuracy gained |"
    )
    return "\n".join([head, "|---" * 8 + "|", *lines])


def _asked_in_any_seed(summary: dict) -> list:
    """What two summaries that differ only in the seed have in common."""
    return [_model_of(summary), *(summary.get(key) for key in ("protocol", "split"))]


def _asked_alike(summary: dict) -> list:
    """What two summaries that differ only in the mode have in common."""
    return [_model_of(summary), *(summary.get(key) for key in ("split", "asked_by", "seed"))]


def _speed_lines(name: str, slow: dict, other: str, fast: dict) -> list[str]:
    """Lines of `speeds` for the benchmarks of two summaries that were asked the same examples."""
    lines = []
    for task in sorted(set(slow) & set(fast)):
        long, short = slow[task], fast[task]
        if long.get("rows") != short.get("rows"):
            continue
        if long["seconds_per_sample"] and short["seconds_per_sample"]:
            ratio = long["seconds_per_sample"] / short["seconds_per_sample"]
            gain = percent(short) - percent(long)
            lines.append(
                f"| {task} | {name} | {other} | {long.get('pictures_per_sample', 0):.2f} "
                f"| {long['seconds_per_sample']:.4f} | {short['seconds_per_sample']:.4f} "
                f"| {ratio:.1f}x | {f'{gain:+.1f}'.replace('-', '−')} |"
            )
    return lines
