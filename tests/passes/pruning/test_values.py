"""Levels, clusters and unified magnitudes: nearest points, against brute force where there is one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from rerampile import ConfigError
from rerampile.passes.pruning.constraint import BlockSparsity, NOfM, Sparsity
from rerampile.passes.pruning.values import Clusters, Combination, Levels, UnifiedMagnitudes

LEVELS = (-1.0, -0.4, 0.0, 0.4, 1.0)


def layer(seed: int, shape: tuple[int, int, int] = (1, 2, 6)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape), rng.uniform(0.1, 3, (shape[0], shape[2]))


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_the_nearest(seed: int) -> None:
    weights, importance = layer(seed)
    scale = np.array([[2.0, 0.5]])
    found = Levels(LEVELS[::-1], scale).project(weights, importance)  # in any order
    for index, weight in np.ndenumerate(weights):
        allowed = np.array(LEVELS) * scale[index[:2]]
        assert found[index] == allowed[np.abs(allowed - weight).argmin()]


def test_levels_of_ties_zeros_and_beyond_the_ends() -> None:
    weights = np.array([[[0.5, -0.5, 9, -9, 0]]])
    found = Levels((-1, 0.25, 0.75, 2), np.ones((1, 1))).project(weights, np.ones((1, 5)))
    assert found.tolist() == [[[0.25, -1, 2, -1, 0]]]  # a zero stays, also where it is no level
    assert not Levels(LEVELS, np.ones((1, 1))).tangent(weights, np.ones((1, 5)))(weights).any()


def test_clusters_are_a_fixed_point_of_weighted_k_means() -> None:
    weights, importance = layer(1, (2, 8, 9))
    weights[0, 0, :3] = 0
    found = Clusters(5).project(weights, importance)
    assert ((found == 0) == (weights == 0)).all()
    centres = np.unique(found[weights != 0])
    assert len(centres) <= 5
    heavy = np.broadcast_to(importance[:, None], weights.shape)
    for centre in centres:
        own = found == centre
        assert centre == pytest.approx(np.average(weights[own], weights=heavy[own]), rel=1e-9)
        assert (np.abs(weights[own] - centre) <= np.abs(weights[own][:, None] - centres).min(axis=1) + 1e-12).all()


@pytest.mark.parametrize("seed", range(4))
def test_two_clusters_far_apart_are_the_best_two(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.permutation(np.concatenate([rng.normal(-3, 0.2, 4), rng.normal(2, 0.2, 4)])).reshape(1, 2, 4)
    importance = rng.uniform(0.5, 2, (1, 4))
    heavy = np.broadcast_to(importance[:, None], weights.shape).reshape(-1)

    def loss(label: np.ndarray) -> float:
        parts = [(weights.reshape(-1)[label == k], heavy[label == k]) for k in (0, 1)]
        return sum(float((h * (w - np.average(w, weights=h)) ** 2).sum()) for w, h in parts if len(w))

    best = min(loss(np.array(bits)) for bits in itertools.product([0, 1], repeat=8))
    found = Clusters(2).project(weights, importance)
    assert (importance[:, None] * (found - weights) ** 2).sum() == pytest.approx(best, rel=1e-9)


def test_clusters_give_the_same_bytes_and_keep_what_is_clustered() -> None:
    weights, importance = layer(2, (1, 16, 18))
    first, again = (Clusters(8).project(weights.copy(), importance) for _ in range(2))
    assert first.tobytes() == again.tobytes()
    assert Clusters(8).project(first, importance[:, ::-1].copy()).tobytes() == first.tobytes()
    assert not Clusters(3).project(np.zeros((1, 2, 2)), np.ones((1, 2))).any()


@pytest.mark.parametrize("seed", range(5))
def test_unification_is_the_nearest(seed: int) -> None:
    weights, importance = layer(seed)
    constraint = UnifiedMagnitudes(0.5, inputs=2, outputs=2)  # 3 blocks, of which 2 are unified
    found = constraint.project(weights, importance)
    heavy = np.broadcast_to(importance[:, None], weights.shape)

    def unify(chosen: tuple[int, ...]) -> np.ndarray:
        result = weights.copy()
        for block in chosen:
            at = np.s_[0, :, 2 * block : 2 * block + 2]
            grid = np.linspace(0, np.abs(weights[at]).max(), 2001)
            losses = (heavy[at][..., None] * (np.abs(weights[at])[..., None] - grid) ** 2).sum(axis=(0, 1))
            result[at] = np.sign(weights[at]) * grid[losses.argmin()]
        return result

    loss = lambda z: float((heavy * (z - weights) ** 2).sum())  # noqa: E731
    best = min((unify(chosen) for chosen in itertools.combinations(range(3), 2)), key=loss)
    np.testing.assert_allclose(found, best, rtol=0, atol=2e-3)
    assert loss(found) <= loss(best)
    assert (np.sign(found) == np.sign(weights)).all()


def test_unification_leaves_zeros_and_moves_magnitudes_together() -> None:
    weights = np.array([[[1.0, -3, 0, 5]]])
    constraint = UnifiedMagnitudes(0.5, inputs=2, outputs=1)  # the second block has one weight: nothing to change
    assert constraint.project(weights, np.ones((1, 4))).tolist() == weights.tolist()
    unified = UnifiedMagnitudes(0.9, inputs=2, outputs=1).project(weights, np.array([[3.0, 1, 1, 1]]))
    assert unified.tolist() == [[[1.5, -1.5, 0, 5]]]
    move = constraint.tangent(unified, np.array([[3.0, 1, 1, 1]]))
    assert move(np.array([[[1.0, 1, 7, 2]]])).tolist() == [[[0.5, -0.5, 0, 2]]]


def test_clusters_move_together_and_zeros_do_not() -> None:
    move = Clusters(2).tangent(np.array([[[2.0, 2, -1, 0]]]), np.array([[3.0, 1, 1, 1]]))
    assert move(np.array([[[1.0, 5, 7, 2]]])).tolist() == [[[2, 2, 7, 0]]]


def test_sparsity_first_then_values() -> None:
    weights, importance = layer(3, (2, 4, 8))
    scale = np.full((2, 4), 2.0)
    for values in (Levels((-1, -0.5, 0.5, 1), scale), Clusters(3), UnifiedMagnitudes(0.5, 4, 1)):
        for sparsity in (Sparsity(0.5), NOfM(2, 4), BlockSparsity(0.5, 4, 2)):
            both = Combination(sparsity, values)
            sparse = sparsity.project(weights, importance)
            found = both.project(weights, importance)
            np.testing.assert_array_equal(found == 0, sparse == 0)
            np.testing.assert_array_equal(found, values.project(sparse, importance))
            assert both.tied
            assert both.joint == (sparsity.joint or values.joint)
            step = both.tangent(found, importance)(np.ones_like(found))
            assert not step[found == 0].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels((), np.ones((1, 2))), r"levels \[\]: expected a list of finite numbers"),
        (lambda: Levels((0.0, float("inf")), np.ones((1, 2))), "expected a list of finite numbers"),
        (lambda: Levels(LEVELS, np.zeros((1, 2))), "levels: a scale of 0, expected only positive ones"),
        (
            lambda: Levels(LEVELS, np.ones((1, 2))).check((1, 3, 9)),
            r"levels: scales of shape \[1, 2\] for a layer of shape \[1, 3, 9\], expected \[1, 3\]",
        ),
        (lambda: Clusters(0), "0 clusters: expected at least 1"),
        (
            lambda: Clusters(20).check((1, 2, 9)),
            r"20 clusters: a layer of 1 x 2 x 9 weights .*expected at most as many",
        ),
        (lambda: UnifiedMagnitudes(1.5, 4, 4), "ratio of blocks 1.5: expected a ratio"),
        (
            lambda: Combination(NOfM(2, 4), Clusters(2)).check((1, 2, 9)),
            "2:4 sparsity: a layer of 1 x 2 x 9 weights",
        ),
        (lambda: Combination(Sparsity(0.5), Clusters(20)).check((1, 2, 9)), "20 clusters: a layer of 1 x 2 x 9"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
