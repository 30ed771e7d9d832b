"""Building blocks of report pages: evaluations and diagnoses are composed of them.

Pure functions that return HTML strings. Every text is escaped; only arguments called `parts`, and
cells that are a `Part`, are taken as HTML. A page is one file: styles within (report.css), images
as data URIs, charts as SVG (see `charts`), no script, nothing from the network (the content
security policy of the template forbids both). It follows the reader's light or dark mode and fits a
phone.

    body = heading("Accuracy"), table(["task", "correct"], [["maze", 0.5312]])
    files.write("report.html", page("Evaluation", *body))
"""

import base64
import dataclasses
import html
import io
import math
import numbers
import pathlib
import re
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

_FOLDER = pathlib.Path(__file__).parent
_DASH = "–"


class Part(str):
    """HTML that `table` takes as it is, for example an image in a cell."""


Cell = Part | str | int | float | bool | None
_SMALL = 128  # pixels: shorter images keep every pixel
_OPEN_SAMPLES = 30  # samples after these are shown collapsed
_SAMPLES = '<section class="samples">'
_CAUTIONS = '<section class="cautions">'
_INTERVAL = r"\S+ to \S+"  # as `between` writes it
_ONE_LINE = ' style="white-space: nowrap"'


def page(title: str, *parts: str) -> str:
    """The whole document: the title, a list of contents, then the parts one below the other.

    The contents link to the headings of levels 2 and 3; a page with fewer than two headings of
    level 2 has none.

    Samples are numbered from s1 in every call of `samples`. On a page with several lists, the ids
    and links of the second and later ones are renamed here (s2_1, s3_1, ...), so that links stay
    within their list.
    """
    first, *others = _join(parts).split(_SAMPLES)
    for number, other in enumerate(others, start=1):
        if number > 1:
            other = re.sub(r'((?:id|for|name)="|href="#)s(?=[-\d])', rf"\g<1>s{number}_", other)
        first += _SAMPLES + other
    contents, body = _with_contents(first)
    template = string.Template((_FOLDER / "report.template.html").read_text(encoding="utf-8"))
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return template.substitute(title=text(title), style=style, body=contents + body)


def section(title: str, *parts: str) -> str:
    """A heading of level 2 above parts whose own headings become one level lower."""

    def lower(match):
        return f"<{match[1]}h{int(match[2]) + 1}>"

    return stack(heading(title), re.sub(r"<(/?)h([2-5])>", lower, _join(parts)))


def _with_contents(body: str) -> tuple[str, str]:
    """(list of contents, the body with an id at each heading that it links to)."""
    found: list[tuple[str, str]] = []

    def anchored(match):
        found.append((match[1], match[2]))
        return f'<h{match[1]} id="c{len(found)}">{match[2]}</h{match[1]}>'

    body = re.sub(r"<h([23])>(.*?)</h\1>", anchored, body)
    if sum(level == "2" for level, _ in found) < 2:
        return "", body
    items = [
        f'<li class="level{level}"><a href="#c{n}">{inside}</a></li>'
        for n, (level, inside) in enumerate(found, start=1)
    ]
    listed = f"<details><summary>Contents</summary><ul>{_join(items)}</ul></details>"
    return f'<nav class="contents" aria-label="contents">{listed}</nav>\n', body


# ---------------------------------------------------------------------------- texts


def heading(content: str, level: int = 2) -> str:
    """A heading with `code` and **bold**; the page's title has level 1."""
    return f"<h{level}>{_spans(content)}</h{level}>"


def paragraph(content: str) -> str:
    """A paragraph with `code` and **bold**; line breaks are kept."""
    return f"<p>{_spans(content)}</p>"


def note(content: str) -> str:
    """A small grey paragraph with `code` and **bold**."""
    return f'<p class="note">{_spans(content)}</p>'


def cautions(lines: Sequence[str], title: str = "") -> str:
    """A box of cautions, one below the other, in bold; without any it is there and not visible.

    title: a small line above them. See `with_cautions`.
    """
    shown = [paragraph(f"**{line}**") for line in lines]
    return f"{_CAUTIONS}{_join([*([note(title)] if title and lines else []), *shown])}</section>"


def with_cautions(document: str, lines: Sequence[str], title: str = "") -> str:
    """A page with these cautions in its box; as it was if it has none."""
    pattern = re.escape(_CAUTIONS) + ".*?</section>"
    return re.sub(pattern, lambda _: cautions(lines, title), document, count=1, flags=re.DOTALL)


def links(entries: Sequence[tuple[str, str]]) -> str:
    """A list of links: (text, address), the address relative to the page."""
    return f"<ul>{''.join(f'<li>{link(*entry)}</li>' for entry in entries)}</ul>"


def link(name: str, address: str) -> Part:
    """A link, also for a cell of a table; the address is relative to the page."""
    return Part(f'<a href="{text(address)}">{text(name)}</a>')


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """What a page is about: (name, content with `code` and **bold**), one below the other."""
    items = [f"<dt>{text(name)}</dt><dd>{_spans(content)}</dd>" for name, content in entries]
    return f'<dl class="facts">{_join(items)}</dl>'


def text(value: object) -> str:
    """A value as escaped text, for contents and attributes.

    Control characters become visible (␛), lone surrogates �.
    """
    return html.escape(visible(str(value)))


def visible(content: str) -> str:
    """The text with control characters made visible (␛) and lone surrogates replaced (�)."""
    content = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), content)
    return re.sub("[\ud800-\udfff]", "\ufffd", content.replace("\x7f", "␡"))


def number(value: float) -> str:
    """A number with 4 significant digits; from 10,000 on as a whole number; a dash for NaN."""
    if math.isnan(value):
        return _DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    whole = 9999.5 <= abs(value) < 1e15
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")


def fixed(value: float | None, digits: int) -> str:
    """A number with a fixed number of decimal places; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return number(math.nan if value is None else value)
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")  # + 0.0: no −0.0


def between(limits: Sequence[float] | None, digits: int) -> str:
    """An interval, "0.10 to 0.25"; a dash for None."""
    return _DASH if limits is None else " to ".join(fixed(limit, digits) for limit in limits)


def p_value(p: float) -> str:
    """A p-value with 3 decimal places, "< 0.001" where they would all be 0."""
    return "< 0.001" if p < 0.001 else fixed(p, 3)


# ---------------------------------------------------------------------------- layout


def stack(*parts: str) -> str:
    """Parts one below the other, as one part."""
    return f'<div class="stack">{_join(parts)}</div>'


def row(*parts: str) -> str:
    """Parts side by side; they wrap where the page is too narrow."""
    return f'<div class="row">{_join(parts)}</div>'


# ---------------------------------------------------------------------------- tables


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    texts: int = 1,
) -> str:
    """A table that scrolls within its box if it is long or wide.

    A column that has nothing but dashes is left out, unless it is one of the `texts`.

    Args:
      columns: the head of each column.
      rows: cells. A `Part` is taken as HTML. Floats have 4 significant digits, and whole digits
        are never cut; a bool is yes or no; None and NaN are a dash.
      texts: the number of columns, from the first, that are aligned left as text is.

    Raises:
      ValueError: a row whose length differs from that of the columns.
    """
    shown = []
    for position, cells in enumerate(rows):
        if isinstance(cells, str) or len(cells) != len(columns):
            raise ValueError(
                f"table row {position} is {cells!r}, but the columns are {list(columns)}"
            )
        shown.append(list(map(_cell, cells)))
    kept = [
        n
        for n in range(len(columns))
        if n < texts or not shown or any(cells[n] != _DASH for cells in shown)
    ]
    looks = {n: ' class="left"' if n < texts else "" for n in kept}

    def shown_cell(n: int, content: str) -> str:
        whole = n >= texts and re.fullmatch(_INTERVAL, content)
        return f"<td{looks[n]}{_ONE_LINE if whole else ''}>{content}</td>"

    head = "".join(f'<th scope="col"{looks[n]}>{text(columns[n])}</th>' for n in kept)
    body = [f"<tr>{''.join(shown_cell(n, cells[n]) for n in kept)}</tr>" for cells in shown]
    if not body:
        body = [f'<tr><td class="left" colspan="{len(kept)}">{_DASH} no rows</td></tr>']
    return _scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{_join(body)}</tbody></table>")


def heat(rows: Sequence[str], columns: Sequence[str], values, *, digits: int = 2) -> str:
    """A table with coloured cells (heat map).

    Colours go from the lowest value (none) to the highest (full). If there are negative values,
    they go both ways from zero, in two colours. NaN is a dash; infinities have the full colour.

    Args:
      rows, columns: labels.
      values: [rows, columns] floats.
      digits: number of decimal places.

    Raises:
      ValueError: the shape of `values` does not fit the labels, or there are no labels.
    """
    values = np.asarray(values, np.float64)
    if not values.size or values.shape != (len(rows), len(columns)):
        raise ValueError(
            f"heat: values of shape {values.shape} for {len(rows)} rows and {len(columns)} columns"
        )
    finite = values[np.isfinite(values)]
    negative = bool((values < 0).any())
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if negative:
        low, high = 0.0, np.abs(finite).max(initial=0.0)

    def cell(value):
        if math.isnan(value):
            return f"<td>{_DASH}</td>"
        shown = number(value) if math.isinf(value) else f"{value:.{digits}f}".replace("-", "−")
        return f"<td{_colour(value, low, high)}>{shown}</td>"

    head = "".join(f'<th scope="col">{text(column)}</th>' for column in columns)
    body = [
        f'<tr><th scope="row" class="left">{text(label)}</th>{"".join(map(cell, line))}</tr>'
        for label, line in zip(rows, values, strict=True)
    ]
    grid = _scroll(
        f'<table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{_join(body)}</tbody></table>"
    )
    low, high, opposite = (fixed(limit, digits) for limit in (low, high, -high))
    return stack(grid, _legend(low, high, opposite if negative else ""))


# ---------------------------------------------------------------------------- images


def image(pixels: np.ndarray | Image.Image, *, size: int = 320, caption: str = "") -> str:
    """An image within the page.

    If its longer side is below 128 pixels, every pixel is kept (PNG), enlarged by the greatest
    whole factor that fits `size`. Otherwise it is reduced to at most `size` and stored as WebP.

    Args:
      pixels: uint8 [H, W, 3], or a Pillow image of 8 bits per channel. Transparent parts become
      white.
      size: pixels of the longer side on the page.
      caption: shown below the image; also its alternative text.

    Raises:
      ValueError: another shape or dtype, an empty image, or a Pillow mode of more than 8 bits.
    """
    shown = _rgb(pixels, caption)
    content, factor, look = io.BytesIO(), 1, ""
    if max(shown.size) < _SMALL:
        kind, factor, look = "png", max(1, size // max(shown.size)), ' class="pixels"'
        shown.save(content, "PNG", optimize=True)
    else:
        kind = "webp"
        shown.thumbnail((size, size), Image.Resampling.LANCZOS)
        shown.save(content, "WEBP", quality=85)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img{look} src="data:image/{kind};base64,{data}" width="{shown.width * factor}" '
        f'height="{shown.height * factor}" alt="{text(caption)}" decoding="async">{below}</figure>'
    )


def _rgb(pixels: np.ndarray | Image.Image, caption: str) -> Image.Image:
    """A new RGB image, checked; `caption` names it in the error."""
    if isinstance(pixels, Image.Image):
        if pixels.mode.startswith(("I", "F")) or not pixels.width * pixels.height:
            raise ValueError(
                f"image {caption!r}: mode {pixels.mode}, {pixels.width} x {pixels.height} pixels; "
                "needs 8 bits per channel and at least one pixel"
            )
        if pixels.has_transparency_data:
            pixels = pixels.convert("RGBA")
            pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
        return pixels.convert("RGB")
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(
            f"image {caption!r}: {array.dtype} {array.shape}; needs uint8 [H, W, 3] or a Pillow "
            "image"
        )
    return Image.fromarray(np.ascontiguousarray(array))


# ---------------------------------------------------------------------------- tokens


def tokens(
    pieces: Sequence[str],
    values: Sequence[float | None],
    *,
    unit: str,
    top: float | None = None,
    digits: int = 3,
) -> str:
    """Text with a background for each token: none at 0, full from `top`.

    Pointing at a token shows its value. Negative values have a second colour, infinite ones the
    full colour; tokens without value (None, NaN) are underlined. Line breaks and tabs are shown as
    ↵ and ⇥, edges of tokens as thin lines, an empty piece as ∅.

    Args:
      pieces: [N] the text of each token.
      values: [N] one value for each token, in `unit`.
      top: value of the full colour. Default: the 95th percentile of the sizes, or the greatest if
        that is 0.
      digits: number of decimal places.

    Raises:
      ValueError: the numbers of pieces and values differ.
    """
    data = np.asarray([math.nan if value is None else value for value in values], np.float64)
    if data.shape != (len(pieces),):
        raise ValueError(f"tokens: {len(pieces)} pieces, but values of shape {data.shape}")
    if not len(pieces):
        return note(f"{_DASH} no tokens")
    sizes, meaning = np.abs(data[np.isfinite(data)]), ""
    if top is None:
        top, meaning = float(np.percentile(sizes, 95)) if sizes.size else 0.0, " (95th percentile)"
        if not top:
            top, meaning = float(sizes.max(initial=0.0)), " (greatest)"

    def span(piece, value):
        shown = text(piece).replace("\n", "<i>↵</i>\n").replace("\t", "<i>⇥</i>\t") or "<i>∅</i>"
        look = ' class="none"' if math.isnan(value) else _colour(value, 0.0, top)
        return f'<span{look} title="{text(f"{fixed(value, digits)} {unit}")}">{shown}</span>'

    missing = int(np.isnan(data).sum())
    more = " and more" if sizes.size and sizes.max() > top else ""
    most = (
        f"{fixed(top, digits)} {unit}{meaning}{more}; {len(pieces)} token{'s' * (len(pieces) > 1)}"
    )
    most += f"; {missing} without value (underlined)" if missing else ""
    return (
        f'<div><div class="tokens">{"".join(map(span, pieces, data))}</div>'
        f"{_legend('0', most, fixed(-top, digits) if (data < 0).any() else '')}</div>"
    )


# ---------------------------------------------------------------------------- samples


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of a list.

    Attributes:
      title: shown also while the sample is collapsed.
      parts: its content, HTML.
      hit: whether the answer is right; None if it is not judged.
      note: a grey line above the parts.
    """

    title: str
    parts: Sequence[str]
    hit: bool | None = None
    note: str = ""

    @property
    def kind(self) -> Literal["hit", "miss", "unjudged"]:
        return "unjudged" if self.hit is None else "hit" if self.hit else "miss"


_MARKS = {"hit": "✓ hit", "miss": "✗ miss", "unjudged": f"{_DASH} not judged"}
_FILTERS = {"all": "all", "hit": "hits", "miss": "misses", "unjudged": "not judged"}


def samples(items: Sequence[Sample]) -> str:
    """A browsable list of samples, with a filter by hit and miss where there are both.

    Each sample links to the previous and the next one that is shown. The n-th has the anchor #s<n>,
    counted from 1. Those after the 30th are shown collapsed; following a link to one opens it.
    Where none is judged, none is marked.
    """
    if not items:
        return note(f"{_DASH} no samples")
    numbered = {
        kind: [n for n, item in enumerate(items, 1) if item.kind == kind] for kind in _MARKS
    }
    kinds = [kind for kind, members in numbered.items() if members]
    numbered["all"] = list(range(1, len(items) + 1))
    choice = [
        f'<input type="radio" name="s-show" id="s-{kind}" class="s-{kind}"'
        f"{' checked' if kind == 'all' else ''}>"
        f' <label for="s-{kind}">{label} ({len(numbered[kind])})</label>'
        for kind, label in _FILTERS.items()
        if len(kinds) > 1 and numbered[kind]
    ]
    shown = []
    for n, item in enumerate(items, 1):
        # The anchor is inside <details>: browsers open it for a link to something inside it, not
        # for a link to itself.
        is_open = " open" if n <= _OPEN_SAMPLES else ""
        mark = "" if kinds == ["unjudged"] else f"<b>{_MARKS[item.kind]}</b>"
        shown.append(
            f'<details class="{item.kind}"{is_open}>'
            f"<summary>{mark}{n}. {_spans(item.title)}</summary>"
            f'<div id="s{n}">{note(item.note) if item.note else ""}{_join(item.parts)}'
            f"{_neighbours('any', n, numbered['all'])}"
            f"{_neighbours('same', n, numbered[item.kind])}</div></details>"
        )
    return f"{_SAMPLES}{_join(choice)}\n{_join(shown)}</section>"


def _neighbours(look: str, n: int, listed: list[int]) -> str:
    """Links from sample `n` to the previous and the next of the listed ones."""
    place = listed.index(n)
    links = [f'<a href="#s{listed[place - 1]}">← previous</a>'] if place else []
    links += [f'<a href="#s{m}">next →</a>' for m in listed[place + 1 : place + 2]]
    return f'<nav class="{look}">{"".join(links)}</nav>'


# ---------------------------------------------------------------------------- helpers


def _spans(content: str) -> str:
    """Escaped text, with `code` and **bold**."""
    pattern = r"`([^`\n]+)`|\*\*(\S(?:.*?\S)??)\*\*"

    def span(match):
        if match[1] is not None:
            return f"<code>{match[1]}</code>"
        return f"<strong>{re.sub(pattern, span, match[2])}</strong>"

    return re.sub(pattern, span, text(content))


def _cell(value: Cell) -> str:
    if value is None:
        return _DASH
    if isinstance(value, Part):
        return value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return (f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))).replace("-", "−")
    if isinstance(value, numbers.Real) and 0 < abs(value) < 9999.5:
        return f"{value:#.4g}".replace("-", "−")  # with closing zeros: decimal points align
    return number(float(value)) if isinstance(value, numbers.Real) else text(value)


def _join(parts: Sequence[str]) -> str:
    """Parts as one string. ValueError for a part that is not a string (a list, forgotten to
    unpack)."""
    for position, part in enumerate(parts):
        if not isinstance(part, str):
            raise ValueError(
                f"part {position} is a {type(part).__name__}; parts are HTML strings (unpack lists "
                "with *)"
            )
    return "\n".join(parts)


def _scroll(inside: str) -> str:
    """A box of limited height; the tab index lets the keyboard scroll it."""
    return f'<div class="scroll" tabindex="0">{inside}</div>'


def _colour(value: float, low: float, high: float) -> str:
    """Attributes of a coloured cell or token: none at |value| = low, full at high.

    The strength is at most 0.9: text on the full colour must stay readable.
    """
    share = 1.0 if math.isinf(value) else (abs(value) - low) / (high - low) if high > low else 0.0
    cold = ' class="cold"' if value < 0 else ""
    return f'{cold} style="--v:{round(0.9 * min(max(share, 0.0), 1.0), 3)}"'


def _legend(low: str, high: str, negative: str) -> str:
    """What the colours of `tokens` and `heat` mean."""
    second = f'; 0<span class="scale cold"></span>{text(negative)}' if negative else ""
    return (
        f'<p class="note">Colours: {text(low)}<span class="scale"></span>{text(high)}{second}</p>'
    )
