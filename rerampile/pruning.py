"""What is asked of a pruning, and the pruned model, as pruning hands it to the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from rerampile.onnx_file import ModelFile

__all__ = ["PruneRequest", "PrunedLayer", "PrunedModel"]


@dataclass(frozen=True, kw_only=True)
class PruneRequest:
    """What is asked of a pruning.

    Attributes:
        ratios: Share of the weights (or rows, or columns) that goes, by block or layer name pattern in order, ``"*"``
            for all layers; without effect where the structure says it.
        engine: A name of :data:`rerampile.passes.pruning.engine.ENGINES`.
        structure: What goes: ``weights``, ``rows`` or ``columns`` of crossbars, input ``channels``, whole
            ``partitions``, or as in ``2:4``, all but 2 of every 4 neighbouring inputs.
        values: What the others may be: ``any``, one of the ``levels`` of the cells, ``clusters:16`` for 16 values a
            layer, ``unified:0.5`` for one magnitude in each of the half of the partitions that this changes least.
        partition: Inputs and outputs that one array holds.
        levels: Values that cells can hold, as shares of an output's largest weight.
        allot: Whether each layer of a key loses the same share, or all together lose it: the weights below one
            ``threshold``, or by the ``sensitivity`` of the layers.
        protect: Layers that are not pruned: ``first``, ``last``, and blocks or layer name patterns.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    engine: str = "admm"
    structure: str = "weights"
    values: str = "any"
    partition: tuple[int, int] = (128, 64)
    levels: tuple[float, ...] = ()
    allot: Literal["uniform", "threshold", "sensitivity"] = "uniform"
    protect: tuple[str, ...] = ("first", "last")


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """One layer after pruning.

    Attributes:
        name: Its name.
        tensor: Name of its weights in the pruned model.
        ratio: The ratio that it was given.
        kept: Which weights are left, bool in the shape of that tensor.
        loss: Mean squared change of its outputs over their mean square, on the calibration images.
        deficient: Whether there were too few images for as many inputs.
    """

    name: str
    tensor: str
    ratio: float
    kept: npt.NDArray[np.bool_] = field(repr=False)
    loss: float
    deficient: bool


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """A pruned model.

    Attributes:
        model: The model, with exact zeros and new weights and biases; its tensors have the names of the original's.
        request: What was asked.
        layers: The layers that were pruned, in the order of the model.
        left: The layers that were not, with the reason.
    """

    model: ModelFile
    request: PruneRequest
    layers: list[PrunedLayer]
    left: dict[str, str]

    def source(self, layer: PrunedLayer) -> str:
        """Return how a layer was pruned, as the plan tells it: ``admm 0.7``, ``admm rows 0.5``, ``admm 2:4 levels``."""
        request = self.request
        words = [request.engine, *([] if request.structure == "weights" else [request.structure])]
        words += [] if ":" in request.structure else [f"{layer.ratio:g}"]
        return " ".join(words if request.values == "any" else [*words, request.values])

    @property
    def sparsity(self) -> float:
        """Share of the weights of all pruned layers that is zero."""
        total = sum(layer.kept.size for layer in self.layers)
        return 1 - sum(int(np.count_nonzero(layer.kept)) for layer in self.layers) / max(total, 1)
