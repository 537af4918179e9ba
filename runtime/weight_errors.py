"""What faults do to the weights of a layer on average: closed forms over its cells, from the plan alone.

Errors of cells (:class:`rerampile.stuck_cell.StuckCell`) add up to those of weights, whatever the scheme: the two cells
of a pair leave a mean of ``-p w``, and the one of ``offset`` leaves ``-p w`` and the same shift for all weights of an
output.

The cells beside the blocks of an array hold zero weights, whose errors let inputs leak into other outputs. Each leak is
as large on average as if its input fed an output of its own group, which is where it is counted.

Errors of the copies of a layer, of which the mean is read, are independent: their mean has the same mean, and the
variance of one of them divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import Partition
from rerampile.deployment import Deployment, layer_coding, layer_segments
from rerampile.runtime.faults import FaultModel
from rerampile.schemes import row_chunks
from rerampile.slice_copies import protected_outputs
from rerampile.stuck_cell import StuckCell

__all__ = ["LayerErrors", "OffsetSums"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OffsetSums:
    """What the shift of ``offset`` weights needs of the inputs, output channels of the same pattern taken together.

    Channel ``c`` of pattern ``q`` is shifted by ``size[c] * sum(sums[q] * inputs)``, but for a factor.

    Attributes:
        sums: float32 [groups, patterns, kernel, inputs], which inputs the shift adds up.
        products: float32 [groups, patterns, kernel, inputs], the weights of channels times their sizes, summed up.
        energy: float64 [groups, patterns], the squared sizes of channels, summed up.
        share: float64 [groups, patterns], how many of the group's channels have the pattern, as a share.
        mixing: float64 [groups, groups], how much of the sums of one group (column) leaks into another (row), or None.
    """

    sums: Floats
    products: Floats
    energy: Doubles
    share: Doubles
    mixing: Doubles | None


class LayerErrors:
    """Means and variances of the weights of one layer.

    Args:
        deployment: The deployment.
        number: Position of the layer in the plan.
    """

    def __init__(self, deployment: Deployment, number: int) -> None:
        self.layer = layer = deployment.plan.layers[number]
        self._deployment, self._coding = deployment, layer_coding(deployment.target, layer)
        self._gain, self._segments = deployment.gain(layer), layer_segments(layer)
        self._arrays = [
            [p for p in array.partitions if p.layer == number]
            for array in deployment.plan.arrays
            if not array.is_second_twin and any(p.layer == number for p in array.partitions)
        ]
        self._placed = np.zeros((layer.groups, layer.outputs, layer.inputs), np.bool_)
        for partition in (p for partitions in self._arrays for p in partitions):
            self._placed[np.ix_(*_places(partition))] = True
        self._counted = self._means_of_three(number)
        transposed = layer.uses[0].op == "ConvTranspose"
        self.kernel = math.prod(layer.weight_shape[2:]) if transposed else 1  # outputs of one output channel

    def stuck(self, model: FaultModel) -> StuckCell:
        """Return how one of the layer's cells fails."""
        by_weight = model.rate_unit == "weight"
        return StuckCell.of(self._deployment.target, self._coding, model.probabilities, by_weight=by_weight)

    def shift(self, model: FaultModel) -> float:
        """Return what the mean error of each weight is beside what it loses, in units of its gain."""
        return self.stuck(model).shift(self._coding)

    def mean_weights(self, model: FaultModel) -> Floats:
        """Return each weight as it is on average, float32 [groups * outputs, inputs]; leaks have no part in it."""
        mean = self._deployment.weights(self.layer) * np.float32(1 - self.stuck(model).loss)
        shift = np.float32(self.shift(model)) * self._segments.spread(self._gain)
        return mean + shift * self._placed.reshape(mean.shape) if shift.any() else mean

    def variance(self, model: FaultModel) -> Floats:
        """Return the variance of each weight and of its leaks, float32 [groups * outputs, inputs]."""
        out = np.empty((self.layer.groups * self.layer.outputs, self.layer.inputs), np.float32)
        for rows, part in self._variances(model):
            out[rows] = part
        return out

    def total_variances(self, model: FaultModel) -> Doubles:
        """Return the variances of all output channels added up, float64 [groups, kernel, inputs]."""
        layer = self.layer
        total = np.zeros((layer.groups * self.kernel, layer.inputs))
        for rows, part in self._variances(model):
            number = np.arange(rows.start, rows.start + len(part))
            target = number // layer.outputs * self.kernel + number % self.kernel
            if self.kernel == 1:  # rows of a group follow one another
                starts = np.flatnonzero(np.diff(target, prepend=-1))
                total[target[starts]] += np.add.reduceat(part, starts, axis=0, dtype=np.float64)
            else:
                np.add.at(total, target, part)
        return total.reshape(layer.groups, self.kernel, layer.inputs)

    def _variances(self, model: FaultModel) -> Iterator[tuple[slice, Floats]]:
        """Yield the variances, some rows of the matrix at a time."""
        layer, coding, stuck = self.layer, self._coding, self.stuck(model)
        cells, leaks = self._deployment.cells(layer), self._leaks(stuck)
        placed = self._placed.reshape(-1, layer.inputs)
        for rows in row_chunks((len(placed), layer.inputs)):
            counted = None if self._counted is None else self._counted[:, rows]
            gain = self._segments.spread(self._gain[rows])
            part = stuck.variance_of(coding, cells[:, :, rows], gain, counted)
            part *= placed[rows]
            if layer.copy_count > 1:
                part /= np.float32(layer.copy_count)
            if leaks is not None:
                part += leaks[rows]
            yield rows, part
        self._deployment.conductances.drop_pages()

    def _means_of_three(self, number: int) -> Floats | None:
        """Return what variances of cells count, [slices, groups * outputs, 1], a third where copies make a mean."""
        protection = self._deployment.plan.protection
        if protection is None:
            return None
        outputs = protected_outputs(self._deployment.plan)[number]
        counted = np.ones((self.layer.slices, len(outputs), 1), np.float32)
        counted[-protection.slices :, outputs] = 1 / 3
        return counted

    def _leaks(self, stuck: StuckCell) -> Floats | None:
        """Return the variances of leaks, float32 [groups * outputs, inputs], at the group that each comes from."""
        layer = self.layer
        shared = [partitions for partitions in self._arrays if _blocks(partitions) > 1]
        if not shared:
            return None
        zero = self._coding.zero_cells[:, :, None, None]
        gain = self._gain.reshape(-1, 1)
        each = stuck.variance_of(self._coding, zero, gain).reshape(layer.groups, layer.outputs, -1)
        leaks = np.zeros((layer.groups, layer.outputs, layer.inputs), np.float32)
        for partitions in shared:
            own, read = [], np.zeros((layer.groups, layer.outputs), np.float32)
            for partition in partitions:
                groups, outputs, inputs = _places(partition)
                own.append(np.zeros((len(groups), layer.outputs), np.float32))
                of_column = each[:, :, self._segments.number_of(inputs[0])]
                own[-1][:, outputs] = of_column[np.ix_(groups, outputs)]
                read[groups] += own[-1]
            for partition, part in zip(partitions, own, strict=True):
                groups, _, inputs = _places(partition)
                together = read[groups] if layer.groups_take_turns else read.sum(axis=0)
                leaks[np.ix_(groups, np.arange(layer.outputs), inputs)] += (together - part)[:, :, None]
        leaks /= np.float32(layer.copy_count**2)  # summed over copies, whose places may differ
        return leaks.reshape(-1, layer.inputs)

    def offset_sums(self) -> OffsetSums | None:
        """Return what the shift of ``offset`` needs; None for pairs, which have none."""
        if self._coding.cells == 2:
            return None
        layer, kernel = self.layer, self.kernel
        shape = (layer.groups, layer.outputs // kernel, kernel)
        gain = self._segments.spread(self._gain).reshape(*shape, -1)
        placed = self._placed.reshape(*shape, layer.inputs)
        size = gain.max(axis=(2, 3)).astype(np.float64)
        patterns: dict[bytes, int] = {}
        sums: list[Floats] = []
        label = np.empty(size.shape, np.int64)
        for channel in np.ndindex(*size.shape):
            ratio = gain[channel] / gain[channel].max()
            label[channel] = patterns.setdefault(placed[channel].tobytes() + ratio.tobytes(), len(patterns))
            if len(patterns) > len(sums):
                sums.append(placed[channel] * ratio)
        of_pattern = np.where(label[:, None] == np.arange(len(patterns))[:, None], 1.0, 0.0)
        weights = self._deployment.weights(layer).reshape(*shape, layer.inputs)
        products = np.einsum("gqc,gc,gcki->gqki", of_pattern, size, weights, optimize=True)
        return OffsetSums(
            sums=np.broadcast_to(np.array(sums), products.shape),
            products=products.astype(np.float32),
            energy=np.einsum("gqc,gc->gq", of_pattern, size**2),
            share=of_pattern.mean(axis=2),
            mixing=self._mixing(),
        )

    def _mixing(self) -> Doubles | None:
        """Return how much of each group's inputs the columns of each group see beside their own block."""
        shared = [partitions for partitions in self._arrays if _blocks(partitions) > 1]
        if not shared:
            return None
        groups = self.layer.groups
        inputs = np.maximum(self._placed.any(axis=1).sum(axis=1), 1)
        outputs = np.maximum(self._placed.any(axis=2).sum(axis=1), 1)
        mixing = np.zeros((groups, groups))
        for partitions in shared:
            driven, read = np.zeros(groups), np.zeros(groups)
            for partition in partitions:
                held = np.arange(*partition.groups)
                rows, columns = partition.input_count / inputs[held], partition.output_count / outputs[held]
                driven[held] += rows
                read[held] += columns
                mixing[held, held] -= rows * columns
            touched = np.flatnonzero(driven)
            mixing[np.ix_(touched, touched)] += np.outer(read[touched], driven[touched])
        return mixing / self.layer.copy_count


def _places(partition: Partition) -> tuple[Integers, Integers, Integers]:
    """Return the groups, outputs and inputs of a partition."""
    outputs, inputs = partition.output_indices, partition.input_indices
    return np.arange(*partition.groups), np.array(outputs, np.int64), np.array(inputs, np.int64)


def _blocks(partitions: list[Partition]) -> int:
    return sum(partition.groups[1] - partition.groups[0] for partition in partitions)
