"""Correct: digital gains and biases that make up for what stuck cells do to a layer's outputs on average.

Chips read the weights ``c`` as ``(1 - p) c`` on average, for ``offset`` with a shift, and clipping made ``c`` of the
user's weights ``w``. That is the same on every chip, and digital numbers beside the crossbar can undo much of it: a
factor of each output, which is part of its gain, and an addend, which is part of its bias.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.editable_model import can_shift
from rerampile.layer import Layer
from rerampile.layer_plan import CorrectionPlan
from rerampile.passes.weigh import placed, stuck_cell
from rerampile.schemes import row_chunks
from rerampile.stuck_cell import StuckCell
from rerampile.unit import InputMoments, MappedLayer, Unit

__all__ = ["corrected", "noise_energies", "products", "shared_moment"]

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def shared_moment(unit: Unit, layer: Layer, seen: InputMoments) -> Doubles:
    """Return the second moment that errors of all chips count by, float64 [groups, inputs, inputs].

    It is the one around the mean where a bias makes up for the mean error of each output.
    """
    if unit.options.correct and can_shift(unit.graph, layer):
        return seen.square - seen.mean[:, :, None] * seen.mean[:, None, :]
    return seen.square


def corrected(unit: Unit, layer: Layer, mapped: MappedLayer, seen: InputMoments) -> MappedLayer:
    """Return a layer whose outputs on the mean chip are as near to the user's as gains and biases bring them.

    With the mean weights ``v`` of all chips an output is ``a v x + b``. The factor ``a`` is the one for which
    ``a (1 - p) c x`` comes nearest to ``w x`` on the calibration images, ``1 / (1 - p)`` where nothing is clipped, and
    ``b`` makes the means equal. What differs from chip to chip has no part in it: the factor of the least mean squared
    error of each layer would make all outputs smaller, and made networks worse.

    Args:
        unit: The compilation, up to *prune*.
        layer: The layer.
        mapped: How its weights become cells, clipped or not.
        seen: Moments of its inputs.
    """
    shape = (layer.view.groups, layer.view.outputs, layer.view.inputs)
    wanted = unit.weights(layer).astype(np.float64)
    limit = None if mapped.limit is None else mapped.segments.spread(mapped.limit)
    held = wanted if limit is None else np.clip(wanted, -limit, limit)
    stuck = stuck_cell(unit, mapped.coding)
    signal = (1 - stuck.loss) * held
    shift = stuck.shift(mapped.coding) * mapped.segments.spread(mapped.gain).astype(np.float64)
    there = placed(layer, mapped.nonzero)
    mean = signal + shift * there
    noise = noise_energies(layer, mapped, stuck, held, there, seen)
    shared = shared_moment(unit, layer, seen)
    alike = products(signal, shared, signal)
    factor = np.divide(products(wanted, shared, signal), alike, out=np.ones_like(alike), where=alike > 0)
    factor = np.where(factor > 0, factor, 1.0).astype(np.float32).astype(np.float64)
    off = wanted - factor[:, None] * mean
    addend = None
    if can_shift(unit.graph, layer):
        scale = layer.uses[0][0].attribute("alpha", 1.0)  # of a Gemm: acts on products alone
        addend = scale * (off.reshape(shape) @ seen.mean[:, :, None]).reshape(-1)
    energy = float(products(wanted, seen.square, wanted).sum()) or 1.0
    before = products(wanted - mean, seen.square, wanted - mean) + noise
    after = products(off, shared, off) + factor**2 * noise
    return replace(
        mapped,
        gain=(mapped.gain.T * factor).T.astype(np.float32),  # of all segments of an output
        factor=factor.astype(np.float32),
        addend=addend,
        correction=CorrectionPlan(
            gain=float(factor.mean()),
            bias=addend is not None,
            error=float(after.sum()) / energy,
            error_uncorrected=float(before.sum()) / energy,
        ),
    )


def products(one: Doubles, moment: Doubles, other: Doubles) -> Doubles:
    """Return E[(one x) (other x)] of each output, float64 [groups * outputs], for a second moment of the inputs."""
    shape = (len(moment), -1, moment.shape[1])
    found: Doubles = np.einsum("goi,goi->go", one.reshape(shape) @ moment, other.reshape(shape)).reshape(-1)
    return found


def noise_energies(
    layer: Layer,
    mapped: MappedLayer,
    stuck: StuckCell,
    held: npt.NDArray[Any],
    there: Flags,
    seen: InputMoments | None,
) -> Doubles:
    """Return the expected energy of what differs from chip to chip in each output, float64 [groups * outputs].

    Args:
        layer: The layer.
        mapped: How its weights become cells.
        stuck: How one of them fails.
        held: The weights that they hold, [groups * outputs, inputs].
        there: Which weights take cells, [groups * outputs, inputs].
        seen: Moments of the inputs; None for inputs of a mean square of 1.
    """
    coding = mapped.coding
    power: npt.NDArray[Any] = np.ones((len(held), 1), np.float32)
    if seen is not None:
        power = np.repeat(np.diagonal(seen.square, axis1=1, axis2=2), layer.view.outputs, axis=0)
    noise = np.empty(len(held))
    for rows in row_chunks(held.shape):
        gain = mapped.segments.spread(mapped.gain[rows])
        variance = stuck.variance_of(coding, coding.encode(held[rows].astype(np.float32, copy=False), gain), gain)
        noise[rows] = np.sum(variance * power[rows], axis=1, where=there[rows])
    return noise
