"""Public API of the network: pure functions of a plain dict of parameters.

The dict is {"llm", "vit", "connector"}, and {"latent", "vae"} as well if the model generates
images.

Letters: B batch, T sequence, P patches, G latent tokens, C values of a latent token, D embedding,
V vocabulary, L layers, S columns of the cache, K kv heads, h head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opsd_jax import divergence, images
from opsd_jax.model import attention, masks, mot, siglip, vae
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.latent import LatentPath


def _decoder(config, latents=0):
    return mot.Decoder(config, latents)


def _vit(config):
    return siglip.Encoder(
        config.vit, config.unroll, config.attention, config.remat, config.query_block
    )


def _connector(config):
    return siglip.Connector(config.llm.hidden_size, config.vit.side)


def _latent(config):
    return LatentPath(config.generation, config.llm.hidden_size)


def _vae(config, part):
    return part(config.generation.vae, config.query_block)


def init(key, *, config: ModelConfig):
    """Random float32 parameters. Under `jax.eval_shape` this is the abstract tree of the model.

    Matrices are truncated normal with variance 1 / fan_in, divided by twice the number of layers if
    they write to the decoder's residual stream. Tables are normal with variance 1 / width.
    Norms are 1 and biases 0.

    Args:
      key: a PRNG key.
    """
    # The parameters do not depend on how attention is computed. A kernel is not needed here.
    c = dataclasses.replace(config, attention="dense")
    keys = jax.random.split(key, 6)
    ids = jnp.zeros((1, 1), jnp.int32)
    # An expert gets its parameters when it is used: the input has one position for each expert.
    slots = 2 if c.generation else 1
    two = jnp.zeros((1, slots), jnp.int32)
    mask = masks.Mask(*jnp.ones((3, 1, slots), jnp.int32))
    variables = {
        "llm": _decoder(c, slots - 1).init(
            keys[0], jnp.zeros((1, slots, c.llm.hidden_size)), two, mask
        ),
        "vit": _vit(c).init(keys[1], jnp.zeros((1, 1, c.vit.patch_dim)), ids, ids),
        "connector": _connector(c).init(keys[2], jnp.zeros((1, 1, c.vit.hidden_size)), ids),
    }
    params = {name: tree["params"] for name, tree in variables.items()}
    if c.generation:
        g, v = c.generation, c.generation.vae
        params["latent"] = _latent(c).init(
            keys[3], jnp.zeros((1, 1, g.latent_dim)), jnp.zeros((1, 1)), ids
        )["params"]
        params["vae"] = {
            "encoder": _vae(c, vae.Encoder).init(
                keys[4], jnp.zeros((1, v.downsample, v.downsample, 3))
            )["params"],
            "decoder": _vae(c, vae.Decoder).init(keys[5], jnp.zeros((1, 1, 1, v.z_channels)))[
                "params"
            ],
        }
    return params


@jax.named_scope("vision")
def encode_images(params, context, *, config: ModelConfig):
    """Embeddings of the context's patches for the decoder: [B, P, D].

    Vision tower and connector, which adds the 2-D positions.
    """
    patches = images.normalize(context.patches).astype(config.dtype)
    x = _vit(config).apply(
        {"params": params["vit"]}, patches, context.patch_table_ids, context.patch_image
    )
    return _connector(config).apply({"params": params["connector"]}, x, context.patch_table_ids)


def embed_tokens(params, tokens, *, config: ModelConfig):
    """Embeddings of tokens, int32 [B, T], in the compute dtype: [B, T, D]."""
    return params["llm"]["embed"][tokens].astype(config.dtype)


def embed(params, context, *, config: ModelConfig, latents=None, times=None):
    """The decoder's input for a context: [B, T, D], or [B, T + G, D] if the context has latents.

    These are token embeddings, with the encoded patches at the patches' positions and the latent
    tokens at the end. Patches are scattered, not gathered, so that the backward pass is a plain
    gather. The position of a padding patch is T, which drops it.

    Args:
      context: Context of T positions, P patches and G latent tokens.
      latents, times: float32 [B, G, C] and [B, G], noisy latent tokens and their flow times, which
        replace the context's clean ones (at time 0).
    """
    x = embed_tokens(params, context.tokens, config=config)
    if context.patches.shape[1]:
        encoded = encode_images(params, context, config=config)
        rows = jnp.arange(x.shape[0])[:, None]
        x = x.at[rows, context.patch_positions].set(encoded, mode="drop")
    if context.latents is None:
        return x
    latents = context.latents.tokens if latents is None else latents
    times = jnp.zeros((1, 1)) if times is None else times
    x = [x, embed_latents(params, latents, times, context.latents.table_ids, config=config)]
    return jnp.concatenate(x, axis=1)


@jax.named_scope("latent")
def embed_latents(params, tokens, times, positions, *, config: ModelConfig):
    """Embeddings of noisy latent tokens for the decoder: [B, G, D].

    Args:
      tokens: float32 [B, G, C]. times: float32 [B, G], [B, 1] or [1, 1], flow times in [0, 1].
      positions: int32 [B, G], indices in the position table.
    """
    return _latent(config).apply(
        {"params": params["latent"]}, tokens.astype(config.dtype), times, positions
    )


@jax.named_scope("velocity")
def velocity(params, hidden, *, config: ModelConfig):
    """hidden [..., D] of latent tokens -> predicted velocity (noise - data), float32 [..., C]."""
    return _latent(config).apply({"params": params["latent"]}, hidden, method="velocity")


@jax.named_scope("decoder")
def forward(
    params,
    x,
    positions,
    limit,
    segment,
    *,
    config: ModelConfig,
    cache=None,
    offset=0,
    key_segment=None,
    order=None,
    noised=None,
    latents: int = 0,
):
    """The decoder on embedded positions.

    Args:
      x: [B, T, D]. positions: int32 [B, T], rope positions.
      limit, segment: int32 [B, T], see `masks.Mask`; [B, 1] if equal for all T.
      cache: {"k", "v": [L, B, S, K, h]} or None. New keys are written at columns
        offset .. offset + T - 1. limit then counts columns, and key_segment must be given.
      key_segment: int32 [B, S], segments of the cache's columns.
      order: int32 [B, S], place of each key in the sequence; None if key j has place j.
      noised: int32 [B, T], see `masks.Mask`; only without a cache.
      latents: number of latent tokens, which are the last of the T positions.
    Returns:
      (hidden [B, T, D] after the final norm, cache).
    Raises:
      ValueError: `latents` is given, but the model has no generation expert.
    """
    mask = masks.Mask(
        limit, segment, segment if cache is None else key_segment, order, noised, noised
    )
    return _decoder(config, latents).apply(
        {"params": params["llm"]}, x, positions, mask, cache, offset
    )


def attention_shares(
    params,
    x,
    positions,
    limit,
    segment,
    queries,
    keys,
    *,
    num_queries: int,
    num_keys: int,
    config: ModelConfig,
    scaled: bool = True,
):
    """How much groups of positions attend to groups of positions in each layer of `forward`.

    Args:
      x, positions, limit, segment: as in `forward`.
      queries, keys: int32 [B, T], the group of each position as a query, 1 .. num_queries, and as a
        key, 1 .. num_keys; 0 for none.
      scaled: False leaves 1 / sqrt(h) out of the softmax that is recorded (not out of the one that
        the decoder uses), as the official recorder does (modeling/bagel/qwen2_navit.py).
    Returns:
      float32 [L, B, num_queries, num_keys]: attention weights, averaged over heads, summed over the
      positions of both groups.
    """
    groups = attention.Groups(
        jax.nn.one_hot(queries - 1, num_queries),
        jax.nn.one_hot(keys - 1, num_keys),
        jnp.float32(config.llm.head_dim**-0.5 if scaled else 1),
    )
    mask = masks.Mask(limit, segment, segment)
    _, _, shares = _decoder(config).apply(
        {"params": params["llm"]}, x, positions, mask, groups=groups
    )
    return shares


def read(
    params, context, *, config: ModelConfig, cache=None, key_segment=None, latents=None, times=None
):
    """`forward` on a whole context, with its latents if it has any.

    Args:
      context: Context of T positions and G latent tokens (G = 0 without latents).
      cache, key_segment: as in `forward`; the cache may have more columns than the context needs.
      latents, times: as in `embed`.
    Returns:
      (hidden [B, T + G, D], cache).
    """
    x = embed(params, context, config=config, latents=latents, times=times)
    found = context.latents
    if found is None:
        extra = {}
    else:
        slots = x.shape[1] if cache is None else key_segment.shape[1]
        extra = {
            "order": extend_order(found.order, slots),
            "noised": found.noised if cache is None else None,
            "latents": found.tokens.shape[1],
        }
    return forward(
        params,
        x,
        context.rope_positions,
        context.limit,
        context.segment,
        config=config,
        cache=cache,
        key_segment=key_segment,
        **extra,
    )


def extend_order(order, slots: int):
    """Places in the sequence of a context's positions, int32 [B, T], extended to [B, slots].

    Each further position j has place j.
    """
    batch, used = order.shape
    more = jnp.broadcast_to(jnp.arange(used, slots, dtype=order.dtype), (batch, slots - used))
    return jnp.concatenate([order, more], axis=1)


def init_cache(batch: int, slots: int, *, config: ModelConfig):
    """Cache of zeros, {"k", "v": [L, B, S, K, h]} in the compute dtype. slots: S, its columns."""
    c = config.llm
    shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


@jax.named_scope("head")
def logits(params, hidden):
    """Hidden states [..., D] -> float32 logits [..., V]."""
    return divergence.project(hidden, params["llm"]["head"])


@jax.named_scope("vae_encoder")
def encode_pixels(params, pixels, *, config: ModelConfig):
    """Mean and log-variance of images' latents, before scale and shift: float32 [N, h, w, z] each.

    pixels: float32 [N, H, W, 3] in [-1, 1].
    """
    moments = _vae(config, vae.Encoder).apply(
        {"params": params["vae"]["encoder"]}, pixels.astype(config.dtype)
    )
    return jnp.split(moments.astype(jnp.float32), 2, axis=-1)


@jax.named_scope("vae_decoder")
def decode_latents(params, latents, *, config: ModelConfig):
    """Pixels of latents: float32 [N, H, W, 3], about in [-1, 1], not clipped.

    latents: float32 [N, h, w, z], scaled and shifted (see `VAEConfig`).
    """
    c = config.generation.vae
    z = (latents / c.scale + c.shift).astype(config.dtype)
    return (
        _vae(config, vae.Decoder).apply({"params": params["vae"]["decoder"]}, z).astype(jnp.float32)
    )
