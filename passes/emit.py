"""Emit: write the cells, the deployed model, the masks and the plan of a deployment."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import rerampile.version
from rerampile.crossbar_functions import DOMAIN, DOMAIN_VERSION, CellInputs, FunctionLibrary
from rerampile.files import CONDUCTANCES, DEPLOYED, DIGITAL, MASKS
from rerampile.graph import GraphNode
from rerampile.graph_edit import rewrite_graph
from rerampile.layer import Layer
from rerampile.onnx_file import copy_without, external_tensor, file_sha256, iter_graphs
from rerampile.passes.prune import block_of
from rerampile.plan import (
    ArrayPlan,
    Conventions,
    DigitalPlan,
    FileRecord,
    FoldPlan,
    LayerPlan,
    MaskPlan,
    ModelRecord,
    Plan,
    Producer,
    Totals,
    Use,
)
from rerampile.tensor_file import TensorSpec, TensorWriter, stores
from rerampile.unit import Unit

__all__ = ["Emit"]

_FUNCTIONS_IR = 8  # the first IR version with model-local functions
_INLINE_LIMIT = 1 << 30  # bytes of digital tensors that deployed.onnx carries itself


@dataclass(frozen=True)
class Emit:
    """The files of the deployment folder, and the plan but for its verification."""

    name: str = "emit"

    def run(self, unit: Unit) -> Unit:
        """Write the files and fill ``plan``."""
        conductances, mean_conductance = _write_conductances(unit)
        _write_masks(unit)
        _write_model(unit, conductances)
        files = {
            path.name: FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
            for path in sorted(unit.folder.iterdir())
            if path.is_file() and path.name != CONDUCTANCES
        }
        files[CONDUCTANCES] = FileRecord(sha256=conductances.sha256, bytes=conductances.path.stat().st_size)
        return replace(unit, plan=_plan(unit, files, mean_conductance))

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the bytes written."""
        return {"bytes": sum(path.stat().st_size for path in unit.folder.iterdir() if path.is_file())}


def _write_conductances(unit: Unit) -> tuple[TensorWriter, dict[str, float]]:
    """Write every cell's target and every gain; return the file and the mean conductance of a cell by layer."""
    tensors: list[tuple[str, npt.DTypeLike, tuple[int, ...]]] = []
    for layer in unit.layers:
        mapped = unit.mapped[layer.name]
        shape = (mapped.coding.slices, mapped.coding.cells, *layer.view.shape)
        tensors += [(f"{layer.name}.cells", mapped.coding.dtype, shape), (f"{layer.name}.gain", np.float32, shape[2:3])]
    means: dict[str, float] = {}
    by_tensor = {f"{layer.name}.{kind}": (layer, kind) for layer in unit.layers for kind in ("cells", "gain")}
    with TensorWriter(unit.folder / CONDUCTANCES, tensors, {"format": "rerampile-conductances"}) as writer:
        for name in writer.specs:
            layer, kind = by_tensor[name]
            mapped = unit.mapped[layer.name]
            if kind == "gain":
                writer.write(name, mapped.gain)
                continue
            cells = mapped.coding.encode(unit.weights(layer), mapped.gain)
            means[layer.name] = _mean_conductance(unit, layer, cells)
            writer.write(name, cells)
    return writer, means


def _mean_conductance(unit: Unit, layer: Layer, cells: npt.NDArray[Any]) -> float:
    coding = unit.mapped[layer.name].coding
    if coding.levels is None:
        return float(cells.mean(dtype=np.float32 if cells.size < 1 << 24 else np.float64))
    counts = np.bincount(cells.reshape(-1), minlength=coding.levels)
    return float(counts @ coding.conductance(np.arange(coding.levels)).astype(np.float64) / cells.size)


def _write_masks(unit: Unit) -> None:
    if not unit.masks:
        return
    layers = [layer for layer in unit.layers if layer.name in unit.masks]
    tensors = [(layer.name, np.bool_, layer.view.tensor_shape) for layer in layers]
    with TensorWriter(unit.folder / MASKS, tensors, {"format": "rerampile-masks"}) as writer:
        for layer in layers:
            writer.write(layer.name, layer.view.tensor(unit.masks[layer.name].kept))


def _write_model(unit: Unit, conductances: TensorWriter) -> None:
    """Write ``deployed.onnx``: the user's model with mapped nodes reading their weights from the conductance file."""
    edit = _Edit.of(unit, conductances.specs)
    original = unit.model.proto
    model = copy_without(original, "graph")
    model.graph.CopyFrom(rewrite_graph(original.graph, edit.rewrite, edit.freed))
    model.graph.initializer.extend(edit.initializers)
    model.functions.extend(edit.library.functions)
    model.opset_import.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
    model.ir_version = max(original.ir_version, _FUNCTIONS_IR)
    _move_digital_tensors(unit, model)
    (unit.folder / DEPLOYED).write_bytes(model.SerializeToString(deterministic=True))


@dataclass
class _Edit:
    """The changes from the user's graph to the deployed one.

    Attributes:
        calls: By message identity, what replaces a mapped node.
        gone: Message identities of folded nodes.
        initializers: Cells, gains and folded biases.
        freed: Names that mapped or folded nodes no longer read.
        library: The functions that calls refer to.
    """

    calls: dict[int, onnx.NodeProto]
    gone: set[int]
    initializers: list[TensorProto]
    freed: set[str]
    library: FunctionLibrary

    @classmethod
    def of(cls, unit: Unit, specs: Mapping[str, TensorSpec]) -> _Edit:
        edit = cls({}, set(), [], set(), FunctionLibrary(unit.model.proto.opset_import))
        names = _Names(unit.model.proto)
        nodes: dict[int, tuple[GraphNode, dict[int, CellInputs]]] = {}
        for layer in unit.layers:
            cells = _cell_inputs(unit, layer, names, specs, edit.initializers)
            for node, slot in layer.uses:
                nodes.setdefault(id(node), (node, {}))[1][slot] = cells
        for node, weights in nodes.values():
            layer = next(iter(weights.values())).layer
            bias = None
            folded_bias = _folded_bias(unit, layer)
            if folded_bias is not None and (folded_bias.any() or _has_bias(node)):
                bias = names.new(f"{layer.name}.bias")
                edit.initializers.append(numpy_helper.from_array(folded_bias, bias))
            edit.gone.update(id(fold.node.proto) for fold in layer.folds)
            folded = [node, *(fold.node for fold in layer.folds)]
            edit.freed.update(name for n in folded for name in n.proto.input)
            after = [fold.node for fold in layer.folds if fold.side == "after"]
            outputs = after[-1].proto.output if after else node.proto.output
            edit.calls[id(node.proto)] = edit.library.call(node, weights, bias, _moved_data(unit, layer), outputs)
        return edit

    def rewrite(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return what stands for a node of the user's graph, None where it was folded."""
        return None if id(node) in self.gone else self.calls.get(id(node), node)


class _Names:
    """Names that no tensor of a model has yet."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._used = {
            name
            for graph in iter_graphs(proto.graph)
            for names in (
                (v.name for v in graph.input),
                (t.name for t in graph.initializer),
                (o for n in graph.node for o in n.output),
            )
            for name in names
        }

    def new(self, name: str) -> str:
        while name in self._used:
            name += "_"
        self._used.add(name)
        return name


def _cell_inputs(
    unit: Unit, layer: Layer, names: _Names, specs: Mapping[str, TensorSpec], initializers: list[TensorProto]
) -> CellInputs:
    """Make the initializers of one layer, each a window into the conductance file."""
    coding = unit.mapped[layer.name].coding
    spec = specs[f"{layer.name}.cells"]
    size = math.prod(layer.view.shape) * spec.dtype.itemsize
    found: dict[str, list[str]] = {"plus": [], "minus": []}
    for k in range(coding.slices):
        for cell, role in enumerate(("plus", "minus")[: coding.cells]):
            suffix = f"_{k}" if coding.slices > 1 else ""
            name = names.new(f"{layer.name}.g_{role}{suffix}")
            offset = spec.offset + (k * coding.cells + cell) * size
            window = TensorSpec(dtype=spec.dtype, shape=layer.view.shape, offset=offset)
            initializers.append(external_tensor(name, CONDUCTANCES, window))
            found[role].append(name)
    gain = names.new(f"{layer.name}.gain")
    gain_spec = specs[f"{layer.name}.gain"]
    initializers.append(external_tensor(gain, CONDUCTANCES, replace(gain_spec, shape=(*gain_spec.shape, 1))))
    return CellInputs(layer=layer, coding=coding, plus=tuple(found["plus"]), minus=tuple(found["minus"]), gain=gain)


def _folded_bias(unit: Unit, layer: Layer) -> npt.NDArray[Any] | None:
    """Return a layer's folded bias in its own type, for the weights that its cells hold."""
    if layer.bias is None:
        return None
    mapped = unit.mapped[layer.name]
    weights = unit.weights(layer) if layer.input_addend is not None else np.zeros((0, 0), np.float32)
    if layer.input_addend is not None:
        weights = mapped.coding.decode(mapped.coding.encode(weights, mapped.gain), mapped.gain)
    bias = layer.bias_with(weights)
    return None if bias is None else bias.astype(helper.tensor_dtype_to_np_dtype(layer.element_type))


def _has_bias(node: GraphNode) -> bool:
    return node.op != "MatMul" and node.input(2) is not None


def _moved_data(unit: Unit, layer: Layer) -> str | None:
    """Return the name of the data input in front of the operations folded before a layer, or None."""
    before = [fold.node for fold in layer.folds if fold.side == "before"]
    if not before:
        return None
    source = next(t for t in before[-1].view.inputs if not unit.graph.is_constant(t))
    return str(source.name)


def _move_digital_tensors(unit: Unit, model: onnx.ModelProto) -> None:
    """Give digital tensors that were external, or are too many to carry, a file of their own."""
    tensors = [t for graph in iter_graphs(model.graph) for t in graph.initializer]
    digital = [t for t in tensors if not _in_conductances(t)]
    inline = sum(len(t.raw_data) for t in digital)
    moved = [t for t in digital if t.data_location == TensorProto.EXTERNAL or (inline > _INLINE_LIMIT and t.raw_data)]
    moved = [t for t in moved if stores(helper.tensor_dtype_to_np_dtype(t.data_type))]
    for tensor in digital:
        if tensor.data_location == TensorProto.EXTERNAL and all(tensor is not m for m in moved):
            tensor.CopyFrom(numpy_helper.from_array(unit.model.array(tensor), tensor.name))
    if not moved:
        return
    names = [f"{i}/{t.name}" for i, t in enumerate(moved)]
    announced = [
        (name, helper.tensor_dtype_to_np_dtype(t.data_type), tuple(t.dims))
        for name, t in zip(names, moved, strict=True)
    ]
    by_name = dict(zip(names, moved, strict=True))
    with TensorWriter(unit.folder / DIGITAL, announced, {"format": "rerampile-digital"}) as writer:
        for name, spec in writer.specs.items():
            tensor = by_name[name]
            writer.write(name, unit.model.array(tensor))
            tensor.CopyFrom(external_tensor(tensor.name, DIGITAL, spec))


def _in_conductances(tensor: TensorProto) -> bool:
    return any(entry.key == "location" and entry.value == CONDUCTANCES for entry in tensor.external_data)


def _plan(unit: Unit, files: Mapping[str, FileRecord], mean_conductance: Mapping[str, float]) -> Plan:
    proto = unit.model.proto
    return Plan(
        format="rerampile-plan",
        format_version=1,
        producer=Producer(name="rerampile", version=rerampile.version.__version__),
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
            deployed_ir_version=max(proto.ir_version, _FUNCTIONS_IR),
        ),
        target=unit.target.to_dict(),
        options=_options(unit),
        conventions=Conventions(),
        files=dict(sorted(files.items())),
        totals=_totals(unit, mean_conductance),
        layers=[_layer_plan(unit, layer, mean_conductance[layer.name]) for layer in unit.layers],
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
        block=block_of(layer),
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


def _totals(unit: Unit, mean_conductance: Mapping[str, float]) -> Totals:
    sizes = {layer.name: math.prod(layer.view.shape) for layer in unit.layers}
    weights = sum(sizes.values())
    zeros = sum(mapped.zeros for mapped in unit.mapped.values())
    coding = next(iter(unit.mapped.values())).coding
    cells = len(unit.arrays) * unit.target.rows * unit.target.columns
    placed = sum(_weights_of(array) for array in unit.arrays)
    used = sum(_weights_of(array) * len(array.roles) * coding.slices for array in unit.arrays)
    sets = 2 if any(array.twin is not None for array in unit.arrays) else 1
    pair = sum(mean_conductance[name] * coding.cells * size for name, size in sizes.items()) / weights
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
        weights_without_cells=weights - placed // sets,
        mean_pair_conductance=pair,
        digital_operations=len(unit.digital),
    )


def _weights_of(array: ArrayPlan) -> int:
    return sum((p.groups[1] - p.groups[0]) * p.input_count * p.output_count for p in array.partitions)
