"""What a finished compilation looks like as a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from rerampile.deployed_model import deployed_ir_version
from rerampile.layer import Layer
from rerampile.plan import (
    ArrayPlan,
    Conventions,
    DigitalPlan,
    FoldPlan,
    LayerPlan,
    MaskPlan,
    ModelRecord,
    Plan,
    Producer,
    Totals,
    Use,
)
from rerampile.unit import Unit
from rerampile.version import __version__

__all__ = ["plan_of"]


def plan_of(unit: Unit, mean_conductance: Mapping[str, float]) -> Plan:
    """Return the plan of a compilation, but for its verification, its files and the hashes of decoded weights.

    Args:
        unit: The compilation, up to *allocate*.
        mean_conductance: Mean conductance over each layer's cells tensor, siemens.
    """
    proto = unit.model.proto
    placed = _placed_cells(unit, mean_conductance)
    return Plan(
        format="rerampile-plan",
        format_version=1,
        producer=Producer(name="rerampile", version=__version__),
        model=ModelRecord(
            name=unit.model.name,
            sha256=unit.model.sha256,
            bytes=unit.model.size,
            ir_version=proto.ir_version,
            opset=unit.model.opset,
            graph=proto.graph.name,
            external_data=unit.model.external,
            inlined_functions=unit.model.inlined_functions,
            converted_from_opset=unit.model.converted_from_opset,
            deployed_ir_version=deployed_ir_version(proto),
        ),
        target=unit.target.to_dict(),
        options=_options(unit),
        conventions=Conventions(),
        files={},
        totals=_totals(unit, placed),
        layers=[_layer_plan(unit, layer, placed[layer.name][1]) for layer in unit.layers],
        digital=[
            DigitalPlan(node=op.node.full_name, op=op.node.op, code=op.code, reason=op.reason) for op in unit.digital
        ],
        verification=None,
        skipped=list(unit.regions),
        arrays=list(unit.arrays),
    )


def _options(unit: Unit) -> dict[str, Any]:
    """Return the resolved options; files by name only, so that the plan does not depend on where they lie."""
    options = dataclasses.asdict(unit.options)
    options.pop("keep_stages")
    return {key: value.name if isinstance(value, Path) else value for key, value in options.items()}


def _layer_plan(unit: Unit, layer: Layer, mean_conductance: float) -> LayerPlan:
    mapped, view, coding = unit.mapped[layer.name], layer.view, unit.mapped[layer.name].coding
    mask = unit.masks.get(layer.name)
    weights = math.prod(view.shape)
    return LayerPlan(
        name=layer.name,
        uses=[Use(node=node.full_name, op=node.op, input=slot) for node, slot in layer.uses],
        block=layer.block,
        groups=view.groups,
        outputs=view.outputs,
        inputs=view.inputs,
        output_order=view.output_order,
        input_order=view.input_order,
        weight_shape=list(view.tensor_shape),
        element_type=TensorProto.DataType.Name(layer.element_type).lower(),
        stored_shape=list(view.stored_shape),
        permutation=None if view.permutation is None else list(view.permutation),
        scheme=coding.scheme,
        cells=coding.cells,
        slices=coding.slices,
        significances=list(coding.significances),
        reference=coding.reference if coding.cells == 1 else None,
        zero_cells=coding.zero_cells.tolist(),
        unit=coding.unit,
        cells_tensor=f"{layer.name}.cells",
        gain_tensor=f"{layer.name}.gain",
        scale=unit.options.scale,
        zeros=mapped.zeros,
        sparsity=mapped.zeros / weights,
        decoded_sha256="0" * 64,  # verify decodes, and fills it in
        mean_cell_conductance=mean_conductance,
        mask=None
        if mask is None
        else MaskPlan(
            source=mask.source, tensor=layer.name, kept=int(np.count_nonzero(mask.kept)), total=mask.kept.size
        ),
        folds=[FoldPlan(node=f.node.full_name, op=f.op, side=f.side) for f in layer.folds],
        constant_chain=[node.full_name for node in unit.graph.chain(layer.tensor)],
    )


def _placed_cells(unit: Unit, mean_conductance: Mapping[str, float]) -> dict[str, tuple[int, float]]:
    """Return, by layer, the weights that sit on arrays and the mean conductance of their cells, siemens.

    What takes no cells is zero, and what cells a zero would take is known: it is taken out of the mean of the tensor.
    """
    left_out = dict.fromkeys(range(len(unit.layers)), 0)
    for region in unit.regions:
        left_out[region.layer] += region.input_count * region.output_count
    placed: dict[str, tuple[int, float]] = {}
    for number, layer in enumerate(unit.layers):
        coding = unit.mapped[layer.name].coding
        zero = float(coding.conductance(coding.zero_cells).astype(np.float64).mean())
        total = math.prod(layer.view.shape)
        count = total - left_out[number]
        mean = (mean_conductance[layer.name] * total - zero * left_out[number]) / count if count else 0.0
        placed[layer.name] = (count, mean)
    return placed


def _totals(unit: Unit, placed: Mapping[str, tuple[int, float]]) -> Totals:
    weights = sum(math.prod(layer.view.shape) for layer in unit.layers)
    held = sum(count for count, _ in placed.values())
    zeros = sum(mapped.zeros for mapped in unit.mapped.values())
    coding = next(iter(unit.mapped.values())).coding
    cells = len(unit.arrays) * unit.target.rows * unit.target.columns
    used = sum(_weights_of(array) * len(array.roles) * coding.slices for array in unit.arrays)
    pair = sum(coding.cells * count * mean for count, mean in placed.values()) / held if held else 0.0
    return Totals(
        layers=len(unit.layers),
        weights=weights,
        zeros=zeros,
        sparsity=zeros / weights,
        arrays=len(unit.arrays),
        partitions=sum(len(array.partitions) for array in unit.arrays),
        cells=cells,
        cells_used=used,
        utilisation=used / cells if cells else 0.0,
        arrays_without_pruning=unit.arrays_without_pruning,
        arrays_before_packing=unit.arrays_before_packing,
        arrays_saved_by_pruning=unit.arrays_without_pruning - unit.arrays_before_packing,
        arrays_saved_by_packing=unit.arrays_before_packing - len(unit.arrays),
        weights_without_cells=weights - held,
        mean_pair_conductance=pair,
        digital_operations=len(unit.digital),
    )


def _weights_of(array: ArrayPlan) -> int:
    return sum((p.groups[1] - p.groups[0]) * p.input_count * p.output_count for p in array.partitions)
