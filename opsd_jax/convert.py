"""Released checkpoints (safetensors folders of BAGEL / ThinkMorph) -> model config and parameters.

Names and layouts are facts of `params.TABLE`; nothing here depends on sizes.
"""

import json
import os

import numpy as np

from opsd_jax import params as params_lib
from opsd_jax.model.config import LLMConfig, ModelConfig, ViTConfig

# Tensors that the understanding path does not use: the generation expert's projections in and out.
_GENERATION_ONLY = ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")


def _json(directory, name):
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: --source must be a folder with llm_config.json, vit_config.json "
                                "and model.safetensors or ema.safetensors")
    with open(path) as f:
        return json.load(f)


def read_config(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from llm_config.json and vit_config.json of a released folder.

    vit_config.json counts one layer more than the file holds: the release drops the last one.
    `compute`: dtype, remat, unroll of `ModelConfig`.
    """
    llm, vit = _json(directory, "llm_config.json"), _json(directory, "vit_config.json")
    return ModelConfig(
        llm=LLMConfig(
            vocab_size=llm["vocab_size"], hidden_size=llm["hidden_size"], num_layers=llm["num_hidden_layers"],
            num_heads=llm["num_attention_heads"], num_kv_heads=llm["num_key_value_heads"],
            intermediate_size=llm["intermediate_size"], rope_theta=llm["rope_theta"],
            rms_norm_eps=llm["rms_norm_eps"]),
        vit=ViTConfig(
            hidden_size=vit["hidden_size"], num_layers=vit["num_hidden_layers"] - 1,
            num_heads=vit["num_attention_heads"], intermediate_size=vit["intermediate_size"],
            patch_size=vit["patch_size"], side=vit["image_size"] // vit["patch_size"]),
        generation=generation, **compute)


def _tensor_files(directory):
    """{tensor name: file} of model.safetensors, ema.safetensors, or either one's sharded index."""
    from safetensors import safe_open

    for stem in ("model", "ema"):
        index = os.path.join(directory, f"{stem}.safetensors.index.json")
        if os.path.isfile(index):
            with open(index) as f:
                return {name: os.path.join(directory, part) for name, part in json.load(f)["weight_map"].items()}
        path = os.path.join(directory, f"{stem}.safetensors")
        if os.path.isfile(path):
            with safe_open(path, framework="numpy") as f:
                return dict.fromkeys(f.keys(), path)
    raise FileNotFoundError(f"{directory} holds neither model.safetensors nor ema.safetensors (nor an index of one)")


def load(directory: str, *, generation: bool = False, **compute):
    """Reads a released folder: (ModelConfig, params), params float32 on the default device.

    `generation`: also read the generation expert. Raises ValueError that lists every missing, surplus or
    misshapen tensor by name at once.
    """
    import jax
    from safetensors import safe_open

    from opsd_jax.model import bagel

    config = read_config(directory, generation=generation, **compute)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
    files = _tensor_files(directory)
    opened = {path: safe_open(path, framework="numpy") for path in set(files.values())}
    problems, used, flat = [], set(), {}
    for path, leaf in params_lib.flatten(abstract).items():
        row = params_lib.fact(path)
        names = [row.name.format(layer=n) for n in range(leaf.shape[0])] if row.stacked else [row.name]
        used.update(names)
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        shape = row.their_shape(shape)
        tensors = []
        for name in names:
            if name not in files:
                problems.append(f"missing {name} (expected shape {shape})")
                continue
            tensor = opened[files[name]].get_tensor(name).astype(np.float32)
            if tensor.shape != shape:
                problems.append(f"misshapen {name}: file has {tensor.shape}, the configs say {shape}")
            tensors.append(tensor)
        if len(tensors) == len(names) and not problems:
            flat[path] = params_lib.from_checkpoint(path, tensors)
    ignored = lambda name: name.startswith(_GENERATION_ONLY) or (not generation and "_moe_gen" in name)
    problems += [f"surplus {name}" for name in files if name not in used and not ignored(name)]
    if problems:
        raise ValueError(f"{directory} does not fit its configs:\n  " + "\n  ".join(problems))
    return config, params_lib.unflatten(flat)
