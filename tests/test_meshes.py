"""Every mesh computes the same: tokens, losses and parameters on 8 fake devices against one device.

The devices exist in a child process only (this file, run as a program); it runs all meshes and leaves an .npz for
each, with the arrays in the order of `jax.tree.leaves`.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tiny
from opsd_jax import distill, params as params_lib, rollout, sharding

# (data, fsdp, tensor): micro steps of an update, share of the parameters that each device holds.
MESHES = {(1, 1, 1): (1, 1.0), (8, 1, 1): (1, 1.0), (1, 8, 1): (1, 0.16), (2, 2, 2): (2, 0.28), (1, 4, 2): (2, 0.16)}
ROWS, BUDGET, STEPS = 8, 6, 3
CONFIG = distill.DistillConfig(
    model=tiny.MODEL, **tiny.ENDS, divergence=distill.DivergenceConfig(top_k=40),
    optim=distill.OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, eps=1e-3))
GREEDY = tiny.rollout_config(max_new_tokens=BUDGET, greedy=True)


def inputs():
    """Parameters, contexts and completions, the same in every process."""
    rng = np.random.default_rng(0)
    return tiny.params(), tiny.batch(rng, ROWS, visual_thoughts=1), tiny.random_trajectory(rng, ROWS, BUDGET)


def run(mesh, accumulation: int) -> dict:
    """Samples in both layouts and does three updates; mesh None: on one device, without any sharding."""
    params, batch, trajectory = inputs()
    found, put = {}, lambda tree, layout="train": tree
    if mesh is not None:
        put = lambda tree, layout="train": jax.device_put(tree, sharding.tree(mesh, tree, layout))
        batch, trajectory = sharding.put_batch(mesh, batch), sharding.put_batch(mesh, trajectory)
        assert batch.student.tokens.sharding.spec == P(("data", "fsdp"))
    for layout in ("rollout", "train"):
        if layout == "train" and (mesh is None or accumulation == 1):
            continue
        programs = rollout.sample._cache_size()
        for _ in range(2):
            sampled = rollout.sample(put(params, layout), batch.student, jax.random.key(1), config=GREEDY)
        found[f"{layout}_tokens"] = sampled.fed
        found[f"{layout}_programs"] = rollout.sample._cache_size() - programs

    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    state = put(tiny.copy(distill.init_state(params, config)))
    placed = jax.tree.map(lambda x: x.sharding, state)
    if mesh is not None:
        abstract = jax.eval_shape(lambda: distill.init_state(params, config))
        assert jax.tree.map(lambda x: x.sharding, sharding.abstract(mesh, abstract)) == placed
        local = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        found["share"] = local / sum(x.nbytes for x in jax.tree.leaves(state))
    losses, deleted = [], True
    for step in range(STEPS):
        given = jax.tree.leaves(state)
        state, metrics = distill.update(state, batch, trajectory, config=config)
        losses.append([metrics["loss"], metrics["grad_norm"], metrics["student_entropy"]])
        deleted &= all(x.is_deleted() for x in given)
        if step == 1:
            found |= {f"leaf{n}": x for n, x in enumerate(jax.tree.leaves(tiny.copy((state["params"], state["ema"]))))}
    moved = jax.tree.map(lambda x, s: not x.sharding.is_equivalent_to(s, x.ndim), state, placed)
    return found | {
        "losses": losses, "deleted": deleted, "resharded": sum(jax.tree.leaves(moved)),
        "update_programs": distill.program(distill.update_step, state, config)._cache_size()}


def name_of(mesh):
    return "one" if mesh is None else "x".join(map(str, mesh))


def main(folder):
    for sizes, (accumulation, _) in {None: (1, 1.0), **MESHES}.items():
        mesh = sizes and sharding.make_mesh(*sizes, devices=jax.devices()[:np.prod(sizes)])
        found = {key: np.asarray(value) for key, value in run(mesh, accumulation).items()}
        np.savez(pathlib.Path(folder) / f"{name_of(sizes)}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{mesh, or None for one device: what `run` found}."""
    folder = tmp_path_factory.mktemp("meshes")
    here = pathlib.Path(__file__).resolve()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(here.parents[1])}
    child = subprocess.run([sys.executable, here, folder], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return {sizes: dict(np.load(folder / f"{name_of(sizes)}.npz")) for sizes in (None, *MESHES)}


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_every_mesh_computes_the_same(results, sizes):
    one, here = results[None], results[sizes]
    for key in ("rollout_tokens", "train_tokens"):
        if key in here:
            np.testing.assert_array_equal(here[key], one["rollout_tokens"])
    np.testing.assert_allclose(here["losses"], one["losses"], rtol=0, atol=1e-5)
    leaves = [key for key in one if key.startswith("leaf")]
    for key in leaves:
        np.testing.assert_allclose(here[key], one[key], rtol=0, atol=1e-5, err_msg=key)
    before = jax.tree.leaves(tiny.params())
    moved = sorted(float(np.abs(one[f"leaf{n}"] - x).max()) for n, x in enumerate(before))
    assert len(leaves) == 2 * len(before) - 1 and moved[len(moved) // 10] > 1e-3  # else equality is no news


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_updates_keep_places_and_programs(results, sizes):
    here = results[sizes]
    assert here["resharded"] == 0 and here["deleted"]
    assert here["update_programs"] == 1 and here["rollout_programs"] == 1
    assert here.get("train_programs", 1) == 1
    assert here["share"] <= MESHES[sizes][1]


# ---- on one device

def test_mesh_sizes_must_fit():
    one = jax.devices()[:1]
    mesh = sharding.make_mesh(devices=one)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} and sharding.batch_divisor(mesh) == 1
    assert sharding.make_mesh(-1, 1, 1, devices=one).shape == mesh.shape
    with pytest.raises(ValueError, match=r"'data': 1, 'fsdp': 2, 'tensor': 1.*does not cover 1 devices: set config.mesh"):
        sharding.make_mesh(1, 2, 1, devices=one)
    with pytest.raises(ValueError, match=r"'fsdp': -1, 'tensor': 2.*does not cover 1 devices"):
        sharding.make_mesh(1, -1, 2, devices=one)


def test_layouts_of_parameters():
    """Axes by name; an axis that does not divide stays whole; slots and EMA lie like their parameter."""
    mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
    spec = lambda path, shape, layout="train": sharding.parameter(mesh, path, shape, layout).spec
    assert spec("llm/layers/und/q_kernel", (2, 32, 32)) == P(None, "fsdp", "tensor")
    assert spec("llm/layers/und/down_kernel", (2, 48, 32)) == P(None, "tensor", "fsdp")
    assert spec("llm/layers/und/q_kernel", (2, 32, 32), "rollout") == P(None, None, "tensor")
    assert spec("llm/layers/und/q_kernel", (2, 30, 32)) == P(None, None, "tensor")
    assert spec("llm/embed", (264, 32)) == P("tensor", "fsdp")
    assert spec("llm/layers/und/k_norm", (2, 8)) == P(None, None)
    params = jax.eval_shape(tiny.params)
    state = jax.eval_shape(lambda p: distill.init_state(p, CONFIG), params)
    found = sharding.tree(mesh, state)
    expected = params_lib.flatten(sharding.tree(mesh, params))
    for tree in (found["params"], found["ema"], found["opt"].mu, found["opt"].nu):
        for path, place in params_lib.flatten(tree).items():
            assert place == expected[path]
    assert found["step"].spec == found["opt"].count.spec == P()
    with pytest.raises(ValueError):
        spec("llm/embed", (264, 32, 1))
