"""Blocks of HTML pages: escaping, tags, pictures, numbers, links, files."""

import base64
import html
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

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
    """(format, picture) of the data URI."""
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', part).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def cells(part: str) -> list[str]:
    return [
        html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", part, flags=re.DOTALL)
    ]


# Every block with a hostile text in every place that takes text.
BLOCKS = {
    "heading": html_lib.heading(EVIL),
    "paragraph": html_lib.paragraph(f"{EVIL} **{EVIL}** `{EVIL}`"),
    "note": html_lib.note(EVIL),
    "table": html_lib.table([EVIL, "b"], [[EVIL, EVIL], ["a", 1.5]]),
    "empty table": html_lib.table([EVIL], []),
    "picture": html_lib.picture(pixels(4, 4), caption=EVIL),
    "tokens": html_lib.tokens([EVIL, "a\n"], [1, -2], unit=EVIL),
    "no tokens": html_lib.tokens([], [], unit=EVIL),
    "intervals": html_lib.intervals([(EVIL, 50, 40, 60), (EVIL, None, None, None)], unit=EVIL),
    "lines": html_lib.lines({EVIL: [(0, 1), (1, 2)], "b": [(0, None)]}, x=EVIL, y=EVIL),
    "no lines": html_lib.lines({EVIL: []}, x=EVIL, y=EVIL),
    "heat": html_lib.heat([EVIL], [EVIL, "b"], [[1, -2]]),
    "samples": html_lib.samples(
        [
            {"title": EVIL, "hit": h, "parts": [html_lib.note(EVIL)], "note": EVIL}
            for h in (True, False, None)
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
    assert Tree(BLOCKS["picture"]).all("img")[0]["alt"] == EVIL
    assert Tree(BLOCKS["tokens"]).all("span")[0]["title"] == f"1 {EVIL}"
    assert Tree(BLOCKS["lines"]).all("svg", role="img")[0]["aria-label"] == f"{EVIL} over {EVIL}"


def test_page_needs_nothing_from_outside():
    text = html_lib.page("Title", *BLOCKS.values())
    tree = Tree(text)
    assert text.startswith("<!DOCTYPE html>") and tree.all("meta", charset="utf-8")
    assert tree.all("meta", name="viewport")
    assert (
        "default-src 'none'"
        in tree.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    )
    assert "prefers-color-scheme:dark" in text
    for _, attributes in tree.tags:
        assert attributes.get("src", "data:").startswith("data:") and attributes.get(
            "href", "#"
        ).startswith("#")
    assert (
        "http:" not in text
        and "https:" not in text
        and "@import" not in text
        and "url(" not in text
    )


def test_spans_of_code_and_bold():
    assert html_lib.paragraph("a **b `c` d** `e**f**`") == (
        "<p>a <strong>b <code>c</code> d</strong> <code>e**f**</code></p>"
    )
    assert html_lib.paragraph("2 ** 3 ** 4 and `open") == "<p>2 ** 3 ** 4 and `open</p>"
    assert html_lib.heading("a `b`", 3) == "<h3>a <code>b</code></h3>"
    with pytest.raises(ValueError, match="levels 1 to 6"):
        html_lib.heading("a", 7)


def test_control_characters_and_surrogates_become_visible():
    part = html_lib.paragraph("a\x1b\x00\x7f\ud800b")
    assert part == "<p>a␛␀␡\ufffdb</p>"
    part.encode("utf-8")


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


def test_alignment():
    tree = Tree(html_lib.table(["a", "b", "c"], [["x", 1, 2]]))
    assert (
        [a["class"] for a in tree.all("td")]
        == [a["class"] for a in tree.all("th")]
        == ["left", "right", "right"]
    )
    tree = Tree(html_lib.table(["a", "b"], [["x", "y"]], align=["center", "left"]))
    assert [a["class"] for a in tree.all("td")] == ["center", "left"]


@pytest.mark.parametrize(
    "arguments, match",
    [
        (([], []), "without columns"),
        ((["a", "b"], [["x", 1], ["y"]]), "row 1 .*'y'"),
        ((["ab"], ["x"]), "row 0"),
        ((["a"], [[[1]]]), "row 0, column 'a'.*list"),
    ],
)
def test_table_names_the_bad_row(arguments, match):
    with pytest.raises(ValueError, match=match):
        html_lib.table(*arguments)


@pytest.mark.parametrize("align", [["left"], ["left", "top"]])
def test_table_refuses_a_bad_alignment(align):
    with pytest.raises(ValueError, match="align"):
        html_lib.table(["a", "b"], [], align=align)


def test_heat_colours_from_lowest_to_highest():
    part = html_lib.heat(["r", "s"], ["a", "b"], [[1, 3], [2, math.nan]], digits=1)
    assert cells(part) == ["1.0", "3.0", "2.0", "–"]
    assert [a.get("style") for a in Tree(part).all("td")] == [
        "--v:0.0",
        "--v:0.9",
        "--v:0.45",
        None,
    ]


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
    for rows, columns, values in (
        (["r"], ["a"], [[1, 2]]),
        ([], ["a"], np.zeros((0, 1))),
        (["r"], [], [[]]),
    ):
        with pytest.raises(ValueError, match="heat: values of shape"):
            html_lib.heat(rows, columns, values)


# ---------------------------------------------------------------------------- pictures
@pytest.mark.parametrize(
    "height, width, factor", [(16, 12, 20), (127, 64, 2), (1, 1, 320), (100, 100, 3)]
)
def test_small_pictures_keep_every_pixel(height, width, factor):
    image = pixels(height, width)
    for source in (image, Image.fromarray(image), np.asfortranarray(image)):
        part = html_lib.picture(source, caption="c")
        kind, decoded = decode(part)
        shown = Tree(part).all("img")[0]
        assert kind == "png" and np.array_equal(np.asarray(decoded), image)
        assert (shown["width"], shown["height"]) == (str(width * factor), str(height * factor))
        assert shown["class"] == "pixels" and shown["alt"] == "c"


def test_large_pictures_are_reduced():
    column, line = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 400))
    image = np.stack([column, line, 255 - column], -1).astype(np.uint8)
    kind, decoded = decode(html_lib.picture(image))
    assert kind in ("webp", "jpeg") and decoded.size == (320, 200)
    wanted = np.asarray(Image.fromarray(image).resize((320, 200))).astype(int)
    assert np.abs(np.asarray(decoded.convert("RGB")).astype(int) - wanted).mean() < 4
    assert decode(html_lib.picture(image, size=64))[1].size == (64, 40)
    assert decode(html_lib.picture(image, size=2000))[1].size == (640, 400)  # never enlarged
    assert 'class="pixels"' not in html_lib.picture(pixels(128, 8))


def test_large_picture_leaves_the_callers_image_alone():
    image = Image.fromarray(pixels(200, 400))
    html_lib.picture(image, size=50)
    assert image.size == (400, 200)


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (9, 9, 9, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(decode(html_lib.picture(image))[1]).tolist() == [
        [[255, 255, 255], [10, 20, 30]]
    ]
    assert np.asarray(decode(html_lib.picture(Image.new("L", (1, 1), 7)))[1]).tolist() == [
        [[7, 7, 7]]
    ]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("I;16", (2, 2)),
        Image.new("F", (2, 2)),
        Image.new("RGB", (0, 2)),
    ],
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match="picture 'maze'"):
        html_lib.picture(image, caption="maze")


def test_picture_size_is_checked():
    with pytest.raises(ValueError, match="size 0"):
        html_lib.picture(pixels(2, 2), size=0)


# ---------------------------------------------------------------------------- tokens
def test_tokens_hold_text_values_and_colours():
    part = html_lib.tokens(
        ["a", " b", "\n", "", "\t", "c"], [0.5, 2, -4, math.nan, math.inf, 0], unit="nats", top=2
    )
    tree = Tree(part)
    spans = [a for a in tree.all("span") if "title" in a]
    assert [a["title"] for a in spans] == [
        "0.5 nats",
        "2 nats",
        "−4 nats",
        "– nats",
        "∞ nats",
        "0 nats",
    ]
    assert [a.get("style") for a in spans] == [
        "--v:0.225",
        "--v:0.9",
        "--v:0.9",
        None,
        "--v:0.9",
        None,
    ]
    assert [a.get("class") for a in spans] == [None, None, "cold", "none", None, None]
    assert "".join(tree.texts).startswith("a b↵\n∅⇥\tc")
    assert "1 without value" in part and "6 tokens" in part


def test_full_colour_is_the_95th_percentile_by_default():
    values = list(range(101))
    part = html_lib.tokens(["x"] * 101, values, unit="nats")
    strengths = [float(s) for s in re.findall(r"--v:([\d.]+)", part)]
    assert (
        strengths[94:] == [0.9] * 6 and strengths[93] < 0.9
    )  # values 95..100, and 94; 0 has no colour
    assert "95 nats (95th percentile)" in part
    part = html_lib.tokens(["x"] * 101, [0] * 100 + [3], unit="nats")
    assert "3 nats (greatest)" in part and part.count("--v:0.9") == 1
    assert "--v" not in html_lib.tokens(["x"], [0], unit="nats")


def test_bad_tokens():
    with pytest.raises(ValueError, match="2 pieces"):
        html_lib.tokens(["a", "b"], [1], unit="nats")
    for top in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="top"):
            html_lib.tokens(["a"], [1], unit="nats", top=top)
    assert "no tokens" in html_lib.tokens([], [], unit="nats")
    assert Tree(html_lib.tokens(["a", "b"], [math.nan, None], unit="nats"))  # nothing measured


# ---------------------------------------------------------------------------- charts
def test_intervals_draw_what_they_say():
    part = html_lib.intervals(
        [("maze", 50, 40, 62.55), ("jigsaw", 25, None, None), ("none", math.nan, 1, 2)]
    )
    tree = Tree(part)
    assert [(a["x"], a["width"]) for a in tree.all("rect")] == [
        ("0.00%", "50.00%"),
        ("0.00%", "25.00%"),
    ]
    ends = [(a["x1"], a["x2"]) for a in tree.all("line", y1="13")]
    assert ends == [("40.00%", "62.55%")]
    shown = cells(part)
    assert (
        shown[1].startswith("50.0 % <small>(40.0 to 62.5")
        and shown[3] == "25.0 %"
        and shown[5] == "–"
    )
    assert [t for t in tree.texts if t.isdigit()] == ["0", "20", "40", "60", "80", "100"]


def test_intervals_below_zero():
    tree = Tree(html_lib.intervals([("a", -4, -6, 2), ("b", 5, 4, 6)], unit="points", top=10))
    assert [(a["x"], a["width"]) for a in tree.all("rect")] == [
        ("30.00%", "20.00%"),
        ("50.00%", "25.00%"),
    ]
    assert "−4 points " in tree.texts and "−10" in tree.texts


@pytest.mark.parametrize(
    "row, match",
    [
        (("maze", 50, 60, 70), "low <= value <= high"),
        (("maze", 101, 90, 105), "top=100"),
        (("maze", 99, 90, 105), "top=100"),
        (("maze", math.inf, 1, 2), "finite"),
        (("maze", 5, 1, None), "both ends"),
        (("maze", 5, 1), r"needs \(label"),
    ],
)
def test_bad_intervals_name_the_row(row, match):
    with pytest.raises(ValueError, match=f"row 1.*maze.*{match}"):
        html_lib.intervals([("fine", 1, 0, 2), row])


def test_intervals_of_nothing():
    assert "no rows" in html_lib.intervals([])
    for top in (0, math.nan):
        with pytest.raises(ValueError, match="top"):
            html_lib.intervals([("a", 1, 0, 2)], top=top)


def test_lines_meet_their_points():
    part = html_lib.lines({"loss": [(0, 0), (5, 50), (10, 100)]}, x="step", y="nats")
    tree = Tree(part)
    path = tree.all("path")[0]["d"]
    path = np.array(
        [[float(v) for v in pair.split(",")] for pair in path.removeprefix("M").split()]
    )
    dots = np.array([[float(a["cx"][:-1]), float(a["cy"][:-1])] for a in tree.all("circle")])
    # The axes show 0 to 10, and 0 to 104 from the bottom (4 % of the range are left free above).
    np.testing.assert_allclose(
        path, [[0, 1000], [500, 1000 * 54 / 104], [1000, 1000 * 4 / 104]], atol=0.06
    )
    np.testing.assert_allclose(dots, path / 10, atol=0.02)
    assert "loss: 50 at 5" in tree.texts and "step" in tree.texts and "nats" in tree.texts
    ticks = {
        t["y"]: text
        for t, text in zip(
            tree.all("text"), re.findall(r"<text[^>]*>(.*?)</text>", part), strict=True
        )
        if t.get("text-anchor") == "end"
    }
    assert ticks["100.00%"] == "0" and ticks["3.85%"] == "100"


def test_missing_points_interrupt_a_line():
    points = [
        (0, 1),
        (1, 2),
        (2, math.nan),
        (3, 3),
        (4, math.inf),
        (5, 1),
        (6, None),
        (7, 2),
        (8, 2),
    ]
    part = html_lib.lines({"a": points, "b": [(0, None)]}, x="x", y="y")
    assert Tree(part).all("path")[0]["d"].count("M") == 2  # 0 to 1, 7 to 8; 3 and 5 stand alone
    assert part.count("<circle") == 6
    assert "a (3 without value)" in part and "b (– no values)" in part


def test_many_points_have_no_dots_and_many_series_are_dashed():
    assert "<circle" not in html_lib.lines({"a": [(i, i) for i in range(61)]}, x="x", y="y")
    part = html_lib.lines({f"s{i}": [(0, i), (1, i)] for i in range(9)}, x="x", y="y")
    assert part.count('stroke-dasharray="6 4"') == 1
    assert [a["class"] for a in Tree(part).all("li")] == [*(f"c{i}" for i in range(8)), "c0 dashed"]


@pytest.mark.parametrize(
    "points",
    [
        [(3, 5)],
        [(0, 2), (1, 2)],
        [(0, 0), (0, 0)],
        [(0, 1e-9), (1, 2e-9)],
        [(0, 1.0), (1, 1.0 + 1e-15)],
        [(0, -1e12), (1, 1e12)],
    ],
)
def test_narrow_and_wide_ranges(points):
    part = html_lib.lines({"a": points}, x="x", y="y")
    assert "nan" not in part and "inf" not in part
    assert 2 <= len(re.findall(r'text-anchor="end"', part)) <= 12


def test_bad_lines():
    for series in ({}, {str(i): [(0, 1)] for i in range(17)}):
        with pytest.raises(ValueError, match="1 to 16"):
            html_lib.lines(series, x="x", y="y")
    for point in ((math.nan, 1), (None, 1), (1,), "ab"):
        with pytest.raises(ValueError, match="point 1 of 'a'"):
            html_lib.lines({"a": [(0, 1), point]}, x="x", y="y")
    assert "no values" in html_lib.lines({"a": []}, x="x", y="y")


# ---------------------------------------------------------------------------- samples
def items(*hits):
    return [
        {"title": f"maze {i}", "hit": hit, "parts": [html_lib.note(f"part {i}")]}
        for i, hit in enumerate(hits)
    ]


def test_samples_show_marks_counts_and_parts():
    tree = Tree(html_lib.samples(items(True, False, None, np.True_)))
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


def test_many_samples_are_collapsed():
    assert not any("open" in a for a in Tree(html_lib.samples(items(*[True] * 31))).all("details"))
    assert all("open" in a for a in Tree(html_lib.samples(items(*[True] * 30))).all("details"))


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


@pytest.mark.parametrize(
    "change, match",
    [
        ({"hit": 0.5}, "sample 2.*hit 0.5"),
        ({"Note": ""}, "sample 2.*'Note'"),
        ({"parts": "<p>"}, "sample 2.*one string"),
        ({"parts": [None]}, "sample 2.*part 0 is a NoneType"),
    ],
)
def test_bad_samples(change, match):
    with pytest.raises(ValueError, match=match):
        html_lib.samples([*items(True), {"title": "t", "parts": []} | change])
    with pytest.raises(ValueError, match="sample 1.*parts"):
        html_lib.samples([{"title": "t"}])
    assert "no samples" in html_lib.samples([])


def test_parts_are_strings():
    for block in (html_lib.stack, html_lib.row, lambda *parts: html_lib.page("t", *parts)):
        with pytest.raises(ValueError, match="part 1 is a list"):
            block("<p></p>", ["<p></p>"])
