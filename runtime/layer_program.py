"""One layer on its way onto one chip: what each step of programming changes, and what errors it leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rerampile.chip_plan import ChipLayer, Unrepaired
from rerampile.deployment import Deployment
from rerampile.errors import ConfigError
from rerampile.runtime.compensation import HitWeights, compensated
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.inject import LayerCells, LayerFaults, Leaks
from rerampile.runtime.repair import best_gain, output_energies, repair_errors
from rerampile.runtime.stuck_cells import StuckCells

__all__ = ["CALIBRATED", "LISTED", "STEPS", "UNCALIBRATED", "LayerProgram", "require_programmable"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
_Kind = TypeVar("_Kind", bound=np.generic)

STEPS = ("compensate", "assign", "flip", "repair", "gain", "bias")
"""What can be done, in this order."""

CALIBRATED = ("repair", "bias")
"""Steps that need to know what layers see."""

UNCALIBRATED = ("compensate", "assign", "flip")
"""Steps that are good for a chip where nobody knows: a gain fitted to sums of squares often is not."""

LISTED = 100  # weights that stay wrong
_WRONG = 1e-6  # of an output's full scale: more than rounding
_LARGEST_GAIN = 1e15  # the square of an output of such weights is far from the largest float32
_GAINS = (0.5, 2.0)  # by how much a gain may change


def require_programmable(deployment: Deployment) -> None:
    """Refuse a chip's deployment, and one with copies: one set of cells cannot make up for stuck ones of each of them.

    Raises:
        ConfigError: It is a chip's already, a layer is held several times, or slices of it are.
    """
    if deployment.plan.chip is not None:
        raise ConfigError(f"{deployment.folder}: programmed already, expected a deployment written by compile")
    if deployment.plan.protection is not None:
        raise ConfigError(
            f"{deployment.folder}: has copies of slices, whose votes programming does not know; compile it without "
            f"--protect-msb"
        )
    for layer in deployment.plan.layers:
        if not deployment.gain(layer).max(initial=0) < _LARGEST_GAIN:
            raise ConfigError(f"{deployment.folder}: weights of layer '{layer.name}' are too large to be squared")
    layer = max(deployment.plan.layers, key=lambda layer: layer.copy_count)
    if layer.copy_count > 1:
        raise ConfigError(
            f"{deployment.folder}: layer '{layer.name}' is held in {layer.copy_count} copies, of which each would need "
            f"cells of its own, expected one of every layer; compile without --spend-spare-arrays"
        )


class LayerProgram:
    """The targets of one layer's cells, its gains and its changed roles, step by step.

    Args:
        deployment: The compiled deployment.
        number: Position of the layer in the plan.
        stuck: The chip's stuck cells that matter to it.
        moments: Mean of x x^T of its inputs, float32 [groups, inputs, inputs]; None where it is not known.
        placed: The chip's stuck cells that matter once its inputs and outputs have other places.
        mean: Mean of its inputs, float32 [groups, inputs], where it has a bias that can be shifted.
        failed: Cells of the chip that have failed: of a pair that is cut off, the other one is stuck, too. None where
            each stuck cell has failed.

    Attributes:
        cells: Targets as stored, [slices, cells, groups * outputs, inputs]; stuck cells at the nearest to what they
            are.
        gain: float32 [groups * outputs] or [groups * outputs, segments].
        shift: float64 [groups * outputs], what is added to its products.
        flipped: int64, the column segments with changed roles, ascending.
        errors: Energy of the errors before and after each step so far, as a share of ``energy``.
        touched: Healthy cells with another target than compiled, before and after each step so far.
        flips: Changed segments before and after each step so far.
    """

    def __init__(
        self,
        deployment: Deployment,
        number: int,
        stuck: StuckCells,
        moments: Floats | None,
        placed: StuckCells | None = None,
        mean: Floats | None = None,
        failed: Integers | None = None,
    ) -> None:
        self.plan, self._number, self._stuck, self._moments = deployment.plan.layers[number], number, stuck, moments
        self._layer, self._geometry = LayerCells.of(deployment, self.plan), ChipGeometry.of(deployment)
        self._coding, self._segments = self._layer.coding, self._layer.segments
        self._compiled = deployment.cells(self.plan)
        self._failed = failed
        self.gain = self._compiled_gain = self._layer.gain
        self.shift = np.zeros(len(self.gain))
        self._wanted = self._coding.decode(self._compiled, self._segments.spread(self.gain))
        self._full_scale = np.abs(self.gain) * np.float32(self._coding.span)
        self._hit = HitWeights.of(self._coding, stuck)
        self.cells = self._compiled
        self._set(self._hit.as_stuck(self._coding, self._at_hit(self._compiled)))
        self._placed, self._mean = stuck if placed is None else placed, mean
        self.flipped = np.zeros(0, np.int64)
        self.energy = float(output_energies(self._shaped(self._wanted), moments).sum())
        self._compensating = self._adjusting = False
        self.errors: list[float] = []
        self.touched: list[int] = []
        self.flips: list[int] = []
        self._note()

    def step(self, name: str) -> None:
        """Take a step, and note what it leaves."""
        if len(self._stuck.part) or len(self._placed.part):
            steps = (self._compensate, self._assign, self._flip, self._repair, self._adjust, self._shift)
            dict(zip(STEPS, steps, strict=True))[name]()
        self._note()

    @property
    def faults(self) -> LayerFaults:
        """What the chip's faults do to the layer as it is now."""
        return self._faults(self.gain)

    def _faults(self, gain: Floats) -> LayerFaults:
        turned = np.isin(self._stuck.segment, self.flipped)
        columns = {**vars(self._stuck), "part": self._stuck.part ^ turned}
        cells = self.cells.reshape(self._coding.slices * self._coding.cells, -1)
        return replace(self._layer, cells=cells, gain=gain).faults(self._number, StuckCells(**columns))

    def weights(self) -> Floats:
        """Return the weights as the chip reads them now, float32 [groups * outputs, inputs]."""
        return self._read(self.faults)

    def _read(self, faults: LayerFaults) -> Floats:
        weights = self._coding.decode(self.cells, self._segments.spread(self.gain))
        weights.reshape(-1)[faults.index] = faults.value
        return weights

    def _note(self) -> None:
        energy = float(self._left().sum())
        self.errors.append(energy / self.energy if self.energy else 0.0)
        same = np.count_nonzero(self.cells == self._compiled)
        held = self._at_hit(self.cells) != self._at_hit(self._compiled)
        self.touched.append(self.cells.size - int(same) - int(np.count_nonzero(held & self._turned().stuck)))
        self.flips.append(len(self.flipped))

    def _left(self) -> Doubles:
        """Return the energy of the present errors of each output, [groups * outputs]."""
        faults = self.faults
        return self._energy(self._read(faults) - self._wanted, faults.leaks)

    def _energy(self, errors: Floats, leaks: Leaks | None) -> Doubles:
        """Return the energy of errors and leaks of each output, [groups * outputs]."""
        energies = output_energies(self._shaped(errors), self._moments).reshape(-1)
        if self.shift.any():  # a variance, but for rounding: moments and means are float32
            energies = np.maximum(energies + self.shift * (self.shift + 2 * self._means(errors)), 0.0)
        return energies if leaks is None else energies + self._leaked(leaks)

    def _leaked(self, leaks: Leaks) -> Doubles:
        """Return the energy that inputs of other groups add to each output, [groups * outputs].

        As if these had nothing in common with the output's own inputs, nor with one another.
        """
        power = np.square(leaks.value.astype(np.float64))
        if self._moments is not None:
            power *= np.einsum("gii->gi", self._moments).reshape(-1)[leaks.in_row]
        return np.bincount(leaks.out_row, power, self.plan.groups * self.plan.outputs).astype(np.float64)

    def _means(self, errors: Floats) -> Doubles:
        """Return the mean that errors add to each output, [groups * outputs]."""
        mean = np.zeros((self.plan.groups, self.plan.inputs), np.float32) if self._mean is None else self._mean
        means: Doubles = np.einsum("goi,gi->go", self._shaped(errors), mean, dtype=np.float64)
        return means.reshape(-1)

    def _shaped(self, matrix: npt.NDArray[_Kind]) -> npt.NDArray[_Kind]:
        """Return a matrix [groups * outputs, inputs] as [groups, outputs, inputs]."""
        return matrix.reshape(self.plan.groups, self.plan.outputs, self.plan.inputs)

    def _at_hit(self, cells: Array) -> Array:
        slices, pair, rows, inputs = cells.shape
        found: Array = cells.reshape(slices, pair, rows * inputs)[:, :, self._hit.index]
        return found

    def _set(self, cells: Array) -> None:
        """Give the weights that are hit other cells."""
        if len(self._hit.index):
            self.cells = self.cells.copy()
            self.cells.reshape(*cells.shape[:2], -1)[:, :, self._hit.index] = cells

    def _turned(self) -> HitWeights:
        """Return the stuck cells under the present roles."""
        return self._hit.turned(np.isin(self._hit.segment, self.flipped)) if len(self.flipped) else self._hit

    def _aimed(self, hit: HitWeights) -> Array:
        """Return the cells of weights that are hit: compensated where that step was taken, else as compiled."""
        return self._targets(hit, self._at_hit(self._compiled))

    def _targets(self, hit: HitWeights, compiled: Array) -> Array:
        if not self._compensating:
            return hit.as_stuck(self._coding, compiled)
        return compensated(self._coding, hit, compiled, self._coding.difference(compiled))

    def _compensate(self) -> None:
        self._compensating = True
        self._set(self._aimed(self._turned()))

    def _assign(self) -> None:
        """Move inputs and outputs to their other places, where other cells are stuck."""
        self._stuck = self._placed
        self._hit, self.cells = HitWeights.of(self._coding, self._stuck), self._compiled
        self._set(self._aimed(self._turned()))

    def _energies(self, hit: HitWeights, key: Integers, count: int) -> tuple[Doubles, Doubles]:
        """Return energies of errors, summed by keys below ``count``: with roles as they are, and changed."""
        slices, pair, rows, inputs = self._compiled.shape
        compiled = self._compiled.reshape(slices, pair, rows * inputs)[:, :, hit.index]
        wanted = self._coding.difference(compiled)
        row, input_ = np.divmod(hit.index, inputs)
        scale = np.square(self._segments.at(self.gain, hit.index).astype(np.float64))
        if self._moments is not None:
            scale = scale * self._moments[row // self.plan.outputs, input_, input_]
        turned = hit.turned(np.ones(len(hit.index), np.bool_)) if pair == 2 else hit
        found: list[Doubles] = []
        for way in (hit, turned):
            error = way.difference(self._coding, self._targets(way, compiled)) - wanted
            found.append(np.bincount(key, scale * np.square(error), count).astype(np.float64))
        return found[0], found[1]

    def _flip(self) -> None:
        """Change the roles of each column segment where that leaves less error (TFix, ReTern: column sign flips)."""
        if self._coding.cells != 2:
            return
        segments, at = np.unique(self._hit.segment, return_inverse=True)
        straight, changed = self._energies(self._hit, at, len(segments))
        self.flipped = segments[changed < straight]
        self._set(self._aimed(self._turned()))

    def _repair(self) -> None:
        """Move healthy weights; zeros stay zero, and outputs whose energy would not fall stay as they are."""
        if self._moments is None:
            return
        faults = self.faults
        errors = self._read(faults) - self._wanted
        free = self._wanted != 0
        free.reshape(-1)[faults.index] = False
        moved = repair_errors(self._shaped(errors), self._shaped(free), self._moments).reshape(errors.shape)
        before, targets = self.cells, self._wanted + np.where(free, moved, np.float32(0))
        held = self._at_hit(before)
        encoded = self._coding.encode(targets, self._segments.spread(self.gain))
        self.cells = np.where((moved != 0).any(axis=1)[:, None] & free, encoded, self.cells)
        self._set(held)
        self._keep_better(self._energy(errors, faults.leaks), before, self.gain)

    def _adjust(self) -> None:
        """Change the gain of each output where that leaves less error."""
        self._adjusting = True
        self._fit(self._moments)

    def _fit(self, moments: Floats | None, shifting: bool = False) -> None:
        """Fit gains by second moments, and shifts that make means equal, where that leaves less error."""
        energy, before = self._left(), self.gain
        if self._adjusting:
            factor = best_gain(self._shaped(self.weights()), self._shaped(self._wanted), moments).reshape(-1)
            change = np.clip(factor * (before / self._compiled_gain).T, *_GAINS)
            self.gain = (self._compiled_gain.T * change).T.astype(np.float32)
        if shifting:
            self.shift = -self._means(self.weights() - self._wanted)
        self._keep_better(energy, self.cells, before)

    def _shift(self) -> None:
        """Shift outputs so that their means are right, and fit gains to what differs from the means."""
        if self._moments is not None and self._mean is not None:
            self._fit(self._moments - self._mean[:, :, None] * self._mean[:, None, :], shifting=True)

    def _keep_better(self, energy: Doubles, cells: Array, gain: Floats) -> None:
        """Put outputs back whose energy has not fallen.

        Args:
            energy: Energy of the errors before, [groups * outputs].
            cells: Cells before.
            gain: Gains before.
        """
        better = self._left() < energy
        self.cells = self.cells if cells is self.cells else np.where(better[:, None], self.cells, cells)
        self.gain = np.where(better, self.gain.T, gain.T).T
        self.shift = np.where(better, self.shift, 0.0)

    def _wrong(self) -> tuple[Integers, Floats]:
        """Return which of the weights that faults hit stay wrong, and how far they are off under the compiled gain."""
        faults = self._faults(self._compiled_gain)
        error = faults.value - self._wanted.reshape(-1)[faults.index]
        wrong = np.flatnonzero(np.abs(error) > _WRONG * self._segments.at(self._full_scale, faults.index))
        return wrong, error[wrong]

    def record(self, bias: str = "", scale: float = 1.0) -> ChipLayer:
        """Return what the plan says of the layer.

        Args:
            bias: The initializer of its bias, where that can be shifted.
            scale: What its products are multiplied by before the bias is added.
        """
        home, shifted = self._stuck.at_home, bool(self.shift.any())
        beside = ~home
        if self.plan.groups_take_turns:  # cells that join two of them do nothing
            beside &= self._stuck.in_group == self._stuck.position // (self.plan.inputs * self.plan.outputs)
        return ChipLayer(
            stuck=int(np.count_nonzero(home | beside)),
            beside=int(np.count_nonzero(beside)),
            weights=len(self.faults.index),
            unrepaired=len(self._wrong()[0]),
            measure="plain" if self._moments is None else "moments",
            energy=self.energy,
            errors=self.errors,
            bias=bias if shifted else None,
            shift=(scale * self.shift).astype(np.float32).tolist() if shifted else [],
        )

    def unrepaired(self) -> list[Unrepaired]:
        """Return the worst of the weights that stay wrong, the worst first."""
        (wrong, error), faults = self._wrong(), self.faults
        index, found = faults.index[wrong], faults.value[wrong]
        row, input_ = np.divmod(index, self.plan.inputs)
        share = np.square(error.astype(np.float64))
        if self._moments is not None:
            share *= self._moments[row // self.plan.outputs, input_, input_]
        share /= self.energy or 1.0
        cell = self._stuck.cell
        named = np.arange(len(cell)) if self._failed is None else np.flatnonzero(np.isin(cell, self._failed))
        position, first = np.unique(self._stuck.position[named], return_index=True)
        array, line, column = self._geometry.locate(cell[named[first[np.searchsorted(position, index)]]])
        worst = np.argsort(-share, kind="stable")[:LISTED].tolist()
        wanted = self._wanted.reshape(-1)[index]
        return [
            Unrepaired(
                layer=self._number,
                output=int(row[i]),
                input=int(input_[i]),
                wanted=float(wanted[i]),
                found=float(found[i]),
                share=float(share[i]),
                array=int(array[i]),
                row=int(line[i]),
                column=int(column[i]),
            )
            for i in worst
        ]
