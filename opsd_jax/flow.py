"""Drawing by flow matching, and the loss that teaches it (official: bagel.py, generate_image; inferencer.py).

t = 1 is noise, t = 0 is data: x_t = (1 - t) x_0 + t noise, the model predicts v = noise - x_0, and a step goes
x <- x - v dt. The image is drawn as one block of latent tokens behind a context:

  ... context ... | <img  L0 L1 .. img>      all of the block sees all of the block and the context

Guidance evaluates it behind up to three contexts: everything so far (cond), everything before the latest text of
the user (text), the texts of the user without images (image). The contexts lie one after another on the batch axis
and run as one forward; their keys and values are computed once, and each step overwrites the block's own in place.

Letters: B images, R branches (1 to 3), G latent tokens, C values of one (patch row, patch column, z), V = [B, G, C].
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import images, sharding
from opsd_jax.method_config import RENORMS as RENORMS
from opsd_jax.method_config import FlowConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig

HARNESS = {"text_scale": 4.0, "image_scale": 2.0, "interval": (0.0, 1.0), "renorm": "text_channel"}


# --- schedule and guidance -------------------------------------------------------------------------------------


def shifted(times, shift: float):
    """s t / (1 + (s - 1) t): times moved towards 1 for s > 1."""
    return shift * times / (1 + (shift - 1) * times)


def timesteps(config: FlowConfig) -> np.ndarray:
    """The time grid, float32 [num_timesteps], from 1 down to 0."""
    return shifted(
        np.linspace(1, 0, config.num_timesteps, dtype=np.float32), np.float32(config.timestep_shift)
    )


def guided_steps(config: FlowConfig) -> tuple[int, int]:
    """Steps first .. last - 1 are guided. Times fall, so they are one run; comparison is with the shifted times."""
    times, (low, high) = timesteps(config)[:-1], config.interval
    inside = np.flatnonzero((low < times) & (times <= high))
    if len(config.branches) == 1 or not len(inside):
        return 0, 0
    return int(inside[0]), int(inside[-1]) + 1


def guide(velocity, text, image, real, config: FlowConfig):
    """The guided velocity [B, G, C] of the three branches (image may be None), with scales a and b:

      u = text + a (velocity - text)
      global, channel    if b > 1: u <- image + b (u - image);  u <- u * r(u)
      text_channel       u <- u * r(u);  if b > 1: u <- image + b (u - image)

    r(u) = clip(|velocity| / |u|, renorm_min, 1), norms over the whole image (global) or each token.
    real: bool [B, G], False at padding.
    """
    kept = jnp.where(real[:, :, None], 1.0, 0.0)
    axes = (1, 2) if config.renorm == "global" else (2,)
    norm = lambda v: jnp.sqrt(jnp.sum(v * v * kept, axis=axes, keepdims=True))
    renormed = lambda u: u * jnp.clip(norm(velocity) / (norm(u) + 1e-8), config.renorm_min, 1.0)
    u = text + config.text_scale * (velocity - text)
    if config.renorm == "text_channel":
        u = renormed(u)
    if image is not None:
        u = image + config.image_scale * (u - image)
    return u if config.renorm == "text_channel" else renormed(u)


# --- drawing ---------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segment", "rope", "positions", "real"],
    meta_fields=["slots"],
)
@dataclasses.dataclass(frozen=True)
class Canvas:
    """Where the steps of a drawing look: R * B contexts in a cache, and the block that is drawn behind each.

    The cache {"k", "v": [L, R * B, slots + 2 + G, K, h]} goes beside it, because each step writes to it.
    segment: int32 [R * B, slots + 2 + G], of all keys.
    rope: int32 [R * B], the block's rope id. positions: int32 [B, G], ids in the latents' position table.
    real: bool [B, G], False at padding. slots: static number of context slots.
    """

    segment: jax.Array
    rope: jax.Array
    positions: jax.Array
    real: jax.Array
    slots: int


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config",))
def prepare(params, contexts, positions, real, *, config: ModelConfig):
    """Computes the keys and values of the contexts: (Canvas, cache).

    Args:
      contexts: Context [R * B, T], branch by branch in the order of `FlowConfig.branches`.
      positions: int32 [B, G], real: bool [B, G] (a prefix of each row): the image's tokens, see `layout`.
    """
    rows, slots = contexts.positions.shape
    block = 2 + positions.shape[1]
    tiled = jnp.tile(real, (rows // real.shape[0], 1))
    segment = jnp.concatenate(
        [contexts.segment, jnp.ones((rows, 2), jnp.int32), tiled.astype(jnp.int32)], axis=1
    )
    cache = bagel.init_cache(rows, slots + block, config=config)
    _, cache = bagel.read(
        params, contexts, config=config, cache=cache, key_segment=segment.at[:, slots:].set(0)
    )
    return Canvas(segment, contexts.next_position, positions, real, slots), cache


def velocities(params, canvas: Canvas, cache, x, t, *, config: FlowConfig):
    """Raw velocities behind every context of the canvas at x [B, G, C] and the scalar time t: (float32 [R, B, G, C],
    cache). The cache comes back with the block's keys and values in it."""
    model = config.model
    batch, tokens, _ = x.shape
    rows = canvas.segment.shape[0]
    latents = bagel.embed_latents(params, x, jnp.reshape(t, (1, 1)), canvas.positions, config=model)
    ends = bagel.embed_tokens(
        params, jnp.array([[config.image_start, config.image_end]]), config=model
    )
    # start and end stand before the latents, where the expert's cut wants them: inside the block order has no meaning
    block = jnp.concatenate([jnp.broadcast_to(ends, (batch, *ends.shape[1:])), latents], axis=1)
    block = jnp.tile(block, (rows // batch, 1, 1))
    # one query stands for all: they share their rope id and see the same keys, so that the mask is [R * B, 1, keys]
    everything, document = (
        jnp.full((rows, 1), canvas.segment.shape[1]),
        jnp.ones((rows, 1), jnp.int32),
    )
    hidden, cache = bagel.forward(
        params,
        block,
        canvas.rope[:, None],
        everything,
        document,
        config=model,
        cache=cache,
        offset=canvas.slots,
        key_segment=canvas.segment,
        latents=tokens,
    )
    found = bagel.velocity(params, hidden[:, 2:], config=model)
    return found.reshape(rows // batch, batch, *found.shape[1:]), cache


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "guided"), donate_argnames=("cache", "x"))
def denoise(params, canvas: Canvas, cache, x, first, last, *, config: FlowConfig, guided: bool):
    """Euler steps first .. last - 1 (traced: one program for any number of them) of x [B, G, C].

    guided: whether canvas and cache hold all branches and they are combined; else the cond contexts alone.
    Returns (x, cache); both are donated.
    """
    times = jnp.asarray(timesteps(config))

    def step(n, carry):
        x, cache = carry
        found, cache = velocities(params, canvas, cache, x, times[n], config=config)
        v = (
            guide(found[0], found[1], found[2] if len(found) > 2 else None, canvas.real, config)
            if guided
            else found[0]
        )
        return x - v * (times[n] - times[n + 1]), cache

    return jax.lax.fori_loop(first, last, step, (x, cache))


def draw(
    params, contexts, noise, positions, real, *, config: FlowConfig, on_step=None, every: int = 5
):
    """Draws B images: latent tokens float32 [B, G, C] at t = 0.

    Args:
      contexts, positions, real: as in `prepare`. noise: float32 [B, G, C], x at t = 1.
      on_step: called with the number of steps done, every `every` steps; None runs all of them in one call.
    """
    batch, needed = positions.shape[0], len(config.branches) * positions.shape[0]
    if contexts.positions.shape[0] != needed:
        raise ValueError(
            f"{batch} images with the branches {', '.join(config.branches)} need {needed} contexts, "
            f"branch by branch, not {contexts.positions.shape[0]}"
        )
    canvas, cache = prepare(params, contexts, positions, real, config=config.model)
    x, steps = jnp.array(noise), config.num_timesteps - 1
    first, last = guided_steps(config)
    for begin, end, guided in ((0, first, False), (first, last, True), (last, steps, False)):
        if begin == end:
            continue
        place, keys = canvas, cache
        if (
            not guided and len(canvas.rope) > batch
        ):  # the first branch is enough: its keys are copied out, once
            place, keys = _first_branch(canvas, cache, batch)
        for start in range(begin, end, every if on_step else steps):
            stop = min(start + every, end) if on_step else end
            x, keys = denoise(params, place, keys, x, start, stop, config=config, guided=guided)
            if on_step:
                jax.block_until_ready(x)
                on_step(stop)
        if guided:
            cache = keys  # the old one was donated
    return x


@functools.partial(jax.jit, static_argnames=("batch",))
def _first_branch(canvas, cache, batch):
    place = dataclasses.replace(
        canvas, **{name: getattr(canvas, name)[:batch] for name in ("segment", "rope")}
    )
    return place, jax.tree.map(lambda a: a[:, :batch], cache)


def layout(grids, tokens: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions int32 [B, tokens], real bool [B, tokens]) of images of these grids (rows, columns) of latent tokens."""
    positions, real = np.zeros((len(grids), tokens), np.int32), np.zeros((len(grids), tokens), bool)
    for b, grid in enumerate(grids):
        ids = images.position_ids(grid, side)
        positions[b, : len(ids)], real[b, : len(ids)] = ids, True
    return positions, real


# --- pixels and latents ----------------------------------------------------------------------------------------


def to_tokens(latents, patch: int):
    """Latents [..., h, w, z] -> tokens [..., h/p * w/p, p * p * z] (patch row, patch column, z; z fastest)."""
    return einops.rearrange(latents, "... (h p) (w q) z -> ... (h w) (p q z)", p=patch, q=patch)


def to_latents(tokens, grid: tuple[int, int], patch: int):
    """Inverse of `to_tokens`; grid: (rows, columns) of tokens."""
    return einops.rearrange(
        tokens, "... (h w) (p q z) -> ... (h p) (w q) z", h=grid[0], w=grid[1], p=patch, q=patch
    )


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config",))
def encode(params, pixels, noise, *, config: ModelConfig):
    """Pixels float32 [N, H, W, 3] in [-1, 1] -> latents float32 [N, h, w, z].

    The posterior is sampled, as officially also at inference: noise float32 [N, h, w, z]; zeros give its mean.
    """
    mean, log_variance = bagel.encode_pixels(params, pixels, config=config)
    vae = config.generation.vae
    return vae.scale * (mean + jnp.exp(log_variance / 2) * noise - vae.shift)


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("grid", "config"))
def decode(params, tokens, *, grid: tuple[int, int], config: ModelConfig):
    """Latent tokens [N, rows * columns, C] of images of one grid -> uint8 [N, H, W, 3].

    Truncated, not rounded, as officially: floor(255 clip(x / 2 + 1 / 2, 0, 1)).
    """
    pixels = bagel.decode_latents(
        params, to_latents(tokens, grid, config.generation.patch), config=config
    )
    return (jnp.clip(pixels * 0.5 + 0.5, 0, 1) * 255).astype(jnp.uint8)


# --- training --------------------------------------------------------------------------------------------------


def training_times(raw, shift: float):
    """Standard normal draws -> flow times: sigmoid, then the training shift. -inf gives 0, a clean image."""
    return shifted(jax.nn.sigmoid(raw), shift)


def padded(pixels, sizes):
    """uint8 [..., H, W, 3] with the sizes int32 [..., 2] (height, width) of the pictures in their upper left corners ->
    (float32 in [-1, 1], 0 outside of the picture; bool [..., H, W], inside)."""
    rows, columns = jnp.arange(pixels.shape[-3])[:, None], jnp.arange(pixels.shape[-2])
    inside = (rows < sizes[..., :1, None]) & (columns < sizes[..., 1:, None])
    return jnp.where(inside[..., None], images.normalize(pixels), 0.0), inside


def with_latents(params, context, pixels, sizes, noise, *, config: ModelConfig):
    """A context whose latent tokens are those of pictures, encoded by the frozen autoencoder.

    Pictures of several sizes are encoded in one shape, padded with zeros, and cut afterwards, as officially; near the
    padding they come out a little otherwise than alone.

    Args:
      context: packed with latents of any values. Picture 0 of a row is its latent image 1, and a later picture m its
        latent images 2 m (noised) and 2 m + 1 (clean).
      pixels: uint8 [B, M, H, W, 3]. sizes: int32 [B, M, 2], 0 where there is no picture. noise: float32 [B, M, h, w, z],
        of the posterior.
    """
    found, drawn, (batch, count) = context.latents, config.generation, pixels.shape[:2]
    flat = lambda x: x.reshape(batch * count, *x.shape[2:])
    tokens = to_tokens(
        encode(params, flat(padded(pixels, sizes)[0]), flat(noise), config=config), drawn.patch
    )
    size, columns = tokens.shape[1], pixels.shape[3] // drawn.stride
    row, column = found.positions // drawn.side, found.positions % drawn.side
    at = found.image // 2 * size + row * columns + column
    tokens = jnp.take_along_axis(tokens.reshape(batch, count * size, -1), at[:, :, None], axis=1)
    tokens = jnp.where(found.image[:, :, None] > 0, jax.lax.stop_gradient(tokens), 0.0)
    return dataclasses.replace(context, latents=dataclasses.replace(found, tokens=tokens))


def loss(params, context, times, noise, *, config: ModelConfig):
    """Squared velocity errors on a packed batch with latents.

    Args:
      context: Context with latents (clean tokens; noised images are marked). times: float32 [B, G], flow time of each
        token, 0 where it is clean. noise: float32 [B, G, C].
    Returns:
      (errors float32 [B, G, C], counted bool [B, G]: the tokens with t > 0, hidden [B, T + G, D]). The official loss
      is the mean of errors over counted tokens and their values.
    """
    clean = context.latents.tokens
    x = (1 - times)[:, :, None] * clean + times[:, :, None] * noise
    hidden, _ = bagel.read(params, context, config=config, latents=x, times=times)
    predicted = bagel.velocity(params, hidden[:, -clean.shape[1] :], config=config)
    counted = (times > 0) & (context.latents.image > 0)
    return jnp.where(counted[:, :, None], (predicted - (noise - clean)) ** 2, 0.0), counted, hidden
