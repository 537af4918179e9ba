"""Filters that nothing reads any more: found through activations, additions and Flatten, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest

from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.pruner import prune_model
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import open_dataset
from rerampile.unused_channels import unread_outputs

Parse = Callable[..., onnx.ModelProto]

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 6, 6] image) => (float[N, 5] scores) {
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, first)
    b = Relu (a)
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b, second)
    d = Add (a, c)
    e = Relu (d)
    f = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 4> (e, depthwise)
    g = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (f)
    h = Flatten (g)
    scores = Gemm <transB = 1> (h, last)
}
"""


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"first": (4, 3, 3, 3), "second": (4, 4, 3, 3), "depthwise": (4, 1, 3, 3), "last": (5, 36)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def found(model: onnx.ModelProto) -> dict[str, list[int]]:
    graph = ModelGraph(load_model_file(onnx.shape_inference.infer_shapes(model)))
    layers, _ = find_layers(graph)
    unread = unread_outputs(graph, layers, {layer.name: layer.matrix(graph) for layer in layers})
    return {name: np.flatnonzero(flags).tolist() for name, flags in unread.items()}


def test_everything_is_read(parse_model: Parse, tensors: dict[str, np.ndarray]) -> None:
    assert found(parse_model(NET, **tensors)) == {}


def test_a_channel_that_the_last_layer_ignores_goes_all_the_way_up(
    parse_model: Parse, tensors: dict[str, np.ndarray]
) -> None:
    """Through Flatten, pooling, the depthwise layer, and the addition; 'first' is read by 'second', too."""
    tensors["last"].reshape(5, 4, 9)[:, 2] = 0
    assert found(parse_model(NET, **tensors)) == {"depthwise": [2], "second": [2]}
    tensors["second"][:, 2] = 0
    assert found(parse_model(NET, **tensors)) == {"depthwise": [2], "second": [2], "first": [2]}
    tensors["last"][0, 18] = 1
    assert found(parse_model(NET, **tensors)) == {}


def test_what_goes_changes_no_output(parse_model: Parse, tensors: dict[str, np.ndarray]) -> None:
    tensors["last"].reshape(5, 4, 9)[:, [0, 3]] = 0
    tensors["second"][:, 0] = 0
    before = parse_model(NET, **tensors)
    for name, outputs in found(before).items():
        tensors[name][outputs] = 0
    image = np.random.default_rng(1).standard_normal((4, 3, 6, 6)).astype(np.float32)
    runs = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
        for model in (before, parse_model(NET, **tensors))
    ]
    assert not tensors["first"][0].any()
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize(
    "reader",
    [
        "t = Transpose <perm = [0, 2, 3, 1]> (a)",  # channels lie elsewhere
        "t = Softmax <axis = 1> (a)",  # channels depend on each other
        "t = Concat <axis = 1> (a, a)",
        "t = Add (a, whole)",  # more dimensions
    ],
)
def test_what_is_not_understood_reads_everything(parse_model: Parse, reader: str) -> None:
    net = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[1, 3, 4, 4] image) => (float[N, M, K, L] y, float[?, ?, ?, ?, ?] z) {{
        a = Conv <kernel_shape = [1, 1]> (image, first)
        {reader}
        y = Conv <kernel_shape = [1, 1]> (a, second)
        z = Identity (t)
    }}
    """
    if "Add" not in reader:
        net = net.replace("float[?, ?, ?, ?, ?] z", "float[P, Q, R, S] z")
    first, whole = np.ones((4, 3, 1, 1), np.float32), np.ones((2, 1, 1, 1, 1), np.float32)
    tensors = {"first": first, "second": np.zeros((2, 4, 1, 1), np.float32)}
    assert found(parse_model(net, **tensors, **({"whole": whole} if "Add" in reader else {}))) == {}


@pytest.mark.parametrize(
    ("between", "image", "result", "expected"),
    [("Flatten", "N, 3, 1, 1", "N, 2", {"first": [1]}), ("Identity", "N, 3, 4, 4", "N, 4, 4, 2", {})],
)
def test_a_product_reads_the_last_axis(
    parse_model: Parse, between: str, image: str, result: str, expected: dict[str, list[int]]
) -> None:
    """As many columns as channels: only where these are the same axis does a row of zeros leave a channel unread."""
    net = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[{image}] image) => (float[{result}] y) {{
        a = Conv <kernel_shape = [1, 1]> (image, first)
        b = {between} (a)
        y = MatMul (b, second)
    }}
    """
    second = np.ones((4, 2), np.float32)
    second[1] = 0
    assert found(parse_model(net, first=np.ones((4, 3, 1, 1), np.float32), second=second)) == expected


def test_pruned_channels_take_their_filters_along(parse_model: Parse, tensors: dict[str, np.ndarray]) -> None:
    model = onnx.shape_inference.infer_shapes(parse_model(NET.replace("d = Add (a, c)", "d = Relu (c)"), **tensors))
    graph = ModelGraph(load_model_file(model))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    data = open_dataset("generated", session, generate=32)
    request = PruneRequest(ratios={"second": 0.5, "first": 0.0}, structure="channels", protect=())
    kept = {layer.tensor: layer.kept for layer in prune_model(graph, data, request, images=32).layers}
    channels = kept["second"].any(axis=(0, 2, 3))
    assert channels.sum() == 2
    np.testing.assert_array_equal(kept["first"].any(axis=(1, 2, 3)), channels)
