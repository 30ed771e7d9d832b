"""What one update reads: a batch and, as the stage needs, a random key or sampled completions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opsd_jax import config as config_lib
from opsd_jax import rollout, sharding
from opsd_jax.data.batches import Batches
from opsd_jax.data.examples import PreparedExample
from opsd_jax.run.session import Session
from opsd_jax.runtime.clock import CompileGuard


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What one update reads.

    Attributes:
      examples: prepared examples of this process's part of the batch.
      host: their arrays, a pytree of NumPy arrays.
      batch: the whole batch on the devices of the mesh, the same pytree.
      sampled: what the step function takes after the batch: (), (random key,) or (trajectory,).
      metrics: numbers about the sampling.
    """

    examples: list[PreparedExample]
    host: Any
    batch: Any
    sampled: tuple = ()
    metrics: dict = dataclasses.field(default_factory=dict)


def put_on_mesh(mesh: Mesh, made: tuple) -> StepInputs:
    """The inputs of a batch (host arrays, examples) that a batch maker returned."""
    host, examples = made
    return StepInputs(examples, host, sharding.put_batch(mesh, host))


def shapes(inputs: StepInputs) -> str:
    """One line for each array of the batch: its name, dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path((inputs.batch, *inputs.sampled))
    return "\n".join(
        f"  {jax.tree_util.keystr(path[1:]) or '.key'} {leaf.dtype} {list(leaf.shape)}"
        for path, leaf in leaves
    )


class Nothing:
    """The update reads the batch alone."""

    def __init__(self, run: Session, batches: Batches, guard: CompileGuard):
        pass

    def __call__(self, params, step: int, inputs: StepInputs) -> StepInputs:
        return inputs


class RandomKey:
    """The update uses random numbers, which depend on the run's seed and the step alone."""

    def __init__(self, run: Session, batches: Batches, guard: CompileGuard):
        self._key = jax.random.fold_in(jax.random.key(run.config.seed), 2)

    def __call__(self, params, step: int, inputs: StepInputs) -> StepInputs:
        return dataclasses.replace(inputs, sampled=(jax.random.fold_in(self._key, step),))


class StudentSamples:
    """The student's completions of the batch, sampled with its current weights.

    A batch in which a completion is empty is replaced by one of other examples, at most
    config.rollout.empty_retries times.

    guard: counts the programs that sampling compiles, one for each bucket.
    """

    def __init__(self, run: Session, batches: Batches, guard: CompileGuard):
        self._run, self._batches = run, batches
        self._config = run.sampling(max_new_tokens=config_lib.training_budget(run.config))
        self._retries = run.config.rollout.empty_retries
        self._sample = guard.watch("sample", rollout.sample, batches.schedule.num_buckets)
        self._key = jax.random.fold_in(jax.random.key(run.config.seed), 1)

    def __call__(self, params, step: int, inputs: StepInputs) -> StepInputs:
        """Samples for the batch of a step, and frees the sampler's copy of the weights."""
        with self._run.clock("sample"):
            params = self._run.for_sampling(params, int8=self._run.config.rollout.int8)
            key = jax.random.fold_in(self._key, step)
            trajectory = self._completions(params, inputs, key)
            attempt = 0
            while attempt < self._retries and not _all_have_tokens(trajectory):
                attempt += 1
                inputs = put_on_mesh(self._run.mesh, self._batches.opsd(step, attempt))
                trajectory = self._completions(params, inputs, jax.random.fold_in(key, attempt))
        return dataclasses.replace(
            inputs,
            sampled=(sharding.move_batch(self._run.mesh, trajectory),),
            metrics={
                "empty_retries": attempt,
                "slot_utilisation": rollout.utilisation(trajectory, self._config.slots),
            },
        )

    def _completions(self, params, inputs: StepInputs, key) -> rollout.Trajectory:
        """Completions of the batch, as the sampler's mesh holds them."""
        student = sharding.move_batch(self._run.sampling_mesh, inputs.batch.student)
        return self._sample(params, student, key, config=self._config)


def _all_have_tokens(trajectory: rollout.Trajectory) -> bool:
    """Whether no completion of the global batch is empty."""
    return bool(jnp.all(trajectory.mask[:, 0]))
