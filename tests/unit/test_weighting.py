"""Which positions of a completion count and how much, against plain loops in Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from opsd_jax import config as config_lib
from opsd_jax import config_check, divergence, weighting
from opsd_jax.weighting import PositionsConfig

LENGTHS = (1, 3, 7, 10)
MASK = np.arange(10) < np.array(LENGTHS)[:, None]


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, [[*range(1)], [*range(3)], [*range(7)], [*range(10)]]),
        ({"first_fraction": 0.3}, [[0], [0], [0, 1, 2], [0, 1, 2]]),
        ({"skip": 2}, [[], [2], [2, 3, 4, 5, 6], [*range(2, 10)]]),
        ({"limit": 4}, [[0], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"first_fraction": 0.5, "skip": 1, "limit": 4}, [[], [1], [1, 2, 3], [1, 2, 3]]),
    ],
)
def test_positions_that_count(settings, counted):
    """Lengths 1, 3, 7 and 10; a fraction is of each length, rounded up."""
    found = np.asarray(weighting.counted(MASK, PositionsConfig(**settings)))
    assert [np.flatnonzero(row).tolist() for row in found] == counted


def test_a_fraction_is_rounded_up_exactly():
    """0.7 of 10 is 7, whatever float32 makes of the product."""
    lengths = np.arange(1, 1001)
    mask = np.arange(1000) < lengths[:, None]
    for tenths in (1, 3, 7, 9):
        found = weighting.counted(mask, PositionsConfig(first_fraction=tenths / 10))
        wanted = [-(-tenths * n // 10) for n in lengths]
        assert np.asarray(found).sum(axis=1).tolist() == wanted


def test_a_gap_in_a_completion_is_part_of_its_length():
    """Delimiters that are not scored have positions too."""
    mask = np.array([[True, True, False, True, False]])
    found = weighting.counted(mask, PositionsConfig(first_fraction=0.5))
    assert np.asarray(found).tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("reduction", ["completion", "token"])
@pytest.mark.parametrize("power", [-1.5, 2.0])
def test_weights_follow_a_power_of_the_position(power, reduction):
    relative = weighting.by_position(jnp.asarray(MASK), PositionsConfig(power=power))
    found = np.asarray(divergence.token_weights(relative, reduction))
    wanted = np.zeros(MASK.shape)
    for b, length in enumerate(LENGTHS):
        for n in range(length):
            wanted[b, n] = math.pow(n + 1, power)
        if reduction == "completion":
            wanted[b] /= wanted[b].sum() * len(LENGTHS)
    np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=1e-5)


def test_positions_change_neither_default_nor_empty_rows():
    assert weighting.counted(MASK, PositionsConfig()) is MASK
    assert weighting.by_position(MASK, PositionsConfig()) is MASK
    none = np.zeros((2, 4), bool)
    for reduction in ("completion", "token"):
        assert not np.asarray(divergence.token_weights(none, reduction)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": 4, "limit": 4}, r"config.opsd.positions.skip is 4 with a positions.limit of 4"),
        ({"skip": 1024}, r"config.opsd.positions.skip is 1024, but a completion has at most 1024"),
    ],
)
def test_settings_under_which_nothing_counts_are_refused(settings, message):
    config = config_lib.default()
    config.opsd.positions.update(settings)
    with pytest.raises(ValueError, match=message):
        config_check.check(config)


def test_sampling_ends_where_nothing_counts_any_more():
    """bos and two delimiters of a skip are fed besides the 100 tokens; evaluation is as before."""
    config = config_lib.default()
    assert config_lib.training_budget(config) == 1024
    config.opsd.positions.limit = 100
    assert config_lib.training_budget(config) == 100 + 1 + 2
    assert config.rollout.max_new_tokens == 1024
    config.opsd.positions.limit = 5000
    assert config_lib.training_budget(config) == 1024
    assert config_lib.health(config, "opsd").min_eos_rate is None
    assert config_lib.health(config, "sft") == config_lib.health(config_lib.default(), "opsd")
