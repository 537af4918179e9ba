"""Refit: the best weights on any mask, with targets from other inputs, and along the tangents of bound weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile import DataError, InternalError
from rerampile.passes.pruning import refit as module
from rerampile.passes.pruning.constraint import NOfM, Sparsity
from rerampile.passes.pruning.problem import LayerProblem, layer_problem
from rerampile.passes.pruning.refit import output_factors, refit, refit_support
from rerampile.passes.pruning.values import Clusters, Combination, Levels, UnifiedMagnitudes

Problem = Callable[..., LayerProblem]


@pytest.mark.parametrize("way", ["direct", "conjugate gradients"])
@pytest.mark.parametrize("seed", range(3))
def test_refit_on_a_mask_is_least_squares(
    way: str, seed: int, problem_of: Problem, best_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DIRECT_COST", 0 if way == "direct" else 1e9)
    problem = problem_of((2, 5, 12), seed)
    kept = np.random.default_rng(seed).random(problem.shape) < 0.4
    kept[0, 0] = False  # an output without weights
    found = refit_support(problem, kept)
    np.testing.assert_allclose(found, best_on(problem, kept), rtol=0, atol=1e-7)
    assert not found[~kept].any()


def test_both_ways_agree_on_a_layer_of_float32(problem_of: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of((1, 6, 1100))
    assert problem.weights.dtype == np.float32
    kept = np.random.default_rng(0).random(problem.shape) < 0.3
    losses = []
    for cost in (0, 1e9):
        monkeypatch.setattr(module, "_DIRECT_COST", cost)
        losses.append(problem.loss(refit_support(problem, kept)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_outputs_of_one_support_are_solved_together(problem_of: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of((1, 6, 10))
    kept = np.zeros(problem.shape, np.bool_)
    kept[:, :, ::2] = True
    factors = []
    factorise = module.scipy.linalg.cho_factor
    monkeypatch.setattr(
        module.scipy.linalg, "cho_factor", lambda *args, **keys: factors.append(1) or factorise(*args, **keys)
    )
    refit_support(problem, kept)
    assert len(factors) == 1


def test_all_weights_kept_are_the_wanted_ones(problem_of: Problem) -> None:
    problem = problem_of((1, 3, 6))
    np.testing.assert_allclose(refit_support(problem, problem.weights != 0), problem.weights, rtol=1e-9)


@pytest.mark.parametrize(
    "constraint",
    [
        Sparsity(0.6),
        NOfM(1, 3),
        Clusters(4),
        UnifiedMagnitudes(0.6, 3, 2),
        Combination(Sparsity(0.5), Clusters(3)),
        Combination(Sparsity(0.5), UnifiedMagnitudes(0.6, 3, 1)),
        Levels((-1.5, -0.5, 0, 0.5, 1.5), np.ones((2, 4))),
    ],
    ids=repr,
)
def test_refit_never_leaves_the_set_nor_raises_the_loss(constraint: Any, problem_of: Problem) -> None:
    for seed in range(5):
        problem = problem_of((2, 4, 9), seed)
        start = constraint.project(problem.weights, problem.importance)
        found = refit(problem, start, constraint)
        assert problem.loss(found) <= problem.loss(start) * (1 + 1e-12)
        np.testing.assert_array_equal(found == 0, start == 0)
        np.testing.assert_allclose(constraint.project(found, problem.importance), found, rtol=1e-12)
        gradient = (problem.weights - found) @ problem.moment / problem.importance[:, None]
        left = constraint.tangent(start, problem.importance)(gradient)
        np.testing.assert_allclose(left, 0, atol=1e-6)  # nothing more to gain


@given(st.integers(0, 1000))
def test_targets_from_the_inputs_of_the_dense_model(seed: int) -> None:
    """Sequential pruning: the weights whose outputs on pruned inputs are nearest to the dense outputs."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6))
    pruned = dense * 0.8 + rng.standard_normal((400, 6)) * 0.3
    weights = rng.standard_normal((1, 3, 6))
    moment, cross = pruned.T @ pruned / 400, weights @ (dense.T @ pruned / 400)
    problem = layer_problem(weights, moment[None], cross)
    kept = rng.random((1, 3, 6)) < 0.6
    found = refit_support(problem, kept)[0]
    ridge = np.diag(np.full(6, np.sqrt(1e-3 * np.trace(moment) / 6 * 400)))  # the damping, as rows of data
    for output in range(3):
        on = np.flatnonzero(kept[0, output])
        rows = np.vstack([pruned, ridge])[:, on]
        target = np.concatenate([dense @ weights[0, output], ridge @ weights[0, output]])
        wanted = np.linalg.lstsq(rows, target, rcond=None)[0]
        np.testing.assert_allclose(found[output, on], wanted, rtol=1e-6, atol=1e-8)


def test_a_cross_moment_of_the_same_inputs_changes_nothing(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((2, 3, 5))
    same, plain = layer_problem(weights, moment, weights @ moment), layer_problem(weights, moment)
    np.testing.assert_allclose(same.weights, plain.weights, rtol=1e-9)


def test_dead_inputs_have_no_weights_and_others_make_up_for_them(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 3, 6))
    moment[:, 2] = moment[:, :, 2] = 0
    problem = layer_problem(weights, moment)
    assert not problem.weights[:, :, 2].any()
    np.testing.assert_array_equal(np.delete(problem.weights, 2, axis=2), np.delete(weights, 2, axis=2))
    assert not problem.deficient  # a dead input is no lack of samples
    # Dead in the pruned model alone: what it did in the dense one is known from the cross moment.
    cross = weights @ layer_of((1, 3, 6))[1]
    cross[:, :, 2] = 0
    target = layer_problem(weights, moment, cross).weights
    assert not target[:, :, 2].any()
    assert np.abs(np.delete(target - weights, 2, axis=2)).min() > 1e-3


def test_too_few_samples_are_noticed_and_damped(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((2, 3, 20), samples=10)
    problem = layer_problem(weights, moment)
    assert problem.deficient
    diagonal = np.diagonal(moment, axis1=1, axis2=2)
    np.testing.assert_allclose(problem.importance, diagonal + 0.01 * diagonal.mean(axis=1, keepdims=True))
    assert np.isfinite(refit_support(problem, weights > 0)).all()
    assert not layer_problem(*layer_of((2, 3, 20))).deficient
    assert not layer_problem(weights, np.zeros_like(moment)).deficient


def test_a_moment_that_is_not_finite() -> None:
    finite, overflown = np.ones((1, 5, 5)), np.full((1, 5, 5), np.inf)
    for moments in ((overflown,), (finite, overflown[:, :2]), (np.full((1, 5, 5), np.nan), finite[:, :2])):
        with pytest.raises(DataError, match=r"of a layer of \[1, 2, 5\] weights: NaN or infinite, expected"):
            layer_problem(np.ones((1, 2, 5)), *moments)


def test_a_moment_of_another_shape_is_a_bug() -> None:
    with pytest.raises(InternalError, match=r"second moment of shape \[1, 4, 4\] for weights of \[1, 2, 5\]"):
        layer_problem(np.ones((1, 2, 5)), np.ones((1, 4, 4)))


@pytest.mark.parametrize("seed", range(5))
def test_factors_of_outputs_are_the_best_there_are(seed: int) -> None:
    """No other factor brings an output nearer to the wanted one, on the samples themselves."""
    rng = np.random.default_rng(seed)
    seen, dense = rng.standard_normal((2, 300, 6))
    seen += dense
    wanted = rng.standard_normal((1, 4, 6))
    weights = np.round(wanted)
    weights[0, 0] = 0
    moment, cross = (seen.T @ seen / 300)[None], wanted @ (dense.T @ seen / 300)
    factors = output_factors(weights, moment, cross)[0]
    assert factors[0] == 1
    target = dense @ wanted[0].T
    for output in range(1, 4):
        given = seen @ weights[0, output]
        tried = [np.square(f * given - target[:, output]).mean() for f in factors[output] * np.array([0.99, 1, 1.01])]
        assert min(tried) == tried[1]
    turned = output_factors(-weights, moment, cross)[0]
    np.testing.assert_array_equal(turned, 1)
