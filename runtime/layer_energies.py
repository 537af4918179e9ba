"""What weight errors do to the products of layers: one pass over data, beside the deployed model itself.

For independent errors of variance ``V``, the error energy of ``y = op(x, W)`` is the sum of ``op(x * x, V)``, and in
that sum all outputs may share one weight: the sum of their variances. So each layer gets a companion with an output for
each fault model, on its squared inputs; strides, pads and groups are the operator's own. The shift of ``offset`` needs
a second companion on the inputs themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rerampile.deployment import Deployment
from rerampile.layer_plan import LayerPlan
from rerampile.matrix_view import MatrixView
from rerampile.onnx_file import copy_without, iter_graphs
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.layer_outputs import by_group_and_output
from rerampile.runtime.plain_model import PlainModel, plain_model, weight_options
from rerampile.runtime.session import open_session, run
from rerampile.runtime.weight_errors import LayerErrors, OffsetSums

__all__ = ["Energies", "layer_energies"]

Inputs = Mapping[str, npt.NDArray[Any]]
Doubles = npt.NDArray[np.float64]

_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(kw_only=True)
class Energies:
    """Sums over images, positions and output channels of one layer.

    Attributes:
        products: Squared products, before any bias.
        errors: Expected squared errors around the mean error, by fault model.
        shifts: Squared sums of inputs, by the gain of each output: what a shift of one adds. 0 for pairs.
        crossed: The same sums times the products.
    """

    products: float = 0.0
    errors: Doubles
    shifts: float = 0.0
    crossed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Companion:
    """One use of a layer, and what is read of it.

    Attributes:
        layer: Position in the plan.
        product: Output of the model: the energy of the products.
        variance: Output: op(x * x, variances).
        sums: Output: op(x, sums and products of the offset); "" for pairs.
        op: Its operator.
        slot: The input slot that reads the weights.
    """

    layer: int
    product: str
    variance: str
    sums: str
    op: str
    slot: int


def layer_energies(
    deployment: Deployment, errors: Sequence[LayerErrors], models: Sequence[FaultModel], batches: Iterable[Inputs]
) -> tuple[dict[int, Energies], dict[int, str]]:
    """Run batches of inputs; return each layer's energies, and the reason for each layer that has none.

    Args:
        deployment: The deployment.
        errors: The errors of each layer's weights.
        models: Fault models.
        batches: Inputs by name, one batch in memory at a time.
    """
    plain = plain_model(deployment)
    reasons = _unpredicted(deployment, plain)
    graph = _Graph(plain, models)
    for number, layer in enumerate(deployment.plan.layers):
        if number not in reasons:
            graph.add(number, layer, errors[number])
    if not graph.companions:
        return {}, reasons
    weights = {
        name: np.ascontiguousarray(layer.view.tensor(deployment.weights(layer)))
        for layer, name in zip(deployment.plan.layers, plain.weights, strict=True)
    }
    deployment.conductances.drop_pages()
    session = open_session(graph.proto().SerializeToString(), weight_options(deployment, weights))
    found = {number: Energies(errors=np.zeros(len(models))) for number in graph.offsets}
    names = [value.name for value in session.get_outputs()]
    needed = {value.name for value in session.get_inputs()}
    for inputs in batches:
        given = {name: array for name, array in inputs.items() if name in needed}
        graph.collect(dict(zip(names, run(session, given), strict=True)), found)
    for number, energies in list(found.items()):
        finite = np.isfinite([energies.products, energies.shifts, energies.crossed, *energies.errors]).all()
        if not (finite and energies.products > 0):
            reasons[number] = (
                "its products are all zero on these inputs"
                if finite
                else "its products or their errors are not all finite on these inputs"
            )
            del found[number]
    return found, reasons


def _unpredicted(deployment: Deployment, plain: PlainModel) -> dict[int, str]:
    """Return the layers that no companion can stand beside."""
    reasons: dict[int, str] = {}
    main, *inner = iter_graphs(plain.proto.graph)
    inside = {name for graph in inner for node in graph.node for name in node.input}
    for number, name in enumerate(plain.weights):
        readers = _readers(main, name)
        if name in inside:
            reasons[number] = "it runs in a subgraph, whose inputs are not seen from outside"
        elif odd := next((node for node, _ in readers if node.op_type not in _OPERATORS), None):
            reasons[number] = f"{odd.op_type} feeds its own errors back"
        elif not readers:
            reasons[number] = "no operator of the deployed model reads it"
    return reasons


def _readers(graph: onnx.GraphProto, weight: str) -> list[tuple[NodeProto, int]]:
    """Return the nodes that read a weight, through a Cast or not, with the slot."""
    names = {weight, *(n.output[0] for n in graph.node if n.op_type == "Cast" and n.input[0] == weight)}
    return [
        (node, slot)
        for node in graph.node
        for slot, name in enumerate(node.input)
        if name in names and node.op_type != "Cast"
    ]


@dataclass
class _Graph:
    """The deployed model with companions, whose results are its only outputs."""

    plain: PlainModel
    models: Sequence[FaultModel]
    offsets: dict[int, OffsetSums | None] = field(default_factory=dict)
    companions: list[_Companion] = field(default_factory=list)
    layers: dict[int, LayerPlan] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def add(self, number: int, layer: LayerPlan, errors: LayerErrors) -> None:
        """Add the companions of every use of a layer."""
        name = self.plain.weights[number]
        offset = self.offsets[number] = errors.offset_sums()
        self.layers[number] = layer
        variances = np.stack([errors.total_variances(model) for model in self.models], axis=1)
        for node, slot in _readers(self.plain.proto.graph, name):
            prefix = f"{node.output[0]}.energies"
            data = node.input[1 - slot if node.op_type in ("Gemm", "MatMul") else 0]
            numbers = self._node("Cast", [data], f"{prefix}.data", to=TensorProto.FLOAT)
            squares = self._node("Mul", [numbers, numbers], f"{prefix}.squares")
            variance = self._companion(node, slot, layer, squares, variances, f"{prefix}.variance", squared=True)
            sums = ""
            if offset is not None:
                rows = np.concatenate([offset.sums, offset.products], axis=1)
                sums = self._companion(node, slot, layer, numbers, rows, f"{prefix}.sums")
            product = self._product(node, prefix, len(layer.weight_shape))
            self.companions.append(
                _Companion(layer=number, product=product, variance=variance, sums=sums, op=node.op_type, slot=slot)
            )

    def _node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def _tensor(self, name: str, array: npt.NDArray[Any]) -> str:
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def _companion(
        self,
        node: NodeProto,
        slot: int,
        layer: LayerPlan,
        data: str,
        rows: npt.NDArray[Any],
        output: str,
        squared: bool = False,
    ) -> str:
        """Add the operator of a node with rows [groups, rows, kernel, inputs] as its weights."""
        weight = self._tensor(f"{output}.weight", _as_weight(node.op_type, slot, layer, rows.astype(np.float32)))
        companion = copy_without(node, "input", "output", "name")
        companion.input.extend([weight, data] if slot == 0 else [data, weight])
        if node.op_type == "Gemm":
            companion.input.append(self._tensor(f"{output}.nothing", np.zeros((), np.float32)))
        for attribute in companion.attribute:
            if attribute.name == "alpha" and squared:
                attribute.f **= 2
        companion.output.append(output)
        self.nodes.append(companion)
        return output

    def _product(self, node: NodeProto, prefix: str, rank: int) -> str:
        """Add the energy of a node's results less its bias."""
        value = self._node("Cast", [node.output[0]], f"{prefix}.result", to=TensorProto.FLOAT)
        if len(node.input) > 2 and node.input[2]:
            bias = self._node("Cast", [node.input[2]], f"{prefix}.bias", to=TensorProto.FLOAT)
            if node.op_type == "Gemm":
                beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
                factor = self._tensor(f"{prefix}.beta", np.array(beta, np.float32))
                bias = self._node("Mul", [bias, factor], f"{prefix}.scaled_bias")
            else:
                shape = self._tensor(f"{prefix}.shape", np.array([-1, *[1] * (rank - 2)], np.int64))
                bias = self._node("Reshape", [bias, shape], f"{prefix}.column")
            value = self._node("Sub", [value, bias], f"{prefix}.product")
        return self._node("ReduceSumSquare", [value], f"{prefix}.energy", keepdims=0)

    def proto(self) -> onnx.ModelProto:
        """Return the model."""
        graph = self.plain.proto.graph
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.tensors)
        del graph.output[:]
        outputs = [name for c in self.companions for name in (c.product, c.variance, c.sums) if name]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return self.plain.proto

    def collect(self, results: Mapping[str, npt.NDArray[Any]], found: Mapping[int, Energies]) -> None:
        """Add the results of one batch to the energies."""
        for companion in self.companions:
            energies, offset = found[companion.layer], self.offsets[companion.layer]
            layer = self.layers[companion.layer]
            energies.products += float(results[companion.product])
            energies.errors += _rows(results[companion.variance], companion, layer).sum(axis=(0, 2), dtype=np.float64)
            if offset is not None:
                sums, products = np.split(_rows(results[companion.sums], companion, layer), 2, axis=1)
                if offset.mixing is not None:
                    driven = np.einsum("gq,gqn->gn", offset.share, sums)
                    sums = sums + (offset.mixing @ driven)[:, None]
                energies.shifts += float(np.einsum("gq,gqn,gqn->", offset.energy, sums, sums, optimize=True))
                energies.crossed += float(np.einsum("gqn,gqn->", sums, products, dtype=np.float64))


def _as_weight(op: str, slot: int, layer: LayerPlan, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return rows [groups, rows, kernel, inputs] as a weight of the layer's operator with so many output channels."""
    count, shape = rows.shape[1], layer.weight_shape
    if op == "Conv":
        view = MatrixView.of_convolution((layer.groups * count, *shape[1:]), layer.groups)
    elif op == "ConvTranspose":
        view = MatrixView.of_transposed_convolution((shape[0], count, *shape[2:]), layer.groups)
    else:
        outputs_first = slot == 0 if len(shape) == 1 else layer.permutation is None
        matrix = (count, layer.inputs) if outputs_first else (layer.inputs, count)
        view = MatrixView.of_product((*shape[:-2], *matrix), outputs_first)
    tensor: npt.NDArray[np.float32] = view.tensor(rows.reshape(-1, layer.inputs))
    return tensor


def _rows(result: npt.NDArray[Any], companion: _Companion, layer: LayerPlan) -> npt.NDArray[Any]:
    """Return a companion's result as [groups, rows, images and positions]."""
    return by_group_and_output(result, companion.op, companion.slot == 0, layer.weight_shape, layer.groups)
