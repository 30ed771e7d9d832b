"""Every mesh computes the same: tokens, losses, gradients and parameters on 2, 4 and 8 fake devices
against one.

The devices exist in a child process only (this file, run as a program): it goes through the meshes
and leaves an .npz for each, with gradients, parameters and EMA in the order of `jax.tree.leaves`.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tiny
import xla_flags
from opsd_jax import distill, divergence, rollout, sharding
from opsd_jax import params as params_lib
from opsd_jax.plan import hlo

# (data, fsdp, tensor): micro steps of an update, share of the state that each device may hold.
# Pieces that do not divide stay whole, so the share is somewhat above 1 / (fsdp * tensor).
ONE = (1, 1, 1)
MESHES = {ONE: (1, 1.0), (1, 8, 1): (1, 0.16), (2, 2, 2): (2, 0.28)}
SLOW = {
    (8, 1, 1): (1, 1.0),
    (1, 4, 2): (2, 0.16),
    (1, 2, 1): (1, 0.52),
    (1, 1, 2): (1, 0.56),
    (2, 2, 1): (2, 0.52),
}
ROWS, BUDGET = 8, 6
CONFIG = distill.DistillConfig(
    model=tiny.MODEL,
    **tiny.ENDS,
    divergence=distill.DivergenceConfig(top_k=40, chunk=3),
    optim=distill.OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, eps=1e-3),
)
SAMPLING = tiny.rollout_config(max_new_tokens=BUDGET)


def inputs():
    """Parameters, contexts and completions, the same in every process."""
    rng = np.random.default_rng(0)
    return (
        tiny.params(),
        tiny.batch(rng, ROWS, visual_thoughts=1),
        tiny.random_trajectory(rng, ROWS, BUDGET),
    )


def whole(mesh, tree) -> list[np.ndarray]:
    """The leaves, also where other processes hold parts of them: made whole on every device by one
    program.
    """
    leaves = jax.tree.leaves(tree)
    if not all(x.is_fully_addressable for x in leaves):
        leaves = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(leaves)
    return [np.array(x) for x in leaves]


def run(mesh, accumulation: int, part=slice(None)) -> dict:
    """Samples in the rollout layout (with micro steps in the train layout, too) and does three
    updates.

    part: rows of the batch that this process hands in.
    """
    params, *rows = inputs()
    batch, trajectory = jax.tree.map(lambda x: x[part], rows)
    # One program after another: between processes on CPU, collectives of several at once may wait
    # for each other for ever, and moving a leaf is a program.
    wait = jax.block_until_ready

    def put(tree, layout="train"):
        return jax.tree.map(
            lambda x, place: wait(jax.device_put(x, place, may_alias=False)),
            tree,
            sharding.tree_shardings(mesh, tree, layout),
        )

    def host(tree):
        return jax.tree.map(np.asarray, tree)  # what every process has whole

    batch, trajectory, found = (
        sharding.put_batch(mesh, batch),
        sharding.put_batch(mesh, trajectory),
        {},
    )
    assert batch.student.tokens.sharding.spec == P(("data", "fsdp"))
    jax.clear_caches()  # an earlier mesh of this process may have had the same programs
    for layout in ("rollout", "train")[:accumulation]:
        programs = rollout.sample._cache_size()
        for _ in range(2):
            placed = put(host(params))
            placed = wait(sharding.relayout_program(mesh, placed, layout)(placed))
            sampled = wait(
                rollout.sample(placed, batch.student, jax.random.key(1), config=SAMPLING)
            )
        (found[f"{layout}_tokens"],) = whole(mesh, sampled.fed)
        found[f"{layout}_programs"] = rollout.sample._cache_size() - programs
    if mesh.size > 1 and mesh.shape["tensor"] == 1:  # two devices for each copy of the weights
        others, placed = sharding.regrouped(mesh, 2), put(host(params))
        placed = wait(sharding.relayout_program(others, placed, "rollout")(placed))
        student = wait(sharding.move_batch(others, batch.student))
        sampled = wait(rollout.sample(placed, student, jax.random.key(1), config=SAMPLING))
        assert {x.sharding.mesh for x in jax.tree.leaves((placed, student))} == {others}
        sampled = wait(sharding.move_batch(mesh, sampled))
        assert sampled.tokens.sharding == batch.student.tokens.sharding
        (found["regrouped_tokens"],) = whole(mesh, sampled.fed)

    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    state = put(host(distill.init_state(params, config)))
    placed = jax.tree.map(lambda x: x.sharding, state)
    abstract = jax.eval_shape(lambda: distill.init_state(params, config))
    assert jax.tree.map(lambda x: x.sharding, sharding.abstract(mesh, abstract)) == placed
    local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    found["share"] = local / sum(x.nbytes for x in jax.tree.leaves(state))
    found["losses"], found["deleted"] = [], True
    for step in range(3):
        given = jax.tree.leaves(state)
        state, metrics = wait(distill.update(state, batch, trajectory, config=config))
        found["losses"].append([metrics["loss"], metrics["grad_norm"], metrics["student_entropy"]])
        found["deleted"] &= all(x.is_deleted() for x in given)
        if step == 0:  # the first moments are (1 - b1) times the clipped gradients
            scale = (1 - CONFIG.optim.b1) * min(
                1, CONFIG.optim.max_grad_norm / (float(metrics["grad_norm"]) + 1e-6)
            )
            found |= {f"grad{n}": x / scale for n, x in enumerate(whole(mesh, state["opt"].mu))}
        if step == 1:
            found |= {
                f"leaf{n}": x for n, x in enumerate(whole(mesh, (state["params"], state["ema"])))
            }
    moved = jax.tree.map(
        lambda x, place: not x.sharding.is_equivalent_to(place, x.ndim), state, placed
    )
    found["resharded"] = sum(jax.tree.leaves(moved))
    found["update_programs"] = sharding.update_program(
        distill.update_step, state, config
    )._cache_size()
    return found


def exchanges(mesh, count: int, known: bool) -> int:
    """How often devices exchange something in the loss of ROWS rows, cut into `count` chunks, and
    its gradient.
    """

    def array(place, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    def cut(*shape):
        return array(sharding.batch(mesh), *shape)

    head = array(sharding.parameter(mesh, "llm/head", (64, 264)), 64, 264)
    config = dataclasses.replace(CONFIG.divergence, chunk=24 // count)

    def loss(hidden_s, head, hidden_t, labels):
        return jnp.mean(
            divergence.chunked(hidden_s, head, hidden_t, head, labels.astype(int), config)[0]
        )

    with sharding.mesh_context(mesh if known else None):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
            cut(ROWS, 24, 64), head, cut(ROWS, 24, 64), cut(ROWS, 24)
        )
    sent = hlo.traffic(program.compile().as_text(), mesh.size)["collectives"]
    return sum(kind["count"] for kind in sent.values())


def main(folder, *meshes):
    for name in meshes:
        sizes = tuple(map(int, name.split("x")))
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        found = jax.tree.map(np.asarray, run(mesh, {**MESHES, **SLOW}[sizes][0]))
        if sizes == (1, 8, 1):
            found["exchanges"] = [
                [exchanges(mesh, count, known) for count in (2, 6)] for known in (True, False)
            ]
        np.savez(pathlib.Path(folder) / f"{name}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit()


def name_of(sizes):
    return "x".join(map(str, sizes))


def results_of(meshes, folder):
    """{mesh: what `run` found}, from one child process."""
    here = pathlib.Path(__file__).resolve()
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": xla_flags.devices(8),
        "PYTHONPATH": os.pathsep.join(map(str, here.parents[1:3])),
    }
    command = [sys.executable, here, folder, *map(name_of, meshes)]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return {sizes: dict(np.load(folder / f"{name_of(sizes)}.npz")) for sizes in meshes}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(MESHES, tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def slow_results(results, tmp_path_factory):
    return {ONE: results[ONE], **results_of(SLOW, tmp_path_factory.mktemp("meshes"))}


def check(results, sizes):
    one, here = results[ONE], results[sizes]
    for layout in ("rollout", "train"):
        if f"{layout}_tokens" in here:
            np.testing.assert_array_equal(here[f"{layout}_tokens"], one["rollout_tokens"])
            assert here[f"{layout}_programs"] == 1
    assert ("regrouped_tokens" in here) == (sizes[2] == 1 and sizes != ONE)
    if "regrouped_tokens" in here:
        np.testing.assert_array_equal(here["regrouped_tokens"], one["rollout_tokens"])
    np.testing.assert_allclose(here["losses"], one["losses"], rtol=0, atol=1e-5)
    for key in one:
        if key.startswith(("grad", "leaf")):  # gradients are smaller than parameters
            atol = 1e-6 if key.startswith("grad") else 1e-5
            np.testing.assert_allclose(here[key], one[key], rtol=0, atol=atol, err_msg=key)
    # every leaf is where it was, its old buffers are gone, and all three steps were one program
    assert here["resharded"] == 0 and here["deleted"] and here["update_programs"] == 1
    assert here["share"] <= {**MESHES, **SLOW}[sizes][1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_every_mesh_computes_the_same(results, sizes):
    check(results, sizes)


@pytest.mark.slow
def test_chunks_of_the_loss_exchange_nothing(results):
    """The head is gathered before the chunks, for each side, and its gradient summed up after
    them.
    """
    ours, of_the_compiler = results[1, 8, 1]["exchanges"]
    assert 0 < ours[0] == ours[1] <= 4
    assert of_the_compiler[0] < of_the_compiler[1]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("sizes", SLOW, ids=name_of)
def test_more_meshes_compute_the_same(slow_results, sizes):
    check(slow_results, sizes)


@pytest.mark.slow
def test_the_comparison_sees_something(results):
    """Tokens differ between rows, and most gradients and changes are far above the tolerance."""
    one, before = results[ONE], jax.tree.leaves(tiny.params())
    assert len(np.unique(one["rollout_tokens"], axis=0)) == ROWS
    moved = sorted(float(np.abs(one[f"leaf{n}"] - x).max()) for n, x in enumerate(before))
    assert len([key for key in one if key.startswith("leaf")]) == 2 * len(before) - 1
    assert moved[len(moved) // 10] > 1e-3
    largest = sorted(float(np.abs(x).max()) for key, x in one.items() if key.startswith("grad"))
    assert len(largest) == len(before) - 1 and largest[len(largest) // 10] > 1e-3


# ---- on one device


def test_mesh_sizes_must_fit():
    one = jax.devices()[:1]
    mesh = sharding.make_mesh(devices=one)
    assert (
        dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
        and sharding.batch_divisor(mesh) == 1
    )
    assert sharding.make_mesh(-1, 1, 1, devices=one).shape == mesh.shape
    with pytest.raises(ValueError, match=r"'fsdp': 2, .*does not cover 1 devices: set config.mesh"):
        sharding.make_mesh(1, 2, 1, devices=one)
    with pytest.raises(ValueError, match=r"'fsdp': -1, 'tensor': 2.*does not cover 1 devices"):
        sharding.make_mesh(1, -1, 2, devices=one)


def test_layouts_of_parameters():
    """Axes by name; an axis that does not divide stays whole; slots and EMA lie like their
    parameter.
    """
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)

    def spec(path, shape, layout="train"):
        return sharding.parameter(mesh, path, shape, layout).spec

    assert spec("llm/layers/und/q_kernel", (2, 32, 32)) == P(None, "fsdp", "tensor")
    assert spec("llm/layers/und/down_kernel", (2, 48, 32)) == P(None, "tensor", "fsdp")
    assert spec("llm/layers/und/q_kernel", (2, 32, 32), "rollout") == P(None, None, "tensor")
    assert spec("llm/layers/und/q_kernel", (2, 30, 32)) == P(None, None, "tensor")
    assert spec("llm/embed", (264, 32)) == P("tensor", "fsdp")
    assert spec("llm/layers/und/k_norm", (2, 8)) == P(None, None)
    params = jax.eval_shape(tiny.params)
    state = jax.eval_shape(lambda p: distill.init_state(p, CONFIG), params)
    found = sharding.tree_shardings(mesh, state)
    expected = params_lib.flatten(sharding.tree_shardings(mesh, params))
    for tree in (found["params"], found["ema"], found["opt"].mu, found["opt"].nu):
        for path, place in params_lib.flatten(tree).items():
            assert place == expected[path]
    assert found["step"].spec == found["opt"].count.spec == P()
    muon = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, kind="muon"))
    state = jax.eval_shape(lambda p: distill.init_state(p, muon), params)
    found = params_lib.flatten(
        sharding.tree_shardings(mesh, state)["opt"].inner_states["matrix"].inner_state[0].mu
    )
    assert found["llm/layers/und/q_kernel"] == expected["llm/layers/und/q_kernel"]
    with pytest.raises(ValueError):
        spec("llm/embed", (264, 32, 1))


def test_layouts_of_the_generation_path():
    """Expert and latent path are cut like their twins; the autoencoder is whole everywhere, and so
    is what is no parameter at all.
    """
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
    params = jax.eval_shape(lambda: tiny.params(tiny.DRAWING))
    config = dataclasses.replace(CONFIG, model=tiny.DRAWING)
    state = jax.eval_shape(lambda p: distill.init_state(p, config), params)
    for layout in ("train", "rollout"):
        found = sharding.tree_shardings(mesh, state, layout)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        flat = params_lib.flatten(found["params"])
        for path, place in flat.items():
            if path.startswith("vae/"):
                assert place.is_fully_replicated, path
            if "/gen/" in path:
                assert place == flat[path.replace("/gen/", "/und/")], path
    train, rollout_layout = (
        params_lib.flatten(sharding.tree_shardings(mesh, params, layout))
        for layout in ("train", "rollout")
    )

    def spec(path, flat=train):
        return flat[f"latent/{path}"].spec

    assert [spec("in_kernel"), spec("out_kernel"), spec("time_fc2_kernel")] == [
        P(None, "fsdp"),
        P("fsdp", None),
        P(None, "fsdp"),
    ]
    assert [spec("in_bias"), spec("out_bias"), spec("position_table")] == [
        P("fsdp"),
        P(None),
        P(None, "fsdp"),
    ]
    assert all(
        place.is_fully_replicated
        for path, place in rollout_layout.items()
        if path.startswith("latent/")
    )
    structs = sharding.abstract(mesh, params)
    assert {path: leaf.sharding for path, leaf in params_lib.flatten(structs).items()} == train
