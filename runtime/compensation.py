"""Healthy cells make up for stuck ones of the same weight, where their range allows.

A stuck cell of a pair leaves its partner free: with ``a`` stuck at ``s``, ``b = s - w`` restores ``w = a - b`` wherever
a cell can hold that (inner fault tolerance: Xia et al., JETCAS 2018; target sparsifying, a zero fits every fault: Jin
et al., DATE 2020; closest-value mapping of slices: arXiv 2512.18459). Stuck conductances may lie between levels or
outside the range of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.runtime.stuck_cells import StuckCells
from rerampile.schemes import Coding

__all__ = ["HitWeights", "compensated"]

Array = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

_SLACK = 1e-6  # of a level: what rounding may add to a whole number


@dataclass(frozen=True, kw_only=True, eq=False)
class HitWeights:
    """The weights of a layer that have stuck cells.

    Attributes:
        index: int64 [weights], flat positions in the matrix [groups * outputs, inputs], ascending, each once.
        segment: int64 [weights], the column segment that each is on.
        stuck: bool [slices, cells, weights].
        worth: float32 [slices, cells, weights]: what stuck cells are worth, in units of the difference; 0 elsewhere.
    """

    index: Integers
    segment: Integers
    stuck: Flags
    worth: Floats

    @classmethod
    def of(cls, coding: Coding, cells: StuckCells) -> HitWeights:
        """Gather the stuck cells of a layer that hold weights.

        Args:
            coding: The layer's coding.
            cells: Its stuck cells.
        """
        home = cells.take(np.flatnonzero(cells.at_home))
        index, first, at = np.unique(home.position, return_index=True, return_inverse=True)
        shape = (coding.slices, coding.cells, len(index))
        stuck, worth = np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
        flat = (coding.slices * coding.cells, len(index))
        stuck.reshape(flat)[home.part, at] = True
        worth.reshape(flat)[home.part, at] = coding.worth(home.conductance)
        return cls(index=index, segment=home.segment[first], stuck=stuck, worth=worth)

    def turned(self, which: Flags) -> HitWeights:
        """Return the same faults where the columns of some weights have changed roles.

        Args:
            which: bool [weights].
        """
        stuck = np.where(which, self.stuck[:, ::-1], self.stuck)
        worth = np.where(which, self.worth[:, ::-1], self.worth)
        return HitWeights(index=self.index, segment=self.segment, stuck=stuck, worth=worth)

    def fixed(self, coding: Coding) -> Doubles:
        """Return what stuck cells add to the difference, float64 [weights]."""
        found: Doubles = np.einsum("kc,kcn->n", coding.signs, np.where(self.stuck, self.worth, 0.0))
        return found

    def reach(self, coding: Coding) -> tuple[Doubles, Doubles]:
        """Return the least and the largest difference that healthy cells can form with the stuck ones."""
        fixed = self.fixed(coding) - (coding.reference if coding.cells == 1 else 0.0)
        least, most = (np.einsum("kc,kcn->n", end, ~self.stuck) for end in _signed_ends(coding))
        return fixed + least, fixed + most

    def difference(self, coding: Coding, cells: Array) -> Floats:
        """Return the differences that weights read when these cells are stuck, float32 [weights].

        Args:
            coding: The layer's coding.
            cells: Their targets as stored, [slices, cells, weights].
        """
        values = cells if coding.cell_values is None else coding.cell_values[cells]
        return coding.combine(np.where(self.stuck, self.worth, values.astype(np.float32)))

    def as_stuck(self, coding: Coding, cells: Array) -> Array:
        """Return cells as stored with the stuck ones at the nearest that a cell can hold."""
        return np.where(self.stuck, _stored(coding, self.worth.astype(np.float64)), cells)


def compensated(coding: Coding, hit: HitWeights, cells: Array, wanted: Floats) -> Array:
    """Return targets of the healthy cells whose weights come as near to the wanted ones as they can.

    The most significant healthy cells are chosen first, each as near to its present target as what the others can still
    add leaves open. With one healthy cell, or analog ones, none comes nearer; with gaps between what slices can form,
    another choice of higher digits sometimes would.

    Args:
        coding: The layer's coding.
        hit: The stuck cells.
        cells: Present targets as stored, [slices, cells, weights].
        wanted: Differences that the weights should have, float32 [weights].

    Returns:
        Cells as stored, [slices, cells, weights]; stuck ones at the nearest that a cell can hold.
    """
    values = (cells if coding.cell_values is None else coding.cell_values[cells]).astype(np.float64)
    signed, ends = coding.signs, _signed_ends(coding)
    rest = wanted.astype(np.float64) + (coding.reference if coding.cells == 1 else 0.0)
    rest -= hit.fixed(coding)
    least, most = (np.einsum("kc,kcn->n", end, ~hit.stuck) for end in ends)
    found = hit.as_stuck(coding, cells)
    for k in reversed(range(coding.slices)):
        for c in range(coding.cells):
            healthy, factor = ~hit.stuck[k, c], signed[k, c]
            least, most = least - healthy * ends[0][k, c], most - healthy * ends[1][k, c]
            between = np.sort(np.stack([(rest - most) / factor, (rest - least) / factor]), axis=0)
            stored = _within(coding, values[k, c], between[0], between[1])
            found[k, c] = np.where(healthy, stored, found[k, c])
            chosen = stored if coding.cell_values is None else coding.cell_values[stored]
            rest -= np.where(healthy, factor * chosen.astype(np.float64), 0.0)
    return found


def _ends(coding: Coding) -> tuple[float, float]:
    """Return the lowest and highest value of one cell."""
    if coding.integer:
        return 0.0, float((coding.levels or 1) - 1)
    if coding.cell_values is not None:
        return float(coding.cell_values[0]), float(coding.cell_values[-1])
    return coding.low, coding.high


def _signed_ends(coding: Coding) -> Doubles:
    """Return the least and the most that each cell can add to a difference, [2, slices, cells]."""
    low, high = _ends(coding)
    ends: Doubles = np.sort(np.stack([coding.signs * low, coding.signs * high]), axis=0)
    return ends


def _within(coding: Coding, present: Doubles, least: Doubles, most: Doubles) -> Array:
    """Return what is nearest to the present values within bounds, as stored."""
    if coding.integer:
        whole = np.ceil(least - _SLACK), np.floor(most + _SLACK)
        fits = whole[0] <= whole[1]
        least, most = (np.where(fits, w, np.rint((least + most) / 2)) for w in whole)
    return _stored(coding, np.clip(present, least, most))


def _stored(coding: Coding, values: Doubles) -> Array:
    """Return the nearest to values that a cell can hold, as stored."""
    if coding.cell_values is not None:
        table = coding.cell_values.astype(np.float64)
        return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(coding.dtype)
    low, high = _ends(coding)
    inside = np.clip(values, low, high)
    return (np.rint(inside) if coding.integer else inside).astype(coding.dtype)
