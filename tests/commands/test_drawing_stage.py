"""Training image generation: traces with latents, both losses, the autoencoder's stage, a whole
run.
"""

import dataclasses
import functools
import importlib
import io
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import small_run
import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import (
    config_check,
    context,
    distill,
    flow,
    generate,
    interleave,
    optimizer,
    sharding,
    supervised,
    train,
)
from opsd_jax import params as params_lib
from opsd_jax.data import arrayrecord, packing
from opsd_jax.data.schema import Example
from opsd_jax.model import bagel
from opsd_jax.model.config import GenerationConfig, VAEConfig
from opsd_jax.run import model as model_lib
from opsd_jax.runtime import metrics

DRAWN = tiny.DRAWING.generation
C = DRAWN.latent_dim


@pytest.fixture(autouse=True)
def quick():
    with tiny.quick_compiles():
        yield


@functools.cache
def jitted(function):
    return jax.jit(function, static_argnames="config")


def tiny_config(**changes):
    """The settings of `tiny.DRAWING`: images of up to 24 pixels for the ViT, 48 for the
    autoencoder.
    """
    c = config_lib.default()
    v = DRAWN.vae
    c.stages = ("warmup",)
    for name in ("llm", "vit"):
        c.model[name].update(dataclasses.asdict(getattr(tiny.DRAWING, name)))
    c.model.generation.update(
        on=True,
        channels=v.channels,
        multipliers=v.multipliers,
        num_res_blocks=v.num_res_blocks,
        z_channels=v.z_channels,
        scale=v.scale,
        shift=v.shift,
        patch=DRAWN.patch,
        side=DRAWN.side,
        timestep_shift=DRAWN.timestep_shift,
    )
    c.model.update(dtype="float32", remat="none", query_block=0)
    c.images.update(stride=4, max_size=24, min_size=8)
    c.prompts.update(system="sys", intro="look", transition="now")
    c.data.tasks, c.data.limits = ("T",), ()
    c.data.buckets.student, c.data.buckets.teacher = ((64, 36),), ((128, 72),)
    c.data.buckets.trace = ((192, 72, 96),)
    c.data.buckets.drawn = ((54, 2, 48, 48),)
    c.warmup.batch_size = 2
    c.warmup.mix.update(interleaved=0, reference=0, text=1, drawn=1)
    c.warmup.optim.update(warmup_steps=0)
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c


def png(seed, height, width):
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    ).save(file, "PNG")
    return file.getvalue()


def example(n, height=16, width=24):
    return Example(
        f"row-{n}",
        "T",
        "which?",
        "B",
        png(n, height, width),
        (png(n + 99, height, width),),
        ("see", "so B"),
        "it is B",
    )


@pytest.fixture
def prepared(monkeypatch):
    """prepared(config, examples) -> the rows as a stage with image generation reads them."""

    def make(config, examples):
        monkeypatch.setattr(arrayrecord, "open_source", lambda *_, **__: examples)
        rows = small_run.examples(config, tiny.TOKENIZER, generation=True)
        return [rows(0, n) for n in range(len(examples))]

    return make


# --- contexts -------------------------------------------------------------------------------------


class Saying(tiny.ByteTokenizer):
    """Decodes the model's k-th text as one of the given ones."""

    def decode(self, ids):
        return self.texts.pop(0)


@pytest.mark.slow
def test_traces_are_the_contexts_of_image_generation(prepared, monkeypatch):
    """Velocities and texts after the same latents are those that `interleave.reason` finds when it
    generates images.
    """
    config = tiny_config()
    model, params = config_lib.model(config), tiny.params(tiny.DRAWING)
    assert model == tiny.DRAWING
    (row,) = prepared(config, [example(0, 24, 24)])  # the size that both resizes keep
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    blocks = packer.blocks(row, "drawn")
    assert (
        "".join(type(block).__name__[0] for block in blocks) == "TLITTLLIT"
    )  # Text, Latent, Image
    first, last = (block for block in blocks if isinstance(block, blocks_lib.Text) and block.loss)

    # inference: its texts and its image are those of the trace
    contexts, tokenizer = [], Saying()
    object.__setattr__(
        tokenizer, "texts", [tiny.TOKENIZER.decode(first.ids), tiny.TOKENIZER.decode(last.ids)]
    )
    run = types.SimpleNamespace(
        config=config, model=model, tokenizer=tokenizer, answer_budget=config.eval.max_new_tokens
    )
    drawer = model_lib.of_run(run, params)
    drawer = dataclasses.replace(
        drawer, protocol=dataclasses.replace(drawer.protocol, max_new_tokens=4)
    )
    monkeypatch.setattr(
        interleave,
        "_generate",
        lambda _, found, *rest: (
            contexts.append(list(found[0]["cond"])),
            [row.pixels[1]],
        )[1],
    )
    pack = interleave._pack
    monkeypatch.setattr(
        interleave, "_pack", lambda rows, _: (contexts.append(list(rows[0])), pack(rows, drawer))[1]
    )
    with Image.open(io.BytesIO(row.example.problem_image)) as picture:
        interleave.reason(
            drawer,
            [([picture.convert("RGB")], row.example.question)],
            jax.random.key(0),
            interleave.ImageGeneration(),
        )
    asked, drawing, answering = contexts
    trained = {"drawing": blocks[:5], "answering": blocks[:5] + blocks[6:8]}
    for name, found in (("drawing", drawing), ("answering", answering)):
        assert [type(block) for block in found] == [type(block) for block in trained[name]]
        for a, b in zip(found, trained[name]):
            if isinstance(a, blocks_lib.Latent):
                assert a.grid == b.grid and not a.noised and not b.noised
            else:
                for field in ("ids",) if isinstance(a, blocks_lib.Text) else ("patches",):
                    np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert [type(block) for block in asked] == [type(block) for block in blocks[:4]]

    # both with the same latents: what the network computes is the same
    rng = np.random.default_rng(0)
    grid = blocks[1].grid
    problem, thought = (rng.standard_normal((grid[0] * grid[1], C), np.float32) for _ in range(2))

    def fill(blocks):
        return [
            dataclasses.replace(b, tokens=problem if n == 1 else thought)
            if isinstance(b, blocks_lib.Latent)
            else b
            for n, b in enumerate(blocks)
        ]

    noise, t = rng.standard_normal(thought.shape, np.float32), 0.7
    whole = tiny.pack(
        [fill(blocks)], positions=200, patches=80, latents=3 * len(thought), generation=DRAWN
    )
    begin = len(problem)
    x, times = np.array(whole.latents.tokens), np.zeros((1, 3 * len(thought)), np.float32)
    x[0, begin : 2 * begin], times[0, begin : 2 * begin] = (1 - t) * thought + t * noise, t
    assert (whole.latents.noised[0, 200 + begin : 200 + 2 * begin] == 2).all()
    hidden, _ = jitted(bagel.read)(params, whole, config=model, latents=x, times=times)
    velocity = bagel.velocity(params, hidden[:, 200 + begin : 200 + 2 * begin], config=model)

    behind = tiny.pack(
        [fill(drawing)], positions=200, patches=80, latents=len(problem), generation=DRAWN
    )
    positions = flow.latent_positions([grid], len(thought), DRAWN.side)
    conditioning, cache = flow.prefill(params, behind, positions, config=model)
    sampler = flow.FlowConfig(
        model, tiny.TOKENIZER.image_start, tiny.TOKENIZER.image_end, text_scale=1.0
    )
    found, _ = flow.velocities(
        params, conditioning, cache, x[:, begin : 2 * begin], jnp.float32(t), config=sampler
    )
    np.testing.assert_allclose(found[0], velocity, atol=2e-5)

    answer = tiny.pack(
        [fill(answering) + [last]],
        positions=200,
        patches=80,
        latents=2 * len(problem),
        generation=DRAWN,
    )
    after, _ = jitted(bagel.read)(params, answer, config=model)
    texts = [
        sum(2 if isinstance(b, blocks_lib.Latent) else b.length for b in row)
        for row in (blocks[:-1], answering)
    ]
    one, other = (h[0, start : start + last.length] for h, start in zip((hidden, after), texts))
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_batches_hold_images_of_their_rows_with_latents(prepared):
    config = tiny_config()
    rows = prepared(config, [example(0), example(1, 24, 16)])
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    traces = packer.traces(rows, ["drawn", "text"])
    pictures = packer.images([rows[0], None])
    assert pictures.sizes.tolist() == [
        [[24, 32], [24, 32]],
        [[0, 0], [0, 0]],
    ]  # 16 x 24 enlarged: shorter side 24
    np.testing.assert_array_equal(pictures.pixels[0, 1, :24, :32], rows[0].pixels[1])
    image = traces.context.latents.image
    assert [np.bincount(line, minlength=4).tolist() for line in image] == [
        [18, 12, 12, 12],
        [54, 0, 0, 0],
    ]
    assert (
        traces.mask[0].sum()
        == len("<think>see</think><image_start><image_end><think>so B</think><answer>B</answer>")
        + 2
    )


def test_latents_are_those_of_their_images(prepared, monkeypatch):
    """Two problem images and two visual thoughts; a fake encoder gives every token the number of
    its image.
    """
    config = tiny_config(data__buckets__trace=((400, 200, 200),))
    config.data.buckets.drawn = ((216, 5, 48, 48),)
    more = png(7, 16, 16), png(8, 24, 24)
    asked = dataclasses.replace(
        example(0), question="is <image> <image>?", more_problem_images=more[:1]
    )
    asked = dataclasses.replace(
        asked, visual_thoughts=(*asked.visual_thoughts, more[1]), thoughts=("a", "b", "c")
    )
    rows = prepared(config, [asked, example(1)])
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    traces = packer.traces(rows, ["drawn", "drawn"])
    images = packer.images(rows)
    kinds = ["".join(type(b).__name__[0] for b in packer.blocks(r, "drawn")) for r in rows]
    assert kinds == ["TTLILITTLLITLLIT", "TLITTLLIT"]

    def tokens(encoded, patch):
        numbers = np.arange(10, dtype=np.float32) % 5
        return np.broadcast_to(numbers[:, None, None], (10, 36, C))

    monkeypatch.setattr(flow, "encode", lambda params, pixels, noise, config: pixels)
    monkeypatch.setattr(flow, "to_tokens", tokens)
    noise = np.zeros((2, 5, 12, 12, 4), np.float32)
    found = flow.with_latents(
        {}, traces.context, images.pixels, images.sizes, noise, config=tiny.DRAWING
    )
    assert not images.sizes[0, 4].any() and images.sizes[0, 3].any()
    for b, wanted in enumerate([[0, 1, 2, 2, 3, 3], [0, 1, 1]]):
        number = traces.context.latents.image[b]
        for n, image in enumerate(wanted, 1):
            assert (found.latents.tokens[b][number == n] == image).all() and (number == n).any()
        assert number.max() == len(wanted)


@pytest.mark.parametrize(
    "bucket, fits",
    [
        ((36, 2, 24, 32), True),
        ((35, 2, 24, 32), False),
        ((36, 1, 24, 32), False),
        ((36, 2, 16, 32), False),
    ],
)
def test_rows_go_where_their_images_fit(prepared, bucket, fits):
    config = tiny_config(data__buckets__drawn=(bucket,))
    rows = prepared(config, [example(7)])
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    assert packer.bucket(rows[0]) == (0 if fits else -1)
    if not fits:
        with pytest.raises(context.TooLongError, match="(row|example) row-7 .*data.buckets"):
            packer.traces(rows, ["drawn"]), packer.images(rows)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model.generation.on": False},
            "config.warmup.mix.drawn trains image generation.*config.model.generation.on=True",
        ),
        (
            {"model.generation.on": False, "stages": ("autoencoder",)},
            "config.stages trains image generation",
        ),
        ({"data.buckets.drawn": ()}, "config.warmup.mix.drawn needs config.data.buckets.drawn"),
        ({"data.buckets.drawn": ((9, 2, 48, 44),)}, "multiples of the 8 pixels"),
        ({"lora.rank": 2}, "set config.lora.rank=0"),
    ],
)
def test_settings_that_cannot_draw(changes, message):
    config = tiny_config()
    config_check.check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        config_check.check(config)


# --- the losses -----------------------------------------------------------------------------------


def stage_config(config, stage="warmup", **changes):
    return dataclasses.replace(config_lib.stage_config(config, stage, tiny.TOKENIZER), **changes)


@pytest.mark.long
@pytest.mark.slow
def test_the_generation_loss_against_numpy(prepared):
    """Two rows with images of different shapes and one text row; weights, shift and posterior as
    they should be.
    """
    config = tiny_config(
        warmup__ce_weight=0.5, warmup__mse_weight=2.0, model__generation__timestep_shift=2.0
    )
    rows = prepared(config, [example(0), example(1, 24, 16), example(2)])
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    batch = context.GenerationBatch(
        packer.traces(rows, ["drawn", "drawn", "text"]), packer.images([*rows[:2], None])
    )
    own = stage_config(config)
    model, key = own.model, jax.random.key(3)
    params = tiny.params(model)
    _, found = jitted(supervised.image_generation_step)(
        distill.init_state(params, own), batch, key, config=own
    )

    # the random numbers of the step; everything else anew, image by image
    keys = jax.random.split(key, 3)
    posterior = np.asarray(jax.random.normal(keys[0], (3, 2, 12, 12, 4)))
    noise = np.asarray(jax.random.normal(keys[1], (3, 54, C)))
    raw = np.asarray(jax.random.normal(keys[2], (3, 4)))
    clean, times = np.zeros((3, 54, C), np.float32), np.zeros((3, 54), np.float32)
    for r, row in enumerate(rows[:2]):
        height, width, _ = row.pixels[0].shape
        at = height // 8 * (width // 8)
        for m, pixels in enumerate(row.pixels):
            canvas = np.zeros((1, 48, 48, 3), np.float32)
            canvas[0, :height, :width] = (pixels / np.float32(255) - 0.5) / 0.5
            latents = np.asarray(
                flow.encode(params, canvas, posterior[r, m : m + 1], config=model)
            )[0]
            tokens = flow.to_tokens(latents[: height // 4, : width // 4], 2)
            for n in (0,) if m == 0 else (1, 2):
                clean[r, n * at : (n + 1) * at] = tokens
        t = 1 / (1 + np.exp(-raw[r, 2]))  # image 2 is the noised one
        times[r, at : 2 * at] = 2 * t / (1 + t)
    x = (1 - times[:, :, None]) * clean + times[:, :, None] * noise
    hidden, _ = jitted(bagel.read)(
        params, batch.traces.context, config=model, latents=x, times=times
    )
    errors = (
        np.asarray(bagel.velocity(params, hidden[:, -54:], config=model)) - (noise - clean)
    ) ** 2
    mse = errors[times > 0].mean()
    logits = np.asarray(bagel.logits(params, hidden), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    t = batch.traces
    ce = -np.concatenate(
        [logp[r, t.positions[r, t.mask[r]], t.labels[r, t.mask[r]]] for r in range(3)]
    ).mean()
    np.testing.assert_allclose(
        [found["mse"], found["ce"], found["loss"]], [mse, ce, ce / 2 + 2 * mse], rtol=2e-5
    )
    assert found["completion_len"] == pytest.approx(t.mask.sum() / 3)


@pytest.mark.long
@pytest.mark.slow
def test_accumulation_changes_nothing_in_the_generation_step(prepared):
    config = tiny_config()
    rows = prepared(config, [example(n) for n in range(4)])
    packer = packing.Packer.from_config(config, tiny.TOKENIZER)
    layouts = ["drawn", "text", "drawn", "text"]
    batch = context.GenerationBatch(
        packer.traces(rows, layouts),
        packer.images([row if layout == "drawn" else None for row, layout in zip(rows, layouts)]),
    )
    found = []
    for accumulation in (1, 2):
        own = stage_config(config, accumulation=accumulation)
        state = distill.init_state(tiny.params(own.model), own)
        found.append(
            jitted(supervised.image_generation_step)(state, batch, jax.random.key(0), config=own)[1]
        )
    for name in found[0]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-4, err_msg=name)


def test_each_stage_trains_its_own():
    config = tiny_config(stages=("autoencoder", "warmup", "opsd"))
    params = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=tiny.DRAWING))
    groups = {}
    for stage in ("autoencoder", "warmup", "opsd", "sft"):
        own = stage_config(config, stage)
        state = jax.eval_shape(lambda p: distill.init_state(p, own), params)
        trained, _ = optimizer.split(params, own)
        groups[stage] = {params_lib.fact(path).group for path in params_lib.flatten(trained)}
        # slots and averages are those of the trained alone
        held = [state["opt"].mu, state["opt"].nu, *([state["ema"]] if stage == "opsd" else [])]
        assert all(jax.tree.structure(tree) == jax.tree.structure(trained) for tree in held)
    text = {"embed", "und", "vit", "connector"}
    assert groups == {
        "autoencoder": {"vae"},
        "warmup": text | {"gen", "latent"},
        "opsd": text,
        "sft": text,
    }


def test_text_needs_no_generation_parameters():
    kept = params_lib.understanding(tiny.params(tiny.DRAWING))
    plain = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=tiny.MODEL))
    assert jax.tree.map(lambda x: x.shape, kept) == jax.tree.map(lambda x: x.shape, plain)
    sampling = config_lib.rollout(tiny_config(), tiny.TOKENIZER, tiny.marker())
    assert sampling.model == dataclasses.replace(config_lib.model(tiny_config()), generation=None)


def test_a_step_of_text_does_not_train_the_generation_path():
    own = stage_config(tiny_config())
    with pytest.raises(
        ValueError, match="sft_step trains on text traces.*use image_generation_step"
    ):
        supervised.sft_step({}, context.Supervised(*(None,) * 4), config=own)
    with pytest.raises(
        ValueError, match="trains image generation, but the model has no image-generation path"
    ):
        dataclasses.replace(own, model=tiny.MODEL)


# --- the autoencoder ------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    tiny.DRAWING,
    generation=GenerationConfig(VAEConfig(32, (1, 1), 1, 2, scale=0.5, shift=0.3), patch=2, side=6),
)


def squares(rng, count, side=8):
    """[count, 2, side, side, 3]: images of one colour with a square of another."""
    pixels = np.repeat(rng.integers(0, 256, (count, 2, 1, 3), np.uint8), side * side, axis=2)
    pixels = pixels.reshape(count, 2, side, side, 3)
    pixels[:, :, 2:5, 2:5] = rng.integers(0, 256, (count, 2, 1, 1, 3), np.uint8)
    return pixels


@pytest.mark.long
@pytest.mark.slow
def test_the_autoencoder_learns_and_ignores_padding():
    rng = np.random.default_rng(0)
    own = stage_config(
        tiny_config(),
        "autoencoder",
        model=SMALL,
        kl_weight=1e-3,
        optim=distill.OptimConfig(lr=3e-3, schedule="constant", warmup_steps=0, eps=1e-8),
    )
    state = distill.init_state(bagel.init(jax.random.key(0), config=SMALL), own)
    sizes = np.full((4, 2, 2), 8, np.int32)
    sizes[0, 0], sizes[1, 1] = (4, 6), 0
    pixels = squares(rng, 4)
    outside = pixels.copy()
    outside[0, 0, 4:], outside[0, 0, :, 6:], outside[1, 1] = 7, 200, 99
    step = jitted(supervised.autoencoder_step)
    one, other = (
        step(state, context.PaddedImages(x, sizes), jax.random.key(1), config=own)[1]
        for x in (pixels, outside)
    )
    assert one == other
    np.testing.assert_allclose(one["loss"], one["mse"] + 1e-3 * one["kl"], rtol=1e-6)

    before, found = state["params"], []
    for n in range(70):
        batch = context.PaddedImages(squares(rng, 4), np.full((4, 2, 2), 8, np.int32))
        state, values = step(state, batch, jax.random.key(n), config=own)
        found.append(float(values["mse"]))
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
    moved = {path for path, distance in tiny.distances(before, state["params"]).items() if distance}
    assert moved == {path for path in params_lib.flatten(before) if path.startswith("vae/")}


@pytest.mark.slow
def test_the_autoencoder_loss_against_numpy():
    """Means over real pixels and over the latents of real images; scale and shift of the model do
    not count.
    """
    rng, key = np.random.default_rng(1), jax.random.key(5)
    own = stage_config(tiny_config(), "autoencoder", model=SMALL, kl_weight=0.25, accumulation=2)
    params = tiny.params(SMALL)
    pixels, sizes = squares(rng, 2), np.array([[[8, 8], [0, 0]], [[8, 4], [8, 8]]], np.int32)
    _, found = jitted(supervised.autoencoder_step)(
        distill.init_state(params, own), context.PaddedImages(pixels, sizes), key, config=own
    )
    noise = np.asarray(jax.random.normal(key, (2, 2, 4, 4, 2)))
    squared, kls, samples = [], [], []
    for r, m in ((0, 0), (1, 0), (1, 1)):
        height, width = sizes[r, m]
        x = np.zeros((1, 8, 8, 3), np.float32)
        x[0, :height, :width] = pixels[r, m, :height, :width] / np.float32(127.5) - 1
        mean, logvar = map(np.asarray, jitted(bagel.encode_pixels)(params, x, config=SMALL))
        z = mean + np.exp(logvar / 2) * noise[r, m]
        back = np.asarray(jitted(bagel.decode_latents)(params, 0.5 * (z - 0.3), config=SMALL))
        squared.append(((back - x) ** 2)[0, :height, :width].ravel())

        def inside(a):
            return a[0, : height // 2, : width // 2].ravel()

        kls.append(inside((mean**2 + np.exp(logvar) - 1 - logvar) / 2))
        samples.append(inside(z))
    mse, kl, z = (np.concatenate(parts) for parts in (squared, kls, samples))
    expected = [mse.mean(), kl.mean(), mse.mean() + kl.mean() / 4, z.mean(), z.std()]
    names = ("mse", "kl", "loss", "latent_mean", "latent_std")
    np.testing.assert_allclose([found[name] for name in names], expected, rtol=1e-4, atol=1e-5)


# --- a run ----------------------------------------------------------------------------------------


def small_draw(**changes):
    import importlib.util

    spec = importlib.util.spec_from_file_location("mini", small_run.MINI)
    mini = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mini)
    c = mini.get_config("draw")
    c.update_from_flattened_dict(
        small_run.CHANGES
        | {
            "autoencoder.steps": 2,
            "autoencoder.batch_size": 4,
            "autoencoder.optim.warmup_steps": 1,
            "warmup.steps": 3,
            "opsd.steps": 1,
            "eval.every": 0,
            "eval.final_visual_thoughts": ("none",),
            "eval.final_banned": False,
            "eval.kl": False,
            "drawing.num_timesteps": 3,
            "log.samples_every": 0,
        }
        | changes
    )
    return c


@pytest.mark.long
@pytest.mark.slow
def test_a_run_learns_to_draw_and_continues_exactly(
    tmp_path_factory, tmp_path, capsys, monkeypatch
):
    with small_run.fast_compiles(tmp_path_factory):
        straight, again = tmp_path / "straight", tmp_path / "again"
        train.train(small_draw(), str(straight))
        rows = [row for row in metrics.read(straight / "metrics.jsonl") if "loss" in row]
        assert [row["stage"] for row in rows] == ["autoencoder"] * 2 + ["warmup"] * 3 + ["opsd"]
        assert {"mse", "kl", "latent_std", "latent_mean"} <= rows[0].keys() and {
            "ce",
            "mse",
        } <= rows[2].keys()
        drawn = Image.open(straight / "samples" / "000005" / "drawing0.png")
        assert drawn.size == (3 * 40, 40)
        assert Image.open(straight / "samples" / "000002" / "reconstruction0-1.png").size == (
            40,
            80,
        )

        for cut in (1, 4):  # inside the autoencoder's stage, and inside the warm-up
            shutil.copytree(straight, again)
            for later in range(cut + 1, 7):
                shutil.rmtree(again / "checkpoints" / str(later))
            sharding._update_program.cache_clear()
            train.train(small_draw(), str(again))
            found = [row for row in metrics.read(again / "metrics.jsonl") if "loss" in row]
            assert [row["loss"] for row in found] == [row["loss"] for row in rows]
            shutil.rmtree(again)

        # the image-generation path is in the checkpoint as the warm-up left it
        from opsd_jax.runtime import checkpoint

        model = config_lib.model(small_draw())
        abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
        saved = {
            step: checkpoint.restore_params(straight / "checkpoints" / str(step), abstract)
            for step in (2, 5, 6)
        }

        def group(path):
            return params_lib.fact(path).group

        def moved(a, b):
            return {group(path) for path, d in tiny.distances(saved[a], saved[b]).items() if d}

        assert moved(2, 5) == {"embed", "und", "vit", "connector", "gen", "latent"}
        assert moved(5, 6) <= {"embed", "und", "vit", "connector"}

        # and the command generates images with it
        image = tmp_path / "problem.png"
        Image.open(straight / "samples" / "000003" / "warmup-row0-problem.png").save(image)
        generate.main(
            [
                f"--checkpoint={straight}",
                f"--image={image}",
                "--question=Height of the second highest bar?",
                "--visual_thoughts=generated",
                "--always_draw",
                "--rounds=2",
                f"--out={tmp_path / 'out'}",
            ]
        )
        assert "1 images" in capsys.readouterr().err
        assert Image.open(tmp_path / "out" / "0-0.png").size == (40, 40)
        text = model_lib.load(str(straight), generation=False)
        assert text.config.generation is None and "vae" not in text.params

        # perf/fewer_steps.py; so few steps as this run has are all computed
        monkeypatch.syspath_prepend(small_run.ROOT / "perf")
        fewer_steps = importlib.import_module("fewer_steps")
        monkeypatch.setattr(fewer_steps, "SETTINGS", ((1, 1), (3, 1)))
        sheet = tmp_path / "fewer.png"
        capsys.readouterr()
        fewer_steps.main([f"--workdir={straight}", "--rows=3", "--batch_size=2", f"--out={sheet}"])
        lines = capsys.readouterr().out.splitlines()[2:4]
        assert lines[0].startswith("| 1 | – | 100% | 0.0 |")
        assert lines[1].startswith("| 3 | 1 | 100% | 0.0 |")
        assert Image.open(sheet).size == (160 * 4, 160 * 3)
