"""When a run saves checkpoints, and which of them it never deletes."""

import os

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.release import folders
from opsd_jax.run import stage_table
from opsd_jax.run.stage import Kind
from opsd_jax.runtime import run_folder


def evaluates_at(config: ConfigDict, kind: Kind, last: int, step: int) -> bool:
    """Whether accuracy is measured after a step; that of the last step is the final evaluation.

    last: the stage's last step, counted over the whole run as `step` is.
    """
    every = config.eval.every
    return kind.evaluates and every > 0 and step % every == 0 and step < last


def saves_at(config: ConfigDict, kind: Kind, last: int, step: int) -> bool:
    """Whether a checkpoint is saved after a step; arguments as of `evaluates_at`."""
    is_regular = step % config.checkpoint.every == 0 or step == last
    return is_regular or evaluates_at(config, kind, last, step)


def saves_start(config: ConfigDict, kind: Kind) -> bool:
    """Whether the weights that the run's first stage starts with are saved, as checkpoint 0.

    `eval.kl` measures against them, at the end of the run or in `diagnose`. Control arms start from
    them, too, but find those of a released or imported folder there.
    """
    return kind.keeps_start and (config.eval.kl or not folders.is_model(config.init_from))


def origin(config: ConfigDict, workdir: str, stage: str) -> str:
    """Folder of the weights that a stage of the run in a workdir starts with.

    It is the run's checkpoint of that step or, for a first stage whose start is not saved
    (`saves_start`), the model folder config.init_from.
    """
    step = config_lib.start_of(config, stage)
    saved = run_folder.checkpoint(workdir, step)
    if step == 0 and not os.path.isdir(saved) and folders.is_model(config.init_from):
        return config.init_from
    return saved


def never_deleted(config: ConfigDict) -> tuple[int, ...]:
    """Steps whose checkpoints stay: the start, and the end of each stage."""
    return (0, *config_lib.stage_ends(config).values())


def of_run(config: ConfigDict) -> list[tuple[int, str]]:
    """(step, stage) of each save of a run from its start to its end that nothing stops, in order.

    The first stage may also save its start, see `saves_start`.
    """
    found, first = [], 0
    for name, last in config_lib.stage_ends(config).items():
        kind = stage_table.kind_of(config, name)
        if first == 0 and saves_start(config, kind):
            found.append((0, name))
        steps = range(first + 1, last + 1)
        found += [(step, name) for step in steps if saves_at(config, kind, last, step)]
        first = last
    return found
