"""Sorting with positions, beside numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest

from rerampile.runtime.sorting import sort_with_order


@pytest.mark.parametrize("largest", [1, 50, 1 << 20, 2**63 - 1])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_as_the_stable_sort(count: int, largest: int) -> None:
    """Whether or not key and position fit into one number."""
    keys = np.random.default_rng(count).integers(0, largest, count, endpoint=True)
    before = keys.copy()

    ordered, order = sort_with_order(keys)

    np.testing.assert_array_equal(order, np.argsort(before, kind="stable"))
    np.testing.assert_array_equal(ordered, before[order])
    np.testing.assert_array_equal(keys, before)
