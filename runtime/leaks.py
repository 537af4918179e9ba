"""Leaks: inputs of one group that reach outputs of another, on arrays that hold groups block-diagonally.

A spare cell that is stuck on such an array adds a weight outside the blocks. The layer is then run as what the array
is: a convolution of fewer and wider groups. Groups that leak into one another stand side by side in one wider group;
all wider groups are as wide as the widest, and channels are gathered and repeated where groups do not fill them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from rerampile.errors import FaultRunError, InternalError
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import copy_without, iter_graphs
from rerampile.runtime.plain_model import declare_weight

if TYPE_CHECKING:
    from rerampile.runtime.inject import Leaks

__all__ = ["arrange", "widen"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_EINSUM_OPSET = 12
_BATCH_LETTERS = "abcdefgh"


@dataclass(frozen=True)
class Arrangement:
    """Groups side by side in wider groups.

    Attributes:
        width: Groups in a wider group.
        source: Which group stands in each slot, [wider groups * width]; empty slots repeat a neighbour.
        slot: The slot of each group, [groups].
    """

    width: int
    source: Integers
    slot: Integers

    @property
    def wider_groups(self) -> int:
        """How many wider groups there are."""
        return len(self.source) // self.width

    @property
    def in_order(self) -> bool:
        """Whether every group stands in its own slot, so that nothing is to be gathered."""
        return len(self.source) == len(self.slot) and bool((self.slot == np.arange(len(self.slot))).all())


def arrange(groups: int, first: Integers, second: Integers) -> Arrangement:
    """Put groups that leak into one another side by side.

    Args:
        groups: Number of groups.
        first: One group of each leak.
        second: The other.
    """
    reach = np.arange(groups)
    np.maximum.at(reach, np.minimum(first, second), np.maximum(first, second))
    ends = np.flatnonzero(np.maximum.accumulate(reach) == np.arange(groups)) + 1
    sizes = np.diff(ends, prepend=0)
    width = int(sizes.max())
    slot, free = np.empty(groups, np.int64), 0
    for end, size in zip(ends.tolist(), sizes.tolist(), strict=True):
        if free % width + size > width:
            free += -free % width
        slot[end - size : end] = np.arange(free, free + size)
        free += size
    source = np.full(free + -free % width, -1)
    source[slot] = np.arange(groups)
    return Arrangement(width, np.maximum.accumulate(source), slot)


def widen(model: onnx.ModelProto, layer: LayerPlan, weight: str, matrix: Floats, leaks: Leaks) -> dict[str, Floats]:
    """Make a model run one layer with leaks from group to group.

    Args:
        model: The plain model, whose nodes are changed in place.
        layer: The layer.
        weight: Its initializer.
        matrix: Its weights, float32 [groups * outputs, inputs].
        leaks: What the array adds outside the groups' own matrices.

    Returns:
        The values of initializers that are new or of another shape now, by name.

    Raises:
        FaultRunError: No standard operator computes the layer with leaks.
    """
    cells = _Cells.of(layer, leaks)
    arrangement = arrange(layer.groups, cells.from_group, cells.to_group)
    values: dict[str, Floats] = {}
    for graph in iter_graphs(model.graph):
        casts = {n.output[0]: n for n in graph.node if n.op_type == "Cast" and n.input[0] == weight}
        names = {weight, *casts}
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.op_type == "Cast" or names.isdisjoint(node.input):
                nodes.append(node)
            elif node.op_type in ("Conv", "ConvTranspose"):
                nodes += _wider_convolution(graph, node, layer, arrangement)
                values[weight] = _wider_weight(layer, matrix, cells, arrangement, node.op_type == "ConvTranspose")
            elif node.op_type == "MatMul":
                slot = next(slot for slot, name in enumerate(node.input) if name in names)
                leak = f"{weight}.leaks"
                if cast := casts.get(node.input[slot]):
                    nodes.append(_renamed(cast, leak, f"{node.output[0]}.leaks"))
                    leak = nodes[-1].output[0]
                nodes += _leaking_product(model, node, slot, layer, leak)
                values[f"{weight}.leaks"] = _product_leaks(layer, cells)
            else:
                raise InternalError(f"layer '{layer.name}': a leak between groups of {node.op_type}")
        del graph.node[:]
        graph.node.extend(nodes)
    for name, array in values.items():
        for tensor in [t for t in model.graph.initializer if t.name == name]:
            model.graph.initializer.remove(tensor)
        declare_weight(model.graph, name, array.shape)
    return values


@dataclass(frozen=True)
class _Cells:
    """Leaks by group: ``value`` is added from an input of one group to an output of another."""

    from_group: Integers
    input: Integers
    to_group: Integers
    output: Integers
    value: Floats

    @classmethod
    def of(cls, layer: LayerPlan, leaks: Leaks) -> _Cells:
        from_group, input_ = np.divmod(leaks.in_row, layer.inputs)
        to_group, output = np.divmod(leaks.out_row, layer.outputs)
        return cls(from_group, input_, to_group, output, leaks.value)


def _wider_weight(
    layer: LayerPlan, matrix: Floats, cells: _Cells, arrangement: Arrangement, transposed: bool
) -> Floats:
    """Return the weight tensor of the wider convolution: blocks on its diagonals, leaks beside them."""
    blocks = matrix.reshape(layer.groups, layer.outputs, layer.inputs)
    slot, width = arrangement.slot, arrangement.width
    if transposed:
        wide = np.zeros((len(arrangement.source), layer.inputs, width, layer.outputs), np.float32)
        wide[slot, :, slot % width] = blocks.transpose(0, 2, 1)
        where = slot[cells.from_group], cells.input, slot[cells.to_group] % width, cells.output
    else:
        wide = np.zeros((len(arrangement.source), layer.outputs, width, layer.inputs), np.float32)
        wide[slot, :, slot % width] = blocks
        where = slot[cells.to_group], cells.output, slot[cells.from_group] % width, cells.input
    np.add.at(wide, where, cells.value)
    first, second, *kernel = layer.weight_shape
    return wide.reshape(first // layer.groups * len(arrangement.source), second * width, *kernel)


def _wider_convolution(
    graph: onnx.GraphProto, node: NodeProto, layer: LayerPlan, arrangement: Arrangement
) -> list[NodeProto]:
    """Return what stands for a grouped convolution: it with wider groups, its channels gathered around it."""
    per_group = (layer.weight_shape[0] // layer.groups, layer.weight_shape[1])
    outputs, inputs = per_group if node.op_type == "Conv" else per_group[::-1]
    wider = copy_without(node)
    for attribute in [a for a in wider.attribute if a.name == "group"]:
        wider.attribute.remove(attribute)
    wider.attribute.append(helper.make_attribute("group", arrangement.wider_groups))
    if arrangement.in_order:
        return [wider]

    def gather(data: str, groups: Integers, channels: int, output: str, axis: int) -> NodeProto:
        index = (groups[:, None] * channels + np.arange(channels)).reshape(-1)
        graph.initializer.append(numpy_helper.from_array(index, f"{output}.index"))
        return helper.make_node("Gather", [data, f"{output}.index"], [output], axis=axis)

    result = node.output[0]
    before = [gather(node.input[0], arrangement.source, inputs, f"{result}.wide_input", 1)]
    if len(node.input) > 2 and node.input[2]:
        before.append(gather(node.input[2], arrangement.source, outputs, f"{result}.wide_bias", 0))
        wider.input[2] = before[-1].output[0]
    wider.input[0], wider.output[0] = before[0].output[0], f"{result}.wide"
    return [*before, wider, gather(wider.output[0], arrangement.slot, outputs, result, 1)]


def _product_leaks(layer: LayerPlan, cells: _Cells) -> Floats:
    """Return what leaks add to a product, float32 [*batch, inputs, *batch, outputs]."""
    dense = np.zeros((layer.groups, layer.inputs, layer.groups, layer.outputs), np.float32)
    np.add.at(dense, (cells.from_group, cells.input, cells.to_group, cells.output), cells.value)
    batch = layer.weight_shape[:-2]
    return dense.reshape(*batch, layer.inputs, *batch, layer.outputs)


def _leaking_product(
    model: onnx.ModelProto, node: NodeProto, slot: int, layer: LayerPlan, leaks: str
) -> list[NodeProto]:
    """Return what stands for a product of a batch of weights: it, and the sum over all other batch entries' leaks."""
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    batch = layer.weight_shape[:-2]
    if opset < _EINSUM_OPSET or len(batch) > len(_BATCH_LETTERS):
        raise FaultRunError(
            f"layer '{layer.name}': leaks between its {layer.groups} products need Einsum of operator set "
            f"{_EINSUM_OPSET} and at most {len(_BATCH_LETTERS)} batch axes, found {opset} and {len(batch)}"
        )
    data, result = node.input[1 - slot], node.output[0]
    own, to = _BATCH_LETTERS[: len(batch)], _BATCH_LETTERS[: len(batch)].upper()
    equation = f"...{own}mi,{own}i{to}o->...{to}mo" if slot == 1 else f"...{own}im,{own}i{to}o->...{to}om"
    names = {part: f"{result}.{part}" for part in ("own", "batch", "expanded", "sum", "shape", "leak")}
    constant = numpy_helper.from_array(np.array([*batch, 1, 1], np.int64))
    product = _renamed(node, None, names["own"])
    return [
        product,
        helper.make_node("Constant", [], [names["batch"]], value=constant),
        helper.make_node("Expand", [data, names["batch"]], [names["expanded"]]),
        helper.make_node("Einsum", [names["expanded"], leaks], [names["sum"]], equation=equation),
        helper.make_node("Shape", [names["own"]], [names["shape"]]),
        helper.make_node("Reshape", [names["sum"], names["shape"]], [names["leak"]]),
        helper.make_node("Add", [names["own"], names["leak"]], [result]),
    ]


def _renamed(node: NodeProto, input_: str | None, output: str) -> NodeProto:
    """Return a copy of a node that reads another first input (None: its own) and makes another output."""
    copy: NodeProto = copy_without(node)
    if input_ is not None:
        copy.input[0] = input_
    copy.output[0] = output
    return copy
