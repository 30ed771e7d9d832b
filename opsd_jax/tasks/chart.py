"""Chart refocus: read the height of one bar of a bar chart.

    problem image      question                              visual thought     answer
    | #     |          Height of the second highest bar?     all other bars     "n7"
    | # # # |                                                are grey

Heights are distinct whole numbers; there is one bar in each column of cells.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd_jax.tasks.tiles import COLOR_NAMES, PALETTE

TASK = "Chart_Refocus"
KINDS = {  # kind -> (rank from the highest bar, words of the question)
    "highest": (0, "highest"),
    "second": (1, "second highest"),
    "third": (2, "third highest"),
    "fourth": (3, "fourth highest"),
    "lowest": (-1, "lowest"),
}
WORDS = (
    *"Height of the bar look".split(),
    *KINDS,
    *COLOR_NAMES,
    *(f"n{height}" for height in range(1, 13)),
)

# `grid` is also the number of bars.
_DEFAULT = {"grid": 5, "cell": 8, "max_height": 9, "kinds": ("second", "third")}
DIFFICULTY = {
    "easy": _DEFAULT | {"kinds": ("highest", "lowest")},
    "default": _DEFAULT,
    "hard": _DEFAULT | {"grid": 6, "max_height": 12, "kinds": ("second", "third", "fourth")},
}

_GREY = (225, 225, 225)


def make(
    rng: np.random.Generator, *, grid: int, cell: int, max_height: int, kinds: Sequence[str]
) -> tuple[bytes, dict[str, Any]]:
    """Makes one random chart.

    Args:
      grid, cell: number of bars, and width of a bar's column in pixels.
      max_height: the largest height of a bar.
      kinds: those of KINDS that a question may have.
    Returns:
      key: the heights from left to right. Colours and question are left out, so that a chart never
        occurs in another split with other colours or another question.
      fields of `TaskExample` that differ between examples.
    Raises ValueError when the settings do not fit together.
    """
    side = grid * cell
    unit = (
        side - 2
    ) // max_height  # pixels; one line for the axis, at least one left free at the top
    if grid > min(len(PALETTE), max_height) or unit < 1:
        raise ValueError(
            f"chart settings grid={grid}, cell={cell}, max_height={max_height} do not fit: bars "
            f"have distinct colours (grid <= {len(PALETTE)}) and heights (grid <= max_height < "
            f"{side - 1} pixels)"
        )
    if not set(kinds) <= KINDS.keys():
        raise ValueError(f"chart kinds {tuple(kinds)} must be among {tuple(KINDS)}")
    heights = rng.permutation(max_height)[:grid] + 1
    colors = rng.permutation(len(PALETTE))[:grid]
    kind = kinds[int(rng.integers(len(kinds)))]
    rank, phrase = KINDS[kind]
    bar = np.argsort(-heights)[rank]

    def draw(bar_colors: np.ndarray) -> np.ndarray:  # [grid, 3] -> uint8 [side, side, 3]
        image = np.full((side, side, 3), 250, np.uint8)
        image[-1] = 0
        for column, (height, color) in enumerate(zip(heights, bar_colors, strict=True)):
            left = column * cell
            image[side - 1 - unit * height : side - 1, left + 1 : left + cell - 1] = color
        return image

    refocused = np.where(np.arange(grid)[:, None] == bar, PALETTE[colors], _GREY)
    answer = f"n{heights[bar]}"
    return bytes(heights.tolist()), {
        "question": f"Height of the {phrase} bar?",
        "answer": answer,
        "problem_image": draw(PALETTE[colors]),
        "thoughts": (f"look {kind}", f"{COLOR_NAMES[colors[bar]]} {answer}"),
        "visual_thoughts": (draw(refocused),),
        "metadata": {"answer": answer, "kind": kind, "heights": heights.tolist()},
    }


def fault(metadata: dict) -> str | None:
    """What `score` misses in the metadata; None if nothing."""
    return (
        None
        if isinstance(metadata.get("answer"), str)
        else f"has no text 'answer', only {metadata.get('answer')!r}"
    )


def score(metadata: dict, answer: str | None) -> bool:
    """True if the answer is the gold word ("n7")."""
    return answer is not None and answer.strip() == metadata["answer"]
