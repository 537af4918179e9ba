"""Weights in memory that the executor owns, in whatever order a kernel reads them, patched sparsely and undone.

ONNX Runtime uses memory that it is handed as it is: it must outlive the session, and start at a multiple of 64 bytes,
or kernels run up to a third slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.layer_plan import LayerPlan

__all__ = ["Place", "WeightBuffers", "tensor_place"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_ALIGNMENT = 64
_CHUNK = 1 << 18  # weights placed at a time: their positions take eight bytes each


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layer's weights lie in a buffer: weight (r, c) at ``rows[r] + columns[c]``.

    Kernels block and pad channels, and some transpose, but every known layout is such a sum; it takes the memory of a
    row and a column instead of another copy of the weights.

    Attributes:
        buffer: Name of the buffer.
        layer: Position in the plan's layers.
        rows: int64 [groups * outputs].
        columns: int64 [inputs].
    """

    buffer: str
    layer: int
    rows: Integers = field(repr=False)
    columns: Integers = field(repr=False)

    def positions(self, index: Integers) -> Integers:
        """Return where the weights at flat positions of the matrix lie in the buffer."""
        row = index // len(self.columns)
        positions: Integers = self.rows[row] + self.columns[index - row * len(self.columns)]
        return positions


def tensor_place(buffer: str, layer: int, plan: LayerPlan) -> Place:
    """Return where a layer's weights lie in a buffer that holds its weight tensor as nodes read it."""
    stored = plan.stored_shape
    order = plan.permutation if plan.permutation is not None else range(len(stored))
    steps, step = [0] * len(stored), 1
    for axis in reversed(order):
        steps[axis], step = step, step * stored[axis]
    offsets = [np.arange(size, dtype=np.int64) * step for size, step in zip(stored, steps, strict=True)]
    split = next(n for n in range(len(stored) + 1) if math.prod(stored[:n]) == plan.groups * plan.outputs)
    return Place(buffer=buffer, layer=layer, rows=_outer_sum(offsets[:split]), columns=_outer_sum(offsets[split:]))


def _outer_sum(offsets: Sequence[Integers]) -> Integers:
    return functools.reduce(np.add.outer, offsets, np.zeros((), np.int64)).reshape(-1)


class WeightBuffers:
    """Aligned buffers by name, and the way from a layer's weights to their places in them.

    Args:
        shapes: Shape of each buffer, by name.
        places: Where layers lie in them; a layer may lie in several.
        int8_scales: Scale of each matrix row of the layers that are held as int8, by position in the plan's layers.
            All others are held as float32.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        places: Sequence[Place],
        int8_scales: Mapping[int, Floats] | None = None,
    ) -> None:
        self._scales = dict(int8_scales or {})
        self.arrays = {
            place.buffer: aligned_zeros(shapes[place.buffer], np.int8 if place.layer in self._scales else np.float32)
            for place in places
        }
        self._flat = {name: array.reshape(-1) for name, array in self.arrays.items()}
        self._places: dict[int, list[Place]] = {}
        for place in places:
            self._places.setdefault(place.layer, []).append(place)
        self._undo: list[tuple[npt.NDArray[Any], Integers, npt.NDArray[Any]]] = []

    def fill(self, layer: int, weights: Floats) -> None:
        """Put a layer's weights, float32 [groups * outputs, inputs], into all their places."""
        step = max(1, _CHUNK // max(1, weights.shape[1]))
        for place in self._places[layer]:
            for first in range(0, len(weights), step):
                rows = np.arange(first, min(first + step, len(weights)))
                held = self._held(layer, rows[:, None], weights[rows])
                self._flat[place.buffer][place.rows[rows, None] + place.columns] = held

    def read(self, layer: int) -> Floats:
        """Return the weights of a layer that is held as float32, as they are now, [groups * outputs, inputs]."""
        place = self._places[layer][0]
        weights: Floats = self._flat[place.buffer][place.rows[:, None] + place.columns]
        return weights

    def patch(self, layer: int, index: Integers, value: Floats) -> None:
        """Set the weights at flat, unique positions of a layer's matrix, until :meth:`restore`."""
        for place in self._places[layer]:
            flat, positions = self._flat[place.buffer], place.positions(index)
            self._undo.append((flat, positions, flat[positions]))
            flat[positions] = self._held(layer, index // len(place.columns), value)

    def _held(self, layer: int, rows: Integers, weights: Floats) -> npt.NDArray[Any]:
        """Return weights of some matrix rows as their buffers hold them."""
        scale = self._scales.get(layer)
        if scale is None:
            return weights
        steps: npt.NDArray[np.int8] = np.clip(np.rint(weights / scale[rows]), -128, 127).astype(np.int8)
        return steps

    def restore(self) -> None:
        """Undo every patch, bit for bit."""
        while self._undo:
            flat, positions, before = self._undo.pop()
            flat[positions] = before


def aligned_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return zeros that start at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
