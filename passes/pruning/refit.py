"""Refit: the weights of the smallest loss on a support, or along the tangent of any set."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from rerampile.passes.pruning.constraint import Constraint, Floats, Tangent
from rerampile.passes.pruning.problem import LayerProblem

__all__ = ["output_factors", "refit", "refit_support"]

_STEPS = 200
_EXPECTED_STEPS = 40  # what conjugate gradients took on layers of trained networks
_DIRECT_COST = 8  # of an operation in a small factor of its own, in float64, against one in a large product


def refit(problem: LayerProblem, weights: Floats, constraint: Constraint, steps: int = _STEPS) -> Floats:
    """Return weights of a smaller or equal loss, reached without leaving the constraint.

    Zeros stay. Free weights become the best ones on their support; weights that share a value move together; levels
    stay as they are.

    Args:
        problem: The layer.
        weights: A point of the constraint, [groups, outputs, inputs].
        constraint: The set.
        steps: The most that conjugate gradients take.
    """
    if not constraint.tied:
        return refit_support(problem, weights != 0, weights, steps)
    tangent = constraint.tangent(weights, problem.importance)
    return _conjugate_gradients(problem, weights, tangent, axes=(0, 1, 2), steps=steps)


def output_factors(weights: Floats, moment: Floats, cross: Floats) -> npt.NDArray[np.float64]:
    """Return the factor of each output that brings it nearest to the wanted one: ``E[y y0] / E[y^2]``.

    For weights that are bound to values: the factor goes into the scale of an output, not into its cells.

    Args:
        weights: [groups, outputs, inputs].
        moment: ``E[x x^T]`` of what they see, [groups, inputs, inputs].
        cross: ``E[y0 x^T]`` with the wanted outputs, [groups, outputs, inputs].

    Returns:
        float64 [groups, outputs], positive; one where an output is zero or turned around.
    """
    energy = np.einsum("goi,goi->go", weights @ moment, weights, dtype=np.float64)
    product = np.einsum("goi,goi->go", weights, cross, dtype=np.float64)
    sensible = (energy > 0) & (product > 0)
    return np.where(sensible, product / np.where(sensible, energy, 1), 1.0)


def refit_support(
    problem: LayerProblem, kept: npt.NDArray[np.bool_], start: Floats | None = None, steps: int = _STEPS
) -> Floats:
    """Return the weights of the smallest loss among those that are zero outside a mask.

    By one Cholesky factor for each different row of the mask, or by conjugate gradients, which stop at rounding: what
    takes less arithmetic.

    Args:
        problem: The layer.
        kept: bool [groups, outputs, inputs].
        start: Where conjugate gradients start, or None for the wanted weights.
        steps: The most that they take.
    """
    supports = [np.unique(rows, axis=0, return_inverse=True) for rows in kept]
    direct = sum(float((rows.sum(axis=1, dtype=np.float64) ** 3).sum()) / 3 for rows, _ in supports)
    if _DIRECT_COST * direct > 2 * min(steps, _EXPECTED_STEPS) * kept.size * kept.shape[2]:
        begin = problem.weights if start is None else start
        return _conjugate_gradients(problem, begin * kept, lambda step: step * kept, axes=(2,), steps=steps)
    weights = np.zeros(problem.shape, problem.weights.dtype)
    wanted = problem.weights @ problem.moment
    for group, (rows, owner) in enumerate(supports):
        for number, row in enumerate(rows):
            support, outputs = np.flatnonzero(row), np.flatnonzero(owner.reshape(-1) == number)
            part = problem.moment[group][np.ix_(support, support)].astype(np.float64)
            right = wanted[group][np.ix_(outputs, support)].T
            factor = scipy.linalg.cho_factor(part, overwrite_a=True, check_finite=False)
            weights[group][np.ix_(outputs, support)] = scipy.linalg.cho_solve(factor, right, check_finite=False).T
    return weights


def _conjugate_gradients(
    problem: LayerProblem, weights: Floats, tangent: Tangent, axes: tuple[int, ...], steps: int = _STEPS
) -> Floats:
    """Minimise the loss from ``weights`` along ``tangent``, preconditioned by the importance of inputs.

    Args:
        problem: The layer.
        weights: Where to start.
        tangent: Projects steps; orthogonal in the norm of the importance.
        axes: Axes over which weights depend on each other: a step has one length over these.
        steps: The most to take.
    """

    def product(left: Floats, right: Floats) -> npt.NDArray[Any]:
        return np.asarray(np.sum(left * right, axis=axes, keepdims=True, dtype=np.float64))

    scale = problem.importance[:, None]
    wanted = problem.weights @ problem.moment
    smallest = np.finfo(weights.dtype).eps ** 1.3 * product(wanted, wanted / scale)
    residual = wanted - weights @ problem.moment
    step = direction = tangent(residual / scale)
    left = product(residual, step)
    for _ in range(steps):
        active = left > smallest
        if not active.any():
            break
        moved = direction @ problem.moment
        length = np.where(active, left / np.where(active, product(direction, moved), 1), 0).astype(weights.dtype)
        weights = weights + length * direction
        residual = residual - length * moved
        step = tangent(residual / scale)
        before, left = left, product(residual, step)
        direction = step + np.where(active, left / np.where(active, before, 1), 0).astype(weights.dtype) * direction
    return weights
