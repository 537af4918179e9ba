"""One uniform number for each of very many items, drawn only where it is near an end of [0, 1].

A field gives item ``i`` of run ``r`` a number ``u`` that depends on (seed, run, purpose, i) and on nothing else. Asking
for the items within a threshold costs time in proportion to how many there are, not to the number of items; a higher
threshold returns the same items and more, with the same numbers, and so does a higher number of items.

The depth of an item is ``2 * min(u, 1 - u)``, itself uniform. Items of small depth come in bands, [0, 2**-10) and then
two an octave up to 1. A band hits items by a Bernoulli process of its own, as likely as an item of no deeper band lies
in this one; of several bands that hit an item the deepest counts. Each process draws the gaps between its hits from one
stream, and where in the band they lie from another, so that it does not matter how many are drawn at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rerampile.runtime.sorting import sort_with_order

__all__ = ["Field"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_EDGES = (0.0, 2.0**-10, *(part * 2.0**-octave for octave in range(9, -1, -1) for part in (0.75, 1.0)))
_BLOCK = 1 << 13  # hits drawn at a time: they and their temporaries stay in the second-level cache


@dataclass(frozen=True)
class Field:
    """Uniform numbers of one purpose in one run.

    Attributes:
        seed: Seed of the experiment, 0 or more.
        run: Number of the run (of the simulated chip).
        purpose: What the numbers are for; fields of different purposes are independent.
    """

    seed: int
    run: int
    purpose: int

    def tails(self, low: float, high: float, size: int) -> tuple[Integers, Floats]:
        """Return the items of ``range(size)``, ascending, whose number is near an end of [0, 1], and their numbers.

        Args:
            low: Items with ``u < low`` are returned,
            high: and those with ``u >= 1 - high``; ``low + high`` is at most 1.
            size: How many items there are.
        """
        items, numbers = self._within(min(1.0, 2 * max(low, high)), size)
        items, order = sort_with_order(items)
        numbers = numbers[order]
        wanted = (numbers < low) | (numbers >= 1 - high)
        wanted[1:] &= items[1:] != items[:-1]  # of equal items the first one, whose band is the deepest
        hit = np.flatnonzero(wanted)  # far faster than indexing by flags that nothing can predict
        return items[hit], numbers[hit]

    def at(self, items: Integers) -> Floats:
        """Return a number in [0, 1) for each of some items, by hashing; it has nothing to do with :meth:`tails`."""
        keys = self._stream(2, 0).integers(0, 2**64, 2, dtype=np.uint64)
        x = items.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for key in keys:  # two rounds of the finaliser of splitmix64
            x += key
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
        return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _within(self, threshold: float, size: int) -> tuple[Integers, Floats]:
        """Return the hits of each band of depth below a threshold with their numbers, ascending in each band."""
        items, numbers = [np.zeros(0, np.int64)], [np.zeros(0)]
        for band, (bottom, top) in enumerate(itertools.pairwise(_EDGES)):
            if bottom >= threshold:
                break
            width, reach = top - bottom, min(1.0, (threshold - bottom) / (top - bottom))
            places = self._stream(1, band)
            for hits in _bernoulli(self._stream(0, band), width / (1 - bottom), size):
                place = 2 * places.random(len(hits)) - 1  # in the band; the sign says at which end
                depth = np.abs(place)
                if reach < 1:
                    kept = np.flatnonzero(depth <= reach)
                    hits, place, depth = hits[kept], place[kept], depth[kept]  # noqa: PLW2901
                half_depth = (bottom + width * depth) / 2
                items.append(hits)
                numbers.append(np.abs((place >= 0) - half_depth))  # half_depth, or 1 - half_depth, exactly
        return np.concatenate(items), np.concatenate(numbers)

    def _stream(self, kind: int, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, self.run, self.purpose, kind, index]))


def _bernoulli(rng: np.random.Generator, probability: float, size: int) -> Iterator[Integers]:
    """Yield which of ``range(size)`` a Bernoulli process hits, ascending, by drawing the gaps between hits."""
    rate = np.log1p(-probability) if probability < 1 else -np.inf
    last = -1
    while last < size - 1:
        expected = (size - 1 - last) * probability
        count = min(_BLOCK, int(expected + 4 * np.sqrt(expected)) + 8)
        gaps = (np.log(1 - rng.random(count)) / rate).astype(np.int64) + 1
        hits = last + np.cumsum(gaps)
        last = int(hits[-1])
        yield hits[: np.searchsorted(hits, size)]
