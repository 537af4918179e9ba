"""How much of each layer is pruned: as asked, by one threshold for several layers, or allotted by sensitivity."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, did_you_mean
from rerampile.passes.pruning.constraint import Floats, check_ratio, keep_largest
from rerampile.passes.pruning.problem import LayerProblem
from rerampile.passes.pruning.refit import refit_support

if TYPE_CHECKING:
    from rerampile.layer import Layer

__all__ = [
    "allotted_ratios",
    "asked_ratios",
    "layer_names",
    "loss_table",
    "protected_layers",
    "relative_scores",
    "threshold_ratios",
]

_CEILING = 0.98
"""The largest share of a layer that goes where several layers share a budget: a dead layer is a dead network."""

_TABLE_STEPS = 10


def asked_ratios(asked: Mapping[str, float], layers: Sequence[Layer]) -> dict[str, float]:
    """Return the pruning ratio of each layer named by a user; what is named later wins.

    Args:
        asked: Ratios by block (number of output channels) or pattern of a layer name, in order.
        layers: All layers of the model.

    Raises:
        ConfigError: A ratio is outside [0, 1), or a key names no block and no layer.
    """
    ratios: dict[str, float] = {}
    for key, ratio in asked.items():
        check_ratio(ratio, "--prune " if key == "*" else f"--prune {key}=")
        hit = _named(key, layers, f"--prune {key}={ratio:g}")
        ratios.update({layer.name: ratio for layer in hit})
    return ratios


def protected_layers(words: Sequence[str], layers: Sequence[Layer]) -> set[str]:
    """Return the names of layers that are not to be pruned.

    Args:
        words: ``first`` and ``last`` of the model's order, and blocks or patterns of layer names.
        layers: All layers of the model, in its order.

    Raises:
        ConfigError: A word names no block and no layer.
    """
    ends = {"first": layers[:1], "last": layers[-1:]}
    found = [ends[word] if word in ends else _named(word, layers, f"--protect {word}") for word in words]
    return {layer.name for hit in found for layer in hit}


def layer_names(layer: Layer) -> list[str]:
    """Return every name by which a user may call a layer: its own, its tensor's, its nodes'."""
    names = [layer.name, layer.tensor.name, *(node.full_name for node, _ in layer.uses)]
    return list(dict.fromkeys([*names, *(node.name for node, _ in layer.uses)]))


def _named(key: str, layers: Sequence[Layer], option: str) -> list[Layer]:
    """Return the layers of a block or of a name pattern.

    Raises:
        ConfigError: There are none.
    """
    hit = [layer for layer in layers if key == layer.block] or [layer for layer in layers if _matches(key, layer)]
    if not hit:
        known = {layer.block for layer in layers} | {layer.name for layer in layers}
        raise ConfigError(
            f"{option}: no block and no layer of that name; expected a number of output channels or a layer name "
            f"pattern{did_you_mean(key, known)}"
        )
    return hit


def _matches(pattern: str, layer: Layer) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in layer_names(layer))


def relative_scores(problem: LayerProblem) -> Floats:
    """Return what removing each weight alone costs, as a share of the mean square of the layer's outputs.

    ``importance * weight**2`` over ``tr(W H W^T)``. As shares of outputs, scores of layers with large and small signals
    can be compared, and a weight among many others counts for less.
    """
    energy = problem.loss(np.zeros_like(problem.weights))
    return problem.importance[:, None] * problem.weights**2 / (energy if energy > 0 else 1.0)


def threshold_ratios(scores: Mapping[str, Floats], ratio: float) -> dict[str, float]:
    """Return the ratio of each layer if the weights below one common threshold go.

    Args:
        scores: Scores of the weights by layer name, comparable between layers (:func:`relative_scores`).
        ratio: Share of all weights; no layer loses more than 98 %.

    Raises:
        ConfigError: The ratio is outside [0, 0.98].
    """
    if not 0 <= ratio <= _CEILING:
        raise ConfigError(f"pruning ratio {ratio:g}: expected 0 to {_CEILING:g}, the most that a layer may lose")
    most = {name: math.floor(_CEILING * part.size) for name, part in scores.items()}
    weakest = [np.sort(scores[name], axis=None)[:count] for name, count in most.items()]
    remove = round(ratio * sum(part.size for part in scores.values()))
    kept = np.split(keep_largest(np.concatenate(weakest), remove), np.cumsum(list(most.values()))[:-1])
    return {
        name: (len(flags) - int(np.count_nonzero(flags))) / part.size
        for (name, part), flags in zip(scores.items(), kept, strict=True)
    }


def loss_table(problem: LayerProblem, grid: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return roughly what pruning a layer costs at each ratio, as a share of the mean square of its outputs.

    A cheap stand-in for an engine: the weights of the smallest ``importance * weight**2`` go, and a few steps of
    conjugate gradients correct the others. What the layer does to the accuracy of the network is not in it.
    """
    scores = relative_scores(problem)
    energy = problem.loss(np.zeros_like(problem.weights)) or 1.0
    losses = np.zeros(len(grid))
    for number, ratio in enumerate(grid):
        kept = keep_largest(scores.reshape(-1), round(ratio * scores.size)).reshape(scores.shape)
        losses[number] = problem.loss(refit_support(problem, kept, steps=_TABLE_STEPS)) / energy
    return losses


def allotted_ratios(
    losses: Mapping[str, Sequence[float] | npt.NDArray[np.float64]],
    grid: Sequence[float],
    sizes: Mapping[str, int],
    ratio: float,
) -> dict[str, float]:
    """Return the ratio of each layer so that the sum of losses is smallest for a share of all weights.

    Losses between the points of the grid are taken from the lower convex hull of each layer's table. The smallest sum
    then has one marginal loss a weight in all layers, and is found by spending the budget on the flattest pieces first.

    Args:
        losses: By layer name, the loss at each ratio of the grid.
        grid: Ratios, ascending from zero.
        sizes: By layer name, the number of weights.
        ratio: Share of all weights.

    Raises:
        ConfigError: The ratio is outside [0, last of the grid].
    """
    if not 0 <= ratio <= grid[-1]:
        raise ConfigError(f"pruning ratio {ratio:g}: expected 0 to {grid[-1]:g}, the largest that a layer may take")
    pieces = []
    for name, table in losses.items():
        corners = _lower_hull(np.asarray(grid, np.float64), np.asarray(table, np.float64))
        for (start, low), (end, high) in itertools.pairwise(corners):
            count = (end - start) * sizes[name]
            pieces.append(((high - low) / count, name, count))
    budget = ratio * sum(sizes[name] for name in losses)
    taken = dict.fromkeys(losses, 0.0)
    for _, name, count in sorted(pieces, key=lambda piece: piece[0]):
        part = min(count, budget)
        taken[name] += part
        budget -= part
    return {name: min(count / sizes[name], grid[-1]) for name, count in taken.items()}


def _lower_hull(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull of points with ascending ``x``."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
