"""Jigsaw assembly: put the pieces of a shuffled image back in order.

    problem image    true image        visual thought: the      answer: pieces from
    A B              C A               true image, each         top left to bottom right
    C D              D B               piece in its frame       "C A D B"

A piece is named after its place in the problem image, A at the top left. It has a frame in the
colour of its name, and the frame moves with it into the visual thought. At least one piece is
always out of place.
"""

from typing import Any

import numpy as np

from opsd_jax.tasks.tiles import PALETTE, assemble

TASK = "Jigsaw_Assembly"
LETTERS = "ABCDEF"
WORDS = (*"Order of the pieces match edges order".split(), *LETTERS)

_DEFAULT = {"grid": 4, "cell": 8, "rows": 2, "columns": 2, "frame": 2}  # frame: its width in pixels
DIFFICULTY = {
    "easy": _DEFAULT | {"frame": 1},
    "default": _DEFAULT,
    "hard": _DEFAULT | {"grid": 6, "columns": 3},
}

_LEVELS = 8  # values of each colour channel


def make(
    rng: np.random.Generator, *, grid: int, cell: int, rows: int, columns: int, frame: int
) -> tuple[bytes, dict[str, Any]]:
    """Makes one random image and shuffles its pieces.

    The image is a blend of four corner colours with a disk on it. Its parameters are whole numbers
    on a coarse grid, so that two different images differ visibly.

    Args:
      grid, cell: their product is the side of the image in pixels.
      rows, columns: of pieces.
      frame: width of a piece's frame, in pixels.
    Returns:
      key: the parameters of the image. The order of the pieces is left out, so that an image never
        occurs in another split in another order.
      fields of `TaskExample` that differ between examples.
    Raises ValueError when the settings do not fit together.
    """
    side, count = grid * cell, rows * columns
    if not 3 <= count <= len(LETTERS) or side % rows or side % columns:
        raise ValueError(
            f"jigsaw of {rows} x {columns} pieces needs 3 to {len(LETTERS)} pieces and an image "
            f"side grid * cell = {side} that both numbers divide"
        )
    if not 0 < 2 * frame < side // max(rows, columns):
        raise ValueError(
            f"jigsaw frame={frame} must be at least 1 and leave space inside the pieces"
        )
    while True:
        colors = rng.integers(_LEVELS, size=(5, 3))  # four corners and the disk
        disk = rng.integers((3, 3, 2), (6, 6, 4))  # y, x and radius in eighths of the side
        pieces = _cut(_paint(colors, disk, side), rows, columns)
        if len({piece.tobytes() for piece in pieces}) == count:  # else the order would be ambiguous
            break
    order = np.arange(count)  # the piece named LETTERS[i] belongs to place order[i]
    while (order == np.arange(count)).all():
        order = rng.permutation(count)
    name = np.argsort(order)  # place -> name of its piece
    color = PALETTE[name][:, None, None]
    pieces[:, :frame], pieces[:, -frame:] = color, color
    pieces[:, :, :frame], pieces[:, :, -frame:] = color, color
    answer = " ".join(LETTERS[index] for index in name)

    def joined(pieces: np.ndarray) -> np.ndarray:  # [place, h, w, 3] -> [side, side, 3]
        return assemble(pieces.reshape(rows, columns, *pieces.shape[1:]))

    return bytes(np.append(colors, disk).tolist()), {
        "question": "Order of the pieces?",
        "answer": answer,
        "problem_image": joined(pieces[order]),
        "thoughts": ("match edges", f"order {answer}"),
        "visual_thoughts": (joined(pieces),),
        "metadata": {"answer": answer},
    }


def fault(metadata: dict) -> str | None:
    """What `score` misses in the metadata; None if nothing."""
    return (
        None
        if isinstance(metadata.get("answer"), str)
        else f"has no text 'answer', only {metadata.get('answer')!r}"
    )


def score(metadata: dict, answer: str | None) -> bool:
    """True if the answer lists the pieces in the gold order, separated by spaces."""
    return answer is not None and answer.split() == metadata["answer"].split()


def _paint(colors: np.ndarray, disk: np.ndarray, side: int) -> np.ndarray:
    """The image of the given colours and disk, uint8 [side, side, 3].

    Args:
      colors: levels of the four corners and the disk, int [5, 3].
      disk: y, x and radius, in eighths of the side.
    """
    colors = colors * (255 / (_LEVELS - 1))
    middle = (np.arange(side) + 0.5) / side
    down, right = middle[:, None, None], middle[None, :, None]
    top = colors[0] * (1 - right) + colors[1] * right
    bottom = colors[2] * (1 - right) + colors[3] * right
    image = top * (1 - down) + bottom * down
    inside = (down - disk[0] / 8) ** 2 + (right - disk[1] / 8) ** 2 <= (disk[2] / 8) ** 2
    return np.where(inside, colors[4], image).astype(np.uint8)


def _cut(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[H, W, 3] -> [rows * columns, H / rows, W / columns, 3], the inverse of `assemble`."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    return (
        image.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    )
