"""What a plan says twice: its sums, its counts, and the nodes of the model, counted again from what they stand for."""

from __future__ import annotations

import itertools
import math
import reprlib

import google.protobuf.message
import msgspec
import numpy as np
import numpy.typing as npt
import onnx

from rerampile.crossbar_functions import CALL_PREFIX, DOMAIN
from rerampile.deployment import Deployment, layer_coding
from rerampile.digital_bias import check_shifts
from rerampile.errors import PlanFormatError
from rerampile.files import CONDUCTANCES, DEPLOYED, PLAN
from rerampile.graph import named_nodes, operator_of
from rerampile.layer_plan import CopiesPlan
from rerampile.plan import Conventions
from rerampile.schemes import row_chunks
from rerampile.slice_copies import protection_of
from rerampile.totals import totals_of, weights_without_cells

__all__ = ["check_counts", "check_nodes", "check_sums"]

_ROUNDING = 1e-5  # of g_on: means of float32 conductances are summed in another order


def check_sums(deployment: Deployment) -> None:
    """Compare the totals with what the layers and arrays add up to, and the conventions with those of the format.

    Raises:
        PlanFormatError: One of them differs.
    """
    plan = deployment.plan
    _compare(deployment, "$.conventions", plan.conventions, Conventions.of(plan.layers))
    totals = totals_of(
        deployment.target,
        plan.layers,
        plan.skipped,
        plan.arrays,
        digital=len(plan.digital),
        arrays_without_pruning=plan.totals.arrays_without_pruning,
        arrays_before_packing=plan.totals.arrays_before_packing,
    )
    _compare(deployment, "$.totals", plan.totals, totals)
    if plan.protection is not None:
        found = protection_of(plan.protection.slices, plan.protection.vote, plan.arrays)
        _compare(deployment, "$.protection", plan.protection, found)
    if plan.chip is not None:
        wrong = sum(layer.unrepaired for layer in plan.chip.layers)
        _expect(deployment, "$.chip.unrepaired_total", plan.chip.unrepaired_total, wrong)
        first = (array for array in plan.arrays if not array.is_second_twin)
        flipped = sum(len(partition.flipped or ()) for array in first for partition in array.partitions)
        last = [step.flipped for step in plan.chip.steps[-1:]]
        _expect(deployment, "$.chip.steps[-1:].flipped", last, [flipped])


def check_counts(deployment: Deployment, number: int, decoded_zeros: int, kept: npt.NDArray[np.bool_] | None) -> None:
    """Compare the zeros, the mask, the copies and the mean conductance of a layer with its weights and its cells.

    A weight that is not zero may be held as zero, so that zeros are known to be no more than those decoded and no
    fewer than those pruned.

    Args:
        deployment: The deployment.
        number: Position of the layer in the plan.
        decoded_zeros: Weights that decode to zero.
        kept: Its mask, [groups * outputs, inputs], or None.

    Raises:
        PlanFormatError: One of them differs.
    """
    layer, where = deployment.plan.layers[number], f"$.layers[{number}]"
    total = layer.groups * layer.outputs * layer.inputs
    pruned = 0 if kept is None else kept.size - int(np.count_nonzero(kept))
    certain = pruned if deployment.plan.chip is None else 0  # stuck cells make something of zeros
    if layer.mask is not None and kept is not None:
        _expect(deployment, f"{where}.mask.total", layer.mask.total, total)
        _expect(deployment, f"{where}.mask.kept", layer.mask.kept, total - pruned)
    if not certain <= layer.zeros <= decoded_zeros:
        raise _changed(deployment, f"{where}.zeros", layer.zeros, f"{certain} to {decoded_zeros}")
    if isinstance(layer.copies, CopiesPlan):
        _expect(deployment, f"{where}.copies.error", layer.copies.error, layer.copies.error_single / layer.copies.count)
    _expect(deployment, f"{where}.sparsity", layer.sparsity, layer.zeros / total if total else 0.0)
    _check_mean(deployment, number, total)


def _check_mean(deployment: Deployment, number: int, total: int) -> None:
    """Compare the mean conductance of the cells on arrays: all there are, less those of zeros that take none."""
    layer = deployment.plan.layers[number]
    coding, cells = layer_coding(deployment.target, layer), deployment.cells(layer)
    sums = (coding.conductance(cells[:, :, rows]).sum(dtype=np.float64) for rows in row_chunks(cells.shape[2:]))
    without = weights_without_cells(len(deployment.plan.layers), deployment.plan.skipped)[number]
    held = math.fsum(sums) / (coding.cells * coding.slices) - coding.mean_zero_conductance * without
    found = layer.mean_cell_conductance * (total - without)
    if not abs(found - held) <= _ROUNDING * coding.g_on * total or (without == total and layer.mean_cell_conductance):
        mean = held / (total - without) if total > without else 0.0
        where = f"$.layers[{number}].mean_cell_conductance"
        raise _changed(deployment, where, layer.mean_cell_conductance, f"{mean:.6g}")


def check_nodes(deployment: Deployment) -> None:
    """Compare the nodes that the plan names with those of the deployed model, and the cells that its calls read.

    Raises:
        PlanFormatError: A node is missing, is another one, or reads another layer's cells.
    """
    try:
        model = onnx.load_model(deployment.model_path, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise PlanFormatError(f"{deployment.model_path}: not an ONNX model: protobuf cannot parse it") from error
    check_shifts(deployment, model)
    layers = _layer_by_gain(deployment, model)
    digital: list[tuple[str, str]] = []
    calls: list[list[tuple[str, str]]] = [[] for _ in deployment.plan.layers]
    for name, node in named_nodes(model.graph):
        if node.domain != DOMAIN:
            digital.append((name, operator_of(node)))
            continue
        operator = node.op_type.removeprefix(CALL_PREFIX).partition("_")[0]
        for number in (layers[source] for source in node.input if source in layers):
            calls[number].append((name, operator))
    planned = [(node.node, node.op) for node in deployment.plan.digital]
    for number, (found, there) in enumerate(itertools.zip_longest(planned, digital)):
        if found != there:
            raise _changed(deployment, f"$.digital[{number}]", _nodes(found), f"{_nodes(there)} as in {DEPLOYED}")
    for number, layer in enumerate(deployment.plan.layers):
        uses = [(use.node, use.op) for use in layer.uses]
        if sorted(uses) != sorted(calls[number]):
            expected = f"{_nodes(*calls[number])} as in {DEPLOYED}"
            raise _changed(deployment, f"$.layers[{number}].uses", _nodes(*uses), expected)


def _layer_by_gain(deployment: Deployment, model: onnx.ModelProto) -> dict[str, int]:
    """Return which layer an initializer of the deployed model is the gain of: each call reads one a layer."""
    specs = deployment.conductances.specs
    offsets = {str(specs[p.gain_tensor].offset): n for n, p in enumerate(deployment.plan.layers)}
    found: dict[str, int] = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == CONDUCTANCES and entries.get("offset") in offsets:
            found[tensor.name] = offsets[entries["offset"]]
    return found


def _nodes(*nodes: tuple[str, str] | None) -> str:
    return ", ".join(f"'{node[0]}' ({node[1]})" for node in nodes if node) or "none"


def _compare(deployment: Deployment, where: str, found: msgspec.Struct, expected: msgspec.Struct) -> None:
    for field in found.__struct_fields__:
        _expect(deployment, f"{where}.{field}", getattr(found, field), getattr(expected, field))


def _expect(deployment: Deployment, where: str, found: object, expected: object) -> None:
    if found != expected:
        raise _changed(deployment, where, found, expected)


def _changed(deployment: Deployment, where: str, found: object, expected: object) -> PlanFormatError:
    shown = found if isinstance(found, str) else reprlib.repr(found)
    return PlanFormatError(f"{deployment.folder / PLAN}: {where}: {shown}, expected {expected}; the plan was changed")
