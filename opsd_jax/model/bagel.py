"""The door of the network: pure functions of one plain parameter dict {"llm", "vit", "connector"}, and where the
model draws, {"latent", "vae"} beside them.

Letters: B batch, T slots, P patches, G latent tokens, C values of one, D hidden, V vocabulary, L layers, S cache
slots, K kv heads, h head_dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opsd_jax import images
from opsd_jax.model import attention, mot, siglip, vae
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
    """Fresh float32 parameters. Under `jax.eval_shape` this is the abstract tree of the model.

    Linear layers draw N(0, 1/fan_in) truncated, those that write to the decoder's residual stream divided by twice
    the number of layers, tables N(0, 1/width); norms are 1, biases 0.
    """
    c = dataclasses.replace(
        config, attention="dense"
    )  # the same parameters, and no kernel for two slots
    keys = jax.random.split(key, 6)
    ids = jnp.zeros((1, 1), jnp.int32)
    # an expert has parameters only once it is used, so the decoder sees one slot of each kind
    slots = 2 if c.generation else 1
    two = jnp.zeros((1, slots), jnp.int32)
    mask = attention.Mask(*jnp.ones((3, 1, slots), jnp.int32))
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
    """What the context's patches become in the decoder's sequence: [B, P, D] (ViT, connector, 2-D positions)."""
    patches = images.normalize(context.patches).astype(config.dtype)
    x = _vit(config).apply(
        {"params": params["vit"]}, patches, context.patch_positions, context.patch_image
    )
    return _connector(config).apply({"params": params["connector"]}, x, context.patch_positions)


def embed_tokens(params, tokens, *, config: ModelConfig):
    """int32 [B, T] -> [B, T, D] in the compute dtype."""
    return params["llm"]["embed"][tokens].astype(config.dtype)


def embed(params, context, *, config: ModelConfig, latents=None, times=None):
    """What stands in the decoder's sequence: [B, T, D], or [B, T + G, D] where the context holds latents.

    Token embeddings with the encoded patches put at their slots. Patches are scattered to slots rather than gathered
    by slot, so that the backward pass is a plain gather; the slot of a padding patch is T, which drops it.

    latents, times: float32 [B, G, C], [B, G]: noisy latent tokens and their flow times in place of the context's
    clean ones (time 0).
    """
    x = embed_tokens(params, context.tokens, config=config)
    if context.patches.shape[1]:
        images = encode_images(params, context, config=config)
        rows = jnp.arange(x.shape[0])[:, None]
        x = x.at[rows, context.patch_slots].set(images, mode="drop")
    if context.latents is None:
        return x
    latents = context.latents.tokens if latents is None else latents
    times = jnp.zeros((1, 1)) if times is None else times
    x = [x, embed_latents(params, latents, times, context.latents.positions, config=config)]
    return jnp.concatenate(x, axis=1)


@jax.named_scope("latent")
def embed_latents(params, tokens, times, positions, *, config: ModelConfig):
    """Noisy latent tokens float32 [B, G, C] at flow times [B, G] (or [B, 1], [1, 1]), with their ids in the position
    table int32 [B, G] -> [B, G, D]."""
    return _latent(config).apply(
        {"params": params["latent"]}, tokens.astype(config.dtype), times, positions
    )


@jax.named_scope("velocity")
def velocity(params, hidden, *, config: ModelConfig):
    """hidden [..., D] at latent slots -> predicted velocity float32 [..., C] (noise - data)."""
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
    """Decoder over embedded slots.

    Args:
      x: [B, T, D]. positions, limit, segment: int32 [B, T] (see `attention.visible`); [B, 1] where all are alike.
      cache: {"k", "v"} [L, B, S, K, h] or None; new keys go to slots offset..offset+T. limit then counts cache
        slots and `key_segment` int32 [B, S] must be given.
      order: int32 [B, S] places of the keys in the sequence, None where slot j is at place j. noised: int32 [B, T],
        see `attention.visible` (only without a cache).
      latents: how many of the T slots, the last ones, are VAE latents.
    Returns:
      (hidden [B, T, D] after the final norm, cache).
    """
    mask = attention.Mask(
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
    """How much groups of slots attend to groups of slots in each layer, as `forward` over the same slots does it.

    Args:
      x, positions, limit, segment: as in `forward`. queries, keys: int32 [B, T], number of the group that a slot is in
        as query and as key, 1..num_queries and 1..num_keys; 0 for none.
      scaled: False leaves 1 / sqrt(h) out of the softmax that is recorded (not out of the one that acts), as the
        official recorder does (modeling/bagel/qwen2_navit.py).
    Returns:
      float32 [L, B, num_queries, num_keys]: attention weights averaged over heads, added up over both groups.
    """
    groups = attention.Groups(
        jax.nn.one_hot(queries - 1, num_queries),
        jax.nn.one_hot(keys - 1, num_keys),
        jnp.float32(config.llm.head_dim**-0.5 if scaled else 1),
    )
    mask = attention.Mask(limit, segment, segment)
    _, _, shares = _decoder(config).apply(
        {"params": params["llm"]}, x, positions, mask, groups=groups
    )
    return shares


def read(
    params, context, *, config: ModelConfig, cache=None, key_segment=None, latents=None, times=None
):
    """`forward` over a whole context (with what it holds of latents): (hidden [B, T + G, D], cache).

    cache, key_segment: as in `forward`, with room for more than the context. latents, times: as in `embed`.
    """
    x = embed(params, context, config=config, latents=latents, times=times)
    found = context.latents
    if found is None:
        extra = {}
    else:
        slots = x.shape[1] if cache is None else key_segment.shape[1]
        extra = {
            "order": behind(found.order, slots),
            "noised": found.noised if cache is None else None,
            "latents": found.tokens.shape[1],
        }
    return forward(
        params,
        x,
        context.positions,
        context.limit,
        context.segment,
        config=config,
        cache=cache,
        key_segment=key_segment,
        **extra,
    )


def behind(order, slots: int):
    """int32 [B, T] places of a context's slots -> [B, slots]: further slots follow one after another."""
    batch, used = order.shape
    more = jnp.broadcast_to(jnp.arange(used, slots, dtype=order.dtype), (batch, slots - used))
    return jnp.concatenate([order, more], axis=1)


def init_cache(batch: int, slots: int, *, config: ModelConfig):
    """Empty key and value cache {"k", "v": [L, B, S, K, h]} in the compute dtype."""
    c = config.llm
    shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


@jax.named_scope("head")
def logits(params, hidden):
    """hidden [..., D] -> float32 logits [..., V]."""
    return mot.dense(hidden, params["llm"]["head"]).astype(jnp.float32)


@jax.named_scope("vae_encoder")
def encode_pixels(params, pixels, *, config: ModelConfig):
    """Pixels float32 [N, H, W, 3] in [-1, 1] -> (mean, log-variance) of their latents, float32 [N, h, w, z] each."""
    moments = _vae(config, vae.Encoder).apply(
        {"params": params["vae"]["encoder"]}, pixels.astype(config.dtype)
    )
    return jnp.split(moments.astype(jnp.float32), 2, axis=-1)


@jax.named_scope("vae_decoder")
def decode_latents(params, latents, *, config: ModelConfig):
    """Latents float32 [N, h, w, z] (scaled and shifted) -> pixels float32 [N, H, W, 3], about [-1, 1], not clipped."""
    c = config.generation.vae
    z = (latents / c.scale + c.shift).astype(config.dtype)
    return (
        _vae(config, vae.Decoder).apply({"params": params["vae"]["decoder"]}, z).astype(jnp.float32)
    )
