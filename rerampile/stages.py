"""What ``--keep-stages`` writes after each pass."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from rerampile.unit import Unit

__all__ = ["stage_record"]


def stage_record(unit: Unit) -> dict[str, Any]:
    """Return what a unit holds so far, in plain data: large arrays by their shape, extremes and counts."""
    return {
        "layers": [
            {
                "name": layer.name,
                "matrix": [layer.view.groups, layer.view.outputs, layer.view.inputs],
                "uses": [node.full_name for node, _ in layer.uses],
                "folds": [fold.node.full_name for fold in layer.folds],
                "kept": int(np.count_nonzero(unit.masks[layer.name].kept)) if layer.name in unit.masks else None,
                "zeros": unit.mapped[layer.name].zeros if layer.name in unit.mapped else None,
                "gain": _extremes(unit.mapped[layer.name].gain) if layer.name in unit.mapped else None,
            }
            for layer in unit.layers
        ],
        "digital": [{"node": op.node.full_name, "op": op.node.op, "code": op.code} for op in unit.digital],
        "arrays": [msgspec.to_builtins(array) for array in unit.arrays],
    }


def _extremes(values: Any) -> list[float]:
    return [float(values.min()), float(values.max())]
