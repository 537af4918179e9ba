"""An ONNX model that grows node by node: what the reference models share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from rerampile.errors import ModelError

OPSET, IR_VERSION = 17, 8
BATCH = "N"


class ModelGraph:
    """One graph under construction. Every node has one output, and the output has the node's name.

    Args:
        name: Name of the graph.
        input_name: Name of its only input.
        shape: Shape of one input image, without the batch dimension, which is dynamic.
        half: Store float32 arrays of two or more dimensions as float16, each behind a Cast to float32: half the file,
            the same operators. The float16 initializer is called ``NAME_fp16``, the cast tensor ``NAME``.
        dtype: Type of the input.
    """

    def __init__(
        self, name: str, input_name: str, shape: Sequence[int], *, half: bool = False, dtype: npt.DTypeLike = np.float32
    ) -> None:
        self.input = gs.Variable(input_name, np.dtype(dtype), [BATCH, *shape])
        self._graph = gs.Graph(inputs=[self.input], name=name, opset=OPSET, ir_version=IR_VERSION)
        self._half = half

    def constant(self, name: str, values: np.ndarray) -> gs.Tensor:
        """Return an initializer; a float32 matrix or kernel becomes float16 and Cast where the graph is ``half``."""
        if not self._half or values.ndim < 2 or values.dtype != np.float32:
            return gs.Constant(name, values)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ModelError(
                f"tensor '{name}': greatest magnitude {np.abs(values).max():g}, expected at most 65504 for float16; "
                f"store it as float32"
            )
        return self.node("Cast", name, gs.Constant(f"{name}_fp16", halves), to=onnx.TensorProto.FLOAT)

    def node(self, op: str, name: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        """Add a node and return its output."""
        output = gs.Variable(name, np.float32)
        self._graph.layer(op=op, name=name, inputs=list(inputs), outputs=[output], attrs=attributes)
        return output

    def export(
        self, outputs: Mapping[str, tuple[gs.Variable, Sequence[int]]], metadata: Mapping[str, Any]
    ) -> onnx.ModelProto:
        """Return the checked model.

        Args:
            outputs: Tensor and shape of one image's result, keyed by the name that the output is to have.
            metadata: Metadata properties of the model; values that are not text are written as JSON.
        """
        for name, (tensor, shape) in outputs.items():
            tensor.name, tensor.shape = name, [BATCH, *shape]
            self._graph.outputs.append(tensor)
        model: onnx.ModelProto = gs.export_onnx(self._graph)
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        onnx.helper.set_model_props(model, text)
        model.producer_name = "rerampile"
        onnx.checker.check_model(model)
        return model


def write(path: Path, model: onnx.ModelProto) -> None:
    """Write a model to a sibling of ``path`` and rename it, so that no reader ever sees half a file."""
    part = path.with_name(path.name + ".part")
    try:
        onnx.save(model, part, format="protobuf")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
