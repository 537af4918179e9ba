"""The sums of a plan, counted from its layers, its arrays and what takes no cells."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rerampile.array_plan import ArrayPlan, Region
from rerampile.layer_plan import LayerPlan
from rerampile.plan import Totals
from rerampile.target import Target

__all__ = ["arrays_needed", "arrays_spent", "totals_of", "weights_without_cells"]


def totals_of(
    target: Target,
    layers: Sequence[LayerPlan],
    skipped: Sequence[Region],
    arrays: Sequence[ArrayPlan],
    *,
    digital: int,
    arrays_without_pruning: int,
    arrays_before_packing: int,
) -> Totals:
    """Return the sums of a plan.

    Args:
        target: The hardware.
        layers: The layers.
        skipped: What takes no cells.
        arrays: The arrays.
        digital: Number of digital operations.
        arrays_without_pruning: What allocation with no row and no column left out would take.
        arrays_before_packing: What allocation without packing would take.
    """
    left_out = weights_without_cells(len(layers), skipped)
    counts = [layer.groups * layer.outputs * layer.inputs for layer in layers]
    held = [count - without for count, without in zip(counts, left_out, strict=True)]
    on_arrays = [layer.copy_count * count for layer, count in zip(layers, held, strict=True)]
    pairs = sum(p.cells * count * p.mean_cell_conductance for p, count in zip(layers, on_arrays, strict=True))
    weights, zeros = sum(counts), sum(layer.zeros for layer in layers)
    cells = len(arrays) * target.rows * target.columns
    used = sum(_weights_of(array) * len(array.roles) * len(array.slices) for array in arrays)
    return Totals(
        layers=len(layers),
        weights=weights,
        zeros=zeros,
        sparsity=zeros / weights if weights else 0.0,
        arrays=len(arrays),
        partitions=sum(len(array.partitions) for array in arrays),
        cells=cells,
        cells_used=used,
        utilisation=used / cells if cells else 0.0,
        arrays_without_pruning=arrays_without_pruning,
        arrays_before_packing=arrays_before_packing,
        arrays_saved_by_pruning=arrays_without_pruning - arrays_before_packing,
        arrays_saved_by_packing=arrays_before_packing - arrays_needed(arrays),
        weights_without_cells=sum(left_out),
        mean_pair_conductance=pairs / sum(on_arrays) if any(held) else 0.0,
        digital_operations=digital,
        arrays_spent=arrays_spent(arrays) if any(layer.copies for layer in layers) else msgspec.UNSET,
    )


def arrays_spent(arrays: Sequence[ArrayPlan]) -> int:
    """Return how many arrays hold nothing but further copies of layers."""
    return sum(bool(array.partitions) and all(partition.copy for partition in array.partitions) for array in arrays)


def arrays_needed(arrays: Sequence[ArrayPlan]) -> int:
    """Return how many arrays hold the first copy of something: those that there are without any further copies."""
    return sum(any(not partition.copy for partition in array.partitions) for array in arrays)


def weights_without_cells(layers: int, skipped: Sequence[Region]) -> list[int]:
    """Return how many weights of each layer take no cells."""
    counts = [0] * layers
    for region in skipped:
        counts[region.layer] += region.input_count * region.output_count
    return counts


def _weights_of(array: ArrayPlan) -> int:
    return sum((p.groups[1] - p.groups[0]) * p.input_count * p.output_count for p in array.partitions)
