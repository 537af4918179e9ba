"""Protect: put copies of the most significant slices into cells that pruning freed (Li et al. 2024, zero-space cost).

A layer's copies go to the cells beside its partitions, first on arrays that it uses anyway, then on arrays that it
would have needed unpruned. Where that is too little for all outputs, those of the largest gain have copies: a stuck
cell of theirs does most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition, SliceCopy, span_fields
from rerampile.deployment import footprint
from rerampile.errors import ConfigError
from rerampile.layer import Layer
from rerampile.passes.bins import array_set
from rerampile.slice_copies import protection_of
from rerampile.target import Target
from rerampile.unit import Unit

__all__ = ["check_protection", "protected"]

Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_VOTED = ("Conv", "Gemm", "MatMul")  # operators whose columns a vote can be taken of, each by itself
_MOST_PLACES = 4  # the rows of a copy lie in at most so many places, each a read of its own


def check_protection(target: Target, slices: int) -> None:
    """Refuse to copy slices that weights do not have.

    Raises:
        ConfigError: The target does not slice weights, or has too few slices.
    """
    if target.slices == 1:
        raise ConfigError(
            f"--protect-msb {slices}: target '{target.name}' holds a weight in one slice, expected several, whose most "
            f"significant ones are copied; use isaac or puma, or give slices in a TOML file"
        )
    if not 1 <= slices <= target.slices:
        raise ConfigError(
            f"--protect-msb {slices}: expected 1 to {target.slices}, the slices of target '{target.name}'"
        )


def protected(unit: Unit, freed: Sequence[int]) -> Unit:
    """Return the unit with copies on its arrays, and what they protect.

    Args:
        unit: With arrays placed.
        freed: How many arrays (sets of twins counted once) pruning freed in each layer.
    """
    slices, arrays = unit.options.protect_msb, list(unit.arrays)
    homes = _homes(arrays, len(unit.layers))
    space = _Space.beside(unit.target, arrays)
    for number, layer in enumerate(unit.layers):
        if homes[number] and _can_vote(layer):
            gain = unit.mapped[layer.name].gain.reshape(layer.view.groups * layer.view.outputs, -1).max(axis=1)
            space = _protect_layer(unit.target, arrays, space, homes[number], slices, gain, freed[number])
    return replace(unit, arrays=tuple(arrays), protection=protection_of(slices, unit.options.vote, arrays))


@dataclass(frozen=True)
class _Home:
    """A partition that is to have copies: where it is, and its array."""

    array: int
    position: int
    partition: Partition


_Place = tuple[int, SliceCopy]  # an array, and a copy on it


def _homes(arrays: Sequence[ArrayPlan], layers: int) -> list[list[_Home]]:
    """Return the partitions of each layer, twins once."""
    found: list[list[_Home]] = [[] for _ in range(layers)]
    for array in arrays:
        if not array.is_second_twin:
            for position, partition in enumerate(array.partitions):
                found[partition.layer].append(_Home(array.id, position, partition))
    return found


def _can_vote(layer: Layer) -> bool:
    """Whether every node that reads a layer is a plain sum over one matrix, whose columns a vote can be taken of."""
    plain = layer.view.groups == 1 and len(layer.view.tensor_shape) > 1
    flat = all(node.op == "Conv" or len(layer.view.tensor_shape) == 2 for node, _ in layer.uses)
    return plain and flat and all(node.op in _VOTED for node, _ in layer.uses)


class _Space:
    """Free rectangles of arrays, int64 [rectangles, 5]: array, row, column, height, width.

    Args:
        free: The rectangles.
        empty: The first array that holds no weights.
    """

    def __init__(self, free: Integers, empty: int) -> None:
        self._rectangles, self._count, self._empty = free, len(free), empty
        self._of: dict[int, list[int]] = {}
        for number, array in enumerate(free[:, 0].tolist()):
            self._of.setdefault(array, []).append(number)

    @classmethod
    def beside(cls, target: Target, arrays: Sequence[ArrayPlan]) -> _Space:
        """Return what lies beside and below all partitions of each array, of twins the first."""
        free = []
        for array in arrays:
            if not array.is_second_twin:
                spans = [footprint(p, len(array.roles) * len(array.slices)) for p in array.partitions]
                row, column = (max(span[axis].stop for span in spans) for axis in (0, 1))
                free.append((array.id, 0, column, target.rows, target.columns - column))
                free.append((array.id, row, 0, target.rows - row, column))
        return cls(np.array(free, np.int64).reshape(-1, 5), len(arrays))

    @property
    def free(self) -> Integers:
        """The rectangles."""
        return self._rectangles[: self._count]

    def on(self, arrays: Sequence[int], more: Iterable[tuple[int, int, int]] = ()) -> _Space:
        """Return the free rectangles of some arrays, and empty ones: id, rows and columns of each."""
        own = self.free[np.isin(self.free[:, 0], arrays)]
        empty = np.array([(array, 0, 0, rows, columns) for array, rows, columns in more], np.int64).reshape(-1, 5)
        return _Space(np.concatenate([own, empty]), self._empty)

    def replaced(self, arrays: Sequence[int], other: _Space) -> _Space:
        """Return the space with what another one has left of some arrays."""
        kept = self.free[~np.isin(self.free[:, 0], arrays)]
        return _Space(np.concatenate([kept, other.on(arrays).free]), self._empty)

    def copy(self) -> _Space:
        """Return the same space, to try something in."""
        return _Space(self.free.copy(), self._empty)

    def take(self, home: int, height: int, least: int, unit: int, most: int) -> tuple[int, int, int, int, int] | None:
        """Take a rectangle; None where none fits.

        The own array comes first, then others that hold weights; on each, whole rows rather than some.

        Args:
            home: The own array.
            height: Rows that are wanted.
            least: Rows that are enough.
            unit: Columns of one output.
            most: Outputs that are wanted.

        Returns:
            Array, row, column, rows and outputs.
        """
        own = self._of[home]
        best = self._best(self._rectangles[own], height, least, unit)
        number = self._best(self.free, height, least, unit) if best is None else own[best]
        if number is None:
            return None
        array, row, column, tall, wide = self._rectangles[number].tolist()
        rows, outputs = min(tall, height), min(wide // unit, most)
        columns = outputs * unit
        self._rectangles[number] = array, row, column + columns, rows, wide - columns
        if tall > rows:
            self._append(array, (array, row + rows, column, tall - rows, wide))
        return array, row, column, rows, outputs

    def _best(self, free: Integers, height: int, least: int, unit: int) -> int | None:
        """Return the first of the best rectangles that fit."""
        array, _, _, tall, wide = free.T
        fits = (tall >= least) & (wide >= unit)
        if not fits.any():
            return None
        return int(np.argmin(np.where(fits, 2 * (array >= self._empty) + (tall < height), 4)))

    def _append(self, array: int, rectangle: tuple[int, ...]) -> None:
        if self._count == len(self._rectangles):
            self._rectangles = np.concatenate([self._rectangles, np.zeros_like(self._rectangles)])
        self._rectangles[self._count] = rectangle
        self._of[array].append(self._count)
        self._count += 1


def _protect_layer(
    target: Target,
    arrays: list[ArrayPlan],
    space: _Space,
    homes: Sequence[_Home],
    slices: int,
    gain: npt.NDArray[np.float32],
    freed: int,
) -> _Space:
    """Give as many outputs of a layer copies as there is room for, those of the largest gain first.

    Args:
        target: The hardware.
        arrays: All arrays; copies are added to them, and arrays in the place of freed ones behind them.
        space: What is free on them.
        homes: The layer's partitions.
        slices: Slices that are copied.
        gain: Of the layer's outputs.
        freed: How many sets of arrays may be added.

    Returns:
        What is free afterwards.
    """
    model = arrays[homes[0].array]
    set_size = 1 if model.twin is None else 2
    if target.arrays is not None:
        freed = min(freed, (target.arrays - len(arrays)) // set_size)
    outputs = np.unique(np.concatenate([home.partition.output_indices for home in homes]))
    order = outputs[np.argsort(-gain[outputs], kind="stable")]
    own = list(dict.fromkeys(home.array for home in homes))
    there = space.on(own, ((len(arrays) + k * set_size, target.rows, target.columns) for k in range(freed)))
    unit = slices * len(model.roles)
    found, left = _largest(homes, there, order, unit)
    copies: dict[int, list[SliceCopy]] = {}
    for array, copy in found:
        copies.setdefault(array, []).append(copy)
    while len(arrays) <= max(copies, default=-1):  # freed arrays are taken in order
        arrays.extend(list(_empty_set(target, arrays, model)))
    for number, more in copies.items():
        twin = arrays[number].twin
        for each in (number,) if twin is None else (number, twin):
            arrays[each] = msgspec.structs.replace(arrays[each], slice_copies=[*arrays[each].slice_copies, *more])
    return space.replaced(own, left)


def _largest(homes: Sequence[_Home], space: _Space, order: Integers, unit: int) -> tuple[list[_Place], _Space]:
    """Return the places of copies of as many of the first outputs as have room, and what is left (by bisection)."""
    best: tuple[list[_Place], _Space] = [], space
    fits, fails = 0, len(order) + 1
    tried = len(order)
    while fails - fits > 1:
        left = space.copy()
        places = _placed(homes, left, np.sort(order[:tried]), unit)
        if places is None:
            fails = tried
        else:
            fits, best = tried, (places, left)
        tried = (fits + fails) // 2
    return best


def _placed(homes: Sequence[_Home], space: _Space, outputs: Integers, unit: int) -> list[_Place] | None:
    """Place two copies of some outputs of every partition; None where there is no room."""
    found: list[_Place] = []
    numbers: tuple[Literal[1, 2], ...] = (1, 2)
    for home in homes:
        held = np.array(home.partition.output_indices, np.int64)
        wanted = held[np.isin(held, outputs)]
        for number in numbers:
            for place in _one_copy(home, space, wanted, number, unit):
                if place is None:
                    return None
                found.append(place)
    return found


def _one_copy(
    home: _Home, space: _Space, outputs: Integers, number: Literal[1, 2], unit: int
) -> Iterator[_Place | None]:
    """Yield the places of one copy of some outputs of a partition, and None where there is no room for all of it."""
    inputs = np.array(home.partition.input_indices, np.int64)
    least = -(-len(inputs) // _MOST_PLACES)
    waiting = [(inputs, outputs)] if len(outputs) else []
    while waiting:
        inputs, outputs = waiting.pop()
        taken = space.take(home.array, len(inputs), min(least, len(inputs)), unit, len(outputs))
        if taken is None:
            yield None
            return
        array, row, column, rows, count = taken
        spans = {**span_fields("input", inputs[:rows]), **span_fields("output", outputs[:count])}
        copy = SliceCopy(array=home.array, partition=home.position, number=number, row=row, column=column, **spans)
        yield array, copy
        if count < len(outputs):
            waiting.append((inputs, outputs[count:]))
        if rows < len(inputs):
            waiting.append((inputs[rows:], outputs[:count]))


def _empty_set(target: Target, arrays: Sequence[ArrayPlan], model: ArrayPlan) -> Iterator[ArrayPlan]:
    """Return an array, or two twins, like those of a layer, with nothing on them, to follow the others."""
    models = [model] if model.twin is None else [model, arrays[model.twin]]
    return array_set(target, len(arrays), [each.roles for each in models], model.slices, [])
