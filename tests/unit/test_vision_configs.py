"""configs/qwen2_5_vl.py and qwen3_vl.py: sizes of the released models."""

import functools
import runpy

import jax
import pytest

import small_run
from opsd_jax import config as config_lib
from opsd_jax import config_check
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.release import families, folders

# Numbers of parameters of the released models, a tied head counted once.
COUNTS = {
    ("qwen2_5_vl", "3B"): 3_754_622_976,
    ("qwen2_5_vl", "7B"): 8_292_166_656,
    ("qwen3_vl", "2B"): 2_127_532_032,
    ("qwen3_vl", "4B"): 4_437_815_808,
    ("qwen3_vl", "8B"): 8_767_123_696,
}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@functools.cache
def module(name):
    return runpy.run_path(str(small_run.ROOT / "configs" / f"{name}.py"))


def test_every_size_is_counted():
    assert {(name, size) for name in FAMILIES for size in module(name)["SIZES"]} == COUNTS.keys()


@pytest.mark.parametrize(("name", "size"), COUNTS)
def test_sizes_of_the_released_models(name, size):
    config = module(name)["get_config"](size)
    config_check.check(config)
    model = config_lib.model(config)
    params = jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))
    assert params.keys() == {"llm", "vit", "connector"}
    assert params_lib.count(params)["total"] == COUNTS[name, size]
    assert families.family(model) == name
    content = folders.config_contents(model)
    vision = content["config.json"]["vision_config"]
    assert vision["out_hidden_size"] == model.llm.hidden_size
    rule = config_lib.resize_rule(config)
    width, height = rule(4000, 4000)
    assert 1100 < width * height // rule.stride**2 <= 1280


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"configs/{name}.py:9B: choose from"):
        module(name)["get_config"]("9B")
