"""The divergence: definition, limits, switches, and the chunked form that training uses."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from opsd_jax import divergence
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.plan import flops

pytestmark = pytest.mark.usefixtures("quick_compiles")

BETAS = (0.0, 0.3, 0.5, 0.9, 1.0)
# Bare: no top-k, no clip.
bare = functools.partial(DivergenceConfig, top_k=0, clip=0.0)


def draw(seed, *shape, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.fixture
def logits():
    """(student, teacher) of 6 rows and 33 entries."""
    return draw(0, 6, 33), draw(1, 6, 33)


def values_of(student, teacher, config):
    return np.asarray(divergence.generalized_jsd(student, teacher, config)[0])


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_definition(logits, beta):
    """Against float64 NumPy, for all switches."""
    for temperature, top_k, tail, clip, unit in itertools.product(
        (1.0, 2.5), (0, 8), (False, True), (0.0, 0.02), ("entry", "token")
    ):
        settings = dict(
            beta=beta, temperature=temperature, top_k=top_k, tail=tail, clip=clip, clip_unit=unit
        )
        wanted = reference.generalized_jsd(*logits, **settings)
        values = values_of(*logits, DivergenceConfig(**settings))
        np.testing.assert_allclose(values, wanted, atol=2e-6, rtol=1e-5, err_msg=str(settings))


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def test_ends_are_directed(logits):
    """beta 0 is KL(teacher || student), beta 1 is KL(student || teacher)."""
    p_s, p_t = (reference.softmax(x.astype(np.float64)) for x in logits)
    assert np.abs(kl(p_s, p_t) - kl(p_t, p_s)).min() > 1e-3  # or the rest would show nothing
    np.testing.assert_allclose(values_of(*logits, bare(beta=0.0)), kl(p_t, p_s), rtol=1e-5)
    np.testing.assert_allclose(values_of(*logits, bare(beta=1.0)), kl(p_s, p_t), rtol=1e-5)


def test_jsd_is_symmetric_and_bounded(logits):
    student, teacher = logits
    values = values_of(student, teacher, bare(beta=0.5))
    np.testing.assert_allclose(values, values_of(teacher, student, bare(beta=0.5)), rtol=1e-5)
    assert (values > 0).all() and (values < np.log(2)).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 8},
        {"top_k": 8, "tail": True},
        {"clip": 0.05},
        {"clip": 0.05, "clip_unit": "token", "temperature": 0.7},
    ],
)
def test_identical_inputs(logits, beta, settings):
    """Equal distributions: the value is exactly 0, the gradient but for the last bit of a
    softmax.
    """
    config = bare(**{"beta": beta, **settings})
    teacher = logits[1]

    def total(student):
        return jnp.sum(divergence.generalized_jsd(student, teacher, config)[0])

    value, gradient = jax.value_and_grad(total)(teacher)
    assert float(value) == 0
    np.testing.assert_allclose(gradient, 0, atol=2e-7)


def test_shift_of_logits_does_not_matter(logits):
    student, teacher = logits
    config = DivergenceConfig(top_k=8)
    shifted = values_of(student + 5, teacher - 3, config)
    np.testing.assert_allclose(shifted, values_of(student, teacher, config), atol=1e-6)


def test_teacher_gets_no_gradient(logits):
    for config in (bare(), DivergenceConfig(top_k=8, tail=True), bare(beta=0.0), bare(beta=1.0)):

        def total(teacher):
            return jnp.sum(divergence.generalized_jsd(logits[0], teacher, config)[0])

        assert not np.asarray(jax.grad(total)(logits[1])).any()


def test_gradient_by_finite_differences(logits):
    student, teacher = (x.astype(np.float64) for x in logits)
    for settings in (
        {"beta": 0.3},
        {"beta": 0.0, "top_k": 8},
        {"beta": 1.0, "top_k": 8, "tail": True},
        {"beta": 0.5, "clip": 0.02},
        {"beta": 0.5, "clip": 0.45, "clip_unit": "token"},
    ):

        def rows(s):
            return reference.generalized_jsd(s, teacher, **settings)

        bumps = 1e-6 * np.eye(student.shape[1])  # rows do not mix: one entry of all rows at a time
        wanted = (
            np.stack([rows(student + bump) - rows(student - bump) for bump in bumps], axis=1) / 2e-6
        )
        ours = jax.grad(
            lambda s: jnp.sum(
                divergence.generalized_jsd(s, teacher.astype(np.float32), bare(**settings))[0]
            )
        )(student.astype(np.float32))
        np.testing.assert_allclose(ours, wanted, atol=2e-6, err_msg=str(settings))
        assert np.abs(wanted).max() > 1e-3, settings


# --- clip and top-k -------------------------------------------------------------------------------


def test_clip_units():
    """The worked example: entries .2313, .2313, 0; bounded each at .05, or their sum."""
    teacher, student = np.log([[0.9, 0.05, 0.05]]), np.log([[0.05, 0.9, 0.05]])
    for settings, wanted in (
        (dict(), 0.4626),
        (dict(clip=0.05), 0.1000),
        (dict(clip=0.05, clip_unit="token"), 0.0500),
    ):
        assert values_of(student, teacher, bare(**settings))[0] == pytest.approx(wanted, abs=5e-5)


def test_clipped_entries_give_no_gradient():
    teacher, student = np.log([[0.9, 0.05, 0.05]]), np.log([[0.05, 0.9, 0.05]])
    for unit in ("entry", "token"):
        config = bare(clip=0.05, clip_unit=unit)
        gradient = jax.grad(lambda s: divergence.generalized_jsd(s, teacher, config)[0][0])(student)
        _, signals = divergence.generalized_jsd(student, teacher, config)
        assert signals["clip_fraction"][0] == pytest.approx(2 / 3 if unit == "entry" else 1)
        # The third entry is equal on both sides: no slope there either.
        np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_rows_clipped_from_above_only_can_be_negative():
    """Officially nothing bounds the negative entries of a directed KL."""
    student, teacher = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert values_of(student, teacher, bare(beta=0.0))[0] > 0
    wanted = 0.05 + 0.1 * np.log(0.1 / 0.5)
    assert wanted < 0
    assert values_of(student, teacher, bare(beta=0.0, clip=0.05))[0] == pytest.approx(wanted)


def test_top_k_follows_the_teacher():
    teacher = np.array([[0.0, 3.0, 2.0, 1.0, -1.0]], np.float32)
    student = np.array(
        [[9.0, 1.0, 1.0, 1.0, 8.0]], np.float32
    )  # its own favourites are not the teacher's
    kept = values_of(student[:, 1:3], teacher[:, 1:3], bare())
    values, signals = divergence.generalized_jsd(student, teacher, bare(top_k=2))
    np.testing.assert_allclose(values, kept, rtol=1e-6)
    mass = reference.softmax(teacher)[0, 1:3].sum()
    assert signals["teacher_topk_mass"][0] == pytest.approx(mass, rel=1e-6)
    gradient = jax.grad(lambda s: divergence.generalized_jsd(s, teacher, bare(top_k=2))[0][0])(
        student
    )
    assert not gradient[0, [0, 3, 4]].any() and np.asarray(gradient[0, 1:3]).any()


def test_top_k_of_the_whole_vocabulary(logits):
    for top_k in (33, 34, 256):
        np.testing.assert_array_equal(
            values_of(*logits, bare(top_k=top_k)), values_of(*logits, bare())
        )


def test_tail_makes_distributions(logits):
    """With the tail bucket both sides add up to 1, and mass that leaves the kept entries is
    seen.
    """
    config = bare(top_k=5, tail=True)
    log_s, log_t, mass = divergence._log_probs(
        logits[0], divergence._of_teacher(logits[1], config), config
    )
    assert log_s.shape == (6, 6)
    np.testing.assert_allclose(np.exp(log_s).sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_t).sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_t[:, :5]).sum(-1), mass, atol=1e-6)
    student = np.array([[2.0, 2.0, 9.0]], np.float32)
    teacher = np.array([[2.0, 2.0, -9.0]], np.float32)
    assert values_of(student, teacher, bare(top_k=2))[0] == pytest.approx(0, abs=1e-7)
    assert values_of(student, teacher, bare(top_k=2, tail=True))[0] > 0.5


@pytest.mark.parametrize("beta", BETAS)
def test_tail_of_one_entry_is_exact(logits, beta):
    """A bucket that holds a single entry loses nothing."""
    full = values_of(*logits, bare(beta=beta))
    bucketed = values_of(*logits, bare(beta=beta, top_k=32, tail=True))
    np.testing.assert_allclose(bucketed, full, atol=1e-5, rtol=1e-4)


def test_empty_tail_is_finite():
    """The kept entries hold all of float32's probability."""
    teacher = np.array([[50.0, 0.0, -50.0, -60.0]], np.float32)
    for beta in BETAS:
        config = bare(beta=beta, top_k=2, tail=True)
        value, gradient = jax.value_and_grad(
            lambda s: divergence.generalized_jsd(s, teacher, config)[0][0]
        )(teacher[:, ::-1].copy())
        assert np.isfinite(value) and np.isfinite(gradient).all(), beta


def test_extreme_logits():
    """Logits far beyond float32's exponent, on the same entry, on opposite ones, and on one side
    only.
    """
    left, right, flat = np.zeros((3, 33), np.float32)
    left[0] = right[1] = 1e4
    left[2] = right[2] = -1e4
    student = np.stack([left, left, left, flat, right, right])
    teacher = np.stack([right, left, flat, right, flat, left])
    switches = (0, False, 0.0), (8, True, 0.05), (8, False, 0.0)
    for beta, (top_k, tail, clip) in itertools.product(BETAS, switches):
        config = bare(beta=beta, top_k=top_k, tail=tail, clip=clip)
        value, gradient = jax.value_and_grad(
            lambda s: jnp.sum(divergence.generalized_jsd(s, teacher, config)[0])
        )(student)
        assert np.isfinite(value) and np.isfinite(gradient).all(), config
    assert values_of(student, teacher, bare(beta=0.5))[0] == pytest.approx(np.log(2), rel=1e-6)


def test_signals(logits):
    config = DivergenceConfig(top_k=8, temperature=2.0, clip=0.0)
    _, signals = divergence.generalized_jsd(*logits, config)
    index = np.argsort(-logits[1], axis=-1)[:, :8]
    for side, x in zip(("student", "teacher"), logits):
        p = reference.softmax(np.take_along_axis(x, index, -1).astype(np.float64) / 2)
        np.testing.assert_allclose(
            signals[f"{side}_entropy"], -np.sum(p * np.log(p), -1), rtol=1e-5
        )
    mass = np.take_along_axis(reference.softmax(logits[1].astype(np.float64) / 2), index, -1).sum(
        -1
    )
    np.testing.assert_allclose(signals["teacher_topk_mass"], mass, rtol=1e-5)
    assert not np.asarray(signals["clip_fraction"]).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "kl"},
        {"beta": 1.5},
        {"beta": -0.1},
        {"temperature": 0.0},
        {"top_k": -1},
        {"clip": -0.1},
        {"clip_unit": "row"},
        {"support": "both"},
        {"support": "union", "top_k": 0},
        {"support": "student", "kind": "sampled_reverse_kl"},
        {"chunk": 0},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="divergence"):
        DivergenceConfig(**settings)


# --- the sampled form -----------------------------------------------------------------------------


def test_sampled_reverse_kl_is_the_policy_gradient(logits):
    """One sample: -(log p_T - log p_S)(x) (onehot(x) - p_S).

    Their mean over x ~ p_S: the slope of the KL.
    """
    student, teacher = logits
    log_s, log_t = reference.log_softmax(student), reference.log_softmax(teacher)
    p_s = np.exp(log_s)
    per_sample = jax.vmap(
        jax.grad(lambda s, t, x: divergence.sampled_reverse_kl(s, t, x)), (None, None, 0)
    )
    for row in range(2):
        tokens = np.arange(student.shape[1])
        gradients = per_sample(student[row], teacher[row], tokens)
        wanted = -(log_t - log_s)[row][:, None] * (np.eye(len(tokens)) - p_s[row])
        np.testing.assert_allclose(gradients, wanted, atol=2e-5)

        def reverse_kl(s):
            return divergence.generalized_jsd(s, teacher[row], bare(beta=1.0))[0]

        reverse = jax.grad(reverse_kl)(student[row])
        np.testing.assert_allclose(p_s[row] @ np.asarray(gradients), reverse, atol=2e-5)


def test_sampled_reverse_kl_ignores_the_teacher_gradient(logits):
    tokens = np.arange(6)

    def total(teacher):
        return jnp.sum(divergence.sampled_reverse_kl(logits[0], teacher, tokens, 2.0))

    assert not np.asarray(jax.grad(total)(logits[1])).any()


# --- in chunks ------------------------------------------------------------------------------------

B, N, D, V = 2, 13, 8, 40


@pytest.fixture(scope="module")
def model():
    """Hidden states, heads, labels."""
    return {
        "student_hidden": draw(2, B, N, D, scale=1.0),
        "student_head": draw(3, D, V, scale=0.8),
        "teacher_hidden": draw(4, B, N, D, scale=1.0),
        "teacher_head": draw(5, D, V, scale=0.8),
        "labels": np.random.default_rng(6).integers(0, V, (B, N)).astype(np.int32),
    }


def whole(student_hidden, student_head, teacher_hidden, teacher_head, labels, config):
    """`chunked` spelled out on full logits."""
    student, teacher = student_hidden @ student_head, teacher_hidden @ teacher_head
    values, signals = divergence.generalized_jsd(student, teacher, config)
    if config.kind == "sampled_reverse_kl":
        values = divergence.sampled_reverse_kl(student, teacher, labels, config.temperature)
    return values, divergence.cross_entropy(student, labels), signals


# 5 and 12 do not divide 13; 99 takes everything at once.
@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk, settings",
    [
        (1, dict(beta=0.5, top_k=16, clip=0.05)),
        (5, dict(beta=0.5, top_k=16, clip=0.05)),
        (99, dict(beta=0.5, top_k=16, clip=0.05)),
        (5, dict(beta=0.0, top_k=0, clip=0.0, temperature=2.0)),
        (12, dict(kind="sampled_reverse_kl", temperature=1.5)),
    ],
)
def test_chunked(model, chunk, settings):
    """Values, cross entropy, signals, gradients for hidden states and head: as from full logits."""
    config = DivergenceConfig(chunk=chunk, **settings)
    weights = draw(7, B, N, scale=1.0)

    def differentiate(function):
        def loss(parts):
            values, ce, signals = function(**parts, labels=model["labels"], config=config)
            return jnp.sum(weights * (values + 0.3 * ce)), (values, ce, signals)

        parts = {name: x for name, x in model.items() if name != "labels"}
        (_, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parts)
        return found, gradients

    found, gradients = differentiate(divergence.chunked)
    wanted, wanted_gradients = differentiate(whole)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5), found, wanted)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, wanted_gradients[name], atol=2e-5, rtol=1e-4, err_msg=name
        )
        assert np.asarray(gradient).any() == name.startswith("student"), name


def test_chunked_without_cross_entropy(model):
    values, ce, _ = divergence.chunked(**model, config=DivergenceConfig(chunk=5), with_ce=False)
    assert not np.asarray(ce).any()
    np.testing.assert_array_equal(
        values, divergence.chunked(**model, config=DivergenceConfig(chunk=5))[0]
    )


@pytest.mark.parametrize("chunk", [4, 13])
def test_chunked_cross_entropy(model, chunk):
    hidden, head, labels = model["student_hidden"], model["student_head"], model["labels"].copy()
    labels[0] = (hidden @ head)[0].argmax(-1)
    ce, correct = divergence.chunked_cross_entropy(hidden, head, labels, chunk)
    log_p = reference.log_softmax((hidden @ head).astype(np.float64))
    wanted = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(ce, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, (hidden @ head).argmax(-1) == labels)
    assert np.asarray(correct[0]).all() and not np.asarray(correct[1]).all()


def test_chunked_memory():
    """The compiled program never holds the logits of all rows, neither forward nor backward."""
    logits = 2048 * 8192 * 4
    assert temporary(divergence.chunked, arguments=(0, 1), chunk=128) < logits // 2
    assert (
        temporary(whole, arguments=(0, 1), chunk=128) > logits
    )  # or the bound above would show nothing


def test_one_side_at_a_time():
    """With top_k the teacher's logits of a chunk are gone before the student's are made; else both
    exist.
    """
    logits = 512 * 8192 * 4
    assert temporary(divergence.chunked, arguments=0, chunk=512) < 1.25 * logits
    assert temporary(divergence.chunked, arguments=0, chunk=512, top_k=0) > 2 * logits


def temporary(function, arguments, chunk, top_k=64):
    n, d, v = 2048, 16, 8192
    config = DivergenceConfig(top_k=top_k, chunk=chunk)
    hidden, head = (
        jax.ShapeDtypeStruct((1, n, d), jnp.float32),
        jax.ShapeDtypeStruct((d, v), jnp.float32),
    )

    def loss(h, w, ht, wt, labels):
        return jnp.mean(function(h, w, ht, wt, labels, config)[0])

    program = (
        jax.jit(jax.grad(loss, argnums=arguments))
        .lower(hidden, head, hidden, head, jax.ShapeDtypeStruct((1, n), jnp.int32))
        .compile()
    )
    return program.memory_analysis().temp_size_in_bytes


def test_chunks_are_even(model):
    """13 rows by 12 are two chunks of 7, not 12 and 11 of padding."""

    def loss(hidden):
        return jnp.mean(
            divergence.chunked_cross_entropy(hidden, model["student_head"], model["labels"], 12)[0]
        )

    traced = jax.jit(loss).trace(model["student_hidden"])
    assert flops.matmul_flops(traced.jaxpr.jaxpr) == 2 * B * 14 * D * V


@pytest.mark.parametrize("chunk", [5, 13])
@pytest.mark.parametrize(
    "settings, products",
    [
        (dict(top_k=16), 4),  # both sides' logits; gradients of the hidden states and of the head
        (dict(top_k=16, tail=True), 5),  # the tail's gradient goes through the student's logits
        (dict(top_k=0, clip=0.0), 6),
    ],
)
def test_logits_are_computed_again_only_where_all_entries_count(model, chunk, settings, products):
    config = DivergenceConfig(chunk=chunk, **settings)

    def loss(student_hidden, student_head):
        return jnp.mean(
            divergence.chunked(
                **model | {"student_hidden": student_hidden, "student_head": student_head},
                config=config,
            )[0]
        )

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(
        model["student_hidden"], model["student_head"]
    )
    assert (
        flops.matmul_flops(traced.jaxpr.jaxpr) == products * 2 * B * -(-N // chunk) * chunk * D * V
    )


# --- helpers --------------------------------------------------------------------------------------


def test_cross_entropy_in_bfloat16():
    """Logits may come in bfloat16: the sum over the vocabulary is done in float32."""
    logits = jnp.asarray(draw(8, 3, 1000), jnp.bfloat16)
    labels = jnp.array([0, 10, 999])
    wanted = -reference.log_softmax(np.asarray(logits, np.float64))[np.arange(3), labels]
    ours = divergence.cross_entropy(logits, labels)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


# --- support --------------------------------------------------------------------------------------


def on_support(student, teacher, support, top_k, beta=0.5, clip=0.0):
    """(value, mass of the teacher, share of clipped entries) of single tokens, by sets of entries
    and in float64.
    """
    found = []
    for s, t in zip(np.float64(student), np.float64(teacher)):
        own = {"student": set(np.argsort(-s)[:top_k]), "teacher": set(np.argsort(-t)[:top_k])}
        own["union"] = own["student"] | own["teacher"]
        index = sorted(own[support])
        value = reference.generalized_jsd(s[None, index], t[None, index], beta=beta, clip=clip)
        p_s, p_t = reference.softmax(s[index]), reference.softmax(t[index])
        m = (p_s + p_t) / 2
        entries = p_t * np.log(p_t / m) / 2 + p_s * np.log(p_s / m) / 2
        found.append((value[0], reference.softmax(t)[index].sum(), np.mean(entries > clip)))
    return np.array(found).T


@pytest.mark.parametrize("clip", [0.0, 0.02])
@pytest.mark.parametrize("support", divergence.SUPPORTS)
def test_whose_entries_are_compared(logits, support, clip):
    """Sets of 8 entries of each side; of the 16 of a union those in both count once."""
    student, teacher = logits
    teacher = teacher + 0.7 * student  # so that the two sets share some entries, not all
    config = bare(top_k=8, support=support, clip=clip)
    values, signals = divergence.generalized_jsd(student, teacher, config)
    wanted, mass, clipped = on_support(student, teacher, support, 8, clip=clip)
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(signals["teacher_topk_mass"], mass, rtol=1e-5)
    if clip:
        np.testing.assert_allclose(signals["clip_fraction"], clipped, rtol=1e-5)
    others = [on_support(student, teacher, s, 8, clip=clip)[0] for s in divergence.SUPPORTS]
    assert sum(np.abs(values - other).max() < 1e-3 for other in others) == 1


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradient_on_a_union_by_finite_differences(logits, beta):
    student, teacher = logits
    config = bare(top_k=8, support="union", beta=beta)

    def total(s):
        return jnp.sum(divergence.generalized_jsd(s, teacher, config)[0])

    gradient = np.asarray(jax.grad(total)(student))
    for n in range(student.shape[1]):
        bump = 1e-6 * np.eye(student.shape[1])[n]
        ends = [
            on_support(np.float64(student) + sign * bump, teacher, "union", 8, beta=beta)[0]
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(gradient[:, n], (ends[0] - ends[1]) / 2e-6, atol=3e-6)
    assert np.abs(gradient).max() > 1e-3


def test_a_union_with_a_tail_adds_up_to_one(logits):
    config = bare(top_k=5, tail=True, support="union")
    student, teacher = logits
    found = divergence._of_teacher(teacher, config, student)
    log_s, log_t, _ = divergence._log_probs(student, found, config)
    assert log_s.shape == (6, 11)
    np.testing.assert_allclose(np.exp(log_s).sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(log_t).sum(-1), 1, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("support", ["student", "union"])
def test_chunked_on_another_support(model, support):
    """Values, signals and gradients as from full logits."""
    config = DivergenceConfig(chunk=5, top_k=6, clip=0.05, support=support)

    def differentiate(function):
        def loss(hidden, head):
            parts = model | {"student_hidden": hidden, "student_head": head}
            values, _, signals = function(**parts, config=config)
            return jnp.sum(values), (values, signals)

        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, found), gradients = both(model["student_hidden"], model["student_head"])
        return found, gradients

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4),
        differentiate(divergence.chunked),
        differentiate(whole),
    )


@pytest.mark.parametrize("shape", [(1, 5), (2, 6)])
def test_logits_of_unequal_shapes_are_refused(shape):
    jsd = inspect.unwrap(divergence.generalized_jsd)
    with pytest.raises(ValueError, match=r"student_logits \[2, 5\] and teacher_logits"):
        jsd(np.zeros((2, 5)), np.zeros(shape), divergence.DivergenceConfig())


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction is 'tokn': use 'token' or 'completion'"):
        divergence.token_weights(np.ones((2, 3), bool), "tokn")
