"""Contexts by configuration: names of blocks, controls, columns, transforms and their presets."""

import inspect
import io
import json
import re
import runpy
import types

import numpy as np
import pytest
import test_datasets
from PIL import Image

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags, context, images, offline, tokenizer
from opsd_jax.blocks import BlockNames
from opsd_jax.data import __main__ as data
from opsd_jax.data import (
    arrayrecord,
    bucket_index,
    packing,
    prepare,
    procedural,
    schema,
    source_files,
    tfds_builder,
)
from opsd_jax.data import examples as examples_lib
from opsd_jax.evaluation import contexts
from opsd_jax.plan import programs
from opsd_jax.run import answering, evaluation_request, redraw, teacher_cache
from opsd_jax.run import checks as run_checks
from opsd_jax.run.evaluation_request import Request

CONTEXTS = small_run.ROOT / "configs" / "contexts.py"
get_config = runpy.run_path(str(CONTEXTS))["get_config"]
PRESETS = ("opsd_text", "crop", "degraded", "solution_and_vt")
SOLUTION = "text:full_text_only_thought"
ASKED = BlockNames.student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("data")
    make = {"families": ["chart"], "train": 6, "validation": 0, "test": 0}
    procedural.make_procedural(
        str(made), {"difficulty": "default", "wrong_traces": 0.0, "seed": 0, **make}
    )
    return made


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def example(n: int = 0, **changes) -> schema.Example:
    """Images of 8 x 8 pixels, 2 x 2 patches; those of other numbers have other values."""
    rng = np.random.default_rng(n)

    def image():
        return png(rng.integers(0, 256, (8, 8, 3)))

    fields = dict(
        pid=f"p{n}",
        task="T",
        question="q?" + "!" * n,
        answer="B",
        problem_image=image(),
        visual_thoughts=(image(),),
        thoughts=("a",),
        full_text_only_thought="so " + "x" * (n + 1),
        columns={"text:hint": "hi" * (n + 1), "images:crops": (image(), image())},
    )
    return schema.Example(**fields | changes)


def prepared(row: schema.Example, names: BlockNames, **transforms):
    """The example with patches of 4 x 4 pixels."""
    preprocess = examples_lib.Preprocessor(
        tiny.TOKENIZER,
        "",
        images.Resize(stride=4, max_size=8, min_size=8),
        "drop",
        4,
        further=tuple(name for name in names.contents if name not in blocks_lib.CONTENTS),
        transforms=images.Transforms(**transforms),
    )
    made, measured = preprocess(row), preprocess.measured(row)

    def compared(part):  # blank images have the sizes of the true ones
        if isinstance(part, np.ndarray):
            return part.tolist()
        return [
            (x.grid, x.patches.shape) if isinstance(x, blocks_lib.Image) else x.tolist()
            for x in part
        ]

    for name, part in made.content.items():
        assert compared(part) == compared(measured.content[name])
    return made


def packer(names: BlockNames) -> packing.Packer:
    sizes = ((64, 28),)
    buckets = config_lib.BucketsConfig(student=sizes, teacher=sizes, trace=((64, 28, 20),))
    return packing.Packer(tiny.TOKENIZER, tiny.PROMPTS, buckets, side=6, names=names)


def shown(blocks) -> list:
    """Texts as they are, images as their patches."""
    return [
        tiny.TOKENIZER.decode(b.ids) if isinstance(b, blocks_lib.Text) else b.patches.tolist()
        for b in blocks
    ]


# --- blocks of a preset --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_the_blocks_of_a_preset(preset):
    config = get_config(f"{preset},smoke")
    config_check.check(config)
    names = config_lib.block_names(config)
    row = prepared(example(), names, crop=(0.5, 0.0, 1.0, 0.5))
    with Image.open(io.BytesIO(row.example.problem_image)) as file:
        pixels = np.asarray(file)
    clean = images.patchify(pixels, 4).tolist()
    (vt,) = row.visual_thoughts
    crop = Image.fromarray(pixels[:4, 4:]).resize((8, 8), Image.Resampling.BICUBIC)
    enlarged = images.patchify(np.asarray(crop), 4).tolist()
    asked = ["sys", clean, "q?"]
    wanted = {
        "opsd_text": (asked, [*asked, "look", "so x", "now"]),
        "crop": (asked, [*asked, "look", enlarged, "now"]),
        "solution_and_vt": (asked, [*asked, "look", "so x", vt.patches.tolist(), "now"]),
    }
    own = packer(names)
    student, teacher = own.blocks(row, "student"), own.blocks(row, "teacher")
    if preset == "degraded":
        (low,) = row.content["image@low_resolution"]
        assert low.patches.tolist() != clean
        wanted["degraded"] = ["sys", low.patches.tolist(), "q?"], asked
    assert (shown(student), shown(teacher)) == wanted[preset]
    # Traces begin with the contexts.
    assert shown(own.blocks(row, "text"))[:-1] == shown(student)
    assert shown(own.blocks(row, "reference"))[:-1] == shown(teacher)
    assert shown(own.blocks(row, "interleaved"))[: len(student)] == shown(student)


def test_tokens_of_a_context_by_hand():
    """opsd_text, packed: bos 256, eos 257, image 258 ... 259 with 4 patches."""
    names = config_lib.block_names(get_config("opsd_text"))
    c = packer(names).teacher([prepared(example(), names)], [None], "real", [None])

    def text(of):
        return [256, *of.encode(), 257]

    patches = [258, 0, 0, 0, 0, 259]
    tokens = [*text("sys"), *patches, *text("q?"), *text("look"), *text("so x"), *text("now")]
    assert c.tokens[0, : c.length[0]].tolist() == tokens and len(tokens) == c.length[0]
    rope = [*range(5), *[5] * 6, *range(6, 6 + 4 + 6 + 6 + 5)]
    assert c.rope_positions[0, : len(rope)].tolist() == rope
    assert c.next_rope_position[0] == rope[-1] + 1


def test_the_defaults_are_the_papers_contexts():
    row = prepared(example(), BlockNames())
    own = packer(config_lib.block_names(config_lib.default()))
    given = tiny.TOKENIZER, tiny.PROMPTS, row.question, row.problems[0]
    assert shown(own.blocks(row, "student")) == shown(blocks_lib.student(*given))
    teacher = blocks_lib.teacher(*given, row.visual_thoughts)
    assert shown(own.blocks(row, "teacher")) == shown(teacher)
    trace = blocks_lib.interleaved(*given, ("a",), row.visual_thoughts, "B")
    assert shown(own.blocks(row, "interleaved")) == shown(trace)


def test_columns_are_blocks_and_empty_ones_are_left_out():
    names = BlockNames(("question", "image"), ("images:crops", "question", "text:hint"))
    assert names.privileged == ("images:crops", "text:hint")
    row = prepared(example(), names)
    one, two = (image.patches.tolist() for image in row.content["images:crops"])
    assert one != two and shown(packer(names).blocks(row, "teacher")) == [one, two, "q?", "hi"]
    bare = prepared(example(columns={"text:hint": "\u200b", "images:crops": ()}), names)
    assert shown(packer(names).blocks(bare, "teacher")) == ["q?"]
    assert examples_lib.has_content(row.example, names.privileged)
    assert not examples_lib.has_content(bare.example, names.privileged)
    assert examples_lib.has_content(bare.example, ("image@crop",))


# --- controls ------------------------------------------------------------------------------------

BOTH = BlockNames(ASKED, (*ASKED, "intro", "text:hint", "images:crops", "transition"))


def test_controls_replace_every_privileged_block():
    own, row, partner = packer(BOTH), prepared(example(), BOTH), prepared(example(2), BOTH)
    clean = row.problems[0].patches.tolist()
    asked = ["sys", clean, "q?", "look"]

    def teacher(mode, seed=0):
        content = own.shown(row, mode, partner, np.random.default_rng(seed))
        return own.blocks(row, "teacher", content)

    crops, others = (
        [image.patches.tolist() for image in x.content["images:crops"]] for x in (row, partner)
    )
    assert shown(teacher("real")) == [*asked, "hi", *crops, "now"]
    assert shown(teacher("swap")) == [*asked, "hihihi", *others, "now"]
    assert shown(teacher("image")) == [*asked, clean, clean, "now"]
    assert shown(teacher("none")) == [*asked, "now"]

    noise = teacher("noise")
    *before, text, first, second, after = noise
    assert shown([*before, after]) == [*asked, "now"]
    rng = np.random.default_rng(0)  # in the order of the names
    assert text.ids.tolist() == rng.choice(np.arange(256), 2).tolist() != [*b"hi"]
    for image in (first, second):
        wanted = rng.standard_normal((4, 48), np.float32)
        np.testing.assert_array_equal(image.patches, wanted)
    assert teacher("noise", 1)[4].ids.tolist() != text.ids.tolist()
    assert context.need(noise) == context.need(teacher("real"))


def test_noise_has_no_special_tokens(folder):
    tok = tokenizer.load(folder / "made" / "tokenizer")
    special = {tok.bos, tok.eos, tok.image_start, tok.image_end}
    special |= {*tok.backend.get_added_tokens_decoder()}
    ids = tok.ordinary.tolist()
    assert not special & {*ids} and special | {*ids} == {*tok.backend.get_vocab().values()}
    assert ids == sorted(ids) and {*tok.encode("find a safe path").tolist()} <= {*ids}


def test_a_clean_image_of_the_teacher_is_privileged():
    names = config_lib.block_names(get_config("degraded"))
    assert names.privileged == ("image",)
    own, row, partner = packer(names), prepared(example(), names), prepared(example(1), names)
    for mode, wanted in (("swap", [partner.problems[0].patches.tolist()]), ("none", [])):
        content = own.shown(row, mode, partner)
        assert shown(own.blocks(row, "teacher", content)) == ["sys", *wanted, "q?"]


def test_buckets_and_needs_count_what_the_controls_show():
    own, row, partner = packer(BOTH), prepared(example(), BOTH), prepared(example(2), BOTH)
    real = own.needs(row)["teacher"].tolist()
    # sys 5, image 6, q? 4, look 6, hi 4, two images 12, now 5
    assert (
        real == [42, 12] and own.needs(row, ("noise", "none", "image"))["teacher"].tolist() == real
    )
    assert own.needs(row, ("swap",), partner)["teacher"].tolist() == [46, 12]  # hihihi


# --- transforms ----------------------------------------------------------------------------------

RULE = images.Resize(stride=1, max_size=64, min_size=1)


def test_a_crop_covers_the_pixels_that_its_box_touches():
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    image, transforms = Image.fromarray(pixels), images.Transforms(crop=(0.3, 0.25, 0.7, 0.9))
    # left 2.4 -> 2, top 1.5 -> 1, right 5.6 -> 6, bottom 5.4 -> 6
    np.testing.assert_array_equal(transforms("crop", image, RULE), pixels[1:6, 2:6])
    assert transforms.size("crop", (8, 6), RULE) == (4, 5)
    np.testing.assert_array_equal(
        transforms("crop", image, RULE, (0.0, 0.0, 0.5, 0.5)), pixels[:3, :4]
    )
    larger = images.Resize(stride=4, max_size=8, min_size=8)
    assert transforms.size("crop", (8, 6), larger) == (8, 8)
    assert transforms("crop", image, larger).shape == (8, 8, 3)


def test_a_blur_is_the_mean_of_a_square():
    pixels = np.zeros((5, 5, 3), np.uint8)
    pixels[2, 2] = 90
    pixels[0, 0] = 45
    found = images.Transforms(blur=1)("blur", Image.fromarray(pixels), RULE)
    wanted = np.zeros((5, 5))
    wanted[1:4, 1:4] = 10
    # The corner counts four times in its own square, twice in those beside it.
    wanted[0, 0] += 20
    wanted[0, 1] += 10
    wanted[1, 0] += 10
    wanted[1, 1] += 5
    np.testing.assert_array_equal(found, np.repeat(wanted[..., None], 3, 2))


def test_a_low_resolution_is_means_and_their_bicubic_enlargement():
    rows = np.array([0, 40, 200, 200, 100, 60, 20, 0])
    pixels = np.repeat(np.repeat(rows[None, :, None], 4, 0), 3, 2).astype(np.uint8)
    found = images.Transforms(low_resolution=2)("low_resolution", Image.fromarray(pixels), RULE)
    means = np.array([20.0, 200, 80, 10])
    # Keys' kernel with a = -1/2 at 1/4, 3/4, 5/4 and 7/4; at the ends its weights are scaled to 1.
    weights = {0.25: 0.8671875, 0.75: 0.2265625, 1.25: -0.0703125, 1.75: -0.0234375}
    wanted = []
    for x in np.arange(8) / 2 + 0.25 - 0.5:
        own = np.array([weights.get(abs(x - n), 0.0) for n in range(4)])
        wanted.append(own @ means / own.sum())
    wanted = np.clip(np.round(wanted), 0, 255)
    assert found.shape == (4, 8, 3)
    np.testing.assert_allclose(found[1, :, 0], wanted, atol=1)  # Pillow's weights have 8 bits
    assert images.Transforms().size("low_resolution", (8, 4), RULE) == (8, 4)


def test_an_example_may_have_its_own_crop():
    names = BlockNames(ASKED, ("image@crop", "question"))
    row = prepared(example(metadata={"box": [0, 0.5, 0.5, 1]}), names, crop_metadata="box")
    with Image.open(io.BytesIO(row.example.problem_image)) as file:
        part = file.crop((0, 4, 4, 8)).resize((8, 8), Image.Resampling.BICUBIC)
    wanted = images.patchify(np.asarray(part), 4)
    np.testing.assert_array_equal(row.content["image@crop"][0].patches, wanted)
    for box, fault in (
        (None, "which is not left, top, right, bottom"),
        ([0, 0, 0.5], "which is not left"),
        ([0, 0, 2, 1], "which is not left"),
        ([0.5, 0, 0.5, 1], "which is empty"),
    ):
        with pytest.raises(ValueError, match=rf"^example p0: its metadata has box = .*{fault}"):
            prepared(example(metadata={"box": box}), names, crop_metadata="box")


# --- refusals ------------------------------------------------------------------------------------

HINT = "text:hint"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher.blocks": (*ASKED, HINT)},
            "config.teacher.blocks names text:hint, which config.data.columns does not declare: "
            r"prepare .* --columns=text:hint and set config.data.columns=\('text:hint',\)",
        ),
        ({"student.blocks": ("image@rotate",)}, "config.student.blocks names 'image@rotate'.*crop"),
        ({"student.blocks": ("images",)}, "config.student.blocks names 'images': choose from sys"),
        ({"student.blocks": ("image", "image")}, "config.student.blocks names image twice"),
        ({"teacher.blocks": ()}, "config.teacher.blocks is .*at least one block of the example"),
        ({"student.blocks": ("system",)}, "config.student.blocks is .*at least one block"),
        ({"data.columns": ("hint",)}, "config.data.columns names 'hint': give text:COLUMN or"),
        ({"data.columns": ("text:answer",)}, "names text:answer, which all data have: leave it"),
        ({"data.columns": (HINT, "images:hint")}, "names the column hint twice"),
        (
            {
                "data.columns": (HINT,),
                "data.make.families": ("maze",),
                "data.make.train": 1,
                "data.make.test": 1,
            },
            "config.data.columns is .*which procedural data lack.*Set it to",
        ),
        (
            {"teacher.blocks": ASKED, "teacher.visual_thoughts": "noise"},
            "config.teacher.visual_thoughts is 'noise', but the student has all blocks of the",
        ),
        (
            {"teacher.blocks": (*ASKED, SOLUTION), "teacher.visual_thoughts": "image"},
            "'image', which puts the problem image .*text:full_text_only_thought: choose",
        ),
        (
            {"teacher.blocks": (*ASKED, SOLUTION), "eval.final_visual_thoughts": ("image",)},
            "an entry of config.eval.final_visual_thoughts is 'image'",
        ),
        ({"transforms.crop": (0.5, 0.0, 0.5, 1.0)}, "config.transforms.crop is .*which is empty"),
        ({"transforms.crop": (0.5,)}, "config.transforms.crop is .*left, top, right, bottom"),
        ({"transforms.blur": 0}, "config.transforms.blur is 0: give a whole number in"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        config_check.check(config)


def test_columns_of_a_command_line():
    names = f"system,image,question,intro,{HINT},transition"
    config = config_flags.read(
        [
            f"--config={small_run.ROOT}/configs/visual_opsd.py",
            f"--config.data.columns={HINT}",
            f"--config.teacher.blocks={names}",
        ]
    )
    config_check.check(config)
    assert config.data.columns == (HINT,)
    assert config_lib.block_names(config) == BlockNames(ASKED, tuple(names.split(",")))


def test_an_arm_that_does_not_suit_the_blocks_is_left_out():
    """The message names that arm alone, and the others that a run with these blocks can have."""
    config = config_flags.read([f"--config={small_run.ROOT}/configs/mini.py"])
    config.teacher.blocks, config.run_arms = (*ASKED, SOLUTION), ("image", "sft")
    with pytest.raises(ValueError) as found:
        config_check.check(config)
    (said, others) = str(found.value).split(" Or leave the arm out: ")
    assert said.startswith("config.arms.image: ") and "noise" not in said.partition(":")[0]
    assert others == "give --config.run_arms=sft,noise,swap, or --config.run_arms='()' for no arm"
    config.run_arms = ("sft", "noise", "swap")
    config_check.check(config)
    config.sft.optim.warmup_steps = 10**6
    with pytest.raises(ValueError, match="config.arms.sft: .*: give --config.run_arms=noise,swap"):
        config_check.check(config)


def test_old_settings_have_the_papers_contexts():
    """Runs of before have no names of blocks in config.json."""
    saved = config_lib.to_json(config_lib.default())
    now = config_lib.default()
    for key in ("student", "transforms"):
        del saved[key]
    del saved["teacher"]["blocks"], saved["data"]["columns"]
    config_check.check_unchanged(saved, now)
    now.teacher.blocks = (*ASKED, SOLUTION)
    with pytest.raises(config_check.ConfigMismatchError, match="teacher.blocks"):
        config_check.check_unchanged(saved, now)


# --- on procedural data --------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_procedural_examples_fit_the_presets(preset, folder):
    config = get_config(preset)
    config.data.dir, config.data.make.families = str(folder), ()
    tok = tokenizer.load(folder / "made" / "tokenizer")
    own, rows = packing.Packer.from_config(config, tok), small_run.examples(config, tok)
    for n in range(6):
        assert own.bucket(rows.measured(0, n), "swap", rows.measured(0, rows.partner_of(0, n))) == 0
    batch = [rows(0, n) for n in range(2)]
    for mode in ("real", "noise", "swap", "none"):
        rngs = [np.random.default_rng(n) for n in range(2)]
        c = own.teacher(batch, [rows.partner(0, n) for n in range(2)], mode, rngs)
        is_noise = mode == "noise" and preset != "opsd_text"
        assert c.patches.dtype == (np.float32 if is_noise else np.uint8)
    own.student(batch), own.traces(batch, ["reference", "interleaved"])


@pytest.mark.parametrize(
    "preset, mode, captions",
    [
        ("crop", "none", ["problem"]),
        ("crop", "swap", ["problem", "image@crop 1 (swap)"]),
        ("crop", "remove", ["problem"]),
        ("degraded", "none", ["problem", "image@low_resolution 1 (none)"]),
        ("degraded", "real", ["problem"]),
        ("degraded", "noise", ["problem", "image 1 (noise)"]),
        ("solution_and_vt", "image", ["problem", "visual thought 1 (image)"]),
    ],
)
def test_what_reports_show(preset, mode, captions, folder):
    config = get_config(preset)
    config.data.dir, config.data.make.families = str(folder), ()
    tok = tokenizer.load(folder / "made" / "tokenizer")
    own, rows = packing.Packer.from_config(config, tok), small_run.examples(config, tok)
    selection = contexts.Selection(rows, own, None, batch_size=1)
    shown = selection.shown_images(0, 0, mode)
    assert [caption for caption, _ in shown] == captions
    assert {image.shape for _, image in shown} == {(40, 40, 3)}
    assert selection.without_visual_thoughts(0) == 0
    contexts.check_fit(selection, (mode,))


def test_a_context_without_images_has_patches_of_the_same_width(folder):
    config = get_config("degraded")
    config.data.dir, config.data.make.families = str(folder), ()
    tok = tokenizer.load(folder / "made" / "tokenizer")
    own, rows = packing.Packer.from_config(config, tok), small_run.examples(config, tok)
    c = own.teacher([rows(0, 0)], [None], "none", [None])
    assert c.patches.shape == own.student([rows(0, 0)]).patches.shape[:1] + (50, 192)
    assert not c.patch_image.any()


def test_caches_depend_on_the_blocks(folder, monkeypatch):
    config = get_config("crop")
    config.data.dir, config.data.make.families = str(folder), ()
    tok = tokenizer.load(folder / "made" / "tokenizer")
    monkeypatch.setattr(offline, "fingerprint", lambda params: "weights")

    def of(**changes):
        c = config.copy_and_resolve_references()
        c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
        own, rows = packing.Packer.from_config(c, tok), small_run.examples(c, tok)
        record = config_lib.to_json(c)
        run = types.SimpleNamespace(config=c, packer=own, record=record, prompts_record={})
        digest = bucket_index._digest(rows, own, 0, "real")
        return digest, teacher_cache.key(run, None, rows)

    usual = of(teacher__blocks=BlockNames.teacher)
    assert "blocks" not in usual[1]  # as before
    found = [
        usual,
        of(),
        of(transforms__crop=(0.0, 0.0, 0.5, 0.5)),
        of(student__blocks=("system", "image@blur", "question")),
    ]
    for of_kind in zip(*found):
        assert len({json.dumps(x) for x in of_kind}) == len(found)
    assert of() == found[1] and {key["teacher"] for _, key in found} == {"weights"}


@pytest.mark.parametrize(
    "names, dtype", [(("visual_thoughts",), "float32"), ((SOLUTION,), "uint8")]
)
def test_the_plan_knows_that_noise_of_texts_are_ids(names, dtype):
    config = config_lib.default()
    config.teacher.update(blocks=(*ASKED, *names), visual_thoughts="noise")

    def made(*sizes, dtype="uint8"):
        return np.dtype(dtype)

    step = types.SimpleNamespace(config=config, bucket=0, context=made)
    assert programs._policy_batch(step).teacher == np.dtype(dtype)


def test_data_without_a_declared_column_are_refused(folder):
    config = small_run.config(data__dir=str(folder), data__make__families=())
    config.data.columns = (HINT,)
    tok = tokenizer.load(folder / "made" / "tokenizer")
    with pytest.raises(
        ValueError,
        match="config.data.columns names text:hint, which the prepared Chart_Refocus in .*lacks "
        r"\(its further columns: none\): prepare it again with .*--columns=text:hint --overwrite",
    ):
        small_run.examples(config, tok)


# --- further columns of the data -----------------------------------------------------------------

COLUMNS = ("text:solution", "images:crops")


def further(n: int, **changes) -> dict:
    """A parquet row with two further columns."""
    crops = [test_datasets.picture(50 + n), test_datasets.picture(60 + n, "PNG", "RGBA")]
    return test_datasets.row(n) | {"solution": f"solve {n}", "crops": crops} | changes


def test_further_columns_are_kept(tmp_path, capsys):
    rows = [further(0), further(1, solution=None, crops=[])]
    test_datasets.maze(tmp_path / "s", rows)
    report = prepare.prepare(tmp_path / "s", tmp_path / "out", prepare.Part(columns=COLUMNS))
    assert [note.reason for note in report.warnings] == [
        f"empty_column: {name} is empty, contexts leave it out" for name in COLUMNS
    ]
    source = arrayrecord.open_source(tmp_path / "out", task="Maze")
    assert source.columns == tuple(sorted(COLUMNS))
    assert source[0].columns == {
        "text:solution": "solve 0",
        "images:crops": tuple(image["bytes"] for image in rows[0]["crops"]),
    }
    assert source[1].columns == {"text:solution": "", "images:crops": ()}
    options = [f"--source={tmp_path}/s", f"--target={tmp_path}/out"]
    data.main(["prepare", *options, f"--columns={','.join(COLUMNS)}"])
    assert str(report) in capsys.readouterr().out  # nothing is written again
    with pytest.raises(FileExistsError, match="splits, columns or limit"):
        prepare.prepare(tmp_path / "s", tmp_path / "out", prepare.Part(columns=COLUMNS[:1]))

    builder = tfds_builder.VisualOpsd(
        config=tfds_builder.Config(name="maze", columns=COLUMNS), data_dir=str(tmp_path / "b")
    )
    assert {*COLUMNS} <= {*builder.info.features}
    read = builder._generate_examples("Maze", [*tmp_path.glob("s/Maze/data/*.parquet")])
    assert [record["text:solution"] for _, record in read] == ["solve 0", ""]


def test_redrawn_examples_keep_them(tmp_path):
    test_datasets.maze(tmp_path / "s", [further(0), further(1, solution="")])
    (path,) = tmp_path.glob("s/Maze/data/*.parquet")
    rows = [*source_files.read_examples(path, task="Maze", further=COLUMNS)]
    redraw._write(str(tmp_path / "w.parquet"), rows, COLUMNS)
    assert [
        *source_files.read_examples(tmp_path / "w.parquet", task="Maze", further=COLUMNS)
    ] == rows


def test_one_image_is_a_list_of_one(tmp_path):
    test_datasets.maze(tmp_path / "s", [further(0, crops=test_datasets.picture(1))])
    prepare.prepare(tmp_path / "s", tmp_path / "out", prepare.Part(columns=COLUMNS[1:]))
    (found,) = arrayrecord.open_source(tmp_path / "out", task="Maze")
    assert found.columns == {"images:crops": (test_datasets.picture(1)["bytes"],)}


@pytest.mark.parametrize(
    "changes, columns, message",
    [
        (
            {},
            ("text:proof",),
            r"train-00000-of-00001.parquet has no column 'proof', as --columns=text:proof ",
        ),
        ({"solution": 3}, COLUMNS, "row 0, pid 'p0': solution is of type int, not text"),
        (
            {"crops": ["x"]},
            COLUMNS,
            r"row 0, pid 'p0': crops is of type str, not an image .*\(image 0\)",
        ),
        (
            {"crops": [{"bytes": b"no image", "path": ""}]},
            COLUMNS,
            r"row 0, pid 'p0': crops cannot be decoded: .*\(image 0\)",
        ),
        ({}, ("text:question",), "--columns names text:question, but question is a column of the"),
        ({}, ("solution",), "--columns names 'solution': give text:COLUMN or images:COLUMN"),
    ],
)
def test_columns_that_cannot_be_kept(tmp_path, changes, columns, message):
    test_datasets.maze(tmp_path / "s", [further(0, **changes)])
    with pytest.raises(ValueError, match=message):
        prepare.prepare(tmp_path / "s", tmp_path / "out", prepare.Part(columns=columns))


# --- examples ------------------------------------------------------------------------------------


class Source(list):
    """Examples in memory, with the columns that a prepared source names."""

    columns = (HINT, "images:crops")


def opened(*tasks: list[schema.Example]) -> examples_lib.Examples:
    return examples_lib.Examples({f"T{n}": Source(task) for n, task in enumerate(tasks)}, None)


def bare(n: int) -> schema.Example:
    return example(n, visual_thoughts=(), columns={})


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({}, True),
        ({"teacher.visual_thoughts": "noise"}, True),
        ({"stages": ("offline",)}, True),
        ({"stages": ("sft",)}, False),
        ({"teacher.visual_thoughts": "none"}, False),  # nothing privileged is intended
        ({"teacher.blocks": ASKED}, False),
        ({"student.blocks": ("system", "image@low_resolution", "question")}, False),
        ({"teacher.blocks": (*ASKED, SOLUTION)}, False),
        ({"teacher.blocks": (*ASKED, "image@crop")}, False),
    ],
)
def test_a_teacher_that_sees_what_the_student_sees_is_refused(changes, refused):
    config = config_lib.default()
    config.update_from_flattened_dict(changes)
    found = opened([bare(0), bare(1)])
    if not refused:
        run_checks.check_privileged(config, lambda _: found)
        return
    with pytest.raises(ValueError, match="no example of T0 has visual_thoughts, so teacher and"):
        run_checks.check_privileged(config, lambda _: found)
    run_checks.check_privileged(config, lambda _: opened([bare(0), example(1)]))


def test_the_options_of_a_refused_teacher_are_right():
    config = config_lib.default()
    with pytest.raises(ValueError, match="The data also hold images:crops, text:") as found:
        run_checks.check_privileged(config, lambda _: opened([bare(0)]))
    options = re.findall(r"--config.(\S+)=(\S+?)\.? ", str(found.value))
    config.update_from_flattened_dict({key: tuple(v.split(",")) for key, v in options})
    assert config.teacher.blocks == (*ASKED, "intro", "images:crops", HINT, "transition")
    config_check.check(config)


def test_one_task_without_anything_privileged_is_logged(caplog):
    with caplog.at_level("WARNING"):
        run_checks.check_privileged(
            config_lib.default(), lambda _: opened([bare(0)], [bare(1), example(2)])
        )
    assert "no example of T0 has visual_thoughts" in caplog.text


@pytest.mark.parametrize(
    "block, seen", [("question", False), ("image", True), ("image@blur", True)]
)
def test_a_caution_about_images_that_nobody_sees(block, seen):
    config = config_lib.default()
    config.student.blocks = ("system", "question")
    config.teacher.blocks = ("system", block, SOLUTION)
    text_alone = example(2, problem_image=None)
    said = run_checks.images_caution(config, opened([example(0)], [text_alone], []))
    assert said.startswith("Questions of T0 have images, and neither") == (not seen)
    assert ("nobody sees them" in said) == (not seen)


def test_a_teacher_without_privileged_blocks_is_logged(caplog):
    config = config_lib.default()
    with caplog.at_level("WARNING"):
        run_checks.check_privileged(config, lambda _: opened([example(0)]))
        assert not caplog.text
        config.teacher.blocks = ASKED
        run_checks.check_privileged(config, lambda _: opened([example(0)]))
    assert "the student has all blocks of the teacher" in caplog.text


def test_the_problem_image_takes_the_place_of_images_alone():
    """Mode image of `eval` and of `answer`, where it would be the mode remove."""
    config = config_lib.default()
    config.teacher.blocks = (*ASKED, SOLUTION)
    with pytest.raises(ValueError, match="--visual_thoughts is 'image', which puts.*and 'remove'"):
        evaluation_request.check(Request("w", ("none", "image")), config)
    training = types.SimpleNamespace(names=config_lib.block_names(config))
    model = types.SimpleNamespace(training=training)
    with pytest.raises(ValueError, match="visual_thoughts='image' puts.*full_text_only_thought"):
        answering._check_mode(model, example(0), "image", None, None)
    training.names = BlockNames()
    answering._check_mode(model, example(0), "image", None, None)


def test_the_problem_image_is_shown_where_examples_have_one():
    def check(*examples):
        found = opened(list(examples))
        packer = types.SimpleNamespace(names=BlockNames())
        selection = contexts.Selection(found, packer, None, batch_size=1)
        contexts.check_visual_thoughts(selection, ["image"], "test")

    check(example(0, problem_image=None), example(1))
    with pytest.raises(ValueError, match="no example of T0, test, has a problem image"):
        check(example(0, problem_image=None))


@pytest.mark.parametrize("blocks, shown", [(ASKED, True), (("system", "question"), False)])
def test_a_caution_about_tasks_without_the_image_that_contexts_show(blocks, shown):
    config = config_lib.default()
    config.student.blocks, config.teacher.blocks = blocks, (*blocks, SOLUTION)
    text_alone = example(2, problem_image=None)
    said = run_checks.images_caution(config, opened([text_alone, example(0)], [text_alone]))
    assert said.startswith("No question of T1 has an image, though" * shown) and "T0" not in said
    assert bool(said) == shown


def test_an_arm_whose_teacher_sees_nothing_is_refused():
    config = config_lib.default()
    config.teacher.blocks = (*ASKED, SOLUTION)
    config.arms.vt = {"teacher": {"blocks": (*ASKED, "visual_thoughts")}}
    config.run_arms = ("vt",)
    with pytest.raises(ValueError, match="^config.arms.vt: no example of T0"):
        run_checks.check_privileged(config, lambda _: opened([bare(0)]))


def test_examples_are_counted_through_the_tasks():
    found = opened([example(0), example(1)], [], [example(2)])
    assert len(found) == 3 and [e.pid for e in found] == [example(n).pid for n in range(3)]
    assert found[-1].pid == example(2).pid
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            found[wrong]


def test_images_of_an_example_are_decoded():
    some = example(1)
    assert png(np.asarray(some.image)) == some.problem_image and some.image.size == (8, 8)
    assert [png(np.asarray(image)) for image in some.visual_images] == [*some.visual_thoughts]
    more = example(1, more_problem_images=(example(2).problem_image,))
    assert [png(np.asarray(image)) for image in more.opened_images] == [*more.problem_images]


@pytest.mark.parametrize("given", [np.zeros((32, 32, 3), np.uint8), [np.zeros((8, 8, 3))], 3])
def test_pixels_in_the_place_of_a_block_are_refused(given):
    """They would be left out of the context."""
    fix = r"make a block of it, blocks.image_block\(pixels, patch\)"
    prompts, block = blocks_lib.Prompts(), blocks_lib.image_block(np.zeros((8, 8, 3), np.uint8), 4)
    student, teacher = (inspect.unwrap(f) for f in (blocks_lib.student, blocks_lib.teacher))
    with pytest.raises(TypeError, match=f"problem.* {fix}"):
        student(tiny.TOKENIZER, prompts, "a", given)
    with pytest.raises(TypeError, match=f"visual_thoughts.* {fix}"):
        teacher(tiny.TOKENIZER, prompts, "a", block, given)


def test_a_grid_of_another_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"has 4 patches and the grid \(1, 2\)"):
        blocks_lib.Image(np.zeros((4, 48), np.uint8), (1, 2))
