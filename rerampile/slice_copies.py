"""Copies of the most significant slices of weights: what they protect, and whether a plan has them right.

A copy holds, for some inputs and outputs of one partition, what the partition's cells of the most significant slices
hold. It is read with no other rows driven. What the copies with number 1 sum to, over all inputs of the partition, is
what the partition's own columns sum to, and so are those with number 2; of the three the median or the mean counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Partition, SliceCopy
from rerampile.deployment import Deployment, copy_span, footprint
from rerampile.errors import PlanFormatError
from rerampile.plan import Plan, ProtectionPlan, Vote

__all__ = ["check_slice_copies", "protected_outputs", "protection_of"]

Flags = npt.NDArray[np.bool_]


def protection_of(slices: int, vote: Vote, arrays: Sequence[ArrayPlan]) -> ProtectionPlan:
    """Return what the copies on arrays protect.

    Args:
        slices: Slices of a weight that are copied.
        vote: How three readings become one.
        arrays: All arrays of a plan.
    """
    first = [array for array in arrays if not array.is_second_twin]
    held = (p for array in first for p in array.partitions)
    copied = ((len(a.roles), c.input_count * c.output_count) for a in arrays for c in a.slice_copies)
    return ProtectionPlan(
        slices=slices,
        vote=vote,
        weights=sum(c.input_count * c.output_count for array in first for c in array.slice_copies if c.number == 1),
        weights_with_cells=sum((p.groups[1] - p.groups[0]) * p.input_count * p.output_count for p in held),
        cells=sum(roles * slices * weights for roles, weights in copied),
        arrays_without_protection=sum(bool(array.partitions) for array in arrays),
    )


def protected_outputs(plan: Plan) -> list[Flags]:
    """Return which outputs of each layer have copies, [groups * outputs] each."""
    found = [np.zeros(layer.groups * layer.outputs, np.bool_) for layer in plan.layers]
    for array in plan.arrays:
        for copy in array.slice_copies:
            home = plan.arrays[copy.array].partitions[copy.partition]
            first = home.groups[0] * plan.layers[home.layer].outputs
            found[home.layer][np.array(copy.output_indices) + first] = True
    return found


def check_slice_copies(deployment: Deployment) -> None:
    """Check that copies take cells that nothing else needs, and that an output has two whole ones or none.

    Partitions are taken to be checked already.

    Raises:
        PlanFormatError: A copy is of no partition, leaves its array, lies on cells that are taken, is there twice or in
            part, or there are copies without the plan's ``protection``.
    """
    plan = deployment.plan
    with_copies = [array for array in plan.arrays if array.slice_copies]
    if plan.protection is None:
        if with_copies:
            raise PlanFormatError(f"$.arrays[{with_copies[0].id}]: copies without $.protection; the plan was changed")
        return
    if plan.chip is not None or any(layer.copy_count > 1 for layer in plan.layers):
        raise PlanFormatError("$.protection: of a programmed chip or beside averaged copies, expected none there")
    for array in with_copies:
        _check_array(deployment, array, plan.protection)
    covers: dict[tuple[int, int], list[Flags]] = {}
    for array in with_copies:
        if not array.is_second_twin:
            for copy in array.slice_copies:
                _cover(plan, copy, covers, f"$.arrays[{array.id}]")
    for (number, position), cover in covers.items():
        layer = plan.layers[plan.arrays[number].partitions[position].layer]
        whole = cover[0].all(axis=1) & cover[1].all(axis=1)
        if (whole != (cover[0].any(axis=1) | cover[1].any(axis=1))).any():
            raise PlanFormatError(
                f"$.arrays[{number}]: layer '{layer.name}': an output of partition {position} has copies of some of "
                f"its inputs or one copy alone, expected two of all of them"
            )
    _check_outputs(plan, covers)


def _check_outputs(plan: Plan, covers: dict[tuple[int, int], list[Flags]]) -> None:
    """Check that an output has copies in all partitions that hold it, or in none."""
    protected = protected_outputs(plan)
    for array in plan.arrays:
        for position, partition in enumerate(array.partitions):
            flags = protected[partition.layer]
            if array.is_second_twin or not flags.any():
                continue
            first = partition.groups[0] * plan.layers[partition.layer].outputs
            expected = flags[np.array(partition.output_indices) + first]
            cover = covers.get((array.id, position))
            found = np.zeros_like(expected) if cover is None else cover[0][:, 0]
            if (found != expected).any():
                raise PlanFormatError(
                    f"$.arrays[{array.id}]: layer '{plan.layers[partition.layer].name}': an output has copies in one "
                    f"partition and not in another, expected them in all"
                )


def _check_array(deployment: Deployment, array: ArrayPlan, protection: ProtectionPlan) -> None:
    """Check the cells that the copies on one array take, and whose they are."""
    plan, target, where = deployment.plan, deployment.target, f"$.arrays[{array.id}]"
    taken = np.zeros((target.rows, target.columns), np.bool_)
    width = len(array.roles) * len(array.slices)
    spans = [(p.layer, *footprint(p, width)) for p in array.partitions]
    for layer, rows, _ in spans:  # cells between partitions of one layer hold zero weights
        for other, _, columns in spans:
            if layer == other:
                taken[rows, columns] = True
    for copy in array.slice_copies:
        held = plan.layers[_home(plan, copy, where).layer]
        original = plan.arrays[copy.array]
        if array.is_second_twin and original.twin is not None:
            original = plan.arrays[original.twin]
        if (original.roles, original.slices) != (array.roles, array.slices):
            raise PlanFormatError(f"{where}: a copy of array {copy.array}, whose columns have other roles or slices")
        if protection.slices > held.slices:
            raise PlanFormatError(
                f"{where}: copies of {protection.slices} slices of layer '{held.name}', expected at most the "
                f"{held.slices} that it has"
            )
        rows, columns = copy_span(copy, array, protection.slices)
        if rows.stop > target.rows or columns.stop > target.columns:
            raise PlanFormatError(
                f"{where}: a copy reaches row {rows.stop}, column {columns.stop}, expected at most {target.rows} and "
                f"{target.columns}"
            )
        if taken[rows, columns].any():
            raise PlanFormatError(f"{where}: a copy at row {copy.row}, column {copy.column} takes cells that are taken")
        taken[rows, columns] = True


def _home(plan: Plan, copy: SliceCopy, where: str) -> Partition:
    """Return the partition that a copy is of."""
    if not (copy.array < len(plan.arrays) and copy.partition < len(plan.arrays[copy.array].partitions)):
        raise PlanFormatError(
            f"{where}: a copy of partition {copy.partition} of array {copy.array}, expected one of the plan"
        )
    home = plan.arrays[copy.array].partitions[copy.partition]
    if home.groups[1] - home.groups[0] != 1 or plan.arrays[copy.array].is_second_twin:
        raise PlanFormatError(
            f"{where}: a copy of partition {copy.partition} of array {copy.array}, expected one of a single group, on "
            f"the first of two twins"
        )
    return home


def _cover(plan: Plan, copy: SliceCopy, covers: dict[tuple[int, int], list[Flags]], where: str) -> None:
    """Note which weights of its partition a copy holds, [outputs, inputs] for each number; none may be held twice."""
    home = plan.arrays[copy.array].partitions[copy.partition]
    shape = home.output_count, home.input_count
    cover = covers.setdefault((copy.array, copy.partition), [np.zeros(shape, np.bool_) for _ in range(2)])
    place = []
    for axis, own, there in (
        ("output", copy.output_indices, home.output_indices),
        ("input", copy.input_indices, home.input_indices),
    ):
        if (getattr(copy, f"{axis}s") is None) == (getattr(copy, f"{axis}_index") is None):
            raise PlanFormatError(f"{where}: a copy: expected either '{axis}s' or '{axis}_index'")
        if not own or not set(own) <= set(there) or sorted(set(own)) != own:
            raise PlanFormatError(f"{where}: a copy of {axis}s that its partition does not have, or not in its order")
        place.append(np.isin(there, own))
    cells = np.ix_(*place)
    if cover[copy.number - 1][cells].any():
        raise PlanFormatError(f"{where}: copy {copy.number} of a weight is there twice, expected once")
    cover[copy.number - 1][cells] = True
