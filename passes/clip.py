"""Clip: full scales below the largest magnitude, where the least expected error of a layer's outputs asks for it.

Stuck cells do errors in proportion to the full scale, so that a few large weights cost all others. Held as large as a
smaller full scale, they cost an error of their own. What either does to the outputs depends on the inputs, which
calibration images show (:mod:`rerampile.passes.full_scale`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rerampile.layer import Layer
from rerampile.passes.correct import shared_moment
from rerampile.passes.full_scale import FaultNoise, Losses, losses_of
from rerampile.passes.weigh import placed, stuck_cell
from rerampile.plan import ClipPlan
from rerampile.unit import InputMoments, MappedLayer, Unit

__all__ = ["clipped", "unclipped"]

Doubles = npt.NDArray[np.float64]


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
    losses = _losses(unit, layer, mapped, weights, seen)
    scale, error, before = losses.least()
    below = np.broadcast_to(scale < losses.top, len(weights))
    gain = np.where(below, mapped.coding.gain(np.broadcast_to(scale, len(weights))), mapped.gain)
    limit = np.where(below, gain * np.float32(mapped.coding.span), np.float32(np.inf))
    energy, change = _energies(layer, weights, limit, seen.square)
    return replace(
        mapped,
        gain=gain,
        limit=limit,
        clip=ClipPlan(
            clipped=int(np.count_nonzero(np.abs(weights) > limit[:, None])),
            full_scale=float(np.divide(scale, losses.top, out=np.ones_like(scale), where=losses.top > 0).mean()),
            output_change=change / energy,
            error=float(error.sum()) / energy,
            error_unclipped=float(before.sum()) / energy,
            reason=None,
        ),
    )


def _losses(unit: Unit, layer: Layer, mapped: MappedLayer, weights: Doubles, seen: InputMoments) -> Losses:
    """Return the expected errors of the outputs, or of all of them as one where they share a full scale."""
    noise = FaultNoise.of(mapped.coding, stuck_cell(unit, mapped.coding))
    noise = noise.unbiased() if unit.options.correct else noise
    shared_by_chips = shared_moment(unit, layer, seen)
    held, shared = placed(layer, mapped.nonzero), unit.options.scale == "tensor"
    sizes = np.abs(weights[weights != 0])
    floor = np.full(layer.view.outputs, np.median(sizes) if sizes.size else 0.0) if shared else None
    groups = [slice(start, start + layer.view.outputs) for start in range(0, len(weights), layer.view.outputs)]
    losses = Losses.stacked(
        [
            losses_of(weights[rows], held[rows], moment, noise, power=np.diagonal(square), floor=floor)
            for rows, moment, square in zip(groups, shared_by_chips, seen.square, strict=True)
        ]
    )
    return losses.together() if shared else losses


def _energies(layer: Layer, weights: Doubles, limit: npt.NDArray[np.float32], moment: Doubles) -> tuple[float, float]:
    """Return the energy of the products, 1 where there is none, and of what clipping changes them by."""
    shape = (layer.view.groups, layer.view.outputs, layer.view.inputs)
    off = np.clip(weights, -limit[:, None], limit[:, None]) - weights
    energy, change = (
        float(np.einsum("goi,goi->", part @ moment, part)) for part in (weights.reshape(shape), off.reshape(shape))
    )
    return energy or 1.0, change
