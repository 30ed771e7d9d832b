"""Which settings to change if a program does not fit."""

from typing import Any

import jax
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import sharding
from opsd_jax.model.config import ModelConfig
from opsd_jax.run import placement
from opsd_jax.runtime.chips import GIB


def advice(
    found: dict[str, Any], config: ConfigDict, stage: str, mesh: jax.sharding.Mesh
) -> list[str]:
    """Settings by name, the cheapest first, each with what it changes.

    found: a bill of one program, see `bill.bill`.
    """
    lines = _of_update(config, stage, mesh) if found["program"] == "update" else []
    if found["program"] == "sample":
        lines.append(_smaller_cache(found, stage))
    if stage == "opsd" and config.teacher.kind != "self":
        lines.append("config.teacher.kind=self keeps no second set of weights")
    if found["program"] == "sample":
        lines += _of_sampler(found, config, stage, mesh)
    lines.append(
        "config.mesh.fsdp: twice as many devices hold half of parameters, moments and EMA each"
    )
    if len(config.data.buckets.student) > 1:
        lines.append(
            "--bucket=0 shows the smaller bucket: config.data.buckets without the largest one, "
            "with config.data.on_too_long=skip, leaves its examples out"
        )
    return lines


def of_answers(
    found: dict[str, Any], model: ModelConfig, mesh: jax.sharding.Mesh, batch_size: int
) -> list[str]:
    """What to change where questions cannot be answered on a host.

    found: a bill of one program. mesh: devices of the host. batch_size: questions of a batch.
    """
    count = mesh.devices.size
    copies, lines = sharding.batch_divisor(mesh), []
    larger = [n for n in placement.degrees(model, count) if n > count // copies]
    if larger:
        lines.append(
            f"--tensor={larger[0]}, here and for the command: each copy of the model on more "
            f"devices ({found['bytes']['params'] / GIB:.1f} GiB of weights now)"
        )
    if batch_size > copies:
        cache = found["bytes"].get("kv_cache") or found["bytes"].get("cache")
        takes = "" if cache is None else f": the KV cache takes {cache / GIB:.1f} GiB"
        half = -(-batch_size // 2 // copies) * copies
        lines.append(
            f"config.eval.batch_size={half} here, --batch_size={half} for the command{takes}"
        )
    lines.append("a host with more devices, or chips with more memory")
    return lines


def _of_update(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh) -> list[str]:
    lines, s, shards = [], config[stage], sharding.batch_divisor(mesh)
    if config.model.remat == "none":
        lines.append("config.model.remat=full recomputes activations instead of keeping them")
    if config.model.attention in ("dense", "auto"):
        if not config.model.query_block:
            lines.append(
                "config.model.query_block=512 computes attention for 512 queries at a time"
            )
        lines.append("config.model.attention=flash keeps no attention scores in memory (TPU)")
    sequences = s.batch_size // s.accumulation // shards
    if sequences > 1:
        lines.append(
            f"config.{stage}.accumulation={s.batch_size // shards} takes one sequence per device "
            f"at a time instead of {sequences}"
        )
    if config.divergence.chunk > 32:
        lines.append(
            f"config.divergence.chunk={config.divergence.chunk // 2} halves the logits that exist "
            "at once"
        )
    if not config.lora.rank:
        lines.append(
            "config.lora.rank=64 trains adapters alone: no moments, gradients or EMA of the weights"
        )
    return lines


def _smaller_cache(found: dict[str, Any], stage: str) -> str:
    cache = found["bytes"].get("kv_cache")
    takes = "" if cache is None else f": the KV cache takes {cache / GIB:.1f} GiB"
    return f"smaller config.{stage}.batch_size or config.rollout.max_new_tokens{takes}"


def _of_sampler(
    found: dict[str, Any], config: ConfigDict, stage: str, mesh: jax.sharding.Mesh
) -> list[str]:
    mesh = placement.of_rollouts(config, mesh)
    lines, shards = [], sharding.batch_divisor(mesh)
    if not config.rollout.slots and config[stage].batch_size > shards:
        lines.append(
            f"config.rollout.slots={shards} keeps the cache of one sequence per device at a time"
        )
    more = 2 * sharding.devices_per_copy(mesh)
    if more in placement.degrees(config_lib.model(config), more):
        lines.append(
            f"config.rollout.tensor={more} halves the sampler's own copy of the weights "
            f"({found['bytes']['params'] / GIB:.1f} GiB)"
        )
    return lines
