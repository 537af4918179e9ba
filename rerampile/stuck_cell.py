"""How one cell fails, and what that does to a weight on average.

A cell of value ``g`` is stuck with probability ``p`` at a value of mean ``v`` and variance ``s``. Its error then has
the mean ``p (v - g)`` and the variance ``p (1 - p) (v - g)^2 + p s``. Errors of cells add up to those of weights by
sign, significance and gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.schemes import Coding
from rerampile.target import Cell, Stuck

__all__ = ["StuckCell"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class StuckCell:
    """How one cell of a layer fails.

    Attributes:
        probability: That it is stuck.
        mean: Mean of its value when stuck, in the unit of the layer.
        variance: Variance of that value.
        exclusive: Whether at most one cell of a weight is stuck; otherwise cells fail independently.
    """

    probability: float
    mean: float
    variance: float
    exclusive: bool = False

    @classmethod
    def of(cls, cell: Cell, coding: Coding, *, stuck_off: float, stuck_on: float, by_weight: bool = False) -> StuckCell:
        """Return how the cells of a layer fail.

        Args:
            cell: The target's cell.
            coding: The layer's coding.
            stuck_off: Probability that a cell is stuck off.
            stuck_on: Probability that it is stuck on.
            by_weight: Whether they are those of a weight, one of whose cells is hit.
        """
        rate = stuck_off + stuck_on
        shares = np.array([stuck_off, stuck_on]) / (rate or 1.0)
        ends = [_moments(cell.stuck_off), _moments(cell.stuck_on)]
        mean = float(shares @ [m for m, _ in ends])
        variance = float(shares @ [v + (m - mean) ** 2 for m, v in ends])
        zero, unit = 0.0, 1.0
        if coding.integer:
            zero, unit = coding.g_off, (coding.g_on - coding.g_off) / ((coding.levels or 0) - 1)
        return cls(
            probability=rate / (coding.cells * coding.slices if by_weight else 1),
            mean=(mean - zero) / unit,
            variance=variance / unit**2,
            exclusive=by_weight,
        )

    def common_modes(self, coding: Coding, current_weight: float = 0.0) -> tuple[float, ...]:
        """Return what the pairs of each slice lie around where error and read current together are least.

        With conductances of a cell from 0 to 1, slices of shares ``b`` (summing to one) of a weight from -1 to 1, and
        the sum ``2 c`` of a pair, averaged over K slices, costing ``current_weight * 2 c``, that is
        ``v - current_weight / (2 K b^2 p (1 - p))``.

        Args:
            coding: A coding of pairs in the same cells.
            current_weight: Squared error, in full scales, that a unit of current is worth.
        """
        reach = float((coding.levels or 0) - 1) if coding.integer else coding.g_on - coding.g_off
        total, p = coding.high - coding.low, self.probability
        shares = [significance * reach / total for significance in coding.significances]
        return tuple(
            self.mean - reach * current_weight / (2 * coding.slices * share**2 * p * (1 - p)) for share in shares
        )

    def shift(self, coding: Coding) -> float:
        """Return the mean error of a weight beside ``-p w``, in units of its gain; 0 for pairs."""
        if coding.cells == 2:
            return 0.0
        return self.probability * (self.mean * sum(coding.significances) - coding.reference)

    def variance_of(
        self, coding: Coding, cells: npt.NDArray[Any], gain: Floats, counted: Floats | None = None
    ) -> Floats:
        """Return the variance of weights, float32 [rows, inputs].

        Args:
            coding: Their coding.
            cells: Their cells, as stored, [slices, cells, rows, inputs].
            gain: Weight units a unit of difference, [rows, 1].
            counted: What the variances of the cells of each slice and row count, [slices, rows, 1]: a third for the
                mean of three; 1 where None.
        """
        p = self.probability
        values = cells if coding.cell_values is None else coding.cell_values[cells]
        total: Any = 0.0
        mean: Any = 0.0
        for k, (significance, pair) in enumerate(zip(coding.significances, values, strict=True)):
            share = np.float32(1) if counted is None else counted[k]
            for sign, value in zip((1.0, -1.0), pair, strict=False):
                factor = gain * np.float32(sign * significance)
                error = factor * (np.float32(self.mean) - value)
                if self.exclusive:
                    mean = mean + np.float32(p) * error
                total = total + share * np.float32(p if self.exclusive else p * (1 - p)) * np.square(error)
                total = total + share * np.square(factor) * np.float32(p) * np.float32(self.variance)
        variance: Floats = np.asarray(total - np.square(mean), np.float32)
        return variance


def _moments(stuck: Stuck) -> tuple[float, float]:
    """Return mean and variance of a stuck conductance: normal, and 0 where that is negative."""
    if not stuck.spread:
        return stuck.mean, 0.0
    z = stuck.mean / stuck.spread
    below, density = 0.5 * math.erfc(z / math.sqrt(2)), math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    mean = stuck.mean * (1 - below) + stuck.spread * density
    square = (stuck.mean**2 + stuck.spread**2) * (1 - below) + stuck.mean * stuck.spread * density
    return mean, square - mean**2
