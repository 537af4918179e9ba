"""Segments: ranges of a layer's inputs whose sums have digital gains of their own.

An array sums at most as many inputs as it has rows. Where a matrix has more, each partial sum is read on its own before
they are added digitally, so that each can be multiplied by a gain of its own: one multiplier a partial sum, and a full
scale that only the weights of one column of one array have to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Segments"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """Ranges that follow one another from the first input of a layer's matrices to the last.

    Gains, and whatever belongs to them, are [outputs] where one range holds all inputs by agreement (scales a tensor or
    a channel), and [outputs, segments] where each range has its own (scales a partition).

    Attributes:
        starts: First input of each range, ascending from 0.
        inputs: How many inputs there are.
    """

    starts: tuple[int, ...]
    inputs: int

    @classmethod
    def whole(cls, inputs: int) -> Segments:
        """Return the one range of all inputs."""
        return cls((0,), inputs)

    @classmethod
    def by_rows(cls, needed: npt.NDArray[np.bool_], rows: int) -> Segments:
        """Return the fewest ranges with no more needed inputs each than an array has rows.

        Args:
            needed: bool [inputs], which inputs take a row somewhere.
            rows: Rows of an array.
        """
        return cls((0, *np.flatnonzero(needed)[rows::rows].tolist()), len(needed))

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The ranges, half-open."""
        return list(zip(self.starts, (*self.starts[1:], self.inputs), strict=True))

    @property
    def slices(self) -> list[slice]:
        """The ranges, to index inputs with."""
        return [slice(*each) for each in self.ranges]

    def number_of(self, inputs: Integers) -> Integers:
        """Return which range each input lies in."""
        return np.searchsorted(np.array(self.starts), inputs, side="right") - 1

    def cut(self, inputs: Integers) -> Iterator[Integers]:
        """Yield ascending inputs range by range, those of ranges that have any."""
        ends = np.searchsorted(inputs, self.starts[1:])
        yield from (part for part in np.split(inputs, ends) if len(part))

    def largest(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the largest of the values [outputs, inputs] in each range, [outputs, segments]."""
        return np.stack([values[:, part].max(axis=1) for part in self.slices], axis=1)

    def full_scale(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the full scales of the weights [outputs, inputs] of segments, float32 [outputs, segments].

        Segments without weights may have cells where other outputs need the inputs. What is stuck there shall add
        nothing to the sum: their full scale is next to none. (That of an output without weights, which has no cells
        under the other scales, is none, and reads as one.)
        """
        largest: npt.NDArray[np.float32] = np.maximum(self.largest(np.abs(weights)), np.finfo(np.float32).tiny)
        return largest

    def spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return values of outputs or of their segments as they meet weights, [outputs, 1] or [outputs, inputs]."""
        if values.ndim == 1:
            return values[:, None]
        return values if len(self.starts) == 1 else np.repeat(values, np.diff([*self.starts, self.inputs]), axis=1)

    def at(self, values: npt.NDArray[Any], position: Integers) -> npt.NDArray[Any]:
        """Return the values that belong to weights at flat positions of the matrix [outputs, inputs]."""
        if len(self.starts) == 1:
            return values.reshape(-1)[position // self.inputs]
        output, input_ = np.divmod(position, self.inputs)
        return values[output, self.number_of(input_)]
