"""Scores, prompts and images of the public benchmarks against recorded results of the public
harness.

`--goldens=DIR` replays another folder of the form of tests/scoring, made with other seeds and
texts; what DIR does not hold is skipped, what tests/scoring does not hold is a failure.
"""

import base64
import csv
import hashlib
import io
import json
import pathlib
import sys

import pytest
from PIL import Image

from opsd_jax.evaluation import prompts, scoring, table_scores
from opsd_jax.evaluation import tables as tables_lib

DEFAULT = pathlib.Path(__file__).parent / "scoring"
TABLES = (
    "VSP_maze_task_main_original",
    "VisPuzzle",
    "ChartQA_h_bar",
    "ChartQA_v_bar",
    "VStarBench",
    "BLINK_Jigsaw",
    "MMVP",
    "BLINK",
    "SAT_circular",
    "CV-Bench-2D",
    "CV-Bench-3D",
)


@pytest.fixture(scope="module")
def folder(goldens):
    return DEFAULT if goldens == (pathlib.Path(__file__).parent / "goldens").resolve() else goldens


def path_of(folder, name):
    path = folder / name
    if not path.exists():
        report = pytest.fail if folder == DEFAULT else pytest.skip
        report(f"{name} is not in {folder}")
    return path


def items(folder, name):
    """The JSON objects of a file; lines end at newlines only, other line separators are content."""
    found = [
        json.loads(line)
        for line in path_of(folder, name).read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert found
    return found


def differing(found, expected, *of):
    """Where two lists of results differ, with what they are of: the whole of it, if it is short."""
    assert len(found) == len(expected)
    return [triple for triple in zip(found, expected, *of) if triple[0] != triple[1]][:5]


# ---- single items


def test_multiple_choice(folder):
    cases = items(folder, "mcq.jsonl")
    found = [scoring.choose(c["prediction"], c["options"]) for c in cases]
    assert differing(found, [(c["option"], c["needs_judge"]) for c in cases], cases) == []
    assert [int(option == c["answer"]) for (option, _), c in zip(found, cases)] == [
        c["hit"] for c in cases
    ]


def test_circular_groups(folder):
    cases = items(folder, "circular.jsonl")
    found = [
        scoring.circular([(r["prediction"], r["options"], r["answer"]) for r in c["rows"]])
        for c in cases
    ]
    assert differing(found, [(c["hit"], c["first_pass"]) for c in cases], cases) == []


def test_maze_routes(folder):
    cases = items(folder, "vsp.jsonl")
    for maze in (lambda rows: rows, repr, lambda rows: "[" + "\n ".join(map(repr, rows)) + "]"):
        paths = [scoring.boxed_path(c["prediction"]) for c in cases]
        found = [
            (path, scoring.walk(maze(c["maze_map"]), c["maze_size"], path))
            for path, c in zip(paths, cases)
        ]
        assert differing(found, [(c["path"], c["hit"]) for c in cases], cases) == []


def test_charts(folder):
    cases = items(folder, "chartqa.jsonl")
    found = [scoring.extract(c["prediction"]) for c in cases]
    assert differing(found, [(c["extracted"], c["needs_judge"]) for c in cases], cases) == []
    for fork, name in ((True, "score_fork"), (False, "score_official")):
        scores = [
            scoring.chart_score(text, c["answer"], fork=fork) for (text, _), c in zip(found, cases)
        ]
        assert differing(scores, [c[name] for c in cases], cases) == []


def test_quirks_that_are_rare():
    options = {"A": "one", "B": "two"}
    assert scoring.choose(
        r"\boxed{B} it is, and that is how it must be, I am sure of it", options
    ) == ("B", False)
    # an empty tag is a tag
    untold = r"<answer></answer> \boxed{B} it is, and that is how it must be, I am sure of it"
    assert scoring.choose(untold, options) == ("Z", True)
    assert scoring.relaxed("12%%", "0.12", fork=True) and not scoring.relaxed(
        "12% %", "0.12", fork=True
    )
    assert scoring.chart_score("", "[]", fork=True) == 0.0
    ragged = ["SF", "F", "FG"]  # where a row ends early the board ends
    assert scoring.walk(ragged, 3, "D,D,R") and not scoring.walk(ragged, 3, "R,D,D")


# ---- prompts


def png(k):
    """Base64 text of an image whose colour tells k."""
    data = io.BytesIO()
    Image.new("RGB", (2, 2), (k, 0, 0)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_table(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(
            f, list(lines[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(lines)


def test_prompts(folder, tmp_path):
    tables = {}
    for case in items(folder, "prompts.jsonl"):
        tables.setdefault((case["format"], case["dataset"]), []).append(case)
    for (form, name), cases in tables.items():
        (tmp_path / form).mkdir()
        path, counts = tmp_path / form / f"{name}.tsv", [c["n_images"] for c in cases]
        cells = [png(0) if n == 1 else str([png(k) for k in range(n)]) for n in counts]
        write_table(path, [c["cells"] | {"image": cell} for c, cell in zip(cases, cells)])
        rows = tables_lib.read(path).rows
        assert [len(row.images) for row in rows] == counts
        parts = [prompts.messages(row) for row in rows]
        found = [
            [{"image": p} if isinstance(p, int) else {"text": p} for p in some] for some in parts
        ]
        assert differing(found, [c["messages"] for c in cases], cases) == []
        for row, case, some in zip(rows, cases, parts):
            if case["wrapper_text"] is None:
                with pytest.raises(ValueError, match="without an image"):
                    prompts.wrapper(some)
            else:
                text, pictures = prompts.wrapper(some)
                assert (text, pictures) == (case["wrapper_text"], case["wrapper_images"])
                decoded = prompts.images(row)
                assert [decoded[k].getpixel((1, 1))[0] for k in pictures] == case["wrapper_images"]


# ---- whole files


def read_predictions(path, table):
    csv.field_size_limit(sys.maxsize)
    indices = {str(row.index): row.index for row in table.rows}
    with open(path, newline="", encoding="utf-8") as f:
        return {
            indices[line["index"]]: line["prediction"] for line in csv.DictReader(f, delimiter="\t")
        }


@pytest.mark.parametrize("name", TABLES)
def test_files(folder, name):
    expected = json.loads(path_of(folder, f"tsv/expected/{name}.json").read_text(encoding="utf-8"))
    table = tables_lib.read(path_of(folder, f"tsv/{name}.tsv"))
    assert table.md5 == hashlib.md5((folder / f"tsv/{name}.tsv").read_bytes()).hexdigest()
    assert len(table.rows) == expected.pop("n_rows_used")
    assert len(table.rows) + len(table.dropped) == expected.pop("n_rows_in_file")
    predictions = read_predictions(folder / f"tsv/predictions/{name}.tsv", table)
    report = table_scores.score(table, predictions)
    assert report.dropped == table.dropped and not report.missing and not report.orphans
    assert (report.name, report.unit) == (expected.pop("dataset"), expected.pop("unit"))
    assert report.split == expected.pop("split", None)
    assert report.overall == pytest.approx(expected.pop("overall"), rel=1e-14)
    assert report.per_category == pytest.approx(expected.pop("per_category"), rel=1e-14)
    assert {str(g): hit for g, hit in report.groups.items()} == expected.pop("groups", {})
    rows = expected.pop("rows")
    assert (
        [row.index for row in table.rows]
        == [d["index"] for d in report.rows]
        == [r["index"] for r in rows]
    )
    for row, found, wanted in zip(table.rows, report.rows, rows):
        pictures = [
            {"size": list(image.size), "rgb_sha256": hashlib.sha256(image.tobytes()).hexdigest()}
            for image in prompts.images(row)
        ]
        assert pictures == wanted.pop("images")
        assert row.options == wanted.pop("options", {})
        assert {key: found[key] for key in wanted} == wanted, row.index
    assert report.extras == pytest.approx(expected, rel=1e-14)  # all that is left


def test_all_files_are_known(folder):
    assert set(TABLES) == set(tables_lib.KINDS)
    assert set(tables_lib.find(path_of(folder, "tsv"))) == set(TABLES)
