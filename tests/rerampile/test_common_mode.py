"""Pairs of level codes, against trying every pair of every slice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile.common_mode import StepPairs


def cost(codes: np.ndarray, levels: int, aims: tuple[float, ...]) -> np.ndarray:
    """Squared distances of codes [..., slices, 2] to the aims, by the significance of their slice."""
    weight = float(levels) ** (2 * np.arange(len(aims)))
    return np.sum(weight[:, None] * (codes - np.array(aims)[:, None]) ** 2, axis=(-2, -1))


@given(
    st.sampled_from([(2, 1), (5, 1), (2, 4), (3, 3), (4, 2), (8, 2)]),
    st.lists(st.floats(-0.5, 1.5) | st.sampled_from([0.0, 1.0, 0.5, -50.0]), min_size=4, max_size=4),
)
def test_no_pairs_of_the_same_difference_are_better(shape: tuple[int, int], shares: list[float]) -> None:
    levels, slices = shape
    aims = tuple(share * (levels - 1) for share in shares[:slices])
    most = levels**slices - 1
    differences = np.arange(-most, most + 1)
    out = np.empty((slices, 2, 1, len(differences)), np.uint8)

    StepPairs(levels, aims).encode(differences[None].astype(np.int32), out)

    codes = out[:, :, 0].astype(int).transpose(2, 0, 1)
    significance = levels ** np.arange(slices)
    np.testing.assert_array_equal((codes[:, :, 0] - codes[:, :, 1]) @ significance, differences)
    every = np.array(list(itertools.product(range(levels), repeat=2 * slices))).reshape(-1, slices, 2)
    held = (every[:, :, 0] - every[:, :, 1]) @ significance
    least = np.full(len(differences), np.inf)
    np.minimum.at(least, held + most, cost(every, levels, aims))
    np.testing.assert_allclose(cost(codes, levels, aims), least, rtol=1e-9)


@pytest.mark.parametrize(("aim", "expected"), [(0.0, [(7, 0), (0, 0)]), (3.5, [(3, 4), (4, 3)])])
def test_a_number_takes_the_digits_that_cost_least(aim: float, expected: list[tuple[int, int]]) -> None:
    """Seven, of eight levels: ``7 + 8 * 0`` where cells lie at off, ``-1 + 8 * 1`` in the middle."""
    out = np.empty((2, 2, 1, 1), np.uint8)
    StepPairs(8, (aim, aim)).encode(np.array([[7]], np.int32), out)
    assert [tuple(pair) for pair in out[:, :, 0, 0]] == expected
