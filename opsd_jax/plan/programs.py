"""The programs of a training step, traced from shapes alone as a run would compile them."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context, distill, offline, optimizer, rollout, sharding, supervised
from opsd_jax import params as params_lib
from opsd_jax.method_config import StageConfig
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.rollout import RolloutConfig
from opsd_jax.run import checks, placement, teacher_cache

PLANNED = ("warmup", "opsd", "sft", "offline")  # stages whose programs are planned
# Programs of a step on the policy; supervised stages have "update" alone.
STEP = ("sample", "update")
# Any two ids: they are constants of the program.
_ENDS = types.SimpleNamespace(bos=0, eos=1, further_ends=())

Shapes = Any  # a pytree of jax.ShapeDtypeStruct with shardings


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program of a step, traced and not compiled.

    arguments: {kind: shapes} of its arguments.
    beside: {kind: shapes} of what else is in memory while it runs, such as the training state.
    trips: how often its `while` loops without a fixed length run at most, from the outermost
      inwards.
    cache: shape of its keys, [L, B, T, K, head_dim]; None if it has no cache.
    is_whole: whether every device computes all of it, instead of its share.
    """

    name: str
    traced: jax.stages.Traced
    arguments: dict[str, Shapes]
    beside: dict[str, Shapes]
    trips: tuple[int, ...] = (1,)
    cache: jax.ShapeDtypeStruct | None = None
    is_whole: bool = False


def programs(
    config: ConfigDict,
    stage: str,
    mesh: jax.sharding.Mesh,
    bucket: int = -1,
    only: str = "",
) -> list[Program]:
    """The programs of one step of a stage, from settings that are checked.

    Args:
      bucket: which of config.data.buckets; -1 is the largest.
      only: a name of `STEP`; "" for all programs.
    Raises:
      ValueError: the stage is not planned, or has no such bucket or program; its batches do not
      fill the mesh.
    """
    if not can_plan(config, stage):
        raise ValueError(
            f"--stage={stage}: plan knows the programs of {', '.join(PLANNED)} without image "
            "generation"
        )
    checks.check_batch(config, stage, sharding.batch_divisor(mesh))
    buckets = len(config.data.buckets.student)
    if not -buckets <= bucket < buckets:
        raise ValueError(f"--bucket={bucket}: config.data.buckets has {buckets}")
    if stage != "opsd" and only == "sample":
        raise ValueError(
            f"--only=sample: stage {stage} samples nothing, choose another --stage or none"
        )
    step = _Step(config, stage, mesh, bucket)
    if stage != "opsd":
        return [_supervised_update(step)]
    found = []
    if only != "update":
        found.append(_sample(step))
    if only != "sample":
        found.append(_policy_update(step))
    return found


def can_plan(config: ConfigDict, stage: str) -> bool:
    """Whether the programs of a stage can be made here."""
    return stage in PLANNED and not config_lib.trains_generation(config, stage)


def checkpoint_bytes(config: ConfigDict, stage: str) -> int:
    """Bytes of the arrays in a checkpoint of a stage, as they are in memory.

    These are the training state and, once more, all parameters: the weights to infer with.
    """
    method = config_lib.stage_config(config, stage, _ENDS)
    params = _abstract_params(config_lib.model(config))
    state = jax.eval_shape(lambda p: optimizer.init_state(p, method), params)
    return _bytes((state, params))


def start_bytes(config: ConfigDict) -> int:
    """Bytes of the arrays in the checkpoint of a run's start: the weights alone."""
    return _bytes(_abstract_params(config_lib.model(config)))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _abstract_params(model: ModelConfig) -> dict:
    return jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))


class _Step:
    """Shapes of what the programs of one stage's step share.

    config, stage, mesh, bucket: as in `programs`.
    sampling_mesh: the devices of `mesh` as the sampler uses them.
    method: configuration of the step function.
    params: {nested: shapes} of the model, without shardings.
    state: shapes of the training state, cut over the mesh.
    """

    def __init__(self, config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, bucket: int):
        self.config, self.stage, self.mesh, self.bucket = config, stage, mesh, bucket
        self.sampling_mesh = placement.of_rollouts(config, mesh)
        self.model = config_lib.model(config)
        self.method: StageConfig = config_lib.stage_config(config, stage, _ENDS)
        self.params = _abstract_params(self.model)
        state = jax.eval_shape(lambda p: optimizer.init_state(p, self.method), self.params)
        self.state = sharding.abstract(mesh, state)

    @property
    def batch_size(self) -> int:
        return self.config[self.stage].batch_size

    @property
    def held(self) -> dict[str, Shapes]:
        """{kind: shapes} of the training state."""
        teacher = {name: self.state[name] for name in ("ema", "teacher") if name in self.state}
        return {
            "params": self.state["params"],
            "optimizer": self.state["opt"],
            "teacher": teacher,
        }

    def array(self, *shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        """An array with the batch as its first axis, [B, *shape]."""
        return jax.ShapeDtypeStruct(
            (self.batch_size, *shape), dtype, sharding=sharding.batch(self.mesh)
        )

    def context(self, positions: int, patches: int, dtype=jnp.uint8) -> context.Context:
        """A packed batch of so many positions and patches per sequence."""
        sequence, patch = self.array(positions), self.array(patches)
        grids = self.model.has_grids
        return context.Context(
            tokens=sequence,
            rope_positions=self.array(positions, 3) if grids else sequence,
            limit=sequence,
            segment=sequence,
            patches=self.array(patches, self.model.patch_dim, dtype=dtype),
            patch_table_ids=patch,
            patch_image=patch,
            patch_positions=patch,
            length=self.array(),
            next_rope_position=self.array(),
            patch_cells=self.array(patches, 4) if grids else None,
        )


# --- supervised stages ---------------------------------------------------------------------------


def _supervised_update(step: _Step) -> Program:
    """The update of a stage that learns from traces; of "offline", with what the teacher made."""
    positions, patches, targets = step.config.data.buckets.trace[step.bucket]
    batch = context.Supervised(
        step.context(positions, patches),
        step.array(targets),
        step.array(targets),
        step.array(targets, dtype=jnp.bool_),
    )
    function = supervised.sft_step
    if step.stage == "offline":
        kept, half = teacher_cache.kept_entries(step.config), jnp.float16
        batch = offline.Cached(
            batch,
            step.array(targets),
            step.array(targets, kept, dtype=half),
            step.array(targets, kept),
            step.array(targets, dtype=half),
        )
        function = offline.step
    traced = sharding.update_program(function, step.state, step.method).trace(step.state, batch)
    return Program("update", traced, step.held | {"batch": batch}, {})


# --- the stage on the policy ---------------------------------------------------------------------


def _policy_batch(step: _Step) -> context.Batch:
    """The contexts of student and teacher; noise in place of images is made of floats."""
    privileged = config_lib.block_names(step.config).privileged
    noise = step.config.teacher.visual_thoughts == "noise" and any(
        map(blocks_lib.holds_images, privileged)
    )
    buckets = step.config.data.buckets
    teacher = buckets.teacher[step.bucket]
    return context.Batch(
        step.context(*buckets.student[step.bucket]),
        step.context(*teacher, dtype=jnp.float32 if noise else jnp.uint8),
        step.context(*teacher) if config_lib.contrasts_swapped(step.config) else None,
        _references(step),
    )


def _references(step: _Step) -> context.References | None:
    batches = config_lib.batches(step.config, "opsd")
    if not batches.num_references:
        return None
    return context.References(
        step.array(batches.tokens),
        step.array(batches.tokens, dtype=jnp.bool_),
        step.array(dtype=jnp.bool_),
    )


def _sampling(step: _Step) -> RolloutConfig:
    # The table of a marker is a constant of the program: only its size matters, as long as it is
    # not all zeros.
    size = step.model.llm.vocab_size
    marker = rollout.Marker.build([bytes([n]) for n in range(min(size, 256))], size)
    return config_lib.rollout(
        step.config,
        _ENDS,
        marker,
        shards=sharding.batch_divisor(step.sampling_mesh),
        max_new_tokens=config_lib.training_budget(step.config),
    )


def _random_key(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))


def _cut(mesh: jax.sharding.Mesh, batch: Shapes) -> Shapes:
    """Shapes of a batch, cut over a mesh."""
    cut = sharding.batch(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), batch)


def _sample(step: _Step) -> Program:
    """The sampler; the training state is in memory, too."""
    batch, sampling = _policy_batch(step), _sampling(step)
    student = _cut(step.sampling_mesh, batch.student)
    is_moved = step.sampling_mesh != step.mesh  # then the update's copy stays beside it
    params = sharding.abstract(
        step.sampling_mesh,
        jax.eval_shape(
            lambda p: params_lib.for_sampling(p, step.model.dtype, step.config.rollout.int8),
            step.params,
        ),
        "rollout",
    )
    traced = rollout.sample.trace(params, student, _random_key(step.sampling_mesh), config=sampling)
    lanes = min(sampling.slots or step.batch_size, step.batch_size)
    positions = batch.student.padded_length + sampling.max_new_tokens
    columns = bagel.cache_columns(positions, config=step.model)
    cache = jax.eval_shape(lambda: bagel.init_cache(lanes, columns, config=step.model))
    return Program(
        "sample",
        traced,
        {"params": params, "batch": student},
        step.held
        | {
            "params": _in_training_alone(step, params),
            "batch": batch if is_moved else dataclasses.replace(batch, student=None),
        },
        trips=(*_sampler_trips(sampling, step.batch_size), *key_blocks(columns, step.model)),
        cache=cache["k"],
    )


def _in_training_alone(step: _Step, sampled: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape} of parameters that the training state does not share with the sampler.

    A leaf that both layouts cut alike is one array; each other one is in memory twice.
    """
    sampled = params_lib.flatten(sampled)

    def is_shared(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
        other = sampled.get(path)
        return (
            other is not None
            and leaf.dtype == other.dtype
            and leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
        )

    trained = params_lib.flatten(step.state["params"])
    return {path: leaf for path, leaf in trained.items() if not is_shared(path, leaf)}


def key_blocks(columns: int, model: ModelConfig) -> tuple[int, ...]:
    """Trips of the loop over blocks of keys in a decoding step, if there is one; all are read.

    columns: columns of the cache.
    """
    return (columns // model.key_block,) if 0 < model.key_block < columns else ()


def _sampler_trips(sampling: RolloutConfig, sequences: int) -> tuple[int, ...]:
    """Trips of the sampler's loops if all sequences use up the budget.

    One number, that of decoding steps. With a queue two numbers: refills, and steps between two of
    them.
    """
    if not sampling.slots or sampling.slots >= sequences:
        return (sampling.max_new_tokens,)
    refills = -(-sequences // sampling.group)
    return refills, -(-sampling.max_new_tokens * -(-sequences // sampling.slots) // refills)


def _policy_update(step: _Step) -> Program:
    """Scores of both roles, loss and update on sampled completions."""
    batch, sampling = _policy_batch(step), _sampling(step)
    trajectory = _cut(
        step.mesh,
        jax.eval_shape(
            functools.partial(rollout.sample, config=sampling),
            step.params,
            batch.student,
            _random_key(step.mesh),
        ),
    )
    update = sharding.update_program(distill.update_step, step.state, step.method)
    traced = update.trace(step.state, batch, trajectory)
    return Program("update", traced, step.held | {"batch": (batch, trajectory)}, {})
