"""Votes in a running model: medians of three sums, of which more than one may be wrong, added to a layer's products.

A median of three sums that share what is right of them is that right sum and the median of the three errors. So a layer
is run with the weights that are right, and with the errors of the three copies as further, mostly few, outputs:
``median(a, b, c) = max(min(a, b), min(max(a, b), c))``, and one more product adds it where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper

from rerampile.errors import FaultRunError
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import copy_without, iter_graphs
from rerampile.runtime.plain_model import declare_weight

if TYPE_CHECKING:
    from rerampile.runtime.inject import Votes

__all__ = ["add_votes"]

Floats = npt.NDArray[np.float32]


def add_votes(model: onnx.ModelProto, layer: LayerPlan, weight: str, votes: Votes) -> dict[str, Floats]:
    """Make a model run one layer with votes.

    Args:
        model: The plain model, whose nodes are changed in place.
        layer: The layer, of one group.
        weight: Its initializer.
        votes: The medians that count.

    Returns:
        The values of the new initializers, by name.

    Raises:
        FaultRunError: A node that reads the layer is no Conv, Gemm or MatMul.
    """
    values: dict[str, Floats] = {}
    for graph in iter_graphs(model.graph):
        casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast" and n.input[0] == weight}
        nodes: list[NodeProto] = []
        for node in graph.node:
            slot = next((k for k, name in enumerate(node.input) if name == weight or name in casts), None)
            if slot is None or node.op_type == "Cast":
                nodes.append(node)
                continue
            if node.op_type not in ("Conv", "Gemm", "MatMul"):
                raise FaultRunError(f"layer '{layer.name}': read by {node.op_type}, expected Conv, Gemm or MatMul")
            given = _errors(layer, weight, votes) | _places(layer, weight, votes, node.op_type, slot)
            values |= given
            nodes += _voting(node, slot, casts.get(node.input[slot]), list(given))
        del graph.node[:]
        graph.node.extend(nodes)
    for name, array in values.items():
        declare_weight(model.graph, name, array.shape)
    return values


def _errors(layer: LayerPlan, weight: str, votes: Votes) -> dict[str, Floats]:
    """Return the errors of the three copies as weight tensors of one output a sum."""
    dense = np.zeros((3, len(votes.out_row), layer.inputs), np.float32)
    np.add.at(dense, (votes.number, votes.sum, votes.input), votes.value)
    kernel = layer.weight_shape[1:]
    as_given = layer.permutation is None
    return {
        f"{weight}.errors{k}": each.reshape(-1, *kernel)
        if len(kernel) > 1
        else np.ascontiguousarray(each if as_given else each.T)
        for k, each in enumerate(dense)
    }


def _places(layer: LayerPlan, weight: str, votes: Votes, op: str, slot: int) -> dict[str, Floats]:
    """Return the product that adds each sum to its output, on the side on which the layer's weights stand."""
    matrix = np.zeros((layer.outputs, len(votes.out_row)), np.float32)
    matrix[votes.out_row, np.arange(len(votes.out_row))] = 1
    if op == "Conv":
        return {f"{weight}.places": matrix.reshape(*matrix.shape, *(1 for _ in layer.weight_shape[2:]))}
    return {f"{weight}.places": matrix} if slot == 0 else {f"{weight}.places_t": np.ascontiguousarray(matrix.T)}


def _voting(node: NodeProto, slot: int, cast: NodeProto | None, given: list[str]) -> Iterator[NodeProto]:
    """Yield what stands for a node that reads the weights: it, and the votes that are added to its result."""
    result = node.output[0]
    if cast is not None:
        for name in given:
            copy = _with(cast, [name], f"{result}.{name}")
            yield copy
        given = [f"{result}.{name}" for name in given]
    *errors, places = given
    own = f"{result}.right"
    yield _with(node, list(node.input), own)
    a, b, c = (f"{result}.sum{k}" for k in range(3))
    for name, output in zip(errors, (a, b, c), strict=True):
        inputs = list(node.input[:2])
        inputs[slot] = name
        yield _with(node, inputs, output)
    low, high, rest, median, voted = (f"{result}.{part}" for part in ("low", "high", "rest", "median", "voted"))
    yield helper.make_node("Min", [a, b], [low])
    yield helper.make_node("Max", [a, b], [high])
    yield helper.make_node("Min", [high, c], [rest])
    yield helper.make_node("Max", [low, rest], [median])
    product = "Conv" if node.op_type == "Conv" else "MatMul"
    yield helper.make_node(product, [places, median] if slot == 0 else [median, places], [voted])
    yield helper.make_node("Add", [own, voted], [result])


def _with(node: NodeProto, inputs: list[str], output: str) -> NodeProto:
    """Return a copy of a node with other inputs and another output."""
    copy: NodeProto = copy_without(node)
    del copy.input[:]
    copy.input.extend(inputs)
    copy.output[0] = output
    return copy
