"""opsd_jax/datasets: the parquet -> TFDS preparation, both sources, and the plan of batches."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsd_jax import images
from opsd_jax.data import arrayrecord, parquet_files, schema, shards, source_files
from opsd_jax.data import prepare as prepare_lib
from opsd_jax.data.arrayrecord import open_source
from opsd_jax.data.prepare import Part, prepare
from opsd_jax.data.schedule import BatchSchedule
from opsd_jax.data.schema import BadRowError, BadSourceError

ROOT = Path(__file__).resolve().parents[2]


def picture(
    seed: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (12, 9)
) -> dict:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(
        0, 256, (size[1], size[0], channels), dtype=np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode=None).save(file, kind)
    return {"bytes": file.getvalue(), "path": f"{seed}.png"}


def row(i: int, **changes) -> dict:
    """A row as released: one visual thought, two thoughts, the misspelt column names."""
    return {
        "pid": f"p{i}",
        "question": f"What is {i}? ü汉",
        "answer": "ABCD"[i % 4],
        "problem_image_0": picture(i),
        "resoning_thought_0": f"look {i}",
        "reasoning_image_0": picture(1000 + i),
        "resoning_thought_1": f"so {i}",
        "task": "Maze",
        "full_text_only_thought": f"all {i}",
    } | changes


def write(path: Path, rows: list[dict], **options) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for r in rows for column in r))
    table = pyarrow.Table.from_pylist([{column: r.get(column) for column in columns} for r in rows])
    pyarrow.parquet.write_table(table, path, **options)
    return path


def maze(source: Path, rows: list[dict], **options) -> Path:
    return write(source / "Maze" / "data" / "train-00000-of-00001.parquet", rows, **options)


@pytest.fixture
def two_tasks(tmp_path) -> Path:
    """Maze: 2 train shards of 5 and 3 rows, 1 of validation; Chart: 4 rows with metadata, no data/
    folder.
    """
    source = tmp_path / "source"
    write(
        source / "Maze/data/train-00000-of-00002.parquet",
        [row(i) for i in range(5)],
        row_group_size=2,
    )
    write(source / "Maze/data/train-00001-of-00002.parquet", [row(i) for i in range(5, 8)])
    write(source / "Maze/data/validation-00000-of-00001.parquet", [row(i) for i in range(8, 10)])
    write(
        source / "Chart_Refocus/train-00000-of-00001.parquet",
        [row(i, task="", metadata=json.dumps({"bars": [i, 2.5]}) if i else "") for i in range(4)],
    )
    return source


# -------------------------------------------------------------------------------- the good way


def test_what_goes_in_comes_out(two_tasks, tmp_path):
    report = prepare(two_tasks, tmp_path / "out")
    assert report.rows == {"Chart_Refocus/train": 4, "Maze/train": 8, "Maze/validation": 2}
    assert report.bad_rows == report.warnings == () and report.bytes > 0 and report.seconds > 0
    assert shards.task_names(tmp_path / "out") == ["Chart_Refocus", "Maze"]  # as spelt
    source = open_source(tmp_path / "out", "train", task="Maze")
    assert len(source) == 8
    for i, example in enumerate(source):
        r = row(i)
        assert (example.pid, example.task) == (f"p{i}", "Maze")
        assert (example.question, example.answer) == (r["question"], r["answer"])
        assert example.problem_image == r["problem_image_0"]["bytes"]
        assert example.visual_thoughts == (r["reasoning_image_0"]["bytes"],)
        assert (
            example.thoughts == (f"look {i}", f"so {i}")
            and example.full_text_only_thought == f"all {i}"
        )
        assert example.metadata == {}
    chart = open_source(tmp_path / "out/visual_opsd/chart_refocus/1.0.0")
    assert [e.metadata for e in chart] == [{}] + [{"bars": [i, 2.5]} for i in (1, 2, 3)]
    assert chart[0].task == "Chart_Refocus"  # the row says none: its folder
    assert source[np.int64(7)].pid == "p7"
    for index in (-1, 8):
        with pytest.raises(IndexError, match="8 examples"):
            source[index]


def test_images_pass_bit_by_bit_and_all_rounds_are_read(tmp_path):
    kinds = [
        picture(1, "JPEG"),
        picture(2, "PNG", "RGBA"),
        picture(3, "WEBP"),
        picture(4, "PNG", "L"),
    ]
    full = (
        row(9)
        | {f"reasoning_image_{i}": picture(20 + i) for i in range(8)}
        | {f"resoning_thought_{i}": f"t{i}" for i in range(8)}
    )
    few = [row(i, problem_image_0=kind, reasoning_image_0=kind) for i, kind in enumerate(kinds)]
    maze(tmp_path / "s", few + [full])
    prepare(tmp_path / "s", tmp_path / "out")
    source = open_source(tmp_path / "out", task="maze")
    for i, p in enumerate(kinds):
        assert source[i].problem_image == p["bytes"] and source[i].visual_thoughts == (p["bytes"],)
    assert source[4].thoughts == tuple(f"t{i}" for i in range(8))
    assert source[4].visual_thoughts == tuple(picture(20 + i)["bytes"] for i in range(8))


def test_plain_tfds_reads_it(two_tasks, tmp_path):
    import tensorflow_datasets as tfds

    prepare(two_tasks, tmp_path / "out")
    by_folder = tfds.builder_from_directory(tmp_path / "out/visual_opsd/maze/1.0.0").as_data_source(
        "train"
    )
    by_name = tfds.data_source("visual_opsd/maze", data_dir=tmp_path / "out", split="train")
    for source in (by_folder, by_name):
        assert len(source) == 8
        assert source[6]["pid"] == b"p6" and list(source[6]["reasoning_thoughts"]) == [
            b"look 6",
            b"so 6",
        ]
        want = np.asarray(Image.open(io.BytesIO(row(6)["problem_image_0"]["bytes"])))
        np.testing.assert_array_equal(source[6]["problem_image"], want)
        assert len(source[6]["reasoning_images"]) == 1
    raw = tfds.data_source(
        "visual_opsd/maze",
        data_dir=tmp_path / "out",
        split="validation",
        decoders={
            "problem_image": arrayrecord.RawBytes(),
            "reasoning_images": arrayrecord.RawBytes(),
        },
    )
    assert raw[0]["problem_image"] == row(8)["problem_image_0"]["bytes"]


@pytest.mark.parametrize(
    "layout, given",
    [
        ("data/train-0.parquet", "Maze"),
        ("train-0.parquet", "Maze"),
        ("data/train.parquet", "Maze/data"),
        ("data/train-0.parquet", ""),
    ],
)
def test_layouts(tmp_path, layout, given):
    write(tmp_path / "s/Maze" / layout, [row(0)])
    assert prepare(tmp_path / "s" / given, tmp_path / "out").rows == {"Maze/train": 1}
    (example,) = source_files.read_examples(tmp_path / "s/Maze" / layout, task="Maze")
    assert example == open_source(tmp_path / "out", task="maze")[0]


@pytest.mark.parametrize(
    "split, want",
    [
        ("train", range(8)),
        ("train[:3]", range(3)),
        ("train[3:6]", [3, 4, 5]),
        ("train[-2:]", [6, 7]),
        ("train[25%:75%]", range(2, 6)),
        ("validation", [8, 9]),
        ("train[4:6]+validation[1:]", [4, 5, 9]),
    ],
)
def test_slices(two_tasks, tmp_path, split, want):
    prepare(two_tasks, tmp_path / "out")
    prepared = open_source(tmp_path / "out", split, task="maze")
    assert [e.pid for e in prepared] == [f"p{i}" for i in want]
    assert len(prepared) == len(want)
    files = sorted((two_tasks / "Maze").rglob("*.parquet"))  # train files, then validation
    rows = [e for file in files for e in source_files.read_examples(file, task="Maze")]
    assert list(prepared) == [rows[i] for i in want]


def test_files_of_one_name_and_links_to_folders(tmp_path):
    write(tmp_path / "blob/train-0.parquet", [row(0)])
    write(tmp_path / "blob/data/train-0.parquet", [row(1)])
    (tmp_path / "s").mkdir()
    (tmp_path / "s/Maze").symlink_to(
        tmp_path / "blob"
    )  # as from a download cache: the link has the name
    for source in (tmp_path / "s", tmp_path / "s/Maze"):
        assert prepare(source, tmp_path / "out").rows == {"Maze/train": 2}
    assert {e.pid for e in open_source(tmp_path / "out", task="maze")} == {"p0", "p1"}


def test_sources_pickle_and_are_shared_by_threads(two_tasks, tmp_path):
    prepare(two_tasks, tmp_path / "out")
    source = open_source(tmp_path / "out", "train[1:7]", task="maze")
    want = [source[i] for i in range(6)]
    assert list(pickle.loads(pickle.dumps(source))) == want
    order = np.random.default_rng(0).integers(0, 6, 200)
    fresh = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fresh.__getitem__, order)) == [want[i] for i in order]


def test_limit_and_splits(two_tasks, tmp_path):
    report = prepare(two_tasks, tmp_path / "a", Part(limit=6, splits=("train", "train")))
    assert report.rows == {
        "Chart_Refocus/train": 4,
        "Maze/train": 6,
    }  # 5 of the first file, 1 of the second
    assert [e.pid for e in open_source(tmp_path / "a", task="maze")] == [f"p{i}" for i in range(6)]
    report = prepare(two_tasks / "Maze", tmp_path / "b", Part(limit=2))
    assert report.rows == {"Maze/train": 2, "Maze/validation": 2}
    shards = sorted(p.name for p in (tmp_path / "b").rglob("*train.array_record*"))
    assert shards == [
        "visual_opsd-train.array_record-00000-of-00001"
    ]  # the second file is not needed


def test_progress_bar_on_a_terminal_only(two_tasks, tmp_path, capsys, monkeypatch):
    prepare(two_tasks, tmp_path / "a")
    assert "preparing" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(two_tasks, tmp_path / "b")
    assert "preparing rows" in (shown := capsys.readouterr().err) and "14/14" in shown
    prepare(two_tasks, tmp_path / "c", progress=False)
    assert "preparing" not in capsys.readouterr().err


# -------------------------------------------------------------------------------- bad rows

NOT_A_PICTURE = {"bytes": b"\x89PNG no", "path": None}
CUT_OFF = {"bytes": picture(5, size=(64, 64))["bytes"][:-200], "path": None}
BAD_ROWS = {
    "blank question": ({"question": " \n"}, "question is empty"),
    "no question": ({"question": None}, "question is empty"),
    "no answer": ({"answer": ""}, "answer is empty"),
    "a place without a picture": (
        {"problem_image_0": None, "question": "Is <image>?"},
        "question has 1 place <image> for 0 images",
    ),
    "path only": (
        {"problem_image_0": {"bytes": None, "path": "a.png"}},
        "problem_image_0 holds no bytes",
    ),
    "broken picture": ({"problem_image_0": NOT_A_PICTURE}, "problem_image_0 cannot be decoded"),
    "truncated picture": ({"problem_image_0": CUT_OFF}, "problem_image_0 cannot be decoded"),
    "no thought": (
        {"resoning_thought_0": "", "resoning_thought_1": None},
        "resoning_thought_0.*no thought",
    ),
    "bad metadata": ({"metadata": "{'a': 1}"}, "metadata is not JSON"),
    "list metadata": ({"metadata": "[1]"}, "metadata is JSON, but not an object"),
    "metadata as a struct": (
        {"metadata": {"family": "maze"}},
        r"metadata is of type dict, not text\. Fix[^)]*$",
    ),
    "zero-width answer": ({"answer": "\u200b \ufeff"}, "answer is empty"),
    "unclosed answer": ({"answer": "<answer>B"}, "answer has <answer> without </answer>"),
    "unknown family": (
        {"metadata": '{"family": "chess"}'},
        "metadata has family 'chess'.*choose from maze",
    ),
    "family alone": ({"metadata": '{"family": "chart"}'}, "metadata has no text 'answer'"),
    "maze without goal": (
        {"metadata": '{"family": "maze", "map": ["SF", "FF"]}', "answer": "R"},
        "metadata has a 'map' without goal G",
    ),
    "wrong label": (
        {"metadata": '{"family": "chart", "answer": "n7"}', "answer": "n8"},
        "answer 'n8' is wrong by the row's metadata",
    ),
}


def encoded(image, kind="PNG", **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


grey16 = Image.fromarray(np.zeros((9, 12), np.uint16))
PICTURES = {  # what the parquet file holds -> whether training opens it
    "RGB": (picture(0), True),
    "RGBA": (picture(0, mode="RGBA"), True),
    "grey": (picture(0, mode="L"), True),
    "CMYK": (encoded(Image.new("CMYK", (9, 9)), "JPEG"), True),
    "1 bit": (encoded(Image.new("1", (9, 9))), True),
    "grey and alpha": (encoded(Image.new("LA", (9, 9))), True),
    "palette": (encoded(Image.new("P", (9, 9))), True),
    "palette and alpha": (encoded(Image.new("P", (9, 9)), transparency=0), True),
    "animated": (
        encoded(
            Image.new("P", (9, 9)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)]
        ),
        True,
    ),
    "16-bit grey": (encoded(grey16), False),
    "16-bit grey TIFF": (encoded(grey16, "TIFF"), False),
    "float TIFF": (encoded(Image.new("F", (9, 9)), "TIFF"), False),
    "32-bit TIFF": (encoded(Image.new("I", (9, 9)), "TIFF"), False),
    "too large": (encoded(Image.new("1", (30_000, 3_000))), False),
    "cut": (CUT_OFF, False),
    "text": ({"bytes": b"<svg/>", "path": None}, False),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("value, is_good", PICTURES.values(), ids=PICTURES)
def test_preparation_takes_the_images_that_training_opens(tmp_path, value, is_good):
    for transparency in ("white", "drop"):
        try:
            images.open_rgb(value["bytes"], transparency=transparency)
        except images.UnreadableImageError:
            assert not is_good
        else:
            assert is_good
    file = maze(tmp_path / "s", [row(0), row(1, problem_image_0=value, reasoning_image_0=value)])
    report = prepare(tmp_path / "s", tmp_path / "out", on_bad_row="skip")
    source = open_source(tmp_path / "out", task="maze")
    if is_good:
        assert report.bad_rows == report.warnings == ()
        assert source[1].problem_image == source[1].visual_thoughts[0] == value["bytes"]
    else:
        (note,) = report.bad_rows
        assert note[:3] == (str(file), 1, "p1") and note.reason.startswith(
            "problem_image_0 cannot be decoded: "
        )
        assert len(source) == 1


@pytest.mark.parametrize("kind", [kind for kind, (_, is_good) in PICTURES.items() if is_good])
def test_plain_tfds_gives_the_channels_that_its_features_tell(tmp_path, kind):
    import tensorflow_datasets as tfds

    maze(
        tmp_path / "s",
        [row(0, problem_image_0=PICTURES[kind][0], reasoning_image_0=PICTURES[kind][0])],
    )
    prepare(tmp_path / "s", tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out/visual_opsd/maze/1.0.0")
    found, told = builder.as_data_source("train")[0], builder.info.features
    for image, feature in (
        (found["problem_image"], told["problem_image"]),
        (found["reasoning_images"][0], told["reasoning_images"].feature),
    ):
        assert feature.shape == (None, None, 3)
        np.testing.assert_array_equal(
            image, np.asarray(images.open_rgb(PICTURES[kind][0]["bytes"], transparency="drop"))
        )


def test_thoughts_beyond_the_eighth_are_named_by_row(tmp_path):
    full = {f"reasoning_image_{i}": picture(20 + i) for i in range(10)} | {
        f"resoning_thought_{i}": f"t{i}" for i in range(9)
    }
    maze(tmp_path / "s", [row(0), row(1) | full, row(2)])
    report = prepare(tmp_path / "s", tmp_path / "out")
    assert [(n.row, n.pid, n.reason) for n in report.warnings] == [
        (1, "p1", "dropped_visual_thought: reasoning_image_8 is not read, a row holds 8"),
        (1, "p1", "dropped_visual_thought: reasoning_image_9 is not read, a row holds 8"),
        (1, "p1", "dropped_thought: resoning_thought_8 is not read, a row holds 8"),
        (
            1,
            "p1",
            "unused_visual_thought: 8 visual thoughts and 8 thoughts: interleaved traces show "
            "those between two thoughts, here 7; the teacher sees all",
        ),
    ]
    example = open_source(tmp_path / "out", task="maze")[1]
    assert len(example.visual_thoughts) == len(
        example.thoughts
    ) == 8 and "warning dropped_thought: 1 (first: " in str(report)


@pytest.mark.parametrize("changes, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(tmp_path, changes, reason):
    file = maze(tmp_path / "s", [row(0), row(1), row(2, **changes), row(3)], row_group_size=2)
    with pytest.raises(BadRowError, match=reason) as error:
        prepare(tmp_path / "s", tmp_path / "out")
    for part in (str(file), "row 2", "'p2'", "--on_bad_row=skip"):
        assert part in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(
        error.value
    )  # as from a worker process
    examples = source_files.read_examples(file, task="Maze")
    assert [next(examples).pid, next(examples).pid] == ["p0", "p1"]
    with pytest.raises(BadRowError, match=f"row 2, pid 'p2': {reason}"):
        next(examples)

    report = prepare(tmp_path / "s", tmp_path / "out", on_bad_row="skip")
    (note,) = report.bad_rows
    assert note[:3] == (str(file), 2, "p2") and report.rows == {"Maze/train": 3}
    assert note.reason in str(report) and "'p2'" in str(report)
    written = json.loads((tmp_path / "out/visual_opsd/maze/1.0.0/report.json").read_text())
    assert written["bad_rows"] == [note._asdict()] and written["rows"] == {"Maze/train": 3}
    assert [e.pid for e in open_source(tmp_path / "out", task="maze")] == ["p0", "p1", "p3"]
    with pytest.raises(
        BadRowError, match=f"row 2, pid 'p2': {reason}"
    ):  # skipped before, but now to fail
        prepare(tmp_path / "s", tmp_path / "out")
    assert len(open_source(tmp_path / "out", task="maze")) == 3  # and nothing is lost


def test_values_of_a_wrong_type(tmp_path):
    maze(tmp_path / "a", [row(0, answer=7)])
    with pytest.raises(BadRowError, match="answer is of type int"):
        prepare(tmp_path / "a", tmp_path / "out")
    maze(tmp_path / "b", [row(0, problem_image_0="a.png")])
    with pytest.raises(BadRowError, match="problem_image_0 is .*not an image .bytes, path.: give"):
        prepare(tmp_path / "b", tmp_path / "out")


def test_every_bad_row_is_named_and_an_empty_shard_does_no_harm(tmp_path):
    write(tmp_path / "s/Maze/train-0.parquet", [row(0, answer=""), row(1, question="")])
    write(tmp_path / "s/Maze/train-1.parquet", [row(2)])
    report = prepare(tmp_path / "s", tmp_path / "out", on_bad_row="skip")
    assert [(note.row, note.pid) for note in report.bad_rows] == [(0, "p0"), (1, "p1")]
    assert all(f"'{pid}'" in str(report) for pid in ("p0", "p1"))
    assert [e.pid for e in open_source(tmp_path / "out", task="maze")] == ["p2"]


def test_visual_thoughts_that_are_left_out_are_named(tmp_path):
    good, none = picture(1), {"bytes": None, "path": None}
    maze(
        tmp_path / "s",
        [
            row(0, reasoning_image_0=None, reasoning_image_1=good, reasoning_image_2=None),  # a gap
            row(1, reasoning_image_0=good, reasoning_image_1=CUT_OFF, reasoning_image_2=good),
            row(2, reasoning_image_0=NOT_A_PICTURE),
            row(3, reasoning_image_0=None),
            row(4, reasoning_image_0=good, reasoning_image_1=none),
        ],
    )
    report = prepare(tmp_path / "s", tmp_path / "out")
    assert [(n.row, n.reason.split(": ")[0], n.reason.split()[1]) for n in report.warnings] == [
        (0, "dropped_visual_thought", "reasoning_image_0"),
        (1, "dropped_visual_thought", "reasoning_image_1"),
        (1, "unused_visual_thought", "2"),
        (2, "dropped_visual_thought", "reasoning_image_0"),
        (2, "no_visual_thought", "the"),
        (3, "no_visual_thought", "the"),
    ]
    assert "warning no_visual_thought: 2" in str(report)
    source = open_source(tmp_path / "out", task="maze")
    assert [len(e.visual_thoughts) for e in source] == [1, 2, 0, 0, 1]
    assert source[0].visual_thoughts == (good["bytes"],)


def test_other_warnings(tmp_path):
    write(tmp_path / "s/Maze/train-0.parquet", [row(0), row(1, pid="p0"), row(2, difficulty=3)])
    write(tmp_path / "s/Maze/train-1.parquet", [row(3, pid="p0"), row(4)])
    write(tmp_path / "s/Maze/training-0.parquet", [row(5)])
    warnings = prepare(tmp_path / "s", tmp_path / "out").warnings
    assert {(Path(n.file).name, n.row, n.reason.split(":")[0]) for n in warnings} == {
        ("training-0.parquet", None, "ignored_file"),
        ("train-0.parquet", None, "ignored_column"),
        ("train-0.parquet", 1, "duplicate_pid"),
        ("train-1.parquet", 0, "duplicate_pid"),
    }
    assert any("difficulty" in n.reason for n in warnings)


def test_rows_without_pid_get_one(tmp_path):
    rows = [row(0), row(1)]
    for r in rows:
        del r["pid"], r["task"], r["full_text_only_thought"]
    maze(tmp_path / "s", rows)
    warnings = prepare(tmp_path / "s", tmp_path / "out").warnings
    assert [(note.row, note.reason.split(":")[0]) for note in warnings] == [
        (0, "no_text_trace"),
        (1, "no_text_trace"),
    ]
    example = open_source(tmp_path / "out", task="maze")[1]
    assert (example.pid, example.task) == ("train-00000-of-00001:1", "Maze")
    assert example.full_text_only_thought == ""


# -------------------------------------------------------------------------------- bad sources


def without(column: str, **more) -> dict:
    return {k: v for k, v in (row(0) | more).items() if k != column}


@pytest.mark.parametrize(
    "bad, message",
    [
        (without("answer"), "has no column 'answer'; its columns: pid, question"),
        (
            without("problem_image_0", problem_image=picture(1)),
            "'problem_image'.*did you mean 'problem_image_0'",
        ),
        (
            without("resoning_thought_0", reasoning_thought_0="t"),
            "no column 'resoning_thought_0'.*'reasoning_thought_0'.*did "
            "you mean 'resoning_thought_0'",
        ),
        (
            without("reasoning_image_0", resoning_image_0=picture(1)),
            "did you mean 'reasoning_image_0'",
        ),
        (row(0, reasoning_thought_2="t"), "did you mean 'resoning_thought_2'"),
    ],
)
def test_columns_with_wrong_names(tmp_path, bad, message):
    file = maze(tmp_path / "s", [bad])
    for attempt in (
        lambda: prepare(tmp_path / "s", tmp_path / "out"),
        lambda: next(source_files.read_examples(file, task="Maze")),
    ):
        with pytest.raises(BadSourceError, match=message) as error:
            attempt()
        assert str(file) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(tmp_path):
    with pytest.raises(BadSourceError, match="nowhere does not exist; --source is"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty/images").mkdir(parents=True)
    with pytest.raises(
        BadSourceError,
        match=r"no parquet and no JSONL.*\*\.parquet, \*\.jsonl, data/.*images.*train, ",
    ):
        prepare(tmp_path / "empty", tmp_path / "out")
    write(tmp_path / "s/Maze/part-0.parquet", [row(0)])
    with pytest.raises(BadSourceError, match=r"train-\*.*part-0.parquet.*Rename"):
        prepare(tmp_path / "s", tmp_path / "out")
    write(tmp_path / "s/train-0.parquet", [row(0)])
    with pytest.raises(BadSourceError, match="one task or several"):
        prepare(tmp_path / "s", tmp_path / "out")
    write(tmp_path / "space/My Maze/train-0.parquet", [row(0)])
    with pytest.raises(BadSourceError, match="My Maze.*rename the folder"):
        prepare(tmp_path / "space", tmp_path / "out")
    maze(tmp_path / "case", [row(0)])
    write(tmp_path / "case/maze/train-0.parquet", [row(0)])
    with pytest.raises(BadSourceError, match="upper and lower case"):
        prepare(tmp_path / "case", tmp_path / "out")
    with pytest.raises(BadSourceError, match="Maze has no split test, only train"):
        prepare(tmp_path / "case/Maze", tmp_path / "out", Part(splits=("train", "test")))
    maze(tmp_path / "two", [row(0)])
    write(tmp_path / "two/Chart/train-0.parquet", [row(0)])
    with pytest.raises(ValueError, match="on_bad_row.*'ignore'"):
        prepare(tmp_path / "two", tmp_path / "out", on_bad_row="ignore")
    with pytest.raises(ValueError, match="limit"):
        prepare(tmp_path / "two", tmp_path / "out", Part(limit=0))
    assert not (tmp_path / "out").exists()


def test_files_without_rows_or_broken(tmp_path):
    import pyarrow.parquet

    good = maze(
        tmp_path / "s", [row(i, reasoning_image_0=picture(i, size=(99, 99))) for i in range(3)]
    )
    empty = pyarrow.parquet.read_table(good).slice(0, 0)
    (tmp_path / "e/Maze").mkdir(parents=True)
    pyarrow.parquet.write_table(empty, tmp_path / "e/Maze/train-0.parquet")
    with pytest.raises(BadSourceError, match="train files hold no row"):
        prepare(tmp_path / "e", tmp_path / "out")
    maze(tmp_path / "all", [row(0, answer=""), row(1, answer="")])
    with pytest.raises(BadSourceError, match="(?s)no row of Maze/train is usable.*'p1'"):
        prepare(tmp_path / "all", tmp_path / "out", on_bad_row="skip")
    data = good.read_bytes()
    for broken in (
        b"not parquet at all",
        data[: len(data) // 2],
        data[:4] + bytes(99) + data[103:],
    ):
        good.write_bytes(broken)
        with pytest.raises(BadSourceError, match="(?s)cannot be read as parquet.*again") as error:
            prepare(tmp_path / "s", tmp_path / "out2")
        assert str(good) in str(error.value)


def test_memory_holds_a_row_group_and_not_the_file(tmp_path):
    import pyarrow

    noise = [picture(i, size=(200, 200)) for i in range(10)]  # 120 kB each
    file = maze(
        tmp_path / "s",
        [row(i, problem_image_0=noise[i % 10]) for i in range(160)],
        row_group_size=16,
        use_dictionary=False,
    )
    assert file.stat().st_size > 18e6
    before, peak = pyarrow.total_allocated_bytes(), 0
    for batch in parquet_files.read_batches(file, 160):
        assert len(batch) <= 32
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert 1e6 < peak < 10e6


def test_large_rows_are_read_few_at_a_time(tmp_path, monkeypatch):
    file = maze(tmp_path / "s", [row(i) for i in range(70)], row_group_size=50)

    def sizes(stop=70):
        return [len(batch) for batch in parquet_files.read_batches(file, stop)]

    assert sizes() == [32, 32, 6] and sizes(33) == [32, 1] and sizes(0) == []
    monkeypatch.setattr(schema, "BATCH_BYTES", 1)
    assert sizes() == [1] * 70
    assert [index for batch in parquet_files.read_batches(file, 70) for index, _ in batch] == [
        *range(70)
    ]


# -------------------------------------------------------------------------------- interruptions


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_full_disk_then_resume(tmp_path):
    """A file size limit stands in for the full disk: ArrayRecord reports both alike, and on close
    only.
    """
    for k in range(3):
        size = (400, 400) if k == 1 else (12, 9)
        write(
            tmp_path / f"s/Maze/train-{k}.parquet",
            [row(10 * k + i, problem_image_0=picture(i, size=size)) for i in range(3)],
        )
    script = textwrap.dedent("""
        import resource, signal, sys
        from opsd_jax.data.prepare import prepare
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            prepare(*sys.argv[1:])
        except OSError as error:
            print(error)
            sys.exit(3)
        """)
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3, done.stderr
    assert (
        f"{folder}/visual_opsd-train.array_record-00001-of-00003 could not be written"
        in done.stdout
    )
    assert "free space" in done.stdout and "finished shards are kept" in done.stdout
    assert sorted(stamps(folder)) == [
        "progress.json",
        "visual_opsd-train.array_record-00000-of-00003",
    ]
    with pytest.raises(
        FileNotFoundError, match="not finished.*opsd_jax.data prepare.*where it stopped"
    ):
        open_source(tmp_path / "out", task="maze")

    (folder / "visual_opsd-train.array_record-00001-of-00003.tmp").write_bytes(
        b"left by a killed process"
    )
    first = stamps(folder)["visual_opsd-train.array_record-00000-of-00003"]
    report = prepare(tmp_path / "s", tmp_path / "out")
    assert stamps(folder)["visual_opsd-train.array_record-00000-of-00003"] == first
    assert not list(folder.glob("*.tmp"))
    whole = prepare(tmp_path / "s", tmp_path / "whole")
    assert (
        (report.rows, report.bytes) == (whole.rows, whole.bytes) == ({"Maze/train": 9}, whole.bytes)
    )
    resumed, at_once = (
        list(open_source(tmp_path / target, task="maze")) for target in ("out", "whole")
    )
    assert resumed == at_once and len(resumed) == 9


def test_killed_in_the_first_shard(tmp_path):
    maze(tmp_path / "s", [row(0), row(1, answer="")])
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    with pytest.raises(BadRowError):
        prepare(tmp_path / "s", tmp_path / "out")
    assert sorted(stamps(folder)) == ["progress.json"]
    (folder / "progress.json").rename(folder / "progress.json.tmp")  # killed even earlier
    (folder / "visual_opsd-train.array_record-00000-of-00001.tmp").write_bytes(
        b"left by a killed process"
    )
    assert prepare(tmp_path / "s", tmp_path / "out", on_bad_row="skip").rows == {"Maze/train": 1}
    (folder / "dataset_info.json").unlink()  # the metadata come again, too
    assert prepare(tmp_path / "s", tmp_path / "out", on_bad_row="skip").rows == {"Maze/train": 1}
    assert len(open_source(folder)) == 1


def test_shards_that_cannot_be_read_back_do_not_count(tmp_path, monkeypatch):
    maze(tmp_path / "s", [row(0)])
    monkeypatch.setattr(shards, "count_records", lambda shard: 0)
    with pytest.raises(OSError, match="read back.*run the same command again"):
        prepare(tmp_path / "s", tmp_path / "out")
    assert sorted(stamps(tmp_path / "out/visual_opsd/maze/1.0.0")) == ["progress.json"]


def test_ctrl_c_leaves_no_half_shard(two_tasks, tmp_path, monkeypatch):
    read, calls = schema.read_row, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["index"])
        if len(calls) == 7:  # in the second shard
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    monkeypatch.setattr(schema, "read_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(two_tasks / "Maze", tmp_path / "out")
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    assert sorted(stamps(folder)) == [
        "progress.json",
        "visual_opsd-train.array_record-00000-of-00002",
    ]
    monkeypatch.setattr(schema, "read_row", lambda *a, **k: calls.append(0) or read(*a, **k))
    calls.clear()
    prepare(two_tasks / "Maze", tmp_path / "out")
    assert len(calls) == 3 + 2  # only the rows of the last two shards
    assert [e.pid for e in open_source(folder, "train+validation")] == [f"p{i}" for i in range(10)]

    calls.clear()  # finished, then a shard is lost, and remaking it is interrupted
    (folder / "visual_opsd-train.array_record-00001-of-00002").unlink()
    calls += range(6)
    monkeypatch.setattr(schema, "read_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(two_tasks / "Maze", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_source(folder)


def test_rerun_changes_nothing_and_replaces_only_when_told(two_tasks, tmp_path):
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    first = prepare(two_tasks / "Maze", tmp_path / "out")
    before = stamps(folder)
    assert prepare(two_tasks / "Maze", tmp_path / "out") == first and stamps(folder) == before
    assert prepare(two_tasks / "Maze", tmp_path / "out", on_bad_row="skip") == first
    with pytest.raises(FileExistsError, match="--overwrite") as error:
        prepare(two_tasks / "Maze", tmp_path / "out", Part(limit=3))
    assert str(folder) in str(error.value) and stamps(folder) == before
    assert (
        prepare(two_tasks / "Maze", tmp_path / "out", Part(limit=3), overwrite=True).rows[
            "Maze/train"
        ]
        == 3
    )
    assert len(list(folder.glob("*train.array_record*"))) == 1 and len(open_source(folder)) == 3
    (tmp_path / "other/visual_opsd/maze/1.0.0").mkdir(parents=True)
    (tmp_path / "other/visual_opsd/maze/1.0.0/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        prepare(two_tasks / "Maze", tmp_path / "other")


def test_fixing_a_row_or_adding_a_split_keeps_the_other_shards(tmp_path):
    source, folder = tmp_path / "s/Maze", tmp_path / "out/visual_opsd/maze/1.0.0"
    write(source / "train-0.parquet", [row(0), row(1)])
    write(source / "train-1.parquet", [row(2), row(3, answer="")])
    with pytest.raises(BadRowError):
        prepare(source, tmp_path / "out")
    first = stamps(folder)["visual_opsd-train.array_record-00000-of-00002"]
    write(source / "train-1.parquet", [row(2), row(3)])
    assert prepare(source, tmp_path / "out").rows == {"Maze/train": 4}
    write(source / "test-0.parquet", [row(4)])
    assert prepare(source, tmp_path / "out").rows == {"Maze/train": 4, "Maze/test": 1}
    assert stamps(folder)["visual_opsd-train.array_record-00000-of-00002"] == first
    assert [e.pid for e in open_source(folder, "train+test")] == [f"p{i}" for i in range(5)]
    write(source / "train-0.parquet", [row(7)])  # a finished shard's file is another now
    with pytest.raises(FileExistsError, match="train.array_record-00000-of-00002.*--overwrite"):
        prepare(source, tmp_path / "out")


def test_a_source_is_no_target(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    with pytest.raises(ValueError, match="is the --source: .* Give another folder"):
        prepare(tmp_path / "rows", tmp_path / "link")


def test_broken_and_absent_targets(two_tasks, tmp_path):
    prepare(two_tasks / "Maze", tmp_path / "out")
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    whole = list(open_source(folder))
    shard = folder / "visual_opsd-train.array_record-00001-of-00002"
    for damage in (
        lambda: shard.write_bytes(shard.read_bytes()[:1000]),
        lambda: os.truncate(shard, 100_000),
        lambda: shard.write_bytes(b""),
        shard.unlink,
    ):
        damage()
        with pytest.raises(
            FileNotFoundError, match="missing or truncated.*3 rows.*data prepare"
        ) as error:
            open_source(folder)
        assert str(shard) in str(error.value)
        prepare(two_tasks / "Maze", tmp_path / "out")
        assert list(open_source(folder)) == whole
    with pytest.raises(
        FileNotFoundError, match="jigsaw/1.0.0 holds no.*python -m opsd_jax.data prepare"
    ):
        open_source(tmp_path / "out", task="Jigsaw")
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        open_source(tmp_path / "out")
    with pytest.raises(
        ValueError, match=f"split 'test' of {folder}: Unknown split 'test'.*train, validation: "
    ):
        open_source(folder, "test")
    with pytest.raises(ValueError, match=f"{folder}.*99"):
        open_source(folder, "train[:99]")


# -------------------------------------------------------------------------------- TFDS by class


def test_without_tensorflow_and_by_builder_class(two_tasks, tmp_path):
    """In a fresh process: TensorFlow is never imported, and nothing slow before it is needed."""
    script = textwrap.dedent("""
        import sys
        from opsd_jax.data import arrayrecord, prepare, schedule, source_files
        slow = {"tensorflow_datasets", "pyarrow", "pandas", "tensorflow", "array_record", "jax"}
        assert not slow & set(sys.modules), slow & set(sys.modules)
        source, target, built = sys.argv[1:]
        prepare.prepare(source, target)
        examples = list(arrayrecord.open_source(target, task="chart_refocus"))
        file = source + "/Chart_Refocus/train-00000-of-00001.parquet"
        assert examples == list(source_files.read_examples(file, task="Chart_Refocus"))

        import tensorflow_datasets as tfds
        from opsd_jax.data.tfds_builder import VisualOpsd
        builder = VisualOpsd(config="chart_refocus", data_dir=built, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source))
        assert examples == list(arrayrecord.open_source(built, task="chart_refocus"))
        for data_dir in (target, built):  # the name is now a registered class, and still reads both
            name = "visual_opsd/chart_refocus"
            rows = tfds.data_source(name, data_dir=data_dir, split="train[1:]")
            assert [r["pid"] for r in rows] == [b"p1", b"p2", b"p3"]
        assert len(tfds.data_source("visual_opsd/maze", data_dir=target, split="train")) == 8
        assert "tensorflow" not in sys.modules
        print("fine")
        """)
    done = subprocess.run(
        [sys.executable, "-c", script, two_tasks, tmp_path / "out", tmp_path / "built"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("fine"), done.stderr


# -------------------------------------------------------------------------------- the schedule


def buckets_of(seed: int, rows: int, buckets: int, out: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(rows) < out, -1, rng.integers(0, buckets, rows)).astype(np.int32)


def some_schedule(**changes) -> BatchSchedule:
    """3 sources of 70, 45 and 20 rows in 3 buckets, some rows left out, weights out of
    proportion.
    """
    return BatchSchedule(
        **{
            "lengths": [buckets_of(1, 70, 3), buckets_of(2, 45, 3), buckets_of(3, 20, 3)],
            "weights": [5, 3.3, 1],
            "buckets": (256, 512, 1024),
            "batch_size": 4,
            "seed": 7,
            "chunk": 8,
        }
        | changes
    )


def visits(schedule: BatchSchedule, steps: range) -> Counter:
    return Counter(pair for step in steps for pair in schedule(step)[1])


def test_the_order_never_changes():
    """Pinned: a run must go on with the same rows after an update of NumPy."""
    schedule = BatchSchedule([[0, 1, 0, 0], [1, 0]], [2, 1], (8, 16), batch_size=2, seed=0, chunk=3)
    assert [schedule(step) for step in range(6)] == PINNED
    assert schedule(4, attempt=1) == PINNED_RETRY


def test_visits_and_mixture_with_one_bucket_at_every_step():
    rows, weights = (50, 30, 7), (3, 2, 1)
    schedule = BatchSchedule(rows, weights, (512,), batch_size=5, seed=3, chunk=16)
    count = Counter()
    for step in range(150):
        bucket, batch = schedule(step)
        assert bucket == 0 and len(batch) == 5
        count.update(batch)
        for s in range(3):
            seen = [count[s, r] for r in range(rows[s])]
            assert max(seen) - min(seen) <= 1
            assert abs(sum(seen) - weights[s] / 6 * 5 * (step + 1)) < 1


def test_visits_and_mixture_with_buckets_at_chunk_ends():
    schedule = some_schedule()
    assert schedule.chunk == 8
    count = Counter()
    for step in range(40 * 8):
        count.update(schedule(step)[1])
        if (step + 1) % 8 == 0:
            for s, length in enumerate(
                some_lengths := [buckets_of(1, 70, 3), buckets_of(2, 45, 3), buckets_of(3, 20, 3)]
            ):
                seen = [count[s, r] for r in np.flatnonzero(length >= 0)]
                assert max(seen) - min(seen) <= 1
                assert abs(sum(seen) - [5, 3.3, 1][s] / 9.3 * 4 * (step + 1)) < 1
            assert len(count) <= sum(
                (length >= 0).sum() for length in some_lengths
            )  # left out is left out


def test_shares_are_seats_by_webster():
    """Against the definition: the next draw goes to the source with the largest weight / (2 draws +
    1).
    """
    weights = [0.1, 3, 1e-3, 0, 1, 1]
    schedule, draws = BatchSchedule([10] * 6, weights, (1,), 1, 0), np.zeros(6, int)
    for n in range(1, 3000):
        draws[np.argmax(np.array(weights) / (2 * draws + 1))] += 1
        assert schedule._draws(n) == draws.tolist()
    assert sum(schedule._draws(10**12)) == 10**12  # exact, however far


def test_default_weights_visit_every_row_once_an_epoch():
    schedule = BatchSchedule([40, 16, 8], None, (1,), batch_size=8, seed=5)
    for epoch in range(3):
        assert set(visits(schedule, range(8 * epoch, 8 * epoch + 8)).values()) == {1}
        assert len(visits(schedule, range(8 * epoch, 8 * epoch + 8))) == 64
    # Another order in the next epoch.
    assert visits(schedule, range(4)) != visits(schedule, range(8, 12))


def test_no_hidden_state():
    want = {step: some_schedule()(step) for step in range(60)}  # a fresh schedule each
    used = some_schedule()
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 3))
    for step in order:
        used(step, attempt=step % 3)
        assert used(step) == want[step]
    used(3)[1].append("changed by the caller")
    assert used(3) == some_schedule()(3)
    with ThreadPoolExecutor(8) as pool:
        fresh = pickle.loads(pickle.dumps(some_schedule()))
        assert list(pool.map(fresh, order)) == [some_schedule()(step) for step in order]
    assert [some_schedule(seed=8)(s) for s in range(8)] != [some_schedule()(s) for s in range(8)]


def test_hosts_share_the_batch_and_the_bucket():
    one = [some_schedule()(step) for step in range(30)]
    for hosts in (1, 2, 3, 4):
        schedules = [some_schedule() for _ in range(hosts)]
        for step in range(17, 30):  # resumed at 17, on another number of hosts
            got = [schedule(step) for schedule in schedules]
            parts = [rows[p::hosts] for p, (_, rows) in enumerate(got)]
            assert {bucket for bucket, _ in got} == {one[step][0]}
            assert Counter(sum(parts, [])) == Counter(one[step][1])
    first = Counter(
        rows[0][0] for _, rows in (BatchSchedule([64, 64], None, (1,), 2, 0)(s) for s in range(64))
    )
    assert min(first.values()) > 16  # no host is stuck with one source


def test_buckets_hold_their_rows_and_seldom_mix():
    schedule = some_schedule()
    lengths = [buckets_of(1, 70, 3), buckets_of(2, 45, 3), buckets_of(3, 20, 3)]
    for chunk in range(10):
        mixed = 0
        for step in range(8 * chunk, 8 * chunk + 8):
            bucket, rows = schedule(step)
            inside = {lengths[s][r] for s, r in rows}
            assert max(inside) == bucket and min(inside) >= 0
            mixed += len(inside) > 1
        assert mixed <= 2  # one batch at each border between buckets
    assert len({bucket for bucket, _ in map(schedule, range(8))}) == 3
    order = [bucket for bucket, _ in map(schedule, range(8))]
    assert order != sorted(order)  # not from short to long


def test_sources_by_count_go_to_the_largest_bucket():
    schedule = BatchSchedule([6, [0] * 6], None, (8, 16), batch_size=3, seed=0)
    for step in range(20):
        bucket, rows = schedule(step)
        assert bucket == (1 if any(s == 0 for s, _ in rows) else 0)


def test_attempts():
    schedule = some_schedule()
    lengths = [buckets_of(1, 70, 3), buckets_of(2, 45, 3), buckets_of(3, 20, 3)]
    sources = Counter()
    for step in range(100):
        bucket, scheduled = schedule(step)
        retries = [schedule(step, attempt) for attempt in (1, 2, 3)]
        assert retries == [some_schedule()(step, attempt) for attempt in (1, 2, 3)]
        assert len({tuple(rows) for _, rows in retries}) == 3
        for b, rows in retries:
            assert b == bucket and len(set(rows)) == 4 and not set(rows) & set(scheduled)
            assert all(0 <= lengths[s][r] <= bucket for s, r in rows)
            sources.update(s for s, _ in rows)
    for s, weight in enumerate([5, 3.3, 1]):
        assert sources[s] / 1200 == pytest.approx(weight / 9.3, abs=0.03)
    tiny = BatchSchedule(
        [2], None, (1,), batch_size=3, seed=0
    )  # nothing else to give: the same rows again
    assert {r for _, r in tiny(0, attempt=1)[1]} == {0, 1}


def test_chunks_are_at_most_an_epoch():
    schedule = BatchSchedule([[0, 1] * 8], None, (8, 16), batch_size=4, seed=0, chunk=64)
    for epoch in range(5):
        assert set(visits(schedule, range(4 * epoch, 4 * epoch + 4)).values()) == {1}


def test_batches_larger_than_everything_wrap_around():
    schedule = BatchSchedule([3, [0, -1]], None, (1,), batch_size=11, seed=0)
    assert Counter(schedule(0)[1]) == Counter(schedule(0)[1])
    count = visits(schedule, range(4))
    assert sum(count.values()) == 44 and set(count.values()) == {11} and (1, 1) not in count


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": [], "weights": None}, "no source"),
        ({"weights": [1, 1]}, "2 weights for 3 sources"),
        ({"weights": [1, -1, 1]}, "finite, >= 0"),
        ({"weights": [1, float("nan"), 1]}, "finite"),
        ({"weights": [0, 0, 0]}, "not all 0"),
        ({"buckets": ()}, "buckets"),
        ({"buckets": (2, 1, 3)}, "ascending"),
        ({"buckets": (1, 2)}, r"lengths\[0\]\[\d+\] is bucket index 2, but there are 2 buckets"),
        ({"lengths": [4, [0, -2]], "weights": None}, r"lengths\[1\]\[1\] is bucket index -2"),
        (
            {"lengths": [4, [-1, -1]], "weights": None},
            "source 1 has no example to use.*2 examples, all left out",
        ),
        ({"lengths": [0], "weights": None}, "source 0 has no example"),
        ({"lengths": [[0.5]], "weights": None}, "int array"),
        ({"lengths": [[[1]]], "weights": None}, "int array"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"chunk": 0}, "chunk must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_schedules_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        some_schedule(**changes)


def test_negative_steps():
    for call in ((-1,), (0, -1)):
        with pytest.raises(ValueError, match="must be >= 0"):
            some_schedule()(*call)


PINNED = [
    (1, [(0, 1), (1, 0)]),
    (0, [(0, 2), (0, 3)]),
    (0, [(0, 0), (1, 1)]),
    (0, [(0, 3), (0, 2)]),
    (1, [(0, 1), (1, 0)]),
    (0, [(0, 0), (1, 1)]),
]
PINNED_RETRY = (1, [(0, 2), (1, 1)])


def test_records_have_one_order_of_fields(tmp_path):
    """Protocol buffers may write a map in an order of the process: then the same rows would have
    another digest each time.
    """
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    write(tmp_path / "s/Maze/train-0.parquet", [row(0)])
    prepare(tmp_path / "s", tmp_path / "out")
    (shard,) = shards.version_folder(tmp_path / "out", "Maze").glob("*.array_record-*")
    record = bytes(array_record_module.ArrayRecordReader(str(shard)).read_all()[0])
    read = tf_example_pb2.Example.FromString(record)
    assert record == read.SerializeToString(deterministic=True) and set(
        read.features.feature
    ) == set(schema.features())


def test_a_digest_is_that_of_the_rows_wherever_they_are(tmp_path):
    """Not of the folder's place, the time, or the way that it was made; but of every byte of a
    row.
    """
    import tensorflow_datasets as tfds

    from opsd_jax.data.tfds_builder import VisualOpsd

    def digest(place, *rows, **changes):
        write(tmp_path / place / "s/Chart_Refocus/train-0.parquet", [row(0), *rows])
        prepare(tmp_path / place / "s", tmp_path / place / "out", **changes)
        return shards.digest(shards.version_folder(tmp_path / place / "out", "Chart_Refocus"))

    known = digest("a", row(1, answer="A"))
    folder = shards.version_folder(tmp_path / "a/out", "Chart_Refocus")
    assert (
        digest("deep/b", row(1, answer="A"))
        == digest("c", row(1, answer="A"), row(2, answer=""), on_bad_row="skip")
        == known
    )
    assert (
        len(
            {
                known,
                digest("d", row(1, answer="B")),
                digest("e"),
                digest("f", row(1, answer="A"), row(2)),
            }
        )
        == 4
    )
    shutil.copytree(tmp_path / "a/out", tmp_path / "copy")
    shutil.rmtree(tmp_path / "a/s")
    for remove in ("nothing", "report.json", "progress.json"):
        (shards.version_folder(tmp_path / "copy", "Chart_Refocus") / remove).unlink(missing_ok=True)
        assert shards.digest(shards.version_folder(tmp_path / "copy", "Chart_Refocus")) == known
    built = VisualOpsd(
        config="chart_refocus", data_dir=tmp_path / "built", file_format="array_record"
    )
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "deep/b/s")
    built.download_and_prepare(download_config=config)
    of_builder = shards.digest(shards.version_folder(tmp_path / "built", "Chart_Refocus"))
    (shard,) = shards.version_folder(tmp_path / "built", "Chart_Refocus").glob("*array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)  # the same size
    assert (
        len({of_builder, shards.digest(shards.version_folder(tmp_path / "built", "Chart_Refocus"))})
        == 2
    )
    records = json.loads((folder / "progress.json").read_text())
    for record in records.values():  # as an older version wrote it
        del record["blake2b"], record["file_bytes"]
    (folder / "progress.json").write_text(json.dumps(records))
    assert shards.digest(shards.version_folder(tmp_path / "a/out", "Chart_Refocus")) == known


def test_an_edited_file_of_the_same_size_and_time_is_seen(tmp_path):
    file = maze(tmp_path / "s", [row(0, answer="A")])
    before = file.stat()
    prepare(tmp_path / "s", tmp_path / "out")
    maze(tmp_path / "s", [row(0, answer="B")])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(
        FileExistsError, match=f"{tmp_path}/out.*other or edited files.*--overwrite"
    ):
        prepare(tmp_path / "s", tmp_path / "out")
    prepare(tmp_path / "s", tmp_path / "out", overwrite=True)
    assert [e.answer for e in open_source(tmp_path / "out", task="maze")] == ["B"]


def test_a_folder_of_an_older_version_is_written_again(two_tasks, tmp_path):
    """It knew its source by size alone."""
    prepare(two_tasks / "Maze", tmp_path / "out")
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    whole, progress = list(open_source(folder)), json.loads((folder / "progress.json").read_text())
    for record in progress.values():
        record["shard"][3] = (two_tasks / "Maze" / record["shard"][2]).stat().st_size
        del record["blake2b"], record["file_bytes"]
    (folder / "progress.json").write_text(json.dumps(progress))
    before = stamps(folder)
    prepare(two_tasks / "Maze", tmp_path / "out")
    assert list(open_source(folder)) == whole
    assert all(stamps(folder)[name] > before[name] for name in progress)
    progress[min(progress)]["shard"][3] += 1
    (folder / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(two_tasks / "Maze", tmp_path / "out")


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "NUL": lambda data: bytes(len(data)),
    "list": lambda data: b"[1]",
    "number": lambda data: b"7",
    "other keys": lambda data: b'{"a": {"b": null}}',
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "report.json", "progress.json"]
)
def test_small_files_that_a_power_cut_damaged(tmp_path, name, damage):
    maze(tmp_path / "s", [row(0), row(1)])
    first = prepare(tmp_path / "s", tmp_path / "out")
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    whole, good = list(open_source(folder)), (folder / name).read_bytes()
    shard = stamps(folder)["visual_opsd-train.array_record-00000-of-00001"]
    known = shards.digest(shards.version_folder(tmp_path / "out", "maze"))
    (folder / name).write_bytes(DAMAGES[damage](good))
    if name in ("dataset_info.json", "features.json"):
        with pytest.raises(
            ValueError,
            match=f"(?s){folder}/{name} is missing or damaged .*`python -m opsd_jax.data "
            f"prepare .*again",
        ):
            open_source(folder)
    else:
        assert list(open_source(folder)) == whole  # it does not need them
    assert shards.digest(shards.version_folder(tmp_path / "out", "maze")) == known
    if name == "progress.json":  # it alone tells what the folder holds
        with pytest.raises(
            ValueError,
            match=f"{folder}/{name} is damaged .*{tmp_path}/s/Maze again with --overwrite",
        ):
            prepare(tmp_path / "s", tmp_path / "out")
        prepare(tmp_path / "s", tmp_path / "out", overwrite=True)
    else:
        assert prepare(tmp_path / "s", tmp_path / "out").rows == first.rows
        assert stamps(folder)["visual_opsd-train.array_record-00000-of-00001"] == shard  # kept
    assert list(open_source(folder)) == whole
    if name != "report.json":  # which holds the seconds
        assert (folder / name).read_bytes() == good
    assert prepare_lib.PrepareReport.read(folder / "report.json").rows == first.rows


def test_a_shard_with_a_flipped_bit_is_written_again(two_tasks, tmp_path):
    prepare(two_tasks / "Maze", tmp_path / "out")
    folder = tmp_path / "out/visual_opsd/maze/1.0.0"
    shard, before = folder / "visual_opsd-train.array_record-00000-of-00002", stamps(folder)
    good = shard.read_bytes()
    shard.write_bytes(good[:500] + bytes([good[500] ^ 1]) + good[501:])
    prepare(two_tasks / "Maze", tmp_path / "out")
    assert shard.read_bytes() == good
    assert (
        stamps(folder)["visual_opsd-train.array_record-00001-of-00002"]
        == before["visual_opsd-train.array_record-00001-of-00002"]
    )


@pytest.mark.long
def test_row_groups_beyond_2_gib(tmp_path):
    """Arrow gives no such image column in one piece.

    The images end in zeros, so the file itself is small.
    """
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "s/Maze/train-0.parquet"
    file.parent.mkdir(parents=True)

    def large(i):
        r = row(i)
        return pyarrow.Table.from_pylist(
            [
                r
                | {
                    "problem_image_0": r["problem_image_0"]
                    | {"bytes": r["problem_image_0"]["bytes"] + bytes(64 << 20)}
                }
            ]
        )

    table = pyarrow.concat_tables([large(i) for i in range(33)])
    pyarrow.parquet.write_table(
        table, file, row_group_size=33, compression="zstd", use_dictionary=False
    )
    del table
    assert pyarrow.parquet.ParquetFile(file).metadata.row_group(0).total_byte_size > 2**31
    found = [index for batch in parquet_files.read_batches(file, 33) for index, _ in batch]
    assert found == [*range(33)]
    assert [*source_files.read_examples(file, task="Maze")][32].pid == "p32"
    assert prepare(tmp_path / "s", tmp_path / "out", Part(limit=2)).rows == {"Maze/train": 2}
