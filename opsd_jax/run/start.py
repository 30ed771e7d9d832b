"""Weights that a stage starts from."""

import dataclasses

import jax
from absl import logging

from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import folders, load
from opsd_jax.run.session import Session
from opsd_jax.runtime import checkpoint


def initial_params(run: Session, step: int | None):
    """The weights of the run's checkpoint of a step, laid out on the mesh.

    Args:
      step: None for a run without checkpoints: the weights in config.init_from, or random ones.
    Raises:
      ValueError: those weights have other sizes, or other adapters, than the settings say.
    """
    params = read(run, run.config.init_from if step is None else run.checkpoint_folder(step))
    counts = params_lib.count(params)
    groups = ", ".join(f"{group} {n:,}" for group, n in counts.items() if group != "total")
    logging.info("the model has %s parameters (%s)", f"{counts['total']:,}", groups)
    return params


def read(run: Session, source: str):
    """The weights in a folder, laid out on the mesh; random ones for "".

    Raises ValueError as `initial_params`.
    """
    if not source:
        params = _random(run)
    elif folders.is_model(source):
        params = _from_model_folder(run, source)
    else:
        params = _from_checkpoint(run, source)
    if run.model.lora and "lora" not in params_lib.count(params):
        params = params_lib.merge(_new_adapters(run), params)
    return params


def _init(run: Session):
    """A function key -> random weights, not yet compiled, and the shardings of what it returns."""

    def init(key):
        return bagel.init(key, config=run.model)

    return init, sharding.tree_shardings(run.mesh, jax.eval_shape(init, jax.random.key(0)))


def _random(run: Session):
    """Random weights, from the run's seed."""
    init, shardings = _init(run)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(run.config.seed))


def _new_adapters(run: Session):
    """The adapters alone, from the run's seed; they do not change what the model computes yet."""
    init, shardings = _init(run)

    def init_adapters(key):
        return params_lib.partition(init(key))[0]

    adapters = jax.jit(init_adapters, out_shardings=params_lib.partition(shardings)[0])
    return adapters(jax.random.key(run.config.seed))


def _from_model_folder(run: Session, folder: str):
    """The weights in a released or imported folder, float32."""
    generation = bool(run.model.generation)
    found = folders.read_config(folder, generation=generation)
    if found.generation and run.model.generation:
        # How training times are chosen is not a size.
        shift = run.model.generation.timestep_shift
        sizes = dataclasses.replace(found.generation, timestep_shift=shift)
        found = dataclasses.replace(found, generation=sizes)
    if _sizes(found) != _sizes(run.model):
        raise ValueError(
            f"{folder} has sizes {found}, config.model says {run.model}: set config.model to them"
        )
    return load.load(folder, generation=generation, mesh=run.mesh)[1]


def _sizes(model: ModelConfig) -> tuple:
    return model.llm, model.vit, model.generation


def _from_checkpoint(run: Session, folder: str):
    """The weights in a checkpoint; where only this run has adapters, without adapters."""
    saved = checkpoint.metadata(folder)["config"].get("lora") or {}
    own = run.record["lora"]
    if saved.get("rank") and saved != own:
        raise ValueError(
            f"{folder} has adapters of config.lora {saved}, this run has {own}: set config.lora to "
            "theirs, or start from what `python -m opsd_jax.convert export` makes of it"
        )
    wanted = run.abstract_params()
    if run.model.lora and not saved.get("rank"):
        _, wanted = params_lib.partition(wanted)
    return checkpoint.restore_params(folder, wanted)
