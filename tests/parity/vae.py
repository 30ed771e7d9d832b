"""Golden set `vae`: the autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import flow
from opsd_jax.model import bagel
from parity.replay import close, read

hwc = functools.partial(np.moveaxis, source=-3, destination=-1)  # [..., C, H, W] -> [..., H, W, C]


@functools.partial(jax.jit, static_argnames="config")
def moments(params, pixels, *, config):
    return jnp.concatenate(bagel.encode_pixels(params, pixels, config=config), axis=-1)


decode_latents = jax.jit(bagel.decode_latents, static_argnames="config")


def test_autoencoder(goldens, autoencoder, whole_model):
    tensors, _ = read(goldens, "vae", autoencoder)
    config, params = whole_model
    pixels, noise = hwc(tensors["image"]), hwc(tensors["noise"])
    close(moments(params, pixels, config=config), hwc(tensors["moments"]))
    for name, draw in (("mean", np.zeros_like(noise)), ("sampled", noise)):
        latents = hwc(tensors[f"latent_{name}"])
        close(flow.encode(params, pixels, draw, config=config), latents, name)
        if f"decoded_from_{name}" in tensors:
            close(
                decode_latents(params, latents, config=config),
                hwc(tensors[f"decoded_from_{name}"]),
                name,
            )
