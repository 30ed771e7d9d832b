"""The files that an analysis writes: report.html, summary.json and arrays."""

import json
import os
from collections.abc import Callable, Mapping

import jax
import numpy as np

from opsd_jax.diagnose.selection import Diagnosis
from opsd_jax.evaluation import html
from opsd_jax.runtime import files, run_folder

Page = tuple[str, list[str]]  # title, HTML parts


def write(folder: str, summary: dict, page: Callable[[dict], Page]) -> Page:
    """Writes report.html and, last of all, summary.json, by the first process only.

    Args:
      page: makes the page of the summary; called by the first process only.

    Returns:
      The page; an empty one in other processes.
    """
    if jax.process_index():
        return "", []
    title, parts = page(summary)
    files.write(os.path.join(folder, run_folder.PAGE), html.page(title, *parts))
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    files.write(os.path.join(folder, run_folder.SUMMARY), text)
    return title, parts


def write_lines(folder: str, name: str, records: list[dict]) -> None:
    """Writes one JSON object per line, by the first process only."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    files.write(os.path.join(folder, name), text, primary=jax.process_index() == 0)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name as .npz, by the first process only."""
    if jax.process_index() == 0:
        with files.replacing(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def examples_text(summary: dict) -> str:
    """The split and the examples of a summary.

    Such as "test, 128 of 512 examples chosen at random with seed 0".
    """
    parts = []
    for task, r in summary["rows"].items():
        name = "" if len(summary["rows"]) == 1 else f"{task}: "
        chosen = f"{r['drawn']} of {r['of']} examples chosen at random with seed {r['seed']}"
        parts.append(name + (chosen if r["drawn"] < r["of"] else f"all {r['of']} examples"))
    return f"{summary['split']}, {'; '.join(parts)}"


def images(diagnosis: Diagnosis, source: int, number: int) -> str:
    """HTML of an example's problem image and visual thoughts, side by side."""
    shown = diagnosis.selection.shown_images(source, number, "real")
    return html.row(*(html.image(image, size=160, caption=caption) for caption, image in shown))
