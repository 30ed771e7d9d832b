"""On-policy self-distillation: score the student's completion twice, reduce the divergence, update. The paper.

  student   C_S + completion   forward with gradient        theta
  teacher   C_T + completion   forward without              theta, their EMA, or the initial weights

Same function, same completion tokens; the rows of both align one to one. `update` is one jitted program: both
forwards, divergence, backward, clipping, AdamW, EMA; the state is donated. Official:
scripts/visual_opsd/train_visual_opsd.py. Letters: B batch rows, N + 1 completion rows, D hidden.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from opsd_jax import context as context_lib
from opsd_jax import divergence, flow, rollout, sharding
from opsd_jax import params as params_lib
from opsd_jax.context import Batch, GenerationBatch, PaddedImages
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.method_config import DistillConfig, OptimConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig

# --- state -----------------------------------------------------------------------------------------------------


def split(params, config: DistillConfig):
    """(trainable, frozen) of a stage, as `params.partition`; the autoencoder is trained by its own stage alone."""
    if config.trains == "autoencoder":
        return {"vae": params["vae"]}, {
            name: tree for name, tree in params.items() if name != "vae"
        }
    return params_lib.partition(params, config.freeze, drawing=config.trains == "drawing")


def understanding(params):
    """The parameters that text needs: all but those of what draws. Nothing is copied."""
    return params_lib.unflatten(
        {
            path: leaf
            for path, leaf in params_lib.flatten(params).items()
            if path.split("/")[0] not in ("latent", "vae") and params_lib.fact(path).group != "gen"
        }
    )


def for_sampling(mesh, params, dtype: str):
    """A function that lays trained parameters out for the sampler, without what draws, in the dtype of the computation:
    for trees that lie as this one does (arrays or ShapeDtypeStructs)."""
    move = sharding.move(
        mesh,
        understanding(params),
        "rollout",
        cast=lambda tree: params_lib.in_compute_dtype(tree, dtype),
    )
    return lambda params: move(understanding(params))


def init_state(params, config: DistillConfig) -> dict:
    """{params, opt, step} and, as the teacher asks, `ema` or `teacher` (copies of the trainable leaves only)."""
    trainable, _ = split(params, config)
    state = {
        "params": params,
        "opt": _adam(config.optim).init(trainable),
        "step": jnp.zeros((), jnp.int32),
    }
    if config.teacher != "self":
        state["ema" if config.teacher == "ema" else "teacher"] = jax.tree.map(jnp.copy, trainable)
    return state


def teacher_params(state: dict, config: DistillConfig) -> dict:
    """The teacher's whole parameter dict: its own trainable leaves over the shared frozen ones."""
    if config.teacher == "self":
        return state["params"]
    _, frozen = split(state["params"], config)
    return params_lib.merge(state["ema" if config.teacher == "ema" else "teacher"], frozen)


def learning_rate(step, config: OptimConfig):
    """The rate of optimizer step k = 0, 1, ...: lr k / warm-up, then lr (f (1 - r) + r) with r = min_lr / lr and
    f = (1 + cos(pi (k - warm-up) / (total - warm-up))) / 2. From total_steps on the cosine stays at its end."""
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


def _adam(config):
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def apply_gradients(state: dict, grads, config: DistillConfig):
    """Clip to the global norm, AdamW, EMA: (new state, {"grad_norm", "lr"}).

    The clipping factor is min(1, max_norm / (norm + 1e-6)) over all trained parameters.
    """
    optim = config.optim
    trainable, frozen = split(state["params"], config)
    norm = optax.tree.norm(grads)
    if optim.max_grad_norm:
        factor = jnp.minimum(1.0, optim.max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * factor, grads)
    direction, opt = _adam(optim).update(grads, state["opt"])
    rate = learning_rate(state["step"], optim)
    trainable = jax.tree.map(
        lambda p, d: p * (1 - rate * optim.weight_decay) - rate * d, trainable, direction
    )
    new = dict(state, params=params_lib.merge(trainable, frozen), opt=opt, step=state["step"] + 1)
    if "ema" in state:
        decay = config.ema_decay
        new["ema"] = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], trainable)
    return new, {"grad_norm": norm, "lr": rate}


# --- scoring ---------------------------------------------------------------------------------------------------


def score(params, context, completion, *, config: ModelConfig):
    """Hidden states that predict the completion's labels behind a context: [B, N + 1, D].

    ValueError for a context with latents: both roles see images as ViT tokens alone, as officially.
    """
    if context.latents is not None:
        raise ValueError(
            "a completion is scored behind contexts without latents: pack them with latents=0"
        )
    x = jnp.concatenate(
        [
            bagel.embed(params, context, config=config),
            bagel.embed_tokens(params, completion.tokens, config=config),
        ],
        axis=1,
    )
    after = context_lib.behind(context, completion.tokens.shape[1])
    vectors = [
        jnp.concatenate(pair, axis=1)
        for pair in zip((context.positions, context.limit, context.segment), after)
    ]
    hidden, _ = bagel.forward(params, x, *vectors, config=config)
    return hidden[:, context.slots :]


def scored_completion(trajectory: rollout.Trajectory, teacher_length, config: DistillConfig):
    """The completion as both roles score it, by the official rules.

    Empty completions become the single token eos (which then stands twice: as token and as label). A completion
    that with the teacher's context exceeds max_forward_tokens is cut on both sides.

    Args:
      teacher_length: int32 [B], used slots of the teacher's context.
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
    eos_row = True if config.eos_after_cut else (trajectory.stop == rollout.STOP_EOS) & ~cut
    if not config.score_seam:
        return context_lib.completion(
            tokens, mask & (index < kept[:, None]), bos=config.bos, eos=config.eos, eos_row=eos_row
        )
    empty = jnp.pad(empty, ((0, 0), (1, 0)))
    fed = jnp.where(empty, config.eos, trajectory.fed)
    block = context_lib.completion(
        fed[:, 1:], index < kept[:, None], bos=config.bos, eos=config.eos, eos_row=eos_row
    )
    chosen = jnp.pad((trajectory.fed_sampled | empty)[:, 1:], ((0, 0), (0, 1)))
    return dataclasses.replace(
        block, mask=block.mask & (chosen | (jnp.arange(index.size + 1) == kept[:, None]))
    )


def is_cut(trajectory: rollout.Trajectory, teacher_length, config: DistillConfig):
    """Whether a completion with the teacher's context exceeds max_forward_tokens, bool [B]."""
    return teacher_length + _length(trajectory, config) + 2 > config.max_forward_tokens


def _length(trajectory, config):
    """Tokens of each completion, int32 [B]; of an empty one 1. With score_seam the delimiters between rounds count, too."""
    n = (
        trajectory.num_fed - 1
        if config.score_seam
        else jnp.sum(trajectory.mask, axis=1, dtype=jnp.int32)
    )
    return jnp.maximum(n, 1)


def row_weights(mask, reduction: str):
    """Weight of each row in the loss, float32 [B, N]; they add up to 1 over the batch."""
    mask = mask.astype(jnp.float32)
    if reduction == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1)
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1) / mask.shape[0]


def _micro(tree, count):
    """[count * B, ...] -> [count, B, ...]. Micro step m takes the rows m, m + count, ...: the batch axis is cut
    over devices in contiguous pieces, and so each piece is split in itself and nothing moves."""

    def split(x):
        if x.shape[0] % count:
            raise ValueError(f"batch size {x.shape[0]} is not divisible by accumulation {count}")
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _accumulate(loss, trainable, inputs, count):
    """Gradients and metrics of `loss(trainable, inputs) -> (scalar, metrics)`, added up over micro steps."""
    grad = jax.grad(loss, has_aux=True)
    if count == 1:
        return grad(trainable, inputs)
    inputs = _micro(inputs, count)
    shapes = jax.eval_shape(grad, trainable, jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(
        lambda total, x: (jax.tree.map(jnp.add, total, grad(trainable, x)), None), zeros, inputs
    )[0]


# --- updates ---------------------------------------------------------------------------------------------------


def program(function, state, config: DistillConfig):
    """`function(state, ..., config)` jitted for states that lie as this one does.

    The state is donated, and every leaf comes back with the sharding it went in with: left to itself, XLA picks
    others for some, and the next step compiles again. state: arrays, or ShapeDtypeStructs with shardings.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
    return _program(function, config, structure, tuple(leaves))


@functools.cache
def _program(function, config, structure, leaves):
    shardings = jax.tree.unflatten(structure, leaves)
    mesh = getattr(leaves[0], "mesh", None)  # none on a single device

    def under_mesh(*arguments):
        with sharding.known(mesh):
            return function(*arguments, config=config)

    return jax.jit(under_mesh, donate_argnums=0, out_shardings=(shardings, None))


def update(state, batch: Batch, trajectory, *, config: DistillConfig):
    """One optimizer step of on-policy self-distillation, jitted and donated; see `update_step`."""
    return program(update_step, state, config)(state, batch, trajectory)


def update_step(state, batch: Batch, trajectory, *, config: DistillConfig):
    """One optimizer step of on-policy self-distillation (paper Eq. 7, Algorithm 1).

    Args:
      state: see `init_state`; donated. batch: contexts of B rows. trajectory: what the student sampled for them.
    Returns:
      (state, metrics): float32 scalars loss, jsd, ce, lr, grad_norm, completion_len, scored_len (positions of a completion
      that are scored, its end included), cut_rate (completions that max_forward_tokens cut), eos_rate, image_skip_rate,
      teacher_topk_mass, clip_fraction, student_entropy, teacher_entropy, and `jsd_by_position` [N + 1].
    """
    completion = scored_completion(trajectory, batch.teacher.length, config)
    weights = row_weights(completion.mask, config.reduction)
    trainable, frozen = split(state["params"], config)
    teacher = jax.lax.stop_gradient(teacher_params(state, config))

    def loss(trainable, inputs):
        batch, completion, weights = inputs
        params = params_lib.merge(trainable, frozen)
        hidden_t = jax.lax.stop_gradient(
            score(teacher, batch.teacher, completion, config=config.model)
        )
        hidden_s = score(params, batch.student, completion, config=config.model)
        jsd, ce, signals = divergence.chunked(
            hidden_s,
            params["llm"]["head"],
            hidden_t,
            teacher["llm"]["head"],
            completion.labels,
            config.divergence,
        )
        total = lambda values: jnp.sum(values * weights)
        value = config.jsd_weight * total(jsd)
        if config.ce_weight:
            value += config.ce_weight * total(ce)
        mask = completion.mask.astype(jnp.float32)
        sums = {name: jnp.sum(x * mask) for name, x in signals.items()}
        return value, {
            "loss": value,
            "jsd": total(jsd),
            "ce": total(ce),
            "sums": sums,
            "jsd_by_position": jnp.sum(jsd * mask, axis=0),
        }

    grads, found = _accumulate(loss, trainable, (batch, completion, weights), config.accumulation)
    state, step_metrics = apply_gradients(state, grads, config)
    rows = completion.mask.astype(jnp.float32)
    mean = lambda x: jnp.mean(x.astype(jnp.float32))
    metrics = {
        "loss": found["loss"],
        "jsd": found["jsd"],
        "ce": found["ce"],
        **step_metrics,
        **{name: total / jnp.maximum(jnp.sum(rows), 1) for name, total in found["sums"].items()},
        "completion_len": mean(jnp.sum(trajectory.mask, axis=1)),
        "scored_len": mean(jnp.sum(completion.mask, axis=1)),
        "cut_rate": mean(is_cut(trajectory, batch.teacher.length, config)),
        "eos_rate": mean(trajectory.stop == rollout.STOP_EOS),
        "image_skip_rate": mean(trajectory.num_skips > 0),
        "jsd_by_position": found["jsd_by_position"] / jnp.maximum(jnp.sum(rows, axis=0), 1),
    }
    return state, metrics


def sft_step(state, batch: context_lib.Supervised, *, config: DistillConfig):
    """One optimizer step of supervised training on packed traces: cross entropy on the target rows.

    Returns (state, metrics): loss, ce, accuracy (top-1 on targets), lr, grad_norm, completion_len (targets a row).
    """
    if config.trains != "text":
        raise ValueError(
            f"traces of text do not train the {config.trains}: that has a step of its own"
        )
    weights = row_weights(batch.mask, config.reduction)
    trainable, frozen = split(state["params"], config)

    def loss(trainable, inputs):
        batch, weights = inputs
        params = params_lib.merge(trainable, frozen)
        c = batch.context
        hidden, _ = bagel.read(params, c, config=config.model)
        hidden = jnp.take_along_axis(hidden, batch.rows[:, :, None], axis=1)
        ce, correct = divergence.chunked_cross_entropy(
            hidden, params["llm"]["head"], batch.labels, config.divergence.chunk
        )
        value = jnp.sum(ce * weights)
        return value, {"loss": value, "ce": value, "correct": jnp.sum(correct * batch.mask)}

    grads, found = _accumulate(loss, trainable, (batch, weights), config.accumulation)
    state, step_metrics = apply_gradients(state, grads, config)
    targets = jnp.sum(batch.mask, dtype=jnp.float32)
    return state, {
        "loss": found["loss"],
        "ce": found["ce"],
        "accuracy": found["correct"] / jnp.maximum(targets, 1),
        "completion_len": targets / batch.mask.shape[0],
        **step_metrics,
    }


def drawn_step(state, batch: GenerationBatch, key, *, config: DistillConfig):
    """One optimizer step on traces with drawn visual thoughts: cross entropy on the texts, and flow matching.

    Each noised image has one flow time; the squared errors of its velocities count alike over all noised tokens of the
    batch. Latents are encoded here, from pixels. key: of the posterior, the times and the noise.

    Returns (state, metrics): as `sft_step`, and mse.
    """
    traces, latents, model = batch.traces, batch.traces.context.latents, config.model
    count, drawn = latents.tokens.shape[1], model.generation
    rows, pictures, height, width = batch.images.pixels.shape[:4]
    keys = jax.random.split(key, 3)
    down, z = drawn.vae.downsample, drawn.vae.z_channels
    posterior = jax.random.normal(keys[0], (rows, pictures, height // down, width // down, z))
    noise = jax.random.normal(keys[1], latents.tokens.shape)
    noised = latents.noised[:, -count:]
    # the number of a noised image in its row chooses its time
    raw = jnp.take_along_axis(jax.random.normal(keys[2], (rows, 2 * pictures)), noised, axis=1)
    times = jnp.where(noised > 0, flow.training_times(raw, drawn.timestep_shift), 0.0)
    share = (noised > 0) / jnp.maximum(jnp.sum(noised > 0) * drawn.latent_dim, 1)
    weights = row_weights(traces.mask, config.reduction)
    trainable, frozen = split(state["params"], config)

    def loss(trainable, inputs):
        traces, pictures, weights, posterior, noise, times, share = inputs
        params = params_lib.merge(trainable, frozen)
        context = flow.with_latents(
            frozen, traces.context, pictures.pixels, pictures.sizes, posterior, config=model
        )
        errors, _, hidden = flow.loss(params, context, times, noise, config=model)
        hidden = jnp.take_along_axis(hidden, traces.rows[:, :, None], axis=1)
        ce, correct = divergence.chunked_cross_entropy(
            hidden, params["llm"]["head"], traces.labels, config.divergence.chunk
        )
        ce, mse = jnp.sum(ce * weights), jnp.sum(errors * share[:, :, None])
        value = config.ce_weight * ce + config.mse_weight * mse
        return value, {
            "loss": value,
            "ce": ce,
            "mse": mse,
            "correct": jnp.sum(correct * traces.mask),
        }

    inputs = (traces, batch.images, weights, posterior, noise, times, share)
    grads, found = _accumulate(loss, trainable, inputs, config.accumulation)
    state, step_metrics = apply_gradients(state, grads, config)
    targets = jnp.sum(traces.mask, dtype=jnp.float32)
    return state, {
        "loss": found["loss"],
        "ce": found["ce"],
        "mse": found["mse"],
        "accuracy": found["correct"] / jnp.maximum(targets, 1),
        "completion_len": targets / traces.mask.shape[0],
        **step_metrics,
    }


def autoencoder_step(state, batch: PaddedImages, key, *, config: DistillConfig):
    """One optimizer step of the autoencoder: mse + kl_weight * kl, with a sample of the posterior.

      mse   squared error of the pixels in [-1, 1], mean over the pixels of all pictures and their colours
      kl    KL(posterior || N(0, 1)), nats, mean over the values of the latents

    key: of the samples. Returns (state, metrics): loss, mse, kl, lr, grad_norm, and latent_mean and latent_std of the
    samples, which `shift` and 1 / `scale` of the model should be.
    """
    vae = config.model.generation.vae
    _, inside = flow.padded(batch.pixels, batch.sizes)
    corners = inside[..., :: vae.downsample, :: vae.downsample]
    share, latent_share = (mask / jnp.maximum(jnp.sum(mask), 1) for mask in (inside, corners))
    noise = jax.random.normal(key, (*corners.shape, vae.z_channels))
    trainable, frozen = split(state["params"], config)

    def loss(trainable, inputs):
        batch, share, latent_share, noise = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), inputs
        )
        params = params_lib.merge(trainable, frozen)
        pixels, _ = flow.padded(batch.pixels, batch.sizes)
        mean, log_variance = bagel.encode_pixels(params, pixels, config=config.model)
        z = mean + jnp.exp(log_variance / 2) * noise
        found = bagel.decode_latents(params, vae.scale * (z - vae.shift), config=config.model)
        average = lambda x, share: jnp.sum(jnp.mean(x, axis=-1) * share)
        mse = average((found - pixels) ** 2, share)
        kl = average((mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2, latent_share)
        value = mse + config.kl_weight * kl
        return value, {
            "loss": value,
            "mse": mse,
            "kl": kl,
            "latent_mean": average(z, latent_share),
            "square": average(z**2, latent_share),
        }

    grads, found = _accumulate(
        loss, trainable, (batch, share, latent_share, noise), config.accumulation
    )
    state, step_metrics = apply_gradients(state, grads, config)
    found["latent_std"] = jnp.sqrt(
        jnp.maximum(found.pop("square") - found["latent_mean"] ** 2, 0.0)
    )
    return state, found | step_metrics


@sharding.on_mesh
@functools.partial(jax.jit, static_argnames=("config", "temperature"))
def kl_to_student(
    teacher, student, batch: Batch, completion, *, config: ModelConfig, temperature: float = 1.0
):
    """Forward KL(teacher with C_T || student with C_S) on shared tokens, full vocabulary, nats (paper Eq. 4).

    teacher, student: parameter dicts (may be different checkpoints). Returns float32 [B, N + 1]; mask it.
    """
    exact = DivergenceConfig(beta=0.0, top_k=0, clip=0.0, temperature=temperature, chunk=64)
    values, _, _ = divergence.chunked(
        score(student, batch.student, completion, config=config),
        student["llm"]["head"],
        score(teacher, batch.teacher, completion, config=config),
        teacher["llm"]["head"],
        completion.labels,
        exact,
        with_ce=False,
    )
    return values
