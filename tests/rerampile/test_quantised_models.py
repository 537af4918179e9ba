"""Models that round their activations: plain ONNX Runtime must run what the cells hold, not what it rounds them to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rerampile import compile_model

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
OPERATORS = {
    "Conv": ("float[1, 3, 8, 8] x", "float[1, 4, 6, 6] y", (4, 3, 3, 3)),
    "ConvTranspose": ("float[1, 3, 8, 8] x", "float[1, 4, 10, 10] y", (3, 4, 3, 3)),
    "Gemm": ("float[5, 16] x", "float[5, 4] y", (16, 4)),
    "MatMul": ("float[5, 16] x", "float[5, 4] y", (16, 4)),
}


@pytest.mark.parametrize("domain", ["", "com.microsoft."])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_onnxruntime_keeps_the_weights(
    operator: str, relu: bool, domain: str, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    given, result, shape = OPERATORS[operator]
    rng = np.random.default_rng(0)
    tail = "r = Relu (c)" if relu else "r = Identity (c)"
    model = parse_model(
        f"""{HEADER} quantised ({given}) => ({result}) {{
            xq = {domain}QuantizeLinear (x, x_scale, zero)
            xd = {domain}DequantizeLinear (xq, x_scale, zero)
            c = {operator} (xd, weight)
            {tail}
            yq = {domain}QuantizeLinear (r, y_scale, zero)
            y = {domain}DequantizeLinear (yq, y_scale, zero)
        }}""",
        weight=rng.standard_normal(shape, dtype=np.float32),
        x_scale=np.float32(0.03).reshape(()),
        y_scale=np.float32(0.2).reshape(()),
        zero=np.array(128, np.uint8),
    )
    deployment = compile_model(model, out=tmp_path / "deployment")
    values = {
        "x": rng.standard_normal([d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim], np.float32)
    }
    optimised = ort.InferenceSession(str(deployment.model_path)).run(None, values)[0]
    plainly = ort.SessionOptions()
    plainly.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    unoptimised = ort.InferenceSession(str(deployment.model_path), plainly).run(None, values)[0]
    assert np.count_nonzero(optimised != unoptimised) <= 1  # a sum taken in another order may tip one rounding
    assert np.unique(unoptimised).size > 10


@pytest.mark.parametrize("operator", ["Conv", "Gemm"])
def test_half_precision_around_quantisers(
    operator: str, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """What keeps ONNX Runtime from rounding the weights is of the type that the operator gives."""
    given, result, shape = OPERATORS[operator]
    given, result = given.replace("float", "float16"), result.replace("float", "float16")
    rng = np.random.default_rng(0)
    model = parse_model(
        f"""<ir_version: 9, opset_import: ["" : 19]> quantised ({given}) => ({result}) {{
            xq = QuantizeLinear (x, scale, zero)
            xd = DequantizeLinear (xq, scale, zero)
            c = {operator} (xd, weight)
            yq = QuantizeLinear (c, scale, zero)
            y = DequantizeLinear (yq, scale, zero)
        }}""",
        weight=rng.standard_normal(shape).astype(np.float16),
        scale=np.float16(0.1).reshape(()),
        zero=np.array(128, np.uint8),
    )
    deployment = compile_model(model, out=tmp_path / "deployment")
    assert [layer.element_type for layer in deployment.plan.layers] == ["float16"]
