"""What comes out of a layer, one row for each output channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["by_group_and_output"]


def by_group_and_output(
    result: npt.NDArray[Any], op: str, outputs_first: bool, weight_shape: Sequence[int], groups: int
) -> npt.NDArray[Any]:
    """Return the result of an operator as [groups, output channels, images and positions].

    Args:
        result: The result.
        op: The operator.
        outputs_first: Whether the weights are the left operand of a product.
        weight_shape: Shape of the weights; of more than one axis, or the operator drops that of the outputs.
        groups: Groups of the layer.
    """
    if op.endswith(("Conv", "ConvInteger", "ConvTranspose")):
        axes = [1]
    else:
        batch = weight_shape[:-2]
        of_vector = result.ndim < max(2, len(weight_shape))  # MatMul drops the axis of a vector
        last = result.ndim - (1 if of_vector else 2)
        axes = [last - len(batch) + i for i, size in enumerate(batch) if size > 1]
        axes.append(result.ndim - (2 if outputs_first and not of_vector else 1))
    moved = np.moveaxis(result, axes, range(len(axes)))
    return moved.reshape(groups, math.prod(moved.shape[: len(axes)]) // groups, -1)
