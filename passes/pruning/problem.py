"""The problem that engines solve: stay near a layer's outputs with weights of a set.

The loss of weights ``W`` is ``tr((W - W0) H (W - W0)^T)``, the mean squared change of the outputs over the calibration
data, where ``W0`` are the wanted weights and ``H`` is the second moment of the inputs, damped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from rerampile.errors import DataError, InternalError
from rerampile.passes.pruning.constraint import Floats, Shape

__all__ = ["LayerProblem", "layer_problem"]

DAMPING = 1e-3
"""Added to the diagonal of the moment, as a share of its mean."""

_DAMPING_WHEN_DEFICIENT = 1e-2
_DOUBLE_UP_TO = 1024  # inputs; above, float32 halves the time, and the loss is the same to four digits
_DEPENDENT = 1e-6  # share of an input's energy that the inputs before it don't explain: below, it is rounding


@dataclass(frozen=True)
class LayerProblem:
    """One layer, ready for engines. All arrays are of one type: float64, or float32 for layers of many inputs.

    Attributes:
        weights: The wanted weights, [groups, outputs, inputs]; zero at dead inputs.
        moment: Damped second moment of the inputs, [groups, inputs, inputs]; its diagonal is positive.
        deficient: Whether the calibration data determine fewer directions than there are live inputs.
    """

    weights: Floats = field(repr=False)
    moment: Floats = field(repr=False)
    deficient: bool

    @property
    def shape(self) -> Shape:
        """Groups, outputs, inputs."""
        groups, outputs, inputs = self.weights.shape
        return groups, outputs, inputs

    @property
    def importance(self) -> Floats:
        """The diagonal of the moment, [groups, inputs]."""
        return np.diagonal(self.moment, axis1=1, axis2=2)

    def losses(self, weights: Floats) -> npt.NDArray[np.float64]:
        """Return the loss of ``weights`` in each group, float64 [groups]."""
        change = weights - self.weights
        losses: npt.NDArray[np.float64] = np.sum((change @ self.moment) * change, axis=(1, 2), dtype=np.float64)
        return losses

    def loss(self, weights: Floats) -> float:
        """Return the loss of ``weights`` in all groups together."""
        return float(self.losses(weights).sum())


def layer_problem(
    weights: Floats, moment: npt.NDArray[np.float64], cross: npt.NDArray[np.float64] | None = None
) -> LayerProblem:
    """Return the problem of a layer.

    With ``cross``, the outputs to stay near are those of the dense weights on other inputs: ``x`` are the inputs in the
    pruned model, ``y = W0 d`` the outputs in the dense one. The weights that minimise ``E|W x - y|^2`` without any
    constraint then take the place of ``W0``, because under every constraint the loss differs from that by a constant
    only.

    Args:
        weights: The dense weights ``W0``, [groups, outputs, inputs].
        moment: E[x x^T], the second moment of the inputs, [groups, inputs, inputs]. An input whose diagonal is zero is
            dead, and its weights become zero.
        cross: E[y x^T], [groups, outputs, inputs], or None where both models have the same inputs.

    Raises:
        DataError: The moment is not finite.
    """
    groups, _, inputs = weights.shape
    if moment.shape != (groups, inputs, inputs) or (cross is not None and cross.shape != weights.shape):
        raise InternalError(f"second moment of shape {list(moment.shape)} for weights of {list(weights.shape)}")
    if not all(np.isfinite(part).all() for part in (moment, cross) if part is not None):
        raise DataError(
            f"second moment of the inputs of a layer of {list(weights.shape)} weights: NaN or infinite, expected "
            f"finite numbers; the model overflows on the calibration data"
        )
    dtype: Any = np.float64 if inputs <= _DOUBLE_UP_TO else np.float32
    diagonal = np.diagonal(moment, axis1=1, axis2=2)
    live = diagonal > 0
    deficient = any(_deficient(moment[group], live[group]) for group in range(groups))
    share, index = _DAMPING_WHEN_DEFICIENT if deficient else DAMPING, np.arange(inputs)
    while True:
        damping = np.where(live, share * diagonal.mean(axis=1, keepdims=True), 0)
        damped = moment.astype(dtype)
        damped[:, index, index] = np.where(live, diagonal + damping, 1)
        if not deficient or all(map(_definite, damped)):
            break
        share *= 10  # inputs that hardly vary around large means: their moment is rounding
    target = weights if cross is None else _unconstrained(weights, moment, cross, damping)
    return LayerProblem(np.where(live[:, None], target, 0).astype(dtype), damped, deficient)


def _unconstrained(
    weights: Floats, moment: npt.NDArray[np.float64], cross: npt.NDArray[np.float64], damping: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the ``W`` of the smallest ``E|W x - y|^2 + sum(damping * (W - W0)^2)``."""
    wanted = cross + weights * damping[:, None]
    solved = np.empty(weights.shape)
    for group, (matrix, added) in enumerate(zip(moment, damping, strict=True)):
        damped = matrix + np.diag(np.where(added > 0, added, 1))
        factor = scipy.linalg.cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
        solved[group] = scipy.linalg.cho_solve(factor, wanted[group].T, check_finite=False).T
    return solved


def _definite(matrix: Floats) -> bool:
    """Tell whether a symmetric matrix is positive definite, to rounding."""
    (factor,) = scipy.linalg.get_lapack_funcs(("potrf",), (matrix,))
    return bool(factor(matrix.T, lower=True)[1] == 0)


def _deficient(moment: npt.NDArray[np.float64], live: npt.NDArray[np.bool_]) -> bool:
    """Tell whether some live input is, to rounding, a combination of others."""
    part = moment if live.all() else moment[np.ix_(live, live)]
    if not part.size:
        return False
    root = np.sqrt(np.diagonal(part))
    factor, info = scipy.linalg.lapack.dpotrf((part / root / root[:, None]).T, lower=True, overwrite_a=True)
    return bool(info) or float(np.diagonal(factor).min()) ** 2 < _DEPENDENT
