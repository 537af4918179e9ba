"""Pairs of the ``optimal`` scheme: both cells as near as their difference allows to what a stuck cell is worth.

A cell ``g`` that is stuck at ``v`` on average adds ``p (1 - p) (v - g)^2`` to the variance of its slice. So of all
pairs of one difference the best lies around ``v``, its *aim*, as far as the range of a cell allows. Read current pulls
the aim down (:meth:`rerampile.stuck_cell.StuckCell.common_modes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["StepPairs", "centre"]

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def centre(difference: Array, aim: float, low: np.float32, high: np.float32, out: Array) -> None:
    """Write pairs of siemens of differences [...] into ``out`` [2, ...], where the differences themselves may lie."""
    half = np.abs(difference) / 2
    inside = np.float32(min(max(aim, float(low)), float(high)))
    common = np.clip(inside, low + half, np.maximum(high - half, low + half))
    half = difference / 2
    np.add(common, half, out=out[0])
    np.subtract(common, half, out=out[1])


@dataclass(frozen=True)
class StepPairs:
    """Pairs of level codes, uniform in conductance, in one slice or several.

    A whole number has many forms as digits from ``1 - levels`` to ``levels - 1``: 7 is ``(7, 0)`` or ``(-1, 1)`` with
    eight levels. Each digit is the difference of one pair of codes, and both which digits and where each pair lies are
    chosen, together, for the least error. What the number decodes to is the same for all of them.

    Attributes:
        levels: Levels of a cell.
        aims: What the pair of each slice lies around, least significant first, in codes; may be outside their range.
    """

    levels: int
    aims: tuple[float, ...]

    def encode(self, difference: Array, out: Array) -> None:
        """Write the codes of whole differences [rows, inputs] into ``out`` [slices, 2, rows, inputs]."""
        negative = difference < 0
        for pair, lower, digit in zip(out, self._lower, self._digits(np.abs(difference)), strict=True):
            signed = np.where(negative, -digit, digit)
            base = lower[np.abs(signed)]
            np.add(base, np.maximum(signed, 0), out=pair[0], casting="unsafe")
            np.add(base, np.maximum(-signed, 0), out=pair[1], casting="unsafe")

    @cached_property
    def _lower(self) -> Integers:
        """The lower code of the best pair of each difference, [slices, levels]."""
        difference = np.arange(self.levels)
        nearest = np.rint(np.array(self.aims)[:, None] - difference / 2)
        return np.clip(nearest, 0, self.levels - 1 - difference).astype(np.int64)

    @cached_property
    def _costs(self) -> Doubles:
        """What that pair costs beside one at its aim, but for a constant of its slice, [slices, levels + 1].

        The last one, of a difference that no pair has, is infinite.
        """
        upper, aims = self._lower + np.arange(self.levels), np.array(self.aims)[:, None]
        squares = self._lower**2 + upper**2 - 2 * aims * (self._lower + upper)
        weight = float(self.levels) ** (2 * np.arange(len(self.aims)))[:, None]
        return np.pad(squares * weight, ((0, 0), (0, 1)), constant_values=np.inf)

    def _digits(self, magnitude: Array) -> list[Array]:
        """Return the digits, least significant first, that cost least of all whose sum is ``magnitude``.

        From slice to slice a digit either is what division leaves, or that less ``levels``, which carries one on. The
        cheapest way to each carry is kept, and followed back from the last slice, which carries nothing.
        """
        if len(self.aims) == 1:
            return [magnitude]
        levels = self.levels
        least = np.zeros(magnitude.shape), np.full(magnitude.shape, np.inf)
        ways: list[tuple[Array, Array, Array]] = []
        for cost in self._costs:
            rest = magnitude // levels
            digit = magnitude - rest * levels
            plain = least[0] + cost[digit], least[1] + cost[digit + 1]
            carried = least[0] + cost[levels - digit], least[1] + cost[levels - 1 - digit]
            ways.append((digit, plain[1] < plain[0], carried[1] < carried[0]))
            least = np.minimum(*plain), np.minimum(*carried)
            magnitude = rest
        carry: Array = np.zeros(magnitude.shape, np.bool_)
        digits = []
        for digit, into_plain, into_carried in reversed(ways):
            into = np.where(carry, into_carried, into_plain)
            digits.append(digit + into - levels * carry)
            carry = into
        return digits[::-1]
