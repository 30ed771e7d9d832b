"""When a run saves checkpoints, and which of them it never deletes."""

from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.run import stage_table
from opsd_jax.run.stage import Kind


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


def never_deleted(config: ConfigDict) -> tuple[int, ...]:
    """Steps whose checkpoints stay: the start, and the end of each stage."""
    return (0, *config_lib.stage_ends(config).values())


def of_run(config: ConfigDict) -> list[tuple[int, str]]:
    """(step, stage) of each save of a run from its start to its end that nothing stops, in order.

    A stage that is compared with its start saves that, too, if it is the first.
    """
    found, first = [], 0
    for name, last in config_lib.stage_ends(config).items():
        kind = stage_table.kind_of(config, name)
        if kind.keeps_start and first == 0:
            found.append((0, name))
        steps = range(first + 1, last + 1)
        found += [(step, name) for step in steps if saves_at(config, kind, last, step)]
        first = last
    return found
