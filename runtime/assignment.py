"""Which input is on which row of an array, and which output on which columns: the places that suit a chip's faults.

Sums are put in order digitally, and each array is sent its inputs by itself, so that both orders are free, and rows and
columns that a piece of a matrix leaves spare may be taken instead of bad ones. The cost of output ``o`` at a place is
``gain[o]^2 sum_i E[x_i^2] e^2`` with the errors ``e`` that the place's stuck cells would leave, and that of an input
the same, summed over the outputs that lie there; both are linear assignment problems (permutation of rows and columns
for a known chip: Chen et al., DATE 2017; Liu et al., DAC 2017), which are solved once each: more turns bring little.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from rerampile.array_plan import ArrayPlan, Partition
from rerampile.background import side_by_side
from rerampile.deployment import Deployment, layer_coding, layer_segments
from rerampile.plan import Plan
from rerampile.runtime.compensation import HitWeights
from rerampile.runtime.fault_map import ChipGeometry, FaultMap
from rerampile.runtime.inject import as_read, column_parts
from rerampile.runtime.stuck_cells import StuckCells
from rerampile.schemes import Coding, row_chunks
from rerampile.segments import Segments

__all__ = ["Assignment", "assigned"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_STAY = 1e-6  # of the mean cost of a line: what moving has to bring


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Where a chip's faults hurt least.

    Attributes:
        deployment: The same, its plan with other places.
        moved: Inputs and outputs of partitions with another row or other columns.
    """

    deployment: Deployment
    moved: int


def assigned(
    deployment: Deployment, faults: FaultMap, moments: Mapping[int, Floats], *, compensating: bool, flipping: bool
) -> Assignment:
    """Give inputs and outputs the rows and columns of their arrays that leave least error.

    Partitions of several groups, whose blocks lie along the diagonal, and arrays without faults stay as they are. Spare
    rows and columns behind a partition, up to the next one of its array, may be taken.

    Args:
        deployment: The compiled deployment.
        faults: The chip's stuck cells.
        moments: By position of the layer in the plan: mean of x x^T, float32 [groups, inputs, inputs]. Inputs of other
            layers count alike.
        compensating: Whether healthy cells of a weight will make up for stuck ones.
        flipping: Whether columns will change roles where that leaves less error.
    """
    plan = deployment.plan
    read = as_read(deployment.target, ChipGeometry.of(deployment), faults)
    pieces: list[list[_Room]] = [[] for _ in plan.layers]
    for room in _rooms(deployment):
        pieces[room.partition.layer].append(room)

    def one(number: int) -> list[tuple[_Room, Partition, int]]:
        if not pieces[number]:
            return []
        layer = _Layer.of(deployment, number, moments.get(number), compensating, flipping)
        sites = [(room, _Sites.of(deployment, room, layer.coding, read)) for room in pieces[number]]
        return [(room, *layer.place(room, stuck)) for room, stuck in sites if len(stuck.row)]

    partitions = [list(array.partitions) for array in plan.arrays]
    moved = 0
    for room, partition, count in itertools.chain.from_iterable(side_by_side(one, range(len(plan.layers)))):
        partitions[room.array.id][room.place] = partition
        moved += count
    return Assignment(deployment=dataclasses.replace(deployment, plan=with_partitions(plan, partitions)), moved=moved)


def with_partitions(plan: Plan, partitions: list[list[Partition]]) -> Plan:
    """Return a plan with other partitions, by array; those of the second of twins are those of the first."""
    first = [array.id if array.twin is None else min(array.id, array.twin) for array in plan.arrays]
    arrays = [
        msgspec.structs.replace(array, partitions=partitions[number])
        for array, number in zip(plan.arrays, first, strict=True)
    ]
    return msgspec.structs.replace(plan, arrays=arrays)


@dataclass(frozen=True)
class _Room:
    """A partition of one group, and the rows and columns that it may take.

    Attributes:
        array: Its array; the first of twins.
        place: Its position on it.
        partition: The partition.
        rows: Rows from its first one to that of the next partition, or to the end of the array.
        slots: The same of columns, counted in outputs.
    """

    array: ArrayPlan
    place: int
    partition: Partition
    rows: int
    slots: int


def _rooms(deployment: Deployment) -> Iterator[_Room]:
    target = deployment.target
    for array in deployment.plan.arrays:
        if array.is_second_twin:
            continue
        width = len(array.slices) * len(array.roles)
        for place, partition in enumerate(array.partitions):
            if partition.groups[1] - partition.groups[0] == 1:
                behind = [p.row for p in array.partitions if p.row > partition.row]
                beside = [p.column for p in array.partitions if p.column > partition.column]
                rows = min(behind, default=target.rows) - partition.row
                columns = min(beside, default=target.columns) - partition.column
                yield _Room(array, place, partition, rows, columns // width)


@dataclass(frozen=True, eq=False)
class _Sites:
    """The places for weights in a room that have stuck cells, by row and slot.

    Attributes:
        row: int64 [sites], counted from the first row of the room.
        slot: int64 [sites], the same of outputs.
        fixed: float32 [sites], what stuck cells add to the difference.
        turned: The same where roles are changed.
        least: float32 [sites], least difference that the healthy cells can form with them.
        most: The largest.
        stuck: float32 [parts, sites], significance and sign of each stuck cell, 0 for healthy ones.
        stuck_turned: The same where roles are changed.
    """

    row: Integers
    slot: Integers
    fixed: Floats
    turned: Floats
    least: Floats
    most: Floats
    stuck: Floats
    stuck_turned: Floats

    @classmethod
    def of(cls, deployment: Deployment, room: _Room, coding: Coding, read: tuple[Integers, Floats]) -> _Sites:
        """Gather the stuck cells of a room, on its array and its twin, from all cells and what they are read as."""
        target, layer = deployment.target, deployment.plan.layers[room.partition.layer]
        arrays = [room.array] if room.array.twin is None else [room.array, deployment.plan.arrays[room.array.twin]]
        area, width = target.rows * target.columns, len(room.array.slices) * len(room.array.roles)
        cells, conductances = read
        position, part, conductance = [], [], []
        for array in arrays:
            first, last = np.searchsorted(cells, [array.id * area, (array.id + 1) * area])
            row, column = np.divmod(cells[first:last] - array.id * area, target.columns)
            row, (slot, cell) = row - room.partition.row, np.divmod(column - room.partition.column, width)
            inside = np.flatnonzero((row >= 0) & (row < room.rows) & (slot >= 0) & (slot < room.slots))
            position.append(row[inside] * room.slots + slot[inside])
            part.append(column_parts(array, layer)[cell[inside]])
            conductance.append(conductances[first:last][inside])
        none = np.zeros(sum(map(len, part)), np.int64)
        stuck_cells = StuckCells(
            layer=none,
            at_home=none == 0,
            in_group=none,
            position=np.concatenate(position),
            part=np.concatenate(part),
            segment=none,
            input_segment=none,
            conductance=np.concatenate(conductance),
            cell=none,
            number=none,
        )
        hit = HitWeights.of(coding, stuck_cells)
        row, slot = np.divmod(hit.index, room.slots)
        least, most = hit.reach(coding)
        turned = hit.turned(np.ones(len(row), np.bool_)) if coding.cells == 2 else hit
        signs = coding.signs.astype(np.float32)[:, :, None]
        (fixed, stuck), (fixed_turned, stuck_turned) = (
            (h.fixed(coding).astype(np.float32), (signs * h.stuck).reshape(coding.slices * coding.cells, len(row)))
            for h in (hit, turned)
        )
        return cls(
            row, slot, fixed, fixed_turned, least.astype(np.float32), most.astype(np.float32), stuck, stuck_turned
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """What a layer asks of places.

    Attributes:
        coding: Its coding.
        wanted: float32 [1, groups * outputs, inputs], differences; without compensation the value of each cell,
            [slices * cells, groups * outputs, inputs].
        gain: float64 [groups * outputs, segments], squared.
        segments: The ranges of inputs that gains are for.
        power: float64 [groups, inputs], mean of x^2.
        outputs: Outputs of a group.
        compensating: Whether healthy cells make up for stuck ones.
        flipping: Whether columns change roles.
    """

    coding: Coding
    wanted: Floats
    gain: Doubles
    segments: Segments
    power: Doubles
    outputs: int
    compensating: bool
    flipping: bool

    @classmethod
    def of(
        cls, deployment: Deployment, number: int, moments: Floats | None, compensating: bool, flipping: bool
    ) -> _Layer:
        layer = deployment.plan.layers[number]
        coding, cells = layer_coding(deployment.target, layer), deployment.cells(layer)
        if compensating:
            wanted = coding.difference(cells)[None]
        else:
            values = cells if coding.cell_values is None else coding.cell_values[cells]
            wanted = values.astype(np.float32).reshape(-1, *values.shape[2:])
        power = np.ones((layer.groups, layer.inputs))
        return cls(
            coding=coding,
            wanted=wanted,
            gain=np.square(deployment.gain(layer).astype(np.float64)).reshape(layer.groups * layer.outputs, -1),
            segments=layer_segments(layer),
            power=power if moments is None else np.einsum("gii->gi", moments).astype(np.float64),
            outputs=layer.outputs,
            compensating=compensating,
            flipping=flipping and coding.cells == 2,
        )

    def place(self, room: _Room, sites: _Sites) -> tuple[Partition, int]:
        """Return the partition of a room with the best places found, and how many inputs and outputs were moved."""
        partition = room.partition
        group = partition.groups[0]
        inputs = np.array(partition.input_indices)
        outputs = np.array(partition.output_indices)
        rows = group * self.outputs + outputs
        block = np.ascontiguousarray(self.wanted[:, rows[:, None], inputs])
        segment = self.segments.number_of(inputs[:1])  # of a partition, whose inputs have one
        by_output = _Axis(block, self.gain[rows, segment], sites.slot, room.slots)
        by_input = _Axis(np.ascontiguousarray(block.swapaxes(1, 2)), self.power[group, inputs], sites.row, room.rows)
        slot, row = np.array(partition.slot_places), np.array(partition.row_places)
        before = slot, row
        flips = np.zeros(room.slots, np.bool_)
        straight, changed = self._costs(sites, by_output, by_input, row, None)
        slot = _best(np.minimum(straight, changed), slot)
        flips[slot] = (changed < straight)[slot, np.arange(len(slot))]
        costs, _ = self._costs(sites, by_input, by_output, slot, flips[sites.slot])
        row = _best(costs, row)
        changes = _listed("output", "output_slots", outputs, before[0], slot)
        changes |= _listed("input", "input_rows", inputs, before[1], row)
        moved = int(np.count_nonzero(slot != before[0]) + np.count_nonzero(row != before[1]))
        return msgspec.structs.replace(partition, **changes), moved

    def _costs(
        self, sites: _Sites, along: _Axis, across: _Axis, lies: Integers, turned: Flags | None
    ) -> tuple[Doubles, Doubles]:
        """Return the cost of each line of one axis at each of its places, [places, lines], with roles kept and changed.

        Args:
            sites: The stuck cells.
            along: The axis whose lines are to be placed.
            across: The other one.
            lies: Where the lines of the other one lie.
            turned: bool [sites], whether roles are changed; None for both ways.
        """
        held = np.full(across.places, -1)
        held[lies] = np.arange(len(lies))
        line = held[across.site]
        order = np.flatnonzero(line >= 0)
        order = order[np.argsort(along.site[order], kind="stable")]
        both = turned is None and self.flipping
        found = [np.zeros((along.places, len(along.weight))) for _ in range(1 + both)]
        for chunk in row_chunks((len(order), len(along.weight))):
            chosen = order[chunk]
            place = along.site[chosen]
            first = np.flatnonzero(np.diff(place, prepend=-1))
            wanted = across.block[:, line[chosen]]
            weight = across.weight[line[chosen], None].astype(np.float32)
            for way, costs in enumerate(found):
                change = np.full(len(chosen), way > 0) if turned is None else turned[chosen]
                error = np.square(self._errors(sites, chosen, change, wanted)) * weight
                costs[place[first]] += np.add.reduceat(error, first, axis=0)
        return found[0] * along.weight, found[-1] * along.weight

    def _errors(self, sites: _Sites, chosen: Integers, turned: Flags, wanted: Floats) -> Floats:
        """Return the errors that sites leave on weights, [sites, lines], in units of the difference.

        Args:
            sites: The stuck cells.
            chosen: Which of them.
            turned: Whether roles are changed there.
            wanted: What the weights should be, [1 or parts, sites, lines].
        """
        if self.compensating:
            least = np.where(turned, -sites.most[chosen], sites.least[chosen])[:, None]
            most = np.where(turned, -sites.least[chosen], sites.most[chosen])[:, None]
            return np.asarray(np.clip(wanted[0], least, most) - wanted[0])
        fixed = np.where(turned, sites.turned[chosen], sites.fixed[chosen])[:, None]
        stuck = np.where(turned, sites.stuck_turned[:, chosen], sites.stuck[:, chosen])
        return np.asarray(fixed - np.einsum("ps,psl->sl", stuck, wanted))


@dataclass(frozen=True)
class _Axis:
    """The inputs or the outputs of a piece, as lines that need places.

    Attributes:
        block: What weights should be, [1 or parts, lines, lines of the other axis], contiguous.
        weight: What errors of each line are multiplied by, float64 [lines].
        site: Place of each stuck cell along it, int64 [sites].
        places: How many places there are.
    """

    block: Floats
    weight: Doubles
    site: Integers
    places: int


def _best(costs: Doubles, lies: Integers) -> Integers:
    """Return the best place of each line: where it lies, where another one brings nothing.

    Args:
        costs: [places, lines].
        lies: Where the lines lie now.
    """
    lines = np.arange(len(lies))
    now = float(costs[lies, lines].sum())
    if not now:
        return lies
    costs[lies, lines] -= _STAY * now / len(lies)
    place: Integers = linear_sum_assignment(costs.T)[1].astype(np.int64)
    return place


def _listed(axis: str, places: str, indices: Integers, before: Integers, after: Integers) -> dict[str, Any]:
    """Return the fields of a partition that say which line lies where; none where nothing was moved."""
    if np.array_equal(before, after):
        return {}
    order = np.argsort(after)
    lies = after[order].tolist()
    return {
        f"{axis}s": None,
        f"{axis}_index": indices[order].tolist(),
        places: None if lies == list(range(len(lies))) else lies,
    }
