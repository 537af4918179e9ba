"""Uniform numbers of items: uniform, the same however they are asked for, more of them at higher thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rerampile.runtime import random_field
from rerampile.runtime.random_field import Field

SURE = 1e-6  # smallest probability of a right result to look as it does; the seeds are fixed

thresholds = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda p: (p[0], p[1] * (1 - p[0])))


def test_numbers_are_uniform() -> None:
    """All of them, and those of each band of depth by themselves."""
    items, u = Field(1, 2, 3).tails(0.5, 0.5, 200_000)

    np.testing.assert_array_equal(items, np.arange(200_000))
    assert stats.kstest(u, "uniform").pvalue > SURE
    depth = 2 * np.minimum(u, 1 - u)
    for low, high in [(0, 2**-10), (0.75 * 2**-4, 2**-4), (0.25, 0.375), (0.75, 1)]:
        inside = depth[(depth >= low) & (depth < high)]
        assert stats.binomtest(len(inside), len(depth), high - low).pvalue > SURE
        assert stats.kstest((inside - low) / (high - low), "uniform").pvalue > SURE


@pytest.mark.parametrize(("low", "high"), [(1e-4, 5e-4), (0.002, 0), (0, 0.01), (0.1, 0.3), (0.7, 0.1), (0.05, 0.95)])
def test_as_many_as_asked_for(low: float, high: float) -> None:
    size = 1_000_000
    items, u = Field(4, 0, 0).tails(low, high, size)

    for found, p in ((int((u < low).sum()), low), (int((u >= 1 - high).sum()), high)):
        assert stats.binomtest(found, size, p).pvalue > SURE
    assert len(items) == (u < low).sum() + (u >= 1 - high).sum()
    assert (np.diff(items) > 0).all()
    gaps = np.diff(items)
    p = low + high
    expected = 1 - p  # a gap of more than one
    assert stats.binomtest(int((gaps > 1).sum()), len(gaps), expected).pvalue > SURE


def test_an_item_is_uniform_over_runs_and_neighbours_are_independent() -> None:
    u = np.array([Field(7, run, 1).tails(0.5, 0.5, 6)[1] for run in range(3000)])

    for item in range(6):
        assert stats.kstest(u[:, item], "uniform").pvalue > SURE
    correlation = np.corrcoef(u, rowvar=False)[np.triu_indices(6, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(3000)


@given(thresholds, st.floats(0, 1), st.floats(0, 1), st.integers(0, 5000), st.integers(0, 2**32))
def test_higher_thresholds_keep_what_lower_ones_return(
    higher: tuple[float, float], a: float, b: float, size: int, seed: int
) -> None:
    low, high = higher[0] * a, higher[1] * b
    field = Field(seed, 1, 2)
    items, u = field.tails(*higher, size)

    fewer, their_u = field.tails(low, high, size)

    kept = (u < low) | (u >= 1 - high)
    np.testing.assert_array_equal(fewer, items[kept])
    np.testing.assert_array_equal(their_u, u[kept])


@given(thresholds, st.integers(0, 3000), st.integers(0, 60_000), st.integers(0, 100))
def test_more_items_change_nothing(p: tuple[float, float], size: int, more: int, run: int) -> None:
    items, u = Field(1, run, 2).tails(*p, size)

    longer, their_u = Field(1, run, 2).tails(*p, size + more)

    prefix = longer < size
    np.testing.assert_array_equal(longer[prefix], items)
    np.testing.assert_array_equal(their_u[prefix], u)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_how_many_are_drawn_at_a_time_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Field(1, 2, 3).tails(0.02, 0.1, 100_000)
    monkeypatch.setattr(random_field, "_BLOCK", block)

    after = Field(1, 2, 3).tails(0.02, 0.1, 100_000)

    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("field", [Field(2, 2, 3), Field(1, 3, 3), Field(1, 2, 4)])
def test_seed_run_and_purpose_all_count(field: Field) -> None:
    """Two fields hit the same items as often as chance has it."""
    size, p = 200_000, 0.05
    items, other = Field(1, 2, 3).tails(p, 0, size)[0], field.tails(p, 0, size)[0]
    assert stats.binomtest(len(np.intersect1d(items, other)), size, p * p).pvalue > SURE
    both = np.corrcoef(Field(1, 2, 3).at(np.arange(10_000)), field.at(np.arange(10_000)))[0, 1]
    assert abs(both) < 0.05


def test_hashed_numbers() -> None:
    """Uniform, of the item alone, and unrelated to the neighbour's and to the item's other number."""
    items = np.arange(100_000)
    field = Field(1, 2, 3)
    u = field.at(items)

    assert stats.kstest(u, "uniform").pvalue > SURE
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_array_equal(field.at(items[::-7]), u[::-7])
    np.testing.assert_array_equal(items, np.arange(100_000))
    far = field.at(items + 2**40)
    for other in (np.roll(u, 1), np.roll(u, 128), far, field.tails(0.5, 0.5, len(items))[1]):
        assert abs(np.corrcoef(u, other)[0, 1]) < 5 / np.sqrt(len(items))


@pytest.mark.parametrize(("low", "high", "size"), [(0, 0, 100), (0.5, 0.5, 0), (1, 0, 0), (0, 0, 0)])
def test_nothing(low: float, high: float, size: int) -> None:
    items, u = Field(1, 2, 3).tails(low, high, size)
    assert items.shape == u.shape == (0,)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, 1), (0.5, 0.5), (0.9, 0.1)])
def test_everything(low: float, high: float) -> None:
    items, _ = Field(1, 2, 3).tails(low, high, 1000)
    np.testing.assert_array_equal(items, np.arange(1000))
