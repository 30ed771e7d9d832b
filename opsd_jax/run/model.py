"""The model that answers, from a released folder, an imported one, or a checkpoint of a run."""

import dataclasses
import os
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from opsd_jax import chat_template, images, interleave, sharding
from opsd_jax import config as config_lib
from opsd_jax import tokenizer as tokenizer_lib
from opsd_jax.inputs import checks, cli, paths
from opsd_jax.interleave import Protocol, Reasoner, TrainingContexts
from opsd_jax.model.config import ModelConfig
from opsd_jax.release import folders
from opsd_jax.release import load as load_lib
from opsd_jax.run import placement
from opsd_jax.run import session as session_lib
from opsd_jax.run.session import Session
from opsd_jax.runtime import run_folder

QUERY_BLOCK = 512  # the attention scores of a large image at once would not fit into memory
KEY_BLOCK = 1024  # see `ModelConfig`
_Read = Callable[[Mesh], dict]
"""mesh -> the weights in the compute dtype, laid out on it for the sampler."""
_LARGEST = 980  # pixels per side of an image, in the official code


def load(
    directory: str | os.PathLike[str],
    *,
    generation: bool = False,
    protocol: str = "",
    tokenizer: str = "",
    dtype: str = "",
    batch_size: int = 0,
    tensor: int = 0,
) -> Reasoner:
    """Reads a released or imported folder, or the newest (or given) checkpoint of a run.

    The weights go to this process's devices, divided along `tensor`, in the compute dtype.

    Args:
      directory: a released or imported folder, the workdir of a run, or one of its step folders.
      generation: also read the weights that generate images; without it they stay on disk.
      protocol: a name in `interleave.PROTOCOLS`; "" for the run's own contexts, sizes and image
        skips, and for "paper" of a released model.
      tokenizer: a folder; "" for the one that belongs to the model.
      dtype: compute dtype, "float32" or "bfloat16"; "" for the model's own: the run's setting, or
        that of a release (`release.folders.compute_dtype`).
      batch_size: number of questions that are asked together, for copies of the model on all
        devices; 0 for a single question and a single copy.
      tensor: number of devices of a copy; 0 for `placement.fastest`, and for as many as
        divide the heads where there is a single copy.
    Raises:
      FileNotFoundError: not a model. ValueError: it cannot generate images; unknown protocol; it
      does not fit into the memory of the devices. TypeError: something else than a path, such as an
      opened run.
    """
    checks.path("directory", directory)
    directory = os.fspath(directory)
    paths.check_given("--checkpoint", directory)
    fix = "give a folder, or '' for the one that belongs to the model"
    checks.instance("tokenizer", tokenizer, (str, os.PathLike), fix)
    paths.check("--tokenizer", tokenizer)
    check_protocol(protocol)
    cli.check_dtype(dtype)
    cli.check_number("batch_size", batch_size, 0)
    cli.check_tensor(tensor)
    if folders.is_model(directory):
        model, read = _of_release(directory, generation, protocol or "paper", tokenizer, dtype)
        own = 1
    else:
        model, read, own = _of_checkpoint(directory, generation, protocol, tokenizer, dtype)
    if batch_size:
        cache = placement.cache_of(model, batch_size)
        devices = jax.local_devices()
        mesh = placement.mesh(model.config, devices, cache, tensor=tensor, otherwise=own)
        return dataclasses.replace(model, params=read(mesh), mesh=mesh)
    return dataclasses.replace(model, params=read(placement.single_copy(model.config, tensor)))


def in_blocks(sizes: ModelConfig, platform: str) -> ModelConfig:
    """The model as it answers questions: attention in blocks of queries, and of keys on a TPU.

    A TPU copies the keys of a layer otherwise. A GPU waits for the host at every block.

    platform: of the devices, "cpu", "gpu" or "tpu".
    """
    key_block = KEY_BLOCK if platform == "tpu" else 0
    return dataclasses.replace(sizes, query_block=QUERY_BLOCK, key_block=key_block)


def _platform() -> str:
    return jax.local_devices()[0].platform


def check_protocol(protocol: str) -> None:
    """ValueError for the name of an unknown protocol; "" means the run's own."""
    if protocol and protocol not in interleave.PROTOCOLS:
        raise ValueError(
            f"--protocol={protocol}: {checks.choose_from(protocol, interleave.PROTOCOLS)}"
        )


def of_run(session: Session, params: dict) -> Reasoner:
    """The model of a run as it answers by itself: contexts, sizes and flow settings of the run.

    params: as `session.model` describes them. Questions are asked one by one, without a mesh.
    """
    c = session.config
    protocol = Protocol(
        system=c.prompts.system,
        transparency=c.images.transparency,
        max_new_tokens=session.answer_budget,
        max_image_skips=c.rollout.max_image_skips,
    )
    training = TrainingContexts(
        config_lib.prompts(c), config_lib.block_names(c), config_lib.transforms(c)
    )
    return Reasoner(
        session.model,
        params,
        session.tokenizer,
        protocol,
        config_lib.resize_rule(c),
        _vae_rule(session.model),
        flow=dict(c.drawing),
        training=training,
    )


def _of_checkpoint(
    directory: str, generation: bool, protocol: str, tokenizer: str, dtype: str
) -> tuple[Reasoner, _Read, int]:
    """The model of a run without its weights, how to read them, and the run's own `mesh.tensor`."""
    workdir = _workdir_of(directory)
    anywhere = sharding.inference_mesh(1, jax.local_devices())  # replaced before anything is read
    session = session_lib.open_run(workdir, mesh=anywhere, tokenizer_folder=tokenizer, dtype=dtype)
    sizes = in_blocks(session.model, _platform())
    if generation and sizes.generation is None:
        raise ValueError(
            f"{directory} was trained without image generation: it has no generation expert"
        )
    if not generation:
        sizes = dataclasses.replace(sizes, generation=None)
    session = dataclasses.replace(session, model=sizes)
    model = of_run(session, {})
    if protocol:
        asked = asked_by(protocol, sizes, in_chat=session.tokenizer.chat is not None)
        model = dataclasses.replace(model, flow={}, training=None, **asked)

    def read(mesh: Mesh) -> dict:
        placed = dataclasses.replace(session, mesh=mesh, sampling_mesh=mesh)
        return placed.restore_params(directory, layout="rollout")

    return model, read, max(session.config.mesh.tensor, 1)


def _of_release(
    directory: str, generation: bool, protocol: str, tokenizer: str, dtype: str
) -> tuple[Reasoner, _Read]:
    """The model of a released or imported folder without its weights, and how to read them.

    There is no run, so there is no session.
    """
    config = in_blocks(folders.read_config(directory, generation=generation), _platform())
    config = dataclasses.replace(config, dtype=dtype or folders.compute_dtype(directory))
    folder = tokenizer or folders.tokenizer_folder(directory)
    in_chat = is_in_chat(directory, tokenizer)
    tok = tokenizer_lib.load(
        folder,
        vocab_size=config.llm.vocab_size,
        images=config.vit is not None,
        form="chat" if in_chat else "bagel",
    )

    def read(mesh: Mesh) -> dict:
        return load_lib.load(
            directory, generation=generation, dtype=config.dtype, mesh=mesh, layout="rollout"
        )[1]

    asked = asked_by(protocol, config, in_chat=in_chat)
    if rule := folders.size_rule(directory, config):
        asked["vit"] = rule
    return Reasoner(config, {}, tok, **asked), read


def is_in_chat(directory: str, tokenizer: str = "") -> bool:
    """Whether a released or imported model is asked in chat form.

    That is one of another family than BAGEL whose tokenizer folder has a chat template.
    """
    folder = tokenizer or folders.tokenizer_folder(directory)
    is_bagel = folders.read_config(directory, generation=False).is_bagel
    return not is_bagel and chat_template.is_there(folder)


def asked_by(protocol: str, config: config_lib.ModelConfig, *, in_chat: bool = False) -> dict:
    """Fields of a Reasoner that a named protocol decides.

    in_chat: whether questions are asked in chat form, without the protocol's system prompt, which
      is BAGEL's.
    """
    asked, vit = interleave.PROTOCOLS[protocol], config.vit
    asked = dataclasses.replace(asked, system="") if in_chat else asked
    rule: images.Rule = asked.vit
    if vit and config.has_grids:
        rule = images.SmartResize(vit.stride)
    elif vit:
        rule = images.in_proportion(asked.vit, vit.patch_size, vit.side * vit.patch_size, _LARGEST)
    return {"protocol": asked, "vit": rule, "vae": _vae_rule(config)}


def _vae_rule(config: config_lib.ModelConfig) -> images.Resize:
    return images.vae_rule(config.generation) if config.generation else images.VAE


def _workdir_of(directory: str) -> str:
    """The workdir of a run that `directory` is, or is a step folder of, W/checkpoints/STEP."""
    workdir = directory
    if not os.path.isdir(run_folder.checkpoints(directory)):
        workdir = os.path.normpath(os.path.join(directory, "..", ".."))
    if os.path.isfile(run_folder.config(workdir)):
        return workdir  # the error of an absent step names those that exist
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            f"--checkpoint={directory}: {paths.absent(directory)}: give a released or imported "
            "model, a run's workdir, or one of its step folders"
        )
    raise FileNotFoundError(
        f"{directory} is not a released folder (no llm_config.json, nor a config.json beside "
        "weights in safetensors), nor one that `python -m opsd_jax.convert import` made (no "
        "release/), nor a run (no config.json)"
    )
