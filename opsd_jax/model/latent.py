"""The way of latent tokens into the decoder and of velocities out of it.

Letters: B batch, G latent tokens, C values of a token (patch row, patch column, z), D hidden.
Official: modeling/bagel/modeling_utils.py, bagel.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from opsd_jax.model.config import GenerationConfig
from opsd_jax.model.mot import _matrix, dense
from opsd_jax.model.siglip import sincos_table

_FREQUENCIES = 128


def sinusoid(times):
    """Flow times [...] in [0, 1] -> float32 [..., 256]: cosines, then sines, of t * 10000 ** (-i / 128)."""
    waves = 10000.0 ** (-jnp.arange(_FREQUENCIES, dtype=jnp.float32) / _FREQUENCIES)
    angles = times.astype(jnp.float32)[..., None] * waves
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LatentPath(nn.Module):
    """`__call__`: noisy latent tokens [B, G, C], their times [B, G] (or [B, 1]) and ids in the position table [B, G]
    -> what stands in the decoder's sequence [B, G, D]. `velocity`: hidden states [..., D] -> float32 [..., C]."""

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
            # official: the model starts with zero velocities
            init = zeros if name == "out" else _matrix
            setattr(self, f"{name}_kernel", self.param(f"{name}_kernel", init, (size, width)))
            setattr(self, f"{name}_bias", self.param(f"{name}_bias", zeros, (width,)))
        self.position_table = self.param(
            "position_table", lambda *_: jnp.asarray(sincos_table(c.side, d))
        )

    def __call__(self, tokens, times, positions):
        x = dense(tokens, self.in_kernel, self.in_bias)
        wave = sinusoid(times).astype(x.dtype)
        time = dense(
            jax.nn.silu(dense(wave, self.time_fc1_kernel, self.time_fc1_bias)),
            self.time_fc2_kernel,
            self.time_fc2_bias,
        )
        return x + time + self.position_table[positions].astype(x.dtype)

    def velocity(self, hidden):
        return dense(hidden, self.out_kernel, self.out_bias).astype(jnp.float32)
