"""Spatial navigation: cross a frozen lake from the start to the goal without falling into a hole.

    problem image          visual thought         answer
    S . O    green S       the same with a red    "D R R"
    . . G    yellow flag   line S - . - . - G

The n x n lake is anywhere inside the grid x grid cells of the image. Every safe path is right.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd_jax.tasks.tiles import assemble, cell_axes, cell_name

TASK = "Spatial_Navigation"
MOVES = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
WORDS = (
    *"Find a safe path start goal holes none".split(),
    *MOVES,
    *(cell_name(row, column) for row in range(5) for column in range(5)),
)

# `sizes` are equally likely, so a size named twice is twice as frequent. `min_moves` and
# `max_moves` bound the length of the shortest path. Up to symmetry there are only 179
# three-by-three lakes of the default kind. Validation and test, where none occurs twice, hold 14
# and 20 of them and are four-by-four otherwise, while 30 % of a train split of 4,000 are
# three-by-three. Report accuracy by size (the length of metadata["map"]) where it matters.
_DEFAULT = {
    "grid": 4,
    "cell": 8,
    "sizes": (3, 4),
    "hole_probability": 0.3,
    "min_moves": 3,
    "max_moves": 8,
}
DIFFICULTY = {
    "easy": _DEFAULT | {"min_moves": 2, "max_moves": 4},
    "default": _DEFAULT,
    "hard": _DEFAULT | {"grid": 5, "sizes": (4, 5), "min_moves": 5, "max_moves": 10},
}

_OUTSIDE, _ICE, _HOLE, _START, _GOAL = range(5)
_LETTERS = np.array(list(" FHSG"))  # as in the FrozenLake maps of the released benchmark


def make(
    rng: np.random.Generator,
    *,
    grid: int,
    cell: int,
    sizes: Sequence[int],
    hole_probability: float,
    min_moves: int,
    max_moves: int,
) -> tuple[bytes, dict[str, Any]]:
    """Makes one random lake.

    Args:
      grid, cell: cells along a side of the image, and pixels along a side of a cell.
      sizes: possible values of n.
      hole_probability: probability of a hole in each cell.
      min_moves, max_moves: bounds of the length of the shortest path.
    Returns:
      key: the n x n lake, the same for its 8 rotations and reflections and wherever it is in the
      image. fields of `TaskExample` that differ between examples.
    Raises ValueError when the settings allow no lake.
    """
    if max(sizes) > grid or min(sizes) < 2:
        raise ValueError(f"maze sizes {tuple(sizes)} must be between 2 and grid={grid}")
    for _ in range(10_000):
        size = int(rng.choice(sizes))
        lake = np.where(rng.random((size, size)) < hole_probability, _HOLE, _ICE).astype(np.uint8)
        start, goal = (
            divmod(int(flat), size) for flat in rng.choice(size * size, 2, replace=False)
        )
        lake[start], lake[goal] = _START, _GOAL
        distance = _distances(lake, goal)
        if min_moves <= distance.get(start, -1) <= max_moves:
            break
    else:
        raise ValueError(
            f"no maze with a shortest path of {min_moves} to {max_moves} moves in 10,000 random "
            f"lakes of sizes {tuple(sizes)} with hole_probability={hole_probability}; lower "
            "min_moves or hole_probability"
        )
    top, left = (int(offset) for offset in rng.integers(grid - size + 1, size=2))
    moves, path = _shortest_path(rng, distance, start)
    cells = [(row + top, column + left) for row, column in path]

    codes = np.full((grid, grid), _OUTSIDE)
    codes[top : top + size, left : left + size] = lake
    image = assemble(_tiles(cell)[codes])
    names = [cell_name(*position) for position in cells]
    holes = [
        cell_name(int(row) + top, int(column) + left)
        for row, column in zip(*np.nonzero(lake == _HOLE))
    ]
    return _canonical(lake), {
        "question": "Find a safe path.",
        "answer": " ".join(moves),
        "problem_image": image,
        "thoughts": (
            f"start {names[0]} goal {names[-1]} holes {' '.join(holes) or 'none'}",
            "path " + " ".join(names),
        ),
        "visual_thoughts": (_draw_path(image, cells, cell),),
        "metadata": {"map": ["".join(_LETTERS[row]) for row in lake], "moves": len(moves)},
    }


def fault(metadata: dict) -> str | None:
    """What `score` misses in the metadata; None if nothing."""
    lake = metadata.get("map")
    if not isinstance(lake, list) or not all(
        isinstance(line, str) and len(line) == len(lake) for line in lake
    ):
        return f"has no 'map' of n lines with n letters each, but {lake!r}"
    absent = [
        what
        for letter, what in (("S", "start S"), ("G", "goal G"))
        if not any(letter in line for line in lake)
    ]
    return f"has a 'map' without {' and '.join(absent)}: {lake!r}" if absent else None


RULE = "Every path that reaches the goal and avoids the holes is right, not only the expected one."


def score(metadata: dict, answer: str | None) -> bool:
    """True if the moves ("R D R") stay on the lake, off the holes, and end on the goal."""
    lake = metadata["map"]
    size = len(lake)
    row, column = next((r, line.index("S")) for r, line in enumerate(lake) if "S" in line)
    for move in (answer or "").split():
        if move not in MOVES:
            return False
        row, column = row + MOVES[move][0], column + MOVES[move][1]
        if not (0 <= row < size and 0 <= column < size) or lake[row][column] == "H":
            return False
    return lake[row][column] == "G"


def _canonical(lake: np.ndarray) -> bytes:
    """The same bytes for all rotations and reflections of a lake."""
    turned = [np.rot90(lake, quarter) for quarter in range(4)]
    return min(view.tobytes() for turn in turned for view in (turn, turn.T))


def _distances(lake: np.ndarray, goal: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Moves to the goal from every cell that can reach it (breadth first)."""
    unseen = {
        (row, column)
        for row, line in enumerate(lake.tolist())
        for column, code in enumerate(line)
        if code != _HOLE
    } - {goal}
    distance = {goal: 0}
    frontier = [goal]
    for row, column in frontier:  # grows in the loop
        for down, right in MOVES.values():
            neighbour = row + down, column + right
            if neighbour in unseen:
                unseen.remove(neighbour)
                distance[neighbour] = distance[row, column] + 1
                frontier.append(neighbour)
    return distance


def _shortest_path(
    rng: np.random.Generator, distance: dict[tuple[int, int], int], start: tuple[int, int]
) -> tuple[list[str], list[tuple[int, int]]]:
    """The moves of a random shortest path, and its cells with start and goal."""
    moves, path = [], [start]
    while distance[path[-1]]:
        row, column = path[-1]
        steps = [
            (move, (row + down, column + right))
            for move, (down, right) in MOVES.items()
            if distance.get((row + down, column + right)) == distance[row, column] - 1
        ]
        move, position = steps[int(rng.integers(len(steps)))]
        moves.append(move)
        path.append(position)
    return moves, path


@functools.lru_cache
def _tiles(cell: int) -> np.ndarray:
    """Images of outside, ice, hole, start and goal, uint8 [code, cell, cell, 3]."""
    y, x = cell_axes(cell)
    ice = np.full((cell, cell, 3), (200, 225, 245), np.uint8)
    ice[0], ice[:, 0] = (150, 170, 190), (150, 170, 190)
    hole, start, goal = ice.copy(), ice.copy(), ice.copy()
    hole[y * y + x * x <= 0.38**2] = (20, 40, 90)
    start[(abs(y) < 0.25) & (abs(x) < 0.25)] = (40, 180, 60)
    pole, flag = (abs(y) < 0.4) & (abs(x) < 0.13), (abs(y + 0.19) < 0.2) & (abs(x - 0.13) < 0.26)
    goal[pole | flag] = (235, 180, 30)
    return np.stack([np.full_like(ice, 255), ice, hole, start, goal])


def _draw_path(image: np.ndarray, cells: list[tuple[int, int]], cell: int) -> np.ndarray:
    """A copy of an image [H, W, 3] with a red line through the middles of cells."""
    image = image.copy()
    half_width = max(1, cell // 8)
    middles = np.array(cells) * cell + cell // 2
    corners = np.sort([middles[:-1], middles[1:]], axis=0)  # [2, step, (y, x)]
    for (top, left), (bottom, right) in zip(
        corners[0] - half_width, corners[1] + half_width, strict=True
    ):
        image[top:bottom, left:right] = (230, 20, 20)
    return image
