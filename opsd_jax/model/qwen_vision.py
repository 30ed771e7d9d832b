"""Vision towers of Qwen2.5-VL and Qwen3-VL on packed images of any size, and their mergers.

Both encode patches in merge blocks: the m * m patches of a square follow one another, and the
merger makes one token of them. Each patch knows its place and the size of its image, its `cell`
(row, column, rows, columns). Rotary positions of two dimensions follow from it.

  Qwen2.5-VL   RMS norms, gated MLP with biases. Most layers attend within windows, squares of
               `window` pixels, some within the whole image. A window is one more document number:
               the layers of the one scan differ in the numbers that their mask compares.
  Qwen3-VL     layer norms, plain MLP, and a table of positions, resampled to each image. The
               outputs of some layers have mergers of their own. Their features are added to the
               decoder's hidden states after its first layers (DeepStack, `mot.Deep`).

Letters: B batch, P patches (all images of a sequence, one after the other), C values of a patch of
one frame (row, column, rgb), E embedding of the tower, D embedding of the decoder, M = P / m^2
tokens, N layers whose outputs have mergers of their own.
Official: transformers, models/qwen2_5_vl and models/qwen3_vl.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.model import attention, masks
from opsd_jax.model.config import ViTConfig
from opsd_jax.model.layers import dense, matrix_init
from opsd_jax.model.mot import rms_norm
from opsd_jax.model.siglip import layer_norm

_THETA = 10_000.0
_MOST_WINDOWS = 1 << 20  # of an image: more than it can have patches


def normalize(
    patches: Float[AnyArray, "B P C"] | UInt8[AnyArray, "B P C"], config: ViTConfig
) -> Float32[Array, "B P C"]:
    """Patches as the tower reads them, float32 [B, P, C]: (value - mean) / std of each channel.

    patches: uint8 [B, P, C]; or floats in [-1, 1] instead of [0, 1], see `context.Context`.
    """
    if patches.dtype == jnp.uint8:
        value = jnp.asarray(patches, jnp.float32) / 255
    else:
        value = (jnp.asarray(patches, jnp.float32) + 1) / 2
    of_channel = value.reshape(*value.shape[:-1], -1, 3)
    mean, std = (np.asarray(x, np.float32) for x in (config.mean, config.std))
    return ((of_channel - mean) / std).reshape(value.shape)


def window_numbers(
    cells: Int[AnyArray, "B P 4"], image: Int[AnyArray, "B P"], side: int
) -> Int32[Array, "B P"]:
    """A number of the window of each patch, different for all windows of a sequence; 0 at padding.

    Windows are squares of patches from the upper left corner, cut at the other borders.

    Args:
      cells: int32 [B, P, 4]. image: int32 [B, P], see `context.Context`.
      side: patches along a side of a window.
    """
    row, column, _, columns = jnp.moveaxis(jnp.asarray(cells), -1, 0)
    window = row // side * -(-columns // side) + column // side
    return jnp.where(image > 0, image * _MOST_WINDOWS + window, 0)


def rope_tables(cells: Int[AnyArray, "B P 4"], head_dim: int):
    """Cosines and sines of the rotation angles of patches, float32 [B, P, 1, head_dim] each.

    The first half of the frequencies turns with the row, the second with the column.
    """
    frequencies = attention.rope_frequencies(head_dim // 2, _THETA)
    row, column = (cells[:, :, n, None].astype(jnp.float32) * frequencies for n in (0, 1))
    return attention.half_split(jnp.concatenate([row, column], axis=-1))


def resample(
    table: Float[AnyArray, "_ E"], cells: Int[AnyArray, "B P 4"]
) -> Float32[Array, "B P E"]:
    """The table of positions, resampled to the size of each image: float32 [B, P, E].

    It is bilinear, and the corners of the image are at the corners of the table (align_corners).

    Args:
      table: [side * side, E]. cells: int32 [B, P, 4].
    """
    side = round(table.shape[0] ** 0.5)

    def taps(place, count):  # the entries on both sides, and the share of the second
        # In whole numbers, so that a place on an entry is exactly on it.
        low, over = jnp.divmod(place * (side - 1), jnp.maximum(count - 1, 1))
        share = over.astype(jnp.float32) / jnp.maximum(count - 1, 1)
        return low, jnp.minimum(low + 1, side - 1), share

    row, column, rows, columns = jnp.moveaxis(jnp.asarray(cells), -1, 0)
    top, bottom, down = taps(row, rows)
    left, right, over = taps(column, columns)
    corners = (
        (top, left, (1 - down) * (1 - over)),
        (top, right, (1 - down) * over),
        (bottom, left, down * (1 - over)),
        (bottom, right, down * over),
    )
    wide = jnp.asarray(table, jnp.float32)
    return sum(wide[r * side + c] * weight[:, :, None] for r, c, weight in corners)


class _Affine(nn.Module):
    """What layers and mergers share: matrices with biases, and the norm of their family."""

    config: ViTConfig

    def _affine(self, x, name, width):
        return dense(
            x,
            self.param(f"{name}_kernel", matrix_init, (x.shape[-1], width)),
            self.param(f"{name}_bias", nn.initializers.zeros, (width,)),
        )

    def _norm(self, x, name):
        width, eps = (x.shape[-1],), self.config.layer_norm_eps
        scale = self.param(f"{name}_scale", nn.initializers.ones, width)
        if self.config.kind == "qwen2_5_vl":
            return rms_norm(x, scale, eps)
        return layer_norm(x, scale, self.param(f"{name}_bias", nn.initializers.zeros, width), eps)


class Layer(_Affine):
    """One pre-norm layer. The carry of the scan is (x [B, P, E], taps [N, B, P, E] or None).

    kind, query_block: `attention` and `query_block` of ModelConfig.

    `__call__` also takes, of this layer, whether it attends to whole images, and where in the taps
    its output is kept (N: nowhere); of all layers, the rotary tables and the numbers of image and
    window of each patch.
    """

    kind: str = "dense"
    query_block: int = 0

    @nn.compact
    def __call__(self, carry, own, rope, image, window):
        c, (x, taps), (full, tap) = self.config, carry, own
        x = sharding.constrain_batch(x)
        document = jnp.where(full, image, window)
        everything = jnp.full_like(image, image.shape[1])
        mask = masks.lay_out(masks.Mask(everything, document, document), image.shape[1], self.kind)
        y = self._affine(self._norm(x, "norm1"), "qkv", 3 * c.hidden_size)
        q, k, v = jnp.moveaxis(y.reshape(*y.shape[:2], 3, c.num_heads, -1), 2, 0)
        q, k = attention.rotate(q, rope), attention.rotate(k, rope)
        attended = attention.attend(q, k, v, mask, self.query_block, self.kind)
        x = x + self._affine(attended, "o", c.hidden_size)
        y = self._norm(x, "norm2")
        if c.kind == "qwen2_5_vl":
            gate = jax.nn.silu(self._affine(y, "gate", c.intermediate_size))
            y = gate * self._affine(y, "up", c.intermediate_size)
            x = x + self._affine(y, "down", c.hidden_size)
        else:
            y = jax.nn.gelu(self._affine(y, "fc1", c.intermediate_size), approximate=True)
            x = x + self._affine(y, "fc2", c.hidden_size)
        if taps is not None:
            taps = taps.at[tap].set(x, mode="drop")
        return (sharding.constrain_batch(x), taps), None


class Encoder(nn.Module):
    """The vision tower.

    `__call__` maps normalised patches [B, P, C], their cells, int32 [B, P, 4], and the number of
    each patch's image, int32 [B, P] (0: padding), to the outputs of the last layer, [B, P, E], and
    of the layers `deepstack`, [N, B, P, E] (None without any).
    unroll, kind, remat, query_block: `unroll`, `attention`, `remat`, `query_block` of ModelConfig.
    """

    config: ViTConfig
    unroll: int = 1
    kind: str = "dense"
    remat: str = "none"
    query_block: int = 0

    @nn.compact
    def __call__(
        self,
        patches: Float[AnyArray, "B P C"],
        cells: Int[AnyArray, "B P 4"],
        image: Int[AnyArray, "B P"],
    ) -> tuple[Float[Array, "B P E"], Float[Array, "N B P E"] | None]:
        c = self.config
        x = self._embed(patches)
        if c.kind == "qwen3_vl":
            table = self.param(
                "position",
                nn.initializers.normal(c.hidden_size**-0.5),
                (c.side * c.side, c.hidden_size),
            )
            x = x + resample(table, cells).astype(x.dtype)
        count = len(c.deepstack)
        full, tap = np.ones(c.num_layers, bool), np.full(c.num_layers, count, np.int32)
        tap[list(c.deepstack)] = np.arange(count)
        image = jnp.asarray(image)
        window = image
        if c.window:
            full[:] = np.isin(np.arange(c.num_layers), c.full_layers)
            window = window_numbers(cells, image, c.window_side)
        taps = jnp.zeros((count, *x.shape), x.dtype) if count else None
        rope = rope_tables(cells, c.hidden_size // c.num_heads)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat == "full" else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            unroll=self.unroll,
        )(c, self.kind, self.query_block, name="layers")
        (x, taps), _ = layers((x, taps), (full, tap), rope, image, window)
        return x, taps

    def _embed(self, patches):
        """[B, P, E]. The frames of a patch are equal, so that their kernels are added."""
        c = self.config
        shape = (c.temporal_patch, c.patch_size, c.patch_size, 3, c.hidden_size)
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2, 3)
        )
        kernel = jnp.sum(self.param("patch_convolution", init, shape), axis=0)
        bias = None
        if c.kind == "qwen3_vl":
            bias = self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,))
        return dense(patches, kernel.reshape(-1, c.hidden_size), bias)


class Merger(_Affine):
    """One token of the decoder of each merge block, [B, P, E] -> [B, M, D].

    hidden_size: D. joined: whether the norm is over the whole block, as in the mergers of
    DeepStack, or over each patch.
    """

    hidden_size: int = 0
    joined: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B P E"]) -> Float[Array, "B M D"]:
        width = self.config.merge**2 * x.shape[-1]
        block = (x.shape[0], -1, width)
        if self.joined:
            y = self._norm(x.reshape(block), "norm")
        else:
            y = self._norm(x, "norm").reshape(block)
        y = jax.nn.gelu(self._affine(y, "fc1", width), approximate=False)
        return self._affine(y, "fc2", self.hidden_size)


class Connector(nn.Module):
    """The mergers of the tower's outputs.

    `__call__` maps the results of `Encoder` to tokens [B, M, D] and the features that are added in
    the decoder, [N, B, M, D] (None without any).
    """

    config: ViTConfig
    hidden_size: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B P E"], taps: Float[Array, "N B P E"] | None
    ) -> tuple[Float[Array, "B M D"], Float[Array, "N B M D"] | None]:
        tokens = Merger(self.config, self.hidden_size, name="merger")(x)
        if taps is None:
            return tokens, None
        mergers = nn.vmap(Merger, variable_axes={"params": 0}, split_rngs={"params": True})(
            self.config, self.hidden_size, joined=True, name="deepstack"
        )
        return tokens, mergers(taps)
