"""Attention kernels against dense attention in float32, at the shapes of a run.

run/attention_check.py compares forward pass and gradients; here they are timed, too.
"""

from collections.abc import Iterator

import numpy as np

from opsd_jax.doctor.result import OK, Limits, Result, judge, seconds_of
from opsd_jax.model import attention
from opsd_jax.run import attention_check
from opsd_jax.run.attention_check import QUERY_BLOCK, TOLERANCE, Attend, Case


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
        reference = attention_check.reference(one)
        for kind in kinds:
            limits.check()
            yield compare(one, kind, reference, limits.measurement, attend, query_block)


def taken(found: list[Result], kernel: str) -> str:
    """What model.attention "auto" takes: a kernel that was compared and right in all cases.

    kernel: see `attention_check.candidate`.
    """
    of_kernel = [one for one in found if one.name.split("/")[1] == kernel]
    return kernel if of_kernel and all(one.status == OK for one in of_kernel) else "dense"


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
      reference: what `attention_check.reference` returns.
      budget: seconds of repeated runs of one pass.
    """
    name = f"attention/{kind}/{one.name}"
    try:
        errors = attention_check.errors(one, kind, reference, attend, query_block)
    except (
        Exception
    ) as error:  # a kernel that does not compile: the other kernels are still checked
        return judge(name, False, "", attention_check.said_by(error), {})
    forward, both = attention_check.programs(kind, query_block, attend)
    mask = attention_check.laid_out(one, kind)
    seconds = {
        "forward_seconds": seconds_of(lambda: forward(one.q, one.k, one.v, mask), budget),
        "both_seconds": seconds_of(lambda: both(one.q, one.k, one.v, mask, one.weight), budget),
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
