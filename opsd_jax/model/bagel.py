"""Public API of the network: pure functions of a plain dict of parameters.

The dict is {"llm", "vit", "connector"}, and {"latent", "vae"} as well if the model generates
images; {"llm"} alone if the model reads text alone.

Letters: B batch, T sequence, P patches, G latent tokens, C values of a latent token, D embedding,
V vocabulary, L layers, S columns of the cache, K kv heads, h head_dim.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8, PRNGKeyArray

from opsd_jax import context as context_lib
from opsd_jax import divergence, images
from opsd_jax.array_types import AnyArray
from opsd_jax.context import Context
from opsd_jax.model import attention, mot, qwen_vision, siglip, vae
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.latent import LatentPath
from opsd_jax.model.masks import Mask
from opsd_jax.model.mot import Cache

_NOWHERE = 2**30  # a position past the end of every sequence
_LARGE, _MOST_PARTS = 2**27, 8  # entries of a head that a CPU multiplies in parts; number of parts


class Embedded(NamedTuple):
    """T embedded positions, as `forward` reads them.

    x: [B, T, D]. positions: int32 [B, T], rope positions; [B, 1] if all are equal.
      [B, T, 3] where they have three dimensions.
    mask: which keys each query attends to. Without a cache the keys are those of the same
      positions. With a cache they are its columns.
    deep: features of images that are added after the first layers; None for none.
    """

    x: AnyArray
    positions: AnyArray
    mask: Mask
    deep: mot.Deep | None = None


def _decoder(config, latents=0):
    return mot.Decoder(config, latents)


def _vit(config):
    tower = qwen_vision if config.has_grids else siglip
    return tower.Encoder(
        config.vit, config.unroll, config.attention, config.remat, config.query_block
    )


def _connector(config):
    if config.has_grids:
        return qwen_vision.Connector(config.vit, config.llm.hidden_size)
    return siglip.Connector(config.llm.hidden_size, config.vit.side)


def _latent(config):
    return LatentPath(config.generation, config.llm.hidden_size)


def _vae(config, part):
    return part(config.generation.vae, config.query_block)


def init(key: PRNGKeyArray, *, config: ModelConfig) -> dict:
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
    experts = 2 if c.generation else 1
    mask = Mask(*jnp.ones((3, 1, experts), jnp.int32))
    variables = {
        "llm": _decoder(c, experts - 1).init(
            keys[0],
            jnp.zeros((1, experts, c.llm.hidden_size)),
            jnp.zeros((1, experts), jnp.int32),
            mask,
        ),
    }
    if c.has_grids:
        count = c.vit.merge**2  # the patches of one merge block
        image = jnp.zeros((1, count), jnp.int32)
        patches = jnp.zeros((1, count, c.vit.patch_dim))
        cells = jnp.zeros((1, count, 4), jnp.int32)
        encoded, variables["vit"] = _vit(c).init_with_output(keys[1], patches, cells, image)
        variables["connector"] = _connector(c).init(keys[2], *encoded)
    elif c.vit:
        patches, features = (jnp.zeros((1, 1, n)) for n in (c.vit.patch_dim, c.vit.hidden_size))
        variables["vit"] = _vit(c).init(keys[1], patches, ids, ids)
        variables["connector"] = _connector(c).init(keys[2], features, ids)
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
def encode_images(params: dict, context: Context, *, config: ModelConfig) -> Float[Array, "B _ D"]:
    """Embeddings of the context's images for the decoder: [B, P, D].

    Vision tower and connector, which adds the 2-D positions or merges patches: [B, P / merge^2, D].
    """
    return _encode(params, context, config)[0]


def _encode(params, context, config):
    """(`encode_images`, features that are added after the decoder's first layers or None)."""
    vit, connector = {"params": params["vit"]}, {"params": params["connector"]}
    if config.has_grids:
        patches = qwen_vision.normalize(context.patches, config.vit).astype(config.dtype)
        encoded = _vit(config).apply(vit, patches, context.patch_cells, context.patch_image)
        return _connector(config).apply(connector, *encoded)
    patches = images.normalize(context.patches).astype(config.dtype)
    x = _vit(config).apply(vit, patches, context.patch_table_ids, context.patch_image)
    return _connector(config).apply(connector, x, context.patch_table_ids), None


def embed_tokens(
    params: dict, tokens: Int[AnyArray, "B T"], *, config: ModelConfig
) -> Float[Array, "B T D"]:
    """Embeddings of tokens, int32 [B, T], in the compute dtype: [B, T, D]."""
    return params["llm"]["embed"][tokens].astype(config.dtype)


def embed(
    params: dict,
    context: Context,
    *,
    config: ModelConfig,
    latents: Float[AnyArray, "B G C"] | None = None,
    times: Float[AnyArray, "B G"] | None = None,
) -> Float[Array, "B _ D"]:
    """The decoder's input for a context: [B, T, D], or [B, T + G, D] if the context has latents.

    These are token embeddings, with the encoded patches at the patches' positions and the latent
    tokens at the end. Patches are scattered, not gathered, so that the backward pass is a plain
    gather. The position of a padding patch is T, which drops it. Features that belong after the
    decoder's first layers are left out: `embed_deep` has them.

    Args:
      context: Context of T positions, P patches and G latent tokens.
      latents, times: float32 [B, G, C] and [B, G], noisy latent tokens and their flow times, which
        replace the context's clean ones (at time 0).
    Raises:
      ValueError: the context has images, and the model has no vision tower.
    """
    return embed_deep(params, context, config=config, latents=latents, times=times)[0]


def embed_deep(
    params: dict,
    context: Context,
    *,
    config: ModelConfig,
    latents: Float[AnyArray, "B G C"] | None = None,
    times: Float[AnyArray, "B G"] | None = None,
) -> tuple[Float[Array, "B _ D"], mot.Deep | None]:
    """(`embed`, features of images that are added after the decoder's first layers).

    The features are None for a model or a context without any. Their padding has no position in a
    longer sequence, either.
    """
    x, deep = embed_tokens(params, context.tokens, config=config), None
    if context.patches.shape[1]:
        if config.vit is None:
            raise ValueError(
                f"the context has {context.patches.shape[1]} patches of images per sequence, but "
                "the model has no vision tower and reads text alone: leave the images out, or use "
                "a model with model.vit.on"
            )
        with jax.named_scope("vision"):
            encoded, features = _encode(params, context, config)
        sequence = jnp.arange(x.shape[0])[:, None]
        positions = context.patch_positions
        if config.vit.merge > 1:
            positions = positions[:, :: config.vit.merge**2]
        x = x.at[sequence, positions].set(encoded, mode="drop")
        if features is not None:
            deep = mot.Deep(features, jnp.where(positions < x.shape[1], positions, _NOWHERE))
    if context.latents is None:
        return x, deep
    latents = context.latents.tokens if latents is None else latents
    times = jnp.zeros((1, 1)) if times is None else times
    more = embed_latents(params, latents, times, context.latents.table_ids, config=config)
    return jnp.concatenate([x, more], axis=1), deep


def embed_with_completion(
    params: dict, context: Context, tokens: Int[AnyArray, "B N"], *, config: ModelConfig
) -> Embedded:
    """A context without latents and a completion after it, T + N positions.

    context: Context of T positions. tokens: int32 [B, N], the completion.
    """
    first, deep = embed_deep(params, context, config=config)
    parts = [first, embed_tokens(params, tokens, config=config)]
    vectors = zip(
        (context.rope_positions, context.limit, context.segment),
        context_lib.following(context, tokens.shape[1]),
    )
    x = jnp.concatenate(parts, axis=1)
    positions, limit, segment = (jnp.concatenate(pair, axis=1) for pair in vectors)
    return Embedded(x, positions, Mask(limit, segment, segment), deep)


@jax.named_scope("latent")
def embed_latents(
    params: dict,
    tokens: Float[AnyArray, "B G C"],
    times: Float[AnyArray, "_ _"],
    table_ids: Int[AnyArray, "B G"],
    *,
    config: ModelConfig,
) -> Float[Array, "B G D"]:
    """Embeddings of noisy latent tokens for the decoder: [B, G, D].

    Args:
      tokens: float32 [B, G, C]. times: float32 [B, G], [B, 1] or [1, 1], flow times in [0, 1].
      table_ids: int32 [B, G], indices in the position table.
    """
    return _latent(config).apply(
        {"params": params["latent"]}, tokens.astype(config.dtype), times, table_ids
    )


@jax.named_scope("velocity")
def velocity(
    params: dict, hidden: Float[AnyArray, "*any D"], *, config: ModelConfig
) -> Float32[Array, "*any C"]:
    """Predicted velocity (noise - data) of the hidden states of latent tokens."""
    return _latent(config).apply({"params": params["latent"]}, hidden, method="velocity")


@jax.named_scope("decoder")
def forward(
    params: dict,
    inputs: Embedded,
    *,
    config: ModelConfig,
    cache: Cache | None = None,
    offset: Int[AnyArray, ""] | int = 0,
    latents: int = 0,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """The decoder on T embedded positions.

    Args:
      cache: keys and values. New ones are written at columns offset .. offset + T - 1.
      latents: number of latent tokens, which are the last of the T positions.
    Returns:
      (hidden [B, T, D] after the final norm, cache).
    Raises:
      ValueError: `latents` is given, but the model has no generation expert.
    """
    return _decoder(config, latents).apply({"params": params["llm"]}, *inputs, cache, offset)


def attention_shares(
    params: dict,
    inputs: Embedded,
    groups: attention.Groups,
    *,
    config: ModelConfig,
) -> Float32[Array, "L B M N"]:
    """How much groups of positions attend to groups of positions in each layer of `forward`.

    Args:
      groups: M groups of queries and N groups of keys. The scale of their scores does not change
        the attention that the decoder uses.
    Returns:
      float32 [L, B, M, N]: attention weights, averaged over heads, summed over the positions of
      both groups.
    """
    _, _, shares = _decoder(config).apply({"params": params["llm"]}, *inputs, groups=groups)
    return shares


def read(
    params: dict,
    context: Context,
    *,
    config: ModelConfig,
    cache: Cache | None = None,
    key_segment: Int[AnyArray, "B S"] | None = None,
    latents: Float[AnyArray, "B G C"] | None = None,
    times: Float[AnyArray, "B G"] | None = None,
) -> tuple[Float[Array, "B _ D"], Cache | None]:
    """`forward` on a whole context, with its latents if it has any.

    Args:
      context: Context of T positions and G latent tokens (G = 0 without latents).
      cache: as in `forward`. It may have more columns than the context needs.
      key_segment: int32 [B, S], segments of the cache's columns, which a cache needs.
      latents, times: as in `embed`.
    Returns:
      (hidden [B, T + G, D], cache).
    """
    x, deep = embed_deep(params, context, config=config, latents=latents, times=times)
    segment, packed = context.segment, context.latents
    mask = Mask(context.limit, segment, segment if key_segment is None else key_segment)
    if packed is None:
        inputs = Embedded(x, context.rope_positions, mask, deep)
        return forward(params, inputs, config=config, cache=cache)
    mask = mask._replace(key_order=extend_order(packed.order, mask.key_segment.shape[1]))
    if cache is None:
        mask = mask._replace(query_noised=packed.noised, key_noised=packed.noised)
    count = packed.tokens.shape[1]
    inputs = Embedded(x, context.rope_positions, mask)
    return forward(params, inputs, config=config, cache=cache, latents=count)


def extend_order(order: Int[AnyArray, "B _"], size: int) -> Int[Array, "B {size}"]:
    """Places in the sequence of a context's positions, int32 [B, T], extended to [B, size].

    Each further position j has place j.
    """
    batch, used = order.shape
    more = jnp.broadcast_to(jnp.arange(used, size, dtype=order.dtype), (batch, size - used))
    return jnp.concatenate([order, more], axis=1)


def cache_columns(positions: int, *, config: ModelConfig) -> int:
    """Columns of the cache of a sampler: whole blocks of `config.key_block` if there are several.

    positions: number of positions that it has to hold.
    """
    size = config.key_block
    return positions if not size or positions <= size else -(-positions // size) * size


def init_cache(batch: int, columns: int, *, config: ModelConfig) -> Cache:
    """Cache of zeros, {"k", "v": [L, B, S, K, h]} in the compute dtype. columns: S."""
    c = config.llm
    shape = (c.num_layers, batch, columns, c.num_kv_heads, c.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


def head(params: dict) -> Float[AnyArray, "D V"] | Int8[AnyArray, "D V"]:
    """The output head [D, V]; of a tied head, the transposed embedding table.

    In the sampler's parameters it may be int8, without its scale (`params.in_int8`).
    """
    llm = params["llm"]
    return llm["head"] if "head" in llm else llm["embed"].T


@jax.named_scope("head")
def logits(params: dict, hidden: Float[AnyArray, "*any D"]) -> Float32[Array, "*any V"]:
    """Hidden states [..., D] -> float32 logits [..., V]; the head may be in int8."""
    matrix = head(params)
    if matrix.dtype == hidden.dtype == jnp.bfloat16 and matrix.size >= _LARGE:
        unscaled = jax.lax.platform_dependent(
            hidden, matrix, cpu=_project_in_parts, default=divergence.project
        )
    else:
        unscaled = divergence.project(hidden, matrix)
    return unscaled * params["llm"]["head_scale"] if "head_scale" in params["llm"] else unscaled


def _project_in_parts(
    hidden: Float[AnyArray, "*any D"], matrix: Float[AnyArray, "D V"]
) -> Float32[Array, "*any V"]:
    """`divergence.project`, a part of the vocabulary after the other.

    XLA for CPUs makes a float32 copy of a bfloat16 matrix before a product. Of the whole head of
    the 7B model that is 2 GiB.
    """
    parts = next(count for count in range(_MOST_PARTS, 0, -1) if matrix.shape[1] % count == 0)
    width = matrix.shape[1] // parts

    def part(number):
        columns = jax.lax.dynamic_slice_in_dim(matrix, number * width, width, axis=1)
        return divergence.project(hidden, columns)

    found = jax.lax.map(part, jnp.arange(parts))  # [parts, ..., width]
    return jnp.moveaxis(found, 0, -2).reshape(*hidden.shape[:-1], matrix.shape[1])


@jax.named_scope("vae_encoder")
def encode_pixels(
    params: dict, pixels: Float[AnyArray, "images height width 3"], *, config: ModelConfig
) -> list[Float32[Array, "images rows columns z"]]:
    """Mean and log-variance of images' latents, before scale and shift: float32 [N, h, w, z] each.

    pixels: float32 [N, H, W, 3] in [-1, 1].
    """
    moments = _vae(config, vae.Encoder).apply(
        {"params": params["vae"]["encoder"]}, pixels.astype(config.dtype)
    )
    return jnp.split(moments.astype(jnp.float32), 2, axis=-1)


@jax.named_scope("vae_decoder")
def decode_latents(
    params: dict, latents: Float[AnyArray, "images rows columns z"], *, config: ModelConfig
) -> Float32[Array, "images height width 3"]:
    """Pixels of latents: float32 [N, H, W, 3], about in [-1, 1], not clipped.

    latents: float32 [N, h, w, z], scaled and shifted (see `VAEConfig`).
    """
    c = config.generation.vae
    z = (latents / c.scale + c.shift).astype(config.dtype)
    return (
        _vae(config, vae.Decoder).apply({"params": params["vae"]["decoder"]}, z).astype(jnp.float32)
    )
