"""A weight tensor read as matrices [outputs, inputs], one for each group, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MatrixView"]


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
        return np.ascontiguousarray(self._stored(tensor)).reshape(self.shape)

    def rows(self, tensor: npt.NDArray[Any]) -> Callable[[slice], npt.NDArray[Any]]:
        """Return a reader of some rows of :meth:`matrix`, contiguous and aligned; a plain transpose is never whole."""
        axes = self._stored(tensor)
        if self.permutation is None or axes.ndim > 2:
            matrix = np.ascontiguousarray(axes).reshape(self.shape)
            return lambda rows: np.require(matrix[rows], requirements=["C", "A"])
        # Columns of a large tensor lie so that few of them fit a cache at once: they are brought together first.
        return lambda rows: np.require(np.ascontiguousarray(axes[rows].T).T, requirements=["C", "A"])

    def _stored(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        axes = tensor.reshape(self.permuted_shape)
        return axes if self.permutation is None else axes.transpose(np.argsort(self.permutation))

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
