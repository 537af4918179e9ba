"""From stuck cells to weights: what each layer's matrix is on a chip with given faults.

A stuck cell inside a partition changes one weight. Where a row and a column of one array belong to the same layer but
not to the same block, the cells at their crossing hold a zero weight, and one that is stuck lets the row's input leak
into the column: within a group that is more of a weight which the layer has anyway, between groups it is a leak.
Everywhere else a stuck cell does nothing, since its row is not driven or its column is not read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.checks import check_placement
from rerampile.deployment import Deployment, layer_coding
from rerampile.plan import ArrayPlan, LayerPlan, Partition
from rerampile.runtime.fault_map import ChipGeometry, FaultMap
from rerampile.schemes import Coding

__all__ = ["Injector", "LayerFaults", "Leaks"]

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Leaks:
    """Inputs of one group that reach outputs of another, ascending by (out_row, in_row), each pair once.

    Attributes:
        in_row: int64 [leaks], group * inputs + input of the row that is driven.
        out_row: int64 [leaks], group * outputs + output of the column that is read.
        value: float32 [leaks], the weight between them.
    """

    in_row: Integers
    out_row: Integers
    value: Floats

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFaults:
    """What a chip's faults do to one layer.

    Attributes:
        layer: Position in the plan's ``layers``.
        index: int64 [weights], flat positions in the matrix [groups * outputs, inputs], ascending, each once.
        value: float32 [weights], the weights there as the faulty chip reads them.
        leaks: What flows between groups; None where nothing does.
    """

    layer: int
    index: Integers
    value: Floats
    leaks: Leaks | None


class Injector:
    """Turns the faults of chips of one deployment into weights.

    Args:
        deployment: The deployment.

    Raises:
        PlanFormatError: The plan does not hold every weight exactly once, or partitions overlap.
    """

    def __init__(self, deployment: Deployment) -> None:
        check_placement(deployment)
        self._places = _Places.of(deployment)
        self._layers = [_LayerCells.of(deployment, layer) for layer in deployment.plan.layers]

    def faults(self, fault_map: FaultMap) -> list[LayerFaults]:
        """Return what the faults of a chip do to each layer that they change, in the order of the plan.

        Args:
            fault_map: Its stuck cells.
        """
        stuck = self._places.resolve(fault_map)
        order = np.argsort(stuck.layer, kind="stable")
        ends = np.searchsorted(stuck.layer[order], np.arange(len(self._layers) + 1))
        found = []
        for number in np.flatnonzero(np.diff(ends)).tolist():
            faults = self._layers[number].faults(number, stuck.take(order[ends[number] : ends[number + 1]]))
            if len(faults.index) or faults.leaks is not None:
                found.append(faults)
        return found


@dataclass(frozen=True, eq=False)
class _Stuck:
    """Stuck cells that matter, as parallel arrays.

    Attributes:
        layer: The layer whose row and column cross there.
        at_home: Whether the cell holds a weight, or lies beside the blocks.
        in_row: group * inputs + input of the row.
        out_row: group * outputs + output of the column.
        part: slice * cells + role of the cell.
        conductance: What it is stuck at, siemens.
    """

    layer: Integers
    at_home: npt.NDArray[np.bool_]
    in_row: Integers
    out_row: Integers
    part: Integers
    conductance: Floats

    def take(self, which: npt.NDArray[Any]) -> _Stuck:
        """Return some of them."""
        return _Stuck(*(column[which] for column in vars(self).values()))


@dataclass(frozen=True, eq=False)
class _Places:
    """What every row and column of every array is for. Blocks number all groups of all partitions; -1 is spare.

    Attributes:
        geometry: The arrays.
        block_layer: Layer of each block, and -1 at the end, where spare rows and columns find it.
        row_block: Block of each row, [arrays * rows].
        row_in: group * inputs + input of each row.
        column_block: Block of each column, [arrays * columns].
        column_out: group * outputs + output of each column.
        column_part: slice * cells + role of each column.
    """

    geometry: ChipGeometry
    block_layer: Integers
    row_block: Integers
    row_in: Integers
    column_block: Integers
    column_out: Integers
    column_part: Integers

    @classmethod
    def of(cls, deployment: Deployment) -> _Places:
        """Lay a plan out."""
        geometry, plan = ChipGeometry.of(deployment), deployment.plan
        rows, columns = (np.full((2, geometry.arrays, n), -1) for n in (geometry.rows, geometry.columns))
        parts = np.zeros((geometry.arrays, geometry.columns), np.int64)
        block_layer: list[int] = []
        for array in plan.arrays:
            for partition in array.partitions:
                layer = plan.layers[partition.layer]
                height, width = _extent(partition, array)
                first = len(block_layer)
                block_layer += [partition.layer] * (partition.groups[1] - partition.groups[0])
                block, in_row = _numbered(partition, partition.input_indices, layer.inputs)
                rows[:, array.id, height] = block + first, in_row
                block, out_row = _numbered(partition, partition.output_indices, layer.outputs)
                part = _parts(array, layer)
                columns[:, array.id, width] = np.repeat([block + first, out_row], len(part), axis=1)
                parts[array.id, width] = np.tile(part, len(out_row))
        return cls(
            geometry=geometry,
            block_layer=np.array([*block_layer, -1], np.int64),
            row_block=rows[0].reshape(-1),
            row_in=rows[1].reshape(-1),
            column_block=columns[0].reshape(-1),
            column_out=columns[1].reshape(-1),
            column_part=parts.reshape(-1),
        )

    def resolve(self, fault_map: FaultMap) -> _Stuck:
        """Return the faults that matter: those on a row and a column of the same layer."""
        geometry = self.geometry
        row, column = np.divmod(fault_map.cell, geometry.columns)
        column += row // geometry.rows * geometry.columns
        row_block, column_block = self.row_block[row], self.column_block[column]
        layer = self.block_layer[row_block]
        matters = np.flatnonzero((layer >= 0) & (layer == self.block_layer[column_block]))
        row, column = row[matters], column[matters]
        return _Stuck(
            layer=layer[matters],
            at_home=(row_block == column_block)[matters],
            in_row=self.row_in[row],
            out_row=self.column_out[column],
            part=self.column_part[column],
            conductance=fault_map.conductance[matters],
        )


def _extent(partition: Partition, array: ArrayPlan) -> tuple[slice, slice]:
    """Return the rows and the columns that a partition spans on its array."""
    groups, width = partition.groups[1] - partition.groups[0], len(array.slices) * len(array.roles)
    rows, columns = groups * partition.input_count, groups * partition.output_count * width
    return slice(partition.row, partition.row + rows), slice(partition.column, partition.column + columns)


def _numbered(partition: Partition, indices: list[int], size: int) -> tuple[Integers, Integers]:
    """Return block, and group * size + index, of each input or output of a partition in its order on the array."""
    groups = np.arange(*partition.groups)
    block = np.repeat(groups - partition.groups[0], len(indices))
    return block, (groups[:, None] * size + np.array(indices)).reshape(-1)


def _parts(array: ArrayPlan, layer: LayerPlan) -> Integers:
    """Return slice * cells + role of each column of one output."""
    cells = [0 if role == "plus" else 1 for role in array.roles]
    return np.array([k * layer.cells + cell for k in array.slices for cell in cells])


@dataclass(frozen=True, eq=False)
class _LayerCells:
    """A layer's cells, and how they are read.

    Attributes:
        plan: The layer.
        coding: Its coding.
        cells: Its cells, [slices * cells, groups * outputs * inputs].
        gain: float32 [groups * outputs].
    """

    plan: LayerPlan
    coding: Coding
    cells: npt.NDArray[Any] = field(repr=False)
    gain: Floats = field(repr=False)

    @classmethod
    def of(cls, deployment: Deployment, layer: LayerPlan) -> _LayerCells:
        """Open a layer."""
        coding, cells = layer_coding(deployment.target, layer), deployment.cells(layer)
        return cls(layer, coding, cells.reshape(coding.slices * coding.cells, -1), deployment.gain(layer))

    def faults(self, number: int, stuck: _Stuck) -> LayerFaults:
        """Return what stuck cells do to this layer, which has that number."""
        home, away = stuck.take(stuck.at_home), stuck.take(~stuck.at_home)
        extra = self._crossings(away)
        group, input_ = np.divmod(away.in_row, self.plan.inputs)
        inside = (group == away.out_row // self.plan.outputs) & (extra != 0)
        positions = home.out_row * self.plan.inputs + home.in_row % self.plan.inputs
        extra_positions = (away.out_row * self.plan.inputs + input_)[inside]
        index, at = _unique(np.concatenate([positions, extra_positions]))
        value = self._weights(self.cells.take(index, axis=1), at[: len(positions)], home, index // self.plan.inputs)
        np.add.at(value, at[len(positions) :], extra[inside])
        leaks = self._leaks(away.take(~inside), extra[~inside])
        return LayerFaults(layer=number, index=index, value=value, leaks=leaks)

    def _crossings(self, stuck: _Stuck) -> Floats:
        """Return the weight that each cell by itself makes of a zero one; those of one pair add up, being linear."""
        zeros = np.repeat(self.coding.zero_cells.reshape(-1, 1), len(stuck.part), axis=1)
        return self._weights(zeros, np.arange(len(stuck.part)), stuck, stuck.out_row)

    def _weights(self, cells: npt.NDArray[Any], at: Integers, stuck: _Stuck, out_row: Integers) -> Floats:
        """Return the weights that cells hold when some are stuck, float32 [weights].

        Args:
            cells: The healthy cells, [slices * cells, weights].
            at: Which weight each stuck cell belongs to.
            stuck: The stuck cells.
            out_row: group * outputs + output of each weight.
        """
        table = self.coding.cell_values
        values = (cells if table is None else table[cells]).astype(np.float32)
        values[stuck.part, at] = self._cell_values(stuck.conductance)
        difference = self.coding.combine(values.reshape(self.coding.slices, self.coding.cells, -1))
        return difference * self.gain[out_row]

    def _cell_values(self, conductance: Floats) -> Floats:
        """Return what conductances are worth in a cell: themselves, or levels (fractions, or outside the range)."""
        if not self.coding.integer:
            return conductance
        off, on = np.float32(self.coding.g_off), np.float32(self.coding.g_on)
        steps = (self.coding.levels or 0) - 1
        return ((conductance.astype(np.float64) - off) / (np.float64(on) - off) * steps).astype(np.float32)

    def _leaks(self, stuck: _Stuck, value: Floats) -> Leaks | None:
        """Return leaks in order, added up for each pair of rows; without those that come to nothing."""
        width = self.plan.groups * self.plan.inputs
        pair, at = _unique(stuck.out_row * width + stuck.in_row)
        total = np.zeros(len(pair), np.float32)
        np.add.at(total, at, value)
        pair, total = pair[total != 0], total[total != 0]
        return Leaks(in_row=pair % width, out_row=pair // width, value=total) if len(pair) else None


def _unique(keys: Integers) -> tuple[Integers, Integers]:
    """Return the distinct keys, ascending, and which of them each key is."""
    order = np.argsort(keys)
    ordered = keys[order]
    first = np.ones(len(keys), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    at = np.empty(len(keys), np.int64)
    at[order] = np.cumsum(first) - 1
    return ordered[first], at
