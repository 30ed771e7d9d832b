"""Prompt and images of a public table's question, as in the public harness."""

import base64
import io
import pathlib
import re

from PIL import Image

from opsd_jax.evaluation.tables import KINDS, TableRow, is_missing
from opsd_jax.images import open_rgb


def images(row: TableRow, cache: str = "lossless") -> list[Image.Image]:
    """The row's images as Pillow RGB images, in order; transparency is dropped, not blended.

    Args:
      cache: "lossless": as they are. "jpeg75": as they come out of the harness's files, which keep
        a single image as NAME.jpg, JPEG of quality 75 and halved chroma, and lists without loss. A
        file named by `image_path` alone is not such a copy and stays as it is.
    Raises:
      ValueError: names file, row and column of a cell that holds no image.
    """

    if cache not in ("lossless", "jpeg75"):
        raise ValueError(f"cache is {cache!r}: choose 'lossless' or 'jpeg75'")
    found = []
    for k, source in enumerate(row.images):
        try:
            data = source if isinstance(source, pathlib.Path) else _decode(source)
            image = open_rgb(data, transparency="drop")
        except ValueError as e:
            column = "image_path" if isinstance(source, pathlib.Path) else "image"
            raise ValueError(
                f"{row.file}: row {row.index}, column {column}, image {k}: {e} (or download the "
                "file again)"
            ) from e
        if cache == "jpeg75" and row.stored and row.stored[k].lower().endswith((".jpg", ".jpeg")):
            stored = io.BytesIO()
            image.save(stored, "JPEG", quality=75, subsampling="4:2:0")
            image = Image.open(stored).convert("RGB")
        found.append(image)
    return found


def _decode(text: str) -> bytes:
    """The bytes of a base64 text.

    Also in the forms that other tools write: after "data:image/png;base64,", as Python's b'...',
    with the alphabet for URLs, without padding.
    """
    text = "".join(text.split())
    text = re.sub(r"^data:[\w/+.-]*;base64,", "", text)
    text = re.sub(r"""^b(['"])(.*)\1$""", r"\2", text)
    padded = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    padded += "=" * (-len(padded) % 4)
    try:
        return base64.b64decode(padded, validate=True)
    except ValueError as e:
        raise ValueError(f"broken base64 text of {len(text):,} characters ({e}): replace it") from e


def messages(row: TableRow) -> list[int | str]:
    """The parts of the prompt in order.

    A number is the image at that place in `images(row)`, from 0; a text is text.

    Multiple choice: the images, then hint, question and options. CV-Bench and charts: the images,
    then the table's own text. Mazes: the question cut at <IMAGE-n> (n from 1) and <TEST-IMAGE> (the
    last image); markers out of range vanish, images without a marker are not shown; a question
    without markers follows its images.
    A missing question is printed as "nan".
    """
    places, cells = list(range(len(row.images))), row.cells
    kind = KINDS[row.name]
    if kind in ("mcq", "circular"):
        text = "" if is_missing(cells.get("hint")) else f"Hint: {cells['hint']}\n"
        text += f"Question: {cells['question']}\n"
        if row.options:
            text += "Options:\n" + "".join(
                f"{letter}. {option}\n" for letter, option in row.options.items()
            )
            text += "Please select the correct answer from the options above. \n"
        return [*places, text]
    text = str(cells["prompt" if kind == "cvbench" else "question"])
    if kind != "vsp" or ("<IMAGE-" not in text and "<TEST-IMAGE>" not in text):
        return [*places, text]
    parts: list[int | str] = []
    for piece in re.split(r"(<IMAGE-\d+>|<TEST-IMAGE>)", text):
        if marker := re.fullmatch(r"<IMAGE-(\d+)>|<TEST-IMAGE>", piece):
            k = int(marker[1]) - 1 if marker[1] else len(places) - 1
            parts += [k] if k in places else []
        elif piece:
            parts.append(piece)
    return parts


def conversation(parts: list[int | str]) -> tuple[tuple[str, ...], list[int]]:
    """(texts, places) of `messages` as a user's turn in chat form, with images where they are.

    texts: the texts around the images, one more than images; an empty one between neighbours.
    places: those of the images in `images(row)`, in order.
    """
    texts, places = [""], []
    for part in parts:
        if isinstance(part, int):
            texts.append("")
            places.append(part)
        else:
            texts[-1] += part
    return tuple(texts), places


def wrapper(parts: list[int | str]) -> tuple[str, list[int]]:
    """(text, places) that the harness's wrapper makes of `messages`.

    All images go first, then one text.

    The text is the parts joined by blanks, where the j-th image (from 1, repeats counted) has
    become "<img><|image_j|></img>"; places are those of the images in `images(row)`, in that order.

    Raises:
      ValueError: no image is left; the harness raises, too.
    """
    places = [part for part in parts if isinstance(part, int)]
    if not places:
        raise ValueError(
            f"a prompt without an image ({str(parts)[:80]}): correct the markers of the question"
        )
    tags = (f"<img><|image_{j}|></img>" for j in range(1, len(places) + 1))
    return " ".join(next(tags) if isinstance(part, int) else part for part in parts), places
