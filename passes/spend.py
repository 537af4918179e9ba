"""Spend: further copies of layers on arrays that are left over, to be averaged.

Stuck cells of the copies of a layer are independent. So of the mean of ``r`` copies, what differs from chip to chip has
a variance of ``1 / r``; the mean error, which all cells have alike, stays. One copy more saves ``noise / (r (r + 1))``:
less with each, so that taking the copy that saves most for each array, again and again, is the best choice but for what
is left over in the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from rerampile.layer import Layer
from rerampile.passes.bins import Bin
from rerampile.passes.correct import noise_energies, products
from rerampile.passes.weigh import placed, stuck_cell
from rerampile.unit import InputMoments, MappedLayer, Unit

__all__ = ["MOST_COPIES", "expected_noise", "further_copies"]

MOST_COPIES = 16
"""Copies of a layer at most: the next ones save less than half a percent of its noise each."""


def expected_noise(unit: Unit, layer: Layer, mapped: MappedLayer, seen: InputMoments | None) -> float:
    """Return what differs from chip to chip in a layer's products: its expected energy, as a share of theirs.

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        mapped: How its weights become cells.
        seen: Moments of its inputs; None for inputs of one size that have nothing in common.
    """
    wanted = unit.weights(layer)
    held, there = mapped.held(wanted, slice(None)), placed(layer, mapped.nonzero)
    noise = noise_energies(layer, mapped, stuck_cell(unit, mapped.coding), held, there, seen)
    exact = wanted.astype(np.float64)
    energy = np.square(exact) if seen is None else products(exact, seen.square, exact)
    return float(noise.sum()) / (float(energy.sum()) or 1.0)


def further_copies(
    bins: Sequence[Sequence[Bin]], noise: Sequence[float], idle: int, *, pack: bool
) -> tuple[list[int], list[Bin]]:
    """Choose how many copies each layer gets, and put the further ones on arrays.

    Args:
        bins: The arrays of one copy of each layer, by itself.
        noise: What a further copy of each layer lowers: its noise with one copy.
        idle: Arrays to spend, each twin counted.
        pack: Whether copies of different layers share arrays. Two copies of one layer never do: a column would see the
            rows of both, and as many more stuck cells as there are copies.

    Returns:
        The number of copies of each layer, 1 where there is no further one; and the arrays of the further ones.
    """
    spare, copies = _Spare(idle, pack), [1] * len(bins)
    queue = [(-_saved(noise[n], 1, own, pack), n) for n, own in enumerate(bins) if own and noise[n] > 0]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        own = bins[number]
        if spare.place([_copied(bin_, copies[number]) for bin_ in own]):
            copies[number] += 1
            if copies[number] < MOST_COPIES:
                heapq.heappush(queue, (-_saved(noise[number], copies[number], own, pack), number))
    return copies, spare.used


def _saved(noise: float, copies: int, bins: Sequence[Bin], pack: bool) -> float:
    """Return the noise that one copy more saves for each array, or part of an array where copies share them."""
    arrays = sum(len(bin_.grid.roles) * (bin_.share if pack else 1) for bin_ in bins)
    return noise / (copies * (copies + 1)) / arrays


def _copied(bin_: Bin, copy: int) -> Bin:
    pieces = [
        (replace(piece, partition=msgspec.structs.replace(piece.partition, copy=copy)), row, output)
        for piece, row, output in bin_.pieces
    ]
    return replace(bin_, pieces=pieces)


@dataclass
class _Spare:
    """Arrays to spend.

    Attributes:
        idle: How many are left.
        pack: Whether copies of different layers share them.
        used: Those that hold copies.
        open: Those of them that have room for more, where copies share them.
    """

    idle: int
    pack: bool
    used: list[Bin] = field(default_factory=list)
    open: list[Bin] = field(default_factory=list)

    def place(self, bins: Sequence[Bin]) -> bool:
        """Put all arrays of one copy somewhere, or none where there is no room for all of them."""
        where = self._shared(bins) if self.pack else [None] * len(bins)
        new = [bin_ for bin_, there in zip(bins, where, strict=True) if there is None]
        needed = sum(len(bin_.grid.roles) for bin_ in new)
        if needed > self.idle:
            return False
        for bin_, there in zip(bins, where, strict=True):
            if there is not None:
                there.absorb(bin_)
        self.idle -= needed
        self.used += new
        if self.pack:
            self.open = [bin_ for bin_ in (*self.open, *new) if bin_.has_room(1, 1)]
        return True

    def _shared(self, bins: Sequence[Bin]) -> list[Bin | None]:
        """Return the first array in use that has room for each, a different one for each; None where there is none."""
        free = [there for there in self.open if there.grid == bins[0].grid and there.layers.isdisjoint(bins[0].layers)]
        found = []
        for bin_ in bins:
            fit = next((there for there in free if there.has_room(bin_.rows, bin_.outputs)), None)
            if fit is not None:
                free.remove(fit)
            found.append(fit)
        return found
