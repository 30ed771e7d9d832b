"""Image generation by flow matching, and its training loss.

Official: bagel.py (generate_image), inferencer.py. t = 1 is noise and t = 0 is data:
x_t = (1 - t) x_0 + t noise. The model predicts v = noise - x_0, and a step is x <- x - v dt. The
image is generated as one block of latent tokens that follows a context:

  ... context ... | <img  L0 L1 .. img>      all of the block sees all of the block and the context

Guidance evaluates the block after up to three contexts, its branches: everything so far (cond),
everything before the user's latest text (text), and the user's texts without images (image). The
contexts follow one another on the batch axis and run as one forward pass. Their keys and values are
computed once, and each step overwrites those of the block in place.

Velocities change slowly from step to step. With `FlowConfig.compute_every` = n only every n-th is
computed, and those between are extrapolated (TaylorSeer, arXiv 2503.06923, with the velocity of
each branch as the feature: guidance stays exact in what it combines). n = 3, degree 1:

  step       0  1  2  3  4  5  6  7 ...      the first degree + 1 steps of a phase are computed
  computed   *  *        *        *

Axes: B images, R branches (1 to 3), N computed velocities that are kept, G latent tokens, C values
of a latent token (patch row, patch column, z), T positions of a context, S keys, L layers, K
key/value heads, h head size, D embedding, M images of an example, height and width in pixels, rows
and columns of latents, z channels of a latent.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from opsd_jax import images, sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.context import Context
from opsd_jax.method_config import FlowConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.masks import Mask

Cache = dict[str, jax.Array]  # {"k", "v": [L, R * B, S, K, h]}
# Guidance of the public evaluation harness, as changes to the defaults of `FlowConfig`.
HARNESS = {"text_scale": 4.0, "image_scale": 2.0, "interval": (0.0, 1.0), "renorm": "text_channel"}


# --- schedule and guidance ------------------------------------------------------------------------


def shifted(times: Float[AnyArray, "*any"], shift: float | np.floating) -> Float[AnyArray, "*any"]:
    """Flow times t shifted by s: s t / (1 + (s - 1) t), which moves them towards 1 for s > 1."""
    return shift * times / (1 + (shift - 1) * times)


def timesteps(config: FlowConfig) -> Float32[np.ndarray, " timesteps"]:
    """The time grid, float32 [num_timesteps], from 1 down to 0."""
    grid = np.linspace(1, 0, config.num_timesteps, dtype=np.float32)
    return np.asarray(shifted(grid, np.float32(config.timestep_shift)))


def guided_steps(config: FlowConfig) -> tuple[int, int]:
    """(first, last): steps first .. last - 1 are guided, none if both are 0.

    The times decrease, so the guided steps are contiguous. `config.interval` is compared with the
    shifted times.
    """
    times, (low, high) = timesteps(config)[:-1], config.interval
    inside = np.flatnonzero((low < times) & (times <= high))
    if len(config.branches) == 1 or not len(inside):
        return 0, 0
    return int(inside[0]), int(inside[-1]) + 1


class Phase(NamedTuple):
    """Steps begin .. end - 1, all of them guided or none."""

    begin: int
    end: int
    guided: bool


def phases(config: FlowConfig) -> list[Phase]:
    """All steps, in order: before, inside and after the interval of guidance."""
    first, last = guided_steps(config)
    phases = [
        Phase(0, first, False),
        Phase(first, last, True),
        Phase(last, config.num_timesteps - 1, False),
    ]
    return [phase for phase in phases if phase.begin < phase.end]


def computed_steps(config: FlowConfig) -> Bool[np.ndarray, " steps"]:
    """Which steps compute their velocities, bool [num_timesteps - 1]; see the module's example."""
    computed = np.zeros(config.num_timesteps - 1, bool)
    for phase in phases(config):
        first = min(phase.begin + config.extrapolation, phase.end - 1)
        computed[phase.begin : first] = True
        computed[first : phase.end : config.compute_every] = True
    return computed


def extrapolated(
    velocities: Float[AnyArray, "N R B G C"],
    times: Float[AnyArray, " N"],
    t: Float[AnyArray, ""],
) -> Float[AnyArray, "R B G C"]:
    """The polynomial of degree N - 1 in flow time through velocities at N times, at time t.

    Lagrange's form: v(t) = sum_j v_j prod_(i != j) (t - t_i) / (t_j - t_i).
    """
    total: Any = 0.0
    for j in range(len(velocities)):
        factors = [(t - times[i]) / (times[j] - times[i]) for i in range(len(velocities)) if i != j]
        total += math.prod(factors) * velocities[j]
    return total


def guide(
    cond: Float[AnyArray, "B G C"],
    text: Float[AnyArray, "B G C"],
    image: Float[AnyArray, "B G C"] | None,
    real: Bool[AnyArray, "B G"],
    config: FlowConfig,
) -> Float[AnyArray, "B G C"]:
    """The guided velocity, with the scales a of text and b of image:

      u = text + a (cond - text)
      global, channel    if b > 1: u <- image + b (u - image);  u <- u * r(u)
      text_channel       u <- u * r(u);  if b > 1: u <- image + b (u - image)

    r(u) = clip(|cond| / |u|, renorm_min, 1), with norms over the whole image (global) or over
    each token.

    Args:
      cond, text, image: [B, G, C], velocities of the branches. image is None where b <= 1.
      real: bool [B, G], False at padding.
    Returns:
      [B, G, C].
    """
    kept = jnp.where(real[:, :, None], 1.0, 0.0)
    axes = (1, 2) if config.renorm == "global" else (2,)

    def norm(v):
        return jnp.sqrt(jnp.sum(v * v * kept, axis=axes, keepdims=True))

    def renormed(u):
        return u * jnp.clip(norm(cond) / (norm(u) + 1e-8), config.renorm_min, 1.0)

    u = text + config.text_scale * (cond - text)
    if config.renorm == "text_channel":
        u = renormed(u)
    if image is not None:
        u = image + config.image_scale * (u - image)
    return u if config.renorm == "text_channel" else renormed(u)


# --- generation -----------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentPositions:
    """Positions of the latent tokens of B images, padded at the end to G tokens per image.

    table_ids: int32 [B, G], row * side + column in the latents' position table.
    real: bool [B, G], False at padding.
    """

    table_ids: AnyArray
    real: AnyArray


def latent_positions(grids: Sequence[tuple[int, int]], tokens: int, side: int) -> LatentPositions:
    """Positions of the latent tokens of B images.

    Args:
      grids: numbers of rows and columns of latent tokens of each image.
      tokens: G.
      side: number of rows, and of columns, of the latents' position table.
    Raises:
      ValueError: a grid is larger than the position table.
    """
    ids, real = np.zeros((len(grids), tokens), np.int32), np.zeros((len(grids), tokens), bool)
    for b, grid in enumerate(grids):
        own = images.position_ids(grid, side)
        ids[b, : len(own)], real[b, : len(own)] = own, True
    return LatentPositions(ids, real)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the denoising steps of B images read and do not change.

    Each image has R contexts, one per branch of guidance, and its block follows each of them. The
    contexts' keys and values are in the cache, {"k", "v": [L, R * B, S, K, h]} with S =
    context_size + 2 + G. The cache is passed separately, because each step writes to it.

    segment: int32 [R * B, S], segments of all keys.
    rope_position: int32 [R * B], rope position of the block.
    positions: LatentPositions of the images.
    context_size: static number of positions of a padded context.
    """

    segment: AnyArray
    rope_position: AnyArray
    positions: LatentPositions
    context_size: int = dataclasses.field(metadata={"static": True})


@sharding.jit_on_mesh(static_argnames=("config",))
def prefill(
    params: dict, contexts: Context, positions: LatentPositions, *, config: ModelConfig
) -> tuple[Conditioning, Cache]:
    """Computes the keys and values of the contexts.

    Args:
      contexts: Context [R * B, T], branch by branch in the order of `FlowConfig.branches`.
      positions: LatentPositions [B, G] of the images.
    Returns:
      (Conditioning, cache).
    """
    count, size = contexts.rope_positions.shape
    images_count, tokens = positions.real.shape
    real = jnp.tile(positions.real, (count // images_count, 1))
    segment = jnp.concatenate(
        [contexts.segment, jnp.ones((count, 2), jnp.int32), real.astype(jnp.int32)], axis=1
    )
    cache = bagel.init_cache(count, size + 2 + tokens, config=config)
    _, written = bagel.read(
        params, contexts, config=config, cache=cache, key_segment=segment.at[:, size:].set(0)
    )
    assert written is not None  # a cache was given
    return Conditioning(segment, contexts.next_rope_position, positions, size), written


def velocities(
    params: dict,
    conditioning: Conditioning,
    cache: Cache,
    x: Float[AnyArray, "B G C"],
    t: Float[Array, ""],
    *,
    config: FlowConfig,
) -> tuple[Float32[Array, "R B G C"], Cache]:
    """Velocities after every context, without guidance.

    Args:
      cache: keys and values, see `Conditioning`.
      x: [B, G, C], the noised images.
      t: scalar flow time.
    Returns:
      (float32 [R, B, G, C], the cache with the block's keys and values written to it).
    """
    model = config.model
    batch, tokens, _ = x.shape
    count, keys = conditioning.segment.shape
    latents = bagel.embed_latents(
        params, x, jnp.reshape(t, (1, 1)), conditioning.positions.table_ids, config=model
    )
    ends = bagel.embed_tokens(
        params, jnp.array([[config.image_start, config.image_end]]), config=model
    )
    # Start and end precede the latents, because the experts split the sequence at a static index.
    # The order of tokens within the block has no effect.
    block = jnp.concatenate([jnp.broadcast_to(ends, (batch, *ends.shape[1:])), latents], axis=1)
    block = jnp.tile(block, (count // batch, 1, 1))
    # One query represents all: they share their rope position and see the same keys, so the mask
    # is [R * B, 1, keys].
    limit, segment = jnp.full((count, 1), keys), jnp.ones((count, 1), jnp.int32)
    hidden, written = bagel.forward(
        params,
        bagel.Embedded(
            block,
            conditioning.rope_position[:, None],
            Mask(limit, segment, conditioning.segment),
        ),
        config=model,
        cache=cache,
        offset=conditioning.context_size,
        latents=tokens,
    )
    assert written is not None  # a cache was given
    velocity = bagel.velocity(params, hidden[:, 2:], config=model)
    return velocity.reshape(count // batch, *x.shape), written


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Denoising:
    """What the denoising steps of B images change.

    x: [B, G, C], the noised images.
    cache: keys and values, see `Conditioning`.
    velocities: float32 [N, R, B, G, C], those computed last, the newest first; N = 0 where all
      steps are computed.
    times: float32 [N], their flow times.
    """

    x: jax.Array
    cache: Cache
    velocities: jax.Array
    times: jax.Array


def start(x: Float[Array, "B G C"], cache: Cache, *, config: FlowConfig) -> Denoising:
    """The state at the beginning of a phase.

    Args:
      x: [B, G, C], which `denoise` donates. cache: that of all branches of the phase.
    """
    kept = config.extrapolation + 1 if config.compute_every > 1 else 0
    branches = cache["k"].shape[1] // x.shape[0]
    return Denoising(x, cache, jnp.zeros((kept, branches, *x.shape)), jnp.zeros(kept))


@sharding.jit_on_mesh(static_argnames=("config",), donate_argnames=("state",))
def denoise(
    params: dict,
    conditioning: Conditioning,
    state: Denoising,
    first: Int[Array, ""],
    last: Int[Array, ""],
    *,
    config: FlowConfig,
) -> Denoising:
    """Euler steps first .. last - 1. Both are traced: one program runs any number of steps.

    The steps are guided if there are contexts of several branches.

    Args:
      state: of the images before the first step. It is donated.
      first: a step that computes its velocities.
    Returns:
      The state after the last step.
    """
    grid, computed = timesteps(config), computed_steps(config)
    times = jnp.asarray(grid)
    # step -> the next one that computes its velocities
    own = np.where(computed, np.arange(len(computed)), len(computed))
    after = jnp.asarray(np.append(np.minimum.accumulate(own[::-1])[::-1][1:], len(computed)))

    def euler(x, branches, n):
        velocity: AnyArray = branches[0]
        if len(branches) > 1:
            image = branches[2] if len(branches) > 2 else None
            velocity = guide(velocity, branches[1], image, conditioning.positions.real, config)
        return x - velocity * (times[n] - times[n + 1])

    def step(n, state):
        branches, cache = velocities(
            params, conditioning, state.cache, state.x, times[n], config=config
        )
        kept, moments = state.velocities, state.times
        if len(kept):
            kept = jnp.concatenate([branches[None], kept[:-1]])
            moments = jnp.concatenate([times[n][None], moments[:-1]])
        return Denoising(euler(state.x, branches, n), cache, kept, moments)

    if config.compute_every == 1:
        return jax.lax.fori_loop(first, last, step, state)

    def group(carry):
        n, state = carry
        state, end = step(n, state), jnp.minimum(after[n], last)

        def between(k, x):
            return euler(x, extrapolated(state.velocities, state.times, times[k]), k)

        x = jax.lax.fori_loop(n + 1, end, between, state.x)
        return end, dataclasses.replace(state, x=x)

    return jax.lax.while_loop(lambda carry: carry[0] < last, group, (first, state))[1]


def generate(
    params: dict,
    contexts: Context,
    noise: Float32[AnyArray, "B G C"],
    positions: LatentPositions,
    *,
    config: FlowConfig,
    on_step: Callable[[int], None] | None = None,
    every: int = 5,
) -> Float32[Array, "B G C"]:
    """Generates the latent tokens of B images.

    Official: bagel.py (generate_image).

    Args:
      contexts, positions: as in `prefill`.
      noise: float32 [B, G, C], x at t = 1.
      on_step: called with the number of steps done, every `every` steps, or a few later where the
        next step is extrapolated. None runs all steps of a phase in one call.
    Returns:
      float32 [B, G, C], latent tokens at t = 0.
    Raises:
      ValueError: the number of contexts is not R * B.
    """
    batch, needed = len(positions.table_ids), len(config.branches) * len(positions.table_ids)
    if contexts.rope_positions.shape[0] != needed:
        raise ValueError(
            f"{batch} images with the branches {', '.join(config.branches)} need {needed} "
            f"contexts, branch by branch, not {contexts.rope_positions.shape[0]}"
        )
    conditioning, cache = prefill(params, contexts, positions, config=config.model)
    x = jnp.array(noise)
    computed = np.flatnonzero(computed_steps(config)).tolist()
    for phase in phases(config):
        # Without guidance the cond branch is enough. Its keys are copied once.
        one_branch = not phase.guided and needed > batch
        used, keys = (
            _cond_branch(conditioning, cache, batch) if one_branch else (conditioning, cache)
        )
        state, done = start(x, keys, config=config), phase.begin
        while done < phase.end:
            stop = phase.end
            if on_step:
                stop = min([stop, *(n for n in computed if n >= done + every)])
            state = denoise(params, used, state, done, stop, config=config)
            if on_step:
                jax.block_until_ready(state.x)
                on_step(stop)
            done = stop
        x = state.x
        if phase.guided:
            cache = state.cache  # the previous cache was donated
    return x


@functools.partial(jax.jit, static_argnames=("batch",))
def _cond_branch(
    conditioning: Conditioning, cache: Cache, batch: int
) -> tuple[Conditioning, Cache]:
    """Conditioning and cache of the cond contexts only, which are the first ones."""
    cond = dataclasses.replace(
        conditioning,
        segment=conditioning.segment[:batch],
        rope_position=conditioning.rope_position[:batch],
    )
    return cond, jax.tree.map(lambda a: a[:, :batch], cache)


# --- pixels and latents ---------------------------------------------------------------------------


def to_tokens(
    latents: Float[AnyArray, "*any rows columns z"], patch: int
) -> Float[AnyArray, "*any G C"]:
    """Groups latents into latent tokens, squares of p = `patch` latents per side.

    Args:
      latents: [..., rows, columns, z].
    Returns:
      [..., rows / p * columns / p, p * p * z]. The order in a token is patch row, patch column, z
      (z fastest).
    """
    return einops.rearrange(latents, "... (h p) (w q) z -> ... (h w) (p q z)", p=patch, q=patch)


def to_latents(
    tokens: Float[AnyArray, "*any G C"], grid: tuple[int, int], patch: int
) -> Float[AnyArray, "*any rows columns z"]:
    """Inverse of `to_tokens`.

    Args:
      tokens: [..., G, p * p * z].
      grid: numbers of rows and columns of latent tokens.
      patch: p.
    Returns:
      [..., rows, columns, z] of latents.
    """
    return einops.rearrange(
        tokens, "... (h w) (p q z) -> ... (h p) (w q) z", h=grid[0], w=grid[1], p=patch, q=patch
    )


@sharding.jit_on_mesh(static_argnames=("config",))
def encode(
    params: dict,
    pixels: Float[AnyArray, "B height width 3"],
    noise: Float[AnyArray, "B rows columns z"],
    *,
    config: ModelConfig,
) -> Float32[Array, "B rows columns z"]:
    """Latents of images. The posterior is sampled, at inference too, as in the official code.

    Args:
      pixels: [B, height, width, 3] in [-1, 1].
      noise: [B, rows, columns, z], standard normal; zeros give the mean of the posterior.
    Returns:
      [B, rows, columns, z].
    """
    mean, log_variance = bagel.encode_pixels(params, pixels, config=config)
    vae = config.generation.vae
    return vae.scale * (mean + jnp.exp(log_variance / 2) * noise - vae.shift)


@sharding.jit_on_mesh(static_argnames=("grid", "config"))
def decode(
    params: dict,
    tokens: Float[AnyArray, "B G C"],
    *,
    grid: tuple[int, int],
    config: ModelConfig,
) -> UInt8[Array, "B height width 3"]:
    """Decodes latent tokens of images of one grid to pixels.

    Pixels are truncated, not rounded, as in the official code:
    floor(255 clip(x / 2 + 1 / 2, 0, 1)).

    Args:
      tokens: [B, G, C], G = grid rows * grid columns.
      grid: numbers of rows and columns of latent tokens.
    Returns:
      [B, height, width, 3].
    """
    pixels = bagel.decode_latents(
        params, to_latents(tokens, grid, config.generation.patch), config=config
    )
    return (jnp.clip(pixels * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


# --- training -------------------------------------------------------------------------------------


def training_times(raw: Float[AnyArray, "*any"], shift: float) -> Float[AnyArray, "*any"]:
    """Flow times of standard normal samples: sigmoid, then the training shift.

    A sample of -inf gives time 0, a clean image.
    """
    return shifted(jax.nn.sigmoid(raw), shift)


def normalize_padded(
    pixels: UInt8[AnyArray, "*any height width 3"], sizes: Int[AnyArray, "*any 2"]
) -> tuple[Float32[Array, "*any height width 3"], Bool[Array, "*any height width"]]:
    """Normalised pixels of padded images, and where the images are.

    Args:
      pixels: [..., height, width, 3], each image in the upper left corner.
      sizes: [..., 2], height and width of each image in pixels.
    Returns:
      ([..., height, width, 3] in [-1, 1] inside the image and 0 outside; [..., height, width], True
      inside).
    """
    rows, columns = jnp.arange(pixels.shape[-3])[:, None], jnp.arange(pixels.shape[-2])
    inside = (rows < sizes[..., :1, None]) & (columns < sizes[..., 1:, None])
    return jnp.where(inside[..., None], images.normalize(pixels), 0.0), inside


def with_latents(
    params: dict,
    context: Context,
    pixels: UInt8[AnyArray, "B M height width 3"],
    sizes: Int[AnyArray, "B M 2"],
    noise: Float[AnyArray, "B M rows columns z"],
    *,
    config: ModelConfig,
) -> Context:
    """A context whose latent tokens are those of images, encoded by the frozen autoencoder.

    Images of several sizes are encoded in one shape, padded with zeros, and cropped afterwards, as
    in the official code. Near the padding their latents differ slightly from those of an image
    that is encoded alone.

    Args:
      context: Context [B, T], packed with latents of any values. Its latent images are the images
        in order; an image to generate is two of them, the first one noised.
      pixels: [B, M, height, width, 3].
      sizes: [B, M, 2], height and width in pixels, 0 where there is no image.
      noise: [B, M, rows, columns, z], noise of the posterior.
    Returns:
      Context [B, T]. No gradient flows through its latent tokens.
    """
    latents, generation, (batch, count) = context.latents, config.generation, pixels.shape[:2]
    assert latents is not None

    def flat(x):
        return x.reshape(batch * count, *x.shape[2:])

    normalized, _ = normalize_padded(pixels, sizes)
    encoded = encode(params, flat(normalized), flat(noise), config=config)
    tokens: Any = to_tokens(encoded, generation.patch)
    size, columns = tokens.shape[1], pixels.shape[3] // generation.stride
    row, column = latents.table_ids // generation.side, latents.table_ids % generation.side
    noised = latents.noised[:, -latents.image.shape[1] :]
    begins = (noised > 0) & (noised != jnp.pad(noised, ((0, 0), (1, 0)))[:, :-1])
    earlier = jnp.cumsum(begins, axis=1) - (noised > 0)  # noised images before this one
    image = jnp.maximum(latents.image - 1 - earlier, 0)
    at = image * size + row * columns + column
    tokens = jnp.take_along_axis(tokens.reshape(batch, count * size, -1), at[:, :, None], axis=1)
    tokens = jnp.where(latents.image[:, :, None] > 0, jax.lax.stop_gradient(tokens), 0.0)
    return dataclasses.replace(context, latents=dataclasses.replace(latents, tokens=tokens))


def loss(
    params: dict,
    context: Context,
    times: Float[AnyArray, "B G"],
    noise: Float[AnyArray, "B G C"],
    *,
    config: ModelConfig,
) -> tuple[Float[Array, "B G C"], Bool[AnyArray, "B G"], Float[Array, "B _ D"]]:
    """Squared velocity errors on a packed batch with latents.

    The official loss is the mean of the errors over the counted tokens and their values.

    Args:
      context: Context [B, T] with latents: clean tokens, in which noised images are marked.
      times: [B, G], flow time of each token, 0 where it is clean.
      noise: [B, G, C].
    Returns:
      (errors [B, G, C]; counted [B, G], the tokens with t > 0; hidden states [B, T + G, D]).
    """
    clean = context.latents.tokens
    x = (1 - times)[:, :, None] * clean + times[:, :, None] * noise
    hidden, _ = bagel.read(params, context, config=config, latents=x, times=times)
    predicted = bagel.velocity(params, hidden[:, -clean.shape[1] :], config=config)
    counted = (times > 0) & (context.latents.image > 0)
    return jnp.where(counted[:, :, None], (predicted - (noise - clean)) ** 2, 0.0), counted, hidden
