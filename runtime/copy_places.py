"""Where copies of slices lie on the arrays of a chip, and which weights stuck cells in them are part of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, SliceCopy
from rerampile.deployment import Deployment, copy_span, layer_segments
from rerampile.errors import ConfigError
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.stuck_cells import StuckCells

__all__ = ["CopyPlaces", "refuse_weight_rates"]

Integers = npt.NDArray[np.int64]


def refuse_weight_rates(deployment: Deployment, faults: Sequence[FaultModel]) -> None:
    """Refuse failure rates of a weight where weights have copies: which cells are one weight's is then not known.

    Raises:
        ConfigError: There are both.
    """
    if deployment.plan.protection is not None and any(model.rate_unit == "weight" for model in faults):
        raise ConfigError(
            f"--rate-unit weight: {deployment.folder} has copies of slices, so that cells of a weight lie apart; "
            f"expected rates of a cell"
        )


@dataclass(frozen=True, eq=False)
class CopyPlaces:
    """All copies of a plan, array by array.

    Attributes:
        first: The first copy of each array, and at the end their number, [arrays + 1].
        span: First row, row behind, first column and column behind of each copy, [4, copies].
        layer: Layer of each.
        number: 1 or 2.
        input_at: Where the inputs of each begin in ``inputs``.
        inputs: The inputs of all rows.
        column_at: Where the columns of each begin in ``columns``.
        columns: What each column is, [4, columns]: the flat position in the matrix of the first weight of its output,
            slice * cells + role, and the column segment and the range of inputs of the partition's own column.
    """

    first: Integers
    span: Integers = field(repr=False)
    layer: Integers = field(repr=False)
    number: Integers = field(repr=False)
    input_at: Integers = field(repr=False)
    inputs: Integers = field(repr=False)
    column_at: Integers = field(repr=False)
    columns: Integers = field(repr=False)

    @classmethod
    def of(cls, deployment: Deployment, segments: Integers) -> CopyPlaces:
        """Lay the copies of a plan out.

        Args:
            deployment: The deployment.
            segments: The column segment of each column of each array, [arrays, columns].
        """
        plan, slices = deployment.plan, deployment.copied_slices
        all_ = [(array, copy) for array in plan.arrays for copy in array.slice_copies]
        spans = [copy_span(copy, array, slices) for array, copy in all_]
        inputs = [np.array(copy.input_indices, np.int64) for _, copy in all_]
        columns = [_columns(deployment, array, copy, segments) for array, copy in all_]
        homes = [plan.arrays[copy.array].partitions[copy.partition] for _, copy in all_]
        return cls(
            first=np.cumsum([0, *(len(array.slice_copies) for array in plan.arrays)]),
            span=np.array([(r.start, r.stop, c.start, c.stop) for r, c in spans], np.int64).reshape(-1, 4).T,
            layer=np.array([home.layer for home in homes], np.int64),
            number=np.array([copy.number for _, copy in all_], np.int64),
            input_at=np.cumsum([0, *(len(each) for each in inputs)]),
            inputs=np.concatenate([np.zeros(0, np.int64), *inputs]),
            column_at=np.cumsum([0, *(each.shape[1] for each in columns)]),
            columns=np.concatenate([np.zeros((4, 0), np.int64), *columns], axis=1),
        )

    def resolve(
        self, cell: Integers, conductance: npt.NDArray[np.float32], geometry: ChipGeometry
    ) -> StuckCells | None:
        """Return the faults in copies; None where there are no copies.

        Args:
            cell: int64 [cells], as the geometry counts them.
            conductance: float32 [cells], what each is read as, siemens.
            geometry: The arrays.
        """
        if not len(self.layer):
            return None
        array, row, column = geometry.locate(cell)
        copy = np.full(len(array), -1)
        most = int(np.diff(self.first).max())
        for k in range(most):  # the copies of an array lie apart, so that at most one has the cell
            each = np.minimum(self.first[array] + k, len(self.layer) - 1)
            top, bottom, left, right = self.span[:, each]
            inside = (top <= row) & (row < bottom) & (left <= column) & (column < right)
            inside &= self.first[array] + k < self.first[array + 1]
            copy[inside] = each[inside]
        found = np.flatnonzero(copy >= 0)
        copy, row, column = copy[found], row[found], column[found]
        input_ = self.inputs[self.input_at[copy] + row - self.span[0, copy]]
        own = self.column_at[copy] + column - self.span[2, copy]
        start, part, segment, input_segment = self.columns[:, own]
        return StuckCells(
            layer=self.layer[copy],
            at_home=np.ones(len(copy), np.bool_),
            in_group=np.zeros(len(copy), np.int64),
            position=start + input_,
            part=part,
            segment=segment,
            input_segment=input_segment.astype(np.int32),
            conductance=conductance[found],
            cell=cell[found],
            number=self.number[copy].astype(np.uint8),
        )


def _columns(deployment: Deployment, array: ArrayPlan, copy: SliceCopy, segments: Integers) -> Integers:
    """Return what each column of a copy is, as :attr:`CopyPlaces.columns`."""
    home = deployment.plan.arrays[copy.array].partitions[copy.partition]
    layer, slices = deployment.plan.layers[home.layer], deployment.copied_slices
    roles = [0 if role == "plus" else 1 for role in array.roles]
    part = np.array([k * layer.cells + role for k in array.slices[-slices:] for role in roles])
    outputs = np.array(copy.output_indices)
    own = home.column + np.searchsorted(home.output_indices, outputs) * len(array.slices) * len(array.roles)
    start, segment = outputs * layer.inputs, segments[copy.array, own]
    input_segment = layer_segments(layer).number_of(np.array(home.input_indices[:1]))
    each = len(part)
    return np.stack(
        [
            np.repeat(start, each),
            np.tile(part, len(outputs)),
            np.repeat(segment, each),
            np.repeat(input_segment, each * len(outputs)),
        ]
    )
