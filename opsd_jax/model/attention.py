"""Attention with masks given as vectors, and rotary positions.

Letters: B batch, T query slots, S key slots, H heads, K kv heads, G = H // K, h head_dim.
"""

import jax
import jax.numpy as jnp

# Large and finite: a padded query sees no key at all, and softmax over -inf would be NaN in its row.
_HIDDEN = -1e30


def visible(limit, query_segment, key_segment):
    """The attention mask as a rule on vectors.

    A query at slot i sees the keys j < limit[i] of its own document (segment > 0; 0 is padding):

        slot      0   1   2   3   4   5        0-1 text, 2-4 image block, 5 text
        limit     1   2   5   5   5   6        text: i + 1; inside an image: the end of the block

    Args:
      limit: int32 [B, T]. query_segment: int32 [B, T]. key_segment: int32 [B, S].
    Returns:
      bool [B, T, S].
    """
    slots = jnp.arange(key_segment.shape[1], dtype=limit.dtype)
    same = (query_segment[:, :, None] == key_segment[:, None, :]) & (key_segment[:, None, :] > 0)
    return same & (slots < limit[:, :, None])


def attend(q, k, v, mask):
    """Softmax attention with grouped kv heads; scores and softmax in float32.

    Args:
      q: [B, T, H, h]. k, v: [B, S, K, h] (query head n uses kv head n // G). mask: bool [B, T, S].
    Returns:
      [B, T, H * h].
    """
    b, t, heads, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, t, kv_heads, heads // kv_heads, h) * jnp.asarray(h ** -0.5, q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, heads * h)


def rope_tables(positions, head_dim, theta):
    """cos and sin of the rotation angles, float32 [B, T, 1, h], two equal halves (rotate-half form)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, tables):
    """Applies rotary positions to x [B, T, heads, h] in float32; keeps the dtype of x."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
