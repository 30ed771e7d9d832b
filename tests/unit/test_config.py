"""Defaults of all settings, and the checks of a configuration.

Settings that no run can have are refused before anything is made, with key, value and what is
allowed: numbers out of range, values of another type, names given twice, shapes, values that
contradict each other.
"""

import contextlib
import functools
import json
import math
import operator
import os
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import small_run
from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import (
    config_check,
    config_flags,
    convert,
    distill,
    eval,
    generate,
    optimizer,
    params,
    redraw,
    train,
)
from opsd_jax.data import __main__ as data
from opsd_jax.diagnose import __main__ as diagnose
from opsd_jax.inputs import checks
from opsd_jax.plan import bill, topology


def refused(message: str, **changes) -> None:
    """`config_check.check` raises ValueError with this text; "__" in a key is a dot."""
    with pytest.raises(ValueError) as error:
        config_check.check(small_run.config(**changes))
    assert message in str(error.value)


def with_value(key: str, value):
    """The small configuration with one value of any type, also where ConfigDict would refuse it."""
    config = SMALL.copy_and_resolve_references()
    *groups, name = key.split(".")
    group = config
    for part in groups:
        group = group[part]
    with group.ignore_type():
        group[name] = value
    return config


SMALL = small_run.config()
NUMBERS = {
    key: usual
    for key, usual in config_lib.default_values().items()
    if isinstance(usual, (int, float)) and not isinstance(usual, bool)
}


# --- defaults ------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_recorded_copy():
    """default_config.json has all defaults: a dataclass must not change one by accident."""
    recorded = json.loads(pathlib.Path(__file__).with_name("default_config.json").read_text())
    found = config_lib.to_json(config_lib.default())
    assert json.dumps(found, sort_keys=True, indent=1) == json.dumps(
        recorded, sort_keys=True, indent=1
    )


def test_choices_hold_their_defaults():
    settings = config_lib.settings()
    chosen = {key: s for key, s in settings.items() if s.rule and s.rule.kind is str}
    assert len(chosen) >= 30
    for key, setting in chosen.items():
        setting.rule.check(key, setting.default)
    assert settings["warmup.freeze"].rule.allowed == params.GROUPS
    assert settings["teacher.visual_thoughts"].rule.allowed == blocks_lib.VISUAL_THOUGHTS


# --- numbers -------------------------------------------------------------------------------------


def test_every_number_has_a_range_that_holds_its_default():
    assert [key for key in NUMBERS if key not in config_lib.ranges()] == []
    for key, usual in NUMBERS.items():
        checks.number(key, usual, type(usual), config_lib.ranges()[key])


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_is_a_flag_a_text_nothing_or_infinite(key):
    own = (
        [True, 1.5] if isinstance(NUMBERS[key], int) else []
    )  # ConfigDict converts True to 1.0 for a float
    for wrong in ("1", None, math.nan, math.inf, -math.inf, (1,), *own):
        with pytest.raises(ValueError) as error:
            config_check.check(with_value(key, wrong))
        assert f"config.{key} is {wrong!r}: give a " in str(error.value)


@pytest.mark.parametrize(
    "key, wrong",
    [
        ("seed", -1),
        ("seed", 2**32),
        ("opsd.optim.lr", -1e-5),
        ("opsd.optim.lr", 1e3),
        ("warmup.optim.min_lr", -1.0),
        ("opsd.optim.max_grad_norm", -1.0),
        ("opsd.optim.max_grad_norm", 1e39),
        ("sft.optim.weight_decay", -0.01),
        ("opsd.optim.b1", 1.0),
        ("opsd.optim.b2", -0.1),
        ("opsd.optim.b2", 1.0),
        ("opsd.optim.eps", 0.0),
        ("opsd.optim.eps", 1e-50),
        ("opsd.optim.warmup_steps", -1),
        ("teacher.ema_decay", 1.001),
        ("teacher.ema_decay", -0.1),
        ("opsd.jsd_weight", -1.0),
        ("opsd.ce_weight", -1.0),
        ("warmup.mse_weight", -1.0),
        ("offline.weight", -0.5),
        ("autoencoder.kl_weight", -1.0),
        ("rollout.temperature", 1e-40),
        ("rollout.temperature", 0.0),
        ("offline.temperature", 1e-40),
        ("divergence.temperature", 1e9),
        ("divergence.beta", 1.5),
        ("divergence.clip", -0.1),
        ("divergence.top_k", -1),
        ("divergence.chunk", 0),
        ("rollout.max_new_tokens", 1),
        ("rollout.top_p", 0.0),
        ("rollout.max_image_skips", -1),
        ("rollout.empty_retries", -1),
        ("opsd.steps", 0),
        ("opsd.batch_size", 0),
        ("opsd.accumulation", 0),
        ("opsd.max_forward_tokens", 0),
        ("warmup.mix.text", -1),
        ("data.make.train", -1),
        ("data.make.seed", -1),
        ("data.threads", 0),
        ("data.prefetch", -1),
        ("eval.rows", -1),
        ("eval.batch_size", 0),
        ("eval.max_new_tokens", 1),
        ("checkpoint.keep_latest", 0),
        ("checkpoint.every", 0),
        ("log.every", 0),
        ("health.patience", 0),
        ("health.min_eos_rate", -0.5),
        ("health.teacher_floor", 2.0),
        ("mesh.fsdp", 0),
        ("mesh.tensor", -2),
        ("model.llm.num_layers", 0),
        ("model.llm.num_kv_heads", 0),
        ("model.llm.rope_theta", 0.0),
        ("model.vit.patch_size", 0),
        ("model.unroll", 0),
        ("model.query_block", -1),
        ("lora.rank", -1),
        ("lora.alpha", 0.0),
        ("images.max_size", 0),
        ("drawing.num_timesteps", 1),
        ("drawing.timestep_shift", 0.0),
        ("model.generation.timestep_shift", -1.0),
    ],
)
def test_numbers_out_of_their_range(key, wrong):
    with pytest.raises(ValueError) as error:
        config_check.check(with_value(key, wrong))
    allowed = config_lib.ranges()[key]
    assert f"config.{key} is {wrong!r}: give a " in str(error.value) and str(error.value).endswith(
        f"number in {allowed}"
    )


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        ("[0, 1)", [0, 0.5, np.float32(0.25)], [1, -1e-9, math.nan]),
        ("(0, inf)", [1e-300, 3e38], [0.0, math.inf, 1e39]),
        ("[2, inf), or 0", [0, 2, np.int64(7)], [1, -1]),
        ("[1, inf), or -1; why", [-1, 1], [0, -2]),
    ],
)
def test_ranges_are_read_as_written(allowed, inside, outside):
    for value in inside:
        checks.number("x", value, float, allowed)
    for value in outside:
        with pytest.raises(ValueError, match="x is .*: give a number in"):
            checks.number("x", value, float, allowed)


def test_the_rate_never_rises_past_its_end():
    optim = distill.OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, total_steps=10)
    rates = [float(optimizer.learning_rate(step, optim)) for step in range(2, 30)]
    assert rates == sorted(rates, reverse=True) and rates[8:] == pytest.approx([1e-4] * 20)


# --- keys and types ------------------------------------------------------------------------------


def set_unknown(key):
    def change(config):
        with config.unlocked():
            *groups, name = key.split(".")
            for part in groups:
                config = config[part]
            config[name] = "x"

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            set_unknown("rollot"),
            "config.rollot: there is no setting 'rollot' in config. Did you mean \"rollout\"?",
        ),
        (
            set_unknown("teacher.knd"),
            "config.teacher.knd: there is no setting 'knd' in config.teacher. "
            'Did you mean "kind"?',
        ),
        (
            set_unknown("opsd.optim.xyzzy"),
            "there is no setting 'xyzzy' in config.opsd.optim. All of them are in",
        ),
        (
            lambda c: setattr(c, "teacher", ConfigDict({"kind": "ema"})),
            "config.teacher lacks blocks, contrast, contrast_with, ema_decay, snapshot_every, "
            "visual_thoughts: change values of config.default() one by one",
        ),
        (
            lambda c: c.arms.update(noise={"teacher": {"visul_thoughts": "noise"}}),
            "config.arms.noise.teacher.visul_thoughts: there is no setting 'visul_thoughts' in "
            'config.teacher. Did you mean "visua',
        ),
        (
            lambda c: c.arms.update(long={"opsd": {"steps": "many"}}),
            "config.arms.long.opsd.steps is 'many': give a whole number",
        ),
        (
            lambda c: c.arms.update(cold={"rollout": {"temperature": 0.0}}),
            "config.arms.cold.rollout.temperature is 0.0: give",
        ),
        (
            lambda c: c.arms.update(flat={"opsd": 3}),
            "config.arms.flat.opsd is 3, but it is a group of settings",
        ),
    ],
    ids=range(8),
)
def test_keys_that_are_not_settings(change, message, tmp_path):
    config = small_run.config()
    change(config)
    with pytest.raises(ValueError) as error:
        train.train(config, str(tmp_path / "w"))
    assert message in str(error.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "key, wrong, message",
    [
        ("rollout.greedy", 1, "give True or False"),
        ("log.tensorboard", "yes", "give True or False"),
        ("teacher.kind", None, "give a text"),
        ("data.dir", 3, "give a text"),
        ("stages", "opsd", "give a tuple, ('opsd',)"),
        ("run_arms", "noise,swap", "give a tuple, ('noise', 'swap')"),
        ("data.tasks", 3, "give a tuple, such as"),
        ("run_arms", None, "give a tuple, such as ()"),
        ("stages", (1,), "give names, each in quotes"),
        ("teacher", "ema", "but it is a group of settings: set one of "),
        ("model.llm", 7, "but it is a group of settings"),
    ],
)
def test_values_of_another_type(key, wrong, message):
    with pytest.raises(ValueError) as error:
        config_check.check(with_value(key, wrong))
    assert f"config.{key} is {wrong!r}" in str(error.value) and message in str(error.value)


def test_a_list_for_a_tuple_and_a_whole_number_for_a_float_are_right():
    config = small_run.config(opsd__optim__weight_decay=0, stages=["warmup", "opsd"])
    config.data.buckets.student = [list(sizes) for sizes in config.data.buckets.student]
    config_check.check(config)


@pytest.mark.parametrize("config", [None, {}, "x", 3])
def test_something_else_than_a_config(config, tmp_path):
    with pytest.raises(
        ValueError, match="get_config.. returns the ConfigDict of opsd_jax.config.default"
    ):
        train.train(config, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


# --- names and shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, names",
    [
        ("stages", ("warmup", "opsd", "warmup")),
        ("data__tasks", ("Chart_Refocus",) * 2),
        ("run_arms", ("noise", "noise")),
        ("data__make__families", ("chart", "maze", "chart")),
        ("eval__visual_thoughts", ("none", "none")),
        ("eval__final_visual_thoughts", ("none", "real", "real")),
        ("opsd__freeze", ("vit", "vit")),
    ],
)
def test_names_given_twice(key, names):
    refused(
        f"config.{key.replace('__', '.')} names {names[-1]} twice: give each once", **{key: names}
    )


@pytest.mark.parametrize(
    "key, wrong, unit",
    [
        ("student", (36, 25), "(positions, patches)"),
        ("student", ((36,),), "(positions, patches)"),
        ("teacher", ((36, 25, 1),), "(positions, patches)"),
        ("trace", ((36, 25),), "(positions, patches, targets)"),
        ("trace", ((36, 25, 0),), "(positions, patches, targets)"),
        ("student", ((36, -1),), "(positions, patches)"),
        ("student", ((36.5, 25),), "(positions, patches)"),
        ("student", (("36", "25"),), "(positions, patches)"),
        ("drawn", ((1, 2),), "(latent tokens, images, height, width)"),
    ],
)
def test_buckets_of_another_shape(key, wrong, unit):
    refused(
        f"config.data.buckets.{key} is {wrong}: give a tuple that holds one {unit} for each bucket",
        **{f"data__buckets__{key}": wrong},
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"opsd__optim__min_lr": 0.1},
            "config.opsd.optim.min_lr is 0.1, above config.opsd.optim.lr 0.003",
        ),
        (
            {"opsd__optim__warmup_steps": 5},
            "config.opsd.optim.warmup_steps is 5, but the stage has 4 steps",
        ),
        (
            {"warmup__mix": {"interleaved": 0, "reference": 0, "text": 0, "drawn": 0}},
            "give at least one layout a share above 0",
        ),
        (
            {"data__weights": (0.0,)},
            "config.data.weights is (0.0,): give at least one task a share above 0",
        ),
        (
            {"data__weights": (1.0, 2.0)},
            "config.data.weights needs one number for each of config.data.tasks",
        ),
        ({"data__weights": (-1.0,)}, "config.data.weights[0] is -1.0: give a number in [0, inf)"),
        ({"data__limits": (-5,)}, "config.data.limits[0] is -5: give a whole number in [0, inf)"),
        (
            {"data__make__train": 0},
            "config.data.make.train is 0, but config.stages needs that split",
        ),
        (
            {"data__make__test": 0},
            "config.data.make.test is 0, but config.eval.final_split needs that split",
        ),
        (
            {"data__make__validation": 0, "eval__every": 2},
            "config.data.make.validation is 0, but config.eval.every needs",
        ),
        (
            {"data__make__families": ("chess",)},
            "config.data.make.families names 'chess': choose from maze, ",
        ),
        (
            {"data__make__difficulty": "odd"},
            "config.data.make.difficulty is 'odd': choose from easy, ",
        ),
        (
            {"images__transparency": "black"},
            "config.images.transparency is 'black': use 'drop' or 'white'",
        ),
        ({"eval__final_visual_thoughts": ()}, "config.eval.final_visual_thoughts is empty"),
        ({"eval__visual_thoughts": (), "eval__every": 2}, "config.eval.visual_thoughts is empty"),
        ({"opsd__freeze": ("embed", "und", "vit", "connector")}, "nothing is left to train"),
        (
            {"opsd__completions": 3},
            "config.opsd.batch_size 8 is not divisible by config.opsd.completions 3",
        ),
        (
            {"opsd__completions": 2, "rollout__greedy": True},
            "gives a question the same completion each time",
        ),
        (
            {"teacher__kind": "snapshot", "teacher__snapshot_every": 4},
            "config.teacher.snapshot_every is 4, but the stage has 4 steps",
        ),
        (
            {
                "teacher__contrast": 1.0,
                "teacher__contrast_with": "swap",
                "teacher__visual_thoughts": "swap",
            },
            "config.teacher.contrast_with is 'swap' with config.teacher.visual_thoughts 'swap'",
        ),
        (
            {
                "opsd__token_weights": "advantage",
                "teacher__blocks": ("system", "image", "question", "transition"),
            },
            "config.opsd.token_weights compares the teacher with itself",
        ),
        (
            {"divergence__support": "union", "divergence__top_k": 0},
            "config.divergence.support is 'union', but with",
        ),
        ({"opsd__freeze": ("wit",)}, "config.opsd.freeze names 'wit': choose from"),
        ({"mesh__data": -1}, "only one size can be -1"),
        *(
            (
                {"log__profile_steps": steps},
                f"config.log.profile_steps is {steps}: give the first and the last step to trace",
            )
            for steps in ((3,), (1, 2, 3), (3, 2))
        ),
        (
            {"log__profile_steps": (0, 2)},
            "config.log.profile_steps[0] is 0: give a whole number in [1, inf)",
        ),
        (
            {"log__profile_steps": (5, 7)},  # 2 of the warm-up and 4
            "config.log.profile_steps is (5, 7), but the run has 6 steps: give steps up to 6",
        ),
        ({"log__wandb": "p"}, "but wandb is not installed: pip install"),
        (
            {"model__llm__num_heads": 3},
            "config.model.llm.hidden_size 32 is not divisible by num_heads 3",
        ),
        (
            {"model__vit__num_heads": 3},
            "config.model.vit.hidden_size 16 is not divisible by its num_heads 3",
        ),
        ({"model__llm__head_dim": 7}, "head_dim 7 is odd"),
        ({"model__dtype": "float16"}, "config.model.dtype is 'float16'"),
        ({"teacher__kind": "emma"}, "config.teacher.kind is 'emma'"),
        (
            {"opsd__optim__schedule": "linear"},
            "config.opsd.optim.schedule is 'linear': use 'cosine' or 'constant'",
        ),
        (
            {"stages": ("autoencoder",), "autoencoder__optim__kind": "muon"},
            "config.autoencoder.optim.kind is 'muon', which moves no parameter",
        ),
        ({"rollout__refill": 3}, "config.rollout.slots 0 must be a multiple of the 1 batch shards"),
        ({"divergence__kind": "kl"}, "config.divergence.kind is 'kl'"),
        (
            {"data__trace_limits": (3, 4)},
            "config.data.trace_limits needs one number for each of config.data.tasks",
        ),
        (
            {"data__trace_limits": (3,), "opsd__reference_share": 0.5},
            "config.opsd.reference_share is 0.5 with config.data.trace_limits (3,)",
        ),
        (
            {"run_arms": ("sft",), "sft__optim__warmup_steps": 50},
            "config.arms.sft: config.sft.optim.warmup_steps is 50",
        ),
        (
            {"run_arms": ("sft",), "sft__batch_size": 7, "sft__accumulation": 2},
            "config.arms.sft: config.sft.batch_size 7",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    refused(message, **changes)


@pytest.mark.parametrize("name", ["a/b", "/tmp/x", "", "x[1]", "gs://b", "a*", "~x", "a b"])
def test_an_arm_is_named_as_one_folder(name):
    config = small_run.config()
    with config.unlocked():
        config.arms[name] = ConfigDict({"seed": 1})
    with pytest.raises(ValueError, match=r"^config.arms.*: give one folder name"):
        config_check.check(config)


def test_an_arm_traces_no_steps_unless_it_is_asked_to():
    """It counts its own steps, so those of the run mean others there."""
    config = small_run.config(log__profile_steps=(5, 6))
    config.arms.noise.log = {"profile_steps": (1, 2)}
    assert config_lib.arm(config, "noise").log.profile_steps == (1, 2)
    del config.arms.noise["log"]
    config.run_arms = ("noise",)
    config_check.check(config)  # 4 steps
    assert config_lib.arm(config, "noise").log.profile_steps == ()
    assert config.log.profile_steps == (5, 6)


def test_an_arm_that_will_not_run_may_wait_to_be_right():
    config_check.check(small_run.config(sft__optim__warmup_steps=50))


def test_zero_where_it_means_something():
    config_check.check(
        small_run.config(
            eval__every=0,
            eval__rows=0,
            data__limits=(0,),
            log__samples_every=0,
            opsd__optim__max_grad_norm=0.0,
            rollout__top_k=0,
            divergence__top_k=0,
            divergence__clip=0.0,
            health__teacher_floor=0.0,
            opsd__optim__warmup_steps=0,
        )
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--families=chart,maze,chart"],
            "--families=chart,maze,chart names chart twice: give each once",
        ),
        (["--train=-1"], "--train is -1: give a whole number in [0, inf)"),
        (["--seed=-1"], "--seed is -1: give a whole number in [0, "),
        (["--wrong_traces=2"], "--wrong_traces is 2.0: give a number in [0, 1]"),
        (
            ["--train=0", "--validation=0", "--test=0"],
            "are all 0: give at least one split an example",
        ),
    ],
)
def test_make_mini_is_checked_alike(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        data.main(["make-mini", f"--target={tmp_path}/made", *flags])
    assert ended.value.code == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


# --- config files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = 1", "it has no function get_config()"),
        ("def get_config():\n    pass", "get_config() returned None: return the"),
        ("def get_config():\n    return {}", "get_config() returned {}: return the ConfigDict"),
        ("def get_config(:\n    pass", ", line 1: SyntaxError: "),
        ("\n\nimport nosuch", ", line 3: ModuleNotFoundError: "),
        (
            "def get_config():\n    return undefined",
            ", line 2: NameError: name 'undefined' is not defined",
        ),
        ("def get_config():\n    raise ValueError('no')", ", line 2: no"),
        (
            "from opsd_jax import config as config_lib\n\ndef get_config():\n"
            "    c = config_lib.default()\n    c.opsd.steps = 'x'\n    return c",
            ", line 5: TypeError: Could not override field 'steps'",
        ),
        (None, "there is no such Python file"),
    ],
)
def test_config_files_that_are_wrong(text, message, tmp_path):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        config_flags._ConfigFile().parse(str(path))
    assert ended.value.code.startswith(f"error: {path}") and message in ended.value.code
    assert "\n" not in ended.value.code


def test_a_json_file_repeats_a_run(tmp_path):
    """W/config.json as --config: the same settings, tuples as tuples, and further changes."""
    config = small_run.config()
    config.arms.limited = {"stages": ("sft",), "data": {"limits": (3,), "buckets": {"drawn": ()}}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_lib.to_json(config)))
    found = config_flags.read([f"--config={path}", "--config.opsd.steps=9"])
    assert found.opsd.steps == 9 and found.is_locked
    with found.unlocked():
        found.opsd.steps = config.opsd.steps
    assert found.to_dict() == config.to_dict()  # == of a list and a tuple is False
    assert found.data.buckets.trace == config.data.buckets.trace
    assert found.arms.limited.data.limits == (3,)
    config_check.check(found)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "mine.json is missing: give a run's config.json, or a Python file"),
        ("{", "mine.json is not valid JSON (Expecting property name"),
        ("[]", "mine.json holds a list, not a JSON object"),
        (
            '{"opsd": {"stepz": 3}}',
            "mine.json: config.opsd.stepz: there is no setting 'stepz' in config.opsd. Did",
        ),
        (
            '{"opsd": {"steps": "x"}}',
            "mine.json: config.opsd.steps is 'x': give a whole number in [",
        ),
        ('{"opsd": {"steps": null}}', "mine.json: config.opsd.steps is None: give a whole number"),
        ('{"opsd": 3}', "mine.json: config.opsd is 3, but it is a group of settings: set one of "),
        ('{"arms": 3}', "config.arms is 3, but it is a group of settings: set one of NAME = {"),
        (
            '{"arms": {"far": {"teacher": {"blocks": "image"}}}}',
            "mine.json: config.arms.far.teacher.blocks is 'image': give a tuple, ('image',)",
        ),
    ],
)
def test_json_files_that_are_wrong(text, message, tmp_path):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        config_flags.read([f"--config={path}"])
    assert ended.value.code.startswith(f"error: {tmp_path}") and message in ended.value.code


@pytest.mark.parametrize(
    "option, said",
    [
        ("arms.far.opsd.steps=5", "the settings have no config.arms.far.opsd.steps. Arms, and"),
        ("arms.noise.opsd.steps=5", "the settings have no config.arms.noise.opsd.steps. Arms, and"),
        ("arms.noise.teecher.x=1", "no setting 'teecher' in config.arms.noise. Did you mean \"te"),
        ("arms.noise.opsd.steps.x=1", "config.arms.noise.opsd.steps is not a group of settings"),
        ("arms.noise=3", "a group of settings, which takes no value: give --config.arms.noise.KEY"),
    ],
)
def test_settings_of_arms_that_the_file_does_not_have(option, said):
    with pytest.raises(SystemExit, match=re.escape(said)):
        config_flags.read([f"--config={small_run.MINI}", f"--config.{option}"])


TUPLES = [
    (key, setting.rule)
    for key, setting in config_lib.settings().items()
    if isinstance(setting.default, tuple) and not key.startswith("data.buckets.")
]


@pytest.mark.parametrize("key, rule", TUPLES, ids=[key for key, _ in TUPLES])
def test_a_tuple_on_the_command_line_needs_neither_brackets_nor_quotes(key, rule):
    """--config.run_arms=noise is one arm, and --config.run_arms=noise,swap are two."""
    words, values = ["one", "two"], ("one", "two")
    if rule and rule.kind is not str:
        words, values = ["1", "2"], (1, 2)
    elif rule:
        words = values = rule.allowed[:2]

    def read(text):
        config = config_flags.read([f"--config={small_run.MINI}", f"--config.{key}={text}"])
        for name in key.split("."):
            config = config[name]
        return list(config)

    assert read(words[0]) == [values[0]]
    for text in (",".join(words), f"({', '.join(words)})", repr(tuple(values)), repr([*values])):
        assert read(text) == [*values], text
    assert read("()") == []
    twice = [f"--config.{key}={word}" for word in words]
    again = config_flags.read([f"--config={small_run.MINI}", *twice])
    assert config_lib.to_json(again) == config_lib.to_json(
        config_flags.read([f"--config={small_run.MINI}", twice[1]])
    )
    with pytest.raises(SystemExit, match=f"^error: --config.{key}=.*give names such as a,b, or"):
        read("")


def test_what_is_no_option_is_refused():
    with pytest.raises(SystemExit, match="^error: stray: options begin with --"):
        config_flags.read([f"--config={small_run.MINI}", "stray"])
    with pytest.raises(SystemExit, match="^error: --config.eval.kl=maybe: give true or false$"):
        config_flags.read([f"--config={small_run.MINI}", "--config.eval.kl=maybe"])
    with pytest.raises(SystemExit, match="^error: give --config=FILE first, then the settings"):
        config_flags.read(["--config.seed=5", f"--config={small_run.MINI}"])
    path = ["--config", str(small_run.MINI)]
    assert config_flags.read([*path, "--config.seed", "5"]).seed == 5


def test_plan_checks_settings_first():
    with pytest.raises(ValueError, match="config.stages is empty"):
        bill.plan(small_run.config(stages=()), topology.parse_topology("cpu:1"))


# --- a run and its continuation ------------------------------------------------------------------


def test_settings_as_json():
    config = ConfigDict(
        {"lr": 1e-3, "betas": (0.8, 0.9), "name": None, "n": 3, "sub": {"on": True}}
    )
    config.total = config.get_ref("n") * 2
    plain = config_lib.to_json(config)
    assert plain == {
        "lr": 1e-3,
        "betas": [0.8, 0.9],
        "name": None,
        "n": 3,
        "sub": {"on": True},
        "total": 6,
    }
    assert json.loads(json.dumps(plain)) == plain
    assert (
        json.dumps(config_lib.to_json({"n": np.int64(3), "on": np.True_})) == '{"n": 3, "on": true}'
    )
    with pytest.raises(TypeError, match="setting sub.dtype is a .*use its name"):
        config_lib.to_json({"sub": {"dtype": jnp.float32}})
    with pytest.raises(ValueError, match=r"setting clip\[1\] is inf.*None"):
        config_lib.to_json({"clip": [1.0, float("inf")]})


def test_check_unchanged_shows_all_differences_and_the_fix():
    saved = {
        "lr": 1e-3,
        "model": {"depth": 4, "old": 1},
        "betas": [0.8, 0.9],
        "log": {"every": 10},
        "logger": "a",
    }
    config_check.check_unchanged(saved, ConfigDict({**saved, "betas": (0.8, 0.9)}))
    config_check.check_unchanged(saved, {**saved, "log": {"every": 99, "new": 1}}, free=("log",))
    current = {
        **saved,
        "lr": 2e-3,
        "model": {"depth": 4, "new": "x"},
        "log": {"every": 5},
        "logger": "b",
    }
    with pytest.raises(config_check.ConfigMismatchError) as caught:
        config_check.check_unchanged(saved, current, free=("log",))
    text = " ".join(str(caught.value).split())
    for row in (
        "lr 0.001 0.002",
        "model.old 1 absent",
        'model.new absent "x"',
        'logger "a" "b"',
        "--config.logger=",
        "another --workdir",
        "May change on resume: log.",
    ):
        assert row in text, row
    assert "log.every" not in text and "betas" not in text and "depth" not in text
    with pytest.raises(config_check.ConfigMismatchError) as caught:  # what a shell takes
        config_check.check_unchanged({"b": [[36, 25]], "n": 1}, {"b": [[70, 50]], "n": 2})
    assert "as before, which are '--config.b=((36, 25),)' --config.n=1, or" in str(caught.value)


@pytest.mark.parametrize(
    "key, value, option",
    [
        ("data.tasks", ("Shapes",), "--config.data.tasks=Shapes"),
        ("stages", ("warmup", "opsd"), "--config.stages=warmup,opsd"),
        (
            "student.blocks",
            ("image@crop", "text:a_b"),
            "--config.student.blocks=image@crop,text:a_b",
        ),
        ("data.tasks", ("1",), """'--config.data.tasks=('"'"'1'"'"',)'"""),
        ("data.tasks", ("None",), """'--config.data.tasks=('"'"'None'"'"',)'"""),
        ("run_arms", (), "'--config.run_arms=()'"),
        ("data.limits", (3,), "'--config.data.limits=(3,)'"),
    ],
)
def test_the_options_of_other_settings_are_short_and_read_as_meant(key, value, option):
    saved, current = config_lib.default(), config_lib.default()
    saved.update_from_flattened_dict({key: value})
    current.update_from_flattened_dict({key: (7,) if key == "data.limits" else ("Other",)})
    with pytest.raises(config_check.ConfigMismatchError) as caught:
        config_check.check_unchanged(saved, current, free=())
    assert f"as before, which are {option}, or" in str(caught.value)
    read = config_flags.read([f"--config={small_run.ROOT}/configs/mini.py", *shlex.split(option)])
    assert functools.reduce(operator.getitem, key.split("."), read) == value


def test_weights_to_start_from_are_the_same_wherever_they_are(tmp_path, monkeypatch):
    """Typed in another way or, of an arm, in the checkpoints of its moved run."""
    monkeypatch.chdir(tmp_path)

    def check(was, now, workdir=""):
        config_check.check_unchanged({"init_from": was}, {"init_from": now}, workdir=workdir)

    check("runs/model", str(tmp_path / "runs" / "model"))
    check("/old/w/checkpoints/350", "new/checkpoints/350", "new/arms/noise")
    for was, now, workdir in (
        ("runs/model", "runs/other", ""),
        ("/old/w/checkpoints/350", "new/checkpoints/350", "new"),
        ("/old/w/checkpoints/300", "new/checkpoints/350", "new/arms/noise"),
        ("/old/w/checkpoints/350", "other/checkpoints/350", "new/arms/noise"),
        ("", "new/checkpoints/350", "new/arms/noise"),
        ("new/checkpoints/350", "", "new/arms/noise"),
    ):
        with pytest.raises(config_check.ConfigMismatchError, match="init_from"):
            check(was, now, workdir)


def test_a_setting_that_is_newer_than_the_run_had_its_default():
    saved, defaults = {"model": {"depth": 4}}, {"model": {"depth": 2, "new": False, "other": 1}}

    def check(**model):
        config_check.check_unchanged(saved, {"model": {"depth": 4} | model}, defaults=defaults)

    check(new=False)
    with pytest.raises(config_check.ConfigMismatchError, match=r"model.new +false +true"):
        check(new=True)
    with pytest.raises(config_check.ConfigMismatchError, match=r"model.unknown +absent +1"):
        check(new=False, unknown=1)
    # A saved value counts, not the default.
    with pytest.raises(config_check.ConfigMismatchError, match=r"model.depth +4 +2"):
        check(depth=2)


def test_check_digests_names_what_differs_and_how_to_accept_it(caplog):
    saved = {"data": {"Maze": "11", "Chart": "22"}, "tokenizer": "aa"}
    config_check.check_digests(saved, json.loads(json.dumps(saved)))
    for change, kinds, rows in (
        ({"data": {"Maze": "11", "Chart": "33"}}, ("data",), ["data.Chart 22 33"]),
        ({"tokenizer": "bb"}, ("tokenizer",), ["tokenizer aa bb"]),
        (
            {"data": {"Maze": "12"}, "tokenizer": "bb"},
            ("data", "tokenizer"),
            ["data.Maze 11 12", "data.Chart 22 absent", "tokenizer aa bb"],
        ),
    ):
        with pytest.raises(config_check.ConfigMismatchError) as caught:
            config_check.check_digests(saved, saved | change)
        text = " ".join(str(caught.value).split())
        for part in (*rows, f'--config.checkpoint.accept_changed="{kinds}"', "another --workdir"):
            assert part in text, part
        config_check.check_digests(saved, saved | change, accepted=kinds)
    with pytest.raises(config_check.ConfigMismatchError, match="tokenizer"):
        config_check.check_digests(saved, {"data": {}, "tokenizer": "bb"}, accepted=("data",))
    with caplog.at_level("WARNING"):
        config_check.check_digests({}, saved)  # of a version without digests
    assert "no digest of its data" in caplog.text and "no digest of its tokenizer" in caplog.text


# --- 64 bits -------------------------------------------------------------------------------------


@contextlib.contextmanager
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize(
    "command, flags",
    [
        (eval.main, ["--workdir=W"]),
        (generate.main, ["--checkpoint=W", "--question=q"]),
        (diagnose.main, ["kl", "--workdir=W"]),
        (redraw.main, ["--workdir=W", "--target=T"]),
        (convert.main, ["import", "--source=S", "--target=T"]),
    ],
)
def test_64_bits_are_refused_before_anything_is_read(command, flags, capsys):
    with x64(), pytest.raises(SystemExit) as ended:
        command(flags)
    assert ended.value.code == 1 and "error: JAX_ENABLE_X64 is set" in capsys.readouterr().err


def test_64_bits_are_refused_by_train_and_plan(tmp_path):
    with x64(), pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
        train.train(SMALL, str(tmp_path / "w"))
    with x64(), pytest.raises(ValueError, match="JAX_ENABLE_X64 is set"):
        bill.plan(SMALL, topology.parse_topology("cpu:1"))
    assert not (tmp_path / "w").exists()


# --- what is not there ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder that looks like data prepared from elsewhere, of one task."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "visual_opsd" / "maze_nav").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(data__tasks=("Chart_Refocsu",)),
            "config.data.tasks names 'Chart_Refocsu', .*choose from Chart_Refocus, or make",
        ),
        (dict(data__tasks=("Chart_Refocus", "")), "config.data.tasks names '', "),
        (
            dict(data__make__families=("maze",)),
            r"names 'Chart_Refocus'.*choose from Spatial_Navigation.*families is \('maze',\)",
        ),
        (
            dict(data__dir="PREPARED"),
            "config.data.tasks names 'Chart_Refocus', .*it holds maze_nav: choose",
        ),
        (dict(data__dir="NOWHERE"), "NOWHERE holds no data"),
        (dict(data__make__families=()), "w/data holds no data"),
        (
            dict(eval__final_split="tset"),
            "config.eval.final_split is 'tset': .*train, validation, test",
        ),
        (dict(eval__split="valid", eval__every=2), "config.eval.split is 'valid'"),
        (
            dict(data__tasks=("Chart_Refocus", "chart_refocus")),
            "data.tasks names chart_refocus twice",
        ),
        (dict(tokenizer="NOWHERE"), "NOWHERE: there is no such folder: give"),
        (dict(init_from="NOWHERE"), "config.init_from='.*NOWHERE': there is no such folder"),
        (
            dict(init_from="org/Qwen3-0.6B"),
            r"'org/Qwen3-0.6B': there is no such folder \(models are not downloaded by their name",
        ),
        (
            dict(init_from="PREPARED"),
            "config.init_from='.*' is not a model and holds no checkpoint",
        ),
    ],
)
@pytest.mark.parametrize("arm", [False, True], ids=["run", "arm"])
def test_what_is_not_there_is_said_before_anything_is_made(
    tmp_path, prepared, changes, message, arm
):
    """In an arm that the run will start, too: it would fail when the run is done."""
    places = {"PREPARED": str(prepared), "NOWHERE": str(tmp_path / "NOWHERE")}
    changes = {
        key: places.get(value, value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    c = small_run.config(**({} if arm else changes))
    if arm:
        if changes.get("data__make__families") == ():
            changes["data__dir"], message = str(tmp_path / "NOWHERE"), "NOWHERE holds no data"
        nested = {}
        for key, value in changes.items():
            *groups, name = key.split("__")
            functools.reduce(lambda group, name: group.setdefault(name, {}), groups, nested)[
                name
            ] = value
        c.arms = ConfigDict({"wrong": nested})
        c.run_arms, message = ("wrong",), f"config.arms.wrong.*{message}"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.check(c, str(tmp_path / "w"))
    assert not os.listdir(tmp_path)


def test_a_run_goes_on_without_what_it_started_from(tmp_path):
    """Weights that a run began with may be gone when it continues."""
    c = small_run.config(init_from=str(tmp_path / "gone"))
    step = tmp_path / "w" / "checkpoints" / "3"
    step.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="config.init_from"):
        train.check(c, str(tmp_path / "w"))
    (step / "commit_success.txt").touch()
    train.check(c, str(tmp_path / "w"))
