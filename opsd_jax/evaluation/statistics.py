"""Confidence intervals and paired tests of accuracies."""

import math
from collections.abc import Sequence


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion, in 0..1 (Wilson's score interval); (0, 1) for n = 0.

    Unlike p ± 1.96 s it stays within 0..1 and has a width at 0 of n and n of n.

    Raises:
      ValueError: not 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    from scipy import stats  # a second to import, and many commands compute no interval

    interval = stats.binomtest(int(successes), int(n)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def wilson_of_mean(parts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of the mean of several proportions, in 0..1; of one proportion it is `wilson`.

    Wilson's intervals are combined by the method of Zou and Donner: the distances from each
    proportion to its own limits add up as squares.

    Args:
      parts: (successes, n) of each proportion.
    """
    if len(parts) == 1:
        return wilson(*parts[0])
    shares = [successes / n for successes, n in parts]
    mean, limits = sum(shares) / len(parts), [wilson(*part) for part in parts]
    below, above = (
        math.sqrt(sum((limit[side] - share) ** 2 for limit, share in zip(limits, shares)))
        / len(parts)
        for side in (0, 1)
    )
    return max(mean - below, 0.0), min(mean + above, 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k answers is right, from n sampled answers, c of them right.

    1 - C(n - c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, Eq. 1).

    Raises:
      ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers with {c} right: need 0 <= c <= n, 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def mcnemar(wins: int, losses: int) -> float:
    """p-value of McNemar's exact two-sided test of paired answers.

    It is the probability that the pairs that differ would be as uneven if a fair coin decided each.

    Args:
      wins: pairs that only the first of two models answers correctly.
      losses: pairs that only the second answers correctly.
    """
    if not wins + losses:
        return 1.0
    from scipy import stats  # as in `wilson`

    return float(stats.binomtest(min(wins, losses), wins + losses).pvalue)
