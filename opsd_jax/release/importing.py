"""`convert import`: a released folder becomes a checkpoint."""

import dataclasses
import os

import jax

from opsd_jax import config as config_lib
from opsd_jax import params as params_lib
from opsd_jax import tokenizer
from opsd_jax.inputs import json_files, paths
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import folders, load, memory, safetensors_io
from opsd_jax.release.keys import TOKENIZER_FILES
from opsd_jax.runtime import checkpoint, run_folder


def import_release(source: str, target: str, *, only: str = "", dtype: str = "") -> None:
    """Makes `target`, a checkpoint with the weights of the released folder `source`.

    Args:
      only: "understanding" leaves out image generation (expert, latent path and autoencoder).
      dtype: "float32", "bfloat16", or "" for each tensor as stored.
    Raises:
      FileNotFoundError: `source` is not a released folder, or lacks a file. FileExistsError:
      `target` holds something. ValueError: files cannot be read or do not fit each other.
    """
    paths.check_given("--source", source)
    paths.check_given("--target", target, orbax=True)
    if not os.path.isdir(source):
        raise FileNotFoundError(
            f"--source={source}: {paths.absent(source)}: give the folder of a released model"
        )
    if not folders.is_released(source):
        raise FileNotFoundError(
            f"--source={source} is not a released folder: it has neither llm_config.json nor a "
            "config.json beside weights in safetensors"
        )
    with folders.build_target(target) as made:
        config = folders.read_config(source)
        check_tokenizer(source, config)
        generation = not only and config.is_bagel
        config, params = load.load(source, generation=generation, dtype=dtype)
        kinds = " and ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)}))
        release = os.path.join(made, "release")
        os.makedirs(release)
        folders.copy_files(source, release, folders.config_files(config) + TOKENIZER_FILES)
        json_files.write(
            os.path.join(release, "source.json"),
            {
                "path": os.path.abspath(source),
                "file": safetensors_io.open_weights(source)[1],
                "dtype": kinds,
                "only": only,
            },
        )
        checkpoint.save(
            run_folder.checkpoint(made, 0),
            None,
            params,
            stage="import",
            config=config_lib.to_json({"model": _sizes(config)}),
        )
        counts = ", ".join(f"{group} {n:,}" for group, n in params_lib.count(params).items())
    print(
        f"{target}: {counts} parameters in {kinds}; peak host memory of the process "
        f"{memory.format_bytes(memory.peak())}"
    )


def _sizes(config: ModelConfig) -> dict[str, dict | None]:
    """The sizes of a model as metadata of its checkpoint, which `metadata.model_config` reads."""
    return {
        name: part and dataclasses.asdict(part)
        for name, part in (
            ("llm", config.llm),
            ("vit", config.vit),
            ("generation", config.generation),
        )
    }


def check_tokenizer(directory: str, config: ModelConfig) -> None:
    """Raises ValueError if a tokenizer in a folder does not belong to the model.

    What is imported or exported must work. A folder without tokenizer files passes.
    """
    files = set(os.listdir(directory))
    if "tokenizer_config.json" in files and (
        "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
    ):
        tokenizer.load(
            directory,
            vocab_size=config.llm.vocab_size,
            images=config.vit is not None,
            form="bagel" if config.is_bagel else "",
        )
