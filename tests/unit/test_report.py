"""Report pages: escaping, self-containment, numbers, images, honest charts, links."""

import base64
import html
import io
import math
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import browser
from opsd_jax.evaluation import charts
from opsd_jax.evaluation import html as html_lib

EVIL = "<script>alert(\"1\")</script> & 'x'"
VOID = {"meta", "img", "input", "br", "link"}


class Tree(HTMLParser):
    """Checks that tags close in order; keeps tags with their attributes, and the texts."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside of {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str, **attributes) -> list[dict]:
        return [a for t, a in self.tags if t == tag and attributes.items() <= a.items()]


def pixels(*shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def decode(part: str) -> tuple[str, Image.Image]:
    """(format, image) of the data URI."""
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', part).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def cells(part: str) -> list[str]:
    return [
        html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", part, flags=re.DOTALL)
    ]


# Every block with a hostile text in every place that takes text.
BLOCKS = {
    "heading": html_lib.heading(EVIL),
    "section": html_lib.section(EVIL, html_lib.heading(EVIL)),
    "facts": html_lib.facts([(EVIL, EVIL)]),
    "paragraph": html_lib.paragraph(f"{EVIL} **{EVIL}** `{EVIL}`"),
    "note": html_lib.note(EVIL),
    "cautions": html_lib.cautions([EVIL, f"`{EVIL}`"], EVIL),
    "table": html_lib.table([EVIL, "b"], [[EVIL, EVIL], ["a", 1.5]]),
    "empty table": html_lib.table([EVIL], []),
    "image": html_lib.image(pixels(4, 4), caption=EVIL),
    "tokens": html_lib.tokens([EVIL, "a\n"], [1, -2], unit=EVIL),
    "no tokens": html_lib.tokens([], [], unit=EVIL),
    "intervals": charts.intervals([(EVIL, 50, 40, 60), (EVIL, None, None, None)], unit=EVIL),
    "lines": charts.lines({EVIL: [(0, 1), (1, 2)], "b": [(0, None)]}, x=EVIL, y=EVIL),
    "no lines": charts.lines({EVIL: []}, x=EVIL, y=EVIL),
    "heat": html_lib.heat([EVIL], [EVIL, "b"], [[1, -2]]),
    "samples": html_lib.samples(
        [
            html_lib.Sample(EVIL, [html_lib.note(EVIL)], hit, note=EVIL)
            for hit in (True, False, None)
        ]
    ),
    "row of a stack": html_lib.row(html_lib.stack(html_lib.note(EVIL)), html_lib.note(EVIL)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_text_is_escaped_and_every_tag_closed(name):
    tree = Tree(html_lib.page(EVIL, BLOCKS[name]))
    assert not tree.all("script") and "<script" not in BLOCKS[name]
    assert all(not key.startswith("on") for _, attributes in tree.tags for key in attributes)
    if name != "no tokens":  # which shows no text of the caller
        assert html.escape(EVIL) in BLOCKS[name]


def test_attributes_hold_the_texts_unchanged():
    assert Tree(BLOCKS["image"]).all("img")[0]["alt"] == EVIL
    assert Tree(BLOCKS["tokens"]).all("span")[0]["title"] == f"1.000 {EVIL}"
    assert Tree(BLOCKS["lines"]).all("div", role="figure")[0]["aria-label"] == f"{EVIL} over {EVIL}"


def test_page_needs_nothing_from_outside():
    text = html_lib.page("Title", *BLOCKS.values())
    tree = Tree(text)
    assert text.startswith("<!DOCTYPE html>") and tree.all("meta", charset="utf-8")
    assert tree.all("meta", name="viewport")
    policy = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in text
    for _, attributes in tree.tags:
        assert attributes.get("src", "data:").startswith("data:")
        for link in ("href", "xlink:href"):
            assert attributes.get(link, "#").startswith("#")
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_contents_link_to_the_headings():
    parts = [html_lib.heading("A `b` & c"), html_lib.heading("inner", 3), html_lib.heading("d", 4)]
    tree = Tree(html_lib.page("t", *parts, html_lib.heading("last")))
    ids = {a["id"]: tag for tag, a in tree.tags if "id" in a}
    assert ids == {"c1": "h2", "c2": "h3", "c3": "h2"}
    assert [a["href"] for a in tree.all("a")] == ["#c1", "#c2", "#c3"]
    text = html_lib.page("t", *parts, html_lib.heading("last"))
    assert text.index("</h1>") < text.index('<nav class="contents"') < text.index("<h2")
    assert '<a href="#c1">A <code>b</code> &amp; c</a>' in text
    assert "<nav" not in html_lib.page("t", *parts)  # one section needs no contents


def test_sections_have_lower_headings():
    parts = [html_lib.heading("in", 2), html_lib.note("<h2>"), html_lib.heading("deep", 4)]
    tree = Tree(html_lib.page("t", html_lib.section("of all", *parts)))
    levels = [(tag, a.get("id")) for tag, a in tree.tags if re.fullmatch(r"h\d", tag)]
    assert [tag for tag, _ in levels] == ["h1", "h2", "h3", "h5"]


def test_spans_of_code_and_bold():
    assert html_lib.paragraph("a **b `c` d** `e**f**`") == (
        "<p>a <strong>b <code>c</code> d</strong> <code>e**f**</code></p>"
    )
    assert html_lib.paragraph("2 ** 3 ** 4 and `open") == "<p>2 ** 3 ** 4 and `open</p>"
    assert html_lib.paragraph("**K** and **ab**") == (
        "<p><strong>K</strong> and <strong>ab</strong></p>"
    )
    assert html_lib.heading("a `b`", 3) == "<h3>a <code>b</code></h3>"


def test_control_characters_and_surrogates_become_visible():
    part = html_lib.paragraph("a\x1b\x00\x7f\ud800b")
    assert part == "<p>a␛␀␡\ufffdb</p>"
    part.encode("utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font that measures the label lacks ␛
        assert "a␛b" in charts.lines({"a\x1bb": [(0, 1)]}, x="x", y="y")


# ---------------------------------------------------------------------------- tables
def test_cells():
    values = [
        "t",
        9999,
        12345,
        -3,
        True,
        None,
        math.nan,
        math.inf,
        -math.inf,
        0.123456,
        0.5,
        -2.0,
        12345.678,
        9999.7,
        1.5e-7,
        np.float32(0.25),
        np.int64(7),
        0.0,
        3e20,
    ]
    assert cells(html_lib.table(["c"], [[value] for value in values])) == [
        "t",
        "9999",
        "12,345",
        "−3",
        "yes",
        "–",
        "–",
        "∞",
        "−∞",
        "0.1235",
        "0.5000",
        "−2.000",
        "12,346",
        "10,000",
        "1.500e−07",
        "0.2500",
        "7",
        "0",
        "3e+20",
    ]


@pytest.mark.parametrize(
    "rows, match", [([["x", 1], ["y"]], "row 1 .*'y'"), (["x"], "row 0"), (["xy"], "row 0")]
)
def test_table_names_the_bad_row(rows, match):
    with pytest.raises(ValueError, match=match):
        html_lib.table(["a", "b"], rows)


def test_empty_columns_are_left_out():
    columns = ["task", "a", "b", "c"]
    part = html_lib.table(columns, [["x", None, 1, math.nan], ["y", None, None, None]])
    assert re.findall(r"<th [^>]*>(.*?)</th>", part) == ["task", "b"]
    assert cells(part) == ["x", "1", "y", "–"]
    part = html_lib.table(columns, [[None, 0, None, None]])
    assert re.findall(r"<th [^>]*>(.*?)</th>", part) == ["task", "a"]  # 0 is a number
    assert html_lib.table(columns, []).count("<th ") == 4  # of no rows nothing is known


def test_a_cell_may_be_html_if_it_says_so():
    image = html_lib.image(pixels(2, 2), caption="c")
    part = html_lib.table(["a", "b"], [[html_lib.Part(image), image]])
    assert len(Tree(part).all("img")) == 1 and cells(part)[1] == image


def test_numbers_have_one_form():
    assert [html_lib.fixed(x, 1) for x in (5.46, -1.66, -0.01, 0, 12345.67)] == [
        "5.5",
        "−1.7",
        "0.0",
        "0.0",
        "12,345.7",
    ]
    assert [html_lib.fixed(x, 3) for x in (None, math.nan, math.inf, 0.2589)] == [
        "–",
        "–",
        "∞",
        "0.259",
    ]
    assert html_lib.between((-0.5, 1.53), 3) == "−0.500 to 1.530"
    assert html_lib.between(None, 3) == "–"
    row = ["from a to b", html_lib.between((99.3, 100), 1), "one of many"]
    (nowrap,) = re.findall("<td[^>]*nowrap[^>]*>(.*?)</td>", html_lib.table(["a", "b", "c"], [row]))
    assert nowrap == "99.3 to 100.0"  # an interval stays on one line
    assert [html_lib.p_value(p) for p in (1, 0.7541, 0.001, 5e-128)] == [
        "1.000",
        "0.754",
        "0.001",
        "< 0.001",
    ]


def test_heat_colours_from_lowest_to_highest():
    part = html_lib.heat(["r", "s"], ["a", "b"], [[1, 3], [2, math.nan]], digits=1)
    assert cells(part) == ["1.0", "3.0", "2.0", "–"]
    assert "".join(Tree(html_lib.heat(["r"], ["a"], [[1e-7]], digits=1)).texts).count("0.0") == 3
    strengths = [a.get("style") for a in Tree(part).all("td")]
    assert strengths == ["--v:0.0", "--v:0.9", "--v:0.45", None]


def test_heat_with_negative_values_goes_both_ways_from_zero():
    part = html_lib.heat(["r"], ["a", "b", "c", "d"], [[1, -2, 0, -math.inf]])
    assert cells(part) == ["1.00", "−2.00", "0.00", "−∞"]
    assert [(a.get("class"), a["style"]) for a in Tree(part).all("td")] == [
        (None, "--v:0.45"),
        ("cold", "--v:0.9"),
        (None, "--v:0.0"),
        ("cold", "--v:0.9"),
    ]


def test_heat_of_nothing():
    assert cells(html_lib.heat(["r"], ["a"], [[math.nan]])) == ["–"]
    for values in ([[1, 2]], np.zeros((0, 1))):
        with pytest.raises(ValueError, match="heat: values of shape"):
            html_lib.heat(["r"], ["a"], values)


# ---------------------------------------------------------------------------- images
@pytest.mark.parametrize("height, width, factor", [(16, 12, 20), (127, 64, 2), (1, 1, 320)])
def test_small_images_keep_every_pixel(height, width, factor):
    image = pixels(height, width)
    for source in (image, Image.fromarray(image), np.asfortranarray(image)):
        part = html_lib.image(source, caption="c")
        kind, decoded = decode(part)
        shown = Tree(part).all("img")[0]
        assert kind == "png" and np.array_equal(np.asarray(decoded), image)
        assert (shown["width"], shown["height"]) == (str(width * factor), str(height * factor))
        assert shown["class"] == "pixels" and shown["alt"] == "c"


def test_large_images_are_reduced():
    column, line = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 400))
    array = np.stack([column, line, 255 - column], -1).astype(np.uint8)
    image = Image.fromarray(array)
    kind, decoded = decode(html_lib.image(image))
    assert kind == "webp" and decoded.size == (320, 200)
    wanted = np.asarray(image.resize((320, 200))).astype(int)
    assert np.abs(np.asarray(decoded.convert("RGB")).astype(int) - wanted).mean() < 4
    assert decode(html_lib.image(image, size=64))[1].size == (64, 40)
    assert decode(html_lib.image(image, size=2000))[1].size == (640, 400)  # never enlarged
    assert image.size == (640, 400)  # the caller's image is left alone


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (9, 9, 9, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    shown = np.asarray(decode(html_lib.image(image))[1]).tolist()
    assert shown == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("I;16", (2, 2)),
        Image.new("RGB", (0, 2)),
    ],
)
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match="image 'maze'"):
        html_lib.image(image, caption="maze")


# ---------------------------------------------------------------------------- tokens
def test_tokens_hold_text_values_and_colours():
    part = html_lib.tokens(
        ["a", " b", "\n", "", "\t", "c"], [0.5, 2, -4, math.nan, math.inf, 0], unit="nats", top=2
    )
    tree = Tree(part)
    spans = [a for a in tree.all("span") if "title" in a]
    assert [a["title"].removesuffix(" nats") for a in spans] == [
        "0.500",
        "2.000",
        "−4.000",
        "–",
        "∞",
        "0.000",
    ]
    strengths = [a.get("style", "--v:none").removeprefix("--v:") for a in spans]
    assert strengths == ["0.225", "0.9", "0.9", "none", "0.9", "0.0"]
    assert [a.get("class") for a in spans] == [None, None, "cold", "none", None, None]
    assert "".join(tree.texts).startswith("a b↵\n∅⇥\tc")
    assert "1 without value" in part and "6 tokens" in part


def test_full_colour_is_the_95th_percentile_by_default():
    part = html_lib.tokens(["x"] * 101, list(range(101)), unit="nats")
    strengths = [float(s) for s in re.findall(r"--v:([\d.]+)", part)]
    assert strengths[95:] == [0.9] * 6 and strengths[94] < 0.9  # values 95 to 100, and 94
    assert "95.000 nats (95th percentile) and more; 101 tokens" in part
    part = html_lib.tokens(["x"] * 101, [0] * 100 + [3], unit="nats", digits=1)
    assert "3.0 nats (greatest);" in part and part.count("--v:0.9") == 1
    assert "--v:0.9" not in html_lib.tokens(["x"], [0], unit="nats")
    assert Tree(html_lib.tokens(["a", "b"], [math.nan, None], unit="nats"))  # nothing measured
    with pytest.raises(ValueError, match="2 pieces"):
        html_lib.tokens(["a", "b"], [1], unit="nats")


# ---------------------------------------------------------------------------- cautions
def test_cautions_of_a_page_are_exchanged():
    page = html_lib.page("a", html_lib.cautions([]), html_lib.paragraph("b"))
    empty = '<section class="cautions"></section>'
    assert page.count(empty) == 1
    told = html_lib.with_cautions(page, [r"few \1 examples", EVIL], "of the run")
    assert Tree(told) and html.unescape(told).count(r"<strong>few \1 examples</strong>") == 1
    assert told.index("of the run") < told.index("few") < told.index("<p>b</p>")
    assert html_lib.with_cautions(told, []) == page
    without = html_lib.page("a", html_lib.paragraph("b"))
    assert html_lib.with_cautions(without, ["few"]) == without


# ---------------------------------------------------------------------------- charts
@pytest.fixture
def figures(monkeypatch):
    """The figures that charts are made of, instead of their SVG."""
    found = []
    monkeypatch.setattr(charts, "_svg", lambda figure, label: found.append(figure) or label)
    return found


def test_intervals_show_what_they_say(figures):
    label = charts.intervals(
        [("maze", 50, 40, 62.55), ("jigsaw", 25, None, None), ("none", math.nan, 1, 2)]
    )
    assert label == "maze: 50.0 % (40.0 to 62.5), jigsaw: 25.0 %, none: –"
    (axes,) = figures[0].axes
    assert axes.get_xlim() == (0, 100) and axes.get_xscale() == "linear"
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 50), (0, 25), (0, 0)]
    (whiskers,) = axes.collections
    ends = [path.vertices[:, 0].tolist() for path in whiskers.get_paths()]
    assert ends[:2] == [[40, 62.55], [25, 25]]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["maze: 50.0 % (40.0 to 62.5)", "jigsaw: 25.0 %", "none: –"]
    assert axes.yaxis_inverted()  # the first on top
    tops = [bar.get_y() for bar in axes.patches]  # each text ends above its own bar
    assert all(top - 1 < text.get_position()[1] < top for text, top in zip(axes.texts, tops))


def test_long_labels_of_bars_are_wrapped(figures):
    long = "teacher: start, with true visual thoughts"  # 42 characters with its colon
    charts.intervals([(long, 100, 99, 100), (f"{long} {long}", 50, 40, 60), ("b", 1, 0, 2)])
    (axes,) = figures[0].axes
    lines = [text.get_text().splitlines() for text in axes.texts]
    assert [len(found) for found in lines] == [2, 3, 1]
    assert lines[0] == [f"{long}:", "100.0 % (99.0 to 100.0)"]
    assert max(len(line) for found in lines for line in found) <= 48
    # in lines, each with a bar and a gap after the text: 4, 5 and 3; the middle of the bar
    assert [bar.get_y() + 0.5 for bar in axes.patches] == [2.5, 7.5, 10.5]


def test_intervals_below_zero(figures):
    charts.intervals([("a", -4, -6, 2), ("b", 5, 4, 6)], unit="points", top=10)
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    assert low < -6 and high == 10
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, -4), (0, 5)]
    assert axes.texts[0].get_text() == "a: −4 points (−6 to 2)"
    assert axes.texts[0].get_position()[0] == low  # at the left edge


@pytest.mark.parametrize(
    "row", [("maze", 50, 60, 70), ("maze", 101, 90, 105), ("maze", 99, 90, 105)]
)
def test_intervals_that_would_be_cut_off_are_refused(row):
    with pytest.raises(ValueError, match="'maze'.*low <= value <= high <= top=100"):
        charts.intervals([("fine", 1, 0, 2), row])
    assert "no rows" in charts.intervals([])


def test_lines_meet_their_points(figures):
    charts.lines({"loss": [(0, 0), (5, 50), (10, 100)]}, x="step", y="nats")
    (axes,) = figures[0].axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [5, 50], [10, 100]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "nats")
    assert axes.get_xscale() == axes.get_yscale() == "linear"
    for (low, high), first, last in ((axes.get_xlim(), 0, 10), (axes.get_ylim(), 0, 100)):
        assert low <= first and last <= high <= 1.1 * last  # every point is within the axes


def test_thin_lines_have_the_colour_of_their_series_and_no_entry_in_the_legend(figures):
    seeds = [[(0, 1), (1, 3)], [(0, 3), (1, 5)]]
    charts.lines({"a": [(0, 2), (1, 4)], "b": [(0, 0)]}, x="x", y="y", thin={"a": seeds})
    mean, *thin, other = figures[0].axes[0].lines
    assert [line.get_xydata().tolist() for line in thin] == [[[0, 1], [1, 3]], [[0, 3], [1, 5]]]
    assert {line.get_color() for line in thin} == {mean.get_color()} != {other.get_color()}
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "b"]


def test_missing_points_interrupt_a_line(figures):
    y = [1, 2, math.nan, 3, math.inf, 1, None, 2, 2]
    points = list(enumerate(y))
    charts.lines({"a": points, "b": [(0, None)]}, x="x", y="y")
    line = figures[0].axes[0].lines[0]
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), [0, 0, 1, 0, 1, 0, 1, 0, 0])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["a (3 without value)", "b (– no values)"]
    assert np.sum(line.get_markevery()) == 6

    many = [(i, i) for i in range(100)] + [(100, None), (101, 5), (102, None)]
    charts.lines({"a": many}, x="x", y="y")  # too many to mark each: only what no line would show
    (marked,) = np.flatnonzero(figures[1].axes[0].lines[0].get_markevery())
    assert marked == 101


def test_many_series_are_told_apart(figures):
    charts.lines({f"s{i}": [(0, i), (1, i)] for i in range(9)}, x="x", y="y")
    looks = [(line.get_color(), line.get_linestyle()) for line in figures[0].axes[0].lines]
    assert len(set(looks)) == 9
    with pytest.raises(ValueError, match="17 series"):
        charts.lines({str(i): [(0, 1)] for i in range(17)}, x="x", y="y")


@pytest.mark.parametrize(
    "points",
    [[(3, 5)], [(0, 0), (0, 0)], [(0, 1.0), (1, 1.0 + 1e-15)], [(0, -1e12), (1, 1e12)]],
)
def test_narrow_and_wide_ranges(points):
    part = charts.lines({"a": points}, x="x", y="y")
    assert "nan" not in part and "inf" not in part


# ---------------------------------------------------------------------------- samples
def items(*hits):
    return [
        html_lib.Sample(f"maze {i}", [html_lib.note(f"part {i}")], hit)
        for i, hit in enumerate(hits)
    ]


def test_samples_show_marks_counts_and_parts():
    tree = Tree(html_lib.samples(items(True, False, None, True)))
    assert [a["class"] for a in tree.all("details")] == ["hit", "miss", "unjudged", "hit"]
    assert all("open" in a for a in tree.all("details"))
    texts = "".join(tree.texts)
    for wanted in (
        "all (4)",
        "hits (2)",
        "misses (1)",
        "not judged (1)",
        "✓ hit1. maze 0",
        "✗ miss2. maze 1",
        "part 2",
    ):
        assert wanted in texts
    assert "not judged" not in html_lib.samples(items(True, False))
    assert len([a for a in tree.all("input") if "checked" in a]) == 1


def test_links_lead_to_the_neighbours_that_are_shown():
    part = html_lib.samples(items(True, False, True))
    third = part[part.index('id="s3"') :]
    assert re.findall(r'<nav class="(\w+)">(.*?)</nav>', third) == [
        ("any", '<a href="#s2">← previous</a>'),
        ("same", '<a href="#s1">← previous</a>'),
    ]
    second = part[part.index('id="s2"') : part.index('id="s3"')]
    assert re.findall(r'href="([^"]+)"', second) == [
        "#s1",
        "#s3",
    ]  # the only miss: no neighbours of its kind


def test_samples_after_the_thirtieth_are_collapsed():
    for count in (30, 31, 33):
        are_open = [
            "open" in a for a in Tree(html_lib.samples(items(*[True] * count))).all("details")
        ]
        assert are_open == [True] * 30 + [False] * (count - 30)


def test_only_what_is_judged_can_be_filtered():
    unjudged = html_lib.samples(items(None, None))
    assert not Tree(unjudged).all("input") and "judged" not in "".join(Tree(unjudged).texts)
    assert "1. maze 0" in unjudged
    all_right = Tree(html_lib.samples(items(True, True)))
    assert not all_right.all("input") and "".join(all_right.texts).count("✓ hit") == 2
    mixed = Tree(html_lib.samples(items(True, None)))
    assert [a["id"] for a in mixed.all("input")] == ["s-all", "s-hit", "s-unjudged"]


def test_several_lists_of_samples_on_a_page_keep_their_links():
    lists = [html_lib.samples(items(*[True, False] * 3)) for _ in range(3)]
    tree = Tree(
        html_lib.page("t", lists[0], html_lib.stack(html_lib.note("between"), lists[1]), lists[2])
    )
    ids = [a["id"] for _, a in tree.tags if "id" in a]
    assert len(set(ids)) == len(ids) == 3 * (6 + 3) and {"s6", "s2_6", "s3_6", "s3_-all"} <= set(
        ids
    )
    assert {a["href"] for a in tree.all("a")} == {
        f"#{i}" for i in ids if not i.endswith(("all", "hit", "miss"))
    }
    assert {a["for"] for a in tree.all("label")} == {
        i for i in ids if i.endswith(("all", "hit", "miss"))
    }
    assert sorted({a["name"] for a in tree.all("input")}) == ["s-show", "s2_-show", "s3_-show"]


@browser.needs_browser
def test_a_phone_shows_every_block_without_scrolling_sideways(tmp_path):
    long = "word " * 60 + "x" * 300
    blocks = [
        html_lib.facts([("command", f"`python -m {'--flag=value ' * 20}`")]),
        html_lib.table([long, *"abcdefghijkl"], [[long[:80], *range(10_000, 10_012)]]),
        html_lib.row(*[html_lib.image(pixels(200, 640))] * 2, html_lib.stack(html_lib.note(long))),
        html_lib.tokens([long] * 3, [1, 2, 3], unit="nats"),
        html_lib.samples([html_lib.Sample(long, [html_lib.paragraph(long)], True)] * 2),
    ]
    page = tmp_path / "page.html"
    for parts in (blocks, BLOCKS.values()):
        page.write_text(html_lib.page(long, *parts, html_lib.heading(long), html_lib.heading("b")))
        assert browser.scroll_width(page, tmp_path, 390) == 390
    wide = '<div style="width: 500px">wide</div>'  # what it would find
    page.write_text(html_lib.page("t", wide))
    assert browser.scroll_width(page, tmp_path, 390) > 390


@browser.needs_browser
def test_a_wide_table_shows_on_a_phone_that_it_scrolls(tmp_path):
    """A shadow at its right side; a table that fits has none."""
    page, darkest = tmp_path / "page.html", []
    for columns in (3, 30):
        table = html_lib.table(["x"] * columns, [[""] * columns] * 30)
        page.write_text(html_lib.page("t", "<style>td { border: 0 !important }</style>", table))
        pixels = browser.screenshot(page, tmp_path, 500, 400)  # the least width of a window
        darkest.append(int(np.median(pixels[250:300, 470:485], axis=0).min()))
    assert darkest[0] > 240 > 200 > darkest[1], darkest


def test_parts_are_strings():
    for block in (html_lib.stack, html_lib.row, lambda *parts: html_lib.page("t", *parts)):
        with pytest.raises(ValueError, match="part 1 is a list"):
            block("<p></p>", ["<p></p>"])
    assert "no samples" in html_lib.samples([])
