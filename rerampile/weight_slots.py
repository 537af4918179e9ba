"""Which inputs of which operators hold weights that a crossbar can take, and which input the weights multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rerampile.graph import GraphNode
from rerampile.matrix_view import MatrixView

__all__ = ["RECURRENT", "SLOTS", "WeightSlot", "slot_of"]

RECURRENT = ("LSTM", "GRU", "RNN")
"""Operators whose groups are directions, which run one after another."""


def _convolution(node: GraphNode, shape: Sequence[int]) -> MatrixView:
    return MatrixView.of_convolution(shape, node.attribute("group", 1))


def _transposed_convolution(node: GraphNode, shape: Sequence[int]) -> MatrixView:
    return MatrixView.of_transposed_convolution(shape, node.attribute("group", 1))


def _right(node: GraphNode, shape: Sequence[int]) -> MatrixView:
    return MatrixView.of_product(shape, outputs_first=bool(node.attribute("transB", 0)))


def _left(node: GraphNode, shape: Sequence[int]) -> MatrixView:
    return MatrixView.of_product(shape, outputs_first=not node.attribute("transA", 0))


def _recurrent(node: GraphNode, shape: Sequence[int]) -> MatrixView:
    return MatrixView.of_product(shape, outputs_first=True)


@dataclass(frozen=True)
class WeightSlot:
    """An input of an operator that can hold weights.

    Attributes:
        weight: Input slot of the weights.
        data: Input slot of what the weights multiply.
        view: How the weights are read as matrices.
        rank: Smallest and largest rank of the weights.
        zero_point: Input slot of the weights' zero point, for whole-numbered weights.
        zero_point_axis: Axis of the weights that a zero point of several numbers runs along.
        data_zero_point: Input slot of the data's zero point, for whole-numbered weights.
    """

    weight: int
    data: int
    view: Callable[[GraphNode, Sequence[int]], MatrixView]
    rank: tuple[int, int]
    zero_point: int | None = None
    zero_point_axis: int = 0
    data_zero_point: int | None = None


_CONV_RANK, _GEMM_RANK, _MATMUL_RANK, _RNN_RANK = (3, 5), (2, 2), (1, 16), (3, 3)

SLOTS: dict[str, tuple[WeightSlot, ...]] = {
    "Conv": (WeightSlot(1, 0, _convolution, _CONV_RANK),),
    "ConvTranspose": (WeightSlot(1, 0, _transposed_convolution, _CONV_RANK),),
    "Gemm": (WeightSlot(1, 0, _right, _GEMM_RANK), WeightSlot(0, 1, _left, _GEMM_RANK)),
    "MatMul": (WeightSlot(1, 0, _right, _MATMUL_RANK), WeightSlot(0, 1, _left, _MATMUL_RANK)),
    "ConvInteger": (WeightSlot(1, 0, _convolution, _CONV_RANK, 3, 0, 2),),
    "MatMulInteger": (
        WeightSlot(1, 0, _right, _MATMUL_RANK, 3, -1, 2),
        WeightSlot(0, 1, _left, _MATMUL_RANK, 2, -2, 3),
    ),
    "QLinearConv": (WeightSlot(3, 0, _convolution, _CONV_RANK, 5, 0, 2),),
    "QLinearMatMul": (
        WeightSlot(3, 0, _right, _MATMUL_RANK, 5, -1, 2),
        WeightSlot(0, 3, _left, _MATMUL_RANK, 2, -2, 5),
    ),
    **dict.fromkeys(RECURRENT, (WeightSlot(1, 0, _recurrent, _RNN_RANK), WeightSlot(2, 0, _recurrent, _RNN_RANK))),
}
"""By standard operator; for the second slot of a recurrent one, the data are its own states."""


def slot_of(node: GraphNode, weight: int) -> WeightSlot:
    """Return what is known of the input slot ``weight`` of a layer's node."""
    return next(slot for slot in SLOTS[node.proto.op_type] if slot.weight == weight)
