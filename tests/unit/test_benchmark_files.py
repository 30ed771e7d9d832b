"""Benchmark files: an error names file, row, column and fix, and no content is lost."""

import base64
import csv
import hashlib
import io
import subprocess
import sys

import numpy as np
import pandas
import pytest
from PIL import Image

from opsd_jax.evaluation import benchmark, prompts, table_scores, tables


def picture(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, form="PNG"):
    data = io.BytesIO()
    image.save(data, form)
    return base64.b64encode(data.getvalue()).decode()


PICTURE = encoded(picture())


def mcq(count=4, **more):
    """Cells of multiple-choice rows 0, 1, ...; the right answer is A, left. `more`: column ->
    values.
    """
    rows = [
        {
            "index": i,
            "image": PICTURE,
            "question": f"Where is {i}?",
            "A": "left",
            "B": "right",
            "answer": "A",
        }
        for i in range(count)
    ]
    for column, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[column] = value
    return rows


def write(folder, rows, name="VisPuzzle", delimiter="\t"):
    path = folder / f"{name}.tsv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def without(rows, *columns):
    return [{c: v for c, v in row.items() if c not in columns} for row in rows]


# ---- bad files


def refused(path, *words):
    """Reading fails with a ValueError that names the file and all the words."""
    with pytest.raises(ValueError) as error:
        tables.read(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    refused(write(tmp_path, mcq(), "VizPuzzle"), "VisPuzzle", "SAT_circular")
    with pytest.raises(FileNotFoundError):
        tables.read(tmp_path / "MMVP.tsv")
    with pytest.raises(FileNotFoundError, match="put NAME.tsv there, NAME one of VSP"):
        tables.find(tmp_path)
    write(tmp_path, mcq(), "MMVP")
    assert tables.find(tmp_path) == {"MMVP": tmp_path / "MMVP.tsv"}


@pytest.mark.parametrize(
    "name, columns",
    [
        ("VisPuzzle", ["answer"]),
        ("VisPuzzle", ["index"]),
        ("VisPuzzle", ["image"]),
        ("SAT_circular", ["question", "A"]),
        ("CV-Bench-2D", ["prompt", "source"]),
        ("CV-Bench-3D", ["prompt"]),
        ("ChartQA_h_bar", ["answer"]),
        ("VSP_maze_task_main_original", ["maze_map", "maze_size"]),
    ],
)
def test_missing_columns_are_named(tmp_path, name, columns):
    rows = mcq(prompt="abcd", source="abcd", maze_map=["['SG']"] * 4, maze_size=[2] * 4)
    assert len(tables.read(write(tmp_path, rows, name)).rows) == 4
    refused(write(tmp_path, without(rows, *columns), name), "no column " + ", ".join(columns))


def test_files_that_are_no_table(tmp_path):
    refused(write(tmp_path, mcq(), delimiter=","), "no column", "separated by tabs")
    path = tmp_path / "VisPuzzle.tsv"
    for content in (
        b"",
        b"\x89PNG\r\n\x1a\n\xff\xfe\xff",
        b'index\timage\n0\t"cut here',
        b"index\timage\n0\tx\n1\t2\t3\t4\n",
    ):
        path.write_bytes(content)
        refused(path, "download it again")
    lines = write(tmp_path, mcq()).read_text().splitlines()
    path.write_text(
        "\n".join([lines[0]] + [line + "\tmore" for line in lines[1:]])
    )  # pandas would shift the columns
    refused(path, "Length of header")
    refused(write(tmp_path, mcq(image=[""] * 4)), "no row has an image")


def test_bad_indices(tmp_path):
    refused(write(tmp_path, mcq(index=[5, 6, 7, 6])), "index 6", "data rows 1 and 3")
    refused(write(tmp_path, mcq(index=[5, 6, "", 8])), "column index", "blank cell")
    refused(write(tmp_path, mcq(index=["a", "b", "", "d"])), "data row 2")
    refused(
        write(tmp_path, mcq(index=list("abcd")), "SAT_circular"),
        "row a, column index",
        "whole number",
    )
    refused(write(tmp_path, mcq(g_index=[0, 0, "", 1]), "SAT_circular"), "row 2, column g_index")
    assert [
        r.index for r in tables.read(write(tmp_path, mcq(index=["a", "1", "x", "d"]))).rows
    ] == [*"a1xd"]


def test_bad_cells_are_named_by_row_and_column(tmp_path):
    refused(
        write(tmp_path, mcq(image=[PICTURE, "7", PICTURE, PICTURE])),
        "row 1, column image",
        "'7'",
        "index",
    )
    refused(
        write(tmp_path, mcq(image=[PICTURE, "2", "1", PICTURE])),
        "row 1, column image",
        "has no image",
    )
    refused(write(tmp_path, mcq(image=[PICTURE, "2", "", PICTURE])), "row 1, column image", "'2'")
    broken = "['" + PICTURE + "', 5]"
    refused(
        write(tmp_path, mcq(image=[PICTURE, PICTURE, broken, PICTURE])),
        "row 2, column image",
        "['...', '...']",
    )
    mazes = mcq(maze_map=["['SG']"] * 4, maze_size=[2, 2, "", 2])
    refused(write(tmp_path, mazes, "VSP_maze_task_main_original"), "row 2, column maze_size")


@pytest.mark.parametrize(
    "cell, reason",
    [
        (PICTURE[:-7] + "&" + PICTURE[-6:], "broken base64"),
        (PICTURE[:101], "broken base64"),
        (PICTURE[:1000], "cannot decode"),
        (base64.b64encode(b"no picture" * 20).decode(), "not an image format"),
        (str([PICTURE, base64.b64encode(b"no picture" * 20).decode()]), "image 1"),
    ],
)
def test_bad_images_are_named_when_opened(tmp_path, cell, reason):
    path = write(tmp_path, mcq(image=[PICTURE, PICTURE, cell, "2"]))
    rows = tables.read(path).rows
    assert len(prompts.images(rows[1])) == 1
    for row in rows[2:]:  # the one that refers to it as well
        with pytest.raises(ValueError) as error:
            prompts.images(row)
        for word in (str(path), f"row {row.index}, column image", reason, "replace"):
            assert word in str(error.value)


# ---- images


def pixels(image):
    return np.asarray(image).tolist()


def test_images_from_text_lists_and_other_rows(tmp_path):
    one, two = picture(1), picture(2)
    cells = [encoded(one), str([encoded(one), encoded(two)]), "1", "2"]
    rows = tables.read(write(tmp_path, mcq(image=cells))).rows
    assert [[pixels(i) for i in prompts.images(row)] for row in rows] == [
        [pixels(one)],
        *3 * [[pixels(one), pixels(two)]],
    ]
    assert prompts.images(rows[0])[0].mode == "RGB"
    assert prompts.messages(rows[1])[:2] == [0, 1] and "image" not in rows[0].cells
    with pytest.raises(ValueError, match="'lossless' or 'jpeg75'"):
        prompts.images(rows[0], cache="jpg")


def jpeg75(image):
    data = io.BytesIO()
    image.save(data, "JPEG")  # Pillow's defaults, which the harness uses: quality 75, 4:2:0
    return Image.open(data).convert("RGB")


def test_jpeg_cache_is_of_single_images(tmp_path):
    one, two = picture(1), picture(2)
    rows = tables.read(
        write(
            tmp_path,
            mcq(3, image=[encoded(one), str([encoded(one), encoded(two)]), str([encoded(two)])]),
        )
    ).rows
    found = [[pixels(i) for i in prompts.images(row, cache="jpeg75")] for row in rows]
    assert found == [[pixels(jpeg75(one))], [pixels(one), pixels(two)], [pixels(jpeg75(two))]]
    assert pixels(jpeg75(one)) != pixels(one)
    grey = Image.fromarray(np.random.default_rng(3).integers(0, 256, (30, 40), np.uint8))
    row = tables.read(write(tmp_path, mcq(1, image=[encoded(grey)]))).rows[0]
    assert pixels(prompts.images(row, cache="jpeg75")[0]) == pixels(
        jpeg75(grey)
    )  # there a grey file


def test_images_named_by_path(tmp_path):
    one, two = picture(1), picture(2)
    (tmp_path / "images" / "VisPuzzle").mkdir(parents=True)
    one.save(tmp_path / "images" / "one.png")
    two.save(tmp_path / "images" / "VisPuzzle" / "two.jpg")
    paths = ["one.png", "two.jpg", "['one.png', 'two.jpg']", "one.png"]
    rows = tables.read(write(tmp_path, without(mcq(image_path=paths), "image"))).rows
    second = Image.open(tmp_path / "images" / "VisPuzzle" / "two.jpg")
    for cache in ("lossless", "jpeg75"):  # files are nobody's copy
        assert [[pixels(i) for i in prompts.images(row, cache)] for row in rows] == [
            [pixels(one)],
            [pixels(second)],
            [pixels(one), pixels(second)],
            [pixels(one)],
        ]
    (tmp_path / "images" / "one.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="row 0, column image_path"):
        prompts.images(rows[0])
    for last, word in (("three.png", str(tmp_path / "images")), ("", "empty")):
        rows = without(mcq(image_path=paths[:3] + [last]), "image")
        refused(write(tmp_path, rows), "row 3, column image_path", last, word)
    # beside an image column it names the harness's copies, and with them their format
    rows = tables.read(
        write(tmp_path, mcq(2, image=[encoded(one)] * 2, image_path=["a.png", "b.jpg"]))
    ).rows
    found = [pixels(prompts.images(row, "jpeg75")[0]) for row in rows]
    assert found == [pixels(one), pixels(jpeg75(one))]
    refused(
        write(tmp_path, mcq(1, image_path=["['a.png', 'b.png']"])),
        "row 0",
        "2 file names for 1 images",
    )


# ---- scores


def test_dropped_rows_are_counted_and_listed(tmp_path):
    table = tables.read(write(tmp_path, mcq(image=[PICTURE, "", PICTURE, "NA"])))
    assert table.dropped == (1, 3) and [row.index for row in table.rows] == [0, 2]
    report = table_scores.score(table, {0: "A", 2: "B"})
    assert report.dropped == (1, 3) and report.overall == 0.5 and len(report.rows) == 2
    with pytest.raises(ValueError, match=r"1 predictions .* dropped .* such as \[3\]"):
        table_scores.score(table, {0: "A", 2: "B", 3: "A"})


def test_predictions_must_be_whole(tmp_path):
    path = write(tmp_path, mcq(5))
    table = tables.read(path)
    for use in (
        lambda p: table_scores.score(table, p),
        lambda p: table_scores.export(tmp_path / "out.tsv", table, p),
    ):
        with pytest.raises(
            ValueError, match=r"4 of 5 rows of .*VisPuzzle.tsv .* such as \[0, 1, 2\].*partial"
        ):
            use({3: "A"})
        with pytest.raises(ValueError, match="row 2 is NoneType"):
            use({0: "A", 1: "A", 2: None, 3: "A", 4: "A"})
        with pytest.raises(ValueError, match="its indices are like 0"):
            use({"0": "A"})
    assert not (tmp_path / "out.tsv").exists()
    report = table_scores.score(table, {3: "B", 4: "A"}, partial=True)
    assert (
        report.missing == (0, 1, 2)
        and report.overall == 0.5
        and [d["index"] for d in report.rows] == [3, 4]
    )
    with pytest.raises(ValueError, match="5 of 5"):
        table_scores.score(table, {}, partial=True)


def test_partial_circular_questions_and_pairs_take_no_part(tmp_path):
    rows = mcq(
        5, index=[0, 1_000_000, 1, 1_000_001, 1_000_002], category=["x", "other", "y", "y", "z"]
    )
    rows = [row | {"l2-category": "all"} for row in rows]
    table = tables.read(write(tmp_path, rows, "SAT_circular"))
    whole = table_scores.score(table, {row.index: "<answer>A</answer>" for row in table.rows})
    assert whole.groups == {0: 1, 1: 1} and whole.overall == 1.0
    assert whole.per_category == {"x": 1.0, "y": 1.0, "all": 1.0}
    assert whole.orphans == (2,) and whole.extras == {"overall_exact_matching_run": 0.0}
    part = table_scores.score(table, {0: "A", 1_000_000: "B", 1: "A"}, partial=True)
    assert part.groups == {0: 0} and part.missing == (1_000_001, 1_000_002)
    assert part.per_category == {"x": 0.0, "all": 0.0}
    with pytest.raises(ValueError, match="whole questions"):
        table_scores.score(table, {0: "A", 1: "A"}, partial=True)

    table = tables.read(write(tmp_path, mcq(6, index=[1, 5, 4, 2, 3, 0]), "MMVP"))
    answers = {0: "A", 1: "A", 2: "A", 3: "B", 4: "A"}
    report = table_scores.score(table, answers, partial=True)
    assert report.extras == {"pair_accuracy_newer_harness": 0.5} and report.overall == 0.8
    assert table_scores.score(table, {0: "A"}, partial=True).extras == {}


def test_categories(tmp_path):
    columns = {
        "category": ["x", "x", "y", ""],
        "l2-category": ["x", "y", "z", "z"],
        "split": ["s", "t", "t", ""],
    }
    rows, answers = mcq(**columns), {0: "A", 1: "B", 2: "A", 3: "A"}
    report = table_scores.score(tables.read(write(tmp_path, rows)), answers)
    assert report.per_category == {
        "x": 0.5,
        "y": 1.0,
        "z": 1.0,
    }  # of equal names that of `category` stays
    assert report.overall == 0.75 and report.split is None
    chart = table_scores.score(tables.read(write(tmp_path, rows, "ChartQA_v_bar")), answers)
    assert chart.per_category == {"s": 100.0, "t": 50.0} and chart.unit == "percent"
    chart = table_scores.score(
        tables.read(write(tmp_path, without(rows, "split"), "ChartQA_v_bar")), answers
    )
    assert chart.per_category == {"x": 50.0, "y": 100.0} and chart.overall == 75.0
    sources = table_scores.score(
        tables.read(write(tmp_path, mcq(**columns, prompt="pppp", source="abbb"), "CV-Bench-2D")),
        answers,
    )
    assert sources.overall == (1 + 2 / 3) / 2 and sources.per_category == {"a": 1.0, "b": 2 / 3}


def test_predictions_are_read_as_the_harness_reads_them(tmp_path):
    chart = tables.read(
        write(tmp_path, without(mcq(4, answer=["nan.", "3", "5", "x"]), "A", "B"), "ChartQA_h_bar")
    )
    found = table_scores.score(chart, {0: "None", 1: "", 2: "<answer>5</answer>", 3: "\bx"})
    assert [d["extracted"] for d in found.rows] == ["nan", "nan", "5", "\bx"]
    found = table_scores.score(chart, {0: "007", 1: "3", 2: "5", 3: "TRUE"})
    assert [d["extracted"] for d in found.rows] == ["007", "3", "5", "TRUE"]
    found = table_scores.score(
        chart, {0: "007", 1: "3", 2: "5", 3: ""}
    )  # numbers and blanks alone: one typed column
    assert [d["extracted"] for d in found.rows] == ["7.0", "3.0", "5.0", "nan"]
    mazes = mcq(2, maze_map=["['SG']"] * 2, maze_size=[2] * 2)
    maze = tables.read(write(tmp_path, mazes, "VSP_maze_task_main_original"))
    assert [d["hit"] for d in table_scores.score(maze, {0: "", 1: "\boxed{R}"}).rows] == [0, 1]


# ---- export


def test_export_loses_nothing(tmp_path):
    hard = [
        "tab\there",
        "two\nlines\r\nand\rthree",
        "\boxed{R}",
        "None",
        "=1+1",
        'a "quoted" word',
        "",
        "x" * 40_000,
    ]
    rows = mcq(
        8,
        A=["1", "2", "", "4", "5", "6", "7", "8"],
        B=["a\tb", "two\nlines", '"', "", "=1", "x", "007", " "],
    )
    table = tables.read(write(tmp_path, rows))
    answers = dict(reversed(list(enumerate(hard))))
    table_scores.export(tmp_path / "answers.tsv", table, answers)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "VisPuzzle.tsv",
        "answers.tsv",
    ]  # no temporary file is left
    frame = pandas.read_csv(tmp_path / "answers.tsv", sep="\t", keep_default_na=False, dtype=str)
    assert frame["prediction"].tolist() == hard
    assert list(frame) == ["index", "question", "A", "B", "answer", "prediction"]
    again = pandas.read_csv(
        tmp_path / "answers.tsv", sep="\t"
    )  # as the harness reads it: the same cells
    for row, cells in zip(table.rows, again.to_dict("records"), strict=True):
        assert repr({c: cells[c] for c in row.cells}) == repr(row.cells)
    text = (tmp_path / "answers.tsv").read_text(encoding="utf-8")
    assert text.startswith('"index"\t"question"') and '"=1+1"' in text and PICTURE not in text


def test_export_is_scored_alike(tmp_path):
    """A benchmark file and an export that has its images put back get the same report."""
    table = tables.read(write(tmp_path, mcq(A=["3", "4", "", "6"])))
    answers = {0: "3", 1: "<answer>A</answer>", 2: "None", 3: "It is 6.0"}
    report = table_scores.score(table, answers)
    assert [d["hit"] for d in report.rows] == [0, 1, 0, 1]  # options are 3.0, 4.0, none, 6.0
    table_scores.export(tmp_path / "answers.tsv", table, answers)
    (tmp_path / "again").mkdir()
    with open(tmp_path / "answers.tsv", newline="", encoding="utf-8") as f:
        rows = [line | {"image": PICTURE} for line in csv.DictReader(f, delimiter="\t")]
    again = tables.read(write(tmp_path / "again", rows))
    assert (
        table_scores.score(again, {int(line["index"]): line["prediction"] for line in rows})
        == report
    )


def test_a_failed_export_leaves_the_old_file(tmp_path):
    table = tables.read(write(tmp_path, mcq(1)))
    target = tmp_path / "answers.tsv"
    table_scores.export(target, table, {0: "A"})
    before = target.read_bytes()
    with pytest.raises(ValueError):
        table_scores.export(target, table, {0: "half a pair: \ud800"})
    assert target.read_bytes() == before


def test_the_table_knows_the_version_of_its_file(tmp_path):
    path = write(tmp_path, mcq())
    assert tables.read(path).md5 == hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "module, loaded",
    [("scoring", []), ("table_scores", ["numpy"]), ("prompts", ["numpy", "PIL"])],
)
def test_import_is_light(module, loaded):
    """Neither pandas nor JAX is loaded before a table is read; the scoring rules load nothing."""
    code = (
        f"import sys, opsd_jax.evaluation.{module}\n"
        "print([m for m in ('pandas', 'numpy', 'jax', 'flax', 'PIL', "
        "'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == f"{loaded}\n"


def test_pairs_of_a_random_subset_are_those_of_the_table(tmp_path):
    """MMVP asks in pairs, rows 2i and 2i+1: two rows that a subset put side by side are none."""
    table = tables.read(write(tmp_path, mcq(8), "MMVP"))
    seed = next(
        s for s in range(99) if [r.index for r in tables.subset(table, 4, s).rows] == [0, 2, 3, 5]
    )
    found = benchmark.of_table(table, cache="lossless", limit=4, seed=seed)
    summary = found.judge({0: "A", 2: "A", 3: "B", 5: "A"})[1]
    assert (
        summary["extras"] == {"pair_accuracy_newer_harness": 0.0}
        and summary["overall"] == 0.75
        and summary["n"] == 4
    )


# ---- rows that no answer can match

MAZE = ["SFH", "FFH", "HFG"]


@pytest.mark.parametrize(
    "name, cells, column, reason",
    [
        *[
            ("MMVP", {"answer": answer}, "answer", "none of the row's options A, B")
            for answer in (
                "CC",
                "a",
                "C",
                "A,B",
                "0",
                "(a)",
                "(C)",
                "A or B",
                "the left one",
                "Z",
                "A)B",
                "?",
            )
        ],
        ("MMVP", {"answer": ""}, "answer", "no right answer"),
        ("MMVP", {"answer": "NA"}, "answer", "no right answer"),
        ("MMVP", {"A": "", "B": ""}, "answer", "none of the row's options (none)"),
        ("MMVP", {"B": "None", "answer": "B"}, "answer", "None and NA count as empty"),
        (
            "MMVP",
            {"A": "same", "B": "same", "answer": "same"},
            "answer",
            "none of the row's options",
        ),
        ("SAT_circular", {"answer": "C"}, "answer", "none of the row's options A, B"),
        ("CV-Bench-2D", {"answer": "(D)"}, "answer", "none of the row's options"),
        ("CV-Bench-2D", {"source": ""}, "source", "would not count"),
        ("CV-Bench-3D", {"answer": "[A, B]"}, "answer", "none of the row's options"),
        ("ChartQA_h_bar", {"answer": ""}, "answer", "no right answer"),
        ("ChartQA_h_bar", {"answer": "[]"}, "answer", "none equals it"),
        ("ChartQA_v_bar", {"answer": "['', ' ']"}, "answer", "none equals it"),
        ("ChartQA_v_bar", {"answer": "[' red ']"}, "answer", "without blanks around"),
        ("ChartQA_v_bar", {"answer": "inf"}, "answer", "none equals it"),
        *[
            ("VSP_maze_task_main_original", cells, column, reason)
            for cells, column, reason in (
                ({"maze_map": ["FFH", "FFH", "HFG"]}, "maze_map", "has no S"),
                ({"maze_map": ["SFH", "FFH", "HFF"]}, "maze_map", "has no G"),
                ({"maze_map": ["SFH", "FF", "HFG"]}, "maze_map", "not a square"),
                ({"maze_map": ["SFG", "FFH"]}, "maze_map", "not a square"),
                ({"maze_size": 4}, "maze_size", "has 3 rows"),
                ({"maze_size": 2}, "maze_size", "has 3 rows"),
                ({"maze_size": 0}, "maze_size", "has 3 rows"),
                ({"maze_map": ["SHH", "HHH", "HHG"]}, "maze_map", "no route leads from S to G"),
                ({"maze_map": ["SxH", "FFH", "HFG"]}, "maze_map", "'x'"),
                ({"maze_map": ["sFH", "FFH", "HFg"]}, "maze_map", "'g'"),
                ({"maze_map": "SFHFFHHFG"}, "maze_map", "not a square"),
                ({"maze_map": ""}, "maze_map", "not a square"),
            )
        ],
    ],
)
def test_rows_that_no_answer_can_match_are_named(tmp_path, name, cells, column, reason):
    rows = mcq(3, prompt=["p"] * 3, source=["s"] * 3, maze_map=[MAZE] * 3, maze_size=[3] * 3)
    rows[1] |= cells
    table = tables.read(write(tmp_path, rows, name))
    found = table_scores.unmatchable(table)
    assert (
        list(found) == [1]
        and f"{table.path}: row 1, column {column}: " in found[1]
        and reason in found[1]
    )
    assert benchmark.broken(benchmark.of_table(table, cache="lossless")) == found
    assert (
        len(table_scores.score(table, dict.fromkeys(range(3), "x")).rows) == 3
    )  # such a row ends nothing


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A", "A"),
        ("(A)", "A"),
        ("(B)", "B"),
        ("B.", "B"),
        (" A ", "A"),
        ("[B]", "B"),
        ("A:", "A"),
        ("left", "A"),
        ("A right one", "C"),
    ],
)
@pytest.mark.parametrize("name", ["CV-Bench-2D", "CV-Bench-3D", "MMVP", "SAT_circular"])
def test_answers_spelt_otherwise_are_read_as_their_letter(tmp_path, name, answer, letter):
    """CV-Bench as published has "(A)"; an option's own text goes before the article "A"."""
    rows = mcq(
        2, answer=[answer, "B"], prompt=["p"] * 2, source=["s"] * 2, C=["A right one", "other"]
    )
    table = tables.read(write(tmp_path, rows, name))
    assert table_scores.unmatchable(table) == {} and table.respelt == (
        {} if answer == letter else {0: answer}
    )
    report = table_scores.score(table, {0: f"<answer>{letter}</answer>", 1: "B"})
    assert report.overall == 1.0
    table_scores.export(tmp_path / "out.tsv", table, {0: letter, 1: "B"})
    assert pandas.read_csv(tmp_path / "out.tsv", sep="\t")["answer"].tolist() == [
        letter,
        "B",
    ]  # so the harness scores it, too


def test_every_row_of_whole_tables_can_be_matched():
    """But for the one of the recorded tables whose answer is an option that it lacks."""
    import pathlib

    folder = pathlib.Path(__file__).parents[1] / "scoring" / "tsv"
    found = {
        name: list(table_scores.unmatchable(tables.read(path)))
        for name, path in tables.find(folder).items()
    }
    assert {name: rows for name, rows in found.items() if rows} == {"VStarBench": [104]}


# ---- odd cells

RAW = base64.b64decode(PICTURE)
URL_SAFE = base64.urlsafe_b64encode(RAW).decode()


@pytest.mark.parametrize(
    "cell",
    [
        "data:image/png;base64," + PICTURE,
        "data:image/jpeg;base64,\n" + PICTURE,
        URL_SAFE,
        PICTURE.rstrip("="),
        URL_SAFE.rstrip("="),
        str(base64.b64encode(RAW)),
        'b"' + PICTURE + '"',
        base64.encodebytes(RAW).decode(),
        "data:;base64," + PICTURE,
        str(["data:image/png;base64," + PICTURE]),
    ],
)
def test_base64_as_other_tools_write_it(tmp_path, cell):
    (row,) = tables.read(write(tmp_path, mcq(1, image=[cell]))).rows
    assert [pixels(image) for image in prompts.images(row)] == [pixels(picture())]


def test_predictions_with_odd_characters_stay_in_their_rows(tmp_path):
    odd = [
        "A\x00",
        "\x00",
        "\x0b A",
        "A\r",
        "a\r\nA",
        '"A',
        'say "A"',
        "A\u2028",
        "\ufeffA",
        "\x1aA",
        "A\\",
        "\\N A",
        "\x08A",
        "A\tB",
        "'A",
        "\ufffd A",
        "\x85A",
        "A\x1c\x1d",
    ]
    table = tables.read(write(tmp_path, mcq(len(odd))))
    texts, missing = table_scores.texts_as_read(table, dict(enumerate(odd)), False)
    assert list(texts.values()) == odd and missing == ()
    table_scores.export(tmp_path / "out.tsv", table, dict(enumerate(odd)))
    assert pandas.read_csv(tmp_path / "out.tsv", sep="\t")["prediction"].tolist() == odd
    assert len(table_scores.score(table, dict(enumerate(odd))).rows) == len(odd)
    for bad in ("\ud800 A", "A\udfff"):
        with pytest.raises(
            ValueError,
            match="prediction for row 3 holds half a surrogate pair.*replace it with U.FFFD",
        ):
            table_scores.score(table, dict(enumerate(odd)) | {3: bad})
