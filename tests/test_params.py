"""The table of parameter facts against the model, and what is read from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig

BOTH = dataclasses.replace(tiny.MODEL, generation=True)
SEVEN_B = ModelConfig(
    llm=LLMConfig(vocab_size=152064, hidden_size=3584, num_layers=28, num_heads=28, num_kv_heads=4,
                  intermediate_size=18944),
    vit=ViTConfig(hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304),
    generation=True)


def abstract(config):
    return jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))


def test_every_parameter_has_a_row_and_every_row_a_parameter():
    leaves = params_lib.flatten(abstract(BOTH))
    assert leaves.keys() == params_lib.TABLE.keys()
    for path, leaf in leaves.items():
        row = params_lib.fact(path)
        assert row.path == path and len(row.axes) == leaf.ndim and row.group in params_lib.GROUPS
        assert row.stacked == ("/layers/" in path) == (row.axes[0] == "layers")
        assert row.transpose == (path.endswith("kernel") or path == "llm/head")
        assert leaf.shape[0] == 2 or not row.stacked
    without = params_lib.flatten(abstract(tiny.MODEL))
    assert leaves.keys() - without.keys() == {p for p, row in params_lib.TABLE.items() if row.group == "gen"}
    assert len({row.name for row in params_lib.TABLE.values()}) == len(params_lib.TABLE)
    with pytest.raises(KeyError, match=r"'llm/bias' has no row in opsd_jax/params.py"):
        params_lib.fact("llm/bias")


@pytest.mark.parametrize(("path", "name", "shape"), [
    ("llm/embed", "language_model.model.embed_tokens.weight", (264, 32)),
    ("llm/head", "language_model.lm_head.weight", (264, 32)),
    ("llm/layers/und/q_bias", "language_model.model.layers.1.self_attn.q_proj.bias", (32,)),
    ("llm/layers/und/k_kernel", "language_model.model.layers.1.self_attn.k_proj.weight", (16, 32)),
    ("llm/layers/gen/o_kernel", "language_model.model.layers.1.self_attn.o_proj_moe_gen.weight", (32, 32)),
    ("llm/layers/gen/q_norm", "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight", (8,)),
    ("llm/layers/und/down_kernel", "language_model.model.layers.1.mlp.down_proj.weight", (32, 48)),
    ("llm/layers/gen/gate_kernel", "language_model.model.layers.1.mlp_moe_gen.gate_proj.weight", (48, 32)),
    ("llm/layers/gen/post_norm", "language_model.model.layers.1.post_attention_layernorm_moe_gen.weight",
     (32,)),
    ("llm/norm_gen", "language_model.model.norm_moe_gen.weight", (32,)),
    ("vit/patch_kernel", "vit_model.vision_model.embeddings.patch_embedding.weight", (16, 48)),
    ("vit/position", "vit_model.vision_model.embeddings.position_embedding.weight", (36, 16)),
    ("vit/layers/o_kernel", "vit_model.vision_model.encoder.layers.1.self_attn.out_proj.weight", (16, 16)),
    ("vit/layers/norm2_scale", "vit_model.vision_model.encoder.layers.1.layer_norm2.weight", (16,)),
    ("vit/post_norm_bias", "vit_model.vision_model.post_layernorm.bias", (16,)),
    ("connector/fc1_kernel", "connector.fc1.weight", (32, 16)),
    ("connector/position_table", "vit_pos_embed.pos_embed", (36, 32))])
def test_names_and_shapes_of_the_release(path, name, shape):
    leaf = params_lib.flatten(abstract(BOTH))[path]
    values = np.arange(np.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape)
    tensor = params_lib.to_checkpoint(path, values)[name]
    assert tensor.shape == shape
    ours = values[1] if params_lib.fact(path).stacked else values  # the last of two layers
    np.testing.assert_array_equal(tensor, ours.T if params_lib.fact(path).transpose else ours)


def test_checkpoint_round_trip():
    params, names = params_lib.flatten(tiny.params(BOTH)), set()
    for path, array in params.items():
        tensors = params_lib.to_checkpoint(path, np.asarray(array))
        assert not names & tensors.keys()
        names |= tensors.keys()
        np.testing.assert_array_equal(params_lib.from_checkpoint(path, list(tensors.values())), array)
    stacked = sum(row.stacked for row in params_lib.TABLE.values())
    assert len(names) == len(params) + stacked  # two layers each


@pytest.mark.parametrize("freeze", [(), ("vit",), ("embed", "und", "vit")])
def test_partition_and_merge(freeze):
    params = tiny.params(BOTH)
    trainable, frozen = params_lib.partition(params, freeze)
    held, trained = params_lib.flatten(frozen), params_lib.flatten(trainable)
    groups = lambda flat: {params_lib.fact(path).group for path in flat}
    assert groups(held) == {"gen", "fixed", *freeze}
    assert groups(trained) == {"embed", "und", "vit", "connector"} - set(freeze)
    assert held.keys() | trained.keys() == params_lib.TABLE.keys() and not held.keys() & trained.keys()
    whole = params_lib.merge(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params)))


def test_wrong_groups_are_refused():
    params = abstract(tiny.MODEL)
    with pytest.raises(ValueError, match=r"unknown parameter groups \['llm'\]: choose from \('embed', 'und'"):
        params_lib.partition(params, ("vit", "llm"))
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        params_lib.partition(params, ("embed", "und", "vit", "connector"))


def test_flatten_and_unflatten():
    tree = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    assert params_lib.flatten(tree) == {"a/b/c": 1, "a/b/d": 2, "e": 3}
    assert params_lib.unflatten(params_lib.flatten(tree)) == tree


def test_counts_of_the_released_size():
    """By hand from the shapes of BAGEL-7B-MoT: 14.6 billion, 8.1 of them without the generation expert."""
    d, kv, mlp, layers = 3584, 4 * 128, 18944, 28
    attention = 2 * d * d + d + 2 * (d * kv + kv)  # q and o, bias of q, k and v with biases
    expert = layers * (attention + 3 * d * mlp + 2 * d + 2 * 128) + d  # norms of layer and heads; last norm
    e, f = 1152, 4304
    vit_layer = 4 * (e * e + e) + e * f + f + f * e + e + 4 * e
    expected = {
        "embed": 2 * 152064 * d,
        "und": expert,
        "gen": expert,
        "vit": 14 * 14 * 3 * e + e + 70 * 70 * e + 26 * vit_layer + 2 * e,
        "connector": e * d + d + d * d + d,
        "fixed": 70 * 70 * d,
    }
    expected["total"] = sum(expected.values())
    assert params_lib.count(abstract(SEVEN_B)) == expected
    billions = {name: round(n / 1e9, 3) for name, n in expected.items()}
    assert billions == {"embed": 1.09, "und": 6.526, "gen": 6.526, "vit": 0.403, "connector": 0.017,
                        "fixed": 0.018, "total": 14.578}
    counts = params_lib.count(abstract(dataclasses.replace(SEVEN_B, generation=False)))
    assert counts == {name: n for name, n in expected.items() if name != "gen"} | {
        "total": expected["total"] - expected["gen"]}


def test_initialisation():
    """Norms constant, biases 0, matrices by their fan-in, the position table's halves where they belong."""
    matrices = ("llm/layers/und/gate_kernel", "llm/layers/und/q_kernel")
    cheap = ("bias", "norm", "scale", "position_table", *matrices)  # all random draws take seconds to compile

    @jax.jit
    def init(key):
        leaves = params_lib.flatten(bagel.init(key, config=tiny.MODEL))
        return {path: leaf for path, leaf in leaves.items() if path.endswith(cheap)}

    params = init(jax.random.key(0))
    assert len(params) > 20
    for path, leaf in params.items():
        assert leaf.dtype == jnp.float32
        if path.endswith("bias"):
            assert not leaf.any()
        elif "norm" in path:  # gains
            assert (leaf == leaf.ravel()[0]).all() and leaf.ravel()[0] >= 1
    gate, layers = (params[path] for path in matrices)
    assert abs(float(gate.std()) * 32 ** 0.5 - 1) < 0.05
    assert (layers[0] != layers[1]).mean() > 0.99
    table = np.asarray(params["connector/position_table"]).reshape(6, 6, 32)
    row, column = table[:, 0], table[0]
    np.testing.assert_allclose(table[:, 3, 16:], row[:, 16:])  # the second half holds the row
    np.testing.assert_allclose(table[4, :, :16], column[:, :16])  # the first half the column
    angles = np.arange(6)[:, None] * 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(column[:, :8], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(row[:, 24:], np.cos(angles), atol=1e-6)
