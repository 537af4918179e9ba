"""How one cell fails, and what that does to a weight on average.

A cell of value ``g`` is stuck with probability ``p`` at a value of mean ``v`` and variance ``s``. Its error then has
the mean ``p (v - g)`` and the variance ``p (1 - p) (v - g)^2 + p s``. Errors of cells add up to those of weights by
sign, significance and gain.

Where the hardware cuts off the whole pair, a pair of difference ``d`` reads 0 with probability ``q = 1 - (1 - p)^2``.
Its error then has the mean ``-q d`` and the variance ``q (1 - q) d^2``, wherever its cells lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.schemes import Coding
from rerampile.target import Category, Stuck, Target

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
        pairwise: Whether a stuck cell and the other one of its pair are both cut off.
    """

    probability: float
    mean: float
    variance: float
    exclusive: bool = False
    pairwise: bool = False

    @classmethod
    def of(
        cls, target: Target, coding: Coding, probabilities: Mapping[str, float], *, by_weight: bool = False
    ) -> StuckCell:
        """Return how the cells of a layer fail.

        Args:
            target: The hardware: what failed cells conduct, and what it reads then.
            coding: The layer's coding.
            probabilities: That a cell is in a state, for some keys of :attr:`Target.failures`.
            by_weight: Whether they are those of a weight, one of whose cells is hit.
        """
        rate = sum(probabilities.values())
        shares = np.array([*probabilities.values()]) / (rate or 1.0)
        ends = [_moments(failure, *target.failed_limits) for failure in map(target.failure, probabilities)]
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
            pairwise=target.failed_cells.isolates_pairs and coding.cells == 2,
        )

    @property
    def loss(self) -> float:
        """How much smaller a weight is read on average, as a share of it."""
        p = self.probability
        if not self.pairwise:
            return p
        return 2 * p if self.exclusive else p * (2 - p)

    def common_modes(self, coding: Coding, current_weight: float = 0.0) -> tuple[float, ...]:
        """Return what the pairs of each slice lie around where error and read current together are least.

        With conductances of a cell from 0 to 1, slices of shares ``b`` (summing to one) of a weight from -1 to 1, and
        the sum ``2 c`` of a pair, averaged over K slices, costing ``current_weight * 2 c``, that is
        ``v - current_weight / (2 K b^2 p (1 - p))``. Where pairs are cut off as a whole, their error is the same
        wherever they lie, and the lowest draws least.

        Args:
            coding: A coding of pairs in the same cells.
            current_weight: Squared error, in full scales, that a unit of current is worth.
        """
        reach = float((coding.levels or 0) - 1) if coding.integer else coding.g_on - coding.g_off
        total, p = coding.high - coding.low, self.probability
        if self.pairwise:
            return (0.0 if coding.integer else coding.g_off,) * coding.slices
        shares = [significance * reach / total for significance in coding.significances]
        return tuple(
            self.mean - reach * current_weight / (2 * coding.slices * share**2 * p * (1 - p)) for share in shares
        )

    def shift(self, coding: Coding) -> float:
        """Return the mean error of a weight beside its :attr:`loss`, in units of its gain; 0 for pairs."""
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
        if self.pairwise:
            return self._variance_of_pairs(coding, values, gain, counted)
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

    def _variance_of_pairs(
        self, coding: Coding, values: npt.NDArray[Any], gain: Floats, counted: Floats | None
    ) -> Floats:
        """Return the variance of weights whose pairs are cut off as a whole."""
        q = self.loss
        total: Any = 0.0
        weight: Any = 0.0
        for k, (significance, (plus, minus)) in enumerate(zip(coding.significances, values, strict=True)):
            difference = gain * np.float32(significance) * np.subtract(plus, minus, dtype=np.float32)
            weight = weight + difference
            total = total + (np.float32(1) if counted is None else counted[k]) * np.square(difference)
        if self.exclusive:
            return np.asarray(np.float32(q) * total - np.square(np.float32(q) * weight), np.float32)
        return np.asarray(np.float32(q * (1 - q)) * total, np.float32)


def _moments(failure: Stuck | Category, low: float, high: float) -> tuple[float, float]:
    """Return mean and variance of what a failed cell is read as: normal, and a limit where that is beyond it.

    Args:
        failure: What it conducts.
        low: The least that it is read as, 0 or more.
        high: The most; may be infinite.
    """
    if not failure.spread or low == high:
        return min(max(failure.mean, low), high), 0.0
    below, low_density = _tail((failure.mean - low) / failure.spread)
    above, high_density = _tail((high - failure.mean) / failure.spread)
    inside, top = 1 - below - above, high if above else 0.0
    mean = failure.mean * inside + failure.spread * (low_density - high_density) + low * below + top * above
    square = (failure.mean**2 + failure.spread**2) * inside + low**2 * below + top**2 * above
    square += (failure.mean + low) * failure.spread * low_density
    square -= (failure.mean + top) * failure.spread * high_density
    return mean, max(square - mean**2, 0.0)


def _tail(z: float) -> tuple[float, float]:
    """Return the probability that a normal number is more than ``z`` deviations below its mean, and its density."""
    return 0.5 * math.erfc(z / math.sqrt(2)), math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
