"""Configs of text models: sizes of the released ones, and the slices of all but BAGEL."""

import functools
import math
import runpy

import jax
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check, presets
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.plan import topology
from opsd_jax.release import families
from opsd_jax.run import checks

# Numbers of parameters of the released models, a tied head counted once.
COUNTS = {
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen2_5", "0.5B"): 494_032_768,
    ("qwen2_5", "1.5B"): 1_543_714_304,
    ("qwen2_5", "3B"): 3_085_938_688,
    ("qwen2_5", "7B"): 7_615_616_512,
    ("llama", "1B"): 1_235_814_400,
    ("llama", "3B"): 3_212_749_824,
    ("llama", "8B"): 8_030_261_248,
    ("smollm2", "135M"): 134_515_008,
    ("smollm2", "360M"): 361_821_120,
    ("smollm2", "1.7B"): 1_711_376_384,
}
FAMILY = {"qwen3": "qwen3", "qwen2_5": "qwen2", "smollm2": "llama", "llama": "llama"}


@functools.cache
def module(name):
    return runpy.run_path(str(small_run.ROOT / "configs" / f"{name}.py"))


def test_every_size_is_counted():
    assert {(name, size) for name in FAMILY for size in module(name)["SIZES"]} == COUNTS.keys()
    for name in FAMILY:
        assert module(name)["get_config"]() == module(name)["get_config"](
            next(iter(module(name)["SIZES"]))
        )


@pytest.mark.parametrize(("name", "size"), COUNTS)
def test_sizes_of_the_released_models(name, size):
    config = module(name)["get_config"](size)
    config_check.check(config)
    model = config_lib.model(config)
    params = jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))
    assert params.keys() == {"llm"}
    assert params_lib.count(params)["total"] == COUNTS[name, size]
    assert families.family(model) == FAMILY[name]


def test_word_problems_of_smollm2():
    """The preset's data are made by the run, in texts alone, and its teacher reads the solution."""
    config = module("smollm2")["get_config"]("arithmetic")
    config_check.check(config)
    assert config_lib.block_names(config).privileged == ("text:full_text_only_thought",)
    assert config.data.make.families == ("arithmetic",) and set(config.run_arms) <= {*config.arms}
    size = module("smollm2")["get_config"]("135M")
    assert config.model.llm == size.model.llm
    with pytest.raises(ValueError, match="choose from 135M, 360M, 1.7B, arithmetic, and"):
        module("smollm2")["get_config"]("arithmetics")


@pytest.mark.parametrize("slice_name", ["v5p-8", "v6e-16", "v5e-16"])
@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen3", "0.6B"), ("qwen3", "8B"), ("qwen2_5", "0.5B"), ("smollm2", "360M"), ("llama", "8B")]
    + [("qwen2_5_vl", "3B"), ("qwen2_5_vl", "7B"), ("qwen3_vl", "8B")],
)
def test_slices(name, size, slice_name):
    config = module(name)["get_config"](f"{size},{slice_name}")
    config_check.check(config)
    assert math.prod(config.mesh.values()) == topology.parse_topology(slice_name).devices
    for stage in config.stages:
        shards = config.mesh.data * config.mesh.fsdp
        checks.check_batch(config, stage, shards)
        _, _, at_once = presets.SLICES[slice_name]
        assert config[stage].batch_size == config[stage].accumulation * shards * at_once
    assert config.model.llm.num_kv_heads % config.mesh.tensor == 0


def test_a_slice_for_which_the_batch_is_too_small():
    with pytest.raises(ValueError, match="8 sequences cannot be divided over the 16 chips of v6e"):
        module("smollm2")["get_config"]("arithmetic,v6e-16")


@pytest.mark.parametrize(
    ("name", "arg"),
    [("qwen3", "7B"), ("qwen3", "8B,v5p-64"), ("qwen2_5", ""), ("smollm2", "8B"), ("llama", "2B")]
    + [("qwen3", "8B,"), ("qwen3", ",v5p-8"), ("qwen3_vl", "3B"), ("qwen2_5_vl", "7B,v4-8")],
)
def test_other_words_are_refused(name, arg):
    with pytest.raises(ValueError, match=f"configs/{name}.py:{arg}: choose"):
        module(name)["get_config"](arg)
