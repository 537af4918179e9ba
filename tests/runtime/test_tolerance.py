"""Tolerated failure rates against curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile.runtime.tolerance import Curve, rate_ratio, tolerated_rate

RATES = np.array([0.0005, 0.001, 0.005, 0.01])


def power_law(reaches_one_at: float, power: float, noise: float, chips: np.ndarray, rng: np.random.Generator) -> Curve:
    """Chips whose mean drop is 1 at a rate and a power of it elsewhere; part of their spread is theirs at all rates."""
    mean = ((RATES / reaches_one_at) ** power)[:, None]
    spread = noise * (0.6 * chips + 0.8 * rng.standard_normal((len(RATES), len(chips))))
    return Curve(rates=RATES, drops=mean * (1 + spread))


@given(st.floats(0.0006, 0.0095), st.floats(0.7, 2.0))
def test_a_power_law_is_found_exactly_between_rates(rate: float, power: float) -> None:
    curve = power_law(rate, power, 0.0, np.zeros(3), np.random.default_rng(0))
    found = tolerated_rate(curve, 1.0)
    assert found.range.low == found.range.high == pytest.approx(rate, rel=1e-6)
    assert found.interval.low == pytest.approx(rate, rel=1e-6)
    assert found.interval.high == pytest.approx(rate, rel=1e-6)


def test_outside_the_rates_that_were_run_only_bounds_are_known() -> None:
    rng = np.random.default_rng(0)
    strong, weak, middle = (power_law(rate, 1.0, 0.0, np.zeros(3), rng) for rate in (0.5, 1e-5, 0.002))
    assert (tolerated_rate(strong, 1.0).range.low, tolerated_rate(strong, 1.0).range.high) == (0.01, math.inf)
    assert (tolerated_rate(weak, 1.0).range.low, tolerated_rate(weak, 1.0).range.high) == (0.0, 0.0005)
    for above, below, low, high in (
        (strong, middle, 5.0, math.inf),
        (middle, weak, 4.0, math.inf),
        (weak, middle, 0.0, 0.25),
        (strong, weak, 20.0, math.inf),
        (strong, strong, 0.0, math.inf),
        (weak, weak, 0.0, math.inf),
    ):
        found = rate_ratio(above, below, 1.0)
        assert found.range.low == pytest.approx(low)
        assert found.range.high == pytest.approx(high)


def test_no_power_law_begins_at_a_gain() -> None:
    curve = Curve(rates=RATES, drops=np.array([[-0.3], [-0.1], [-0.2], [2.0]]))
    found = tolerated_rate(curve, 1.0)
    assert (found.range.low, found.range.high) == (found.interval.low, found.interval.high) == (0.005, 0.01)


@pytest.mark.parametrize("number", [5, 20, 60])
def test_the_intervals_cover_what_they_say(number: int) -> None:
    rng = np.random.default_rng(5)
    trials, rate_hits, ratio_hits = 120, 0, 0
    for _ in range(trials):
        chips = rng.standard_normal(number)
        reference, better = (power_law(*law, chips, rng) for law in ((0.0008, 1.4, 0.6), (0.006, 1.2, 0.8)))
        rate = tolerated_rate(better, 1.0).interval
        ratio = rate_ratio(better, reference, 1.0).interval
        rate_hits += rate.low <= 0.006 <= rate.high
        ratio_hits += ratio.low <= 7.5 <= ratio.high
    # 95 % asked; 120 trials of that fall below 88 % once in a thousand.
    assert rate_hits >= 0.88 * trials
    assert ratio_hits >= 0.88 * trials


def test_the_same_chips_give_the_same_bytes() -> None:
    curve = power_law(0.002, 1.0, 0.5, np.random.default_rng(1).standard_normal(20), np.random.default_rng(2))
    assert tolerated_rate(curve, 1.0) == tolerated_rate(curve, 1.0)
    assert rate_ratio(curve, curve, 1.0).range.low == 1.0
    assert rate_ratio(curve, curve, 1.0).interval.high == 1.0
