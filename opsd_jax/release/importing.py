"""A released folder becomes an imported one."""

import dataclasses
import os
import shutil

import jax

from opsd_jax import params as params_lib
from opsd_jax import tokenizer
from opsd_jax.inputs import json_files, paths
from opsd_jax.release import configs, folders, load, safetensors_io
from opsd_jax.runtime import checkpoint


def import_release(source: str, target: str, *, only: str = "", dtype: str = "") -> None:
    """Makes `target`, a checkpoint with the weights of the released folder `source`.

    Args:
      only: "understanding" leaves out what draws. dtype: "float32", "bfloat16", or "" for each tensor as stored.
    """
    paths.check_given("--source", source)
    paths.check_given("--target", target, orbax=True)
    if not folders.is_released(source):
        raise FileNotFoundError(
            f"--source={source} is no released folder: it has no llm_config.json"
        )
    with folders.new_folder(target) as made:
        check_tokenizer(source, folders.read_config(source))
        config, params = load.load(source, generation=not only, dtype=dtype)
        kinds = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
        sizes = {
            name: part and dataclasses.asdict(part)
            for name, part in (
                ("llm", config.llm),
                ("vit", config.vit),
                ("generation", config.generation),
            )
        }
        release = os.path.join(made, "release")
        os.makedirs(release)
        copy(source, release, configs.NAMES + folders.TOKENIZER)
        json_files.write(
            os.path.join(release, "source.json"),
            {
                "path": os.path.abspath(source),
                "file": safetensors_io.folder(source)[1],
                "dtype": " and ".join(kinds),
                "only": only,
            },
        )
        checkpoint.save(
            os.path.join(made, "checkpoints", "0"),
            None,
            params,
            stage="import",
            config={"model": sizes},
        )
        counts = ", ".join(f"{group} {n:,}" for group, n in params_lib.count(params).items())
    print(
        f"{target}: {counts} parameters in {' and '.join(kinds)}; peak host memory of the process "
        f"{safetensors_io.size_of(folders.peak_memory())}"
    )


def check_tokenizer(directory, config) -> None:
    """Raises ValueError if a tokenizer in a folder is not one of the model: what is imported or exported must work."""
    files = set(os.listdir(directory))
    if "tokenizer_config.json" in files and (
        "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
    ):
        tokenizer.load(directory, vocab_size=config.llm.vocab_size)


def copy(source, target, names):
    for name in names:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
