"""Building blocks of self-contained HTML pages: evaluation reports and diagnostics are composed of them.

Pure functions that return HTML strings. Every text is escaped; only arguments called `parts` are taken as HTML.
A page is one file: styles inside, pictures as data URIs, no script, nothing from the network (a content security
policy in the page forbids both). It follows the reader's light or dark mode and fits a phone.

    write("report.html", page("Evaluation", heading("Accuracy"), table(["task", "correct"], [["maze", 0.5312]])))
"""

import base64
import html
import io
import math
import numbers
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, features

_DASH = "–"
_NEW = "\n"  # a backslash may not stand inside the braces of an f-string before Python 3.12
_SMALL = 128  # pixels: shorter pictures keep every pixel
_SIZE = 320  # pixels of the longer side on the page
_OPEN_SAMPLES = 30  # more samples than this are shown collapsed
_COLOURS = 8  # series of one chart; the next ones take the same colours dashed
_DOTS = 60  # points up to which each point of a series is marked
_CSS = """
:root{color-scheme:light dark;--text:#1b1f24;--grey:#626a73;--page:#fff;--box:#f5f6f8;--line:#d5d9de;--link:#0b5cad;
--heat:236 140 30;--cold:80 140 235;--bar:#9dc3e6;--good:#117a3d;--bad:#b3261e;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8609a;--c4:#d18f00;--c5:#3c9fdc;--c6:#1b1f24;--c7:#8a8420}
@media(prefers-color-scheme:dark){:root{--text:#e6e8eb;--grey:#9aa3ad;--page:#15181c;--box:#1e2227;--line:#3a4149;
--link:#7cb8f2;--heat:185 85 10;--cold:40 95 190;--bar:#2f5f8a;--good:#58c487;--bad:#f28b82;
--c0:#4a9fd8;--c1:#f07d2e;--c2:#2dbd92;--c3:#d98cbd;--c4:#e6a91e;--c5:#8accf5;--c6:#e6e8eb;--c7:#d9d06a}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1,h2,h3,h4,h5,h6{line-height:1.25;margin:2rem 0 .6rem}h1{font-size:1.9rem;margin-top:.5rem}h2{font-size:1.4rem}
h3{font-size:1.15rem}h4,h5,h6{font-size:1rem}
p{margin:.6rem 0;max-width:46rem;white-space:pre-line}a{color:var(--link)}
.note{color:var(--grey);font-size:.875rem}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--box);padding:.1em .3em;
border-radius:3px}
.scroll{overflow:auto;max-height:34rem;max-width:100%;width:fit-content;margin:.8rem 0;border:1px solid var(--line);
border-radius:6px}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem;border-bottom:1px solid var(--line);vertical-align:top;white-space:pre-line;
overflow-wrap:normal}
tr:last-child>*{border-bottom:0}th{font-weight:600}
thead th{position:sticky;top:0;z-index:2;background:var(--box);vertical-align:bottom;
box-shadow:inset 0 -1px var(--line)}
.left{text-align:left}.right{text-align:right}.center{text-align:center}
.heat td{text-align:right;background:rgb(var(--heat)/var(--v,0))}.heat td.cold{background:rgb(var(--cold)/var(--v,0))}
.heat thead th{white-space:nowrap}.heat tbody th{min-width:5rem;position:sticky;left:0;z-index:1;background:var(--box)}
figure{margin:.4rem 0;max-width:100%}figure img{display:block;max-width:100%;height:auto;border-radius:3px}
.pixels{image-rendering:pixelated}
figcaption{color:var(--grey);font-size:.875rem;margin-top:.3rem;white-space:pre-line}
.tokens{font:.875rem/1.9 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
background:var(--box);border-radius:6px;padding:.6rem .8rem;margin:.8rem 0 .2rem;max-height:34rem;overflow:auto}
.tokens span{background:rgb(var(--heat)/var(--v,0));box-shadow:inset 1px 0 var(--line);border-radius:2px;
padding:.15em 1px}
.tokens .cold{background:rgb(var(--cold)/var(--v,0))}.tokens .none{text-decoration:underline dotted}
.tokens i{font-style:normal;color:var(--grey)}
.scale{display:inline-block;width:6rem;height:.7em;border-radius:2px;margin:0 .3em;
background:linear-gradient(90deg,transparent,rgb(var(--heat)/.9));border:1px solid var(--line)}
.scale.cold{background:linear-gradient(90deg,transparent,rgb(var(--cold)/.9))}
.whole,.chart{flex:1 1 22rem}
.intervals{width:100%;max-width:60rem;margin:.8rem 0 0}.intervals th,.intervals td{border:0;padding:.1rem .6rem;
vertical-align:middle;line-height:1.3;white-space:nowrap}
.intervals th{text-align:left;font-weight:400;max-width:16rem;padding-left:0;white-space:pre-line}
.intervals td:nth-child(2){width:60%;min-width:7rem}
.intervals small{color:var(--grey);white-space:nowrap;font-size:.8125rem}.intervals td:last-child{padding-right:0}
svg{display:block;overflow:visible;font-size:12px;font-variant-numeric:tabular-nums}svg text{fill:var(--grey)}
.chart{margin:.8rem 0;max-width:52rem}.chart>svg{width:calc(100% - 84px);height:17rem;margin:.3rem 22px 0 62px}
.chart>p{margin:0}.chart>p+svg{margin-top:.7rem}.chart .below{text-align:center;margin:26px 22px 0 62px}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:.4rem 0 0 62px;padding:0;
font-size:.875rem}
.legend span{color:var(--text)}.legend li:before{content:"";display:inline-block;width:1.4em;border-top:3px solid;
vertical-align:.25em;margin-right:.4em}.legend .dashed:before{border-top-style:dashed}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.stack{display:flex;flex-direction:column;gap:.4rem}.row{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
.stack>*,.row>*{min-width:0;max-width:100%}
.samples{margin:.8rem 0}.samples>label{margin-right:1.1rem}
.samples details{border:1px solid var(--line);border-radius:6px;margin:.7rem 0;padding:0 1rem}
.samples summary{cursor:pointer;padding:.6rem 0}.samples summary b{margin-right:.5em}
.hit>summary b{color:var(--good)}.miss>summary b{color:var(--bad)}.unjudged>summary b{color:var(--grey)}
.samples details>div{padding-bottom:.7rem;scroll-margin-top:4.5rem}
.samples details:has(:target){border-color:var(--link)}
.samples nav{display:flex;gap:1.5rem;font-size:.875rem;margin-top:.6rem}
.samples nav.same,.samples>.s-hit:checked~details:not(.hit),.samples>.s-miss:checked~details:not(.miss),
.samples>.s-unjudged:checked~details:not(.unjudged),.samples>input:not(.s-all):checked~details nav.any{display:none}
.samples>input:not(.s-all):checked~details nav.same{display:flex}
@media(max-width:600px){main{padding:1rem .8rem 3rem}h1{font-size:1.5rem}th,td{padding:.3rem .5rem}
.intervals th,.intervals td{padding:.1rem .3rem}
.intervals td{white-space:normal}.legend{margin-left:0}}
@media print{.scroll,.tokens{max-height:none;overflow:visible}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, *parts: str) -> str:
    """The whole document: title, styles and the parts (HTML) one below the other.

    Samples are numbered from s1 in every call of `samples`; where a page holds several, the ids and links of the
    second and later ones are renamed here (s2_1, s3_1, ...) so that links stay inside their own list.
    """
    first, *others = _join(parts, "page").split('<section class="samples">')
    for number, other in enumerate(others, start=1):
        if number > 1:
            other = re.sub(r'((?:id|for|name)="|href="#)s(?=[-\d])', rf"\g<1>s{number}_", other)
        first += '<section class="samples">' + other
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n{first}\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading; the page's title is level 1."""
    if level not in range(1, 7):
        raise ValueError(f"heading {text!r}: level {level!r}; headings have levels 1 to 6")
    return f"<h{level}>{_spans(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph; **bold** and `code` are honoured, line breaks kept."""
    return f"<p>{_spans(text)}</p>"


def note(text: str) -> str:
    """A small grey paragraph; **bold** and `code` as in `paragraph`."""
    return f'<p class="note">{_spans(text)}</p>'


def stack(*parts: str) -> str:
    """Parts one below the other, as one part."""
    return f'<div class="stack">{_join(parts, "stack")}</div>'


def row(*parts: str) -> str:
    """Parts side by side; they wrap where the page is too narrow."""
    return f'<div class="row">{_join(parts, "row")}</div>'


def table(
    columns: Sequence[str], rows: Sequence[Sequence], *, align: Sequence[str] | None = None
) -> str:
    """A table that scrolls inside its box where it is long or wide.

    Args:
      columns: the head.
      rows: cells are str, int, bool (yes, no), float or None. Floats have 4 significant digits and never lose whole
        ones; None and NaN are a dash.
      align: "left", "right" or "center" for each column. Default: the first left, the others right.

    Raises:
      ValueError: no columns; a row or `align` of another length; an unknown alignment; a cell of another type.
    """
    if not columns:
        raise ValueError("table without columns")
    align = ["left"] + ["right"] * (len(columns) - 1) if align is None else list(align)
    if len(align) != len(columns) or not set(align) <= {"left", "right", "center"}:
        raise ValueError(
            f"align {align}: needs left, right or center for each of the columns {list(columns)}"
        )
    head = "".join(
        f'<th scope="col" class="{a}">{_text(c)}</th>' for c, a in zip(columns, align, strict=True)
    )
    body = []
    for number, cells in enumerate(rows):
        if isinstance(cells, str) or len(cells) != len(columns):
            raise ValueError(
                f"table row {number} is {cells!r}, but the columns are {list(columns)}"
            )
        body.append(
            "<tr>"
            + "".join(
                f'<td class="{a}">{_cell(cell, f"table row {number}, column {column!r}")}</td>'
                for column, cell, a in zip(columns, cells, align, strict=True)
            )
            + "</tr>"
        )
    if not body:
        body = [f'<tr><td class="center" colspan="{len(columns)}">{_DASH} no rows</td></tr>']
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{_NEW.join(body)}</tbody></table>")


def heat(rows: Sequence[str], columns: Sequence[str], values, *, digits: int = 2) -> str:
    """A table with coloured cells.

    Colours go from the lowest value (none) to the highest (full). Where there are negative values they go both ways
    from zero, in two colours. NaN is a dash; infinities have full colour.

    Args:
      rows, columns: labels.
      values: [rows, columns] floats.
      digits: behind the point.

    Raises:
      ValueError: `values` has another shape, or a side has no label.
    """
    values = np.asarray(values, np.float64)
    if not len(rows) or not len(columns) or values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"heat: values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns"
        )
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    negative = bool((values < 0).any())
    if negative:
        low, high = 0.0, np.abs(finite).max() if finite.size else 0.0

    def cell(value):
        if math.isnan(value):
            return f"<td>{_DASH}</td>"
        share = _share(abs(value) - low, high - low)
        text = _infinite(value) or f"{value:.{digits}f}".replace("-", "−")
        return f'<td{_cold(value)} style="--v:{share}">{text}</td>'

    head = "".join(f'<th scope="col" class="right">{_text(c)}</th>' for c in columns)
    body = [
        f'<tr><th scope="row" class="left">{_text(label)}</th>{"".join(map(cell, line))}</tr>'
        for label, line in zip(rows, values, strict=True)
    ]
    grid = _scroll(
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{_NEW.join(body)}</tbody></table>"
    )
    legend = (
        _legend(_number(low), _number(high), _number(-high) if negative else "")
        if finite.size
        else ""
    )
    return f"<div>{grid}{legend}</div>"


def picture(image, *, size: int | None = None, caption: str = "") -> str:
    """A picture inside the page.

    One whose longer side is below 128 pixels keeps every pixel (PNG) and is shown enlarged by the greatest whole
    factor that fits `size`. Others are reduced to at most `size` and stored as WebP, or JPEG where Pillow has no WebP.

    Args:
      image: uint8 [H, W, 3], or a Pillow image. Transparent parts become white.
      size: pixels of the longer side on the page; default 320.
      caption: below the picture, and its alternative text.

    Raises:
      ValueError: another shape or dtype, an empty picture, or a Pillow mode with more than 8 bits.
    """
    size = _SIZE if size is None else size
    if size < 1:
        raise ValueError(f"picture {caption!r}: size {size}; needs at least 1 pixel")
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")) or not image.width * image.height:
            raise ValueError(
                f"picture {caption!r}: mode {image.mode}, {image.width} x {image.height} pixels; needs "
                f"8 bits a channel and at least one pixel"
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    else:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ValueError(
                f"picture {caption!r}: {array.dtype} {array.shape}; needs uint8 [H, W, 3] or a Pillow "
                f"image"
            )
        image = Image.fromarray(np.ascontiguousarray(array))

    content, factor, looks = io.BytesIO(), 1, ""
    if max(image.size) < _SMALL:
        kind, factor, looks = "png", max(1, size // max(image.size)), ' class="pixels"'
        image.save(content, "PNG", optimize=True)
    else:
        kind = "webp" if features.check("webp") else "jpeg"
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.save(content, kind, quality=85)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img{looks} src="data:image/{kind};base64,{data}" width="{image.width * factor}" '
        f'height="{image.height * factor}" alt="{_text(caption)}" decoding="async">{below}</figure>'
    )


def tokens(
    pieces: Sequence[str], values: Sequence[float], *, unit: str, top: float | None = None
) -> str:
    """Text with a background for each token: none at 0, full from `top`. Pointing at a token shows its value.

    Negative values have a second colour, infinite ones the full colour; tokens without value (None, NaN) are
    underlined. Line breaks and tabs are drawn (↵, ⇥), edges of tokens are thin lines, an empty piece is ∅.

    Args:
      pieces: [N] the text of each token.
      values: [N] one value for each token, in `unit`.
      top: value of the full colour. Default: the 95th percentile of the sizes, or the greatest where that is 0.

    Raises:
      ValueError: as many pieces as values are needed; `top` must be finite and above 0.
    """
    values = np.asarray([math.nan if value is None else value for value in values], np.float64)
    if values.shape != (len(pieces),):
        raise ValueError(f"tokens: {len(pieces)} pieces, but values of shape {values.shape}")
    if top is not None and not (math.isfinite(top) and top > 0):
        raise ValueError(f"tokens: top {top}; needs a finite value above 0")
    if not len(pieces):
        return note(f"{_DASH} no tokens")
    sizes = np.abs(values[np.isfinite(values)])
    meaning = ""
    if top is None:
        top, meaning = (
            (float(np.percentile(sizes, 95)), " (95th percentile)") if sizes.size else (0.0, "")
        )
        if not top and sizes.size:
            top, meaning = float(sizes.max()), " (greatest)"

    def span(piece, value):
        text = _text(piece).replace("\n", "<i>↵</i>\n").replace("\t", "<i>⇥</i>\t") or "<i>∅</i>"
        if math.isnan(value):
            return f'<span class="none" title="{_DASH} {_text(unit)}">{text}</span>'
        share = _share(abs(value), top)
        look = f' style="--v:{share}"' if share else ""
        return (
            f'<span{_cold(value)}{look} title="{_text(f"{_number(value)} {unit}")}">{text}</span>'
        )

    spans = "".join(map(span, pieces, values))
    missing = int(np.isnan(values).sum())
    more = f"; {missing} without value (underlined)" if missing else ""
    count = "1 token" if len(pieces) == 1 else f"{len(pieces)} tokens"
    colour = f"{_number(top)} {unit}{meaning}; {count}{more}"
    below = _number(-top) if (values < 0).any() else ""
    return f'<div><div class="tokens">{spans}</div>{_legend("0", colour, below)}</div>'


def intervals(rows: Sequence[tuple], *, unit: str = "%", top: float = 100) -> str:
    """Horizontal bars with their 95 % intervals and the numbers.

    Args:
      rows: (label, value, low, high), all in `unit`. A value of None or NaN is a dash without bar (nothing was
        measured); low and high of None or NaN leave the interval out.
      unit: behind the numbers. Per cent have one digit behind the point, others 4 significant ones.
      top: right end of the axis. The left end is 0, or below the lowest negative number.

    Raises:
      ValueError: a row without four entries, infinite, not low <= value <= high, or above `top`.
    """
    if not (math.isfinite(top) and top > 0):
        raise ValueError(f"intervals: top {top}; needs a finite number above 0")
    entries = [_interval(number, entry, top) for number, entry in enumerate(rows)]
    if not entries:
        return note(f"{_DASH} no rows")
    lowest = min(
        [0.0, *(number for _, *values in entries for number in values if not math.isnan(number))]
    )
    ticks, step = _ticks(lowest, top)
    bottom = min(0.0, math.floor(lowest / step) * step)
    ticks = list(dict.fromkeys([bottom, *ticks]))

    def at(value):
        return f"{100 * (value - bottom) / (top - bottom):.2f}%"

    def share(value):
        return f"{100 * value / (top - bottom):.2f}%"

    def text(value):
        return (f"{value:.1f}" if unit == "%" else _number(value)).replace("-", "−")

    grid = "".join(
        f'<line x1="{at(t)}" x2="{at(t)}" y1="0" y2="26" stroke="var(--line)"/>' for t in ticks
    )
    bars, suffix = [], f" {unit}" if unit else ""
    for label, value, low, high in entries:
        shapes, figures = grid, _DASH
        if not math.isnan(value):
            shapes += (
                f'<rect x="{at(min(value, 0))}" width="{share(abs(value))}" y="6" height="14" rx="2" '
                f'fill="var(--bar)"/>'
            )
            figures = _text(f"{text(value)}{suffix}")
            if not math.isnan(low):
                shapes += (
                    f'<line x1="{at(low)}" x2="{at(high)}" y1="13" y2="13" stroke="var(--text)" '
                    f'stroke-width="1.5"/>'
                )
                shapes += "".join(
                    f'<line x1="{at(x)}" x2="{at(x)}" y1="9" y2="17" stroke="var(--text)" '
                    f'stroke-width="1.5"/>'
                    for x in (low, high)
                )
                figures += f" <small>({text(low)} to {text(high)})</small>"
            shapes += f'<circle cx="{at(value)}" cy="13" r="3.5" fill="var(--c0)"/>'
        bars.append(
            f'<tr><th scope="row">{_text(label)}</th><td><svg width="100%" height="26" aria-hidden="true">'
            f"{shapes}</svg></td><td>{figures}</td></tr>"
        )
    axis = "".join(
        f'<text x="{at(t)}" y="13" text-anchor="middle">{_tick(t, step)}</text>' for t in ticks
    )
    bars.append(
        f'<tr><td></td><td><svg width="100%" height="18" aria-hidden="true">{axis}</svg></td>'
        "<td></td></tr>"
    )
    meaning = note("Thin lines, and the numbers in brackets: 95 % intervals.")
    return f'<div class="whole"><table class="intervals"><tbody>{_NEW.join(bars)}</tbody></table>{meaning}</div>'


def _interval(number: int, entry, top: float) -> tuple[str, float, float, float]:
    """A checked row of `intervals`; NaN where a number is missing."""
    if isinstance(entry, str) or len(entry) != 4:
        raise ValueError(f"intervals row {number} is {entry!r}; needs (label, value, low, high)")
    label, *values = entry
    value, low, high = (math.nan if v is None else float(v) for v in values)
    where = f"intervals row {number} ({label!r}): value {value}, low {low}, high {high}"
    if any(map(math.isinf, (value, low, high))):
        raise ValueError(f"{where}; an interval has finite ends")
    if math.isnan(low) != math.isnan(high):
        raise ValueError(f"{where}; give both ends or none")
    if not math.isnan(value) and not math.isnan(low) and not low <= value <= high:
        raise ValueError(f"{where}; needs low <= value <= high")
    if math.isnan(value):  # no bar, hence no interval either
        low = high = math.nan
    if max([v for v in (value, high) if not math.isnan(v)], default=0) > top:
        raise ValueError(f"{where}; above the end of the axis, top={top}")
    return label, value, low, high


def lines(series: dict[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """A line chart with axes, ticks and legend. About 10 bytes a point: thin out series of many thousands before.

    Args:
      series: {name: points (x, y) in the order of drawing}. A point whose y is None, NaN or infinite interrupts the
        line, and the legend counts it.
      x, y: what the axes mean, with units.

    Raises:
      ValueError: no series, more than 16, a point that is no pair, or an x that is not finite.
    """
    if not 0 < len(series) <= 2 * _COLOURS:
        raise ValueError(
            f"lines: {len(series)} series {list(series)}; a chart takes 1 to {2 * _COLOURS}"
        )
    points = {name: _points(name, entries) for name, entries in series.items()}
    everything = np.concatenate(list(points.values()))
    everything = everything[np.isfinite(everything[:, 1])]
    if not len(everything):
        return note(f"{_DASH} no values of {y} over {x} ({', '.join(map(str, series))})")
    (left, low), (right, high) = _spread(everything.min(0)), _spread(everything.max(0))
    if left == right:
        left, right = left - 0.5, right + 0.5
    pad = 0.04 * (high - low) or 0.1 * abs(high) or 0.5
    low, high = (low if low == 0 else low - pad), high + pad

    def across(value):
        return (value - left) / (right - left)

    def down(value):
        return (high - value) / (high - low)

    marks = []
    ticks, step = _ticks(low, high)
    for tick in ticks:
        at = f"{100 * down(tick):.2f}%"
        marks.append(
            f'<line x1="0" x2="100%" y1="{at}" y2="{at}" stroke="var(--line)"/>'
            f'<text x="0" y="{at}" dx="-8" dy="4" text-anchor="end">{_tick(tick, step)}</text>'
        )
    ticks, step = _ticks(left, right)
    for tick in ticks:
        at = f"{100 * across(tick):.2f}%"
        marks.append(
            f'<line x1="{at}" x2="{at}" y1="0" y2="100%" stroke="var(--line)" stroke-dasharray="2 4"/>'
            f'<text x="{at}" y="100%" dy="18" text-anchor="middle">{_tick(tick, step)}</text>'
        )
    marks.append(
        '<line x1="0" x2="100%" y1="100%" y2="100%" stroke="var(--grey)"/>'
        '<line x1="0" x2="0" y1="0" y2="100%" stroke="var(--grey)"/>'
    )

    legend = []
    for number, (name, data) in enumerate(points.items()):
        colour, dashed = f"c{number % _COLOURS}", number >= _COLOURS
        dashes = ' stroke-dasharray="6 4"' if dashed else ""
        seen = np.isfinite(data[:, 1])
        dots = seen.sum() <= _DOTS
        strokes, circles = [], []
        for run in np.split(
            data, np.flatnonzero(~seen)
        ):  # each run but the first begins with a missing point
            run = run[np.isfinite(run[:, 1])]
            if len(run) > 1:
                strokes.append(
                    "M" + " ".join(f"{1000 * across(a):.1f},{1000 * down(b):.1f}" for a, b in run)
                )
            if dots or len(run) == 1:
                circles += [
                    f'<circle cx="{100 * across(a):.2f}%" cy="{100 * down(b):.2f}%" r="3" fill="currentColor">'
                    f"<title>{_text(f'{name}: {_number(b)} at {_number(a)}')}</title></circle>"
                    for a, b in run
                ]
        # Stretched to the width of the page; the texts and dots outside keep their size on every screen.
        path = (
            (
                f'<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">'
                f'<path d="{"".join(strokes)}" fill="none" stroke="currentColor" stroke-width="2" '
                f'stroke-linejoin="round" vector-effect="non-scaling-stroke"'
                f"{dashes}/></svg>"
            )
            if strokes
            else ""
        )
        marks.append(f'<g class="{colour}">{path}{"".join(circles)}</g>')
        missing = len(data) - int(seen.sum())
        more = (
            f" ({_DASH} no values)"
            if not seen.any()
            else f" ({missing} without value)"
            if missing
            else ""
        )
        legend.append(
            f'<li class="{colour}{" dashed" if dashed else ""}"><span>{_text(name)}{more}</span></li>'
        )
    return (
        f'<div class="chart"><p class="note">{_text(y)}</p>'
        f'<svg role="img" aria-label="{_text(f"{y} over {x}")}">{_NEW.join(marks)}</svg>'
        f'<p class="note below">{_text(x)}</p><ul class="legend">{"".join(legend)}</ul></div>'
    )


def _points(name: str, entries) -> np.ndarray:
    """[N, 2] floats of a series of `lines`, NaN where y is None."""
    for number, entry in enumerate(entries):
        if (
            isinstance(entry, str)
            or len(entry) != 2
            or entry[0] is None
            or not math.isfinite(entry[0])
        ):
            raise ValueError(
                f"lines: point {number} of {name!r} is {entry!r}; needs (x, y) with a finite x"
            )
    return np.asarray([(a, math.nan if b is None else b) for a, b in entries], np.float64).reshape(
        -1, 2
    )


def samples(items: Sequence[dict]) -> str:
    """Samples to leaf through: hit or miss, a filter, and links to the previous and next one that is shown.

    The n-th item has the anchor #s<n>, counted from 1. More than 30 items are shown collapsed; following a link to
    one opens it.

    Args:
      items: {"title": str, "hit": bool or None (not judged), "parts": [HTML], "note": str}; "hit" and "note" may be
        left out.

    Raises:
      ValueError: an item without title or parts, with an unknown key, or with another kind of hit.
    """
    if not items:
        return note(f"{_DASH} no samples")
    for number, item in enumerate(items, start=1):
        wrong = {"title", "parts"} - set(item) or set(item) - {"title", "hit", "parts", "note"}
        if wrong:
            raise ValueError(
                f"sample {number}: missing or unknown {sorted(wrong)}; needs title, parts, and may have "
                f"hit, note"
            )
        if not isinstance(item.get("hit"), (bool, np.bool_, type(None))):
            raise ValueError(
                f"sample {number} ({item['title']!r}): hit {item['hit']!r}; needs True, False or None"
            )
    kinds = [
        "unjudged" if item.get("hit") is None else "hit" if item["hit"] else "miss"
        for item in items
    ]
    words = {"hit": "✓ hit", "miss": "✗ miss", "unjudged": f"{_DASH} not judged"}
    counts = {"all": len(items)} | {kind: kinds.count(kind) for kind in words}
    labels = {"all": "all", "hit": "hits", "miss": "misses", "unjudged": "not judged"}
    if not counts["unjudged"]:
        del labels["unjudged"]
    choice = "".join(
        f'<input type="radio" name="s-show" id="s-{kind}" class="s-{kind}"'
        f'{" checked" if kind == "all" else ""}> <label for="s-{kind}">{label} ({counts[kind]})</label>\n'
        for kind, label in labels.items()
    )

    def links(look, number, shown_numbers):
        place = shown_numbers.index(number)
        before = f'<a href="#s{shown_numbers[place - 1]}">← previous</a>' if place else ""
        after = (
            f'<a href="#s{shown_numbers[place + 1]}">next →</a>'
            if place + 1 < len(shown_numbers)
            else ""
        )
        return f'<nav class="{look}">{before}{after}</nav>'

    each = range(1, len(items) + 1)
    alike = {kind: [n for n in each if kinds[n - 1] == kind] for kind in words}
    shown = []
    for number, item, kind in zip(each, items, kinds, strict=True):
        # The anchor lies inside of <details>: browsers open it for a link to something inside, not for one to itself.
        shown.append(
            f'<details class="{kind}"{" open" if len(items) <= _OPEN_SAMPLES else ""}>'
            f'<summary><b>{words[kind]}</b>{number}. {_spans(item["title"])}</summary><div id="s{number}">'
            f"{note(item['note']) if item.get('note') else ''}{_join(item['parts'], f'sample {number}')}"
            f"{links('any', number, each)}{links('same', number, alike[kind])}</div></details>"
        )
    return f'<section class="samples">{choice}{_NEW.join(shown)}</section>'


def _text(value) -> str:
    """Escaped for contents and attributes. Control characters become visible (␛), lone surrogates �."""
    shown = "".join(
        chr(0x2400 + ord(c))
        if c < " " and c not in "\n\t"
        else "␡"
        if c == "\x7f"
        else "\ufffd"
        if "\ud800" <= c <= "\udfff"
        else c
        for c in str(value)
    )
    return html.escape(shown)


def _spans(text: str) -> str:
    """Escaped, with `code` and **bold**."""

    def span(match):
        if match[1] is not None:
            return f"<code>{match[1]}</code>"
        return f"<strong>{re.sub(pattern, span, match[2])}</strong>"

    pattern = r"`([^`\n]+)`|\*\*(\S(?:.*?\S)?)\*\*"
    return re.sub(pattern, span, _text(text))


def _number(value: float) -> str:
    """4 significant digits without closing zeros; from 10,000 on all whole ones; a dash for NaN."""
    value = float(value)
    if math.isnan(value):
        return _DASH
    whole = 9999.5 <= abs(value) < 1e15
    return (_infinite(value) or (f"{value:,.0f}" if whole else f"{value:.4g}")).replace("-", "−")


def _aligned(value: float) -> str:
    """As `_number`, with closing zeros, so that the points of a column tend to stand below each other."""
    return f"{value:#.4g}".replace("-", "−") if 0 < abs(value) < 9999.5 else _number(value)


def _infinite(value: float) -> str:
    return "" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def _cell(value, where: str) -> str:
    if value is None:
        return _DASH
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return (f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))).replace("-", "−")
    if isinstance(value, numbers.Real):
        return _aligned(float(value))
    if isinstance(value, str):
        return _text(value)
    raise ValueError(
        f"{where}: {value!r} is a {type(value).__name__}; cells are str, int, float or None"
    )


def _join(parts, where: str) -> str:
    if isinstance(parts, str):
        raise ValueError(f"{where}: parts is one string; needs a list of HTML strings")
    for number, part in enumerate(parts):
        if not isinstance(part, str):
            raise ValueError(
                f"{where}: part {number} is a {type(part).__name__}; parts are HTML strings "
                f"(unpack lists with *)"
            )
    return "\n".join(parts)


def _scroll(inside: str) -> str:
    """A box of limited height; the tab index lets the keyboard scroll it."""
    return f'<div class="scroll" tabindex="0">{inside}</div>'


def _share(value: float, top: float) -> float:
    """Strength of a colour, 0 to 0.9: text on the full colour must stay readable."""
    if math.isinf(value):
        return 0.9
    return round(0.9 * min(max(value / top, 0.0), 1.0), 3) if top else 0.0


def _cold(value: float) -> str:
    return ' class="cold"' if value < 0 else ""


def _legend(low: str, high: str, negative: str) -> str:
    """What the colours of `tokens` and `heat` mean."""
    second = f'; 0<span class="scale cold"></span>{_text(negative)}' if negative else ""
    return (
        f'<p class="note">Colours: {_text(low)}<span class="scale"></span>{_text(high)}{second}</p>'
    )


def _ticks(low: float, high: float) -> tuple[list[float], float]:
    """About five round numbers in [low, high], and their distance."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)], step


def _tick(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:,.{digits}f}" if digits <= 4 and abs(value) < 1e7 else f"{value:.6g}"
    return ("0" if value == 0 else text).replace("-", "−")


def _spread(corner: np.ndarray) -> tuple[float, float]:
    return float(corner[0]), float(corner[1])
