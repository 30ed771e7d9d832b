"""Attention with masks given as vectors (see `masks`), and rotary positions.

A setting (`ModelConfig.attention`) selects how attention is computed. Only "auto" depends on the
machine, and a run resolves it when it starts (`run.attention_check`):

  dense   scores in memory, all at once or some queries at a time; any device
  flash   the kernel of `flash`, which reads the vectors of the mask; TPU
  cudnn   cuDNN's kernel with the mask as an array [B, T, S]; GPU, bfloat16

A single query (decoding) is computed densely in all modes: its scores take little memory.

Letters: B batch, T queries, S keys, H heads, K kv heads, G = H // K, h head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from opsd_jax.array_types import AnyArray
from opsd_jax.model import masks
from opsd_jax.model.masks import Mask, Plan

# Large but finite: a padded query attends to no key, and its softmax over -inf would be NaN.
_HIDDEN = -1e30


def check_platform(kind: str, platform: str) -> None:
    """Checks that a kernel can run on the devices, before data are prepared and programs compiled.

    Args:
      kind: see `ModelConfig.attention`. platform: platform of the devices, "cpu", "gpu" or "tpu".
    Raises:
      ValueError: the kernel needs another platform.
    """
    needed = {"flash": "tpu", "cudnn": "gpu"}.get(kind, platform)
    if platform != needed:
        raise ValueError(
            f"config.model.attention is {kind!r}, a kernel for a {needed.upper()}, and the devices "
            f"here are {platform.upper()}s: set config.model.attention='dense'"
        )


@jax.named_scope("attention")
def attend(
    q: Float[AnyArray, "B T H h"],
    k: Float[AnyArray, "B S K h"],
    v: Float[AnyArray, "B S K h"],
    mask: Bool[AnyArray, "B _ _"] | Plan,
    query_block: int = 0,
    kind: str = "dense",
) -> Float[Array, "B T H*h"]:
    """Softmax attention with grouped kv heads; scores and softmax in float32.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h] (query head n uses kv head n // G).
      mask: from `masks.lay_out` with the same kind.
      query_block: number of queries that dense attention computes at a time, so that scores are
        [B, H, query_block, S]; 0 for all at once.
      kind: see `ModelConfig.attention`. A single query is always computed densely.
    Returns:
      [B, T, H * h]. The output of a query that attends to no key is finite: zeros (flash) or the
      mean of v.
    Raises:
      ValueError: kind is "cudnn" and q is not bfloat16.
      NotImplementedError: when compiled for a platform that the kernel does not support.
    """
    if isinstance(mask, Plan):
        from opsd_jax.model import flash  # importing Pallas takes 0.4 s: only where it is used

        return flash.attend(q, k, v, mask, interpret=kind == "flash_interpret")
    if kind == "cudnn" and q.shape[1] > 1:
        return _cudnn(q, k, v, mask)
    b, t, heads, h = q.shape
    if query_block and t > query_block:
        # Even blocks: 4,098 queries by 512 are 9 x 456, not 9 x 512 with 510 queries of padding.
        count = -(-t // query_block)
        block = min(query_block, -(-t // (8 * count)) * 8)

        def cut(x):  # [B, T, ...] -> [count, B, block, ...]
            padded = jnp.pad(x, [(0, 0), (0, count * block - t)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(padded.reshape(b, count, block, *x.shape[2:]), 1, 0)

        masks = cut(mask) if mask.shape[1] > 1 else None
        # The backward pass recomputes the scores of a block. Saved scores of all blocks would take
        # as much memory as without blocks.
        some = jax.checkpoint(
            lambda part: attend(part[0], k, v, mask if part[1] is None else part[1])
        )
        parts = jax.lax.map(some, (cut(q), masks))
        return jnp.moveaxis(parts, 0, 1).reshape(b, count * block, heads * h)[:, :t]
    kv_heads = k.shape[2]
    q = q.reshape(b, t, kv_heads, heads // kv_heads, h) * jnp.asarray(h**-0.5, q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    if mask.shape[1] > 1:
        scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    else:  # Added, to the same effect. XLA:GPU would first broadcast a mask to the scores' size.
        scores += jnp.where(mask, 0.0, _HIDDEN)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, heads * h)


@jax.named_scope("attention")
def attend_to_blocks(
    q: Float[AnyArray, "B 1 H h"],
    keys: Float[AnyArray, "L B S K h"],
    values: Float[AnyArray, "L B S K h"],
    layer: Int[Array, ""],
    blocks: masks.KeyBlocks,
) -> Float[Array, "B 1 H*h"]:
    """`attend` of one query per sequence to the keys of a layer, block by block.

    The softmax is computed in one pass: sum and output are rescaled where a block has a larger
    score (arXiv 1805.02867). Blocks without any key are not read.

    Args:
      q: [B, 1, H, h]. keys, values: [L, B, S, K, h], of all layers.
      layer: number of the layer.
      blocks: which keys are seen. A query that attends to no key gets a finite output.
    Returns:
      [B, 1, H * h].
    """
    b, _, heads, h = q.shape
    kv_heads, size = keys.shape[3], blocks.size
    grouped = q.reshape(b, kv_heads, heads // kv_heads, h) * jnp.asarray(h**-0.5, q.dtype)

    def one(n, carry):
        largest, total, out = carry
        start = blocks.order[n] * size

        def cut(x):  # sliced where it is used: the layer's keys as an array would be a copy
            part = jax.lax.dynamic_slice(x, (layer, 0, start, 0, 0), (1, b, size, kv_heads, h))
            return part[0].astype(q.dtype)

        scores = jnp.einsum(
            "bkgh,bskh->bkgs", grouped, cut(keys), preferred_element_type=jnp.float32
        )
        seen = jax.lax.dynamic_slice(blocks.seen, (0, start), (b, size))
        scores += jnp.where(seen, 0.0, _HIDDEN)[:, None, None]
        new = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights, before = jnp.exp(scores - new[..., None]), jnp.exp(largest - new)
        more = jnp.einsum(
            "bkgs,bskh->bkgh",
            weights.astype(q.dtype),
            cut(values),
            preferred_element_type=jnp.float32,
        )
        return (
            new,
            total * before + jnp.sum(weights, axis=-1),
            out * before[..., None] + more,
        )

    begin = jnp.full(grouped.shape[:3], _HIDDEN), jnp.zeros(grouped.shape[:3])
    empty = jnp.zeros(grouped.shape, jnp.float32)
    _, total, out = jax.lax.fori_loop(0, blocks.used, one, (*begin, empty))
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.astype(q.dtype).reshape(b, 1, heads * h)


class Groups(NamedTuple):
    """Groups of queries and keys between which attention is recorded, see `shares`.

    queries: float32 [B, T, M], 1 where a query is in a group. keys: float32 [B, S, N], the same for
      keys. scale: float32 [], factor of the scores.
    """

    queries: jax.Array
    keys: jax.Array
    scale: jax.Array


def shares(
    q: Float[AnyArray, "B T H h"],
    k: Float[AnyArray, "B S K h"],
    mask: Mask,
    groups: Groups,
    query_block: int = 0,
) -> Float32[Array, "B M N"]:
    """Attention weights of groups of queries on groups of keys.

    The weights are those of `attend`. They are computed again, some queries at a time, whichever
    kernel `attend` uses: weights and mask exist for `query_block` queries at a time.

    Args:
      q: [B, T, H, h]. k: [B, S, K, h].
      query_block: number of queries at a time; 0 for all at once.
    Returns:
      float32 [B, M, N], averaged over heads, summed over the queries and keys of each group.
    """
    b, t, heads, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, t, kv_heads, heads // kv_heads, h) * groups.scale.astype(q.dtype)
    of_queries = {
        name: jnp.broadcast_to(x, (b, t))
        for name, x in mask._asdict().items()
        if x is not None and not name.startswith("key")
    }

    def of_some(part):
        q, queries, vectors = part
        seen = masks.visible(mask._replace(**vectors))
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _HIDDEN), axis=-1)
        return jnp.einsum("bts,btm,bsn->bmn", jnp.mean(weights, axis=(1, 2)), queries, groups.keys)

    block = min(query_block or t, t)
    count = -(-t // block)

    def cut(x):
        # padding is in no group
        x = jnp.pad(x, [(0, 0), (0, count * block - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, count, block, *x.shape[2:]), 1, 0)

    return jnp.sum(jax.lax.map(of_some, jax.tree.map(cut, (q, groups.queries, of_queries))), axis=0)


def _cudnn(q, k, v, mask):
    """`attend` by cuDNN, with the same arguments and result.

    Its kernel takes the mask as a bias [B, 1, T, S] in bfloat16, written out for every query. Its
    backward pass needs even T and S.
    """
    from opsd_jax.model import flash

    b, t, heads, h = q.shape
    if q.dtype != jnp.bfloat16:
        raise ValueError(
            "model.attention is 'cudnn', which computes in bfloat16, and model.dtype is "
            f"{q.dtype.name!r}: set model.dtype='bfloat16', or model.attention='dense'"
        )
    message = (
        "model.attention is 'cudnn', which needs an NVIDIA GPU with cuDNN: on a CPU set 'dense', "
        "on a TPU 'flash' or 'dense'"
    )

    def even(x, axes):
        return jnp.pad(x, [(0, n % 2 if axis in axes else 0) for axis, n in enumerate(x.shape)])

    mask = flash.only_on(mask, platform="cuda", message=message)
    mask = even(jnp.broadcast_to(mask, (b, t, k.shape[1])), (1, 2))
    q, k, v = (even(x, (1,)) for x in (q, k, v))
    try:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    except RuntimeError as error:  # "cuDNN is not detected."
        raise NotImplementedError(f"{message} ({error})") from error
    return out[:, :t].reshape(b, t, heads * h)


def rope_frequencies(
    head_dim: int, theta: float, llama3: tuple[float, ...] = ()
) -> Float32[Array, " frequencies"]:
    """Frequencies of rotary positions (inv_freq), in radians per position, float32 [h / 2].

    Official: transformers, modeling_rope_utils.py.

    Args:
      head_dim: h. theta: base of the frequencies.
      llama3: (factor, low, high, original). Wavelengths above original / low are multiplied by
        factor, those below original / high stay, and the frequencies between are interpolated. ()
        for no scaling.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if not llama3:
        return frequencies
    factor, low, high, original = llama3
    turns = original * frequencies / (2 * math.pi)  # original / wavelength
    share = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - share) * frequencies / factor + share * frequencies


def rope_axes(mrope: tuple[int, ...], interleaved: bool) -> tuple[int, ...]:
    """Which dimension of a position each frequency turns with: 0 time, 1 row, 2 column.

    mrope (3, 3, 2), one after another: 0 0 0 1 1 1 2 2, interleaved: 0 1 2 0 1 2 0 1. Interleaved,
    the n-th row is at 3 n + 1, the n-th column at 3 n + 2, and all other places are of time.
    Official: transformers, Qwen2.5-VL and Qwen3-VL (apply_interleaved_mrope).

    Args:
      mrope, interleaved: `mrope` and `mrope_interleaved` of LLMConfig.
    """
    if not interleaved:
        return tuple(axis for axis, count in enumerate(mrope) for _ in range(count))
    return tuple(n % 3 if n < 3 * mrope[n % 3] else 0 for n in range(sum(mrope)))


def rope_tables(
    positions: Int[AnyArray, "B T"] | Int[AnyArray, "B T axes"],
    head_dim: int,
    theta: float,
    bfloat16: bool = False,
    llama3: tuple[float, ...] = (),
    axes: tuple[int, ...] = (),
) -> tuple[Float32[Array, "B T 1 h"], Float32[Array, "B T 1 h"]]:
    """Cosines and sines of the rotation angles, float32 [B, T, 1, h] each.

    Args:
      positions: int32 [B, T], rope positions; [B, T, 3] for positions of three dimensions. Those
        of a model with three dimensions may be [B, T] where all three are equal, as in texts.
      head_dim, theta, llama3: see `rope_frequencies`.
      bfloat16: whether the frequencies are rounded to bfloat16, see `ModelConfig.rope_bfloat16`.
      axes: the dimension that each frequency turns with, see `rope_axes`.
    """
    frequencies = rope_frequencies(head_dim, theta, llama3)
    if bfloat16:  # not a cast to bfloat16 and back, which XLA may remove
        frequencies = jax.lax.reduce_precision(frequencies, exponent_bits=8, mantissa_bits=7)
    by_frequency = positions[:, :, None]
    if positions.ndim == 3:
        by_frequency = positions[:, :, np.asarray(axes)]
    return half_split(by_frequency.astype(jnp.float32) * frequencies)


def half_split(
    angles: Float32[AnyArray, "B T _"],
) -> tuple[Float32[Array, "B T 1 h"], Float32[Array, "B T 1 h"]]:
    """Cosines and sines of angles [B, T, h / 2], float32 [B, T, 1, h] each.

    Both halves of the last axis are equal (rotate-half form).
    """
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T heads h"],
    tables: tuple[Float32[Array, "B _ 1 h"], Float32[Array, "B _ 1 h"]],
) -> Float[Array, "B T heads h"]:
    """Rotates x [B, T, heads, h] by the angles of `rope_tables` in float32; keeps x's dtype."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
