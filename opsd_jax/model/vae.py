"""FLUX autoencoder: pixels <-> latents (official: modeling/autoencoder.py).

Letters: N images, H and W pixels, h and w latents (H = h * downsample, W = w * downsample), z
latent channels, C channels. Axes are [N, height, width, channels]. Parameter paths follow the names
in the released checkpoints, see `params.find`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from opsd_jax.array_types import AnyArray
from opsd_jax.model import attention
from opsd_jax.model.config import VAEConfig

_GROUPS = 32
_EPS = 1e-6


class Conv(nn.Module):
    """Convolution with bias, [N, H, W, C] -> [N, H', W', features].

    pad: pixels that are added on all four sides, or ((top, bottom), (left, right)).
    """

    features: int
    size: int = 3
    stride: int = 1
    pad: int | tuple[tuple[int, int], tuple[int, int]] = 1

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N H W C"]) -> Float[Array, "N _ _ {self.features}"]:
        init = nn.initializers.lecun_normal()
        kernel = self.param("conv_kernel", init, (self.size, self.size, x.shape[-1], self.features))
        bias = self.param("conv_bias", nn.initializers.zeros, (self.features,))
        return convolve(x, kernel, bias, self.stride, self.pad)


def convolve(
    x: Float[AnyArray, "N H W C"],
    kernel: Float[AnyArray, "k k C D"],
    bias: Float[AnyArray, " D"],
    stride: int = 1,
    pad: int | tuple[tuple[int, int], tuple[int, int]] = 1,
) -> Float[Array, "N _ _ D"]:
    """Convolution of x [N, H, W, C] with kernel [k, k, C, D], plus bias [D]: [N, H', W', D].

    Computed in the dtype of x. pad: as in `Conv`.
    """
    pads = ((pad, pad), (pad, pad)) if isinstance(pad, int) else pad
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel, x.dtype),
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias.astype(x.dtype)


def group_norm(
    x: Float[AnyArray, "N H W C"], scale: Float[AnyArray, " C"], bias: Float[AnyArray, " C"]
) -> Float[Array, "N H W C"]:
    """Group norm of x [N, H, W, C] over 32 groups of channels and all pixels of an image.

    Computed in float32; keeps the dtype of x.
    """
    n, h, w, c = x.shape
    y = jnp.asarray(x, jnp.float32).reshape(n, h * w, _GROUPS, c // _GROUPS)
    mean = jnp.mean(y, axis=(1, 3), keepdims=True)
    y = y - mean
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 3), keepdims=True) + _EPS)
    return (y.reshape(n, h, w, c) * scale + bias).astype(x.dtype)


class _Layers(nn.Module):
    """Base class of the blocks: named convolutions and norms with parameters of the block."""

    def conv(self, name, x, features, size=3):
        init = nn.initializers.lecun_normal()
        kernel = self.param(f"{name}_kernel", init, (size, size, x.shape[-1], features))
        return convolve(
            x, kernel, self.param(f"{name}_bias", nn.initializers.zeros, (features,)), pad=size // 2
        )

    def norm(self, name, x):
        width = (x.shape[-1],)
        return group_norm(
            x,
            self.param(f"{name}_scale", nn.initializers.ones, width),
            self.param(f"{name}_bias", nn.initializers.zeros, width),
        )


class ResBlock(_Layers):
    """Two 3x3 convolutions with a shortcut: [N, H, W, C] -> [N, H, W, features].

    The shortcut is a 1x1 convolution where the number of channels changes.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W {self.features}"]:
        y = self.conv("conv1", jax.nn.silu(self.norm("norm1", x)), self.features)
        y = self.conv("conv2", jax.nn.silu(self.norm("norm2", y)), self.features)
        if x.shape[-1] != self.features:
            x = self.conv("nin_shortcut", x, self.features, size=1)
        return x + y


class AttentionBlock(_Layers):
    """Attention with one head over all pixels, added to its input: [N, H, W, C] -> [N, H, W, C]."""

    query_block: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        y = self.norm("norm", x)
        q, k, v = (self.conv(name, y, c, size=1).reshape(n, h * w, 1, c) for name in "qkv")
        everything = jnp.ones((n, h * w, 1), bool)  # broadcasts over keys
        y = attention.attend(q, k, v, everything, self.query_block)
        return x + self.conv("proj_out", y.reshape(x.shape), c, size=1)


class Encoder(_Layers):
    """Pixels [N, H, W, 3] in [-1, 1] -> moments [N, h, w, 2z]: means, then log-variances."""

    config: VAEConfig
    query_block: int = 0

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N H W 3"]) -> Float[Array, "N h w _"]:
        c = self.config
        last = len(c.multipliers) - 1
        x = self.conv("conv_in", x, c.channels)
        for level, multiplier in enumerate(c.multipliers):
            for block in range(c.num_res_blocks):
                x = ResBlock(c.channels * multiplier, name=f"down_{level}_block_{block}")(x)
            if level < last:  # pads one row below and one column to the right, then halves
                x = Conv(
                    x.shape[-1], stride=2, pad=((0, 1), (0, 1)), name=f"down_{level}_downsample"
                )(x)
        x = _middle(x, self.query_block)
        return self.conv("conv_out", jax.nn.silu(self.norm("norm_out", x)), 2 * c.z_channels)


class Decoder(_Layers):
    """Latents [N, h, w, z], not scaled or shifted, -> pixels [N, H, W, 3], not clipped."""

    config: VAEConfig
    query_block: int = 0

    @nn.compact
    def __call__(self, x: Float[AnyArray, "N h w z"]) -> Float[Array, "N H W 3"]:
        c = self.config
        x = _middle(self.conv("conv_in", x, c.channels * c.multipliers[-1]), self.query_block)
        for level in reversed(range(len(c.multipliers))):
            for block in range(c.num_res_blocks + 1):
                x = ResBlock(c.channels * c.multipliers[level], name=f"up_{level}_block_{block}")(x)
            if level:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Conv(x.shape[-1], name=f"up_{level}_upsample")(x)
        return self.conv("conv_out", jax.nn.silu(self.norm("norm_out", x)), 3)


def _middle(x, query_block):
    """The blocks at the lowest resolution, [N, h, w, C] -> [N, h, w, C]."""
    x = ResBlock(x.shape[-1], name="mid_block_1")(x)
    x = AttentionBlock(query_block, name="mid_attn_1")(x)
    return ResBlock(x.shape[-1], name="mid_block_2")(x)
