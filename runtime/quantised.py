"""The plain model in int8: whole-numbered weights as they are, activations rounded to uint8.

Cells of few levels hold whole steps. Where all differences of two cells fit into int8, weights need no rounding: the
scale of an output divides its gain. Where slices have more values together, levels were measured, or stuck cells lie
outside their range, weights are rounded: the scale is as coarse as the largest difference asks for. The ranges of
activations come from calibration inputs, through ONNX Runtime's own quantiser, which writes QuantizeLinear and
DequantizeLinear nodes that its optimiser turns into integer kernels.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.external_data_helper
from onnx import NodeProto, TensorProto, numpy_helper

from rerampile.deployment import Deployment, layer_coding
from rerampile.errors import ConfigError, FaultRunError
from rerampile.layer_plan import LayerPlan
from rerampile.runtime.blocked_weights import plain_buffers
from rerampile.runtime.plain_model import PlainModel, declare_weight
from rerampile.runtime.processor import int8_saturates

__all__ = ["QuantisedModel", "quantised_model", "require_dot_products", "require_int8"]

Floats = npt.NDArray[np.float32]
Inputs = Mapping[str, npt.NDArray[Any]]

_MOST_LEVELS = 256  # of a cell: eight bits
_OPSET = 13  # the first with a scale an output channel
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_CUTTING = {"Clip", "Relu"}
_LARGEST = 127  # magnitude of an int8 weight
_PERCENTILE = 99.999  # of activations lie in their range: outliers would cost all others precision
_DEVIATIONS = 4  # how far from their mean the conductances of stuck cells are told apart


@dataclass(frozen=True, kw_only=True)
class QuantisedModel:
    """A plain model some of whose weights are int8.

    Attributes:
        plain: The model; quantised weights are int8 initializers without data.
        scales: Scale of each row of the layers that are quantised, float32 [outputs], by position in the plan.
    """

    plain: PlainModel
    scales: Mapping[int, Floats] = field(repr=False)


def quantised_model(
    deployment: Deployment, plain: PlainModel, calibration: Sequence[Inputs], float_layers: Collection[int]
) -> QuantisedModel:
    """Quantise a deployment's plain model.

    Args:
        deployment: The deployment.
        plain: Its model with ordinary weights.
        calibration: Inputs whose activations set the ranges.
        float_layers: Layers to leave in fp32.

    Raises:
        ConfigError: As :func:`require_int8`, or no layer of the model can be quantised.
        FaultRunError: As :func:`require_int8`, or ONNX Runtime's quantiser refuses the model.
    """
    from onnxruntime.quantization import QuantType  # half as much again to import as ONNX Runtime itself

    require_int8(deployment)
    clean = _clean_model(deployment, plain)
    opset = next(o.version for o in clean.opset_import if o.domain in ("", "ai.onnx"))
    if opset < _OPSET:
        raise ConfigError(f"--precision int8: operator set {opset}, expected {_OPSET} or newer; use fp32")
    layers = deployment.plan.layers
    readers = _readers(clean, plain)
    overrides: dict[str, Any] = {}
    nodes: set[str] = set()
    for number, (layer, weight) in enumerate(zip(layers, plain.weights, strict=True)):
        axis = _channel_axis(layer, weight, readers[weight])
        if number not in float_layers and axis is not None:
            fixed = {"quant_type": QuantType.QInt8, "axis": axis, "zero_point": np.int8(0)}
            overrides[weight] = [{**fixed, "scale": value} for value in _scale(deployment, layer)]
            nodes.update(node.name for node in readers[weight])
    if not nodes:
        raise ConfigError(
            "--precision int8: no layer has int8 kernels, expected a Conv, Gemm or MatMul on arrays that hold one of "
            "its groups each; use fp32"
        )
    proto = _quantise(clean, calibration, nodes, overrides)
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    scales, names = {}, []
    for number, weight in enumerate(plain.weights):
        quantised = f"{weight}_quantized" in found
        name, kind = (f"{weight}_quantized", TensorProto.INT8) if quantised else (weight, TensorProto.FLOAT)
        if quantised:
            scales[number] = numpy_helper.to_array(found[f"{weight}_scale"]).astype(np.float32)
        proto.graph.initializer.remove(found[name])
        declare_weight(proto.graph, name, layers[number].weight_shape, kind)
        names.append(name)
    return QuantisedModel(plain=PlainModel(proto=proto, weights=tuple(names)), scales=scales)


def require_int8(deployment: Deployment) -> None:
    """Refuse what cannot run in int8, before any work is done.

    Raises:
        ConfigError: The target's cells have no levels, or more than 8 bits.
        FaultRunError: This CPU saturates int8 products.
    """
    for layer in deployment.plan.layers:
        coding = layer_coding(deployment.target, layer)
        if coding.levels is None or coding.levels > _MOST_LEVELS:
            found = "analog cells" if coding.levels is None else f"cells of {coding.levels} levels"
            raise ConfigError(
                f"--precision int8: {found} in layer '{layer.name}', expected at most {_MOST_LEVELS} levels; compile "
                f"with --set cell.levels={_LARGEST + 1}, or use fp32"
            )
    require_dot_products()


def require_dot_products() -> None:
    """Refuse CPUs of the x86 family whose int8 products saturate at 16 bits.

    Raises:
        FaultRunError: This is one.
    """
    if int8_saturates():
        raise FaultRunError("--precision int8: this CPU has neither VNNI nor AMX, its int8 products saturate; use fp32")


def _clean_model(deployment: Deployment, plain: PlainModel) -> onnx.ModelProto:
    """Return the plain model with its fault-free weights and all digital tensors in it, its nodes named uniquely."""
    model = onnx.ModelProto()
    model.CopyFrom(plain.proto)
    buffers = plain_buffers(deployment, plain)
    for number, layer in enumerate(deployment.plan.layers):
        buffers.fill(number, deployment.weights(layer))
    for tensor in model.graph.initializer:
        if tensor.name in buffers.arrays:
            tensor.CopyFrom(numpy_helper.from_array(buffers.arrays[tensor.name], tensor.name))
    onnx.external_data_helper.load_external_data_for_model(model, str(deployment.folder))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return model


def _readers(model: onnx.ModelProto, plain: PlainModel) -> dict[str, list[NodeProto]]:
    """Return the nodes of the main graph that read each weight."""
    readers: dict[str, list[NodeProto]] = {weight: [] for weight in plain.weights}
    for node in model.graph.node:
        for name in readers.keys() & set(node.input):
            readers[name].append(node)
    return readers


def _channel_axis(layer: LayerPlan, weight: str, readers: Sequence[NodeProto]) -> int | None:
    """Return the axis of the weight tensor that holds its matrix rows, or None where int8 has no kernel for it."""
    axes = {_axis(layer, node) if list(node.input)[1:2] == [weight] else None for node in readers}
    return axes.pop() if len(axes) == 1 else None


def _axis(layer: LayerPlan, node: NodeProto) -> int | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul" and len(layer.weight_shape) == 2:
        return 1
    if node.op_type == "Gemm" and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0:
        return 0 if attributes.get("transB", 0) else 1
    return None


def _scale(deployment: Deployment, layer: LayerPlan) -> Floats:
    """Return the scale of each row: its gain over a whole number, so that weights are exact, where int8 has the room.

    Of several gains, one for each partition, the largest counts: weights behind the others are rounded.
    Room that is left makes the scale finer, which brings conductances of stuck cells between two levels closer. Means
    of copies lie between two levels, too: the whole number is a multiple of how many there are where int8 has the room.
    """
    target, coding = deployment.target, layer_coding(deployment.target, layer)
    low, high = target.failed_limits
    ends = [
        min(max(failure.mean + side * _DEVIATIONS * failure.spread, low), high)
        for failure in target.failures.values()
        for side in (-1, 1)
    ]
    unit = (coding.g_on - coding.g_off) / coding.steps if coding.integer else 1.0  # of a difference, in siemens
    zero = coding.g_off if coding.integer else 0.0
    worths = [(conductance - zero) / unit for conductance in ends]
    most, least = max(coding.high, *worths), min(coding.low, *worths)
    reach = max(most - coding.reference, coding.reference - least) if coding.cells == 1 else most - least
    share = _LARGEST / reach
    if coding.integer and share >= 1:
        step = layer.copy_count if share >= layer.copy_count else 1
        share = share // step * step
    largest: Floats = deployment.gain(layer).reshape(layer.groups * layer.outputs, -1).max(axis=1)
    return largest / np.float32(share)


def _quantise(
    model: onnx.ModelProto, calibration: Sequence[Inputs], nodes: Collection[str], overrides: Mapping[str, Any]
) -> onnx.ModelProto:
    """Run ONNX Runtime's quantiser: nodes of mapped layers with given scales, everything between them calibrated."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    options = {
        "TensorQuantOverrides": dict(overrides),
        "CalibPercentile": _PERCENTILE,
        "CalibStridedMinMax": 1,  # of any method: one batch after another, not all in memory
    }
    outputs = {value.name for value in model.graph.output}
    excluded = [node.name for node in model.graph.node if node.op_type in _WEIGHTED and node.name not in nodes]
    # The quantiser gives what such a node alone reads the range of what it cuts off, outputs of the model, too.
    excluded += [node.name for node in model.graph.node if node.op_type in _CUTTING and node.input[0] in outputs]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantised.onnx"
        try:
            quantize_static(
                model,
                path,
                _Reader(calibration),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                calibrate_method=CalibrationMethod.Percentile,
                extra_options=options,
            )
        except Exception as error:
            raise FaultRunError(
                f"--precision int8: ONNX Runtime cannot quantise the model: {' '.join(str(error).split())[:300]}"
            ) from error
        return onnx.load_model(path)


class _Reader:
    """Calibration inputs, as ONNX Runtime's quantiser wants to be handed them."""

    def __init__(self, inputs: Sequence[Inputs]) -> None:
        self._inputs = inputs
        self._waiting = iter(inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with some of the inputs."""
        self._waiting = iter(self._inputs[start_index:end_index])

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """Return the next inputs, None after the last."""
        return next((dict(inputs) for inputs in self._waiting), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser quiet: its progress, and advice on models that the compiler has prepared."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
