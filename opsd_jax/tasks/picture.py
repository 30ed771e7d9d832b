"""Contact sheets: what the rows look like to a person."""

import os
import textwrap
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont, ImageOps

from opsd_jax.runtime import files
from opsd_jax.tasks.example import TaskExample

_SCALE, _GAP, _LINE, _LETTER = (
    4,
    12,
    13,
    6,
)  # enlargement; pixels between pictures, of a line, of a letter


def contact_sheet(rows: Iterable[TaskExample], path: str | os.PathLike, columns: int = 4) -> None:
    """Saves one picture that shows each row: problem image and visual thoughts, enlarged, above the texts."""
    entries = []
    for row in rows:
        pictures = [Image.fromarray(image) for image in (row.problem_image, *row.visual_thoughts)]
        pictures = [
            ImageOps.scale(picture, _SCALE, Image.Resampling.NEAREST) for picture in pictures
        ]
        width = sum(p.width + _GAP for p in pictures)
        texts = [f"{row.pid}: {row.question}", *row.thoughts, f"answer: {row.answer}"]
        lines = [line for text in texts for line in textwrap.wrap(text, width // _LETTER)]
        entries.append((pictures, lines, width))
    if not entries:
        raise ValueError(f"no rows for the contact sheet {path}")
    width = max(width for _, _, width in entries) + _GAP
    pictures_height = max(p.height for pictures, _, _ in entries for p in pictures) + _GAP
    height = pictures_height + _LINE * max(len(lines) for _, lines, _ in entries) + _GAP

    columns = min(columns, len(entries))
    sheet = Image.new("RGB", (columns * width, -(-len(entries) // columns) * height), "grey")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, (pictures, lines, _) in enumerate(entries):
        left, top = index % columns * width + _GAP, index // columns * height + _GAP
        for number, line in enumerate(lines):
            draw.text(
                (left, top + pictures_height - _GAP // 2 + number * _LINE), line, "white", font
            )
        for picture in pictures:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
    with files.replacing(path) as file:
        sheet.save(file, "PNG")
