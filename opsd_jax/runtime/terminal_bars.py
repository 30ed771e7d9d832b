"""Progress bars on a terminal of any width: what was done, and the time left, come first."""

from collections.abc import Callable, Iterable, Sequence

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDEST, _NARROWEST = 40, 8  # columns of a bar
_TITLE = 1 / 3  # of a line; a longer title is cut


class Bars(progress.Progress):
    """One line for each task: title, bar, done/total, numbers, elapsed time, time left.

    Where a line is too long for the terminal, its numbers are left out from the last one on, then
    the bar, then the elapsed time. The fields of a task are `numbers` (texts) and `left`.

    hms: how a number of seconds is shown.
    """

    def __init__(self, console: Console, hms: Callable[[float], str]):
        self._console, self._hms = console, hms  # first: rich asks for a frame already
        super().__init__(console=console)

    def make_tasks_table(self, tasks: Iterable[progress.Task]) -> Table:
        """Called by rich for every frame."""
        shown = [task for task in tasks if task.visible]
        titles = [task.description for task in shown]
        counts = [f"{task.completed:.0f}/{task.total:.0f}" for task in shown]
        elapsed = [self._hms(_seconds(task)) for task in shown]
        left = [f"left {task.fields['left']}" for task in shown]
        free = self._console.width - 2 - _widest(counts) - _widest(left)  # with a space after each
        title = min(_widest(titles), int(self._console.width * _TITLE))
        free -= title
        with_elapsed = free > _widest(elapsed)
        free -= (1 + _widest(elapsed)) * with_elapsed
        with_bar = free > _NARROWEST
        free -= (1 + _NARROWEST) * with_bar
        numbers = [_fitting(task.fields["numbers"], free - 1) for task in shown]
        with_numbers = any(numbers)
        free -= (1 + _widest(numbers)) * with_numbers
        bar = progress.BarColumn(min(_WIDEST, _NARROWEST + max(free, 0)))
        columns = [
            ("left", [Text(text) for text in titles], True),
            ("left", [bar.render(task) for task in shown], with_bar),
            ("right", [Text(text) for text in counts], True),
            ("left", [Text(text) for text in numbers], with_numbers),
            ("left", [Text(text) for text in elapsed], with_elapsed),
            ("left", [Text(text) for text in left], True),
        ]
        columns = [column for column in columns if column[2]]
        table = Table.grid(padding=(0, 1))
        for n, (justify, *_) in enumerate(columns):
            table.add_column(justify=justify, no_wrap=True, width=None if n else title)
        for cells in zip(*(cells for _, cells, _ in columns)):
            table.add_row(*cells)
        return table


def _seconds(task: progress.Task) -> float:
    """Seconds since a task began, or that it took."""
    return (task.finished_time if task.finished else task.elapsed) or 0.0


def _widest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def _fitting(numbers: Sequence[str], width: int) -> str:
    """As many of a task's numbers, from the first on, as fit into a width."""
    for count in range(len(numbers), 0, -1):
        if len(text := "  ".join(numbers[:count])) <= width:
            return text
    return ""
