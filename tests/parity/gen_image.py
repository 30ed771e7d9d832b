"""Golden set `gen_image`: image generation with guidance, and its training loss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import context as context_lib
from opsd_jax import divergence, flow
from opsd_jax.model import bagel
from parity.inputs import SPARE, bucket, image_block, pack, visible
from parity.replay import by_name, close, close_gradient, compare, equal, matching, read
from parity.vae import decode_latents, hwc, moments

BRANCHES = {
    "cond": "cond",
    "cfg_text": "text",
    "cfg_img": "image",
}  # golden name: name in FlowConfig.branches


def scene(tensors, facts, whole_model, tokenizer):
    """(stages, {branch: blocks}, grid): the parts of the context, the three contexts, tokens of the
    generated image.
    """
    config, params = whole_model
    generation = config.generation
    pixels, noise = hwc(tensors["vae_image"])[None], hwc(tensors["vae_encode_noise"])
    latents = np.asarray(flow.encode(params, pixels, noise, config=config))[0]
    grid = tuple(n // generation.patch for n in latents.shape[:2])
    picture = [
        blocks_lib.Latent(np.asarray(flow.to_tokens(latents, generation.patch)), grid),
        image_block(tensors["vit_image"], config.vit.patch_size),
    ]
    system, question, generated = (
        [blocks_lib.Text(tensors[f"{name}_ids"])]
        for name in ("system", "question", "generated_text")
    )
    contexts = {
        "cond": [*system, *picture, *question, *generated],
        "text": [*system, *picture],
        "image": [*system, *question],
    }
    return (
        [system, picture, question, generated],
        contexts,
        tuple(n // generation.stride for n in facts["image_shape"]),
    )


def flow_config(model, tokenizer, run):
    return flow.FlowConfig(
        model=model,
        image_start=tokenizer.image_start,
        image_end=tokenizer.image_end,
        num_timesteps=run["num_timesteps"],
        timestep_shift=run["timestep_shift"],
        text_scale=run["cfg_text_scale"],
        image_scale=run["cfg_img_scale"],
        interval=tuple(run["cfg_interval"]),
        renorm=run["cfg_renorm_type"],
        renorm_min=run["cfg_renorm_min"],
    )


def all_branches(model, tokenizer):
    """For raw velocities after all three contexts, whatever the guidance."""
    return flow.FlowConfig(
        model, tokenizer.image_start, tokenizer.image_end, text_scale=2.0, image_scale=2.0
    )


def padded(tokens):
    """Latent tokens [..., G, C] with some more after them: nothing may depend on their values."""
    return np.concatenate(
        [tokens, np.full((*tokens.shape[:-2], SPARE, tokens.shape[-1]), 7, np.float32)], axis=-2
    )


def prefilled(blocks, grid, whole_model, tokenizer, config):
    """(packed contexts, Conditioning, cache) of rows of blocks."""
    model, params = whole_model
    packed = pack(blocks, tokenizer, model, bucket(blocks, latents=True))
    positions = flow.latent_positions([grid], math.prod(grid) + SPARE, model.generation.side)
    return packed, *flow.prefill(params, packed, positions, config=config.model)


@functools.partial(jax.jit, static_argnames="config")
def raw_velocities(params, conditioning, cache, x, times, *, config):
    """x [N, B, G, C], times [N] -> [N, R, B, G, C]."""
    return jax.lax.map(
        lambda at: flow.velocities(params, conditioning, cache, *at, config=config)[0], (x, times)
    )


def test_gen_image_contexts(goldens, drawing, whole_model, tokenizer):
    """The context image's moments; lengths, rope ids and cached keys of the three contexts; latent
    positions.
    """
    tensors, facts = read(goldens, "gen_image", drawing)
    config, params = whole_model
    found = moments(params, hwc(tensors["vae_image"])[None], config=config)
    compare(close, np.moveaxis(found, -1, -3), tensors, "vae_moments")
    stages, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    assert len(stages) == len(facts["context_stages"])
    for n, fact in enumerate(facts["context_stages"]):
        row = sum(stages[: n + 1], [])
        part = pack([row], tokenizer, config, bucket([row], latents=True))
        assert (part.length[0], part.next_rope_position[0]) == (fact["kv_len"], fact["rope"]), fact[
            "after"
        ]
    settings = all_branches(config, tokenizer)
    assert settings.branches == tuple(BRANCHES.values())
    packed, conditioning, cache = prefilled(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    positions = conditioning.positions
    equal(positions.table_ids[positions.real], tensors["packed_vae_position_ids"])
    for r, name in enumerate(BRANCHES):
        length = facts[name]["kv_len"]
        assert (packed.length[r], packed.next_rope_position[r]) == (length, facts[name]["rope"])
        rope = tensors["packed_position_ids" if name == "cond" else f"{name}_position_ids"]
        equal(np.full(positions.real.sum() + 2, conditioning.rope_position[r]), rope)
        used = packed.segment[r] > 0
        places = packed.latents.order[r, used]
        for match, wanted in matching(tensors, rf"([kv])_(?:layer(\d+)|last)_{name}"):
            kept = np.full(wanted.shape, np.nan, np.float32)
            kept[places] = np.asarray(
                cache[match[1]][int(match[2] or -1), r, : packed.padded_length]
            )[used]
            close(kept, wanted, match[0])


def test_gen_image_steps(goldens, drawing, whole_model, tokenizer):
    """Time grids; at every step of every trajectory: raw velocities, guidance, the next x."""
    tensors, facts = read(goldens, "gen_image", drawing)
    model, params = whole_model
    configs = {n: flow_config(model, tokenizer, run) for n, run in enumerate(facts["runs"])}
    for n, config in configs.items():
        compare(close, flow.timesteps(config), tensors, f"run{n}.timesteps")
    configs = {n: config for n, config in configs.items() if f"run{n}.x_traj" in tensors}
    assert configs
    _, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    settings = all_branches(model, tokenizer)
    _, conditioning, cache = prefilled(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    # All steps of all runs in one program.
    x = np.concatenate([padded(tensors[f"run{n}.x_traj"][:-1]) for n in configs])[:, None]
    times = np.concatenate([flow.timesteps(config)[:-1] for config in configs.values()])
    found = np.asarray(raw_velocities(params, conditioning, cache, x, times, config=settings))
    guide = jax.jit(flow.guide, static_argnames="config")
    real = conditioning.positions.real
    for n, config in configs.items():
        run, steps = facts["runs"][n], config.num_timesteps - 1
        v, found = found[:steps], found[steps:]
        # The official code evaluates a branch whose scale is above 1, even where guidance is off.
        evaluated = [0, *[1] * (run["cfg_text_scale"] > 1), *[2] * (run["cfg_img_scale"] > 1)]
        for branch, name in zip(evaluated, ("cond", "second", "third")):
            compare(close, v[0, branch, 0, :-SPARE], tensors, f"run{n}.step0_branch_{name}")
        first, last = flow.guided_steps(config)
        grid_of_times, path = flow.timesteps(config), tensors[f"run{n}.x_traj"]
        for k in range(steps):
            guided = first <= k < last
            if run["cfg_text_scale"] > 1:
                assert run["branches_per_step"][k] == (len(config.branches) if guided else 1)
            used = v[k, 0]
            if guided:
                image = v[k, 2] if "image" in config.branches else None
                used = np.asarray(guide(v[k, 0], v[k, 1], image, real, config=config))
            used = used[0, :-SPARE]
            close(used, tensors[f"run{n}.velocity"][k], f"run {n}, step {k}")
            close(
                path[k] - used * (grid_of_times[k] - grid_of_times[k + 1]),
                path[k + 1],
                f"run {n}, step {k}",
            )


@pytest.mark.slow
def test_gen_image_generate(goldens, drawing, whole_model, tokenizer):
    """`flow.generate`, every run from noise to pixels."""
    tensors, facts = read(goldens, "gen_image", drawing)
    model, params = whole_model
    _, contexts, grid = scene(tensors, facts, whole_model, tokenizer)
    assert len(tensors["init_noise"]) == math.prod(grid)
    positions = flow.latent_positions([grid], math.prod(grid) + SPARE, model.generation.side)
    for n, run in enumerate(facts["runs"]):
        config = flow_config(model, tokenizer, run)
        rows = [contexts[name] for name in config.branches]
        sizes = bucket(list(contexts.values()), latents=True)
        tokens = flow.generate(
            params,
            pack(rows, tokenizer, model, sizes),
            padded(tensors["init_noise"])[None],
            positions,
            config=config,
        )[:, :-SPARE]
        close(tokens[0], tensors[f"run{n}.final_latent_tokens"], f"run {n}")
        latents = flow.to_latents(tokens, grid, model.generation.patch)
        compare(close, np.moveaxis(latents, -1, -3)[0], tensors, f"run{n}.final_latent_chw")
        if f"run{n}.decoded_preclamp" in tensors:
            pixels = np.asarray(decode_latents(params, latents, config=model))[0]
            close(pixels, hwc(tensors[f"run{n}.decoded_preclamp"]), f"run {n}")
        if f"run{n}.image_u8" in tensors:
            wanted = tensors[f"run{n}.image_u8"]
            pixels = np.asarray(flow.decode(params, tokens, grid=grid, config=model))[0]
            assert pixels.dtype == np.uint8 and pixels.shape == wanted.shape
            apart = np.abs(pixels.astype(int) - wanted)
            # Values are truncated: rounding errors of the floats turn some just below a whole
            # number.
            assert apart.max() <= 1 and apart.mean() <= 1e-3, f"run {n}"


def test_flow_velocity(goldens, whole_model, tokenizer):
    """Velocities after each context at given times."""
    tensors, facts = read(goldens, "gen_image", "flow_velocity")
    source, there = read(goldens, "gen_image", facts["context"].split()[-1])
    model, params = whole_model
    _, contexts, grid = scene(source, {**there, **facts}, whole_model, tokenizer)
    settings = all_branches(model, tokenizer)
    _, conditioning, cache = prefilled(
        [contexts[name] for name in settings.branches], grid, whole_model, tokenizer, settings
    )
    times = np.array(facts["t"], np.float32)
    x = np.tile(padded(tensors["x_t"]), (len(times), 1, 1, 1))
    found = np.asarray(raw_velocities(params, conditioning, cache, x, times, config=settings))[
        :, :, 0, :-SPARE
    ]
    wanted = matching(tensors, r"v\.(\w+)\.t(\d+)")
    assert wanted
    for match, velocity in wanted:
        close(found[int(match[2]), list(BRANCHES).index(match[1])], velocity, match[0])


def train_rows(tensors, facts, whole_model):
    """Blocks of each packed sample; VAE images are sampled with the noise of the golden run."""
    config, params = whole_model
    generation = config.generation
    samples = sorted({int(match[1]) for match, _ in matching(tensors, r"sample(\d+)\..*")})
    is_image = [not step.startswith("text") for step in facts["plan"]]
    order = [sum(part == kind for part in is_image[:n]) for n, kind in enumerate(is_image)]
    plan = list(zip(facts["plan"], order))
    pictures = [
        tensors[f"sample{n}.image{k}"]
        for n in samples
        for step, k in plan
        if step.startswith("vae")
    ]
    # the official code encodes all at once, on black of a common size
    noise = hwc(tensors["vae_encode_noise"])
    assert len(noise) == len(pictures)
    sides = [side * generation.vae.downsample for side in noise.shape[1:3]]

    def pad(picture):
        return np.pad(picture, [(0, 0), *((0, a - b) for a, b in zip(sides, picture.shape[1:]))])

    pixels = np.stack([pad(picture) for picture in pictures])
    compare(equal, pixels, tensors, "padded_images")
    latents = np.asarray(flow.encode(params, hwc(pixels), noise, config=config))
    compare(close, np.moveaxis(latents, -1, -3), tensors, "padded_latent")
    encoded = []
    for picture, values, grid in zip(
        pictures, latents, facts["patchified_vae_latent_shapes"], strict=True
    ):
        assert [side // generation.stride for side in picture.shape[1:]] == grid
        rows, columns = (side * generation.patch for side in grid)
        encoded.append(
            blocks_lib.Latent(
                flow.to_tokens(values[:rows, :columns], generation.patch), tuple(grid)
            )
        )

    def block(n, step, k):
        if step.startswith("text"):
            return blocks_lib.Text(tensors[f"sample{n}.text{k}"], loss="(loss)" in step)
        if step == "vit":
            return image_block(tensors[f"sample{n}.image{k}"], config.vit.patch_size)
        return dataclasses.replace(encoded.pop(0), noised="noised" in step)

    return [[block(n, step, k) for step, k in plan] for n in samples]


@pytest.mark.slow
def test_train_mse(goldens, whole_model, tokenizer):
    """Training on noised images: latents, packs, flow loss, cross entropy, gradients of their sum.

    Officially the samples are documents of one row; here each has a row of its own.
    """
    tensors, facts = read(goldens, "gen_image", "train_mse")
    config, params = whole_model
    assert facts["timestep_shift"] == config.generation.timestep_shift
    rows = train_rows(tensors, facts, whole_model)
    batch = context_lib.supervise(
        rows,
        bucket(rows, latents=True),
        tokenizer=tokenizer,
        side=config.vit.side,
        generation=config.generation,
    )
    context, drawn = batch.context, batch.context.latents
    real, used = drawn.image > 0, context.segment > 0
    stops = np.cumsum(facts["sample_lens"])
    equal(context.length, facts["sample_lens"])
    place = drawn.order + (stops - context.length)[:, None]  # of each position in the official row

    def in_sequence(values):
        return values[used][np.argsort(place[used])]

    positions, patches = context.tokens.shape[1], context.patch_image > 0
    text, at_latents = used[:, :positions].copy(), place[:, positions:]
    for r in range(len(rows)):
        text[r, context.patch_positions[r, patches[r]]] = False
    equal(place[:, :positions][text], tensors["packed_text_indexes"])
    equal(context.tokens[text], tensors["packed_text_ids"])
    equal(in_sequence(context.rope_positions), tensors["packed_position_ids"])
    equal(
        np.take_along_axis(place, context.patch_positions, axis=1)[patches],
        tensors["packed_vit_token_indexes"],
    )
    equal(context.patch_table_ids[patches], tensors["packed_vit_position_ids"])
    compare(equal, context.patches[patches], tensors, "packed_vit_tokens")
    equal(
        [n for row in context.patch_image for n in np.bincount(row)[1:]],
        tensors["vit_token_seqlens"],
    )
    equal(at_latents[real], tensors["packed_vae_token_indexes"])
    equal(drawn.table_ids[real], tensors["packed_latent_position_ids"])
    if "attention_mask" in tensors:
        mask = np.asarray(
            visible(
                context.limit,
                context.segment,
                context.segment,
                drawn.order,
                drawn.noised,
                drawn.noised,
            )
        )
        ours = np.zeros_like(tensors["attention_mask"])
        for r in range(len(rows)):
            assert not mask[r][:, ~used[r]].any()
            ours[np.ix_(place[r, used[r]], place[r, used[r]])] = mask[r][np.ix_(used[r], used[r])]
        equal(ours, tensors["attention_mask"])
    equal(
        np.take_along_axis(place, batch.positions, axis=1)[batch.mask], tensors["ce_loss_indexes"]
    )
    equal(batch.labels[batch.mask], tensors["packed_label_ids"])

    raw, noise = np.full(real.shape, -np.inf, np.float32), np.zeros(drawn.tokens.shape, np.float32)
    raw[real], noise[real] = tensors["packed_timesteps"], tensors["flow_noise"]
    times = flow.training_times(raw, config.generation.timestep_shift)
    equal(np.asarray(times) == 0, np.isneginf(raw))
    equal((np.asarray(times) > 0) & real, np.isin(at_latents, tensors["mse_loss_indexes"]) & real)

    @jax.jit
    def objective(params):
        errors, counted, hidden = flow.loss(params, context, times, noise, config=config)
        logits = bagel.logits(
            params, jnp.take_along_axis(hidden, batch.positions[:, :, None], axis=1)
        )
        ce = divergence.cross_entropy(logits, batch.labels)

        def mean(values, mask):
            return jnp.sum(values * mask) / jnp.sum(mask)

        means = mean(errors.mean(-1), counted), mean(ce, batch.mask)
        return sum(means), (means, errors, counted, hidden, logits, ce)

    (total, found), gradients = jax.value_and_grad(objective, has_aux=True)(params)
    means, errors, counted, hidden, logits, ce = jax.tree.map(np.asarray, found)
    equal(at_latents[counted], tensors["mse_loss_indexes"])
    close(errors[counted], tensors["mse"])
    assert not errors[~counted].any()
    close(errors[counted].mean(-1), tensors["mse_per_token"])
    compare(close, in_sequence(hidden), tensors, "hidden_final")
    compare(close, logits[batch.mask], tensors, "logits")
    close(ce[batch.mask], tensors["ce"])
    for ours, name in (
        (means[0], "mse_mean"),
        (means[1], "ce_mean"),
        (total, "total_loss_for_grads"),
    ):
        assert float(ours) == pytest.approx(facts[name], rel=1e-5), name
    ours, wanted = by_name(gradients), matching(tensors, r"grad\.(.+)")
    assert wanted
    for match, gradient in wanted:
        close_gradient(ours[match[1]], gradient, match[1])
