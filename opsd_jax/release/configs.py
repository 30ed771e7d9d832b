"""Config files of a released folder: llm_config.json, vit_config.json, config.json and ae_params.json.

Sizes are read with their types and ranges. Keys that change the computation are refused unless their value is the one
that is computed here: a release that was trained with another one would load and give wrong numbers.
"""

import dataclasses
import os
import typing

from opsd_jax.inputs import json_files
from opsd_jax.model.config import (
    GenerationConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    VAEConfig,
    ViTConfig,
)

NAMES = ("llm_config.json", "vit_config.json", "config.json", "ae_params.json")
# Keys that change the computation, and their only values that are implemented. Absent or null is one of them: that is
# what the official code computes then (it sets qk_norm, layer_module, tie_word_embeddings and rope itself). The copies
# of the first two files in config.json follow the same rules. Inert: sliding_window and max_window_layers without
# use_sliding_window, attention_dropout (the official attention has none), freeze_und, whatever is not named here.
_IMPLEMENTED = {
    "llm_config": {
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
_LAYERS, _SIDE = (
    1000,
    512,
)  # upper bounds that only a damaged number exceeds; they bound time and memory until the error
# How the network is computed where the caller does not say.
_COMPUTE = {"dtype": "float32", "remat": "none", "query_block": 0}


def read(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files in a folder.

    vit_config.json counts one layer more than the weights have: the release drops the last one.

    Args:
      generation: also the sizes of image generation, from config.json and ae_params.json (without it: the official
        autoencoder's).
      compute: dtype, remat, unroll, query_block of `ModelConfig`.
    Raises:
      FileNotFoundError: a config file is missing. ValueError: a key is missing, has a value of the wrong type, asks for
      what is not implemented, or files disagree; lists all.
    """
    problems = []
    open_ = lambda name: json_files.Object(
        name,
        json_files.read(
            os.path.join(directory, name),
            "a released folder has llm_config.json, vit_config.json and model.safetensors or "
            "ema.safetensors",
        ),
        problems,
    )
    llm, vit = open_("llm_config.json"), open_("vit_config.json")
    whole = os.path.isfile(os.path.join(directory, "config.json"))
    top = open_("config.json") if whole else json_files.Object("config.json", {}, problems)
    copies = {"llm_config": top.child("llm_config"), "vit_config": top.child("vit_config")}
    for name, found in (("llm_config", llm), ("vit_config", vit), ("config", top), *copies.items()):
        _refuse(name, found)

    heads = llm.integer("num_attention_heads")
    language = {
        "vocab_size": llm.integer("vocab_size"),
        "hidden_size": llm.integer("hidden_size", most=1 << 20),
        "num_hidden_layers": llm.integer("num_hidden_layers", most=_LAYERS),
        "num_attention_heads": heads,
        # as in the official code: null for one key head for each query head
        "num_key_value_heads": llm.integer("num_key_value_heads")
        if llm.values.get("num_key_value_heads", 0) is not None
        else heads,
        "intermediate_size": llm.integer("intermediate_size"),
        "rope_theta": _rope_theta(llm),
        "rms_norm_eps": llm.number("rms_norm_eps"),
        "head_dim": llm.integer("head_dim", most=1 << 20, default=None),
    }
    vision = {
        "hidden_size": vit.integer("hidden_size", most=1 << 20),
        "num_hidden_layers": vit.integer("num_hidden_layers", least=2, most=_LAYERS),
        "num_attention_heads": vit.integer("num_attention_heads"),
        "intermediate_size": vit.integer("intermediate_size"),
        "patch_size": vit.integer("patch_size", most=1 << 12),
        "image_size": vit.integer("image_size"),
        "layer_norm_eps": vit.number("layer_norm_eps", default=1e-6),
    }
    if generation and not whole:
        problems.append(
            "config.json is missing: image generation needs its latent_patch_size and max_latent_size"
        )
    elif generation and top.values.get("visual_gen") is False and not top.has("latent_patch_size"):
        problems.append(
            "config.json: visual_gen is false, so the folder has no image generation: import it with "
            "--only=understanding, or ask it without --visual_thoughts=generated"
        )
        latent, vae, autoencoder = {}, None, json_files.Object("config.json", {}, problems)
    elif generation:
        latent = dict(
            patch=top.integer("latent_patch_size", most=1 << 8),
            side=top.integer("max_latent_size", most=_SIDE),
            timestep_shift=top.number("timestep_shift", default=1.0),
        )
        vae, autoencoder = _autoencoder(directory, problems), top.child("vae_config")
    summary = f"the config files of {directory} cannot be used:"
    top.check(summary)

    language["head_dim"] = language["head_dim"] or language["hidden_size"] // heads
    # config.json repeats both files; it may count the vision layers as they are in the weights
    for name, own in (("llm_config", language), ("vit_config", vision)):
        copy = dict(copies[name].values)
        if name == "llm_config" and (theta := _rope_theta(copies[name], required=False)):
            copy["rope_theta"] = theta
        for key in own.keys() & {key for key, value in copy.items() if value is not None}:
            allowed = [own[key]] + [own[key] - 1] * (
                (name, key) == ("vit_config", "num_hidden_layers")
            )
            if isinstance(copy[key], bool) or copy[key] not in allowed:
                problems.append(
                    f"{name}.{key} is {json_files.shown(copy[key])} in config.json and {own[key]} in "
                    f"{name}.json"
                )
    side = vision["image_size"] // vision["patch_size"]
    if not 1 <= side <= _SIDE:
        problems.append(
            f"vit_config.json: images of {vision['image_size']} pixels (image_size) in patches of "
            f"{vision['patch_size']} (patch_size) have {side} a side: at least 1 and at most {_SIDE} are "
            "possible"
        )
    if top.has("vit_max_num_patch_per_side") and top.values["vit_max_num_patch_per_side"] != side:
        top.refuse(
            "vit_max_num_patch_per_side",
            f", but images of {vision['image_size']} pixels in patches of "
            f"{vision['patch_size']}, as vit_config.json says, have {side}",
        )
    for key in ("downsample", "z_channels") if generation else ():
        if autoencoder.has(key) and autoencoder.values[key] != getattr(vae, key):
            problems.append(
                f"vae_config.{key} is {json_files.shown(autoencoder.values[key])} in config.json, the autoencoder "
                f"has {getattr(vae, key)} (from ae_params.json, or without that file from the official code)"
            )
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
                head_dim=llm.values.get("head_dim") or 0,
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
            **_COMPUTE | compute,
        )
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def _refuse(name, found) -> None:
    """Adds a problem for every value that changes the computation and is not implemented."""
    for key, values in _IMPLEMENTED[name].items():
        spelled = [json_files.shown(value) for value in values]
        if (
            found.has(key) and json_files.shown(found.values[key]) not in spelled
        ):  # spelled: in Python True equals 1
            found.refuse(
                key,
                f", but only {spelled[0]} is implemented: weights that were trained with another value "
                "cannot be used here",
            )
    layers = found.values.get("layer_types")  # transformers 5
    if (
        name == "llm_config"
        and layers is not None
        and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers))
    ):
        found.refuse("layer_types", ', but only "full_attention" is implemented')


def _rope_theta(llm, required: bool = True) -> float | None:
    """The base of the rotary positions: of the key itself (transformers 4) or of rope_parameters (transformers 5).

    Any other kind of rotary positions than the default is a problem.
    """
    found = {"rope_theta": llm.number("rope_theta", default=None)}
    for key in ("rope_parameters", "rope_scaling"):
        rope = llm.child(key)
        kinds = [rope.values[name] for name in ("rope_type", "type") if rope.has(name)]
        others = {name for name in rope.values if rope.has(name)} - {
            "rope_type",
            "type",
            "rope_theta",
            "partial_rotary_factor",
        }
        if (
            others
            or any(kind != "default" for kind in kinds)
            or rope.values.get("partial_rotary_factor", 1) not in (1, None)
        ):
            llm.refuse(
                key,
                ', but only rope_type "default", which has no further keys than rope_theta, is implemented',
            )
        else:
            found[f"{key}.rope_theta"] = rope.number("rope_theta", default=None)
    given = {key: value for key, value in found.items() if value is not None}
    if len(set(given.values())) > 1:
        llm.problems.append(
            f"{llm.file}: "
            + " and ".join(f"{llm.prefix}{key} is {value}" for key, value in given.items())
            + ": which one is right?"
        )
    if not given and required and not llm.has("rope_theta"):
        llm.problems.append(f"{llm.file} lacks 'rope_theta': give a positive number")
    return next(iter(given.values()), None)


def _autoencoder(directory, problems) -> VAEConfig | None:
    """From ae_params.json, None where it is faulty; the official code's numbers without such a file, as the releases."""
    path = os.path.join(directory, "ae_params.json")
    if not os.path.isfile(path):
        return VAEConfig()
    found = json_files.Object("ae_params.json", json_files.read(path), problems)
    _refuse("ae_params", found)
    values = dict(
        channels=found.integer("ch", most=1 << 16),
        multipliers=found.integers("ch_mult", most=1 << 10),
        num_res_blocks=found.integer("num_res_blocks", most=_LAYERS),
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


def contents(config: ModelConfig) -> dict[str, dict]:
    """{file: content} of the config files of a release of these sizes."""
    llm, vit = config.llm, config.vit
    language = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads,
        "intermediate_size": llm.intermediate_size,
        "rope_theta": llm.rope_theta,
        "rms_norm_eps": llm.rms_norm_eps,
    }
    if llm.head_dim * llm.num_heads != llm.hidden_size:
        language["head_dim"] = llm.head_dim
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vit.hidden_size,
        "num_hidden_layers": vit.num_layers + 1,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": vit.intermediate_size,
        "patch_size": vit.patch_size,
        "image_size": vit.side * vit.patch_size,
    }
    if vit.layer_norm_eps != 1e-6:
        vision["layer_norm_eps"] = vit.layer_norm_eps
    top = {
        "architectures": ["Bagel"],
        "model_type": "bagel",
        "visual_und": True,
        "visual_gen": config.generation is not None,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "vit_max_num_patch_per_side": vit.side,
        "llm_config": language,
        "vit_config": vision | {"num_hidden_layers": vit.num_layers},
    }
    files = {"llm_config.json": language, "vit_config.json": vision, "config.json": top}
    if config.generation:
        g, v = config.generation, config.generation.vae
        top |= {
            "latent_patch_size": g.patch,
            "max_latent_size": g.side,
            "timestep_shift": g.timestep_shift,
            "vae_config": {"downsample": v.downsample, "z_channels": v.z_channels},
        }
        files["ae_params.json"] = {
            "in_channels": 3,
            "out_ch": 3,
            "downsample": v.downsample,
            "ch": v.channels,
            "ch_mult": list(v.multipliers),
            "num_res_blocks": v.num_res_blocks,
            "z_channels": v.z_channels,
            "scale_factor": v.scale,
            "shift_factor": v.shift,
        }
    return files


def of_metadata(settings, directory: str) -> ModelConfig:
    """ModelConfig of a checkpoint from the settings in its metadata, of a run or of an import.

    Raises ValueError, which names the keys, where they are no settings of a model.
    """
    found = json_files.Object(
        f"the metadata of {directory}", settings if isinstance(settings, dict) else {}, []
    )
    model, adapters = found.child("model"), found.child("lora")
    if not (model.has("llm") and model.has("vit")):
        raise ValueError(
            f"the metadata of {directory} has no config.model.llm and .vit: it is not a checkpoint of a run "
            "or of `convert import`"
        )
    llm, vit, sizes = (
        _fields(LLMConfig, model.child("llm")),
        _fields(ViTConfig, model.child("vit")),
        model.child("generation"),
    )
    generation = None
    if sizes.values and sizes.values.get("on", True):
        flat = sizes.has(
            "on"
        )  # settings of a run; those of an import are the fields of the dataclasses
        generation = (
            _fields(GenerationConfig, sizes),
            _fields(VAEConfig, sizes if flat else sizes.child("vae")),
        )
    lora = None
    if adapters.has("rank") and adapters.values["rank"] != 0:
        lora = _fields(LoRAConfig, adapters)
    summary = f"{directory} is not a checkpoint of a model that this version can read:"
    found.check(summary)
    try:
        return ModelConfig(
            llm=LLMConfig(**llm),
            vit=ViTConfig(**vit),
            lora=lora and LoRAConfig(**lora),
            generation=generation
            and GenerationConfig(vae=VAEConfig(**generation[1]), **generation[0]),
            **_COMPUTE,
        )
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def _fields(kind, found) -> dict:
    """Arguments of a dataclass from the keys of a JSON object, each of the field's type; a key may be absent where the
    field has a default."""
    defaults = {
        field.name: {} if field.default is dataclasses.MISSING else {"default": field.default}
        for field in dataclasses.fields(kind)
    }
    # the hints without the ranges, which the dataclass checks itself
    read = {
        int: lambda name, **k: found.integer(name, least=0, **k),
        float: lambda name, **k: found.number(name, positive=False, **k),
        bool: found.flag,
        tuple[int, ...]: found.integers,
        tuple[str, ...]: found.texts,
    }
    return {
        name: read[of](name, **defaults[name])
        for name, of in typing.get_type_hints(kind).items()
        if of in read
    }
