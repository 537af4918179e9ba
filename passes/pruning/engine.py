"""Engines by name, and what they make of a layer: new weights and a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, did_you_mean
from rerampile.passes.pruning.admm import admm
from rerampile.passes.pruning.constraint import Constraint, Floats, Sparsity
from rerampile.passes.pruning.problem import LayerProblem, layer_problem
from rerampile.passes.pruning.sparsegpt import sparsegpt
from rerampile.passes.pruning.values import Combination

__all__ = ["ENGINES", "Engine", "PrunedWeights", "magnitude", "prune_layer", "wanda"]


class Engine(Protocol):
    """Finds weights of a constraint near the outputs of a layer."""

    def __call__(self, problem: LayerProblem, constraint: Constraint) -> Floats:
        """Return weights of the constraint, [groups, outputs, inputs]."""
        ...


@dataclass(frozen=True)
class PrunedWeights:
    """What an engine made of a layer.

    Attributes:
        weights: New weights, [groups, outputs, inputs], in the type of the old ones.
        kept: Which of them are not zero, bool [groups, outputs, inputs].
        loss: Mean squared change of the outputs over the mean square of the wanted ones, damping included.
        deficient: Whether there were too few calibration samples for as many inputs, so that the weights were damped
            more; the user is to be warned.
    """

    weights: Floats = field(repr=False)
    kept: npt.NDArray[np.bool_] = field(repr=False)
    loss: float
    deficient: bool


def magnitude(problem: LayerProblem, constraint: Constraint) -> Floats:
    """Project the weights as they are, all inputs alike."""
    return constraint.project(problem.weights, np.ones_like(problem.importance))


def wanda(problem: LayerProblem, constraint: Constraint) -> Floats:
    """Project by ``|weight| * sqrt(importance)``; without structure within each output (Sun et al. 2024)."""
    return _within_outputs(constraint).project(problem.weights, problem.importance)


def _within_outputs(constraint: Constraint) -> Constraint:
    if isinstance(constraint, Combination):
        return replace(constraint, sparsity=_within_outputs(constraint.sparsity))
    return replace(constraint, within="output") if isinstance(constraint, Sparsity) else constraint


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {"admm": admm, "sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
)
"""The engines by name; the first is the default."""


def prune_layer(
    weights: Floats,
    moment: npt.NDArray[np.float64],
    constraint: Constraint,
    *,
    engine: str = "admm",
    cross: npt.NDArray[np.float64] | None = None,
) -> PrunedWeights:
    """Prune one layer.

    Args:
        weights: float32 or float64 [groups, outputs, inputs].
        moment: E[x x^T] over the calibration data, [groups, inputs, inputs].
        constraint: What the new weights have to be.
        engine: A name of :data:`ENGINES`.
        cross: E[y x^T], [groups, outputs, inputs], where ``y`` are the layer's outputs in the dense model and ``x`` its
            inputs in the model pruned so far, or None where both have the same inputs
            (:func:`rerampile.passes.pruning.problem.layer_problem`).

    Raises:
        ConfigError: The engine is unknown, or the constraint does not fit the layer.
        DataError: The moment is not finite.
    """
    if engine not in ENGINES:
        raise ConfigError(f"pruning engine '{engine}': unknown{did_you_mean(engine, ENGINES)}")
    groups, outputs, inputs = weights.shape
    constraint.check((groups, outputs, inputs))
    problem = layer_problem(weights, moment, cross)
    found = ENGINES[engine](problem, constraint)
    energy = problem.loss(np.zeros_like(problem.weights))
    return PrunedWeights(
        weights=found.astype(weights.dtype),
        kept=found != 0,
        loss=problem.loss(found) / energy if energy > 0 else 0.0,
        deficient=problem.deficient,
    )
