"""Statistics of simulated chips, against brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile.runtime.statistics import chip_statistics, chips_needed, two_stage_interval, variance_parts


def test_summary_of_known_numbers() -> None:
    found = chip_statistics(np.array([90.0, 88.0, 86.0, 84.0]), np.full(4, 91.0))
    assert (found.chips, found.clean, found.mean, found.worst, found.drop) == (4, 91.0, 87.0, 84.0, 4.0)
    assert found.deviation == pytest.approx(math.sqrt(20 / 3))
    half = 3.182446305284263 * math.sqrt(20 / 3) / 2  # t(0.975, 3) from a table
    assert found.interval.half_width == pytest.approx(half)
    assert (found.drop_interval.low, found.drop_interval.high) == pytest.approx((4 - half, 4 + half))


def test_one_chip_has_no_interval() -> None:
    found = chip_statistics(np.array([90.0]), np.array([91.0]))
    assert math.isnan(found.deviation)
    assert (found.interval.low, found.interval.high) == (-math.inf, math.inf)


def test_t_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = chip_statistics(rng.normal(3.0, 2.0, 8), np.zeros(8)).interval
        hits += found.low <= 3.0 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


@pytest.mark.parametrize("spread", [0.3, 1.5, 4.0])
def test_two_stage_rule_is_as_narrow_and_as_sure_as_asked(spread: float) -> None:
    rng = np.random.default_rng(1)
    hits, wanted = 0, 0.5
    for _ in range(1500):
        first = rng.normal(2.0, spread, 20)
        values = np.concatenate([first, rng.normal(2.0, spread, chips_needed(first, wanted) - 20)])
        found = two_stage_interval(values, 20)
        assert found.half_width <= wanted * (1 + 1e-9)
        hits += found.low <= 2.0 <= found.high
    assert hits / 1500 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1500)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=40), st.floats(0.05, 5))
def test_never_fewer_chips_than_the_first_stage(values: list[float], half_width: float) -> None:
    assert chips_needed(np.array(values), half_width) >= len(values)


@settings(deadline=None, max_examples=3, derandomize=True)
@given(st.integers(0, 1000))
def test_variance_parts_separate_chips_from_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    population, images, chips = 500, 50, 3000
    loss = rng.normal(5.0, 3.0, chips)  # true drop of each chip, points
    scores = rng.normal(0.0, 40.0, (1, population))  # what an image adds, the same for every chip
    scores -= scores.mean()
    measured, within = np.empty(chips), np.empty(chips)
    for i in range(chips):
        seen = loss[i] + scores[0, rng.choice(population, images, replace=False)]
        measured[i], within[i] = seen.mean(), seen.var(ddof=1)
    parts = variance_parts(measured, within, images, population)
    assert parts.chips == pytest.approx(9.0, rel=0.25)
    assert parts.images == pytest.approx(scores.var(ddof=1) / images * (1 - images / population), rel=0.02)
