"""What a finished compilation looks like as a plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from onnx import TensorProto

from rerampile.deployed_model import deployed_ir_version
from rerampile.layer import Fold, Layer
from rerampile.layer_plan import FoldPlan, LayerPlan, MaskPlan, Use
from rerampile.plan import NO_SHA256, Conventions, DigitalPlan, ModelRecord, Plan, Producer
from rerampile.totals import totals_of, weights_without_cells
from rerampile.unit import Unit
from rerampile.version import __version__

__all__ = ["plan_of"]

_OVERRIDABLE_IR = 4  # before it every initializer is an input too, and means nothing by it


def plan_of(unit: Unit, mean_conductance: Mapping[str, float]) -> Plan:
    """Return the plan of a compilation, but for its verification, its files and the hashes of decoded weights.

    Args:
        unit: The compilation, up to *allocate*.
        mean_conductance: Mean conductance over each layer's cells tensor, siemens.
    """
    proto = unit.model.proto
    layers = [_layer_plan(unit, layer, mean) for layer, mean in _placed_means(unit, mean_conductance)]
    digital = [
        DigitalPlan(node=op.node.full_name, op=op.node.op, code=op.code, reason=op.reason) for op in unit.digital
    ]
    return Plan(
        format="rerampile-plan",
        format_version=1,
        plan_sha256=NO_SHA256,  # encoding fills it in
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
            fixed_inputs=_fixed_inputs(unit),
        ),
        target=unit.target.to_dict(),
        options=_options(unit),
        conventions=Conventions.of(layers),
        files={},
        totals=totals_of(
            unit.target,
            layers,
            unit.regions,
            unit.arrays,
            digital=len(digital),
            arrays_without_pruning=unit.arrays_without_pruning,
            arrays_before_packing=unit.arrays_before_packing,
        ),
        layers=layers,
        digital=digital,
        verification=None,
        skipped=list(unit.regions),
        arrays=list(unit.arrays),
        protection=unit.protection,
    )


def _options(unit: Unit) -> dict[str, Any]:
    """Return the resolved options; files by name only, so that the plan does not depend on where they lie."""
    options = dataclasses.asdict(unit.options)
    options.pop("keep_stages")
    if not options["categories"]:
        del options["categories"]
    if unit.calibration is None:
        options = {key: value for key, value in options.items() if key not in ("clip", "correct", "calibration")}
    if not unit.options.spend_spare_arrays:
        options.pop("spend_spare_arrays")
    if not unit.options.protect_msb:
        options = {key: value for key, value in options.items() if key not in ("protect_msb", "vote")}
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
        common_modes=None if coding.common_modes is None else list(coding.common_modes),
        zero_cells=coding.zero_cells.tolist(),
        unit=coding.unit,
        cells_tensor=f"{layer.name}.cells",
        gain_tensor=f"{layer.name}.gain",
        scale=unit.options.scale,
        segments=mapped.segments.ranges if unit.options.scale == "partition" else msgspec.UNSET,
        zeros=mapped.zeros,
        sparsity=mapped.zeros / weights,
        decoded_sha256=NO_SHA256,  # verify decodes, and fills it in
        mean_cell_conductance=mean_conductance,
        choice=mapped.choice,
        clip=mapped.clip or msgspec.UNSET,
        correction=mapped.correction or msgspec.UNSET,
        copies=unit.copies.get(layer.name, msgspec.UNSET),
        mask=None
        if mask is None
        else MaskPlan(
            source=mask.source, tensor=layer.name, kept=int(np.count_nonzero(mask.kept)), total=mask.kept.size
        ),
        folds=[
            FoldPlan(node=f.node.full_name, op=f.op, side=f.side, constant_chain=_constants_of(unit, f))
            for f in layer.folds
        ],
        constant_chain=[node.full_name for node in unit.graph.chain(layer.tensor)],
    )


def _constants_of(unit: Unit, fold: Fold) -> list[str]:
    """Return the nodes that computed the constants of a folded operation."""
    constants = [tensor for tensor in fold.node.view.inputs if unit.graph.is_constant(tensor)]
    return list(dict.fromkeys(node.full_name for tensor in constants for node in unit.graph.chain(tensor)))


def _fixed_inputs(unit: Unit) -> list[str]:
    """Return the inputs that could be given another value than their default, and that cells or biases now hold."""
    proto, graph = unit.model.proto, unit.graph
    defaults = {tensor.name for tensor in proto.graph.initializer} if proto.ir_version >= _OVERRIDABLE_IR else set()
    held = []
    for layer in unit.layers:
        held += [tensor for tensor in (layer.tensor, layer.zero_point) if tensor is not None]
        held += [tensor for fold in layer.folds for tensor in fold.node.view.inputs if graph.is_constant(tensor)]
        if layer.bias is not None and (bias := layer.uses[0][0].input(2)) is not None:
            held.append(bias)
    names = {source.name for tensor in held for source in graph.sources(tensor)}
    return [value.name for value in proto.graph.input if value.name in names & defaults]


def _placed_means(unit: Unit, mean_conductance: Mapping[str, float]) -> Iterator[tuple[Layer, float]]:
    """Yield each layer with the mean conductance of its cells that sit on arrays, siemens.

    What takes no cells is zero, and what cells a zero would take is known: it is taken out of the mean of the tensor.
    """
    left_out = weights_without_cells(len(unit.layers), unit.regions)
    for layer, without in zip(unit.layers, left_out, strict=True):
        zero = unit.mapped[layer.name].coding.mean_zero_conductance
        total = math.prod(layer.view.shape)
        count = total - without
        yield layer, (mean_conductance[layer.name] * total - zero * without) / count if count else 0.0
