"""Random weights and contexts of the shapes of a run.

Axes: B batch, T positions, P patches, N completion tokens, L layers.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from opsd_jax import blocks as blocks_lib
from opsd_jax import config as config_lib
from opsd_jax import context, rollout
from opsd_jax import params as params_lib
from opsd_jax.blocks import Image, Text
from opsd_jax.model.config import ModelConfig

IDS = types.SimpleNamespace(  # any ids
    bos=0, eos=1, image_start=2, image_end=3, further_ends=()
)
_FIRST = 4  # smallest id of a text
_SMALL = 2**20  # values of a matrix that the host makes faster than a program is compiled


def weights(abstract: dict) -> dict:
    """Random weights: matrices with variance 1 / fan_in, norms 1, biases 0.

    They are made on the devices, one leaf at a time and one layer at a time: the random bits of all
    would need twice the memory of the weights.

    abstract: {nested: jax.ShapeDtypeStruct with a sharding}.
    """
    found = {}
    for n, (path, leaf) in enumerate(params_lib.flatten(abstract).items()):
        name = path.rsplit("/", 1)[-1]
        if name.endswith(("bias", "scale")) or "norm" in name:
            value = np.full(leaf.shape, not name.endswith("bias"), leaf.dtype)
            found[path] = jax.device_put(value, leaf.sharding)
            continue
        stacked = params_lib.fact(path).stacked
        if leaf.size <= _SMALL:
            value = np.random.default_rng(n).standard_normal(leaf.shape, np.float32)
            value *= _deviation(leaf.shape, stacked)
            found[path] = jax.device_put(value.astype(leaf.dtype), leaf.sharding)
        else:
            found[path] = _matrix(leaf.sharding, leaf.shape, str(leaf.dtype), stacked)(n)
    return jax.block_until_ready(params_lib.unflatten(found))


def _deviation(shape: tuple[int, ...], stacked: bool) -> float:
    """Root of 1 / fan_in of a matrix, or of one for each layer."""
    return math.prod(shape[1:-1] if stacked else shape[:-1]) ** -0.5


@functools.cache
def _matrix(
    place: jax.sharding.Sharding, shape: tuple[int, ...], dtype: str, stacked: bool
) -> Callable[[int], jax.Array]:
    """A program that makes a random matrix, or one for each layer, from a seed."""
    own, deviation = shape[1:] if stacked else shape, _deviation(shape, stacked)

    def random(key):
        return (jax.random.normal(key, own, dtype) * deviation).astype(dtype)

    def make(seed):
        key = jax.random.key(seed)
        return jax.lax.map(random, jax.random.split(key, shape[0])) if stacked else random(key)

    return jax.jit(make, out_shardings=place)


def text(rng: np.random.Generator, count: int, vocabulary: int) -> Text:
    """A text block of random ids that takes `count` positions, delimiters included."""
    return Text(rng.integers(_FIRST, vocabulary, max(count - 2, 1)).astype(np.int32))


def image(rng: np.random.Generator, patches: int, model: ModelConfig) -> Image:
    """A square image block of random pixels, with at most so many patches."""
    rows, merge = math.isqrt(patches), model.vit.merge
    if side := model.patches_per_side:  # a table of positions
        rows = min(rows, side)
    rows = max(rows // merge, 1) * merge
    pixels = rng.integers(0, 256, (rows * rows, model.patch_dim), np.uint8)
    return Image(pixels, (rows, rows), merge)


def contexts(config: ConfigDict, bucket: int, batch: int) -> context.Batch:
    """Contexts of student and teacher that fill a bucket but for a few positions of padding.

      student  text, problem image, text      teacher  the same, text, a second image, text

    Args:
      config: settings of a run. bucket: which of config.data.buckets. batch: B.
    Returns:
      Batch [B, T] of NumPy arrays. Its images have the bucket's patches, as far as squares allow.
    """
    rng, vocabulary = np.random.default_rng(0), config.model.llm.vocab_size
    model = config_lib.model(config)
    per_token = model.vit.merge**2
    student = context.Sizes(*config.data.buckets.student[bucket])
    teacher = context.Sizes(*config.data.buckets.teacher[bucket])

    def pack(blocks, sizes):
        return context.pack([blocks] * batch, sizes, tokenizer=IDS, side=model.patches_per_side)

    problem = image(rng, min(student.patches, (student.positions - 8) * per_token), model)
    spare = max(student.positions - problem.length - 3, 8)
    question: list[blocks_lib.Block] = [
        text(rng, spare // 2, vocabulary),
        problem,
        text(rng, spare // 2, vocabulary),
    ]
    used = context.need(question)
    left = teacher.positions - used.positions - 8
    thought = image(rng, min(teacher.patches - used.patches, left * per_token), model)
    spare = max(teacher.positions - used.positions - thought.length - 3, 8)
    privileged: list[blocks_lib.Block] = [
        text(rng, spare // 2, vocabulary),
        thought,
        text(rng, spare // 2, vocabulary),
    ]
    return context.Batch(pack(question, student), pack([*question, *privileged], teacher))


def trajectory(abstract: rollout.Trajectory, vocabulary: int) -> rollout.Trajectory:
    """Completions of random tokens that use up the budget, placed as the shapes say.

    abstract: Trajectory of jax.ShapeDtypeStruct with shardings, [B, N].
    """
    rng, (batch, count) = np.random.default_rng(1), abstract.tokens.shape
    tokens = rng.integers(_FIRST, vocabulary, (batch, count))
    sampled = np.ones((batch, count), bool)

    def each(value):
        return np.full(batch, value)

    fields: dict[str, Any] = dict(
        tokens=tokens,
        mask=sampled,
        logprobs=np.zeros((batch, count)),
        num_skips=each(0),
        stop=each(rollout.STOP_BUDGET),
        fed=np.pad(tokens, ((0, 0), (1, 0)), constant_values=IDS.bos),
        fed_sampled=np.pad(sampled, ((0, 0), (1, 0))),
        num_fed=each(count + 1),
        ended=each(count + 1),
    )
    return put(rollout.Trajectory(**fields), abstract)


def put(tree: Any, abstract: Any) -> Any:
    """Arrays of the host on the devices, with dtypes and shardings of `abstract`."""
    return jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x).astype(like.dtype), like.sharding),
        tree,
        abstract,
    )
