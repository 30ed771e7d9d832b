"""Charts of report pages, made by matplotlib: SVG within the page, with its texts kept as text."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opsd_jax.evaluation import html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 4.0  # inches: on a phone, 364 pixels wide, texts of 9 points then have 11 pixels
_LINE = 48  # characters of the font that fit the width
_ROW = 0.19  # inches of a line of text, and of half a bar
_LEGEND = 20  # characters up to which two entries of a legend fit beside each other
_DOTS = 60  # points up to which each point of a series is marked
_COLOURS = (  # distinguishable by colour-blind readers; later series repeat them dashed
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b8609a",
    "#d18f00",
    "#3c9fdc",
    "#1b1f24",
    "#8a8420",
)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts, not outlines
    "svg.hashsalt": "opsd_jax",  # the same figure gives the same file
    "text.parse_math": False,  # a label may hold $
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": "#626a73",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d5d9de",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}


def lines(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    x: str,
    y: str,
    thin: Mapping[str, Sequence[Sequence[tuple[float, float | None]]]] | None = None,
    percent: bool = False,
) -> str:
    """A line chart with a legend.

    Args:
      series: {name: points (x, y)}, connected in their order. A point whose y is None, NaN or
        infinite interrupts the line, and the legend counts it.
      x, y: labels of the axes, with units.
      thin: {name of a series: several lines of points}, drawn thin in its colour, for example the
        seeds that the series is the mean of.
      percent: whether the axis of y goes from 0 to 100, as for accuracies.

    Raises:
      ValueError: more series than can be told apart.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if len(series) > 2 * len(_COLOURS):
        raise ValueError(
            f"a chart of {len(series)} series; at most {2 * len(_COLOURS)} can be told apart"
        )
    points = {name: _points(entries) for name, entries in series.items()}
    if not any(np.isfinite(data[:, 1]).any() for data in points.values()):
        return html.note(f"– no values of {y} over {x} ({', '.join(points)})")
    with rc_context(_STYLE):
        columns = 2 if max(map(len, points)) <= _LEGEND else 1
        height = 2.8 + 0.2 * -(-len(points) // columns)
        figure = Figure((_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        handles, labels = [], []
        for number, (name, data) in enumerate(points.items()):
            seen = np.isfinite(data[:, 1])
            handles += axes.plot(
                *data.T,
                color=_COLOURS[number % len(_COLOURS)],
                linestyle="-" if number < len(_COLOURS) else "--",
                marker=".",
                markevery=seen if seen.sum() <= _DOTS else _alone(seen),
            )
            for line in (thin or {}).get(name, ()):
                axes.plot(
                    *_points(line).T,
                    color=_COLOURS[number % len(_COLOURS)],
                    linewidth=0.7,
                    alpha=0.45,
                    zorder=1,
                )
            missing = len(data) - int(seen.sum())
            more = f" ({missing} without value)" if missing else ""
            labels.append(html.visible(name) + (more if seen.any() else " (– no values)"))
        axes.set(xlabel=html.visible(x), ylabel=html.visible(y))
        if percent:
            axes.set_ylim(-2, 102)
        if all(np.all(data[:, 0] == np.round(data[:, 0])) for data in points.values()):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps, tokens
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        return _svg(figure, f"{y} over {x}")


def intervals(
    rows: Sequence[tuple[str, float | None, float | None, float | None]],
    *,
    unit: str = "%",
    top: float = 100,
) -> str:
    """Horizontal bars with their 95 % intervals, below their labels and numbers.

    Labels above the bars leave them the whole width, on a phone, too.

    Args:
      rows: (label, value, low, high), all in `unit`. A value of None or NaN is a dash without bar
        (nothing was measured); low and high of None or NaN leave the interval out.
      unit: follows the numbers. Per cent have one decimal place, others 4 significant digits.
      top: right end of the axis. The left end is 0, or below the lowest negative number.

    Raises:
      ValueError: not low <= value <= high, or above `top`, which would cut the bar off.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if not rows:
        return html.note("– no rows")
    labels = [row[0] for row in rows]
    numbers = np.array([[math.nan if v is None else v for v in row[1:]] for row in rows], float)
    numbers[np.isnan(numbers[:, 0])] = math.nan
    for label, (value, low, high) in zip(labels, numbers.tolist()):
        if value > top or high > top or low > value or high < value:
            raise ValueError(
                f"interval of {label!r}: value {value}, low {low}, high {high}; needs "
                f"low <= value <= high <= top={top}"
            )
    value, low, high = numbers.T
    shown = [
        _above(html.visible(label), _numbers(entry, unit))
        for label, entry in zip(labels, numbers.tolist())
    ]
    # Vertically in lines of text: a bar takes one, and the gap below it another.
    heights = np.array([text.count("\n") + 3 for text in shown])
    places = np.cumsum(heights) - 1.5
    with rc_context(_STYLE):
        figure = Figure((_WIDTH, 0.5 + _ROW * heights.sum()), layout="constrained")
        axes = figure.subplots()
        axes.barh(places, np.nan_to_num(value), height=1, color="#9dc3e6")
        axes.errorbar(
            value,
            places,
            xerr=np.nan_to_num([value - low, high - value]),
            fmt="o",
            color=_COLOURS[0],
            ecolor="#1b1f24",
            capsize=3,
            markersize=4,
        )
        left = 1.1 * min(0.0, float(np.nanmin(numbers, initial=0.0)))
        for place, text in zip(places, shown):
            axes.text(left, place - 0.6, text, va="bottom", linespacing=1.1)
        axes.set_yticks([])
        axes.set_ylim(heights.sum(), 0)  # the first on top
        axes.set_xlim(left, top)
        axes.set_xlabel(f"{html.visible(unit)}; brackets: 95 % intervals")
        return _svg(figure, ", ".join(shown).replace("\n", " "))


def _above(label: str, number: str) -> str:
    """The lines above a bar: its label, and the number after it where both fit a line."""
    lines = textwrap.wrap(f"{label}:", _LINE)
    if len(lines[-1]) + 1 + len(number) <= _LINE:
        return "\n".join([*lines[:-1], f"{lines[-1]} {number}"])
    return "\n".join([*lines, number])


def _points(entries: Sequence[tuple[float, float | None]]) -> np.ndarray:
    """[N, 2] floats of a series, NaN where y is None or infinite."""
    points = np.array([(x, math.nan if y is None else y) for x, y in entries], float).reshape(-1, 2)
    points[~np.isfinite(points[:, 1]), 1] = math.nan
    return points


def _alone(seen: np.ndarray) -> np.ndarray:
    """[N] which points have no neighbour that a line would connect them to."""
    padded = np.pad(seen, 1)
    return seen & ~padded[:-2] & ~padded[2:]


def _numbers(entry: Sequence[float], unit: str) -> str:
    """A value with its interval, "50.0 % (40.0 to 62.5)"; a dash for NaN."""

    def number(value):
        return f"{value:.1f}".replace("-", "−") if unit == "%" else html.number(value)

    value, low, high = entry
    if math.isnan(value):
        return "–"
    interval = "" if math.isnan(low) else f" ({number(low)} to {number(high)})"
    return html.visible(f"{number(value)} {unit}".rstrip()) + interval


def _svg(figure: "Figure", label: str) -> str:
    """A figure as SVG within the page.

    What matplotlib writes about itself is left out, and ids that only name its objects: several
    charts would repeat them.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root, inside = file.getvalue().partition("<svg")[2].split(">", 1)
    root = re.sub(r' (xmlns(:xlink)?|width|height)="[^"]*"', "", root)
    inside = re.sub(r"<metadata>.*?</metadata>", "", inside, count=1, flags=re.DOTALL)
    inside = re.sub(r'<g id="[\w.]+_\d+">', "<g>", inside)
    label = html.text(label)
    return f'<div class="chart" role="figure" aria-label="{label}"><svg{root}>{inside}</div>'
