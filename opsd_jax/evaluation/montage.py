"""A column of texts and images as a single image."""

from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12  # pixels
_SIDE = 320  # pixels: the longer side of every image
_FONT_SIZE = 14


def column(items: Iterable[str | np.ndarray | Image.Image], width: int = 640) -> Image.Image:
    """A Pillow image of texts and images, one below the other.

    Args:
      items: texts, and images as Pillow images or uint8 [H, W, 3]. An image is scaled so that its
        longer side is 320 pixels.
      width: width of the result in pixels.
    """
    parts = [_text(item, width) if isinstance(item, str) else _image(item, width) for item in items]
    whole = Image.new("RGB", (width, sum(part.height for part in parts) + _MARGIN), "white")
    top = _MARGIN
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _text(content: str, width: int) -> Image.Image:
    font = ImageFont.load_default(_FONT_SIZE)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines, line = [], ""
    for char in "".join(c if c.isprintable() else " " for c in content):
        # A line breaks at any character: texts of a model may have no spaces.
        if draw.textlength(line + char, font=font) > width - 2 * _MARGIN:
            lines.append(line)
            line = ""
        line += char
    text = "\n".join([*lines, line])
    height = int(draw.multiline_textbbox((0, 0), text, font=font)[3]) + _MARGIN
    part = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(part).multiline_text((_MARGIN, 0), text, fill="black", font=font)
    return part


def _image(image: np.ndarray | Image.Image, width: int) -> Image.Image:
    shown = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    scale = _SIDE / max(shown.size)
    size = (max(1, round(shown.width * scale)), max(1, round(shown.height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    part = Image.new("RGB", (width, size[1] + _MARGIN), "white")
    part.paste(shown.resize(size, method), (_MARGIN, 0))
    return part
