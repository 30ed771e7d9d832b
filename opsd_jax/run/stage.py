"""What the training loop knows about a stage."""

import dataclasses
from collections.abc import Callable

from opsd_jax.config import BatchesConfig
from opsd_jax.method_config import StageConfig


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one kind of stage does in the training loop.

    Attributes:
      about: what the model learns in it, for the terminal.
      step: step function, (state, batch, *sampled, config=) -> (state, metrics).
      load: batch maker, (batches, step) -> (host arrays, prepared examples).
      sampler: what the step function reads besides the batch (see `step_inputs`).
      samples: functions that write files for humans (see `samples`).
      generates: the stage trains the image-generation path, so that examples also carry their
        images as the autoencoder sees them.
      caches_teacher: the batch maker also takes the cache of a teacher's outputs, which is
        collected before the first step (see `teacher_cache`).
      evaluates: accuracy is measured during the stage and at its end.
      keeps_start: results are compared with the weights that the stage starts with. If it is the
        run's first stage they may be saved as checkpoint 0 (`saves.saves_start`), and its final
        evaluation measures the KL to them.
      starts_arms: control arms start from the weights that the stage starts with.
    """

    about: str
    step: Callable
    load: Callable
    sampler: Callable
    samples: tuple[Callable, ...]
    generates: bool = False
    caches_teacher: bool = False
    evaluates: bool = False
    keeps_start: bool = False
    starts_arms: bool = False


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: its name in the settings and in metrics.jsonl.
      kind: what it does.
      config: static argument of its step function.
      batches: how its batches are made.
      first, last: it takes the steps first + 1 .. last of the run.
    """

    name: str
    kind: Kind
    config: StageConfig
    batches: BatchesConfig
    first: int
    last: int
