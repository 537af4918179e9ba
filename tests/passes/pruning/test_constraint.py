"""Zeros: which weights stay, exactly how many, and what no layer can have."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rerampile import ConfigError
from rerampile.passes.pruning.constraint import BlockSparsity, Constraint, NOfM, Sparsity, keep_largest

SHAPE = (2, 4, 6)
weights_ = hnp.arrays(np.float64, SHAPE, elements=st.sampled_from([-2.0, -1, 0, 1, 1.5, 2, 3]))
importance_ = hnp.arrays(np.float64, (2, 6), elements=st.sampled_from([0.25, 1.0, 4.0]))


@given(hnp.arrays(np.float32, (4, 5), elements=st.sampled_from([-2, -1, 0, 1, 1.5, 2])), st.floats(0, 0.99))
def test_keep_largest_takes_exactly_the_smallest(weights: np.ndarray, ratio: float) -> None:
    count = round(ratio * 20)
    kept = keep_largest(np.abs(weights).reshape(-1), count)
    order = np.argsort(np.abs(weights), axis=None, kind="stable")  # among equals the earlier ones go
    np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(order[:count]))


@given(hnp.arrays(np.float64, (3, 2, 5), elements=st.sampled_from([0.0, 1, 2])), st.integers(0, 6))
def test_keep_largest_of_each_row(scores: np.ndarray, remove: int) -> None:
    kept = keep_largest(scores, remove)
    for at in np.ndindex(3, 2):
        np.testing.assert_array_equal(kept[at], keep_largest(scores[at], remove))


def distance(left: np.ndarray, right: np.ndarray, importance: np.ndarray) -> float:
    return float((importance[:, None] * (left - right) ** 2).sum())


def supports(constraint: Constraint) -> list[np.ndarray]:
    """All masks of a set on one group of 2 outputs and 4 inputs, by what the set means."""
    shape = (1, 2, 4)
    masks = [np.array(bits, np.bool_).reshape(shape) for bits in itertools.product([0, 1], repeat=8)]
    match constraint:
        case Sparsity(ratio=ratio, within="layer"):
            return [m for m in masks if (~m).sum() == round(ratio * 8)]
        case Sparsity(ratio=ratio):
            return [m for m in masks if ((~m).sum(axis=2) == round(ratio * 4)).all()]
        case NOfM(count=count, of=of):
            return [m for m in masks if (m.reshape(2, -1, of).sum(axis=2) == count).all()]
        case BlockSparsity(ratio=ratio, inputs=inputs, outputs=outputs):
            rows, columns = inputs or 4, outputs or 2
            tiles = [np.s_[0, c : c + columns, r : r + rows] for r in range(0, 4, rows) for c in range(0, 2, columns)]
            wanted = min(round(ratio * len(tiles)), len(tiles) - 1)
            return [
                m
                for m in masks
                if all(len(set(m[t].flat)) == 1 for t in tiles) and sum(not m[t].any() for t in tiles) == wanted
            ]
    raise AssertionError(constraint)


SETS: list[Any] = [
    Sparsity(0.6),
    Sparsity(0.5, within="output"),
    NOfM(1, 2),
    NOfM(2, 4),
    NOfM(2, 2),
    BlockSparsity.rows(0.5),
    BlockSparsity.columns(0.5),
    BlockSparsity(0.5, inputs=2, outputs=1),
    BlockSparsity(0.5, inputs=3, outputs=1),
    BlockSparsity(0.9, inputs=128, outputs=128),
]


@pytest.mark.parametrize("constraint", SETS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_projection_is_the_nearest_point(constraint: Constraint, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, importance = rng.standard_normal((1, 2, 4)), rng.uniform(0.1, 3, (1, 4))
    candidates = supports(constraint)
    found = constraint.project(weights, importance)
    assert any(np.array_equal(found, np.where(mask, weights, 0)) for mask in candidates)
    nearest = min(distance(weights, np.where(mask, weights, 0), importance) for mask in candidates)
    assert distance(weights, found, importance) == pytest.approx(nearest, rel=1e-12)


@given(weights_, importance_, st.floats(0, 0.99))
def test_cardinality_is_exact(weights: np.ndarray, importance: np.ndarray, ratio: float) -> None:
    """Also with ties and zeros: no kept weight scores less than one that went, and the earlier of equals went."""
    ones = np.where(weights == 0, 1, weights)
    assert (Sparsity(ratio).project(ones, importance) == 0).sum() == round(ratio * 48)
    each = Sparsity(ratio, within="output").project(ones, importance)
    assert ((each == 0).sum(axis=2) == round(ratio * 6)).all()
    assert ((NOfM(1, 3).project(ones, importance) == 0).reshape(2, 4, 2, 3).sum(axis=3) == 2).all()
    assert (Sparsity(ratio).project(weights, importance) == 0).sum() >= round(ratio * 48)


@given(weights_, importance_, st.sampled_from(SETS[2:5:2] + SETS[5:] + SETS[:2]))
def test_projecting_twice_changes_nothing(weights: np.ndarray, importance: np.ndarray, constraint: Constraint) -> None:
    if isinstance(constraint, NOfM):
        constraint = NOfM(1, 3)
    once = constraint.project(weights, importance)
    np.testing.assert_array_equal(constraint.project(once, importance), once)


def test_ties_are_decided_by_position() -> None:
    ones = np.ones((1, 2, 4))
    assert Sparsity(0.5).project(ones, np.ones((1, 4))).tolist() == [[[0, 0, 0, 0], [1, 1, 1, 1]]]
    assert Sparsity(0.5, "output").project(ones, np.ones((1, 4))).tolist() == [[[0, 0, 1, 1]] * 2]
    assert BlockSparsity.rows(0.5).project(ones, np.ones((1, 4))).tolist() == [[[0, 0, 1, 1]] * 2]
    assert NOfM(1, 2).project(ones, np.ones((1, 4))).tolist() == [[[0, 1, 0, 1]] * 2]


def test_ratio_of_zero_changes_nothing_and_nearly_one_leaves_nothing_but_a_block() -> None:
    weights = np.arange(1.0, 9).reshape(1, 2, 4)
    for constraint in (Sparsity(0), Sparsity(0, "output"), BlockSparsity.rows(0), NOfM(4, 4)):
        np.testing.assert_array_equal(constraint.project(weights, np.ones((1, 4))), weights)
    assert not Sparsity(0.99).project(weights, np.ones((1, 4))).any()
    assert np.flatnonzero(BlockSparsity.rows(0.99).project(weights, np.ones((1, 4)))).tolist() == [3, 7]


def test_ragged_partitions_are_pruned_whole() -> None:
    weights = np.random.default_rng(0).standard_normal((2, 5, 7))
    found = BlockSparsity(0.5, inputs=3, outputs=2).project(weights, np.ones((2, 7)))
    empty = [not found[g, c : c + 2, r : r + 3].any() for g in range(2) for c in range(0, 5, 2) for r in range(0, 7, 3)]
    full = [found[g, c : c + 2, r : r + 3].all() for g in range(2) for c in range(0, 5, 2) for r in range(0, 7, 3)]
    assert sum(empty) == round(0.5 * 18)
    assert sum(full) == 18 - sum(empty)


def test_tangent_moves_only_weights_that_are_kept() -> None:
    weights = np.array([[[0.0, 2, -1, 0]]])
    move = Sparsity(0.5).tangent(weights, np.ones((1, 4)))
    assert move(np.array([[[5.0, 6, 7, 8]]])).tolist() == [[[0, 6, 7, 0]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparsity(1.0), "pruning ratio 1: expected a ratio of 0 or more and less than 1"),
        (lambda: Sparsity(float("nan")), "pruning ratio nan: expected a ratio"),
        (lambda: BlockSparsity.rows(-0.1), "ratio of blocks -0.1: expected a ratio"),
        (lambda: BlockSparsity(0.5, inputs=0, outputs=4), "blocks of 0 inputs x 4 outputs: expected at least 1 x 1"),
        (lambda: NOfM(4, 2), "4:2 sparsity: expected N:M with 1 <= N <= M, as in 2:4"),
        (lambda: NOfM(0, 4), "0:4 sparsity: expected N:M"),
        (
            lambda: NOfM(2, 4).check((1, 16, 27)),
            r"2:4 sparsity: a layer of 1 x 16 x 27 weights \(groups x outputs x inputs\), expected a multiple of 4",
        ),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
