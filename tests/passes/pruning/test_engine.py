"""Engines against brute force on tiny layers, and what each promises under every constraint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile import ConfigError
from rerampile.passes.pruning.admm import admm
from rerampile.passes.pruning.constraint import BlockSparsity, NOfM, Sparsity
from rerampile.passes.pruning.engine import ENGINES, magnitude, prune_layer, wanda
from rerampile.passes.pruning.problem import LayerProblem, layer_problem
from rerampile.passes.pruning.refit import refit, refit_support
from rerampile.passes.pruning.sparsegpt import sparsegpt
from rerampile.passes.pruning.values import Clusters, Combination, Levels, UnifiedMagnitudes

Problem = Callable[..., LayerProblem]
LEVELS = tuple(np.linspace(-3, 3, 9))


def constraints(shape: tuple[int, int, int]) -> list[Any]:
    levels = Levels(LEVELS, np.ones(shape[:2]))
    return [
        Sparsity(0.6),
        Sparsity(0.5, within="output"),
        NOfM(1, 2),
        NOfM(3, 4),
        BlockSparsity.rows(0.5),
        BlockSparsity.columns(0.3),
        BlockSparsity(0.5, inputs=3, outputs=2),
        UnifiedMagnitudes(0.6, inputs=2, outputs=2),
        levels,
        Clusters(4),
        Combination(Sparsity(0.5), levels),
        Combination(NOfM(1, 2), Clusters(4)),
        Combination(BlockSparsity.rows(0.25), UnifiedMagnitudes(0.5, 2, 1)),
    ]


CONSTRAINTS = constraints((2, 4, 8))


def best_sparse(problem: LayerProblem, remove: int, best_on: Callable[..., Any]) -> float:
    """The smallest loss of any weights with that many zeros in a layer of one group."""
    size = problem.weights.size
    losses = []
    for gone in itertools.combinations(range(size), remove):
        kept = np.ones(size, np.bool_)
        kept[list(gone)] = False
        losses.append(problem.loss(best_on(problem, kept.reshape(problem.shape))))
    return min(losses)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 5)])
def test_engines_against_every_support(shape: Any, problem_of: Problem, best_on: Callable[..., Any]) -> None:
    """None is better than the best of all supports; ADMM finds it mostly, and is near it always."""
    ratios: dict[str, list[float]] = {name: [] for name in ENGINES}
    for seed in range(12):
        problem = problem_of(shape, seed)
        best = best_sparse(problem, 5, best_on)
        for name, engine in ENGINES.items():
            found = engine(problem, Sparsity(5 / problem.weights.size))
            if name != "wanda":  # which counts in each output
                assert (found == 0).sum() == 5
                assert problem.loss(found) >= best * (1 - 1e-9)
            ratios[name].append(problem.loss(found) / best)
    assert np.median(ratios["admm"]) < 1.001
    assert np.mean(ratios["admm"]) < np.mean(ratios["sparsegpt"]) < np.mean(ratios["magnitude"])


def test_admm_against_every_n_of_m(problem_of: Problem, best_on: Callable[..., Any]) -> None:
    ratios = []
    pairs = [np.array(bits) for bits in itertools.product([(True, False), (False, True)], repeat=4)]
    for seed in range(12):
        problem = problem_of((1, 1, 8), seed)
        best = min(problem.loss(best_on(problem, mask.reshape(1, 1, 8))) for mask in pairs)
        ratios.append(problem.loss(admm(problem, NOfM(1, 2))) / best)
        assert ratios[-1] > 1 - 1e-9
    assert np.median(ratios) < 1.05


def test_admm_against_every_choice_of_levels(problem_of: Problem) -> None:
    values = (-1.5, -0.5, 0.5, 1.5)
    ratios = []
    for seed in range(12):
        problem = problem_of((1, 1, 5), seed)
        losses = [problem.loss(np.array(choice).reshape(1, 1, 5)) for choice in itertools.product(values, repeat=5)]
        constraint = Levels(values, np.ones((1, 1)))
        ratios.append(problem.loss(admm(problem, constraint)) / min(losses))
        assert ratios[-1] > 1 - 1e-9
    assert np.median(ratios) < 1.2


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(range(len(CONSTRAINTS))))
def test_admm_is_never_worse_than_magnitude_with_refit(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, 4, 8)
    x = np.maximum(rng.standard_normal((2, rng.integers(3, 40), 8)) @ rng.standard_normal((2, 8, 8)), 0)
    problem = layer_problem(rng.standard_normal(shape), x.transpose(0, 2, 1) @ x)
    constraint = CONSTRAINTS[number]
    found = admm(problem, constraint)
    plain = refit(problem, magnitude(problem, constraint), constraint)
    assert problem.loss(found) <= problem.loss(plain) * (1 + 1e-9)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_stays_within_every_constraint(engine: str, constraint: Any, layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((2, 4, 8), 3)
    before = weights.copy(), moment.copy()
    found = prune_layer(weights, moment, constraint, engine=engine)
    again = prune_layer(weights, moment, constraint, engine=engine)
    assert found.weights.tobytes() == again.weights.tobytes()
    np.testing.assert_array_equal(found.kept, found.weights != 0)
    np.testing.assert_array_equal(weights, before[0])
    np.testing.assert_array_equal(moment, before[1])
    if engine == "wanda" and isinstance(constraint, Sparsity):
        assert ((found.weights == 0).sum(axis=2) == round(constraint.ratio * 8)).all()
        return
    importance = layer_problem(weights, moment).importance
    np.testing.assert_allclose(constraint.project(found.weights, importance), found.weights, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_groups_that_share_no_budget_are_independent(engine: str, number: int, layer_of: Callable[..., Any]) -> None:
    constraint = CONSTRAINTS[number]
    assert not constraint.joint
    weights, moment = layer_of((3, 4, 8), 1)
    together = prune_layer(weights, moment, constraint, engine=engine).weights
    for group in range(3):
        part = np.s_[group : group + 1]
        alone = prune_layer(weights[part], moment[part], constraint, engine=engine).weights
        np.testing.assert_allclose(together[part], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_dead_inputs_and_zeros(engine: str, layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 4, 8))
    moment[:, 3] = moment[:, :, 3] = 0
    weights[0, 1] = 0
    for constraint in constraints((1, 4, 8)):
        found = prune_layer(weights, moment, constraint, engine=engine)
        assert not found.weights[:, :, 3].any()
        assert np.isfinite(found.weights).all()
        assert np.isfinite(found.loss)


@pytest.mark.parametrize("engine", ENGINES)
def test_too_few_samples_and_no_signal_at_all(engine: str, layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 4, 8), samples=3)
    found = prune_layer(weights, moment, Sparsity(0.5), engine=engine)
    assert found.deficient
    assert np.isfinite(found.weights).all()
    silent = prune_layer(weights, np.zeros_like(moment), Sparsity(0.5), engine=engine)
    assert not silent.weights.any()
    assert silent.loss == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inputs", [8, 1100])  # float64, and float32
def test_inputs_that_hardly_vary_around_large_means(engine: str, inputs: int) -> None:
    """What is left of their moment around the means is rounding, with negative eigenvalues: it is damped."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1, 3, inputs)).astype(np.float32)
    noise = rng.standard_normal((inputs, inputs))
    moment = (noise + noise.T)[None] / 2 + 0.05 * np.eye(inputs)
    moment[0, np.arange(inputs), np.arange(inputs)] = np.abs(np.diagonal(moment[0]))
    assert np.linalg.eigvalsh(moment[0])[0] < -1
    cross = weights.astype(np.float64) @ moment
    found = prune_layer(weights, moment, Sparsity(0.5), engine=engine, cross=cross)
    assert found.deficient
    assert np.isfinite(found.weights).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_ratio_of_zero_changes_nothing(engine: str, layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((2, 3, 8))
    for constraint in (Sparsity(0), NOfM(2, 2), BlockSparsity.rows(0.0)):
        found = prune_layer(weights.astype(np.float32), moment, constraint, engine=engine)
        np.testing.assert_array_equal(found.weights, weights.astype(np.float32))
        assert found.kept.all()
        assert found.loss == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_and_inputs_without_any_weight(engine: str, layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 4, 8))
    weights[0, :2] *= 1e-6
    found = prune_layer(weights, moment, Sparsity(0.9), engine=engine)
    assert not found.weights[0, :2].any() or engine == "wanda"
    assert (found.weights == 0).sum() >= 28
    assert not prune_layer(weights, moment, Sparsity(0.99), engine=engine).weights.any()


def test_many_small_groups_are_solved_at_once(layer_of: Callable[..., Any]) -> None:
    """A depthwise convolution; every group by itself gives the same."""
    weights, moment = layer_of((500, 1, 9))
    found = prune_layer(weights, moment, Sparsity(0.5))
    assert (found.weights == 0).sum() == round(0.5 * 4500)
    each = prune_layer(weights, moment, Sparsity(5 / 9, "output")).weights
    alone = prune_layer(weights[7:8], moment[7:8], Sparsity(5 / 9, "output")).weights
    np.testing.assert_allclose(each[7:8], alone, rtol=1e-9)


def test_units_of_inputs_do_not_matter_to_admm(problem_of: Problem) -> None:
    problem = problem_of((1, 4, 8), 5)
    unit = 2.0 ** np.arange(-4, 4)
    other = LayerProblem(problem.weights / unit, problem.moment * unit * unit[:, None], deficient=False)
    np.testing.assert_allclose(admm(other, Sparsity(0.5)) * unit, admm(problem, Sparsity(0.5)), rtol=1e-6)


def test_sequential_targets_reach_the_engine(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 4, 8))
    found = prune_layer(weights, moment, Sparsity(0.5), cross=0.5 * weights @ moment)
    half = prune_layer(0.5 * weights, moment, Sparsity(0.5))
    np.testing.assert_allclose(found.weights, half.weights, atol=2e-2)


def test_wanda_compares_within_outputs(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((2, 3, 8))
    problem = layer_problem(weights, moment)
    found = wanda(problem, Combination(Sparsity(0.5), Levels(LEVELS, np.ones((2, 3)))))
    score = np.abs(weights) * np.sqrt(problem.importance)[:, None]
    kept = score > np.sort(score, axis=2)[:, :, 3:4]
    assert not found[~kept].any()


class OneMask:
    """A constraint of a user's own: these weights and no others."""

    joint = tied = False

    def __init__(self, kept: np.ndarray) -> None:
        self.kept = kept

    def check(self, shape: Any) -> None:
        assert self.kept.shape == shape

    def project(self, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
        return np.where(self.kept, weights, 0)

    def tangent(self, weights: np.ndarray, importance: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda step: step * self.kept


def test_a_given_mask_and_in_which_order_sparsegpt_corrects(problem_of: Problem) -> None:
    """Where the first input goes, one sweep is the exact refit; where the last, nothing is left to correct it."""
    problem = problem_of((1, 2, 6))
    for gone, exact in ((0, True), (5, False)):
        kept = np.broadcast_to(np.arange(6) != gone, problem.shape)
        best = refit_support(problem, kept)
        np.testing.assert_allclose(admm(problem, OneMask(kept)), best, rtol=1e-9)
        found = sparsegpt(problem, OneMask(kept))
        assert np.allclose(found, best, rtol=1e-6) is exact
        if not exact:
            np.testing.assert_array_equal(found, np.where(kept, problem.weights, 0))


def test_sparsegpt_prunes_exactly_across_blocks(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 3, 300))
    found = prune_layer(weights, moment, Sparsity(0.37), engine="sparsegpt")
    assert (found.weights == 0).sum() == round(0.37 * 900)
    assert found.loss < prune_layer(weights, moment, Sparsity(0.37), engine="magnitude").loss
    triples = prune_layer(weights, moment, NOfM(1, 3), engine="sparsegpt").weights
    assert ((triples.reshape(3, 100, 3) != 0).sum(axis=2) == 1).all()


def test_sparsegpt_rounds_better_than_the_nearest_level(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 8, 40))
    levels = Levels(LEVELS, np.ones((1, 8)))
    nearest = prune_layer(weights, moment, levels, engine="magnitude")
    assert prune_layer(weights, moment, levels, engine="sparsegpt").loss < 0.7 * nearest.loss


def test_unknown_engines_and_layers_that_do_not_fit(layer_of: Callable[..., Any]) -> None:
    weights, moment = layer_of((1, 2, 9))
    with pytest.raises(ConfigError, match=r"pruning engine 'adm': unknown \(did you mean admm"):
        prune_layer(weights, moment, Sparsity(0.5), engine="adm")
    with pytest.raises(ConfigError, match="2:4 sparsity: a layer of 1 x 2 x 9 weights"):
        prune_layer(weights, moment, NOfM(2, 4))
