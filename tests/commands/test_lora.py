"""Adapters: what they compute, that only they are trained, and how a run reads and writes them."""

import dataclasses
import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import small_run
import tiny
import xla_flags
from opsd_jax import config as config_lib
from opsd_jax import config_check, distill, sharding
from opsd_jax import params as params_lib
from opsd_jax.distill import DistillConfig, OptimConfig
from opsd_jax.divergence import DivergenceConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import LoRAConfig
from opsd_jax.params import LORA_TARGETS
from opsd_jax.release import bagel_keys, export, load
from opsd_jax.run import session
from opsd_jax.run import start as start_lib
from opsd_jax.runtime import checkpoint, metrics

LORA = LoRAConfig(rank=3, alpha=6.0)
SOME = LoRAConfig(rank=2, alpha=1.0, targets=("v", "down"))
IN = {"q": 32, "k": 32, "v": 32, "o": 32, "gate": 32, "up": 32, "down": 48}
OUT = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 32}


def model(lora=LORA, base=tiny.MODEL):
    return dataclasses.replace(base, lora=lora)


@functools.cache
def abstract(config):
    return jax.eval_shape(functools.partial(bagel.init, config=config), jax.random.key(0))


def adapters(tree) -> dict:
    return {path: leaf for path, leaf in params_lib.flatten(tree).items() if "_lora_" in path}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def context():
    return tiny.batch(np.random.default_rng(0), 2, visual_thoughts=1).student


def logits(params, context, config, **options):
    """Logits of the used positions; options: of XLA."""

    @functools.partial(jax.jit, compiler_options=options)
    def compute(params):
        hidden, _ = bagel.read(params, context, config=config)
        return bagel.logits(params, hidden)

    return np.asarray(compute(params))[
        np.arange(context.padded_length) < np.asarray(context.length)[:, None]
    ]


@pytest.fixture(scope="module")
def initial():
    """Adapters as a run initialises them."""
    return jax.jit(lambda key: params_lib.partition(bagel.init(key, config=model()))[0])(
        jax.random.key(0)
    )


# --- what they are --------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_shapes_groups_and_axes(lora):
    found = adapters(abstract(model(lora, tiny.DRAWING)))
    expected = {f"llm/layers/und/{t}_lora_a": (2, IN[t], lora.rank) for t in lora.targets} | {
        f"llm/layers/und/{t}_lora_b": (2, lora.rank, OUT[t]) for t in lora.targets
    }
    assert {
        path: leaf.shape for path, leaf in found.items()
    } == expected  # and so none of the generation expert
    for path in found:
        row, matrix = params_lib.fact(path), params_lib.fact(path[:-6] + "kernel")
        assert (row.path, row.group, row.stacked) == (path, "lora", True)
        layers, into, out = matrix.axes
        assert row.axes == ((layers, into, None) if path.endswith("a") else (layers, None, out))
    without = params_lib.flatten(abstract(tiny.DRAWING))
    assert (
        params_lib.flatten(abstract(model(lora, tiny.DRAWING))).keys() - found.keys()
        == without.keys()
    )
    for wrong in (
        "llm/layers/gen/q_lora_a",
        "llm/layers/und/q_norm_lora_a",
        "llm/layers/und/q_lora_c",
    ):
        assert params_lib.find(wrong) is None


def test_sharded_like_input_and_output():
    """Also inside Adam's moments and the EMA."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = DistillConfig(model=model(), **tiny.ENDS)
    state = jax.eval_shape(lambda p: distill.init_state(p, config), abstract(model()))

    def specs_of(*args):
        return {
            path.split("/")[-1]: s.spec
            for path, s in adapters(sharding.tree_shardings(mesh, *args)).items()
        }

    for tree in (state["params"], state["ema"], state["opt"].mu):
        specs = specs_of(tree)
        assert specs["q_lora_a"] == P(None, "fsdp", None) and specs["q_lora_b"] == P(
            None, None, "tensor"
        )
        assert specs["down_lora_a"] == P(None, "tensor", None) and specs["down_lora_b"] == P(
            None, None, "fsdp"
        )
    specs = specs_of(state["params"], "rollout")
    assert specs["q_lora_a"] == P(None, None, None) and specs["o_lora_a"] == P(None, "tensor", None)


def test_at_first_they_change_nothing(context, initial):
    base = tiny.params()
    for path, leaf in adapters(initial).items():
        if path.endswith("b"):
            assert not leaf.any()
        else:
            assert (
                abs(float(leaf.std()) * leaf.shape[1] ** 0.5 - 1) < 0.2
                and (leaf[0] != leaf[1]).all()
            )
    # Two programs, which the quicker emitters round in two ways.
    options = {"xla_cpu_use_fusion_emitters": True} if xla_flags.QUICK else {}
    np.testing.assert_array_equal(
        logits(params_lib.merge(initial, base), context, model(), **options),
        logits(base, context, tiny.MODEL, **options),
    )


@pytest.mark.parametrize("lora", [LORA, SOME])
def test_merged_weights_compute_the_same(context, lora):
    params = tiny.params(model(lora))
    merged = params_lib.merge_lora(params, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract(tiny.MODEL))
    own = logits(params, context, model(lora))
    np.testing.assert_allclose(
        logits(merged, context, tiny.MODEL), own, atol=1e-5 * np.abs(own).max()
    )
    _, bare = params_lib.partition(params)
    assert np.abs(logits(bare, context, tiny.MODEL) - own).max() > 0.1
    changed = {path.split("/")[-1] for path, d in tiny.distances(merged, bare).items() if d}
    assert changed == {f"{target}_kernel" for target in lora.targets}


def test_merging_is_by_the_formula_and_keeps_the_dtype():
    params = tiny.params(model())
    got = params_lib.merge_lora(params, LORA)["llm"]["layers"]["und"]["gate_kernel"]
    w, a, b = (
        np.asarray(params["llm"]["layers"]["und"][f"gate_{part}"], np.float64)
        for part in ("kernel", "lora_a", "lora_b")
    )
    np.testing.assert_allclose(got, w + 2 * np.einsum("lir,lro->lio", a, b), atol=1e-5)
    half = params_lib.merge_lora(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), LORA)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    rounded = half["llm"]["layers"]["und"]["gate_kernel"].astype(jnp.float32)
    np.testing.assert_allclose(rounded, got, atol=0.03, rtol=0.01)


# --- training -------------------------------------------------------------------------------------

CONFIG = DistillConfig(
    model=model(),
    **tiny.ENDS,
    divergence=DivergenceConfig(top_k=40, clip=0.05, chunk=4),
    ema_decay=0.9,
    optim=OptimConfig(
        lr=1e-2, min_lr=1e-3, warmup_steps=0, total_steps=10, eps=1e-3, weight_decay=0.1
    ),
)


@pytest.mark.parametrize("teacher", ["ema", "fixed"])
def test_state_of_the_adapters_alone(teacher):
    config = dataclasses.replace(CONFIG, teacher=teacher)
    state = jax.eval_shape(lambda p: distill.init_state(p, config), abstract(model()))
    copy = state["teacher" if teacher == "fixed" else "ema"]
    own = adapters(state["params"])
    for tree in (copy, state["opt"].mu, state["opt"].nu):
        assert params_lib.flatten(tree).keys() == own.keys()

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    numbers = 2 * 3 * sum(IN[t] + OUT[t] for t in LORA_TARGETS)
    assert params_lib.count(state["params"])["lora"] == numbers
    assert (
        size(state) == size(state["params"]) + 3 * 4 * numbers + 4 + 4
    )  # copy, mu, nu; two counters


@pytest.mark.slow
def test_only_adapters_are_trained():
    config, rng = CONFIG, np.random.default_rng(1)
    batch, trajectory = tiny.batch(rng, 2, visual_thoughts=1), tiny.random_trajectory(rng, 2, 10)
    before = distill.init_state(tiny.params(model()), config)
    own = adapters(before["params"])
    after, found = distill.update(tiny.copy(before), batch, trajectory, config=config)
    moved = {path for path, d in tiny.distances(after["params"], before["params"]).items() if d}
    assert moved == own.keys() and found["grad_norm"] > 1e-3
    followed = {path for path, d in tiny.distances(after["ema"], before["ema"]).items() if d}
    assert followed == own.keys()
    teacher = distill.teacher_params(after, config)
    differs = {path for path, d in tiny.distances(teacher, after["params"]).items() if d}
    assert differs == own.keys()


def test_the_generation_path_is_frozen_as_well():
    for drawing in (False, True):
        trainable, frozen = params_lib.partition(
            abstract(model(base=tiny.DRAWING)), generation=drawing
        )
        assert params_lib.flatten(trainable).keys() == adapters(abstract(model())).keys()
        assert {"gen", "latent", "vae", "und", "embed"} < {
            params_lib.fact(p).group for p in params_lib.flatten(frozen)
        }


# --- settings and errors --------------------------------------------------------------------------


def test_settings():
    config = config_lib.default()
    assert config_lib.model(config).lora is None
    config.lora.update(rank=4, targets=("q", "o"))
    config_check.check(config)
    assert config_lib.model(config).lora == LoRAConfig(4, 16.0, ("q", "o"))
    spec = importlib.util.spec_from_file_location(
        "visual_opsd", small_run.ROOT / "configs" / "visual_opsd.py"
    )
    preset = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(preset)
    config_check.check(preset.get_config("lora"))
    assert config_lib.model(preset.get_config("lora")).lora == LoRAConfig(64, 128.0)
    assert config_lib.model(preset.get_config()).lora is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": -1}, r"config.lora.rank is -1: give a whole number in \[0, inf\)"),
        ({"rank": 2, "alpha": 0.0}, r"config.lora.alpha is 0.0: give a number in \(0, inf\)"),
        ({"rank": 2, "targets": ()}, r"lora.targets is empty, so rank 2 adapts nothing"),
        (
            {"rank": 2, "targets": ("q", "w")},
            r"config.lora.targets names 'w': choose from q, k",
        ),
        ({"rank": 2, "targets": ("q", "q")}, "config.lora.targets names q twice: give each once"),
    ],
)
def test_wrong_settings(changes, message):
    config = config_lib.default()
    config.lora.update(changes)
    with pytest.raises(ValueError, match=message):
        config_check.check(config)


def test_freezing_and_adapters_exclude_each_other():
    config = config_lib.default()
    config.opsd.freeze = ("vit",)
    config_check.check(config)
    config.lora.rank = 2
    with pytest.raises(ValueError, match=r"config.opsd.freeze is \('vit',\) with config.lora"):
        config_check.check(config)
    with pytest.raises(ValueError, match=r"freeze=\('vit',\) with LoRA"):
        params_lib.partition(abstract(model()), ("vit",))


def test_releases_do_not_know_them():
    with pytest.raises(KeyError, match="llm/layers/und/q_lora_a' has no key .*Adapters of LoRA"):
        bagel_keys.key("llm/layers/und/q_lora_a")


@pytest.mark.parametrize(
    "params, lora",
    [(model(), SOME), (model(), dataclasses.replace(LORA, rank=4)), (tiny.MODEL, LORA)],
)
def test_merging_other_adapters_is_refused(params, lora):
    with pytest.raises(ValueError, match="adapters of other targets or ranks"):
        params_lib.merge_lora(abstract(params), lora)


# --- a run ----------------------------------------------------------------------------------------

STEPS = 3
RUN = {
    "stages": ("opsd",),
    "opsd__steps": STEPS,
    "opsd__optim__warmup_steps": 0,
    "lora__rank": 3,
    "lora__alpha": 6.0,
    "teacher__kind": "ema",
    "teacher__ema_decay": 0.5,
    "eval__final_visual_thoughts": ("none",),
    "eval__final_banned": False,
}


def restored(folder, config):
    return checkpoint.restore_params(folder, abstract(config_lib.model(config)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir) of a finished run on adapters that started from a checkpoint without."""
    from opsd_jax import train

    folder = tmp_path_factory.mktemp("lora")
    base = config_lib.model(small_run.config())
    checkpoint.save(
        folder / "base", None, tiny.params(base), config=config_lib.to_json(small_run.config())
    )
    config = small_run.config(**RUN, init_from=str(folder / "base"))
    sharding._update_program.cache_clear()
    with small_run.fast_compiles(tmp_path_factory):
        train.train(config, str(folder / "w"))
    return config, folder / "w"


def initial_params(config, workdir):
    """The weights that a run with these settings would start from, on one device."""
    run = session.Session(
        config=config,
        workdir=str(workdir),
        data_dir=str(workdir / "data"),
        model=config_lib.model(config),
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
        sampling_mesh=None,
        tokenizer=None,
        marker=None,
        packer=None,
        clock=None,
        writer=None,
        profile=None,
    )
    return start_lib.initial_params(run, None)


@pytest.mark.slow
def test_a_run_changes_only_adapters(run):
    config, workdir = run
    start, end = (restored(workdir / "checkpoints" / str(step), config) for step in (0, STEPS))
    base = restored(config.init_from, small_run.config())
    jax.tree.map(np.testing.assert_array_equal, params_lib.partition(start)[1], base)
    assert all(leaf.any() == path.endswith("a") for path, leaf in adapters(start).items())
    moved = {path for path, d in tiny.distances(end, start).items() if d}
    assert moved == adapters(end).keys() and len(moved) == 14
    state = checkpoint.contents(workdir)["state"]
    held = {path.split("/llm/")[0] for path in state if "_lora_" in path}
    assert held == {"params", "ema", "opt/mu", "opt/nu"}
    assert not [
        path
        for path in state
        if "_lora_" not in path and path.startswith(("ema/", "opt/mu/", "opt/nu/"))
    ]


@pytest.mark.slow
def test_a_run_resumes_exactly(run, tmp_path, tmp_path_factory):
    from opsd_jax import train

    config, workdir = run
    again = tmp_path / "w"
    shutil.copytree(workdir, again)
    for step in range(2, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / str(step))
    shutil.rmtree(again / "eval")
    sharding._update_program.cache_clear()
    with small_run.fast_compiles(tmp_path_factory):
        train.train(config, str(again))
    expected, found = (_state(folder) for folder in (workdir, again))
    assert expected.keys() == found.keys() and any(
        "ema" in path and "_lora_b" in path for path in found
    )
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    losses = [
        [row["loss"] for row in metrics.read(w / "metrics.jsonl") if "loss" in row]
        for w in (workdir, again)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def _state(workdir):
    from orbax.checkpoint import v1 as ocp

    tree = ocp.load_checkpointables(workdir / "checkpoints" / str(STEPS), {"state": None})["state"]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_a_run_is_exported_merged_and_a_run_starts_from_the_export(run, tmp_path):
    config, workdir = run
    export.export_release(str(workdir), str(tmp_path / "hf"), base="none")
    found, params = load.load(str(tmp_path / "hf"))
    trained = restored(workdir, config)
    assert found.lora is None and (found.llm, found.vit) == (
        config_lib.model(config).llm,
        config_lib.model(config).vit,
    )
    merged = params_lib.merge_lora(trained, config_lib.model(config).lora)
    assert max(tiny.distances(params, merged).values()) < 1e-6
    _, base = params_lib.partition(trained)
    assert max(tiny.distances(params, base).values()) > 1e-3

    config = small_run.config(**RUN, init_from=str(tmp_path / "hf"))
    start = initial_params(config, tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, params_lib.partition(start)[1], params)
    assert all(leaf.any() == path.endswith("a") for path, leaf in adapters(start).items())


@pytest.mark.slow
def test_a_run_starts_from_a_run_with_the_same_adapters_alone(run, tmp_path):
    config, workdir = run
    again = small_run.config(**RUN, init_from=str(workdir))
    jax.tree.map(
        np.testing.assert_array_equal, initial_params(again, tmp_path), restored(workdir, config)
    )
    for changes in ({"lora__alpha": 3.0}, {"lora__rank": 0}):
        with pytest.raises(ValueError, match=r"has adapters of config.lora {'alpha': 6.0"):
            initial_params(small_run.config(**(RUN | changes), init_from=str(workdir)), tmp_path)


@pytest.mark.slow
def test_a_run_is_evaluated_and_answers(run):
    from opsd_jax import interleave
    from opsd_jax.run import evaluate
    from opsd_jax.run import model as model_lib
    from opsd_jax.run.evaluation_request import Request

    _, workdir = run
    during = workdir / "eval" / f"{STEPS:06d}-none" / "predictions.jsonl"
    evaluate.evaluate(Request(str(workdir), ("none",), name="again", rows=8))
    found, again = (
        {p["index"]: p["prediction"] for p in map(json.loads, path.read_text().splitlines())}
        for path in (during, workdir / "eval" / "again" / "predictions.jsonl")
    )
    assert len(again) == 8 and any(again.values()) and again == {n: found[n] for n in again}
    answering = model_lib.load(str(workdir), generation=False)
    assert (
        answering.config.lora == LORA
        and adapters(answering.params).keys() == adapters(abstract(model())).keys()
    )
    (answer,) = interleave.reason(answering, [([], "Why?")], jax.random.key(0))
    assert answer.tokens > 0 and answer.text == "".join(answer.parts)
