"""Supervised training steps: text traces, traces with images to generate, and the autoencoder.

Each step is `step(state, batch, ..., config) -> (state, metrics)` for `sharding.update_program`;
metrics are float32 scalars. Letters: B batch, T sequence, R targets per example, M images per
example, G latent tokens, D embedding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from opsd_jax import divergence, flow, optimizer
from opsd_jax import params as params_lib
from opsd_jax.context import GenerationBatch, PaddedImages, Supervised
from opsd_jax.method_config import AutoencoderConfig, ImageGenerationConfig, SupervisedConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig


def target_states(params: dict, traces: Supervised, config: ModelConfig) -> Float[Array, "B R D"]:
    """Hidden states that predict the labels of text traces, [B, R, D]."""
    hidden, _ = bagel.read(params, traces.context, config=config)
    return at_targets(hidden, traces)


def at_targets(hidden: Float[Array, "B T D"], traces: Supervised) -> Float[Array, "B R D"]:
    """hidden [B, T, D] at the positions of the targets: [B, R, D]."""
    return jnp.take_along_axis(hidden, traces.positions[:, :, None], axis=1)


def target_metrics(
    traces: Supervised, correct: Float32[Array, ""]
) -> dict[str, Float32[Array, ""]]:
    """Metrics of text traces: top-1 accuracy and completion_len (targets per example).

    correct: float32 [], number of targets that are predicted correctly.
    """
    targets = jnp.sum(traces.mask, dtype=jnp.float32)
    return {
        "accuracy": correct / jnp.maximum(targets, 1),
        "completion_len": targets / traces.mask.shape[0],
    }


def sft_step(
    state: dict, batch: Supervised, *, config: SupervisedConfig
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """One optimizer step on packed text traces: cross entropy on the targets.

    Returns:
      (state, metrics): loss, ce, accuracy, completion_len, lr, grad_norm.
    Raises:
      ValueError: the config is of image generation, whose traces need `image_generation_step`.
    """
    if isinstance(config, ImageGenerationConfig):
        raise ValueError(
            "sft_step trains on text traces and got an ImageGenerationConfig: use "
            "image_generation_step, or give a SupervisedConfig"
        )
    weights = divergence.token_weights(batch.mask, config.reduction)
    trainable, frozen = optimizer.split(state["params"], config)

    def loss(trainable, inputs):
        traces, weights = inputs
        params = params_lib.merge(trainable, frozen)
        hidden = target_states(params, traces, config.model)
        ce, correct = divergence.chunked_cross_entropy(
            hidden, bagel.head(params), traces.labels, config.chunk
        )
        value = jnp.sum(ce * weights)
        return value, {"loss": value, "ce": value, "correct": jnp.sum(correct * traces.mask)}

    grads, metrics = optimizer.accumulate(loss, trainable, (batch, weights), config.accumulation)
    state, step_metrics = optimizer.apply_gradients(state, grads, config)
    counts = target_metrics(batch, metrics.pop("correct"))
    return state, {**metrics, **counts, **step_metrics}


def image_generation_step(
    state: dict, batch: GenerationBatch, key: PRNGKeyArray, *, config: ImageGenerationConfig
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """One optimizer step on traces with images to generate: cross entropy and flow matching.

    The cross entropy is that of the text.
    Each noised image has one flow time. The squared errors of its velocities weigh alike over all
    noised tokens of the batch. Latents are encoded here, from pixels.

    Args:
      key: PRNG key of the posterior samples, the flow times and the noise.
    Returns:
      (state, metrics): those of `sft_step`, and mse.
    """
    traces, latents, model = batch.traces, batch.traces.context.latents, config.model
    count, generation = latents.tokens.shape[1], model.generation
    examples, per_example, height, width = batch.images.pixels.shape[:4]
    keys = jax.random.split(key, 3)
    down, z = generation.vae.downsample, generation.vae.z_channels
    posterior = jax.random.normal(
        keys[0], (examples, per_example, height // down, width // down, z)
    )
    noise = jax.random.normal(keys[1], latents.tokens.shape)
    noised = latents.noised[:, -count:]
    # the number of a noised image within its example selects its time
    raw = jax.random.normal(keys[2], (examples, 2 * per_example))
    raw = jnp.take_along_axis(raw, noised, axis=1)
    times = jnp.where(noised > 0, flow.training_times(raw, generation.timestep_shift), 0.0)
    share = (noised > 0) / jnp.maximum(jnp.sum(noised > 0) * generation.latent_dim, 1)
    weights = divergence.token_weights(traces.mask, config.reduction)
    trainable, frozen = optimizer.split(state["params"], config)

    def loss(trainable, inputs):
        traces, images, weights, posterior, noise, times, share = inputs
        params = params_lib.merge(trainable, frozen)
        context = flow.with_latents(
            frozen, traces.context, images.pixels, images.sizes, posterior, config=model
        )
        errors, _, hidden = flow.loss(params, context, times, noise, config=model)
        ce, correct = divergence.chunked_cross_entropy(
            at_targets(hidden, traces), bagel.head(params), traces.labels, config.chunk
        )
        ce, mse = jnp.sum(ce * weights), jnp.sum(errors * share[:, :, None])
        value = config.ce_weight * ce + config.mse_weight * mse
        correct = jnp.sum(correct * traces.mask)
        return value, {"loss": value, "ce": ce, "mse": mse, "correct": correct}

    inputs = (traces, batch.images, weights, posterior, noise, times, share)
    grads, metrics = optimizer.accumulate(loss, trainable, inputs, config.accumulation)
    state, step_metrics = optimizer.apply_gradients(state, grads, config)
    counts = target_metrics(traces, metrics.pop("correct"))
    return state, {**metrics, **counts, **step_metrics}


def autoencoder_step(
    state: dict, batch: PaddedImages, key: PRNGKeyArray, *, config: AutoencoderConfig
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """One optimizer step of the autoencoder: mse + kl_weight * kl, with a sample of the posterior.

      mse   squared error of the pixels in [-1, 1], mean over pixels and colours of all images
      kl    KL(posterior || N(0, 1)) in nats, mean over the values of the latents

    Args:
      key: PRNG key of the posterior samples.
    Returns:
      (state, metrics): loss, mse, kl, lr, grad_norm, and latent_mean and latent_std of the samples,
      which the model's `shift` and 1 / `scale` should equal.
    """
    vae = config.model.generation.vae
    _, inside = flow.normalize_padded(batch.pixels, batch.sizes)
    corners = inside[..., :: vae.downsample, :: vae.downsample]
    share, latent_share = (mask / jnp.maximum(jnp.sum(mask), 1) for mask in (inside, corners))
    noise = jax.random.normal(key, (*corners.shape, vae.z_channels))
    trainable, frozen = optimizer.split(state["params"], config)

    def average(x, share):
        return jnp.sum(jnp.mean(x, axis=-1) * share)

    def loss(trainable, inputs):
        batch, share, latent_share, noise = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), inputs
        )
        params = params_lib.merge(trainable, frozen)
        pixels, _ = flow.normalize_padded(batch.pixels, batch.sizes)
        mean, log_variance = bagel.encode_pixels(params, pixels, config=config.model)
        z = mean + jnp.exp(log_variance / 2) * noise
        decoded = bagel.decode_latents(params, vae.scale * (z - vae.shift), config=config.model)
        mse = average((decoded - pixels) ** 2, share)
        kl = average((mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2, latent_share)
        value = mse + config.kl_weight * kl
        return value, {
            "loss": value,
            "mse": mse,
            "kl": kl,
            "latent_mean": average(z, latent_share),
            "square": average(z**2, latent_share),
        }

    inputs = (batch, share, latent_share, noise)
    grads, metrics = optimizer.accumulate(loss, trainable, inputs, config.accumulation)
    state, step_metrics = optimizer.apply_gradients(state, grads, config)
    variance = jnp.maximum(metrics.pop("square") - metrics["latent_mean"] ** 2, 0.0)
    return state, {**metrics, "latent_std": jnp.sqrt(variance), **step_metrics}
