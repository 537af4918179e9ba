"""What a plan says of arrays: what sits where, and which weights take no cells at all."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rerampile.plan_record import Count, Range, Record

__all__ = ["ArrayPlan", "Partition", "Region", "SliceCopy", "span_fields"]


class _Rectangle:
    """Part of a group's matrix: a range or a list of its inputs, by a range or a list of its outputs."""

    __slots__ = ()

    inputs: Range | None
    outputs: Range | None
    input_index: list[int] | None
    output_index: list[int] | None

    @property
    def input_count(self) -> int:
        """Inputs, so rows, of one group."""
        return self.inputs[1] - self.inputs[0] if self.inputs is not None else len(self.input_index or ())

    @property
    def output_count(self) -> int:
        """Outputs of one group."""
        return self.outputs[1] - self.outputs[0] if self.outputs is not None else len(self.output_index or ())

    @property
    def input_indices(self) -> list[int]:
        """The inputs in the order of their rows."""
        return list(range(*self.inputs)) if self.inputs is not None else list(self.input_index or ())

    @property
    def output_indices(self) -> list[int]:
        """The outputs in the order of their columns."""
        return list(range(*self.outputs)) if self.outputs is not None else list(self.output_index or ())


def span_fields(axis: str, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return ascending indices as a range where they are one, else as a list, under the fields of a rectangle.

    Args:
        axis: ``input`` or ``output``.
        indices: int64, at least one.
    """
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first == len(indices):
        return {f"{axis}s": (first, last)}
    return {f"{axis}_index": indices.tolist()}


class Partition(Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """The piece of a layer's matrices that sits on one array.

    ``inputs`` and ``outputs`` are ranges of one group's matrix, or lists of its indices where rows or columns were
    left out. A partition of several groups is block-diagonal: group ``groups[0] + k`` starts ``k`` times its own rows
    and columns further.

    Attributes:
        layer: Position in ``layers``.
        row: First row on the array.
        column: First column on the array.
        groups: The layer's groups.
        inputs: Range of inputs, in row order.
        outputs: Range of outputs, in column order.
        input_index: The inputs in row order, where they are no range; ascending but where a chip was programmed.
        output_index: The outputs in column order, where they are no range; ascending but where a chip was programmed.
        input_rows: Where a chip was programmed and rows between were left free: the row of each input, counted from
            ``row``, ascending. Of partitions of one group.
        output_slots: Where columns between were left free: the place of each output, counted from ``column`` in outputs
            (of ``width`` columns each), ascending. Of partitions of one group.
        replica: Number of the replica, for layers held several times for throughput: each serves other inputs.
        copy: Number of the copy of those that are averaged, all of which serve the same inputs.
        flipped: Numbers, ascending, of the outputs whose columns have changed roles: plus stands where minus would,
            and minus where plus would. Output ``b`` of group ``groups[0] + k`` has number ``k * outputs + b`` for as
            many outputs as a group of the partition has.
    """

    layer: Count
    row: Count
    column: Count
    groups: Range
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None
    input_rows: list[Count] | None = None
    output_slots: list[Count] | None = None
    replica: Count = 0
    copy: Count = 0
    flipped: list[Count] | None = None

    @property
    def row_places(self) -> list[int]:
        """The rows of a group's inputs, counted from its first."""
        return list(range(self.input_count)) if self.input_rows is None else self.input_rows

    @property
    def slot_places(self) -> list[int]:
        """The places of a group's outputs, counted from its first, in outputs."""
        return list(range(self.output_count)) if self.output_slots is None else self.output_slots


class SliceCopy(Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """Copies of the most significant slices of some weights of a partition, on cells that hold nothing else.

    They are read with no other rows than theirs driven, so that what lies beside them does not count.

    Attributes:
        array: The array of the partition; of twins the one with the lower id.
        partition: Position of the partition in the array's ``partitions``.
        number: 1 or 2: which copy it is.
        row: First row on the array where the copy is.
        column: First column there.
        inputs: Range of inputs, in row order.
        outputs: Range of outputs, in column order.
        input_index: The inputs, ascending, where they are no range.
        output_index: The outputs, ascending, where they are no range.
    """

    array: Count
    partition: Count
    number: Literal[1, 2]
    row: Count
    column: Count
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None


class ArrayPlan(Record, kw_only=True, frozen=True, omit_defaults=True):
    """One crossbar array. ``roles`` and ``slices`` say which cells of a weight its columns hold.

    Attributes:
        id: Position in ``arrays``.
        chip: Chip of the target.
        tile: Tile of the chip.
        core: Core of the tile.
        array: Array of the core.
        roles: Which cells of a pair the array holds.
        slices: Which slices it holds, least significant first.
        partitions: What sits on it.
        twin: The array with the other cells of the same weights; null where it holds both.
        slice_copies: Copies of most significant slices in cells that no partition needs; left out where there are none.
    """

    id: Count
    chip: Count
    tile: Count
    core: Count
    array: Count
    roles: list[Literal["plus", "minus"]]
    slices: list[Count]
    partitions: list[Partition]
    twin: Count | None = None
    slice_copies: list[SliceCopy] = []

    @property
    def is_second_twin(self) -> bool:
        """Whether an earlier array holds the same weights, with their other cells."""
        return self.twin is not None and self.twin < self.id


class Region(Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """A rectangle of a layer's matrix that takes no cells: all its weights are zero.

    Attributes:
        layer: Position in ``layers``.
        reason: Why it takes none.
        group: The layer's group.
        inputs: Range of inputs.
        outputs: Range of outputs.
        input_index: The inputs, ascending, where they are no range.
        output_index: The outputs, ascending, where they are no range.
    """

    layer: Count
    reason: Literal["zero"]
    group: Count
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None
