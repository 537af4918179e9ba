"""Ratios by name, by one threshold, and for a global budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile import ConfigError
from rerampile.passes.pruning.constraint import Sparsity
from rerampile.passes.pruning.problem import LayerProblem
from rerampile.passes.pruning.ratios import (
    allotted_ratios,
    loss_table,
    protected_layers,
    relative_scores,
    threshold_ratios,
)
from rerampile.passes.pruning.refit import refit_support

Problem = Callable[..., LayerProblem]


def layers(*names: str) -> Any:
    """What ratios need to know of layers; the third is of another block."""
    return [
        SimpleNamespace(name=name, block="64" if i < 2 else "10", tensor=SimpleNamespace(name=name), uses=())
        for i, name in enumerate(names)
    ]


def test_protected_layers() -> None:
    four = layers("stem", "conv1", "conv2", "fc")
    assert protected_layers(["first", "last"], four) == {"stem", "fc"}
    assert protected_layers(["last", "conv*"], four) == {"conv1", "conv2", "fc"}
    assert protected_layers(["64"], four) == {"stem", "conv1"}
    assert protected_layers([], four) == protected_layers(["first", "last"], []) == set()
    assert protected_layers(["first", "last"], layers("only")) == {"only"}
    with pytest.raises(ConfigError, match=r"--protect fcc: no block and no layer of that name; .*did you mean fc"):
        protected_layers(["fcc"], four)


def test_relative_scores_are_shares_of_the_outputs(problem_of: Problem) -> None:
    problem = problem_of((2, 3, 5))
    scores = relative_scores(problem)
    at = (1, 2, 3)
    without = problem.weights.copy()
    without[at] = 0
    assert scores[at] == pytest.approx(problem.loss(without) / problem.loss(np.zeros_like(without)))
    louder = LayerProblem(problem.weights * 10, problem.moment * 4, deficient=False)
    np.testing.assert_allclose(relative_scores(louder), scores)
    assert not relative_scores(LayerProblem(np.zeros((1, 2, 3)), np.eye(3)[None], deficient=False)).any()


@given(st.floats(0, 0.9), st.integers(0, 100))
def test_one_threshold_for_several_layers(ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {"a": rng.random((1, 4, 50)), "b": 3 * rng.random((2, 5, 30)), "c": 0.5 + rng.random((1, 10, 10))}
    found = threshold_ratios(scores, ratio)
    removed = {name: round(found[name] * scores[name].size) for name in scores}
    assert sum(removed.values()) == round(ratio * 600)
    gone = {name: np.sort(scores[name], axis=None)[: removed[name]] for name in scores}
    stay = {name: np.sort(scores[name], axis=None)[removed[name] :] for name in scores}
    if all(removed[name] < int(0.98 * scores[name].size) for name in scores):
        highest = max((part[-1] for part in gone.values() if len(part)), default=0)
        assert highest <= min(part[0] for part in stay.values())


def test_no_layer_dies_of_a_common_threshold() -> None:
    scores = {"weak": np.full((1, 10, 10), 1e-9), "strong": np.ones((1, 10, 10))}
    assert threshold_ratios(scores, 0.5) == {"weak": 0.98, "strong": 0.02}
    for ratio in (-0.1, 0.99, float("nan")):
        with pytest.raises(ConfigError, match=f"pruning ratio {ratio:g}: expected 0 to 0.98, the most that a layer"):
            threshold_ratios(scores, ratio)


def test_loss_table_is_near_what_a_full_refit_reaches(problem_of: Problem) -> None:
    problem = problem_of((1, 8, 24))
    grid = (0.0, 0.3, 0.6, 0.9)
    losses = loss_table(problem, grid)
    assert losses[0] == pytest.approx(0, abs=1e-12)
    assert (np.diff(losses) > 0).all()
    energy = problem.loss(np.zeros_like(problem.weights))
    for ratio, loss in list(zip(grid, losses, strict=True))[1:]:
        kept = Sparsity(ratio).project(problem.weights, problem.importance) != 0
        exact = problem.loss(refit_support(problem, kept)) / energy
        assert exact <= loss * (1 + 1e-9)
        assert loss < 2 * exact


GRID = (0.0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize("seed", range(5))
def test_allotment_is_the_smallest_sum_of_losses(seed: int) -> None:
    """Against every choice from the grid that spends the same budget, with convex tables."""
    rng = np.random.default_rng(seed)
    sizes = {"a": 400, "b": 800, "c": 400}
    losses = {name: np.concatenate([[0], np.cumsum(np.sort(rng.random(3)))]) for name in sizes}
    found = allotted_ratios(losses, GRID, sizes, 0.5)
    assert sum(found[name] * sizes[name] for name in sizes) == pytest.approx(0.5 * 1600)
    total = sum(float(np.interp(found[name], GRID, losses[name])) for name in sizes)
    choices = [
        sum(losses[name][pick] for name, pick in zip(sizes, picks, strict=True))
        for picks in itertools.product(range(4), repeat=3)
        if sum(GRID[p] * size for p, size in zip(picks, sizes.values(), strict=True)) >= 800
    ]
    assert total <= min(choices) + 1e-12


def test_allotment_equalises_the_marginal_loss_and_spares_the_sensitive() -> None:
    sizes = {"tough": 100, "sensitive": 100}
    losses = {"tough": [0, 0.01, 0.02, 0.03], "sensitive": [0, 1, 2, 3]}
    assert allotted_ratios(losses, GRID, sizes, 0.25) == {"tough": 0.5, "sensitive": 0.0}
    found = allotted_ratios(losses, GRID, sizes, 0.5)
    assert found == {"tough": 0.75, "sensitive": 0.25}
    same = {"a": [0, 1, 4, 9], "b": [0, 1, 4, 9]}
    found = allotted_ratios(same, GRID, {"a": 100, "b": 300}, 0.2)
    assert found["b"] > found["a"]  # the same loss buys more weights there


def test_allotment_of_tables_that_are_not_convex() -> None:
    losses = {"a": [0, 5, 1, 2], "b": [0, 1, 2, 3]}  # its hull goes from 0 straight to the third point
    assert allotted_ratios(losses, GRID, {"a": 100, "b": 100}, 0.25) == {"a": 0.5, "b": 0}
    assert allotted_ratios({}, GRID, {}, 0.5) == {}
    assert allotted_ratios(losses, GRID, {"a": 100, "b": 100}, 0) == {"a": 0, "b": 0}
    assert allotted_ratios(losses, GRID, {"a": 100, "b": 100}, 0.75) == {"a": 0.75, "b": 0.75}
    with pytest.raises(ConfigError, match=r"pruning ratio 0.8: expected 0 to 0.75, the largest that a layer may take"):
        allotted_ratios(losses, GRID, {"a": 100, "b": 100}, 0.8)
