"""Questions without an image: files, blocks, controls, pages, and the procedural word problems."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import test_blocks
import test_datasets
from test_blocks import packer, png, prepared, shown

from opsd_jax import tasks
from opsd_jax.blocks import BlockNames
from opsd_jax.data import examples as examples_lib
from opsd_jax.data import prepare as prepare_lib
from opsd_jax.data import schema, shards, sizes, source_files, tfds_builder
from opsd_jax.data.arrayrecord import open_source
from opsd_jax.data.prepare import prepare
from opsd_jax.data.schema import BadRowError, BadSourceError
from opsd_jax.evaluation import contexts
from opsd_jax.tasks import arithmetic, parquet

IMAGE = png(np.random.default_rng(0).integers(0, 256, (8, 8, 3)))
LINE = {"question": "1 + 1?", "answer": "2", "thoughts": ["one more"], "text_trace": "1 + 1 = 2."}
CHAT = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "1 + 1 = 2. <answer>2</answer>"},
    ]
}


def write(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(IMAGE)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl"


def read(path):
    return list(source_files.read_examples(path, task="T"))


def row(n, **changes):
    return test_datasets.row(n) | changes


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [LINE, LINE | {"images": []}, LINE | {"image": None}, CHAT])
def test_lines_without_an_image(tmp_path, line):
    path = write(tmp_path / "T", line)
    (example,) = read(path)
    assert example.problem_images == () and example.problem_image is None
    assert (example.question, example.answer) == ("1 + 1?", "2")
    report = prepare(tmp_path, tmp_path / "out")
    assert "no_image: the question is asked without an image" in [w.reason for w in report.warnings]
    source = open_source(tmp_path / "out", task="T")
    assert source[0] == example
    with pytest.raises(ValueError, match="example train:0 has no image"):
        source[0].image  # noqa: B018
    assert source[0].opened_images == []
    plain = tfds.data_source("visual_opsd/t", data_dir=str(tmp_path / "out"), split="train")
    assert len(plain[0]["problem_images"]) == 0 and "problem_image" not in plain[0]


def test_some_rows_have_images(tmp_path):
    """All are in one feature; a second preparation changes nothing."""
    lines = [LINE, LINE | {"image": "a.png"}, LINE | {"images": ["a.png", "a.png"]}]
    path = write(tmp_path / "T", *lines)
    report = prepare(tmp_path, tmp_path / "out")
    assert [w.row for w in report.warnings if w.reason.startswith("no_image")] == [0]
    source = open_source(tmp_path / "out", task="T")
    assert [len(source[n].problem_images) for n in range(3)] == [0, 1, 2]
    assert [source[n] for n in range(3)] == read(path)
    folder = shards.version_folder(tmp_path / "out", "T")
    (record,) = json.loads((folder / "progress.json").read_text()).values()
    assert record["shard"][5:] == [[], True, True]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    prepare(tmp_path, tmp_path / "out")
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_named_image_that_is_missing_stays_an_error(tmp_path):
    for line, said in (
        (LINE | {"image": "no.png"}, "image is .*no such file"),
        (LINE | {"images": [None, "a.png"]}, r"images\[0\] is missing"),
        (LINE | {"question": "Is <image>?"}, "question has 1 place <image> for 0 images"),
        (CHAT | {"images": ["no.png"]}, "images is .*no such file"),
    ):
        write(tmp_path / "T", line)
        with pytest.raises(BadRowError, match=said):
            prepare(tmp_path, tmp_path / "out")


def test_parquet_rows_without_an_image(tmp_path):
    def rewritten(rows, **options):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path, **options)

    test_datasets.maze(tmp_path / "s", [row(0), row(1)])
    (path,) = tmp_path.glob("s/Maze/data/*.parquet")
    without = [{k: v for k, v in row(n).items() if k != "problem_image_0"} for n in range(2)]
    for rows, counts, options in (
        ([row(0), row(1, problem_image_0=None)], [1, 0], {}),
        ([row(0), row(1, problem_image_0=None)], [1, 0], {"write_statistics": False}),
        ([row(0), row(1, problem_image_0={"bytes": None, "path": None})], [1, 0], {}),
        (without, [0, 0], {}),
    ):
        rewritten(rows, **options)
        prepare(tmp_path / "s", tmp_path / "out", overwrite=True)
        source = open_source(tmp_path / "out", task="Maze")
        assert [len(source[n].problem_images) for n in range(2)] == counts
    for options in ({}, {"write_statistics": False}):  # as before
        rewritten([row(0), row(1)], **options)
        prepare(tmp_path / "s", tmp_path / "out", overwrite=True)
        folder = shards.version_folder(tmp_path / "out", "Maze")
        assert schema.PROBLEMS not in (folder / "features.json").read_text()
        (record,) = json.loads((folder / "progress.json").read_text()).values()
        assert len(record["shard"]) == 5
    for image, said in (
        ({"bytes": None, "path": "a.png"}, "problem_image_0 holds no bytes"),
        ({"bytes": b"", "path": "a.png"}, "problem_image_0 holds no bytes"),
    ):
        rewritten([row(0), row(1, problem_image_0=image)])
        with pytest.raises(BadRowError, match=said):
            prepare(tmp_path / "s", tmp_path / "bad")
    rewritten([r | {"picture": row(0)["problem_image_0"]} for r in without])
    with pytest.raises(BadSourceError, match="no column 'problem_image_0', but 'picture' seems to"):
        prepare(tmp_path / "s", tmp_path / "bad")
    part = prepare_lib.Part(columns=("images:picture",))
    assert prepare(tmp_path / "s", tmp_path / "good", part).rows == {"Maze/train": 2}


def test_the_builder_is_told(tmp_path):
    path = write(tmp_path / "T", LINE)
    config = tfds_builder.Config(name="t", optional_image=True)
    builder = tfds_builder.VisualOpsd(config=config, data_dir=str(tmp_path / "b"))
    ((_, made),) = builder._generate_examples("T", [path])
    assert made[schema.PROBLEMS] == [] and schema.PROBLEMS in builder.info.features
    with pytest.raises(ValueError, match="has 0 problem images.*optional_image=True"):
        schema.to_features(read(path)[0])


# --- blocks, controls, pages ---------------------------------------------------------------------


def test_blocks_of_a_question_without_an_image():
    """Blocks of images are left out; the controls have no image to show in their place."""
    names = BlockNames(("image", "question"), ("image", "question", "image@blur", "images:crops"))
    made = prepared(test_blocks.example(problem_image=None), names)
    assert made.problems == () and made.content["image@blur"] == ()
    pack = packer(names)
    assert shown(pack.blocks(made, "student")) == ["q?"]
    assert len(pack.blocks(made, "teacher")) == 3  # the question and two crops
    other = prepared(test_blocks.example(1), names)
    rng = np.random.default_rng(0)
    for mode, count in (("real", 2), ("noise", 2), ("swap", 3), ("image", 0), ("none", 0)):
        content = pack.shown(made, mode, other, rng)
        assert len(pack.blocks(made, "teacher", content)) == 1 + count, mode
    both = pack.student([made, other])
    assert both.patch_image.any(axis=1).tolist() == [False, True]
    alone = pack.student([made])
    assert alone.patches.shape[1] == both.patches.shape[1] and not alone.patch_image.any()


def test_a_context_without_anything_is_refused():
    made = prepared(test_blocks.example(problem_image=None), BlockNames(("image",), ("image",)))
    with pytest.raises(ValueError, match="example p0 has nothing to show in config.student.blocks"):
        packer(BlockNames(("image",), ("image",))).student([made])


def test_sizes_of_questions_without_images():
    rows = [
        sizes.Row(
            f"p{n}", True, {"student": np.array([n + 9, 0]), "trace": np.array([20, 0, 7])}, 8
        )
        for n in range(2)
    ]
    lines = [line.split() for line in sizes._table(rows)[1:]]
    assert [line[:-1] for line in lines] == [
        ["student", "positions", "10", "10", "10"],
        ["trace", "positions", "20", "20", "20"],
        ["targets", "7", "7", "7"],
    ]


def test_what_a_teacher_can_see():
    without, with_image = test_blocks.example(problem_image=None), test_blocks.example()
    for names, found in (
        (("image@crop",), [False, True]),
        (("image",), [False, True]),
        (("question",), [True, True]),
        (("image@crop", "text:hint"), [True, True]),
    ):
        assert [examples_lib.has_content(e, names) for e in (without, with_image)] == found


def test_images_of_a_page(monkeypatch):
    names = BlockNames(("image", "question"), ("image", "question", "visual_thoughts"))
    made = prepared(test_blocks.example(problem_image=None), names)

    class OneExample:
        def __call__(self, source, n):
            return made

    selection = contexts.Selection(OneExample(), packer(names), mesh=None, batch_size=1)
    captions = {
        mode: [caption for caption, _ in selection.shown_images(0, 0, mode)]
        for mode in ("none", "real", "image")
    }
    assert captions == {"none": [], "real": ["visual thought 1 (real)"], "image": []}


# --- word problems -------------------------------------------------------------------------------


def solved(example) -> int:
    """The answer, from the question alone."""
    words = example.question.rstrip("?").split()
    things = words[words.index("many") + 1]
    total = 0
    for sentence in example.question.split(". "):
        said = sentence.rstrip(".").split()
        numbers = [int(word) for word in said if word.isdigit()]
        if things not in said or not numbers:
            continue  # a distractor, or the question
        (n,) = numbers
        total += -n if {"gives", "loses", "sells"} & {*said} else n
    return total


@pytest.mark.parametrize("difficulty", arithmetic.DIFFICULTY)
def test_word_problems(difficulty):
    found = list(tasks.generate("arithmetic", "test", 100, seed=0, difficulty=difficulty))
    settings, keys = arithmetic.DIFFICULTY[difficulty], set()
    for example in found:
        assert example.problem_image is None and example.visual_thoughts == ()
        assert solved(example) == int(example.answer) == example.metadata["answer"] > 0
        (worked,) = example.thoughts
        assert worked == example.full_text_only_thought and worked.endswith(f"= {example.answer}.")
        sums = [part.split(" = ") for part in worked.rstrip(".").split(". ")[1:]]
        assert len(sums) == example.metadata["steps"]
        assert settings["steps"][0] <= len(sums) <= settings["steps"][1]
        for left, right in sums:
            a, sign, b = left.split()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert example.question.count(" also has ") == settings["distractors"]
        keys.add(worked.split(". ", 1)[1])
    assert len(keys) == 100  # sums never recur, whatever the names


def test_splits_of_word_problems_share_no_sum():
    def sums(split):
        return {
            e.full_text_only_thought.split(". ", 1)[1]
            for e in tasks.generate("arithmetic", split, 300, seed=1, difficulty="easy")
        }

    found = [sums(split) for split in tasks.SPLITS]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


@pytest.mark.parametrize(
    "text, is_right",
    [
        ("29", True),
        (" 29 pens. ", True),
        ("23 + 6 = 29", True),
        ("29.0", True),
        ("-29", False),
        ("2 9", False),
        ("129", False),
        ("29 of 30", False),
        ("none", False),
        (None, False),
    ],
)
def test_scores_of_word_problems(text, is_right):
    assert tasks.score({"family": "arithmetic", "answer": 29}, text) == is_right
    assert tasks.score({"family": "arithmetic", "answer": 1029}, "1,029 pens")


def test_wrong_settings_of_word_problems():
    assert tasks.fault({"family": "arithmetic", "answer": "29"}, "<answer>29</answer>")
    for changes, said in (
        ({"start": (0, 4)}, r"start=\(0, 4\)"),
        ({"steps": (3, 2)}, r"steps=\(3, 2\)"),
        ({"distractors": 3}, "distractors=3: give 0 to"),
    ):
        with pytest.raises(ValueError, match=f"arithmetic {said}"):
            list(tasks.generate("arithmetic", "test", 1, seed=0, **changes))


def test_word_problems_as_files(tmp_path):
    """No column of images; the miniature's tokenizer is what it was."""
    parquet.make_mini(tmp_path / "m", families=["arithmetic"], counts={"train": 8, "test": 2})
    names = pq.read_schema(next(tmp_path.glob("m/parquet/Arithmetic/data/train-*"))).names
    assert names == ["pid", "question", "answer", "resoning_thought_0", *names[4:]]
    assert not [name for name in names if "image" in name]
    report = prepare(tmp_path / "m" / "parquet", tmp_path / "out")
    assert report.rows == {"Arithmetic/train": 8, "Arithmetic/test": 2}
    source = open_source(tmp_path / "out", "test", task="Arithmetic")
    assert tasks.judge(source[0].metadata, "", f"<answer>{source[0].answer}</answer>")[1]
    bad = next(tasks.generate("arithmetic", "test", 1, seed=0))
    bad.__dict__["thoughts"] = ("a", "b")
    with pytest.raises(ValueError, match="has 2 thoughts and 0 visual .* holds 1 and 0"):
        parquet.rows([bad], "Arithmetic")
