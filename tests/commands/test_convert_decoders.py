"""Released folders of text decoders (Qwen2, Qwen3, Llama): what is refused, and what is read.

Weights that arrive, and round trips, are in tests/test_hf_parity.py.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conftest import DEFAULT_HF_GOLDENS
from opsd_jax import convert
from opsd_jax.model.config import LLMConfig, ModelConfig
from opsd_jax.release import decoder_configs, families, folders, load
from opsd_jax.run import model as model_lib

UNTIED, TIED, SHARDED = "qwen3/base", "llama/smol", "qwen2/tied_sharded"


@pytest.fixture
def copied(tmp_path):
    """A function that copies the model folder of a case, which a test may then spoil."""

    def copy(name):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(DEFAULT_HF_GOLDENS / name / "model", folder)
        return folder

    return copy


def changed(folder, **changes):
    """The folder with other values in its config.json; None removes a key."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return str(folder)


def with_tensors(folder, change):
    """The folder with other tensors: `change` gets all of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return str(folder)


def refuses(folder, *parts, call=load.load, kind=ValueError, **options):
    with pytest.raises(kind) as error:
        call(str(folder), **options)
    for part in parts:
        assert part in str(error.value), str(error.value)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        (UNTIED, {"model_type": "mistral"}, 'only "qwen2", "qwen3", "llama" are implemented'),
        (UNTIED, {"model_type": "absent"}, "config.json lacks 'model_type': give a text"),
        (UNTIED, {"model_type": "bagel"}, "a folder of BAGEL has llm_config.json"),
        (UNTIED, {"hidden_act": "gelu"}, 'hidden_act is "gelu", but only "silu" is implemented'),
        (UNTIED, {"mlp_bias": True}, "mlp_bias is true, but only false is implemented"),
        (SHARDED, {"attention_bias": False}, "attention_bias is false, but only true"),
        (TIED, {"rope_interleaved": True}, "rope_interleaved is true, but only false"),
        (
            UNTIED,
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "layers from 1 on (max_window_layers) would attend to a window",
        ),
        (
            SHARDED,
            {"layer_types": ["full_attention", "sliding_attention"]},
            'but only "full_attention" is implemented',
        ),
        (UNTIED, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 'and "llama3" with its four'),
        (UNTIED, {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3]}}, "rope_scaling is"),
        (
            UNTIED,
            {"rope_scaling": {**LLAMA3, "factor": None}},
            "rope_scaling.factor is null: give a positive number",
        ),
        (
            UNTIED,
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 4.0}},
            "rope_parameters and rope_scaling differ: which one is right?",
        ),
        (
            UNTIED,
            {"rope_parameters": {"rope_theta": 5.0}},
            "rope_theta is 1000000.0 and rope_parameters.rope_theta is 5.0",
        ),
        (UNTIED, {"rope_theta": "absent"}, "config.json lacks 'rope_theta'"),
        (UNTIED, {"vocab_size": "320"}, 'vocab_size is "320": give a whole number'),
        (UNTIED, {"num_key_value_heads": "absent"}, "lacks 'num_key_value_heads'"),
        (UNTIED, {"num_key_value_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        (UNTIED, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1: give true or false"),
        (UNTIED, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_configs_that_are_refused(copied, name, changes, part):
    folder = changed(copied(name), **changes)
    refuses(folder, folder, part)


@pytest.mark.parametrize(
    ("name", "changes", "field", "value"),
    [
        (UNTIED, {"rope_scaling": LLAMA3}, "rope_llama3", (8.0, 1.0, 4.0, 64.0)),
        (
            UNTIED,
            {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            "rope_llama3",
            (8.0, 1.0, 4.0, 64.0),
        ),
        (UNTIED, {"head_dim": "absent"}, "head_dim", 128),
        (TIED, {"num_key_value_heads": "absent"}, "num_kv_heads", 3),
        (TIED, {"rope_theta": "absent"}, "rope_theta", 1e4),
        (TIED, {"attention_bias": True}, "output_bias", True),
        (TIED, {"mlp_bias": True}, "mlp_bias", True),
        (UNTIED, {"attention_bias": True}, "output_bias", True),
        (UNTIED, {"tie_word_embeddings": True}, "tied_head", True),
        (UNTIED, {"use_sliding_window": True, "max_window_layers": 3}, "num_layers", 3),
    ],
)
def test_configs_that_are_read(copied, name, changes, field, value):
    found = folders.read_config(changed(copied(name), **changes))
    assert getattr(found.llm, field) == value and found.vit is None


def test_tensors_that_do_not_fit(copied):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(96, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]

    refuses(
        with_tensors(copied(UNTIED), spoil),
        "missing model.norm.weight (expected shape (64,))",
        "surplus model.layers.1.self_attn.q_proj.bias in model.safetensors",
        "misshapen lm_head.weight: the file has (319, 64), the configs say (320, 64)",
    )


def test_a_tied_head_may_be_in_the_file(copied, capsys):
    """Releases of small Qwen3 have it. Another one than the embedding would be untied."""

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(9, np.float32)

    folder = with_tensors(copied(TIED), add)
    _, params = load.load(folder)
    assert "head" not in params["llm"]
    said = capsys.readouterr().err
    assert "1 tensor of the output head, which is the embedding table, stays on disk" in said
    assert "1 tensor of rotary frequencies, which follow from the sizes, stays on disk" in said

    def spoil(tensors):
        tensors["lm_head.weight"][0, 0] += 1

    refuses(with_tensors(pathlib.Path(folder), spoil), "tie_word_embeddings true: set it to false")


def test_no_image_generation(copied):
    refuses(copied(TIED), "reads and writes text alone", generation=True)
    refuses(copied(UNTIED), "reads and writes text alone", call=model_lib.load, generation=True)


def test_a_folder_without_weights_is_none(copied):
    folder = copied(UNTIED)
    (folder / "model.safetensors").unlink()
    refuses(folder, "nor a config.json beside weights", kind=FileNotFoundError)
    assert not folders.is_model(str(folder))


def test_the_command_and_its_errors(copied, tmp_path, capsys):
    folder, target = copied(SHARDED), tmp_path / "imported"
    convert.main(["import", f"--source={folder}", f"--target={target}", "--dtype=bfloat16"])
    assert "embed 9,744, und " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert.main(
            ["export", f"--source={target}", f"--target={tmp_path / 'x'}", f"--base={folder}"]
        )
    assert "is not of BAGEL's family and takes no image" in capsys.readouterr().err
    convert.main(["export", f"--source={target}", f"--target={tmp_path / 'y'}"])
    assert "a model of the family qwen2" in capsys.readouterr().out
    stored = load.load(str(tmp_path / "y"), dtype=None)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"qk_norm": False}, "qwen2"),
        ({"qkv_bias": False}, "qwen3"),
        ({"output_bias": True}, "qwen3"),
        ({"qkv_bias": False, "qk_norm": False}, "llama"),
        ({"output_bias": True, "qk_norm": False}, "llama"),
        ({"qkv_bias": False, "qk_norm": False, "mlp_bias": True}, "llama"),
        ({}, None),
        ({"qk_norm": False, "mlp_bias": True}, None),
    ],
)
def test_families_of_decoders(fields, family, tmp_path):
    sizes = ModelConfig(LLMConfig(64, 32, 2, 4, 2, 48, **fields), **decoder_configs.configs.COMPUTE)
    if family is None:
        with pytest.raises(ValueError, match="no released family has a decoder with qk_norm"):
            families.family(sizes)
        return
    assert families.family(sizes) == family
    content = decoder_configs.contents(sizes)["config.json"]
    assert content["model_type"] == family
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert decoder_configs.read(str(tmp_path)) == sizes
