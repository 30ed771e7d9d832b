"""Checks of a run before anything is made."""

import os
from collections.abc import Callable, Sequence

from absl import logging
from ml_collections import ConfigDict

from opsd_jax import chat_template, config_check
from opsd_jax import config as config_lib
from opsd_jax.blocks import TRANSFORMED
from opsd_jax.data import existing, procedural, shards, sizes
from opsd_jax.data import workdir as workdir_lib
from opsd_jax.data.examples import Examples, Preprocessor, has_content
from opsd_jax.inputs import cli, paths
from opsd_jax.release import folders
from opsd_jax.runtime import checkpoint, run_folder

# What asks for a split, for messages.
SPLIT = "config.eval.split (unused where config.eval.every=0)"
FINAL_SPLIT = "config.eval.final_split ('' for no evaluation)"


def check(config: ConfigDict, workdir: str, data_workdir: str = "") -> None:
    """Raises what would fail later, in the run or in a control arm that it starts. Nothing is made.

    Args:
      data_workdir: folder of the run whose data and tokenizer are used; "" for workdir.
    Raises:
      ValueError: settings or paths that cannot be used, or another run's workdir.
      FileNotFoundError: no data, no tokenizer or no weights.
    """
    cli.check_precision()
    paths.check_given("--workdir", workdir, orbax=True)
    paths.check_writable("--workdir", workdir)
    config_check.check(config)
    workdir_lib.check_same_run(workdir, config_lib.to_json(config))
    _check_inputs(config, workdir, data_workdir or workdir)
    if not checkpoint.is_begun(workdir):
        sizes.check_unmade(config)
        _check_prepared(config, data_workdir or workdir)
    for name in config.run_arms:
        try:
            arm = config_lib.arm(config, name)
            _check_inputs(arm, run_folder.arm(workdir, name), workdir)
        except (ValueError, OSError) as error:
            raise ValueError(f"config.arms.{name}: {error}") from None


def _check_inputs(config: ConfigDict, workdir: str, data_workdir: str) -> None:
    """Checks that what a run reads is present: data (or how to make them), tokenizer, weights."""
    if config.init_from and not folders.is_released(config.init_from):
        paths.check(
            "config.init_from", config.init_from, orbax=True
        )  # before anything is looked up
    data_dir = workdir_lib.data_dir(config, data_workdir)
    procedural.check_available(config_lib.data(config), data_dir, config.tokenizer)
    own_tokenizer = workdir_lib.tokenizer_folder("", data_dir)
    if (
        not config.tokenizer
        and config.prompts.form == "chat"
        and not chat_template.is_there(own_tokenizer)
    ):
        raise ValueError(
            "config.tokenizer is empty, and config.prompts.form='chat' needs the chat template of "
            "a model: give the model's folder, --config.tokenizer="
            f"{config.init_from or 'FOLDER (for SmolLM2, examples/smollm2.py makes one)'}"
        )
    begun = checkpoint.is_begun(workdir)
    by_number = os.path.basename(os.path.normpath(config.init_from)).isdigit()
    if config.init_from and not begun and not by_number and not os.path.isdir(config.init_from):
        raise checkpoint.CheckpointNotFoundError(
            f"config.init_from={config.init_from!r}: {paths.absent(config.init_from)}: give a "
            "released or imported model, a run's workdir, or one of its step folders"
        )
    if config.init_from and not folders.is_model(config.init_from) and not begun:
        try:
            checkpoint.resolve(config.init_from)
        except checkpoint.CheckpointNotFoundError as error:
            raise checkpoint.CheckpointNotFoundError(
                f"config.init_from={config.init_from!r} is not a model and holds no checkpoint: "
                f"{error}"
            ) from None


def _check_prepared(config: ConfigDict, data_workdir: str) -> None:
    """Checks what only the data and the tokenizer tell, where the data are complete already."""
    data, data_dir = config_lib.data(config), workdir_lib.data_dir(config, data_workdir)
    folders_of_tasks = [shards.version_folder(data_dir, task) for task in data.tasks]
    if not all(os.path.exists(folder / shards.REPORT) for folder in folders_of_tasks):
        return
    folder = workdir_lib.tokenizer_folder(config.tokenizer, data_dir)
    preprocess = Preprocessor.from_config(config, config_lib.load_tokenizer(config, folder))

    def opened(run: ConfigDict, split: str = "train", asked_by: str = "training") -> Examples:
        return Examples.open(config_lib.data(run), data_dir, split, preprocess, asked_by=asked_by)

    if config.eval.every:
        opened(config, config.eval.split, SPLIT)
    if config.eval.final_split:
        opened(config, config.eval.final_split, FINAL_SPLIT)
    check_privileged(config, opened, logs=False)


def check_privileged(
    config: ConfigDict, open_examples: Callable[[ConfigDict], Examples], *, logs: bool = True
) -> None:
    """Checks that the teachers of a run and of its arms see something that the student does not.

    A teacher without privileged content by the settings passes: without privileged blocks, which is
    logged, or with `teacher.visual_thoughts` "none". Tasks that have nothing to show beside others
    that have are logged.

    Args:
      open_examples: opens the training examples of the settings.
      logs: whether what passes so is logged.
    Raises ValueError if no example has anything in the privileged blocks.
    """
    for name, run in zip(("", *config.run_arms), existing.runs(config), strict=True):
        names = config_lib.block_names(run).privileged
        if (
            not {"opsd", "offline"}.intersection(run.stages)
            or run.teacher.visual_thoughts == "none"
        ):
            continue
        shown = f"config.arms.{name}: " if name else ""
        if not names:
            if logs:
                logging.warning("%s%s", shown, config_check.NOT_PRIVILEGED)
            continue
        examples = open_examples(run)
        lacking = examples.without(names)
        blocks = " or ".join(names)
        if len(lacking) < len(examples.tasks):
            if lacking and logs:
                logging.warning(
                    "no example of %s has %s: there, teacher and student see the same",
                    ", ".join(lacking),
                    blocks,
                )
            continue
        held = sorted({c for source in examples.sources for c in source.columns} - {*names})
        hint = f"The data also hold {', '.join(held)}: set" if held else "Prepare such data, or set"
        raise ValueError(
            f"{shown}no example of {', '.join(lacking)} has {blocks}, so teacher and student see "
            f"the same. {hint} {_teacher_of(run, held)}. To train so all the same, set "
            "config.teacher.visual_thoughts='none'"
        )


def images_caution(config: ConfigDict, examples: Examples) -> str:
    """Which tasks' problem images nobody is shown, or lack what a context should show; "" for none.

    Images may have been under another name in the files. Of a task with images one example is read.
    """
    shown = {*config.student.blocks, *config.teacher.blocks}
    if "image" in shown:
        absent = examples.without(("image",))
        return bool(absent) * (
            f"No question of {', '.join(absent)} has an image, though the contexts have the block "
            "image: they are asked without one. If that is wrong, see what `data prepare` said of "
            "keys and columns that are not read (ignored_column in its report.json)."
        )
    if any(name.startswith(TRANSFORMED) for name in shown):
        return ""
    unseen = [
        task
        for task, source in zip(examples.tasks, examples.sources)
        if len(source) and has_content(source[0], ("image",))
    ]
    return bool(unseen) * (
        f"Questions of {', '.join(unseen)} have images, and neither config.student.blocks nor "
        "config.teacher.blocks has the block image: nobody sees them."
    )


def _teacher_of(config: ConfigDict, held: Sequence[str]) -> str:
    """Options with which the teacher sees the columns that data hold, or else the text trace."""
    shown = tuple(held) or ("text:full_text_only_thought",)
    privileged = config_lib.block_names(config).privileged
    blocks = [name for name in config.teacher.blocks if name not in privileged]
    last = blocks.index("transition") if "transition" in blocks else len(blocks)
    blocks[last:last] = shown
    columns = f"--config.data.columns={','.join(held)} and " if held else ""
    return f"{columns}--config.teacher.blocks={','.join(blocks)}"


def check_batch(config: ConfigDict, stage: str, shards: int) -> None:
    """Checks that a mesh divides the batch of a stage's micro step, and of its evaluation.

    shards: number of parts that the mesh cuts a batch into.
    """
    size, accumulation = config[stage].batch_size, config[stage].accumulation
    if (size // accumulation) % shards:
        raise ValueError(
            f"a micro step of config.{stage} has {size // accumulation} sequences (batch_size "
            f"{size} / accumulation {accumulation}) for {shards} batch shards (mesh data x fsdp): "
            f"lower config.{stage}.accumulation, raise config.{stage}.batch_size, or give devices "
            "to config.mesh.tensor"
        )
    if (config.eval.every or config.eval.final_split) and config.eval.batch_size % shards:
        raise ValueError(
            f"config.eval.batch_size {config.eval.batch_size} must be a multiple of the {shards} "
            "batch shards of config.mesh"
        )
