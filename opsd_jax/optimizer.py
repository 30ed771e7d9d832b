"""The training state and its update: accumulation, clipping, AdamW or Muon, schedule and EMA.

The state is one plain dict {"params", "opt", "step"} with "ema" or "teacher" as the teacher needs
it. Only trainable leaves have a gradient, moments and an EMA.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Real
from optax import contrib

from opsd_jax import params as params_lib
from opsd_jax.array_types import AnyArray
from opsd_jax.method_config import (
    AutoencoderConfig,
    DistillConfig,
    ImageGenerationConfig,
    OptimConfig,
    StageConfig,
    SupervisedConfig,
)


def split(params: dict, config: StageConfig) -> tuple[dict, dict]:
    """(trainable, frozen) parameters of a stage; `params.merge` is the inverse.

    The autoencoder is trained by its own stage only, and that stage trains nothing else.
    """
    if isinstance(config, AutoencoderConfig):
        frozen = {name: tree for name, tree in params.items() if name != "vae"}
        return {"vae": params["vae"]}, frozen
    if not isinstance(config, DistillConfig | SupervisedConfig):
        raise TypeError(f"split does not know what a stage with {type(config).__name__} trains")
    generation = isinstance(config, ImageGenerationConfig)
    return params_lib.partition(params, config.freeze, generation=generation)


def init_state(params: dict, config: StageConfig) -> dict:
    """The state at the start of a stage.

    params: the model's parameters, not copied. opt: Adam's moments, optax.ScaleByAdamState; with
    Muon an optax.PartitionState: the momentum of the matrices and Adam's moments of the others.
    step: int32 [], optimizer steps of the stage so far.
    ema or teacher: copies of the trainable leaves: the moving average, or the weights of a fixed
      teacher or of the last snapshot.
    """
    trainable, _ = split(params, config)
    state = {
        "params": params,
        "opt": _directions(config.optim).init(trainable)[1],
        "step": jnp.zeros((), jnp.int32),
    }
    if isinstance(config, DistillConfig) and config.teacher != "self":
        state["ema" if config.teacher == "ema" else "teacher"] = jax.tree.map(jnp.copy, trainable)
    return state


def learning_rate(
    step: Real[AnyArray, "*any"] | int, config: OptimConfig
) -> Float32[Array, "*any"]:
    """Learning rate of optimizer step k = 0, 1, ..., float32 with the shape of `step`.

      warm-up    lr k / warmup_steps
      cosine     lr (f (1 - r) + r), r = min_lr / lr,
                 f = (1 + cos(pi (k - warmup_steps) / (total_steps - warmup_steps))) / 2

    From total_steps on, the cosine keeps its last value. (optax's schedule of this shape rounds
    differently and refuses total_steps = warmup_steps.)
    """
    step = jnp.asarray(step, jnp.float32)
    warm = step / max(config.warmup_steps, 1)
    if config.schedule == "constant":
        return (
            config.lr * jnp.minimum(warm, 1.0)
            if config.warmup_steps
            else config.lr * jnp.ones_like(step)
        )
    progress = jnp.minimum(
        (step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1), 1
    )
    floor = config.min_lr / config.lr if config.lr else 0.0
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress)) * (1 - floor) + floor
    return config.lr * jnp.where(step < config.warmup_steps, warm, cosine)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)) as torch does; 0 switches it off."""
    if not max_norm:
        return optax.identity()

    def scale(updates, params=None):
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * factor, updates)

    return optax.stateless(scale)


def _directions(config: OptimConfig) -> optax.GradientTransformation:
    """Clipped gradients as directions of Adam or Muon. Clipping has no state."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.kind == "muon":
        muon = optax.chain(
            contrib.scale_by_muon(
                beta=config.b1, weight_dimension_numbers=functools.partial(jax.tree.map, _in_out)
            ),
            optax.stateless(lambda updates, _: jax.tree.map(_like_adam, updates)),
        )
        adam = optax.partition({"matrix": muon, "other": adam}, _kinds_of_leaves)
    return optax.chain(clip_by_global_norm(config.max_grad_norm), adam)


def _kinds_of_leaves(tree: dict) -> dict:
    """ "matrix" for each leaf that Muon moves: matrices [in, out], alone or stacked over layers."""

    def kind(path, leaf):
        names = [str(key.key) for key in path]
        matrix = names[0] != "vae" and names[-1].endswith(("_kernel", "_lora_a", "_lora_b"))
        return "matrix" if matrix else "other"

    return jax.tree_util.tree_map_with_path(kind, tree)


def _in_out(matrix: AnyArray) -> contrib.MuonDimensionNumbers:
    """The axes of a matrix. The axis before them, the layers, is a batch of matrices."""
    return contrib.MuonDimensionNumbers(matrix.ndim - 2, matrix.ndim - 1)


def _like_adam(direction: AnyArray) -> AnyArray:
    """Muon's direction with the usual size of Adam's, so that both take the same learning rate.

    A semi-orthogonal [n, m] has entries of root mean square 1 / sqrt(max(n, m)); Adam's have about
    0.2 (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    return 0.2 * max(direction.shape[-2:]) ** 0.5 * direction


@jax.named_scope("optimizer")
def apply_gradients(
    state: dict, grads: dict, config: StageConfig
) -> tuple[dict, dict[str, Float32[Array, ""]]]:
    """Clipping, AdamW or Muon, and the teacher's weights where they follow the student's.

    Muon (Jordan et al. 2024; optax.contrib): the momentum of a matrix with its singular values
    replaced by about 1. It needs fewer steps than AdamW where a model learns from random weights.
    Embeddings, head, norms, biases and the autoencoder are moved by AdamW.

    The last operations are written out, because optax's round differently: weight decay and
    learning rate in the order of torch's AdamW, p <- p (1 - lr * decay) - lr * direction, and the
    EMA.

    Args:
      state: see `init_state`. grads: the trainable leaves' gradients.
    Returns:
      (new state, {"grad_norm", "lr"}): the norm before clipping, over all trained parameters.
    """
    optim = config.optim
    trainable, frozen = split(state["params"], config)
    rate = learning_rate(state["step"], optim)
    directions, (_, opt) = _directions(optim).update(grads, (optax.EmptyState(), state["opt"]))
    trainable = jax.tree.map(
        lambda p, d: p * (1 - rate * optim.weight_decay) - rate * d, trainable, directions
    )
    new = {
        **state,
        "params": params_lib.merge(trainable, frozen),
        "opt": opt,
        "step": state["step"] + 1,
    }
    if isinstance(config, DistillConfig) and config.teacher == "ema":
        decay = config.ema_decay
        new["ema"] = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], trainable)
    if isinstance(config, DistillConfig) and config.teacher == "snapshot":
        due = new["step"] % config.snapshot_every == 0
        new["teacher"] = jax.tree.map(
            lambda t, p: jnp.where(due, p, t), state["teacher"], trainable
        )
    return new, {"grad_norm": optax.tree.norm(grads), "lr": rate}


def accumulate(loss: Callable, trainable: dict, inputs: Any, count: int) -> tuple[dict, dict]:
    """Gradients and metrics of a loss, summed over micro steps.

    Args:
      loss: function (trainable, inputs) -> (scalar, metrics).
      inputs: pytree of [B, ...], cut into `count` micro batches. The loss must weigh its terms such
        that the sum over micro batches is the loss of the whole batch.
    Raises:
      ValueError: `count` does not divide B.
    """
    grad = jax.grad(loss, has_aux=True)
    if count == 1:
        return grad(trainable, inputs)
    inputs = _micro_batches(inputs, count)
    shapes = jax.eval_shape(grad, trainable, jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, grad(trainable, micro_batch)), None

    return jax.lax.scan(add, zeros, inputs)[0]


def _micro_batches(tree, count):
    """[count * B, ...] -> [count, B, ...].

    Micro batch m takes the entries m, m + count, ... Devices hold contiguous parts of the batch, so
    that each part is divided in itself and no entry moves.
    """

    def divide(x):
        if x.shape[0] % count:
            raise ValueError(
                f"batch size {x.shape[0]} is not divisible by accumulation {count}: change one of "
                "them"
            )
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(divide, tree)
