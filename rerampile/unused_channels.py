"""Channels that nobody reads any more: filters all of whose readers have zero weights for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.graph import GraphNode, ModelGraph, Tensor
from rerampile.layer import Layer

__all__ = ["kernel_size", "unread_outputs"]

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]

# What each of these puts out in a channel depends on that channel of its inputs alone.
_CHANNEL_BY_CHANNEL = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus", "Mish"}
    | {"Gelu", "Identity", "Dropout", "Cast", "BatchNormalization", "InstanceNormalization"}
    | {"MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool"}
)
_ELEMENT_BY_ELEMENT = frozenset({"Add", "Sub", "Mul", "Sum", "Max", "Min"})
_CHANNELS = 1  # the axis of channels


def kernel_size(layer: Layer) -> int:
    """Return how many neighbouring inputs of a layer belong to one channel: the positions of a kernel."""
    return math.prod(layer.view.tensor_shape[2:]) if layer.uses[0][0].op == "Conv" else 1


def unread_outputs(graph: ModelGraph, layers: Sequence[Layer], weights: Mapping[str, Floats]) -> dict[str, Flags]:
    """Return, for each layer, the outputs that can be zero as well: nothing that reads them has a weight for them.

    Layers are looked at from the last to the first: where all filters that read a channel go, the channel goes, too.

    Args:
        graph: The model.
        layers: Its layers, in its order.
        weights: Weights of those that may lose filters, by name, [groups * outputs, inputs]. Others keep theirs.

    Returns:
        bool [groups * outputs] by layer name, where there are any.
    """
    readers = _Readers(graph, layers, weights)
    found: dict[str, Flags] = {}
    for layer in reversed(layers):
        (node, slot), *others = layer.uses
        if layer.name not in weights or others or slot != 1 or node.op not in ("Conv", "Gemm") or node.scope:
            continue
        unread = readers.unread(node.view.outputs[0], layer.view.channels)
        if unread.any():
            found[layer.name] = unread
            readers.drop(layer, unread)
    return found


def _has_channels_second(node: GraphNode, tensor: Tensor) -> bool:
    """Whether what a layer reads has the layer's inputs along its second axis."""
    if node.slots(tensor) != [0] or node.scope:
        return False
    if node.op == "MatMul":
        return tensor.shape is not None and len(tensor.shape) == _CHANNELS + 1
    return node.op == "Conv" or (node.op == "Gemm" and not node.attribute("transA", 0))


class _Readers:
    """What reads the channels of tensors, as weights are dropped."""

    def __init__(self, graph: ModelGraph, layers: Sequence[Layer], weights: Mapping[str, Floats]) -> None:
        self._graph, self._weights = graph, weights
        self._layers = {id(node): layer for layer in layers for node, slot in layer.uses if slot == 1}
        self._dropped: dict[str, Flags] = {}

    def drop(self, layer: Layer, outputs: Flags) -> None:
        """Take outputs of a layer for zero from now on."""
        self._dropped[layer.name] = outputs

    def unread(self, tensor: Tensor, channels: int, width: int = 1) -> Flags:
        """Return which channels nothing reads.

        Args:
            tensor: The tensor.
            channels: Channels that it has along its second axis.
            width: Neighbouring elements of that axis that belong to a channel: more than one after Flatten.
        """
        if self._graph.is_output(tensor):
            return np.zeros(channels, np.bool_)
        unread = np.ones(channels, np.bool_)
        for node in self._graph.consumers(tensor):
            unread &= self._unread_by(node, tensor, channels, width)
            if not unread.any():
                break
        return unread

    def _unread_by(self, node: GraphNode, tensor: Tensor, channels: int, width: int) -> Flags:
        if id(node) in self._layers and _has_channels_second(node, tensor):
            return self._without_weights(self._layers[id(node)], channels, width)
        passes = node.slots(tensor) == [0] and node.op in _CHANNEL_BY_CHANNEL and len(node.view.outputs) == 1
        if width == 1 and (passes or self._adds(node, tensor, channels)):
            return self.unread(node.view.outputs[0], channels)
        if width == 1 and node.op == "Flatten" and node.attribute("axis", 1) == _CHANNELS:
            elements = tensor.shape[_CHANNELS:] if tensor.shape is not None else ()
            if elements and all(isinstance(size, int) for size in elements) and elements[0] == channels:
                return self.unread(node.view.outputs[0], channels, math.prod(elements[1:]))
        return np.zeros(channels, np.bool_)

    def _adds(self, node: GraphNode, tensor: Tensor, channels: int) -> bool:
        """Whether a node joins tensors of the same channels, each channel by itself."""
        if node.op not in _ELEMENT_BY_ELEMENT or tensor.shape is None:
            return False
        rank = len(tensor.shape)
        for other in node.view.inputs:
            shape = self._graph.shape(other) if self._graph.is_constant(other) else other.shape
            if shape is None or len(shape) > rank:
                return False
            aligned = (1,) * (rank - len(shape)) + tuple(shape)
            if aligned[_CHANNELS] not in (1, channels):
                return False
        return True

    def _without_weights(self, layer: Layer, channels: int, width: int) -> Flags:
        """Return which channels of its input a layer has no weight for."""
        view = layer.view
        per_group = channels // view.groups
        positions = kernel_size(layer) * width
        if per_group * view.groups != channels or per_group * positions != view.inputs:
            return np.zeros(channels, np.bool_)
        filled = (self._weights[layer.name] if layer.name in self._weights else layer.matrix(self._graph)) != 0
        if layer.name in self._dropped:
            filled = filled & ~self._dropped[layer.name][:, None]
        blocks = filled.reshape(view.groups, view.outputs, per_group, positions)
        unread: Flags = ~blocks.any(axis=(1, 3)).reshape(-1)
        return unread
