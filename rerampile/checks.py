"""What must hold in every plan, checked from the plan and the conductance file alone."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition, Region
from rerampile.deployment import Deployment, footprint, layer_coding, layer_segments
from rerampile.errors import CapacityError, PlanFormatError
from rerampile.files import CONDUCTANCES, DEPLOYED, MASKS, PLAN, REFERENCE
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import file_sha256
from rerampile.plan import Plan, plan_checksum
from rerampile.schemes import Coding, row_chunks
from rerampile.slice_copies import check_slice_copies

__all__ = ["check_checksums", "check_placement", "decode_rows", "weight_bytes"]

Flags = npt.NDArray[np.bool_]

_LARGEST_RANK = 32
_PAGES_HELD = 1 << 26  # bytes of the conductance file that decoding keeps in memory


def check_checksums(deployment: Deployment) -> None:
    """Compare the plan with its own checksum, and every other file with the one that the plan records.

    Raises:
        PlanFormatError: A file was changed, or one that every such folder has is not in the plan.
    """
    expected = {CONDUCTANCES, DEPLOYED, REFERENCE}
    if any(layer.mask is not None for layer in deployment.plan.layers):
        expected.add(MASKS)
    path = deployment.folder / PLAN
    _compare_hashes(path, plan_checksum(path.read_bytes(), deployment.plan), deployment.plan.plan_sha256)
    if missing := expected - deployment.plan.files.keys():
        raise PlanFormatError(f"{deployment.folder / PLAN}: $.files: '{min(missing)}' is missing; the plan was changed")
    for name, record in deployment.plan.files.items():
        _compare_hashes(deployment.folder / name, file_sha256(deployment.folder / name), record.sha256)


def _compare_hashes(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise PlanFormatError(
            f"{path}: sha256 {found[:16]}…, expected {expected[:16]}…; it was changed after it was compiled"
        )


def check_placement(deployment: Deployment) -> None:
    """Check that every weight sits in exactly one place, in one of each copy where there are several.

    No two partitions may share a row or a column.

    Raises:
        PlanFormatError: A weight is missing or held twice, partitions overlap, leave their array, or twins differ, or
            the sum of a partition would have two gains.
    """
    plan = deployment.plan
    for layer in plan.layers:
        deployment.cells(layer)  # refuses matrices that the file does not hold, before memory is taken for them
        deployment.gain(layer)
        _check_view(deployment, layer)
    addresses: set[int] = set()
    for number, array in enumerate(plan.arrays):
        where = f"$.arrays[{number}]"
        if array.id != number or not (array.partitions or array.slice_copies):
            raise PlanFormatError(
                f"{where}: id {array.id} with {len(array.partitions)} partitions, expected id {number}"
            )
        for partition in array.partitions:
            if not 0 <= partition.layer < len(plan.layers):
                raise PlanFormatError(f"{where}: layer {partition.layer}, expected 0 to {len(plan.layers) - 1}")
            first, last = partition.groups
            if not first < last <= plan.layers[partition.layer].groups:
                raise PlanFormatError(
                    f"{where}: groups [{first}, {last}), expected some of {plan.layers[partition.layer].groups}"
                )
            _check_places(partition, where)
            if partition.copy >= (copies := plan.layers[partition.layer].copy_count):
                raise PlanFormatError(f"{where}: copy {partition.copy}, expected 0 to {copies - 1}")
            _check_flips(plan, partition, where)
        _check_address(deployment, array, where, addresses)
        _check_roles(deployment, array, where)
        _check_array(deployment, array, where)
    for number, region in enumerate(plan.skipped):
        if not 0 <= region.layer < len(plan.layers):
            raise PlanFormatError(f"$.skipped[{number}]: layer {region.layer}, expected 0 to {len(plan.layers) - 1}")
    parts: list[list[_Part]] = [[] for _ in plan.layers]
    for number, part in _parts(plan):
        parts[number].append(part)
    for layer, own in zip(plan.layers, parts, strict=True):
        _check_copies(layer, own)
    check_slice_copies(deployment)


# A group of a layer, a rectangle of its matrix, and where the plan has it.
_Part = tuple[int, Partition | Region, str]


def _parts(plan: Plan) -> Iterator[tuple[int, _Part]]:
    """Yield each rectangle of a plan, whether it has cells or is skipped, with the number of its layer."""
    for number, array in enumerate(plan.arrays):
        if array.roles[0] == "plus":  # twins hold the same weights
            for partition in array.partitions:
                for group in range(*partition.groups):
                    yield partition.layer, (group, partition, f"$.arrays[{number}]")
    for number, region in enumerate(plan.skipped):
        yield region.layer, (region.group, region, f"$.skipped[{number}]")


def _check_copies(layer: LayerPlan, parts: list[_Part]) -> None:
    """Check each copy of a layer; what takes no cells takes none in any of them."""
    copies: dict[int, list[_Part]] = {}
    for part in parts:
        if isinstance(part[1], Partition):
            copies.setdefault(part[1].copy, []).append(part)
    if layer.copy_count > max(1, len(copies)):
        missing = next(copy for copy in range(layer.copy_count) if copy not in copies)
        raise PlanFormatError(
            f"layer '{layer.name}': copy {missing} of {layer.copy_count} sits on no array, expected some for each"
        )
    skipped = [part for part in parts if isinstance(part[1], Region)]
    for placed in copies.values() or [[]]:
        _check_cover(layer, placed + skipped)


def _check_cover(layer: LayerPlan, parts: list[_Part]) -> None:
    """Check that rectangles hold each weight of a layer once: all are painted, and nothing was painted twice."""
    cover = np.zeros((layer.groups * layer.outputs, layer.inputs), np.bool_)
    area = sum(_paint(cover, layer, *part) for part in parts)
    painted = int(np.count_nonzero(cover))
    if painted < area:  # once more, to tell where
        cover[:] = False
        for part in parts:
            _paint(cover, layer, *part, once=True)
    if painted < cover.size:
        output, input_ = np.unravel_index(int(cover.argmin()), cover.shape)
        raise PlanFormatError(f"layer '{layer.name}': weight [{output}, {input_}] sits in 0 places, expected 1")


def _paint(
    cover: Flags, layer: LayerPlan, group: int, part: Partition | Region, where: str, *, once: bool = False
) -> int:
    """Note where the weights of a rectangle sit and return how many; ``once`` refuses those that sit somewhere."""
    inputs, outputs = _indices(part, "input", layer.inputs, where), _indices(part, "output", layer.outputs, where)
    if not 0 <= group < layer.groups:
        raise PlanFormatError(f"{where}: group {group}, expected 0 to {layer.groups - 1}")
    if isinstance(part, Partition):
        _check_gain(layer, inputs, where)
    rows = cover[group * layer.outputs : (group + 1) * layer.outputs]
    place: Any = (outputs, inputs)
    if not (isinstance(inputs, slice) and isinstance(outputs, slice)):
        place = np.ix_(np.arange(layer.outputs)[outputs], np.arange(layer.inputs)[inputs])
    if once and rows[place].any():
        output, input_ = (int(axis[0]) for axis in np.nonzero(rows[place]))
        raise PlanFormatError(
            f"{where}: layer '{layer.name}': weight [{output}, {input_}] of the part sits in 2 places, expected 1"
        )
    rows[place] = True
    return part.input_count * part.output_count


def _check_gain(layer: LayerPlan, inputs: slice | npt.NDArray[np.int64], where: str) -> None:
    """Check that inputs of a partition lie in one segment: what a column sums is multiplied by one gain."""
    first, last = (inputs.start, inputs.stop - 1) if isinstance(inputs, slice) else (int(inputs[0]), int(inputs[-1]))
    if np.ptp(layer_segments(layer).number_of(np.array([first, last]))):
        raise PlanFormatError(
            f"{where}: layer '{layer.name}': inputs {first} to {last} on one array are of two segments, which have "
            f"gains of their own"
        )


def _indices(part: Partition | Region, axis: str, size: int, where: str) -> slice | npt.NDArray[np.int64]:
    """Return the range or list of one axis, exactly one of which is given and inside the matrix."""
    span, listed = getattr(part, f"{axis}s"), getattr(part, f"{axis}_index")
    if (span is None) == (listed is None):
        raise PlanFormatError(f"{where}: expected either '{axis}s' or '{axis}_index'")
    first, last = (span[0], span[1] - 1) if span is not None else (min(listed, default=0), max(listed, default=-1))
    if not 0 <= first <= last < size:
        raise PlanFormatError(
            f"{where}: {axis}s {reprlib.repr(list(span or listed))}, expected some of 0 to {size - 1}"
        )
    if span is not None:
        return slice(*span)
    indices = np.array(listed, np.int64)
    if isinstance(part, Partition):  # other orders are those of programmed chips
        indices = np.sort(indices)
    if (np.diff(indices) <= 0).any():
        wrong = "lists one twice" if isinstance(part, Partition) else "is not ascending"
        raise PlanFormatError(f"{where}: {axis}_index {wrong}")
    return indices


def _check_places(partition: Partition, where: str) -> None:
    """Check that rows and columns of inputs and outputs that are listed are as many, ascending, and of one group."""
    for name, listed, count in (
        ("input_rows", partition.input_rows, partition.input_count),
        ("output_slots", partition.output_slots, partition.output_count),
    ):
        if listed is None:
            continue
        if partition.groups[1] - partition.groups[0] != 1:
            raise PlanFormatError(f"{where}: {name} of a partition of several groups, whose blocks leave nothing free")
        if len(listed) != count or any(b <= a for a, b in itertools.pairwise(listed)):
            raise PlanFormatError(f"{where}: {name} {reprlib.repr(listed)}, expected {count} numbers, ascending")


def _check_flips(plan: Plan, partition: Partition, where: str) -> None:
    """Check that outputs with changed roles are outputs of the partition, and have two roles."""
    flipped = partition.flipped
    if flipped is None:
        return
    count = (partition.groups[1] - partition.groups[0]) * partition.output_count
    if plan.layers[partition.layer].cells != 2:
        raise PlanFormatError(f"{where}: flipped outputs of a layer without pairs, whose columns have one role")
    if any(b <= a for a, b in itertools.pairwise(flipped)) or not all(0 <= b < count for b in flipped):
        raise PlanFormatError(
            f"{where}: flipped {reprlib.repr(flipped)}, expected some of 0 to {count - 1}, ascending, each once"
        )


def _check_address(deployment: Deployment, array: ArrayPlan, where: str, taken: set[int]) -> None:
    """Check that an array exists on the target and is no other array of the plan; note that it is taken."""
    try:
        index = deployment.target.index((array.chip, array.tile, array.core, array.array))
    except CapacityError as error:
        raise PlanFormatError(f"{where}: {error}") from error
    if index in taken:
        raise PlanFormatError(f"{where}: has the address of an earlier array, expected one of its own")
    taken.add(index)


def _check_roles(deployment: Deployment, array: ArrayPlan, where: str) -> None:
    """Check that an array, with its twin where it has one, holds every cell of a weight."""
    layers = [deployment.plan.layers[p.layer] for p in array.partitions]
    cells = {layer.cells for layer in layers}
    slices = {layer.slices for layer in layers}
    roles = list(array.roles)
    if array.twin is not None:
        if not 0 <= array.twin < len(deployment.plan.arrays):
            raise PlanFormatError(f"{where}: twin {array.twin}, expected an array of the plan")
        twin = deployment.plan.arrays[array.twin]
        if (
            twin.partitions != array.partitions
            or twin.slice_copies != array.slice_copies
            or twin.twin != array.id
            or [len(array.roles), len(twin.roles)] != [1, 1]
        ):
            raise PlanFormatError(f"{where}: differs from its twin, array {array.twin}")
        roles = sorted([*array.roles, *twin.roles], reverse=True)
    if not layers:  # copies alone, which have the roles and slices of their partitions' arrays
        return
    whole = slices == {len(array.slices)} and sorted(array.slices) == list(range(len(array.slices)))
    if cells != {len(roles)} or roles != ["plus", "minus"][: len(roles)] or not whole:
        raise PlanFormatError(
            f"{where}: roles {roles} and slices {array.slices}, expected every cell of its layers' weights"
        )


def _check_array(deployment: Deployment, array: ArrayPlan, where: str) -> None:
    width = len(array.roles) * len(array.slices)
    spans = [footprint(partition, width) for partition in array.partitions]
    for axis, size, what in ((0, deployment.target.rows, "row"), (1, deployment.target.columns, "column")):
        ordered = sorted((span[axis].start, span[axis].stop) for span in spans)
        if ordered and (ordered[0][0] < 0 or ordered[-1][1] > size):
            raise PlanFormatError(f"{where}: partitions reach {what} {ordered[-1][1]}, expected at most {size}")
        if any(before[1] > after[0] for before, after in itertools.pairwise(ordered)):
            raise PlanFormatError(f"{where}: two partitions share a {what}")


def decode_rows(deployment: Deployment, layer: LayerPlan) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Rebuild a layer's weights from cells that are checked to be possible ones, some rows at a time.

    Yields:
        A range of rows of [groups * outputs, inputs] and its weights, float32.

    Raises:
        PlanFormatError: A cell is outside the range or the levels of the target, or the plan tells other readers
            something else of the cells than its scheme and target mean.
    """
    coding = layer_coding(deployment.target, layer)
    _check_coding(deployment, layer, coding)
    cells, gain, segments = deployment.cells(layer), deployment.gain(layer), layer_segments(layer)
    low, high = (float(coding.low), float(coding.high)) if coding.levels is None else (0, coding.levels - 1)
    read = 0
    for rows in row_chunks(cells.shape[2:]):
        part = cells[:, :, rows]
        if not (part.min() >= low and part.max() <= high):
            raise PlanFormatError(
                f"{deployment.conductances.path}: tensor '{layer.cells_tensor}' holds {part.min()} to {part.max()}, "
                f"expected {low:g} to {high:g}"
            )
        yield rows, coding.decode(part, segments.spread(gain[rows]))
        read += part.nbytes
        if read > _PAGES_HELD:
            deployment.conductances.drop_pages()
            read = 0
    deployment.conductances.drop_pages()


def weight_bytes(weights: npt.NDArray[np.float32]) -> memoryview:
    """Return the bytes of decoded weights that plans hash: in row order, little-endian float32."""
    return np.ascontiguousarray(weights, "<f4").view(np.uint8).data


def _check_view(deployment: Deployment, layer: LayerPlan) -> None:
    """Check that the way from matrices to the weight tensor can be gone."""
    axes = list(range(len(layer.stored_shape)))
    permutation = axes if layer.permutation is None else sorted(layer.permutation)
    sizes = {math.prod(shape) for shape in (layer.stored_shape, layer.weight_shape)}
    if sizes != {layer.groups * layer.outputs * layer.inputs} or permutation != axes or len(axes) > _LARGEST_RANK:
        raise PlanFormatError(
            f"{deployment.folder}: layer '{layer.name}': stored_shape {reprlib.repr(layer.stored_shape)}, permutation "
            f"{reprlib.repr(layer.permutation)} and weight_shape {reprlib.repr(layer.weight_shape)} are not of "
            f"{layer.groups} x {layer.outputs} x {layer.inputs} weights"
        )


def _check_coding(deployment: Deployment, layer: LayerPlan, coding: Coding) -> None:
    """Check what a plan spells out for readers that do not know the schemes."""
    meant = {
        "cells": coding.cells,
        "unit": coding.unit,
        "significances": list(coding.significances),
        "reference": coding.reference if coding.cells == 1 else None,
        "zero_cells": coding.zero_cells.tolist(),
    }
    for field, value in meant.items():
        if getattr(layer, field) != value:
            raise PlanFormatError(
                f"{deployment.folder}: layer '{layer.name}': {field} {getattr(layer, field)}, expected {value}, "
                f"as scheme {layer.scheme} and the target mean it; the plan was changed"
            )
