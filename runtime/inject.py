"""From stuck cells to weights: what each layer's matrix is on a chip with given faults.

A stuck cell inside a partition changes one weight. Where a row and a column of one array belong to the same layer but
not to the same block, the cells at their crossing hold a zero weight, and one that is stuck lets the row's input leak
into the column: within a group that is more of a weight which the layer has anyway, between groups it is a leak.
Everywhere else a stuck cell does nothing, since its row is not driven or its column is not read.

What a stuck cell is read as is up to the hardware (:mod:`rerampile.failed_cells`). Of copies that are averaged, the
weights are those of the mean cells: reading is linear.

Where slices have copies, a stuck cell changes one of three sums, of which the mean or the median counts. The mean is
linear: a third of what the cell alone would do to its weight. The median is not: it depends on the inputs, so it is
left to whoever runs the model (:class:`Votes`), but for sums of which at most one is wrong, which change nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition
from rerampile.checks import check_placement
from rerampile.deployment import Deployment, flipped_outputs, layer_coding, layer_segments, lines
from rerampile.layer_plan import LayerPlan
from rerampile.plan import Vote
from rerampile.runtime.copy_places import CopyPlaces
from rerampile.runtime.fault_map import ChipGeometry, FaultMap
from rerampile.runtime.sorting import sort_with_order
from rerampile.runtime.stuck_cells import StuckCells
from rerampile.schemes import Coding
from rerampile.segments import Segments
from rerampile.slice_copies import protected_outputs
from rerampile.target import Target

__all__ = ["Injector", "LayerCells", "LayerFaults", "Leaks", "Votes", "as_read", "column_parts"]

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
class Votes:
    """Medians of three wrong sums: to ``out_row[s]`` the median over n of ``sum(value * input)`` of sum s is added.

    The parts run over the entries of s with number n. Sums of which at most one is wrong are left out.

    Attributes:
        out_row: int64 [sums], the layer's output that each adds to.
        sum: int64 [entries], which sum.
        number: int64 [entries], 0 for the cells of the partition itself, 1 and 2 for copies.
        input: int64 [entries], the input.
        value: float32 [entries], what the stuck cell alone adds to the weight between them; not zero.
    """

    out_row: Integers
    sum: Integers
    number: Integers
    input: Integers
    value: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFaults:
    """What a chip's faults do to one layer.

    Attributes:
        layer: Position in the plan's ``layers``.
        index: int64 [weights], flat positions in the matrix [groups * outputs, inputs], each once.
        value: float32 [weights], the weights there as the faulty chip reads them.
        leaks: What flows between groups; None where nothing does.
        votes: Medians that are not zero for all inputs; None where there are none.
    """

    layer: int
    index: Integers
    value: Floats
    leaks: Leaks | None
    votes: Votes | None = None


class Injector:
    """Turns the faults of chips of one deployment into weights.

    Args:
        deployment: The deployment.

    Raises:
        PlanFormatError: The plan does not hold every weight exactly once, or partitions overlap.
    """

    def __init__(self, deployment: Deployment) -> None:
        check_placement(deployment)
        self._target = deployment.target
        self._places = _Places.of(deployment)
        self._layers = [LayerCells.of(deployment, layer) for layer in deployment.plan.layers]
        protection = deployment.plan.protection
        outputs = protected_outputs(deployment.plan)
        self._protected = [
            None if protection is None or not flags.any() else _Protected(flags, protection.slices, protection.vote)
            for flags in outputs
        ]

    def faults(self, fault_map: FaultMap) -> list[LayerFaults]:
        """Return what the faults of a chip do to each layer that they change, in the order of the plan.

        Args:
            fault_map: Its stuck cells.
        """
        found = []
        for number, stuck in enumerate(self.stuck(fault_map)):
            faults = self._layers[number].faults(number, stuck, self._protected[number])
            if len(faults.index) or faults.leaks is not None or faults.votes is not None:
                found.append(faults)
        return found

    def stuck(self, fault_map: FaultMap) -> list[StuckCells]:
        """Return the stuck cells of a chip that matter to each layer of the plan.

        Args:
            fault_map: Its stuck cells.
        """
        stuck = self._places.resolve(*as_read(self._target, self._places.geometry, fault_map))
        if self._target.failed_cells.isolates_pairs:  # which leaves a pair beside the blocks at zero, as it was
            pairs = np.array([layer.coding.cells == 2 for layer in self._layers])
            stuck = stuck.take(np.flatnonzero(stuck.at_home | ~pairs[stuck.layer]))
        if (stuck.layer[1:] < stuck.layer[:-1]).any():  # mostly, arrays lie in the order of layers
            stuck = stuck.take(np.argsort(stuck.layer, kind="stable"))
        ends = np.searchsorted(stuck.layer, np.arange(len(self._layers) + 1))
        return [stuck.take(slice(first, last)) for first, last in itertools.pairwise(ends.tolist())]


@dataclass(frozen=True, eq=False)
class _Protected:
    """What of a layer has copies: which outputs [groups * outputs], how many slices, and how three sums become one."""

    outputs: npt.NDArray[np.bool_]
    slices: int
    vote: Vote


@dataclass(frozen=True, eq=False)
class _Places:
    """What every row and column of every array is for. Blocks number all groups of all partitions; -1 is spare.

    Attributes:
        geometry: The arrays.
        block_layer: Layer of each block, and -1 at the end, where spare rows and columns find it.
        row_block: Block of each row, [arrays * rows].
        row_group: Group of each row.
        row_input: Input of each row, within its group.
        column_block: Block of each column, [arrays * columns].
        column_start: Flat position in the matrix of the first weight of each column's output.
        column_part: slice * cells + role of each column.
        column_segment: The column segment of each column: an output of a group of a partition, counted array by array;
            twins share theirs.
        column_input_segment: Which of its layer's ranges of inputs each column sums.
        copies: The copies of slices.
    """

    geometry: ChipGeometry
    block_layer: Integers
    row_block: Integers
    row_group: Integers
    row_input: Integers
    column_block: Integers
    column_start: Integers
    column_part: Integers
    column_segment: Integers
    column_input_segment: npt.NDArray[np.int32]
    copies: CopyPlaces

    @classmethod
    def of(cls, deployment: Deployment) -> _Places:
        """Lay a plan out."""
        geometry, plan = ChipGeometry.of(deployment), deployment.plan
        rows = np.full((3, geometry.arrays, geometry.rows), -1)
        columns = np.full((2, geometry.arrays, geometry.columns), -1)
        parts, segments, input_segments = np.zeros((3, geometry.arrays, geometry.columns), np.int64)
        block_layer: list[int] = []
        first_segment: dict[int, int] = {}
        ranges = [layer_segments(layer) for layer in plan.layers]
        count = 0
        for array in plan.arrays:
            first_segment[array.id] = segment = count if array.twin is None else first_segment.get(array.twin, count)
            for partition in array.partitions:
                layer = plan.layers[partition.layer]
                height, width = lines(partition, len(array.slices) * len(array.roles))
                first = len(block_layer)
                block_layer += [partition.layer] * (partition.groups[1] - partition.groups[0])
                group, input_ = _numbered(partition, partition.input_indices)
                rows[:, array.id, height] = group - partition.groups[0] + first, group, input_
                group, output = _numbered(partition, partition.output_indices)
                start = (group * layer.outputs + output) * layer.inputs
                part = column_parts(array, layer)
                columns[:, array.id, width] = np.repeat([group - partition.groups[0] + first, start], len(part), axis=1)
                flips = np.repeat(flipped_outputs(partition), len(part))
                parts[array.id, width] = np.tile(part, len(output)) ^ flips
                segments[array.id, width] = np.repeat(segment + np.arange(len(output)), len(part))
                segment += len(output)
                first_input = np.array(partition.input_indices[:1])
                input_segments[array.id, width] = ranges[partition.layer].number_of(first_input)
            count = max(count, segment)
        return cls(
            geometry=geometry,
            block_layer=np.array([*block_layer, -1], np.int64),
            row_block=rows[0].reshape(-1),
            row_group=rows[1].reshape(-1),
            row_input=rows[2].reshape(-1),
            column_block=columns[0].reshape(-1),
            column_start=columns[1].reshape(-1),
            column_part=parts.reshape(-1),
            column_segment=segments.reshape(-1),
            column_input_segment=input_segments.reshape(-1).astype(np.int32),
            copies=CopyPlaces.of(deployment, segments),
        )

    def resolve(self, cell: Integers, conductance: Floats) -> StuckCells:
        """Return the cells that matter: those on a row and a column of the same layer.

        Args:
            cell: int64 [cells], as the geometry counts them.
            conductance: float32 [cells], what each is read as, siemens.
        """
        geometry = self.geometry
        row = cell // geometry.columns  # numpy divides by one number far faster than it finds what is left over
        column = cell - (row - row // geometry.rows) * geometry.columns
        row_block, column_block = self.row_block.take(row), self.column_block.take(column)
        layer = self.block_layer[row_block]
        matters = np.flatnonzero((layer >= 0) & (layer == self.block_layer[column_block]))
        row, column, layer, at_home = (
            row.take(matters),
            column.take(matters),
            layer.take(matters),
            (row_block == column_block).take(matters),
        )
        del row_block, column_block  # workers have little room
        found = StuckCells(
            layer=layer,
            at_home=at_home,
            in_group=self.row_group.take(row),
            position=self.column_start.take(column) + self.row_input.take(row),
            part=self.column_part.take(column),
            segment=self.column_segment.take(column),
            input_segment=self.column_input_segment.take(column),
            conductance=conductance.take(matters),
            cell=cell.take(matters),
            number=np.zeros(len(matters), np.uint8),
        )
        copied = self.copies.resolve(cell, conductance, geometry)
        return found if copied is None else found.joined(copied)


def as_read(target: Target, geometry: ChipGeometry, fault_map: FaultMap) -> tuple[Integers, Floats]:
    """Return which cells are not read as programmed, ascending, and what they are read as, float32 siemens."""
    if target.failed_cells.isolates_pairs:
        cell = np.union1d(fault_map.cell, geometry.other_of_pair(fault_map.cell))
        return cell, np.zeros(len(cell), np.float32)
    low, high = np.array(target.failed_limits, np.float32)
    return fault_map.cell, np.clip(fault_map.conductance, low, high)


def _numbered(partition: Partition, indices: list[int]) -> tuple[Integers, Integers]:
    """Return group and index of each input or output of a partition in its order on the array."""
    groups = np.arange(*partition.groups)
    return np.repeat(groups, len(indices)), np.tile(np.array(indices), len(groups))


def column_parts(array: ArrayPlan, layer: LayerPlan) -> Integers:
    """Return slice * cells + role of each column of one output."""
    cells = [0 if role == "plus" else 1 for role in array.roles]
    return np.array([k * layer.cells + cell for k in array.slices for cell in cells])


@dataclass(frozen=True, eq=False)
class LayerCells:
    """A layer's cells, and how they are read.

    Attributes:
        plan: The layer.
        coding: Its coding.
        cells: Its cells, [slices * cells, groups * outputs * inputs].
        gain: Its gains, float32 [groups * outputs] or [groups * outputs, segments].
        segments: The ranges of inputs that they are for.
        adjacent: Whether all cells of a weight lie side by side on one row.
    """

    plan: LayerPlan
    coding: Coding
    cells: npt.NDArray[Any] = field(repr=False)
    gain: Floats = field(repr=False)
    segments: Segments
    adjacent: bool

    @classmethod
    def of(cls, deployment: Deployment, layer: LayerPlan) -> LayerCells:
        """Open a layer."""
        coding, cells = layer_coding(deployment.target, layer), deployment.cells(layer)
        flat = cells.reshape(coding.slices * coding.cells, -1)
        together = coding.cells == 1 or deployment.target.pair_layout == "adjacent"
        adjacent = together and coding.slices == layer.copy_count == 1
        return cls(layer, coding, flat, deployment.gain(layer), layer_segments(layer), adjacent)

    def faults(self, number: int, stuck: StuckCells, protected: _Protected | None = None) -> LayerFaults:
        """Return what stuck cells do to this layer, which has that number; ``protected`` says what of it has copies."""
        voted, votes = stuck.take(slice(0)), None
        if protected is not None:
            has_copies = stuck.at_home & protected.outputs[stuck.position // self.plan.inputs]
            has_copies &= stuck.part // self.coding.cells >= self.coding.slices - protected.slices
            voted, stuck = stuck.take(np.flatnonzero(has_copies)), stuck.take(np.flatnonzero(~has_copies))
            if protected.vote == "median":
                voted, votes = voted.take(slice(0)), self._votes(voted)
        away = stuck.take(np.flatnonzero(~stuck.at_home))
        home = stuck.take(np.flatnonzero(stuck.at_home)) if len(away.part) else stuck
        extra = self._crossings(away)
        out_row, input_ = np.divmod(away.position, self.plan.inputs)
        inside = (away.in_group == out_row // self.plan.outputs) & (extra != 0)
        position = np.concatenate([home.position, away.position[inside], voted.position])
        ordered = self.adjacent and len(position) == len(home.position)  # cells come row by row
        index, at = _runs(position) if ordered else _unique(position)
        gain = self.segments.at(self.gain, index)
        cells = [part.take(index, mode="clip") for part in self.cells]  # all are inside; looking takes a third longer
        value = self._weights(cells, at[: len(home.part)], home, gain)
        more = np.concatenate([extra[inside], self._changes(voted) / np.float32(3)])
        np.add.at(value, at[len(home.part) :], more)
        leaks = None
        if not self.plan.groups_take_turns:
            pair = out_row * (self.plan.groups * self.plan.inputs) + away.in_group * self.plan.inputs + input_
            leaks = self._leaks(pair[~inside], extra[~inside])
        return LayerFaults(layer=number, index=index, value=value, leaks=leaks, votes=votes)

    def _changes(self, stuck: StuckCells) -> Floats:
        """Return what each cell that holds part of a weight changes it by, alone."""
        slice_, role = np.divmod(stuck.part, self.coding.cells)
        held = self.cells[stuck.part, stuck.position]
        table = self.coding.cell_values
        error = self.coding.worth(stuck.conductance) - (held.astype(np.float32) if table is None else table[held])
        factor = np.array(self.coding.significances, np.float32)[slice_] * np.where(role == 0, 1, -1).astype(np.float32)
        changes: Floats = self.segments.at(self.gain, stuck.position) * factor * error
        return changes

    def _votes(self, stuck: StuckCells) -> Votes | None:
        """Return the medians that stuck cells with copies, and stuck copies, can make other than zero."""
        value = self._changes(stuck)
        wrong = np.flatnonzero(value)
        stuck, value = stuck.take(wrong), value[wrong]
        sums, which = _unique(stuck.segment * len(self.cells) + stuck.part)
        hit = np.zeros((len(sums), 3), np.bool_)
        hit[which, stuck.number] = True
        matters = hit.sum(axis=1) > 1
        chosen = np.flatnonzero(matters[which])
        if not len(chosen):
            return None
        out_row = np.empty(len(sums), np.int64)
        out_row[which], input_ = np.divmod(stuck.position, self.plan.inputs)
        return Votes(
            out_row=out_row[matters],
            sum=(np.cumsum(matters) - 1)[which[chosen]],
            number=stuck.number[chosen].astype(np.int64),
            input=input_[chosen],
            value=value[chosen],
        )

    def _crossings(self, stuck: StuckCells) -> Floats:
        """Return the weight that each cell by itself makes of a zero one; those of one pair add up, being linear.

        Its column's sum is multiplied by the gain of what that column sums, whichever row it is on. Of a copy it is the
        share that the mean has.
        """
        count = len(stuck.part)
        zeros = [np.repeat(cell, count) for cell in self.coding.zero_cells.reshape(-1)]
        sums = stuck.position // self.plan.inputs * len(self.segments.starts) + stuck.input_segment
        return self._weights(zeros, np.arange(count), stuck, self.gain.reshape(-1)[sums])

    def _weights(self, cells: Sequence[npt.NDArray[Any]], at: Integers, stuck: StuckCells, gain: Floats) -> Floats:
        """Return the weights that cells hold when some are stuck, the mean of all copies, float32 [weights].

        Args:
            cells: The healthy cells of each slice and role, [weights] each.
            at: Which weight each stuck cell belongs to.
            stuck: The stuck cells.
            gain: What multiplies each weight's difference, [weights].
        """
        table, count = self.coding.cell_values, len(gain)
        values = np.empty((len(cells), count), np.float32)
        for value, cell in zip(values, cells, strict=True):
            value[:] = cell if table is None else table[cell]
        flat, place = values.reshape(-1), stuck.part * count + at
        worth = self.coding.worth(stuck.conductance)
        if self.plan.copy_count == 1:
            flat[place] = worth
        else:  # several copies of one cell may be stuck
            np.add.at(flat, place, (worth - flat[place]) / np.float32(self.plan.copy_count))
        difference = self.coding.combine(values.reshape(self.coding.slices, self.coding.cells, count))
        return difference * gain

    def _leaks(self, pair: Integers, value: Floats) -> Leaks | None:
        """Return leaks in order, added up for each pair of rows; without those that come to nothing.

        Args:
            pair: out_row * groups * inputs + in_row of each leak.
            value: float32, its weight.
        """
        pair, at = _unique(pair)
        total = np.zeros(len(pair), np.float32)
        np.add.at(total, at, value)
        out_row, in_row = np.divmod(pair[total != 0], self.plan.groups * self.plan.inputs)
        return Leaks(in_row=in_row, out_row=out_row, value=total[total != 0]) if len(in_row) else None


def _unique(keys: Integers) -> tuple[Integers, Integers]:
    """Return the distinct keys, ascending, and which of them each key is."""
    ordered, order = sort_with_order(keys)
    distinct, number = _runs(ordered)
    at = np.empty(len(keys), np.int64)
    at[order] = number
    return distinct, at


def _runs(keys: Integers) -> tuple[Integers, Integers]:
    """Return each key once, and which of them each key is, where equal ones come one after the other."""
    first = np.ones(len(keys), np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    return keys[np.flatnonzero(first)], np.cumsum(first) - 1
