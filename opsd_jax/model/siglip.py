"""SigLIP vision tower on packed patches of any sizes (NaViT), and the connector to the decoder.

Letters: B batch, P patches of all images of a row in one sequence, C patch values (row, column, rgb), E hidden.
Official: modeling/bagel/siglip_navit.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import sharding
from opsd_jax.model import attention
from opsd_jax.model.config import ViTConfig
from opsd_jax.model.mot import _matrix, dense


def layer_norm(x, scale, bias, eps):
    """Layer norm over the last axis in float32; keeps the dtype of x."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)


def gelu(x):
    """Its tanh approximation, as in the release."""
    return jax.nn.gelu(x, approximate=True)


class Layer(nn.Module):
    """One pre-norm encoder layer; every image attends to itself only. No rotary positions."""

    config: ViTConfig
    kind: str = "dense"
    query_block: int = 0

    def _affine(self, x, name, width):
        return dense(
            x,
            self.param(f"{name}_kernel", _matrix, (x.shape[-1], width)),
            self.param(f"{name}_bias", nn.initializers.zeros, (width,)),
        )

    def _norm(self, x, name):
        width = (x.shape[-1],)
        return layer_norm(
            x,
            self.param(f"{name}_scale", nn.initializers.ones, width),
            self.param(f"{name}_bias", nn.initializers.zeros, width),
            self.config.layer_norm_eps,
        )

    @nn.compact
    def __call__(self, x, mask):
        c = self.config
        x = sharding.constrain_batch(x)
        y = self._norm(x, "norm1")
        q, k, v = (
            self._affine(y, name, c.hidden_size).reshape(*y.shape[:2], c.num_heads, -1)
            for name in "qkv"
        )
        x = x + self._affine(
            attention.attend(q, k, v, mask, self.query_block, self.kind), "o", c.hidden_size
        )
        y = gelu(self._affine(self._norm(x, "norm2"), "fc1", c.intermediate_size))
        return sharding.constrain_batch(x + self._affine(y, "fc2", c.hidden_size)), None


class Encoder(nn.Module):
    """patches [B, P, C] (normalised), position ids int32 [B, P], image numbers int32 [B, P] (0: padding)
    -> [B, P, E]."""

    config: ViTConfig
    unroll: int = 1  # this and the others: see ModelConfig
    kind: str = "dense"
    remat: str = "none"
    query_block: int = 0

    @nn.compact
    def __call__(self, patches, positions, image):
        c = self.config
        x = dense(
            patches,
            self.param("patch_kernel", _matrix, (c.patch_dim, c.hidden_size)),
            self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,)),
        )
        table = self.param(
            "position",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.side * c.side, c.hidden_size),
        )
        x = x + table[positions].astype(x.dtype)
        everything = jnp.full_like(image, image.shape[1])
        mask = attention.lay_out(
            attention.Mask(everything, image, image), image.shape[1], self.kind
        )
        layer = nn.remat(Layer, prevent_cse=False) if self.remat == "full" else Layer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            in_axes=nn.broadcast,
            unroll=self.unroll,
        )(c, self.kind, self.query_block, name="layers")
        x, _ = layers(x, mask)
        width = (c.hidden_size,)
        return layer_norm(
            x,
            self.param("post_norm_scale", nn.initializers.ones, width),
            self.param("post_norm_bias", nn.initializers.zeros, width),
            c.layer_norm_eps,
        )


class Connector(nn.Module):
    """Linear, gelu, linear into the decoder's width, plus the fixed table of 2-D positions (never trained)."""

    hidden_size: int
    side: int

    @nn.compact
    def __call__(self, x, positions):
        d, zeros = self.hidden_size, nn.initializers.zeros
        y = gelu(
            dense(
                x,
                self.param("fc1_kernel", _matrix, (x.shape[-1], d)),
                self.param("fc1_bias", zeros, (d,)),
            )
        )
        y = dense(y, self.param("fc2_kernel", _matrix, (d, d)), self.param("fc2_bias", zeros, (d,)))
        table = self.param("position_table", lambda *_: jnp.asarray(sincos_table(self.side, d)))
        return y + table[positions].astype(y.dtype)


def sincos_table(side: int, width: int) -> np.ndarray:
    """Fixed positions float32 [side * side, width] of row-major patches.

    Row `r * side + c`: the first half of the channels encodes the COLUMN c, the second half the ROW r; each half
    is [sin(p * w_i), cos(p * w_i)], w_i = 10000 ** (-i / (width / 4)) (official: modeling_utils.py).
    """
    if width % 4:
        raise ValueError(
            f"the 2-D position table needs a width divisible by 4, got {width}: change llm.hidden_size"
        )
    waves = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)
    half = lambda p: np.concatenate(
        [np.sin(p[:, None] * waves), np.cos(p[:, None] * waves)], axis=1
    )
    return np.concatenate([half(column), half(row)], axis=1).astype(np.float32)
