"""Second moments beside plain numpy windows and the energies of ONNX Runtime's own products, and their checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from rerampile import ConfigError, DataError
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile, load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.runtime import layer_inputs, taps
from rerampile.runtime import second_moments as second_moments_module
from rerampile.runtime.data import open_dataset
from rerampile.runtime.dataset import ArrayDataset, Batch
from rerampile.runtime.second_moments import Moments, cross_moments, second_moments
from rerampile.runtime.session import open_session, run

Array = NDArray[Any]


class BreakOffError(Exception):
    """What stops a calibration half way."""


class Arrays(ArrayDataset):
    """Arrays in memory as data, which can break off before some batch."""

    def __init__(self, arrays: Mapping[str, Array], rows: int | None = None, stop: int | None = None) -> None:
        super().__init__(
            name="arrays",
            count=len(next(iter(arrays.values()))),
            rows=rows,
            fetch=lambda indices: {name: array[indices] for name, array in arrays.items()},
            hash_data=lambda found: [found.update(array.tobytes()) for array in arrays.values()],
        )
        self.stop = stop

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(size, indices)):
            if number == self.stop:
                raise BreakOffError
            yield batch


class Whole(Arrays):
    """Inputs that are run as they are, whatever counts their first axis."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        super().__init__({"x": np.zeros(1)})
        self.arrays = dict(arrays)

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        yield Batch(self.arrays, None, np.arange(len(self.arrays["x"])))


def parsed(text: str, weights: Mapping[str, Array], opset: int = 17) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return shape_inference.infer_shapes(model, data_prop=True)


def found_in(model: onnx.ModelProto | Path) -> tuple[ModelGraph, list[Layer]]:
    graph = ModelGraph(load_model_file(model))
    return graph, find_layers(graph)[0]


def moments(
    model: onnx.ModelProto, inputs: Mapping[str, Array], **options: Any
) -> tuple[dict[str, Moments], dict[str, str]]:
    graph, layers = found_in(model)
    data = Arrays(inputs)
    return second_moments(graph, layers, data, np.arange(len(data)), **options)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def check(found: Moments, vectors: Array) -> None:
    """Compare moments with input vectors [groups, vectors, inputs]."""
    vectors = vectors.astype(np.float64)
    expected = np.einsum("gni,gnj->gij", vectors, vectors)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.moment, expected, rtol=0, atol=3e-6 * scale)
    np.testing.assert_allclose(found.total, vectors.sum(axis=1), rtol=0, atol=3e-6 * np.abs(vectors).sum(axis=1).max())
    assert found.count == vectors.shape[1]
    assert (found.moment == found.moment.swapaxes(1, 2)).all()


def energy_of(found: Moments, matrix: Array) -> float:
    """What the products of a layer with weights [groups * outputs, inputs] come to: tr(W H W^T)."""
    groups, inputs = found.total.shape
    weights = matrix.astype(np.float64).reshape(groups, -1, inputs)
    return float(np.sum((weights @ found.moment) * weights))


def windows(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Any) -> Array:
    """Every window of [images, channels, *sizes] with pads [(first, last), ...], one by one: [windows, inputs]."""
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    starts = [range(0, n - span + 1, s) for n, span, s in zip(padded.shape[2:], spans, strides, strict=True)]
    rows = []
    for image, corner in itertools.product(padded, itertools.product(*starts)):
        box = tuple(slice(c, c + span, d) for c, span, d in zip(corner, spans, dilations, strict=True))
        rows.append(image[(slice(None), *box)].reshape(-1))
    return np.array(rows)


def grouped(vectors: Array, groups: int) -> Array:
    """Split windows [windows, channels * kernel] by the groups of their channels: [groups, windows, inputs]."""
    return vectors.reshape(len(vectors), groups, -1).swapaxes(0, 1)


def convolution(x: Array, weight: Array, **attributes: Any) -> onnx.ModelProto:
    shape = ["N", *x.shape[1:]]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Conv", ["x", "W"], ["y"], **attributes)],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * x.ndim)],
            [numpy_helper.from_array(weight, "W")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Array, Array, dict[str, Any]]:
    rank = draw(st.integers(1, 3))
    sizes = {1: (1, 9), 2: (1, 7), 3: (1, 4)}[rank]

    def each(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, strides, dilations, pads = each(1, 3), each(1, 3), each(1, 2), each(0, 2, 2 * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    shape = [max(n, span) for n, span in zip(each(*sizes), spans, strict=True)]
    groups, images = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    attributes = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    weight = normal(outputs, channels // groups, *kernel, seed=1)
    return normal(images, channels, *shape), weight, attributes


@given(convolutions())
def test_convolutions(case: tuple[Array, Array, dict[str, Any]]) -> None:
    x, weight, attributes = case
    rank, groups = x.ndim - 2, attributes["group"]
    model = convolution(x, weight, **attributes)

    found = moments(model, {"x": x}, batch=2)[0]["W"]

    pads = list(zip(attributes["pads"][:rank], attributes["pads"][rank:], strict=True))
    every = windows(x, weight.shape[2:], attributes["strides"], attributes["dilations"], pads)
    check(found, grouped(every, groups))
    product = run(open_session(model.SerializeToString()), {"x": x})[0]
    assert found.count == product[:, 0].size
    assert energy_of(found, weight.reshape(len(weight), -1)) == pytest.approx(np.square(product).sum(), rel=1e-4)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [(2, 3), (4, 1)])
def test_automatic_padding(auto_pad: str, strides: tuple[int, int], kernel: tuple[int, int]) -> None:
    x, weight = normal(2, 3, 7, 8), normal(4, 3, *kernel, seed=1)
    model = convolution(x, weight, strides=strides, auto_pad=auto_pad)

    found = moments(model, {"x": x})[0]["W"]

    product = run(open_session(model.SerializeToString()), {"x": x})[0]
    missing = [(n - 1) * s + k - size for n, s, k, size in zip(product.shape[2:], strides, kernel, (7, 8), strict=True)]
    halves = [(max(0, n) // 2, max(0, n) - max(0, n) // 2) for n in missing]
    pads = [half if auto_pad == "SAME_UPPER" else half[::-1] for half in halves]
    check(found, windows(x, kernel, strides, (1, 1), pads)[None])
    assert energy_of(found, weight.reshape(4, -1)) == pytest.approx(np.square(product).sum(), rel=1e-4)


@pytest.mark.parametrize(("channels", "groups", "kernel"), [(96, 96, 3), (40, 2, 3), (150, 1, 1), (33, 1, 3)])
def test_few_large_groups_and_many_small_ones(channels: int, groups: int, kernel: int) -> None:
    x = normal(3, channels, 6, 5)
    model = convolution(x, normal(channels, channels // groups, kernel, kernel, seed=1), group=groups)

    found = moments(model, {"x": x})[0]["W"]

    every = windows(x, (kernel, kernel), (1, 1), (1, 1), [(0, 0), (0, 0)])
    check(found, grouped(every, groups))


def test_transposed_convolution() -> None:
    x = normal(3, 6, 4, 5)
    text = (
        "(float[N,6,4,5] x) => (float[N,4,P,Q] y) { y = ConvTranspose <group=2, strides=[2,1], pads=[1,0,0,1]> (x, W) }"
    )
    found = moments(parsed(text, {"W": normal(6, 2, 3, 3)}), {"x": x})[0]["W"]
    check(found, grouped(np.moveaxis(x, 1, -1).reshape(-1, 6), 2))


# name: (model, weight shape, input shape, einsum from the input to [groups, vectors, inputs])
PRODUCTS = {
    "gemm": ("y = Gemm (x, W)", (5, 4), (6, 5), "ni->ni", 1),
    "gemm, transposed weight": ("y = Gemm <transB=1, alpha=0.5> (x, W)", (4, 5), (6, 5), "ni->ni", 1),
    "gemm, transposed data": ("y = Gemm <transA=1> (x, W)", (5, 4), (5, 6), "in->ni", 1),
    "gemm, weight on the left": ("y = Gemm (W, x)", (4, 5), (5, 6), "in->ni", 1),
    "gemm, both transposed": ("y = Gemm <transA=1, transB=1> (W, x)", (5, 4), (6, 5), "ni->ni", 1),
    "right": ("y = MatMul (x, W)", (5, 4), (2, 3, 5), "abi->abi", 1),
    "left": ("y = MatMul (W, x)", (4, 5), (2, 5, 3), "aib->abi", 1),
    "batch": ("y = MatMul (x, W)", (3, 5, 4), (2, 3, 6, 5), "agni->gani", 3),
    "batch on the left": ("y = MatMul (W, x)", (3, 4, 5), (2, 3, 5, 6), "agin->gani", 3),
    "batches of two axes": ("y = MatMul (x, W)", (2, 3, 5, 4), (2, 3, 6, 5), "ghni->ghni", 6),
    "repeated weights": ("y = MatMul (x, W)", (2, 1, 5, 4), (2, 3, 6, 5), "gani->gani", 2),
    "of a vector": ("y = MatMul (x, W)", (5,), (2, 6, 5), "ani->ani", 1),
    "of a vector on the left": ("y = MatMul (W, x)", (5,), (2, 5, 6), "ain->ani", 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    body, weight_shape, shape, order, groups = PRODUCTS[name]
    dims = ",".join(map(str, shape))
    model = parsed(f"(float[{dims}] x) => (float[] y) {{ {body} }}", {"W": normal(*weight_shape, seed=1)})
    x = normal(*shape)
    graph, layers = found_in(model)

    found = second_moments(graph, layers, Arrays({"x": x}, rows=shape[0]), np.arange(shape[0]))[0]["W"]

    check(found, np.einsum(order, x).reshape(groups, -1, 5))
    product = run(open_session(model.SerializeToString()), {"x": x})[0]
    alpha = 0.5 if "alpha" in body else 1.0
    energy = np.square(product, dtype=np.float64).sum() / alpha**2
    assert energy_of(found, layers[0].original_matrix(graph)) == pytest.approx(energy, rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "data"), [((3, 5, 4), (6, 5)), ((3, 5, 4), (2, 1, 6, 5)), ((2, 3, 5, 4), (3, 6, 5)), ((3, 5, 4), (5,))]
)
def test_data_that_meet_every_matrix_of_a_batch(weights: tuple[int, ...], data: tuple[int, ...]) -> None:
    text = f"(float[{','.join(map(str, data))}] x) => (float[] y) {{ y = MatMul (x, W) }}"
    model = parsed(text, {"W": normal(*weights, seed=1)})
    x = normal(*data)
    graph, layers = found_in(model)

    found = second_moments(graph, layers, Arrays({"x": x}, rows=data[0]), np.arange(data[0]))[0]["W"]

    product = run(open_session(model.SerializeToString()), {"x": x})[0]
    energy = np.square(product, dtype=np.float64).sum()
    assert energy_of(found, layers[0].original_matrix(graph)) == pytest.approx(energy, rel=1e-4)
    assert found.count == product.size // 4 // math.prod(weights[:-2])


def test_operations_folded_in_before_are_not_seen() -> None:
    text = (
        "(float[N,4,5,5] x) => (float[N,3,3,3] y, float[N,4,5,3] z) {"
        " a = Relu (x) n = BatchNormalization (a, scale, shift, mean, var) m = Mul (n, factor) y = Conv (m, C)"
        " b = Sigmoid (x) p = Mul (b, row) q = Add (p, row) z = MatMul (q, M) }"
    )
    weights = {
        "C": normal(3, 4, 3, 3),
        "M": normal(5, 3),
        "row": normal(5),
        "factor": normal(4, 1, 1),
        **{name: np.abs(normal(4, seed=k)) + 0.1 for k, name in enumerate(("scale", "shift", "mean", "var"))},
    }
    x = normal(2, 4, 5, 5)
    model = parsed(text, weights)
    graph, layers = found_in(model)
    assert [len([f for f in layer.folds if f.side == "before"]) for layer in layers] == [2, 2]

    found = moments(model, {"x": x})[0]

    check(found["C"], windows(np.maximum(x, 0), (3, 3), (1, 1), (1, 1), [(0, 0), (0, 0)])[None])
    check(found["M"], (1 / (1 + np.exp(-x))).reshape(1, -1, 5))
    weights_of = {layer.name: layer.matrix(graph) for layer in layers}
    with_bias = {layer.name: layer.bias_with(weights_of[layer.name]) for layer in layers}
    products = dict(zip("CM", run(open_session(model.SerializeToString()), {"x": x}), strict=True))
    for name, axis in (("C", 1), ("M", 3)):
        product = np.moveaxis(products[name], axis, -1) - with_bias[name]
        assert energy_of(found[name], weights_of[name]) == pytest.approx(np.square(product).sum(), rel=1e-4)


def test_shared_weights_and_shared_inputs() -> None:
    text = (
        "(float[N,5] x, float[N,5] z) => (float[N,4] a, float[N,4] b, float[N,4] c, float[N,6] d) {"
        " a = MatMul (x, W) b = MatMul (z, W) c = MatMul (x, W) d = MatMul (x, V) }"
    )
    x, z = normal(7, 5), normal(7, 5, seed=2)
    model = parsed(text, {"W": normal(5, 4), "V": normal(5, 6)})
    found, reasons = moments(model, {"x": x, "z": z}, batch=3)
    assert not reasons
    check(found["W"], np.concatenate([x, z, x])[None])
    check(found["V"], x[None])

    text = "(float[N,5] x) => (float[N,4] a, float[N,6] d) { a = MatMul (x, W) d = MatMul (x, V) }"
    model = parsed(text, {"W": normal(5, 4), "V": normal(5, 6)})
    found = moments(model, {"x": x})[0]
    assert found["W"] is found["V"]
    with pytest.raises(ValueError, match="read-only"):
        found["W"].moment[0, 0, 0] = 1


def states(x: Array, initial: Array, weights: Array, recurrent: Array, backwards: bool) -> tuple[Array, Array]:
    """States that each step of a plain recurrent layer reads, and those that it leaves: [steps, images, states]."""
    state, before, after = initial, np.zeros((len(x), *initial.shape)), np.zeros((len(x), *initial.shape))
    for step in reversed(range(len(x))) if backwards else range(len(x)):
        before[step] = state
        state = np.tanh(x[step] @ weights.T + state @ recurrent.T)
        after[step] = state
    return before, after


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("initial", [True, False])
def test_inputs_and_states_of_recurrent_layers(direction: str, initial: bool) -> None:
    directions = 2 if direction == "bidirectional" else 1
    outputs = f'y, last = RNN <hidden_size=3, direction="{direction}"> (x, W, R{",,,h" if initial else ""})'
    text = f"(float[6,2,4] x, float[{directions},2,3] h) => (float[{directions},2,3] last) {{ {outputs} }}"
    weights, recurrent = normal(directions, 3, 4), normal(directions, 3, 3)
    x, first = normal(6, 2, 4), normal(directions, 2, 3)
    model = parsed(text, {"W": weights, "R": recurrent})
    graph, layers = found_in(model)
    data = Whole({"x": x, "h": first})

    found, reasons = second_moments(graph, layers, data, np.arange(1))

    assert not reasons
    start = first if initial else np.zeros_like(first)
    backwards = [direction == "reverse", True][:directions]
    seen = [states(x, start[d], weights[d], recurrent[d], backwards[d])[0] for d in range(directions)]
    check(found["W"], np.stack([x.reshape(-1, 4)] * directions))
    check(found["R"], np.stack(seen).reshape(directions, -1, 3))


def test_states_of_lstm_and_gru() -> None:
    text = (
        "(float[5,2,4] x) => (float[5,1,2,3] y, float[5,1,2,3] z, float[1,2,3] s) {"
        " y = LSTM <hidden_size=3> (x, W, R) z = GRU <hidden_size=3, linear_before_reset=1> (x, V, S)"
        " _, s = GRU <hidden_size=3> (x, U, T) }"
    )
    shapes = {"W": 12, "V": 9, "U": 9}
    weights = {name: normal(1, n, 4) for name, n in shapes.items()}
    weights |= {name: normal(1, n, 3, seed=1) for name, n in zip("RST", shapes.values(), strict=True)}
    model, x = parsed(text, weights), normal(5, 2, 4)
    model.graph.node[2].output[0] = ""
    graph, layers = found_in(model)

    found, reasons = second_moments(graph, layers, Whole({"x": x}), np.arange(1))

    y, z, _ = run(open_session(model.SerializeToString()), {"x": x})
    for name, outputs in (("R", y), ("S", z)):
        before = np.concatenate([np.zeros((1, 2, 3)), outputs[:-1, 0]])
        check(found[name], before.reshape(1, -1, 3))
    assert set(found) == set("WVURS")
    assert list(reasons) == ["T"]
    assert "gate" in reasons["T"]


def test_quantised_layers() -> None:
    text = (
        "(float[N,3,6,5] f) => (int32[N,4,6,5] conv, uint8[N,4,6,5] linear, int32[N,3,6,4] left, float[N,2,6,5] q) {"
        " x, scale, zero = DynamicQuantizeLinear (f)"
        " conv = ConvInteger <pads=[1,1,1,1]> (x, C, zero)"
        " linear = QLinearConv <pads=[1,1,1,1]> (x, scale, zero, D, ws, wz, ys, yz)"
        " left = MatMulInteger (x, M, zero)"
        " real = DequantizeLinear (x, scale, zero) q = Conv <pads=[1,1,1,1]> (real, E) }"
    )
    rng = np.random.default_rng(0)
    weights = {
        "C": rng.integers(0, 255, (4, 3, 3, 3)).astype(np.uint8),
        "D": rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        "M": rng.integers(-127, 128, (5, 4)).astype(np.int8),
        "E": normal(2, 3, 3, 3),
        "ws": np.float32(0.01),
        "wz": np.int8(0),
        "ys": np.float32(0.1),
        "yz": np.uint8(120),
    }
    f = normal(1, 3, 6, 5)
    found, reasons = moments(parsed(text, weights), {"f": f})
    assert not reasons
    probe = parsed(
        "(float[N,3,6,5] f) => (uint8[N,3,6,5] x, float s, uint8 z) { x, s, z = DynamicQuantizeLinear (f) }", {}
    )
    x, scale, zero = run(open_session(probe.SerializeToString()), {"f": f})
    numbers = x.astype(np.float64) - zero
    every = windows(numbers, (3, 3), (1, 1), (1, 1), [(1, 1), (1, 1)])[None]
    check(found["C"], every)
    assert found["D"] is found["C"]
    check(found["M"], numbers.reshape(1, -1, 5))
    check(found["E"], every * scale)


def test_other_number_types() -> None:
    text = (
        "(double[N,5] x) => (double[N,4] y, float16[N,4] z) {"
        " y = MatMul (x, W) h = Cast <to=10> (x) z = MatMul (h, V) }"
    )
    x = normal(6, 5).astype(np.float64)
    model = parsed(text, {"W": normal(5, 4).astype(np.float64), "V": normal(5, 4).astype(np.float16)})
    found = moments(model, {"x": x})[0]
    check(found["W"], x[None])
    check(found["V"], x.astype(np.float16)[None])


def test_what_cannot_be_seen_is_listed() -> None:
    text = (
        "(float[2,6] x, float[4,2,6] s, int32[2] n, bool c) => (float[2,5] z, float[1,2,3] h) {"
        " k = MatMul (x, K) _, h = RNN <hidden_size=3> (s, W, R, , n)"
        " z = If (c) <then_branch = t () => (float[2,5] p) { p = MatMul (k, A) },"
        " else_branch = e () => (float[2,5] q) { q = Gemm (k, B) }> }"
    )
    weights = {"K": (6, 6), "A": (6, 5), "B": (6, 5), "W": (1, 3, 6), "R": (1, 3, 3)}
    model = parsed(text, {name: normal(*shape) for name, shape in weights.items()})
    model.graph.node[1].output[0] = ""
    graph, layers = found_in(model)
    inputs = {"x": normal(2, 6), "s": normal(4, 2, 6), "n": np.array([4, 2], np.int32), "c": np.array(True)}

    found, reasons = second_moments(graph, layers, Whole(inputs), np.arange(1))

    check(found["K"], inputs["x"][None])
    assert list(found) == ["K"]
    assert {name: reason.split(",")[0] for name, reason in reasons.items()} == {
        "W": "its sequences have lengths of their own",
        "R": "its sequences have lengths of their own",
        "A": "it runs in a subgraph",
        "B": "it runs in a subgraph",
    }
    hidden = [layer for layer in layers if layer.name in "AB"]
    assert second_moments(graph, hidden, Whole({}), np.arange(1))[0] == {}
    with pytest.raises(ConfigError, match=r"layer 'A' cannot be refitted: it runs in a subgraph"):
        cross_moments(graph, graph.model, hidden[0], Whole(inputs), np.arange(1))


def test_numbers_that_cannot_be_squared_are_told() -> None:
    text = "(float[N,5] x) => (float[N,4] y, float[N,4] z) { y = MatMul (x, W) s = Sigmoid (x) z = MatMul (s, V) }"
    x = normal(6, 5)
    x[2, 3] = 1e30
    found, reasons = moments(parsed(text, {"W": normal(5, 4), "V": normal(5, 4)}), {"x": x})
    assert list(found) == ["V"]
    assert "not finite, or too large" in reasons["W"]


NETWORK = (
    "(float[N,3,9,8] x) => (float[N,4] y) { a = Conv <pads=[1,1,1,1]> (x, A) b = Relu (a)"
    " c = Conv <pads=[1,1,1,1], group=6> (b, B) d = Add (c, a) e = Conv (d, C) p = GlobalAveragePool (e)"
    " q = Flatten (p) y = Gemm <transB=1> (q, D) }"
)
SHAPES = {"A": (18, 3, 3, 3), "B": (18, 3, 3, 3), "C": (16, 18, 3, 3), "D": (4, 16)}


def network(seed: int = 0) -> onnx.ModelProto:
    return parsed(NETWORK, {name: normal(*shape, seed=seed) / 3 for name, shape in SHAPES.items()})


def test_batches_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(11, 3, 9, 8)
    once = moments(network(), {"x": x})[0]
    by_three = moments(network(), {"x": x}, batch=3)[0]
    monkeypatch.setattr(layer_inputs, "_CHUNK", 10_000)
    chunked = moments(network(), {"x": x})[0]
    for name, expected in once.items():
        for other in (by_three[name], chunked[name]):
            np.testing.assert_allclose(other.moment, expected.moment, rtol=0, atol=1e-5 * expected.moment.max())
            np.testing.assert_allclose(other.total, expected.total, rtol=1e-4, atol=1e-3)
            assert other.count == expected.count


def test_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "_CHUNK", 4 * 27 * 20)
    x = normal(5, 3, 9, 8)
    (use,) = layer_inputs.input_uses(*_only(convolution(x, normal(4, 3, 3, 3), pads=[1, 1, 1, 1])))
    sizes = [columns.shape for columns in use.reader.columns([x])]
    assert max(n for _, _, n in sizes) <= 20
    assert sum(n for _, _, n in sizes) == 5 * 9 * 8


def _only(model: onnx.ModelProto) -> tuple[ModelGraph, Layer]:
    graph, (layer,) = found_in(model)
    return graph, layer


def test_large_models_process_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, layers = found_in(network())
    data = Arrays({"x": normal(200, 3, 9, 8)})
    seen = [use.taps[0] for layer in layers for use in layer_inputs.input_uses(graph, layer)]
    assert taps.Watched([graph.model], seen, data, np.arange(200)).batch == 64
    an_image = 4 * (3 * 72 + 18 * 72 + 18 * 72 + 16)
    monkeypatch.setattr(taps, "_AT_ONCE", 5 * an_image)
    assert taps.Watched([graph.model], seen, data, np.arange(200)).batch == 5
    monkeypatch.setattr(taps, "_AT_ONCE", 1)
    assert taps.Watched([graph.model], seen, data, np.arange(200)).batch == 1


def test_only_what_is_watched_is_run() -> None:
    """Behind the last tap there is nothing left, nor are inputs that only it would have needed."""
    text = "(float[N,5] x, float[N,4] z) => (float[N,4] y) { a = MatMul (x, W) b = Add (a, z) y = MatMul (b, V) }"
    model = parsed(text, {"W": normal(5, 4), "V": normal(4, 4)})
    graph, layers = found_in(model)
    x = normal(6, 5)
    found = second_moments(graph, layers[:1], Arrays({"x": x}), np.arange(6))[0]
    check(found["W"], x[None])


def test_weights_in_a_file_beside_the_model(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    x = normal(3, 3, 9, 8)
    graph, layers = found_in(tmp_path / "m.onnx")
    found = second_moments(graph, layers, Arrays({"x": x}), np.arange(3))[0]
    assert same_bytes(found, moments(network(), {"x": x})[0])


def test_a_batch_that_was_filled_up_is_left_out() -> None:
    text = "(float[4,5] x) => (float[4,4] y) { y = MatMul (x, W) }"
    graph, layers = found_in(parsed(text, {"W": normal(5, 4)}))
    x, reported = normal(10, 5), []
    found = second_moments(
        graph, layers, Arrays({"x": x}, rows=4), np.arange(10), progress=lambda *done: reported.append(done)
    )[0]
    check(found["W"], x[None, :8])
    assert reported == [(0, 10), (4, 10), (8, 10), (10, 10)]
    with pytest.raises(DataError, match="arrays: 3 images, fewer than the model runs at once; give more"):
        second_moments(graph, layers, Arrays({"x": x}, rows=4), np.arange(3))


def test_refusals() -> None:
    graph, layers = found_in(network())
    data = Arrays({"x": normal(4, 3, 9, 8)})
    with pytest.raises(DataError, match="no images to calibrate with"):
        second_moments(graph, layers, data, np.arange(0))
    with pytest.raises(ConfigError, match="--batch: 0, expected 1 or more"):
        second_moments(graph, layers, data, np.arange(4), batch=0)


# checkpoints ----------------------------------------------------------------------------------------


def test_interrupted_is_uninterrupted(tmp_path: Path) -> None:
    x, path = normal(20, 3, 9, 8), tmp_path / "moments.safetensors"
    graph, layers = found_in(network())
    images = np.arange(20)[::-1].copy()
    whole = second_moments(graph, layers, Arrays({"x": x}), images, batch=3)[0]

    for stop in (2, 5):
        with pytest.raises(BreakOffError):
            second_moments(
                graph, layers, Arrays({"x": x}, stop=stop), images, batch=3, checkpoint=path, checkpoint_seconds=0
            )
    reported: list[tuple[int, int]] = []
    resumed = second_moments(
        graph,
        layers,
        Arrays({"x": x}),
        images,
        batch=3,
        checkpoint=path,
        progress=lambda *done: reported.append(done),
    )[0]

    assert reported == [(15, 20), (18, 20), (20, 20)]
    assert same_bytes(resumed, whole)
    finished = second_moments(graph, layers, Arrays({"x": x}, stop=0), images, batch=3, checkpoint=path)[0]
    assert same_bytes(finished, whole)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def same_bytes(one: Mapping[str, Moments], other: Mapping[str, Moments]) -> bool:
    return one.keys() == other.keys() and all(
        a.moment.tobytes() == b.moment.tobytes() and a.total.tobytes() == b.total.tobytes() and a.count == b.count
        for a, b in ((one[name], other[name]) for name in one)
    )


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    graph, layers = found_in(network())
    x = normal(6, 3, 9, 8)
    data, images = Arrays({"x": x}), np.arange(6)
    second_moments(graph, layers, data, images, batch=2, checkpoint=path)
    other = found_in(network(seed=1))
    asked: dict[str, tuple[Any, ...]] = {
        "model": (*other, data, images, 2),
        "layers": (graph, layers[:2], data, images, 2),
        "data": (graph, layers, Arrays({"x": x + 1}), images, 2),
        "images": (graph, layers, data, images[:4], 2),
        "batch": (graph, layers, data, images, 3),
    }
    for what, (*arguments, batch) in asked.items():
        with pytest.raises(DataError, match=f"another calibration: {what} was .*, now .*; remove it to start anew"):
            second_moments(*arguments, batch=batch, checkpoint=path)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    graph, layers = found_in(network())
    data, images = Arrays({"x": normal(2, 3, 9, 8)}), np.arange(2)
    path = tmp_path / "moments.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not a safetensors file.*remove it to start anew, or name another file"):
        second_moments(graph, layers, data, images, checkpoint=path)
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError, match="not a checkpoint of moments; name another file"):
        second_moments(graph, layers, data, images, checkpoint=path)
    path.unlink()
    second_moments(graph, layers, data, images, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"moments\.safetensors: tensor .*remove it to start anew"):
        second_moments(graph, layers, data, images, checkpoint=path)
    with pytest.raises(DataError, match=r"absent/m: the checkpoint cannot be written: No such file"):
        second_moments(graph, layers, data, images, checkpoint=tmp_path / "absent" / "m")


# two models side by side ----------------------------------------------------------------------------


def test_cross_moments() -> None:
    x = normal(7, 3, 9, 8)
    graph, layers = found_in(network())
    sparse = network()
    for tensor in sparse.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        values[np.abs(values) < 0.2] = 0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    pruned = load_model_file(sparse)
    layer = next(layer for layer in layers if layer.name == "B")

    found = cross_moments(graph, pruned, layer, Arrays({"x": x}), np.arange(7), batch=3)

    dense_columns, pruned_columns = (
        grouped(windows(of_b(model, x), (3, 3), (1, 1), (1, 1), [(1, 1), (1, 1)]), 6) for model in (graph.model, pruned)
    )
    check(found.pruned, pruned_columns)
    weights = layer.matrix(graph).reshape(6, -1, dense_columns.shape[-1])
    products = np.einsum("goi,gni->gon", weights, dense_columns, dtype=np.float64)
    expected = products @ pruned_columns
    np.testing.assert_allclose(found.cross, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found.dense_total, dense_columns.sum(axis=1), rtol=1e-4)
    assert np.abs(found.cross - weights @ found.pruned.moment).max() > 0.01 * np.abs(expected).max()


def test_of_many_vectors_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(64, 3, 9, 8)
    graph, layers = found_in(network())
    layer = next(layer for layer in layers if layer.name == "B")
    arguments = graph, graph.model, layer, Arrays({"x": x}), np.arange(64)
    everything = cross_moments(*arguments, batch=8)
    monkeypatch.setattr(second_moments_module, "_sampled", lambda inputs: 1000)
    some = cross_moments(*arguments, batch=8)

    assert everything.pruned.count == 64 * 72
    assert abs(some.pruned.count - 1000) < 5 * np.sqrt(1000)
    for found in (some, cross_moments(*arguments, batch=8)):  # the same ones each time
        np.testing.assert_array_equal(found.pruned.moment, some.pruned.moment)
    # Both models are one, and the same vectors were drawn in both.
    weights = layer.matrix(graph).reshape(6, -1, some.pruned.moment.shape[-1])
    np.testing.assert_allclose(some.cross, weights @ some.pruned.moment, atol=1e-4 * np.abs(some.cross).max())
    np.testing.assert_allclose(some.dense_total, some.pruned.total)
    average, expected = (found.pruned.moment / found.pruned.count for found in (some, everything))
    assert np.linalg.norm(average - expected) < 0.1 * np.linalg.norm(expected)


def of_b(model: ModelFile, x: Array) -> Array:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.append(onnx.ValueInfoProto(name="b"))
    return np.asarray(run(open_session(proto.SerializeToString()), {"x": x})[1])


# real models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["A", "B"])
def test_energies_of_resnet20(option: str, data_root: Path) -> None:
    path = data_root / "models" / f"resnet20_cifar10_option{option}.onnx"
    assert_energies(path, images=6)


@pytest.mark.slow
def test_energies_of_resnet18(project_root: Path) -> None:
    path = project_root / "models" / "resnet18_cifar10.onnx"
    if not path.is_file():
        pytest.skip("the trained model comes with the checkout only")
    assert_energies(path, images=4)


def assert_energies(path: Path, images: int) -> None:
    """Compare tr(W H W^T) with the squared results of ONNX Runtime, less their bias, for every layer."""
    graph, layers = found_in(path)
    data = open_dataset("generated", open_session(path), generate=images)
    found, reasons = second_moments(graph, layers, data, np.arange(images))
    assert not reasons
    assert len(found) > 15
    proto = onnx.load(path)
    del proto.graph.output[:]
    nodes = [layer.uses[0][0] for layer in layers]
    proto.graph.output.extend(onnx.ValueInfoProto(name=node.proto.output[0]) for node in nodes)
    results = run(open_session(proto.SerializeToString()), next(data.batches(images)).inputs)
    for layer, node, result in zip(layers, nodes, results, strict=True):
        product = result.astype(np.float64)
        if node.input(2) is not None:
            product -= graph.read(node.input(2)).reshape(-1, *[1] * (result.ndim - 2))
        assert not any(fold.side == "before" for fold in layer.folds)
        energy = energy_of(found[layer.name], layer.original_matrix(graph))
        assert energy == pytest.approx(np.square(product).sum(), rel=1e-4)
