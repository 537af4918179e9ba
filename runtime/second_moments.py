"""Second moments of what each layer's crossbars see: one pass over calibration images, which can be resumed.

The error that other weights ``V`` make in the products of a layer is ``tr((V - W) H (V - W)^T)`` with the second moment
``H`` of its inputs, so that pruning needs nothing else of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile
from rerampile.runtime.dataset import Dataset, Indices
from rerampile.runtime.layer_inputs import InputUse, NotObservedError, input_uses
from rerampile.runtime.moment_sums import MomentSums, add_products
from rerampile.runtime.moments_checkpoint import MomentsCheckpoint
from rerampile.runtime.taps import Progress, Tap, Watched

__all__ = ["CrossMoments", "Moments", "cross_moments", "second_moments"]

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
_Uses = tuple[InputUse, ...]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over the input vectors of a layer, of all its uses.

    Attributes:
        moment: Sum of x x^T, float64 [groups, inputs, inputs], read-only.
        total: Sum of x, float64 [groups, inputs], read-only.
        count: How many vectors each group has seen.
    """

    moment: Doubles = field(repr=False)
    total: Doubles = field(repr=False)
    count: int


@dataclass(frozen=True, kw_only=True)
class CrossMoments:
    """Sums over the input vectors of a layer in two models: x in the pruned one, d in the dense one.

    Attributes:
        pruned: Sums over x alone.
        cross: Sum of (W d) x^T with the dense weights W, float64 [groups, outputs, inputs].
        dense_total: Sum of d, float64 [groups, inputs].
    """

    pruned: Moments
    cross: Doubles = field(repr=False)
    dense_total: Doubles = field(repr=False)


def second_moments(
    graph: ModelGraph,
    layers: Sequence[Layer],
    data: Dataset,
    images: Indices,
    *,
    batch: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> tuple[dict[str, Moments], dict[str, str]]:
    """Run calibration images; return what each layer sees, and the reason for each layer that cannot be observed.

    Inputs are those of the layer's crossbars: operations that were folded in before it are left out, padding counts as
    zeros, whole-numbered weights see whole numbers less their zero point. Layers that see the same share one result.
    Memory is that of the results, of 256 MiB of activations and of 32 MiB of input vectors; where the results of all
    layers are too many, some layers at a time can be asked for.

    Args:
        graph: The model.
        layers: Layers of it.
        data: Images; targets are not needed.
        images: Which of them to use.
        batch: Images run at once, or None for as many as memory allows, at most 64.
        checkpoint: A file that takes the sums from time to time and at the end. A later call with the same arguments
            goes on from it, to the same bytes.
        checkpoint_seconds: Least time between two versions of it.
        progress: Called with (images done, all images).

    Raises:
        ConfigError: ``batch`` is less than one.
        DataError: There are no images, or the checkpoint is damaged or belongs to another calibration.
        FaultRunError: ONNX Runtime refuses the model or the images.
    """
    uses, reasons = _observable(graph, layers)
    sums = {uses[layer.name]: _sums_of(layer) for layer in layers if layer.name in uses}
    if sums:
        watched = _watched([graph.model], list(sums), data, images, batch)
        saved = None
        if checkpoint is not None:
            experiment = _experiment(graph.model, list(sums), data, images, watched.batch)
            saved = MomentsCheckpoint(checkpoint, experiment, list(sums.values()), checkpoint_seconds)
        _accumulate(watched, sums, saved, progress)
    found: dict[_Uses, Moments] = {}
    for key, sum_ in sums.items():
        sum_.finish()
        if sum_.finite:
            found[key] = _moments(sum_)
    for name, key in uses.items():
        if key not in found:
            reasons[name] = "its inputs are not finite, or too large to be squared, on these images"
    ordered = {layer.name: reasons[layer.name] for layer in layers if layer.name in reasons}
    return {name: found[key] for name, key in uses.items() if key in found}, ordered


def cross_moments(
    graph: ModelGraph,
    pruned: ModelFile,
    layer: Layer,
    data: Dataset,
    images: Indices,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> CrossMoments:
    """Run images through two models side by side, as far as one layer's inputs; return how these go together.

    Where the images hold more than 32 input vectors for each input of the layer (and more than 16,384), that many of
    them are drawn, evenly and always the same ones: early convolutions see a thousand positions of every image.

    Args:
        graph: The dense model.
        pruned: The same model with other weights: its tensors have the same names.
        layer: A layer of the dense model.
        data: Images; targets are not needed.
        images: Which of them to use.
        batch: Images run at once, or None for as many as memory allows, at most 64.
        progress: Called with (images done, all images).

    Raises:
        ConfigError: The layer cannot be observed, or ``batch`` is less than one.
        DataError: There are no images.
        FaultRunError: ONNX Runtime refuses a model or the images.
    """
    uses, reasons = _observable(graph, [layer])
    if reasons:
        raise ConfigError(f"layer '{layer.name}' cannot be refitted: {reasons[layer.name]}")
    sums, view = _sums_of(layer), layer.view
    weights = layer.matrix(graph).reshape(view.groups, view.outputs, view.inputs)
    cross, dense_total = np.zeros(weights.shape), np.zeros_like(sums.total)
    watched = _watched([graph.model, pruned], list(uses.values()), data, images, batch)
    draws, share = np.random.default_rng(0), 0.0
    for shown in watched.results(progress):
        if shown and not share:
            seen = sum(_count(use, shown[0]) for use in uses[layer.name])
            share = _sampled(view.inputs) * watched.batch / (seen * len(images))
        for use in uses[layer.name] if shown else ():
            dense, sparse = (use.reader.columns([values[tap] for tap in use.taps]) for values in shown)
            for pair in zip(dense, sparse, strict=True):
                d, x = pair if share >= 1 else _drawn(pair, share, draws)
                sums.add(x)
                add_products(cross, weights @ d, x)
                dense_total += d.sum(axis=-1, dtype=np.float64)
        shown.clear()
    sums.finish()
    return CrossMoments(pruned=_moments(sums), cross=cross, dense_total=dense_total)


def _sampled(inputs: int) -> int:
    """Return how many input vectors of a layer are enough."""
    return max(32 * inputs, 1 << 14)


def _drawn(pair: tuple[Floats, Floats], share: float, draws: np.random.Generator) -> tuple[Floats, Floats]:
    """Return some of the vectors of both models, the same of each."""
    dense, sparse = pair
    chosen = np.flatnonzero(draws.random(sparse.shape[-1]) < share)
    return dense[..., chosen], sparse[..., chosen]


def _count(use: InputUse, values: Mapping[Tap, Floats]) -> int:
    """Return how many input vectors a use of a layer has in a batch."""
    return sum(part.shape[-1] for part in use.reader.columns([values[tap] for tap in use.taps]))


def _observable(graph: ModelGraph, layers: Sequence[Layer]) -> tuple[dict[str, _Uses], dict[str, str]]:
    """Return the uses of every layer whose inputs can be seen, and the reasons of the others."""
    uses: dict[str, _Uses] = {}
    reasons: dict[str, str] = {}
    for layer in layers:
        try:
            uses[layer.name] = tuple(input_uses(graph, layer))
        except NotObservedError as reason:
            reasons[layer.name] = str(reason)
    return uses, reasons


def _sums_of(layer: Layer) -> MomentSums:
    return MomentSums(layer.view.groups, layer.view.inputs)


def _moments(sums: MomentSums) -> Moments:
    return Moments(moment=sums.moment, total=sums.total, count=sums.count)


def _watched(
    models: Sequence[ModelFile], uses: Sequence[_Uses], data: Dataset, images: Indices, batch: int | None
) -> Watched:
    every = [use for together in uses for use in together]
    extra = {node.output[0]: node for use in every for node in use.extra}
    return Watched(models, [tap for use in every for tap in use.taps], data, images, batch, list(extra.values()))


def _accumulate(
    watched: Watched,
    sums: dict[_Uses, MomentSums],
    saved: MomentsCheckpoint | None,
    progress: Progress | None,
) -> None:
    if saved is not None and saved.complete:
        return
    for shown in watched.results(progress, skip=0 if saved is None else saved.batches):
        for uses, sum_ in sums.items():
            for values, use in ((values, use) for values in shown for use in uses):
                for columns in use.reader.columns([values[tap] for tap in use.taps]):
                    sum_.add(columns)
        shown.clear()  # before the next batch takes as much memory
        if saved is not None:
            saved.add_batch()
    if saved is not None:
        saved.finish()


def _experiment(model: ModelFile, uses: Sequence[_Uses], data: Dataset, images: Indices, batch: int) -> dict[str, str]:
    """Return everything that the sums depend on; hashes stand for what is long."""
    seen = [[(use.taps, use.reader) for use in together] for together in uses]
    texts = {
        "model": json.dumps([model.sha256, model.external], sort_keys=True),
        "layers": repr(seen),
        "data": data.digest,
        "images": json.dumps(np.asarray(images).tolist()),
    }
    hashed = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    return {**hashed, "batch": str(batch)}
