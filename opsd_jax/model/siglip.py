"""SigLIP vision tower on packed images of any size (NaViT), and the connector to the decoder.

Letters: B batch, P patches (all images of a batch entry, one after the other), C values of a patch
(row, column, rgb), E embedding of the tower, D embedding of the decoder, H heads.
Official: modeling/bagel/siglip_navit.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from opsd_jax import sharding
from opsd_jax.array_types import AnyArray
from opsd_jax.model import attention, masks
from opsd_jax.model.config import ViTConfig
from opsd_jax.model.layers import dense, matrix_init


def layer_norm(
    x: Float[AnyArray, "*any E"],
    scale: Float[AnyArray, " E"],
    bias: Float[AnyArray, " E"],
    eps: float,
) -> Float[Array, "*any E"]:
    """Layer norm of x [..., E] over the last axis in float32; keeps the dtype of x."""
    y = jnp.asarray(x, jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)


def gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """GELU in its tanh approximation, as in the official model."""
    return jax.nn.gelu(x, approximate=True)


class Layer(nn.Module):
    """One pre-norm encoder layer, [B, P, E] -> [B, P, E], without rotary positions.

    mask: from `masks.lay_out`; every image attends to itself only.
    kind, query_block: `attention` and `query_block` of ModelConfig.
    """

    config: ViTConfig
    kind: str = "dense"
    query_block: int = 0

    def _affine(self, x, name, width):
        return dense(
            x,
            self.param(f"{name}_kernel", matrix_init, (x.shape[-1], width)),
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
    def __call__(
        self, x: Float[Array, "B P E"], mask: Bool[Array, "B _ _"] | masks.Plan
    ) -> tuple[Float[Array, "B P E"], None]:
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
    """The vision tower.

    `__call__` maps normalised patches [B, P, C], their indices in the position table, int32 [B, P],
    and the number of each patch's image, int32 [B, P] (0: padding), to [B, P, E].
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
        table_ids: Int[AnyArray, "B P"],
        image: Int[AnyArray, "B P"],
    ) -> Float[Array, "B P E"]:
        c = self.config
        x = dense(
            patches,
            self.param("patch_kernel", matrix_init, (c.patch_dim, c.hidden_size)),
            self.param("patch_bias", nn.initializers.zeros, (c.hidden_size,)),
        )
        table = self.param(
            "position",
            nn.initializers.normal(c.hidden_size**-0.5),
            (c.side * c.side, c.hidden_size),
        )
        x = x + table[table_ids].astype(x.dtype)
        everything = jnp.full_like(image, image.shape[1])
        mask = masks.lay_out(masks.Mask(everything, image, image), image.shape[1], self.kind)
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
    """Linear, GELU, linear, plus a fixed table of 2-D positions, which is never trained.

    `__call__` maps [B, P, E] and the indices of the patches in the position table, int32 [B, P], to
    [B, P, D].
    """

    hidden_size: int
    side: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B P E"], table_ids: Int[AnyArray, "B P"]
    ) -> Float[Array, "B P D"]:
        d, zeros = self.hidden_size, nn.initializers.zeros
        y = gelu(
            dense(
                x,
                self.param("fc1_kernel", matrix_init, (x.shape[-1], d)),
                self.param("fc1_bias", zeros, (d,)),
            )
        )
        y = dense(
            y, self.param("fc2_kernel", matrix_init, (d, d)), self.param("fc2_bias", zeros, (d,))
        )
        table = self.param("position_table", lambda *_: jnp.asarray(sincos_table(self.side, d)))
        return y + table[table_ids].astype(y.dtype)


def sincos_table(side: int, width: int) -> Float32[np.ndarray, "{side}*{side} {width}"]:
    """Fixed embeddings of the 2-D positions of side x side patches, float32 [side * side, width].

    Entry `r * side + c` belongs to image row r and column c. The first half of its channels encodes
    the COLUMN c, the second half the ROW r. Each half is [sin(p * w_i), cos(p * w_i)] with
    w_i = 10000 ** (-i / (width / 4)) (official: modeling/bagel/modeling_utils.py).

    Raises:
      ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(
            f"the 2-D position table needs a width divisible by 4, got {width}: change "
            "model.llm.hidden_size"
        )
    waves = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(side * side), side)

    def half(p):
        return np.concatenate([np.sin(p[:, None] * waves), np.cos(p[:, None] * waves)], axis=1)

    return np.concatenate([half(column), half(row)], axis=1).astype(np.float32)
