"""Questions with several images, and with places of images: files, blocks, controls, pages."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import test_blocks
import test_datasets
from PIL import Image
from test_blocks import ASKED, packer, png, prepared, shown

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import images, tags
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.blocks import BlockNames
from opsd_jax.data import __main__ as data
from opsd_jax.data import examples as examples_lib
from opsd_jax.data import packing, schema, shards, sizes, source_files, tfds_builder
from opsd_jax.data.arrayrecord import open_source
from opsd_jax.data.prepare import Part, prepare
from opsd_jax.data.schema import BadRowError
from opsd_jax.diagnose import official
from opsd_jax.evaluation import benchmark, contexts
from opsd_jax.run import redraw

PLACED = "Is <image> as\n<image>?"
DEFAULT = BlockNames()


def pixels(n: int, width: int = 8) -> bytes:
    return png(np.random.default_rng(n).integers(0, 256, (8, width, 3)))


def example(n: int = 0, question: str = PLACED, **changes) -> schema.Example:
    """Two problem images; the second, twice as wide, has 1 x 2 patches."""
    fields = dict(
        question=question, problem_image=pixels(n), more_problem_images=(pixels(n + 50, 16),)
    )
    return test_blocks.example(n, **fields | changes)


def patches(prepared_images) -> list:
    return [image.patches.tolist() for image in prepared_images]


# --- the text around places ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, texts",
    [
        ("Why?", ("Why?",)),
        (" Why?\n", (" Why?\n",)),  # as it is
        ("<image>\n<image> Why? ", ("Why?",)),
        ("Is <image> as\n<image>?", ("Is", "as", "?")),
        ("<image> and <image>", ("", "and", "")),
        ("a<image><image>", ("a", "", "")),
        ("<image>", ("",)),
    ],
)
def test_texts_around_places(question, texts):
    assert tags.around_places(question) == texts


def test_as_many_places_as_images_or_none():
    assert [tags.places_fault(PLACED, n) is None for n in range(4)] == [False, False, True, False]
    assert tags.places_fault("Why?", 3) is None
    fault = tags.places_fault("<image>?", 2)
    assert fault.startswith("has 1 place <image> for 2 images: give as many places as images")
    assert tags.places_fault(PLACED, 1).startswith("has 2 places <image> for 1 image: ")


# --- blocks --------------------------------------------------------------------------------------


def test_two_images_position_by_position():
    """bos 256, eos 257, image 258 ... 259; the images have 1 and 2 patches."""
    rng = np.random.default_rng(0)
    first, second = tiny.image(rng, (1, 1)), tiny.image(rng, (1, 2))
    prompts = blocks_lib.Prompts(system="", suffix="!")
    blocks = blocks_lib.student(tiny.TOKENIZER, prompts, "a <image> b <image>", [first, second])
    packed = tiny.pack([blocks], positions=16, patches=4)
    a, b, end = map(ord, "ab!")
    assert packed.tokens[0].tolist() == [
        *(256, a, 257, 258, 0, 259, 256, b, 257, 258, 0, 0, 259, 256, end, 257)
    ]
    assert packed.rope_positions[0].tolist() == [0, 1, 2, *[3] * 3, 4, 5, 6, *[7] * 4, 8, 9, 10]
    assert packed.limit[0].tolist() == [1, 2, 3, *[6] * 3, 7, 8, 9, *[13] * 4, 14, 15, 16]
    assert packed.patch_positions[0].tolist() == [4, 10, 11, 16]
    assert packed.patch_image[0].tolist() == [1, 2, 2, 0]
    assert packed.patch_table_ids[0].tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(packed.patches[0, 1:3], second.patches)
    assert (packed.length[0], packed.next_rope_position[0]) == (16, 11)
    with pytest.raises(ValueError, match="the question has 2 places <image> for 1 image"):
        blocks_lib.student(tiny.TOKENIZER, prompts, PLACED, first)


def test_images_are_where_the_places_are():
    row, own = prepared(example(), DEFAULT), packer(DEFAULT)
    one, two = patches(row.problems)
    (vt,) = patches(row.visual_thoughts)
    asked = ["sys", "Is", one, "as", two, "?"]
    assert one != two and len(row.problems) == 2
    assert shown(own.blocks(row, "student")) == asked
    assert shown(own.blocks(row, "teacher")) == [*asked, "look", vt, "now"]
    assert shown(own.blocks(row, "interleaved"))[:6] == asked
    assert shown(own.blocks(row, "reference"))[:9] == [*asked, "look", vt, "now"]
    given = tiny.TOKENIZER, tiny.PROMPTS, PLACED, row.problems
    assert shown(blocks_lib.teacher(*given, row.visual_thoughts)) == [*asked, "look", vt, "now"]
    named = own.named_blocks(row, "student")
    assert [name for name, _ in named] == [
        *("system", "question", "image", "question", "image", "question")
    ]
    thought, *rest = official.official_blocks(own, row)[0][5:]
    assert shown(official.official_blocks(own, row)[1])[:5] == asked[1:]
    assert thought.loss and shown([thought, *rest]) == ["a", vt, "B"]
    # sys 5, Is 4, image 6, as 4, image 4, ? 3; then look 6, vt 6, now 5
    needs = own.needs(row)
    assert needs["student"].tolist() == [26, 6] and needs["teacher"].tolist() == [43, 10]


@pytest.mark.parametrize("question", ["q?", "<image>\n<image>q?"])
def test_without_places_all_images_come_in_the_order_of_the_names(question):
    row = prepared(example(question=question), DEFAULT)
    one, two = patches(row.problems)
    assert shown(packer(DEFAULT).blocks(row, "student")) == ["sys", one, two, "q?"]
    names = BlockNames(("question", "image"))
    assert shown(packer(names).blocks(row, "student")) == ["q?", one, two]


def test_one_image_may_have_a_place():
    row = prepared(test_blocks.example(question="In <image>?"), DEFAULT)
    (clean,) = patches(row.problems)
    assert shown(packer(DEFAULT).blocks(row, "student")) == ["sys", "In", clean, "?"]


def test_the_places_hold_the_first_kind_of_problem_images():
    names = BlockNames(
        ("image@blur", "question", "image@low_resolution"), (*ASKED, "image@crop", "text:hint")
    )
    row = prepared(example(), names)
    one, two = patches(row.problems)
    blurred, low, crops = (
        patches(row.content[f"image@{name}"]) for name in ("blur", "low_resolution", "crop")
    )
    own = packer(names)
    assert shown(own.blocks(row, "student")) == ["Is", blurred[0], "as", blurred[1], "?", *low]
    assert shown(own.blocks(row, "teacher")) == ["sys", "Is", one, "as", two, "?", *crops, "hi"]
    assert len({str(image) for image in (one, two, *blurred, *low, *crops)}) == 8
    for file, wanted in zip(row.example.problem_images, crops):
        with Image.open(io.BytesIO(file)) as opened:
            box = opened.width // 4, 2, opened.width * 3 // 4, 6
            crop = images.resize(opened.crop(box), images.Resize(4, 8, 8))
        assert images.patchify(crop, 4).tolist() == wanted


def test_a_context_without_the_image_has_the_texts():
    names = BlockNames(("question",), ("image", "question", "text:hint"))
    row, own = prepared(example(), names), packer(names)
    one, two = patches(row.problems)
    asked = ["Is", one, "as", two, "?"]
    assert shown(own.blocks(row, "student")) == ["Is", "as", "?"]
    assert shown(own.blocks(row, "teacher")) == [*asked, "hi"]

    def teacher(mode, partner=None):
        content = own.shown(row, mode, partner, np.random.default_rng(0))
        return shown(own.blocks(row, "teacher", content))

    assert teacher("none") == ["Is", "as", "?"]
    assert teacher("image") == ["Is", one, "as", one, "?"]
    other = prepared(example(7), names)
    partner = patches(other.problems)
    assert teacher("swap", other) == ["Is", partner[0], "as", partner[1], "?", "hi" * 8]
    # Another number of images than places: they are where their name is.
    single = prepared(test_blocks.example(3), names)
    assert teacher("swap", single) == [*patches(single.problems), "Is", "as", "?", "hi" * 4]


def test_controls_of_a_question_that_only_the_teacher_has():
    names = BlockNames(("image",), ASKED)
    row, own = prepared(example(), names), packer(names)
    content = own.shown(row, "noise", None, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    wanted = [rng.choice(np.arange(256), n).tolist() for n in (2, 2, 1)]
    blocks = own.blocks(row, "teacher", content)
    assert [b.ids.tolist() for b in blocks[1:] if isinstance(b, blocks_lib.Text)] == wanted
    assert patches(b for b in blocks if isinstance(b, blocks_lib.Image)) == patches(row.problems)
    content = own.shown(row, "none")
    assert shown(own.blocks(row, "teacher", content)) == ["sys", *patches(row.problems)]


def test_the_control_image_shows_the_first():
    row, own = prepared(example(), DEFAULT), packer(DEFAULT)
    content = own.shown(row, "image")
    one, two = patches(row.problems)
    assert shown(own.blocks(row, "teacher", content))[-3:] == ["look", one, "now"]


def test_boxes_of_crops():
    names = BlockNames(ASKED, ("image@crop", "question"))

    def crops(box):
        row = prepared(example(metadata={"box": box}), names, crop_metadata="box")
        return patches(row.content["image@crop"])

    left, right = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
    assert crops([left, right]) == [crops(left)[0], crops(right)[1]] != crops(left)
    with pytest.raises(ValueError, match="example p0: its metadata has box = .*is not left, top"):
        crops([left])


def test_prepared_questions_with_a_wrong_number_of_places():
    """Folders of older versions, which took a place for text."""
    wrong = example(question="Is <image>?")
    for ask in (prepared, lambda row, names: preprocessor().question(row)):
        with pytest.raises(
            ValueError, match="example p0: its question has 1 place <image> for 2 images"
        ):
            ask(wrong, DEFAULT)


def preprocessor(suffix: str = "") -> examples_lib.Preprocessor:
    return examples_lib.Preprocessor(tiny.TOKENIZER, suffix, images.Resize(4, 8, 8), "drop", 4)


def test_a_question_without_a_context():
    opened, texts = preprocessor("!").question(example())
    assert texts == ("Is", "as", "?!") and [image.size for image in opened] == [(8, 8), (16, 8)]
    assert preprocessor("!").question(example(question="<image><image>q"))[1] == "q!"
    asked = benchmark.Benchmark("T", (0,), lambda key: (opened, texts), str, dict)
    assert asked.text(0) == "Is <image> as <image> ?!"


# --- files ---------------------------------------------------------------------------------------

FILES = {"a.png": pixels(1), "b.png": pixels(2), "c.png": pixels(3)}
NAMED = {
    "pid": "n0",
    "question": PLACED,
    "answer": "no",
    "images": ["a.png", base64.b64encode(FILES["b.png"]).decode()],
    "thoughts": ["look", "no"],
    "visual_thoughts": ["c.png"],
    "text_trace": "They differ.",
}


def chat(content, files: list, **keys) -> dict:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "no"}]
    return {"messages": turns, "images": files} | keys


def write(folder: Path, *lines: dict, name: str = "train.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in FILES.items():
        (folder / file).write_bytes(content)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def read(path: Path) -> list[schema.Example]:
    return [*source_files.read_examples(path, task="T")]


def test_columns_by_name(tmp_path):
    numbered = NAMED | {"problem_image_0": "a.png", "problem_image_1": "c.png"}
    one = NAMED | {"images": ["c.png", None], "question": "<image>?"}
    path = write(tmp_path, NAMED, {k: v for k, v in numbered.items() if k != "images"}, one)
    a, b, c = FILES.values()
    assert [e.problem_images for e in read(path)] == [(a, b), (a, c), (c,)]
    assert [e.question for e in read(path)] == [PLACED, PLACED, "<image>?"]


def test_chats(tmp_path):
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": " as\n"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    path = write(
        tmp_path,
        chat("<image>\n<image>\nSame?", ["a.png", "b.png"]),
        chat("Same?", ["a.png", "b.png", "c.png"]),
        chat(parts, ["a.png", "b.png"]),
        chat(" In <image>, what? ", ["a.png"]),
    )
    found = read(path)
    assert [e.question for e in found] == ["Same?", "Same?", PLACED, "In <image>, what?"]
    a, b, c = FILES.values()
    assert [e.problem_images for e in found] == [(a, b), (a, b, c), (a, b), (a,)]


NUMBERS = "has {} place.* <image> for {} image"
BAD = {
    "few places": (NAMED | {"question": "<image>?"}, "question", NUMBERS.format(1, 2)),
    "many places": (NAMED | {"images": ["a.png"]}, "question", NUMBERS.format(2, 1)),
    "a hole": (NAMED | {"images": ["a.png", None, "b.png"]}, r"images\[1\]", "is missing"),
    "no file": (NAMED | {"images": ["a.png", "x.png"]}, r"images\[1\]", "no such file"),
    "both": (NAMED | {"image": "a.png"}, "image", "another key both give problem_image_0"),
    "no list": (NAMED | {"images": "a.png"}, "images", "is of type str, not a list"),
    "empty list": (NAMED | {"images": []}, "question", "has 2 places <image> for 0 images"),
    "only places": (NAMED | {"question": "<image> <image>"}, "question", "is empty"),
}
BAD_CHATS = {
    "few places": (chat("<image>?", ["a.png", "b.png"]), "messages", NUMBERS.format(1, 2)),
    "many places": (chat(PLACED, ["a.png"]), "messages", NUMBERS.format(2, 1)),
    "only places": (chat("<image> <image>", ["a.png", "b.png"]), "question", "is empty"),
    "no file": (chat("Same?", ["a.png", "x.png"]), r"images\[1\]", "no such file"),
}


@pytest.mark.parametrize(
    "good, bad", [(NAMED, BAD), (chat("a", ["a.png"]), BAD_CHATS)], ids=["named", "chat"]
)
def test_bad_lines(tmp_path, good, bad):
    path = write(tmp_path / "T", good, *(line for line, *_ in bad.values()))
    with pytest.raises(BadRowError, match=rf"{path}, line 2, pid '.*': "):
        prepare(tmp_path, tmp_path / "out")
    report = prepare(tmp_path, tmp_path / "out", on_bad_row="skip")
    assert report.rows == {"T/train": 1} and len(report.bad_rows) == len(bad)
    for note, (_, column, fault) in zip(report.bad_rows, bad.values()):
        with pytest.raises(ValueError, match=rf"line {note.row + 1}, .*: {column} .*{fault}"):
            raise ValueError(str(note))


def row(n: int, **changes) -> dict:
    """A parquet row with two problem images, the second with transparency."""
    more = {"problem_image_1": test_datasets.picture(50 + n, "PNG", "RGBA")}
    return test_datasets.row(n) | more | changes


def test_parquet_has_numbered_columns(tmp_path):
    test_datasets.maze(tmp_path / "s", [row(0, question=PLACED), row(1, problem_image_1=None)])
    (path,) = tmp_path.glob("s/Maze/data/*.parquet")
    first, second = read(path)
    assert first.problem_images == tuple(row(0)[f"problem_image_{n}"]["bytes"] for n in (0, 1))
    assert (second.more_problem_images, first.question) == ((), PLACED)
    report = prepare(tmp_path / "s", tmp_path / "out")
    assert not [note for note in report.warnings if "problem_image_1" in note.reason]
    redraw._write(str(tmp_path / "w.parquet"), [first, second], ())
    assert read(tmp_path / "w.parquet") == [first, second]
    for changes, fault in (
        (
            {"question": PLACED, "problem_image_1": None},
            "question has 2 places <image> for 1 image",
        ),
        ({"problem_image_0": None}, "problem_image_0 is missing"),
        ({"problem_image_1": {"bytes": b"x", "path": ""}}, "problem_image_1 cannot be decoded"),
    ):
        with pytest.raises(BadRowError, match=f"row 1, pid 'p1': {fault}"):
            test_datasets.maze(tmp_path / "s", [row(0), row(1, **changes)])
            prepare(tmp_path / "s", tmp_path / "bad")
    test_datasets.maze(tmp_path / "s", [row(0, problem_image_0=[row(0)["problem_image_0"]])])
    with pytest.raises(BadRowError, match="problem_image_0 is a list: give its images in problem"):
        prepare(tmp_path / "s", tmp_path / "bad")
    with pytest.raises(ValueError, match="--columns names images:problem_image_1, but problem_im"):
        Part(columns=("images:problem_image_1",))


def test_prepared_files_hold_all_images_as_they_were(tmp_path):
    test_datasets.maze(tmp_path / "s", [row(0, question=PLACED), row(1, problem_image_1=None)])
    (path,) = tmp_path.glob("s/Maze/data/*.parquet")
    prepare(tmp_path / "s", tmp_path / "out")
    source = open_source(tmp_path / "out", task="Maze")
    assert [source[n] for n in range(2)] == read(path)
    folder = shards.version_folder(tmp_path / "out", "Maze")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    prepare(tmp_path / "s", tmp_path / "out")  # nothing is written again
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}

    plain = tfds.data_source("visual_opsd/maze", data_dir=str(tmp_path / "out"), split="train")
    with Image.open(io.BytesIO(row(0)["problem_image_1"]["bytes"])) as image:
        raw = np.asarray(image)[..., :3]
    (shown_by_tfds,) = plain[0]["more_problem_images"]
    np.testing.assert_array_equal(shown_by_tfds, raw)
    assert len(plain[1]["more_problem_images"]) == 0

    config = tfds_builder.Config(name="maze", several_images=True)
    builder = tfds_builder.VisualOpsd(config=config, data_dir=str(tmp_path / "b"))
    assert schema.MORE_PROBLEMS in builder.info.features
    (_, made), _ = builder._generate_examples("Maze", [path])
    assert len(made[schema.MORE_PROBLEMS]) == 1
    builder = tfds_builder.VisualOpsd(
        config=tfds_builder.Config(name="maze"), data_dir=str(tmp_path / "c")
    )
    with pytest.raises(ValueError, match="example p0 has 2 problem images.*several_images=True"):
        next(builder._generate_examples("Maze", [path]))


def test_files_of_single_images_are_as_before(tmp_path):
    """The features, and the record in progress.json, which tells whether a folder is finished."""
    one = NAMED | {"images": ["a.png"], "question": "q"}
    write(tmp_path / "T", one)
    prepare(tmp_path, tmp_path / "out")
    folder = shards.version_folder(tmp_path / "out", "T")
    assert "more_problem_images" not in (folder / "features.json").read_text()
    (record,) = json.loads((folder / "progress.json").read_text()).values()
    assert len(record["shard"]) == 5
    # Another split with several images needs other features for all.
    write(tmp_path / "T", NAMED, name="test.jsonl")
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(tmp_path, tmp_path / "out")
    prepare(tmp_path, tmp_path / "out", overwrite=True)
    assert [
        len(open_source(tmp_path / "out", split, task="T")[0].problem_images)
        for split in ("train", "test")
    ] == [1, 2]


# --- with a run's settings -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, capsys):
    """Prepared rows of one, two and three images, and a tokenizer."""
    lines = [
        NAMED,
        NAMED | {"pid": "n1", "images": ["a.png"], "question": "q?"},
        NAMED | {"pid": "n2", "images": [*FILES], "question": "q?"},
    ]
    write(tmp_path / "T", *lines)
    prepare(tmp_path, tmp_path / "data", progress=False)
    made = ["--families=maze", "--train=1", "--validation=0", "--test=0"]
    data.main(["make-mini", f"--target={tmp_path}/words", *made])
    capsys.readouterr()
    return tmp_path


def settings(folder: Path):
    config = small_run.config(data__dir=str(folder / "data"), data__tasks=("T",))
    config.data.make.families, config.eval.final_split, config.eval.every = (), "", 0
    config.tokenizer = str(folder / "words/made/tokenizer")
    config.data.buckets.student = ((90, 50), (128, 90))
    config.data.buckets.teacher = ((128, 75), (192, 115))
    config.data.buckets.trace = ((192, 75, 64), (256, 115, 64))
    return config


def test_sizes_and_buckets_count_all_images(folder):
    config = settings(folder)
    tok = tokenizer_lib.load(config.tokenizer)
    own, rows = packing.Packer.from_config(config, tok), small_run.examples(config, tok)
    # Images of 8 x 8 pixels become 40 x 40, 25 patches of 8 x 8.
    counts = [own.needs(rows.measured(0, n))["student"][1] for n in range(3)]
    assert counts == [50, 25, 75]
    assert [own.bucket(rows.measured(0, n)) for n in range(3)] == [0, 0, 1]
    for n in range(3):
        assert (
            own.needs(rows.measured(0, n))["student"].tolist()
            == own.needs(rows(0, n))["student"].tolist()
        )
    table = sizes.report(config)
    assert "75" in next(line for line in table.splitlines() if "patches" in line)
    selection = contexts.Selection(rows, own, None, batch_size=1)
    assert [[caption for caption, _ in selection.shown_images(0, n, "real")] for n in (0, 1)] == [
        ["problem 1", "problem 2", "visual thought 1 (real)"],
        ["problem", "visual thought 1 (real)"],
    ]
