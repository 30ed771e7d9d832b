"""Attention kernels against dense attention in float32, at the shapes of a run.

The mask is that of a packed context, images included, and a completion after it. Forward pass and
gradients are compared, and timed.

Letters: B batch, T positions, H heads, K kv heads, h head_dim.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opsd_jax import context as context_lib
from opsd_jax.context import Context
from opsd_jax.doctor.result import Limits, Result, judge, seconds_of
from opsd_jax.model import attention, masks
from opsd_jax.model.config import ModelConfig
from opsd_jax.model.masks import Mask

# Kernels that each platform has besides "dense" (see `ModelConfig.attention`).
OF_PLATFORM = {"tpu": ("flash",), "gpu": ("cudnn",), "cpu": ("flash_interpret",)}
QUERY_BLOCK = 512  # queries at a time of the reference: its scores are in float32
TOLERANCE = 0.02  # of `relative_error`; bfloat16 itself costs about 0.006
_COMPARED = ("out", "dq", "dk", "dv")

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


def checks(
    cases: list[Case],
    kinds: tuple[str, ...],
    query_block: int,
    limits: Limits,
    attend: Attend = attention.attend,
) -> Iterator[Result]:
    """A result for each case and kernel.

    Args:
      kinds: see `ModelConfig.attention`. query_block: of "dense".
      attend: computes attention as `attention.attend`; the reference does not use it.
    """
    for one in cases:
        limits.check()
        reference = jax.device_get(_reference(one))
        for kind in kinds:
            limits.check()
            yield compare(one, kind, reference, limits.measurement, attend, query_block)


def compare(
    one: Case,
    kind: str,
    reference: dict[str, np.ndarray],
    budget: float,
    attend: Attend = attention.attend,
    query_block: int = QUERY_BLOCK,
) -> Result:
    """Whether a kernel agrees with the reference within `TOLERANCE`, and how long it takes.

    Args:
      reference: what `_reference` returns. budget: seconds of repeated runs of one pass.
    """
    forward, both = _programs(kind, query_block, attend)
    laid_out = jax.jit(masks.lay_out, static_argnums=(1, 2))(one.mask, one.q.shape[1], kind)
    name = f"attention/{kind}/{one.name}"
    try:
        found = jax.device_get(both(one.q, one.k, one.v, laid_out, one.weight))
    except (
        Exception
    ) as error:  # a kernel that does not compile: the other kernels are still checked
        said = (str(error).strip() or "without a message").splitlines()[0]
        return judge(name, False, "", f"{type(error).__name__}: {said}", {})
    errors = {key: relative_error(found[key], reference[key], one.real) for key in _COMPARED}
    seconds = {
        "forward_seconds": seconds_of(lambda: forward(one.q, one.k, one.v, laid_out), budget),
        "both_seconds": seconds_of(lambda: both(one.q, one.k, one.v, laid_out, one.weight), budget),
    }
    times = (
        f"{1e3 * seconds['forward_seconds']:.2f} ms forward, "
        f"{1e3 * seconds['both_seconds']:.2f} ms with gradients, {one.q.shape[1]} positions"
    )
    shown = ", ".join(f"{key} {error:.2g}" for key, error in errors.items())
    wrong = [key for key, error in errors.items() if not error <= TOLERANCE]
    return judge(
        name,
        not wrong,
        f"{times}; largest error: {shown}",
        f"{', '.join(wrong)} differs from dense attention in float32: largest error {shown}, "
        f"allowed {TOLERANCE:g}. Do not train with config.model.attention={kind!r}",
        {"positions": one.q.shape[1], "errors": errors, "tolerance": TOLERANCE, **seconds},
    )


def _reference(one: Case) -> dict[str, jax.Array]:
    """{"out", "dq", "dk", "dv"} of dense attention in float32: output and gradients."""
    _, both = _programs("dense", QUERY_BLOCK, attention.attend)
    wide = (x.astype(jnp.float32) for x in (one.q, one.k, one.v))
    with jax.default_matmul_precision("highest"):
        return both(*wide, masks.visible(one.mask), one.weight)


def _programs(kind: str, query_block: int, attend: Attend) -> tuple[Any, Any]:
    """(forward pass, forward and backward pass), jitted."""

    def forward(q, k, v, mask):
        return attend(q, k, v, mask, query_block=query_block, kind=kind)

    def value(q, k, v, mask, weight):
        out = forward(q, k, v, mask)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    def both(q, k, v, mask, weight):
        gradients, out = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(q, k, v, mask, weight)
        return dict(zip(_COMPARED, (out, *gradients)))

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
