"""SparseGPT (Frantar and Alistarh 2023): one sweep over the inputs that corrects later weights for each removed one.

Inputs are taken in blocks. At the start of a block, or of every M inputs of an N:M pattern, the weights that go are
chosen by what removing each would cost after correction; then, input by input, weights become zero or move to their
level, and the inputs that follow make up for it. With levels and no sparsity this is GPTQ.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from rerampile.passes.pruning.constraint import Constraint, Floats, NOfM, Sparsity
from rerampile.passes.pruning.problem import LayerProblem
from rerampile.passes.pruning.values import Combination, Levels, fix_centres

__all__ = ["sparsegpt"]

_BLOCK = 128  # inputs


def sparsegpt(problem: LayerProblem, constraint: Constraint) -> Floats:
    """Return weights of the constraint after one sweep over the inputs.

    Which rows, columns or partitions go is decided before the sweep, and so are the values of clusters; magnitudes are
    unified after it.
    """
    weights = problem.weights.copy()
    sweep = fix_centres(constraint, weights, problem.importance)
    parts = sweep if isinstance(sweep, Combination) else Combination(sweep, sweep)
    values = parts.values if isinstance(parts.values, Levels) else None
    fixed = None
    if not isinstance(parts.sparsity, Sparsity | NOfM):
        sparse = weights if parts.sparsity.tied else parts.sparsity.project(weights, problem.importance)
        fixed = sparse != 0
    factor = _inverse_factor(problem.moment)
    width = period = _BLOCK
    if isinstance(parts.sparsity, NOfM):
        period = parts.sparsity.of
        width = max(_BLOCK // period, 1) * period
    for start in range(0, problem.shape[2], width):
        block = slice(start, min(start + width, problem.shape[2]))
        part, rows = weights[:, :, block], factor[:, block, block]
        kept = np.ones(part.shape, np.bool_) if fixed is None else fixed[:, :, block]
        errors = np.empty_like(part)
        for number in range(part.shape[2]):
            if fixed is None and number % period == 0:
                some = slice(number, number + period)
                cost = np.diagonal(rows, axis1=1, axis2=2)[:, some] ** -2.0
                kept[:, :, some] = _choose(parts.sparsity, part[:, :, some], cost, start + number, problem.shape[2])
            wanted = part[:, :, number]
            now = np.where(kept[:, :, number], wanted, 0)
            if values is not None:
                now = values.project(now[:, :, None], problem.importance[:, :1])[:, :, 0]
            errors[:, :, number] = (wanted - now) / rows[:, number, number, None]
            part[:, :, number:] -= errors[:, :, number, None] * rows[:, None, number, number:]
            part[:, :, number] = now
        weights[:, :, block.stop :] -= errors @ factor[:, block, block.stop :]
    return constraint.project(weights, problem.importance)


def _choose(sparsity: Constraint, part: Floats, cost: Floats, start: int, inputs: int) -> npt.NDArray[np.bool_]:
    """Return which weights of some inputs, from ``start`` on, to keep."""
    if not isinstance(sparsity, Sparsity):
        return np.not_equal(sparsity.project(part, cost), 0)
    size = part.size // part.shape[2] if sparsity.joint else 1
    before, after = (round(sparsity.ratio * size * end) for end in (start, min(start + part.shape[2], inputs)))
    return sparsity.kept(cost[:, None] * part**2, after - before)


def _inverse_factor(moment: Floats) -> Floats:
    """Return the upper triangular ``U`` of ``moment^-1 = U^T U`` in each group.

    It is the inverse of the upper triangular ``R`` of ``moment = R R^T``, a Cholesky factor with the inputs reversed.
    """
    factors = np.empty_like(moment)
    for group, matrix in enumerate(moment):
        reverse = matrix[::-1, ::-1].astype(np.float64)
        lower, _ = scipy.linalg.cho_factor(reverse, lower=True, check_finite=False)
        inverse, _ = scipy.linalg.lapack.dtrtri(lower, lower=True)
        factors[group] = np.triu(inverse[::-1, ::-1])
    return factors
