"""Prune a model from calibration images alone: layer after layer, each towards what the dense model gives there.

The first layers that are pruned change what later ones see. So each layer is fitted to the dense model's outputs on the
inputs of the model pruned so far, and where it has a bias of its own, scale and bias are fitted together: the engine
works with centred moments, and the bias takes the rest (docs/pruning.md).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Allotment", "PruneOptions", "PrunedLayer", "PrunedModel", "Structure", "prune_model"]

Doubles = npt.NDArray[np.float64]
Allotment = Literal["uniform", "threshold", "sensitivity"]
Structure = Literal["weights", "rows", "columns"]

_GRID = tuple(np.round(np.arange(0, 0.96, 0.05), 2))
