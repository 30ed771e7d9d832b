"""Golden set `text_forward`: packed documents through the decoder; rope tables."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import divergence
from opsd_jax.model import attention, bagel, masks
from parity.inputs import SPARE, cross_entropy, first_layers, normed, visible
from parity.replay import close, compare, equal, matching, read


def test_text_forward(goldens, model):
    """Several documents in one pack; every layer."""
    tensors, settings = read(goldens, "text_forward", "text")
    config, params = model
    lengths = tensors["sample_lens"]
    assert lengths.tolist() == settings["sample_lens"]
    slots = lengths.sum()
    equal(tensors["packed_text_indexes"], np.arange(slots))
    positions = np.concatenate([np.arange(n) for n in lengths])
    equal(positions, tensors["packed_position_ids"])
    documents = np.repeat(np.arange(len(lengths)) + 1, lengths)
    vectors = [
        np.pad(v, (0, SPARE))[None].astype(np.int32)
        for v in (tensors["packed_text_ids"], positions, np.arange(slots) + 1, documents)
    ]
    mask = np.asarray(visible(vectors[2], vectors[3], vectors[3]))[0]
    equal(mask[:slots, :slots], tensors["attention_mask"])

    @functools.partial(jax.jit, static_argnames="config")
    def run(params, tokens, positions, limit, segment, *, config):
        x = bagel.embed_tokens(params, tokens, config=config)
        inputs = bagel.Embedded(x, positions, masks.Mask(limit, segment, segment))
        return bagel.forward(params, inputs, config=config)[0][0, :slots]

    layers = matching(tensors, r"hidden\.layer(\d+)")
    assert len(layers) == config.llm.num_layers
    for match, hidden in layers:
        shorter, cut = first_layers(config, params, "llm", int(match[1]) + 1)
        close(run(cut, *vectors, config=shorter), normed(hidden, config, params), match[0])
    hidden = np.asarray(run(params, *vectors, config=config))
    close(hidden, tensors["hidden.norm"])
    logits = bagel.logits(params, hidden)
    compare(close, logits, tensors, "logits")
    ce = np.asarray(cross_entropy(logits, tensors["labels"]))
    close(ce, tensors["ce"])
    assert float(ce.mean()) == pytest.approx(settings["ce_mean"], rel=1e-5)
    chunked, hits = divergence.chunked_cross_entropy(
        hidden[None], params["llm"]["head"], tensors["labels"][None], chunk=5
    )
    close(chunked[0], tensors["ce"])
    equal(hits[0] > 0, logits.argmax(-1) == tensors["labels"])


def test_rope_tables(goldens, model):
    tensors, _ = read(goldens, "text_forward", "text")
    config = model[0].llm
    tables = matching(tensors, r"rope_(cos|sin)_(\d+)_(\d+)")
    assert tables
    for match, table in tables:
        positions = np.arange(int(match[2]), int(match[3]) + 1)[None]
        ours = attention.rope_tables(positions, config.head_dim, config.rope_theta)[
            match[1] == "sin"
        ]
        np.testing.assert_allclose(ours[0, :, 0], table, atol=2e-5, err_msg=match[0])
    cos, _ = attention.rope_tables(np.ones((1, 1), np.int32), config.head_dim, config.rope_theta)
    np.testing.assert_allclose(cos.ravel(), np.cos(np.tile(tensors["rope_inv_freq"], 2)), atol=1e-6)


def test_rope_frequencies_in_bfloat16(model):
    """`model.rope_bfloat16`: inv_freq as FSDP casts it, under jit too; the model's output moves by
    as much as that.
    """
    theta, dim = 1e6, 128
    exact = np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    rounded = exact.astype(jnp.bfloat16).astype(np.float64)
    assert 0.0035 < np.abs(rounded / exact - 1).max() < 0.0039
    positions = np.array([[1, 7, 4321]])
    for inv_freq, bfloat16 in ((rounded, True), (exact.astype(np.float64), False)):
        angles = np.tile(positions[0][:, None] * inv_freq, 2)
        tables = jax.jit(
            functools.partial(attention.rope_tables, head_dim=dim, theta=theta, bfloat16=bfloat16)
        )(positions)
        for ours, expected in zip(tables, (np.cos(angles), np.sin(angles))):
            # angles reach 4,321, of which float32 keeps 2.4e-4
            np.testing.assert_allclose(ours[0, :, 0], expected, atol=6e-4)
            np.testing.assert_allclose(ours[0, :2, 0], expected[:2], atol=2e-6)

    config, params = model
    x = np.random.default_rng(0).standard_normal((1, 40, config.llm.hidden_size), np.float32)
    segment = np.ones((1, 40), np.int32)
    mask = masks.Mask(np.arange(1, 41)[None], segment, segment)
    hidden = [
        np.asarray(
            jax.jit(
                functools.partial(
                    bagel.forward, config=dataclasses.replace(config, rope_bfloat16=bfloat16)
                )
            )(params, bagel.Embedded(x, np.arange(40)[None], mask))[0]
        )
        for bfloat16 in (False, True)
    ]
    assert 1e-4 < np.abs(hidden[0] - hidden[1]).max() / np.abs(hidden[0]).max() < 0.2
