"""The budget of a whole run: its arithmetic by hand, and its bytes against a real checkpoint."""

import dataclasses
import os
import re
import types

import jax
import pytest

import small_run
import tiny
from opsd_jax import config as config_lib
from opsd_jax import optimizer
from opsd_jax import params as params_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.diagnose import selection
from opsd_jax.plan import bill, budget, programs, table, topology
from opsd_jax.run import controls, saves
from opsd_jax.run import state as state_lib
from opsd_jax.runtime import checkpoint

WARMUP = budget.StageOfRun("warmup", 100, 1, 10 * 10**9, (3.0, 5.0))
OPSD = budget.StageOfRun("opsd", 1000, 3, 40 * 10**9, (7.2, 10.8))
UNKNOWN = budget.StageOfRun("autoencoder", 50, 1, 10**9, None, "not known")


def test_hours_and_dollars_by_hand():
    found = budget.budget([WARMUP, OPSD], chips=8, hosts=2, write_speed=0.5, price=4.0)
    warmup, opsd = found["stages"]
    # two hosts write 1 GB a second together
    assert warmup["save_seconds"] == pytest.approx(10) and opsd["save_seconds"] == pytest.approx(40)
    assert warmup["hours"] == pytest.approx((310 / 3600, 510 / 3600))
    assert opsd["hours"] == pytest.approx((7320 / 3600, 10920 / 3600))
    assert found["hours"] == pytest.approx((7630 / 3600, 11430 / 3600))
    assert found["chip_hours"] == pytest.approx((7630 / 450, 11430 / 450))
    assert found["dollars"] == pytest.approx((4 * 7630 / 450, 4 * 11430 / 450))


def test_the_start_is_saved_in_less_time():
    """10 GB of weights, then 40 GB twice, at 1 GB a second."""
    stage = dataclasses.replace(OPSD, start_bytes=10 * 10**9)
    found = budget.budget([stage], chips=8, hosts=2, write_speed=0.5, price=None)
    assert found["hours"] == pytest.approx((7290 / 3600, 10890 / 3600))


def test_what_is_not_modelled_is_not_in_the_sum():
    found = budget.budget([UNKNOWN, OPSD], chips=1, hosts=1, write_speed=1, price=None)
    assert found["stages"][0]["hours"] is None and found["stages"][0]["save_seconds"] == 1
    assert found["hours"] == found["stages"][1]["hours"] == found["chip_hours"]
    assert found["dollars"] is None
    none = budget.budget([UNKNOWN], chips=1, hosts=1, write_speed=1, price=4.0)
    assert none["hours"] is None and none["chip_hours"] is None and none["dollars"] is None


@pytest.mark.parametrize(
    "steps, keep_latest, count, size",
    [
        # 0 and 30 are never deleted. While 20 is written, 0 and 10 are there; while 30 is, 0 and
        # 20; at the end 0 and 30
        ([0, 10, 20, 30], 1, 3, 3),
        ([0, 10, 20, 30], 2, 4, 4),  # 0, 10, 20 and the new one
        ([0, 10, 20, 25, 30], 2, 4, 4),  # 10 is gone by the time of 30
        ([0, 10, 20, 25, 30], 9, 5, 5),
        ([30], 2, 1, 1),
    ],
)
def test_checkpoints_at_once(steps, keep_latest, count, size):
    saved = [(step, 7) for step in steps]
    assert budget.most_at_once(saved, keep_latest, (0, 30)) == (count, 7 * size)


def test_checkpoints_of_stages_differ_in_size():
    saved = [(1, 1), (2, 1), (3, 1), (4, 100), (5, 1)]
    assert budget.most_at_once(saved, 2, ()) == (3, 102)


def test_the_table_says_it():
    found = budget.budget([UNKNOWN, OPSD], chips=8, hosts=2, write_speed=0.5, price=4.2)
    run = found | {"checkpoints": 3, "checkpoints_bytes": 120 * 10**9}
    report = {
        "topology": "v5p:2x2x2",
        "slices": 1,
        "chips": 8,
        "devices": 8,
        "hbm_gib": 95.74,
        "mesh": {},
        "parameters": {},
        "programs": [],
        "run": run,
    }
    *_, title, unknown, opsd, kept, total, assumed = table.table(report).splitlines()
    assert title == "the whole run, on 8 chips of 2 hosts"
    assert unknown.split() == "autoencoder 50 steps, 1 save of 1.0 GB: not known".split()
    assert opsd.split(maxsplit=1) == [
        "opsd",
        "1,000 steps of 7.200 to 10.800 s, 3 saves of 40.0 GB in 40.0 s: 2.03 to 3.03 hours",
    ]
    assert kept.split(maxsplit=1) == ["checkpoints", "up to 3 at once, 120.0 GB"]
    assert total == (
        "  sum without autoencoder 2.03 to 3.03 hours, 16.3 to 24.3 chip-hours, "
        "68.32 to 101.92 dollars at 4.2 a chip-hour"
    )
    assert "at 0.5 GB/s; without start-up, compilation" in assumed
    start = dataclasses.replace(OPSD, start_bytes=8 * 10**9)
    report["run"] = run | budget.budget([start], chips=8, hosts=2, write_speed=0.5, price=None)
    assert "s, 2 saves of 40.0 GB in 40.0 s and one of 8.0 GB: 2.02" in table.table(report)
    report["run"] = run | {"hours": None, "chip_hours": None, "dollars": None}
    assert table.table(report).splitlines()[-1] == kept  # no sum, and nothing assumed for it


# --- of settings ----------------------------------------------------------------------------------


def test_saves_of_a_run():
    """Every 500 steps, at the start if it is compared with, and at the end of each stage."""
    config = config_lib.default()
    config.eval.every, config.checkpoint.every = 0, 500
    assert saves.of_run(config) == [(0, "opsd"), (500, "opsd"), (1000, "opsd")]
    assert saves.never_deleted(config) == (0, 1000)
    config.stages, config.warmup.steps, config.opsd.steps = ("warmup", "opsd"), 350, 400
    assert saves.of_run(config) == [(350, "warmup"), (500, "opsd"), (750, "opsd")]
    assert saves.never_deleted(config) == (0, 350, 750)
    config.eval.every = 175  # what is evaluated is saved; the last step has the final evaluation
    assert [step for step, _ in saves.of_run(config)] == [175, 350, 500, 525, 700, 750]


def test_the_start_is_saved_where_something_measures_against_it(tmp_path):
    config = config_lib.default()
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "source.json").touch()  # an imported model
    config.init_from = str(tmp_path)
    assert saves.of_run(config)[0] == (0, "opsd")
    config.eval.kl = False
    assert saves.of_run(config)[0] == (100, "opsd")
    config.init_from = ""  # random weights, or those of another run, may not come again
    assert saves.of_run(config)[0] == (0, "opsd")


def test_where_a_stage_starts(tmp_path):
    config, workdir = config_lib.default(), str(tmp_path / "w")
    config.eval.kl, config.init_from = False, str(tmp_path)
    saved = str(tmp_path / "w" / "checkpoints" / "0")
    assert saves.origin(config, workdir, "opsd") == saved  # init_from is no model
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "source.json").touch()
    assert saves.origin(config, workdir, "opsd") == str(tmp_path)
    config.arms.noise = {"teacher": {"visual_thoughts": "noise"}}
    workdir_lib.write_record(workdir, config_lib.to_json(config))
    arm, folder = controls.settings_of(config, workdir, "noise")
    assert (arm.init_from, folder) == (str(tmp_path), str(tmp_path / "w" / "arms" / "noise"))
    with pytest.raises(ValueError, match=r"has no checkpoint 0: with config.eval.kl=False a run"):
        selection.start_checkpoint(workdir)
    os.makedirs(saved)  # as older runs have it
    assert saves.origin(config, workdir, "opsd") == saved
    assert controls.settings_of(config, workdir, "noise")[0].init_from == saved
    assert selection.start_checkpoint(workdir) == saved
    config.stages = ("warmup", "opsd")
    assert saves.origin(config, workdir, "opsd").endswith("checkpoints/3000")


@pytest.mark.parametrize(
    "teacher, offered, kind",
    [
        ("ema", "ema", "adamw"),
        ("ema", "student", "adamw"),
        ("self", "ema", "adamw"),
        ("self", "ema", "muon"),
    ],
)
def test_bytes_are_those_of_a_real_checkpoint(tmp_path, teacher, offered, kind):
    """What the training loop saves of the tiny model, by the metadata on disk."""
    config = small_run.config(
        teacher__kind=teacher, checkpoint__params=offered, opsd__optim__kind=kind
    )
    method = config_lib.stage_config(config, "opsd", tiny.TOKENIZER)
    run = types.SimpleNamespace(config=config, record=config_lib.to_json(config), digests={})
    stage = types.SimpleNamespace(name="opsd", config=method)
    params = tiny.params(config_lib.model(config))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        state = optimizer.init_state(params, method)
        state_lib.save(run, stage, checkpoints, 0, state)
        state_lib.save(run, stage, checkpoints, 1, state, weights_only=True)
    ((name, start),) = checkpoint.contents(tmp_path / "1").items()
    on_disk = sum(array.size * array.dtype.itemsize for array in start.values())
    assert name == "params" and programs.start_bytes(config) == on_disk
    items = checkpoint.contents(tmp_path / "0")
    arrays = [array for item in items.values() for array in item.values()]
    on_disk = sum(array.size * array.dtype.itemsize for array in arrays)
    assert {*items} == {"params", "state"} and programs.checkpoint_bytes(config, "opsd") == on_disk
    # by hand: weights twice; two moments and the EMA of all but the position tables; two counters
    size = sum(x.size for x in jax.tree.leaves(params))
    trained = size - config.model.vit.side**2 * config.model.llm.hidden_size
    copies = (3 if teacher == "ema" else 2) * trained + 2
    if kind == "muon":  # one moment of each matrix; the iteration's three numbers, its count
        matrices = [x for path, x in params_lib.flatten(params).items() if path.endswith("_kernel")]
        copies += 4 - sum(x.size for x in matrices)
    assert on_disk == 4 * (2 * size + copies)


def _bills(**seconds):
    return [
        {"stage": "opsd", "program": name, "fits": True, "seconds": found}
        for name, found in seconds.items()
    ]


SAMPLE, UPDATE = {"overlapped": 1.0, "serial": 1.5}, {"overlapped": 2.0, "serial": 4.0}


@pytest.mark.parametrize(
    "bills, seconds, why",
    [
        (_bills(sample=SAMPLE, update=UPDATE), (3.0, 5.5), ""),
        (_bills(update=UPDATE), None, "leave out --only=update"),
        (_bills(sample=None, update=None), None, "no time is modelled for a CPU"),
        ([], None, "not planned, --stage=warmup,opsd does"),
        (
            [
                one | {"fits": False, "seconds": None}
                for one in _bills(sample=SAMPLE, update=UPDATE)
            ],
            None,
            "it does not fit",
        ),
    ],
)
def test_a_step_is_the_sum_of_its_programs(bills, seconds, why):
    config = small_run.config()
    slice_of_eight = topology.parse_topology("v5p-16")
    found = bill.budget_of_run(config, bills, slice_of_eight, hosts=2, write_speed=1.0, price=None)
    warmup, opsd = found["stages"]
    assert (opsd["step_seconds"], opsd["not_modelled"]) == (seconds, why)
    assert warmup["step_seconds"] is None and "--stage=warmup,opsd" in warmup["not_modelled"]
    assert (warmup["steps"], opsd["steps"]) == (small_run.WARMUP, small_run.OPSD)
    # one save a step, all are kept
    assert (warmup["saves"], opsd["saves"]) == (small_run.WARMUP, small_run.OPSD)
    assert found["checkpoints"] == small_run.LAST
    assert found["checkpoints_bytes"] == (
        small_run.WARMUP * warmup["checkpoint_bytes"] + small_run.OPSD * opsd["checkpoint_bytes"]
    )


def test_the_checkpoint_of_the_start_has_the_weights_alone():
    config = small_run.config(stages=("opsd",))
    found = bill.budget_of_run(
        config, [], topology.parse_topology("v5p-16"), hosts=2, write_speed=1.0, price=None
    )
    (opsd,) = found["stages"]
    weights = 4 * sum(x.size for x in jax.tree.leaves(tiny.params(config_lib.model(config))))
    assert opsd["start_bytes"] == weights and opsd["saves"] == 1 + small_run.OPSD
    # all are kept
    assert found["checkpoints_bytes"] == weights + small_run.OPSD * opsd["checkpoint_bytes"]
    of_two = bill.budget_of_run(
        small_run.config(), [], topology.parse_topology("v5p-16"), 2, 1.0, None
    )
    assert [stage["start_bytes"] for stage in of_two["stages"]] == [0, 0]


def test_a_stage_that_plan_does_not_know_has_bytes_but_no_hours():
    config = small_run.config(
        stages=("autoencoder", "opsd"),
        autoencoder__steps=3,
        model__generation__on=True,
        model__generation__channels=32,
        model__generation__multipliers=(1, 1, 1),
        model__generation__num_res_blocks=1,
    )
    found = bill.budget_of_run(
        config, [], topology.parse_topology("v5p-16"), hosts=2, write_speed=1.0, price=None
    )
    autoencoder, opsd = found["stages"]
    assert autoencoder["not_modelled"] == "plan does not know its programs"
    assert opsd["not_modelled"] == "not planned, --stage=opsd does"
    assert 0 < autoencoder["checkpoint_bytes"] != opsd["checkpoint_bytes"] > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"price": 0.0}, "--price_per_chip_hour is 0.0: give a number in (0, inf)"),
        ({"price": -4.2}, "--price_per_chip_hour is -4.2"),
        ({"price": float("nan")}, "--price_per_chip_hour is nan"),
        ({"price": 4.2, "slice": "cpu:8"}, "no time is modelled for a CPU"),
        ({"price": 4.2, "only": "update"}, "leave --only out"),
        ({"price": 4.2, "stage": "sft"}, "the run has the stages ('warmup', 'opsd')"),
        ({"write_speed": 0.0}, "--write_speed is 0.0: give a number in (0, inf)"),
        ({"stage": "opsd,opsd"}, "--stage names opsd twice"),
        ({"stage": "opsd,nothing"}, "--stage names 'nothing': choose from"),
    ],
)
def test_what_has_no_price_is_refused_before_anything_is_compiled(arguments, says, monkeypatch):
    monkeypatch.setattr(topology, "devices_of", None)
    arguments = {"slice": "v5p-16"} | arguments
    slice_of_eight = topology.parse_topology(arguments.pop("slice"))
    with pytest.raises(ValueError, match=re.escape(says)):
        bill.plan(small_run.config(), slice_of_eight, bill.Options(**arguments))
