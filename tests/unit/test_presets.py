"""configs/visual_opsd.py: the paper's run and its controls, on every slice that has a preset."""

import importlib.util
import itertools
import math
import runpy

import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, config_flags
from opsd_jax.plan import topology
from opsd_jax.run import checks

PATH = small_run.ROOT / "configs" / "visual_opsd.py"
_spec = importlib.util.spec_from_file_location("paper", PATH)
paper = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(paper)
# How a batch is divided; all other settings are the paper's.
DIVISION = {
    *("mesh.fsdp", "mesh.tensor"),
    "model.key_block",  # the order of sums in decoding
    "model.attention",  # the kernel, if it equals dense attention
    *(f"{s}.accumulation" for s in ("opsd", "sft", "offline")),
}


def flat(config):
    return config_check._flat(config_lib.to_json(config))


@pytest.mark.parametrize("run, name", list(itertools.product(paper.RUNS, paper.SLICES)))
def test_a_slice_changes_no_number_of_the_run(run, name):
    config, usual = paper.get_config(f"{run},{name}"), paper.get_config(run)
    config_check.check(config)
    now, before = flat(config), flat(usual)
    assert {key for key in now if now[key] != before[key]} <= DIVISION
    for stage in config.stages:
        assert config[stage].batch_size == 16
        shards = config.mesh.data * config.mesh.fsdp
        checks.check_batch(config, stage, shards)
        _, _, at_once = paper.SLICES[name]
        assert config[stage].batch_size == config[stage].accumulation * shards * at_once
    # all chips of the slice, and no other number of them
    assert math.prod(config.mesh.values()) == topology.parse_topology(name).devices
    assert config.model.llm.num_kv_heads % config.mesh.tensor == 0


def test_words_in_any_order_and_the_paper_without_any():
    assert flat(paper.get_config()) == flat(paper.get_config("paper")) == flat_default()
    assert flat(paper.get_config("v5p-32,noise")) == flat(paper.get_config("noise,v5p-32"))
    assert flat(paper.get_config("v5p-8")) == flat(paper.get_config("paper,v5p-8"))


def flat_default():
    return flat(config_lib.default()) | {"eval.final_split": '""'}


@pytest.mark.parametrize(
    "arg",
    [
        "v5p-64",
        "v5e-16",
        "v5litepod-64",
        "v5p",
        ",",
        "noise,swap",
        "v5p-8,v5p-16",
        "noise,",
        "noise v5p-8",
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arg):
    with pytest.raises(SystemExit) as error:
        config_flags.read([f"--config={PATH}:{arg}"])
    message = str(error.value)
    assert all(name in message for name in (*paper.RUNS, *paper.SLICES)) and "plan" in message


def test_a_run_continues_on_another_slice():
    saved = config_lib.to_json(paper.get_config("v5p-16"))
    for name in paper.SLICES:
        config_check.check_unchanged(saved, paper.get_config(name))
    with pytest.raises(config_check.ConfigMismatchError, match="teacher.visual_thoughts"):
        config_check.check_unchanged(saved, paper.get_config("noise,v5p-16"))


@pytest.mark.parametrize(
    "file, given, meant",
    [
        ("contexts", "degradd", "degraded"),
        ("contexts", "crop,smok", "smoke"),
        ("mini", "smok", "smoke"),
        ("qwen2_5", "0.5b", "0.5B"),
        ("qwen3", "1.7b", "1.7B"),
        ("qwen3", "1.7B,v5p8", "1.7B,v5p-8"),
        ("qwen2_5_vl", "7b", "7B"),
        ("llama", "8b,v5p-8", "8B,v5p-8"),
        ("smollm2", "135m", "135M"),
        ("study", "contnt", "content"),
        ("visual_opsd", "nose,v5p-16", "noise"),
    ],
)
def test_a_misspelt_preset_names_the_one_that_is_meant(file, given, meant):
    get_config = runpy.run_path(str(small_run.ROOT / "configs" / f"{file}.py"))["get_config"]
    with pytest.raises(ValueError, match=f"; did you mean '{meant}'"):
        get_config(given)
