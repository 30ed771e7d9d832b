"""Confidence intervals and paired tests of accuracies."""

import math
from collections.abc import Sequence

import numpy as np

from opsd_jax.data import randomness

LEAST_KL = 1e-4  # nats per token: below it, a KL may be nothing but rounding
_AT_ONCE = 1 << 22  # values that are resampled at the same time


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


def closure(before: float, after: float) -> float | None:
    """The share of the KL to the teacher that training removed, 1 - after / before (Eq. 9).

    Args:
      before, after: nats per token.
    Returns:
      None where `before` is below `LEAST_KL`: teacher and student say the same from the start, and
      the quotient would be one of rounding errors.
    """
    return None if before < LEAST_KL else 1 - after / before


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


def paired_difference(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same questions, in -1..1.

    Newcombe's square-and-add interval for paired data (Statistics in Medicine 17, 1998, 2635-2650,
    method 10): Wilson's intervals of the two, combined with their correlation. Unlike a bootstrap
    or a normal approximation it has a width where no answers differ.

    Args:
      both, neither: questions that both models, or neither, answer correctly.
      first, second: questions that only the first, or only the second, answers correctly.
    Returns:
      The interval of the first accuracy minus the second.
    """
    n = both + first + second + neither
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    covariance = float(both * neither - first * second)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # for continuity
    return _difference(
        (both + first, n), (both + second, n), covariance / math.sqrt(product) if product else 0.0
    )


def unpaired_difference(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on different questions, in -1..1.

    As `paired_difference`, without a correlation (method 10 of Newcombe's paper on unpaired data,
    the same volume, 873-890).

    Args:
      first, second: (right answers, questions) of each.
    """
    return _difference(first, second, 0.0)


def _difference(
    first: tuple[int, int], second: tuple[int, int], correlation: float
) -> tuple[float, float]:
    """Wilson's intervals of two proportions, (successes, n) of each, as one of their difference."""
    shares = [successes / n for successes, n in (first, second)]
    (low_1, high_1), (low_2, high_2) = wilson(*first), wilson(*second)

    def reach(a, b):
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    difference = shares[0] - shares[1]
    below = reach(shares[0] - low_1, high_2 - shares[1])
    above = reach(high_1 - shares[0], shares[1] - low_2)
    return difference - below, difference + above


def paired_interval(
    differences: Sequence[np.ndarray], *, shared: bool, resamples: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a mean paired difference over seeds and questions, by bootstrap.

    A resample takes seeds with replacement, then questions with replacement, and the mean over
    both; the interval holds the middle 95 % of the means. Where all seeds answered the same
    questions, a resample takes the same questions for all of its seeds: what is easy for one seed
    is easy for the others, and questions taken independently for each seed would make the interval
    too narrow (seeds and questions are crossed; Owen 2007, The Annals of Applied Statistics).

    With few seeds the interval is too narrow, with one it is about the questions alone: a bootstrap
    cannot show values that were not measured.

    Args:
      differences: for each seed [n] what one model scored minus what the other did, question by
        question, such as 1 for an answer that only the first gives correctly.
      shared: whether position i is the same question for all seeds.
      resamples: number of resamples. seed: of the resamples; the same seed gives the same interval.
    Raises:
      ValueError: no seed, a seed without questions, or shared questions in different numbers.
    """
    values = [np.asarray(part, np.float64) for part in differences]
    sizes = {len(part) for part in values}
    if not values or 0 in sizes or (shared and len(sizes) > 1):
        raise ValueError(
            f"{len(values)} seeds with {sorted(sizes)} questions: give at least one of each, and "
            "equally many for all seeds if they are shared"
        )
    rng = randomness.generator(seed, "paired interval")
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    if shared:
        means = _resampled_means(np.stack(values), resamples, rng)  # [seeds, resamples]
        found = np.take_along_axis(means.T, chosen, axis=1)
    else:
        found = np.zeros(chosen.shape)
        for number, part in enumerate(values):
            places = chosen == number
            found[places] = _resampled_means(part[None], int(places.sum()), rng)[0]
    low, high = np.percentile(found.mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _resampled_means(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[S, count] means of resamples of the columns of values [S, n], the same for all rows."""
    n = values.shape[1]
    block = max(1, _AT_ONCE // values.size)
    parts = [
        values[:, rng.integers(n, size=(min(block, count - first), n))].mean(axis=-1)
        for first in range(0, count, block)
    ]
    return np.concatenate(parts, axis=1) if parts else np.zeros((len(values), 0))
