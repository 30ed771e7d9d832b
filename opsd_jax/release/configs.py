"""Config files of BAGEL's releases: llm_config.json, vit_config.json, config.json, ae_params.json.

Sizes are read with their types and ranges. Keys that change the computation are refused unless
their value is the one that is computed here: a release that was trained with another one would load
and give wrong numbers.
"""

import os
from collections.abc import Mapping
from typing import Any

from opsd_jax.inputs import json_files
from opsd_jax.model.config import (
    GenerationConfig,
    LLMConfig,
    ModelConfig,
    VAEConfig,
    ViTConfig,
)

FILES = ("llm_config.json", "vit_config.json", "config.json", "ae_params.json")
# Keys that change the computation, and their only values that are implemented. A key that is absent
# or null has one of them: that is what the official code computes then (it sets qk_norm,
# layer_module, tie_word_embeddings and rope itself). The copies of the first two files in
# config.json follow the same rules. Without effect: sliding_window and max_window_layers without
# use_sliding_window, attention_dropout (the official attention has none), freeze_und, and whatever
# is not named here.
_IMPLEMENTED = {
    "llm_config": {
        "model_type": ("qwen2",),
        "hidden_act": ("silu",),
        "qk_norm": (True,),
        "layer_module": ("Qwen2MoTDecoderLayer",),
        "tie_word_embeddings": (False,),
        "use_sliding_window": (False,),
        "attention_bias": (True,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0, 1),
    },
    "vit_config": {"hidden_act": ("gelu_pytorch_tanh",), "rope": (False,), "num_channels": (3,)},
    "config": {
        "connector_act": ("gelu_pytorch_tanh",),
        "interpolate_pos": (False,),
        "visual_und": (True,),
    },
    "ae_params": {"in_channels": (3,), "out_ch": (3,)},
}
# How a network is computed if the caller does not say.
COMPUTE = {"dtype": "float32", "remat": "none", "query_block": 0}
# Upper bounds that only a damaged number exceeds. They bound time and memory until the error.
MOST_LAYERS = 1000
_MOST_PATCHES = 512  # on a side


def read(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files in a folder.

    vit_config.json counts one layer more than the weights have: the release drops the last one.

    Args:
      generation: also the sizes of image generation, from config.json and ae_params.json (without
        the latter, those of the official autoencoder).
      compute: dtype, remat, unroll, query_block of `ModelConfig`, in place of `COMPUTE`.
    Raises:
      FileNotFoundError: a config file is missing. ValueError: a key is missing, has a value of the
      wrong type, asks for what is not implemented, or files disagree; lists all.
    """
    problems = []
    llm, vit, top = _open(directory, problems)
    copies = {"llm_config": top.child("llm_config"), "vit_config": top.child("vit_config")}
    for name, found in (("llm_config", llm), ("vit_config", vit), ("config", top), *copies.items()):
        refuse_unimplemented(_IMPLEMENTED[name], found)
    top.flag("visual_gen", default=None)
    language, vision = _language(llm), _vision(vit)
    latent, vae = _generation(directory, top) if generation else ({}, None)
    summary = f"the config files of {directory} cannot be used:"
    top.check(summary)

    heads = language["num_attention_heads"]
    head_dim = language["head_dim"] or language["hidden_size"] // heads
    _compare_copy("llm_config", language | {"head_dim": head_dim}, copies["llm_config"])
    _compare_copy("vit_config", vision, copies["vit_config"])
    side = _patches_on_a_side(vision, top)
    if vae is not None:
        _compare_autoencoder(vae, top.child("vae_config"))
    top.check(f"the config files of {directory} disagree; take all of them from one release:")
    try:
        return ModelConfig(
            llm=LLMConfig(
                vocab_size=language["vocab_size"],
                hidden_size=language["hidden_size"],
                num_layers=language["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=language["num_key_value_heads"],
                intermediate_size=language["intermediate_size"],
                rope_theta=language["rope_theta"],
                rms_norm_eps=language["rms_norm_eps"],
                head_dim=language["head_dim"] or 0,
            ),
            vit=ViTConfig(
                hidden_size=vision["hidden_size"],
                num_layers=vision["num_hidden_layers"] - 1,
                num_heads=vision["num_attention_heads"],
                intermediate_size=vision["intermediate_size"],
                patch_size=vision["patch_size"],
                side=side,
                layer_norm_eps=vision["layer_norm_eps"],
            ),
            generation=GenerationConfig(vae=vae, **latent) if generation else None,
            **COMPUTE | compute,
        )
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def compute_dtype(directory: str) -> str:
    """The dtype that the model in a folder is meant to compute in, whatever its weights are.

    It is `torch_dtype` of llm_config.json (`dtype` as transformers 5 writes it); bfloat16, in which
    the official code computes, where the file names no dtype that is implemented.
    """
    return dtype_of(json_files.read(os.path.join(directory, "llm_config.json")))


def dtype_of(llm: Mapping[str, Any]) -> str:
    """The compute dtype that the content of a config file names, as in `compute_dtype`."""
    named = llm.get("torch_dtype") or llm.get("dtype")
    return named if named in ("float32", "bfloat16") else "bfloat16"


# --- sizes from each file ------------------------------------------------------------------------


def _open(directory: str, problems: list[str]) -> list[json_files.Object]:
    """llm_config.json, vit_config.json and config.json, which is empty if it is absent."""
    why = (
        "a released folder has llm_config.json, vit_config.json and model.safetensors or "
        "ema.safetensors"
    )
    found = []
    for name in FILES[:3]:
        path = os.path.join(directory, name)
        optional = name == "config.json" and not os.path.isfile(path)
        values = {} if optional else json_files.read(path, why)
        found.append(json_files.Object(name, values, problems))
    return found


def _language(llm: json_files.Object) -> dict[str, Any]:
    """Sizes of the decoder under the keys of llm_config.json; None for a faulty one."""
    heads = llm.integer("num_attention_heads")
    # as in the official code: null for as many key heads as query heads
    null = llm.values.get("num_key_value_heads", 0) is None
    return {
        "vocab_size": llm.integer("vocab_size"),
        "hidden_size": llm.integer("hidden_size", most=1 << 20),
        "num_hidden_layers": llm.integer("num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if null else llm.integer("num_key_value_heads"),
        "intermediate_size": llm.integer("intermediate_size"),
        "rope_theta": rope(llm)[0],
        "rms_norm_eps": llm.number("rms_norm_eps"),
        "head_dim": llm.integer("head_dim", most=1 << 20, default=None),
    }


def _vision(vit: json_files.Object) -> dict[str, Any]:
    """Sizes of the vision tower under the keys of vit_config.json; None for a faulty one."""
    return {
        "hidden_size": vit.integer("hidden_size", most=1 << 20),
        "num_hidden_layers": vit.integer("num_hidden_layers", least=2, most=MOST_LAYERS),
        "num_attention_heads": vit.integer("num_attention_heads"),
        "intermediate_size": vit.integer("intermediate_size"),
        "patch_size": vit.integer("patch_size", most=1 << 12),
        "image_size": vit.integer("image_size"),
        "layer_norm_eps": vit.number("layer_norm_eps", default=1e-6),
    }


def _generation(directory: str, top: json_files.Object) -> tuple[dict[str, Any], VAEConfig | None]:
    """(arguments of GenerationConfig without the autoencoder, the autoencoder's sizes).

    A fault is added to the problems; ({}, None) if the folder has no image generation.
    """
    if not os.path.isfile(os.path.join(directory, "config.json")):
        top.problems.append(
            "config.json is missing: image generation needs its latent_patch_size and "
            "max_latent_size"
        )
        return {}, None
    if top.values.get("visual_gen") is False and not top.has("latent_patch_size"):
        top.problems.append(
            "config.json: visual_gen is false, so the folder has no image generation: import it "
            "with --only=understanding, or ask it without --visual_thoughts=generated"
        )
        return {}, None
    latent = dict(
        patch=top.integer("latent_patch_size", most=1 << 8),
        side=top.integer("max_latent_size", most=_MOST_PATCHES),
        timestep_shift=top.number("timestep_shift", default=1.0),
    )
    top.child("vae_config")
    return latent, _autoencoder(directory, top.problems)


def _autoencoder(directory: str, problems: list[str]) -> VAEConfig | None:
    """Sizes from ae_params.json; None if it is faulty.

    Releases come without this file: then the numbers of the official code.
    """
    path = os.path.join(directory, "ae_params.json")
    if not os.path.isfile(path):
        return VAEConfig()
    found = json_files.Object("ae_params.json", json_files.read(path), problems)
    refuse_unimplemented(_IMPLEMENTED["ae_params"], found)
    values = dict(
        channels=found.integer("ch", most=1 << 16),
        multipliers=found.integers("ch_mult", most=1 << 10),
        num_res_blocks=found.integer("num_res_blocks", most=MOST_LAYERS),
        z_channels=found.integer("z_channels", most=1 << 16),
        scale=found.number("scale_factor"),
        shift=found.number("shift_factor", positive=False),
    )
    if len(values["multipliers"] or ()) > 16:
        found.refuse("ch_mult", ": give at most 16 numbers")
    if None in values.values():
        return None
    try:
        vae = VAEConfig(**values)
    except ValueError as error:
        problems.append(f"ae_params.json: {error}")
        return None
    if found.has("downsample") and found.values["downsample"] != vae.downsample:
        found.refuse(
            "downsample", f", but {len(vae.multipliers)} numbers in ch_mult make {vae.downsample}"
        )
    return vae


# --- what is refused -----------------------------------------------------------------------------


def refuse_unimplemented(
    implemented: Mapping[str, tuple[Any, ...]], found: json_files.Object
) -> None:
    """Adds a problem for every value that changes the computation and is not implemented.

    implemented: the values of each key that are, the usual one first.
    """
    for key, values in implemented.items():
        # compared as JSON, because True equals 1 in Python
        spelled = [json_files.shown(value) for value in values]
        if found.has(key) and json_files.shown(found.values[key]) not in spelled:
            found.refuse(
                key,
                f", but only {spelled[0]} is implemented: weights that were trained with another "
                "value cannot be used here",
            )
    layers = found.values.get("layer_types")  # transformers 5
    if layers is not None and not (
        isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    ):
        found.refuse("layer_types", ', but only "full_attention" is implemented')


# Keys of rotary positions of type "llama3", in the order of `LLMConfig.rope_llama3`.
LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def rope(
    llm: json_files.Object, *, required: bool = True, scaled: bool = False, sections: bool = False
) -> tuple[float | None, tuple[float, ...]]:
    """The base of the rotary positions and their scaling: (theta, `LLMConfig.rope_llama3`).

    The base is a key of its own (transformers 4) or in rope_parameters (transformers 5), the
    scaling is in rope_scaling or in rope_parameters. Any kind of rotary positions that is not
    implemented is a problem.

    Args:
      required: whether a missing base is a problem; None without.
      scaled: whether the type "llama3" is implemented; else only "default".
      sections: whether positions may have three dimensions: type "mrope", which is "default" with
        a section of the frequencies for each dimension.
    """
    found = {"rope_theta": llm.number("rope_theta", default=None)}
    scalings: dict[str, tuple[float, ...]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = llm.child(key)
        kinds = {rope.values[name] for name in ("rope_type", "type") if _is_text(rope, name)}
        names = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if sections:
            names |= {"mrope_section", "mrope_interleaved"}
            kinds = {"default" if kind == "mrope" else kind for kind in kinds}
        is_llama3 = scaled and kinds == {"llama3"}
        if is_llama3:
            names |= {*LLAMA3}
        if (
            {name for name in rope.values if rope.has(name)} - names
            or not (is_llama3 or kinds <= {"default"})
            or any(rope.has(name) and not _is_text(rope, name) for name in ("rope_type", "type"))
            or rope.values.get("partial_rotary_factor", 1) not in (1, None)
        ):
            further = ', and "llama3" with its four numbers, are' if scaled else ", is"
            llm.refuse(
                key,
                ', but only rope_type "default", which has no further keys than rope_theta'
                f"{further} implemented",
            )
            continue
        found[f"{key}.rope_theta"] = rope.number("rope_theta", default=None)
        if is_llama3:
            numbers = [rope.number(name) for name in LLAMA3]
            scalings[key] = tuple(float(n) for n in numbers if n is not None)
        elif kinds:
            scalings[key] = ()
    given = {key: value for key, value in found.items() if value is not None}
    if len(set(given.values())) > 1:
        llm.problems.append(
            f"{llm.file}: "
            + " and ".join(f"{llm.prefix}{key} is {value}" for key, value in given.items())
            + ": which one is right?"
        )
    if len(set(scalings.values())) > 1:
        llm.problems.append(
            f"{llm.file}: {llm.prefix}rope_parameters and {llm.prefix}rope_scaling differ: which "
            "one is right?"
        )
    if not given and required and not llm.has("rope_theta"):
        llm.problems.append(f"{llm.file} lacks 'rope_theta': give a positive number")
    return next(iter(given.values()), None), next(iter(scalings.values()), ())


def _is_text(found: json_files.Object, key: str) -> bool:
    return isinstance(found.values.get(key), str)


def _compare_copy(name: str, sizes: dict[str, Any], copy: json_files.Object) -> None:
    """Adds a problem for every size that its copy in config.json contradicts.

    The copy may count the vision layers as they are in the weights, one less.
    """
    values = dict(copy.values)
    if name == "llm_config" and (theta := rope(copy, required=False)[0]):
        values["rope_theta"] = theta
    for key in sizes.keys() & {key for key, value in values.items() if value is not None}:
        allowed = [sizes[key]]
        if (name, key) == ("vit_config", "num_hidden_layers"):
            allowed.append(sizes[key] - 1)
        if isinstance(values[key], bool) or values[key] not in allowed:
            copy.problems.append(
                f"{name}.{key} is {json_files.shown(values[key])} in config.json and {sizes[key]} "
                f"in {name}.json"
                + "".join(
                    f"; config.json may also say {other}, without the layer that releases drop"
                    for other in allowed[1:]
                )
            )


def _patches_on_a_side(vision: dict[str, Any], top: json_files.Object) -> int:
    """Patches on a side of the largest image; adds a problem if their number cannot be right."""
    pixels, patch = vision["image_size"], vision["patch_size"]
    side = pixels // patch
    if not 1 <= side <= _MOST_PATCHES:
        top.problems.append(
            f"vit_config.json: images of {pixels} pixels (image_size) in patches of {patch} "
            f"(patch_size) have {side} a side: at least 1 and at most {_MOST_PATCHES} are possible"
        )
    if top.has("vit_max_num_patch_per_side") and top.values["vit_max_num_patch_per_side"] != side:
        top.refuse(
            "vit_max_num_patch_per_side",
            f", but images of {pixels} pixels in patches of {patch}, as vit_config.json says, have "
            f"{side}",
        )
    return side


def _compare_autoencoder(vae: VAEConfig, copy: json_files.Object) -> None:
    """Adds a problem for every key of vae_config in config.json that contradicts the sizes."""
    for key in ("downsample", "z_channels"):
        if copy.has(key) and copy.values[key] != getattr(vae, key):
            copy.problems.append(
                f"vae_config.{key} is {json_files.shown(copy.values[key])} in config.json, the "
                f"autoencoder has {getattr(vae, key)} (from ae_params.json, or without that file "
                "from the official code)"
            )


# --- writing -------------------------------------------------------------------------------------


def contents(config: ModelConfig, dtype: str = "") -> dict[str, dict[str, Any]]:
    """{file: content} of the config files of a release of these sizes.

    dtype: what `compute_dtype` reads back; "" leaves the key out.
    """
    llm, vit, generation = _llm_config(config.llm), _vit_config(config.vit), config.generation
    if dtype:
        llm["torch_dtype"] = dtype
    top = {
        "architectures": ["Bagel"],
        "model_type": "bagel",
        "visual_und": True,
        "visual_gen": generation is not None,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "vit_max_num_patch_per_side": config.vit.side,
        "llm_config": llm,
        "vit_config": vit | {"num_hidden_layers": config.vit.num_layers},
    }
    files = {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}
    if generation is not None:
        vae = generation.vae
        top |= {
            "latent_patch_size": generation.patch,
            "max_latent_size": generation.side,
            "timestep_shift": generation.timestep_shift,
            "vae_config": {"downsample": vae.downsample, "z_channels": vae.z_channels},
        }
        files["ae_params.json"] = {
            "in_channels": 3,
            "out_ch": 3,
            "downsample": vae.downsample,
            "ch": vae.channels,
            "ch_mult": list(vae.multipliers),
            "num_res_blocks": vae.num_res_blocks,
            "z_channels": vae.z_channels,
            "scale_factor": vae.scale,
            "shift_factor": vae.shift,
        }
    return files


def decoder_sizes(llm: LLMConfig) -> dict[str, Any]:
    """The sizes of a decoder, as the config files of all families spell them."""
    return {
        "hidden_act": "silu",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "intermediate_size": llm.intermediate_size,
        "rope_theta": llm.rope_theta,
        "rms_norm_eps": llm.rms_norm_eps,
    }


def _llm_config(llm: LLMConfig) -> dict[str, Any]:
    content = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        **decoder_sizes(llm),
    }
    if llm.head_dim * llm.num_heads != llm.hidden_size:
        content["head_dim"] = llm.head_dim
    return content


def _vit_config(vit: ViTConfig) -> dict[str, Any]:
    content = {
        "model_type": "siglip_vision_model",
        "hidden_size": vit.hidden_size,
        "num_hidden_layers": vit.num_layers + 1,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": vit.intermediate_size,
        "patch_size": vit.patch_size,
        "image_size": vit.side * vit.patch_size,
    }
    if vit.layer_norm_eps != 1e-6:
        content["layer_norm_eps"] = vit.layer_norm_eps
    return content
