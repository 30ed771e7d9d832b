"""On-policy self-distillation: score the student's completion twice, reduce the divergence, update.

  student   C_S + completion   forward with gradient      theta
  teacher   C_T + completion   forward without gradient   theta, their EMA, or the initial weights

Token weights and contrastive targets take one more forward pass of the teacher in another context.
Both roles are the same function on the same completion tokens, so that their positions align one to
one. `update` is one jitted program: both forward passes, divergence, backward pass, clipping,
AdamW or Muon, EMA. The state is donated. Official: scripts/visual_opsd/train_visual_opsd.py.

Letters: B batch, T sequence, N completion tokens, D embedding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from opsd_jax import context as context_lib
from opsd_jax import divergence, optimizer, rollout, sharding, weighting
from opsd_jax import params as params_lib
from opsd_jax.array_types import AnyArray
from opsd_jax.context import Batch, Completion, Context, References
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.method_config import DistillConfig
from opsd_jax.method_config import OptimConfig as OptimConfig  # for callers of `init_state`
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.optimizer import init_state as init_state  # makes the state of `update`
from opsd_jax.rollout import Trajectory

# --- scoring --------------------------------------------------------------------------------------


def score(
    params: dict, context: Context, completion: Completion, *, config: ModelConfig
) -> Float[Array, "B _ D"]:
    """Hidden states that predict the completion's labels, given a context: [B, N + 1, D].

    Raises:
      ValueError: the context holds latents. As in the official code, both roles see images as ViT
        tokens only.
    """
    if context.latents is not None:
        raise ValueError(
            "a completion is scored after contexts without latents: pack them with latents=0"
        )
    inputs = bagel.embed_with_completion(params, context, completion.tokens, config=config)
    hidden, _ = bagel.forward(params, inputs, config=config)
    return hidden[:, context.padded_length :]


def scored_completion(
    trajectory: Trajectory, teacher_length: Int[AnyArray, " B"], config: DistillConfig
) -> Completion:
    """The completion as both roles score it, by the official rules.

    An empty completion becomes the single token eos (which then occurs twice, as token and as
    label). A completion that exceeds max_forward_tokens together with the teacher's context is
    truncated for both roles. Of its positions those of `config.positions` count.

    Args:
      trajectory: B completions of up to N tokens.
      teacher_length: int32 [B], number of used positions of the teacher's context.
    Returns:
      context.Completion of [B, N + 1].
    """
    tokens, mask = trajectory.tokens, trajectory.mask
    index = jnp.arange(tokens.shape[1])
    empty = ~jnp.any(mask, axis=1, keepdims=True) & (index == 0)
    tokens, mask = jnp.where(empty, config.eos, tokens), mask | empty
    cut = is_cut(trajectory, teacher_length, config)
    kept = jnp.where(
        cut,
        jnp.maximum(config.max_forward_tokens - teacher_length - 2, 1),
        _length(trajectory, config),
    )
    eos_label = True if config.eos_after_cut else (trajectory.stop == rollout.STOP_EOS) & ~cut
    between = functools.partial(
        context_lib.completion, bos=config.bos, eos=config.eos, eos_label=eos_label
    )
    if not config.score_seam:
        return _counting(between(tokens, mask & (index < kept[:, None])), config)
    # After an image skip, the sequence is scored as it was fed (`context.completion` puts bos
    # before `fed[:, 1:]`). A position counts if the model chose the token that it predicts. With
    # the marker m:
    #
    #   fed          bos  c1   m    eos  bos  d1   d2
    #   fed_sampled  0    1    1    1    0    1    1
    #   position     bos  c1   m    eos  bos  d1   d2
    #   predicts     c1   m    eos  bos  d1   d2   eos
    #   counts       1    1    1    0    1    1    (is_end)
    only_eos = jnp.pad(empty, ((0, 0), (1, 0)))  # `fed` begins with bos
    fed = jnp.where(only_eos, config.eos, trajectory.fed)
    block = between(fed[:, 1:], index < kept[:, None])
    chosen = jnp.pad((trajectory.fed_sampled | only_eos)[:, 1:], ((0, 0), (0, 1)))
    is_end = jnp.arange(index.size + 1) == kept[:, None]
    block = dataclasses.replace(block, mask=block.mask & (chosen | is_end))
    return _counting(block, config)


def _counting(completion: Completion, config: DistillConfig) -> Completion:
    """The completion with the positions that count as its mask."""
    counted = weighting.counted(completion.mask, config.positions)
    return dataclasses.replace(completion, mask=jnp.asarray(counted))


def with_references(
    trajectory: Trajectory, references: References | None, *, bos: int
) -> Trajectory:
    """Completions with references in the place of some: what is scored.

    A reference that goes on after its N tokens ends like a completion that used up its budget.

    Args:
      trajectory: B completions of up to N tokens. references: References [B, N].
    """
    if references is None:
        return trajectory
    given = references.mask[:, 0]
    count = jnp.sum(references.mask, axis=1, dtype=jnp.int32)
    ended = jnp.where(references.cut, rollout.STOP_BUDGET, rollout.STOP_EOS)
    instead = dataclasses.replace(
        trajectory,
        tokens=jnp.asarray(references.tokens),
        mask=jnp.asarray(references.mask),
        logprobs=jnp.zeros_like(trajectory.logprobs),
        num_skips=jnp.zeros_like(trajectory.num_skips),
        stop=ended.astype(trajectory.stop.dtype),
        fed=jnp.pad(references.tokens, ((0, 0), (1, 0)), constant_values=bos),
        fed_sampled=jnp.pad(references.mask, ((0, 0), (1, 0))),
        num_fed=count + 1,
    )

    def choose(reference, sampled):
        return jnp.where(given.reshape(-1, *[1] * (sampled.ndim - 1)), reference, sampled)

    return jax.tree.map(choose, instead, trajectory)


def is_cut(
    trajectory: Trajectory, teacher_length: Int[AnyArray, " B"], config: DistillConfig
) -> Bool[Array, " B"]:
    """Whether a completion exceeds max_forward_tokens with the teacher's context, bool [B].

    teacher_length: int32 [B], number of used positions of the teacher's context.
    """
    needed = teacher_length + _length(trajectory, config) + 2
    return jnp.asarray(needed > config.max_forward_tokens)


def _length(trajectory: Trajectory, config: DistillConfig) -> Int[AnyArray, " B"]:
    """Number of tokens of each completion, int32 [B]; 1 for an empty one.

    With score_seam the delimiters between rounds count as well.
    """
    n = (
        trajectory.num_fed - 1
        if config.score_seam
        else jnp.sum(trajectory.mask, axis=1, dtype=jnp.int32)
    )
    return jnp.maximum(n, 1)


# --- the update -----------------------------------------------------------------------------------


def teacher_params(state: dict, config: DistillConfig) -> dict:
    """All parameters of the teacher: its own trainable leaves and the shared frozen ones."""
    if config.teacher == "self":
        return state["params"]
    _, frozen = optimizer.split(state["params"], config)
    return params_lib.merge(state["ema" if config.teacher == "ema" else "teacher"], frozen)


def update(
    state: dict, batch: Batch, trajectory: Trajectory, *, config: DistillConfig
) -> tuple[dict, dict[str, Float32[Array, "..."]]]:
    """One optimizer step of on-policy self-distillation, jitted and donated; see `update_step`.

    ValueError where batch and trajectory have different numbers of sequences.
    """
    given, wanted = trajectory.tokens.shape[0], batch.student.length.shape[0]
    if given != wanted:
        raise ValueError(
            f"the trajectory has {given} sequences and the batch {wanted}: give the completions "
            "that were sampled for this batch"
        )
    return sharding.update_program(update_step, state, config)(state, batch, trajectory)


def update_step(
    state: dict, batch: Batch, trajectory: Trajectory, *, config: DistillConfig
) -> tuple[dict, dict[str, Float32[Array, "..."]]]:
    """One optimizer step of on-policy self-distillation (paper Eq. 7, Algorithm 1).

    Args:
      state: see `optimizer.init_state`; donated. batch: contexts of B examples.
      trajectory: what the student sampled for them.
    Returns:
      (state, metrics): float32 scalars loss, jsd, ce, lr, grad_norm, completion_len, scored_len
      (scored positions of a completion, its end included), cut_rate (completions that
      max_forward_tokens truncated), eos_rate, image_skip_rate, teacher_topk_mass, clip_fraction,
      student_entropy, teacher_entropy, with the weights "advantage" their mean advantage, and
      `jsd_by_position` [N + 1].
    """
    scored = with_references(trajectory, batch.references, bos=config.bos)
    completion = scored_completion(scored, batch.teacher.length, config)
    relative = weighting.by_position(completion.mask, config.positions)
    weights = divergence.token_weights(relative, config.reduction)
    trainable, frozen = optimizer.split(state["params"], config)
    teacher = jax.lax.stop_gradient(teacher_params(state, config))
    loss = functools.partial(_loss, frozen=frozen, teacher=teacher, config=config)
    inputs = (batch, completion, weights)
    grads, sums = optimizer.accumulate(loss, trainable, inputs, config.accumulation)
    if _is_normalised_last(config):
        total = sums.pop("weight")
        total = jnp.where(total > 0, total, 1)
        grads = jax.tree.map(lambda x: x / total, grads)
        sums |= {name: sums[name] / total for name in ("loss", "jsd", "ce")}
    state, step_metrics = optimizer.apply_gradients(state, grads, config)
    mask = completion.mask.astype(jnp.float32)
    signals, jsd_sums = sums.pop("signal_sums"), sums.pop("jsd_sums")
    return state, {
        **sums,
        **step_metrics,
        **{name: x / jnp.maximum(jnp.sum(mask), 1) for name, x in signals.items()},
        **_of_samples(trajectory, completion),
        "cut_rate": _mean(is_cut(scored, batch.teacher.length, config)),
        "jsd_by_position": jsd_sums / jnp.maximum(jnp.sum(mask, axis=0), 1),
    }


def _is_normalised_last(config: DistillConfig) -> bool:
    """Whether the weights' sum over the batch is known after all micro steps only."""
    return config.token_weights != "none" and config.reduction == "token"


def _loss(
    trainable: dict,
    inputs: tuple[Batch, Completion, Float32[Array, "B _"]],
    *,
    frozen: dict,
    teacher: dict,
    config: DistillConfig,
) -> tuple[Float32[Array, ""], dict]:
    """The loss of a micro step (paper Eq. 7), and sums over its tokens for the metrics.

    Args:
      trainable, frozen: the student's parameters. teacher: those of the teacher.
      inputs: (contexts, completions, weights [B, N + 1] of their positions).
    """
    batch, completion, weights = inputs
    params = params_lib.merge(trainable, frozen)
    with jax.named_scope("teacher"):
        hidden_t = jax.lax.stop_gradient(
            score(teacher, batch.teacher, completion, config=config.model)
        )
    with jax.named_scope("student"):
        hidden_s = score(params, batch.student, completion, config=config.model)
    others = _other_states(teacher, hidden_s, batch, completion, config)
    jsd, ce, signals = divergence.chunked(
        hidden_s,
        bagel.head(params),
        _target(hidden_t, others, config),
        bagel.head(teacher),
        completion.labels,
        config.divergence,
    )
    if config.token_weights == "advantage":
        signals["advantage"] = weighting.advantage(
            hidden_t, others["none"], bagel.head(teacher), config.divergence.chunk
        )
    if config.token_weights != "none":
        own = signals[config.token_weights]
        weights = weighting.reweighted(weights, own, config.reduction)
    value = config.jsd_weight * jnp.sum(jsd * weights)
    if config.ce_weight:
        value += config.ce_weight * jnp.sum(ce * weights)
    mask = completion.mask.astype(jnp.float32)
    sums = {
        "loss": value,
        "jsd": jnp.sum(jsd * weights),
        "ce": jnp.sum(ce * weights),
        "signal_sums": {name: jnp.sum(x * mask) for name, x in signals.items()},
        "jsd_sums": jnp.sum(jsd * mask, axis=0),
    }
    if _is_normalised_last(config):
        sums["weight"] = jnp.sum(weights)
    return value, sums


def _of_samples(trajectory: Trajectory, completion: Completion) -> dict[str, Float32[Array, ""]]:
    """Means over the student's samples. completion: the positions that are scored of them."""
    return {
        "completion_len": _mean(jnp.sum(trajectory.mask, axis=1)),
        "scored_len": _mean(jnp.sum(completion.mask, axis=1)),
        "eos_rate": _mean(trajectory.stop == rollout.STOP_EOS),
        "image_skip_rate": _mean(trajectory.num_skips > 0),
    }


def _other_states(teacher, hidden_s, batch, completion, config):
    """{context: hidden states [B, N + 1, D] of the teacher in it}, of the contexts that are needed.

    "none" is the student's context, "swap" that of `batch.contrast`. A teacher that is the student
    has the student's hidden states in the student's context.
    """
    needed = {config.contrast_with} if config.contrast else set()
    if config.token_weights == "advantage":
        needed.add("none")
    others = {}
    with jax.named_scope("teacher"):
        if "none" in needed and config.teacher == "self":
            others["none"] = hidden_s
        elif "none" in needed:
            others["none"] = score(teacher, batch.student, completion, config=config.model)
        if "swap" in needed:
            others["swap"] = score(teacher, batch.contrast, completion, config=config.model)
    return jax.lax.stop_gradient(others)


def _target(hidden_t, others, config):
    """Hidden states of the target: the teacher's, or contrasted with those in another context.

    The head is linear, so that this is log p + a (log p - log p'), up to the normalisation.
    """
    if not config.contrast:
        return hidden_t
    wide, other = hidden_t.astype(jnp.float32), others[config.contrast_with].astype(jnp.float32)
    return (wide + config.contrast * (wide - other)).astype(hidden_t.dtype)


def _mean(x):
    return jnp.mean(x.astype(jnp.float32))


@sharding.jit_on_mesh(static_argnames=("config", "temperature"))
def kl_to_student(
    teacher: dict,
    student: dict,
    batch: Batch,
    completion: Completion,
    *,
    config: ModelConfig,
    temperature: float = 1.0,
) -> Float32[Array, "B _"]:
    """Forward KL(teacher with C_T || student with C_S) on shared tokens, in nats (paper Eq. 4).

    Over the full vocabulary, without clipping.

    Args:
      teacher, student: the parameters of each; they may be different checkpoints.
      batch: contexts of B examples. completion: Completion [B, N + 1].
    Returns:
      float32 [B, N + 1]. Positions outside completion.mask have values as well: mask them.
    """
    exact = DivergenceConfig(beta=0.0, top_k=0, clip=0.0, temperature=temperature, chunk=64)
    values, _, _ = divergence.chunked(
        score(student, batch.student, completion, config=config),
        bagel.head(student),
        score(teacher, batch.teacher, completion, config=config),
        bagel.head(teacher),
        completion.labels,
        exact,
        with_ce=False,
    )
    return values


@sharding.jit_on_mesh(static_argnames=("config", "chunk"))
def log_prob_gain(
    params: dict, batch: Batch, completion: Completion, *, config: ModelConfig, chunk: int
) -> Float32[Array, " B"]:
    """What the teacher's context adds to the log-probability of completions, in nats per token.

        mean over the positions of log p(y_n | C_T, y_<n) - log p(y_n | C_S, y_<n)

    Over the full vocabulary at temperature 1.

    Args:
      batch: contexts of B examples. completion: Completion [B, N + 1], its end included.
      chunk: number of positions per sequence whose logits exist at the same time.
    Returns:
      float32 [B]; 0 for a completion without any position that counts.
    """
    student, teacher = (
        divergence.chunked_cross_entropy(
            score(params, context, completion, config=config),
            bagel.head(params),
            completion.labels,
            chunk,
        )[0]
        for context in (batch.student, batch.teacher)
    )
    mask = completion.mask.astype(jnp.float32)
    total = jnp.sum((student - teacher) * mask, axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)
