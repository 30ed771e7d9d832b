"""Files of generated answers: their texts, their images, an overview.

N.json     question, steps, tokens and seconds of answer N
N-K.png    its K-th generated image
N.png      all of it in one image
"""

import os
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from opsd_jax import interleave
from opsd_jax.evaluation import montage
from opsd_jax.inputs import json_files, paths
from opsd_jax.runtime import files

_RESULT = re.compile(r"\d+\.json|\d+(-\d+)?\.png")  # names of the files that `write` makes


def earlier(directory: str) -> list[str]:
    """Paths of the files that an earlier `write` left in a folder, as its N.json list them.

    Raises:
      ValueError: other files have such names. They would be taken for results, or be lost.
    """
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    names = [name for name in names if _RESULT.fullmatch(name)]
    known = set()
    for name in (n for n in names if n.endswith(".json")):
        try:
            steps = json_files.read(os.path.join(directory, name))["steps"]
            images = {step["picture"] for step in steps if "picture" in step}
        except (ValueError, KeyError, TypeError):
            continue  # not a file of `write`
        known |= {name, f"{name[:-5]}.png", *images}
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"--out={directory} holds {', '.join(strange[:5])}, which no earlier answer there "
            "names: results have such names, so give another folder, or delete them"
        )
    return [os.path.join(directory, name) for name in names]


def write(
    directory: str,
    questions: Sequence[interleave.Question],
    traces: Sequence[interleave.Trace],
) -> list[str]:
    """Writes the files of each answer; returns the paths of the overviews, N.png.

    All results that an earlier call left in the folder are replaced.
    """
    paths.check_given("--out", directory)
    os.makedirs(directory, exist_ok=True)
    for path in earlier(directory):
        os.remove(path)
    overviews = []
    for n, ((shown, question), trace) in enumerate(zip(questions, traces)):
        steps, images = [], 0
        for step in trace.steps:
            if isinstance(step, str):
                steps.append({"text": step})
                continue
            steps.append({"picture": f"{n}-{images}.png"})
            save_image(step, os.path.join(directory, steps[-1]["picture"]))
            images += 1
        record = {
            "question": question,
            "steps": steps,
            "tokens": trace.tokens,
            "seconds": trace.seconds,
        }
        files.write_json(os.path.join(directory, f"{n}.json"), record)
        overviews.append(os.path.join(directory, f"{n}.png"))
        save_image(montage.column([*shown, question, *trace.steps]), overviews[-1])
    return overviews


def save_image(image: Image.Image | np.ndarray, path: str) -> None:
    """Writes a Pillow image, or uint8 [H, W, 3], as PNG, atomically."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with files.replacing(path) as f:
        image.save(f, format="PNG")


def as_harness(trace: interleave.Trace) -> str:
    """A trace in the form in which the public harness keeps answers with images."""
    parts, rounds = [], 0
    for step in trace.steps:
        if isinstance(step, str):
            parts.append(f"Round_{rounds}:\n{step}")
            rounds += 1
        else:
            parts.append("[Image]")
    return "\n".join(parts)
