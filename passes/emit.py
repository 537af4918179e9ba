"""Emit: write the cells, the deployed model, the masks and the plan of a deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.deployed_model import deployed_model
from rerampile.files import CONDUCTANCES, DEPLOYED, MASKS
from rerampile.layer import Layer
from rerampile.onnx_file import file_sha256
from rerampile.plan import FileRecord
from rerampile.planning import plan_of
from rerampile.tensor_file import TensorWriter
from rerampile.unit import Unit

__all__ = ["Emit"]


@dataclass(frozen=True)
class Emit:
    """The files of the deployment folder, and the plan but for its verification."""

    name: str = "emit"

    def run(self, unit: Unit) -> Unit:
        """Write the files and fill ``plan``."""
        conductances, mean_conductance = _write_conductances(unit)
        _write_masks(unit)
        (unit.folder / DEPLOYED).write_bytes(
            deployed_model(unit, conductances.specs).SerializeToString(deterministic=True)
        )
        files = {
            path.name: FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
            for path in sorted(unit.folder.iterdir())
            if path.is_file() and path.name != CONDUCTANCES
        }
        files[CONDUCTANCES] = FileRecord(sha256=conductances.sha256, bytes=conductances.path.stat().st_size)
        return replace(unit, plan=plan_of(unit, files, mean_conductance))

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the bytes written."""
        return {"bytes": sum(path.stat().st_size for path in unit.folder.iterdir() if path.is_file())}


def _write_conductances(unit: Unit) -> tuple[TensorWriter, dict[str, float]]:
    """Write every cell's target and every gain; return the file and the mean conductance of a cell by layer."""
    tensors: list[tuple[str, npt.DTypeLike, tuple[int, ...]]] = []
    for layer in unit.layers:
        mapped = unit.mapped[layer.name]
        shape = (mapped.coding.slices, mapped.coding.cells, *layer.view.shape)
        tensors += [(f"{layer.name}.cells", mapped.coding.dtype, shape), (f"{layer.name}.gain", np.float32, shape[2:3])]
    means: dict[str, float] = {}
    by_tensor = {f"{layer.name}.{kind}": (layer, kind) for layer in unit.layers for kind in ("cells", "gain")}
    with TensorWriter(unit.folder / CONDUCTANCES, tensors, {"format": "rerampile-conductances"}) as writer:
        for name in writer.specs:
            layer, kind = by_tensor[name]
            mapped = unit.mapped[layer.name]
            if kind == "gain":
                writer.write(name, mapped.gain)
                continue
            cells = mapped.coding.encode(unit.weights(layer), mapped.gain)
            means[layer.name] = _mean_conductance(unit, layer, cells)
            writer.write(name, cells)
    return writer, means


def _mean_conductance(unit: Unit, layer: Layer, cells: npt.NDArray[Any]) -> float:
    coding = unit.mapped[layer.name].coding
    if coding.levels is None:
        return float(cells.mean(dtype=np.float32 if cells.size < 1 << 24 else np.float64))
    counts = np.bincount(cells.reshape(-1), minlength=coding.levels)
    return float(counts @ coding.conductance(np.arange(coding.levels)).astype(np.float64) / cells.size)


def _write_masks(unit: Unit) -> None:
    if not unit.masks:
        return
    layers = [layer for layer in unit.layers if layer.name in unit.masks]
    tensors = [(layer.name, np.bool_, layer.view.tensor_shape) for layer in layers]
    with TensorWriter(unit.folder / MASKS, tensors, {"format": "rerampile-masks"}) as writer:
        for layer in layers:
            writer.write(layer.name, layer.view.tensor(unit.masks[layer.name].kept))
