"""Mean and variance of every output channel of each layer, over calibration images, in models side by side.

The output is that after the operations that were folded in behind the layer, to which a correction of scale and bias
goes: its mean tells the bias, its variance (or its covariance with that of the dense model) the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile
from rerampile.runtime.dataset import Dataset, Indices
from rerampile.runtime.layer_inputs import IN_SUBGRAPH, NotObservedError
from rerampile.runtime.layer_outputs import by_group_and_output
from rerampile.runtime.taps import Progress, Tap, Watched
from rerampile.weight_slots import RECURRENT

__all__ = ["ChannelStatistics", "channel_statistics"]

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """One layer's outputs over all images, positions and uses.

    Attributes:
        count: How many values each channel had.
        mean: float64 [models, channels].
        covariance: Of each channel between models, float64 [models, models, channels]; the diagonal is the variance.
    """

    count: int
    mean: Doubles = field(repr=False)
    covariance: Doubles = field(repr=False)


def channel_statistics(
    models: Sequence[ModelFile],
    layers: Sequence[Layer],
    data: Dataset,
    images: Indices,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, ChannelStatistics], dict[str, str]]:
    """Run images through models; return each layer's statistics, and the reason for each layer that has none.

    Args:
        models: The model that the layers are of, and models with other weights, whose tensors have the same names.
        layers: Layers of the first.
        data: Images; targets are not needed.
        images: Which of them to use.
        batch: Images run at once, or None for as many as memory allows, at most 64.
        progress: Called with (images done, all images).

    Raises:
        ConfigError: There is no model, or ``batch`` is less than one.
        DataError: There are no images.
        FaultRunError: ONNX Runtime refuses a model or the images.
    """
    if not models:
        raise ConfigError("no model to run, expected one or more")
    reasons: dict[str, str] = {}
    outputs: dict[str, list[_Output]] = {}
    for layer in layers:
        try:
            outputs[layer.name] = _outputs(layer)
        except NotObservedError as reason:
            reasons[layer.name] = str(reason)
    sums = {layer.name: _Sums(len(models), layer.view.channels) for layer in layers if layer.name in outputs}
    if sums:
        taps = [output.tap for found in outputs.values() for output in found]
        watched = Watched(models, taps, data, images, batch)
        for shown in watched.results(progress):
            for name, output in ((n, o) for n, found in outputs.items() for o in found if shown):
                sums[name].add([output.channels(values[output.tap]) for values in shown])
            shown.clear()
    return {name: found.statistics() for name, found in sums.items()}, reasons


@dataclass(frozen=True)
class _Output:
    """One use's output, folds included: what to watch, and of which operator and layer it is."""

    tap: Tap
    op: str
    outputs_first: bool
    weight_shape: tuple[int, ...]
    groups: int

    def channels(self, value: Floats) -> Floats:
        """Return a tensor as [channels, images and positions]."""
        if len(self.weight_shape) == 1:
            return value.reshape(1, -1)
        rows = by_group_and_output(value, self.op, self.outputs_first, self.weight_shape, self.groups)
        return rows.reshape(-1, rows.shape[-1])


def _outputs(layer: Layer) -> list[_Output]:
    after = [fold.node for fold in layer.folds if fold.side == "after"]
    found = []
    for node, slot in layer.uses:
        if node.scope:
            raise NotObservedError(IN_SUBGRAPH)
        if node.op in RECURRENT:
            raise NotObservedError("its products are not seen outside its operator")
        tensor = (after[-1] if after else node).view.outputs[0]
        view = layer.view
        found.append(_Output(Tap(tensor.name), node.op, slot == 0, view.tensor_shape, view.groups))
    return found


class _Sums:
    """Running means and sums of products of deviations (Chan, Golub and LeVeque 1979), which lose no digits."""

    def __init__(self, models: int, channels: int) -> None:
        self.count = 0
        self.mean = np.zeros((models, channels))
        self.products = np.zeros((models, models, channels))

    def add(self, values: Sequence[Floats]) -> None:
        """Add values of each model, float32 [channels, images and positions]."""
        count = values[0].shape[-1]
        means = np.stack([value.mean(axis=-1, dtype=np.float64) for value in values])
        deviations = [value - mean[:, None] for value, mean in zip(values, means, strict=True)]
        total = self.count + count
        shift = means - self.mean
        self.products += shift[:, None] * shift[None] * (self.count * count / total)
        for (a, b), _ in np.ndenumerate(self.products[..., 0]):
            self.products[a, b] += np.vecdot(deviations[a], deviations[b])
        self.mean += shift * (count / total)
        self.count = total

    def statistics(self) -> ChannelStatistics:
        """Return what was found."""
        return ChannelStatistics(count=self.count, mean=self.mean, covariance=self.products / self.count)
