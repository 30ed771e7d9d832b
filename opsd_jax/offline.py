"""Distillation from a cached teacher: the control arm without on-policy sampling, stage `offline`.

  collect, once      teacher  C_T + reference trace  ->  top K log-probabilities, on disk
                     student  C_S + reference trace  ->  weight of a token,
                                                         KL(with visual thoughts || without)
  train, each step   student  C_S + reference trace  ->  cross entropy
                                                         + weight * KL(cached teacher || student)

While collecting, both roles are the model with which the stage starts, frozen. Official:
scripts/visual_opsd/collect_traces.py and train_visual_opsd_offline.py. In the official code the
teacher reads another text than the student (two thoughts around the image, the student the
text-only thought), so that tokens are paired from the end. The official trainer looks examples up
by another name than the one they were stored under, so that it never finds one. Here the same trace
follows both contexts and token n pairs with token n. Each example is stored with the labels that
its cache was made for, and an example without its cache is an error.

    <workdir>/teacher_cache/key.json                    what the outputs depend on
    <workdir>/teacher_cache/Chart_Refocus-0000128.npz   examples 128 .. 255 of the task, complete
        key                                             digest of key.json
        <number>:<pid>                                  [tokens of `record_type`] of one example

A file of examples is complete or does not exist.

Letters: B batch, R targets of an example (tokens of the trace and eos), K kept entries, V
vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Float32, Int, Int32

from opsd_jax import context as context_lib
from opsd_jax import divergence, optimizer, sharding, supervised
from opsd_jax import params as params_lib
from opsd_jax.array_types import AnyArray
from opsd_jax.method_config import OfflineConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """Text traces with the cached outputs of the teacher.

    traces: Supervised [B, R].
    labels: int32 [B, R], the labels that the cache was made for; -1 where it has no entry.
    log_probs: float16 [B, R, K], the teacher's K largest log-probabilities at temperature 1 over
      the whole vocabulary.
    indices: int32 [B, R, K], their tokens.
    weights: float16 [B, R], weights of the tokens in nats.
    """

    traces: context_lib.Supervised
    labels: np.ndarray
    log_probs: np.ndarray
    indices: np.ndarray
    weights: np.ndarray


def cached_kl(
    logits: Float[AnyArray, "*any V"],
    log_probs: Float[AnyArray, "*any K"],
    indices: Int[AnyArray, "*any K"],
    temperature: float,
) -> Float32[Array, "*any"]:
    """T^2 KL(teacher || student) of each token in nats, float32 [...].

    The teacher's kept log-probabilities are divided by the temperature T and renormalised among
    themselves. The student's log-softmax is over the whole vocabulary. The value for a student
    equal to the teacher is therefore not 0, but -T^2 times the log of its own mass on the kept
    entries.

    Args:
      logits: [..., V] of the student. log_probs, indices: [..., K] as in `Cached`.
    """
    scaled = logits.astype(jnp.float32) / temperature
    log_t = jax.nn.log_softmax(log_probs.astype(jnp.float32) / temperature, axis=-1)
    log_s = jnp.take_along_axis(scaled, indices, axis=-1) - jax.nn.logsumexp(
        scaled, axis=-1, keepdims=True
    )
    return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def shares(weights: Float[AnyArray, "B R"], used: Bool[AnyArray, "B R"]) -> Float32[Array, "B R"]:
    """Share of each token in the batch's KL, float32 [B, R]: w / (sum of the example's w) / B.

    As in the official code, an example whose weights are all 0 counts all its tokens alike.

    Args:
      weights: [B, R], as in `Cached`. used: bool [B, R]; the weight of other tokens is taken as 0.
    """
    weights, even = weights.astype(jnp.float32) * used, used.astype(jnp.float32)
    total = jnp.sum(weights, axis=1, keepdims=True)
    chosen = jnp.where(total > 0, weights, even)
    return (
        chosen
        / jnp.maximum(jnp.sum(chosen, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        / used.shape[0]
    )


def step(
    state: dict, batch: Cached, *, config: OfflineConfig
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """One optimizer step: cross entropy plus weight times the KL divergence to the cached teacher.

    The cross entropy is that of `supervised.sft_step`.

    Returns:
      (state, metrics): those of `sft_step`, kl (T^2 sum w KL / sum w of each trace, mean over
      traces) and cache_used, the share of the targets on which the teacher counted.
    """
    traces = batch.traces
    weights = divergence.token_weights(traces.mask, config.reduction)
    used = traces.mask & (batch.labels == traces.labels)
    trainable, frozen = optimizer.split(state["params"], config)

    def loss(trainable, inputs):
        traces, log_probs, indices, weights, share = inputs
        params = params_lib.merge(trainable, frozen)

        def piece(head, hidden, labels, log_probs, indices):
            logits = divergence.project(hidden, head)
            hit = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
            kl = cached_kl(logits, log_probs, indices, config.temperature)
            return divergence.cross_entropy(logits, labels), hit, kl

        hidden = supervised.target_states(params, traces, config.model)
        ce, correct, kl = divergence.over_chunks(
            piece, bagel.head(params), (hidden, traces.labels, log_probs, indices), config.chunk
        )
        ce, kl = jnp.sum(ce * weights), jnp.sum(kl * share)
        value = ce + config.weight * kl
        return value, {"loss": value, "ce": ce, "kl": kl, "correct": jnp.sum(correct * traces.mask)}

    inputs = traces, batch.log_probs, batch.indices, weights, shares(batch.weights, used)
    grads, metrics = optimizer.accumulate(loss, trainable, inputs, config.accumulation)
    state, step_metrics = optimizer.apply_gradients(state, grads, config)
    targets = jnp.sum(traces.mask, dtype=jnp.float32)
    return state, {
        "cache_used": jnp.sum(used, dtype=jnp.float32) / jnp.maximum(targets, 1),
        **supervised.target_metrics(traces, metrics.pop("correct")),
        **metrics,
        **step_metrics,
    }


@sharding.jit_on_mesh(static_argnames=("config", "top_k", "chunk"))
def teacher_outputs(
    params: dict,
    with_thoughts: context_lib.Supervised,
    without: context_lib.Supervised,
    *,
    config: ModelConfig,
    top_k: int,
    chunk: int,
) -> tuple[Float16[Array, "B R K"], Int32[Array, "B R K"], Float16[Array, "B R"]]:
    """The teacher's outputs on a batch of traces.

    Args:
      with_thoughts, without: Supervised [B, R], the same traces after the contexts with and without
        visual thoughts.
      top_k: K.
      chunk: number of target positions per example whose logits exist at the same time.
    Returns:
      (log_probs, indices, weights) as in `Cached`.
    """
    states = [
        supervised.target_states(params, traces, config) for traces in (with_thoughts, without)
    ]

    def piece(head, *pair):
        log_t, log_s = (jax.nn.log_softmax(divergence.project(x, head)) for x in pair)
        log_probs, indices = jax.lax.top_k(log_t, top_k)
        # not below 0 by rounding
        kl = jnp.maximum(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1), 0)
        return log_probs.astype(jnp.float16), indices.astype(jnp.int32), kl.astype(jnp.float16)

    return divergence.over_chunks(piece, bagel.head(params), states, chunk)


def fingerprint(params: dict) -> str:
    """Checksum of the weights that the teacher uses on text traces, see `params.fingerprint`."""
    return params_lib.fingerprint(params_lib.understanding(params))
