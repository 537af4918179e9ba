"""Clip: full scales below the largest magnitude, where the least expected error of a layer's outputs asks for it.

Stuck cells do errors in proportion to the full scale, so that a few large weights cost all others. Held as large as a
smaller full scale, they cost an error of their own. What either does to the outputs depends on the inputs, which
calibration images show (:mod:`rerampile.passes.full_scale`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.layer import Layer
from rerampile.layer_plan import ClipPlan
from rerampile.passes.correct import shared_moment
from rerampile.passes.full_scale import FaultNoise, Losses, least_by_segment, losses_of
from rerampile.passes.weigh import placed, stuck_cell
from rerampile.unit import InputMoments, MappedLayer, Unit

__all__ = ["clipped", "unclipped"]

Doubles = npt.NDArray[np.float64]

_WEIGHTS = 1 << 17  # weights whose losses are handled at a time: some 500 bytes each


def unclipped(unit: Unit, mapped: MappedLayer, reason: str) -> MappedLayer:
    """Return a layer as it is, with the reason why nothing of it is clipped where that was asked for."""
    if not unit.options.clip:
        return mapped
    clip = ClipPlan(clipped=0, full_scale=1.0, output_change=0.0, error=None, error_unclipped=None, reason=reason)
    return replace(mapped, clip=clip)


def clipped(unit: Unit, layer: Layer, mapped: MappedLayer, seen: InputMoments) -> MappedLayer:
    """Return a layer with the full scales of the least expected error.

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        mapped: How its weights become cells, with the largest magnitudes as full scales.
        seen: Moments of its inputs.
    """
    weights = unit.weights(layer).astype(np.float64)
    scale, error, before = _least(unit, layer, mapped, weights, seen)
    top = _largest(unit, mapped, np.abs(weights))
    below = np.broadcast_to(scale < top, mapped.gain.shape)
    gain = np.where(below, mapped.coding.gain(np.broadcast_to(scale, below.shape)), mapped.gain)
    limit = np.where(below, gain * np.float32(mapped.coding.span), np.float32(np.inf))
    spread = np.broadcast_to(mapped.segments.spread(limit), weights.shape)
    energy, change = _energies(layer, weights, spread, seen.square)
    return replace(
        mapped,
        gain=gain,
        limit=limit,
        clip=ClipPlan(
            clipped=int(np.count_nonzero(np.abs(weights) > spread)),
            full_scale=float(np.divide(scale, top, out=np.ones_like(scale), where=top > 0).mean()),
            output_change=change / energy,
            error=float(error.sum()) / energy,
            error_unclipped=float(before.sum()) / energy,
            reason=None,
        ),
    )


def _least(
    unit: Unit, layer: Layer, mapped: MappedLayer, weights: Doubles, seen: InputMoments
) -> tuple[Doubles, Doubles, Doubles]:
    """Return the best full scales, their errors and those of the largest magnitudes.

    They are of each output, or of all outputs together where these share a full scale; full scales may be of each
    segment of each output.
    """
    problems = _problems(unit, layer, mapped, weights, seen)
    if unit.options.scale == "tensor":
        sizes = np.abs(weights[weights != 0])
        floor = float(np.quantile(sizes, 0.75)) if sizes.size else 0.0
        return Losses.together(losses_of(**problem, floor=floor) for problem in problems).least()
    if unit.options.scale == "partition":
        found = [least_by_segment(**problem, segments=mapped.segments) for problem in problems]
    else:
        found = [losses_of(**problem).least() for problem in problems]
    scale, error, before = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return scale, error, before


def _problems(
    unit: Unit, layer: Layer, mapped: MappedLayer, weights: Doubles, seen: InputMoments
) -> Iterator[dict[str, Any]]:
    """Yield what the expected errors of all outputs depend on, some at a time."""
    noise = FaultNoise.of(mapped.coding, stuck_cell(unit, mapped.coding))
    noise = noise.unbiased() if unit.options.correct else noise
    held, shared = placed(layer, mapped.nonzero), shared_moment(unit, layer, seen)
    step = max(1, _WEIGHTS // layer.view.inputs)
    for group, (moment, square) in enumerate(zip(shared, seen.square, strict=True)):
        end = (group + 1) * layer.view.outputs
        for start in range(group * layer.view.outputs, end, step):
            rows = slice(start, min(start + step, end))
            yield {
                "weights": weights[rows],
                "placed": held[rows],
                "moment": moment,
                "noise": noise,
                "power": np.diagonal(square),
            }


def _largest(unit: Unit, mapped: MappedLayer, sizes: Doubles) -> Doubles:
    """Return the largest of the magnitudes that share a full scale, shaped as full scales that were found."""
    if unit.options.scale == "partition":
        return mapped.segments.largest(sizes)
    largest: Doubles = np.asarray(sizes.max(axis=None if unit.options.scale == "tensor" else 1))
    return largest


def _energies(layer: Layer, weights: Doubles, limit: npt.NDArray[np.float32], moment: Doubles) -> tuple[float, float]:
    """Return the energy of the products, 1 where there is none, and of what clipping changes them by."""
    shape = (layer.view.groups, layer.view.outputs, layer.view.inputs)
    off = np.clip(weights, -limit, limit) - weights
    energy, change = (
        float(np.einsum("goi,goi->", part @ moment, part)) for part in (weights.reshape(shape), off.reshape(shape))
    )
    return energy or 1.0, change
