"""Statistics of output channels beside plain numpy on ONNX Runtime's own outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from rerampile import ConfigError, DataError
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.runtime.channel_statistics import ChannelStatistics, channel_statistics
from rerampile.runtime.dataset import ArrayDataset
from rerampile.runtime.session import open_session, run

Array = NDArray[Any]


def data_of(arrays: Mapping[str, Array]) -> ArrayDataset:
    return ArrayDataset(
        name="arrays",
        count=len(next(iter(arrays.values()))),
        rows=None,
        fetch=lambda indices: {name: array[indices] for name, array in arrays.items()},
        hash_data=lambda found: None,
    )


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def parsed(text: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    for name, shape in shapes.items():
        values = np.abs(normal(*shape)) if name == "var" else normal(*shape, seed=seed)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return shape_inference.infer_shapes(model)


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    return find_layers(ModelGraph(load_model_file(model)))[0]


def outputs(model: onnx.ModelProto, inputs: Mapping[str, Array], names: list[str]) -> list[Array]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return [array.astype(np.float64) for array in run(open_session(copy.SerializeToString()), inputs)]


def check(found: ChannelStatistics, *values: Array) -> None:
    """Compare with values [channels, images and positions] of each model."""
    assert found.count == values[0].shape[1]
    np.testing.assert_allclose(found.mean, [v.mean(axis=1) for v in values], rtol=1e-5, atol=1e-6)
    expected = [[((a.T - a.mean(1)) * (b.T - b.mean(1))).mean(axis=0) for b in values] for a in values]
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-5, atol=1e-6)


TEXT = (
    "(float[N,3,9,8] x) => (float[] y, float[] u, float[] left, float[] batch, float[] vector) {"
    " a = Conv <pads=[1,1,1,1]> (x, A) n = BatchNormalization (a, scale, shift, mean, var) m = Mul (n, factor)"
    " b = Relu (m) c = Conv <group=2> (b, B, bias) u = ConvTranspose <strides=[2,2]> (b, U)"
    " left = MatMul (L, c) batch = MatMul (x, M) vector = MatMul (x, V)"
    " p = GlobalAveragePool (c) q = Flatten (p) g = Gemm <transB=1> (q, D) y = Add (g, d) }"
)
SHAPES = {
    "A": (6, 3, 3, 3),
    **dict.fromkeys(("scale", "shift", "mean", "var"), (6,)),
    "factor": (6, 1, 1),
    "B": (4, 3, 3, 3),
    "bias": (4,),
    "U": (6, 2, 2, 2),
    "L": (5, 7),
    "M": (3, 8, 4),
    "V": (8,),
    "D": (10, 4),
    "d": (10,),
}


def test_every_kind_of_layer_in_two_models() -> None:
    x = normal(7, 3, 9, 8) + 0.5
    model, other = parsed(TEXT, SHAPES), parsed(TEXT, SHAPES, seed=1)
    models = [load_model_file(model), load_model_file(other)]
    reported: list[tuple[int, int]] = []

    found, reasons = channel_statistics(
        models,
        layers_of(model),
        data_of({"x": x}),
        np.arange(7),
        batch=3,
        progress=lambda *done: reported.append(done),
    )

    assert not reasons
    assert reported == [(0, 7), (3, 7), (6, 7), (7, 7)]
    names = ["m", "c", "u", "y", "left", "batch", "vector"]
    dense, sparse = (dict(zip(names, outputs(m, {"x": x}, names), strict=True)) for m in (model, other))
    ways = {
        "A": ("m", lambda v: np.moveaxis(v, 1, 0).reshape(6, -1)),  # behind both operations that were folded in
        "B": ("c", lambda v: np.moveaxis(v, 1, 0).reshape(4, -1)),
        "U": ("u", lambda v: np.moveaxis(v, 1, 0).reshape(2, -1)),
        "D": ("y", lambda v: v.T),
        "L": ("left", lambda v: np.moveaxis(v, 2, 0).reshape(5, -1)),
        "M": ("batch", lambda v: v.transpose(1, 3, 0, 2).reshape(12, -1)),
        "V": ("vector", lambda v: v.reshape(1, -1)),
    }
    assert set(found) == set(ways)
    for layer, (name, channels) in ways.items():
        check(found[layer], channels(dense[name]), channels(sparse[name]))


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares would lose the variance here."""
    text = "(float[N,2] x) => (float[N,2] y) { y = MatMul (x, W) }"
    model = parsed(text, {"W": (2, 2)})
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(2, dtype=np.float32), "W"))
    x = (normal(40, 2) + 2.0**20).astype(np.float32)
    found = channel_statistics([load_model_file(model)], layers_of(model), data_of({"x": x}), np.arange(40), batch=7)[
        0
    ]["W"]
    np.testing.assert_allclose(found.covariance[0, 0], x.astype(np.float64).var(axis=0), rtol=1e-9)


def test_shared_layers_and_what_cannot_be_seen() -> None:
    text = (
        "(float[2,5] x, bool c) => (float[2,4] a, float[2,4] b, float[2,3] z, float[2,1,1,3] r) {"
        " a = MatMul (x, W) s = Sigmoid (x) b = MatMul (s, W)"
        " three = Unsqueeze (x, axis) r = RNN <hidden_size=3> (three, R, S)"
        " z = If (c) <then_branch = t () => (float[2,3] p) { p = MatMul (x, A) },"
        " else_branch = e () => (float[2,3] q) { q = MatMul (x, A) }> }"
    )
    model = parsed(text, {"W": (5, 4), "A": (5, 3), "R": (1, 3, 5), "S": (1, 3, 3)})
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    x = normal(2, 5)
    inputs = {"x": x, "c": np.array(True)}
    data = data_of({"x": x})
    data.fetch = lambda indices: inputs

    found, reasons = channel_statistics([load_model_file(model)], layers_of(model), data, np.arange(2))

    a, b = outputs(model, inputs, ["a", "b"])
    check(found["W"], np.concatenate([a, b]).T)
    assert list(found) == ["W"]
    assert "subgraph" in reasons["A"]
    assert reasons["R"] == reasons["S"] == "its products are not seen outside its operator"


def test_refusals() -> None:
    model = parsed("(float[N,2] x) => (float[N,2] y) { y = MatMul (x, W) }", {"W": (2, 2)})
    layers, data = layers_of(model), data_of({"x": normal(4, 2)})
    with pytest.raises(ConfigError, match="no model to run"):
        channel_statistics([], layers, data, np.arange(4))
    with pytest.raises(DataError, match="no images"):
        channel_statistics([load_model_file(model)], layers, data, np.arange(0))
