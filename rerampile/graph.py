"""A read-only view of a model's graphs: who makes a tensor, who reads it, and what is constant.

onnx-graphsurgeon links producers and consumers, across subgraphs too. It is used to look, never to write: a round trip
through it drops metadata, so that edits are made on the original messages (each view is paired with its message).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from rerampile.errors import ModelError
from rerampile.onnx_file import ModelFile

__all__ = ["STANDARD_DOMAINS", "GraphNode", "ModelGraph", "Tensor", "named_nodes", "operator_of"]

STANDARD_DOMAINS = ("", "ai.onnx")

Tensor = Any  # gs.Variable or gs.Constant: graphsurgeon carries no types

_NOT_DETERMINISTIC = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
}
# Outside the standard domain, but defined as their namesakes in it; exporters for ONNX Runtime put weights behind them.
_NAMESAKES = ("com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear")
_LARGEST_CONSTANT = 2**30  # elements of a computed constant; a file of a few bytes can ask for any number


def operator_of(node: onnx.NodeProto) -> str:
    """Return the operator of a node, with its domain where it is not the standard one."""
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"


def named_nodes(graph: onnx.GraphProto, scope: tuple[str, ...] = ()) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Yield each node of a graph with its full name, subgraphs included, in the order of :class:`ModelGraph`."""
    for node in graph.node:
        name = _own_name(node)
        yield "/".join((*scope, name)), node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from named_nodes(attribute.g, (*scope, name, attribute.name))


def _own_name(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type}_{next(filter(None, node.output), '')}"


@dataclass(eq=False)
class GraphNode:
    """One node: its message, its linked view, and the graph it lies in.

    Attributes:
        proto: The message, owned by the model.
        view: The graphsurgeon node; ``view.inputs`` and ``view.outputs`` are tensors.
        graph: The graph message that holds the node.
        scope: Names of the nodes around it, each before the attribute that holds the graph, outermost first; empty in
            the main graph.
        name: Readable name: the node's own, or its operator and first output.
    """

    proto: onnx.NodeProto = field(repr=False)
    view: Any = field(repr=False)
    graph: onnx.GraphProto = field(repr=False)
    scope: tuple[str, ...]
    name: str

    @property
    def op(self) -> str:
        """Operator, with its domain where it is not the standard one."""
        return operator_of(self.proto)

    @property
    def full_name(self) -> str:
        """Name with the nodes around it, as messages and the plan show it."""
        return "/".join((*self.scope, self.name))

    def input(self, slot: int) -> Tensor | None:
        """Return the tensor at an input slot, or None where it is absent."""
        if slot >= len(self.proto.input) or not self.proto.input[slot]:
            return None
        return self.view.inputs[slot]

    @property
    def random(self) -> bool:
        """Whether two runs of the node may differ."""
        training = self.proto.op_type == "Dropout" and self.input(2) is not None
        return self.proto.op_type in _NOT_DETERMINISTIC or training

    def slots(self, tensor: Tensor) -> list[int]:
        """Return the input slots at which the node reads ``tensor``."""
        return [slot for slot, value in enumerate(self.view.inputs) if value is tensor]

    def attribute(self, name: str, default: Any) -> Any:
        """Return the value of an attribute, or a default."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default


class ModelGraph:
    """All nodes of a model, subgraphs included, in the order of the file."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self.nodes: list[GraphNode] = []
        self._by_view: dict[int, GraphNode] = {}
        self._initializers: dict[int, TensorProto] = {}
        self._constant: dict[int, bool] = {}
        self._outputs: set[int] = set()
        with G_LOGGER.suppress():  # it prints to stdout, which belongs to the user's data
            root = gs.import_onnx(model.proto)
        self._root = root  # views are known by identity, so they must outlive this object
        self._add(root, model.proto.graph, (), ({},))

    def _add(
        self, view: Any, graph: onnx.GraphProto, scope: tuple[str, ...], outer: tuple[dict[str, TensorProto], ...]
    ) -> None:
        scopes = (*outer, {tensor.name: tensor for tensor in graph.initializer})
        self._outputs.update(id(tensor) for tensor in view.outputs)
        for proto, node_view in zip(graph.node, view.nodes, strict=True):
            name = _own_name(proto)
            node = GraphNode(proto=proto, view=node_view, graph=graph, scope=scope, name=name)
            self.nodes.append(node)
            self._by_view[id(node_view)] = node
            for tensor in node_view.inputs:
                if isinstance(tensor, gs.Constant) and id(tensor) not in self._initializers:
                    known = next((s[tensor.name] for s in reversed(scopes) if tensor.name in s), None)
                    if known is not None:
                        self._initializers[id(tensor)] = known
            for attribute in proto.attribute:
                if attribute.HasField("g"):
                    self._add(node_view.attrs[attribute.name], attribute.g, (*scope, name, attribute.name), scopes)

    def producer(self, tensor: Tensor) -> GraphNode | None:
        """Return the node that makes ``tensor``, or None for inputs and initializers."""
        return self._by_view.get(id(tensor.inputs[0])) if tensor.inputs else None

    def consumers(self, tensor: Tensor) -> list[GraphNode]:
        """Return the nodes that read ``tensor``, once for each input slot."""
        return [self._by_view[id(view)] for view in tensor.outputs if id(view) in self._by_view]

    def is_output(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is an output of the graph that it lies in."""
        return id(tensor) in self._outputs

    def initializer(self, tensor: Tensor) -> TensorProto | None:
        """Return the message of an initializer, or None where ``tensor`` is none."""
        return self._initializers.get(id(tensor))

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is an initializer, or computed from initializers alone by deterministic operators."""
        waiting = [tensor]
        opened: set[int] = set()
        while waiting:  # by hand: a chain may be longer than calls may nest
            value = waiting[-1]
            sources = self._constant_sources(value)
            unknown = [source for source in sources or () if id(source) not in self._constant]
            if unknown and id(value) not in opened:
                opened.add(id(value))  # a cycle, which the checker refuses, would end here
                waiting += unknown
                continue
            waiting.pop()
            constant = sources is not None and all(self._constant.get(id(source), False) for source in sources)
            self._constant[id(value)] = constant
        return self._constant[id(tensor)]

    def _constant_sources(self, tensor: Tensor) -> list[Tensor] | None:
        """Return what a constant is computed from, or None where it cannot be one whatever that is."""
        if id(tensor) in self._initializers:
            return []
        node = self.producer(tensor)
        if node is None or node.random:
            return None
        if node.proto.domain not in STANDARD_DOMAINS and node.op not in _NAMESAKES:
            return None
        if any(a.HasField("g") or a.graphs for a in node.proto.attribute):
            return None
        return _sources(node)

    def chain(self, tensor: Tensor) -> list[GraphNode]:
        """Return the nodes that compute a constant, in the order in which they run; none for an initializer."""
        found: dict[int, GraphNode] = {}
        opened: set[int] = set()
        waiting = [tensor]
        while waiting:
            value = waiting[-1]
            node = None if id(value) in self._initializers else self.producer(value)
            if node is None or id(node) in opened:
                waiting.pop()
                if node is not None:
                    found.setdefault(id(node), node)
                continue
            opened.add(id(node))
            waiting += reversed(_sources(node))
        return list(found.values())

    def sources(self, tensor: Tensor) -> list[TensorProto]:
        """Return the initializers behind a constant."""
        tensors = [tensor, *(t for node in self.chain(tensor) for t in node.view.inputs)]
        return list({id(t): self._initializers[id(t)] for t in tensors if id(t) in self._initializers}.values())

    def read(self, tensor: Tensor) -> npt.NDArray[np.float32]:
        """Return a constant as float32 (integers of up to 24 bits are exact), never kept.

        Raises:
            ModelError: The constant cannot be computed, or would take an absurd amount of memory.
        """
        known = self.initializer(tensor)
        if known is not None:
            return self.model.array(known).astype(np.float32, copy=False)
        chain = self.chain(tensor)
        if len(chain) == 1 and chain[0].op == "Cast" and chain[0].attribute("to", 0) == TensorProto.FLOAT:
            return self.read(chain[0].input(0))
        return self._evaluate(tensor, chain)

    def element_type(self, tensor: Tensor) -> int:
        """Return the ONNX element type of a constant, 0 where it cannot be inferred."""
        known = self.initializer(tensor)
        if known is not None:
            return int(known.data_type)
        return int(self._infer(tensor, self.chain(tensor)).elem_type)

    def shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Return the shape of a constant, or None where it cannot be inferred without computing it."""
        known = self.initializer(tensor)
        if known is not None:
            return tuple(known.dims)
        inferred = self._infer(tensor, self.chain(tensor))
        if not inferred.HasField("shape") or not all(d.HasField("dim_value") for d in inferred.shape.dim):
            return None
        return tuple(d.dim_value for d in inferred.shape.dim)

    def _infer(self, tensor: Tensor, chain: Sequence[GraphNode]) -> onnx.TypeProto.Tensor:
        """Infer type and shape of a computed constant from a graph of its chain, large initializers left out."""
        nodes = [_standard(node) for node in chain]
        model = self._chain_model(tensor, nodes, tuple(_small(source) for source in self.sources(tensor)))
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        values = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
        for name, value in values.items():
            dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
            if math.prod(dims) > _LARGEST_CONSTANT:
                raise ModelError(
                    f"{self.model.name}: constant '{name}' of shape {dims} has {math.prod(dims)} elements, "
                    f"expected at most {_LARGEST_CONSTANT}"
                )
        found: onnx.TypeProto.Tensor = values[tensor.name].type.tensor_type
        return found

    def _chain_model(
        self,
        tensor: Tensor,
        nodes: Sequence[onnx.NodeProto],
        initializers: Sequence[TensorProto | onnx.ValueInfoProto],
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            nodes,
            "constant",
            [value for value in initializers if isinstance(value, onnx.ValueInfoProto)],
            [onnx.ValueInfoProto(name=tensor.name)],
            [value for value in initializers if isinstance(value, TensorProto)],
        )
        proto = self.model.proto
        return helper.make_model(graph, opset_imports=proto.opset_import, ir_version=max(proto.ir_version, 4))

    def _evaluate(self, tensor: Tensor, chain: Sequence[GraphNode]) -> npt.NDArray[np.float32]:
        """Run a constant chain in ONNX Runtime, the engine that gives it its meaning in the deployed model."""
        import onnxruntime as ort

        self._infer(tensor, chain)  # refuses absurd sizes before they are allocated
        nodes = [node.proto for node in chain]
        model = self._chain_model(tensor, nodes, [self._inline(source) for source in self.sources(tensor)])
        name = f"{tensor.name}__float"
        model.graph.node.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return np.asarray(session.run([name], {})[0], np.float32)
        except Exception as error:
            raise ModelError(
                f"{self.model.name}: constant '{tensor.name}' cannot be computed by ONNX Runtime: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    def _inline(self, tensor: TensorProto) -> TensorProto:
        """Return ``tensor`` with its data inside, for a model that has no folder."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor
        return numpy_helper.from_array(self.model.array(tensor), tensor.name)


def _sources(node: GraphNode) -> list[Tensor]:
    """Return the tensors that a node reads, absent ones left out."""
    return [source for source, name in zip(node.view.inputs, node.proto.input, strict=True) if name]


def _standard(node: GraphNode) -> onnx.NodeProto:
    """Return the message of a node of a chain, in the domain in which shape inference knows it."""
    if node.proto.domain in STANDARD_DOMAINS:
        return node.proto
    copy = onnx.NodeProto()
    copy.CopyFrom(node.proto)
    copy.domain = ""
    return copy


def _small(tensor: TensorProto) -> TensorProto | onnx.ValueInfoProto:
    """Return ``tensor`` itself where shape inference may need its values, else only its type and shape."""
    if math.prod(tensor.dims) <= 64 and tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
