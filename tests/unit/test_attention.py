"""Attention in pieces against attention at once, the rule of the mask, and the kernels against
dense attention.

The TPU's kernel runs here in interpret mode, and is lowered for a TPU; nothing here shows that it
is right on one.
"""

import dataclasses
import functools
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import xla_flags
from opsd_jax import context, distill, flow, rollout
from opsd_jax.blocks import Text
from opsd_jax.model import attention, bagel, flash, masks
from tiny import DRAWING, MODEL, TOKENIZER, image, latent

pytestmark = pytest.mark.usefixtures("quick_compiles")


def drawn(t, s, heads=4, kv=2, width=8, seed=0):
    """q, k, v, and a mask in which some queries see nothing."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    mask = rng.random((2, t, s)) < 0.6
    mask[1, :2] = False
    return (
        normal(2, t, heads, width),
        normal(2, s, kv, width),
        normal(2, s, kv, width),
        jnp.asarray(mask),
    )


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

    def loss(block, q, k, v):
        return jnp.sum(attention.attend(q, k, v, mask, block) * weights)

    at_once, in_blocks = (
        jax.grad(functools.partial(loss, n), argnums=(0, 1, 2))(q, k, v) for n in (0, block)
    )
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
    """All queries see the same keys (as a generated image), or everything everything (as the
    autoencoder calls it).
    """
    q, k, v, mask = drawn(6, 9)
    expected = dense(q, k, v, np.broadcast_to(mask[:, 3:4], (2, 6, 9)))
    np.testing.assert_allclose(attention.attend(q, k, v, mask[:, 3:4], block), expected, atol=1e-5)
    expected = dense(q, k, v, np.ones((2, 6, 9), bool))
    for shape in ((2, 6, 1), (2, 1, 1)):
        np.testing.assert_allclose(
            attention.attend(q, k, v, jnp.ones(shape, bool), block), expected, atol=1e-5
        )


def test_blocks_of_keys_compute_the_same():
    """Those without keys are not read: NaN in them, and in other layers, has no effect."""
    q, k, v, mask = drawn(1, 24, seed=1)
    mask = mask.at[0].set(True).at[:, :, 4:12].set(False).at[:, :, 16:20].set(False)
    mask = mask.at[1, :, 12:15].set(True)
    used = jnp.any(mask, axis=(0, 1))[:, None, None]
    cache = [
        jnp.full((3, *x.shape), jnp.nan).at[1].set(jnp.where(used, x, jnp.nan)) for x in (k, v)
    ]
    order = jnp.array([0, 3, 5, 1, 2, 4], jnp.int32)
    blocks = masks.KeyBlocks(mask[:, 0], order, jnp.int32(3))
    found = jax.jit(attention.attend_to_blocks)(q, *cache, jnp.int32(1), blocks)
    np.testing.assert_allclose(found, dense(q, k, v, mask), atol=1e-6)


def test_which_blocks_of_keys_are_read():
    segment = jnp.zeros((2, 12), jnp.int32).at[0, 9].set(1).at[1, :2].set(1)
    mask = masks.Mask(jnp.full((1, 1), 12), jnp.ones((2, 1), jnp.int32), segment)
    blocks = masks.key_blocks(mask, 3)
    assert blocks.order.tolist() == [0, 3, 1, 2] and int(blocks.used) == 2 and blocks.size == 3
    np.testing.assert_array_equal(blocks.seen, segment > 0)
    with pytest.raises(ValueError, match="12 keys are not a multiple of model.key_block=5"):
        masks.key_blocks(mask, 5)


def test_query_blocks_need_less_memory():
    """Scores at once take B * H * T * S floats; in blocks a small share of it."""
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, 512, 4, 8), jnp.float32),
            ((1, 512, 2, 8), jnp.float32),
            ((1, 512, 2, 8), jnp.float32),
            ((1, 512, 512), bool),
        )
    ]

    def compiled(block):
        return (
            jax.jit(functools.partial(attention.attend, query_block=block)).lower(*shapes).compile()
        )

    at_once, in_blocks = (compiled(block).memory_analysis().temp_size_in_bytes for block in (0, 32))
    assert at_once >= 4 * 512 * 512 * 4 > 4 * in_blocks


def test_the_rule_of_the_mask():
    """Against loops over queries and keys, for random vectors."""
    rng = np.random.default_rng(0)

    def vector(high, n):
        return rng.integers(0, high, (3, n)).astype(np.int32)

    limit, order = vector(9, 8), np.stack([rng.permutation(8) for _ in range(3)]).astype(np.int32)
    segment, noised = vector(3, 8), vector(3, 8)
    for places, numbers in ((None, None), (order, None), (order, noised)):
        found = masks.visible(
            masks.Mask(*map(jnp.asarray, (limit, segment, segment)), places, numbers, numbers)
        )
        for b, i, j in np.ndindex(3, 8, 8):
            place = j if places is None else places[b, j]
            seen = segment[b, i] == segment[b, j] > 0 and place < limit[b, i]
            if numbers is not None and numbers[b, j]:
                seen = seen and numbers[b, i] == numbers[b, j]
            assert found[b, i, j] == seen


# ---- the kernel against dense attention

FLASH = {"attention": "flash_interpret"}
POSITIONS, LATENTS = 30, 8
pack = functools.partial(
    tiny.pack,
    positions=POSITIONS,
    patches=12,
    latents=LATENTS,
    generation=DRAWING.generation,
)


def text(n):
    return Text(np.arange(n, dtype=np.int32))


def mask_of(packed, documents=False):
    """The Mask of a packed batch of POSITIONS + LATENTS positions; documents: what follows the
    first 11 is a second one.
    """
    segment = np.where(documents & (packed.latents.order >= 11), 2, 1) * packed.segment
    order, noised = packed.latents.order, packed.latents.noised
    return masks.Mask(*map(jnp.asarray, (packed.limit, segment, segment, order, noised, noised)))


def layouts():
    """Name -> Mask of two rows."""
    rng = np.random.default_rng(0)
    pictures = [
        [text(2), image(rng, (3, 2)), text(6)],
        [image(rng, (2, 2)), text(1), image(rng, (1, 3)), text(3)],
    ]
    drawn = [
        [text(3), latent(rng, (2, 2)), text(4), latent(rng, (1, 3)), text(2)],
        [latent(rng, (2, 2)), text(1), image(rng, (2, 2)), latent(rng, (2, 2)), text(5)],
    ]
    noisy, clean = (functools.partial(latent, rng, noised=noised) for noised in (True, False))
    noised = [
        [text(3), noisy((1, 2)), clean((1, 2)), text(4)],
        [text(1), noisy((2, 2)), clean((1, 2)), noisy((1, 2)), text(1)],
    ]
    return {
        "text": mask_of(pack([[text(20)], [text(9)]])),
        "images": mask_of(pack(pictures)),
        "documents": mask_of(
            pack([[text(9), text(12)], [text(9), image(rng, (3, 3)), text(2)]]), documents=True
        ),
        "latents": mask_of(pack(drawn)),
        "noised": mask_of(pack(noised)),
        "nothing": mask_of(pack([[], [text(4)]])),
    }


LAYOUTS = layouts()


def arrays(t, s, heads=4, kv=2, width=8, dtype=jnp.float32, seed=0):
    """q, k, v and a gradient of what attention makes of them."""
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
        for shape in (
            (2, t, heads, width),
            (2, s, kv, width),
            (2, s, kv, width),
            (2, t, heads * width),
        )
    ]


@functools.partial(jax.jit, static_argnames=("kind", "blocks"))
def attended(q, k, v, gradient, mask, kind, blocks=None):
    """(output, gradients of q, k and v)."""
    laid = (
        masks.plan(mask, queries=q.shape[1], blocks=blocks)
        if blocks
        else masks.lay_out(mask, q.shape[1], kind)
    )
    out, back = jax.vjp(lambda q, k, v: attention.attend(q, k, v, laid, kind=kind), q, k, v)
    return out, *back(gradient)


def seeing(mask):
    """bool [B, T, 1], the queries that see something.

    What the others give is nobody's, and differs.
    """
    return jnp.any(masks.visible(mask), axis=-1)[:, :, None]


def both(kind, blocks, q, k, v, gradient, mask):
    """`attended` of the kernel and densely, without the queries that see nothing."""
    some = seeing(mask)
    gradient = jnp.where(some, gradient, 0)
    ours, its = (
        attended(q, k, v, gradient, mask, kind, blocks),
        attended(q, k, v, gradient, mask, "dense"),
    )
    return (jnp.where(some, ours[0], 0), *ours[1:]), (jnp.where(some, its[0], 0), *its[1:])


def attended_in_float64(q, k, v, gradient, mask):
    """`attended` by NumPy, rounded to float32 at the end; every query sees something."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    (b, t, heads, d), kv = q.shape, k.shape[2]
    q, gradient = (x.reshape(b, t, kv, heads // kv, d) for x in (q, gradient))
    scores = np.einsum("btkrd,bskd->bkrts", q, k) / np.sqrt(d)
    scores = np.where(np.asarray(masks.visible(mask))[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btkrd,bskd->bkrts", gradient, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(d)
    found = (
        np.einsum("bkrts,bskd->btkrd", p, v).reshape(b, t, heads * d),
        np.einsum("bkrts,bskd->btkrd", ds, k).reshape(b, t, heads, d),
        np.einsum("bkrts,btkrd->bskd", ds, q),
        np.einsum("bkrts,btkrd->bskd", p, gradient),
    )
    return [jnp.asarray(x, jnp.float32) for x in found]


def agree(found, expected, atol):
    for ours, its in zip(found, expected, strict=True):
        assert ours.dtype == its.dtype
        ours, its = (np.asarray(x, np.float32) for x in (ours, its))
        assert np.abs(its).max() > 0.1
        np.testing.assert_allclose(ours, its, atol=atol)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_kernel_equals_dense_attention(name):
    """38 queries and keys in blocks of 8 and 16: neither divides them.

    All layouts run through one program.
    """
    agree(*both("flash_interpret", (8, 16), *arrays(38, 38), LAYOUTS[name]), 3e-6)


def test_the_kernel_with_other_heads_and_fewer_queries_than_keys():
    """5 heads on one kv head; 7 queries of a cache with 33 positions."""
    cache = np.arange(33)[None].repeat(2, 0)
    mask = masks.Mask(
        *(
            jnp.asarray(x, jnp.int32)
            for x in ([np.arange(20, 27), np.arange(9, 16)], np.ones((2, 7)), cache % 5 > 0)
        )
    )
    agree(*both("flash_interpret", (16, 8), *arrays(7, 33, heads=5, kv=1), mask), 3e-6)


def test_the_kernel_in_bfloat16():
    """Off from float32 by no more than rounding to 8 bits brings; dense attention in bfloat16 the
    same.
    """
    given = arrays(38, 38, dtype=jnp.bfloat16)
    _, exact = both("dense", None, *(x.astype(jnp.float32) for x in given), LAYOUTS["images"])
    for found in both("flash_interpret", (16, 16), *given, LAYOUTS["images"]):
        assert all(x.dtype == jnp.bfloat16 for x in found)
        agree([x.astype(jnp.float32) for x in found], exact, 0.03)


def test_one_row_of_a_mask_serves_all_queries():
    """As a generated image has it: [B, 1] vectors and 200 queries in blocks of the size that is
    chosen.

    The reference is in float64: a gradient of keys sums over 400 queries, and in float32 dense
    attention rounds as much as the tolerance.
    """
    given = arrays(200, 38)
    one = masks.Mask(*jnp.array([[[38], [20]], [[1], [1]]]), jnp.ones((2, 38), jnp.int32))
    assert np.all(seeing(one))
    agree(attended(*given, one, "flash_interpret"), attended_in_float64(*given, one), 3e-6)


def test_queries_that_see_nothing_are_zero_and_finite():
    mask, (q, k, v, gradient) = LAYOUTS["nothing"], arrays(38, 38)
    some = np.asarray(seeing(mask))[:, :, 0]
    assert not some[0].any() and some[1].any()
    out, *gradients = attended(q, k, v, gradient, mask, "flash_interpret", (8, 16))
    assert np.all(np.asarray(out)[~some] == 0) and np.all(np.asarray(gradients[0])[~some] == 0)
    for x in gradients:
        assert np.isfinite(x).all() and np.all(np.asarray(x[0]) == 0)


def test_which_blocks_are_resident():
    """The drawing in the docstring of `masks`, and one with blocks before the first needed one, and
    none at all.
    """
    lines = ["#...", "##..", ".##.", "..#.", "...."]
    found = masks._resident(jnp.array([[[mark == "#" for mark in line] for line in lines]]))
    assert found[0].tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [1, 1, 2, 2],
        [2, 2, 2, 2],
        [0, 0, 0, 0],
    ]


def test_blocks_that_nobody_sees_are_left_out():
    def vector(*values):
        return jnp.asarray(values, jnp.int32)[None]

    real = vector(*[1] * 20, *[0] * 12)  # causal text, in blocks of 8; the last one is padding
    laid = masks.plan(masks.Mask(vector(*range(1, 33)), real, real), queries=32, blocks=(8, 8))
    assert laid.key_blocks[0, :3].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2]]
    assert laid.query_blocks[0, :3].tolist() == [[0, 1, 2, 2], [1, 1, 2, 2], [2, 2, 2, 2]]
    two = vector(*[1] * 16, *[2] * 16)  # two documents, each all-to-all
    laid = masks.plan(masks.Mask(vector(*[32] * 32), two, two), queries=32, blocks=(8, 8))
    assert laid.key_blocks[0].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [2, 2, 2, 3], [2, 2, 2, 3]]


def test_the_content_of_a_block_that_nobody_sees_does_not_matter():
    """Positions 32 to 37 are the third block of keys, all padding: not even NaN does harm there."""
    mask, (q, k, v, gradient) = LAYOUTS["text"], arrays(38, 38)
    assert not (mask.key_segment[:, 32:] > 0).any()

    def poison(x):
        return x.at[:, 32:].set(jnp.nan)

    found = attended(q, poison(k), poison(v), gradient, mask, "flash_interpret", (8, 16))
    expected = attended(q, k, v, gradient, mask, "flash_interpret", (8, 16))
    for ours, its, positions in zip(found, expected, (38, 38, 32, 32), strict=True):
        np.testing.assert_array_equal(ours[:, :positions], its[:, :positions])


@pytest.mark.parametrize(
    "positions, size", [(2, 128), (128, 128), (300, 384), (1024, 512), (4098, 384), (4900, 384)]
)
def test_block_sizes_pad_little(positions, size):
    assert masks.block_size(positions) == size


def largest(jaxpr):
    """Entries of the largest array anywhere in a jaxpr."""
    found = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found.append(largest(inner) if hasattr(inner, "eqns") else 0)
    return max(found, default=0)


def test_nothing_as_large_as_queries_times_keys_is_made():
    """Traced forward and backward, 2,000 positions: dense attention has [2000, 2000] at least, the
    kernel its blocks.
    """
    positions = 2000
    config = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, vocab_size=8))
    x = jax.ShapeDtypeStruct((1, positions, 32), jnp.float32)
    vector = jax.ShapeDtypeStruct((1, positions), jnp.int32)
    params = jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))
    for kind, below in (("dense", False), ("flash_interpret", True), ("flash", True)):
        run = functools.partial(bagel.forward, config=dataclasses.replace(config, attention=kind))
        inputs = bagel.Embedded(x, vector, masks.Mask(vector, vector, vector))
        traced = jax.make_jaxpr(jax.grad(lambda p, i: jnp.sum(run(p, i)[0])))(params, inputs)
        assert (largest(traced.jaxpr) < positions * positions / 4) == below, kind


@pytest.mark.parametrize("heads, kv, width", [(28, 4, 128), (16, 16, 72)], ids=["decoder", "vit"])
def test_the_kernel_lowers_for_a_tpu(heads, kv, width):
    """At the sizes of 7B, noised latents included.

    The tiles that the TPU wants are checked here, its memory is not.
    """
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((1, 700, heads, width), (1, 900, kv, width), (1, 900, kv, width))
    ]
    of_query, of_key = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (700, 900))
    mask = masks.Mask(of_query, of_query, of_key, of_key, of_query, of_key)

    def gradients(q, k, v, mask):
        laid = masks.lay_out(mask, 700, "flash")

        def loss(*a):
            return jnp.sum(attention.attend(*a, laid, kind="flash").astype(jnp.float32))

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    text = jax.export.export(jax.jit(gradients), platforms=["tpu"])(*shapes, mask).mlir_module()
    assert text.count("tpu_custom_call") == 3


# ---- the whole model


@pytest.fixture(scope="module")
def params():
    return tiny.params(DRAWING)


def test_a_context_with_latents_reads_the_same(params):
    rng = np.random.default_rng(1)
    packed = pack(
        [
            [
                text(2),
                image(rng, (2, 2)),
                latent(rng, (1, 2), noised=True),
                latent(rng, (1, 2)),
                text(3),
            ],
            [image(rng, (2, 3)), text(4)],
        ],
        positions=20,
    )

    def read(config):
        return jax.jit(functools.partial(bagel.read, config=config))(params, packed)[0]

    dense, ours = read(DRAWING), read(dataclasses.replace(DRAWING, **FLASH))
    np.testing.assert_allclose(ours[packed.segment > 0], dense[packed.segment > 0], atol=2e-5)


@pytest.mark.slow
def test_scores_and_their_gradients_are_the_same():
    params, rng = tiny.params(), np.random.default_rng(2)
    packed = tiny.batch(rng, 2).student
    completion = context.completion(
        jnp.asarray(rng.integers(0, 256, (2, 5))),
        jnp.arange(5) < jnp.array([[5], [3]]),
        bos=TOKENIZER.bos,
        eos=TOKENIZER.eos,
    )
    weights = completion.mask[:, :, None] * jnp.asarray(rng.standard_normal((2, 6, 32), np.float32))

    def run(config):
        def loss(p):
            return jnp.sum(distill.score(p, packed, completion, config=config) * weights)

        return jax.jit(jax.value_and_grad(loss))(params)

    (expected, dense), (found, ours) = run(MODEL), run(dataclasses.replace(MODEL, **FLASH))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(dense))
    assert max(tiny.distances(dense, ours).values()) < 2e-5 * scale


@pytest.mark.slow
def test_an_image_is_generated_the_same(params):
    rng = np.random.default_rng(3)
    contexts = pack([[text(n), image(rng, (2, 2))] for n in (3, 5, 2)], positions=16)
    positions = flow.latent_positions([(2, 2)], 4, DRAWING.generation.side)
    noise = rng.standard_normal((1, 4, DRAWING.generation.latent_dim), np.float32)

    def generate(model):
        config = flow.FlowConfig(
            model, TOKENIZER.image_start, TOKENIZER.image_end, num_timesteps=3, interval=(0, 1)
        )
        return np.asarray(flow.generate(params, contexts, noise, positions, config=config))

    expected = generate(DRAWING)
    assert np.abs(expected - noise).max() > 0.1
    np.testing.assert_allclose(generate(dataclasses.replace(DRAWING, **FLASH)), expected, atol=2e-5)


@pytest.mark.slow
def test_answers_are_the_same():
    """Prefill through the kernel, decoding dense: the same logits, greedily."""
    params, rng = tiny.params(), np.random.default_rng(4)
    packed = tiny.batch(rng, 2).student

    def sample(model):
        config = tiny.rollout_config(model=model, greedy=True, max_new_tokens=5)
        return rollout.sample(params, packed, jax.random.key(0), config=config, return_logits=True)

    (dense, expected), (ours, found) = sample(MODEL), sample(dataclasses.replace(MODEL, **FLASH))
    np.testing.assert_array_equal(ours.fed, dense.fed)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_sampling_on_several_devices_goes_through_the_kernel():
    """The parameters' mesh is known while the sampler is traced: without it the kernel would not be
    cut, and on a TPU not compile.
    """
    program = """if True:
        import dataclasses
        import jax, numpy as np
        import tiny
        from test_attention import FLASH
        from opsd_jax import rollout, sharding
        mesh, params = sharding.make_mesh(1, 2, 2), tiny.params()
        packed = tiny.batch(np.random.default_rng(4), 4).student
        def sample(model, params, packed):
            config = tiny.rollout_config(model=model, greedy=True, max_new_tokens=5)
            arguments = params, packed, jax.random.key(0)
            jaxpr = rollout.sample.trace(*arguments, config=config).jaxpr
            return jaxpr, rollout.sample(*arguments, config=config).fed
        layout = sharding.tree_shardings(mesh, params, "rollout")
        on_mesh = jax.device_put(params, layout), sharding.put_batch(mesh, packed)
        _, expected = sample(tiny.MODEL, params, packed)
        jaxpr, found = sample(dataclasses.replace(tiny.MODEL, **FLASH), *on_mesh)
        np.testing.assert_array_equal(found, expected)
        assert "shard_map" in str(jaxpr)
        print("the same")
        """
    env = dict(
        os.environ,
        XLA_FLAGS=xla_flags.devices(4),
        JAX_PLATFORMS="cpu",
        PYTHONPATH=os.pathsep.join(map(str, pathlib.Path(__file__).resolve().parents[:3])),
    )
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


@pytest.mark.slow
def test_several_devices_compute_their_own_rows_and_heads():
    """Four processors that the CPU plays, in a process of their own."""
    program = """if True:
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from opsd_jax import sharding
        from opsd_jax.model import attention, masks
        mesh, rng = sharding.make_mesh(1, 2, 2), np.random.default_rng(0)
        shapes = (2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)
        arrays = [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]
        ones = jnp.ones((2, 9), jnp.int32)
        arrays += [jnp.broadcast_to(jnp.arange(1, 10), (2, 9)), ones, ones]
        def gradients(kind):
            def run(q, k, v, *vectors):
                laid = masks.lay_out(masks.Mask(*vectors), 9, kind)
                def loss(*a):
                    return jnp.sum(attention.attend(*a, laid, kind=kind) ** 2)
                return jax.grad(loss, (0, 1, 2))(q, k, v)
            return jax.jit(run)
        expected = gradients("dense")(*arrays)
        def put(x):
            spec = P(("data", "fsdp"), *(None, "tensor")[:x.ndim - 2])
            return jax.device_put(x, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            compiled = gradients("flash_interpret").lower(*map(put, arrays)).compile()
        text = compiled.as_text()
        collectives = "all-gather", "all-reduce", "all-to-all", "collective-permute"
        assert not any(name in text for name in collectives)
        for ours, its in zip(compiled(*map(put, arrays)), expected):
            np.testing.assert_allclose(ours, its, atol=5e-6)
        print("the same")
        """
    env = dict(os.environ, XLA_FLAGS=xla_flags.devices(4), JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


# ---- what is chosen, and where it may run


def test_one_query_is_computed_densely_by_all():
    """Decoding: also where the kernels themselves would not run."""
    q, k, v, _ = arrays(1, 12)
    mask = masks.Mask(*jnp.array([[[9], [4]], [[1], [1]]]), jnp.ones((2, 12), jnp.int32))
    for kind in ("dense", "flash", "cudnn"):
        found = attention.attend(q, k, v, masks.lay_out(mask, 1, kind), kind=kind)
        np.testing.assert_allclose(
            found, dense(q, k, v, np.asarray(masks.visible(mask))), atol=1e-5
        )


@pytest.mark.parametrize(
    "kind, dtype, error, message",
    [
        (
            "flash",
            jnp.float32,
            NotImplementedError,
            "model.attention is 'flash'.*on a CPU set 'dense'",
        ),
        (
            "cudnn",
            jnp.bfloat16,
            NotImplementedError,
            "model.attention is 'cudnn'.*on a CPU set 'dense'",
        ),
        ("cudnn", jnp.float32, ValueError, "set model.dtype='bfloat16'"),
    ],
)
@pytest.mark.parametrize("jit", [True, False])
def test_kernels_of_other_machines_say_so(kind, dtype, error, message, jit):
    q, k, v, _ = arrays(38, 38, dtype=dtype)
    laid = masks.lay_out(LAYOUTS["text"], 38, kind)
    run = jax.grad(lambda *a: jnp.sum(attention.attend(*a, laid, kind=kind).astype(jnp.float32)))
    with pytest.raises(error, match=message):
        (jax.jit(run) if jit else run)(q, k, v)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="model.attention is 'fast': choose from"):
        dataclasses.replace(MODEL, attention="fast")


def test_cudnn_is_lowered_for_gpus_alone(monkeypatch):
    """With its gradients; XLA's implementation stands in for cuDNN, which is not here."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, mask, implementation: real(*a, mask=mask)
    )
    q, k, v, _ = arrays(38, 38, dtype=jnp.bfloat16)
    laid = masks.lay_out(LAYOUTS["text"], 38, "cudnn")
    gradient = jax.jit(
        jax.grad(
            lambda q: jnp.sum(attention.attend(q, k, v, laid, kind="cudnn").astype(jnp.float32))
        )
    )
    jax.export.export(gradient, platforms=["cuda"])(q)
    for platform in ("cpu", "tpu"):
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            jax.export.export(gradient, platforms=[platform])(q)


@pytest.mark.parametrize("queries, one_row", [(38, False), (37, True)])
def test_what_cudnn_is_given(monkeypatch, queries, one_row):
    """cuDNN is not here: XLA's implementation of the same function stands in, after the checks of
    cuDNN's shapes.
    """
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, mask, implementation):
        assert implementation == "cudnn" and q.dtype == jnp.bfloat16
        assert mask.dtype == bool and mask.shape == (2, 1, q.shape[1], k.shape[1])
        assert q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
        return real(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(flash, "only_on", lambda x, **_: x)
    q, k, v, _ = arrays(queries, 37, dtype=jnp.bfloat16)
    seen = masks.visible(LAYOUTS["images"])[:, :queries, :37]
    seen = jnp.pad(seen, ((0, 0), (0, queries - seen.shape[1]), (0, 0)))[
        :, : 1 if one_row else None
    ]
    found = attention.attend(q, k, v, seen, kind="cudnn")
    some = np.broadcast_to(np.asarray(seen).any(-1), (2, queries))
    assert found.shape == (2, queries, 32)
    expected = dense(q, k, v, np.broadcast_to(seen, (2, queries, 37)))
    np.testing.assert_allclose(found.astype(jnp.float32)[some], expected[some], atol=0.03)
