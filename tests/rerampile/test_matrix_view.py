"""Weight tensors as matrices: the inverse holds for every kind, and the matrices compute what the operators mean."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rerampile.matrix_view import MatrixView
from rerampile.runtime.session import open_session

Array = npt.NDArray[Any]


@st.composite
def views(draw: st.DrawFn) -> MatrixView:
    side = st.integers(1, 4)
    kind = draw(st.sampled_from(["conv", "transposed", "product", "product, outputs first"]))
    if kind.startswith("product"):
        shape = draw(st.lists(side, min_size=1, max_size=5))
        return MatrixView.of_product(shape, outputs_first=kind.endswith("first"))
    groups, kernel = draw(side), draw(st.lists(side, min_size=1, max_size=3))
    if kind == "conv":
        return MatrixView.of_convolution([groups * draw(side), draw(side), *kernel], groups)
    return MatrixView.of_transposed_convolution([groups * draw(side), draw(side), *kernel], groups)


@given(views())
def test_matrix_and_tensor_are_inverse(view: MatrixView) -> None:
    tensor = np.arange(math.prod(view.tensor_shape), dtype=np.float32).reshape(view.tensor_shape)
    matrix = view.matrix(tensor)
    assert matrix.shape == view.shape
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(view.tensor(matrix), tensor)
    assert sorted(matrix.ravel()) == sorted(tensor.ravel())
    assert view.channels * view.outputs_per_channel == view.shape[0]


@given(views(), st.integers(0, 3), st.integers(0, 8), st.integers(1, 8))
def test_some_rows_are_those_of_the_matrix(view: MatrixView, shift: int, first: int, count: int) -> None:
    """Wherever the tensor lies, aligned or not, rows come out contiguous and aligned."""
    tensor = np.arange(math.prod(view.tensor_shape), dtype=np.float32).reshape(view.tensor_shape)
    moved = np.frombuffer(bytes(shift) + tensor.tobytes(), np.uint8)[shift:].view(np.float32).reshape(tensor.shape)
    rows = slice(first, first + count)
    found = view.rows(moved)(rows)
    np.testing.assert_array_equal(found, view.matrix(tensor)[rows])
    assert found.flags.c_contiguous
    assert found.flags.aligned


@given(views())
def test_the_stored_form_describes_the_tensor(view: MatrixView) -> None:
    """What the plan says, and the deployed model computes: reshape, transpose, reshape."""
    matrix = np.arange(math.prod(view.shape)).reshape(view.shape)
    stored = matrix.reshape(view.stored_shape)
    if view.permutation is not None:
        stored = stored.transpose(view.permutation)
    np.testing.assert_array_equal(stored.reshape(view.tensor_shape), view.tensor(matrix))


def evaluate(op: str, x: Array, weight: Array, **attributes: Any) -> Array:
    """The operator itself, by ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return np.asarray(open_session(model.SerializeToString()).run(None, {"x": x})[0])


def whole(*shape: int) -> Array:
    """Small whole numbers, so that sums are exact in any order."""
    return np.random.default_rng(math.prod(shape)).integers(-4, 5, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "image", "groups", "stride", "dilation"),
    [
        ((4, 3, 5), (9,), 1, (2,), (1,)),
        ((4, 3, 3, 2), (7, 6), 1, (1, 2), (2, 1)),
        ((6, 2, 2, 3), (5, 6), 2, (1, 1), (1, 2)),
        ((8, 1, 3, 3), (5, 5), 4, (1, 1), (1, 1)),
        ((2, 3, 2, 1, 2), (4, 3, 4), 1, (1, 1, 1), (1, 2, 1)),
    ],
)
def test_convolution_is_matrix_times_patches(
    shape: tuple[int, ...],
    image: tuple[int, ...],
    groups: int,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> None:
    """Each group's matrix times each window of its channels, flattened in the order cin, kernel."""
    weight, x = whole(*shape), whole(1, shape[1] * groups, *image)
    view = MatrixView.of_convolution(shape, groups)
    matrices = view.matrix(weight).reshape(groups, view.outputs, view.inputs)
    kernel = shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(image, kernel, stride, dilation, strict=True)]
    y = np.zeros((shape[0], *size), np.float32)
    for group, place in itertools.product(range(groups), itertools.product(*map(range, size))):
        window = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d) for p, k, s, d in zip(place, kernel, stride, dilation, strict=True)
        )
        patch = x[0, group * shape[1] : (group + 1) * shape[1]][(slice(None), *window)]
        y[(slice(group * view.outputs, (group + 1) * view.outputs), *place)] = matrices[group] @ patch.ravel()
    np.testing.assert_array_equal(y, evaluate("Conv", x, weight, group=groups, strides=stride, dilations=dilation)[0])


@pytest.mark.parametrize(("groups", "stride"), [(1, (1, 1)), (1, (2, 3)), (2, (2, 1))])
def test_transposed_convolution_adds_up_matrix_products(groups: int, stride: tuple[int, int]) -> None:
    """One input pixel drives the outputs [cout, kernel] of its group; where windows overlap they are added."""
    weight, x = whole(4, 3, 3, 2), whole(1, 4, 3, 4)
    view = MatrixView.of_transposed_convolution(weight.shape, groups)
    matrices = view.matrix(weight).reshape(groups, view.outputs, view.inputs)
    y = np.zeros((3 * groups, 2 * stride[0] + 3, 3 * stride[1] + 2), np.float32)
    for group, row, column in itertools.product(range(groups), range(3), range(4)):
        pixel = x[0, group * view.inputs : (group + 1) * view.inputs, row, column]
        window = y[group * 3 : group * 3 + 3, row * stride[0] :, column * stride[1] :]
        window[:, :3, :2] += (matrices[group] @ pixel).reshape(3, 3, 2)
    np.testing.assert_array_equal(y, evaluate("ConvTranspose", x, weight, group=groups, strides=stride)[0])


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_operands(transposed: bool) -> None:
    weight, x = whole(5, 3), whole(2, 5)
    right = MatrixView.of_product(weight.T.shape if transposed else weight.shape, outputs_first=transposed)
    np.testing.assert_array_equal(right.matrix(weight.T if transposed else weight) @ x[0], (x @ weight)[0])
    left = MatrixView.of_product(weight.shape if transposed else weight.T.shape, outputs_first=not transposed)
    np.testing.assert_array_equal(left.matrix(weight if transposed else weight.T) @ x.T, weight.T @ x.T)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 3, 5, 4), (5,)])
def test_batched_products(shape: tuple[int, ...]) -> None:
    """Every batch is a group, in the order of the tensor."""
    weight = whole(*shape)
    view = MatrixView.of_product(shape, outputs_first=False)
    x = whole(*shape[:-2], 2, 5)
    matrices = view.matrix(weight).reshape(*shape[:-2], view.outputs, view.inputs)
    products = x @ np.swapaxes(matrices, -1, -2)
    np.testing.assert_array_equal(products.reshape((x @ weight).shape), x @ weight)
    assert view.groups == math.prod(shape[:-2])


def test_orders_name_the_axes() -> None:
    assert MatrixView.of_convolution((4, 3, 2), 1).input_order == "cin,kw"
    assert MatrixView.of_convolution((4, 3, 2, 2, 2), 1).input_order == "cin,kd,kh,kw"
    assert MatrixView.of_transposed_convolution((4, 3, 2, 2), 1).output_order == "cout,kh,kw"
