"""The stages of a run: what each of them reads, samples, computes and writes for humans.

To add a stage, write

  an entry in `KINDS`
  its step function, in a module beside `distill`, with a frozen config in `method_config`
  its batch maker, in `data.batches`
  its settings, its name in `STAGES` and its `stage_config`, in `config`
  the checks of settings that depend on each other, in `config_check`
  its programs, in `plan.programs`, if `plan` is to compile it
"""

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import distill, offline, supervised
from opsd_jax.blocks import BlockNames
from opsd_jax.data.batches import Batches
from opsd_jax.run import samples, teacher_cache
from opsd_jax.run import scores as scores_lib
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Kind, Stage
from opsd_jax.run.step_inputs import Nothing, RandomKey, StudentSamples

FIRST_BATCH = samples.write_first_batch

KINDS = {
    "autoencoder": Kind(
        about="the autoencoder learns to compress images and to restore them",
        step=supervised.autoencoder_step,
        load=Batches.images,
        sampler=RandomKey,
        samples=(samples.write_reconstructions,),
        generates=True,
    ),
    "warmup": Kind(
        about="the model learns from text traces to reason with and without privileged content",
        step=supervised.sft_step,
        load=Batches.traces,
        sampler=Nothing,
        samples=(FIRST_BATCH,),
        evaluates=True,
    ),
    "warmup with image generation": Kind(
        about="the model learns to reason, and to generate visual thoughts",
        step=supervised.image_generation_step,
        load=Batches.traces,
        sampler=RandomKey,
        samples=(FIRST_BATCH, samples.write_generated_images),
        generates=True,
        evaluates=True,
    ),
    "opsd": Kind(
        about="the student learns on its own tokens from the teacher, which sees more than it",
        step=distill.update_step,
        load=Batches.opsd,
        sampler=StudentSamples,
        samples=(FIRST_BATCH, samples.write_rollouts),
        evaluates=True,
        keeps_start=True,
        starts_arms=True,
    ),
    "sft": Kind(
        about="the model learns from text traces",
        step=supervised.sft_step,
        load=Batches.traces,
        sampler=Nothing,
        samples=(FIRST_BATCH,),
        evaluates=True,
        keeps_start=True,
    ),
    "offline": Kind(
        about="the model learns from text traces and from stored outputs of the teacher",
        step=offline.step,
        load=teacher_cache.batch,
        sampler=Nothing,
        samples=(FIRST_BATCH,),
        caches_teacher=True,
        evaluates=True,
        keeps_start=True,
    ),
}


# What the teacher sees in the place of the visual thoughts, with the blocks of the paper.
_SEEN = {
    "real": "sees them",
    "noise": "sees noise in their place",
    "swap": "sees those of another example",
    "image": "sees the problem image in their place",
    "none": "does not see them either",
}


def about(config: ConfigDict, name: str) -> str:
    """What the model learns in a stage, for the terminal."""
    if name == "warmup" and not config.warmup.mix.drawn:
        content = scores_lib.words_of(config).content
        return f"the model learns from text traces to reason with and without {content}"
    if name == "opsd" and config_lib.block_names(config) == BlockNames():
        return (
            "the student answers without visual thoughts; on its own tokens it learns from the "
            f"teacher, which {_SEEN[config.teacher.visual_thoughts]}"
        )
    return kind_of(config, name).about


def of_run(run: Session) -> list[Stage]:
    """The stages of a run in order. Step numbers continue from stage to stage."""
    ends = config_lib.stage_ends(run.config)
    firsts = [0, *ends.values()]
    return [
        Stage(
            name=name,
            kind=kind_of(run.config, name),
            config=config_lib.stage_config(run.program_config, name, run.tokenizer),
            batches=config_lib.batches(run.config, name),
            first=first,
            last=last,
        )
        for first, (name, last) in zip(firsts, ends.items())
    ]


def kind_of(config: ConfigDict, name: str) -> Kind:
    """The kind of a stage. A warm-up that learns to generate images is not that on texts."""
    if name == "warmup" and config.warmup.mix.drawn:
        return KINDS["warmup with image generation"]
    return KINDS[name]
