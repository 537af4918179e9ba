"""Healthy weights make up for those that stay wrong, by the second moments of what a layer sees.

With errors ``e`` fixed on some weights of an output, the others are moved by the ``d`` that minimises
``(e + d) H (e + d)^T``: the update of the optimal brain surgeon. Each output has its own system ``H_RR d = -(e H)_R``;
all are solved together by preconditioned conjugate gradients, whose every step is one product with ``H``, whatever
the number of faults.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["best_gain", "output_energies", "repair_errors"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_STEPS = 32
_ENOUGH = 1e-4  # of the first residual, where steps end


def output_energies(errors: Floats, moments: Floats | None) -> Doubles:
    """Return the expected squared error of every output, float64 [groups, outputs].

    Args:
        errors: float32 [groups, outputs, inputs].
        moments: Mean of x x^T, float32 [groups, inputs, inputs]; None for the identity.
    """
    weighed = errors if moments is None else errors @ moments
    energies: Doubles = np.maximum(np.einsum("goi,goi->go", weighed, errors, dtype=np.float64), 0.0)
    return energies


def repair_errors(errors: Floats, free: Flags, moments: Floats) -> Floats:
    """Return what to add to free weights so that the energy of the errors falls, float32 [groups, outputs, inputs].

    Args:
        errors: float32 [groups, outputs, inputs].
        free: Which weights may move, bool of the same shape.
        moments: Mean of x x^T, float32 [groups, inputs, inputs].
    """
    diagonal = np.einsum("gii->gi", moments)[:, None]
    scale = np.maximum(diagonal, np.finfo(np.float32).eps * diagonal.mean() + np.finfo(np.float32).tiny)
    moved, residual = np.zeros_like(errors), -(errors @ moments) * free
    direction = residual / scale
    size = first = _dot(residual, direction)
    for _ in range(_STEPS):
        if not (size > _ENOUGH**2 * first).any():
            break
        forward = (direction @ moments) * free
        step = _ratio(size, _dot(direction, forward))
        moved += step * direction
        residual -= step * forward
        scaled = residual / scale
        before, size = size, _dot(residual, scaled)
        direction = scaled + _ratio(size, before) * direction
    return moved


def best_gain(weights: Floats, wanted: Floats, moments: Floats | None) -> Doubles:
    """Return the factor of every output that brings its weights nearest to the wanted ones, float64 [groups, outputs].

    Args:
        weights: float32 [groups, outputs, inputs].
        wanted: The same.
        moments: Mean of x x^T, float32 [groups, inputs, inputs]; None for the identity.
    """
    weighed = weights if moments is None else weights @ moments
    along = np.einsum("goi,goi->go", weighed, wanted, dtype=np.float64)
    own = np.einsum("goi,goi->go", weighed, weights, dtype=np.float64)
    factors: Doubles = np.divide(along, own, out=np.ones_like(along), where=own > 0)
    return factors


def _dot(a: Floats, b: Floats) -> Floats:
    products: Floats = np.einsum("goi,goi->go", a, b)[:, :, None]
    return products


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
