"""Sizes of the model in a checkpoint, from the settings in its metadata."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from opsd_jax.inputs import json_files
from opsd_jax.model.config import (
    GenerationConfig,
    LLMConfig,
    LoRAConfig,
    ModelConfig,
    VAEConfig,
    ViTConfig,
)
from opsd_jax.release import configs


def model_config(settings: Mapping[str, Any], directory: str) -> ModelConfig:
    """ModelConfig of a checkpoint from the settings in its metadata, of a run or of an import.

    It is computed as `configs.COMPUTE` says, whatever the run did.

    Args:
      directory: folder of the checkpoint, for messages.
    Raises:
      ValueError, which names the keys, if they are not settings of a model.
    """
    found = json_files.Object(
        f"the metadata of {directory}", settings if isinstance(settings, dict) else {}, []
    )
    model, adapters = found.child("model"), found.child("lora")
    if not (model.has("llm") and "vit" in model.values):
        raise ValueError(
            f"the metadata of {directory} has no config.model.llm and .vit: it is not a checkpoint "
            "of a run or of `convert import`"
        )
    llm, vision = _fields(LLMConfig, model.child("llm")), model.child("vit")
    # null (of an import), or off (of a run): the model reads text alone
    sees = model.has("vit") and vision.values.get("on", True)
    vit = _fields(ViTConfig, vision) if sees else None
    sizes = model.child("generation")
    generation = vae = lora = None
    if sizes.values and sizes.values.get("on", True):
        # settings of a run are flat and have "on"; those of an import are the dataclasses' fields
        flat = sizes.has("on")
        generation = _fields(GenerationConfig, sizes)
        vae = _fields(VAEConfig, sizes if flat else sizes.child("vae"))
    if adapters.has("rank") and adapters.values["rank"] != 0:
        lora = _fields(LoRAConfig, adapters)
    summary = f"{directory} is not a checkpoint of a model that this version can read:"
    found.check(summary)
    try:
        return ModelConfig(
            llm=LLMConfig(**llm),
            vit=vit and ViTConfig(**vit),
            lora=lora and LoRAConfig(**lora),
            generation=generation and GenerationConfig(vae=VAEConfig(**vae), **generation),
            **configs.COMPUTE,
        )
    except ValueError as error:
        raise ValueError(f"{summary}\n  {error}") from error


def _fields(kind: type, found: json_files.Object) -> dict[str, Any]:
    """Arguments of a dataclass from the keys of a JSON object, each of the field's type.

    A key may be absent if the field has a default. Fields of other types, such as a dataclass, are
    left out.
    """
    # Ranges are not checked here: the dataclass does that.
    readers = {
        int: lambda name, **default: found.integer(name, least=0, **default),
        float: lambda name, **default: found.number(name, positive=False, **default),
        bool: found.flag,
        str: found.text,
        tuple[int, ...]: lambda name, **default: found.integers(name, least=0, **default),
        tuple[float, ...]: found.numbers,
        tuple[str, ...]: found.texts,
    }
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if reader := readers.get(hints[field.name]):
            has_default = field.default is not dataclasses.MISSING
            default = {"default": field.default} if has_default else {}
            values[field.name] = reader(field.name, **default)
    return values
