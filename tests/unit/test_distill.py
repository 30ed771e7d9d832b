"""Scores, loss, teachers, accumulation and the optimizer, compared with NumPy on the model's
logits.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from opsd_jax import blocks as blocks_lib
from opsd_jax import context, distill, divergence, optimizer, rollout, sharding, supervised
from opsd_jax import params as params_lib
from opsd_jax.distill import DistillConfig, OptimConfig
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.method_config import SupervisedConfig
from opsd_jax.model import bagel

BOS, EOS = tiny.TOKENIZER.bos, tiny.TOKENIZER.eos
BUDGET, ROWS = 10, 4
# A divergence that clips and drops some entries. Steps of the optimizer are large, and its eps as
# well: then rounding in a vanishing gradient does not grow into a step.
BASE = DistillConfig(
    model=tiny.MODEL,
    **tiny.ENDS,
    divergence=DivergenceConfig(top_k=40, clip=0.05, chunk=4),
    ema_decay=0.9,
    optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, total_steps=10, eps=1e-3),
)
variant = functools.partial(dataclasses.replace, BASE)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def case():
    """Parameters of student and teacher, contexts of four rows, and completions: one with an image
    skip.
    """
    rng = np.random.default_rng(0)
    batch = tiny.batch(rng, ROWS, visual_thoughts=1)

    def draw(n):
        return rng.integers(0, 256, n).tolist()

    completions = [[draw(5)], [draw(3), draw(2)], [draw(1)], [draw(9)]]
    params = tiny.params(seed=1)
    trainable, frozen = params_lib.partition(params)
    scaled = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * np.float32(1.2)), trainable)
    other = params_lib.merge(scaled, frozen)
    return types.SimpleNamespace(
        batch=batch,
        completions=completions,
        params=params,
        other=other,
        trajectory=tiny.trajectory(completions, BUDGET, [True, True, True, False]),
    )


def state_of(case, config, **changes):
    """A fresh state on buffers of its own; its teacher has the weights `case.other`."""
    state = distill.init_state(case.params, config)
    if config.teacher != "self":
        own, _ = params_lib.partition(case.other, config.freeze)
        state["ema" if config.teacher == "ema" else "teacher"] = own
    return tiny.copy(state | changes)


def first_step(case, config, **changes):
    return distill.update(
        state_of(case, config, **changes), case.batch, case.trajectory, config=config
    )


@pytest.fixture(scope="module")
def base(case):
    """(state after one step, metrics) of BASE."""
    return first_step(case, BASE)


def gradients(state, metrics, optim=BASE.optim):
    """The gradients that filled Adam's first moments: mu = (1 - b1) factor g."""
    factor = min(1, optim.max_grad_norm / (float(metrics["grad_norm"]) + 1e-6))
    return {
        path: np.asarray(mu) / (1 - optim.b1) / factor
        for path, mu in params_lib.flatten(state["opt"].mu).items()
    }


def assert_same_gradients(a, b, tolerance=1e-5):
    """Leaf by leaf, relative to the largest entry of all."""
    assert a.keys() == b.keys()
    scale = max(np.abs(g).max() for g in a.values())
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=0, atol=tolerance * scale, err_msg=path)


def assert_slope(case, config, found):
    """Moves the student alone along the gradients found: the loss must change by their length."""
    length = np.sqrt(sum((g**2).sum() for g in found.values()))
    assert length > 1e-2

    def loss(step):
        moved = {
            path: jnp.asarray(np.asarray(x) + np.float32(step / length) * found[path])
            if path in found
            else x
            for path, x in params_lib.flatten(case.params).items()
        }
        return float(first_step(case, config, params=params_lib.unflatten(moved))[1]["loss"])

    step = 0.002  # the loss moves by about 0.001, and its rounding is 1e-8
    np.testing.assert_allclose((loss(step) - loss(-step)) / (2 * step), length, rtol=0.01)


# ---- references


@jax.jit
def model_logits(params, one_context, completion):
    return bagel.logits(params, distill.score(params, one_context, completion, config=tiny.MODEL))


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def reference_rows(case, config, student_context, teacher_context, teacher_params):
    """Row values float64 [B, N + 1] of divergence, cross entropy and signals, and the mask."""
    completion = distill.scored_completion(case.trajectory, teacher_context.length, config)

    def of(params, c):
        return np.asarray(model_logits(params, c, completion), np.float64)

    log_s, log_t = of(case.params, student_context), of(teacher_params, teacher_context)
    d = config.divergence
    ce = np.log(softmax(log_s))
    ce = -np.take_along_axis(ce, np.asarray(completion.labels)[..., None], axis=-1)[..., 0]
    top = np.argsort(-log_t, axis=-1)[..., : d.top_k]
    mass = np.take_along_axis(softmax(log_t), top, axis=-1).sum(-1)
    s, t = (softmax(np.take_along_axis(x, top, axis=-1)) for x in (log_s, log_t))
    m = d.beta * t + (1 - d.beta) * s
    entries = d.beta * t * np.log(t / m) + (1 - d.beta) * s * np.log(s / m)

    def entropy(p):
        return -(p * np.log(p)).sum(-1)

    signals = {
        "teacher_topk_mass": mass,
        "clip_fraction": (entries > d.clip).mean(-1),
        "student_entropy": entropy(s),
        "teacher_entropy": entropy(t),
    }
    return np.minimum(entries, d.clip).sum(-1), ce, signals, np.asarray(completion.mask)


def by_completion(values, mask):
    return np.mean([row[count].mean() for row, count in zip(values, mask)])


def by_token(values, mask):
    return values[mask].mean()


# ---- loss


@pytest.mark.slow
def test_loss_and_signals_against_numpy(case, base):
    jsd, ce, signals, mask = reference_rows(
        case, BASE, case.batch.student, case.batch.teacher, case.other
    )
    _, metrics = base
    assert mask.sum(axis=1).tolist() == [6, 6, 2, 10]
    assert (
        signals["clip_fraction"][mask].mean() > 0.01
        and signals["teacher_topk_mass"][mask].mean() < 0.99
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4)
    close(metrics["loss"], by_completion(jsd, mask))
    close(metrics["jsd"], by_completion(jsd, mask))
    close(metrics["ce"], by_completion(ce, mask))
    for name, values in signals.items():
        close(metrics[name], by_token(values, mask), err_msg=name)
    close(metrics["jsd_by_position"], (jsd * mask).sum(0) / np.maximum(mask.sum(0), 1))
    assert (metrics["completion_len"], metrics["eos_rate"], metrics["image_skip_rate"]) == (
        5,
        0.75,
        0.25,
    )
    assert (metrics["scored_len"], metrics["cut_rate"]) == (mask.sum(1).mean(), 0)
    assert metrics["lr"] == 0


@pytest.mark.slow
def test_token_reduction_weights_and_two_micro_steps(case):
    """Every token alike, both terms, the batch cut in two: value by NumPy, gradient by
    differences.
    """
    config = variant(
        reduction="token",
        jsd_weight=2.0,
        ce_weight=0.5,
        accumulation=2,
        freeze=("vit", "connector"),
    )
    teacher = distill.teacher_params(state_of(case, config), config)  # shares what is frozen
    jsd, ce, _, mask = reference_rows(case, config, case.batch.student, case.batch.teacher, teacher)
    state, metrics = first_step(case, config)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4)
    close(metrics["jsd"], by_token(jsd, mask))
    close(metrics["ce"], by_token(ce, mask))
    close(metrics["loss"], 2 * by_token(jsd, mask) + by_token(ce, mask) / 2)
    assert abs(by_token(jsd, mask) / by_completion(jsd, mask) - 1) > 0.01
    assert_slope(case, config, gradients(state, metrics))


@pytest.mark.slow
def test_four_micro_steps_with_recomputation_equal_one_batch(case, base):
    """Accumulation, remat and unrolled layers at once: none of them changes a gradient or a
    metric.
    """
    config = variant(accumulation=4, model=dataclasses.replace(tiny.MODEL, remat="full", unroll=2))
    state, metrics = first_step(case, config)
    assert_same_gradients(gradients(*base), gradients(state, metrics))
    for name, value in base[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="batch size 4 is not divisible by accumulation 3"):
        first_step(case, variant(accumulation=3))


def test_roles_are_not_confused(case, base):
    """The same program on swapped contexts: the teacher's weights stay with `batch.teacher`."""
    swapped = context.Batch(case.batch.teacher, case.batch.student)
    _, metrics = distill.update(state_of(case, BASE), swapped, case.trajectory, config=BASE)
    jsd, _, _, mask = reference_rows(case, BASE, swapped.student, swapped.teacher, case.other)
    np.testing.assert_allclose(metrics["loss"], by_completion(jsd, mask), rtol=2e-4)
    assert abs(metrics["loss"] / base[1]["loss"] - 1) > 0.01


@pytest.mark.parametrize("group", ["embed", "und", "vit", "connector"])
def test_gradients_against_finite_differences(case, base, group):
    def of_group(path):
        return params_lib.fact(path).group == group

    assert_slope(case, BASE, {path: g for path, g in gradients(*base).items() if of_group(path)})


@pytest.mark.slow
def test_bfloat16_is_close(case, base):
    state, metrics = first_step(
        case, variant(model=dataclasses.replace(tiny.MODEL, dtype="bfloat16"))
    )
    np.testing.assert_allclose(metrics["loss"], base[1]["loss"], rtol=0.05)
    assert metrics["loss"] != base[1]["loss"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state["params"], state["opt"].mu)))

    def flat(pair):
        return np.concatenate([g.ravel() for g in gradients(*pair).values()])

    a, b = flat(base), flat((state, metrics))
    assert a @ b / np.sqrt(a @ a * (b @ b)) > 0.95


# ---- teachers and state


def test_the_live_weights_as_teacher(case):
    """With the student's context there is nothing to teach; with its own, the teacher gets no
    gradient.

    The first is zero up to the rounding of two forwards that XLA may fuse differently (a divergence
    is quadratic in it). The second: all is as with a copy of the weights.
    """
    config = variant(teacher="self", freeze=("vit", "connector", "embed"))
    same = context.Batch(case.batch.student, case.batch.student)
    state, metrics = distill.update(state_of(case, config), same, case.trajectory, config=config)
    assert set(state) == {"params", "opt", "step"}
    assert max(metrics["loss"], metrics["jsd"], metrics["jsd_by_position"].max()) < 1e-11
    assert metrics["grad_norm"] < 1e-5
    live = first_step(case, config)
    apart = first_step(case, BASE, ema=params_lib.partition(case.params)[0])
    assert live[1]["loss"] > 0.01
    np.testing.assert_allclose(live[1]["loss"], apart[1]["loss"], rtol=1e-5)
    found, whole = gradients(*live), gradients(*apart)
    assert_same_gradients(found, {path: whole[path] for path in found})


def test_steps_of_an_ema_teacher(case, base):
    """Step 0 has rate 0: moments fill, nothing moves.

    Then parameters move, and the EMA follows each step.
    """
    before = params_lib.flatten(state_of(case, BASE)["params"])
    state, _ = base
    for path, x in params_lib.flatten(state["params"]).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    assert all(np.asarray(nu).any() for path, nu in params_lib.flatten(state["opt"].nu).items())
    state = tiny.copy(state)
    for step in (1, 2):
        old, ema = tiny.copy(state["params"]), params_lib.flatten(tiny.copy(state["ema"]))
        given = jax.tree.leaves(state)
        state, metrics = distill.update(state, case.batch, case.trajectory, config=BASE)
        assert all(x.is_deleted() for x in given)  # donated
        assert state["step"] == step + 1
        np.testing.assert_allclose(metrics["lr"], 0.005 * step, rtol=1e-6)
        moved = tiny.distances(old, state["params"])
        assert moved.pop("connector/position_table") == 0
        moved.pop("vit/layers/k_bias")  # softmax does not see it: no gradient but rounding
        assert min(moved.values()) > 1e-6
        new = params_lib.flatten(state["params"])
        for path, x in params_lib.flatten(state["ema"]).items():
            expected = 0.9 * np.asarray(ema[path]) + 0.1 * np.asarray(new[path])
            np.testing.assert_allclose(x, expected, atol=1e-6, err_msg=path)
    assert set(state) == {"params", "opt", "step", "ema"}
    assert "connector/position_table" not in params_lib.flatten(state["ema"])


def test_a_fixed_teacher_and_frozen_groups_stay(case):
    config = variant(teacher="fixed", freeze=("vit",))
    state = state_of(case, config)
    for tree in (state["opt"].mu, state["opt"].nu, state["teacher"]):
        assert params_lib.count(tree).keys() == {"embed", "und", "connector", "total"}
    before = tiny.copy(state)
    for _ in range(3):
        state, metrics = distill.update(state, case.batch, case.trajectory, config=config)
    assert max(tiny.distances(before["teacher"], state["teacher"]).values()) == 0
    for path, distance in tiny.distances(before["params"], state["params"]).items():
        frozen = params_lib.fact(path).group in ("vit", "fixed")
        assert (distance == 0) if frozen else (distance > 1e-6), path
    whole = distill.teacher_params(state, config)
    assert tiny.distances(whole, case.params)["vit/patch_kernel"] == 0
    assert tiny.distances(whole, case.other)["llm/head"] == 0


def test_init_state_copies_the_teacher(case):
    for teacher, key in (("ema", "ema"), ("fixed", "teacher"), ("snapshot", "teacher")):
        state = distill.init_state(case.params, variant(teacher=teacher))
        assert set(state) == {"params", "opt", "step", key} and state["step"] == 0
        mine, its = params_lib.flatten(state["params"]), params_lib.flatten(state[key])
        assert mine.keys() - its.keys() == {"connector/position_table"}
        for path, x in its.items():
            np.testing.assert_array_equal(x, mine[path], err_msg=path)
            assert x.unsafe_buffer_pointer() != mine[path].unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(teacher="nobody"), "'nobody': choose from ema, self, fixed, snapshot"),
        (dict(reduction="sum"), "use 'completion' or 'token'"),
        (dict(accumulation=0), r"accumulation is 0: give a whole number in \[1, inf\)"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        variant(**wrong)
    with pytest.raises(ValueError, match="use 'cosine' or 'constant'"):
        OptimConfig(schedule="linear")


# ---- the optimizer


def test_learning_rate_at_points_of_the_schedule():
    paper = OptimConfig()

    def rate(step, config=paper):
        return float(optimizer.learning_rate(step, config))

    half = (1e-5 + 1e-7) / 2
    quarter = 1e-7 + (1e-5 - 1e-7) * (1 + np.sqrt(0.5)) / 2
    points = {0: 0, 1: 5e-8, 100: 5e-6, 200: 1e-5, 400: quarter, 600: half, 1000: 1e-7, 1400: 1e-7}
    for step, expected in points.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-13)
    flat = dataclasses.replace(paper, schedule="constant")
    assert [rate(n, flat) for n in (0, 100, 200, 5000)] == pytest.approx([0, 5e-6, 1e-5, 1e-5])
    assert rate(0, dataclasses.replace(flat, warmup_steps=0)) == pytest.approx(1e-5)
    assert rate(0, dataclasses.replace(paper, warmup_steps=0)) == pytest.approx(1e-5)


@pytest.mark.parametrize("max_norm", [1.0, 1e3, 0.0])
def test_optimizer_against_optax(max_norm):
    """Five steps of clipping, AdamW and EMA on a few parameters; clipping by min(1, c / (norm +
    1e-6)).
    """
    rng = np.random.default_rng(0)
    optim = OptimConfig(
        lr=0.1, min_lr=0.01, warmup_steps=2, total_steps=6, weight_decay=0.1, max_grad_norm=max_norm
    )
    config = variant(optim=optim, ema_decay=0.8)

    def values():
        return {
            "llm": {
                "embed": rng.normal(size=(5, 3)).astype(np.float32),
                "norm": rng.normal(size=3).astype(np.float32),
            }
        }

    params = jax.tree.map(jnp.asarray, values())
    state = distill.init_state(params, config)
    reference = optax.adamw(
        lambda step: optimizer.learning_rate(step, optim),
        b1=0.9,
        b2=0.95,
        eps=1e-15,
        weight_decay=0.1,
    )
    slots, expected, ema = reference.init(params), params, params
    for _ in range(5):
        grads = jax.tree.map(lambda x: 3 * x, values())
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 1.0
        factor = min(1, max_norm / (norm + 1e-6)) if max_norm else 1
        changes, slots = reference.update(
            jax.tree.map(lambda g: g * factor, grads), slots, expected
        )
        expected = optax.apply_updates(expected, changes)
        ema = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, ema, expected)
        state, metrics = optimizer.apply_gradients(state, jax.tree.map(jnp.asarray, grads), config)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        found = state["params"], state["ema"], state["opt"].mu
        for ours, theirs in zip(found, (expected, ema, slots[0].mu)):
            assert max(tiny.distances(ours, theirs).values()) < 2e-6
    assert max(tiny.distances(state["params"], params).values()) > 0.05


def test_a_snapshot_is_taken_every_second_step():
    """Also where the state was restored in between: its step says what is due."""
    optim = OptimConfig(lr=0.1, schedule="constant", warmup_steps=0)
    config = variant(optim=optim, teacher="snapshot", snapshot_every=2)
    update = jax.jit(functools.partial(optimizer.apply_gradients, config=config))
    state = distill.init_state({"llm": {"norm": jnp.ones(3)}}, config)
    norms, held = [state["params"]["llm"]["norm"]], []
    for _ in range(5):
        state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
        state, _ = update(state, {"llm": {"norm": jnp.ones(3)}})
        norms.append(state["params"]["llm"]["norm"])
        held.append(state["teacher"]["llm"]["norm"])
    assert all((a != b).all() for a, b in zip(norms, norms[1:]))
    for found, at in zip(held, (0, 2, 2, 4, 4)):
        np.testing.assert_array_equal(found, norms[at])


def test_muon_against_its_definition():
    """Three steps of stacked, tall and wide matrices in float64 NumPy: momentum with Nesterov's
    look-ahead, five Newton-Schulz iterations of each matrix alone, and the size of Adam's steps.
    Embedding, norm and autoencoder move as with AdamW.
    """
    optim = OptimConfig(
        kind="muon",
        lr=0.1,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.1,
        max_grad_norm=0.0,
    )
    rng = np.random.default_rng(0)

    def tree():
        return {
            "llm": {
                "embed": rng.normal(size=(5, 3)),
                "layers": {"und": {"up_kernel": rng.normal(size=(2, 3, 4))}},
                "norm": rng.normal(size=3),
            },
            "connector": {"fc1_kernel": rng.normal(size=(5, 3))},
            "vae": {"x_kernel": rng.normal(size=(3, 3))},
        }

    def orthogonal(x):
        if x.shape[0] > x.shape[1]:
            return orthogonal(x.T).T
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - (4.775 * a - 2.0315 * a @ a) @ x
        return x

    def to_jax(values):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)

    start, gradients = tree(), [tree() for _ in range(3)]
    states = {}
    for kind in ("muon", "adamw"):
        own = dataclasses.replace(optim, kind=kind)
        config = variant(optim=own, teacher="self", model=tiny.DRAWING)
        state = {
            "params": to_jax(start),
            "opt": optimizer._directions(own).init(to_jax(start))[1],
            "step": jnp.zeros((), jnp.int32),
        }
        with pytest.MonkeyPatch.context() as patch:  # this test trains all leaves, the vae, too
            patch.setattr(optimizer, "split", lambda params, config: (params, {}))
            update = jax.jit(functools.partial(optimizer.apply_gradients, config=config))
            for g in gradients:
                state, _ = update(state, to_jax(g))
        states[kind] = params_lib.flatten(state["params"])

    decay, b1 = 1 - optim.lr * optim.weight_decay, optim.b1
    for path, scale in (("llm/layers/und/up_kernel", 4), ("connector/fc1_kernel", 5)):
        expected = params_lib.flatten(start)[path]
        momentum = np.zeros_like(expected)
        for t, g in enumerate((params_lib.flatten(g)[path] for g in gradients), 1):
            momentum = b1 * momentum + (1 - b1) * g
            ahead = b1 * momentum / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            matrices = ahead if ahead.ndim == 3 else ahead[None]
            step = np.stack([orthogonal(x) for x in matrices]).reshape(ahead.shape)
            expected = expected * decay - optim.lr * 0.2 * scale**0.5 * step
        np.testing.assert_allclose(states["muon"][path], expected, rtol=0, atol=2e-6)
        assert np.abs(states["adamw"][path] - expected).max() > 0.05
    for path in ("llm/embed", "llm/norm", "vae/x_kernel"):
        np.testing.assert_array_equal(states["muon"][path], states["adamw"][path])


def torch_adamw(gradients, lr, b1, b2, eps):
    """Parameters that start at 0 after torch.optim.AdamW, in float64 and in the order of its
    operations: the square root of the second moment is divided by that of its bias correction, then
    eps is added.
    """
    parameter, first, second = (np.zeros(gradients.shape[1]) for _ in range(3))
    for step, g in enumerate(gradients.astype(np.float64), 1):
        first, second = first + (1 - b1) * (g - first), b2 * second + (1 - b2) * g * g
        denominator = np.sqrt(second) / np.sqrt(1 - b2**step) + eps
        parameter = parameter - lr / (1 - b1**step) * first / denominator
    return parameter


def test_adamw_against_the_order_of_torch():
    """The same gradients, down to far below eps, give the same steps in both orders. What does not
    are gradients that differ by the rounding of float32 sums: with an eps of 1e-15 AdamW follows it
    where a gradient is nearly zero.
    """
    rng = np.random.default_rng(0)
    optim = OptimConfig(lr=2e-3, schedule="constant", warmup_steps=0, max_grad_norm=0.0)
    config = variant(optim=optim, teacher="self")

    def ours(gradients):
        state = distill.init_state({"llm": {"norm": jnp.zeros(gradients.shape[1])}}, config)
        for g in gradients:
            state, _ = optimizer.apply_gradients(state, {"llm": {"norm": jnp.asarray(g)}}, config)
        return np.asarray(state["params"]["llm"]["norm"])

    def steps(a, b):
        return np.abs(a - b) / optim.lr

    normal = rng.standard_normal((3, 200_000), np.float32)
    for smallest in (1, 1e-5, 1e-22):
        scale = np.exp(rng.uniform(np.log(smallest), 0, normal.shape[1])).astype(np.float32)
        expected = torch_adamw(normal * scale, optim.lr, optim.b1, optim.b2, optim.eps)
        assert steps(ours(normal * scale), expected).max() < 3e-6
        if smallest == 1e-5:
            rounding = np.float32(3e-7) * rng.standard_normal(normal.shape, np.float32)
            moved = steps(ours(normal * scale), ours(normal * scale + rounding))
            assert (
                moved[scale > 0.1].max() < 0.01
                and moved.max() > 0.02
                and scale[moved > 0.02].max() < 1e-2
            )


# ---- what is scored


def scored(completions, teacher_length, ended=True, **settings):
    trajectory = tiny.trajectory(completions, BUDGET, ended)
    block = distill.scored_completion(trajectory, jnp.asarray(teacher_length), variant(**settings))
    return jax.tree.map(np.asarray, block)


def test_an_empty_completion_becomes_eos_twice():
    for seam in (False, True):
        block = scored([[[]], [[7]]], [20, 20], score_seam=seam)
        assert block.tokens[:, :3].tolist() == [[BOS, EOS, 0], [BOS, 7, 0]]
        assert block.labels[:, :2].tolist() == [[EOS, EOS], [7, EOS]]
        assert block.mask.sum(axis=1).tolist() == [2, 2]


@pytest.mark.parametrize("seam", [False, True])
@pytest.mark.parametrize("teacher_length", [20, 25, 26, 27, 30, 33, 34, 90])
def test_completions_are_cut_by_the_official_formula(teacher_length, seam):
    """7 tokens, at most 34 positions: if the teacher's length, completion included, exceeds the
    limit, the official code keeps `max(max_fwd - (teacher_len - (n + 2)) - 2, 1)` tokens.
    """
    tokens = list(range(1, 8))
    block = scored([[tokens]], [teacher_length], max_forward_tokens=34, score_seam=seam)
    whole = teacher_length + len(tokens) + 2
    kept = max(34 - (whole - (7 + 2)) - 2, 1) if whole > 34 else 7
    assert block.labels[0, : kept + 1].tolist() == [*tokens[:kept], EOS]
    assert block.tokens[0, : kept + 1].tolist() == [BOS, *tokens[:kept]]
    assert block.mask[0].tolist() == [True] * (kept + 1) + [False] * (BUDGET - kept - 1)
    assert (kept == 7) == (teacher_length <= 25) and (kept == 1) == (teacher_length >= 31)


@pytest.mark.parametrize("seam", [False, True])
def test_what_counts_as_cut(seam):
    """An empty completion is one token; between rounds two delimiters count where they are
    scored.
    """
    rows = [[[]], [[]], [[1, 2]], [[1, 2]], [[1], [2]]]
    trajectory = tiny.trajectory(rows, BUDGET, True)
    lengths = jnp.array([17, 18, 16, 17, 16])
    found = distill.is_cut(trajectory, lengths, variant(max_forward_tokens=20, score_seam=seam))
    assert found.tolist() == [False, True, False, True, seam]


@pytest.mark.parametrize("seam", [False, True])
def test_eos_after_a_cut(seam):
    """Four rows: ended on eos, stopped by the budget, ended but cut here, stopped and cut here."""
    rows, lengths, ended = [[[1, 2, 3]]] * 4, [10, 10, 17, 17], [True, False, True, False]
    official = scored(rows, lengths, ended, max_forward_tokens=20, score_seam=seam)
    mended = scored(
        rows, lengths, ended, max_forward_tokens=20, score_seam=seam, eos_after_cut=False
    )
    assert official.mask.sum(axis=1).tolist() == [4, 4, 2, 2]
    assert mended.mask.sum(axis=1).tolist() == [4, 3, 1, 1]
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(getattr(official, name), getattr(mended, name))


def test_the_seam_of_an_image_skip():
    """Official: rounds joined.

    score_seam: what was fed; eos that ended a round is a target, bos is not.
    """
    rows = [[[1, 2], [3]], [[4]]]
    joined = scored(rows, [20, 20])
    assert joined.tokens[0, :4].tolist() == [BOS, 1, 2, 3] and joined.labels[0, :4].tolist() == [
        1,
        2,
        3,
        EOS,
    ]
    assert joined.mask.sum(axis=1).tolist() == [4, 2]
    seam = scored(rows, [20, 20], score_seam=True)
    assert seam.tokens[0].tolist() == [BOS, 1, 2, EOS, BOS, 3, 0, 0, 0, 0]
    assert seam.labels[0].tolist() == [1, 2, EOS, BOS, 3, EOS, 0, 0, 0, 0]
    assert seam.mask[0].tolist() == [True, True, True, False, True, True] + [False] * 4
    assert seam.tokens[1, :2].tolist() == [BOS, 4] and seam.mask[1].sum() == 2
    # cut between the rounds: 3 of 5 fed tokens fit, the row after them predicts eos
    cut = scored(rows, [20, 20], score_seam=True, max_forward_tokens=25)
    assert cut.labels[0, :4].tolist() == [1, 2, EOS, EOS] and cut.mask[0].sum() == 4


def test_token_weights_by_hand():
    mask = jnp.array([[True, True, True], [True, False, False], [False, False, False]])
    assert divergence.token_weights(mask, "token").tolist() == [[0.25] * 3, [0.25, 0, 0], [0, 0, 0]]
    expected = [[1 / 9] * 3, [1 / 3, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(divergence.token_weights(mask, "completion"), expected, rtol=1e-6)


# ---- the diagnostic and supervised training


def test_kl_to_student_against_numpy(case):
    completion = distill.scored_completion(case.trajectory, case.batch.teacher.length, BASE)
    kl = functools.partial(distill.kl_to_student, completion=completion, config=tiny.MODEL)
    found, mask = np.asarray(kl(case.other, case.params, case.batch)), np.asarray(completion.mask)

    def of(params, c):
        return softmax(np.asarray(model_logits(params, c, completion), np.float64))

    t, s = of(case.other, case.batch.teacher), of(case.params, case.batch.student)
    np.testing.assert_allclose(found[mask], (t * np.log(t / s)).sum(-1)[mask], rtol=1e-3, atol=1e-5)
    assert found[mask].min() > 0
    same = kl(case.params, case.params, context.Batch(case.batch.student, case.batch.student))
    assert np.abs(np.asarray(same)[mask]).max() < 1e-6
    assert np.asarray(kl(case.params, case.params, case.batch))[mask].min() > 1e-3


@pytest.mark.parametrize("chunk", [4, 192])
def test_log_prob_gain_against_numpy(case, chunk):
    """Mean log-probability of the labels in both contexts, over the positions that count."""
    completion = distill.scored_completion(case.trajectory, case.batch.teacher.length, BASE)
    blank = dataclasses.replace(completion, mask=completion.mask.at[2].set(False))
    mask, labels = np.asarray(blank.mask), np.asarray(blank.labels)
    found = distill.log_prob_gain(case.params, case.batch, blank, config=tiny.MODEL, chunk=chunk)
    of = [
        np.take_along_axis(
            np.log(softmax(np.asarray(model_logits(case.params, c, blank), np.float64))),
            labels[..., None],
            axis=-1,
        )[..., 0]
        for c in (case.batch.teacher, case.batch.student)
    ]
    expected = [(t - s)[m].mean() if m.any() else 0 for t, s, m in zip(*of, mask)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.delete(expected, 2)).min() > 1e-3 and expected[2] == 0


def test_supervised_training(case):
    """The first loss is the cross entropy that `score` gives on the same completions (two ways to
    pack one sequence), and twenty steps on one batch lower it.
    """
    tokens = [[token for part in rounds for token in part] for rounds in case.completions]
    blocks, _ = tiny.rows(np.random.default_rng(5), ROWS)
    packed = context.supervise(
        [[*row, blocks_lib.Text(np.array(ids), loss=True)] for row, ids in zip(blocks, tokens)],
        context.Sizes(tiny.POSITIONS, tiny.PATCHES, targets=12),
        tokenizer=tiny.TOKENIZER,
        side=6,
    )
    completion = distill.scored_completion(case.trajectory, jnp.zeros(ROWS, jnp.int32), BASE)
    log_p = np.log(
        softmax(np.asarray(model_logits(case.params, tiny.pack(blocks), completion), np.float64))
    )
    labels, mask = np.asarray(completion.labels), np.asarray(completion.mask)
    ce = -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]

    optim = OptimConfig(lr=3e-3, schedule="constant", warmup_steps=0, eps=1e-8)
    config = SupervisedConfig(model=tiny.MODEL, optim=optim, reduction="completion", chunk=4)
    state, found = tiny.copy(distill.init_state(case.params, config)), []
    for _ in range(20):
        state, metrics = sharding.update_program(supervised.sft_step, state, config)(state, packed)
        found.append(metrics)
    np.testing.assert_allclose(found[0]["loss"], by_completion(ce, mask), rtol=1e-4)
    assert found[0]["completion_len"] == mask.sum() / ROWS
    np.testing.assert_allclose(
        found[0]["accuracy"], by_token(log_p.argmax(-1) == labels, mask), atol=1e-6
    )
    losses = [float(m["loss"]) for m in found]
    assert losses[-1] < 0.5 * losses[0] and found[-1]["accuracy"] > found[0]["accuracy"]
    assert sharding.update_program(supervised.sft_step, state, config)._cache_size() == 1


def test_a_profile_reads_like_the_code(case):
    """The lowered programs carry the names of the phases of a step and of the model's blocks."""

    def names(lowered):
        return lowered.as_text(debug_info=True)

    state = state_of(case, BASE)
    program = sharding.update_program(distill.update_step, state, BASE)
    update = names(program.lower(state, case.batch, case.trajectory))
    for name in ("student", "teacher", "divergence", "optimizer"):
        assert f"{name}/" in update or f"({name})" in update, name
    for name in ("vision", "decoder", "attention", "mlp"):
        assert f"{name}/" in update or f"({name})" in update, name
    config, key = tiny.rollout_config(), jax.random.key(0)
    sample = names(rollout.sample.lower(case.params, case.batch.student, key, config=config))
    for name in ("prefill", "decode", "head"):
        assert f"{name}/" in sample, name


def test_a_trajectory_of_another_batch_is_refused(case):
    fewer = jax.tree.map(lambda x: x[:3], case.trajectory)
    with pytest.raises(ValueError, match="the trajectory has 3 sequences and the batch 4"):
        distill.update({}, case.batch, fewer, config=BASE)
