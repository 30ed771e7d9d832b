"""Folders with a model: released by Hugging Face, or imported."""

import contextlib
import os
import re
import resource
import shutil
import sys

from opsd_jax.inputs import json_files
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import configs
from opsd_jax.runtime import checkpoint, locks

# What the understanding path leaves on disk: the generation expert, and the latent path in and out of it.
GENERATION = re.compile(r".*_moe_gen\b.*|(time_embedder|vae2llm|llm2vae|latent_pos_embed)\..*")
TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "special_tokens.json",
    "generation_config.json",
)
LISTED = 1000  # faults of tensors that an error lists


def is_released(directory: str) -> bool:
    """Whether it is a folder in the layout of the releases."""
    return os.path.isfile(os.path.join(directory, "llm_config.json"))


def is_imported(directory: str) -> bool:
    """Whether it is a folder that `import` made."""
    return os.path.isfile(os.path.join(directory, "release", "source.json"))


def is_model(directory: str) -> bool:
    """Whether `load` can read the folder."""
    return is_released(directory) or is_imported(directory)


def tokenizer_folder(directory: str) -> str:
    """Where the config and tokenizer files of a folder for `load` lie."""
    return os.path.join(directory, "release") if is_imported(directory) else directory


@contextlib.contextmanager
def new_folder(target):
    """A folder beside `target` that takes its name once complete. FileExistsError if `target` holds anything.

    What a killed process left of it is removed: only one at a time converts into a target.
    """
    target = os.path.abspath(target)
    with locks.only_writer(target):
        if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
            raise FileExistsError(
                f"--target={target} exists and is not empty: choose another folder, or delete it"
            )
        made = os.path.join(os.path.dirname(target), f".tmp-{os.path.basename(target)}")
        shutil.rmtree(made, ignore_errors=True)
        os.makedirs(made)
        try:
            yield made
            os.rename(made, target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def read_config(directory: str, *, generation: bool = False, **compute) -> ModelConfig:
    """ModelConfig from the config files of a released or imported folder; see `release_configs.read`."""
    return configs.read(tokenizer_folder(directory), generation=generation, **compute)


def names(row, shape):
    return [row.name.format(layer=n) for n in range(shape[0])] if row.stacked else [row.name]


def peak_memory() -> int:
    """The most memory in bytes that this process has held so far."""
    try:
        with open("/proc/self/status", encoding="utf-8") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) << 10
    except OSError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (
            0 if sys.platform == "darwin" else 10
        )


def note(directory) -> dict[str, str]:
    """What `import` noted about an imported folder: path, file and only."""
    path = os.path.join(directory, "release", "source.json")
    found = json_files.Object(path, json_files.read(path), [])
    note = {key: found.text(key) for key in ("path", "file", "only")}
    for key, values in (("only", ("", "understanding")), ("file", ("model", "ema"))):
        if note[key] is not None and note[key] not in values:
            found.refuse(
                key, f": give {json_files.shown(values[0])} or {json_files.shown(values[1])}"
            )
    found.check("this is not what `convert import` writes; import the release again:")
    return note


def stored(directory) -> dict:
    """{path: shape and dtype} of the weights in a checkpoint, of a run or imported."""
    items = checkpoint.contents(directory)
    if "params" not in items:
        raise ValueError(f"{directory} holds no weights to export, only {sorted(items)}")
    return items["params"]
