"""The model that a deployment must agree with: the user's own graph, with pruned or quantised weights put in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rerampile.editable_model import BIAS, own_bias
from rerampile.graph import ModelGraph
from rerampile.graph_edit import UnusedNames, rewrite_graph
from rerampile.layer import Layer
from rerampile.onnx_file import copy_without, external_tensor, iter_graphs
from rerampile.tensor_file import TensorWriter, stores
from rerampile.unit import Unit

__all__ = ["write_reference"]

_WEIGHTS = "weights.safetensors"


def write_reference(unit: Unit, weights: Callable[[Layer], npt.NDArray[np.float32]], folder: Path) -> Path:
    """Write the user's model with other weights, nothing folded or mapped, and return its path.

    Each mapped node reads a new initializer, and another one for its bias where that is corrected; every operation
    around it stays as the user wrote it, so that folds and mapped functions are compared with what they replace.

    Args:
        unit: The compilation.
        weights: Gives a layer's weights before folds, as the model's file would hold them, float32
            [groups * outputs, inputs].
        folder: An empty folder to write into.
    """
    unused = UnusedNames(unit.model.proto)
    names = {layer.name: unused.new(f"{layer.name}__reference") for layer in unit.layers}
    slots: dict[int, dict[int, str]] = {}
    for layer in unit.layers:
        for node, slot in layer.uses:
            slots.setdefault(id(node.proto), {})[slot] = names[layer.name]
    biases = _corrected_biases(unit, unused, slots)

    def rewrite(node: onnx.NodeProto) -> onnx.NodeProto:
        new = copy_without(node) if id(node) in slots else node
        for slot, name in slots.get(id(node), {}).items():
            new.input.extend([""] * (slot + 1 - len(new.input)))
            new.input[slot] = name
        return new

    model = copy_without(unit.model.proto, "graph")
    freed = {layer.tensor.name for layer in unit.layers}
    model.graph.CopyFrom(rewrite_graph(unit.model.proto.graph, rewrite, freed))
    model.ir_version = max(model.ir_version, 4)
    _, *subgraphs = iter_graphs(model.graph)
    for tensor in (t for graph in subgraphs for t in graph.initializer if t.data_location == TensorProto.EXTERNAL):
        tensor.CopyFrom(numpy_helper.from_array(unit.model.array(tensor), tensor.name))
    carried = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    specs = [(names[layer.name], _dtype(layer), layer.view.tensor_shape) for layer in unit.layers]
    specs += [(t.name, helper.tensor_dtype_to_np_dtype(t.data_type), tuple(t.dims)) for t in carried]
    storable = [spec for spec in specs if stores(spec[1])]
    by_name: dict[str, Layer | TensorProto] = {names[layer.name]: layer for layer in unit.layers}
    by_name |= {t.name: t for t in carried}
    made: dict[str, TensorProto] = {}
    with TensorWriter(folder / _WEIGHTS, storable, {}, lasting=False) as writer:
        for name, spec in writer.specs.items():
            writer.write(name, _values(unit, by_name[name], weights))
            made[name] = external_tensor(name, _WEIGHTS, spec)
    for name, _, _ in specs:
        if name not in made:
            made[name] = numpy_helper.from_array(_values(unit, by_name[name], weights), name)
    kept = [t for t in model.graph.initializer if t.name not in made]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *made.values(), *biases])
    path = folder / "reference.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _corrected_biases(unit: Unit, unused: UnusedNames, slots: dict[int, dict[int, str]]) -> list[TensorProto]:
    """Return the biases that correct outputs, as the user's graph adds them, and note which nodes read them."""
    made = []
    for layer in unit.layers:
        addend = unit.mapped[layer.name].addend
        if addend is not None:
            name = unused.new(f"{layer.name}__bias")
            slots[id(layer.uses[0][0].proto)][BIAS] = name
            made.append(numpy_helper.from_array(own_bias(unit.graph, layer, addend).astype(_dtype(layer)), name))
    return made


def _values(
    unit: Unit, source: Layer | TensorProto, weights: Callable[[Layer], npt.NDArray[np.float32]]
) -> npt.NDArray[Any]:
    if isinstance(source, TensorProto):
        return unit.model.array(source)
    return _original_tensor(unit.graph, source, weights(source))


def _original_tensor(graph: ModelGraph, layer: Layer, matrix: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return a matrix as the weight tensor that the layer's nodes read, in its own type."""
    tensor = layer.view.tensor(matrix)
    dtype = _dtype(layer)
    if not layer.integer:
        return tensor.astype(dtype)
    if layer.zero_point is not None:
        tensor = tensor + graph.read(layer.zero_point).reshape(layer.zero_point_shape)
    info = np.iinfo(dtype)
    rounded: npt.NDArray[Any] = np.clip(np.rint(tensor), info.min, info.max).astype(dtype)
    return rounded


def _dtype(layer: Layer) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(layer.element_type)
