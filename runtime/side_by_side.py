"""Every mapped layer beside the node that it replaces, on the same inputs, in one graph.

From input to output a network that rounds its activations amplifies a single tipped bit, so that its outputs say little
about a layer. Here each crossbar call of the deployed model reads what the original node reads, inside the reference
model; the two results of each layer are compared, and the original one goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from rerampile.crossbar_functions import DOMAIN
from rerampile.files import DEPLOYED
from rerampile.onnx_file import copy_without
from rerampile.plan import OutputError
from rerampile.runtime.compare import output_error
from rerampile.runtime.session import open_session, run

__all__ = ["layer_errors"]

_SUFFIX = "__crossbar"


def layer_errors(folder: Path, reference: Path, inputs: Mapping[str, npt.NDArray[Any]]) -> list[OutputError]:
    """Return the error of each mapped layer of the main graph (those inside subgraphs are seen from outside only).

    Results of whole numbers (quantised activations, integer sums) that differ by one step at most count as equal: the
    last bit of a weight may tip a rounding.

    Args:
        folder: The deployment folder; a model is written into it for a moment.
        reference: The reference model, in a folder inside ``folder``.
        inputs: Inputs of the model.
    """
    model = onnx.load(reference, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(Path(reference.parent.name) / entry.value)
    names = _add_calls(model, onnx.load(folder / DEPLOYED, load_external_data=False))
    path = folder / "side-by-side.onnx"
    try:
        path.write_bytes(model.SerializeToString())
        results = run(open_session(path), inputs)
    finally:
        path.unlink(missing_ok=True)
    pairs = zip(names, results[::2], results[1::2], strict=True)
    return [_error(name, crossbar, original) for name, original, crossbar in pairs]


def _add_calls(model: onnx.ModelProto, deployed: onnx.ModelProto) -> list[str]:
    """Put the calls of the deployed model beside the nodes of the reference; return the outputs that both make."""
    made = {name for node in model.graph.node for name in node.output if name}
    known = made | {v.name for v in model.graph.input} | {t.name for t in model.graph.initializer}
    cells = {tensor.name: tensor for tensor in deployed.graph.initializer}
    names: list[str] = []
    for node in deployed.graph.node:
        if node.domain != DOMAIN or node.output[0] not in made:
            continue
        call = copy_without(node, "output", "name")
        call.output.extend(f"{name}{_SUFFIX}" for name in node.output)
        model.graph.node.append(call)
        names.append(node.output[0])
        for name in node.input:
            if name not in known and name in cells:
                known.add(name)
                model.graph.initializer.append(cells[name])
    model.functions.extend(deployed.functions)
    del model.opset_import[:]
    model.opset_import.extend(deployed.opset_import)
    model.ir_version = deployed.ir_version
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=f"{n}{s}") for n in names for s in ("", _SUFFIX))
    return names


def _error(name: str, found: Any, reference: Any) -> OutputError:
    a, b = np.asarray(found), np.asarray(reference)
    if (
        a.shape == b.shape
        and a.dtype.kind in "iu"
        and np.abs(a.astype(np.int64) - b.astype(np.int64)).max(initial=0) <= 1
    ):
        a = b
    return output_error(name, a, b)
