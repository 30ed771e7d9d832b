"""Sizes unlike the golden ones, compared with the NumPy reference instead of goldens."""

import types

import jax
import numpy as np
import pytest

from opsd_jax import blocks as blocks_lib
from opsd_jax import flow, rollout
from opsd_jax.method_config import RENORMS
from opsd_jax.model import bagel
from opsd_jax.release import load as load_lib
from parity.gen_image import padded
from parity.inputs import SPARE, bucket, completion, pack, score
from parity.replay import close
from parity.vae import decode_latents, hwc
from reference import Reference, write_checkpoint

OTHER_LLM = {
    "vocab_size": 400,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "intermediate_size": 72,
    "rope_theta": 5e4,
    "rms_norm_eps": 1e-5,
}
OTHER_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 35,
    "patch_size": 5,
}
OTHER_WHOLE = {"latent_patch_size": 3, "max_latent_size": 5, "timestep_shift": 2.0}
OTHER_AE = {
    "ch": 32,
    "ch_mult": [1, 3, 2],
    "num_res_blocks": 1,
    "z_channels": 8,
    "scale_factor": 0.7,
    "shift_factor": -0.2,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "downsample": 4,
}
OTHER_TOKENIZER = types.SimpleNamespace(bos=391, eos=7, image_start=390, image_end=2)


def test_other_sizes(tmp_path):
    """A model of sizes unlike the golden ones against NumPy: both packs, and greedy decoding."""
    tokenizer = OTHER_TOKENIZER
    write_checkpoint(tmp_path, OTHER_LLM, OTHER_VIT, OTHER_WHOLE, OTHER_AE, seed=0)
    config, params = load_lib.load(str(tmp_path))
    assert (config.llm.head_dim, config.vit.num_layers, config.vit.side) == (8, 2, 7)
    reference = Reference(tmp_path, tuple(vars(tokenizer).values()))
    rng = np.random.default_rng(1)

    def ids(n):
        return rng.integers(10, 380, n).astype(np.int32)

    def picture(rows, columns):
        return blocks_lib.Image(
            rng.uniform(-1, 1, (rows * columns, 75)).astype(np.float32), (rows, columns)
        )

    prompts = blocks_lib.Prompts(ids(6), ids(3), ids(4))
    question, problem, answer = ids(5), picture(3, 7), ids(8)
    roles = [
        blocks_lib.student(tokenizer, prompts, question, problem),
        blocks_lib.teacher(
            tokenizer, prompts, question, problem, [picture(2, 4), None, picture(6, 1)]
        ),
    ]
    context = pack(roles, tokenizer, config)
    block = completion(answer, tokenizer, batch=2)
    hidden = np.asarray(score(params, context, block, config=config))
    for r, blocks in enumerate(roles):
        wanted = reference.logits(blocks, [tokenizer.bos, *answer])
        close(
            bagel.logits(params, hidden[r, : len(answer) + 1]),
            wanted[-len(answer) - 1 :],
            f"role {r}",
        )

    marker = rollout.Marker.build([b"."] * 400, 400)
    settings = rollout.RolloutConfig(
        model=config,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        marker=marker,
        greedy=True,
        max_new_tokens=12,
    )
    sampled, logits = jax.tree.map(
        np.asarray,
        rollout.sample(params, context, jax.random.key(0), config=settings, return_logits=True),
    )
    for r, blocks in enumerate(roles):
        fed, wanted = reference.greedy(blocks, budget=12)
        gap = np.sort(wanted, axis=-1)
        assert (gap[:, -1] - gap[:, -2]).min() > 1e-3  # no near-ties: the tokens are well defined
        assert sampled.fed[r, : sampled.num_fed[r]].tolist() == fed
        close(logits[r, : len(fed)], wanted, f"role {r}")


@pytest.mark.slow
def test_other_sizes_draw(tmp_path):
    """The same sizes, from shards: pixels to latents and back, images after three contexts."""
    tokenizer = OTHER_TOKENIZER
    write_checkpoint(tmp_path, OTHER_LLM, OTHER_VIT, OTHER_WHOLE, OTHER_AE, seed=2, shards=3)
    model, params = load_lib.load(str(tmp_path), generation=True)
    generation = model.generation
    assert (generation.stride, generation.latent_dim, generation.timestep_shift) == (12, 72, 2.0)
    reference = Reference(tmp_path, tuple(vars(tokenizer).values()))
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    pixels, noise = np.tanh(normal(3, 24, 36)), normal(8, 6, 9)
    latents = np.asarray(flow.encode(params, hwc(pixels)[None], hwc(noise)[None], config=model))[0]
    close(latents, hwc(reference.encode(pixels, noise)))

    def text(n):
        return blocks_lib.Text(rng.integers(10, 380, n).astype(np.int32))

    system, question, answer = text(4), text(6), text(3)
    picture = [
        blocks_lib.Latent(np.asarray(flow.to_tokens(latents, 3)), (2, 3)),
        blocks_lib.Image(np.tanh(normal(2 * 4, 75)), (2, 4)),
    ]
    contexts = [[system, *picture, question, answer], [system, *picture], [system, question]]
    grid, initial = (1, 4), normal(4, 72)
    times = np.linspace(1, 0, 5)
    times = 1.7 * times / (1 + 0.7 * times)
    guided = [0.3 < time <= 0.9 for time in times[:-1]]
    assert not guided[0] and any(guided)
    packed = pack(contexts, tokenizer, model, bucket(contexts, latents=True))
    positions = flow.latent_positions([grid], len(initial) + SPARE, generation.side)
    for renorm in RENORMS:
        config = flow.FlowConfig(
            model,
            tokenizer.image_start,
            tokenizer.image_end,
            num_timesteps=5,
            timestep_shift=1.7,
            text_scale=2.5,
            image_scale=1.4,
            interval=(0.3, 0.9),
            renorm=renorm,
            renorm_min=0.2,
        )
        wanted = reference.draw(
            contexts,
            initial,
            grid,
            times,
            config.interval,
            a=2.5,
            b=1.4,
            renorm=renorm,
            renorm_min=0.2,
        )
        found = flow.generate(params, packed, padded(initial)[None], positions, config=config)[
            :, :-SPARE
        ]
        close(found[0], wanted, renorm)

    def square(tokens):
        return np.asarray(flow.to_latents(tokens, grid, 3))

    image = decode_latents(params, square(found), config=model)[0]
    close(image, hwc(reference.decode(np.moveaxis(square(wanted), -1, 0))))
