"""Every operator that can be trained through gives what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rerampile.errors import ModelError
from rerampile.onnx_file import ModelFile, load_model_file
from rerampile.runtime.session import open_session, run

torch = pytest.importorskip("torch", reason="the extra rerampile[train] is not installed")
from rerampile.training.operators import OPERATORS  # noqa: E402
from rerampile.training.torch_graph import TorchGraph  # noqa: E402

INT, FLOAT = np.int64, np.float32


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, INT)


IMAGE = normal(2, 4, 7, 6)
CASES: list[tuple[str, Sequence[np.ndarray | None], dict[str, Any]]] = [
    ("Add", (IMAGE, normal(4, 1, 1)), {}),
    ("AveragePool", (IMAGE,), {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("AveragePool", (IMAGE,), {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "count_include_pad": 1}),
    ("BatchNormalization", (IMAGE, normal(4), normal(4), normal(4), np.abs(normal(4)) + 0.1), {"epsilon": 1e-3}),
    ("Cast", (IMAGE,), {"to": TensorProto.INT32}),
    ("Clip", (IMAGE, np.array(-0.5, FLOAT), None), {}),
    ("Clip", (IMAGE, np.array(-0.5, FLOAT), np.array(0.5, FLOAT)), {}),
    ("Concat", (IMAGE, normal(2, 3, 7, 6)), {"axis": 1}),
    ("Constant", (), {"value": numpy_helper.from_array(normal(3))}),
    ("Constant", (), {"value_floats": [1.0, 2.5]}),
    ("Constant", (), {"value_int": 3}),
    ("ConstantOfShape", (ints(2, 3),), {"value": numpy_helper.from_array(np.array([2.5], FLOAT))}),
    ("Conv", (IMAGE, normal(6, 2, 3, 3), normal(6)), {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}),
    ("Conv", (IMAGE, normal(5, 4, 2, 2), None), {"dilations": [2, 1], "auto_pad": "VALID"}),
    ("Conv", (normal(2, 3, 9), normal(4, 3, 3)), {"pads": [1, 1]}),
    ("Div", (IMAGE, normal(6) + 5), {}),
    ("Div", (ints(7, -7, 9), ints(2, 2, 4)), {}),
    ("Dropout", (IMAGE,), {}),
    ("Flatten", (IMAGE,), {"axis": -2}),
    ("Gather", (IMAGE, ints(2, 0, -1)), {"axis": 1}),
    ("Gather", (ints(5, 6, 7), np.array(1, INT)), {}),
    ("Gemm", (normal(3, 5), normal(4, 5), normal(4)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", (normal(5, 3), normal(5, 4)), {"transA": 1}),
    ("GlobalAveragePool", (IMAGE,), {}),
    ("GlobalMaxPool", (IMAGE,), {}),
    ("HardSigmoid", (IMAGE,), {"alpha": 0.3, "beta": 0.4}),
    ("HardSwish", (4 * IMAGE,), {}),
    ("Identity", (IMAGE,), {}),
    ("LeakyRelu", (IMAGE,), {"alpha": 0.2}),
    ("LogSoftmax", (IMAGE,), {"axis": 1}),
    ("MatMul", (normal(2, 3, 4), normal(4, 5)), {}),
    ("MaxPool", (IMAGE,), {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ("MaxPool", (IMAGE,), {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("Mul", (IMAGE, normal(1)), {}),
    ("Pad", (IMAGE, ints(0, 1, 0, 0, 0, 0, 2, 1), np.array(1.5, FLOAT)), {}),
    ("ReduceMean", (IMAGE,), {"axes": [2, 3], "keepdims": 0}),
    ("ReduceMean", (IMAGE,), {}),
    ("Relu", (IMAGE,), {}),
    ("Reshape", (IMAGE, ints(0, -1, 3)), {}),
    (
        *("Resize", (IMAGE, None, np.array([1, 1, 2, 3], FLOAT))),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    ("Resize", (IMAGE, None, None, ints(2, 8, 7, 18)), {}),
    ("Resize", (IMAGE, None, np.array([1, 1, 4, 5], FLOAT)), {"nearest_mode": "round_prefer_ceil"}),
    ("Shape", (IMAGE,), {}),
    ("Sigmoid", (IMAGE,), {}),
    ("Slice", (IMAGE, ints(5, 1), ints(-100, 3), ints(2, 1), ints(-2, 1)), {}),
    ("Softmax", (IMAGE,), {"axis": -1}),
    ("Squeeze", (normal(2, 1, 3, 1), ints(1)), {}),
    ("Squeeze", (normal(2, 1, 3, 1),), {}),
    ("Sub", (IMAGE, normal(6)), {}),
    ("Tanh", (IMAGE,), {}),
    ("Transpose", (IMAGE,), {"perm": [0, 2, 3, 1]}),
    ("Transpose", (IMAGE,), {}),
    ("Unsqueeze", (IMAGE, ints(0, -1)), {}),
]


def file_of(model: onnx.ModelProto) -> ModelFile:
    """Skip the checks of files: the shape of an output isn't known here."""
    return ModelFile(proto=model, name="g", folder=None, size=0)


def model_of(op: str, inputs: Sequence[np.ndarray | None], attributes: dict[str, Any], opset: int = 17) -> Any:
    names = ["" if array is None else f"x{n}" for n, array in enumerate(inputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], name="node", **attributes)],
        "g",
        [helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(array, name) for array, name in zip(inputs, names, strict=True) if array is not None],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{op}-{n}" for n, (op, *_) in enumerate(CASES)])
def test_operator(case: int) -> None:
    model = model_of(*CASES[case])
    expected = run(open_session(model.SerializeToString()), {"unused": np.zeros(1, np.float32)})[0]
    found = TorchGraph(file_of(model)).run({}, {}).numpy()
    assert found.dtype == np.asarray(expected).dtype
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    assert {op for op, *_ in CASES} == set(OPERATORS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset", "message"),
    [
        ("Relx", (IMAGE,), {}, 17, r"node 'node': operator Relx cannot be trained through \(did you mean Relu\?\)"),
        (
            "Softmax",
            (IMAGE,),
            {},
            11,
            "node 'node': Softmax of opset 11 .*, expected 13 or later; export the model again",
        ),
        (
            *("Conv", (IMAGE, normal(5, 4, 2, 2)), {"auto_pad": "SAME_UPPER"}, 17),
            "node 'node': Conv with auto_pad SAME_UPPER",
        ),
        ("Pad", (IMAGE, ints(0, 0, 1, 1, 0, 0, 1, 1)), {"mode": "reflect"}, 17, "node 'node': Pad with mode reflect"),
        ("AveragePool", (IMAGE,), {"kernel_shape": [3, 3], "ceil_mode": 1}, 17, "AveragePool with ceil_mode"),
        (
            *("BatchNormalization", (IMAGE, *[normal(4)] * 4), {"training_mode": 1}, 17),
            "BatchNormalization with training_mode; export the model for inference",
        ),
        (
            *("Resize", (IMAGE, None, np.array([1, 1, 2, 2], FLOAT)), {"mode": "linear"}, 17),
            "node 'node': Resize with mode linear",
        ),
        (
            *("Resize", (IMAGE, None, np.array([1, 1, 1.5, 2], FLOAT)), {}, 17),
            r"Resize with factors \[1.0, 1.0, 1.5, 2.0\], not whole ones of every axis",
        ),
        (
            *("Resize", (IMAGE, None, np.array([1, 1, 2, 2], FLOAT)), {"nearest_mode": "floor"}, 17),
            "Resize with coordinate_transformation_mode half_pixel and nearest_mode floor",
        ),
        (
            *("Resize", (IMAGE, None, None, ints(14, 12)), {"axes": [2, 3]}, 18),
            "Resize with sizes of some axes or of kept aspect",
        ),
        ("MatMul", (normal(2, 3), normal(4, 5)), {}, 17, "node 'node': MatMul cannot be run: "),
    ],
)
def test_what_cannot_be_trained_through(
    op: str, inputs: Any, attributes: dict[str, Any], opset: int, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        TorchGraph(file_of(model_of(op, inputs, attributes, opset))).run({}, {})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet20_cifar10_optionA", (3, 3, 32, 32)),
        ("resnet20_cifar10_optionB", (3, 3, 32, 32)),
        ("mobilenetv2_imagenet", (2, 3, 224, 224)),
    ],
)
def test_real_models(data_root: Path, name: str, shape: tuple[int, ...]) -> None:
    path = data_root / "models" / f"{name}.onnx"
    function, images = TorchGraph(load_model_file(path)), normal(*shape)
    expected = run(open_session(path), {function.inputs[0]: images})[0]
    with torch.no_grad():
        found = function.run({function.inputs[0]: torch.from_numpy(images)}, {}).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
