"""Files of answers: their texts, their generated images, an overview.

N.json     question, texts and names of images, number of tokens and seconds of answer N
N-K.png    its K-th generated image
N.png      question, texts and images in one image
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

_NAME = re.compile(r"\d+\.json|\d+(-\d+)?\.png")  # of a file that `write` makes


def earlier(directory: str) -> list[str]:
    """Paths of the files that an earlier `write` left in a folder, according to each N.json.

    Raises:
      ValueError: other files have such names. They would be taken for results, or be overwritten.
    """
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    names = [name for name in names if _NAME.fullmatch(name)]
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
            "names: answers are written under such names, so give another folder, or delete them"
        )
    return [os.path.join(directory, name) for name in names]


def write(
    directory: str,
    questions: Sequence[tuple[Sequence[Image.Image], str]],
    answers: Sequence[interleave.Answer],
) -> list[str]:
    """Writes the files of each answer; returns the paths of the overviews, N.png.

    All files that an earlier call left in the folder are replaced.

    questions: (images, text) of each.
    """
    paths.check_given("--out", directory)
    os.makedirs(directory, exist_ok=True)
    for path in earlier(directory):
        os.remove(path)
    overviews = []
    for n, ((images, text), answer) in enumerate(zip(questions, answers)):
        # "picture" and "drawing" are the keys of earlier versions, whose files `earlier` reads.
        steps, count = [], 0
        for part in answer.parts:
            if isinstance(part, str):
                steps.append({"text": part})
                continue
            steps.append({"picture": f"{n}-{count}.png"})
            save_image(part, os.path.join(directory, steps[-1]["picture"]))
            count += 1
        record = {
            "question": text,
            "steps": steps,
            "tokens": answer.tokens,
            "seconds": {"text": answer.text_seconds, "drawing": answer.image_seconds},
        }
        files.write_json(os.path.join(directory, f"{n}.json"), record)
        overviews.append(os.path.join(directory, f"{n}.png"))
        save_image(montage.column([*images, text, *answer.parts]), overviews[-1])
    return overviews


def save_image(image: Image.Image | np.ndarray, path: str) -> None:
    """Writes a Pillow image, or uint8 [H, W, 3], as PNG, atomically."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with files.replacing(path) as f:
        image.save(f, format="PNG")


def as_harness(answer: interleave.Answer) -> str:
    """An answer in the form in which the public harness keeps answers with images."""
    parts, rounds = [], 0
    for part in answer.parts:
        if isinstance(part, str):
            parts.append(f"Round_{rounds}:\n{part}")
            rounds += 1
        else:
            parts.append("[Image]")
    return "\n".join(parts)
