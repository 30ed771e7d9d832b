"""Choices of OPSD's loss beside the paper: token weights, contrastive targets, positions.

Values against float64 NumPy on the model's logits, gradients against the slope of the loss.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import assert_slope, case, first_step, gradients, model_logits  # noqa: F401

import reference
import tiny
from opsd_jax import context, distill, weighting
from opsd_jax.distill import DistillConfig, OptimConfig
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.weighting import PositionsConfig

BASE = DistillConfig(
    model=tiny.MODEL,
    **tiny.ENDS,
    divergence=DivergenceConfig(top_k=40, clip=0.05, chunk=4),
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, total_steps=10, eps=1e-3),
)
variant = functools.partial(dataclasses.replace, BASE)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def swapped(case):  # noqa: F811
    """A case whose batch also holds the teacher's contexts of other examples."""
    others = jax.tree.map(lambda x: np.roll(np.asarray(x), 1, axis=0), case.batch.teacher)
    batch = dataclasses.replace(case.batch, contrast=others)
    return type(case)(**(vars(case) | {"batch": batch}))


def log_probs(params, of_role, completion):
    """Log probabilities float64 [B, N + 1, V] of a role."""
    logits = model_logits(params, of_role, completion)
    return reference.log_softmax(np.asarray(logits, np.float64))


def kl(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def jsd_rows(log_s, log_t, config):
    d = config.divergence
    found = reference.generalized_jsd(
        log_s.reshape(-1, log_s.shape[-1]),
        log_t.reshape(-1, log_t.shape[-1]),
        top_k=d.top_k,
        clip=d.clip,
    )
    return found.reshape(log_s.shape[:-1])


def weighted_mean(values, weights, reduction):
    """The weighted mean in the place of the mean, written as loops."""
    if reduction == "token":
        return (values * weights).sum() / weights.sum()
    return np.mean([(v * w).sum() / w.sum() for v, w in zip(values, weights)])


# {name: settings}. A batch in one piece and in two, each reduction, each weight, each contrast.
CASES = {
    "advantage": dict(
        token_weights="advantage",
        contrast=0.7,
        reduction="token",
        accumulation=2,
        ce_weight=0.5,
        positions=PositionsConfig(first_fraction=0.8, power=-0.5),
    ),
    "entropy": dict(token_weights="teacher_entropy", contrast=0.7, contrast_with="swap"),
    "self": dict(token_weights="advantage", contrast=0.7, teacher="self"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_and_contrast(swapped, name):
    """The loss is a mean over the tokens that count, weighted, of what separates the student from
    log p + a (log p - log p').
    """
    config = variant(**CASES[name])
    batch, teacher = swapped.batch, swapped.params if name == "self" else swapped.other
    completion = distill.scored_completion(swapped.trajectory, batch.teacher.length, config)
    log_s = log_probs(swapped.params, batch.student, completion)
    log_t = log_probs(teacher, batch.teacher, completion)
    without = log_probs(teacher, batch.student, completion)
    other = log_probs(teacher, batch.contrast, completion) if name == "entropy" else without
    target = reference.log_softmax(log_t + 0.7 * (log_t - other))

    index, lengths = np.arange(completion.mask.shape[1]), np.array([6, 6, 2, 10])
    counted = index < np.ceil(config.positions.first_fraction * lengths)[:, None]
    weights = counted * (index + 1.0) ** config.positions.power
    if config.token_weights == "advantage":
        own = kl(log_t, without)
    else:
        kept = reference.log_softmax(np.sort(target, axis=-1)[..., -40:])
        own = -np.sum(np.exp(kept) * kept, axis=-1)
    jsd = jsd_rows(log_s, target, config)
    ce = -np.take_along_axis(log_s, np.asarray(completion.labels)[..., None], axis=-1)[..., 0]
    mean = functools.partial(weighted_mean, reduction=config.reduction)

    state, metrics = first_step(swapped, config)
    close = functools.partial(np.testing.assert_allclose, rtol=3e-4)
    close(metrics["jsd"], mean(jsd, weights * own))
    close(metrics["ce"], mean(ce, weights * own))
    close(metrics["loss"], metrics["jsd"] + config.ce_weight * metrics["ce"])
    if config.token_weights == "advantage":
        close(metrics["advantage"], own[counted].mean())
    # Weights and contrast each make a difference.
    assert abs(metrics["jsd"] / mean(jsd, weights) - 1) > 1e-3
    assert abs(mean(jsd_rows(log_s, log_t, config), weights * own) / metrics["jsd"] - 1) > 0.01
    if name == "advantage":
        assert_slope(swapped, config, gradients(state, metrics))


def test_references_in_the_place_of_completions():
    """What is scored is what would be if the student had sampled the references."""
    sampled = [[[5, 6], [7]], [[1, 2, 3]], [[9]]]
    trajectory = tiny.trajectory(sampled, budget=8, ended_on_eos=[True, False, True])
    wanted = tiny.trajectory(
        [[[5, 6], [7]], [[30, 31]], [[40, 41, 42, 43, 44, 45, 46]]], 8, [True, True, False]
    )
    given = np.array([False, True, True])[:, None]
    references = context.References(
        np.where(given, wanted.tokens, 0), given & wanted.mask, np.array([False, False, True])
    )
    found = distill.with_references(trajectory, references, bos=tiny.TOKENIZER.bos)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert distill.with_references(trajectory, None, bos=0) is trajectory


@pytest.mark.parametrize("reduction", ["completion", "token"])
def test_reweighted(reduction):
    """By hand: two completions of 2 tokens and of 1, the second with values of 0."""
    weights = jnp.array([[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]])
    found = weighting.reweighted(weights, jnp.array([[1.0, 3.0, 9.0], [0.0, 5.0, 5.0]]), reduction)
    first = [0.125, 0.375, 0.0] if reduction == "completion" else [0.25, 0.75, 0.0]
    np.testing.assert_allclose(found, [first, [0.0, 0.0, 0.0]], rtol=1e-6)
