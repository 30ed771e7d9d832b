"""Weights that a run starts from."""

import dataclasses
import os

import jax
from absl import logging

from opsd_jax import config as config_lib
from opsd_jax import params as params_lib
from opsd_jax import sharding
from opsd_jax.model import bagel
from opsd_jax.release import folders, load
from opsd_jax.run import session
from opsd_jax.runtime import checkpoint


def initial_params(run: session.Session, done):
    """The weights that the first stage starts from, laid out on the mesh."""

    config, model = run.config, config_lib.model(run.config)
    abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=model))
    shardings = sharding.tree_shardings(run.mesh, abstract)
    if done is not None or config.init_from:
        source = (
            os.path.join(run.workdir, "checkpoints", str(done))
            if done is not None
            else config.init_from
        )
        if folders.is_model(source):
            found = folders.read_config(source, generation=bool(model.generation))
            if model.generation:  # how training times are drawn is no size
                shift = model.generation.timestep_shift
                found = dataclasses.replace(
                    found, generation=dataclasses.replace(found.generation, timestep_shift=shift)
                )
            if (found.llm, found.vit, found.generation) != (model.llm, model.vit, model.generation):
                raise ValueError(
                    f"{source} has sizes {found}, config.model says {model}: set config.model to them"
                )
            _, params = load.load(
                source, generation=bool(model.generation), mesh=run.mesh
            )  # float32
        else:
            there = checkpoint.metadata(source)["config"].get("lora") or {}
            here = config_lib.to_json(config.lora)
            if there.get("rank") and there != here:
                raise ValueError(
                    f"{source} has adapters of config.lora {there}, this run has {here}: set config.lora to "
                    "theirs, or start from what `python -m opsd_jax.convert export` makes of it"
                )
            wanted = sharding.abstract(run.mesh, abstract)
            if model.lora and not there.get("rank"):
                _, wanted = params_lib.partition(wanted)
            params = checkpoint.restore_params(source, wanted)
        if model.lora and "lora" not in params_lib.count(
            params
        ):  # new adapters, without effect so far
            adapters = jax.jit(
                lambda key: params_lib.partition(bagel.init(key, config=model))[0],
                out_shardings=params_lib.partition(shardings)[0],
            )
            params = params_lib.merge(adapters(jax.random.key(config.seed)), params)
    else:
        init = jax.jit(lambda key: bagel.init(key, config=model), out_shardings=shardings)
        params = init(jax.random.key(config.seed))
    counts = params_lib.count(params)
    logging.info("parameters: %s", ", ".join(f"{group} {n:,}" for group, n in counts.items()))
    return params
