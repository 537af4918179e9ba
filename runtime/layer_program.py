"""One layer on its way onto one chip: what each step of programming changes, and what errors it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from rerampile.deployment import Deployment, layer_coding
from rerampile.plan import ChipLayer, Unrepaired
from rerampile.runtime.compensation import HitWeights, compensated
from rerampile.runtime.inject import LayerCells, LayerFaults
from rerampile.runtime.repair import best_gain, output_energies, repair_errors
from rerampile.runtime.stuck_cells import StuckCells

__all__ = ["STEPS", "LayerProgram"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
_Kind = TypeVar("_Kind", bound=np.generic)

STEPS = ("compensate", "assign", "flip", "repair", "gain")
"""What can be done, in this order."""

LISTED = 100  # weights that stay wrong
_WRONG = 1e-6  # of an output's full scale: more than rounding
_GAINS = (0.5, 2.0)  # by how much a gain may change


class LayerProgram:
    """The targets of one layer's cells, its gains and its changed roles, step by step.

    Args:
        deployment: The compiled deployment.
        number: Position of the layer in the plan.
        stuck: The chip's stuck cells that matter to it.
        blocks: First column segment, and rows of the matrix in the order of segments, of each of its pieces whose
            outputs may change places.
        moments: Mean of x x^T of its inputs, float32 [groups, inputs, inputs]; None where it is not known.

    Attributes:
        cells: Targets as stored, [slices, cells, groups * outputs, inputs]; stuck cells at the nearest to what they
            are.
        gain: float32 [groups * outputs].
        order: By the first column segment of a piece, the rows of the matrix in the order of its segments, where
            that was changed.
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
        blocks: Sequence[tuple[int, Integers]] = (),
    ) -> None:
        self.plan, self._number, self._stuck, self._moments = deployment.plan.layers[number], number, stuck, moments
        self._coding = layer_coding(deployment.target, self.plan)
        self._compiled = deployment.cells(self.plan)
        self.gain = self._compiled_gain = deployment.gain(self.plan)
        self._wanted = self._coding.decode(self._compiled, self.gain)
        self._full_scale = np.abs(self.gain) * np.float32(self._coding.span)
        self._hit = HitWeights.of(self._coding, stuck)
        self.cells = self._compiled
        self._set(self._hit.as_stuck(self._coding, self._at_hit(self._compiled)))
        self._blocks = blocks
        self.order: dict[int, Integers] = {}
        self.flipped = np.zeros(0, np.int64)
        self.energy = float(output_energies(self._shaped(self._wanted), moments).sum())
        self._compensating = False
        self.errors: list[float] = []
        self.touched: list[int] = []
        self.flips: list[int] = []
        self._note()

    def step(self, name: str) -> None:
        """Take a step, and note what it leaves."""
        if len(self._stuck.part):
            steps = (self._compensate, self._assign, self._flip, self._repair, self._adjust)
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
        return LayerCells(self.plan, self._coding, cells, gain).faults(self._number, StuckCells(**columns))

    def weights(self) -> Floats:
        """Return the weights as the chip reads them now, float32 [groups * outputs, inputs]."""
        weights, faults = self._coding.decode(self.cells, self.gain), self.faults
        weights.reshape(-1)[faults.index] = faults.value
        return weights

    def _note(self) -> None:
        energy = output_energies(self._shaped(self.weights() - self._wanted), self._moments).sum()
        self.errors.append(float(energy / self.energy) if self.energy else 0.0)
        same = np.count_nonzero(self.cells == self._compiled)
        held = self._at_hit(self.cells) != self._at_hit(self._compiled)
        self.touched.append(self.cells.size - int(same) - int(np.count_nonzero(held & self._turned().stuck)))
        self.flips.append(len(self.flipped))

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
        """Let outputs of each piece change places where that leaves less error, best of all orders of its columns."""
        row_of = self._stuck.position // self.plan.inputs
        for first, rows in self._blocks:
            costs = self._assignment_costs(first, rows)
            outputs, slots = linear_sum_assignment(costs)
            if costs[outputs, slots].sum() >= costs.trace():
                continue
            order = rows.copy()
            order[slots] = rows[outputs]
            self.order[first] = order
            mine = (self._stuck.segment >= first) & (self._stuck.segment < first + len(rows))
            row_of[mine] = order[self._stuck.segment[mine] - first]
        position = row_of * self.plan.inputs + self._stuck.position % self.plan.inputs
        self._stuck = StuckCells(**{**vars(self._stuck), "position": position})
        self._hit, self.cells = HitWeights.of(self._coding, self._stuck), self._compiled
        self._set(self._aimed(self._turned()))

    def _assignment_costs(self, first: int, rows: Integers) -> Doubles:
        """Return the energy of each output of a piece, by the column segment that it would be on, [outputs, slots]."""
        hit, inputs = self._hit, self.plan.inputs
        chosen = np.flatnonzero((hit.segment >= first) & (hit.segment < first + len(rows)))
        input_ = np.tile(hit.index[chosen] % inputs, len(rows))
        row = np.repeat(rows, len(chosen))
        sites = HitWeights(
            index=row * inputs + input_,
            segment=np.tile(hit.segment[chosen], len(rows)),
            stuck=np.tile(hit.stuck[:, :, chosen], len(rows)),
            worth=np.tile(hit.worth[:, :, chosen], len(rows)),
        )
        key = np.repeat(np.arange(len(rows)), len(chosen)) * len(rows) + sites.segment - first
        straight, changed = self._energies(sites, key, len(rows) ** 2)
        return np.minimum(straight, changed).reshape(len(rows), len(rows))

    def _energies(self, hit: HitWeights, key: Integers, count: int) -> tuple[Doubles, Doubles]:
        """Return energies of errors, summed by keys below ``count``: with roles as they are, and changed."""
        slices, pair, rows, inputs = self._compiled.shape
        compiled = self._compiled.reshape(slices, pair, rows * inputs)[:, :, hit.index]
        wanted = self._coding.difference(compiled)
        row, input_ = np.divmod(hit.index, inputs)
        scale = np.square(self.gain.astype(np.float64))[row]
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
        errors = self.weights() - self._wanted
        free = self._wanted != 0
        free.reshape(-1)[self.faults.index] = False
        moved = repair_errors(self._shaped(errors), self._shaped(free), self._moments).reshape(errors.shape)
        before, targets = self.cells, self._wanted + np.where(free, moved, np.float32(0))
        held = self._at_hit(before)
        self.cells = np.where(
            (moved != 0).any(axis=1)[:, None] & free, self._coding.encode(targets, self.gain), self.cells
        )
        self._set(held)
        self._keep_better(errors, before, self.gain)

    def _adjust(self) -> None:
        """Change the gain of each output where that leaves less error."""
        weights = self.weights()
        factor = best_gain(self._shaped(weights), self._shaped(self._wanted), self._moments).reshape(-1)
        before, self.gain = self.gain, (self.gain * np.clip(factor, *_GAINS)).astype(np.float32)
        self._keep_better(weights - self._wanted, self.cells, before)

    def _keep_better(self, errors: Floats, cells: Array, gain: Floats) -> None:
        """Put outputs back whose energy has not fallen.

        Args:
            errors: Errors before, [groups * outputs, inputs].
            cells: Cells before.
            gain: Gains before.
        """
        energy = output_energies(self._shaped(errors), self._moments).reshape(-1)
        now = output_energies(self._shaped(self.weights() - self._wanted), self._moments).reshape(-1)
        better = now < energy
        self.cells = self.cells if cells is self.cells else np.where(better[:, None], self.cells, cells)
        self.gain = np.where(better, self.gain, gain)

    def _wrong(self) -> tuple[Integers, Floats]:
        """Return the weights that faults hit and that stay wrong, and how far they are off under the compiled gain."""
        faults = self._faults(self._compiled_gain)
        error = faults.value - self._wanted.reshape(-1)[faults.index]
        wrong = np.abs(error) > _WRONG * self._full_scale[faults.index // self.plan.inputs]
        return faults.index[wrong], error[wrong]

    def record(self) -> ChipLayer:
        """Return what the plan says of the layer."""
        home = self._stuck.at_home
        return ChipLayer(
            stuck=len(home),
            beside=int(np.count_nonzero(~home)),
            weights=len(self.faults.index),
            unrepaired=len(self._wrong()[0]),
            measure="plain" if self._moments is None else "moments",
            energy=self.energy,
            errors=self.errors,
        )

    def unrepaired(self) -> list[Unrepaired]:
        """Return the worst of the weights that stay wrong, the worst first."""
        index, error = self._wrong()
        row, input_ = np.divmod(index, self.plan.inputs)
        share = np.square(error.astype(np.float64))
        if self._moments is not None:
            share *= self._moments[row // self.plan.outputs, input_, input_]
        share /= self.energy or 1.0
        worst = np.argsort(-share, kind="stable")[:LISTED].tolist()
        wanted = self._wanted.reshape(-1)[index]
        return [
            Unrepaired(
                layer=self._number,
                output=int(row[i]),
                input=int(input_[i]),
                wanted=float(wanted[i]),
                found=float(wanted[i] + error[i]),
                share=float(share[i]),
            )
            for i in worst
        ]
