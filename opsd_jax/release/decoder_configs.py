"""config.json of a released folder whose model reads text alone: Qwen2, Qwen3, Llama.

Both spellings are read: that of the hub (rope_theta, rope_scaling, torch_dtype) and that of
transformers 5 (rope_parameters, dtype, layer_types). Keys that change the computation are refused
unless their value is implemented, as in `configs`.
"""

import os
from typing import Any

from opsd_jax.inputs import json_files
from opsd_jax.model.config import LLMConfig, ModelConfig
from opsd_jax.release import configs, families

FILES = ("config.json",)
# Keys that change the computation, and their only values that are implemented. An absent or null
# key has one of them in transformers. A key that is not named here is not read by the family.
_IMPLEMENTED = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0, 1),
    "rope_interleaved": (False,),
}
_OF_FAMILY = {
    "qwen2": {"attention_bias": (True,), "mlp_bias": (False,), "qk_norm": (False,)},
    "qwen3": {"mlp_bias": (False,), "qk_norm": (True,)},
    "llama": {"qk_norm": (False,)},
}
_QWEN3_HEAD = 128  # head_dim of Qwen3 where the file has none
_LLAMA_THETA = 1e4  # rope_theta of Llama where the file has none


def read(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config.json in a folder.

    Args:
      generation: whether image generation is wanted, which these families do not have.
      compute: dtype, remat, unroll, query_block of `ModelConfig`, in place of `configs.COMPUTE`.
    Raises:
      FileNotFoundError: the file is missing. ValueError: image generation is wanted, the family is
      not one of `families.DECODERS`, or a key is missing, has a value of the wrong type, or asks
      for what is not implemented; lists all.
    """
    path = os.path.join(directory, "config.json")
    found = json_files.Object("config.json", json_files.read(path), [])
    summary = f"the config file of {directory} cannot be used:"
    family = found.text("model_type")
    if family is not None and family not in families.DECODERS:
        known = ", ".join(map(json_files.shown, families.DECODERS))
        other = ""
        if family == "bagel":
            other = "; a folder of BAGEL has llm_config.json and vit_config.json, too"
        found.refuse("model_type", f", but only {known} are implemented{other}")
    found.check(summary)
    if generation:
        raise ValueError(
            f"{directory} holds a model of the family {family}, which reads and writes text alone: "
            "do without image generation"
        )
    configs.refuse_unimplemented(_IMPLEMENTED | _OF_FAMILY[family], found)
    refuse_windows(family, found)
    fields = sizes(family, found)
    found.check(summary)
    try:
        return ModelConfig(llm=LLMConfig(**fields), **configs.COMPUTE | compute)
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def compute_dtype(directory: str) -> str:
    """The dtype that the model in a folder is meant to compute in; see `configs.dtype_of`."""
    return configs.dtype_of(json_files.read(os.path.join(directory, "config.json")))


def sizes(family: str, found: json_files.Object, *, sections: bool = False) -> dict[str, Any]:
    """The fields of LLMConfig but for positions of three dimensions; None for a faulty one.

    Args:
      family: one of `families.DECODERS`, whose rules hold.
      found: the object with the keys of the decoder.
      sections: whether positions may have three dimensions.
    """
    heads = found.integer("num_attention_heads")
    # as in transformers: null (of Llama also no key) for as many key heads as query heads
    alone = found.values.get("num_key_value_heads", 0 if family != "llama" else None) is None
    head_dim = found.integer("head_dim", most=1 << 20, default=None)
    if head_dim is None and family == "qwen3":
        head_dim = _QWEN3_HEAD
    theta, llama3 = configs.rope(found, required=family != "llama", scaled=True, sections=sections)
    biased = family == "qwen2" or found.flag("attention_bias", default=False)
    return {
        "vocab_size": found.integer("vocab_size"),
        "hidden_size": found.integer("hidden_size", most=1 << 20),
        "num_layers": found.integer("num_hidden_layers", most=configs.MOST_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads if alone else found.integer("num_key_value_heads"),
        "intermediate_size": found.integer("intermediate_size"),
        "rope_theta": theta or _LLAMA_THETA,
        "rms_norm_eps": found.number("rms_norm_eps"),
        "head_dim": head_dim or 0,
        "qkv_bias": biased,
        "output_bias": biased and family != "qwen2",
        "mlp_bias": family == "llama" and found.flag("mlp_bias", default=False),
        "qk_norm": family == "qwen3",
        "tied_head": found.flag("tie_word_embeddings", default=False),
        "rope_llama3": llama3,
    }


def refuse_windows(family: str, found: json_files.Object) -> None:
    """Adds a problem where some layer would attend to a window of keys alone.

    A number as sliding_window is none by itself: releases have it with use_sliding_window false.
    """
    if family == "llama" or not found.flag("use_sliding_window", default=False):
        return
    if found.has("layer_types"):  # `configs.refuse_unimplemented` reads them
        return
    first = found.integer("max_window_layers", least=0, default=28)
    layers = found.integer("num_hidden_layers", most=configs.MOST_LAYERS, default=0)
    if first is not None and layers is not None and first < layers:
        found.refuse(
            "use_sliding_window",
            f", so layers from {first} on (max_window_layers) would attend to a window of keys, "
            "but only full attention is implemented",
        )


def contents(config: ModelConfig, dtype: str = "") -> dict[str, dict[str, Any]]:
    """{file: content} of the config file of a release of these sizes, as the hub spells it.

    dtype: what `compute_dtype` reads back; "" leaves the key out.
    Raises ValueError for a decoder that no family has.
    """
    family, llm = families.family(config), config.llm
    content = {
        "architectures": [families.DECODERS[family]],
        "model_type": family,
        **configs.decoder_sizes(llm),
        "rope_scaling": None,
        "tie_word_embeddings": llm.tied_head,
    }
    if llm.rope_llama3:
        values = dict(zip(configs.LLAMA3, llm.rope_llama3, strict=True))
        original = int(values["original_max_position_embeddings"])
        values["original_max_position_embeddings"] = original
        content["rope_scaling"] = {"rope_type": "llama3", **values}
    if family == "qwen3" or llm.head_dim * llm.num_heads != llm.hidden_size:
        content["head_dim"] = llm.head_dim
    if family != "qwen2":
        content["attention_bias"] = llm.qkv_bias
    if family == "llama":
        content["mlp_bias"] = llm.mlp_bias
    if dtype:
        content["torch_dtype"] = dtype
    return {"config.json": content}
