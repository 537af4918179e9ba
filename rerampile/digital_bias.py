"""Biases that the deployed model adds digitally: which of them belong to one call alone, and how they are shifted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from rerampile.deployment import Deployment
from rerampile.errors import PlanFormatError
from rerampile.files import PLAN
from rerampile.onnx_file import iter_graphs

__all__ = ["check_shifts", "own_tensors", "shifted_model"]


def own_tensors(model: onnx.ModelProto) -> set[str]:
    """Return the initializers of the main graph that one input of one node reads, and that the model carries itself."""
    reads = Counter(name for graph in iter_graphs(model.graph) for node in graph.node for name in node.input)
    seen = {value.name for graph in iter_graphs(model.graph) for value in (*graph.input, *graph.output)}
    return {
        tensor.name
        for tensor in model.graph.initializer
        if reads[tensor.name] == 1 and tensor.name not in seen and tensor.data_location != TensorProto.EXTERNAL
    }


def shifted_model(path: Path, shifts: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return a deployed model with other biases.

    Args:
        path: The model.
        shifts: What is added to each element, by initializer.
    """
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in shifts:
            bias = numpy_helper.to_array(tensor)
            moved = bias.astype(np.float64) + shifts[tensor.name].reshape(bias.shape)
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(bias.dtype), tensor.name))
    return bytes(model.SerializeToString(deterministic=True))


def check_shifts(deployment: Deployment, model: onnx.ModelProto) -> None:
    """Check that biases which a chip's plan says to be shifted are biases of its deployed model, of as many outputs.

    Raises:
        PlanFormatError: One is not.
    """
    chip, own = deployment.plan.chip, own_tensors(model)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    if chip is not None and len(chip.layers) != len(deployment.plan.layers):
        raise PlanFormatError(
            f"{deployment.folder / PLAN}: $.chip.layers: {len(chip.layers)}, expected one for each of the "
            f"{len(deployment.plan.layers)} layers; the plan was changed"
        )
    for number, found in enumerate([] if chip is None else chip.layers):
        layer = deployment.plan.layers[number]
        where = f"{deployment.folder / PLAN}: $.chip.layers[{number}]"
        expected = 0 if found.bias is None else layer.groups * layer.outputs
        if len(found.shift) != expected:
            raise PlanFormatError(
                f"{where}.shift: {len(found.shift)} numbers, expected {expected}; the plan was changed"
            )
        if found.bias is not None and (found.bias not in own or sizes[found.bias] != expected):
            raise PlanFormatError(
                f"{where}.bias: '{found.bias}', expected an initializer of {deployment.model_path.name} with "
                f"{expected} numbers that one node reads; the plan was changed"
            )
