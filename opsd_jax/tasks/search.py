"""Visual search: the colour of the object next to a named one.

    problem image        question                       visual thought        answer
    .  O  .   red O      color right of red square?     a black box around    "green"
    .  #  +   red #                                     the green +
    O  .  .   blue O

The named object is the only one with its colour and shape, and the question is about its neighbour:
the model has to find the object and then look next to it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd_jax.tasks.tiles import COLOR_NAMES, PALETTE, SHAPE_NAMES, assemble, cell_name, shape_masks

TASK = "Visual_Search"
RELATIONS = {  # relation -> (step to the target, words of the question)
    "left": ((0, -1), "left of"),
    "right": ((0, 1), "right of"),
    "above": ((-1, 0), "above"),
    "below": ((1, 0), "below"),
}
WORDS = (
    *"color of find target".split(),
    *RELATIONS,
    *COLOR_NAMES,
    *SHAPE_NAMES,
    *(cell_name(row, column) for row in range(5) for column in range(5)),
)

_DEFAULT = {"grid": 4, "cell": 8, "objects": 10, "relations": tuple(RELATIONS)}
DIFFICULTY = {
    "easy": _DEFAULT | {"objects": 7, "relations": ("left", "right")},
    "default": _DEFAULT,
    "hard": _DEFAULT | {"grid": 5, "objects": 16},
}


def make(
    rng: np.random.Generator, *, grid: int, cell: int, objects: int, relations: Sequence[str]
) -> tuple[bytes, dict[str, Any]]:
    """Makes one random scene.

    Args:
      grid, cell: cells along a side of the image, and pixels along a side of a cell.
      objects: number of objects.
      relations: those of RELATIONS that a question may have.
    Returns:
      key: the shape in each cell. Colours and question are left out, so that a scene never occurs
        in another split with other colours or another question.
      fields of `TaskExample` that differ between examples.
    Raises ValueError when the settings allow no scene.
    """
    if not 2 <= objects <= grid * grid:
        raise ValueError(
            f"search objects={objects} must be between 2 and grid * grid = {grid * grid}"
        )
    if not relations or not set(relations) <= RELATIONS.keys():
        raise ValueError(f"search relations {tuple(relations)} must be some of {tuple(RELATIONS)}")
    for _ in range(10_000):
        # codes: 0 is an empty cell, 1 + colour * shapes + shape an object.
        codes = np.zeros(grid * grid, np.int64)
        codes[rng.permutation(grid * grid)[:objects]] = 1 + rng.integers(len(_KINDS), size=objects)
        codes = codes.reshape(grid, grid)
        questions = _questions(codes, relations)
        if questions:
            break
    else:
        raise ValueError(
            f"no search scene has a question among 10,000 random scenes with grid={grid}, "
            f"objects={objects}, relations={tuple(relations)}; change the number of objects or "
            "allow more relations"
        )
    anchor, relation, target = questions[rng.integers(len(questions))]
    (anchor_color, anchor_shape), (color, shape) = (
        _KINDS[codes[anchor] - 1],
        _KINDS[codes[target] - 1],
    )

    tiles = _tiles(cell)[codes]
    image = assemble(tiles)
    box = tiles[target]  # a view: writing to it changes `tiles`, not `image`
    box[[0, -1]] = box[:, [0, -1]] = 0
    where = cell_name(*target)
    shapes = np.where(codes > 0, 1 + (codes - 1) % len(SHAPE_NAMES), 0)
    return shapes.astype(np.uint8).tobytes(), {
        "question": f"color {RELATIONS[relation][1]} {anchor_color} {anchor_shape}?",
        "answer": color,
        "problem_image": image,
        "thoughts": (f"find {anchor_color} {anchor_shape}", f"target {where} {color} {shape}"),
        "visual_thoughts": (assemble(tiles),),
        "metadata": {"answer": color, "relation": relation, "target": where},
    }


def fault(metadata: dict) -> str | None:
    """What `score` misses in the metadata; None if nothing."""
    return (
        None
        if isinstance(metadata.get("answer"), str)
        else f"has no text 'answer', only {metadata.get('answer')!r}"
    )


def score(metadata: dict, answer: str | None) -> bool:
    """True if the answer is the gold colour."""
    return answer is not None and answer.strip() == metadata["answer"]


_KINDS = tuple((color, shape) for color in COLOR_NAMES for shape in SHAPE_NAMES)


def _questions(
    codes: np.ndarray, relations: Sequence[str]
) -> list[tuple[tuple[int, int], str, tuple[int, int]]]:
    """All (anchor, relation, target) of a scene with a unique anchor and an object as target."""
    at = {
        (row, column): code
        for row, line in enumerate(codes.tolist())
        for column, code in enumerate(line)
        if code
    }
    kinds = list(at.values())
    found = []
    for (row, column), code in at.items():
        if kinds.count(code) > 1:
            continue
        for relation in relations:
            down, right = RELATIONS[relation][0]
            if (row + down, column + right) in at:
                found.append(((row, column), relation, (row + down, column + right)))
    return found


@functools.lru_cache
def _tiles(cell: int) -> np.ndarray:
    """Images of the empty cell and of every shape in every colour, uint8 [code, cell, cell, 3]."""
    masks = shape_masks(cell)[None, ..., None]  # [1, shape, cell, cell, 1]
    objects = np.where(masks, PALETTE[:, None, None, None], np.uint8(245)).reshape(
        -1, cell, cell, 3
    )
    return np.concatenate([np.full((1, cell, cell, 3), 245, np.uint8), objects])
