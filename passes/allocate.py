"""Allocate: cut matrices to arrays, leave out what pruning emptied, and give every piece an address.

A matrix is cut into strips of outputs (as many as an array has columns for), and each strip into pieces of as many
inputs as an array has rows; where segments of inputs have gains of their own, no piece is of two of them. Outputs whose
weights are all zero, and inputs that a whole strip does not need, take no column and no row. Groups that fit an array
several times lie block-diagonally on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition, Region, span_fields
from rerampile.errors import CapacityError
from rerampile.layer import Layer
from rerampile.layer_plan import CopiesPlan
from rerampile.passes.bins import Bin, Grid, Piece, array_set
from rerampile.passes.protect import protected
from rerampile.passes.spend import further_copies
from rerampile.schemes import Coding
from rerampile.target import Target
from rerampile.totals import arrays_needed, arrays_spent
from rerampile.unit import MappedLayer, Unit

__all__ = ["Allocate"]

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Allocate:
    """Partitions, their positions, their addresses, and what takes no cells at all."""

    name: str = "allocate"

    def run(self, unit: Unit) -> Unit:
        """Fill ``arrays``, ``regions``, ``copies``, the counts without pruning and packing, and ``protection``.

        Further copies come behind the arrays that there are without them.

        Raises:
            CapacityError: An array is too narrow for one output, or the target has too few arrays.
        """
        own: list[list[Bin]] = []
        regions: list[Region] = []
        freed: list[int] = []
        dense = 0
        for number, layer in enumerate(unit.layers):
            mapped = unit.mapped[layer.name]
            grid = Grid.of(unit.target, mapped.coding)
            pieces, empty = _cut(grid, number, layer, mapped)
            own.append(list(_stack(grid, pieces)))
            regions.extend(empty)
            freed.append(max(0, grid.dense_count(layer) - len(own[-1])))
            dense += grid.dense_count(layer) * len(grid.roles)
        bins = list(chain.from_iterable(own))
        before_packing = _count(bins)
        if unit.options.pack:  # pairs and single cells lie differently on an array, and never share one
            grids = dict.fromkeys(bin_.grid for bin_ in bins)
            bins = [packed for grid in grids for packed in _pack(grid, [b for b in bins if b.grid == grid])]
        _check_capacity(unit.target, _count(bins), unit.options.pack)
        copies, further = _spent(unit, own, _count(bins))
        placed = replace(
            unit,
            arrays=tuple(_place(unit.target, [*bins, *further])),
            regions=tuple(regions),
            copies=copies,
            arrays_without_pruning=dense,
            arrays_before_packing=before_packing,
        )
        return protected(placed, freed) if unit.options.protect_msb else placed

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the number of arrays, what leaving out zeros saved, and what copies took."""
        summary = {
            "arrays": len(unit.arrays),
            "saved by pruning": unit.arrays_without_pruning - unit.arrays_before_packing,
            "saved by packing": unit.arrays_before_packing - arrays_needed(unit.arrays),
        }
        if unit.copies:
            summary["spent on copies"] = arrays_spent(unit.arrays)
        if unit.protection is not None:
            summary["weights with copies"] = unit.protection.weights
        return summary


def partition_size(target: Target, coding: Coding) -> tuple[int, int]:
    """Return the inputs and the outputs that one array of a target has room for.

    Raises:
        CapacityError: It has no room for a single weight.
    """
    grid = Grid.of(target, coding)
    return grid.rows, grid.outputs


def _cut(grid: Grid, number: int, layer: Layer, mapped: MappedLayer) -> tuple[list[Piece], list[Region]]:
    """Cut one layer into pieces, in the order of groups, outputs, inputs; and list what takes no cells."""
    view = layer.view
    if mapped.nonzero is None:
        at_once = grid.groups_at_once(layer)
        if at_once > 1:
            return list(_diagonal_pieces(number, layer, at_once)), []
        outputs, inputs = np.arange(view.outputs), np.arange(view.inputs)
        pieces = [
            _piece(number, group, rows, columns)
            for group in range(view.groups)
            for columns in _chunks(outputs, grid.outputs)
            for rows in _rows(grid, mapped, inputs)
        ]
        return pieces, []
    pieces, regions = [], []
    for group, nonzero in enumerate(mapped.nonzero.reshape(view.groups, view.outputs, view.inputs)):
        kept: Flags = np.asarray(nonzero.any(axis=1))
        regions += _empty_region(number, group, ~kept, np.ones(view.inputs, np.bool_))
        for columns in _chunks(np.flatnonzero(kept), grid.outputs):
            needed: Flags = np.asarray(nonzero[columns].any(axis=0))
            regions += _empty_region(number, group, _as_flags(columns, view.outputs), ~needed)
            pieces += [_piece(number, group, rows, columns) for rows in _rows(grid, mapped, np.flatnonzero(needed))]
    return _merge_whole_groups(grid, layer, number, pieces), regions


def _diagonal_pieces(number: int, layer: Layer, at_once: int) -> Iterator[Piece]:
    """Yield block-diagonal pieces of several whole groups."""
    view = layer.view
    for first in range(0, view.groups, at_once):
        last = min(first + at_once, view.groups)
        partition = Partition(
            layer=number,
            row=0,
            column=0,
            groups=(first, last),
            inputs=(0, view.inputs),
            outputs=(0, view.outputs),
        )
        yield Piece(partition, (last - first) * view.inputs, (last - first) * view.outputs, first)


def _merge_whole_groups(grid: Grid, layer: Layer, number: int, pieces: list[Piece]) -> list[Piece]:
    """Write pieces that are whole groups block-diagonally where no group lost anything, as without zeros."""
    view = layer.view
    at_once = grid.groups_at_once(layer)
    whole = all(p.rows == view.inputs and p.outputs == view.outputs for p in pieces)
    if at_once > 1 and len(pieces) == view.groups and whole:
        return list(_diagonal_pieces(number, layer, at_once))
    return pieces


def _piece(number: int, group: int, rows: Indices, columns: Indices) -> Piece:
    spans = {**span_fields("input", rows), **span_fields("output", columns)}
    partition = Partition(layer=number, row=0, column=0, groups=(group, group + 1), **spans)
    return Piece(partition, len(rows), len(columns), group)


def _empty_region(number: int, group: int, outputs: Flags, inputs: Flags) -> list[Region]:
    if not outputs.any() or not inputs.any():
        return []
    spans = {**span_fields("input", np.flatnonzero(inputs)), **span_fields("output", np.flatnonzero(outputs))}
    return [Region(layer=number, group=group, reason="zero", **spans)]


def _rows(grid: Grid, mapped: MappedLayer, inputs: Indices) -> Iterator[Indices]:
    """Yield the inputs of a strip piece by piece."""
    for segment in mapped.segments.cut(inputs):
        yield from _chunks(segment, grid.rows)


def _chunks(indices: Indices, size: int) -> Iterator[Indices]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _as_flags(indices: Indices, size: int) -> Flags:
    flags = np.zeros(size, np.bool_)
    flags[indices] = True
    return flags


def _stack(grid: Grid, pieces: Sequence[Piece]) -> Iterator[Bin]:
    """Give each piece an array of its own, but let small pieces of different groups of one layer share one."""
    current = Bin(grid)
    for piece in pieces:
        alone = not current.pieces or any(piece.group == other.group for other, _, _ in current.pieces)
        if alone or not current.has_room(piece.rows, piece.outputs):
            if current.pieces:
                yield current
            current = Bin(grid)
        current.add(piece)
    if current.pieces:
        yield current


def _pack(grid: Grid, bins: Sequence[Bin]) -> list[Bin]:
    """Put arrays together that share neither a row nor a column: first fit, the fullest first (diagonal packing)."""
    order = sorted(range(len(bins)), key=lambda i: (-max(bins[i].rows / grid.rows, bins[i].outputs / grid.outputs), i))
    packed: list[Bin] = []
    free = np.empty((len(bins), 2), np.int64)
    for i in order:
        need = np.array([bins[i].rows, bins[i].outputs])
        fits = (free[: len(packed)] >= need).all(axis=1)
        where = int(fits.argmax()) if fits.any() else len(packed)
        if where == len(packed):
            packed.append(Bin(grid))
            free[where] = grid.rows, grid.outputs
        packed[where].absorb(bins[i])
        free[where] -= need
    return packed


def _check_capacity(target: Target, needed: int, packed: bool) -> None:
    if target.arrays is not None and needed > target.arrays:
        share = "" if packed else "let small partitions share arrays with --pack, "
        raise CapacityError(
            f"the model needs {needed} arrays of {target.rows} x {target.columns} cells, target '{target.name}' has "
            f"{target.arrays}; prune more, {share}or take a target with more or larger arrays"
        )


def _spent(unit: Unit, own: Sequence[Sequence[Bin]], taken: int) -> tuple[dict[str, CopiesPlan], list[Bin]]:
    """Return how many copies each layer has and what they save, and the arrays of the further ones.

    Nothing where spare arrays are not to be spent.
    """
    if not unit.options.spend_spare_arrays or unit.target.arrays is None:
        return {}, []
    noise = [unit.mapped[layer.name].noise or 0.0 for layer in unit.layers]
    counts, further = further_copies(own, noise, unit.target.arrays - taken, pack=unit.options.pack)
    copies = {
        layer.name: CopiesPlan(count=count, error=error / count, error_single=error)
        for layer, count, error in zip(unit.layers, counts, noise, strict=True)
    }
    return copies, further


def _count(bins: Sequence[Bin]) -> int:
    """Return how many arrays there are, each twin counted."""
    return sum(len(bin_.grid.roles) for bin_ in bins)


def _place(target: Target, bins: Sequence[Bin]) -> Iterator[ArrayPlan]:
    """Yield the arrays in address order; twins follow one another."""
    first = 0
    for bin_ in bins:
        grid = bin_.grid
        slices = list(range(grid.slices))
        partitions = [
            msgspec.structs.replace(piece.partition, row=row, column=output * grid.width)
            for piece, row, output in bin_.pieces
        ]
        yield from array_set(target, first, grid.roles, slices, partitions)
        first += len(grid.roles)
