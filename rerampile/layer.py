"""A layer: one weight matrix [outputs, inputs] for each group, with the graph nodes that use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rerampile.graph import GraphNode, ModelGraph, Tensor

__all__ = ["DigitalOperation", "Fold", "Layer", "MatrixView"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """How a weight tensor is read as matrices, and matrices as the tensor.

    The matrix rows of all groups, in group order, are split into ``stored_shape``; transposed by ``permutation`` and
    reshaped they are the tensor.

    Attributes:
        groups: Separate matrices: convolution groups, batch of a MatMul, directions of a recurrent layer.
        outputs: Rows of one group's matrix (columns of the crossbar).
        inputs: Columns of one group's matrix (rows of the crossbar).
        tensor_shape: Shape of the weight tensor as its node reads it.
        stored_shape: The matrices as axes.
        permutation: Axes of ``stored_shape`` in the order of the tensor, or None for the same order.
        outputs_per_channel: Matrix outputs that belong to one output channel (kernel positions of a ConvTranspose).
        input_order: What the inputs of a group run over, outermost first.
        output_order: What the outputs of a group run over, outermost first.
    """

    groups: int
    outputs: int
    inputs: int
    tensor_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    outputs_per_channel: int = 1
    input_order: str = "input"
    output_order: str = "output"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of all groups' matrices stacked: [groups * outputs, inputs]."""
        return self.groups * self.outputs, self.inputs

    @property
    def channels(self) -> int:
        """Output channels of all groups."""
        return self.groups * self.outputs // self.outputs_per_channel

    @property
    def permuted_shape(self) -> tuple[int, ...]:
        """Stored axes in tensor order."""
        return self.stored_shape if self.permutation is None else tuple(self.stored_shape[i] for i in self.permutation)

    def matrix(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a weight tensor (or a mask of its shape) as [groups * outputs, inputs], contiguous."""
        axes = tensor.reshape(self.permuted_shape)
        if self.permutation is not None:
            axes = axes.transpose(np.argsort(self.permutation))
        return np.ascontiguousarray(axes).reshape(self.shape)

    def tensor(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return [groups * outputs, inputs] as the weight tensor; the inverse of :meth:`matrix`."""
        axes = matrix.reshape(self.stored_shape)
        if self.permutation is not None:
            axes = axes.transpose(self.permutation)
        return np.ascontiguousarray(axes).reshape(self.tensor_shape)

    @classmethod
    def of_convolution(cls, shape: Sequence[int], groups: int) -> MatrixView:
        """View of a Conv weight [cout, cin / groups, *kernel]: inputs in the order cin, kernel."""
        return cls(
            groups=groups,
            outputs=shape[0] // groups,
            inputs=math.prod(shape[1:]),
            tensor_shape=tuple(shape),
            stored_shape=tuple(shape),
            input_order="cin," + _kernel_order(len(shape) - 2),
            output_order="cout",
        )

    @classmethod
    def of_transposed_convolution(cls, shape: Sequence[int], groups: int) -> MatrixView:
        """View of a ConvTranspose weight [cin, cout / groups, *kernel].

        One input pixel drives all kernel positions at once, and overlapping outputs are added digitally: inputs are
        the channels, outputs run over cout and kernel.
        """
        kernel = tuple(shape[2:])
        rank = len(kernel)
        return cls(
            groups=groups,
            outputs=math.prod(shape[1:]),
            inputs=shape[0] // groups,
            tensor_shape=tuple(shape),
            stored_shape=(groups, shape[1], *kernel, shape[0] // groups),
            permutation=(0, rank + 2, *range(1, rank + 2)),
            outputs_per_channel=math.prod(kernel),
            input_order="cin",
            output_order="cout," + _kernel_order(rank),
        )

    @classmethod
    def of_product(cls, shape: Sequence[int], outputs_first: bool) -> MatrixView:
        """View of a MatMul or Gemm operand [*batch, outputs, inputs] or [*batch, inputs, outputs]."""
        batch, (first, second) = tuple(shape[:-2]), (shape[-2:] if len(shape) > 1 else (1, *shape))
        outputs, inputs = (first, second) if outputs_first or len(shape) == 1 else (second, first)
        rank = len(batch)
        return cls(
            groups=math.prod(batch),
            outputs=outputs,
            inputs=inputs,
            tensor_shape=tuple(shape),
            stored_shape=(*batch, outputs, inputs),
            permutation=None if outputs_first or len(shape) == 1 else (*range(rank), rank + 1, rank),
        )


def _kernel_order(rank: int) -> str:
    return ",".join({1: ("kw",), 2: ("kh", "kw"), 3: ("kd", "kh", "kw")}.get(rank, tuple(f"k{i}" for i in range(rank))))


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A digital operation that was folded into a layer.

    Attributes:
        node: Full name of the folded node.
        op: Its operator.
        side: ``after`` (on the layer's outputs) or ``before`` (on its inputs).
    """

    node: GraphNode
    op: str
    side: Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class DigitalOperation:
    """A node that stays digital, with the reason."""

    node: GraphNode
    code: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One weight tensor, read as matrices, with its uses.

    Attributes:
        name: Unique name: of the weight's initializer, or of the first node that uses it.
        view: How the tensor is read as matrices.
        tensor: The tensor (graphsurgeon) that the nodes read; constant.
        element_type: ONNX element type of that tensor.
        uses: Each node that reads it, with the input slot.
        integer: Whether nodes read whole-numbered weights (the ConvInteger and QLinear families).
        zero_point: Constant that is subtracted from whole-numbered weights, or None.
        zero_point_shape: Shape in which the zero point meets the weight tensor.
        folds: Operations folded into this layer, in the order in which they act.
        output_factor: What folds multiply each output by, float64 [groups * outputs], or None.
        input_factor: What folds multiply each input by, float64 [groups, inputs], or None.
        input_addend: What folds add to each input, in units of what precedes them and times the alpha of a Gemm,
            float64 [groups, inputs], or None.
        bias: Bias after folding but for what ``input_addend`` adds, float64 [channels]; None where no fold set it.
    """

    name: str
    view: MatrixView
    tensor: Tensor = field(repr=False)
    element_type: int
    uses: tuple[tuple[GraphNode, int], ...]
    integer: bool = False
    zero_point: Tensor | None = field(default=None, repr=False)
    zero_point_shape: tuple[int, ...] = ()
    folds: tuple[Fold, ...] = ()
    output_factor: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    input_factor: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    input_addend: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    bias: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    @property
    def block(self) -> str:
        """The block that the layer belongs to, named by its number of output channels."""
        return str(self.view.channels)

    def original_matrix(self, graph: ModelGraph) -> Floats:
        """Return the weights as the model's file holds them, float32 [groups * outputs, inputs]."""
        weights = graph.read(self.tensor)
        if self.zero_point is not None:
            weights = weights - graph.read(self.zero_point).reshape(self.zero_point_shape)
        return self.view.matrix(weights)

    def matrix(self, graph: ModelGraph) -> Floats:
        """Return the weights that the crossbar is to hold, folds included, float32 [groups * outputs, inputs]."""
        matrix = self.original_matrix(graph)
        factor = self.fold_factor()
        return matrix if factor is None else np.multiply(matrix, factor, dtype=np.float32)

    def fold_factor(self) -> Floats | None:
        """Return what folds multiply the weights by, broadcastable to the matrix, or None where it is one."""
        if self.output_factor is None and self.input_factor is None:
            return None
        factor = np.ones((1, 1)) if self.output_factor is None else self.output_factor[:, None]
        if self.input_factor is not None:
            factor = factor * np.repeat(self.input_factor, self.view.outputs, axis=0)
        return factor.astype(np.float32)

    def bias_with(self, weights: Floats) -> npt.NDArray[np.float64] | None:
        """Return the folded bias, float64 [channels], for the weights that the cells hold; None where no fold set it.

        Args:
            weights: float32 [groups * outputs, inputs], as decoded from the cells.
        """
        if self.bias is None or self.input_addend is None:
            return self.bias
        grouped = weights.astype(np.float64).reshape(self.view.groups, self.view.outputs, self.view.inputs)
        return self.bias + (grouped @ self.input_addend[:, :, None]).reshape(-1)
