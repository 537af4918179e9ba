"""The deployed ONNX model: the user's own, its mapped nodes replaced by calls that read crossbar cells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rerampile.crossbar_functions import DOMAIN, DOMAIN_VERSION, CellInputs, FunctionLibrary
from rerampile.editable_model import own_bias
from rerampile.files import CONDUCTANCES, DIGITAL
from rerampile.graph import GraphNode
from rerampile.graph_edit import UnusedNames, rewrite_graph
from rerampile.layer import Layer
from rerampile.onnx_file import copy_without, external_tensor, iter_graphs
from rerampile.tensor_file import TensorSpec, TensorWriter, stores
from rerampile.unit import Unit

__all__ = ["deployed_ir_version", "deployed_model"]

_FUNCTIONS_IR = 8  # the first IR version with model-local functions
_INLINE_LIMIT = 1 << 30  # bytes of digital tensors that the model carries itself


def deployed_model(unit: Unit, conductances: Mapping[str, TensorSpec]) -> onnx.ModelProto:
    """Return the user's model with every mapped node reading its weights from the conductance file.

    Args:
        unit: The compilation, up to *allocate*. Digital tensors that were external get a file in its folder.
        conductances: Where each tensor lies in the conductance file.
    """
    edit = _Edit.of(unit, conductances)
    original = unit.model.proto
    model: onnx.ModelProto = copy_without(original, "graph")
    model.graph.CopyFrom(rewrite_graph(original.graph, edit.rewrite, edit.freed))
    model.graph.initializer.extend(edit.initializers)
    model.functions.extend(edit.crossbars.functions)
    if all(imported.domain != DOMAIN for imported in model.opset_import):  # a deployed model may be compiled again
        model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    model.ir_version = deployed_ir_version(original)
    _move_digital_tensors(unit, model)
    return model


def deployed_ir_version(original: onnx.ModelProto) -> int:
    """Return the IR version of the deployed model: the user's own, raised where it knows no model-local functions."""
    return max(original.ir_version, _FUNCTIONS_IR)


@dataclass
class _Edit:
    """The changes from the user's graph to the deployed one.

    Attributes:
        calls: By message identity, what replaces a mapped node.
        gone: Message identities of folded nodes.
        initializers: Cells, gains and folded biases.
        freed: Names that mapped or folded nodes no longer read.
        crossbars: The functions that calls refer to.
    """

    calls: dict[int, onnx.NodeProto]
    gone: set[int]
    initializers: list[TensorProto]
    freed: set[str]
    crossbars: FunctionLibrary

    @classmethod
    def of(cls, unit: Unit, specs: Mapping[str, TensorSpec]) -> _Edit:
        quantised = any(node.proto.op_type == "QuantizeLinear" for node in unit.graph.nodes)
        edit = cls({}, set(), [], set(), FunctionLibrary(unit.model.proto.opset_import, quantised))
        names = UnusedNames(unit.model.proto)
        nodes: dict[int, tuple[GraphNode, dict[int, CellInputs]]] = {}
        for layer in unit.layers:
            cells = _cell_inputs(unit, layer, names, specs, edit.initializers)
            for node, slot in layer.uses:
                nodes.setdefault(id(node), (node, {}))[1][slot] = cells
        for node, weights in nodes.values():
            layer = next(iter(weights.values())).layer
            bias = None
            folded_bias = _folded_bias(unit, layer)
            if folded_bias is not None and (folded_bias.any() or _has_bias(node)):
                bias = names.new(f"{layer.name}.bias")
                edit.initializers.append(numpy_helper.from_array(folded_bias, bias))
            edit.gone.update(id(fold.node.proto) for fold in layer.folds)
            folded = [node, *(fold.node for fold in layer.folds)]
            edit.freed.update(name for n in folded for name in n.proto.input)
            after = [fold.node for fold in layer.folds if fold.side == "after"]
            outputs = after[-1].proto.output if after else node.proto.output
            edit.calls[id(node.proto)] = edit.crossbars.call(node, weights, bias, _moved_data(unit, layer), outputs)
        return edit

    def rewrite(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return what stands for a node of the user's graph, None where it was folded."""
        return None if id(node) in self.gone else self.calls.get(id(node), node)


def _cell_inputs(
    unit: Unit, layer: Layer, names: UnusedNames, specs: Mapping[str, TensorSpec], initializers: list[TensorProto]
) -> CellInputs:
    """Make the initializers of one layer, each a window into the conductance file."""
    coding = unit.mapped[layer.name].coding
    spec = specs[f"{layer.name}.cells"]
    size = math.prod(layer.view.shape) * spec.dtype.itemsize
    found: dict[str, list[str]] = {"plus": [], "minus": []}
    for k in range(coding.slices):
        for cell, role in enumerate(("plus", "minus")[: coding.cells]):
            suffix = f"_{k}" if coding.slices > 1 else ""
            name = names.new(f"{layer.name}.g_{role}{suffix}")
            offset = spec.offset + (k * coding.cells + cell) * size
            window = TensorSpec(dtype=spec.dtype, shape=layer.view.shape, offset=offset)
            initializers.append(external_tensor(name, CONDUCTANCES, window))
            found[role].append(name)
    gain = names.new(f"{layer.name}.gain")
    gain_spec = specs[f"{layer.name}.gain"]
    segments = unit.mapped[layer.name].segments
    shape = (gain_spec.shape[0], len(segments.starts))
    initializers.append(external_tensor(gain, CONDUCTANCES, replace(gain_spec, shape=shape)))
    plus, minus = tuple(found["plus"]), tuple(found["minus"])
    return CellInputs(layer=layer, coding=coding, plus=plus, minus=minus, gain=gain, segments=segments)


def _folded_bias(unit: Unit, layer: Layer) -> npt.NDArray[Any] | None:
    """Return a layer's folded and corrected bias in its own type, for the weights that its cells hold."""
    mapped = unit.mapped[layer.name]
    if layer.bias is None:
        bias = None if mapped.addend is None else own_bias(unit.graph, layer) + mapped.addend
        return None if bias is None else bias.astype(helper.tensor_dtype_to_np_dtype(layer.element_type))
    weights = unit.weights(layer) if layer.input_addend is not None else np.zeros((0, 0), np.float32)
    if layer.input_addend is not None:
        gain = mapped.segments.spread(mapped.gain)
        weights = mapped.coding.decode(mapped.coding.encode(weights, gain), gain)
    bias = layer.bias_with(weights)
    if bias is not None and mapped.addend is not None:
        bias = bias + mapped.addend
    return None if bias is None else bias.astype(helper.tensor_dtype_to_np_dtype(layer.element_type))


def _has_bias(node: GraphNode) -> bool:
    return node.op != "MatMul" and node.input(2) is not None


def _moved_data(unit: Unit, layer: Layer) -> str | None:
    """Return the name of the data input in front of the operations folded before a layer, or None."""
    before = [fold.node for fold in layer.folds if fold.side == "before"]
    if not before:
        return None
    source = next(t for t in before[-1].view.inputs if not unit.graph.is_constant(t))
    return str(source.name)


def _move_digital_tensors(unit: Unit, model: onnx.ModelProto) -> None:
    """Give digital tensors that were external, or are too many to carry, a file of their own."""
    tensors = [t for graph in iter_graphs(model.graph) for t in graph.initializer]
    digital = [t for t in tensors if not _in_conductances(t)]
    for tensor in digital:
        unit.model.put_back(tensor)
    inline = sum(len(t.raw_data) for t in digital)
    moved = [t for t in digital if t.data_location == TensorProto.EXTERNAL or (inline > _INLINE_LIMIT and t.raw_data)]
    moved = [t for t in moved if stores(helper.tensor_dtype_to_np_dtype(t.data_type))]
    for tensor in digital:
        if tensor.data_location == TensorProto.EXTERNAL and all(tensor is not m for m in moved):
            tensor.CopyFrom(numpy_helper.from_array(unit.model.array(tensor), tensor.name))
    if not moved:
        return
    names = [f"{i}/{t.name}" for i, t in enumerate(moved)]
    announced = [
        (name, helper.tensor_dtype_to_np_dtype(t.data_type), tuple(t.dims))
        for name, t in zip(names, moved, strict=True)
    ]
    by_name = dict(zip(names, moved, strict=True))
    with TensorWriter(unit.folder / DIGITAL, announced, {"format": "rerampile-digital"}) as writer:
        for name, spec in writer.specs.items():
            tensor = by_name[name]
            writer.write(name, unit.model.array(tensor))
            tensor.CopyFrom(external_tensor(tensor.name, DIGITAL, spec))


def _in_conductances(tensor: TensorProto) -> bool:
    return any(entry.key == "location" and entry.value == CONDUCTANCES for entry in tensor.external_data)
