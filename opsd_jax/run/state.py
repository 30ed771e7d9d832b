"""The training state of a stage: made, restored, saved."""

import jax

from opsd_jax import distill, optimizer, sharding
from opsd_jax.method_config import DistillConfig
from opsd_jax.model import bagel
from opsd_jax.run.session import Session
from opsd_jax.run.stage import Stage
from opsd_jax.runtime.checkpoint import Checkpoints


def fresh(run: Session, stage: Stage, params) -> dict:
    """The state at a stage's first step: its weights, and an optimizer that has seen nothing."""

    def init(params):
        return optimizer.init_state(params, stage.config)

    shardings = sharding.tree_shardings(run.mesh, jax.eval_shape(init, params))
    return jax.jit(init, out_shardings=shardings)(params)


def restored(run: Session, stage: Stage, checkpoints: Checkpoints, step: int) -> dict:
    """The state in the checkpoint of a step of the stage."""

    def init(key):
        return optimizer.init_state(bagel.init(key, config=run.model), stage.config)

    abstract = sharding.abstract(run.mesh, jax.eval_shape(init, jax.random.key(0)))
    with run.clock("checkpoint"):
        return checkpoints.restore(step, abstract)


def offered_params(run: Session, stage: Stage, state: dict) -> dict:
    """The weights that a checkpoint offers: to evaluation, export, the next stage, and arms."""
    if run.config.checkpoint.params == "ema":
        return ema_params(stage, state) or state["params"]
    return state["params"]


def ema_params(stage: Stage, state: dict) -> dict | None:
    """The weights of the EMA teacher; None for a stage without one."""
    if "ema" in state and isinstance(stage.config, DistillConfig):
        return distill.teacher_params(state, stage.config)
    return None


def moving_teacher(stage: Stage, state: dict) -> dict | None:
    """The weights of a teacher that follows the student: its EMA or snapshot; else None."""
    if isinstance(stage.config, DistillConfig) and stage.config.teacher in ("ema", "snapshot"):
        return distill.teacher_params(state, stage.config)
    return None


def save(
    run: Session,
    stage: Stage,
    checkpoints: Checkpoints,
    step: int,
    state: dict,
    *,
    weights_only: bool = False,
) -> None:
    """Starts to save the checkpoint of a step; `checkpoints.wait()` waits until it is complete.

    weights_only: without the training state. At the start of a stage that holds the same weights
      once or twice more, and an optimizer that has seen nothing: `fresh` makes them again.
    """
    checkpoints.save(
        step,
        None if weights_only else state,
        offered_params(run, stage, state),
        stage=stage.name,
        config=run.record,
        digests=run.digests,
    )
