"""Jigsaw assembly: put the pieces of a shuffled picture back in order.

    problem image    true picture      visual thought: the      answer: pieces from
    A B              C A               true picture, each       top left to bottom right
    C D              D B               piece in its frame       "C A D B"

A piece is named after where it lies in the problem image, A at the top left, and wears a frame of the colour
that belongs to the name; the frame moves with it into the visual thought. Some piece is always out of place.
"""

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

_LEVELS = 8  # of each colour channel


def make(rng: np.random.Generator, *, grid, cell, rows, columns, frame):
    """Draws one picture and shuffles it.

    The picture is a blend of four corner colours with a disk on it. Its parameters are whole numbers on a
    coarse lattice, so that two different pictures differ visibly.

    Returns:
      key: the parameters of the picture. The order of the pieces is left out, so that a picture never comes
        back in another split shuffled anew.
      fields of `TaskExample` that differ between rows.
    """
    side, count = grid * cell, rows * columns
    if not 3 <= count <= len(LETTERS) or side % rows or side % columns:
        raise ValueError(
            f"jigsaw of {rows} x {columns} pieces needs 3 to {len(LETTERS)} pieces and an image side "
            f"grid * cell = {side} that both numbers divide"
        )
    if not 0 < 2 * frame < side // max(rows, columns):
        raise ValueError(
            f"jigsaw frame={frame} must be at least 1 and leave room inside the pieces"
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

    def lay(pieces):  # [place, h, w, 3] -> [side, side, 3]
        return assemble(pieces.reshape(rows, columns, *pieces.shape[1:]))

    return bytes(np.append(colors, disk).tolist()), {
        "question": "Order of the pieces?",
        "answer": answer,
        "problem_image": lay(pieces[order]),
        "thoughts": ("match edges", f"order {answer}"),
        "visual_thoughts": (lay(pieces),),
        "metadata": {"answer": answer},
    }


def fault(metadata: dict) -> str | None:
    """What `score` lacks in the metadata; None if nothing."""
    return (
        None
        if isinstance(metadata.get("answer"), str)
        else f"has no text 'answer', only {metadata.get('answer')!r}"
    )


def score(metadata: dict, answer: str | None) -> bool:
    """True if the answer lists the pieces in the gold order, separated by spaces."""
    return answer is not None and answer.split() == metadata["answer"].split()


def _paint(colors: np.ndarray, disk: np.ndarray, side: int) -> np.ndarray:
    """Levels[4 corners + disk, 3] and (y, x, radius) in eighths -> uint8[side, side, 3]."""
    colors = colors * (255 / (_LEVELS - 1))
    middle = (np.arange(side) + 0.5) / side
    down, right = middle[:, None, None], middle[None, :, None]
    top = colors[0] * (1 - right) + colors[1] * right
    bottom = colors[2] * (1 - right) + colors[3] * right
    image = top * (1 - down) + bottom * down
    inside = (down - disk[0] / 8) ** 2 + (right - disk[1] / 8) ** 2 <= (disk[2] / 8) ** 2
    return np.where(inside, colors[4], image).astype(np.uint8)


def _cut(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[H, W, 3] -> [rows * columns, H / rows, W / columns, 3], the reverse of `assemble`."""
    height, width = image.shape[0] // rows, image.shape[1] // columns
    return (
        image.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    )
