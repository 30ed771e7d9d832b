"""On how many devices a copy of a model is divided to answer questions.

`data` copies, each divided over `tensor` devices, of as many as the weights and the cache of keys
need to fit. Beyond that, more devices read a part of the weights each, and wait for each other in
every layer. For text the number with the shortest decoding step is taken, by the chip's data sheet.
For images it is the fewest: flow matching is bound by operations, which copies share as well.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import interleave, sharding
from opsd_jax import params as params_lib
from opsd_jax.interleave import Reasoner
from opsd_jax.model import bagel
from opsd_jax.model.config import ModelConfig
from opsd_jax.runtime import chips

# Activations while contexts are read, as a multiple of the keys: 4.06 in the 7B sampler for 8
# sequences of 6,144 positions on two v5e (the command is in docs/performance/plan.md).
ACTIVATIONS = 4.1
TEXT = 512  # tokens of prompt and question that are assumed
_LARGE = 100_000  # pixels along a side of an image that every size rule shrinks


@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of keys that a batch of questions needs.

    sequences: number of sequences of the whole batch. columns: keys of each.
    """

    sequences: int
    columns: int


# --- what is needed ------------------------------------------------------------------------------


def largest_question(reasoner: Reasoner, generated: int = 0) -> list[blocks_lib.Block]:
    """The blocks of a question with one image of the largest size, if the model sees images, and
    `TEXT` tokens.

    Args:
      reasoner: its sizes and rules; it needs no weights.
      generated: rounds before this one, each a text of full length and an image.
    """
    model = reasoner.config
    image: list[blocks_lib.Block] = []
    if model.vit:
        width, height = reasoner.vit(_LARGE, _LARGE)
        grid = (height // model.vit.patch_size, width // model.vit.patch_size)
        patches = np.zeros((grid[0] * grid[1], model.patch_dim), np.uint8)
        image = [blocks_lib.Image(patches, grid, model.vit.merge)]
    if sizes := model.generation:
        width, height = reasoner.vae(_LARGE, _LARGE)
        rows, columns = height // sizes.stride, width // sizes.stride
        latents = np.zeros((rows * columns, sizes.latent_dim), np.float32)
        image = [blocks_lib.Latent(latents, (rows, columns)), *image]
    text = blocks_lib.Text(np.zeros(reasoner.protocol.max_new_tokens, np.int32))
    question = blocks_lib.Text(np.zeros(TEXT, np.int32))
    return [*image, question, *[text, *image] * generated]


def cache_of(reasoner: Reasoner, batch_size: int) -> Cache:
    """The cache of a batch of the largest questions, with one generated image if there are any."""
    generation = reasoner.config.generation
    sizes = interleave.bucketed([largest_question(reasoner, 1 if generation else 0)])
    columns = sizes.positions + sizes.latents
    if not generation:
        return Cache(batch_size, columns + reasoner.protocol.max_new_tokens)
    branches = len(interleave.flow_config(reasoner).branches)
    block = interleave.bucket(generation.side**2)
    return Cache(branches * batch_size, columns + 2 + block)


def cache_of_run(config: ConfigDict, batch_size: int) -> Cache:
    """The cache of a batch of a run's examples in the largest bucket of any context."""
    buckets = (*config.data.buckets.student, *config.data.buckets.teacher)
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    lanes = min(config.eval.slots or batch_size, batch_size)
    return Cache(lanes, max(bucket[0] for bucket in buckets) + budget)


def abstract_weights(model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict:
    """Shapes, dtypes and shardings of the weights as questions are answered with them."""
    return sharding.abstract(mesh, _shapes(model), "rollout")


@functools.cache
def _shapes(model: ModelConfig) -> dict:
    def weights():
        return params_lib.in_compute_dtype(bagel.init(jax.random.key(0), config=model), model.dtype)

    return jax.eval_shape(weights)


def _weights(model: ModelConfig, tensor: int) -> int:
    """Bytes of the weights that a device holds of a copy divided over `tensor` devices."""
    abstract = abstract_weights(model, AbstractMesh((1, 1, tensor), sharding.AXES))
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )


def _keys(model: ModelConfig, tensor: int, devices: int, cache: Cache) -> int:
    """Bytes of the cache that a device holds."""
    sequences = -(-cache.sequences * tensor // devices)
    shapes = jax.eval_shape(lambda: bagel.init_cache(sequences, cache.columns, config=model))
    pieces = tensor if model.llm.num_kv_heads % tensor == 0 else 1
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) // pieces


# --- what is chosen ------------------------------------------------------------------------------


def degrees(model: ModelConfig, devices: int) -> list[int]:
    """Numbers of devices that divide the heads of queries and of keys, and `devices`."""
    sizes = (model.llm.num_heads, model.llm.num_kv_heads, devices)
    return [n for n in range(1, devices + 1) if not any(size % n for size in sizes)]


def fastest(
    model: ModelConfig, devices: int, memory: float, cache: Cache, chip: chips.Chip | None = None
) -> int:
    """The number of devices per copy, of those on which a batch fits; the most possible if on none.

    It has the shortest decoding step (`_decoding_step`). It is the fewest where images are
    generated, or without a data sheet. Weights, keys and activations are counted.

    Args:
      devices: number of devices that share the batch. memory: bytes of one of them.
      chip: data sheet of a device; None if unknown.
    """
    possible = degrees(model, devices)
    fitting = [
        tensor
        for tensor in possible
        if _weights(model, tensor) + (1 + ACTIVATIONS) * _keys(model, tensor, devices, cache)
        <= memory
    ]
    if not fitting:
        return possible[-1]
    if chip is None or model.generation:
        return fitting[0]
    return min(fitting, key=lambda tensor: _decoding_step(model, tensor, devices, cache, chip))


def mesh(
    model: ModelConfig, devices: Sequence[jax.Device], cache: Cache, *, tensor: int, otherwise: int
) -> Mesh:
    """The mesh of devices that answer batches of questions.

    Args:
      tensor: devices of a copy; 0 for `fastest`.
      otherwise: used for 0 where the memory of the devices is not known, if it divides them.
    Raises:
      ValueError: `tensor` does not divide the devices, or the weights alone do not fit.
    """
    memory, count = chips.memory(devices[0]), len(devices)
    found = mesh_within(model, devices, cache, memory=memory, tensor=tensor, otherwise=otherwise)
    if memory is not None:
        tensor = count // sharding.batch_divisor(found)
        check_memory(model, tensor, memory, devices[0].device_kind)
        logging.info(
            "%d copies of the model on %d devices each: %.2f GiB of weights and up to %.2f GiB of "
            "keys per device of %.2f GiB",
            count // tensor,
            tensor,
            _weights(model, tensor) / chips.GIB,
            _keys(model, tensor, count, cache) / chips.GIB,
            memory / chips.GIB,
        )
    return found


def mesh_within(
    model: ModelConfig,
    devices: Sequence[jax.Device],
    cache: Cache,
    *,
    memory: float | None,
    tensor: int,
    otherwise: int,
) -> Mesh:
    """`mesh`, whatever the weights take, for devices of so much memory.

    memory: bytes of a device; None if not known.
    """
    if not tensor:
        tensor = otherwise if len(devices) % otherwise == 0 else 1
        if memory is not None:
            chip = chips.data_sheet(devices[0])
            tensor = fastest(model, len(devices), memory, cache, chip)
    return sharding.inference_mesh(tensor, devices)


def single_copy(model: ModelConfig, tensor: int) -> Mesh:
    """The mesh of one copy of a model for one question.

    Nothing else could use the other devices, so all take part that divide the heads evenly.

    Args:
      tensor: number of devices; 0 for as many as possible.
    Raises:
      ValueError: there are not so many devices, or the weights alone do not fit.
    """
    devices = jax.local_devices()
    if tensor > len(devices):
        raise ValueError(f"--tensor={tensor}: there are {len(devices)} devices: give fewer")
    if not tensor:
        tensor = max(degrees(model, n)[-1] for n in range(1, len(devices) + 1))
    return mesh(model, devices[:tensor], Cache(0, 0), tensor=tensor, otherwise=1)


def of_rollouts(config: ConfigDict, mesh: Mesh) -> Mesh:
    """The devices of a training mesh as they sample completions, in training and evaluations.

    config.rollout.tensor of them share a copy of the weights. Where that is 0, it is the number
    with the shortest decoding step by the chip's data sheet (`_decoding_step`), and that of `mesh`
    where there is none, as for a CPU.

    Raises:
      ValueError: config.rollout.tensor does not divide the devices, or leaves more copies than the
        batches have sequences for.
    """
    batches = _sampled_batches(config)
    if tensor := config.rollout.tensor:
        found = sharding.regrouped(mesh, tensor)
        copies = sharding.batch_divisor(found)
        for key, size in batches.items():
            if size % copies:
                raise ValueError(
                    f"config.rollout.tensor={tensor} makes {copies} copies of the weights, and "
                    f"config.{key} is {size}: make that a multiple of {copies}, or raise "
                    "config.rollout.tensor"
                )
        return found
    chip = chips.data_sheet(mesh.devices.flat[0])
    if chip is None:
        return mesh
    model = dataclasses.replace(config_lib.model(config), generation=None)
    possible = [mesh]
    for tensor in degrees(model, sharding.devices_of_slice(mesh)):
        other = sharding.regrouped(mesh, tensor)
        if not any(size % sharding.batch_divisor(other) for size in batches.values()):
            possible.append(other)
    cache = cache_of_run(config, max(batches.values()))

    def step(other):
        return _decoding_step(
            model, sharding.devices_per_copy(other), other.devices.size, cache, chip
        )

    return min(possible, key=step)


def _sampled_batches(config: ConfigDict) -> dict[str, int]:
    """{key: size} of the batches that the sampler gets, and of its lanes."""
    sizes = {}
    if "opsd" in config.stages:
        sizes |= {"opsd.batch_size": config.opsd.batch_size, "rollout.slots": config.rollout.slots}
    if config.eval.every or config.eval.final_split or not sizes:
        sizes |= {"eval.batch_size": config.eval.batch_size, "eval.slots": config.eval.slots}
    return {key: size for key, size in sizes.items() if size}


def _decoding_step(
    model: ModelConfig, tensor: int, devices: int, cache: Cache, chip: chips.Chip
) -> float:
    """Seconds of one decoding step, modelled.

    Each device reads its part of weights and keys. In each layer the `tensor` devices of a copy add
    up the outputs of attention and of the MLP.
    """
    read = _weights(model, tensor) + _keys(model, tensor, devices, cache)
    sums = 2 * model.llm.num_layers if tensor > 1 else 0
    return read / chip.bandwidth + sums * chips.LATENCY


def check_memory(model: ModelConfig, tensor: int, memory: float, kind: str) -> None:
    """ValueError where a device has less memory than its part of the weights takes."""
    needed = _weights(model, tensor)
    if needed > memory:
        larger = [n for n in degrees(model, 4096) if _weights(model, n) < memory]
        fix = f"give --tensor={larger[0]} on a host with as many devices" if larger else ""
        raise ValueError(
            f"the weights in {model.dtype} take {needed / chips.GIB:.1f} GiB of each device, with "
            f"--tensor={tensor}, and a {kind} has {memory / chips.GIB:.1f} GiB: "
            f"{fix or 'use devices with more memory'}; python -m opsd_jax.plan --stage=eval tells "
            "what fits"
        )


def of_run(config: ConfigDict, *, tensor: int = 0, batch_size: int = 0) -> Mesh:
    """The mesh of all devices for a run's own contexts.

    Args:
      tensor: see `mesh`; where 0 and nothing is known of the memory, the run's own.
      batch_size: 0 for config.eval.batch_size.
    """
    model = dataclasses.replace(config_lib.model(config), generation=None)
    own = config.mesh.tensor
    cache = cache_of_run(config, batch_size or config.eval.batch_size)
    return mesh(model, jax.devices(), cache, tensor=tensor, otherwise=own if own > 0 else 1)
