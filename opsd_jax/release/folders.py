"""Folders that hold a model: as released (safetensors), or as `convert import` makes them.

A released folder has weights as safetensors, config files and tokenizer files. One of BAGEL has
llm_config.json, one of another family config.json beside its weights. An imported one has
checkpoints/0/ (Orbax, the weights alone) and release/ (the config and tokenizer files of the
release, and source.json, which says where the weights came from).
"""

import contextlib
import os
import shutil
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from opsd_jax import images
from opsd_jax.inputs import json_files
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import configs, decoder_configs, qwen_vl_configs, safetensors_io
from opsd_jax.runtime import checkpoint, locks


def is_released(directory: str) -> bool:
    """Whether it is a folder in the layout of the releases."""
    return _is_bagel(directory) or (
        os.path.isfile(os.path.join(directory, "config.json"))
        and any(safetensors_io.has_weights(directory, stem) for stem in ("model", "ema"))
    )


def _is_bagel(directory: str) -> bool:
    return os.path.isfile(os.path.join(directory, "llm_config.json"))


def _configs(directory: str) -> types.ModuleType:
    """The module that reads the config files in a folder."""
    path = os.path.join(directory, "config.json")
    if _is_bagel(directory) or not os.path.isfile(path):
        return configs
    family = json_files.read(path).get("model_type")
    return qwen_vl_configs if family in qwen_vl_configs.ARCHITECTURES else decoder_configs


def _configs_of(config: ModelConfig) -> types.ModuleType:
    """The module that reads and writes the config files of a model."""
    if config.is_bagel:
        return configs
    return qwen_vl_configs if config.has_grids else decoder_configs


def is_imported(directory: str) -> bool:
    """Whether it is a folder that `convert import` made."""
    return os.path.isfile(os.path.join(directory, "release", "source.json"))


def is_model(directory: str) -> bool:
    """Whether `release.load.load` can read the folder."""
    return is_released(directory) or is_imported(directory)


def tokenizer_folder(directory: str) -> str:
    """Folder of the config and tokenizer files of a released or imported folder."""
    return os.path.join(directory, "release") if is_imported(directory) else directory


def read_config(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files of a released or imported folder; see `configs.read`."""
    folder = tokenizer_folder(directory)
    return _configs(folder).read(folder, generation=generation, **compute)


def compute_dtype(directory: str) -> str:
    """The dtype that a released or imported model computes in; see `configs.compute_dtype`."""
    folder = tokenizer_folder(directory)
    return _configs(folder).compute_dtype(folder)


def size_rule(directory: str, config: ModelConfig) -> images.SmartResize | None:
    """The size rule of images that the files of a released or imported folder say.

    None for a family whose rule does not depend on them. Raises ValueError for faulty files.
    """
    if not config.has_grids:
        return None
    return qwen_vl_configs.size_rule(tokenizer_folder(directory))


def config_files(config: ModelConfig) -> tuple[str, ...]:
    """The names of the config files in a release of a model."""
    return _configs_of(config).FILES


def config_contents(config: ModelConfig, dtype: str = "") -> dict[str, dict[str, Any]]:
    """{file: content} of the config files of a release of a model; see `configs.contents`."""
    return _configs_of(config).contents(config, dtype)


def read_import_source(directory: str) -> dict[str, str]:
    """Where the weights of an imported folder came from, as `convert import` wrote it.

    Returns:
      {"path": the released folder, "file": "model" or "ema", "only": "" or "understanding"}.
    Raises:
      ValueError: source.json is not what `convert import` writes; names every wrong key.
    """
    path = os.path.join(directory, "release", "source.json")
    found = json_files.Object(path, json_files.read(path), [])
    source = {key: found.text(key) for key in ("path", "file", "only")}
    for key, values in (("only", ("", "understanding")), ("file", ("model", "ema"))):
        if source[key] is not None and source[key] not in values:
            found.refuse(
                key, f": give {json_files.shown(values[0])} or {json_files.shown(values[1])}"
            )
    found.check("this is not what `convert import` writes; import the release again:")
    return source


def checkpoint_shapes(directory: str) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of the weights in a checkpoint, of a run or imported.

    Raises ValueError if it holds no weights.
    """
    items = checkpoint.contents(directory)
    if "params" not in items:
        raise ValueError(f"{directory} holds no weights to export, only {sorted(items)}")
    return items["params"]


@contextlib.contextmanager
def build_target(target: str) -> Iterator[str]:
    """Gives the caller a temporary folder beside `target`, which gets that name at the end.

    Nothing remains of it after an error. What a killed process left of one is removed: only one
    process at a time converts into a target. FileExistsError if `target` holds anything.
    """
    target = os.path.abspath(target)
    with locks.only_writer(target):
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            raise FileExistsError(
                f"--target={target} exists and is not empty: choose another folder, or delete it"
            )
        unfinished = os.path.join(os.path.dirname(target), f".tmp-{os.path.basename(target)}")
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        try:
            yield unfinished
            os.rename(unfinished, target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def copy_files(source: str, target: str, names: Iterable[str]) -> None:
    """Copies those of the named files that `source` has."""
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
