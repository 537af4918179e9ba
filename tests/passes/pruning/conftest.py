"""Small layers with correlated inputs, and the best weights on a support by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from rerampile.passes.pruning.problem import LayerProblem, layer_problem

Layer = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="session")
def layer_of() -> Callable[..., Layer]:
    """`layer_of((groups, outputs, inputs), seed)`: weights and the second moment of inputs that are correlated."""

    def make(shape: tuple[int, int, int], seed: int = 0, samples: int | None = None) -> Layer:
        rng = np.random.default_rng(seed)
        groups, _, inputs = shape
        mix = rng.standard_normal((groups, inputs, inputs)) + 1.0
        x = np.maximum(rng.standard_normal((groups, samples or 8 * inputs, inputs)) @ mix, 0)
        return rng.standard_normal(shape), x.transpose(0, 2, 1) @ x / x.shape[1]

    return make


@pytest.fixture(scope="session")
def problem_of(layer_of: Callable[..., Layer]) -> Callable[..., LayerProblem]:
    """`problem_of((groups, outputs, inputs), seed)`: such a layer as a problem."""
    return lambda *args, **keys: layer_problem(*layer_of(*args, **keys))


@pytest.fixture(scope="session")
def best_on() -> Callable[[LayerProblem, np.ndarray], np.ndarray]:
    """`best_on(problem, kept)`: the weights of the smallest loss on a mask, by least squares output by output."""

    def solve(problem: LayerProblem, kept: np.ndarray) -> np.ndarray:
        weights = np.zeros(problem.shape)
        for group, output in itertools.product(*map(range, problem.shape[:2])):
            on = np.flatnonzero(kept[group, output])
            root = np.linalg.cholesky(problem.moment[group]).T  # moment = root^T root
            target = root @ problem.weights[group, output]
            weights[group, output, on] = np.linalg.lstsq(root[:, on], target, rcond=None)[0]
        return weights

    return solve
