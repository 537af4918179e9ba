"""Prune: apply masks from a file or of an earlier pruning, or make them by magnitude.

Magnitude takes one ratio, a ratio a block, or a ratio a layer.

A block is a group of layers of similar size (Yuan et al. 2021, section IV-C): the layers with the same number of output
channels, named by that number (``64``, ``128``, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, did_you_mean
from rerampile.layer import Layer
from rerampile.npz_file import read_npz
from rerampile.passes.pruning.constraint import keep_largest
from rerampile.passes.pruning.ratios import asked_ratios, layer_names
from rerampile.pruning import PrunedModel
from rerampile.tensor_file import TensorFile, stores
from rerampile.unit import Mask, Unit

__all__ = ["Prune", "read_masks"]


@dataclass(frozen=True)
class Prune:
    """Exact zeros where a mask says so."""

    name: str = "prune"

    def run(self, unit: Unit) -> Unit:
        """Fill ``masks``.

        Raises:
            ConfigError: The masks file or a block name does not fit the model.
        """
        if unit.pruned is not None:
            return replace(unit, masks=_masks_of(unit.pruned, unit.layers))
        if unit.options.masks is not None:
            return replace(unit, masks=read_masks(unit.options.masks, unit.layers))
        ratios = asked_ratios(unit.options.prune, unit.layers)
        masks = {
            layer.name: Mask(kept=_largest(layer.matrix(unit.graph), ratio), source=f"magnitude {ratio:g}")
            for layer in unit.layers
            if (ratio := ratios.get(layer.name, 0.0)) > 0
        }
        return replace(unit, masks=masks)

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return how many layers and weights were pruned."""
        total = sum(mask.kept.size for mask in unit.masks.values())
        kept = sum(int(np.count_nonzero(mask.kept)) for mask in unit.masks.values())
        return {"layers pruned": len(unit.masks), "weights pruned": total - kept}


def _largest(weights: npt.NDArray[np.float32], ratio: float) -> npt.NDArray[np.bool_]:
    """Return which weights to keep, bool [outputs, inputs]: all but exactly ``round(ratio * size)`` of the smallest."""
    return keep_largest(np.abs(weights).reshape(-1), round(ratio * weights.size)).reshape(weights.shape)


def _masks_of(pruned: PrunedModel, layers: Sequence[Layer]) -> dict[str, Mask]:
    """Return the masks of a pruned model's layers, by the names of the tensors that these read."""
    by_tensor = {layer.tensor: layer for layer in pruned.layers}
    found = [(layer, by_tensor[layer.tensor.name]) for layer in layers if layer.tensor.name in by_tensor]
    return {layer.name: Mask(kept=layer.view.matrix(part.kept), source=pruned.source(part)) for layer, part in found}


def read_masks(path: Path, layers: Sequence[Layer]) -> dict[str, Mask]:
    """Read the masks of a file, each matched with its layers by name and checked.

    An initializer that is read in two ways is two layers: a mask under its name goes for both, but where the file has
    one under the layer's own name.

    Raises:
        ConfigError: The file is unreadable, or a mask has an unknown name, a wrong shape or values other than 0 and 1.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer_names(layer):
            by_name.setdefault(name, []).append(layer)
    masks: dict[str, Mask] = {}
    found: dict[str, str] = {}
    largest = max((layer.view.shape[0] * layer.view.shape[1] for layer in layers), default=0)
    for key, values in _read_arrays(path, largest):
        if key not in by_name:
            raise ConfigError(f"{path}: mask '{key}': no layer or initializer of that name{did_you_mean(key, by_name)}")
        if not stores(values.dtype) or not ((values == 0) | (values == 1)).all():
            raise ConfigError(f"{path}: mask '{key}': values other than 0 and 1, expected 1 to keep and 0 to prune")
        for owner in by_name[key]:
            if values.shape != owner.view.tensor_shape:
                raise ConfigError(
                    f"{path}: mask '{key}': shape {list(values.shape)}, expected {list(owner.view.tensor_shape)}, "
                    f"the shape of its weights"
                )
            earlier = found.get(owner.name, key)
            if earlier != key and len(by_name[earlier]) == len(by_name[key]):
                raise ConfigError(f"{path}: mask '{key}': layer '{owner.name}' has a mask already; keep one of the two")
            if len(by_name[earlier]) >= len(by_name[key]):
                masks[owner.name] = Mask(kept=owner.view.matrix(values.astype(np.bool_)), source=path.name)
                found[owner.name] = key
    return masks


def _read_arrays(path: Path, largest: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the arrays of an .npz or .safetensors file; nothing of an .npz that is larger than the largest layer."""
    try:
        if path.suffix == ".npz":
            yield from read_npz(path, largest)
        elif path.suffix == ".safetensors":
            file = TensorFile(path)
            yield from ((key, file.read(key)) for key in file.specs)
        else:
            raise ValueError(f"ending '{path.suffix}', expected .npz or .safetensors")
    except ValueError as error:
        raise ConfigError(f"{path}: not a readable masks file: {error}") from error
