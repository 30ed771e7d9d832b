"""Attention kernels against dense attention in float32, at the shapes of a run.

The mask is that of a packed context, images included, and a completion after it, or that of the
patches of its images. Forward pass and gradients are compared. A run with model.attention "auto"
compares its machine's kernel when it starts, and takes dense attention if they differ.

Letters: B batch, T positions, P patches, H heads, K kv heads, h head_dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax import context as context_lib
from opsd_jax.context import Context
from opsd_jax.model import attention, masks
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.masks import Mask
from opsd_jax.run import random_arrays

# The kernel that each platform has besides "dense" (see `ModelConfig.attention`).
OF_PLATFORM = {"tpu": "flash", "gpu": "cudnn", "cpu": "flash_interpret"}
QUERY_BLOCK = 512  # queries at a time of the reference: its scores are in float32
TOLERANCE = 0.02  # of `relative_error`; bfloat16 itself costs about 0.006
COMPARED = ("out", "dq", "dk", "dv")

Attend = Callable[..., jax.Array]  # as `attention.attend`


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one layer's attention.

    name: whose context it is.
    q: [B, T, H, h], k, v: [B, T, K, h], in bfloat16.
    weight: float32 [B, T, H * h], gradient of the output; 0 at padding.
    mask: of the positions. real: bool [B, T], False at padding.
    """

    name: str
    q: jax.Array
    k: jax.Array
    v: jax.Array
    weight: jax.Array
    mask: Mask
    real: np.ndarray


def case(name: str, context: Context, completion: int, model: ModelConfig) -> Case:
    """Random inputs with the mask of a context and a completion of so many tokens after it."""
    _, limit, segment = (
        jnp.concatenate([of_context, after], axis=1)
        for of_context, after in zip(
            (context.rope_positions, context.limit, context.segment),
            context_lib.following(context, completion),
        )
    )
    (batch, size), llm = limit.shape, model.llm
    keys, real = jax.random.split(jax.random.key(0), 4), np.asarray(segment > 0)

    def random(key, heads):
        return jax.random.normal(key, (batch, size, heads, llm.head_dim), jnp.bfloat16)

    weight = jax.random.normal(keys[3], (batch, size, llm.num_heads * llm.head_dim))
    return Case(
        name,
        random(keys[0], llm.num_heads),
        random(keys[1], llm.num_kv_heads),
        random(keys[2], llm.num_kv_heads),
        weight * real[:, :, None],
        Mask(limit, segment, segment),
        real,
    )


def vision_case(name: str, context: Context, model: ModelConfig) -> Case:
    """Random inputs of the vision tower: each patch sees the patches of its own image."""
    image = jnp.asarray(context.patch_image)
    (batch, size), vit = image.shape, model.vit
    assert vit is not None
    shape = (batch, size, vit.num_heads, vit.hidden_size // vit.num_heads)
    keys, real = jax.random.split(jax.random.key(1), 4), np.asarray(image > 0)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    weight = jax.random.normal(keys[3], (batch, size, vit.hidden_size)) * real[:, :, None]
    return Case(name, q, k, v, weight, Mask(jnp.full_like(image, size), image, image), real)


def cases_of(config: ConfigDict, completion: int) -> list[Case]:
    """A case for the student's and for the teacher's largest bucket, and for the vision tower."""
    model, contexts = config_lib.model(config), random_arrays.contexts(config, -1, 1)
    found = [
        case("student", contexts.student, completion, model),
        case("teacher", contexts.teacher, completion, model),
    ]
    if model.vit is not None and contexts.teacher.patch_image.shape[1]:
        found.append(vision_case("vision tower", contexts.teacher, model))
    return found


def errors(
    one: Case,
    kind: str,
    reference: dict[str, np.ndarray],
    attend: Attend = attention.attend,
    query_block: int = QUERY_BLOCK,
) -> dict[str, float]:
    """{"out", "dq", "dk", "dv": `relative_error`} of a kernel against what `reference` returns."""
    _, both = programs(kind, query_block, attend)
    found = jax.device_get(both(one.q, one.k, one.v, laid_out(one, kind), one.weight))
    return {key: relative_error(found[key], reference[key], one.real) for key in COMPARED}


def said_by(error: Exception) -> str:
    """The kind and the first line of what a compiler or a kernel raised."""
    lines = str(error).strip().splitlines() or ["without a message"]
    return f"{type(error).__name__}: {lines[0]}"


def laid_out(one: Case, kind: str) -> Any:
    """The mask of a case in the form that the kernel takes, see `masks.lay_out`."""
    return jax.jit(masks.lay_out, static_argnums=(1, 2))(one.mask, one.q.shape[1], kind)


def reference(one: Case) -> dict[str, np.ndarray]:
    """{"out", "dq", "dk", "dv"} of dense attention in float32: output and gradients."""
    _, both = programs("dense", QUERY_BLOCK, attention.attend)
    wide = (x.astype(jnp.float32) for x in (one.q, one.k, one.v))
    with jax.default_matmul_precision("highest"):
        return jax.device_get(both(*wide, masks.visible(one.mask), one.weight))


@functools.cache
def programs(kind: str, query_block: int, attend: Attend) -> tuple[Any, Any]:
    """(forward pass, forward and backward pass), jitted."""

    def forward(q, k, v, mask):
        return attend(q, k, v, mask, query_block=query_block, kind=kind)

    def value(q, k, v, mask, weight):
        out = forward(q, k, v, mask)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    def both(q, k, v, mask, weight):
        gradients, out = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(q, k, v, mask, weight)
        return dict(zip(COMPARED, (out, *gradients)))

    return jax.jit(forward), jax.jit(both)


def relative_error(found: np.ndarray, wanted: np.ndarray, real: np.ndarray) -> float:
    """Largest error of a position: norm of the difference over that of what is wanted.

    The norm of what is wanted counts as at least the root of the mean square over positions.
    Elsewhere the rounding of a position whose gradient is nearly 0 would be the largest error.

    Args:
      found, wanted: [B, T, ...]. real: bool [B, T]; other positions do not count.
    Returns:
      nan if anything is not finite.
    """

    def norms(x):
        rows = np.asarray(x, np.float32)[real]
        return np.sqrt(np.sum(rows.reshape(len(rows), -1) ** 2, axis=1))

    size = norms(wanted)
    usual = np.sqrt(np.mean(size**2))
    difference = norms(np.asarray(found, np.float32) - np.asarray(wanted, np.float32))
    return float(np.max(difference / np.maximum(size, usual)))


# --- the choice of a run --------------------------------------------------------------------------


def candidate(config: ConfigDict, platform: str) -> str:
    """The kernel that "auto" may take on a platform; "" where there is none for these settings.

    That of a CPU is for tests, and cuDNN's computes in bfloat16 alone.
    """
    kernel = OF_PLATFORM.get(platform, "")
    if platform == "cpu" or (kernel == "cudnn" and config.model.dtype != "bfloat16"):
        return ""
    return kernel


def chosen(config: ConfigDict, platform: str) -> str:
    """How a run on devices of this platform computes attention, see `ModelConfig.attention`.

    Where the settings say "auto": the platform's kernel if it equals dense attention within
    `TOLERANCE` at the run's largest shapes, on a device of every process; else "dense". The log
    says which, and why.
    """
    setting = config.model.attention
    if setting != "auto":
        return setting
    kind = candidate(config, platform)
    if not kind:
        return "dense"
    logging.info("comparing the attention kernel %r with dense attention", kind)
    fault = _fault(config, kind)
    if jax.process_count() > 1:
        equal = multihost_utils.process_allgather(np.array([not fault]))
        if not fault and not np.all(equal):
            fault = "another process found that it differs, see its log"
    if fault:
        logging.warning("attention: 'dense', since the kernel %r is not usable: %s", kind, fault)
        return "dense"
    logging.info("attention: %r, equal to dense attention within %g", kind, TOLERANCE)
    return kind


def _fault(config: ConfigDict, kind: str) -> str:
    """What is wrong with a kernel on this process's first device; "" for nothing."""
    with jax.default_device(jax.local_devices()[0]):
        for one in cases_of(config, config.rollout.max_new_tokens):
            try:
                found = errors(one, kind, reference(one))
            except Exception as error:  # compilers and drivers raise what they like
                return f"{one.name}: {said_by(error)}"
            wrong = {key: error for key, error in found.items() if not error <= TOLERANCE}
            if wrong:
                shown = ", ".join(f"{key} {error:.2g}" for key, error in wrong.items())
                return f"{one.name}: relative error {shown}, allowed {TOLERANCE:g}"
    return ""
