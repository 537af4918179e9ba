"""Model-local ONNX functions that run a mapped node from its cells.

A mapped node becomes a call of a function in the domain ``ai.rerampile``: read the cells, subtract, scale, reshape to
the weight tensor, then the ordinary operator. The bodies are standard ONNX, so that plain ONNX Runtime inlines them and
folds the arithmetic away, and a viewer shows the crossbar with its G+ and G-. Nodes of the same form share a function;
shapes and the operator's attributes are passed as attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from rerampile.graph import GraphNode
from rerampile.layer import Layer
from rerampile.onnx_file import copy_without
from rerampile.schemes import Coding
from rerampile.segments import Segments
from rerampile.weight_slots import slot_of

__all__ = ["CALL_PREFIX", "DOMAIN", "DOMAIN_VERSION", "CellInputs", "FunctionLibrary"]

DOMAIN = "ai.rerampile"
DOMAIN_VERSION = 1
CALL_PREFIX = "Crossbar"  # of a function's name, in front of the operator's

_FLOAT = TensorProto.FLOAT
_ROUNDED_BY_ONNX_RUNTIME = ("Conv", "ConvTranspose", "Gemm")
_INTEGER_CONSTANTS_OPSET = 9  # before it, Constant holds floating point numbers only


@dataclass(frozen=True, kw_only=True)
class CellInputs:
    """The weights of one input slot: their layer, its coding, and the initializers that hold its cells.

    Attributes:
        layer: The layer.
        coding: Its coding.
        plus: Initializer of the + cells of each slice, [groups * outputs, inputs].
        minus: The same of the - cells; empty for ``offset``.
        gain: Initializer of the gains, [groups * outputs, segments].
        segments: The ranges of inputs that they are for.
    """

    layer: Layer
    coding: Coding
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    gain: str
    segments: Segments


@dataclass
class _Body:
    """A function body under construction, in terms of its formal names.

    Attributes:
        opset: Version of the standard operators that it is written in.
        rank: Rank of the weight tensor.
    """

    opset: int
    rank: int
    inputs: list[str] = field(default_factory=list)
    nodes: list[NodeProto] = field(default_factory=list)
    attributes: dict[str, AttributeProto] = field(default_factory=dict)

    def formal(self, name: str) -> str:
        self.inputs.append(name)
        return name

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def constant(self, value: float, output: str, element_type: int = _FLOAT) -> str:
        return self.op("Constant", [], output, value=helper.make_tensor(output, element_type, [], [value]))

    def integers(self, name: str, numbers: Sequence[int]) -> str:
        """Return a tensor of some whole numbers, a shape mostly, which the caller passes as attribute ``name``."""
        floats_only = self.opset < _INTEGER_CONSTANTS_OPSET
        kind, output = (TensorProto.DOUBLE, f"{name}_numbers") if floats_only else (TensorProto.INT64, f"{name}_ints")
        values = helper.make_tensor(name, kind, [len(numbers)], list(numbers))
        self.attributes[name] = helper.make_attribute(name, values)
        node = helper.make_node("Constant", [], [output])
        node.attribute.append(AttributeProto(name="value", ref_attr_name=name, type=AttributeProto.TENSOR))
        self.nodes.append(node)
        return self.op("Cast", [output], f"{name}_ints", to=TensorProto.INT64) if floats_only else output


class FunctionLibrary:
    """The functions that a deployed model needs, each once.

    Args:
        opset_imports: What the model imports; bodies are written in its own standard operator set.
        quantised: Whether activations pass through QuantizeLinear, of whichever domain. Between DequantizeLinear and
            QuantizeLinear, ONNX Runtime rounds constant float weights to 8 bits of its own accord, and so would what
            the cells hold; a maximum with minus infinity behind the operator keeps it from that.
    """

    def __init__(self, opset_imports: Sequence[onnx.OperatorSetIdProto], quantised: bool) -> None:
        self._quantised = quantised
        self._opset_imports = [helper.make_opsetid("", o.version) for o in opset_imports if o.domain in ("", "ai.onnx")]
        self._functions: dict[bytes, FunctionProto] = {}
        self._names: dict[str, int] = {}

    @property
    def functions(self) -> list[FunctionProto]:
        """All functions, in the order of first use."""
        return list(self._functions.values())

    def call(
        self,
        node: GraphNode,
        weights: Mapping[int, CellInputs],
        bias: str | None,
        data: str | None,
        outputs: Sequence[str],
    ) -> NodeProto:
        """Return the node that calls the crossbar version of ``node``.

        Args:
            node: The mapped node.
            weights: Cells by input slot.
            bias: Initializer of a folded bias, or None to leave the node's own.
            data: Name of the data input where folding moved it, or None.
            outputs: Output names of the call.
        """
        rank = len(next(iter(weights.values())).layer.view.tensor_shape)
        body, actual = _Body(max((o.version for o in self._opset_imports), default=1), rank), []
        formals: dict[int, str] = {}
        # The cells hold weights from which their zero point is subtracted already.
        replaced = {slot_of(node, slot).zero_point for slot in weights} | ({2} if bias is not None else set())
        for slot, name in enumerate(node.proto.input):
            if slot in weights:
                formals[slot] = _weight(body, weights[slot], "" if len(weights) == 1 else f"w{slot}_")
                actual += [*weights[slot].plus, *weights[slot].minus, weights[slot].gain]
            elif name and slot not in replaced:
                formals[slot] = body.formal(f"x{slot}")
                actual.append(data if data is not None and slot == 0 else name)
        if bias is not None:
            formals[2] = body.formal("bias")
            actual.append(bias)
        results = [f"y{i}" if name else "" for i, name in enumerate(node.proto.output)]
        if self._quantised and node.op in _ROUNDED_BY_ONNX_RUNTIME:
            _BODIES.get(node.op, _plain)(body, node, formals, ["unrounded"])
            element_type = next(iter(weights.values())).layer.element_type
            body.op("Max", ["unrounded", body.constant(-np.inf, "lowest", element_type)], results[0])
        else:
            _BODIES.get(node.op, _plain)(body, node, formals, results)
        function = self._register(node, body, [r for r in results if r])
        call = NodeProto(op_type=function.name, domain=DOMAIN, name=node.name, doc_string=node.proto.doc_string)
        call.input.extend(actual)
        call.output.extend(name for name in outputs if name)
        call.attribute.extend(a for a in node.proto.attribute if a.name in function.attribute)
        call.attribute.extend(body.attributes[name] for name in function.attribute if name in body.attributes)
        call.metadata_props.extend(node.proto.metadata_props)
        return call

    def _register(self, node: GraphNode, body: _Body, outputs: Sequence[str]) -> FunctionProto:
        used = {a.ref_attr_name for n in body.nodes for a in n.attribute if a.ref_attr_name}
        function = helper.make_function(
            DOMAIN, "", body.inputs, outputs, body.nodes, self._opset_imports, attributes=sorted(used)
        )
        key = function.SerializeToString(deterministic=True)
        if key not in self._functions:
            base = f"{CALL_PREFIX}{node.proto.op_type}"
            number = self._names.get(base, 0) + 1
            self._names[base] = number
            function.name = base if number == 1 else f"{base}_{number}"
            function.doc_string = f"{node.proto.op_type} whose weights are read from crossbar cells"
            self._functions[key] = function
        return self._functions[key]


def _weight(body: _Body, cells: CellInputs, prefix: str) -> str:
    """Add the reading of one layer's weights to a body; return the weight tensor as its operator wants it."""
    coding, view = cells.coding, cells.layer.view
    plus = [body.formal(f"{prefix}g_plus{_suffix(cells.plus, k)}") for k in range(len(cells.plus))]
    minus = [body.formal(f"{prefix}g_minus{_suffix(cells.minus, k)}") for k in range(len(cells.minus))]
    gain = body.formal(f"{prefix}gain")
    positive = _value(body, coding, plus, f"{prefix}plus")
    if minus:
        negative = _value(body, coding, minus, f"{prefix}minus")
    else:
        negative = body.constant(coding.reference, f"{prefix}reference")
    difference = body.op("Sub", [positive, negative], f"{prefix}difference")
    if len(cells.segments.starts) > 1:
        number = cells.segments.number_of(np.arange(view.inputs)).tolist()
        segment = body.integers(f"{prefix}segment_of_input", number)
        gain = body.op("Gather", [gain, segment], f"{prefix}gain_of_input", axis=1)
    weight = body.op("Mul", [difference, gain], f"{prefix}matrix")
    if view.permutation is not None:
        stored_shape = body.integers(f"{prefix}stored_shape", view.stored_shape)
        weight = body.op("Reshape", [weight, stored_shape], f"{prefix}stored")
        weight = body.op("Transpose", [weight], f"{prefix}transposed", perm=list(view.permutation))
    weight_shape = body.integers(f"{prefix}weight_shape", view.tensor_shape)
    weight = body.op("Reshape", [weight, weight_shape], f"{prefix}weight")
    if cells.layer.integer or cells.layer.element_type == _FLOAT:
        return weight
    return body.op("Cast", [weight], f"{prefix}weight_cast", to=cells.layer.element_type)


def _suffix(names: Sequence[str], k: int) -> str:
    return "" if len(names) == 1 else f"_{k}"


def _value(body: _Body, coding: Coding, slices: Sequence[str], name: str) -> str:
    """Add the value of a + or - cell over its slices, as :meth:`Coding.difference` computes it."""
    total = ""
    for k, (cell, significance) in enumerate(zip(slices, coding.significances, strict=True)):
        part = _cell(body, coding, cell)
        if significance != 1.0:
            factor = body.constant(significance, f"{name}_significance_{k}")
            part = body.op("Mul", [part, factor], f"{name}_part_{k}")
        total = body.op("Add", [total, part], f"{name}_sum_{k}") if total else part
    return total


def _cell(body: _Body, coding: Coding, cell: str) -> str:
    if coding.levels is None:
        return cell
    if coding.cell_values is None:
        return body.op("Cast", [cell], f"{cell}_level", to=_FLOAT)
    table = body.op("Constant", [], f"{cell}_table", value=numpy_helper.from_array(coding.cell_values))
    code = body.op("Cast", [cell], f"{cell}_code", to=TensorProto.INT32)
    return body.op("Gather", [table, code], f"{cell}_siemens", axis=0)


def _refer(node: GraphNode, target: NodeProto, without: Sequence[str] = ()) -> NodeProto:
    """Give ``target`` the attributes of ``node``, each as a reference that the call fills in."""
    target.attribute.extend(
        AttributeProto(name=a.name, ref_attr_name=a.name, type=a.type)
        for a in node.proto.attribute
        if a.name not in without
    )
    return target


def _plain(body: _Body, node: GraphNode, formals: Mapping[int, str], results: Sequence[str]) -> None:
    """The operator itself, its weights from the cells. A folded bias is added where it has no input for one."""
    names = dict(formals)
    bias = names.pop(2, "") if node.op == "MatMul" else ""
    inputs = [names.get(slot, "") for slot in range(max(names) + 1)]
    copy = copy_without(node.proto, "input", "output", "attribute", "name", "metadata_props", "doc_string")
    copy.input.extend(inputs)
    copy.output.extend(["product"] if bias else results)
    folded_gemm = node.op == "Gemm" and names.get(2) == "bias"
    body.nodes.append(_refer(node, copy, without=("beta",) if folded_gemm else ()))
    if bias:
        body.op("Add", ["product", bias], results[0])


def _as_float(body: _Body, formals: Mapping[int, str], data: int, zero_point: int) -> str:
    """Add the integer input minus its zero point as float32, in which such differences are exact."""
    value = body.op("Cast", [formals[data]], f"x{data}_float", to=_FLOAT)
    if zero_point not in formals:
        return value
    zero = body.op("Cast", [formals[zero_point]], f"x{zero_point}_float", to=_FLOAT)
    return body.op("Sub", [value, zero], f"x{data}_centred")


def _multiply(body: _Body, node: GraphNode, op_type: str, inputs: Sequence[str]) -> str:
    product = helper.make_node(op_type, list(inputs), ["sum"])
    body.nodes.append(_refer(node, product) if op_type == "Conv" else product)
    return "sum"


def _integer(op_type: str, weight_first: Callable[[Mapping[int, str]], bool]) -> Callable[..., None]:
    """Body of ConvInteger or MatMulInteger: float arithmetic on whole numbers, rounded back to int32."""

    def build(body: _Body, node: GraphNode, formals: Mapping[int, str], results: Sequence[str]) -> None:
        if weight_first(formals):
            operands = [formals[0], _as_float(body, formals, 1, 3)]
        else:
            operands = [_as_float(body, formals, 0, 2), formals[1]]
        total = _multiply(body, node, op_type, operands)
        half = body.constant(0.5, "half")
        rounded = body.op("Floor", [body.op("Add", [total, half], "sum_and_half")], "rounded")
        body.op("Cast", [rounded], results[0], to=TensorProto.INT32)

    return build


def _scale(body: _Body, formals: Mapping[int, str], slot: int) -> str:
    """Add a scale as float32: it may be float16 or bfloat16 in the user's model."""
    return body.op("Cast", [formals[slot]], f"x{slot}_scale", to=_FLOAT)


def _requantise(body: _Body, total: str, factor: str, scale: str, zero_point: str, result: str) -> None:
    """Add ``saturate(round(total * factor / scale) + zero_point)``, as the QLinear operators define it."""
    ratio = body.op("Div", [factor, scale], "ratio")
    scaled = body.op("Mul", [total, ratio], "scaled")
    one = body.constant(1.0, "one")
    body.op("QuantizeLinear", [scaled, one, zero_point], result)


def _qlinear_conv(body: _Body, node: GraphNode, formals: Mapping[int, str], results: Sequence[str]) -> None:
    operands = [_as_float(body, formals, 0, 2), formals[3]]
    if 8 in formals:
        operands.append(body.op("Cast", [formals[8]], "bias_float", to=_FLOAT))
    total = _multiply(body, node, "Conv", operands)
    column = body.integers("channel_shape", [-1, *[1] * (body.rank - 2)])
    weight_scale = body.op("Reshape", [_scale(body, formals, 4), column], "weight_scale")
    factor = body.op("Mul", [_scale(body, formals, 1), weight_scale], "factor")
    _requantise(body, total, factor, _scale(body, formals, 6), formals[7], results[0])


def _qlinear_matmul(body: _Body, node: GraphNode, formals: Mapping[int, str], results: Sequence[str]) -> None:
    left_is_weight = formals[0].endswith("weight")
    left = formals[0] if left_is_weight else _as_float(body, formals, 0, 2)
    right = _as_float(body, formals, 3, 5) if left_is_weight else formals[3]
    total = _multiply(body, node, "MatMul", [left, right])
    scale = _scale(body, formals, 1)
    if left_is_weight:
        scale = body.op("Reshape", [scale, body.integers("row_shape", [-1, 1])], "row_scale")
    factor = body.op("Mul", [scale, _scale(body, formals, 4)], "factor")
    _requantise(body, total, factor, _scale(body, formals, 6), formals[7], results[0])


_BODIES: dict[str, Callable[[_Body, GraphNode, Mapping[int, str], Sequence[str]], None]] = {
    "ConvInteger": _integer("Conv", lambda formals: False),
    "MatMulInteger": _integer("MatMul", lambda formals: formals[0] == "weight"),
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
}
