"""A deployment folder: its plan, its cells, and what its arrays look like."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition, SliceCopy
from rerampile.errors import ConfigError, PlanFormatError
from rerampile.files import CONDUCTANCES, DEPLOYED, PLAN, resolved
from rerampile.layer_plan import LayerPlan
from rerampile.plan import Plan, read_plan
from rerampile.schemes import Coding
from rerampile.segments import Segments
from rerampile.target import Target
from rerampile.tensor_file import TensorFile

__all__ = ["Deployment", "copy_span", "layer_coding", "layer_segments", "load_deployment"]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment folder as read from disk.

    Attributes:
        folder: The folder.
        plan: Its plan.
        target: The hardware that the plan is for.
        conductances: Its cells and gains, mapped into memory.
    """

    folder: Path
    plan: Plan = field(repr=False)
    target: Target
    conductances: TensorFile = field(repr=False)

    @property
    def model_path(self) -> Path:
        """The deployed ONNX model."""
        return self.folder / DEPLOYED

    def layer(self, name: str) -> LayerPlan:
        """Return a layer by name.

        Raises:
            ConfigError: There is none of that name.
        """
        for layer in self.plan.layers:
            if layer.name == name:
                return layer
        raise ConfigError(f"{self.folder}: no layer '{name}'")

    def cells(self, layer: LayerPlan) -> npt.NDArray[Any]:
        """Return a layer's cells, [slices, cells, groups * outputs, inputs], siemens or level codes, read-only.

        Raises:
            PlanFormatError: The tensor is missing, of another shape or type, or holds what no cell can hold.
        """
        coding = layer_coding(self.target, layer)
        cells = self.conductances.read(layer.cells_tensor)
        expected = (coding.slices, coding.cells, layer.groups * layer.outputs, layer.inputs)
        if cells.shape != expected or cells.dtype != coding.dtype:
            raise PlanFormatError(
                f"{self.conductances.path}: tensor '{layer.cells_tensor}': {cells.dtype} {list(cells.shape)}, "
                f"expected {coding.dtype} {list(expected)}"
            )
        return cells

    def gain(self, layer: LayerPlan) -> npt.NDArray[np.float32]:
        """Return a layer's gains as stored, float32 [groups * outputs] or [groups * outputs, segments].

        Raises:
            PlanFormatError: The tensor is missing, of another shape or type, or holds what is no finite number.
        """
        gain = self.conductances.read(layer.gain_tensor)
        expected = [layer.groups * layer.outputs]
        if layer.scale == "partition":
            expected.append(len(layer_segments(layer).starts))
        if list(gain.shape) != expected or gain.dtype != np.float32:
            raise PlanFormatError(
                f"{self.conductances.path}: tensor '{layer.gain_tensor}': {gain.dtype} {list(gain.shape)}, "
                f"expected float32 {expected}"
            )
        if not np.isfinite(gain).all():
            raise PlanFormatError(
                f"{self.conductances.path}: tensor '{layer.gain_tensor}' holds what is no finite number"
            )
        return gain

    def weights(self, layer: LayerPlan) -> npt.NDArray[np.float32]:
        """Decode a layer's weights from its cells alone, float32 [groups * outputs, inputs]."""
        gain = layer_segments(layer).spread(self.gain(layer))
        return layer_coding(self.target, layer).decode(self.cells(layer), gain)

    def array_plan(self, array_id: int) -> ArrayPlan:
        """Return an array of the plan by its id.

        Raises:
            ConfigError: There is none of that id.
        """
        if not self.plan.arrays:
            raise ConfigError(f"{self.folder}: no array {array_id}, there is none: every weight is zero")
        if not 0 <= array_id < len(self.plan.arrays):
            raise ConfigError(f"{self.folder}: no array {array_id}, expected 0 to {len(self.plan.arrays) - 1}")
        return self.plan.arrays[array_id]

    def array(self, array_id: int) -> npt.NDArray[Any]:
        """Return the physical picture of an array, [rows, columns], as it is to be programmed.

        Cells are float32 siemens or level codes. Spare cells hold ``g_off`` (code 0), but where a row and a column
        belong to the same layer they hold a zero weight: that row is driven while that column is read.
        """
        array = self.array_plan(array_id)
        codings = {number: layer_coding(self.target, self.plan.layers[number]) for number in self.layers_on(array)}
        coding = next(iter(codings.values()))  # cells of all layers are stored alike
        spare = coding.dtype.type(coding.low if coding.levels is None else 0)
        picture = np.full((self.target.rows, self.target.columns), spare, coding.dtype)
        zeros = {
            number: np.array([coding.zero_cells[k, _cell(role)] for k in array.slices for role in array.roles])
            for number, coding in codings.items()
        }
        spans = [(p, *lines(p, len(zeros[p.layer]))) for p in array.partitions]
        for p, rows, _ in spans:
            for q, _, others in spans:
                if p.layer == q.layer:
                    zero = zeros[p.layer]
                    picture[np.ix_(rows, others)] = np.tile(zero, len(others) // len(zero))
        for partition in array.partitions:
            self._program(picture, array, partition)
        for copy in array.slice_copies:
            self._copy(picture, array, copy)
        return picture

    def layers_on(self, array: ArrayPlan) -> list[int]:
        """Return the positions of the layers that have weights or copies on an array, in the order of their places."""
        homes = (self.plan.arrays[copy.array].partitions[copy.partition] for copy in array.slice_copies)
        return list(dict.fromkeys(p.layer for p in (*array.partitions, *homes)))

    def require_outside(self, path: Path) -> None:
        """Refuse to write a file into the deployment folder, over one of its own or beside them.

        Raises:
            ConfigError: The path lies in it.
        """
        if resolved(path).is_relative_to(resolved(self.folder)):
            raise ConfigError(
                f"{path}: lies in the deployment '{self.folder}', which holds its own files only; name another place"
            )

    def _program(self, picture: npt.NDArray[Any], array: ArrayPlan, partition: Partition) -> None:
        """Write the cells of one partition into the picture of its array."""
        layer = self.plan.layers[partition.layer]
        cells = self.cells(layer)
        roles = np.array([_cell(role) for role in array.roles])
        slices = np.array(array.slices)
        for group, rows, columns in partition_blocks(partition, len(roles) * len(slices)):
            outputs = np.array(partition.output_indices) + group * layer.outputs
            block = cells[np.ix_(slices, roles, outputs, np.array(partition.input_indices))]
            flips = flipped_outputs(partition)[group - partition.groups[0]]
            if flips.any():
                swapped = np.ix_(slices, 1 - roles, outputs[flips], np.array(partition.input_indices))
                block[:, :, flips] = cells[swapped]
            picture[np.ix_(rows, columns)] = block.transpose(3, 2, 0, 1).reshape(len(rows), -1)

    def _copy(self, picture: npt.NDArray[Any], array: ArrayPlan, copy: SliceCopy) -> None:
        """Write the cells of one copy into the picture of its array: those of the most significant slices again."""
        home = self.plan.arrays[copy.array].partitions[copy.partition]
        layer, slices = self.plan.layers[home.layer], self.copied_slices
        roles = np.array([_cell(role) for role in array.roles])
        outputs = np.array(copy.output_indices) + home.groups[0] * layer.outputs
        block = self.cells(layer)[
            np.ix_(np.array(array.slices)[-slices:], roles, outputs, np.array(copy.input_indices))
        ]
        rows, columns = copy_span(copy, array, slices)
        picture[rows, columns] = block.transpose(3, 2, 0, 1).reshape(rows.stop - rows.start, -1)

    @property
    def copied_slices(self) -> int:
        """How many slices of a weight have copies, the most significant ones."""
        return 0 if self.plan.protection is None else self.plan.protection.slices


def lines(partition: Partition, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows and the columns of a partition on its array, int64, ascending: by group, input or output, cell.

    Args:
        partition: The partition.
        width: Columns that one output takes.
    """
    groups = partition.groups[1] - partition.groups[0]  # places are listed for one group alone
    listed, slots = partition.input_rows, partition.output_slots
    rows = np.arange(groups * partition.input_count) if listed is None else np.array(listed, np.int64)
    columns = np.arange(groups * partition.output_count * width)
    if slots is not None:
        columns = (np.array(slots, np.int64)[:, None] * width + np.arange(width)).reshape(-1)
    return partition.row + rows, partition.column + columns


def partition_blocks(
    partition: Partition, width: int
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield (group, rows, columns) of each group of a partition: where its matrix lies on the array.

    Args:
        partition: The partition.
        width: Columns that one output takes.
    """
    rows, columns = lines(partition, width)
    count = partition.groups[1] - partition.groups[0]
    yield from zip(range(*partition.groups), rows.reshape(count, -1), columns.reshape(count, -1), strict=True)


def flipped_outputs(partition: Partition) -> npt.NDArray[np.bool_]:
    """Return which outputs of a partition have columns of changed roles, [groups, outputs]."""
    flips = np.zeros((partition.groups[1] - partition.groups[0], partition.output_count), np.bool_)
    flips.reshape(-1)[partition.flipped or []] = True
    return flips


def footprint(partition: Partition, width: int) -> tuple[slice, slice]:
    """Return all rows and all columns that a partition spans, those that it leaves free between others included."""
    groups = partition.groups[1] - partition.groups[0]
    height, breadth = groups * partition.input_count, groups * partition.output_count
    if partition.input_rows:
        height = partition.input_rows[-1] + 1
    if partition.output_slots:
        breadth = partition.output_slots[-1] + 1
    row, column = partition.row, partition.column
    return slice(row, row + height), slice(column, column + breadth * width)


def copy_span(copy: SliceCopy, array: ArrayPlan, slices: int) -> tuple[slice, slice]:
    """Return the rows and the columns of a copy of so many slices on its array."""
    width = copy.output_count * slices * len(array.roles)
    return slice(copy.row, copy.row + copy.input_count), slice(copy.column, copy.column + width)


def _cell(role: str) -> int:
    return 0 if role == "plus" else 1


def layer_coding(target: Target, layer: LayerPlan) -> Coding:
    """Return the coding of a layer's weights, from the plan alone.

    Raises:
        PlanFormatError: The common modes are not one for each slice of ``optimal``.
    """
    expected = layer.slices if layer.scheme == "optimal" else 0
    if len(layer.common_modes or ()) != expected:
        raise PlanFormatError(
            f"layer '{layer.name}': {len(layer.common_modes or ())} common modes, expected {expected} for scheme "
            f"{layer.scheme} in {layer.slices} slices; the plan was changed"
        )
    return Coding(
        scheme=layer.scheme,
        g_off=target.cell.g_off,
        g_on=target.cell.g_on,
        levels=target.cell.levels,
        level_table=target.cell.level_table,
        slices=layer.slices,
        common_modes=None if layer.common_modes is None else tuple(layer.common_modes),
    )


def layer_segments(layer: LayerPlan) -> Segments:
    """Return the ranges of a layer's inputs that its gains are for.

    Raises:
        PlanFormatError: They are not one after another from the first input to the last, or there for another scale
            than ``partition``.
    """
    if layer.scale != "partition" and layer.segments is msgspec.UNSET:
        return Segments.whole(layer.inputs)
    ranges = [] if layer.segments is msgspec.UNSET else layer.segments
    ends = [0, *(last for _, last in ranges)]
    joined = [first for first, _ in ranges] == ends[:-1] and ends[-1] == layer.inputs
    if layer.scale != "partition" or not joined or not all(first < last for first, last in ranges):
        raise PlanFormatError(
            f"layer '{layer.name}': scale {layer.scale} with segments {reprlib.repr([list(each) for each in ranges])}, "
            f"expected ranges one after another from 0 to {layer.inputs} for scale partition, none for others; the "
            f"plan was changed"
        )
    return Segments(tuple(first for first, _ in ranges), layer.inputs)


def load_deployment(folder: str | os.PathLike[str]) -> Deployment:
    """Read a deployment folder.

    Args:
        folder: The folder, or its ``plan.json``.

    Raises:
        PlanFormatError: The folder is no deployment, incomplete, damaged, or of a newer format. Checksums are compared
            by ``rerampile verify``, not here.
    """
    path = Path(folder)
    path = path.parent if path.name == PLAN and path.is_file() else path
    if not (path / PLAN).is_file():
        raise PlanFormatError(f"{path}: no {PLAN} in it, expected a deployment folder written by 'rerampile compile'")
    plan = read_plan(path / PLAN)
    for name, record in plan.files.items():
        if Path(name).name != name:
            raise PlanFormatError(f"{path / PLAN}: $.files: '{name}' is a path, expected the name of a file beside it")
        file = path / name
        if not file.is_file():
            raise PlanFormatError(f"{path}: file '{name}' of the plan is missing; copy the whole folder")
        if file.stat().st_size != record.bytes:
            raise PlanFormatError(
                f"{file}: {file.stat().st_size} bytes, expected {record.bytes}; it was truncated or changed"
            )
    try:
        target = Target.from_dict(plan.target, where=f"{path / PLAN}: $.target")
    except ConfigError as error:
        raise PlanFormatError(str(error)) from error
    return Deployment(folder=path, plan=plan, target=target, conductances=TensorFile(path / CONDUCTANCES))
