"""Attention in pieces against attention at once, and the rule of the mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax.model import attention


def drawn(t, s, heads=4, kv=2, width=8, seed=0):
    """q, k, v, and a mask in which some queries see nothing."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    mask = rng.random((2, t, s)) < 0.6
    mask[1, :2] = False
    return normal(2, t, heads, width), normal(2, s, kv, width), normal(2, s, kv, width), jnp.asarray(mask)


def dense(q, k, v, mask):
    """Head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, heads = q.shape[2] // k.shape[2], []
    for n in range(q.shape[2]):
        scores = q[:, :, n] @ k[:, :, n // group].swapaxes(1, 2) / np.sqrt(q.shape[3])
        scores = np.where(mask, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, :, n // group])
    return np.concatenate(heads, axis=-1)


@pytest.mark.parametrize("block", [0, 1, 3, 4, 6, 7, 12])
def test_query_blocks_compute_the_same(block):
    """7 queries: blocks that divide them and that do not, one of all, one that is larger."""
    args = drawn(7, 9)
    found = attention.attend(*args, block)
    assert found.shape == (2, 7, 32)
    np.testing.assert_allclose(found, dense(*args), atol=1e-5)


@pytest.mark.parametrize("block", [2, 5])
def test_query_blocks_have_the_same_gradients(block):
    q, k, v, mask = drawn(7, 9)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 7, 32), np.float32))
    loss = lambda block, q, k, v: jnp.sum(attention.attend(q, k, v, mask, block) * weights)
    at_once, in_blocks = (jax.grad(functools.partial(loss, n), argnums=(0, 1, 2))(q, k, v) for n in (0, block))
    for ours, its in zip(in_blocks, at_once):
        assert np.abs(its).max() > 0.1
        np.testing.assert_allclose(ours, its, atol=1e-5)


@pytest.mark.parametrize("block", [0, 12, 20, 32, 64])
def test_larger_query_blocks(block):
    """30 queries in blocks of at most so many, which may be evened out."""
    args = drawn(30, 5)
    np.testing.assert_allclose(attention.attend(*args, block), dense(*args), atol=1e-5)


@pytest.mark.parametrize("block", [0, 4])
def test_query_blocks_with_masks_that_broadcast(block):
    """All queries see the same keys (as a drawn image), or everything everything (as the autoencoder calls it)."""
    q, k, v, mask = drawn(6, 9)
    expected = dense(q, k, v, np.broadcast_to(mask[:, 3:4], (2, 6, 9)))
    np.testing.assert_allclose(attention.attend(q, k, v, mask[:, 3:4], block), expected, atol=1e-5)
    expected = dense(q, k, v, np.ones((2, 6, 9), bool))
    for shape in ((2, 6, 1), (2, 1, 1)):
        np.testing.assert_allclose(attention.attend(q, k, v, jnp.ones(shape, bool), block), expected, atol=1e-5)


def test_query_blocks_need_less_memory():
    """Scores at once take B * H * T * S floats; in blocks a small share of it."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((1, 512, 4, 8), jnp.float32), ((1, 512, 2, 8), jnp.float32), ((1, 512, 2, 8), jnp.float32),
        ((1, 512, 512), bool))]
    compiled = lambda block: jax.jit(functools.partial(attention.attend, query_block=block)).lower(*shapes).compile()
    at_once, in_blocks = (compiled(block).memory_analysis().temp_size_in_bytes for block in (0, 32))
    assert at_once >= 4 * 512 * 512 * 4 > 4 * in_blocks


def test_the_rule_of_the_mask():
    """Against loops over queries and keys, for random vectors."""
    rng = np.random.default_rng(0)
    vector = lambda high, n: rng.integers(0, high, (3, n)).astype(np.int32)
    limit, order = vector(9, 8), np.stack([rng.permutation(8) for _ in range(3)]).astype(np.int32)
    segment, noised = vector(3, 8), vector(3, 8)
    for places, numbers in ((None, None), (order, None), (order, noised)):
        found = attention.visible(*map(jnp.asarray, (limit, segment, segment)), places, numbers, numbers)
        for b, i, j in np.ndindex(3, 8, 8):
            place = j if places is None else places[b, j]
            seen = segment[b, i] == segment[b, j] > 0 and place < limit[b, i]
            if numbers is not None and numbers[b, j]:
                seen = seen and numbers[b, i] == numbers[b, j]
            assert found[b, i, j] == seen
