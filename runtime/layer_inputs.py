"""What the crossbars of a layer see at their inputs, as columns: [groups, inputs, images and positions].

An input vector is what meets one row of the layer's weight matrix: a window of a convolution, padding included; the
channels of one pixel before a transposed convolution; a row (or column) of a matrix product; the input or the state of
one step of a recurrent layer. Operations that were folded in before the layer are no longer there, so it sees what
comes before them. The ``alpha`` of a Gemm acts on the results.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from onnx import NodeProto

from rerampile.graph import GraphNode, ModelGraph, Tensor
from rerampile.layer import Layer
from rerampile.onnx_file import copy_without
from rerampile.runtime.taps import Tap
from rerampile.weight_slots import RECURRENT, slot_of

__all__ = ["IN_SUBGRAPH", "InputUse", "NotObservedError", "Reader", "input_uses"]

Floats = npt.NDArray[np.float32]

IN_SUBGRAPH = "it runs in a subgraph, whose tensors are not seen from outside"
_CHUNK = 32 << 20  # bytes of input vectors at a time


class NotObservedError(Exception):
    """A layer whose inputs or outputs cannot be had; the message is the reason."""


class Reader(Protocol):
    """Turns watched tensors into input vectors, at most 32 MiB of them at a time; equal readers do the same."""

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield float32 [groups, inputs, some images and positions]."""
        ...


@dataclass(frozen=True)
class InputUse:
    """One use of a layer: what to watch, and how to read it. Equal uses see the same.

    Attributes:
        taps: The tensors.
        reader: Makes input vectors of them.
        extra: Nodes that the model needs besides.
    """

    taps: tuple[Tap, ...]
    reader: Reader
    extra: tuple[NodeProto, ...] = field(default=(), compare=False)


def input_uses(graph: ModelGraph, layer: Layer) -> list[InputUse]:
    """Return every use of a layer.

    Raises:
        NotObservedError: One of them cannot be seen.
    """
    return [_use(graph, layer, node, weight) for node, weight in layer.uses]


def _use(graph: ModelGraph, layer: Layer, node: GraphNode, weight: int) -> InputUse:
    if node.scope:
        raise NotObservedError(IN_SUBGRAPH)
    slot = slot_of(node, weight)
    tensor = _before_folds(graph, layer, node.input(slot.data))
    if node.op in RECURRENT:
        return _recurrent_use(layer, node, tensor, of_states=weight == 2)
    zero = None if slot.data_zero_point is None else node.input(slot.data_zero_point)
    tap = Tap(tensor.name, "" if zero is None else zero.name)
    view = layer.view
    if node.op == "ConvTranspose":
        return InputUse((tap,), _Pixels(view.groups))
    if node.op.endswith(("Conv", "ConvInteger")):
        return InputUse((tap,), _Windows.of(node, view.groups, view.tensor_shape[2:]))
    across = slot.data > weight
    if node.op == "Gemm" and node.attribute("transB" if across else "transA", 0):
        across = not across
    return InputUse((tap,), _Operand(view.tensor_shape[:-2], across))


def _before_folds(graph: ModelGraph, layer: Layer, tensor: Tensor) -> Tensor:
    """Return the data of a layer as they are before the operations that were folded into it."""
    folded = {id(fold.node) for fold in layer.folds if fold.side == "before"}
    while (producer := graph.producer(tensor)) is not None and id(producer) in folded:
        tensor = next(t for t in producer.view.inputs if not graph.is_constant(t))
    return tensor


def _recurrent_use(layer: Layer, node: GraphNode, data: Tensor, of_states: bool) -> InputUse:
    if node.input(4) is not None:
        raise NotObservedError("its sequences have lengths of their own")
    if not of_states:
        return InputUse((Tap(data.name),), _Steps(layer.view.groups))
    if node.op == "GRU" and not node.attribute("linear_before_reset", 0):
        raise NotObservedError("a gate between the states and these weights makes them see different inputs")
    copy = copy_without(node.proto, "output", "name")
    copy.output.append(f"ai.rerampile/{next(filter(None, node.proto.output))}/states")
    initial = node.input(5)
    taps = (Tap(copy.output[0]), *(() if initial is None else (Tap(initial.name),)))
    return InputUse(taps, _States(node.attribute("direction", "forward")), (copy,))


# readers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Windows:
    """Windows of a convolution; padding is zeros, as it is to the crossbar.

    Attributes:
        groups: Groups.
        kernel: Sizes of the kernel.
        strides: Its strides.
        dilations: Its dilations.
        pads: First all beginnings, then all ends; None where ``auto_pad`` says it.
        auto_pad: ``SAME_UPPER`` or ``SAME_LOWER`` where ``pads`` is None.
    """

    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str = ""

    @classmethod
    def of(cls, node: GraphNode, groups: int, kernel: tuple[int, ...]) -> _Windows:
        """Read the attributes of a node."""
        ones, auto_pad = [1] * len(kernel), node.attribute("auto_pad", "NOTSET")
        strides, dilations = tuple(node.attribute("strides", ones)), tuple(node.attribute("dilations", ones))
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            return cls(groups, kernel, strides, dilations, None, auto_pad)
        pads = [0] * 2 * len(kernel) if auto_pad == "VALID" else node.attribute("pads", [0] * 2 * len(kernel))
        return cls(groups, kernel, strides, dilations, tuple(pads))

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield windows of one tensor [images, channels, *sizes]."""
        rank = len(self.kernel)
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        windows = sliding_window_view(self._padded(values[0], spans), spans, axis=tuple(range(2, rank + 2)))
        steps = tuple(slice(None, None, step) for step in (*self.strides, *self.dilations))
        windows = windows[(slice(None), slice(None), *steps)]
        windows = windows.transpose(0, *range(rank + 2, 2 * rank + 2), *range(1, rank + 2))
        inputs, positions = windows.shape[: rank + 1], windows.shape[rank + 1 :]
        for box in _boxes(positions, _CHUNK // (4 * math.prod(inputs))):
            part = np.ascontiguousarray(windows[(slice(None),) * (rank + 1) + box])
            yield part.reshape(self.groups, math.prod(inputs) // self.groups, -1)

    def _padded(self, value: Floats, spans: Sequence[int]) -> Floats:
        """Return a tensor with its padding, channels first: [channels, images, *sizes]."""
        sizes, rank = value.shape[2:], len(self.kernel)
        if self.pads is not None:
            pads = list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        else:
            missing = [
                max(0, (-(-size // stride) - 1) * stride + span - size)
                for size, stride, span in zip(sizes, self.strides, spans, strict=True)
            ]
            pads = [(n // 2, n - n // 2) if self.auto_pad == "SAME_UPPER" else (n - n // 2, n // 2) for n in missing]
        swapped = value.swapaxes(0, 1)
        if not any(map(any, pads)):
            return swapped
        shape = (size + sum(ends) for size, ends in zip(sizes, pads, strict=True))
        padded = np.zeros((*swapped.shape[:2], *shape), np.float32)
        inside = (slice(first, first + size) for (first, _), size in zip(pads, sizes, strict=True))
        padded[(slice(None), slice(None), *inside)] = swapped
        return padded


@dataclass(frozen=True)
class _Pixels:
    """Pixels before a transposed convolution: all kernel positions are outputs of one input vector."""

    groups: int

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield pixels of one tensor [images, channels, *sizes]."""
        images, channels, *sizes = values[0].shape
        grouped = values[0].reshape(images, self.groups, channels // self.groups, math.prod(sizes))
        return _chunks(grouped.transpose(1, 2, 0, 3))


@dataclass(frozen=True)
class _Operand:
    """Vectors of the operand of a matrix product; those that meet one matrix of a batch are its group.

    Attributes:
        batch: Batch axes of the weights.
        across: Whether inputs run along the first of the two axes of a matrix, not along the second.
    """

    batch: tuple[int, ...]
    across: bool

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield vectors of one tensor [*batch, rows, columns], or of [inputs]."""
        value = values[0]
        if value.ndim == 1:
            value = value[None]
        elif self.across:
            value = value.swapaxes(-1, -2)
        rank = len(self.batch)
        value = value.reshape((1,) * max(0, rank + 2 - value.ndim) + value.shape)
        first = value.ndim - 2 - rank  # axes before it, and those along which the weights repeat, count positions
        separate = [first + axis for axis, size in enumerate(self.batch) if size > 1]
        shape = list(value.shape)
        for axis in separate:
            shape[axis] = self.batch[axis - first]
        others = [axis for axis in range(value.ndim - 1) if axis not in separate]
        ordered = np.broadcast_to(value, shape).transpose(*separate, value.ndim - 1, *others)
        return _chunks(ordered.reshape(math.prod(self.batch), shape[-1], *(shape[axis] for axis in others)))


@dataclass(frozen=True)
class _Steps:
    """The inputs of a recurrent layer: every direction sees those of all steps."""

    directions: int

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield inputs of one tensor [steps, images, inputs]."""
        vectors = values[0].reshape(-1, values[0].shape[-1]).T
        return _chunks(np.broadcast_to(vectors, (self.directions, *vectors.shape)))


@dataclass(frozen=True)
class _States:
    """The states that a recurrent layer feeds back: at each step those after the step before, in its direction."""

    direction: str

    def columns(self, values: Sequence[Floats]) -> Iterator[Floats]:
        """Yield states from the outputs of all steps and the first states, which are zeros where they are left out."""
        after = values[0].transpose(1, 3, 0, 2)  # [directions, states, steps, images]
        before = np.zeros_like(after)
        for number, (seen, states) in enumerate(zip(before, after, strict=True)):
            backwards = self.direction == "reverse" or number == 1
            if backwards:
                seen[:, :-1] = states[:, 1:]
            else:
                seen[:, 1:] = states[:, :-1]
            if len(values) > 1:
                seen[:, -1 if backwards else 0] = values[1][number].T
        return _chunks(before)


def _chunks(vectors: Floats) -> Iterator[Floats]:
    """Yield [groups, inputs, *positions] in parts of bounded size, positions flattened."""
    groups, inputs, *positions = vectors.shape
    for box in _boxes(positions, _CHUNK // (4 * groups * inputs)):
        yield vectors[:, :, *box].reshape(groups, inputs, -1)


def _boxes(shape: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Yield boxes that fill a shape, in order, each of at most ``most`` elements (but at least one)."""
    sizes: list[int] = []
    for length in reversed(shape):
        sizes.insert(0, max(1, min(length, most)))
        most //= sizes[0]
    for corner in itertools.product(*(range(0, n, size) for n, size in zip(shape, sizes, strict=True))):
        yield tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))
