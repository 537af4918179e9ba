"""Quantised weights in every rank, behind every kind of constant, in the standard and in ONNX Runtime's domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rerampile import Deployment, Target
from rerampile.deployment import layer_segments

Compile = Callable[..., Deployment]
Weight = Callable[..., np.ndarray]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
MICROSOFT = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'


@pytest.mark.parametrize("source", ["initializer", "constant", "chain"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_qlinear_conv_of_every_rank(rank: int, source: str, compile_text: Compile, weight: Weight) -> None:
    """Scales of the channels meet the channel axis, whether or not the shape of the weights stands in the graph."""
    values = weight(4, 3, *[2] * rank, dtype=np.int8)
    name, weights = ("V", {"V": values})
    before = ""
    if source == "chain":
        name, before = "W", "W = Identity (V)"
    elif source == "constant":
        listed, weights = ", ".join(map(str, values.reshape(-1))), {}
        before = f"V = Constant <value = int8[{','.join(map(str, values.shape))}] {{{listed}}}> ()"
    size = ",".join(["4"] * rank)
    deployment = compile_text(
        f"""{HEADER} g (uint8[4,3,{size}] x) => (uint8[] y)
        <float xs = {{0.02}}, uint8 xz = {{117}}, float ys = {{0.3}}, uint8 yz = {{90}}> {{
            {before}
            y = QLinearConv (x, xs, xz, {name}, ws, wz, ys, yz, B)
        }}""",
        {
            **weights,
            "ws": np.linspace(0.01, 0.04, 4, dtype=np.float32),
            "wz": np.zeros(4, np.int8),
            "B": np.arange(4, dtype=np.int32) * 900,
        },
    )
    (layer,) = deployment.plan.layers
    assert (layer.groups, layer.outputs, layer.inputs) == (1, 4, 3 * 2**rank)
    found: Any = deployment.plan.verification
    assert max(o.max_abs_error for o in found.outputs) <= 1  # one step where a half is rounded


@pytest.mark.parametrize(
    "cells",
    [{"levels": 3}, {"levels": 4}, {"levels": 8}, {"levels": 64}, {"levels": 100}, {"levels": 2, "slices": 3}],
    ids=lambda cells: "x".join(map(str, cells.values())),
)
@pytest.mark.parametrize(
    ("scale", "zero"),
    [
        *(("tensor", [128]), ("channel", [128]), ("partition", [128])),
        *(("channel", [0, 255, 128, 126]), ("partition", [0, 255, 128, 126])),
    ],
)
@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_whole_weights_on_few_levels(
    scheme: str,
    scale: str,
    zero: list[int],
    cells: dict[str, int],
    compile_text: Compile,
    discrete_target: Callable[..., Target],
) -> None:
    """Rounded to multiples of the least whole number of which none is off by more than half, within their type."""
    values = np.arange(64, dtype=np.uint8).reshape(16, 4) * 4 + np.arange(4, dtype=np.uint8)
    deployment = compile_text(
        f"""{HEADER} g (float[N,16] x) => (float[N,4] y) {{
            q, s, z = DynamicQuantizeLinear (x)
            i = MatMulInteger (q, W, z, wz) f = Cast <to = 1> (i) y = Mul (f, s)
        }}""",
        {"W": values, "wz": np.array(zero if len(zero) > 1 else zero[0], np.uint8)},
        target=discrete_target(rows=8, **cells),
        mapping=scheme,
        scale=scale,
    )
    (layer,) = deployment.plan.layers
    zeros = np.broadcast_to(zero, 4)[:, None]
    wanted, held = values.T - zeros, deployment.weights(layer)
    gain = layer_segments(layer).spread(deployment.gain(layer))
    np.testing.assert_array_equal(gain, np.rint(gain))
    assert ((held >= -zeros) & (held <= 255 - zeros)).all()
    assert (np.abs(held - wanted) <= gain / 2).all()
    assert (np.abs(held).max(axis=1) > 0.3 * np.abs(wanted).max(axis=1)).all()
    assert (gain <= np.abs(wanted).max(axis=1, keepdims=True)).all()
    assert scale != "tensor" or len(np.unique(gain)) == 1


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_weights_behind_the_quantisers_of_onnxruntime(per_channel: bool, compile_text: Compile, weight: Weight) -> None:
    """`com.microsoft.DequantizeLinear` computes what its namesake in the standard does, so the weights are known."""
    count = 3 if per_channel else 1
    weights = {
        "W": weight(3, 4, dtype=np.int8),
        "ws": np.linspace(0.01, 0.03, count, dtype=np.float32),
        "wz": np.arange(count, dtype=np.int8),
    }
    if not per_channel:
        weights["ws"], weights["wz"] = weights["ws"].reshape(()), weights["wz"].reshape(())
    deployment = compile_text(
        f"""{MICROSOFT} g (float[2,4] x) => (float[2,3] y) {{
            w = com.microsoft.DequantizeLinear <axis = 0> (W, ws, wz)
            y = Gemm <transB = 1> (x, w)
        }}""",
        weights,
    )
    (layer,) = deployment.plan.layers
    assert (layer.name, layer.constant_chain, deployment.plan.digital) == ("W", ["DequantizeLinear_w"], [])
    expected = (weights["W"] - weights["wz"].reshape(-1, 1)) * weights["ws"].reshape(-1, 1)
    np.testing.assert_allclose(deployment.weights(layer), expected, atol=1e-5)


def test_other_operators_of_onnxruntime_compute_no_constants(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{MICROSOFT} g (float[2,4] x) => (float[2,3] y, float[2,4] z) {{
            g = com.microsoft.Gelu (W)
            y = MatMul (x, g)
            z = MatMul (x, V)
        }}""",
        {"W": weight(4, 3), "V": weight(4, 4)},
    )
    assert [layer.name for layer in deployment.plan.layers] == ["V"]
    assert {op.node: op.code for op in deployment.plan.digital}["MatMul_y"] == "computed-weights"
