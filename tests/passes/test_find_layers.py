"""What maps and what stays digital. Each model is compiled, so run before and after in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rerampile import Deployment, ModelError, UnsupportedModelError, compile_model, verify_deployment
from rerampile.schemes import SCHEMES

Compile = Callable[..., Deployment]
Weight = Callable[..., np.ndarray]

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def matrices(deployment: Deployment) -> dict[str, list[int]]:
    """Layers by name, as [groups, outputs, inputs]."""
    return {layer.name: [layer.groups, layer.outputs, layer.inputs] for layer in deployment.plan.layers}


def reasons(deployment: Deployment) -> dict[str, str]:
    """Codes of digital operations by operator."""
    return {operation.op: operation.code for operation in deployment.plan.digital}


# Body, shape of x, weights as shapes, expected matrices.
FLOAT_CASES: dict[str, tuple[str, str, dict[str, tuple[int, ...]], dict[str, list[int]]]] = {
    "conv 1-D": ("y = Conv (x, W, B)", "N,3,9", {"W": (4, 3, 3), "B": (4,)}, {"W": [1, 4, 9]}),
    "conv 2-D, free size": ("y = Conv <pads=[1,1,1,1]> (x, W)", "N,3,H,V", {"W": (4, 3, 3, 3)}, {"W": [1, 4, 27]}),
    "conv 3-D": ("y = Conv <strides=[2,1,1]> (x, W)", "1,2,5,4,4", {"W": (3, 2, 2, 3, 1)}, {"W": [1, 3, 12]}),
    "conv stride, dilation, uneven pads": (
        "y = Conv <strides=[2,3], dilations=[2,1], pads=[0,1,2,3]> (x, W)",
        "2,3,9,8",
        {"W": (4, 3, 2, 3)},
        {"W": [1, 4, 18]},
    ),
    "conv auto_pad": ('y = Conv <auto_pad="SAME_UPPER">(x, W)', "1,3,5,5", {"W": (4, 3, 3, 3)}, {"W": [1, 4, 27]}),
    "conv groups": ("y = Conv <group=2> (x, W)", "1,4,5,5", {"W": (6, 2, 3, 3)}, {"W": [2, 3, 18]}),
    "conv depthwise": ("y = Conv <group=4> (x, W)", "1,4,5,5", {"W": (8, 1, 3, 3)}, {"W": [4, 2, 9]}),
    "conv transpose": (
        "y = ConvTranspose <strides=[2,2], output_padding=[1,1]> (x, W, B)",
        "1,3,4,4",
        {"W": (3, 5, 3, 2), "B": (5,)},
        {"W": [1, 30, 3]},
    ),
    "conv transpose groups": ("y = ConvTranspose <group=2>(x, W)", "1,4,5", {"W": (4, 3, 3)}, {"W": [2, 9, 2]}),
    "gemm": ("y = Gemm (x, W)", "N,5", {"W": (5, 3)}, {"W": [1, 3, 5]}),
    "gemm transB, alpha, beta": (
        "y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, W, C)",
        "2,5",
        {"W": (3, 5), "C": (3,)},
        {"W": [1, 3, 5]},
    ),
    "gemm transA, C a column": ("y = Gemm <transA=1> (x, W, C)", "5,2", {"W": (5, 3), "C": (2, 1)}, {"W": [1, 3, 5]}),
    "gemm, C full": ("y = Gemm (x, W, C)", "2,5", {"W": (5, 3), "C": (2, 3)}, {"W": [1, 3, 5]}),
    "gemm, C a scalar": ("y = Gemm (x, W, C)", "2,5", {"W": (5, 3), "C": ()}, {"W": [1, 3, 5]}),
    "gemm constant left": ("y = Gemm <alpha=2.0> (W, x)", "5,2", {"W": (3, 5)}, {"W": [1, 3, 5]}),
    "gemm constant left transposed": ("y = Gemm <transA=1, transB=1>(W, x)", "2,5", {"W": (5, 3)}, {"W": [1, 3, 5]}),
    "matmul right": ("y = MatMul (x, W)", "2,3,5", {"W": (5, 4)}, {"W": [1, 4, 5]}),
    "matmul left": ("y = MatMul (W, x)", "2,5,3", {"W": (4, 5)}, {"W": [1, 4, 5]}),
    "matmul right batched": ("y = MatMul (x, W)", "2,3,6,5", {"W": (3, 5, 4)}, {"W": [3, 4, 5]}),
    "matmul left batched": ("y = MatMul (W, x)", "5,3", {"W": (2, 3, 4, 5)}, {"W": [6, 4, 5]}),
    "matmul 1-D right": ("y = MatMul (x, W)", "3,5", {"W": (5,)}, {"W": [1, 1, 5]}),
    "matmul 1-D left": ("y = MatMul (W, x)", "5,3", {"W": (5,)}, {"W": [1, 1, 5]}),
    "matmul 1-D both": ("y = MatMul (x, W)", "5", {"W": (5,)}, {"W": [1, 1, 5]}),
    "one weight": ("y = Gemm (x, W)", "1,1", {"W": (1, 1)}, {"W": [1, 1, 1]}),
    "lstm bidirectional": (
        'y, h, c = LSTM <hidden_size=3, direction="bidirectional"> (x, W, R, B)',
        "4,2,5",
        {"W": (2, 12, 5), "R": (2, 12, 3), "B": (2, 24)},
        {"W": [2, 12, 5], "R": [2, 12, 3]},
    ),
    "lstm, peepholes only, last output only": (
        "y0, y1, y = LSTM <hidden_size=3> (x, W, R, , , , , P)",
        "4,2,5",
        {"W": (1, 12, 5), "R": (1, 12, 3), "P": (1, 9)},
        {"W": [1, 12, 5], "R": [1, 12, 3]},
    ),
    "gru, reset after, batch first": (
        "y, h = GRU <hidden_size=3, linear_before_reset=1, layout=0> (x, W, R)",
        "4,2,5",
        {"W": (1, 9, 5), "R": (1, 9, 3)},
        {"W": [1, 9, 5], "R": [1, 9, 3]},
    ),
    "rnn reversed": (
        'y = RNN <hidden_size=3, direction="reverse", activations=["Relu"]> (x, W, R)',
        "4,2,5",
        {"W": (1, 3, 5), "R": (1, 3, 3)},
        {"W": [1, 3, 5], "R": [1, 3, 3]},
    ),
    "shared by two nodes": (
        "a = MatMul (x, W) \n b = Relu (a) \n y = MatMul (b, W)",
        "2,4",
        {"W": (4, 4)},
        {"W": [1, 4, 4]},
    ),
    "shared by two forms": (
        "a = Gemm <transB=1> (x, W) \n y = Gemm (a, W)",
        "2,4",
        {"W": (3, 4)},
        {"W": [1, 3, 4], "W#2": [1, 4, 3]},
    ),
    "shared with a digital node": (
        "a = MatMul (x, W) \n b = Mul (W, W) \n c = ReduceSum <keepdims=0> (b) \n y = Add (a, c)",
        "2,4",
        {"W": (4, 3)},
        {"W": [1, 3, 4]},
    ),
    "behind Identity": ("V = Identity (W) \n y = MatMul (x, V)", "2,4", {"W": (4, 3)}, {"W": [1, 3, 4]}),
    "behind Transpose": ("V = Transpose (W) \n y = MatMul (x, V)", "2,4", {"W": (3, 4)}, {"W": [1, 3, 4]}),
    "behind Reshape and Squeeze": (
        "s = Constant <value_ints=[1,4,3]> () \n V = Reshape (W, s) \n z = Constant <value_ints=[0]> ()"
        "\n U = Squeeze (V, z) \n y = MatMul (x, U)",
        "2,4",
        {"W": (3, 4)},
        {"W": [1, 3, 4]},
    ),
    "behind a computation": ("V = Mul (W, W) \n y = MatMul (x, V)", "2,4", {"W": (4, 3)}, {"W": [1, 3, 4]}),
    "from two tensors": (
        "V = Concat <axis=0> (W, U) \n y = MatMul (x, V)",
        "2,4",
        {"W": (1, 3), "U": (3, 3)},
        {"MatMul_y": [1, 3, 4]},
    ),
    "a Constant node": (
        "W = Constant <value = float[2,3] {1.0, -2.0, 3.0, 0.5, 0.25, -1.5}> () \n y = MatMul (x, W)",
        "2,2",
        {},
        {"MatMul_y": [1, 3, 2]},
    ),
    "the weight is an output too": (
        "y = MatMul (x, W) \n z = Identity (W)",
        "2,4",
        {"W": (4, 3)},
        {"W": [1, 3, 4]},
    ),
}


@pytest.mark.parametrize("case", FLOAT_CASES)
def test_float_forms_map(case: str, compile_text: Compile, weight: Weight) -> None:
    body, shape, shapes, expected = FLOAT_CASES[case]
    outputs = "float[] y, float[] z" if "z = Identity" in body else "float[] y"
    text = f"{HEADER} g (float[{shape}] x) => ({outputs}) {{ {body} }}"

    deployment = compile_text(text, {name: weight(*size) for name, size in shapes.items()})

    assert matrices(deployment) == expected
    assert deployment.plan.verification is not None
    assert max(o.relative_error for o in deployment.plan.verification.outputs) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs(
    scheme: str, small_model: onnx.ModelProto, tmp_path: Path, discrete_target: Callable[..., Any]
) -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"scale": "tensor"},
        {"target": discrete_target(levels=4, slices=3)},
        {"target": discrete_target(levels=1024)},
        {"target": discrete_target(levels=4, slices=2, level_table=(1e-6, 20e-6, 37e-6, 100e-6))},
    ]
    for number, options in enumerate(choices):
        deployment = compile_model(small_model, out=tmp_path / str(number), mapping=scheme, **options)
        assert {layer.scheme for layer in deployment.plan.layers} == {scheme}
        assert max(o.relative_error for o in deployment.plan.verification.outputs) < 1e-5
        onnx.checker.check_model(str(deployment.model_path))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16], ids=["float16", "double", "bfloat16"])
def test_other_float_types_map(dtype: Any, weight: Weight, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 MatMul on the CPU, so that one is cast, as exporters do."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    cast = dtype is ml_dtypes.bfloat16
    compute = TensorProto.FLOAT if cast else element
    nodes = [helper.make_node("MatMul", ["x", "V" if cast else "W"], ["y"])]
    if cast:
        nodes.insert(0, helper.make_node("Cast", ["W"], ["V"], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", compute, [2, 5])],
        [helper.make_tensor_value_info("y", compute, [2, 3])],
        [numpy_helper.from_array(weight(5, 3).astype(dtype), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    deployment = compile_model(model, out=tmp_path / "out")

    assert matrices(deployment) == {"W": [1, 3, 5]}
    assert deployment.plan.layers[0].element_type == ("float" if cast else TensorProto.DataType.Name(element).lower())
    assert deployment.plan.layers[0].constant_chain == (["Cast_V"] if cast else [])


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_qlinear_conv(signed: bool, per_channel: bool, compile_text: Compile, weight: Weight) -> None:
    kind = np.int8 if signed else np.uint8
    count = 4 if per_channel else 1
    weights = {
        "W": weight(4, 2, 3, 3, dtype=kind),
        "ws": np.linspace(0.01, 0.04, count, dtype=np.float32),
        "wz": np.zeros(count, kind) if signed else np.full(count, 128, kind),
        "B": np.arange(4, dtype=np.int32) * 900,
    }
    if not per_channel:
        weights["ws"], weights["wz"] = weights["ws"].reshape(()), weights["wz"].reshape(())
    deployment = compile_text(
        f"""{HEADER} g (uint8[N,4,6,6] x) => (uint8[N,4,H,V] y)
        <float xs = {{0.02}}, uint8 xz = {{117}}, float ys = {{0.3}}, uint8 yz = {{90}}> {{
            y = QLinearConv <group=2, pads=[1,1,1,1]> (x, xs, xz, W, ws, wz, ys, yz, B)
        }}""",
        weights,
    )
    assert matrices(deployment) == {"W": [2, 2, 18]}
    assert max(o.max_abs_error for o in deployment.plan.verification.outputs) <= 1  # one step where a half is rounded
    centred = weights["W"].astype(np.float32) - weights["wz"].astype(np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(deployment.weights(deployment.plan.layers[0]), centred.reshape(4, -1), atol=1e-3)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("shape", ["()", "(1)"], ids=["scalar", "vector"])
def test_qlinear_matmul(left: bool, shape: str, compile_text: Compile, weight: Weight) -> None:
    one = "" if shape == "()" else "[1]"
    parameters = ", ".join(
        f"{kind}{one} {name} = {{{value}}}"
        for kind, name, value in (
            ("float", "xs", 0.02),
            ("uint8", "xz", 100),
            ("float", "ws", 0.01),
            ("int8", "wz", 3),
            ("float", "ys", 0.2),
            ("uint8", "yz", 128),
        )
    )
    operands = "W, ws, wz, x, xs, xz" if left else "x, xs, xz, W, ws, wz"
    if left:  # ONNX Runtime wants a signed left operand to meet a signed right one
        parameters = parameters.replace(f"uint8{one} xz = {{100}}", f"int8{one} xz = {{-7}}")
        parameters = parameters.replace(f"uint8{one} yz = {{128}}", f"int8{one} yz = {{5}}")
    kind, size = ("int8", "4,3") if left else ("uint8", "3,4")
    deployment = compile_text(
        f"""{HEADER} g ({kind}[{size}] x) => ({kind}[] y) <{parameters}> {{
            y = QLinearMatMul ({operands}, ys, yz)
        }}""",
        {"W": weight(5, 4, dtype=np.int8) if left else weight(4, 5, dtype=np.int8)},
    )
    assert matrices(deployment) == {"W": [1, 5, 4]}
    assert max(o.max_abs_error for o in deployment.plan.verification.outputs) <= 1


@pytest.mark.parametrize("zero_points", ["", ", xz", ", xz, wz", ", , wz"])
@pytest.mark.parametrize(  # ONNX Runtime's ConvInteger takes weights of type uint8 only
    ("op", "kind"), [("ConvInteger", "uint8"), ("MatMulInteger", "uint8"), ("MatMulInteger", "int8")]
)
def test_integer_products(op: str, zero_points: str, kind: str, compile_text: Compile, weight: Weight) -> None:
    convolution = op == "ConvInteger"
    size = (4, 2, 3, 3) if convolution else (5, 4)
    data = "uint8[2,2,6,6]" if convolution else "uint8[3,5]"
    deployment = compile_text(
        f"""{HEADER} g ({data} x) => (int32[] y) <uint8 xz = {{120}}, {kind} wz = {{7}}> {{
            y = {op} (x, W{zero_points})
        }}""",
        {"W": weight(*size, dtype=kind)},
    )
    assert matrices(deployment) == {"W": [1, 4, int(np.prod(size[1:])) if convolution else 5]}
    assert [o.max_abs_error for o in deployment.plan.verification.outputs] == [0.0]


def test_matmul_integer_constant_left(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"{HEADER} g (uint8[4,3] x) => (int32[] y) <uint8 wz = {{9}}> {{ y = MatMulInteger (W, x, wz) }}",
        {"W": weight(5, 4, dtype=np.uint8)},
    )
    assert matrices(deployment) == {"W": [1, 5, 4]}
    assert [o.max_abs_error for o in deployment.plan.verification.outputs] == [0.0]


def test_quantised_weights_are_held_exactly(
    compile_text: Compile, weight: Weight, discrete_target: Callable[..., Any]
) -> None:
    values = weight(5, 4, dtype=np.int8)
    deployment = compile_text(
        f"{HEADER} g (uint8[3,5] x) => (int32[] y) {{ y = MatMulInteger (x, W) }}",
        {"W": values},
        target=discrete_target(levels=4, slices=4),
    )
    np.testing.assert_array_equal(deployment.weights(deployment.plan.layers[0]), values.T.astype(np.float32))


@pytest.mark.parametrize("axis", [None, 0])
def test_dequantised_weights_map(axis: int | None, compile_text: Compile, weight: Weight) -> None:
    """QDQ: the layer is what DequantizeLinear gives; the quantisers around it stay digital."""
    attribute, count = ("", 1) if axis is None else (f"<axis={axis}>", 3)
    scale = np.linspace(0.01, 0.03, count, dtype=np.float32)
    deployment = compile_text(
        f"""{HEADER} g (float[N,4] x) => (float[N,3] y) <float xs = {{0.02}}, uint8 xz = {{128}}> {{
            q = QuantizeLinear (x, xs, xz)
            d = DequantizeLinear (q, xs, xz)
            w = DequantizeLinear {attribute} (W, ws)
            y = Gemm <transB=1> (d, w)
        }}""",
        {"W": weight(3, 4, dtype=np.int8), "ws": scale.reshape(()) if axis is None else scale},
    )
    assert matrices(deployment) == {"W": [1, 3, 4]}
    assert deployment.plan.layers[0].constant_chain == ["DequantizeLinear_w"]
    assert reasons(deployment)["QuantizeLinear"] == "no-weights"


def test_subgraphs(compile_text: Compile, weight: Weight) -> None:
    """If, Loop and Scan bodies: a weight of their own, one from outside, and one shared by two branches."""
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x, bool c) => (float[2,4] y, float[2,4] z, float[k,4] s) {{
            y = If (c) <
                then_branch = t () => (float[2,4] a) {{ a = MatMul (x, W) }},
                else_branch = e () => (float[2,4] b) <float[4,4] V = {{1,2,3,4, 5,6,7,8, 9,1,2,3, 4,5,6,7}}> {{
                    p = MatMul (x, V)
                    b = MatMul (p, W)
                }}
            >
            n = Constant <value_int=2> ()
            z = Loop (n, , x) <
                body = l (int64 i, bool go, float[2,4] before) => (bool on, float[2,4] after) {{
                    on = Identity (go)
                    after = MatMul (before, U)
                }}
            >
            s = Scan (x) <num_scan_inputs = 1,
                body = r (float[4] row) => (float[4] out) {{ out = MatMul (row, U) }}
            >
        }}""",
        {"W": weight(4, 4), "U": weight(4, 4)},
    )
    assert {name: m[1:] for name, m in matrices(deployment).items()} == {"W": [4, 4], "V": [4, 4], "U": [4, 4]}
    uses = {layer.name: [use.node for use in layer.uses] for layer in deployment.plan.layers}
    assert uses["W"] == ["If_y/then_branch/MatMul_a", "If_y/else_branch/MatMul_b"]
    assert uses["U"] == ["Loop_z/body/MatMul_after", "Scan_s/body/MatMul_out"]


def test_model_local_functions(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2,4] x) => (float[2,3] y) {
            y = local.dense (x, W)
        }
        <domain: "local", opset_import: ["" : 17]>
        dense (a, b) => (c) { h = MatMul (a, b) c = Relu (h) }
        """,
        {"W": weight(4, 3)},
    )
    assert matrices(deployment) == {"W": [1, 3, 4]}
    assert deployment.plan.model.inlined_functions == 1


def test_unknown_domain_around_a_layer_stays(weight: Weight, tmp_path: Path, small_model: onnx.ModelProto) -> None:
    """ONNX Runtime's own operators run digitally, as any operator does that the compiler knows nothing about."""
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = "Gelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    deployment = compile_model(model, out=tmp_path / "out")

    assert len(deployment.plan.layers) == 2
    assert reasons(deployment)["com.microsoft.Gelu"] == "no-weights"


@pytest.mark.parametrize("opset", [7, 9, 13, 17, 21, 24])
def test_operator_sets(
    opset: int,
    model_of: Callable[..., onnx.ModelProto],
    weight: Weight,
    discrete_target: Callable[..., Any],
    tmp_path: Path,
) -> None:
    newest = onnx.defs.onnx_opset_version()
    version = min(opset, newest)
    ir = 3 if version < 9 else 8 if version < 21 else 10
    inputs = "float[2,3,6,6] x, float[4,3,3,3] W, float[64,5] V" if ir == 3 else "float[2,3,6,6] x"
    model = model_of(
        f"""<ir_version: {ir}, opset_import: ["" : {version}]> g ({inputs}) => (float[2,5] y) {{
            a = Conv (x, W) \n b = Relu (a) \n c = Flatten (b) \n y = MatMul (c, V)
        }}""",
        {"W": weight(4, 3, 3, 3), "V": weight(64, 5)},
    )
    deployment = compile_model(model, out=tmp_path / "out")
    assert matrices(deployment) == {"W": [1, 4, 27], "V": [1, 5, 64]}
    assert deployment.plan.model.opset == version
    for target in (discrete_target(slices=2), discrete_target(level_table=(1e-6, 20e-6, 37e-6, 100e-6))):
        compile_model(model, out=tmp_path / "discrete", target=target)  # level codes: casts, and a table to look up
    assert [i.name for i in onnx.load(deployment.model_path, load_external_data=False).graph.input] == ["x"]


def test_old_operator_set_is_converted_up(weight: Weight, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "W"], ["a"]), helper.make_node("Relu", ["a"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6]),
            helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 3, 3, 3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(weight(4, 3, 3, 3), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3)
    deployment = compile_model(model, out=tmp_path / "out")
    assert matrices(deployment) == {"W": [1, 4, 27]}
    assert deployment.plan.model.converted_from_opset == 6


def test_external_data(weight: Weight, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """Weights and digital tensors beside the model; what is digital moves into the deployment with it."""
    model = parse_model(
        f"{HEADER} g (float[2,40] x) => (float[2,30] y) {{ a = Relu (x) \n b = MatMul (a, W) \n y = PRelu (b, S) }}",
        W=weight(40, 30),
        S=weight(30),
    )
    source = tmp_path / "model"
    source.mkdir()
    onnx.save(model, source / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = {path.name: path.read_bytes() for path in source.iterdir()}

    deployment = compile_model(source / "m.onnx", out=tmp_path / "out")

    assert matrices(deployment) == {"W": [1, 30, 40]}
    assert set(deployment.plan.model.external_data) == {"weights.bin"}
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}
    for path in source.iterdir():
        path.unlink()
    onnx.checker.check_model(str(deployment.model_path))


# Body, shape of x, weights, the operator that stays digital and its code.
DIGITAL_CASES: dict[str, tuple[str, dict[str, tuple[int, ...]], str, str]] = {
    "computed": (
        "t = Transpose (x) \n a = Gemm (x, t) \n b = MatMul (a, W)",
        {"W": (4, 3)},
        "Gemm",
        "computed-weights",
    ),
    "constant": (
        "c = MatMul (U, U) \n a = MatMul (x, W) \n b = Add (a, c)",
        {"W": (4, 4), "U": (4, 4)},
        "MatMul",
        "constant",
    ),
    "no weights": ("a = Softmax (x) \n b = MatMul (a, W)", {"W": (4, 3)}, "Softmax", "no-weights"),
    "random": (
        "r = RandomNormal <shape=[4,4]> () \n a = MatMul (x, r) \n d = MatMul(x, W) \n b = Shape(a)",
        {"W": (4, 4)},
        "MatMul",
        "computed-weights",
    ),
}


@pytest.mark.parametrize("case", DIGITAL_CASES)
def test_what_stays_digital_has_a_reason(case: str, compile_text: Compile, weight: Weight) -> None:
    body, shapes, op, code = DIGITAL_CASES[case]
    kind = "int64" if case == "random" else "float"
    extra = ", float[] d" if case == "random" else ""
    deployment = compile_text(
        f"{HEADER} g (float[4,4] x) => ({kind}[] b{extra}) {{ {body} }}", {n: weight(*s) for n, s in shapes.items()}
    )
    assert list(matrices(deployment)) == ["W"]
    assert (op, code) in [(operation.op, operation.code) for operation in deployment.plan.digital]
    mapped = {use.node for layer in deployment.plan.layers for use in layer.uses}
    digital = {operation.node for operation in deployment.plan.digital}
    assert not mapped & digital
    assert len(mapped) + len(digital) == len(body.split("\n"))


def test_empty_weights_stay_digital(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"{HEADER} g (float[2,4] x) => (float[] y, float[] z) {{ y = MatMul (x, W) \n z = MatMul (x, E) }}",
        {"W": weight(4, 3), "E": np.zeros((4, 0), np.float32)},
    )
    assert list(matrices(deployment)) == ["W"]
    assert reasons(deployment) == {"MatMul": "empty"}


def test_all_zero_layer_is_legal(compile_text: Compile) -> None:
    deployment = compile_text(
        f"{HEADER} g (float[2,4] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": np.zeros((4, 3), np.float32)}
    )
    assert deployment.plan.arrays == []
    assert deployment.plan.totals.sparsity == 1.0
    assert deployment.plan.totals.weights_without_cells == 12


def test_nothing_maps_is_an_error(compile_text: Compile) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"nothing maps to a crossbar.*Relu: not an operator whose weights map"
    ):
        compile_text(f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Relu (x) }}")


def test_groups_that_do_not_divide(tmp_path: Path, weight: Weight) -> None:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "W"], ["y"], group=2)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 3, 3])],
        [numpy_helper.from_array(weight(5, 2, 3, 3), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ModelError, match="5 channels of weights do not divide into 2 groups"):
        compile_model(model, out=tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float, compile_text: Compile, weight: Weight) -> None:
    weights = weight(4, 3)
    weights[2, 1] = value
    with pytest.raises(
        ModelError, match="layer 'W' has a weight that is NaN, infinite or beyond float32 in output 1, expected finite"
    ):
        compile_text(f"{HEADER} g (float[2,4] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": weights})


def test_initializers_that_are_inputs_too(compile_text: Compile, weight: Weight) -> None:
    """Some exporters list every initializer as an input. Mapped weights are inputs no more, all others stay so."""
    deployment = compile_text(
        f"{HEADER} g (float[2,4] x, float[4,3] W, float[3] S) => (float[] y) {{ a = MatMul (x, W) y = PRelu (a, S) }}",
        {"W": weight(4, 3), "S": weight(3)},
    )
    assert list(matrices(deployment)) == ["W"]
    model = onnx.load(deployment.model_path, load_external_data=False)
    assert [value.name for value in model.graph.input] == ["x", "S"]
    assert deployment.plan.model.fixed_inputs == ["W"]


def test_values_of_inputs_that_are_in_cells_or_biases(compile_text: Compile, weight: Weight) -> None:
    """Behind a chain, in a fold and in a bias that a fold changed; one that a digital node reads too stays an input."""
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x, float[3,4] W, float[3] B, float[3] M, float[4] S) => (float[] y, float[] z) {{
            t = Transpose (W) \n c = Gemm (x, t, B) \n y = Mul (c, M) \n z = Mul (S, S) }}""",
        {"W": weight(3, 4), "B": weight(3), "M": weight(3), "S": weight(4)},
    )
    assert deployment.plan.model.fixed_inputs == ["W", "B", "M"]
    shared = compile_text(
        f"{HEADER} g (float[2,4] x, float[4,3] W) => (float[] y, float[] z) {{ y = MatMul (x, W) z = Relu (W) }}",
        {"W": weight(4, 3)},
    )
    assert shared.plan.model.fixed_inputs == ["W"]
    model = onnx.load(shared.model_path, load_external_data=False)
    assert [value.name for value in model.graph.input] == ["x", "W"]


def test_inputs_mean_nothing_by_it_in_old_models(compile_text: Compile, weight: Weight) -> None:
    text = '<ir_version: 3, opset_import: ["" : 8]> g (float[2,4] x, float[4,3] W) => (float[] y) { y = MatMul (x, W) }'
    assert compile_text(text, {"W": weight(4, 3)}).plan.model.fixed_inputs == []


def test_every_node_is_somewhere_in_the_plan(compile_text: Compile, weight: Weight) -> None:
    """Casts in front of weights and of what is folded go with them, and are named there."""
    deployment = compile_text(
        f"""{HEADER} g (float[1,3,4,4] x) => (float[] y) {{
            k = Cast <to = 1> (K) \n w = Cast <to = 1> (W) \n c = Conv (x, w) \n m = Mul (c, k) \n y = Relu (m) }}""",
        {"W": weight(4, 3, 3, 3, dtype=np.float16), "K": weight(4, 1, 1, dtype=np.float16)},
    )
    (layer,) = deployment.plan.layers
    named = [use.node for use in layer.uses] + layer.constant_chain + [op.node for op in deployment.plan.digital]
    named += [node for fold in layer.folds for node in (fold.node, *fold.constant_chain)]
    assert sorted(named) == ["Cast_k", "Cast_w", "Conv_c", "Mul_m", "Relu_y"]
    assert [fold.constant_chain for fold in layer.folds] == [["Cast_k"]]


def test_nodes_of_one_name_in_two_branches(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x, bool c) => (float[2,4] y) {{
            [choose] y = If (c) <then_branch = t () => (float[2,4] a) {{ [product] a = MatMul (x, W) }},
                                 else_branch = e () => (float[2,4] b) {{ [product] b = MatMul (x, W) }}>
        }}""",
        {"W": weight(4, 4)},
    )
    uses = [use.node for use in deployment.plan.layers[0].uses]
    assert uses == ["choose/then_branch/product", "choose/else_branch/product"]


@pytest.mark.parametrize("prune", [None, 0.5])
def test_external_data_in_a_subgraph(
    prune: float | None, weight: Weight, model_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """A digital tensor of a branch lies beside the model; the deployment must not look for it there."""
    model = model_of(
        f"""{HEADER} g (float[2,4] x, bool c) => (float[2,4] y) {{
            y = If (c) <then_branch = t () => (float[2,4] a) <float[4] S = {{1, 2, 3, 4}}> {{
                            b = MatMul (x, W) \n a = PRelu (b, S) }},
                        else_branch = e () => (float[2,4] d) {{ d = MatMul (x, W) }}>
        }}""",
        {"W": weight(4, 4)},
    )
    (slope,) = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch").initializer
    slope.CopyFrom(TensorProto(name="S", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"\0" * 16))
    onnx.external_data_helper.set_external_data(slope, "slope.bin", 0, 16)
    slope.ClearField("raw_data")
    (tmp_path / "slope.bin").write_bytes(weight(4).tobytes())
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())

    deployment = compile_model(tmp_path / "m.onnx", out=tmp_path / "out", prune=prune)

    assert list(matrices(deployment)) == ["W"]
    (tmp_path / "slope.bin").unlink()
    verify_deployment(deployment.folder)


def test_a_zero_point_for_every_batch_and_column(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"{HEADER} g (uint8[2,3,4] x) => (int32[] y) {{ y = MatMulInteger (x, W, , z) }}",
        {"W": weight(2, 4, 5, dtype=np.int8), "z": np.arange(-5, 5, dtype=np.int8).reshape(2, 1, 5)},
    )
    assert matrices(deployment) == {"W": [2, 5, 4]}


@pytest.mark.parametrize(
    "name", ["__metadata__", "layers[0].w", "a b/../c", 'é\n"', "W__reference", "B__reference", "W.gain"]
)
def test_any_name_will_do(name: str, weight: Weight, tmp_path: Path) -> None:
    """Names that mean something to the formats we write, and names that another layer's files or tensors would take."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["a"]), helper.make_node("MatMul", ["a", name], ["b"])]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in ("x", "y")]
    weights = [numpy_helper.from_array(weight(4, 4), n) for n in ("W", name)]
    bias = numpy_helper.from_array(weight(2, 4), "B")
    graph = helper.make_graph(
        [*nodes, helper.make_node("Add", ["b", "B"], ["y"])], "g", values[:1], values[1:], [*weights, bias]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    deployment = compile_model(model, out=tmp_path / "out", prune=0.5)
    assert [layer.zeros for layer in deployment.plan.layers] == [8, 8]
    verify_deployment(tmp_path / "out")


def test_inputs_of_a_loop_stay_though_nobody_reads_them(compile_text: Compile, weight: Weight) -> None:
    """The body's counter has the name of a weight in a branch: only that weight makes way."""
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x, bool c) => (float[2,4] y) {{
            a = If (c) <then_branch = t () => (float[2,4] p) <float[4,4] i = {{{", ".join(["1"] * 16)}}}> {{
                p = MatMul (x, i) }}, else_branch = e () => (float[2,4] q) {{ q = Relu (x) }}>
            n = Constant <value_int = 3> ()
            y = Loop (n, , a) <body = b (int64 i, bool k, float[2,4] s) => (bool m, float[2,4] r) {{
                m = Identity (k) r = MatMul (s, W) }}> }}""",
        {"W": weight(4, 4)},
    )
    assert matrices(deployment) == {"i": [1, 4, 4], "W": [1, 4, 4]}


def test_weights_of_four_bits_in_an_external_file(weight: Weight, tmp_path: Path) -> None:
    packed = numpy_helper.from_array((np.arange(16) - 8).reshape(4, 4).astype(ml_dtypes.int4), "W")
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (float[2,4] y) <float S = {0.1}> {
            w = DequantizeLinear (W, S) y = MatMul (x, w) }"""
    )
    model.graph.initializer.append(packed)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    deployment = compile_model(tmp_path / "m.onnx", out=tmp_path / "out")
    assert matrices(deployment) == {"W": [1, 4, 4]}


@pytest.mark.parametrize("prune", [None, 0.25])
def test_branches_with_weights_of_one_name(prune: float | None, compile_text: Compile) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,2] x, bool c) => (float[2,2] y) {{
            y = If (c) <then_branch = t () => (float[2,2] a) <float[2,2] W = {{1,2,3,4}}> {{ a = MatMul (x, W) }},
                        else_branch = e () => (float[2,2] b) <float[2,2] W = {{5,-6,7,8}}> {{ b = MatMul (x, W) }}>
        }}""",
        prune=prune,
    )
    assert {p.name: [use.node for use in p.uses] for p in deployment.plan.layers} == {
        "W": ["If_y/then_branch/MatMul_a"],
        "W#2": ["If_y/else_branch/MatMul_b"],
    }
    assert deployment.weights(deployment.layer("W#2")).max() == 8


@pytest.mark.parametrize("prune", [None, 0.25])
def test_a_constant_chain_across_graphs(prune: float | None, compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x, bool c) => (float[2,2] y) {{
            V = Transpose (W)
            y = If (c) <then_branch = t () => (float[2,2] a) {{ a = MatMul (x, V) }},
                        else_branch = e () => (float[2,2] b) {{ U = Identity (V) b = MatMul (x, U) }}>
        }}""",
        {"W": weight(2, 4)},
        prune=prune,
    )
    assert [p.constant_chain for p in deployment.plan.layers] == [
        ["Transpose_V"],
        ["Transpose_V", "If_y/else_branch/Identity_U"],
    ]


@pytest.mark.parametrize("prune", [None, 0.5])
def test_a_deployed_model_compiles_again(prune: float | None, compile_text: Compile, weight: Weight) -> None:
    """It is an ONNX model like any other: its weights are a constant chain over its own conductances."""
    first = compile_text(f"{HEADER} g (float[2,4] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": weight(4, 3)})
    again = compile_model(first.model_path, out=first.folder.parent / "again", prune=prune)
    (layer,) = again.plan.layers
    assert (layer.outputs, layer.inputs) == (3, 4)
    imported = [o.domain for o in onnx.load(again.model_path, load_external_data=False).opset_import]
    assert sorted(imported) == ["", "ai.rerampile"]
    if prune is None:
        np.testing.assert_allclose(again.weights(layer), first.weights(first.plan.layers[0]), rtol=1e-5)


def test_functions_within_functions_and_of_another_operator_set(
    weight: Weight, model_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    model = model_of(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[2,4] x) => (float[2,4] y) { y = local.two (x, W) }
        <domain: "local", opset_import: ["" : 17, "local" : 1]>
        two (a, b) => (c) { h = local.one (a, b) c = local.one (h, b) }
        <domain: "local", opset_import: ["" : 13]>
        one (a, b) => (c) { c = MatMul (a, b) }""",
        {"W": weight(4, 4)},
    )
    deployment = compile_model(model, out=tmp_path / "out")
    (layer,) = deployment.plan.layers
    assert len(layer.uses) == 2
    assert deployment.plan.model.inlined_functions == 2


def test_weights_that_a_loop_changes_stay_digital(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[2,4] x) => (float[2,4] y) {{
            n = Constant <value_int=2> ()
            z, v = Loop (n, , x, W) <body = l (int64 i, bool go, float[2,4] b, float[4,4] V)
                => (bool on, float[2,4] a, float[4,4] U) {{ on = Identity (go) a = MatMul (b, V) U = Mul (V, V) }}>
            y = MatMul (z, W)
        }}""",
        {"W": weight(4, 4)},
    )
    assert {p.name: [use.node for use in p.uses] for p in deployment.plan.layers} == {"W": ["MatMul_y"]}
    assert ("Loop_z/body/MatMul_a", "computed-weights") in [(o.node, o.code) for o in deployment.plan.digital]


def test_sparse_initializers_stay_digital(
    weight: Weight, model_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    model = model_of(
        f"{HEADER} g (float[2,4] x) => (float[2,3] y) {{ a = MatMul (x, W) y = MatMul (a, S) }}",
        {"W": weight(4, 3), "S": weight(3, 3)},
    )
    del model.graph.initializer[1]
    values = numpy_helper.from_array(np.array([1, 2], np.float32), "S")
    places = numpy_helper.from_array(np.array([1, 5], np.int64), "places")
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=places, dims=[3, 3]))
    deployment = compile_model(model, out=tmp_path / "out")
    assert list(matrices(deployment)) == ["W"]


@pytest.mark.parametrize("outputs", ["float[] y, float[4,3] W", "float[] y, float[2,4] x"])
def test_inputs_and_weights_that_are_outputs(outputs: str, compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(f"{HEADER} g (float[2,4] x) => ({outputs}) {{ y = MatMul (x, W) }}", {"W": weight(4, 3)})
    assert list(matrices(deployment)) == ["W"]


def test_an_empty_batch_is_legal(compile_text: Compile, weight: Weight) -> None:
    """It can be compiled, and the plan says that no output was compared."""
    deployment = compile_text(f"{HEADER} g (float[0,4] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": weight(4, 3)})
    assert list(matrices(deployment)) == ["W"]
    found: Any = deployment.plan.verification
    assert [(o.numbers, o.relative_error) for o in found.outputs] == [(0, 0.0)]


def test_quantisation_annotations_of_what_is_left_are_kept(
    weight: Weight, model_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    model = model_of(f"{HEADER} g (float[2,4] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": weight(4, 3)})
    model.graph.initializer.append(numpy_helper.from_array(weight(1), "s"))
    for name in ("W", "x"):
        note = model.graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    deployed = onnx.load(compile_model(model, out=tmp_path / "out").model_path, load_external_data=False)
    assert [note.tensor_name for note in deployed.graph.quantization_annotation] == ["x"]
    assert "s" in [t.name for t in deployed.graph.initializer]


def test_weights_of_wide_integers_stay_digital(compile_text: Compile, weight: Weight) -> None:
    deployment = compile_text(
        f"{HEADER} g (int32[2,4] k, float[2,4] x) => (int32[] z, float[] y) {{ z = MatMul (k, V) y = MatMul (x, W) }}",
        {"V": np.arange(12, dtype=np.int32).reshape(4, 3), "W": weight(4, 3)},
    )
    assert list(matrices(deployment)) == ["W"]
    assert [(o.code, o.reason) for o in deployment.plan.digital] == [("element-type", "weights of type int32")]


@pytest.mark.parametrize("discrete", [False, True])
def test_a_dynamically_quantised_model(
    discrete: bool, compile_text: Compile, weight: Weight, discrete_target: Callable[..., Any]
) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[N,6] x) => (float[N,5] y) <float ws = {{0.02}}, uint8 wz = {{117}}> {{
            q, xs, xz = DynamicQuantizeLinear (x)
            sum = MatMulInteger (q, W, xz, wz)
            real = Cast <to=1> (sum)
            scale = Mul (xs, ws)
            y = Mul (real, scale)
        }}""",
        {"W": weight(6, 5, dtype=np.uint8)},
        **({"target": discrete_target(levels=16, slices=2)} if discrete else {}),
    )
    assert matrices(deployment) == {"W": [1, 5, 6]}
    assert [o.relative_error for o in deployment.plan.verification.layers] == [0.0]


@pytest.mark.parametrize("discrete", [False, True])
def test_a_statically_quantised_model(
    discrete: bool, compile_text: Compile, weight: Weight, discrete_target: Callable[..., Any]
) -> None:
    """What ONNX Runtime's quantiser writes: quantisers around a Conv whose weights and bias are dequantised."""
    deployment = compile_text(
        f"""{HEADER} g (float[N,3,6,6] x) => (float[N,4,4,4] y)
        <float xs = {{0.02}}, uint8 xz = {{128}}, float ys = {{0.3}}, uint8 yz = {{120}}> {{
            q = QuantizeLinear (x, xs, xz)
            d = DequantizeLinear (q, xs, xz)
            w = DequantizeLinear <axis=0> (W, ws, wz)
            b = DequantizeLinear <axis=0> (B, bs, bz)
            c = Conv (d, w, b)
            r = Relu (c)
            p = QuantizeLinear (r, ys, yz)
            y = DequantizeLinear (p, ys, yz)
        }}""",
        {
            "W": weight(4, 3, 3, 3, dtype=np.int8),
            "ws": np.linspace(0.01, 0.04, 4, dtype=np.float32),
            "wz": np.zeros(4, np.int8),
            "B": np.arange(4, dtype=np.int32) * 500,
            "bs": np.linspace(0.0002, 0.0008, 4, dtype=np.float32),
            "bz": np.zeros(4, np.int32),
        },
        **({"target": discrete_target(levels=16, slices=2)} if discrete else {}),
    )
    assert matrices(deployment) == {"W": [1, 4, 27]}
    assert deployment.plan.layers[0].constant_chain == ["DequantizeLinear_w"]


def test_a_chain_longer_than_calls_may_nest(compile_text: Compile, weight: Weight) -> None:
    steps = " ".join(f"c{n + 1} = Identity (c{n})" for n in range(1500))
    deployment = compile_text(
        f"{HEADER} g (float[2,4] x) => (float[2,3] y) {{ c0 = Neg (W) {steps} y = MatMul (x, c1500) }}",
        {"W": weight(4, 3)},
    )
    (layer,) = deployment.plan.layers
    assert len(layer.constant_chain) == 1501
    assert layer.constant_chain[:2] == ["Neg_c0", "Identity_c1"]
    assert deployment.plan.digital == []
