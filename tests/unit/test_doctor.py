"""Checks of a machine: each tells a machine that works from one that does not.

Stand-ins: a file system that lies, a kernel with another mask, a chip that promises more than the
machine has.
"""

import dataclasses
import json
import os
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from opsd_jax.doctor import kernels, machine, network, rates, report, sizes, speed, storage
from opsd_jax.doctor.result import (
    FAILED,
    OK,
    SKIPPED,
    Limits,
    Result,
    SkipError,
    judge,
    run,
    seconds_of,
)
from opsd_jax.model import attention
from opsd_jax.plan import hlo, topology
from opsd_jax.run import attention_check, random_arrays

FOR_EVER = Limits(float("inf"), 0.0)
pytestmark = pytest.mark.usefixtures("quick_compiles")


def statuses(results) -> dict[str, str]:
    return {result.name: result.status for result in results}


# --- running checks -------------------------------------------------------------------------------


def test_a_check_that_raises_has_failed_and_the_others_still_run(capsys):
    def breaks():
        yield Result("a/1", OK, "fine")
        raise RuntimeError("INTERNAL: the device is lost\nat line 3")

    def does_not_apply():
        raise SkipError("one process")
        yield

    found = run(
        {"a": breaks, "b": does_not_apply, "c": lambda: [judge("c", True, "yes", "no", {})]}
    )
    assert [(one.name, one.status, one.summary) for one in found] == [
        ("a/1", OK, "fine"),
        ("a", FAILED, "RuntimeError: INTERNAL: the device is lost"),
        ("b", SKIPPED, "one process"),
        ("c", OK, "yes"),
    ]
    assert capsys.readouterr().err.splitlines() == ["doctor: a", "doctor: b", "doctor: c"]


def test_a_long_check_says_that_it_runs(capsys, monkeypatch):
    monkeypatch.setattr("opsd_jax.doctor.result._EVERY", 0.01)
    run({"slow": lambda: iter([time.sleep(0.1)] * 0)})
    assert capsys.readouterr().err.count("doctor: slow, for 0 s\n") >= 2


def test_nothing_is_measured_after_the_end():
    Limits(time.monotonic() + 60, 1.0).check(30)
    with pytest.raises(SkipError, match="time of the command is used up"):
        Limits(time.monotonic() + 60, 1.0).check(90)


@pytest.mark.parametrize(("budget", "calls"), [(0.0, 2), (float("inf"), 6)])
def test_a_call_is_timed_until_its_budget_is_spent(budget, calls):
    made = []
    assert seconds_of(lambda: made.append(1), budget) >= 0
    assert len(made) == calls  # the first does not count


def test_report():
    first = [Result("devices", OK, "4 x TPU v4", {"local": 4}), Result("disk", SKIPPED, "no")]
    second = [Result("devices", FAILED, "on the CPU"), Result("disk", SKIPPED, "no")]
    good = report.report([report.to_json(first)], {"model": {}}, 12.3)
    assert good["ok"] and good["checks"][0]["values"] == {"local": 4}
    assert report.table(good).splitlines() == [
        "ok       devices  4 x TPU v4",
        "skipped  disk     no",
        "",
        "all 1 checks that ran hold (12 s)",
    ]
    both = report.report([report.to_json(first), report.to_json(second)], {}, 1.0)
    assert not both["ok"] and json.loads(json.dumps(both)) == both
    assert "FAILED   1: devices  on the CPU" in report.table(both)
    assert report.table(both).endswith("1 of 2 checks failed: 1: devices (1 s)")


# --- devices, versions, memory --------------------------------------------------------------------


def device(kind="TPU v5 lite", platform="tpu", limit=None):
    return types.SimpleNamespace(
        device_kind=kind,
        platform=platform,
        client=types.SimpleNamespace(platform_version="libtpu\n version"),
        memory_stats=lambda: limit and {"bytes_limit": limit},
    )


def test_devices(monkeypatch):
    (found,) = machine.devices([device()] * 4)
    assert (found.status, found.summary) == (OK, "4 x TPU v5 lite (tpu)")
    assert found.values["platform_version"] == "libtpu version"
    (mixed,) = machine.devices([device(), device("TPU v4")])
    assert mixed.status == FAILED
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/x"] * ("nvidia" in pattern))
    cpu = [device("cpu", "cpu")]
    assert statuses(machine.devices(cpu)) == {"devices": OK}  # JAX_PLATFORMS=cpu asks for it
    monkeypatch.delenv("JAX_PLATFORMS")
    (unused,) = machine.devices(cpu)
    assert unused.status == FAILED and 'pip install -e ".[cuda]"' in unused.summary


@pytest.mark.parametrize(
    ("installed", "wanted", "status"),
    [
        ("0.0.42.1", "libtpu==0.0.42.*", OK),
        ("0.0.41", "libtpu==0.0.42.*", FAILED),
        ("0.0.421", "libtpu==0.0.42.*", FAILED),
        (None, "libtpu==0.0.42.*", SKIPPED),
        ("0.0.42.1", "libtpu>=0.0.42", SKIPPED),
    ],
)
def test_libtpu_belongs_to_jax(installed, wanted, status):
    assert machine.libtpu_match(installed, wanted).status == status
    assert topology.wanted_libtpu().startswith("libtpu==")


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ({"jax-cuda13-plugin": "0.10.2"}, OK),
        ({"jax-cuda13-plugin": "0.10.1"}, FAILED),
        ({"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"}, FAILED),
        ({}, SKIPPED),
    ],
)
def test_the_cuda_plugin_belongs_to_jaxlib(installed, status):
    assert machine.plugin_match(installed, "0.10.2").status == status


def test_memory():
    gib = 2**30
    assert machine.device_memory([60 * gib] * 8, 80).status == OK
    assert machine.device_memory([60 * gib, 20 * gib], 80).status == FAILED
    assert machine.device_memory([20 * gib], None).status == OK
    assert machine.device_memory([], 80).status == SKIPPED
    found = statuses(machine.memory([device("NVIDIA H100 80GB HBM3", "gpu", 70 * gib)]))
    assert found == {"memory/device": OK, "memory/host": OK}


def test_data_sheets():
    sheets = topology.CHIPS | topology.GPUS
    kinds = [kind for chip in sheets.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) and all(chip.kinds for chip in sheets.values())
    assert topology.of_devices([device()] * 8) == topology.Topology("v5e", (8,))
    assert topology.of_devices([device("TPU7x")] * 8).devices == 8
    h200 = topology.of_devices([device("NVIDIA H200", "gpu")])
    assert h200.chip.flops == 989e12 and h200.hbm == 141
    # A part of a GPU is none of the data sheet's.
    assert topology.of_devices([device("NVIDIA H200 MIG 1g.18gb", "gpu")]) is None
    assert topology.of_devices(jax.devices()) is None


def test_traffic_of_library_calls():
    """XLA:GPU multiplies matrices by calls of cuBLAS, whose second result is scratch memory."""
    text = (
        "ENTRY %main (a: bf16[8,64], b: bf16[64,32]) -> bf16[8,32] {\n"
        "  %a = bf16[8,64]{1,0} parameter(0)\n"
        "  %b = bf16[64,32]{1,0} parameter(1)\n"
        "  %call = (bf16[8,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$gemm"\n'
        "  ROOT %out = bf16[8,32]{1,0} get-tuple-element(%call), index=0\n"
        "}\n"
    )
    assert hlo.traffic(text, 1)["hbm_bytes"] == 2 * (8 * 64 + 64 * 32 + 8 * 32)


# --- the file system ------------------------------------------------------------------------------


def files(tmp_path) -> dict[str, str]:
    found = statuses(run({"files": lambda: storage.semantics(str(tmp_path), 2**20)}))
    assert os.listdir(tmp_path) == []  # nothing is left
    return found


CHECKS = ("files/close", "files/list", "files/rename", "files/folder", "files/speed")


def test_a_file_system_that_works(tmp_path):
    assert files(tmp_path) == dict.fromkeys(CHECKS, OK)


def lies(monkeypatch, name, lie):
    monkeypatch.setattr(storage.os, name, lie(getattr(os, name)))


def copied_in_parts(real):
    def replace(source, target):
        content = open(source, "rb").read()
        with open(target, "wb") as file:
            file.write(content[:100])
            file.flush()
            time.sleep(0.01)
            file.write(content[100:])
        os.remove(source)

    return replace


def stale(real):
    listed = {}
    return lambda folder: listed.setdefault(folder, real(folder))


def without_content(real):
    def rename(source, target):
        os.mkdir(target)
        shutil.rmtree(source)

    return rename


def refuses(real):
    def fsync(file):
        raise OSError(95, "Operation not supported")

    return fsync


@pytest.mark.parametrize(
    ("name", "lie", "fails"),
    [
        ("replace", copied_in_parts, "files/rename"),
        ("replace", lambda real: lambda source, target: None, "files/rename"),
        ("listdir", stale, "files/list"),
        ("rename", without_content, "files/folder"),
    ],
)
def test_a_file_system_that_lies(tmp_path, monkeypatch, name, lie, fails):
    lies(monkeypatch, name, lie)
    found = statuses(run({"files": lambda: storage.semantics(str(tmp_path), 2**20)}))
    assert found[fails] == FAILED and found["files/close"] == OK and set(found) == {*CHECKS}


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    lies(monkeypatch, "fsync", refuses)
    (found,) = run({"files": lambda: storage.semantics(str(tmp_path), 2**20)})
    assert found.status == FAILED and "Operation not supported" in found.summary


def test_disk(tmp_path):
    (enough,) = storage.disk(str(tmp_path), 1)
    (full,) = storage.disk(str(tmp_path), 2**70)
    assert (enough.status, full.status) == (OK, FAILED) and "larger disk" in full.summary


# --- several processes ----------------------------------------------------------------------------


def test_the_workdir_is_one_for_all_processes(tmp_path):
    token = b"0123"
    for name, content in (("0", token), ("1", b"of an earlier run"), ("x.tmp", token)):
        (tmp_path / name).write_bytes(content)
    assert network.files_with(tmp_path, token) == [0]
    assert network.files_with(tmp_path / "gone", token) == []
    assert network.who_sees_whom(np.ones((3, 3), bool), "W").status == OK
    found = network.who_sees_whom(np.eye(2, dtype=bool), "W")
    assert found.status == FAILED
    assert "process 0 misses files of [1]; process 1 misses files of [0]" in found.summary


def test_one_process_has_no_network():
    assert {one.status for one in network.shared_workdir("W")} == {SKIPPED}
    assert network.gather("text") == ["text"]


# --- rates ----------------------------------------------------------------------------------------


def test_rates_against_the_data_sheet():
    promised = topology.Chip(1, flops=1e30, bandwidth=1.0, link=1, axes=1)
    found = statuses(rates.products(jax.devices()[:1], promised, 64, 0.0))
    assert found == {"matmul/exact": OK, "matmul/bfloat16": FAILED, "matmul/float32": OK}
    found = statuses(rates.bandwidth(jax.devices()[:1], promised, 2**12, 0.0))
    assert found == {"bandwidth": OK}
    assert rates.compare("x", 1e12, None, "TFLOP/s", 0.5).status == OK
    share = rates.LEAST_FLOPS
    assert rates.compare("x", share * 9e12, 9e12, "TFLOP/s", share).status == OK
    below = rates.compare("x", 0.99 * share * 9e12, 9e12, "TFLOP/s", share)
    assert below.status == FAILED and "of 9, at least 50% expected" in below.summary


def test_products_that_are_wrong(monkeypatch):
    monkeypatch.setattr(
        rates.jnp, "matmul", lambda a, b, preferred_element_type: (a @ b).astype(jnp.float32) + 1
    )
    found = rates.exact_product(jax.devices()[0], 32)
    assert found.status == FAILED and "256 of 256 sums" in found.summary


# --- attention ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    config = sizes.default_config("cpu")
    model = dataclasses.replace(tiny.MODEL, attention="dense")
    batch = random_arrays.contexts(config, 0, 1)
    return attention_check.case("teacher", batch.teacher, 8, model)


def test_contexts_fill_their_bucket():
    config = sizes.default_config("cpu")
    batch = random_arrays.contexts(config, 0, 2)
    assert batch.student.tokens.shape == (2, 96) and batch.teacher.tokens.shape == (2, 192)
    assert 88 <= batch.student.length[0] < 96 and 180 <= batch.teacher.length[0] < 192
    assert batch.student.patch_image.max() == 1 and batch.teacher.patch_image.max() == 2
    config.model.llm.update(mrope=(4, 2, 2))  # a tower of Qwen: 4 patches are a token
    config.model.vit.update(kind="qwen3_vl", merge=2)
    batch = random_arrays.contexts(config, 0, 2)
    assert batch.teacher.rope_positions.shape == (2, 192, 3)
    assert 88 <= batch.student.length[0] < 96 and (batch.student.patch_image[0] > 0).sum() == 64


def test_kernels(case):
    """A kernel that ignores the mask, one that raises, and one that is right."""

    def blind(q, k, v, mask, query_block, kind):
        return attention.attend(q, k, v, jnp.ones_like(mask), query_block, kind)

    def broken(*arguments, **named):
        raise NotImplementedError("Mosaic failed to compile\nmore")

    found = {}
    for name, attend in (("right", attention.attend), ("blind", blind), ("broken", broken)):
        (found[name],) = kernels.checks([case], ("dense",), 0, FOR_EVER, attend)
    assert {one.status for one in found.values()} == {OK, FAILED}
    assert found["right"].status == OK
    assert max(found["right"].values["errors"].values()) < attention_check.TOLERANCE / 2
    assert "config.model.attention='dense'" in found["blind"].summary
    assert found["broken"].summary == "NotImplementedError: Mosaic failed to compile"


def test_the_kernel_that_auto_takes():
    def named(kind, case, status=OK):
        return Result(f"attention/{kind}/{case}", status, "")

    right = [named("dense", "student"), named("flash", "student"), named("flash", "vision tower")]
    assert kernels.taken(right, "flash") == "flash"
    assert kernels.taken([*right, named("flash", "teacher", FAILED)], "flash") == "dense"
    assert kernels.taken(right[:1], "flash") == kernels.taken(right, "") == "dense"


def test_errors_of_a_kernel():
    wanted = np.zeros((1, 3, 4), np.float32)
    wanted[0, :2] = 1.0
    real = np.array([[True, True, False]])
    found = wanted.copy()
    found[0, 2] = np.nan  # padding
    assert attention_check.relative_error(found, wanted, real) == 0
    found[0, 1] *= 1.1
    assert attention_check.relative_error(found, wanted, real) == pytest.approx(0.1)
    found[0, 0] = np.nan
    assert not attention_check.relative_error(found, wanted, real) <= 1e9


# --- speed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "layers"), [(None, 28), (1000, 28), (380, 28), (379, 27), (135, 3), (110, 1), (9, 0)]
)
def test_layers_that_fit(memory, layers):
    """A model of 100 bytes and 10 a layer."""
    assert speed.layers_that_fit(lambda n: 100 + 10 * n, 28, memory, 1.0) == layers


def test_extrapolation_to_all_layers():
    found = speed.extrapolate(0.5 + 4 * 0.25, 4, 0.5 + 2 * 0.25, 2, 28)
    assert found == {"seconds_per_layer": 0.25, "seconds_of_all_layers": 0.5 + 28 * 0.25}


def measured(layers, left=1e9, finite=True):
    config = sizes.default_config("gpu")
    limits = Limits(time.monotonic() + left, 0.0)
    model = {"overlapped": 0.5, "serial": 0.75}
    return speed._measured(
        "decode",
        config,
        layers,
        lambda n: speed.Timing(0.1 + n * 0.25, model, finite, 1.0),
        limits,
    )


def test_fewer_layers_are_extrapolated():
    whole, part = measured(28), measured(4)
    assert whole.status == OK and "seconds_per_layer" not in whole.values
    assert "28 of 28 layers: 7.1 s (plan models 0.5 to 0.75)" in whole.summary
    assert part.values["seconds_of_all_layers"] == pytest.approx(7.1)
    assert (part.values["fewer_layers"], part.values["layers_of_the_model"]) == (2, 28)
    assert "not extrapolated" in measured(1).summary
    assert "not extrapolated" in measured(4, left=0).summary
    assert measured(4, finite=False).status == FAILED
    with pytest.raises(SkipError, match="not one layer"):
        measured(0)


def test_the_update_falls_back_to_adapters(monkeypatch):
    """Where not even two layers of the whole state fit."""
    taken = []

    def timing(config, setting):
        taken.append((config.model.llm.num_layers, config.lora.rank))
        return speed.Timing(1.0, None, True, 0.0)

    monkeypatch.setattr(speed, "_update", timing)
    config = sizes.default_config("cpu")
    config.model.llm.num_layers = 4
    setting = speed.Setting(config, jax.devices()[:1], None, 8, (16, 16), 2, FOR_EVER)
    (found,) = speed.update(setting)
    assert taken == [(4, 0)] and "4 of 4" in found.summary
    fit = iter([1, 3])
    monkeypatch.setattr(speed, "layers_that_fit", lambda *_: next(fit))
    (found,) = speed.update(setting)
    assert "adapters of rank 64 only, 3 of 4" in found.summary and taken[1:] == [(3, 64), (1, 64)]
