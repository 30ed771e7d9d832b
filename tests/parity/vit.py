"""Golden set `vit`: the vision tower, the connector, and the embedding of flow times."""

import functools
import math

import jax
import numpy as np

from opsd_jax.model import bagel, latent, siglip
from parity.inputs import first_layers, image_block, pack
from parity.replay import close, compare, equal, matching, read


def test_vit(goldens, model, tokenizer):
    tensors, settings = read(goldens, "vit", "vit")
    config, params = model
    vit, patch = params["vit"], config.vit.patch_size
    for ours, name in (
        (patch, "patch_size"),
        (config.vit.side, "max_num_patch_per_side"),
        (config.vit.num_layers, "layers_used"),
        (config.vit.layer_norm_eps, "layer_norm_eps"),
    ):
        assert ours == settings[name], name
    blocks = [
        image_block(pixels, patch)
        for _, pixels in sorted(
            matching(tensors, r"image(\d+)"), key=lambda found: int(found[0][1])
        )
    ]
    assert [list(b.grid) for b in blocks] == [
        [h // patch, w // patch] for h, w in settings["image_sizes_hw"]
    ]
    packed = pack([blocks], tokenizer, config)
    lengths = tensors["vit_token_seqlens"]
    n = lengths.sum()
    equal(np.bincount(packed.patch_image[0])[1:], lengths)
    equal(np.concatenate([[0], np.cumsum(lengths)]), tensors["cu_seqlens"])
    compare(equal, packed.patches[0, :n], tensors, "packed_vit_tokens")
    equal(packed.patch_table_ids[0, :n], tensors["packed_vit_position_ids"])

    @functools.partial(jax.jit, static_argnames="config")
    def encode(params, *, config):
        return siglip.Encoder(config.vit).apply(
            {"params": params["vit"]}, packed.patches, packed.patch_table_ids, packed.patch_image
        )[0, :n]

    def post_norm(x):
        return siglip.layer_norm(
            x, vit["post_norm_scale"], vit["post_norm_bias"], config.vit.layer_norm_eps
        )

    layers = matching(tensors, r"hidden\.layer(\d+)")
    assert len(layers) == config.vit.num_layers
    for match, hidden in layers:
        shorter, cut = first_layers(config, params, "vit", int(match[1]) + 1)
        close(encode(cut, config=shorter), post_norm(hidden), match[0])
    close(
        packed.patches[0, :n] @ vit["patch_kernel"]
        + vit["patch_bias"]
        + vit["position"][tensors["packed_vit_position_ids"]],
        tensors["hidden.embeddings"],
    )
    close(encode(params, config=config), tensors["vit_out"])
    llm_input = jax.jit(functools.partial(bagel.encode_images, config=config))(params, packed)[
        0, :n
    ]
    close(llm_input, tensors["llm_input"])
    close(llm_input - tensors["pos_embed"], tensors["connector_out"])


def test_time_embedding(goldens, whole_model):
    """The sinusoid of flow times, and what the latent path makes of it."""
    tensors, _ = read(goldens, "vit", "vit")
    config, params = whole_model
    times, ours = tensors["time_embed_t"], params["latent"]
    close(jax.jit(latent.sinusoid)(times), tensors["time_embed_sinusoid"])
    zeros = np.zeros((1, len(times), config.generation.latent_dim), np.float32)
    whole = jax.jit(functools.partial(bagel.embed_latents, config=config))(
        params, zeros, times[None], np.zeros((1, len(times)), np.int32)
    )[0]
    close(whole - ours["in_bias"] - ours["position_table"][0], tensors["time_embed_out"])


def test_position_tables(goldens, whole_model):
    """The fixed 2-D tables of the checkpoint can be made afresh, for any side."""
    tensors, _ = read(goldens, "vit", "vit")
    for part, name in (("connector", "vit"), ("latent", "latent")):
        table = whole_model[1][part]["position_table"]
        compare(equal, table, tensors, f"{name}_pos_embed_table")
        ours = siglip.sincos_table(math.isqrt(len(table)), table.shape[1])
        np.testing.assert_allclose(ours, table, atol=1e-6, err_msg=name)
