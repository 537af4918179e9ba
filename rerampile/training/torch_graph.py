"""An ONNX model as a function of PyTorch, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import helper

from rerampile.errors import ModelError, did_you_mean
from rerampile.graph import named_nodes, operator_of
from rerampile.onnx_file import ModelFile
from rerampile.training.operators import OPERATORS, Unsupported

__all__ = ["TorchGraph"]

_SOFTMAX_OVER_ONE_AXIS = 13  # before, Softmax flattened its input


class TorchGraph:
    """Runs a model's nodes in the order of the file.

    Args:
        model: The model.

    Attributes:
        inputs: Names of the inputs that are not initializers.
        output: Name of the first output.
        output_operator: The operator that makes it.

    Raises:
        ModelError: A node's operator cannot be trained through.
    """

    def __init__(self, model: ModelFile) -> None:
        graph = model.proto.graph
        self._name = model.name
        self._nodes = [(name, node, _attributes(node)) for name, node in named_nodes(graph)]
        for name, node, _ in self._nodes:
            if operator_of(node) not in OPERATORS or any(a.HasField("g") for a in node.attribute):
                raise ModelError(
                    f"{model.name}: node '{name}': operator {operator_of(node)} cannot be trained through"
                    f"{did_you_mean(node.op_type, OPERATORS)}; expected a network of: {', '.join(OPERATORS)}"
                )
        self._check_softmax(model.proto)
        self._constants = {tensor.name: torch.from_numpy(model.array(tensor).copy()) for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self._constants]
        self.output = graph.output[0].name
        self.output_operator = next((node.op_type for _, node, _ in self._nodes if self.output in node.output), "")

    def _check_softmax(self, proto: onnx.ModelProto) -> None:
        version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
        for name, node, _ in self._nodes:
            if node.op_type in ("Softmax", "LogSoftmax") and version < _SOFTMAX_OVER_ONE_AXIS:
                raise ModelError(
                    f"{self._name}: node '{name}': {node.op_type} of opset {version} cannot be trained through, "
                    f"expected {_SOFTMAX_OVER_ONE_AXIS} or later; export the model again"
                )

    def run(self, inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
        """Return the first output.

        Args:
            inputs: Tensors by input name.
            weights: Tensors that take the place of initializers, by name.

        Raises:
            ModelError: A node asks for what cannot be done, or its inputs don't fit.
        """
        values: dict[str, Any] = {**self._constants, **weights, **inputs}
        for name, node, attributes in self._nodes:
            read = [values[key] if key else None for key in node.input]
            try:
                values[node.output[0]] = OPERATORS[node.op_type](read, attributes)
            except Unsupported as error:
                raise ModelError(f"{self._name}: node '{name}': {node.op_type} with {error}") from error
            except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
                line = " ".join(str(error).split())[:200]
                raise ModelError(f"{self._name}: node '{name}': {node.op_type} cannot be run: {line}") from error
        return values[self.output]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
