"""How large the measurements are, and for how long, on accelerators and on a CPU."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.doctor import machine
from opsd_jax.runtime.chips import GIB


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes and times of all measurements.

    matrix: rows and columns of matrices that are multiplied.
    array, sent, file: bytes of the array that is read and written, of what a device sends in an
      all-reduce, and of the file that is timed.
    tokens: budget of a completion. pixels: sides of the problem image and of the generated image.
    steps: denoising steps that are timed.
    measurement: seconds of repeated runs of one program.
    total: seconds after which no further measurement starts. One that has started goes on, and
      compiles for about a minute.
    """

    matrix: int
    array: int
    sent: int
    file: int
    tokens: int
    pixels: tuple[int, int]
    steps: int
    measurement: float
    total: float


ACCELERATOR = Scale(8192, 2**30, 2**26, 2**30, 128, (512, 1024), 4, 5.0, 390.0)
CPU = Scale(256, 2**24, 2**20, 2**23, 8, (16, 16), 2, 0.2, 45.0)
# Sizes for a CPU, as changes to the settings of the 7B run.
_SMALL = {
    "model": {"dtype": "float32", "remat": "none", "query_block": 0},
    "model.llm": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 96,
    },
    "model.vit": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 48,
        "side": 16,
    },
    "model.generation": {"channels": 32, "multipliers": (1, 1), "num_res_blocks": 1, "side": 16},
    "data.buckets": {
        "student": ((96, 64),),
        "teacher": ((192, 128),),
        "trace": ((192, 128, 32),),
    },
}


def default_config(platform: str) -> ConfigDict:
    """The paper's run; on a CPU with small sizes.

    platform: `jax.default_backend()`.
    """
    config = config_lib.default()
    if platform == "cpu":
        for group, values in _SMALL.items():
            at = config
            for name in group.split("."):
                at = at[name]
            at.update(values)
    return config


def memory(device: jax.Device) -> int | None:
    """Bytes that the measurements may take of a device; of a CPU, what is available."""
    limit = machine.memory_limit(device)
    if limit is None and device.platform == "cpu":
        _, available = machine.host_memory()
        return None if available is None else int(available * GIB)
    return limit


def described(config: ConfigDict, scale: Scale) -> dict[str, Any]:
    """What the measurements were made with, for the report."""
    settings = config_lib.to_json(config)
    return {
        "model": settings["model"],
        "buckets": settings["data"]["buckets"],
        "scale": dataclasses.asdict(scale),
    }
