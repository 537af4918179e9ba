"""Stuck cells of a chip that matter, and what each is part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["StuckCells"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StuckCells:
    """Stuck cells that matter, as parallel arrays.

    Attributes:
        layer: The layer whose row and column cross there.
        at_home: Whether the cell holds a weight, or lies beside the blocks.
        in_group: Group of the row.
        position: Flat position in the matrix [groups * outputs, inputs] of the column's output and the row's input.
        part: slice * cells + role of the cell.
        segment: The column segment whose column it is on.
        input_segment: Which of the layer's ranges of inputs that column sums, so which gain its sum has.
        conductance: What it is read as, siemens.
        cell: The cell, as :class:`~rerampile.runtime.fault_map.ChipGeometry` counts them.
        number: 0, or the number of the copy that it is part of.
    """

    layer: Integers
    at_home: npt.NDArray[np.bool_]
    in_group: Integers
    position: Integers
    part: Integers
    segment: Integers
    input_segment: npt.NDArray[np.integer[Any]]
    conductance: Floats
    cell: Integers
    number: npt.NDArray[np.integer[Any]]

    def take(self, which: Integers | slice) -> StuckCells:
        """Return some of them."""
        return StuckCells(*(column[which] for column in vars(self).values()))

    def joined(self, other: StuckCells) -> StuckCells:
        """Return these and others."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return StuckCells(*(np.concatenate(pair) for pair in pairs))
