"""The model that answers, from a released folder, an imported one, or a checkpoint of a run."""

import dataclasses
import os

from jax.sharding import Mesh

from opsd_jax import config as config_lib
from opsd_jax import images, interleave, sharding
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.inputs import checks, paths
from opsd_jax.interleave import Protocol, Reasoner
from opsd_jax.release import folders
from opsd_jax.release import load as load_lib
from opsd_jax.run import session as session_lib
from opsd_jax.run.session import Session
from opsd_jax.runtime import run_folder

QUERY_BLOCK = 512  # the attention scores of a large image at once would not fit into memory
_LARGEST = 980  # pixels per side of an image, in the official code


def load(
    directory: str | os.PathLike[str],
    *,
    generation: bool = False,
    protocol: str = "",
    tokenizer: str = "",
    dtype: str = "",
    mesh: Mesh | None = None,
) -> Reasoner:
    """Reads a released or imported folder, or the newest (or given) checkpoint of a run.

    Args:
      directory: a released or imported folder, the workdir of a run, or one of its step folders.
      generation: also read the weights that generate images; without it they stay on disk.
      protocol: a name in `interleave.PROTOCOLS`; "" for the run's own prompt and sizes, and for
        "paper" of a released model.
      tokenizer: a folder; "" for the one that belongs to the model.
      dtype: "float32" or "bfloat16"; "" as stored.
      mesh: devices that batches of questions are placed on; None for a single question, with all
        devices along `tensor`.
    Raises:
      FileNotFoundError: not a model. ValueError: it cannot generate images; unknown protocol.
      TypeError: something else than a path, such as an opened run.
    """
    checks.path("directory", directory)
    directory = os.fspath(directory)
    paths.check_given("--checkpoint", directory)
    paths.check("--tokenizer", tokenizer)
    check_protocol(protocol)
    whole = mesh or sharding.make_mesh(data=1, fsdp=1, tensor=-1)
    if folders.is_model(directory):
        reasoner = _of_release(directory, generation, protocol or "paper", tokenizer, dtype, whole)
        return dataclasses.replace(reasoner, mesh=mesh)
    workdir = _workdir_of(directory)
    session = session_lib.open_run(workdir, mesh=whole, tokenizer_folder=tokenizer)
    sizes = dataclasses.replace(session.model, query_block=QUERY_BLOCK)
    if dtype:
        sizes = dataclasses.replace(sizes, dtype=dtype)
    if generation and sizes.generation is None:
        raise ValueError(
            f"{directory} was trained without image generation: it has no generation expert"
        )
    if not generation:
        sizes = dataclasses.replace(sizes, generation=None)
    session = dataclasses.replace(session, model=sizes)
    reasoner = of_run(session, session.restore_params(directory, layout="rollout"))
    if protocol:
        reasoner = dataclasses.replace(reasoner, flow={}, **_asked_by(protocol, reasoner.config))
    return dataclasses.replace(reasoner, mesh=mesh)


def check_protocol(protocol: str) -> None:
    """ValueError for the name of an unknown protocol; "" means the run's own."""
    if protocol and protocol not in interleave.PROTOCOLS:
        raise ValueError(f"--protocol={protocol}: choose from {', '.join(interleave.PROTOCOLS)}")


def of_run(session: Session, params: dict) -> Reasoner:
    """The model of a run as it answers by itself: prompt, sizes and flow settings of the run.

    params: as `session.model` describes them. Questions are asked one by one, without a mesh.
    """
    c = session.config
    protocol = Protocol(
        system=c.prompts.system,
        transparency=c.images.transparency,
        max_new_tokens=session.answer_budget,
    )
    return Reasoner(
        session.model,
        params,
        session.tokenizer,
        protocol,
        config_lib.resize_rule(c),
        _vae_rule(session.model),
        flow=dict(c.drawing),
    )


def _of_release(
    directory: str, generation: bool, protocol: str, tokenizer: str, dtype: str, mesh: Mesh
) -> Reasoner:
    """The model of a released or imported folder. There is no run, so there is no session."""
    size = folders.read_config(directory, generation=generation).llm.vocab_size
    tok = tokenizer_lib.load(tokenizer or folders.tokenizer_folder(directory), vocab_size=size)
    config, params = load_lib.load(
        directory,
        generation=generation,
        dtype=dtype,
        mesh=mesh,
        layout="rollout",
        query_block=QUERY_BLOCK,
    )
    config = dataclasses.replace(config, dtype=str(params["llm"]["embed"].dtype))
    return Reasoner(config, params, tok, **_asked_by(protocol, config))


def _asked_by(protocol: str, config: config_lib.ModelConfig) -> dict:
    """Fields of a Reasoner that a named protocol decides."""
    asked, vit = interleave.PROTOCOLS[protocol], config.vit
    rule = images.in_proportion(asked.vit, vit.patch_size, vit.side * vit.patch_size, _LARGEST)
    return {"protocol": asked, "vit": rule, "vae": _vae_rule(config)}


def _vae_rule(config: config_lib.ModelConfig) -> images.Resize:
    return images.vae_rule(config.generation) if config.generation else images.VAE


def _workdir_of(directory: str) -> str:
    """The workdir of a run that `directory` is, or is a step folder of, W/checkpoints/STEP."""
    workdir = directory
    if not os.path.isdir(run_folder.checkpoints(directory)):
        workdir = os.path.normpath(os.path.join(directory, "..", ".."))
    if not os.path.isfile(run_folder.config(workdir)):
        raise FileNotFoundError(
            f"{directory} is not a released folder (no llm_config.json), nor one that `python -m "
            "opsd_jax.convert import` made (no release/), nor a run (no config.json)"
        )
    return workdir
