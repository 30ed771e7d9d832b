"""The programs of a training step, compiled ahead of time."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp

from opsd_jax import config as config_lib
from opsd_jax import context, distill, offline, rollout, sharding
from opsd_jax import params as params_lib
from opsd_jax.model import bagel
from opsd_jax.run import session, teacher_cache

PLANNED = ("warmup", "opsd", "sft", "offline")  # stages whose programs are planned
STEP = (
    "sample",
    "update",
)  # the programs of a step on the policy; supervised stages have "update" alone


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program of a step, traced and not compiled.

    kinds: {kind: pytree of ShapeDtypeStructs} of its arguments. beside: the same of what else lies in memory.
    trips: how often its `while` loops without a fixed length run at most, from the outermost inwards.
    cache: shape of its keys, [L, B, S, K, h].
    """

    name: str
    traced: object
    kinds: dict
    beside: dict
    trips: tuple[int, ...] = (1,)
    cache: object = None


def programs(config, stage: str, mesh, bucket: int = -1, only: str = "") -> list[Program]:
    """The programs of one step of a stage, from shapes alone, with settings that are checked."""

    if stage not in PLANNED or config_lib.draws(config, stage):
        raise ValueError(
            f"--stage={stage}: plan knows the programs of {', '.join(PLANNED)} without drawing"
        )
    session.check_batch(config, stage, sharding.batch_divisor(mesh))
    size = config[stage].batch_size
    ends = types.SimpleNamespace(bos=0, eos=1)  # any two ids: they are constants of the program
    model, own = config_lib.model(config), config_lib.distill(config, stage, ends)
    whole = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch(mesh)), tree
    )

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding.batch(mesh))

    def packed(slots, patches, dtype=jnp.uint8):
        row, patch = array(slots), array(patches)
        return context.Context(
            tokens=row,
            positions=row,
            limit=row,
            segment=row,
            patches=array(patches, model.vit.patch_dim, dtype=dtype),
            patch_positions=patch,
            patch_image=patch,
            patch_slots=patch,
            length=array(),
            next_position=array(),
        )

    params = jax.eval_shape(functools.partial(bagel.init, config=model), jax.random.key(0))
    state = sharding.abstract(mesh, jax.eval_shape(lambda p: distill.init_state(p, own), params))
    teacher = {name: state[name] for name in ("ema", "teacher") if name in state}
    held = {"params": state["params"], "optimizer": state["opt"], "teacher": teacher}

    buckets = config.data.buckets
    if not -len(buckets.student) <= bucket < len(buckets.student):
        raise ValueError(f"--bucket={bucket}: config.data.buckets has {len(buckets.student)}")
    if stage != "opsd":
        if only == "sample":
            raise ValueError(
                f"--only=sample: stage {stage} samples nothing, choose another --stage or none"
            )
        slots, patches, targets = buckets.trace[bucket]
        batch = context.Supervised(
            packed(slots, patches), array(targets), array(targets), array(targets, dtype=jnp.bool_)
        )
        step = distill.sft_step
        if stage == "offline":
            kept, half, step = teacher_cache.kept_entries(config), jnp.float16, offline.step
            batch = offline.Cached(
                batch,
                array(targets),
                array(targets, kept, dtype=half),
                array(targets, kept),
                array(targets, dtype=half),
            )
        traced = distill.program(step, state, own).trace(state, batch)
        return [Program("update", traced, held | {"batch": batch}, {})]

    noise = config.teacher.visual_thoughts == "noise"  # drawn as floats
    batch = context.Batch(
        packed(*buckets.student[bucket]),
        packed(*buckets.teacher[bucket], dtype=jnp.float32 if noise else jnp.uint8),
    )
    # The table of a marker is a constant of the program: only its size matters, as long as it is not all zeros.
    marker = rollout.Marker.build([bytes([n]) for n in range(256)], model.llm.vocab_size)
    sampling = config_lib.rollout(config, ends, marker, shards=sharding.batch_divisor(mesh))
    sampler = sharding.abstract(
        mesh,
        jax.eval_shape(
            lambda p: params_lib.in_compute_dtype(distill.understanding(p), model.dtype), params
        ),
        "rollout",
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    # Leaves that both layouts cut alike are one array; the others lie in memory twice.
    same = lambda a, b: a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    sampled = params_lib.flatten(sampler)
    trained_only = {
        path: leaf
        for path, leaf in params_lib.flatten(state["params"]).items()
        if path not in sampled or not same(leaf, sampled[path])
    }
    found = []
    if only != "update":
        slots = batch.student.slots + sampling.max_new_tokens
        held_rows = min(sampling.slots or size, size)
        cache = jax.eval_shape(lambda: bagel.init_cache(held_rows, slots, config=model))
        traced = rollout.sample.trace(sampler, batch.student, key, config=sampling)
        beside = held | {"params": trained_only, "batch": batch.teacher}
        found.append(
            Program(
                "sample",
                traced,
                {"params": sampler, "batch": batch.student},
                beside,
                trips=_sampler_trips(sampling, size),
                cache=cache["k"],
            )
        )
    if only != "sample":
        drawn = whole(
            jax.eval_shape(
                lambda *a: rollout.sample(*a, config=sampling), params, batch.student, key
            )
        )
        traced = distill.program(distill.update_step, state, own).trace(state, batch, drawn)
        found.append(Program("update", traced, held | {"batch": (batch, drawn)}, {}))
    return found


def _sampler_trips(sampling, rows: int) -> tuple[int, ...]:
    """Of the sampler's loops, if all rows use up the budget: steps; with a queue refills, and steps between two."""
    if not sampling.slots or sampling.slots >= rows:
        return (sampling.max_new_tokens,)
    refills = -(-rows // sampling.group)
    return refills, -(-sampling.max_new_tokens * -(-rows // sampling.slots) // refills)


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a pytree of arrays or ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def matmul_flops(jaxpr, trips: tuple[int, ...] = (1,)) -> int:
    """Floating point operations of all matrix products and convolutions of a jaxpr, on all devices together.

    A scan counts its body as often as it runs, a kernel its body for every block of its grid (also those that it
    skips), a `while` loop `trips` times (see Program); of the branches of a condition the largest counts. Recomputation counts,
    because it is in the jaxpr.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, []
        deeper = trips[1:] or trips if name == "while" else trips
        for value in eqn.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                item = getattr(item, "jaxpr", item)  # of a closed one
                if hasattr(item, "eqns"):
                    inner.append(matmul_flops(item, deeper))
        if name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += (
                2
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features
        times = {"scan": eqn.params.get("length", 1), "while": trips[0]}.get(name, 1)
        if name == "shard_map":  # its body is what one device does along these axes
            times = math.prod(
                eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]
            )
        if name == "pallas_call":  # one turn of its grid
            times = math.prod(eqn.params["grid_mapping"].grid)
        total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total
