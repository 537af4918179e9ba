"""ONNX operators as functions of PyTorch: those of networks on images.

Each takes the inputs of a node, absent ones as None, and its attributes, and returns its one output. Names and meanings
are those of the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

__all__ = ["OPERATORS", "Unsupported"]

Inputs = Sequence[Any]
Attributes = Mapping[str, Any]


class Unsupported(Exception):  # noqa: N818
    """A node asks for what its function here doesn't do; the message is what."""


def _whole(value: Tensor) -> list[int]:
    """Return the numbers of a tensor that says sizes, axes or positions."""
    return [int(number) for number in value.reshape(-1).tolist()]


def _given(inputs: Inputs, slot: int, attributes: Attributes, name: str) -> list[int] | None:
    """Return numbers that are an input since some version of the operator, and were an attribute before."""
    if len(inputs) > slot and inputs[slot] is not None:
        return _whole(inputs[slot])
    return attributes.get(name)


# sliding windows ------------------------------------------------------------------------------------


def _pads(attributes: Attributes, rank: int) -> list[tuple[int, int]]:
    """Return the padding before and after each axis of a window."""
    if (way := attributes.get("auto_pad", b"NOTSET")) not in (b"NOTSET", b"VALID"):
        raise Unsupported(f"auto_pad {way.decode()}")
    pads = [0] * 2 * rank if way == b"VALID" else attributes.get("pads", [0] * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    if not any(map(any, pads)):
        return x
    return functional.pad(x, [n for ends in reversed(pads) for n in ends], value=value)


def _conv(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, weight, bias = (*inputs, None)[:3]
    rank = weight.ndim - 2
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    pads = _pads(attributes, rank)
    same = all(first == last for first, last in pads)
    return function(
        x if same else _padded(x, pads),
        weight,
        bias,
        stride=attributes.get("strides", [1] * rank),
        padding=[first for first, _ in pads] if same else 0,
        dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    (x,), rank = inputs, len(attributes["kernel_shape"])
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    pads = _pads(attributes, rank)
    if attributes.get("ceil_mode", 0) and any(map(any, pads)):
        raise Unsupported("ceil_mode and pads")
    found: Tensor = function(
        _padded(x, pads, -torch.inf),
        attributes["kernel_shape"],
        stride=attributes.get("strides", [1] * rank),
        dilation=attributes.get("dilations", [1] * rank),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )
    return found


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    (x,), rank = inputs, len(attributes["kernel_shape"])
    if attributes.get("ceil_mode", 0) or any(n != 1 for n in attributes.get("dilations", [1])):
        raise Unsupported("ceil_mode or dilations")
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    pads = _pads(attributes, rank)
    sizes = attributes["kernel_shape"], attributes.get("strides", [1] * rank)
    mean: Tensor = function(_padded(x, pads), *sizes)
    if attributes.get("count_include_pad", 0) or not any(map(any, pads)):
        return mean
    return mean / function(_padded(torch.ones_like(x[:1, :1]), pads), *sizes)


def _over_sizes(reduce: Callable[..., Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    """Return global pooling by a reduction."""
    return lambda inputs, _: reduce(inputs[0], dim=tuple(range(2, inputs[0].ndim)), keepdim=True)


def _resize(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, _, scales, sizes = (*inputs, None, None, None)[:4]
    if attributes.get("mode", b"nearest") != b"nearest":
        raise Unsupported(f"mode {attributes['mode'].decode()}")
    where = attributes.get("coordinate_transformation_mode", b"half_pixel")
    rounding = attributes.get("nearest_mode", b"round_prefer_floor")
    if (where, rounding) not in _REPEATING:
        raise Unsupported(f"coordinate_transformation_mode {where.decode()} and nearest_mode {rounding.decode()}")
    if scales is not None and scales.numel():
        factors = [float(scale) for scale in scales]
    elif sizes is not None and not {"axes", "keep_aspect_ratio_policy"} & set(attributes):
        factors = [new / old for new, old in zip(_whole(sizes), x.shape, strict=True)]
    else:
        raise Unsupported("sizes of some axes or of kept aspect")
    if len(factors) != x.ndim or any(factor < 1 or factor != int(factor) for factor in factors):
        raise Unsupported(f"factors {factors}, not whole ones of every axis")
    for axis, factor in enumerate(factors):
        x = x.repeat_interleave(int(factor), axis) if factor > 1 else x
    return x


_REPEATING = {
    (b"asymmetric", b"floor"),
    (b"half_pixel", b"round_prefer_floor"),
    (b"half_pixel", b"round_prefer_ceil"),
}
"""Where to read and how to round, as long as whole factors come to each value that many times."""


# products and normalisation -------------------------------------------------------------------------


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    a, b, c = (*inputs, None)[:3]
    product = (a.T if attributes.get("transA", 0) else a) @ (b.T if attributes.get("transB", 0) else b)
    product = product * attributes.get("alpha", 1.0)
    return product if c is None else product + c * attributes.get("beta", 1.0)


def _batch_normalization(inputs: Inputs, attributes: Attributes) -> Tensor:
    if attributes.get("training_mode", 0):
        raise Unsupported("training_mode; export the model for inference")
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _clip(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, low, high = (*inputs, None, None)[:3]
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    return x if low is None and high is None else torch.clamp(x, low, high)


def _hard_sigmoid(inputs: Inputs, attributes: Attributes) -> Tensor:
    return torch.clamp(attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5), 0, 1)


def _reduce_mean(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _given(inputs, 1, attributes, "axes")
    if axes is None:
        axes = [] if attributes.get("noop_with_empty_axes", 0) else list(range(inputs[0].ndim))
    return inputs[0].mean(dim=axes, keepdim=bool(attributes.get("keepdims", 1))) if axes else inputs[0]


# shapes ---------------------------------------------------------------------------------------------


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, shape = inputs[0], _whole(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


def _flatten(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, axis = inputs[0], attributes.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _transpose(inputs: Inputs, attributes: Attributes) -> Tensor:
    return inputs[0].permute(attributes.get("perm", list(reversed(range(inputs[0].ndim)))))


def _unsqueeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _given(inputs, 1, attributes, "axes") or []
    x, rank = inputs[0], inputs[0].ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(inputs: Inputs, attributes: Attributes) -> Tensor:
    axes = _given(inputs, 1, attributes, "axes")
    return inputs[0].squeeze() if axes is None else inputs[0].squeeze(axes)


def _slice(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = inputs[0]
    starts, ends = _given(inputs, 1, attributes, "starts") or [], _given(inputs, 2, attributes, "ends") or []
    axes = _given(inputs, 3, attributes, "axes") or list(range(len(starts)))
    steps = _given(inputs, 4, attributes, "steps") or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        numbers = range(x.shape[axis])[start:end:step]
        x = x.index_select(axis, torch.tensor(list(numbers), dtype=torch.int64, device=x.device))
    return x


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, mode = inputs[0], attributes.get("mode", b"constant").decode()
    pads = _given(inputs, 1, attributes, "pads") or []
    if mode != "constant" or len(inputs) > 3:
        raise Unsupported(f"mode {mode}, or some axes alone")
    rank = x.ndim
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else attributes.get("value", 0.0)
    return _padded(x, list(zip(pads[:rank], pads[rank:], strict=True)), value)


def _gather(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, index = inputs
    axis = attributes.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index).long()
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _cast(inputs: Inputs, attributes: Attributes) -> Tensor:
    kind = np.zeros(0, helper.tensor_dtype_to_np_dtype(attributes["to"]))
    return inputs[0].to(torch.from_numpy(kind).dtype)


def _constant(_: Inputs, attributes: Attributes) -> Tensor:
    if "value" in attributes:
        return torch.from_numpy(numpy_helper.to_array(attributes["value"]).copy())
    (value,) = (v for name, v in attributes.items() if name.startswith("value_"))
    kind = torch.int64 if any(name.startswith("value_int") for name in attributes) else torch.float32
    return torch.tensor(value, dtype=kind)


def _constant_of_shape(inputs: Inputs, attributes: Attributes) -> Tensor:
    value = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return torch.from_numpy(value.copy()).expand(_whole(inputs[0])).clone()


def _divide(inputs: Inputs, _: Attributes) -> Tensor:
    a, b = inputs
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _first(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    """Return an operator of one input without attributes that matter."""
    return lambda inputs, _: function(inputs[0])


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    """Return an operator of two inputs."""
    return lambda inputs, _: function(inputs[0], inputs[1])


OPERATORS: Mapping[str, Callable[[Inputs, Attributes], Any]] = {
    "Add": _both(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda inputs, attributes: torch.cat(list(inputs), attributes["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": _divide,
    "Dropout": _first(lambda x: x),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _over_sizes(torch.mean),
    "GlobalMaxPool": _over_sizes(torch.amax),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _first(functional.hardswish),
    "Identity": _first(lambda x: x),
    "LeakyRelu": lambda inputs, attributes: functional.leaky_relu(inputs[0], attributes.get("alpha", 0.01)),
    "LogSoftmax": lambda inputs, attributes: torch.log_softmax(inputs[0], attributes.get("axis", -1)),
    "MatMul": _both(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _both(torch.mul),
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _first(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _first(lambda x: torch.tensor(x.shape, dtype=torch.int64)),
    "Sigmoid": _first(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda inputs, attributes: torch.softmax(inputs[0], attributes.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": _both(torch.sub),
    "Tanh": _first(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""The operators of the standard domain that can be trained through, by name."""
