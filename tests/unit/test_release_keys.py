"""The key table of released checkpoints against the model and the table of parameter facts."""

import functools

import jax
import numpy as np
import pytest

import tiny
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.release import bagel_keys

BOTH = tiny.DRAWING


def abstract(config):
    return jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))


def test_every_parameter_has_a_key_and_every_key_a_parameter():
    leaves = params_lib.flatten(abstract(BOTH))
    in_vae = {path for path in leaves if path.startswith("vae/")}
    assert bagel_keys.TABLE.keys() == leaves.keys() - in_vae
    assert bagel_keys.TABLE.keys() <= params_lib.TABLE.keys()
    for path in leaves:
        key, fact = bagel_keys.key(path), params_lib.fact(path)
        assert key.stacked == fact.stacked
        assert (key.file == "ae") == (fact.group == "vae") and key.file in ("model", "ae")
        matrix = path.endswith("kernel") or path == "llm/head"
        in_vae = fact.group == "vae"
        assert key.order == ((2, 3, 1, 0) if matrix and in_vae else (1, 0) if matrix else None)
    assert len({bagel_keys.key(path).template for path in leaves}) == len(leaves)
    with pytest.raises(KeyError, match="'llm/bias' has no key in opsd_jax/release/bagel_keys.py"):
        bagel_keys.key("llm/bias")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "shape"),
    [
        ("llm/embed", "language_model.model.embed_tokens.weight", (264, 32)),
        ("llm/head", "language_model.lm_head.weight", (264, 32)),
        ("llm/layers/und/q_bias", "language_model.model.layers.1.self_attn.q_proj.bias", (32,)),
        (
            "llm/layers/und/k_kernel",
            "language_model.model.layers.1.self_attn.k_proj.weight",
            (16, 32),
        ),
        (
            "llm/layers/gen/o_kernel",
            "language_model.model.layers.1.self_attn.o_proj_moe_gen.weight",
            (32, 32),
        ),
        (
            "llm/layers/gen/q_norm",
            "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight",
            (8,),
        ),
        (
            "llm/layers/und/down_kernel",
            "language_model.model.layers.1.mlp.down_proj.weight",
            (32, 48),
        ),
        (
            "llm/layers/gen/gate_kernel",
            "language_model.model.layers.1.mlp_moe_gen.gate_proj.weight",
            (48, 32),
        ),
        (
            "llm/layers/gen/post_norm",
            "language_model.model.layers.1.post_attention_layernorm_moe_gen.weight",
            (32,),
        ),
        ("llm/norm_gen", "language_model.model.norm_moe_gen.weight", (32,)),
        ("vit/patch_kernel", "vit_model.vision_model.embeddings.patch_embedding.weight", (16, 48)),
        ("vit/position", "vit_model.vision_model.embeddings.position_embedding.weight", (36, 16)),
        (
            "vit/layers/o_kernel",
            "vit_model.vision_model.encoder.layers.1.self_attn.out_proj.weight",
            (16, 16),
        ),
        (
            "vit/layers/norm2_scale",
            "vit_model.vision_model.encoder.layers.1.layer_norm2.weight",
            (16,),
        ),
        ("vit/post_norm_bias", "vit_model.vision_model.post_layernorm.bias", (16,)),
        ("connector/fc1_kernel", "connector.fc1.weight", (32, 16)),
        ("connector/position_table", "vit_pos_embed.pos_embed", (36, 32)),
        ("latent/time_fc1_kernel", "time_embedder.mlp.0.weight", (32, 256)),
        ("latent/time_fc2_bias", "time_embedder.mlp.2.bias", (32,)),
        ("latent/in_kernel", "vae2llm.weight", (32, 16)),
        ("latent/out_kernel", "llm2vae.weight", (16, 32)),
        ("latent/position_table", "latent_pos_embed.pos_embed", (36, 32)),
        ("vae/encoder/conv_in_kernel", "encoder.conv_in.weight", (32, 3, 3, 3)),
        ("vae/encoder/down_1_block_0/norm2_scale", "encoder.down.1.block.0.norm2.weight", (32,)),
        (
            "vae/encoder/down_2_block_0/conv1_kernel",
            "encoder.down.2.block.0.conv1.weight",
            (64, 32, 3, 3),
        ),
        (
            "vae/encoder/down_2_block_0/nin_shortcut_kernel",
            "encoder.down.2.block.0.nin_shortcut.weight",
            (64, 32, 1, 1),
        ),
        (
            "vae/encoder/down_0_downsample/conv_kernel",
            "encoder.down.0.downsample.conv.weight",
            (32, 32, 3, 3),
        ),
        ("vae/encoder/mid_attn_1/q_kernel", "encoder.mid.attn_1.q.weight", (64, 64, 1, 1)),
        ("vae/encoder/mid_attn_1/norm_bias", "encoder.mid.attn_1.norm.bias", (64,)),
        ("vae/encoder/mid_block_2/conv2_bias", "encoder.mid.block_2.conv2.bias", (64,)),
        ("vae/encoder/norm_out_scale", "encoder.norm_out.weight", (64,)),
        ("vae/encoder/conv_out_kernel", "encoder.conv_out.weight", (8, 64, 3, 3)),
        ("vae/decoder/conv_in_kernel", "decoder.conv_in.weight", (64, 4, 3, 3)),
        (
            "vae/decoder/up_1_block_1/conv1_kernel",
            "decoder.up.1.block.1.conv1.weight",
            (32, 32, 3, 3),
        ),
        ("vae/decoder/up_2_upsample/conv_bias", "decoder.up.2.upsample.conv.bias", (64,)),
        (
            "vae/decoder/mid_attn_1/proj_out_kernel",
            "decoder.mid.attn_1.proj_out.weight",
            (64, 64, 1, 1),
        ),
        ("vae/decoder/conv_out_kernel", "decoder.conv_out.weight", (3, 32, 3, 3)),
    ],
)
def test_names_and_shapes_of_the_release(path, name, shape):
    leaf = params_lib.flatten(abstract(BOTH))[path]
    values = np.arange(np.prod(leaf.shape), dtype=np.float32).reshape(leaf.shape)
    key, tensor = bagel_keys.key(path), tiny.released(path, values)[name]
    ours = values[1] if key.stacked else values  # the last of two layers
    assert tensor.shape == shape == key.tensor_shape(values.shape) == key.stored_order(ours.shape)
    if ours.ndim == 4:  # a convolution
        ours = np.einsum("hwio->oihw", ours)
    elif path.endswith("kernel") or path == "llm/head":
        ours = ours.T
    np.testing.assert_array_equal(tensor, ours)


def test_release_round_trip():
    params, names = params_lib.flatten(tiny.params(BOTH)), set()
    for path, array in params.items():
        key, tensors = bagel_keys.key(path), tiny.released(path, np.asarray(array))
        assert not names & tensors.keys()
        names |= tensors.keys()
        layers = [key.from_release(tensor) for tensor in tensors.values()]
        np.testing.assert_array_equal(np.stack(layers) if key.stacked else layers[0], array)
    stacked = sum(key.stacked for key in bagel_keys.TABLE.values())
    assert len(names) == len(params) + stacked  # two layers each
