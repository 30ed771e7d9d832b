"""Answers and generated images, from the command line and from Python."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import opsd_jax
import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import generate, images, interleave, rollout, tokenizer
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.evaluation import answer_files, contexts, montage
from opsd_jax.run import answering


def picture(seed, height, width):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


@pytest.fixture(scope="module")
def model():
    """The tiny model that generates images: images of up to 24 pixels for the ViT, 48 for the
    autoencoder.
    """
    protocol = interleave.Protocol(system="sys", max_new_tokens=6)
    return interleave.Reasoner(
        tiny.DRAWING,
        tiny.params(tiny.DRAWING, seed=1),
        tiny.TOKENIZER,
        protocol,
        images.Resize(4, 24, 8),
        images.Resize(8, 48, 16),
        flow={"num_timesteps": 3},
    )


@pytest.fixture
def recorded(monkeypatch):
    """Every batch of blocks that is packed, in order."""
    calls, pack = [], interleave._pack
    monkeypatch.setattr(
        interleave,
        "_pack",
        lambda rows, model: (calls.append([list(row) for row in rows]), pack(rows, model))[1],
    )
    return calls


def kinds(blocks):
    return "".join(type(block).__name__[0] for block in blocks)  # Text, Image, Latent


def run(model, questions, seed=0, generation=None):
    with tiny.quick_compiles():
        return interleave.reason(model, questions, jax.random.key(seed), generation)


ALWAYS = interleave.ImageGeneration(always=True)
WHEN_ASKED = interleave.ImageGeneration()


@pytest.mark.parametrize("transparency", ["white", "drop"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_an_image_of_any_mode_is_shown_as_its_file_is(
    model, transparency, mode, tmp_path, recorded
):
    """To `reason`, and to `answer` by a protocol; `generate` opens files with `open_rgb`."""
    protocol = dataclasses.replace(model.protocol, transparency=transparency)
    model = dataclasses.replace(model, protocol=protocol)
    image = picture(0, 12, 16)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(1, 12, 16).convert("L"))
    image = image.convert(mode)
    image.save(tmp_path / "image.tif")
    rgb = images.open_rgb(tmp_path / "image.tif", transparency=transparency)
    expected = blocks_lib.image_block(images.resize(rgb, model.vit), 4)
    run(model, [([image], "what?")])
    with tiny.quick_compiles():
        opsd_jax.answer(model, image, "what?")
    for (batch,) in recorded:
        np.testing.assert_array_equal(batch[1].patches, expected.patches)
    assert len(recorded) == 2


def test_text_is_what_the_sampler_gives_after_the_packed_question(model):
    (answer,) = run(model, [([picture(0, 12, 16)], "what?")])
    image = blocks_lib.image_block(images.resize(picture(0, 12, 16), model.vit), 4)
    blocks = [
        blocks_lib.Text(tiny.TOKENIZER.encode("sys")),
        image,
        blocks_lib.Text(tiny.TOKENIZER.encode("what?")),
    ]
    found = rollout.sample(
        model.params,
        tiny.pack([blocks]),
        jax.random.key(1),
        config=tiny.rollout_config(
            model=tiny.DRAWING, max_new_tokens=6, greedy=True, max_image_skips=0
        ),
    )
    ids = found.tokens[0][found.mask[0]]
    assert (
        answer.parts == [tiny.TOKENIZER.decode(ids)]
        and answer.tokens == len(ids)
        and answer.images == []
    )


def test_images_are_where_the_places_of_the_question_are(model):
    shown = [picture(n, 8, 8 * n) for n in (1, 2)]
    grids = [(2, 2), (2, 4)]

    def branches(*question):
        found = interleave._contexts(
            model, question, iter(jax.random.split(jax.random.key(0))), False
        )
        return {
            name: [
                tiny.TOKENIZER.decode(b.ids) if isinstance(b, blocks_lib.Text) else b.grid
                for b in blocks
            ]
            for name, blocks in found.items()
        }

    assert branches(shown, ("Is", "", "?")) == {
        "cond": ["sys", "Is", *grids, "?"],
        "text": ["sys", *grids],
        "image": ["sys", "Is", "?"],
    }
    assert branches(shown, ("", "as", ""))["cond"] == ["sys", grids[0], "as", grids[1]]
    one_text = branches(shown, "q")
    assert one_text == branches(shown, ("q",)) and one_text["cond"] == ["sys", *grids, "q"]
    with pytest.raises(ValueError, match="the question has 1 place <image> for 2 images"):
        opsd_jax.answer(model, shown, "In <image>?")


@pytest.mark.slow
def test_rounds_alternate_and_images_enter_the_context(model, recorded):
    steps = []
    (answer,) = run(
        model,
        [([picture(0, 16, 16), picture(1, 24, 16)], "what?")],
        generation=interleave.ImageGeneration(
            always=True, on_step=lambda *seen: steps.append(seen)
        ),
    )
    assert [type(part) for part in answer.parts] == [str, np.ndarray, str, np.ndarray, str]
    # as large as the last image is for the autoencoder, and not all of one colour
    assert all(
        p.shape == (24, 16, 3) and p.dtype == np.uint8 and p.std() > 0 for p in answer.images
    )
    assert steps == [(0, 2, 2), (1, 2, 2)]
    text, drawn, again, drawn_again, last = recorded
    assert [kinds(r) for r in text] == ["TLILIT"]
    # the branches of guidance: everything, everything before the question, the texts of the user
    assert [kinds(r) for r in drawn] == ["TLILITT", "TLILI", "TT"]
    assert [kinds(r) for r in again] == ["TLILITTLI"]
    assert [kinds(r) for r in drawn_again] == ["TLILITTLIT", "TLILI", "TT"]
    assert [kinds(r) for r in last] == ["TLILITTLITLI"]
    # the generated image is what the model sees next
    seen, pixels = interleave.resize_for_model(images.open_rgb(answer.images[0]), model)
    np.testing.assert_array_equal(again[0][-1].patches, images.patchify(seen, 4))
    assert again[0][-2].grid == (pixels.shape[0] // 8, pixels.shape[1] // 8)
    # the text goes back as the ids of its string
    np.testing.assert_array_equal(drawn[0][-1].ids, tiny.TOKENIZER.encode(answer.parts[0]))


class Saying(tiny.ByteTokenizer):
    """Decodes the model's k-th text as one of the given ones."""

    def decode(self, ids):
        return self.texts.pop(0)


def saying(model, *texts):
    tokenizer = Saying()
    object.__setattr__(tokenizer, "texts", list(texts))
    return dataclasses.replace(model, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("texts", "shape"),
    [
        (["the end"], "t"),
        (["see <image_start>", "the end"], "tpt"),
        (["<image_start> a", "<image_start>", "x"], "tptpt"),
        (["<image_start>"] * 3, "tptptp"),
    ],
)
def test_it_generates_images_when_the_text_asks_and_stops_when_it_does_not(model, texts, shape):
    (answer,) = run(saying(model, *texts), [([picture(0, 16, 16)], "what?")], generation=WHEN_ASKED)
    assert "".join("t" if isinstance(part, str) else "p" for part in answer.parts) == shape
    assert answer.text == "".join(texts)


def test_text_only_answers_generate_no_image(model):
    (answer,) = run(saying(model, "<image_start>"), [([picture(0, 16, 16)], "what?")])
    assert answer.parts == ["<image_start>"]


@pytest.mark.slow
def test_rows_of_a_batch_go_their_own_ways(model):
    """The second row generates an image, the first one does not; the batch keeps its size."""
    questions = [([picture(0, 24, 16)], "a?"), ([picture(1, 24, 16)], "longer?")]
    first, second = run(
        saying(model, "no", "<image_start>", "done"), questions, generation=WHEN_ASKED
    )
    assert first.parts == ["no"]
    assert (
        second.parts[0] == "<image_start>"
        and second.parts[2] == "done"
        and second.images[0].shape == (24, 16, 3)
    )


def test_text_of_a_batch_is_that_of_each_question_alone(model):
    questions = [([picture(0, 16, 16)], "a?"), ([], "a longer one?")]
    together = [answer.text for answer in run(model, questions)]
    assert together == [run(model, [question])[0].text for question in questions]


@pytest.mark.slow
def test_seeds_generate_different_images(model):
    def draw(seed):
        asked = [([picture(0, 16, 16)], "a")]
        (answer,) = run(model, asked, seed, ALWAYS)
        return answer.images[0]

    first = draw(0)
    np.testing.assert_array_equal(draw(0), first)
    assert (draw(1) != first).any()


def test_without_images_it_generates_the_largest_square(model):
    keys = iter(jax.random.split(jax.random.key(0), 3))
    for shown, grid in (([], (6, 6)), ([picture(0, 16, 24)], (2, 3))):
        contexts = interleave._contexts(model, (shown, "a"), keys, True)
        assert interleave._generated_grid(contexts, model.config.generation.side) == grid


def test_text_is_cut_at_another_bos():
    bos = tiny.TOKENIZER.bos
    assert interleave._until_bos(np.array([65, 66, bos, 67]), bos).tolist() == [65, 66]


def test_sizes_of_the_release_and_in_proportion():
    assert images.in_proportion(images.TRAINING, 14, 980, 980) == images.TRAINING
    assert images.in_proportion(images.VAE, 16, 1024, 1024) == images.VAE
    small = images.in_proportion(images.TRAINING, 14, 140, 980)
    assert (small.stride, small.max_size, small.min_size) == (14, 140, 54)


def test_one_or_two_resizes(model):
    shown = picture(0, 10, 30)
    seen, pixels = interleave.resize_for_model(shown, model)
    np.testing.assert_array_equal(seen, images.resize(shown, model.vit))
    np.testing.assert_array_equal(pixels, images.resize(shown, model.vae))
    twice = dataclasses.replace(
        model, protocol=dataclasses.replace(model.protocol, two_stages=True)
    )
    seen, again = interleave.resize_for_model(shown, twice)
    np.testing.assert_array_equal(seen, images.resize(Image.fromarray(pixels), model.vit))
    np.testing.assert_array_equal(again, pixels)


def test_buckets_are_few_and_hold():
    assert [interleave.bucket(n) for n in (0, 1, 16, 17, 24, 25, 33, 48, 49, 4096, 4097)] == [
        0,
        16,
        16,
        24,
        24,
        32,
        48,
        48,
        64,
        4096,
        6144,
    ]


@pytest.mark.parametrize("step", [0, 1, 6, 24, -16])
def test_steps_of_buckets_that_are_no_powers_of_two(step):
    """Of 6, the sizes would go on as 8 and 12, and never end for 1."""
    with pytest.raises(ValueError, match=f"step is {step}: give a power of two"):
        interleave.bucket(100, step)


def test_page_shows_texts_and_images():
    long = montage.column(["word" * 500, picture(0, 8, 16)])
    short = montage.column(["word", picture(0, 8, 16)])
    assert long.width == short.width and long.height > short.height + 100
    assert len(np.unique(np.asarray(short).reshape(-1, 3), axis=0)) > 20


# --- the command ----------------------------------------------------------------------------------


def command(folder, *arguments):
    with tiny.quick_compiles():
        generate.main(
            [
                f"--checkpoint={folder}",
                f"--image={folder}/maze.png",
                "--question=Where?",
                "--max_new_tokens=12",
                *arguments,
            ]
        )


@pytest.mark.slow
def test_command_generates_images(released, tmp_path, capsys):
    command(
        released,
        "--visual_thoughts=generated",
        "--always_draw",
        "--steps=4",
        "--compute_every=2",
        "--rounds=2",
        f"--out={tmp_path}",
    )
    out, err = capsys.readouterr()
    record = json.loads((tmp_path / "0.json").read_text())
    drawn = Image.open(tmp_path / "0-0.png")
    assert [list(step) for step in record["steps"]] == [["text"], ["picture"], ["text"]]
    assert f"[image: {tmp_path}/0-0.png]" in out and record["steps"][0]["text"] in out
    assert "image 1" in err and "1 images" in err
    assert max(drawn.size) > 14 and drawn.size[0] > drawn.size[1]  # the shape of the maze
    assert Image.open(tmp_path / "0.png").height > 450  # both images, 320 pixels wide, and text
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_command_answers_in_text_without_reading_the_generation_path(
    released, tmp_path, capsys, monkeypatch
):
    for file in released.iterdir():
        if file.name != "ae.safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    command(tmp_path)
    text = capsys.readouterr().out
    command(released, "--protocol=paper", "--temperature=0")
    assert capsys.readouterr().out == text
    for seed in range(4):  # random weights often end at once
        command(released, "--temperature=3", f"--seed={seed}")
    assert len(capsys.readouterr().out) > 20
    command(released, "--dtype=bfloat16", "--protocol=harness")
    assert "tokens in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--visual_thoughts=generated"], "needs --out=FOLDER"),
        (["--always_draw"], "--always_draw needs --visual_thoughts=generated"),
        (["--question="], "the question is empty"),
        (["--question=<image>"], "the question is empty"),
        (["--question=Is <image> as <image>?"], "--question has 2 places <image> for 1 image"),
        (["--image={folder}/nothing.png"], "nothing.png: there is no such file"),
        (["--image={folder}/config.json"], "config.json: cannot decode"),
        (["--tokenizer={folder}/.."], "holds no tokenizer"),
        (["--checkpoint={folder}/.."], "is not a released folder (no llm_config.json"),
        (["--checkpoint=/nowhere"], "--checkpoint=/nowhere: there is no such folder: give a rel"),
        (
            ["--checkpoint=Qwen/Qwen3-0.6B"],
            "--checkpoint=Qwen/Qwen3-0.6B: there is no such folder (models are not downloaded",
        ),
    ],
)
def test_bad_arguments_end_with_one_line(released, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command(released, *(a.format(folder=released) for a in arguments))
    err = capsys.readouterr().err
    assert end.value.code == 1 and message in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    with small_run.fast_compiles(tmp_path_factory):
        return small_run.trained(tmp_path_factory)


@pytest.mark.slow
def test_a_run_answers_as_its_evaluation_did(workdir, tmp_path, capsys):
    """Prompt, sizes, budget and tokenizer are the run's own."""
    config = workdir_lib.load_config(str(workdir))
    tok = tokenizer.load(str(workdir / "data" / "made" / "tokenizer"))
    row = small_run.examples(config, tok, "test", data_dir=workdir / "data").sources[0][0]
    images.open_rgb(row.problem_image).save(tmp_path / "chart.png")
    name = f"{small_run.LAST:06d}-none"
    found = json.loads((workdir / "eval" / name / "predictions.jsonl").open().readline())
    for folder in (workdir, workdir / "checkpoints" / str(small_run.LAST)):
        generate.main(
            [
                f"--checkpoint={folder}",
                f"--image={tmp_path}/chart.png",
                f"--question={row.question}",
            ]
        )
        assert capsys.readouterr().out == found["prediction"] + "\n"
    with pytest.raises(SystemExit):
        generate.main(
            [
                f"--checkpoint={workdir}",
                "--question=a",
                "--visual_thoughts=generated",
                f"--out={tmp_path}",
            ]
        )
    assert "was trained without image generation" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_asked_in_its_own_contexts(workdir, monkeypatch):
    """In each mode the texts are those of an evaluation, with its image skips."""
    run, model = opsd_jax.open_run(workdir), opsd_jax.load(workdir)
    test = run.examples("test")

    # Every text asks for an image, and eos takes the place of a token that texts have.
    marker = rollout.Marker(np.ones((2, model.config.llm.vocab_size), np.int8), "always")
    monkeypatch.setattr(rollout.Marker, "build", lambda *_, **__: marker)
    blocks = answering._blocks(model, model.training, test[0], ("none", None, 0))
    ((start, *ids),), _ = interleave._sample_texts(
        model, [blocks], jax.random.key(0), interleave.rollout_config(model)
    )
    end, head = next(i for i in ids if i != start), model.params["llm"]["head"]
    head = head.at[:, run.tokenizer.eos].set(head[:, end]).at[:, end].set(0)
    llm = {**model.params["llm"], "head": head}
    model = dataclasses.replace(model, params={**model.params, "llm": llm})

    run = dataclasses.replace(run, marker=marker)
    skips = 0
    for mode in ("none", "real", "swap", "remove"):
        for n, expected in evaluated(run, model.params, mode).items():
            partner = test[test.partner_of(0, n)] if mode == "swap" else None
            found = opsd_jax.answer(model, test[n], visual_thoughts=mode, partner=partner)
            assert (found.text, found.tokens) == (expected["prediction"], expected["tokens"])
            assert found.image_skips == expected["image_skips"]
            skips += found.image_skips
            if mode == "none":
                plain = opsd_jax.answer(model, test[n].image, test[n].question)
                assert plain.text == found.text
    assert skips > 0
    noise = [opsd_jax.answer(model, test[0], visual_thoughts="noise", seed=n) for n in (0, 0)]
    assert noise[0].text == noise[1].text

    for changes, message in (
        (
            {"partner": test[1]},
            "'swap' shows those of another example: give partner",
        ),
        ({"visual_thoughts": "true"}, "visual_thoughts is 'true': choose from"),
        ({"visual_thoughts": "generated"}, "generation=opsd_jax.interleave.ImageGeneration"),
        ({"question": "What?"}, "an example has a question of its own"),
        ({"visual_thoughts": "real", "generation": WHEN_ASKED}, "give one of both"),
    ):
        with pytest.raises(ValueError, match=message):
            opsd_jax.answer(model, test[0], **changes)
    with pytest.raises(ValueError, match="give one in the place of image and question"):
        opsd_jax.answer(model, test[0].image, "What?", visual_thoughts="real")
    names = blocks_lib.BlockNames(student=("question", "text:hint"))
    training = dataclasses.replace(model.training, names=names)
    with pytest.raises(ValueError, match="the run's student sees text:hint, which a question"):
        opsd_jax.answer(dataclasses.replace(model, training=training), test[0].image, "What?")
    with pytest.raises(ValueError, match="load a run, without a protocol"):
        asked_by = dataclasses.replace(model, training=None)
        opsd_jax.answer(asked_by, test[0], visual_thoughts="real")


def evaluated(run, params, mode):
    """{number: prediction} of an evaluation of a few examples of the test split."""
    selection = contexts.Selection(
        run.examples("test"), run.packer, run.mesh, batch_size=4, limit=4
    )
    (result,) = contexts.answer_all(params, selection, mode, sampling=run.evaluation_sampling())
    return {p["index"]: p for p in result.predictions}


# --- a folder that is used again


def answer_of(*parts):
    return interleave.Answer(list(parts), 3, 0.1, 0.2)


def test_results_in_a_reused_folder_are_replaced_all_of_them(tmp_path):
    image = picture(0, 8, 8)
    pixels, question = np.asarray(image), ([image], "what?")
    (tmp_path / "mine.png").touch()
    answer_files.write(
        str(tmp_path),
        [question] * 2,
        [answer_of("a", pixels, "b", pixels, "c"), answer_of("x", pixels)],
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "mine.png",
        "0.json",
        "0.png",
        "0-0.png",
        "0-1.png",
        "1.json",
        "1.png",
        "1-0.png",
    }
    answer_files.write(str(tmp_path), [question], [answer_of("a", pixels)])
    assert {p.name for p in tmp_path.iterdir()} == {"mine.png", "0.json", "0.png", "0-0.png"}


@pytest.mark.parametrize(
    "name, content", [("0.png", b""), ("0-3.png", b""), ("7.json", b"[1, 2]"), ("0.json", b"{cut")]
)
def test_other_files_of_such_names_are_kept(released, tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        command(released, f"--out={tmp_path}")
    assert f"holds {name}, which no earlier answer there names" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_bytes() == content
