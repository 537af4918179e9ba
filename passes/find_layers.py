"""Find layers: every constant weight that a crossbar can hold, with its uses; everything else with a reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import TensorProto

from rerampile.errors import ModelError, UnsupportedModelError
from rerampile.graph import STANDARD_DOMAINS, GraphNode, ModelGraph, Tensor
from rerampile.layer import DigitalOperation, Layer
from rerampile.passes.fold import fold_neighbours
from rerampile.unit import Unit
from rerampile.weight_slots import SLOTS, WeightSlot

__all__ = ["FindLayers", "find_layers"]


_RUNTIME_DOMAINS = (*STANDARD_DOMAINS, "ai.onnx.ml", "com.microsoft")

_WEIGHT_TYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT8,
}


@dataclass(frozen=True)
class FindLayers:
    """Each weight matrix as [outputs, inputs] with its graph uses, neighbours folded in, digital nodes with reasons."""

    name: str = "find layers"

    def run(self, unit: Unit) -> Unit:
        """Fill ``layers`` and ``digital``.

        Raises:
            UnsupportedModelError: Nothing at all maps, or an operator is of a domain that ONNX Runtime does not know.
        """
        _refuse_unknown_domains(unit)
        layers, digital = find_layers(unit.graph)
        if not layers:
            reasons = sorted({f"{op.node.op}: {op.reason}" for op in digital})
            raise UnsupportedModelError(
                f"{unit.model.name}: nothing maps to a crossbar, expected at least one of {', '.join(SLOTS)} with "
                f"constant weights; found {'; '.join(reasons[:8])}"
            )
        return replace(unit, layers=tuple(layers), digital=tuple(digital))

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return how many layers were found, folded and left digital."""
        folds = sum(len(layer.folds) for layer in unit.layers)
        return {"layers": len(unit.layers), "folded": folds, "digital": len(unit.digital)}


def _refuse_unknown_domains(unit: Unit) -> None:
    for node in unit.graph.nodes:
        if node.proto.domain not in _RUNTIME_DOMAINS:
            raise UnsupportedModelError(
                f"{unit.model.name}: node '{node.full_name}': operator {node.op} is of a domain that ONNX Runtime does "
                f"not know, expected one of {', '.join(filter(None, _RUNTIME_DOMAINS))}; export the model without it"
            )


def find_layers(graph: ModelGraph) -> tuple[list[Layer], list[DigitalOperation]]:
    """Return every layer of a model in graph order, neighbours folded in, and each digital node with its reason.

    A node is neither where the deployed model no longer has it: because it was folded, or because only layers read the
    constant that it computes.
    """
    found: dict[tuple[object, ...], Layer] = {}
    digital: list[DigitalOperation] = []
    for node in graph.nodes:
        layers, why = _layers_of(graph, node)
        for layer, slot in layers:
            key = (id(layer.tensor), layer.view, layer.integer, id(layer.zero_point))
            if key in found:
                found[key] = replace(found[key], uses=(*found[key].uses, (node, slot)))
            else:
                found[key] = layer
        if why is not None:
            digital.append(DigitalOperation(node=node, code=why[0], reason=why[1]))
    folded = fold_neighbours(graph, _with_unique_names(found.values()))
    gone = _gone(graph, folded)
    return folded, [operation for operation in digital if id(operation.node) not in gone]


def _gone(graph: ModelGraph, layers: Sequence[Layer]) -> set[int]:
    """Return which nodes (by identity) were folded, or compute what nobody but layers and folded nodes reads."""
    gone = {id(fold.node) for layer in layers for fold in layer.folds}
    uses = {(id(node), slot) for layer in layers for node, slot in layer.uses}
    folded = [t for layer in layers for fold in layer.folds for t in fold.node.view.inputs if graph.is_constant(t)]

    def unread(tensor: Tensor) -> bool:
        readers = [(node, slot) for node in graph.consumers(tensor) for slot in node.slots(tensor)]
        return not graph.is_output(tensor) and all(id(n) in gone or (id(n), s) in uses for n, s in readers)

    for tensor in [*(layer.tensor for layer in layers), *folded]:
        for node in reversed(graph.chain(tensor)):
            if all(unread(output) for output in node.view.outputs):
                gone.add(id(node))
    return gone


def _layers_of(graph: ModelGraph, node: GraphNode) -> tuple[list[tuple[Layer, int]], tuple[str, str] | None]:
    """Return the layers of one node with their slots, or a code and a reason why it has none."""
    slots = SLOTS.get(node.proto.op_type) if node.proto.domain in STANDARD_DOMAINS else None
    if all(graph.is_constant(t) for t in node.view.outputs) and node.view.outputs:
        return [], ("constant", "its value is known when the model is compiled")
    if slots is None:
        return [], ("no-weights", "not an operator whose weights map to a crossbar")
    constant = [s for s in slots if (t := node.input(s.weight)) is not None and graph.is_constant(t)]
    if not constant:
        return [], (
            "computed-weights",
            "no operand is a stored constant: each is computed while the model runs, or sparse",
        )
    layers: list[tuple[Layer, int]] = []
    for slot in constant:
        layer = _layer(graph, node, slot)
        if isinstance(layer, tuple):
            return [], layer
        layers.append((layer, slot.weight))
    return layers, None


def _layer(graph: ModelGraph, node: GraphNode, slot: WeightSlot) -> Layer | tuple[str, str]:
    tensor = node.input(slot.weight)
    element_type = graph.element_type(tensor)
    if element_type not in _WEIGHT_TYPES:
        return "element-type", f"weights of type {TensorProto.DataType.Name(element_type).lower()}"
    shape = graph.shape(tensor)
    if shape is None:
        shape = graph.read(tensor).shape
    if math.prod(shape) == 0:
        return "empty", f"weights of shape {list(shape)} hold nothing"
    if not slot.rank[0] <= len(shape) <= slot.rank[1]:
        return "rank", f"weights of shape {list(shape)}, expected a rank of {slot.rank[0]} to {slot.rank[1]}"
    groups = node.attribute("group", 1)
    if groups < 1 or (groups > 1 and shape[0] % groups):
        raise ModelError(f"node '{node.full_name}': {shape[0]} channels of weights do not divide into {groups} groups")
    view = slot.view(node, shape)
    sources = [t.name for t in graph.sources(tensor) if math.prod(t.dims) == math.prod(shape)]
    layer = Layer(
        name=sources[0] if len(sources) == 1 else node.full_name,
        view=view,
        tensor=tensor,
        element_type=element_type,
        uses=((node, slot.weight),),
        integer=slot.zero_point is not None,
    )
    return layer if slot.zero_point is None else _with_zero_point(graph, layer, node, slot)


def _with_zero_point(graph: ModelGraph, layer: Layer, node: GraphNode, slot: WeightSlot) -> Layer | tuple[str, str]:
    zero_point: Tensor | None = node.input(slot.zero_point or 0)
    if zero_point is None:
        return layer
    if not graph.is_constant(zero_point):
        return "computed-weights", "the zero point of the weights is computed while the model runs"
    shape, weights = graph.read(zero_point).shape, layer.view.tensor_shape
    if len(shape) == 1 and len(weights) > 1:
        along = [1] * len(weights)
        along[slot.zero_point_axis] = shape[0]
        shape = tuple(along)
    if len(shape) > len(weights) or any(n not in (1, m) for n, m in zip(shape[::-1], weights[::-1], strict=False)):
        return "zero-point", f"a zero point of shape {list(shape)} for weights of shape {list(weights)}"
    return replace(layer, zero_point=zero_point, zero_point_shape=shape)


def _with_unique_names(layers: Iterable[Layer]) -> list[Layer]:
    used = {"__metadata__"}  # a word of the safetensors format, in which masks are named by layer
    named: list[Layer] = []
    for layer in layers:
        name, number = layer.name, 1
        while name in used:
            number += 1
            name = f"{layer.name}#{number}"
        used.add(name)
        named.append(replace(layer, name=name))
    return named
