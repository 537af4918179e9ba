"""Prune a model from calibration images alone: layer after layer, each towards what the dense model gives there.

Layers that were pruned change what later ones see. So each layer is fitted to the outputs of the dense model on the
inputs of the model pruned so far; where it has a bias of its own, weights and bias are fitted together: the engine
works with centred moments, and the bias makes up for the mean (docs/pruning.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.asked_constraint import WHOLE, constraint_of, inputs_of_pattern
from rerampile.editable_model import EditableModel, can_shift
from rerampile.errors import ConfigError, did_you_mean
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile
from rerampile.passes.find_layers import find_layers
from rerampile.passes.pruning.engine import ENGINES, prune_layer
from rerampile.passes.pruning.problem import LayerProblem, layer_problem
from rerampile.passes.pruning.ratios import (
    allotted_ratios,
    asked_ratios,
    loss_table,
    protected_layers,
    relative_scores,
    threshold_ratios,
)
from rerampile.passes.pruning.refit import output_factors
from rerampile.pruning import PrunedLayer, PrunedModel, PruneRequest
from rerampile.runtime.dataset import Dataset, Indices, spread
from rerampile.runtime.second_moments import CrossMoments, Moments, cross_moments, second_moments
from rerampile.tensor_file import TensorFile, TensorWriter
from rerampile.unused_channels import kernel_size, unread_outputs

__all__ = ["check_request", "prune_model", "remove_checkpoint"]

Doubles = npt.NDArray[np.float64]

_GRID = tuple(float(ratio) for ratio in np.round(np.arange(0, 0.96, 0.05), 2))  # of tables of losses
_DIGITS = 32  # of the names of finished layers


def check_request(request: PruneRequest) -> None:
    """Refuse what no model has.

    Raises:
        ConfigError: The engine or the structure is unknown.
    """
    if request.engine not in ENGINES:
        raise ConfigError(f"pruning method {request.engine}: no such engine{did_you_mean(request.engine, ENGINES)}")
    constraint_of(request, 0.0, np.ones((1, 1, 1)))


def prune_model(
    graph: ModelGraph,
    data: Dataset,
    request: PruneRequest,
    *,
    images: int = 1024,
    checkpoint: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> PrunedModel:
    """Prune a model.

    Args:
        graph: The model, which stays as it is.
        data: Calibration images; labels are not needed.
        request: What is asked.
        images: How many of the images to use at most, spread over the data.
        checkpoint: A folder that takes each finished layer; the same call goes on from it, to the same bytes, and a
            call with other ratios takes the layers up to the first with another ratio from it.
        progress: Called with (layers done, layers, name of the next one or "").

    Raises:
        ConfigError: The request does not fit the model.
        DataError: The images do not fit the model.
    """
    check_request(request)
    layers, _ = find_layers(graph)
    indices = spread(len(data), min(len(data), images))
    ratios, left = _ratios(graph, layers, data, indices, request)
    pruned = [layer for layer in layers if layer.name in ratios]
    after = layers[layers.index(pruned[0]) :] if pruned else []
    shifted = [layer for layer in after if layer.name not in ratios and can_shift(graph, layer)]
    work = [layer for layer in layers if layer in pruned or layer in shifted]
    editable = EditableModel(graph, work)
    steps = _Checkpoint(checkpoint, _experiment(graph, data, indices, request))
    report = progress or (lambda done, count, name: None)
    found: dict[str, _Step] = {}
    for number, layer in enumerate(work):
        report(number, len(work), layer.name)
        steps.enter(layer.name, ratios.get(layer.name))
        step = steps.read()
        if step is None:
            step = _fit(graph, editable.model, layer, data, indices, request, ratios.get(layer.name))
            steps.write(step)
        editable.set_weights(layer, step.weights.reshape(layer.view.shape))
        if step.shift is not None:
            editable.shift(layer, step.shift)
        if layer.name in ratios:
            found[layer.name] = step
    report(len(work), len(work), "")
    weights = {layer.name: found[layer.name].weights.reshape(layer.view.shape) for layer in pruned}
    if request.structure in WHOLE:
        weights = _without_unread(graph, layers, weights)
        for layer in pruned:
            editable.set_weights(layer, weights[layer.name])
    return PrunedModel(
        model=editable.model,
        request=request,
        layers=[_outcome(editable, layer, weights[layer.name], found[layer.name], ratios) for layer in pruned],
        left=left,
    )


def _without_unread(
    graph: ModelGraph, layers: Sequence[Layer], weights: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Return weights, float32 [groups * outputs, inputs] by layer name, without filters that nothing reads any more."""
    unread = unread_outputs(graph, layers, weights)
    return {
        name: np.where(unread[name][:, None], np.float32(0), matrix) if name in unread else matrix
        for name, matrix in weights.items()
    }


def _outcome(
    editable: EditableModel, layer: Layer, weights: npt.NDArray[np.float32], step: _Step, ratios: Mapping[str, float]
) -> PrunedLayer:
    """Say what became of a layer."""
    return PrunedLayer(
        name=layer.name,
        tensor=editable.weight_name(layer),
        ratio=ratios[layer.name],
        kept=layer.view.tensor(weights != 0),
        loss=step.loss,
        deficient=step.deficient,
    )


def _ratios(
    graph: ModelGraph, layers: Sequence[Layer], data: Dataset, images: Indices, request: PruneRequest
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the ratio of each layer that is pruned, and the reason for each that is not."""
    keys: dict[str, str] = {}  # which of the user's words a layer goes by
    for key, ratio in ({"*": 0.0} if inputs_of_pattern(request.structure) else request.ratios).items():
        keys.update(dict.fromkeys(asked_ratios({key: ratio}, layers), key))
    protected = protected_layers(request.protect, layers)
    left: dict[str, str] = {}
    chosen: list[Layer] = []
    for layer in layers:
        reason = _reason(layer, layer.name in protected, layer.name in keys, request)
        if reason is None:
            chosen.append(layer)
        else:
            left[layer.name] = reason
    if request.allot == "uniform" or inputs_of_pattern(request.structure):
        _, unseen = second_moments(graph, chosen, data, images[:1])
        ratios = {layer.name: request.ratios.get(keys[layer.name], 0.0) for layer in chosen}
    else:
        moments, unseen = second_moments(graph, chosen, data, images)
        ratios = {}
        for key in dict.fromkeys(keys.values()):
            together = [layer for layer in chosen if keys[layer.name] == key and layer.name not in unseen]
            problems = {layer.name: _problem(graph, layer, moments[layer.name]) for layer in together}
            if request.allot == "threshold":
                scores = {name: relative_scores(problem) for name, problem in problems.items()}
                ratios |= threshold_ratios(scores, request.ratios[key])
            else:
                tables = {name: loss_table(problem, _GRID) for name, problem in problems.items()}
                sizes = {layer.name: layer.view.shape[0] * layer.view.shape[1] for layer in together}
                ratios |= allotted_ratios(tables, _GRID, sizes, request.ratios[key])
    left |= unseen
    return {name: ratio for name, ratio in ratios.items() if name not in unseen}, left


def _problem(graph: ModelGraph, layer: Layer, found: Moments) -> LayerProblem:
    return layer_problem(_weights(graph, layer), found.moment / found.count)


def _reason(layer: Layer, protected: bool, asked: bool, request: PruneRequest) -> str | None:
    """Return why a layer is not pruned, None if it is."""
    if not asked:
        return "no ratio was asked for it"
    if protected:
        return "protected"
    if layer.integer:
        return "its weights are whole numbers"
    of = inputs_of_pattern(request.structure)
    if of and layer.view.inputs % of:
        return f"{layer.view.inputs} inputs are no multiple of {of}"
    return None


def _weights(graph: ModelGraph, layer: Layer) -> npt.NDArray[np.float32]:
    """Return a layer's weights, float32 [groups, outputs, inputs]."""
    return layer.matrix(graph).reshape(layer.view.groups, layer.view.outputs, layer.view.inputs)


@dataclass(frozen=True)
class _Step:
    """A fitted layer.

    Attributes:
        weights: float32 [groups, outputs, inputs].
        shift: What is added to each output, float64 [channels], or None where it has no bias of its own.
        loss: See :class:`PrunedLayer`.
        deficient: See :class:`PrunedLayer`.
    """

    weights: npt.NDArray[np.float32]
    shift: Doubles | None
    loss: float = 0.0
    deficient: bool = False


def _fit(
    graph: ModelGraph,
    model: ModelFile,
    layer: Layer,
    data: Dataset,
    images: Indices,
    request: PruneRequest,
    ratio: float | None,
) -> _Step:
    """Fit one layer to the dense model's outputs; without a ratio its bias alone."""
    dense = _weights(graph, layer)
    found = cross_moments(graph, model, layer, data, images)
    centred = can_shift(graph, layer)
    moment, cross = _averages(found, dense, centred)
    if ratio is None:
        return _Step(dense, _shift(layer, dense, dense, found))
    constraint = constraint_of(request, ratio, dense, kernel_size(layer))
    pruned = prune_layer(dense, moment, constraint, engine=request.engine, cross=cross)
    weights = pruned.weights
    if request.values == "levels":
        weights = weights * output_factors(weights, moment, cross)[:, :, None]
    shift = _shift(layer, dense, weights, found) if centred else None
    return _Step(weights.astype(np.float32), shift, pruned.loss, pruned.deficient)


def _averages(found: CrossMoments, dense: npt.NDArray[np.float32], centred: bool) -> tuple[Doubles, Doubles]:
    """Return E[x x^T] and E[(W d) x^T], of the deviations from the means where a bias makes up for these."""
    count = found.pruned.count
    moment, cross = found.pruned.moment / count, found.cross / count
    if centred:
        x, d = found.pruned.total / count, found.dense_total / count
        moment -= x[:, :, None] * x[:, None, :]
        cross -= (dense.astype(np.float64) @ d[:, :, None]) * x[:, None, :]
    return moment, cross


def _shift(
    layer: Layer, dense: npt.NDArray[np.float32], pruned: npt.NDArray[np.floating[Any]], found: CrossMoments
) -> Doubles:
    """Return what brings the mean of each output back to the dense model's, float64 [channels]."""
    added = 0.0 if layer.input_addend is None else layer.input_addend
    scale = layer.uses[0][0].attribute("alpha", 1.0) / found.pruned.count  # of a Gemm: acts on products alone
    x, d = found.pruned.total * scale + added, found.dense_total * scale + added
    wanted, have = (np.einsum("goi,gi->go", w.astype(np.float64), mean) for w, mean in ((dense, d), (pruned, x)))
    shift: Doubles = (wanted - have).reshape(-1)
    return shift


def _experiment(graph: ModelGraph, data: Dataset, images: Indices, request: PruneRequest) -> str:
    """Return a hash of everything that a layer's result depends on, but for the ratios up to it."""
    model = graph.model
    files = [model.sha256, sorted(model.external.items()), data.digest]
    parts = [
        *files,
        np.asarray(images).tolist(),
        request.engine,
        request.structure,
        request.values,
        request.partition,
        request.levels,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def remove_checkpoint(folder: Path) -> None:
    """Remove finished layers, and the folder if nothing else is in it."""
    for path in folder.glob(f"{'[0-9a-f]' * _DIGITS}.*"):
        path.unlink()
    with suppress(OSError):
        folder.rmdir()


class _Checkpoint:
    """Finished layers in files of their own, each written whole, named by a hash of all that they depend on."""

    def __init__(self, folder: Path | None, experiment: str) -> None:
        self._folder, self._hash = folder, hashlib.sha256(experiment.encode())
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def enter(self, name: str, ratio: float | None) -> None:
        """Go on to the next layer."""
        self._hash.update(json.dumps([name, ratio]).encode())

    @property
    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._hash.hexdigest()[:_DIGITS]}.safetensors"

    def read(self) -> _Step | None:
        """Return the layer's step, None where it is not there."""
        path = self._path
        if path is None or not path.exists():
            return None
        file = TensorFile(path)
        shift = file.read("shift").copy() if "shift" in file.specs else None
        loss, deficient = file.read("loss")
        return _Step(file.read("weights").copy(), shift, float(loss), bool(deficient))

    def write(self, step: _Step) -> None:
        """Keep the layer's step."""
        path = self._path
        if path is None:
            return
        tensors: dict[str, npt.NDArray[Any]] = {"weights": step.weights, "loss": np.array([step.loss, step.deficient])}
        if step.shift is not None:
            tensors["shift"] = step.shift
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        specs = [(key, array.dtype, array.shape) for key, array in tensors.items()]
        with TensorWriter(temporary, specs, {"format": "rerampile-pruned-layer"}, lasting=False) as writer:
            for key in writer.specs:
                writer.write(key, tensors[key])
        temporary.replace(path)
