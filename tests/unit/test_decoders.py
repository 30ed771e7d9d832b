"""Decoders of other families beside BAGEL's: their parameters, and models that read text alone.

What they compute is held by tests/test_hf_parity.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import opsd_jax
import small_run
import tiny
from opsd_jax import config as config_lib
from opsd_jax import config_check, images, interleave
from opsd_jax import params as params_lib
from opsd_jax.model import attention, bagel
from opsd_jax.model.config import LLMConfig, ModelConfig

SIZES = {
    "vocab_size": 264,
    "hidden_size": 30,  # not a multiple of 4, which 2-D positions of images need
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "intermediate_size": 20,
    "head_dim": 12,
}
FAMILIES = {
    "qwen2": {"qk_norm": False},
    "qwen3": {"qkv_bias": False},
    "llama": {"qkv_bias": False, "qk_norm": False},
    "llama with biases": {"qk_norm": False, "output_bias": True, "mlp_bias": True},
}
BIASES = {
    "qwen2": "qkv",
    "qwen3": (),
    "llama": (),
    "llama with biases": ("q", "k", "v", "o", "gate", "up", "down"),
}


def text_model(**changes):
    return ModelConfig(LLMConfig(**SIZES | changes), dtype="float32", remat="none", query_block=0)


def abstract(config):
    return jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_family(family, tied):
    config = text_model(**FAMILIES[family], tied_head=tied)
    params = abstract(config)
    assert params.keys() == {"llm"}
    layers = params["llm"]["layers"]["und"]
    assert {name for name in layers if name.endswith("_bias")} == {
        f"{name}_bias" for name in BIASES[family]
    }
    assert {"q_norm", "k_norm"} & layers.keys() == (
        {"q_norm", "k_norm"} if family == "qwen3" else set()
    )
    assert layers["o_kernel"].shape == (2, 36, 30) and layers["k_kernel"].shape == (2, 30, 12)
    assert ("head" in params["llm"]) != tied
    for path in params_lib.flatten(params):
        assert params_lib.fact(path).group in ("embed", "und")


def test_head_is_the_embedding_table_where_it_is_tied():
    """Its gradient is that of both uses."""
    config = text_model(tied_head=True)
    tied = tiny.params(config)
    untied = {"llm": tied["llm"] | {"head": tied["llm"]["embed"].T}}
    np.testing.assert_array_equal(bagel.head(tied), bagel.head(untied))

    def loss(params):
        x = bagel.embed_tokens(params, np.array([[1, 2]]), config=config)
        return jnp.sum(jnp.sin(bagel.logits(params, x)))

    one, two = jax.grad(loss)(tied)["llm"], jax.grad(loss)(untied)["llm"]
    np.testing.assert_allclose(one["embed"], two["embed"] + two["head"].T, atol=1e-5)
    assert np.abs(two["embed"]).max() > 0.1


def test_images_are_refused_by_a_model_that_reads_text_alone():
    config = text_model()
    students, _ = tiny.rows(np.random.default_rng(0), 1)
    packed = tiny.pack(students)
    with pytest.raises(ValueError, match="28 patches of images per sequence, but the model has no"):
        jax.eval_shape(functools.partial(bagel.embed, config=config), abstract(config), packed)
    sizes = images.Resize(), images.Resize()
    asked = interleave.Reasoner(config, {}, tiny.TOKENIZER, interleave.Protocol(), *sizes)
    with pytest.raises(ValueError, match="reads text alone: ask it without an image"):
        opsd_jax.answer(asked, Image.new("RGB", (8, 8)), "Which?")


def test_llama3_frequencies():
    """Long wavelengths are stretched, short ones stay, those between are interpolated."""
    factor, low, high, original = 8.0, 1.0, 4.0, 64.0
    scaling = factor, low, high, original
    wanted, kinds = [], set()
    for i in range(16):
        frequency = 1e4 ** (-2 * i / 32)
        wave = 2 * math.pi / frequency
        kind = "long" if wave > original / low else "short" if wave < original / high else "between"
        kinds.add(kind)
        share = (original / wave - low) / (high - low)
        mixed = (1 - share) * frequency / factor + share * frequency
        wanted.append({"long": frequency / factor, "short": frequency, "between": mixed}[kind])
    assert kinds == {"long", "short", "between"}
    found = attention.rope_frequencies(32, 1e4, scaling)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    cos, _ = attention.rope_tables(np.ones((1, 1), np.int32), 32, 1e4, False, scaling)
    np.testing.assert_allclose(cos.ravel(), np.cos(np.tile(wanted, 2)), atol=1e-6)


@pytest.mark.parametrize("wrong", [(8.0,), (8.0, 4.0, 4.0, 64.0), (8.0, 1.0, 4.0, 0.0)])
def test_llama3_scaling_that_is_none(wrong):
    with pytest.raises(ValueError, match="model.llm.rope_llama3"):
        text_model(rope_llama3=wrong)


def test_generation_needs_vision_and_the_decoder_of_bagel():
    with pytest.raises(ValueError, match="model.generation.on is True, but the model has no"):
        dataclasses.replace(tiny.DRAWING, vit=None)
    biased = dataclasses.replace(tiny.DRAWING.llm, mlp_bias=True)
    with pytest.raises(ValueError, match="not implemented for a model with a generation expert"):
        dataclasses.replace(tiny.DRAWING, llm=biased)


TEXT_ALONE = {
    "model__vit__on": False,
    "stages": ("opsd",),
    "student__blocks": ("question",),
    "teacher__blocks": ("question", "text:full_text_only_thought"),
    "data__buckets__student": ((20, 0),),
    "data__buckets__teacher": ((40, 0),),
    "data__buckets__trace": ((40, 0, 20),),
}


def test_settings_of_a_model_that_reads_text_alone():
    config = small_run.config(**TEXT_ALONE)
    config_check.check(config)
    assert config_lib.model(config).vit is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student__blocks": ("image", "question")},
            r"config.student.blocks names image, which are images: set it to \('question',\)",
        ),
        (
            {"teacher__blocks": ("question", "visual_thoughts", "image@crop")},
            "config.teacher.blocks names visual_thoughts, image@crop, which are images",
        ),
        (
            {"data__buckets__teacher": ((40, 25),)},
            r"config.data.buckets.teacher is \(\(40, 25\),\): set the second number",
        ),
        ({"stages": ("warmup", "opsd")}, "config.warmup.mix.interleaved is 2: set it to 0"),
        ({"model__generation__on": True}, "config.model.generation.on is True, but"),
    ],
)
def test_settings_that_show_images_to_a_model_without_vision(changes, message):
    with pytest.raises(ValueError, match=message):
        config_check.check(small_run.config(**TEXT_ALONE | changes))
