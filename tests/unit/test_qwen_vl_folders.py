"""Config files and names of tensors of Qwen2.5-VL and Qwen3-VL folders.

Whole folders are read and written by tests/test_hf_parity.py.
"""

import functools
import json

import jax
import pytest

import tiny
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.release import families, folders, qwen_vl_configs, qwen_vl_keys

FAMILIES = tuple(tiny.QWEN)


def written(folder, family, dialect="hub"):
    """The config files of the tiny model, as the hub or transformers 5 spells them."""
    files = folders.config_contents(tiny.QWEN[family], "float32")
    top = files["config.json"]
    if dialect == "transformers 5":
        text = top.pop("text_config", None)
        if text is None:  # the decoder's keys are at the top level
            kept = ("architectures", "model_type", "tie_word_embeddings", "vision_config")
            text = {key: top.pop(key) for key in set(top) - {*kept}}
        sections = text.pop("rope_scaling")
        text["rope_parameters"] = {
            "rope_theta": text.pop("rope_theta"),
            "rope_type": "default",
            "mrope_section": sections["mrope_section"],
        }
        text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
        text["tie_word_embeddings"] = not top["tie_word_embeddings"]  # the top level counts
        top["vision_config"]["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "axial"}
        top |= {"text_config": text, "dtype": top.pop("torch_dtype", "float32")}
        files = {
            "config.json": top,
            "processor_config.json": {"image_processor": files["preprocessor_config.json"]},
        }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def change(folder, name, *path, value=None):
    file = folder / name
    content = found = json.loads(file.read_text())
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("dialect", ["hub", "transformers 5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_read(family, dialect, tmp_path):
    folder = written(tmp_path, family, dialect)
    config = folders.read_config(folder)
    assert config == tiny.QWEN[family] and folders.compute_dtype(folder) == "float32"
    rule = folders.size_rule(folder, config)
    assert rule.stride == 8
    assert (rule.min_pixels, rule.max_pixels) == qwen_vl_configs._PIXELS[family]
    assert families.family(config) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(family, tmp_path):
    """Its own configuration class reads our files and writes them in its spelling."""
    import transformers

    folder = written(tmp_path, family)
    ours = json.loads((tmp_path / "config.json").read_text())
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in theirs["text_config"] and theirs != ours
    assert folders.read_config(folder) == tiny.QWEN[family]


def test_bounds_of_images_are_read_in_both_places(tmp_path):
    folder = written(tmp_path, "qwen2_5_vl")
    name = "preprocessor_config.json"
    change(tmp_path, name, "size", value={"shortest_edge": 100, "longest_edge": 900})
    config = folders.read_config(folder)
    assert folders.size_rule(folder, config).min_pixels == 3136  # a key of its own comes first
    change(tmp_path, name, "min_pixels")
    change(tmp_path, name, "max_pixels")
    rule = folders.size_rule(folder, config)
    assert (rule.min_pixels, rule.max_pixels) == (100, 900)
    assert folders.size_rule("nowhere", tiny.MODEL) is None
    (tmp_path / name).unlink()  # then the family's
    assert folders.size_rule(folder, config).max_pixels == 12_845_056
    mean = folders.read_config(folder).vit.mean
    assert mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("family", "path", "value", "message"),
    [
        ("qwen3_vl", ("vision_config", "hidden_act"), "silu", "hidden_act is \"silu\", but only"),
        ("qwen3_vl", ("vision_config", "num_position_embeddings"), 26, "give a square number"),
        ("qwen3_vl", ("vision_config", "out_hidden_size"), 64, "the decoder has 32"),
        ("qwen2_5_vl", ("rope_scaling", "mrope_section"), [2, 2], "give three numbers"),
        ("qwen2_5_vl", ("rope_scaling", "mrope_interleaved"), True, "the other order"),
        ("qwen2_5_vl", ("vision_config", "fullatt_block_indexes"), [-1], "whole numbers from 0"),
        ("qwen2_5_vl", ("vision_config", "spatial_patch_size"), 5, "but patch_size is 4"),
        ("qwen2_5_vl", ("use_sliding_window",), True, "would attend to a window"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused(family, path, value, message, tmp_path):
    folder = written(tmp_path, family)
    if path == ("use_sliding_window",):
        change(tmp_path, "config.json", "max_window_layers", value=1)
    change(tmp_path, "config.json", *path, value=value)
    with pytest.raises(ValueError, match=message):
        folders.read_config(folder)


def test_processors_of_other_models_are_refused(tmp_path):
    folder = written(tmp_path, "qwen3_vl")
    change(tmp_path, "preprocessor_config.json", "merge_size", value=3)
    change(tmp_path, "preprocessor_config.json", "resample", value=2)
    with pytest.raises(ValueError, match=r"resample is 2, but[\s\S]*merge_size is 3, but config"):
        folders.read_config(folder)
    with pytest.raises(ValueError, match="generates no images"):
        folders.read_config(folder, generation=True)


def test_every_parameter_has_a_key_and_every_key_a_parameter():
    for family, config in tiny.QWEN.items():
        init = functools.partial(bagel.init, config=config)
        leaves = params_lib.flatten(jax.eval_shape(init, jax.random.key(0)))
        table = qwen_vl_keys.TABLES[family]
        names = [table[path].template for path in leaves]
        assert len({*names}) == len(names)
        unused = {path for path in table if path not in leaves}
        biases = {path for path in unused if path.endswith("_bias")}
        rest = {"llm/head", "vit/position", *(f"llm/layers/und/{x}_norm" for x in "qk")}
        assert unused - biases <= rest, family
        for path, leaf in leaves.items():
            key = families.key(config, path)
            assert len(key.tensor_shape(leaf.shape)) == leaf.ndim - key.stacked
            assert key.stacked == params_lib.fact(path).stacked
    with pytest.raises(KeyError, match="no key in opsd_jax/release/qwen_vl_keys.py"):
        families.key(tiny.QWEN["qwen3_vl"], "vit/layers/gate_kernel")
