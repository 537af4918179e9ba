"""A layer: one weight matrix [outputs, inputs] for each group, with the graph nodes that use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from rerampile.graph import GraphNode, ModelGraph, Tensor
from rerampile.matrix_view import MatrixView

__all__ = ["DigitalOperation", "Fold", "Layer"]

Floats = npt.NDArray[np.float32]


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
        return self.view.matrix(self._original_tensor(graph))

    def original_rows(self, graph: ModelGraph) -> Callable[[slice], Floats]:
        """Return a reader of some rows of :meth:`original_matrix`."""
        return self.view.rows(self._original_tensor(graph))

    def _original_tensor(self, graph: ModelGraph) -> Floats:
        weights = graph.read(self.tensor)
        if self.zero_point is not None:
            weights = weights - graph.read(self.zero_point).reshape(self.zero_point_shape)
        return weights

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
