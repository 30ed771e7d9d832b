"""Writes a folder in the layout of the releases with random weights of a size.

  python perf/random_release.py --target=/tmp/release --size=7b

For trying what depends on sizes alone, such as memory and time of `convert`, `generate` and `eval`,
without a download. The folder has the understanding path in bfloat16 (15.0 GiB for 7b), the config
files, and a small tokenizer, whose words are those of the procedural tasks. Weights are normal with
variance 1 / fan in, norms 1, biases 0; their values repeat after four million, because drawing all
takes hours.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import drawing
import jax.numpy as jnp
import numpy as np

from opsd_jax.inputs import json_files
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import bagel_keys, configs, load, safetensors_io
from opsd_jax.tasks import vocabulary

BFLOAT16 = np.dtype(jnp.bfloat16)
PERIOD = 4_194_301  # a prime, so that the rows of no matrix are equal


def outline(config: ModelConfig) -> dict[tuple[str, str], tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of all tensors of a release, see `safetensors_io.Outline`."""
    found = {}
    for path, leaf in load.abstract_params(config).items():
        key = bagel_keys.key(path)
        for name in key.names(leaf.shape):
            found[key.file, name] = key.tensor_shape(leaf.shape), BFLOAT16
    return found


def tensors(config: ModelConfig, seed: int = 0) -> Iterator[tuple[str, str, np.ndarray]]:
    """(file, name, random tensor) of each tensor of the outline, one at a time."""
    values = np.random.default_rng(seed).standard_normal(PERIOD, np.float32)
    for (file, name), (shape, _) in outline(config).items():
        if name.endswith("bias"):
            tensor = np.zeros(shape, BFLOAT16)
        elif len(shape) == 1:  # scales of norms
            tensor = np.ones(shape, BFLOAT16)
        else:
            scaled = (values * np.float32(np.prod(shape[1:]) ** -0.5)).astype(BFLOAT16)
            tensor = np.resize(scaled.view(np.uint16), shape).view(BFLOAT16)
        yield file, name, tensor


def write(target: pathlib.Path, config: ModelConfig, seed: int = 0) -> int:
    """Writes the folder, which must not exist; returns the bytes of all tensors."""
    os.makedirs(target)
    vocabulary.build_tokenizer(target)
    for name, content in configs.contents(config, "bfloat16").items():
        json_files.write(os.path.join(target, name), content)
    limit = 5 * 10**9
    return safetensors_io.write(str(target), outline(config), tensors(config, seed), "model", limit)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=pathlib.Path, required=True, help="folder to make")
    parser.add_argument("--size", default="7b", choices=list(drawing.SIZES), help="default: 7b")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    config = dataclasses.replace(drawing.model(args.size), generation=None)
    print(f"{args.target}: {write(args.target, config, args.seed) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
