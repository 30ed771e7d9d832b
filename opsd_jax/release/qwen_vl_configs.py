"""config.json and preprocessor_config.json of released folders of Qwen2.5-VL and Qwen3-VL.

Both spellings are read: that of the hub (of Qwen2.5-VL with the decoder's keys at the top level)
and that of transformers 5 (text_config in both families, rope_parameters, dtype). Keys that change
the computation are refused unless their value is implemented, as in `configs`.
"""

import dataclasses
import math
import os
from typing import Any

from opsd_jax import images
from opsd_jax.inputs import json_files
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig
from opsd_jax.release import configs, decoder_configs

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
# {model_type: its model's class}
ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
# The decoder's family, whose rules for biases and norms hold.
_DECODER = {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}
_IMPLEMENTED = {
    "text": {"hidden_act": ("silu",), "partial_rotary_factor": (1.0, 1), "mlp_bias": (False,)},
    "qwen2_5_vl": {"hidden_act": ("silu",), "in_chans": (3,), "in_channels": (3,)},
    "qwen3_vl": {"hidden_act": ("gelu_pytorch_tanh",), "in_channels": (3,)},
    "processor": {
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "resample": (3,),
    },
}
# Values of absent keys, as in transformers.
_MEAN = {"qwen2_5_vl": (0.48145466, 0.4578275, 0.40821073), "qwen3_vl": (0.5, 0.5, 0.5)}
_STD = {"qwen2_5_vl": (0.26862954, 0.26130258, 0.27577711), "qwen3_vl": (0.5, 0.5, 0.5)}
_PIXELS = {"qwen2_5_vl": (3136, 12_845_056), "qwen3_vl": (65_536, 16_777_216)}
_FULL_LAYERS, _DEEPSTACK = (7, 15, 23, 31), (8, 16, 24)
_MROPE = {"qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
_ROPE_THETA = 10_000  # of the towers


def read(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files in a folder.

    Args:
      generation: whether image generation is wanted, which these families do not have.
      compute: dtype, remat, unroll, query_block of `ModelConfig`, in place of `configs.COMPUTE`.
    Raises:
      FileNotFoundError: config.json is missing. ValueError: image generation is wanted, or a key is
      missing, has a value of the wrong type, or asks for what is not implemented; lists all.
    """
    problems: list[str] = []
    path = os.path.join(directory, "config.json")
    found = json_files.Object("config.json", json_files.read(path), problems)
    family = found.text("model_type")
    assert family in ARCHITECTURES  # `folders` has chosen this module by it
    if generation:
        raise ValueError(
            f"{directory} holds a model of the family {family}, which generates no images: do "
            "without image generation"
        )
    text = found.child("text_config") if found.has("text_config") else found
    vision = found.child("vision_config")
    processor = _processor(directory, problems)
    configs.refuse_unimplemented(_IMPLEMENTED["text"], text)
    configs.refuse_unimplemented(_IMPLEMENTED[family], vision)
    configs.refuse_unimplemented(_IMPLEMENTED["processor"], processor)
    decoder = _DECODER[family]
    decoder_configs.refuse_windows(decoder, text)
    sizes = decoder_configs.sizes(decoder, text, sections=True)
    sizes["tied_head"] = found.flag("tie_word_embeddings", default=False)
    sizes["mrope"], sizes["mrope_interleaved"] = _mrope(family, text), family == "qwen3_vl"
    tower = _tower(family, vision, processor)
    if None not in (out := vision.integer("out_hidden_size"), sizes["hidden_size"]):
        if out != sizes["hidden_size"]:
            vision.refuse("out_hidden_size", f", the decoder has {sizes['hidden_size']}")
    _pixels(family, processor)
    summary = f"the config files of {directory} cannot be used:"
    found.check(summary)
    try:
        return ModelConfig(
            llm=LLMConfig(**sizes), vit=ViTConfig(**tower), **configs.COMPUTE | compute
        )
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def compute_dtype(directory: str) -> str:
    """The dtype that the model in a folder is meant to compute in; see `configs.dtype_of`."""
    content = json_files.read(os.path.join(directory, "config.json"))
    text = content.get("text_config")
    return configs.dtype_of((text if isinstance(text, dict) else {}) | content)


def size_rule(directory: str) -> images.SmartResize:
    """The size rule of images from the config files in a folder.

    Raises ValueError as `read` does.
    """
    vit, problems = read(directory).vit, []
    processor = _processor(directory, problems)
    return images.SmartResize(vit.stride, *_pixels(vit.kind, processor))


def _processor(directory: str, problems: list[str]) -> json_files.Object:
    """The settings of the image processor; an empty object where there are none.

    They are a file of their own, or one object of the file that transformers 5 writes.
    """
    for name in FILES[1:]:
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            found = json_files.Object(name, json_files.read(path), problems)
            return found if name == FILES[1] else found.child("image_processor")
    return json_files.Object(FILES[1], {}, problems)


def _mrope(family: str, text: json_files.Object) -> tuple[int, ...]:
    """The sections of the frequencies."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.child(key)
        if rope.has("mrope_section"):
            found[key] = rope.integers("mrope_section", least=0)
        rope.flag("mrope_interleaved", default=None)
        if rope.values.get("mrope_interleaved", family == "qwen3_vl") != (family == "qwen3_vl"):
            rope.refuse("mrope_interleaved", f", but {family} has the other order of frequencies")
    if len(set(found.values())) > 1:
        text.problems.append(
            f"{text.file}: mrope_section differs in rope_parameters and rope_scaling: which one is "
            "right?"
        )
    return next(iter(found.values()), _MROPE[family]) or ()


def _tower(family: str, vision: json_files.Object, processor: json_files.Object) -> dict[str, Any]:
    """The fields of ViTConfig; None for a faulty one."""
    patch = vision.integer("patch_size", most=1 << 12)
    tower: dict[str, Any] = {
        "kind": family,
        "hidden_size": vision.integer("hidden_size", most=1 << 20),
        "num_layers": vision.integer("depth", most=configs.MOST_LAYERS),
        "num_heads": vision.integer("num_heads"),
        "intermediate_size": vision.integer("intermediate_size"),
        "patch_size": patch,
        "merge": vision.integer("spatial_merge_size", most=16, default=2),
        "temporal_patch": vision.integer("temporal_patch_size", most=16, default=2),
        "mean": processor.numbers("image_mean", default=_MEAN[family]),
        "std": processor.numbers("image_std", default=_STD[family]),
    }
    rope = vision.child("rope_parameters")
    if rope.values.get("rope_theta", _ROPE_THETA) != _ROPE_THETA:
        rope.refuse("rope_theta", f", but only {_ROPE_THETA} is implemented")
    for key, name in (
        ("patch_size", "patch_size"),
        ("merge_size", "merge"),
        ("temporal_patch_size", "temporal_patch"),
    ):
        if processor.has(key) and processor.values[key] != tower[name]:
            processor.refuse(key, f", but config.json has {tower[name]}: take both from one folder")
    if vision.has("spatial_patch_size") and vision.values["spatial_patch_size"] != patch:
        vision.refuse("spatial_patch_size", f", but patch_size is {patch}")
    if family == "qwen2_5_vl":
        return tower | {
            "side": 0,
            "window": vision.integer("window_size", default=112),
            "full_layers": vision.integers("fullatt_block_indexes", least=0, default=_FULL_LAYERS),
        }
    count = vision.integer("num_position_embeddings", default=2304)
    side = math.isqrt(count or 0)
    if count is not None and side * side != count:
        vision.refuse("num_position_embeddings", ": give a square number")
    return tower | {
        "side": side,
        "deepstack": vision.integers("deepstack_visual_indexes", least=0, default=_DEEPSTACK),
    }


def _pixels(family: str, processor: json_files.Object) -> tuple[int, int]:
    """Least and largest number of pixels of an image.

    They are keys of their own, or in `size` under the names of edges, though they are areas.
    """
    size = processor.child("size")
    found = []
    for n, (key, edge) in enumerate(
        (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    ):
        inside = size.integer(edge, most=1 << 40, default=_PIXELS[family][n])
        found.append(processor.integer(key, most=1 << 40, default=inside))
    return found[0], found[1]


def contents(config: ModelConfig, dtype: str = "") -> dict[str, dict[str, Any]]:
    """{file: content} of the config files of a release of these sizes, as the hub spells them.

    The bounds of an image's pixels are the family's.

    Args:
      dtype: what `compute_dtype` reads back; "" leaves the key out.
    """
    llm, vit = config.llm, config.vit
    family = vit.kind
    decoder = dataclasses.replace(llm, mrope=(), mrope_interleaved=False)
    text = decoder_configs.contents(ModelConfig(llm=decoder))["config.json"]
    del text["architectures"], text["model_type"], text["tie_word_embeddings"]
    vision: dict[str, Any] = {
        "model_type": family,
        "depth": vit.num_layers,
        "hidden_size": vit.hidden_size,
        "hidden_act": "silu" if family == "qwen2_5_vl" else "gelu_pytorch_tanh",
        "intermediate_size": vit.intermediate_size,
        "num_heads": vit.num_heads,
        "out_hidden_size": llm.hidden_size,
        "patch_size": vit.patch_size,
        "spatial_merge_size": vit.merge,
        "temporal_patch_size": vit.temporal_patch,
    }
    top = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "tie_word_embeddings": llm.tied_head,
    }
    if dtype:
        top["torch_dtype"] = dtype
    smallest, largest = _PIXELS[family]
    processor: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(vit.mean),
        "image_std": list(vit.std),
        "patch_size": vit.patch_size,
        "temporal_patch_size": vit.temporal_patch,
        "merge_size": vit.merge,
    }
    if family == "qwen2_5_vl":
        text["rope_scaling"] = {"type": "mrope", "mrope_section": list(llm.mrope)}
        vision |= {
            "in_chans": 3,
            "spatial_patch_size": vit.patch_size,
            "window_size": vit.window,
            "fullatt_block_indexes": list(vit.full_layers),
        }
        top |= text | {"vision_config": vision}
        processor |= {"min_pixels": smallest, "max_pixels": largest}
    else:
        text["model_type"] = "qwen3_vl_text"
        text["rope_scaling"] = {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": list(llm.mrope),
        }
        vision |= {
            "in_channels": 3,
            "num_position_embeddings": vit.side**2,
            "deepstack_visual_indexes": list(vit.deepstack),
        }
        top |= {"text_config": text, "vision_config": vision}
        processor["size"] = {"shortest_edge": smallest, "longest_edge": largest}
    return {"config.json": top, "preprocessor_config.json": processor}
