"""Quantised weights in every rank, behind every kind of constant, in the standard and in ONNX Runtime's domain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rerampile import Deployment

Compile = Callable[..., Deployment]
Weight = Callable[..., np.ndarray]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


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
