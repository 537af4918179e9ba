"""Weigh mapping schemes for one layer: the error and the current that each is expected to have, and the best of them.

Everything comes from the cells that a scheme would program, in closed form (Yuan et al. 2021 for the fault model). Of
the inputs nothing is known, so all count alike, and independent errors of weights add up by their squares. The shift
that ``offset`` gives to all weights of an output is no such error: it adds up over the inputs. It counts as it does
where inputs are of one sign and one size, as the square of the whole output's shift. That is its worst case, and
close to what happens behind a Relu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rerampile.layer import Layer
from rerampile.layer_plan import MappingChoice, SchemeEstimate
from rerampile.schemes import Coding, row_chunks
from rerampile.segments import Segments
from rerampile.stuck_cell import StuckCell
from rerampile.unit import Unit

__all__ = ["Candidate", "placed", "stuck_cell", "weigh"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_TIE = 1e-5  # costs closer than this are the same but for float32 rounding


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to code a layer.

    Attributes:
        coding: The coding.
        gain: float32 [groups * outputs] or [groups * outputs, segments], weight units a unit of difference.
    """

    coding: Coding
    gain: Floats


def stuck_cell(unit: Unit, coding: Coding) -> StuckCell:
    """Return how the cells of a coding fail, by the probabilities of the options."""
    options = unit.options
    stuck = {"stuck_off": options.stuck_off or 0.0, "stuck_on": options.stuck_on or 0.0}
    return StuckCell.of(unit.target, coding, {**stuck, **options.categories})


def weigh(
    unit: Unit, layer: Layer, nonzero: Flags | None, segments: Segments, candidates: Sequence[Candidate]
) -> tuple[Candidate, MappingChoice]:
    """Return the candidate that the options ask for, and why.

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        nonzero: bool [groups * outputs, inputs], where a weight is not zero; None for everywhere.
        segments: The ranges of inputs that gains are for.
        candidates: All codings that can hold the layer, in the order that decides between equal ones.
    """
    estimates = _estimates(unit, layer, nonzero, segments, candidates)
    costs = [estimate.cost for estimate in estimates]
    if unit.options.mapping == "auto":
        best = next(n for n, cost in enumerate(costs) if cost <= min(costs) * (1 + _TIE))
    else:
        best = next(n for n, candidate in enumerate(candidates) if candidate.coding.scheme == unit.options.mapping)
    return candidates[best], MappingChoice(reason=_reason(unit, estimates, best), estimates=estimates)


def _reason(unit: Unit, estimates: Sequence[SchemeEstimate], best: int) -> str:
    chosen = estimates[best]
    measure = "error and current" if unit.options.current_weight else "error"
    if not chosen.cost:
        return f"{chosen.scheme}: no weight has an {measure} to expect"
    others = ", ".join(
        f"{estimate.scheme} {estimate.cost / chosen.cost:.3g}" for estimate in estimates if estimate is not chosen
    )
    why = f"least expected {measure}" if unit.options.mapping == "auto" else f"asked for; expected {measure}"
    return f"{chosen.scheme}: {why}; the others, times as much: {others}"


def _estimates(
    unit: Unit, layer: Layer, nonzero: Flags | None, segments: Segments, candidates: Sequence[Candidate]
) -> list[SchemeEstimate]:
    """Return the estimate of each candidate; the weights are read once, some outputs at a time."""
    weights, held = unit.weight_rows(layer), placed(layer, nonzero)
    sums = [_Sums.of(unit, candidate, segments, layer.view.shape[0]) for candidate in candidates]
    power = 0.0
    for rows in row_chunks(layer.view.shape):
        part, cells = weights(rows), held[rows]
        power += float(np.square(part, dtype=np.float64).sum())
        for each in sums:
            each.add(rows, part, cells)
    pair = next(candidate for candidate in candidates if candidate.coding.cells == 2)
    full_scale = pair.gain.reshape(len(pair.gain), -1).astype(np.float64) * pair.coding.span
    inputs = np.stack([held[:, part].sum(axis=1, dtype=np.float64) for part in segments.slices], axis=1)
    return [each.estimate(inputs, full_scale, power or 1.0, unit.options.current_weight) for each in sums]


def placed(layer: Layer, nonzero: Flags | None) -> Flags:
    """Return which weights take cells, [groups * outputs, inputs], as far as that is known before allocation."""
    view = layer.view
    if nonzero is None:
        return np.broadcast_to(np.True_, view.shape)
    inputs: Flags = np.asarray(nonzero.reshape(view.groups, view.outputs, view.inputs).any(axis=1))
    outputs: Flags = np.asarray(nonzero.any(axis=1, keepdims=True))
    return outputs & np.repeat(inputs, view.outputs, axis=0)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over the weights of each segment of each output under one candidate.

    Attributes:
        candidate: The candidate.
        segments: The ranges of inputs.
        stuck: How its cells fail.
        errors: Expected squared errors but for the shift, in units of difference, float64 [groups * outputs, segments].
        currents: Conductances of pairs, averaged over slices, siemens, float64 of the same shape.
    """

    candidate: Candidate
    segments: Segments
    stuck: StuckCell
    errors: Doubles
    currents: Doubles

    @classmethod
    def of(cls, unit: Unit, candidate: Candidate, segments: Segments, outputs: int) -> _Sums:
        errors, currents = np.zeros((2, outputs, len(segments.starts)))
        stuck = stuck_cell(unit, candidate.coding)
        return cls(candidate=candidate, segments=segments, stuck=stuck, errors=errors, currents=currents)

    def add(self, rows: slice, weights: Floats, placed: Flags) -> None:
        """Add some outputs.

        Args:
            rows: Which.
            weights: float32 [outputs, inputs].
            placed: bool [outputs, inputs], which of them take cells.
        """
        coding = self.candidate.coding
        cells = coding.encode(weights, self.segments.spread(self.candidate.gain[rows]))
        errors = self.stuck.variance_of(coding, cells, np.ones((len(weights), 1), np.float32))
        errors += np.square(np.float32(self.stuck.loss) * coding.difference(cells))
        currents = coding.conductance(cells).sum(axis=(0, 1)) / coding.slices
        for k, part in enumerate(self.segments.slices):
            self.errors[rows, k] = errors[:, part].sum(axis=1, where=placed[:, part], dtype=np.float64)
            self.currents[rows, k] = currents[:, part].sum(axis=1, where=placed[:, part], dtype=np.float64)

    def estimate(self, inputs: Doubles, full_scale: Doubles, power: float, current_weight: float) -> SchemeEstimate:
        """Return what they come to.

        Args:
            inputs: Weights of each segment of each output that take cells, [groups * outputs, segments].
            full_scale: Weight of the largest difference of a pair, of the same shape.
            power: Sum of all squared weights.
            current_weight: What a unit of current counts, in squared full scales.
        """
        coding = self.candidate.coding
        gain = self.candidate.gain.reshape(inputs.shape).astype(np.float64)
        shift = self.stuck.shift(coding) * inputs
        between = np.square((gain * shift).sum(axis=1)) - np.square(gain * shift).sum(axis=1)  # shifts of segments
        error = float(np.sum(gain**2 * (self.errors + shift**2)) + between.sum()) / power
        conductance, count = float(self.currents.sum()), float(inputs.sum())
        drawn = (self.currents - coding.cells * coding.g_off * inputs) / (coding.g_on - coding.g_off)
        return SchemeEstimate(
            scheme=coding.scheme,
            error=error,
            pair_conductance=conductance / count if count else 0.0,
            cost=error + current_weight * float(np.sum(full_scale**2 * drawn)) / power,
        )
