"""Attention with masks given as vectors, and rotary positions.

How it is computed is a setting (`ModelConfig.attention`), never found out from the backend:

  dense   scores in memory, all at once or some queries at a time; anywhere
  flash   the kernel of `flash`, driven by the vectors of the mask; TPU
  cudnn   cuDNN's kernel with the mask as an array [B, T, S]; GPU, bfloat16

One query (decoding) is computed densely in all modes: its scores are one row, and there is nothing to save.

Letters: B batch, T query slots, S key slots, H heads, K kv heads, G = H // K, h head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Large and finite: a padded query sees no key at all, and softmax over -inf would be NaN in its row.
_HIDDEN = -1e30
_KERNEL = ("flash", "flash_interpret")


class Mask(NamedTuple):
    """Who sees whom, by the rule of `visible`, whose arguments these are. T is 1 where all queries see the same."""

    limit: jax.Array
    query_segment: jax.Array
    key_segment: jax.Array
    key_order: jax.Array | None = None
    query_noised: jax.Array | None = None
    key_noised: jax.Array | None = None


def visible(limit, query_segment, key_segment, key_order=None, query_noised=None, key_noised=None):
    """The attention mask as a rule on vectors.

    A query at slot i sees the keys j < limit[i] of its own document (segment > 0; 0 is padding):

        slot      0   1   2   3   4   5        0-1 text, 2-4 image block, 5 text
        limit     1   2   5   5   5   6        text: i + 1; inside an image: the end of the block

    Where latents stand apart from the other slots (`context.Latents`), key_order says at which place of the
    sequence a key really is. A key of a noised image (key_noised > 0: its number) is seen from inside it alone.

    Args:
      limit: int32 [B, T]. query_segment: int32 [B, T]. key_segment: int32 [B, S].
      key_order: int32 [B, S] or None (slot j is at place j). query_noised: int32 [B, T], key_noised: int32 [B, S].
    Returns:
      bool [B, T, S].
    """
    if key_order is None:
        key_order = jnp.arange(key_segment.shape[1], dtype=limit.dtype)[None]
    seen = (query_segment[:, :, None] == key_segment[:, None, :]) & (key_segment[:, None, :] > 0)
    seen &= key_order[:, None, :] < limit[:, :, None]
    if key_noised is not None:
        seen &= (key_noised[:, None, :] == 0) | (key_noised[:, None, :] == query_noised[:, :, None])
    return seen


def lay_out(mask: Mask, queries: int, kind: str):
    """What `attend` wants of a mask, computed once for all layers: bool [B, T, S] ([B, 1, S] where all queries see
    the same), or for the kernel of `flash` its Plan, so that nothing of that size is ever made.

    queries: T. kind: see `ModelConfig.attention`.
    """
    if kind in _KERNEL and queries > 1:
        from opsd_jax.model import flash  # Pallas takes 0.4 s to import: for those who use it

        return flash.plan(*mask, queries=queries)
    return visible(*mask)


def check_platform(kind: str, platform: str) -> None:
    """ValueError where a kernel cannot run on the devices, which compiling would tell only after the data are made.

    kind: see `ModelConfig.attention`. platform: of the devices, "cpu", "gpu" or "tpu".
    """
    needed = {"flash": "tpu", "cudnn": "gpu"}.get(kind, platform)
    if platform != needed:
        raise ValueError(
            f"config.model.attention is {kind!r}, a kernel for a {needed.upper()}, and the devices here are "
            f"{platform.upper()}s: set config.model.attention='dense'"
        )


@jax.named_scope("attention")
def attend(q, k, v, mask, query_block: int = 0, kind: str = "dense"):
    """Softmax attention with grouped kv heads; scores and softmax in float32.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h] (query head n uses kv head n // G).
      mask: of `lay_out` with the same kind; bool [B, T, S], or [B, 1, S] where all queries see the same keys.
      query_block: queries at a time if dense, so that scores take [B, H, query_block, S]; 0 for all at once.
      kind: see `ModelConfig.attention`. One query is computed densely, whatever it says.
    Returns:
      [B, T, H * h]. A query that sees no key gets something finite: zeros (flash) or the mean of v.
    """
    if kind in _KERNEL and q.shape[1] > 1:
        from opsd_jax.model import flash

        return flash.attend(q, k, v, mask, interpret=kind == "flash_interpret")
    if kind == "cudnn" and q.shape[1] > 1:
        return _cudnn(q, k, v, mask)
    b, t, heads, h = q.shape
    if query_block and t > query_block:
        # even blocks: 4,098 queries by 512 are 9 times 456, not 8 times 512 and 510 rows of padding
        count = -(-t // query_block)
        block = min(query_block, -(-t // (8 * count)) * 8)
        pad = lambda x: jnp.pad(x, [(0, 0), (0, count * block - t)] + [(0, 0)] * (x.ndim - 2))
        cut = lambda x: jnp.moveaxis(pad(x).reshape(b, count, block, *x.shape[2:]), 1, 0)
        masks = cut(mask) if mask.shape[1] > 1 else None
        # the backward pass recomputes a block's scores; kept, those of all blocks would be as large as without blocks
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
    else:  # added, to the same effect: a row to select by XLA:GPU would first write out as large as the scores
        scores += jnp.where(mask, 0.0, _HIDDEN)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, heads * h)


class Groups(NamedTuple):
    """Whose attention to whom is recorded, see `shares`.

    queries: float32 [B, T, M], keys: float32 [B, S, N], 1 where a slot is in a group. scale: float32 [], of the scores.
    """

    queries: jax.Array
    keys: jax.Array
    scale: jax.Array


def shares(q, k, mask: Mask, groups: Groups, query_block: int = 0):
    """Attention weights of groups of queries on groups of keys, float32 [B, M, N]: averaged over the heads, added up
    over the queries and keys of the groups.

    The weights are those of `attend`, computed again, some queries at a time, whatever kernel attends: neither weights
    nor mask ever exist for more than `query_block` queries (0: all at once).

    Args:
      q: [B, T, H, h]. k: [B, S, K, h]. mask: the vectors, as `lay_out` takes them.
    """
    b, t, heads, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, t, kv_heads, heads // kv_heads, h) * groups.scale.astype(q.dtype)
    of_queries = {
        "limit": mask.limit,
        "query_segment": mask.query_segment,
        "query_noised": mask.query_noised,
    }
    of_queries = {
        name: jnp.broadcast_to(x, (b, t)) for name, x in of_queries.items() if x is not None
    }

    def of_some(part):
        q, queries, vectors = part
        seen = visible(
            **vectors,
            key_segment=mask.key_segment,
            key_order=mask.key_order,
            key_noised=mask.key_noised,
        )
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _HIDDEN), axis=-1)
        return jnp.einsum("bts,btm,bsn->bmn", jnp.mean(weights, axis=(1, 2)), queries, groups.keys)

    block = min(query_block or t, t)
    count = -(-t // block)

    def cut(x):
        x = jnp.pad(
            x, [(0, 0), (0, count * block - t)] + [(0, 0)] * (x.ndim - 2)
        )  # padding is in no group
        return jnp.moveaxis(x.reshape(b, count, block, *x.shape[2:]), 1, 0)

    return jnp.sum(jax.lax.map(of_some, jax.tree.map(cut, (q, groups.queries, of_queries))), axis=0)


def _cudnn(q, k, v, mask):
    """`attend` by cuDNN. Its kernel takes the mask as a bias [B, 1, T, S] in bfloat16, a row for every query, and
    trains on even T and S only."""
    from opsd_jax.model import flash

    b, t, heads, h = q.shape
    if q.dtype != jnp.bfloat16:
        raise ValueError(
            f"model.attention is 'cudnn', which computes in bfloat16, and model.dtype {q.dtype.name!r}: "
            "set model.dtype='bfloat16', or model.attention='dense'"
        )
    message = (
        "model.attention is 'cudnn', which needs an NVIDIA GPU with cuDNN: on a CPU set 'dense', on a TPU "
        "'flash' or 'dense'"
    )
    even = lambda x, axes: jnp.pad(
        x, [(0, n % 2 if axis in axes else 0) for axis, n in enumerate(x.shape)]
    )
    mask = flash.only_on(mask, platform="cuda", message=message)
    mask = even(jnp.broadcast_to(mask, (b, t, k.shape[1])), (1, 2))
    q, k, v = (even(x, (1,)) for x in (q, k, v))
    try:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    except RuntimeError as error:  # "cuDNN is not detected."
        raise NotImplementedError(f"{message} ({error})") from error
    return out[:, :t].reshape(b, t, heads * h)


def rope_tables(positions, head_dim, theta, bfloat16: bool = False):
    """cos and sin of the rotation angles, float32 [B, T, 1, h], two equal halves (rotate-half form).

    bfloat16: round the frequencies to it, see `ModelConfig.rope_bfloat16`.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if bfloat16:  # not astype there and back, which XLA may leave out
        frequencies = jax.lax.reduce_precision(frequencies, exponent_bits=8, mantissa_bits=7)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, tables):
    """Applies rotary positions to x [B, T, heads, h] in float32; keeps the dtype of x."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
