"""The folder of a pruned model: the model, its masks, and the record of how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.onnx_file import ModelFile, write_model_file
from rerampile.tensor_file import TensorWriter

__all__ = ["MASKS", "MODEL", "write_pruned"]

MODEL, MASKS = "model.onnx", "masks.safetensors"


def write_pruned(
    place: Path,
    model: ModelFile,
    kept: Mapping[str, npt.NDArray[np.bool_]],
    record_name: str,
    record: Mapping[str, Any],
) -> None:
    """Write a model, its masks and its record, each whole or not at all.

    Args:
        place: The folder.
        model: The model.
        kept: Which weights are not pruned, by the name of their tensor, in its shape.
        record_name: File name of the record.
        record: What it says, in plain data.
    """
    write_model_file(model, place / MODEL)
    temporary = place / f".{MASKS}"
    temporary.unlink(missing_ok=True)
    specs = [(name, np.bool_, mask.shape) for name, mask in kept.items()]
    with TensorWriter(temporary, specs, {"format": "rerampile-masks"}) as writer:
        for name, mask in kept.items():
            writer.write(name, mask)
    temporary.replace(place / MASKS)
    temporary = place / f".{record_name}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(place / record_name)
