"""The model that answers: a released folder, an imported one, or a run's checkpoint."""

import dataclasses
import os

import jax

from opsd_jax import config as config_lib
from opsd_jax import images, interleave, sharding
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.inputs import paths
from opsd_jax.model import bagel
from opsd_jax.release import folders
from opsd_jax.release import load as load_lib
from opsd_jax.runtime import checkpoint


def load(
    directory: str,
    *,
    draw: bool,
    protocol: str = "",
    tokenizer: str = "",
    dtype: str = "",
    mesh=None,
) -> interleave.Model:
    """Reads a released or imported folder, or the newest (or given) checkpoint of a run.

    Args:
      draw: also read what draws; without it that stays on disk. protocol: a name of `PROTOCOLS`, or "" for the run's
        own prompt and sizes, "paper" for a released model. tokenizer: a folder; "" for the one that belongs to it.
      dtype: "float32" or "bfloat16"; "" as stored. mesh: None for all devices along `tensor`, and one question.
    Raises:
      FileNotFoundError: not a model. ValueError: it cannot draw; unknown protocol.
    """

    paths.check_given("--checkpoint", directory)
    paths.check("--tokenizer", tokenizer)
    if protocol and protocol not in interleave.PROTOCOLS:
        raise ValueError(f"--protocol={protocol}: choose from {', '.join(interleave.PROTOCOLS)}")
    placed, mesh = mesh, mesh or sharding.make_mesh(data=1, fsdp=1, tensor=-1)
    compute = {"query_block": 512}  # the scores of a large picture at once would not fit
    asked = interleave.PROTOCOLS[protocol or "paper"]
    if folders.is_model(directory):
        size = folders.read_config(directory, generation=draw).llm.vocab_size
        tok = tokenizer_lib.load(tokenizer or folders.tokenizer_folder(directory), vocab_size=size)
        config, params = load_lib.load(
            directory, generation=draw, dtype=dtype, mesh=mesh, layout="rollout", **compute
        )
        config = dataclasses.replace(config, dtype=str(params["llm"]["embed"].dtype))
    else:
        workdir = directory
        if not os.path.isdir(os.path.join(directory, "checkpoints")):  # a step: W/checkpoints/STEP
            workdir = os.path.normpath(os.path.join(directory, "..", ".."))
        if not os.path.isfile(os.path.join(workdir, "config.json")):
            raise FileNotFoundError(
                f"{directory} is no released folder (no llm_config.json), none that `python -m "
                "opsd_jax.convert import` made (no release/), and no run (no config.json)"
            )
        run = workdir_lib.load_config(workdir)
        tok = tokenizer_lib.load(
            tokenizer or workdir_lib.tokenizer_folder(run, workdir_lib.data_workdir(run, workdir)),
            vocab_size=run.model.llm.vocab_size,
        )
        config = dataclasses.replace(
            config_lib.model(run), **compute, **({"dtype": dtype} if dtype else {})
        )
        if draw and config.generation is None:
            raise ValueError(
                f"{directory} was trained without what draws: it has no generation expert"
            )
        config = config if draw else dataclasses.replace(config, generation=None)
        abstract = jax.eval_shape(lambda: bagel.init(jax.random.key(0), config=config))
        params = checkpoint.restore_params(
            directory, sharding.abstract(mesh, abstract, "rollout"), partial=not draw
        )
        if not protocol:
            return of_run(run, config, params, tok, placed)
    vit, drawn = config.vit, config.generation
    rule = images.in_proportion(asked.vit, vit.patch_size, vit.side * vit.patch_size, 980)
    return interleave.Model(
        config, params, tok, asked, rule, images.vae_rule(drawn) if drawn else images.VAE, placed
    )


def of_run(run, config, params, tokenizer, mesh=None) -> interleave.Model:
    """The model of a run as it answers by itself: prompt, sizes and drawing of the run's settings `run`."""
    protocol = interleave.Protocol(
        system=run.prompts.system,
        transparency=run.images.transparency,
        max_new_tokens=run.eval.max_new_tokens or run.rollout.max_new_tokens,
    )
    vae = images.vae_rule(config.generation) if config.generation else images.VAE
    return interleave.Model(
        config,
        params,
        tokenizer,
        protocol,
        config_lib.resize_rule(run),
        vae,
        mesh,
        dict(run.drawing),
    )
