"""Bootstrap intervals of divergences before and after training."""

import math
from collections.abc import Sequence

import numpy as np

from opsd_jax.data.randomness import generator
from opsd_jax.evaluation import statistics

RESAMPLES = 2000


def bootstrap(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]] | None = None,
    *,
    count: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """Means over examples and the closure, with 95 % intervals.

    Examples are resampled within their task, `before` and `after` together (percentile intervals).

    Args:
      before, after: for each task an array [n] of nats per token, the same examples in both.
      count: number of resamples.
    Returns:
      {"tasks": [one dict per task], "macro": mean of the tasks' means, "samples": mean over all
      examples}. Each dict has n, before, before_95, and with `after` after, after_95,
      closure = 1 - after / before, closure_95. Both are None where `before` is too small for a
      closure, of the examples or of a resample (see `statistics.closure`).
    """
    rng = generator(seed, "bootstrap")
    sides = [before] if after is None else [before, after]
    values = [[np.asarray(x, np.float64) for x in side] for side in sides]
    sizes = np.array([len(x) for x in before])
    means = np.zeros((len(sides), len(sizes), count + 1))  # the last: of the examples themselves
    for task, n in enumerate(sizes):
        for k in range(count + 1):
            chosen = np.arange(n) if k == count else rng.integers(n, size=n)
            means[:, task, k] = [side[task][chosen].mean() for side in values]
    return {
        "tasks": [_summary(means[:, task], n) for task, n in enumerate(sizes)],
        "macro": _summary(means.mean(axis=1), sizes.sum()),
        "samples": _summary(
            np.stack([np.average(part, axis=0, weights=sizes) for part in means]), sizes.sum()
        ),
    }


def _summary(means: np.ndarray, n: int) -> dict:
    """One dict of `bootstrap`.

    Args:
      means: [1 or 2, count + 1], before and maybe after; the last of each is the estimate.
    """
    found = {"n": int(n), **_interval("before", means[0])}
    if len(means) > 1:
        every = [statistics.closure(*pair) for pair in means.T]
        closure = np.array([math.nan if x is None else x for x in every])
        found |= {**_interval("after", means[1]), **_interval("closure", closure)}
    return found


def _interval(name: str, values: np.ndarray) -> dict:
    """{name: the last value, name_95: the interval that holds 95 % of the others}."""
    if not np.all(np.isfinite(values)):
        return {name: None, f"{name}_95": None}
    return {name: float(values[-1]), f"{name}_95": np.percentile(values[:-1], (2.5, 97.5)).tolist()}
