"""The files that an analysis writes: report.html, summary.json and arrays."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import html
from opsd_jax.run import cautions as cautions_lib
from opsd_jax.runtime import files, provenance, run_folder

_WEIGHTS = {  # keys of a summary, and what the page calls them
    "checkpoint": "weights",
    "teacher": "weights of the teacher",
    "base": "weights before training",
    "student": "weights after training",
}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
      title: of its page, or of its section on a page of several.
      summary: content of summary.json.
      parts: makes the HTML parts of the page, with headings of level 2; for the first process only.
      words: the main numbers as lines for the terminal.
    """

    title: str
    summary: dict
    parts: Callable[[], list[str]]
    words: Sequence[str] = ()


def write(folder: str, analysis: Analysis, cautions: Sequence[str] = ()) -> None:
    """Writes report.html and, last of all, summary.json, by the first process only.

    cautions: of the run, see `cautions_lib.of_run`.
    """
    if jax.process_index() == 0:
        above = [facts(analysis.summary), html.cautions(cautions, cautions_lib.OF_THE_RUN)]
        page = html.page(analysis.title, *above, *analysis.parts())
        files.write(os.path.join(folder, run_folder.PAGE), page)
        write_summary(folder, analysis.summary)


def write_summary(folder: str, summary: dict) -> None:
    """Writes summary.json, by the first process only."""
    path = os.path.join(folder, run_folder.SUMMARY)
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    files.write(path, text, primary=jax.process_index() == 0)


def write_lines(folder: str, name: str, records: list[dict]) -> None:
    """Writes one JSON object per line, by the first process only."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    files.write(os.path.join(folder, name), text, primary=jax.process_index() == 0)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as .npz, by the first process only."""
    if jax.process_index() == 0:
        with files.replacing(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def facts(summary: dict) -> str:
    """HTML of what a page is about: command, weights, examples, seed."""
    return html.facts(
        [
            *provenance.facts(summary["command"]),
            *((name, f"`{summary[key]}`") for key, name in _WEIGHTS.items() if key in summary),
            ("examples", _examples(summary)),
            ("split", f"`{summary['split']}`"),
            ("seed", str(summary["seed"])),
        ]
    )


def _examples(summary: dict) -> str:
    """The examples of each task: "maze: all 512", or a random subset."""
    return "\n".join(
        f"{task}: "
        + (
            f"a random subset, {r['drawn']} of {r['of']}, chosen with seed {r['seed']}"
            if r["drawn"] < r["of"]
            else f"all {r['of']}"
        )
        for task, r in summary["rows"].items()
    )


def evaluation_link(name: str, text: str) -> html.Part:
    """A link from the page of an analysis to that of an evaluation in W/eval."""
    return html.link(text, os.path.join("..", run_folder.evaluation("..", name), run_folder.PAGE))


def images(diagnosis: Diagnosis, source: int, number: int, mode: str, size: int = 160) -> list[str]:
    """HTML of an example's problem images, and of what a mode shows as its visual thoughts."""
    shown = diagnosis.selection.shown_images(source, number, mode)
    return [
        html.image(image, size=size, caption=caption.removesuffix(f" ({mode})"))
        for caption, image in shown
    ]
