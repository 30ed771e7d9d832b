"""The palette, the shapes and the layout that all families share: images made of square cells.

A cell is as wide as a patch of the vision encoder (8 pixels), so each cell is one patch.
"""

import functools

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 190),
    "orange": (240, 140, 30),
}
COLOR_NAMES = tuple(COLORS)
PALETTE = np.array(list(COLORS.values()), np.uint8)  # [colour, 3]

SHAPE_NAMES = ("circle", "square", "triangle", "cross", "bar", "ring")


def cell_name(row: int, column: int) -> str:
    """Word for a cell, counted from 0 at the top left of the image: (1, 3) -> "c13".

    Raises ValueError for rows and columns above 9.
    """
    if row > 9 or column > 9:
        raise ValueError(f"cell ({row}, {column}) has no unambiguous name; use grid <= 10")
    return f"c{row}{column}"


def cell_axes(cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres of a cell, y [cell, 1] and x [1, cell].

    The unit is the width of the cell and the origin its middle: they are between -0.5 and 0.5.
    """
    axis = (np.arange(cell) + 0.5) / cell - 0.5
    return axis[:, None], axis[None, :]


@functools.lru_cache
def shape_masks(cell: int) -> np.ndarray:
    """The pixels of each of SHAPE_NAMES, bool [shape, cell, cell]."""
    y, x = cell_axes(cell)
    radius2 = y * y + x * x
    return np.stack(
        [
            radius2 <= 0.38**2,
            (abs(y) < 0.33) & (abs(x) < 0.33),
            (abs(y) < 0.4) & (abs(x) < (y + 0.4) / 2),
            ((abs(y) < 0.13) & (abs(x) < 0.4)) | ((abs(x) < 0.13) & (abs(y) < 0.4)),
            (abs(y) < 0.2) & (abs(x) < 0.4),
            (radius2 <= 0.44**2) & (radius2 >= 0.25**2),
        ]
    )


def assemble(tiles: np.ndarray) -> np.ndarray:
    """Puts tiles side by side.

    [rows, columns, height, width, 3] -> [rows * height, columns * width, 3]
    """
    rows, columns, height, width, channels = tiles.shape
    return tiles.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
