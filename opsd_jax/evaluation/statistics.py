"""Confidence intervals and paired tests of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson_of_mean(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the mean of several proportions, each (successes, n): Wilson's intervals combined by the method of
    Zou and Donner, in which the distances from each proportion to its own limits add up as squares. Of one it is `wilson`."""
    if len(parts) == 1:
        return wilson(*parts[0])
    shares = [successes / n for successes, n in parts]
    mean, limits = sum(shares) / len(parts), [wilson(*part) for part in parts]
    off = [
        math.sqrt(sum((limit[side] - share) ** 2 for limit, share in zip(limits, shares)))
        / len(parts)
        for side in (0, 1)
    ]
    return max(mean - off[0], 0.0), min(mean + off[1], 1.0)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, in 0..1 (Wilson's score interval); (0, 1) for n = 0.

    Unlike p +- 1.96 s it stays inside 0..1 and has a width at 0 of n and n of n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely pairs that differ would be as uneven if each were a coin."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
