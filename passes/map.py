"""Map: choose how each layer's weights become pairs of conductances, and their full scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from rerampile.background import side_by_side
from rerampile.errors import ConfigError, ModelError
from rerampile.layer import Layer
from rerampile.passes.clip import clipped, unclipped
from rerampile.passes.correct import corrected
from rerampile.passes.spend import expected_noise
from rerampile.passes.weigh import Candidate, stuck_cell, weigh
from rerampile.schemes import SCHEMES, WEIGHED, Coding, Scheme, row_chunks
from rerampile.segments import Segments
from rerampile.target import Target
from rerampile.unit import InputMoments, MappedLayer, Unit

__all__ = ["Map", "coding_for"]

Floats = npt.NDArray[np.float32]

_MOMENTS_HELD = 1 << 30  # bytes of second moments of inputs at a time


@dataclass(frozen=True)
class Map:
    """The coding and the gains; the cells themselves are computed while they are written."""

    name: str = "map"

    def run(self, unit: Unit) -> Unit:
        """Fill ``mapped``.

        Raises:
            ModelError: A weight is NaN, infinite or too large.
            ConfigError: The cells have too few levels for the scheme.
        """
        weighed = unit.options.mapping in WEIGHED
        codings = [coding_for(unit, scheme) for scheme in SCHEMES if weighed or scheme == unit.options.mapping]
        possible = [coding for coding in codings if coding.span > 0]
        if not possible:
            raise ConfigError(
                f"mapping '{codings[0].scheme}': one cell of {codings[0].levels} levels holds zero and weights of one "
                f"sign only; use more levels or slices, or a scheme with a pair of cells"
            )
        found = side_by_side(lambda layer: _map_layer(unit, layer, possible), unit.layers)
        mapped = dict(zip((layer.name for layer in unit.layers), found, strict=True))
        calibrated = unit.calibration is not None or unit.options.spend_spare_arrays
        return replace(unit, mapped=_calibrated(unit, mapped) if calibrated else mapped)

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the scheme, or how many layers have which, and the number of weights."""
        weights = sum(layer.view.shape[0] * layer.view.shape[1] for layer in unit.layers)
        scheme: str = unit.options.mapping
        if scheme == "auto":
            counts = Counter(mapped.coding.scheme for mapped in unit.mapped.values())
            scheme = f"auto ({', '.join(f'{name} {counts[name]}' for name in SCHEMES if counts[name])})"
        summary = {"scheme": scheme, "scale": unit.options.scale, "weights": weights}
        clips = [mapped.clip for mapped in unit.mapped.values() if mapped.clip is not None]
        return summary | ({"clipped": sum(clip.clipped for clip in clips)} if clips else {})


def coding_for(unit: Unit, scheme: Scheme) -> Coding:
    """Return the coding of weights into the target's cells under a mapping scheme."""
    if scheme != "optimal":
        return plain_coding(unit.target, scheme)
    pair = plain_coding(unit.target, "balanced")
    common_modes = stuck_cell(unit, pair).common_modes(pair, unit.options.current_weight)
    return replace(pair, scheme=scheme, common_modes=common_modes)


def plain_coding(target: Target, scheme: Scheme) -> Coding:
    """Return the coding under a scheme that does not depend on faults; ``optimal`` holds the same values as others."""
    cell = target.cell
    return Coding(
        scheme=scheme,
        g_off=cell.g_off,
        g_on=cell.g_on,
        levels=cell.levels,
        level_table=cell.level_table,
        slices=target.slices,
    )


def _map_layer(unit: Unit, layer: Layer, codings: Sequence[Coding]) -> MappedLayer:
    """Map one layer with the best of some codings."""
    smallest, largest, nonzero = _survey(unit, layer)
    magnitude = np.maximum(largest, -smallest)  # NaN and infinity survive both
    if not np.isfinite(magnitude).all():
        raise ModelError(
            f"{unit.model.name}: layer '{layer.name}' has a weight that is NaN, infinite or beyond float32 in output "
            f"{int(np.flatnonzero(~np.isfinite(magnitude))[0])}, expected finite numbers; export the model again"
        )
    limits = [float(np.finfo(np.float32).max) * coding.span for coding in codings]
    most = float(magnitude.max(initial=0))
    if most > max(limits):
        raise ModelError(
            f"{unit.model.name}: layer '{layer.name}': weights of up to {most:.3g}, expected at most "
            f"{max(limits):.3g}, where weight per siemens still fits float32; scale the model down"
        )
    segments = _segments(unit, layer, nonzero)
    scale = _full_scale(unit, layer, magnitude, segments)
    candidates = [
        _candidate(unit, layer, coding, smallest, largest, scale)
        for coding, limit in zip(codings, limits, strict=True)
        if most <= limit
    ]
    chosen, choice = candidates[0], None
    if unit.options.mapping in WEIGHED:
        chosen, choice = weigh(unit, layer, nonzero, segments, candidates)
    return MappedLayer(
        coding=chosen.coding,
        gain=chosen.gain,
        segments=segments,
        nonzero=nonzero,
        zeros=0 if nonzero is None else nonzero.size - int(np.count_nonzero(nonzero)),
        choice=choice,
    )


def _calibrated(unit: Unit, mapped: Mapping[str, MappedLayer]) -> dict[str, MappedLayer]:
    """Clip, correct and weigh layers, as many at a time as the moments of their inputs leave memory for."""
    found: dict[str, MappedLayer] = {}
    for layers in _within(unit.layers, _MOMENTS_HELD):
        wanted = [layer for layer in layers if not layer.integer]
        moments, reasons = unit.calibration(wanted) if unit.calibration and wanted else ({}, {})
        reasons = {layer.name: "its weights are whole numbers" for layer in layers if layer.integer} | dict(reasons)
        found |= {layer.name: mapped[layer.name] for layer in layers}
        found |= {name: unclipped(unit, mapped[name], reason) for name, reason in reasons.items()}
        for layer in (layer for layer in layers if layer.name in moments):
            result, seen = mapped[layer.name], moments[layer.name]
            result = clipped(unit, layer, result, seen) if unit.options.clip else result
            found[layer.name] = corrected(unit, layer, result, seen) if unit.options.correct else result
        if unit.options.spend_spare_arrays:
            found |= _with_noise(unit, layers, found, moments)
    return found


def _with_noise(
    unit: Unit, layers: Sequence[Layer], mapped: Mapping[str, MappedLayer], moments: Mapping[str, InputMoments]
) -> dict[str, MappedLayer]:
    """Return layers with what stuck cells are expected to do to them, inputs counted alike where none were seen."""

    def one(layer: Layer) -> MappedLayer:
        result = mapped[layer.name]
        return replace(result, noise=expected_noise(unit, layer, result, moments.get(layer.name)))

    return dict(zip((layer.name for layer in layers), side_by_side(one, layers), strict=True))


def _within(layers: Sequence[Layer], most: int) -> Iterator[list[Layer]]:
    """Yield layers in order, as many at once as have at most so many bytes of second moments, but at least one."""
    chosen: list[Layer] = []
    held = 0
    for layer in layers:
        size = 8 * layer.view.groups * layer.view.inputs**2
        if chosen and held + size > most:
            yield chosen
            chosen, held = [], 0
        chosen.append(layer)
        held += size
    yield chosen


def _candidate(unit: Unit, layer: Layer, coding: Coding, smallest: Floats, largest: Floats, scale: Floats) -> Candidate:
    """Return a coding with its gains.

    Whole-numbered weights on cells of whole steps keep whole-numbered values: their own where the cells have enough
    steps, else multiples of the least whole number of which none is off by more than half.

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        coding: The coding.
        smallest: Smallest weight of each output.
        largest: Largest weight of each output.
        scale: Full scales.
    """
    if layer.integer and coding.holds_integers(float(smallest.min()), float(largest.max())):
        return Candidate(coding=coding, gain=np.ones_like(scale))
    gain = coding.gain(scale)
    if layer.integer and coding.integer:
        limits = _limits(unit, layer)
        if unit.options.scale == "tensor":  # all outputs are alike
            smallest, largest = np.full_like(smallest, smallest.min()), np.full_like(largest, largest.max())
            limits = np.broadcast_to([limits[:, 0].max(), limits[:, 1].min()], limits.shape)
        across = (slice(None), *[None] * (scale.ndim - 1))
        ends = np.stack([np.maximum(-scale, smallest[across]), np.minimum(scale, largest[across])], axis=-1)
        limits = np.repeat(limits, gain.size // len(limits), axis=0)
        gain = _whole_gains(coding, np.ceil(gain.reshape(-1)), ends.reshape(-1, 2), limits).reshape(gain.shape)
    return Candidate(coding=coding, gain=gain)


def _whole_gains(coding: Coding, ample: Floats, ends: Floats, limits: Floats) -> Floats:
    """Return the least whole gains with which no weight is off by more than half a level, nor beyond its type.

    Where none keeps weights within their type, that is left out: the model cannot be verified then, which says so.

    Args:
        coding: The coding.
        ample: Whole gains with which all weights fit, [gains].
        ends: The smallest and the largest weight behind each, [gains, 2].
        limits: The least and the largest that its type holds, [gains, 2].
    """
    most = np.abs(ends).max(axis=1)  # at this gain, the larger end is one step
    near, found = np.zeros((2, len(ends)), np.float32)
    waiting = np.flatnonzero(most)
    for whole in range(1, int(most.max(initial=0)) + 1):
        gain = np.full(len(waiting), whole, np.float32)
        held = coding.decode(coding.encode(ends[waiting], gain), gain)
        close = (np.abs(held - ends[waiting]) <= coding.error_bound(gain)[:, None]).all(axis=1)
        inside = (held[:, 0] >= limits[waiting, 0]) & (held[:, 1] <= limits[waiting, 1])
        near[waiting[close & (near[waiting] == 0)]] = whole
        found[waiting[close & inside]] = whole
        waiting = waiting[~(close & inside) & (whole < most[waiting])]
    return np.where(found > 0, found, np.where(near > 0, near, ample))


def _limits(unit: Unit, layer: Layer) -> Floats:
    """Return the least and the largest that a weight of each output can be, less its zero point, [outputs, 2]."""
    info = np.iinfo(helper.tensor_dtype_to_np_dtype(layer.element_type))
    ends, rows = np.array([info.min, info.max], np.float32), layer.view.shape[0]
    if layer.zero_point is None:
        return np.broadcast_to(ends, (rows, 2))
    zero = unit.graph.read(layer.zero_point).astype(np.float32)
    if zero.size == 1:
        return np.broadcast_to(ends - zero.reshape(()), (rows, 2))
    zeros = layer.view.matrix(np.broadcast_to(zero.reshape(layer.zero_point_shape), layer.view.tensor_shape))
    return np.stack([ends[0] - zeros.min(axis=1), ends[1] - zeros.max(axis=1)], axis=1)


def _survey(unit: Unit, layer: Layer) -> tuple[Floats, Floats, npt.NDArray[np.bool_] | None]:
    """Return the smallest and the largest weight of each output, and where weights are not zero: None for everywhere.

    The weights are read once, some outputs at a time.
    """
    weights, shape = unit.weight_rows(layer), layer.view.shape
    smallest, largest = np.empty(shape[0], np.float32), np.empty(shape[0], np.float32)
    nonzero: npt.NDArray[np.bool_] | None = None
    for rows in row_chunks(shape):
        part = weights(rows)
        part.min(axis=1, out=smallest[rows])
        part.max(axis=1, out=largest[rows])
        filled = part != 0
        if not filled.all():
            nonzero = np.ones(shape, np.bool_) if nonzero is None else nonzero
            nonzero[rows] = filled
    return smallest, largest, nonzero


def _segments(unit: Unit, layer: Layer, nonzero: npt.NDArray[np.bool_] | None) -> Segments:
    """Return the ranges of inputs with gains of their own: as much as the rows of one array hold, or everything."""
    if unit.options.scale != "partition":
        return Segments.whole(layer.view.inputs)
    needed = np.ones(layer.view.inputs, np.bool_) if nonzero is None else nonzero.any(axis=0)
    return Segments.by_rows(np.asarray(needed), unit.target.rows)


def _full_scale(unit: Unit, layer: Layer, magnitude: Floats, segments: Segments) -> Floats:
    """Return full scales that hold all weights, [groups * outputs] or [groups * outputs, segments].

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        magnitude: Largest magnitude of each output.
        segments: The ranges of inputs with gains of their own.
    """
    if unit.options.scale == "tensor":
        return np.full_like(magnitude, magnitude.max(initial=0))
    if unit.options.scale == "channel":
        return magnitude
    weights = unit.weight_rows(layer)
    return np.concatenate([segments.full_scale(weights(rows)) for rows in row_chunks(layer.view.shape)])
