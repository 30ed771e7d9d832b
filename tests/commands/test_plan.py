"""plan: names of slices, what compiled programs send and read, and the bill, added up by hand."""

import contextlib
import json
import math
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from opsd_jax import config as config_lib
from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.model import bagel
from opsd_jax.plan import advice, answers, bill, flops, hlo, programs, table
from opsd_jax.plan import topology as topology_lib
from opsd_jax.run import checks
from opsd_jax.runtime.chips import GIB
from tests import small_run

# --- topologies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name, chips, devices, hbm",
    [
        ("v5p:2x2x2", "v5p:2x2x2", 8, 8, 95.74),
        ("v5p-16", "v5p:2x2x2", 8, 8, 95.74),  # TensorCores, two a chip
        ("v5p-8", "v5p:2x2x1", 4, 4, 95.74),
        ("v5p-256", "v5p:4x4x8", 128, 128, 95.74),
        ("v4-32", "v4:2x2x4", 16, 16, 30.75),
        ("v5e-64", "v5e:8x8", 64, 64, 15.75),
        ("v5litepod-8", "v5e:2x4", 8, 8, 15.75),
        ("v5e-1", "v5e:1x1", 1, 1, 15.75),
        ("v6e-256", "v6e:16x16", 256, 256, 31.25),
        ("v6e:4x8", "v6e:4x8", 32, 32, 31.25),
        ("7x:2x2x1", "tpu7x:2x2x1", 4, 8, 94.75),  # two devices a chip
        ("tpu7x-16", "tpu7x:2x2x2", 8, 16, 94.75),
        ("cpu:8", "cpu:8", 8, 8, None),
    ],
)
def test_names_become_grids(text, name, chips, devices, hbm):
    found = topology_lib.parse_topology(text)
    assert (found.name, found.chips, found.devices, found.hbm) == (name, chips, devices, hbm)


def test_slices_multiply():
    found = topology_lib.parse_topology("v5p-32", slices=4)
    assert found.name == "v5p:2x2x4" and found.chips == 64


@pytest.mark.parametrize(
    "text, wrap",
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x2x4", (False,) * 3),
        ("v5e:16x16", (True, True, False)),
        ("v5e:8x8", (False,) * 3),
    ],
)
def test_full_cubes_are_closed(text, wrap):
    assert topology_lib.parse_topology(text).wrap == wrap


@pytest.mark.parametrize(
    "text, slices, says",
    [
        ("v9:2x2", 1, "v5p"),
        ("v5p", 1, "FAMILY:GRID"),
        ("v5p:2x2", 1, "3 axes"),
        ("v5e:2x2x2", 1, "2 axes"),
        ("v5p-12", 1, "v5p-8, v5p-16"),
        ("v5e-24", 1, "v5e-16"),
        ("v5e-64", 0, "one slice"),
        ("cpu:8", 2, "one slice"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(text, slices, says):
    with pytest.raises(ValueError, match=says):
        topology_lib.parse_topology(text, slices)


def test_a_missing_compiler_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(topology_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'libtpu==\d+\.\d+"):
        topology_lib.devices_of(topology_lib.parse_topology("v5p-8"))


# --- compiled programs ----------------------------------------------------------------------------

# A loop of 5 around a gather and a fused reduce-scatter; then one collective of each other kind,
# with every way of writing groups. `sliced` reads one layer of the stacked weights; S(1) is not
# HBM.
HLO = """\
HloModule jit_step, entry_computation_layout={(bf16[5,64,8]{2,1,0:T(8,128)(2,1)})->f32[8]{0}}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.9 = f32[8]{0} dynamic-slice(%all-reduce.9, %p), dynamic_slice_sizes={8}
}

%slice_layer (w: bf16[5,64,8], n: s32[]) -> bf16[64,8] {
  %w = bf16[5,64,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %dynamic-slice.1 = bf16[1,64,8]{2,1,0} dynamic-slice(%w, %n, %n, %n), dynamic_slice_sizes={1,64,8}
  ROOT %bitcast.1 = bf16[64,8]{1,0} bitcast(%dynamic-slice.1)
}

%body (state: (s32[], bf16[5,64,8])) -> (s32[], bf16[5,64,8]) {
  %state = (s32[], bf16[5,64,8]{2,1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state), index=0
  %w.1 = bf16[5,64,8]{2,1,0} get-tuple-element(%state), index=1
  %sliced = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} fusion(%w.1, %n.1), kind=kLoop, calls=%slice_layer
  %all-gather.1 = bf16[512,8]{1,0:S(1)} all-gather(%sliced), channel_id=1, replica_groups=mesh['a'=8,'b'=4] {'a'}
  %scattered = f32[8]{0:T(128)S(1)} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[], bf16[5,64,8]{2,1,0}) tuple(%n.1, %w.1)
}

%condition (state.1: (s32[], bf16[5,64,8])) -> pred[] {
  %state.1 = (s32[], bf16[5,64,8]{2,1,0}) parameter(0)
  %bound = s32[] constant(5)
  %n.2 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%n.2, %bound), direction=LT
}

ENTRY %main (w.2: bf16[5,64,8]) -> f32[8] {
  %w.2 = bf16[5,64,8]{2,1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[], bf16[5,64,8]{2,1,0}) tuple(%zero, %w.2)
  %loop = (s32[], /*index=1*/bf16[5,64,8]{2,1,0}) while(%tuple.2), condition=%condition, body=%body
  %x = f32[1000]{0:T(1024)S(1)} constant({...})
  %all-reduce.2 = f32[1000]{0:T(1024)S(1)} all-reduce(%x), channel_id=2, replica_groups=[8,4]<=[32], to_apply=%add
  %all-to-all.1 = f32[1000]{0:T(1024)S(1)} all-to-all(%x), channel_id=3, replica_groups={{0,1},{2,3}}
  %permute.1 = (f32[1000]{0:S(1)}, f32[1000]{0:S(1)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4
  %permute.2 = f32[1000]{0:S(1)} collective-permute-done(%permute.1)
  ROOT %product = f32[8]{0} negate(%all-reduce.2)
}
"""


def test_collectives_and_traffic_of_a_module():
    found = hlo.traffic(HLO, devices=32)
    kinds = found["collectives"]
    assert kinds["all-gather"] == {
        "count": 5,
        "bytes": 5 * 512 * 8 * 2 * 7 // 8,
    }  # a mesh axis of 8
    assert kinds["reduce-scatter"] == {
        "count": 5,
        "bytes": 5 * 8 * 4 * 7,
    }  # and not also an all-reduce
    assert kinds["all-reduce"] == {"count": 1, "bytes": 2 * 4000 * 3 // 4}  # groups of 4
    assert kinds["all-to-all"] == {"count": 1, "bytes": 2000}
    assert kinds["collective-permute"] == {
        "count": 1,
        "bytes": 4000,
    }  # result alone, start and done once
    # a turn of the loop: one layer bf16 [64, 8] and its number; the condition reads two scalars and
    # writes a byte. The last line writes 32 bytes; what it reads is not in HBM
    assert found["hbm_bytes"] == 5 * (64 * 8 * 2 + 4) + 5 * (4 + 4 + 1) + 32


def test_loops_without_a_bound_run_as_often_as_told():
    open_ended = HLO.replace(
        "%bound = s32[] constant(5)", "%bound = s32[] get-tuple-element(%state.1), index=0"
    )
    assert hlo.traffic(open_ended, 32, trips=(11,))["collectives"]["all-gather"]["count"] == 11
    noted = open_ended.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert hlo.traffic(noted, 32, trips=(11,))["collectives"]["all-gather"]["count"] == 7


def test_updates_in_place_write_the_update_alone():
    module = """\
%put (cache: f32[100,64], new: f32[1,64], n: s32[]) -> f32[100,64] {
  %cache = f32[100,64]{1,0} parameter(0)
  %new = f32[1,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  ROOT %updated = f32[100,64]{1,0} dynamic-update-slice(%cache, %new, %n, %n)
}

ENTRY %main (a: f32[100,64], b: f32[1,64], c: s32[]) -> f32[100,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %b = f32[1,64]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %out = f32[100,64]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%put
}
"""
    assert hlo.traffic(module, 1)["hbm_bytes"] == 64 * 4 + 4 + 64 * 4


def test_a_matrix_behind_a_nested_bitcast_is_read():
    module = """\
%same (w: bf16[64,32]) -> bf16[64,32] {
  %w = bf16[64,32]{1,0} parameter(0)
  ROOT %view = bf16[64,32]{1,0} bitcast(%w)
}

%product (x: bf16[2,64], w.1: bf16[64,32]) -> bf16[2,32] {
  %x = bf16[2,64]{1,0} parameter(0)
  %w.1 = bf16[64,32]{1,0} parameter(1)
  %inner = bf16[64,32]{1,0} fusion(%w.1), kind=kLoop, calls=%same
  ROOT %y = bf16[2,32]{1,0} convolution(%x, %inner), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[2,64], b: bf16[64,32]) -> bf16[2,32] {
  %a = bf16[2,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  ROOT %out = bf16[2,32]{1,0} fusion(%a, %b), kind=kOutput, calls=%product
}
"""
    assert hlo.traffic(module, 1)["hbm_bytes"] == 2 * (2 * 64 + 64 * 32 + 2 * 32)


def test_traffic_of_a_real_module():
    """What the installed XLA prints is understood."""

    def step(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    w, x = (
        jax.ShapeDtypeStruct((6, 256, 256), jnp.float32),
        jax.ShapeDtypeStruct((8, 256), jnp.float32),
    )
    text = jax.jit(step).lower(w, x).compile().as_text()
    once = 256 * 256 * 4
    assert (
        6 * once <= hlo.traffic(text, 1)["hbm_bytes"] <= 6 * 4 * once
    )  # each layer read once, perhaps copied


def test_flops_count_loops_and_recomputation():
    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (x @ w, None))
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    w, x = (
        jax.ShapeDtypeStruct((5, 16, 16), jnp.float32),
        jax.ShapeDtypeStruct((3, 16), jnp.float32),
    )
    product = 2 * 3 * 16 * 16
    assert flops.matmul_flops(jax.make_jaxpr(loss)(w, x).jaxpr) == 5 * product
    # backward: two products a layer; a product that nothing needs again is not recomputed
    assert flops.matmul_flops(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr) in (
        5 * 3 * product,
        5 * 4 * product,
    )
    kernel = pl.pallas_call(
        lambda x, o: o.__setitem__(..., x[...] @ x[...]),
        grid=(3,),
        out_shape=jax.ShapeDtypeStruct((16, 16), jnp.float32),
    )
    assert flops.matmul_flops(jax.make_jaxpr(kernel)(jnp.zeros((16, 16))).jaxpr) == 3 * 2 * 16**3

    def endless(x, w):
        return jax.lax.while_loop(lambda s: jnp.sum(s) < 1, lambda s: s @ w, x)

    square = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def nested(x, w):
        return jax.lax.while_loop(lambda s: jnp.sum(s) < 1, lambda s: endless(s @ w, w), x)

    assert (
        flops.matmul_flops(jax.make_jaxpr(nested)(x, square).jaxpr, trips=(3, 7))
        == (3 + 21) * product
    )
    assert flops.matmul_flops(jax.make_jaxpr(endless)(x, square).jaxpr, trips=(7,)) == 7 * product


def test_loops_of_a_sampler_with_a_queue():
    """16 rows of up to 32 tokens by 8 slots, 4 at a time: 4 refills, 64 steps; all at once: 32
    steps.
    """

    def of(**kw):
        return programs._sampler_trips(types.SimpleNamespace(max_new_tokens=32, **kw), 16)

    assert of(slots=8, group=4) == (4, 16) and of(slots=0) == of(slots=16) == (32,)


def test_modelled_time_by_hand():
    topology = topology_lib.parse_topology("v5p-16")
    taken = {"collectives": {"all-gather": {"count": 1, "bytes": 18e9}}, "hbm_bytes": 2.77e12}
    found = bill.step_seconds(459e12, taken, topology)
    assert found["compute"] == pytest.approx(2) and found["hbm"] == pytest.approx(
        1
    )  # half of the peak
    assert found["network"] == pytest.approx(0.1, abs=2e-5)  # two directions of 90 GB/s
    assert found["overlapped"] == pytest.approx(2)
    assert found["serial"] == pytest.approx(2.1, abs=2e-5)
    taken["collectives"]["all-reduce"] = {"count": 999, "bytes": 0}
    assert bill.step_seconds(459e12, taken, topology)["network"] == pytest.approx(0.11)


# --- the bill -------------------------------------------------------------------------------------


def _command(*arguments):
    changes = [f"--config.{key}={value}" for key, value in small_run.CHANGES.items()]
    return [
        sys.executable,
        "-m",
        "opsd_jax.plan",
        f"--config={small_run.MINI}:smoke",
        *changes,
        *arguments,
    ]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The command on eight fake devices, four-way fsdp by two-way tensor: (completed process, what
    --out holds).
    """
    out = tmp_path_factory.mktemp("plan") / "bill.json"
    done = small_run.run(
        _command(
            "--topology=cpu:8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", f"--out={out}"
        ),
        env=small_run.environment(tmp_path_factory),
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text())


def _shards(config, cut):
    """Bytes of the parameters on one device, where logical axis -> number of pieces."""
    model = config_lib.model(config)
    params = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    total = 0
    for path, leaf in params_lib.flatten(params).items():
        pieces = 1
        for size, axis in zip(leaf.shape, params_lib.fact(path).axes):
            n = cut.get(axis, 1)
            pieces *= n if size % n == 0 else 1
        total += math.prod(leaf.shape) * 4 // pieces
    return total


@pytest.mark.slow
def test_the_bill_is_the_sum_of_the_shards(eight):
    config = small_run.config()
    tensor = dict.fromkeys(("heads", "kv", "mlp", "vocab", "vit_heads", "vit_mlp"), 2)
    train = _shards(config, tensor | dict.fromkeys(("embed", "vit_embed"), 4))
    rollout = _shards(config, tensor)
    sample, update = eight[1]["programs"]
    assert (sample["program"], update["program"]) == ("sample", "update")
    assert sample["bytes"]["params"] == rollout and update["bytes"]["params"] == train
    # the position tables of the connector are never trained: no moments, no copy for the teacher;
    # two moments and the step of the schedule, that of Adam
    fixed = config.model.vit.side**2 * config.model.llm.hidden_size * 4 // 4
    assert update["bytes"]["teacher"] == train - fixed
    assert update["bytes"]["optimizer"] == 2 * (train - fixed) + 4

    # 8 rows, 2 a device; vectors of the context, patches as bytes, two scalars a row
    def packed(slots, patches):
        return 2 * (4 * slots * 4 + patches * (8 * 8 * 3 + 3 * 4) + 2 * 4)

    slots, patches = config.data.buckets.student[0]
    assert sample["bytes"]["batch"] == packed(slots, patches)
    budget = config.rollout.max_new_tokens
    trajectory = 2 * ((budget - 1) * (4 + 1 + 4) + budget * (4 + 1) + 4 * 4)
    teacher = packed(*config.data.buckets.teacher[0])
    assert update["bytes"]["batch"] == packed(slots, patches) + teacher + trajectory
    # keys and values of two layers and two rows; there is one kv head, so its 16 entries are what
    # tensor cuts
    assert sample["bytes"]["kv_cache"] == 2 * 2 * 2 * (slots + budget) * 8 * 4
    # beside the sampler: the whole training state but leaves that are one array in both layouts
    same = _same_in_both(config)
    assert sample["bytes"]["beside"] == (train - same) + 3 * (train - fixed) + 4 + teacher
    assert update["bytes"]["beside"] == 0


def _same_in_both(config):
    """Bytes of the leaves that fsdp does not cut."""
    model = config_lib.model(config)
    params = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    total = 0
    for path, leaf in params_lib.flatten(params).items():
        axes = list(zip(leaf.shape, params_lib.fact(path).axes))
        if not any(axis in ("embed", "vit_embed") and size % 4 == 0 for size, axis in axes):
            pieces = math.prod(
                2
                for size, axis in axes
                if axis not in (None, "layers", "embed", "vit_embed") and size % 2 == 0
            )
            total += math.prod(leaf.shape) * 4 // pieces
    return total


@pytest.mark.slow
def test_report_and_table(eight):
    done, report = eight
    assert set(report) == {
        "topology",
        "slices",
        "chips",
        "devices",
        "hbm_gib",
        "mesh",
        "rollout_mesh",
        "stage",
        "bucket",
        "parameters",
        "fits",
        "programs",
        "run",
        "versions",
        "quick",
    }
    assert (
        report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
        and report["hbm_gib"] is None
        and report["fits"]
    )
    for program in report["programs"]:
        assert set(program) == {
            "stage",
            "program",
            "fits",
            "hbm_gib",
            "needs_gib",
            "peak_gib",
            "beside_gib",
            "bytes",
            "flops",
            "hbm_bytes",
            "collectives",
            "seconds",
            "compile_seconds",
            "advice",
        }
        assert program["fits"] and not program["advice"] and program["collectives"]
        assert program["needs_gib"] == pytest.approx(
            program["peak_gib"] + program["bytes"]["beside"] / GIB
        )
        assert program["peak_gib"] * GIB >= sum(program["bytes"][k] for k in ("params", "batch"))
        assert program["flops"]["traced"] > 0 and program["hbm_bytes"] > 0
        assert f"\n{program['program']}, for each device" in done.stdout
    total = sum(
        math.prod(x.shape)
        for x in jax.tree.leaves(
            jax.eval_shape(
                lambda: bagel.init(jax.random.key(0), config=config_lib.model(small_run.config()))
            )
        )
    )
    assert report["parameters"]["total"] == total
    # a CPU has bytes, but no hours
    run = report["run"]
    assert run["hours"] is None and (run["chips"], run["hosts"]) == (8, 1)
    assert [stage["name"] for stage in run["stages"]] == ["warmup", "opsd"]
    size = f"{run['stages'][1]['checkpoint_bytes'] / 1e6:.2f} MB"
    assert f"4 steps, 4 saves of {size}: no time is modelled for a CPU\n" in done.stdout
    assert "\nthe whole run, on 8 chips of 1 host\n" in done.stdout and " hours" not in done.stdout


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.mark.slow
def test_what_does_not_fit_says_what_to_change(eight, tmp_path_factory):
    """The same update on one device with memory for three quarters of what that took."""
    bound = 0.75 * eight[1]["programs"][1]["peak_gib"]
    done = small_run.run(
        _command(
            "--topology=cpu:1", "--only=update", "--config.teacher.kind=ema", f"--hbm={bound}"
        ),
        env=small_run.environment(tmp_path_factory),
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "does not fit: needs" in done.stdout and "fits:" not in done.stdout
    for setting in (
        "opsd.accumulation=8 takes one sequence per device",
        "teacher.kind=self",
        "model.remat=full",
        "mesh.fsdp",
        "divergence.chunk=96",
    ):
        assert f"config.{setting}" in done.stdout
    assert "--bucket" not in done.stdout  # there is but one
    assert "mesh.tensor" not in done.stdout  # the sampler's copy is gone by then


def test_a_sampler_that_does_not_fit_is_told_of_its_copy(mesh):
    found = {
        "program": "sample",
        "bytes": {"params": 3 * GIB, "kv_cache": GIB // 2},
    }
    config = small_run.config(model__llm__num_kv_heads=2)
    lines = "\n".join(advice.advice(found, config, "opsd", mesh))
    copy = "config.rollout.tensor=2 halves the sampler's own copy of the weights (3.0 GiB)"
    assert copy in lines
    assert "the KV cache takes 0.5 GiB" in lines and "accumulation" not in lines
    config.model.llm.num_kv_heads = 1  # which two devices cannot share
    assert copy not in "\n".join(advice.advice(found, config, "opsd", mesh))


def test_bad_arguments_end_with_one_line(tmp_path_factory):
    done = small_run.run(_command("--topology=v9:2x2"), env=small_run.environment(tmp_path_factory))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: --topology='v9:2x2': use"
    )


@pytest.mark.parametrize(
    "message, gib",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
            "Used 16.50G of 15.75G hbm. Exceeded by 1G.",
            16.5,
        ),
        # what it calls temporaries counts the arguments, too
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
            "(152.79G) exceeds available HBM (9G).",
            152.79,
        ),
        ("RESOURCE_EXHAUSTED: for some other reason", 1.0),
    ],
)  # at least the arguments
def test_running_out_of_memory_is_an_answer(message, gib):
    """What libtpu says where a program does not fit even alone becomes numbers, not a traceback."""

    def fail(**_):
        raise jax.errors.JaxRuntimeError(message)

    x = jax.ShapeDtypeStruct(
        (2**28,),
        jnp.float32,
        sharding=sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1])),
    )
    traced, slice_of_four = jax.jit(lambda x: x).trace(x), topology_lib.parse_topology("v5p-8")
    stub = types.SimpleNamespace(
        jaxpr=traced.jaxpr, lower=lambda **_: types.SimpleNamespace(compile=fail)
    )
    found = bill.bill(
        programs.Program("update", stub, {"params": x}, {}),
        slice_of_four,
        95.74,
    )
    assert (
        not found["fits"] and found["needs_gib"] == pytest.approx(gib) and found["peak_gib"] is None
    )
    config = small_run.config()
    found["advice"] = advice.advice(
        found, config, "sft", sharding.make_mesh(devices=jax.devices()[:1])
    )
    report = {
        "topology": "v5p:2x2x1",
        "slices": 1,
        "chips": 4,
        "devices": 4,
        "hbm_gib": 95.74,
        "mesh": {},
        "parameters": {},
        "programs": [{"stage": "opsd"} | found],
        "run": bill.budget_of_run(
            config, [{"stage": "opsd"} | found], slice_of_four, hosts=1, write_speed=1, price=None
        ),
    }
    shown = table.table(report)
    assert f"does not fit: needs at least {gib:.2f} GiB of 95.74 GiB" in shown
    assert "MB: it does not fit" in shown and " hours" not in shown


def test_other_errors_of_the_compiler_are_not_swallowed():
    def fail(**_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    traced = jax.jit(lambda x: x).trace(jnp.zeros(1))
    stub = types.SimpleNamespace(
        jaxpr=traced.jaxpr, lower=lambda **_: types.SimpleNamespace(compile=fail)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        bill.bill(programs.Program("update", stub, {}, {}), topology_lib.parse_topology("v5p-8"))


def test_supervised_stages_have_one_program(mesh):
    config = small_run.config()
    (program,) = programs.programs(config, "warmup", mesh)
    assert (
        program.name == "update"
        and "teacher" in program.arguments
        and not program.arguments["teacher"]
    )
    with pytest.raises(ValueError, match="samples nothing"):
        programs.programs(config, "warmup", mesh, only="sample")


def test_settings_that_no_run_would_start_with(mesh):
    with pytest.raises(ValueError, match="--bucket=1"):
        programs.programs(small_run.config(), "opsd", mesh, bucket=1)
    with pytest.raises(ValueError, match="has 8 sequences .* for 16 batch shards"):
        checks.check_batch(small_run.config(), "opsd", 16)
    for every, final_split in (
        (0, ""),
        (1, ""),
        (0, "test"),
    ):  # where nothing is evaluated, its batches may be of any size
        config = small_run.config(
            eval__batch_size=6, eval__every=every, eval__final_split=final_split
        )
        with (
            contextlib.nullcontext()
            if not every and not final_split
            else pytest.raises(ValueError, match="eval.batch_size 6")
        ):
            checks.check_batch(config, "opsd", 4)


def test_the_sampler_holds_no_generation_parameters(mesh):
    config = small_run.config(model__generation__on=True)
    (program,) = programs.programs(config, "opsd", mesh, only="sample")
    assert {*program.arguments["params"]} == {"llm", "vit", "connector"}
    assert "latent" in {path.split("/")[0] for path in program.beside["params"]}


def test_programs_are_those_that_a_run_compiles(mesh):
    """The shapes made up here are those of packed rows."""
    config = small_run.config()
    (program,) = programs.programs(config, "opsd", mesh, only="sample")
    context = program.arguments["batch"]
    slots, patches = config.data.buckets.student[0]
    assert context.tokens.shape == (8, slots) and context.patches.shape == (8, patches, 192)
    assert (
        context.patches.dtype == np.uint8
        and context.length.shape == (8,)
        and context.latents is None
    )


# --- a real slice ---------------------------------------------------------------------------------


def _tpu(*arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "opsd_jax.plan",
            "--config=configs/visual_opsd.py",
            "--quick",
            "--config.model.query_block=512",
            *arguments,
        ],
        cwd=small_run.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": "."},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "only, arguments",
    [
        pytest.param(
            "update",
            ["--topology=v5e-16", "--config.opsd.accumulation=4", "--config.mesh.tensor=4"],
            marks=pytest.mark.long,
        ),
        ("sample", ["--topology=v5e-64", "--config.opsd.accumulation=1", "--config.mesh.tensor=4"]),
    ],
)
def test_the_7b_step_fits_a_slice(only, arguments, tmp_path):
    pytest.importorskip("libtpu")
    done = _tpu(f"--only={only}", "--bucket=0", f"--out={tmp_path / 'bill.json'}", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bill.json").read_text())
    (program,) = report["programs"]
    assert report["parameters"]["total"] > 7e9
    assert sum(program["bytes"][k] for k in ("params", "batch")) < program["peak_gib"] * GIB
    assert program["needs_gib"] < 0.9 * report["hbm_gib"]
    if only == "update":  # weights are gathered layer by layer: not the rows of all devices
        sent = sum(c["bytes"] for c in program["collectives"].values())
        assert sent < 12 * 4 * report["parameters"]["total"]


@pytest.mark.long
def test_only_data_crosses_slices(tmp_path, tmp_path_factory):
    """Two slices of four chips, in small: copies of the model that exchange gradients."""
    pytest.importorskip("libtpu")

    def run(*sizes):
        return small_run.run(
            _command(
                "--topology=v5e:2x2",
                "--slices=2",
                "--only=update",
                *sizes,
                f"--out={tmp_path / 'bill.json'}",
            ),
            env=small_run.environment(tmp_path_factory) | {"JAX_PLATFORMS": ""},
        )

    done = run("--config.mesh.fsdp=4", "--config.mesh.data=2")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bill.json").read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and report["devices"] == 8
    done = run("--config.mesh.fsdp=8")
    assert done.returncode == 1 and "config.mesh.data is 1 for 2 slices" in done.stderr


@pytest.mark.slow
def test_hours_and_dollars_of_a_run_on_a_slice(tmp_path, tmp_path_factory):
    """Both stages of the small run on four chips of one host: the sum of what their bills say."""
    pytest.importorskip("libtpu")
    done = small_run.run(
        _command(
            "--topology=v5e:2x2",
            "--stage=warmup,opsd",
            "--quick",
            "--price_per_chip_hour=4.2",
            "--write_speed=0.001",
            f"--out={tmp_path / 'bill.json'}",
        ),
        env=small_run.environment(tmp_path_factory) | {"JAX_PLATFORMS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bill.json").read_text())
    assert report["stage"] == "warmup,opsd"
    of = {(one["stage"], one["program"]): one["seconds"] for one in report["programs"]}
    assert [*of] == [("warmup", "update"), ("opsd", "sample"), ("opsd", "update")]
    run, hours = report["run"], []
    megabytes = {stage["name"]: stage["checkpoint_bytes"] / 1e6 for stage in run["stages"]}
    for kind in ("overlapped", "serial"):
        seconds = small_run.WARMUP * (of["warmup", "update"][kind] + megabytes["warmup"])
        step = of["opsd", "sample"][kind] + of["opsd", "update"][kind]
        hours.append((seconds + small_run.OPSD * (step + megabytes["opsd"])) / 3600)
    assert (run["chips"], run["hosts"]) == (4, 1) and run["hours"] == pytest.approx(hours)
    assert run["dollars"] == pytest.approx([4 * 4.2 * n for n in hours])
    assert "\nupdate of warmup, for each device" in done.stdout
    assert f"{run['dollars'][1]:,.2f} dollars at 4.2 a chip-hour\n" in done.stdout


@pytest.mark.slow
def test_the_7b_step_does_not_fit_four_small_chips():
    pytest.importorskip("libtpu")
    done = _tpu("--topology=v5e-4", "--only=update", "--config.opsd.accumulation=4")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "does not fit: needs at least" in done.stdout and "config.mesh.fsdp" in done.stdout


@pytest.mark.slow
def test_answers_on_a_host_of_a_slice(tmp_path, tmp_path_factory):
    """The sampler on the four chips of one host, two copies of the model; four hosts answer."""
    pytest.importorskip("libtpu")
    done = small_run.run(
        _command(
            "--topology=v5e-16",
            "--stage=eval",
            "--quick",
            "--tensor=2",
            "--questions=100",
            "--price_per_chip_hour=2",
            "--config.model.llm.num_kv_heads=2",
            "--config.eval.batch_size=3",
            f"--out={tmp_path / 'bill.json'}",
        ),
        env=small_run.environment(tmp_path_factory) | {"JAX_PLATFORMS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "bill.json").read_text())
    assert report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2} and report["devices"] == 16
    (sample,) = report["programs"]
    found = report["answers"]
    assert (found["batch_size"], found["hosts"], found["images"]) == (4, 4, 0)  # 3, for two copies
    seconds = [sample["seconds"][kind] for kind in ("overlapped", "serial")]
    assert found["seconds_per_batch"] == pytest.approx(seconds)
    batches = math.ceil(100 / 16)
    assert found["hours"] == pytest.approx([batches * n / 3600 for n in seconds])
    assert found["dollars"] == pytest.approx([16 * 2 * n for n in found["hours"]])
    assert "16 chips of 4 hosts, in batches of 4 questions on each host\n" in done.stdout
    assert any("all-reduce" in kind for kind in sample["collectives"])


def test_answers_are_planned_alone():
    for options in (bill.Options("eval", only="sample"), bill.Options("generate", bucket=0)):
        with pytest.raises(ValueError, match="with --only or --bucket: they are of training"):
            bill.plan(small_run.config(), topology_lib.parse_topology("cpu:1"), options)


# --- what a decoding step of the real widths reads --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_decoding_on_a_tpu_reads_weights_and_keys_once(sequences):
    """Two layers of the 7B model on one v5p: no layer's weights or keys are copied before use.

    XLA would copy 64 sequences' keys of a layer, 235 MB, without `model.key_block`.
    """
    slice_of_four = topology_lib.parse_topology("v5p-8")
    device = topology_lib.devices_of(slice_of_four)[0]
    config = config_lib.default()
    config.model.llm.num_layers = config.model.vit.num_layers = 2
    model = answers.model_of(config, "eval")
    mesh = sharding.inference_mesh(1, [device])
    (call,) = answers.calls(model, mesh, sequences)
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O1")
    try:
        text = call.program.traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    finally:
        jax.config.update("jax_optimization_level", level)
    computations, entry = hlo.read_hlo(text)
    (decoding,) = (
        body
        for i in computations[entry].values()
        if i.op == "while" and hlo._trips(i, computations) is None
        for body in i.named("body")
    )
    blocks = call.program.trips[-1]
    step = hlo._Traffic(computations, 1)
    step.visit(decoding, 1, (blocks,))
    llm, columns = model.config.llm, blocks * model.config.key_block
    keys = 2 * llm.num_layers * sequences * columns * llm.num_kv_heads * llm.head_dim * 2
    weights = sum(
        math.prod(x.shape) * x.dtype.itemsize
        for path, x in params_lib.flatten(call.program.arguments["params"]).items()
        if path.startswith("llm/") and path != "llm/embed"
    )
    assert step.hbm_bytes < 1.15 * (weights + keys) + 150e6, (step.hbm_bytes, weights, keys)
    assert step.hbm_bytes > weights + keys
    copied = [
        sum(hlo._arrays(i.shape))
        for body in _bodies(decoding, computations)
        for i in computations[body].values()
        if i.op in ("copy", "copy-start", "reshape") or "dynamic-slice" in i.name.split("_")[-2:]
    ]
    assert max(copied, default=0) < 20e6


def _bodies(name, computations):
    """A computation and the bodies of the loops in it."""
    found = [name]
    for i in computations[name].values():
        if i.op == "while":
            found += [other for body in i.named("body") for other in _bodies(body, computations)]
    return found
