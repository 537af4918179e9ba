"""Emit: write the cells, the deployed model, the masks and the plan of a deployment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.background import in_background, side_by_side
from rerampile.deployed_model import deployed_model
from rerampile.files import CONDUCTANCES, DEPLOYED, MASKS
from rerampile.layer import Layer
from rerampile.onnx_file import hash_on_disk
from rerampile.planning import plan_of
from rerampile.schemes import Coding, row_chunks
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
        writers = [conductances, *_write_masks(unit)]
        (unit.folder / DEPLOYED).write_bytes(
            deployed_model(unit, conductances.specs).SerializeToString(deterministic=True)
        )
        hashes = {writer.path.name: writer.sha256 for writer in writers}
        others = [path for path in unit.folder.iterdir() if path.is_file() and path.name not in hashes]
        hashes |= {path.name: in_background(hash_on_disk, path) for path in others}
        return replace(unit, hashes=hashes, plan=plan_of(unit, mean_conductance))

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the bytes written."""
        return {"bytes": sum(path.stat().st_size for path in unit.folder.iterdir() if path.is_file())}


def _write_conductances(unit: Unit) -> tuple[TensorWriter, dict[str, float]]:
    """Write every cell's target and every gain; return the file and the mean conductance of a cell by layer."""
    tensors: list[tuple[str, npt.DTypeLike, tuple[int, ...]]] = []
    for layer in unit.layers:
        mapped = unit.mapped[layer.name]
        shape = (mapped.coding.slices, mapped.coding.cells, *layer.view.shape)
        gain = (f"{layer.name}.gain", np.float32, mapped.gain.shape)
        tensors += [(f"{layer.name}.cells", mapped.coding.dtype, shape), gain]
    with TensorWriter(unit.folder / CONDUCTANCES, tensors, {"format": "rerampile-conductances"}) as writer:
        means = side_by_side(lambda layer: _write_layer(unit, layer, writer), unit.layers)
    return writer, dict(zip((layer.name for layer in unit.layers), means, strict=True))


def _write_layer(unit: Unit, layer: Layer, writer: TensorWriter) -> float:
    """Encode and write one layer's cells, some outputs at a time; return the mean conductance of a cell."""
    mapped = unit.mapped[layer.name]
    coding, gain = mapped.coding, mapped.gain
    weights, sums = unit.weight_rows(layer), []

    def blocks() -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        chunks = row_chunks(layer.view.shape)
        buffer = np.empty((coding.slices, coding.cells, chunks[0].stop, layer.view.inputs), coding.dtype)
        for rows in chunks:
            part = weights(rows)
            cells = coding.encode(part, mapped.segments.spread(gain[rows]), out=buffer[:, :, : len(part)])
            sums.append(_total_conductance(coding, cells))
            yield rows, cells

    writer.write_rows(f"{layer.name}.cells", blocks())
    writer.write(f"{layer.name}.gain", gain)
    return math.fsum(sums) / (math.prod(layer.view.shape) * coding.cells * coding.slices)


def _total_conductance(coding: Coding, cells: npt.NDArray[Any]) -> float:
    if coding.levels is None:
        return float(cells.sum(dtype=np.float32))
    if coding.level_table is not None:
        return float(np.bincount(cells.reshape(-1), minlength=coding.levels) @ np.array(coding.level_table))
    step = (coding.g_on - coding.g_off) / (coding.levels - 1)
    return cells.size * coding.g_off + int(cells.sum(dtype=np.uint64)) * step


def _write_masks(unit: Unit) -> list[TensorWriter]:
    if not unit.masks:
        return []
    layers = [layer for layer in unit.layers if layer.name in unit.masks]
    tensors = [(layer.name, np.bool_, layer.view.tensor_shape) for layer in layers]
    with TensorWriter(unit.folder / MASKS, tensors, {"format": "rerampile-masks"}) as writer:
        for layer in layers:
            writer.write(layer.name, layer.view.tensor(unit.masks[layer.name].kept))
    return [writer]
