"""The door of the network: pure functions of one plain parameter dict {"llm", "vit", "connector"}.

Letters: B batch, T slots, P patches, D hidden, V vocabulary, L layers, S cache slots, K kv heads, h head_dim.
"""

import jax
import jax.numpy as jnp

from opsd_jax.model import attention, mot, siglip
from opsd_jax.model.config import ModelConfig


def _decoder(config):
    return mot.Decoder(config)


def _vit(config):
    return siglip.Encoder(config.vit, config.unroll)


def _connector(config):
    return siglip.Connector(config.llm.hidden_size, config.vit.side)


def init(key, *, config: ModelConfig):
    """Fresh float32 parameters. Under `jax.eval_shape` this is the abstract tree of the model.

    Linear layers draw N(0, 1/fan_in) truncated, those that write to the decoder's residual stream divided by twice
    the number of layers, tables N(0, 1/width); norms are 1, biases 0.
    """
    c = config
    keys = jax.random.split(key, 3)
    ids, yes = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    latent = {"is_latent": yes} if c.generation else {}  # an expert has parameters only once it is used
    variables = {
        "llm": _decoder(c).init(keys[0], jnp.zeros((1, 1, c.llm.hidden_size)), ids, yes[None], **latent),
        "vit": _vit(c).init(keys[1], jnp.zeros((1, 1, c.vit.patch_dim)), ids, ids),
        "connector": _connector(c).init(keys[2], jnp.zeros((1, 1, c.vit.hidden_size)), ids),
    }
    return {name: tree["params"] for name, tree in variables.items()}


def normalize_patches(patches):
    """uint8 patches -> float32 in [-1, 1] ((x / 255 - 0.5) / 0.5); float patches are taken as normalised."""
    if patches.dtype != jnp.uint8:
        return patches
    return (patches.astype(jnp.float32) / 255 - 0.5) / 0.5


def encode_images(params, context, *, config: ModelConfig):
    """What the context's patches become in the decoder's sequence: [B, P, D] (ViT, connector, 2-D positions)."""
    patches = normalize_patches(context.patches).astype(config.dtype)
    x = _vit(config).apply({"params": params["vit"]}, patches, context.patch_positions, context.patch_image)
    return _connector(config).apply({"params": params["connector"]}, x, context.patch_positions)


def embed_tokens(params, tokens, *, config: ModelConfig):
    """int32 [B, T] -> [B, T, D] in the compute dtype."""
    return params["llm"]["embed"][tokens].astype(config.dtype)


def embed(params, context, *, config: ModelConfig):
    """Token embeddings with the encoded patches put at their slots: [B, T, D].

    Patches are scattered to slots rather than gathered by slot, so that the backward pass is a plain gather;
    the slot of a padding patch is T, which drops it.
    """
    x = embed_tokens(params, context.tokens, config=config)
    images = encode_images(params, context, config=config)
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, context.patch_slots].set(images, mode="drop")


def forward(params, x, positions, limit, segment, *, config: ModelConfig, cache=None, offset=0, key_segment=None,
            is_latent=None):
    """Decoder over embedded slots.

    Args:
      x: [B, T, D]. positions, limit, segment: int32 [B, T] (see `attention.visible`).
      cache: {"k", "v"} [L, B, S, K, h] or None; new keys go to slots offset..offset+T. limit then counts cache
        slots and `key_segment` int32 [B, S] must be given.
    Returns:
      (hidden [B, T, D] after the final norm, cache).
    """
    mask = attention.visible(limit, segment, segment if cache is None else key_segment)
    return _decoder(config).apply({"params": params["llm"]}, x, positions, mask, cache, offset, is_latent)


def init_cache(batch: int, slots: int, *, config: ModelConfig):
    """Empty key and value cache {"k", "v": [L, B, S, K, h]} in the compute dtype."""
    c = config.llm
    shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


def logits(params, hidden):
    """hidden [..., D] -> float32 logits [..., V]."""
    return mot.dense(hidden, params["llm"]["head"]).astype(jnp.float32)
