"""The autoencoder: shapes, single images compared with batches, and its layers at the borders."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from opsd_jax import flow
from opsd_jax.model import bagel, vae
from opsd_jax.model.config import GenerationConfig

VAE = tiny.DRAWING.generation.vae
C = VAE.z_channels

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def params():
    return {"vae": tiny.params(tiny.DRAWING)["vae"]}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pixels_of(rng, *shape):
    return rng.uniform(-1, 1, (*shape, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnames="query_block")
def moments(params, pixels, query_block=0):
    config = dataclasses.replace(tiny.DRAWING, query_block=query_block)
    return bagel.encode_pixels(params, pixels, config=config)


decode_latents = jax.jit(bagel.decode_latents, static_argnames="config")


# ---- tokens


def test_tokens_are_patches_of_latents(rng):
    latents = rng.standard_normal((2, 6, 4, C), np.float32)  # 3 x 2 tokens
    tokens = np.asarray(flow.to_tokens(latents, 2))
    assert tokens.shape == (2, 6, 4 * C)
    for row, column, p, q, z in np.ndindex(3, 2, 2, 2, C):
        assert (
            tokens[:, row * 2 + column, (p * 2 + q) * C + z]
            == latents[:, 2 * row + p, 2 * column + q, z]
        ).all()
    np.testing.assert_array_equal(flow.to_latents(tokens, (3, 2), 2), latents)
    np.testing.assert_array_equal(flow.to_tokens(latents[0], 2), tokens[0])  # no batch axis
    np.testing.assert_array_equal(flow.to_latents(tokens[0], (3, 2), 2), latents[0])


# ---- shapes


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_shapes_of_odd_numbers_of_latents(params, rng, size):
    """Only tokens need even numbers of latents; the autoencoder itself takes any."""
    h, w = size
    assert VAE.downsample == 4
    mean, log_variance = jax.eval_shape(moments, params, pixels_of(rng, 2, 4 * h, 4 * w))
    assert mean.shape == log_variance.shape == (2, h, w, C) and mean.dtype == jnp.float32
    decode = functools.partial(bagel.decode_latents, config=tiny.DRAWING)
    found = jax.eval_shape(decode, params, jnp.zeros((2, h, w, C)))
    assert found.shape == (2, 4 * h, 4 * w, 3) and found.dtype == jnp.float32


def test_sizes_of_the_release():
    config = dataclasses.replace(tiny.DRAWING, generation=GenerationConfig())
    assert (config.generation.stride, config.generation.latent_dim) == (16, 64)
    tree = jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))
    encode, decode = (
        functools.partial(f, config=config) for f in (bagel.encode_pixels, bagel.decode_latents)
    )
    mean, _ = jax.eval_shape(encode, tree, jnp.zeros((1, 48, 1024, 3)))
    assert mean.shape == (1, 6, 128, 16)
    assert jax.eval_shape(decode, tree, mean).shape == (1, 48, 1024, 3)


def test_halving_pads_below_and_to_the_right():
    """A kernel of ones counts the pixels under it: 9 inside, fewer at the two padded edges
    alone.
    """
    ones = jnp.ones((1, 4, 4, 1))
    found = vae.convolve(ones, jnp.ones((3, 3, 1, 1)), jnp.zeros(1), 2, ((0, 1), (0, 1)))
    assert found[0, :, :, 0].tolist() == [[9, 6], [6, 4]]
    same = vae.convolve(ones, jnp.ones((3, 3, 1, 1)), jnp.full(1, 0.5))
    assert same[0, :, :, 0].tolist() == [[4.5, 6.5, 6.5, 4.5], [6.5, 9.5, 9.5, 6.5]] + [
        [6.5, 9.5, 9.5, 6.5],
        [4.5, 6.5, 6.5, 4.5],
    ]


def test_the_encoder_halves_so(params, rng):
    """Its first halving, written out: output (i, j) is the kernel on rows 2i .. 2i + 2 and columns
    2j .. 2j + 2 of what comes in, zeros beyond the edge.
    """
    names = ("down_0_block_0", "down_0_downsample")
    _, state = vae.Encoder(VAE).apply(
        {"params": params["vae"]["encoder"]},
        pixels_of(rng, 1, 4, 8),
        capture_intermediates=lambda module, _: module.name in names,
    )
    before, after = (np.asarray(state["intermediates"][name]["__call__"][0])[0] for name in names)
    kernel, bias = (
        params["vae"]["encoder"]["down_0_downsample"][f"conv_{kind}"] for kind in ("kernel", "bias")
    )
    assert before.shape == (4, 8, 32) and after.shape == (2, 4, 32)
    padded = np.pad(before, ((0, 1), (0, 1), (0, 0)))
    for i, j in np.ndindex(2, 4):
        expected = (
            np.einsum("hwi,hwio->o", padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel) + bias
        )
        np.testing.assert_allclose(after[i, j], expected, atol=1e-4)


def test_group_norm_by_hand(rng):
    x = rng.standard_normal((2, 3, 2, 64), np.float32) * 3 + 1
    scale, bias = rng.standard_normal((2, 64), np.float32)
    found = vae.group_norm(jnp.asarray(x), scale, bias)
    for n, group in np.ndindex(2, 32):
        mine = slice(2 * group, 2 * group + 2)
        values = x[n, :, :, mine].astype(np.float64)
        expected = (values - values.mean()) / np.sqrt(values.var() + 1e-6) * scale[mine] + bias[
            mine
        ]
        np.testing.assert_allclose(found[n, :, :, mine], expected, atol=1e-5)
    assert vae.group_norm(jnp.asarray(x, jnp.bfloat16), scale, bias).dtype == jnp.bfloat16


# ---- values


@pytest.fixture(scope="module")
def encoded(params):
    """Pixels [3, 12, 20, 3], their mean and log-variance."""
    pixels = pixels_of(np.random.default_rng(1), 3, 12, 20)
    return pixels, *map(np.asarray, moments(params, pixels))


def test_encoding_a_batch_is_one_by_one(params, encoded):
    pixels, mean, log_variance = encoded
    assert mean.std() > 0.1 and log_variance.std() > 0.1
    assert np.abs(mean[0] - mean[1]).max() > 0.1
    for n in range(3):
        one = moments(params, pixels[n : n + 1])
        np.testing.assert_allclose(one[0][0], mean[n], atol=2e-5)
        np.testing.assert_allclose(one[1][0], log_variance[n], atol=2e-5)


def test_query_blocks_do_not_change_the_moments(params, encoded):
    pixels, mean, _ = encoded
    np.testing.assert_allclose(moments(params, pixels, query_block=4)[0], mean, atol=2e-5)


def test_encode_samples_the_posterior(params, encoded, rng):
    """z = mean + std * noise, then scale * (z - shift); without noise the mean."""
    pixels, mean, log_variance = encoded
    encode = functools.partial(flow.encode, params, pixels, config=tiny.DRAWING)
    np.testing.assert_allclose(encode(np.zeros_like(mean)), 0.3611 * (mean - 0.1159), atol=2e-5)
    noise = rng.standard_normal(mean.shape, np.float32)
    expected = 0.3611 * (mean + np.exp(log_variance / 2) * noise - 0.1159)
    assert np.abs(expected - 0.3611 * (mean - 0.1159)).max() > 0.1
    np.testing.assert_allclose(encode(noise), expected, atol=5e-5)


def test_decode_truncates_and_takes_batches(params, rng):
    """uint8 from pixels about [-1, 1]: scaled to 0 .. 255, cut at both ends, rounded down."""
    tokens = rng.standard_normal((2, 6, 4 * C), np.float32)
    decode = functools.partial(flow.decode, params, grid=(2, 3), config=tiny.DRAWING)
    images = np.asarray(decode(tokens))
    assert images.shape == (2, 16, 24, 3) and images.dtype == np.uint8
    raw = decode_latents(
        params, flow.to_latents(jnp.asarray(tokens), (2, 3), 2), config=tiny.DRAWING
    )
    expected = np.clip(np.asarray(raw, np.float64) / 2 + 0.5, 0, 1) * 255
    assert (
        (expected == 0).any() and (expected == 255).any() and ((expected % 1) > 0.6).mean() > 0.05
    )
    clear = np.minimum(expected % 1, 1 - expected % 1) > 1e-2  # a rounding error does not decide
    clear |= (expected == 0) | (expected == 255)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(images[clear], np.floor(expected[clear]))
    one = np.asarray(decode(tokens[1:]))
    assert np.abs(one[0].astype(int) - images[1]).max() <= 1 and (one[0] == images[1]).mean() > 0.99
    assert (images[0] != images[1]).mean() > 0.5


def test_the_decoder_undoes_scale_and_shift(params, rng):
    """Other constants with latents moved to match give the same image."""
    latents = rng.standard_normal((1, 2, 2, C), np.float32)
    other = dataclasses.replace(
        tiny.DRAWING,
        generation=dataclasses.replace(
            tiny.DRAWING.generation, vae=dataclasses.replace(VAE, scale=2.0, shift=-0.5)
        ),
    )
    moved = 2.0 * (latents / 0.3611 + 0.1159 + 0.5)
    ours, its = (
        decode_latents(params, jnp.asarray(x), config=config)
        for x, config in ((latents, tiny.DRAWING), (moved, other))
    )
    np.testing.assert_allclose(ours, its, atol=1e-3)
