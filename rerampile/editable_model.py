"""A model whose layers' weights and biases can be set one by one, everything else as its user exported it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from rerampile.graph import ModelGraph
from rerampile.graph_edit import UnusedNames, rewrite_graph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile, copy_without, iter_graphs

__all__ = ["BIAS", "EditableModel", "can_shift", "own_bias"]

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]

BIAS = 2  # the input slot of Conv and Gemm


def can_shift(graph: ModelGraph, layer: Layer) -> bool:
    """Whether a layer has a bias of its own for each output, or may be given one."""
    (node, slot), *others = layer.uses
    if others or layer.integer or slot != 1 or node.op not in ("Conv", "Gemm") or node.scope:
        return False
    if node.op == "Gemm" and (node.attribute("beta", 1.0) != 1.0 or node.attribute("transA", 0)):
        return False
    bias = node.input(BIAS)
    return bias is None or (graph.is_constant(bias) and graph.shape(bias) == (layer.view.channels,))


def own_bias(graph: ModelGraph, layer: Layer, shift: Doubles | float = 0.0) -> Doubles:
    """Return the bias of a layer's node, before folding, that moves its outputs, folding included, by a shift.

    Args:
        graph: The model.
        layer: A layer for which :func:`can_shift` holds.
        shift: What is added to each output, float64 [channels]; 0 where folding multiplies an output by 0.
    """
    tensor = layer.uses[0][0].input(BIAS)
    bias = np.zeros(layer.view.channels) if tensor is None else graph.read(tensor).astype(np.float64)
    if layer.output_factor is not None:
        factor = layer.output_factor
        shift = np.divide(shift, factor, out=np.zeros_like(factor), where=factor != 0)
    return bias + shift


class EditableModel:
    """A copy of a model in memory.

    Weights that a node reads through a chain of constants (a Cast, a Transpose) get an initializer of their own, in the
    type that the node reads; where nobody else reads the chain, it goes, and its name is kept.

    Args:
        graph: The model.
        layers: Its layers; those whose weights may be set.

    Attributes:
        model: The copy; its tensors have the names of the original's.
    """

    def __init__(self, graph: ModelGraph, layers: Sequence[Layer]) -> None:
        self._graph = graph
        unused = UnusedNames(graph.model.proto)
        self._names = {layer.name: unused.new(f"{layer.name}.weight") for layer in layers}
        self._bias_names = {layer.name: unused.new(f"{layer.name}.bias") for layer in layers if can_shift(graph, layer)}
        proto = copy_without(graph.model.proto, "graph")
        proto.graph.CopyFrom(rewrite_graph(graph.model.proto.graph, self._rewriting(layers), self._freed(layers)))
        proto.ir_version = max(proto.ir_version, 4)
        self._keep_names(proto.graph, layers)
        self._tensors: dict[str, onnx.TensorProto] = {}
        for layer in layers:
            self._tensors[self._names[layer.name]] = proto.graph.initializer.add()
            self.set_weights(layer, layer.matrix(graph))
            if layer.name in self._bias_names:
                self._tensors[self._bias_names[layer.name]] = proto.graph.initializer.add()
                self.shift(layer, np.zeros(layer.view.channels))
        self.model: ModelFile = replace(graph.model, proto=proto)

    def weight_name(self, layer: Layer) -> str:
        """Return the name of a layer's weights in the copy."""
        return self._names[layer.name]

    def bias_name(self, layer: Layer) -> str | None:
        """Return the name of a layer's bias in the copy, None where :func:`can_shift` doesn't hold."""
        return self._bias_names.get(layer.name)

    def set_weights(self, layer: Layer, matrix: Floats) -> None:
        """Give a layer other weights.

        Args:
            layer: The layer.
            matrix: Its weights, operations that were folded into it included, [groups * outputs, inputs]. Zeros stay
                exact zeros.
        """
        factor = layer.fold_factor()
        if factor is not None:
            matrix = np.divide(
                matrix, factor, out=np.zeros_like(matrix), where=np.broadcast_to(factor, matrix.shape) != 0
            )
        self._put(self._names[layer.name], layer.view.tensor(matrix), layer.element_type)

    def shift(self, layer: Layer, shift: Doubles) -> None:
        """Give a layer its own bias and a shift of its outputs, folded operations included.

        Args:
            layer: A layer for which :func:`can_shift` holds.
            shift: What is added to each output, float64 [channels]; 0 where folding multiplies an output by 0.
        """
        self._put(self._bias_names[layer.name], own_bias(self._graph, layer, shift), layer.element_type)

    def _put(self, name: str, values: npt.NDArray[np.floating[Any]], element_type: int) -> None:
        array = values.astype(helper.tensor_dtype_to_np_dtype(element_type))
        self._tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def _freed(self, layers: Sequence[Layer]) -> set[str]:
        """Return the tensors that the layers' nodes no longer read."""
        biases = (layer.uses[0][0].input(BIAS) for layer in layers if layer.name in self._bias_names)
        return {layer.tensor.name for layer in layers} | {bias.name for bias in biases if bias is not None}

    def _keep_names(self, graph: onnx.GraphProto, layers: Sequence[Layer]) -> None:
        """Give weights the names of their layers, where nothing else has these any more."""
        taken = UnusedNames(onnx.ModelProto(graph=graph))
        names = {self._names[layer.name]: layer.name for layer in layers if taken.new(layer.name) == layer.name}
        for node in (node for inner in iter_graphs(graph) for node in inner.node):
            for slot, name in enumerate(node.input):
                node.input[slot] = names.get(name, name)
        self._names = {layer: names.get(name, name) for layer, name in self._names.items()}

    def _rewriting(self, layers: Sequence[Layer]) -> Callable[[onnx.NodeProto], onnx.NodeProto]:
        """Return what makes the layers' nodes read tensors of their own."""
        slots: dict[int, dict[int, str]] = {}
        for layer in layers:
            for node, slot in layer.uses:
                slots.setdefault(id(node.proto), {})[slot] = self._names[layer.name]
            if layer.name in self._bias_names:
                slots[id(layer.uses[0][0].proto)][BIAS] = self._bias_names[layer.name]

        def rewrite(node: onnx.NodeProto) -> onnx.NodeProto:
            new = copy_without(node) if id(node) in slots else node
            for slot, name in sorted(slots.get(id(node), {}).items()):
                new.input.extend([""] * (slot + 1 - len(new.input)))
                new.input[slot] = name
            return new

        return rewrite
