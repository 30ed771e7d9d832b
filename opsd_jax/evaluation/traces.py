"""Files of one generated answer: its texts, its images, a page."""

import os
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opsd_jax import interleave
from opsd_jax.inputs import json_files, paths
from opsd_jax.runtime import files

_RESULT = re.compile(r"\d+\.json|\d+(-\d+)?\.png")  # files that `write` leaves


def earlier(directory: str) -> list[str]:
    """The files in a folder that an earlier `write` left there, by its N.json.

    Raises ValueError for other files of such names: they would be taken for results, or be lost.
    """
    names = (
        sorted(n for n in os.listdir(directory) if _RESULT.fullmatch(n))
        if os.path.isdir(directory)
        else []
    )
    known = set()
    for name in (n for n in names if n.endswith(".json")):
        try:
            steps = json_files.read(os.path.join(directory, name))["steps"]
            known |= {
                name,
                f"{name[:-5]}.png",
                *(step["picture"] for step in steps if "picture" in step),
            }
        except (ValueError, KeyError, TypeError):
            pass  # not one of ours
    if strange := [name for name in names if name not in known]:
        raise ValueError(
            f"--out={directory} holds {', '.join(strange[:5])}, which no earlier answer there names: results have "
            "such names, so give another folder, or delete them"
        )
    return [os.path.join(directory, name) for name in names]


def write(directory: str, questions, traces) -> list[str]:
    """Writes each trace: N-K.png for its pictures, N.json, and N.png, a page with all of it. Returns the pages.

    Results that an earlier call left in the folder are replaced, all of them.
    """
    paths.check_given("--out", directory)
    os.makedirs(directory, exist_ok=True)
    for path in earlier(directory):
        os.remove(path)
    pages = []
    for n, ((pictures, question), trace) in enumerate(zip(questions, traces)):
        steps = []
        for step in trace.steps:
            if isinstance(step, str):
                steps.append({"text": step})
            else:
                steps.append({"picture": f"{n}-{len([s for s in steps if 'picture' in s])}.png"})
                save_image(step, os.path.join(directory, steps[-1]["picture"]))
        record = {
            "question": question,
            "steps": steps,
            "tokens": trace.tokens,
            "seconds": trace.seconds,
        }
        files.write_json(os.path.join(directory, f"{n}.json"), record)
        pages.append(os.path.join(directory, f"{n}.png"))
        save_image(page([*pictures, question, *trace.steps]), pages[-1])
    return pages


def save_image(picture, path: str) -> None:
    """Writes a Pillow image, or uint8 [H, W, 3], as PNG, atomically."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with files.replacing(path) as f:
        picture.save(f, format="PNG")


def as_harness(trace: interleave.Trace) -> str:
    """A trace in the form in which the public harness keeps answers with pictures."""
    parts, rounds = [], 0
    for step in trace.steps:
        if isinstance(step, str):
            parts.append(f"Round_{rounds}:\n{step}")
            rounds += 1
        else:
            parts.append("[Image]")
    return "\n".join(parts)


def page(items, width: int = 640):
    """A Pillow image of texts and pictures one below the other; pictures are shown at up to 320 pixels a side."""
    margin, font, parts = 12, ImageFont.load_default(14), []
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    for item in items:
        if isinstance(item, str):
            lines, line = [], ""
            for char in "".join(
                c if c.isprintable() else " " for c in item
            ):  # wraps anywhere: traces may have no spaces
                if draw.textlength(line + char, font=font) > width - 2 * margin:
                    lines.append(line)
                    line = ""
                line += char
            text = "\n".join([*lines, line])
            part = Image.new(
                "RGB",
                (width, draw.multiline_textbbox((0, 0), text, font=font)[3] + margin),
                "white",
            )
            ImageDraw.Draw(part).multiline_text((margin, 0), text, fill="black", font=font)
        else:
            shown = Image.fromarray(item) if isinstance(item, np.ndarray) else item
            scale = 320 / max(shown.size)
            size = tuple(max(1, round(s * scale)) for s in shown.size)
            shown = shown.resize(
                size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
            )
            part = Image.new("RGB", (width, size[1] + margin), "white")
            part.paste(shown, (margin, 0))
        parts.append(part)
    whole = Image.new("RGB", (width, sum(p.height for p in parts) + margin), "white")
    at = margin
    for part in parts:
        whole.paste(part, (0, at))
        at += part.height
    return whole
