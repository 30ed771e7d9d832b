"""Attention masks: the rule on vectors, the mask as an array, and its blocks for the kernel.

Query i attends to the keys j < limit[i] of its own document (segment > 0; 0 is padding):

    position  0   1   2   3   4   5        0-1 text, 2-4 image block, 5 text
    limit     1   2   5   5   5   6        text: i + 1; inside an image: the end of the block

Where latents are stored apart from the other positions (`context.Latents`), key_order is the place
of each key in the sequence, and limit counts places. Only queries of the same image attend to a key
of a noised image.

The kernel of `flash` evaluates this rule one block at a time. A block of keys to which no query of
a block can attend is neither fetched nor computed. `plan` determines these blocks from the largest
limit, the smallest place of a key and the document numbers of each block.

  key blocks      0 1 2 3          resident     0 1 2 3
  queries 0       # . . .          queries 0    0 0 0 0      A block that is resident costs no
          1       # # . .                  1    0 1 1 1      transfer. Step j computes only where
          2       . # # .                  2    1 1 2 2      block j is the resident one.

Letters: B batch, T queries, S keys; I blocks of q queries, J blocks of s keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from opsd_jax.array_types import AnyArray

KERNELS = ("flash", "flash_interpret")  # settings of `ModelConfig.attention` that take a Plan
_FAR = 2**30  # place of a key to which no query attends


class Mask(NamedTuple):
    """The vectors of the rule. T is 1 if all queries attend to the same keys.

    limit: int32 [B, T], places. query_segment: int32 [B, T], key_segment: int32 [B, S], documents.
    key_order: int32 [B, S]; None if key j has place j.
    query_noised: int32 [B, T], key_noised: int32 [B, S], number of the noised image, 0 for
      everything else; None if no image is noised.
    """

    limit: AnyArray
    query_segment: AnyArray
    key_segment: AnyArray
    key_order: AnyArray | None = None
    query_noised: AnyArray | None = None
    key_noised: AnyArray | None = None


class Plan(NamedTuple):
    """A mask as the kernel reads it, the same for all layers, padded to whole blocks.

    queries: int32 [B, 2 or 3, I * q]: limit, document and, if images are noised, the number of the
      noised image.
    keys: int32 [B, J * s, 2 or 3]: place, document (-1 for padding), number of the noised image.
    key_blocks: int32 [B, I, J], the key block that is resident in each step. Step j computes if it
      is block j.
    query_blocks: int32 [B, J, I], the same for the pass over queries.
    """

    queries: jax.Array
    keys: jax.Array
    key_blocks: jax.Array
    query_blocks: jax.Array


class KeyBlocks(NamedTuple):
    """A mask of single queries over keys in blocks, of which only those with keys are read.

      block       0 1 2 3        order  0 2 1 3
      has keys    # . # .        used   2

    seen: bool [B, S], True where the query attends to a key; S is a multiple of the blocks.
    order: int32 [J], numbers of the blocks, those to which any query attends first.
    used: int32 [], the number of these.
    """

    seen: jax.Array
    order: jax.Array
    used: jax.Array

    @property
    def size(self) -> int:
        """Keys per block."""
        return self.seen.shape[1] // self.order.shape[0]


def visible(mask: Mask) -> Bool[Array, "B T S"]:
    """The mask as an array, True where a query attends to a key."""
    key_order = mask.key_order
    if key_order is None:
        key_order = jnp.arange(mask.key_segment.shape[1], dtype=mask.limit.dtype)[None]
    key_segment = jnp.asarray(mask.key_segment)[:, None, :]
    seen = (mask.query_segment[:, :, None] == key_segment) & (key_segment > 0)
    seen &= key_order[:, None, :] < mask.limit[:, :, None]
    if mask.key_noised is not None and mask.query_noised is not None:
        key_noised = mask.key_noised[:, None, :]
        seen &= (key_noised == 0) | (key_noised == mask.query_noised[:, :, None])
    return seen


def key_blocks(mask: Mask, size: int) -> KeyBlocks:
    """The mask of a single query per sequence, for `attention.attend_to_blocks`.

    Args:
      mask: vectors with T = 1. size: keys per block.
    Raises:
      ValueError: the number of keys is not a multiple of it.
    """
    seen = visible(mask)[:, 0]
    batch, keys = seen.shape
    if keys % size:
        raise ValueError(
            f"{keys} keys are not a multiple of model.key_block={size}: make a cache with as many "
            "columns as bagel.cache_columns says"
        )
    unused = ~jnp.any(seen.reshape(batch, -1, size), axis=(0, 2))
    order = jnp.argsort(unused, stable=True).astype(jnp.int32)
    return KeyBlocks(seen, order, jnp.sum(~unused, dtype=jnp.int32))


def lay_out(mask: Mask, queries: int, kind: str) -> Bool[Array, "B _ S"] | Plan:
    """The form of a mask that `attention.attend` takes, computed once for all layers.

    Args:
      queries: T. kind: see `ModelConfig.attention`.
    Returns:
      bool [B, T, S], or [B, 1, S] if all queries attend to the same keys. For the kernel of `flash`
      its Plan, so that no array of that size is created.
    """
    return plan(mask, queries=queries) if kind in KERNELS and queries > 1 else visible(mask)


def block_size(count: int) -> int:
    """Positions per block, for `count` positions: a multiple of 128, the number of lanes of a TPU.

    Of 512, 384 and 256, the largest of those that pad least.
    """
    if count <= 128:
        return 128
    return min((512, 384, 256), key=lambda size: -(-count // size) * size)


def plan(mask: Mask, *, queries: int, blocks: tuple[int, int] | None = None) -> Plan:
    """The Plan of a mask.

    Args:
      queries: T. blocks: (q, s), size of a block of queries and of keys; None for `block_size`.
    """
    batch, keys = mask.key_segment.shape
    size_q, size_s = blocks or (block_size(queries), block_size(keys))

    def fill(x, size, value):
        padding = ((0, 0), (0, -x.shape[1] % size))
        return jnp.pad(x.astype(jnp.int32), padding, constant_values=value)

    def of_query(x):
        return fill(jnp.broadcast_to(x, (batch, queries)), size_q, 0)

    def of_key(x, value):
        return fill(jnp.broadcast_to(x, (batch, keys)), size_s, value)

    def cut(x, size):
        return x.reshape(batch, -1, size)

    def lowest(x):
        return jnp.min(jnp.where(x > 0, x, _FAR), axis=-1)

    key_order = jnp.arange(keys)[None] if mask.key_order is None else mask.key_order
    limit, document = of_query(mask.limit), of_query(mask.query_segment)
    real = mask.key_segment > 0
    place = of_key(jnp.where(real, key_order, _FAR), _FAR)
    owner = of_key(jnp.where(real, mask.key_segment, -1), -1)
    of_queries, of_keys = [limit, document], [place, owner]
    if mask.key_noised is not None:
        of_queries.append(of_query(mask.query_noised))
        of_keys.append(of_key(mask.key_noised, 0))

    seeing, seen = cut(document, size_q), cut(owner, size_s)
    furthest = jnp.max(cut(jnp.where(document > 0, limit, 0), size_q), axis=-1)[:, :, None]
    nearest = jnp.min(cut(place, size_s), axis=-1)[:, None]
    needed = (nearest < furthest) & (lowest(seen)[:, None] <= jnp.max(seeing, axis=-1)[:, :, None])
    needed &= lowest(seeing)[:, :, None] <= jnp.max(seen, axis=-1)[:, None]
    return Plan(
        jnp.stack(of_queries, axis=1),
        jnp.stack(of_keys, axis=2),
        _resident(needed),
        _resident(jnp.swapaxes(needed, 1, 2)),
    )


def _resident(needed: Bool[Array, "B N M"]) -> Int32[Array, "B N M"]:
    """Which block is resident in each of M steps, given the blocks that are needed.

    It is the last needed block so far, and before the first needed block that one.
    """
    number = jnp.where(needed, jnp.arange(needed.shape[2], dtype=jnp.int32), -1)
    last = jax.lax.cummax(number, axis=2)
    return jnp.where(last < 0, jnp.argmax(needed, axis=2).astype(jnp.int32)[:, :, None], last)
