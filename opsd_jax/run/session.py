"""Everything of a run that is opened once."""

import dataclasses
import json
import os

import jax
from jax.experimental import multihost_utils

from opsd_jax import config as config_lib
from opsd_jax import rollout, sharding, tokenizer
from opsd_jax.data import arrayrecord, packing, procedural
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.model import attention
from opsd_jax.release import folders
from opsd_jax.runtime import checkpoint, metrics
from opsd_jax.runtime import clock as clock_lib

# What may change between a run and its continuation.
FREE_SETTINGS = (
    "log",
    "health",
    "eval",
    "checkpoint.keep_latest",
    "checkpoint.accept_changed",
    "data.threads",
    "data.prefetch",
    "data.cache_rows",
    "mesh",
    "arms",
    "run_arms",
)


@dataclasses.dataclass
class Run:
    """What all stages share. Made once by `prepare`; nothing in it changes while training."""

    config: object
    workdir: str
    data_workdir: str
    mesh: object
    tokenizer: object
    marker: object
    packer: object
    digests: dict
    clock: object
    writer: object

    def rollout(self, **changes):
        shards = sharding.batch_divisor(self.mesh)
        return config_lib.rollout(
            self.config, self.tokenizer, self.marker, shards=shards, **changes
        )


def record_config(config, workdir: str) -> None:
    """Writes W/config.json; ConfigMismatch if W holds a run with other settings.

    A run that has not logged a step, because it failed at once, has nothing to protect: its record is replaced.
    """
    record, path = checkpoint.config_to_json(config), os.path.join(workdir, "config.json")
    rows = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(path) and os.path.exists(rows) and os.path.getsize(rows):
        checkpoint.check_config(
            workdir_lib.read_record(workdir),
            record,
            ignore=FREE_SETTINGS,
            defaults=config_lib.default(),
        )
    else:
        write_json(path, record)


def prepare(
    config, workdir: str, data_workdir: str, resume_step: int | None, saved: dict | None = None
) -> Run:
    """Makes everything of a run that is not weights: mesh, data, tokenizer, writers.

    saved: the metadata of the checkpoint that it continues from, None at the start. ConfigMismatch where the data or the
    tokenizer have another content now.
    """

    clock = clock_lib.Clock()
    primary = jax.process_index() == 0
    mesh = sharding.make_mesh(**config.mesh)
    attention.check_platform(config.model.attention, mesh.devices.flat[0].platform)
    for stage in config.stages:
        check_batch(config, stage, sharding.batch_divisor(mesh))
    with clock("data"):
        if primary:
            procedural.make_if_absent(config, data_workdir)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("data is there")
        tok = tokenizer.load(
            workdir_lib.tokenizer_folder(config, data_workdir),
            vocab_size=config.model.llm.vocab_size,
        )
        where = workdir_lib.folder(config, data_workdir)
        digests = {
            "data": {task: arrayrecord.digest(where, task) for task in config.data.tasks},
            "tokenizer": tok.digest,
        }
    if saved:
        checkpoint.check_digests(
            saved.get("digests") or {}, digests, accepted=config.checkpoint.accept_changed
        )
    elif config.init_from:
        checkpoint.check_digests(
            _tokenizer_of_origin(config),
            {"tokenizer": tok.digest},
            whose=config.init_from,
            accepted=config.checkpoint.accept_changed,
        )
    marker = rollout.Marker.build(tok.token_bytes, config.model.llm.vocab_size)
    writer = metrics.Writer(
        workdir,
        primary=primary,
        tensorboard=config.log.tensorboard,
        wandb=wandb_arguments(config, workdir, data_workdir),
        resume_step=resume_step,
    )
    return Run(
        config,
        workdir,
        data_workdir,
        mesh,
        tok,
        marker,
        packing.Packer(config, tok),
        digests,
        clock,
        writer,
    )


def _tokenizer_of_origin(config) -> dict:
    """{"tokenizer": digest} of the weights that a run starts from; {} where they have no tokenizer with them."""
    if not folders.is_model(config.init_from):
        return checkpoint.metadata(config.init_from).get("digests") or {}
    folder = folders.tokenizer_folder(config.init_from)
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return {}
    return {"tokenizer": tokenizer.load(folder).digest}


def wandb_arguments(config, workdir: str, data_workdir: str) -> dict | None:
    """What a run tells Weights & Biases about itself, None if it does not log there. A run and its arms are one group."""
    if not config.log.wandb:
        return None
    name, group = (os.path.basename(os.path.abspath(folder)) for folder in (workdir, data_workdir))
    return {
        "project": config.log.wandb,
        "name": name,
        "group": group,
        "config": checkpoint.config_to_json(config),
    }


def check_batch(config, stage: str, shards: int) -> None:
    """ValueError where the rows of a stage's micro step, or of its evaluation, do not fill the batch shards of a mesh."""
    s = config[stage]
    micro = s.batch_size // s.accumulation
    if micro % shards:
        raise ValueError(
            f"a micro step of config.{stage} has {micro} rows (batch_size {s.batch_size} / accumulation {s.accumulation}) for "
            f"{shards} batch shards (mesh data x fsdp): lower config.{stage}.accumulation, raise "
            f"config.{stage}.batch_size, or give devices to config.mesh.tensor"
        )
    if (config.eval.every or config.eval.final_split) and config.eval.batch_size % shards:
        raise ValueError(
            f"config.eval.batch_size {config.eval.batch_size} must be a multiple of the {shards} batch shards of "
            "config.mesh"
        )


def write_json(path, value) -> None:
    metrics.write_text(path, json.dumps(value, indent=1))
