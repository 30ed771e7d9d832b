"""Intervals of differences: bootstrap and closed form, against cases computed by hand."""

import numpy as np
import pytest

from opsd_jax.evaluation import statistics


def test_two_seeds_that_answer_alike_within_themselves():
    """A resample of seeds with means 0 and 1 is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    seeds = [np.zeros(7), np.ones(7)]
    for shared in (True, False):
        assert statistics.paired_interval(seeds, shared=shared) == (0.0, 1.0)
    assert statistics.paired_interval([np.full(4, 0.25)] * 3, shared=True) == (0.25, 0.25)


@pytest.mark.parametrize("shared", [True, False])
def test_one_seed_is_the_normal_interval_of_a_mean(shared):
    """Values -1, 0, 1: mean m and variance v of 900 of them; m -+ 1.96 sqrt(v / 900)."""
    values = np.repeat([-1.0, 0.0, 1.0], [90, 540, 270])
    mean, half = 0.2, 1.96 * np.sqrt((0.4 - 0.04) / 900)
    low, high = statistics.paired_interval([values], shared=shared, resamples=20_000)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.003)


def test_questions_that_all_seeds_share_are_resampled_together():
    """Four seeds that agree on every question say as much as one; four of other questions say more.

    The standard deviation is that of 400 questions, or of 1,600.
    """
    seeds = [np.repeat([0.0, 1.0], 200)] * 4
    for shared, n in ((True, 400), (False, 1600)):
        low, high = statistics.paired_interval(seeds, shared=shared, resamples=20_000)
        half = 1.96 * np.sqrt(0.25 / n)
        np.testing.assert_allclose([low, high], [0.5 - half, 0.5 + half], atol=0.003)


def test_seeds_of_different_sizes_and_what_cannot_be_resampled():
    seeds = [np.ones(3), np.zeros(5)]
    assert statistics.paired_interval(seeds, shared=False) == (0.0, 1.0)
    again = [statistics.paired_interval([np.arange(9.0)], shared=False, seed=s) for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    for wrong, shared in (([], False), ([np.ones(0)], False), (seeds, True)):
        with pytest.raises(ValueError, match="give at least one of each"):
            statistics.paired_interval(wrong, shared=shared)


def test_blocks_of_resamples_do_not_change_the_interval(monkeypatch):
    seeds = [np.random.default_rng(s).integers(-1, 2, 50) for s in range(3)]
    whole = statistics.paired_interval(seeds, shared=True, resamples=100)
    monkeypatch.setattr(statistics, "_AT_ONCE", 400)  # two resamples of 3 x 50 at a time
    assert statistics.paired_interval(seeds, shared=True, resamples=100) == whole


# --- the difference of two accuracies


def test_the_interval_of_a_difference_of_pairs():
    """The first example is of Newcombe's paper (36, 12, 2 and 0 of 50 pairs)."""
    np.testing.assert_allclose(
        statistics.paired_difference(36, 12, 2, 0), (0.0569, 0.3404), atol=5e-5
    )
    low, high = statistics.paired_difference(100, 5, 25, 382)
    assert statistics.paired_difference(100, 25, 5, 382) == pytest.approx((-high, -low))
    # Agreement tells more than different questions do.
    unpaired = statistics.unpaired_difference((105, 512), (125, 512))
    assert unpaired[0] < low < high < 0 < unpaired[1]
    for counts in ((0, 0, 0, 16), (16, 0, 0, 0)):  # no answer differs: the interval has a width
        low, high = statistics.paired_difference(*counts)
        assert low == pytest.approx(-high) and 0.15 < high < 0.25


def test_of_unpaired_answers():
    low, high = statistics.unpaired_difference((56, 70), (48, 80))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # Newcombe, method 10


def test_the_interval_of_pairs_covers_the_true_difference():
    """In about 95 of 100 draws, near the ends, too."""
    rng = np.random.default_rng(0)
    for chances in ((0.5, 0.2, 0.1, 0.2), (0.9, 0.06, 0.02, 0.02)):
        draws = rng.multinomial(100, chances, size=400)
        limits = [statistics.paired_difference(*map(int, draw)) for draw in draws]
        inside = np.mean([low <= chances[1] - chances[2] <= high for low, high in limits])
        assert inside >= 0.93
