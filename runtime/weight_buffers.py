"""Weights in memory that the executor owns, in whatever order a kernel reads them, patched sparsely and undone.

ONNX Runtime uses memory that it is handed as it is: it must outlive the session, and start at a multiple of 64 bytes,
or kernels run up to a third slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rerampile.plan import LayerPlan

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
        row, column = np.divmod(index, len(self.columns))
        return self.rows[row] + self.columns[column]


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
    """Aligned float32 buffers by name, and the way from a layer's weights to their places in them.

    Args:
        shapes: Shape of each buffer, by name.
        places: Where layers lie in them; a layer may lie in several.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], places: Sequence[Place]) -> None:
        self.arrays = {name: aligned_zeros(shape) for name, shape in shapes.items()}
        self._flat = {name: array.reshape(-1) for name, array in self.arrays.items()}
        self._places: dict[int, list[Place]] = {}
        for place in places:
            self._places.setdefault(place.layer, []).append(place)
        self._undo: list[tuple[Floats, Integers, Floats]] = []

    def fill(self, layer: int, weights: Floats) -> None:
        """Put a layer's weights, float32 [groups * outputs, inputs], into all their places."""
        step = max(1, _CHUNK // max(1, weights.shape[1]))
        for place in self._places[layer]:
            for first in range(0, len(weights), step):
                rows = place.rows[first : first + step, None] + place.columns
                self._flat[place.buffer][rows] = weights[first : first + step]

    def read(self, layer: int) -> Floats:
        """Return a layer's weights as they are now, float32 [groups * outputs, inputs]."""
        place = self._places[layer][0]
        weights: Floats = self._flat[place.buffer][place.rows[:, None] + place.columns]
        return weights

    def patch(self, layer: int, index: Integers, value: Floats) -> None:
        """Set the weights at flat, unique positions of a layer's matrix, until :meth:`restore`."""
        for place in self._places[layer]:
            flat, positions = self._flat[place.buffer], place.positions(index)
            self._undo.append((flat, positions, flat[positions]))
            flat[positions] = value

    def restore(self) -> None:
        """Undo every patch, bit for bit."""
        while self._undo:
            flat, positions, before = self._undo.pop()
            flat[positions] = before


def aligned_zeros(shape: Sequence[int]) -> Floats:
    """Return float32 zeros that start at a multiple of 64 bytes."""
    size = math.prod(shape) * 4
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)
