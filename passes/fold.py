"""Fold per-channel affine operations around a mapped layer into its weights and bias.

What follows a layer (BatchNormalization, constant Mul, Div, Add, Sub) scales the outputs: ``w' = m * w``,
``b' = m * b + a``. What precedes it scales the inputs: ``w' = w * m``, ``b' = b + sum(w * a)``, summed over the weights
that the cells will hold, once they are known; an addend is exact only where no padding mixes zeros into it. Folding
happens in float64, once, before anything is mapped. A fold is made only where nobody else reads the tensor in between,
so that the model's outputs stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rerampile.graph import GraphNode, ModelGraph, Tensor
from rerampile.layer import Fold, Layer

__all__ = ["fold_neighbours"]

Vector = npt.NDArray[np.float64]

_DATA_SLOT = 0
_WEIGHT_SLOT = 1
_BIAS_SLOT = 2
_FOLDABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_OLDEST_BROADCAST_OPSET = 7


def fold_neighbours(graph: ModelGraph, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with their foldable neighbours folded in: what follows first, then what precedes."""
    folded = [_fold_after(graph, layer) for layer in layers]
    taken = {id(fold.node) for layer in folded for fold in layer.folds}
    return [_fold_before(graph, layer, taken) for layer in folded]


def _fold_after(graph: ModelGraph, layer: Layer) -> Layer:
    bias = _bias(graph, layer)
    if not _foldable(layer) or bias is None:
        return layer
    node = layer.uses[0][0]
    channels = layer.view.channels
    factor, folds = np.ones(channels), []
    rank, axis = _layout(node.view.outputs[0], layer)
    for follower, tensor in _followers(graph, node):
        affine = _affine(graph, follower, tensor, channels, rank, axis)
        if affine is None:
            break
        factor, bias = factor * affine[0], bias * affine[0] + affine[1]
        folds.append(Fold(node=follower, op=follower.op, side="after"))
    if not folds or not (np.isfinite(factor).all() and np.isfinite(bias).all()):
        return layer
    return replace(
        layer,
        folds=tuple(folds),
        output_factor=None if (factor == 1).all() else _per_output(layer, factor),
        bias=bias,
    )


def _fold_before(graph: ModelGraph, layer: Layer, taken: set[int]) -> Layer:
    bias = layer.bias if layer.bias is not None else _bias(graph, layer)
    if not _foldable(layer) or bias is None:
        return layer
    node = layer.uses[0][0]
    if node.attribute("transA", 0):
        return layer
    product = node.op in ("Gemm", "MatMul")
    channels = layer.view.inputs if product else layer.view.groups * _inputs_per_group(layer)
    rank, axis = _layout(node.input(_DATA_SLOT), layer)
    factor, addend, folds = np.ones(channels), np.zeros(channels), []
    tensor = node.input(_DATA_SLOT)
    safe = factor, addend, 0  # up to the last fold whose own input is known to be as wide as the layer's
    while (before := _private_producer(graph, node, tensor)) is not None and id(before) not in taken:
        source = _data_input(graph, before)
        affine = None if source is None else _affine(graph, before, source, channels, rank, axis)
        if affine is None or (affine[1].any() and _pads(node)):
            break
        factor, addend = factor * affine[0], addend + factor * affine[1]
        folds.append(Fold(node=before, op=before.op, side="before"))
        tensor = source
        if before.op == "BatchNormalization" or _has_channels(tensor, channels, rank, axis):
            safe = factor, addend, len(folds)
    factor, addend, count = safe
    folds = folds[:count]
    taken.update(id(fold.node) for fold in folds)
    useless = addend.any() and not factor.all()  # an input that is multiplied by zero but carries an addend
    if not folds or useless or not (np.isfinite(factor).all() and np.isfinite(addend).all()):
        return layer
    return replace(
        layer,
        folds=(*layer.folds, *folds),
        input_factor=_per_input(layer, factor),
        input_addend=_per_input(layer, addend / factor * node.attribute("alpha", 1.0)) if addend.any() else None,
        bias=bias if addend.any() else layer.bias,
    )


def _foldable(layer: Layer) -> bool:
    """Whether the layer has one use of a kind whose neighbours can be folded exactly."""
    (node, slot), *others = layer.uses
    return (
        not others
        and not layer.integer
        and layer.element_type in _FLOATS
        and node.op in _FOLDABLE
        and slot == _WEIGHT_SLOT
        and (node.op != "MatMul" or (layer.view.groups == 1 and len(layer.view.tensor_shape) > 1))
    )


def _bias(graph: ModelGraph, layer: Layer) -> Vector | None:
    """Return the layer's bias a channel, zeros where it has none, or None where it cannot be folded into."""
    node = layer.uses[0][0]
    channels = layer.view.channels
    tensor = node.input(_BIAS_SLOT) if node.op != "MatMul" else None
    if tensor is None:
        return np.zeros(channels)
    if not graph.is_constant(tensor):
        return None
    bias = graph.read(tensor).astype(np.float64)
    if bias.shape not in ((channels,), (1, channels), (1,), ()):
        return None
    scale = float(node.attribute("beta", 1.0)) if node.op == "Gemm" else 1.0
    return np.broadcast_to(scale * bias.reshape(-1), (channels,)).copy()


def _followers(graph: ModelGraph, node: GraphNode) -> Iterator[tuple[GraphNode, Tensor]]:
    """Yield each node that alone reads the output of the one before, with the tensor between them."""
    while True:
        tensor = node.view.outputs[0]
        consumers = graph.consumers(tensor)
        if graph.is_output(tensor) or len(consumers) != 1 or consumers[0].graph is not node.graph:
            return
        node = consumers[0]
        yield node, tensor


def _private_producer(graph: ModelGraph, node: GraphNode, tensor: Tensor) -> GraphNode | None:
    """Return the producer of ``tensor`` where nobody but one node reads it."""
    producer = graph.producer(tensor)
    if producer is None or producer.graph is not node.graph:
        return None
    return None if graph.is_output(tensor) or len(graph.consumers(tensor)) != 1 else producer


def _data_input(graph: ModelGraph, node: GraphNode) -> Tensor | None:
    """Return the one input of a node that is not constant."""
    data = [t for t in node.view.inputs if not graph.is_constant(t)]
    return data[0] if len(data) == 1 else None


def _affine(
    graph: ModelGraph, node: GraphNode, tensor: Tensor, channels: int, rank: int, axis: int
) -> tuple[Vector, Vector] | None:
    """Return (m, a), float64 [channels], where ``node`` computes ``m * tensor + a`` channel by channel, else None.

    Args:
        graph: The model.
        node: The node.
        tensor: Its data input.
        channels: Length of the channel axis.
        rank: Largest rank of a constant that cannot change the rank of the result.
        axis: The channel axis, counted from the end (1 is the last).
    """
    if node.op == "BatchNormalization":
        return _batch_normalization(graph, node, tensor, channels) if rank - axis == 1 else None
    if node.op not in ("Mul", "Div", "Add", "Sub") or graph.model.opset < _OLDEST_BROADCAST_OPSET:
        return None
    left, right = node.view.inputs
    if left is right or not graph.is_constant(right if left is tensor else left):
        return None
    constant = _channel_vector(graph.read(right if left is tensor else left), channels, rank, axis)
    if constant is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Mul":
        return constant, zero
    if node.op == "Add":
        return one, constant
    if node.op == "Sub":
        return (one, -constant) if left is tensor else (-one, constant)
    return (1 / constant, zero) if left is tensor and constant.all() else None


def _batch_normalization(
    graph: ModelGraph, node: GraphNode, tensor: Tensor, channels: int
) -> tuple[Vector, Vector] | None:
    data, *constants = node.view.inputs
    inference = not node.attribute("training_mode", 0) and node.attribute("spatial", 1) and len(node.proto.output) == 1
    if data is not tensor or not inference or not all(graph.is_constant(t) for t in constants):
        return None
    scale, shift, mean, variance = (graph.read(t).astype(np.float64) for t in constants)
    variance = variance + float(node.attribute("epsilon", 1e-5))
    if scale.shape != (channels,) or not (variance > 0).all():
        return None
    factor = scale / np.sqrt(variance)
    return factor, shift - mean * factor


def _channel_vector(constant: npt.NDArray[np.float32], channels: int, rank: int, axis: int) -> Vector | None:
    """Return a constant that differs only along the channel axis as float64 [channels], else None."""
    along = constant.shape[-axis] if constant.ndim >= axis else 1
    if constant.ndim > rank or constant.size != along or along not in (1, channels):
        return None
    return np.broadcast_to(constant.astype(np.float64).reshape(-1), (channels,)).copy()


def _layout(tensor: Tensor, layer: Layer) -> tuple[int, int]:
    """Return (largest rank of a constant that leaves the rank of ``tensor`` alone, its channel axis from the end)."""
    op = layer.uses[0][0].op
    if op == "Gemm":
        return 2, 1
    if op == "MatMul":
        vector = len(layer.view.tensor_shape) == 1  # of two vectors the product is a scalar
        return (len(tensor.shape) if tensor.shape is not None else 1 - vector), 1
    rank = len(layer.view.tensor_shape)
    return rank, rank - 1


def _has_channels(tensor: Tensor, channels: int, rank: int, axis: int) -> bool:
    """Whether a tensor is known to have every channel, so that no constant widens it or raises its rank."""
    return tensor.shape is not None and len(tensor.shape) >= rank and tensor.shape[-axis] == channels


def _inputs_per_group(layer: Layer) -> int:
    """Return the input channels of one convolution group."""
    shape = layer.view.tensor_shape
    return shape[1] if layer.uses[0][0].op == "Conv" else shape[0] // layer.view.groups


def _per_output(layer: Layer, channels: Vector) -> Vector:
    return np.repeat(channels, layer.view.outputs_per_channel)


def _per_input(layer: Layer, channels: Vector) -> Vector:
    """Spread a vector over input channels to [groups, inputs] of the matrix."""
    grouped = channels.reshape(layer.view.groups, -1)
    return np.repeat(grouped, layer.view.inputs // grouped.shape[1], axis=1)


def _pads(node: GraphNode) -> bool:
    """Whether zeros outside the input reach the layer's sums (a ConvTranspose has borders of its own)."""
    if node.op in ("Gemm", "MatMul"):
        return False
    padded = any(node.attribute("pads", ())) or node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return padded or node.op == "ConvTranspose"
