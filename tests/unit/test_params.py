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
from opsd_jax.model.config import GenerationConfig, LLMConfig, ModelConfig, ViTConfig

BOTH = tiny.DRAWING
# every bias that a decoder of another family can have
BIASED = dataclasses.replace(
    tiny.MODEL, llm=dataclasses.replace(tiny.MODEL.llm, output_bias=True, mlp_bias=True)
)
SEVEN_B = ModelConfig(
    llm=LLMConfig(
        vocab_size=152064,
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        intermediate_size=18944,
    ),
    vit=ViTConfig(hidden_size=1152, num_layers=26, num_heads=16, intermediate_size=4304),
    generation=GenerationConfig(),
    dtype="float32",
    remat="none",
    query_block=0,
)


def abstract(config):
    return jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))


def test_every_parameter_has_a_row_and_every_row_a_parameter():
    leaves = params_lib.flatten(abstract(BOTH))
    in_vae = {path for path in leaves if path.startswith("vae/")}
    own = params_lib.flatten(abstract(BIASED))
    assert own.keys() - leaves.keys() == {
        f"llm/layers/und/{name}_bias" for name in ("o", "gate", "up", "down")
    }
    of_qwen = {}
    for model in tiny.QWEN.values():
        of_qwen |= params_lib.flatten(abstract(model))
    leaves |= own | {path: leaf for path, leaf in of_qwen.items() if path not in leaves}
    assert leaves.keys() - in_vae == params_lib.TABLE.keys() and len(in_vae) > 80
    for path, leaf in leaves.items():
        row = params_lib.fact(path)
        assert row.path == path and len(row.axes) == leaf.ndim and row.group in params_lib.GROUPS
        of_layers = "/layers/" in path or "/deepstack/" in path
        assert row.stacked == of_layers == (row.axes[0] == "layers")
        assert (row.group == "vae") == (path in in_vae)
        assert leaf.shape[0] in (2, 3) or not row.stacked
    without = params_lib.flatten(abstract(tiny.MODEL))
    assert without.keys() == {
        path
        for path, row in params_lib.TABLE.items()
        if row.group not in ("gen", "latent", "vae") and not path.startswith("latent/")
    } - ((own.keys() | of_qwen.keys()) - params_lib.flatten(abstract(BOTH)).keys())
    assert params_lib.fact("latent/position_table").group == "fixed"
    for wrong in (
        "llm/bias",
        "vae/encoder/down_0_block_1/conv1",
        "vae/conv_in_kernel",
        "vae/encoder/conv_in_kernels",
    ):
        assert params_lib.find(wrong) is None
        with pytest.raises(KeyError, match=f"'{wrong}' has no row in opsd_jax/params.py"):
            params_lib.fact(wrong)


@pytest.mark.parametrize("drawing", [False, True])
@pytest.mark.parametrize("freeze", [(), ("vit",), ("embed", "und", "vit")])
def test_partition_and_merge(freeze, drawing):
    """The image-generation path is trained where images are generated; the autoencoder and the
    position tables are never trained.
    """
    params = tiny.params(BOTH)
    trainable, frozen = params_lib.partition(params, freeze, generation=drawing)
    held, trained = params_lib.flatten(frozen), params_lib.flatten(trainable)

    def groups(flat):
        return {params_lib.fact(path).group for path in flat}

    draws = {"gen", "latent"}
    assert groups(held) == {"fixed", "vae", *freeze} | (set() if drawing else draws)
    assert groups(trained) == {"embed", "und", "vit", "connector"} - set(freeze) | (
        draws if drawing else set()
    )
    assert (
        held.keys() | trained.keys() == params_lib.flatten(params).keys()
        and not held.keys() & trained.keys()
    )
    whole = params_lib.merge(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params)))


def test_wrong_groups_are_refused():
    params = abstract(tiny.MODEL)
    with pytest.raises(
        ValueError, match=r"unknown parameter groups \['llm'\]: choose from embed, und"
    ):
        params_lib.partition(params, ("vit", "llm"))
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        params_lib.partition(params, ("embed", "und", "vit", "connector"))
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        params_lib.partition(
            abstract(BOTH), ("embed", "und", "vit", "connector", "latent", "gen"), generation=True
        )


def test_flatten_and_unflatten():
    tree = {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    assert params_lib.flatten(tree) == {"a/b/c": 1, "a/b/d": 2, "e": 3}
    assert params_lib.unflatten(params_lib.flatten(tree)) == tree


def test_int8_rounds_each_output_by_its_own_scale():
    params = tiny.params()
    rounded = params_lib.flatten(params_lib.for_sampling(params, "float32", int8=True))
    before = params_lib.flatten(params)
    matrices = {
        path for path in before if path.startswith("llm/layers/und/") and path.endswith("_kernel")
    } | {"llm/head"}
    assert len(matrices) == 8
    for path in matrices:
        values, scale = rounded[path], rounded[path.removesuffix("_kernel") + "_scale"]
        assert values.dtype == jnp.int8 and scale.dtype == jnp.float32
        column = np.abs(before[path]).max(axis=-2)
        np.testing.assert_allclose(scale, column / 127, rtol=1e-6)
        assert (np.abs(values).max(axis=-2) == 127).all()
        error = np.abs(values * np.asarray(scale)[..., None, :] - before[path])
        assert (error <= 0.5001 * np.asarray(scale)[..., None, :]).all()
        fact = params_lib.fact(path.removesuffix("_kernel") + "_scale")
        axes = params_lib.fact(path).axes
        assert fact.axes == (*axes[:-2], axes[-1]) and len(fact.axes) == scale.ndim
    others = before.keys() - matrices
    assert others < rounded.keys() and len(rounded) == len(before) + len(matrices)
    for path in others:
        np.testing.assert_array_equal(rounded[path], before[path])


def test_counts_of_the_released_size():
    """By hand from the shapes of BAGEL-7B-MoT: 14.7 billion, 8.1 of them without the
    image-generation path.
    """
    d, kv, mlp, layers = 3584, 4 * 128, 18944, 28
    attention = 2 * d * d + d + 2 * (d * kv + kv)  # q and o, bias of q, k and v with biases
    expert = (
        layers * (attention + 3 * d * mlp + 2 * d + 2 * 128) + d
    )  # norms of layer and heads; last norm
    e, f = 1152, 4304
    vit_layer = 4 * (e * e + e) + e * f + f + f * e + e + 4 * e
    expected = {
        "embed": 2 * 152064 * d,
        "und": expert,
        "gen": expert,
        "vit": 14 * 14 * 3 * e + e + 70 * 70 * e + 26 * vit_layer + 2 * e,
        "connector": e * d + d + d * d + d,
        "latent": 256 * d + d + d * d + d + 64 * d + d + d * 64 + 64,  # two time layers, in, out
        "vae": 34_274_208 + 49_545_475,
        "fixed": (70 * 70 + 64 * 64) * d,
    }
    expected["total"] = sum(expected.values())
    found = params_lib.count(abstract(SEVEN_B))
    print("\n" + "\n".join(f"{name:10}{n:16,}" for name, n in found.items()))
    assert found == expected
    billions = {name: round(n / 1e9, 3) for name, n in expected.items()}
    assert billions == {
        "embed": 1.09,
        "und": 6.526,
        "gen": 6.526,
        "vit": 0.403,
        "connector": 0.017,
        "latent": 0.014,
        "vae": 0.084,
        "fixed": 0.032,
        "total": 14.691,
    }
    draws = {"gen": 0, "latent": 0, "vae": 0, "fixed": 70 * 70 * d}
    counts = {name: n for name, n in (expected | draws).items() if n and name != "total"}
    assert params_lib.count(abstract(dataclasses.replace(SEVEN_B, generation=None))) == counts | {
        "total": sum(counts.values())
    }


def test_counts_of_the_autoencoder():
    """By hand, layer by layer: 83.8 million parameters with channels of 128 (1, 2, 4, 4) and 16
    latent channels.
    """

    def conv(into, out, size=3):
        return size * size * into * out + out

    def block(into, out):
        return (
            2 * into
            + conv(into, out)
            + 2 * out
            + conv(out, out)
            + (conv(into, out, 1) if into != out else 0)
        )

    attention = 2 * 512 + 4 * conv(512, 512, 1)
    middle = 2 * block(512, 512) + attention
    encoder = {
        "in": conv(3, 128),
        "128": 2 * block(128, 128) + conv(128, 128),
        "256": block(128, 256) + block(256, 256) + conv(256, 256),
        "512": block(256, 512) + block(512, 512) + conv(512, 512),
        "last": 2 * block(512, 512),
        "middle": middle,
        "out": 2 * 512 + conv(512, 2 * 16),
    }
    decoder = {
        "in": conv(16, 512),
        "middle": middle,
        "first": 3 * block(512, 512) + conv(512, 512),
        "512": 3 * block(512, 512) + conv(512, 512),
        "256": block(512, 256) + 2 * block(256, 256) + conv(256, 256),
        "128": block(256, 128) + 2 * block(128, 128),
        "out": 2 * 128 + conv(128, 3),
    }
    tree = abstract(SEVEN_B)["vae"]
    sizes = {side: sum(leaf.size for leaf in jax.tree.leaves(tree[side])) for side in tree}
    assert sizes == {"encoder": sum(encoder.values()), "decoder": sum(decoder.values())}
    assert (
        sizes == {"encoder": 34_274_208, "decoder": 49_545_475}
        and sum(sizes.values()) == 83_819_683
    )


def test_initialisation():
    """Norms constant, biases 0, matrices by their fan-in, the position table's halves where they
    belong.
    """
    matrices = ("llm/layers/und/gate_kernel", "llm/layers/und/q_kernel")
    cheap = (
        "bias",
        "norm",
        "scale",
        "position_table",
        *matrices,
    )  # all random draws take seconds to compile

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
    assert abs(float(gate.std()) * 32**0.5 - 1) < 0.05
    assert (layers[0] != layers[1]).mean() > 0.99
    table = np.asarray(params["connector/position_table"]).reshape(6, 6, 32)
    row, column = table[:, 0], table[0]
    np.testing.assert_allclose(table[:, 3, 16:], row[:, 16:])  # the second half holds the row
    np.testing.assert_allclose(table[4, :, :16], column[:, :16])  # the first half the column
    angles = np.arange(6)[:, None] * 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(column[:, :8], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(row[:, 24:], np.cos(angles), atol=1e-6)
