"""The deployed model with ordinary weights: what its crossbar functions compute, as initializers that can be set.

Validation changes weights, chip after chip. Here each layer's cells, gains and the arithmetic that decodes them give
way to one initializer that holds no data: whoever opens a session gives it. Biases and all digital tensors stay.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx
import onnx.inliner
import onnxruntime as ort
from onnx import FunctionProto, NodeProto, TensorProto

from rerampile.crossbar_functions import DOMAIN
from rerampile.deployment import Deployment
from rerampile.errors import PlanFormatError
from rerampile.files import CONDUCTANCES
from rerampile.onnx_file import iter_graphs

__all__ = ["PlainModel", "declare_weight", "plain_model", "weight_options"]

_WEIGHT = re.compile(r"(w\d+_)?weight")  # what function bodies call a decoded weight tensor


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """A model whose mapped weights are named and left open.

    Attributes:
        proto: The model, without functions; each weight is an external initializer of the main graph without data.
        weights: Name of each layer's weight tensor, float32 in the layer's ``weight_shape``, in the plan's order.
        optimised: Whether ONNX Runtime has optimised it already.
    """

    proto: onnx.ModelProto = field(repr=False)
    weights: tuple[str, ...]
    optimised: bool = False


def plain_model(deployment: Deployment) -> PlainModel:
    """Return the deployed model of a deployment with ordinary weights.

    Raises:
        PlanFormatError: The deployed model does not read the cells of every layer of the plan.
    """
    proto = onnx.load_model(deployment.model_path, load_external_data=False)
    layers = _layers_of_cells(deployment, proto.graph)
    weights = _weight_names(deployment, proto)
    readers = {
        (function.domain, function.name): _read_weights(function)
        for function in proto.functions
        if function.domain == DOMAIN
    }
    for node in (node for graph in iter_graphs(proto.graph) for node in graph.node):
        reader = readers.get((node.domain, node.op_type))
        if reader is not None:
            _pass_weights(node, reader, {cell: weights[layer] for cell, layer in layers.items()})
    kept = [t for t in proto.graph.initializer if t.name not in layers]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for layer, name in zip(deployment.plan.layers, weights, strict=True):
        declare_weight(proto.graph, name, layer.weight_shape)
    inlined = onnx.inliner.inline_local_functions(proto)
    for imported in [o for o in inlined.opset_import if o.domain == DOMAIN]:
        inlined.opset_import.remove(imported)
    return PlainModel(proto=inlined, weights=weights)


def declare_weight(
    graph: onnx.GraphProto, name: str, shape: Collection[int], element_type: int = TensorProto.FLOAT
) -> None:
    """Add an initializer whose values a session is given when it is opened."""
    tensor = graph.initializer.add(name=name, data_type=element_type, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=CONDUCTANCES)


def weight_options(deployment: Deployment, values: Mapping[str, npt.NDArray[Any]]) -> Any:
    """Return session options that give a plain model its weights.

    They are given as external initializers: ONNX Runtime's ``add_initializer`` acts only after constants were folded,
    so that old values may live on.

    Args:
        deployment: Where the model's digital tensors lie.
        values: Weight tensors by name. They must outlive the session, which may read them where they are.
    """
    options = ort.SessionOptions()
    shared = [ort.OrtValue.ortvalue_from_numpy(array) for array in values.values()]
    options.add_external_initializers(list(values), shared)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(deployment.folder))
    return options


def _layers_of_cells(deployment: Deployment, graph: onnx.GraphProto) -> dict[str, int]:
    """Return, for every initializer in the conductance file, which layer's cells or gain it reads."""
    specs = deployment.conductances.specs
    starts = sorted(
        (specs[name].offset, number)
        for number, layer in enumerate(deployment.plan.layers)
        for name in (layer.cells_tensor, layer.gain_tensor)
        if name in specs
    )
    found: dict[str, int] = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == CONDUCTANCES:
            found[tensor.name] = starts[bisect_right(starts, (int(entries["offset"]), len(starts))) - 1][1]
    missing = set(range(len(deployment.plan.layers))) - set(found.values())
    if missing:
        name = deployment.plan.layers[min(missing)].name
        raise PlanFormatError(f"{deployment.model_path}: reads no cells of layer '{name}'; compile the model again")
    return found


def _weight_names(deployment: Deployment, proto: onnx.ModelProto) -> tuple[str, ...]:
    """Return a name for each layer's weight that nothing in the model has yet."""
    used = {name for graph in iter_graphs(proto.graph) for name in _names(graph)}
    names = []
    for layer in deployment.plan.layers:
        name = f"{layer.name}.weight"
        while name in used:
            name += "_"
        used.add(name)
        names.append(name)
    return tuple(names)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output)


@dataclass(frozen=True)
class _Reader:
    """How calls of a changed function change.

    Attributes:
        kept: Positions of the inputs that stay.
        cells: For each weight input, which is appended, the position of one input that held its cells.
        attributes: The attributes that the function still knows.
    """

    kept: list[int]
    cells: list[int]
    attributes: set[str]


def _read_weights(function: FunctionProto) -> _Reader:
    """Make a crossbar function read ordinary weights instead of decoding cells."""
    producers = {output: node for node in function.node for output in node.output}
    formals = list(function.input)
    decoding: set[int] = set()
    gone: set[str] = set()
    cells: list[int] = []
    weights = [name for name in producers if _WEIGHT.fullmatch(name)]
    for weight in weights:
        waiting, read = [weight], set()
        while waiting:
            name = waiting.pop()
            if name in producers:
                decoding.add(id(producers[name]))
                waiting.extend(producers[name].input)
            else:
                read.add(name)
        cells.append(min(formals.index(name) for name in read))
        gone |= read
    kept_nodes = [node for node in function.node if id(node) not in decoding]
    attributes = {a.ref_attr_name for node in kept_nodes for a in node.attribute if a.ref_attr_name}
    reader = _Reader([i for i, name in enumerate(formals) if name not in gone], cells, attributes)
    _replace(function.node, kept_nodes)
    _replace(function.input, [*(formals[i] for i in reader.kept), *weights])
    _replace(function.attribute, [name for name in function.attribute if name in attributes])
    return reader


def _pass_weights(node: NodeProto, reader: _Reader, weights: dict[str, str]) -> None:
    actual = list(node.input)
    kept = [actual[i] for i in reader.kept if i < len(actual)]
    _replace(node.input, [*kept, *(weights[actual[i]] for i in reader.cells)])
    _replace(node.attribute, [a for a in node.attribute if a.name in reader.attributes])


def _replace(repeated: Any, values: Iterable[Any]) -> None:
    """Put other values into a repeated field."""
    values = list(values)
    del repeated[:]
    repeated.extend(values)
