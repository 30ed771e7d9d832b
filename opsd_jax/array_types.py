"""Annotations of arrays: dtype, axis letters, and whether an array may still be on the host.

  Float[Array, "B N V"]      a jax.Array of any float dtype, with axes batch, token and vocabulary
  Int[AnyArray, "B N"]       a jax.Array or a NumPy array of integers
  Float[Array, "*any V"]     any number of axes before V
  Float[Array, " N"]         one axis; linters read a string without a space as a name

A letter has one size within a call: an argument "B N D" and another one "B N" must agree in B and
N. Type checkers read only the array type. Shapes and dtypes are checked in tests, where
tests/conftest.py decorates the functions of the modules in `CHECKED`; a run pays nothing.

  B batch             T sequence, padded     P patches of an image     G latent tokens
  N completion token  R training target      D embedding               V vocabulary
  H heads             K key/value heads      h head size               L layers
  S keys, the columns of a cache             C values of a patch or of a latent token

Further letters, and those of `model.vae`, are in the docstrings of their modules.
"""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray

CHECKED = (
    "opsd_jax.blocks",
    "opsd_jax.context",
    "opsd_jax.distill",
    "opsd_jax.divergence",
    "opsd_jax.flow",
    "opsd_jax.images",
    "opsd_jax.interleave",
    "opsd_jax.marker",
    "opsd_jax.model.attention",
    "opsd_jax.model.bagel",
    "opsd_jax.model.flash",
    "opsd_jax.model.latent",
    "opsd_jax.model.layers",
    "opsd_jax.model.masks",
    "opsd_jax.model.mot",
    "opsd_jax.model.qwen_vision",
    "opsd_jax.model.siglip",
    "opsd_jax.model.vae",
    "opsd_jax.offline",
    "opsd_jax.optimizer",
    "opsd_jax.params",
    "opsd_jax.rollout",
    "opsd_jax.supervised",
    "opsd_jax.tokenizer",
)
