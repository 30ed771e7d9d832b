"""Golden set `jsd`: divergences over a grid of settings, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import divergence
from parity.inputs import jsd_config
from parity.replay import close_gradient, compare, read


def mean_of(values, kept):
    """As the loss adds up the rows that count; 0 where none does."""
    return jnp.sum(values[None] * divergence.token_weights(jnp.asarray(kept)[None], "completion"))


def test_jsd(goldens):
    """The whole grid of settings: values, reductions, gradients."""
    tensors, facts = read(goldens, "jsd", "jsd")
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    kept = tensors["labels"] != -100
    assert len(facts["cases"]) == len(tensors["per_token"])
    gradient_of = dict(zip(facts["grad_student_cases"], tensors["grad_student"], strict=True))

    def mean(logits, config):
        values = divergence.generalized_jsd(logits, teacher, config)[0]
        return jnp.mean(values), values

    for i, case in enumerate(facts["cases"]):
        (_, values), gradient = jax.value_and_grad(mean, has_aux=True)(student, jsd_config(case))
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, err_msg=str(case))
        near(values, tensors["per_token"][i], atol=5e-6)
        near(jnp.mean(values), case["mean"], atol=1e-6)
        near(jnp.sum(values), case["sum"], atol=1e-5)
        near(mean_of(values, kept), case["mean_with_labels"], atol=1e-6)
        if i in gradient_of:
            close_gradient(gradient, gradient_of[i], str(case))
    assert float(mean_of(values, jnp.zeros_like(kept))) == facts["all_masked_value"]


def test_sampled_reverse_kl(goldens):
    tensors, facts = read(goldens, "jsd", "jsd")
    assert facts["tinker"]
    for i, case in enumerate(facts["tinker"]):
        mask = (
            tensors["labels"] != -100
            if case["with_labels"]
            else np.ones(len(tensors["labels"]), bool)
        )

        def loss(logits):
            return mean_of(
                divergence.sampled_reverse_kl(
                    logits,
                    tensors["teacher_logits"],
                    tensors["sampled_token_ids"],
                    case["temperature"],
                ),
                mask,
            )

        value, gradient = jax.value_and_grad(loss)(tensors["student_logits"])
        assert float(value) == pytest.approx(case["loss"], rel=1e-5, abs=1e-6), case
        compare(close_gradient, gradient, tensors, f"tinker_grad.{i}")
