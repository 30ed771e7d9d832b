"""Latent path: latent tokens to embeddings for the decoder, hidden states to velocities.

Letters: B batch, G latent tokens, C values of a token (patch row, patch column, z), D embedding.
Official: modeling/bagel/modeling_utils.py, bagel.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from opsd_jax.array_types import AnyArray
from opsd_jax.model.config import GenerationConfig
from opsd_jax.model.layers import dense, matrix_init
from opsd_jax.model.siglip import sincos_table

_FREQUENCIES = 128


def sinusoid(times: Float[AnyArray, "*any"]) -> Float32[Array, "*any 256"]:
    """Embedding of flow times [...] in [0, 1]: float32 [..., 256].

    128 cosines, then 128 sines, of t * 10000 ** (-i / 128).
    """
    waves = 10000.0 ** (-jnp.arange(_FREQUENCIES, dtype=jnp.float32) / _FREQUENCIES)
    angles = times.astype(jnp.float32)[..., None] * waves
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LatentPath(nn.Module):
    """Linear layers around the decoder, time embedding and position table of latent tokens.

    `__call__` maps noisy latent tokens [B, G, C], their flow times [B, G] (or [B, 1]) and their
    indices in the position table, int32 [B, G], to embeddings [B, G, D] in the decoder's sequence.
    `velocity` maps hidden states [..., D] to velocities, float32 [..., C].
    """

    config: GenerationConfig
    hidden_size: int

    def setup(self):
        c, d, zeros = self.config, self.hidden_size, nn.initializers.zeros
        for name, size, width in (
            ("time_fc1", 2 * _FREQUENCIES, d),
            ("time_fc2", d, d),
            ("in", c.latent_dim, d),
            ("out", d, c.latent_dim),
        ):
            # As in the official code, the untrained model predicts zero velocities.
            init = zeros if name == "out" else matrix_init
            setattr(self, f"{name}_kernel", self.param(f"{name}_kernel", init, (size, width)))
            setattr(self, f"{name}_bias", self.param(f"{name}_bias", zeros, (width,)))
        self.position_table = self.param(
            "position_table", lambda *_: jnp.asarray(sincos_table(c.side, d))
        )

    def __call__(
        self,
        tokens: Float[AnyArray, "B G C"],
        times: Float[AnyArray, "_ _"],
        table_ids: Int[AnyArray, "B G"],
    ) -> Float[Array, "B G D"]:
        x = dense(tokens, self.in_kernel, self.in_bias)
        wave = sinusoid(times).astype(x.dtype)
        time = dense(
            jax.nn.silu(dense(wave, self.time_fc1_kernel, self.time_fc1_bias)),
            self.time_fc2_kernel,
            self.time_fc2_bias,
        )
        return x + time + self.position_table[table_ids].astype(x.dtype)

    def velocity(self, hidden: Float[AnyArray, "*any D"]) -> Float32[Array, "*any C"]:
        return dense(hidden, self.out_kernel, self.out_bias).astype(jnp.float32)
