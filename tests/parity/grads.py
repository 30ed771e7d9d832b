"""Golden set `grads`: losses and gradients of all parameters."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import divergence
from opsd_jax import params as params_lib
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model import bagel
from parity.inputs import completion, jsd_config, pack, role_blocks, score
from parity.replay import by_name, close, close_gradient, matching, read


def kind_of(name, settings):
    """(DivergenceConfig, whether the loss is the cross entropy) of a gradient file."""
    if name.startswith(("ce", "tinker")):
        kind = "sampled_reverse_kl" if name.startswith("tinker") else "jsd"
        return DivergenceConfig(kind=kind, chunk=5), name.startswith("ce")
    return jsd_config(settings, chunk=5), False


def source_of(facts):
    """Which case of und_forward the gradients were taken on."""
    return re.search(r"und_forward/(\w+)", facts["uses"])[1]


def logits_of(role, tensors, sample):
    """A role's logits: the file of gradients repeats those of the case that it was taken on, or
    leaves them out.
    """
    return tensors.get(f"{role}_logits", sample[f"{role}.logits"])


@pytest.mark.slow
def test_grads(goldens, grads, whole_model, tokenizer):
    """Loss and gradients of all parameters, through `distill.score` and the chunked divergence."""
    tensors, facts = read(goldens, "grads", grads)
    config, params = whole_model
    divergence_config, is_ce = kind_of(grads, facts["settings"])
    pack_name = source_of(facts)
    sample, settings = read(goldens, "und_forward", pack_name)
    student, teacher = role_blocks(sample, tokenizer, config.vit.patch_size, settings)
    student, teacher = pack([student], tokenizer, config), pack([teacher], tokenizer, config)
    block = completion(sample["completion_ids"], tokenizer, batch=1)

    hidden_s, pull = jax.vjp(lambda params: score(params, student, block, config=config), params)
    hidden_t = score(params, teacher, block, config=config)  # a constant of the loss

    def reduce(hidden, head):
        values, ce, _ = divergence.chunked(
            hidden, head, hidden_t, head, block.labels, divergence_config
        )
        return jnp.sum(
            (ce if is_ce else values) * divergence.token_weights(block.mask, "completion")
        ), values

    (loss, values), (of_hidden, of_head) = jax.jit(
        jax.value_and_grad(reduce, (0, 1), has_aux=True)
    )(hidden_s, params["llm"]["head"])
    gradients = params_lib.flatten(jax.tree.map(np.asarray, pull(of_hidden)[0]))
    gradients["llm/head"] = gradients["llm/head"] + of_head
    np.testing.assert_allclose(loss, tensors["loss"][0], atol=1e-6, rtol=1e-5)
    assert float(loss) == pytest.approx(facts["loss"], rel=1e-5, abs=1e-6)
    n = len(sample["completion_ids"]) + 1
    for role, hidden in (("student", hidden_s), ("teacher", hidden_t)):
        close(
            bagel.logits(params, np.asarray(hidden)[0, :n]), logits_of(role, tensors, sample), role
        )
    if "per_token_jsd" in tensors:
        np.testing.assert_allclose(values[0, :n], tensors["per_token_jsd"], atol=1e-6, rtol=1e-4)
    ours = by_name(params_lib.unflatten(gradients))
    wanted = matching(tensors, r"grad\.(.+)")
    assert wanted
    for match, gradient in wanted:
        close_gradient(ours[match[1]], gradient, match[1])
    trained = set(by_name(params_lib.partition(params)[0]))
    checked = 0
    for name in ours:
        if name in facts["grad_norms"]:
            checked += 1
            wanted = pytest.approx(facts["grad_norms"][name], rel=1e-3, abs=1e-6)
            assert np.linalg.norm(ours[name]) == wanted, name
        if name in facts["params_with_exact_zero_grad"]:
            assert not ours[name].any(), name
        if name in facts["params_with_grad_none"]:
            assert name not in trained, name
    assert checked >= len(trained)
    total = math.sqrt(sum(float(np.sum(ours[name].astype(np.float64) ** 2)) for name in trained))
    assert total == pytest.approx(facts["total_grad_norm"], rel=1e-4)


def test_grads_from_logits(goldens, grads):
    """The divergences as defined on logits, and what they hand back to them."""
    tensors, facts = read(goldens, "grads", grads)
    config, is_ce = kind_of(grads, facts["settings"])
    sample, _ = read(goldens, "und_forward", source_of(facts))
    student, teacher = (logits_of(role, tensors, sample) for role in ("student", "teacher"))
    labels = sample["student.packed_label_ids"]

    def rows(logits, config):
        if is_ce:
            return divergence.cross_entropy(logits, labels)
        if config.kind == "sampled_reverse_kl":
            return divergence.sampled_reverse_kl(logits, teacher, labels, config.temperature)
        return divergence.generalized_jsd(logits, teacher, config)[0]

    loss, gradient = jax.jit(jax.value_and_grad(lambda logits: jnp.mean(rows(logits, config))))(
        student
    )
    np.testing.assert_allclose(loss, tensors["loss"][0], atol=1e-6, rtol=1e-5)
    close_gradient(gradient, tensors["student_logits_grad"])
    for name, clip in (("per_token_jsd", config.clip), ("per_token_jsd_unclipped", 0.0)):
        if name in tensors:
            values = jax.jit(
                functools.partial(rows, config=dataclasses.replace(config, clip=clip))
            )(student)
            np.testing.assert_allclose(values, tensors[name], atol=1e-6, rtol=1e-4, err_msg=name)
