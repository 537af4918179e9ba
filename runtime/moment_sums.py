"""Sums of products of input vectors: float32 products of some vectors at a time, summed in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import ssyrk

__all__ = ["MomentSums", "add_products"]

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

_WHOLE = 128  # inputs from which on the products of one group are a call of their own
_ROWS = 256  # rows of a triangle that are added or mirrored at once


class MomentSums:
    """Running sums over input vectors x.

    Attributes:
        moment: Sum of x x^T, float64 [groups, inputs, inputs]; only its lower triangles count until :meth:`finish`.
        total: Sum of x, float64 [groups, inputs].
        count: How many vectors each group has seen.
    """

    def __init__(self, groups: int, inputs: int) -> None:
        self.moment = np.zeros((groups, inputs, inputs))
        self.total = np.zeros((groups, inputs))
        self.count = 0

    def add(self, columns: Floats) -> None:
        """Add vectors, float32 [groups, inputs, vectors]."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is seen in the sums
            self.total += columns.sum(axis=-1, dtype=np.float64)
            if columns.shape[1] < _WHOLE:
                self.moment += columns @ columns.swapaxes(-1, -2)
            else:
                for total, vectors in zip(self.moment, columns, strict=True):
                    _add_triangle(total, _square(vectors))
        self.count += columns.shape[-1]

    @property
    def finite(self) -> bool:
        """Whether every sum is a number."""
        diagonal = np.diagonal(self.moment, axis1=1, axis2=2)  # no product is larger than those on the diagonal
        return bool(np.isfinite(self.total).all() and np.isfinite(diagonal).all())

    def finish(self) -> None:
        """Mirror the triangles, and make the arrays read-only: several layers may share them."""
        moment, inputs = self.moment, self.moment.shape[-1]
        for start in range(0, inputs, _ROWS):
            stop = min(start + _ROWS, inputs)
            lower = np.tril(moment[:, start:stop, start:stop])
            moment[:, start:stop, start:stop] = lower + np.tril(lower, -1).swapaxes(-1, -2)
            moment[:, start:stop, stop:] = moment[:, stop:, start:stop].swapaxes(-1, -2)
        moment.flags.writeable = self.total.flags.writeable = False


def add_products(total: Doubles, left: Floats, right: Floats) -> None:
    """Add the sum of y x^T over pairs of vectors, float32 [groups, size, vectors], to float64 [groups, size, size]."""
    with np.errstate(over="ignore", invalid="ignore"):
        for group, (y, x) in enumerate(zip(left, right, strict=True)):
            total[group] += y @ x.T


def _square(vectors: Floats) -> Floats:
    """Return the sum of x x^T over vectors [inputs, vectors]; only the lower triangle is filled."""
    upper = ssyrk(1.0, vectors.T, trans=1) if vectors.flags.c_contiguous else ssyrk(1.0, vectors)
    lower: Floats = upper.T  # the library stores columns, so that this is a plain array
    return lower


def _add_triangle(total: Doubles, triangle: Floats) -> None:
    """Add a lower triangle [inputs, inputs] without the zeros beside it."""
    for start in range(0, len(total), _ROWS):
        stop = start + _ROWS
        total[start:stop, :stop] += triangle[start:stop, :stop]
