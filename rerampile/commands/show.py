"""What the commands show: tables for people, plain data for machines."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rerampile.array_plan import ArrayPlan, Partition
from rerampile.commands.cell_picture import cell_picture
from rerampile.commands.show_mapping import clip_words, copies_words
from rerampile.commands.show_program import show_chip
from rerampile.deployment import Deployment, copy_span, layer_coding, partition_blocks
from rerampile.failed_cells import FailedCells
from rerampile.graph import ModelGraph
from rerampile.layer import DigitalOperation, Layer
from rerampile.onnx_file import ModelFile
from rerampile.plan import DigitalPlan, Plan, ProtectionPlan, Verification
from rerampile.target import Target
from rerampile.terminal import Justify, facts_table, new_table, print_parts, printable, siemens_text

__all__ = [
    "array_data",
    "model_data",
    "plan_data",
    "show_array",
    "show_model",
    "show_plan",
    "show_summary",
    "show_targets",
    "show_verification",
]

_WIDE = 110  # columns of a terminal from which on the less important columns of a table are shown


def _matrix(groups: int, outputs: int, inputs: int) -> str:
    return f"{outputs} × {inputs}" if groups == 1 else f"{groups} × ({outputs} × {inputs})"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _ranges(numbers: Iterable[int], most: int = 3) -> str:
    """Return sorted numbers as inclusive ranges, ``0-35, 40``, shortened to the first few."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [f"{first}-{last}" if last > first else str(first) for first, last in spans]
    return ", ".join(words[:most]) + (f", … {spans[-1][1]}" if len(words) > most else "")


def _listed(words: Iterable[str]) -> str:
    """Return distinct words with their counts, the frequent ones first, shortened to the first few."""
    return _shortened([word if count == 1 else f"{count} {word}" for word, count in Counter(words).most_common()])


def _shortened(words: Sequence[str], most: int = 5) -> str:
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


# A model before it is compiled.


def model_data(
    model: ModelFile,
    graph: ModelGraph,
    blocks: Sequence[str],
    layers: Sequence[Layer],
    digital: Sequence[DigitalOperation],
) -> dict[str, Any]:
    """Return what ``inspect`` found as plain data.

    Args:
        model: The model.
        graph: Its linked view.
        blocks: The block of each layer.
        layers: Its layers, with folds.
        digital: What stays digital.
    """
    return {
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "bytes": model.size,
            "ir_version": model.proto.ir_version,
            "opset": model.opset,
            "converted_from_opset": model.converted_from_opset,
            "inlined_functions": model.inlined_functions,
            "nodes": len(graph.nodes),
        },
        "layers": [
            {
                "name": layer.name,
                "block": block,
                "groups": layer.view.groups,
                "outputs": layer.view.outputs,
                "inputs": layer.view.inputs,
                "weights": layer.view.shape[0] * layer.view.shape[1],
                "weight_shape": list(layer.view.tensor_shape),
                "uses": [{"node": node.full_name, "op": node.op, "input": slot} for node, slot in layer.uses],
                "folds": [{"node": fold.node.full_name, "op": fold.op, "side": fold.side} for fold in layer.folds],
            }
            for block, layer in zip(blocks, layers, strict=True)
        ],
        "digital": [
            {"node": op.node.full_name, "op": op.node.op, "code": op.code, "reason": op.reason} for op in digital
        ],
    }


def show_model(out: Console, data: dict[str, Any], verbose: bool) -> None:
    """Print what ``inspect`` found."""
    model, layers = data["model"], data["layers"]
    wide = out.width >= _WIDE
    columns: list[tuple[str, Justify]] = [("layer", "left"), ("op", "left")]
    columns += [("block", "right")] if wide else []
    shared = any(len(layer["uses"]) > 1 for layer in layers)
    columns += [("matrix", "right"), ("weights", "right"), ("folds", "left")]
    columns += [("other uses", "right")] if shared else []
    table = new_table(*columns)
    for layer in layers:
        uses = layer["uses"]
        matrix = _matrix(layer["groups"], layer["outputs"], layer["inputs"])
        folds = [fold["op"] for fold in layer["folds"]]
        table.add_row(
            *(printable(layer["name"]), printable(uses[0]["op"])),
            *([layer["block"]] if wide else []),
            *(matrix, f"{layer['weights']:,}", printable(_listed(folds))),
            *([str(len(uses) - 1 or "")] if shared else []),
        )
    nodes = [DigitalPlan(**node) for node in data["digital"]]
    weights = sum(layer["weights"] for layer in layers)
    opset = f"operator set {model['opset']}"
    if model["converted_from_opset"] is not None:
        opset += f" (converted from {model['converted_from_opset']})"
    size = f"{_size(model['bytes'])}, {opset}, {_number(model['nodes'], 'node')}"
    facts = [
        ("model", f"{printable(model['name'])}, {size}"),
        (
            "layers",
            f"{len(layers):,}, with {_number(weights, 'weight')}" if layers else "none: compile would refuse it",
        ),
        ("folded", printable(_listed(fold["op"] for layer in layers for fold in layer["folds"])) or "nothing"),
        ("digital", _number(len(nodes), "node")),
    ]
    print_parts(out, table if layers else None, _digital(nodes, verbose), facts_table(facts))


def _digital(nodes: Sequence[DigitalPlan], verbose: bool) -> Table | None:
    """Return digital nodes grouped by reason, or each of them."""
    if not nodes:
        return None
    if verbose:
        table = new_table(("digital node", "left"), ("op", "left"), ("why it stays digital", "left"))
        for node in nodes:
            table.add_row(printable(node.node), printable(node.op), printable(node.reason))
        return table
    table = new_table(("digital", "right"), ("operators", "left"), ("why they stay digital", "left"))
    by_reason: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        by_reason[node.reason].append(node.op)
    for reason, ops in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        table.add_row(f"{len(ops):,}", printable(_listed(ops)), printable(reason))
    return table


# A deployment.


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data without its long lists: each layer carries the number of its arrays instead."""
    data: dict[str, Any] = msgspec.to_builtins(plan)
    for key in ("arrays", "skipped", "conventions", "files"):
        del data[key]
    for layer, ids in zip(data["layers"], _arrays_by_layer(plan), strict=True):
        layer["arrays"] = len(ids)
    return data


def _arrays_by_layer(plan: Plan) -> list[list[int]]:
    """Return the ids of the arrays that each layer uses."""
    found: list[list[int]] = [[] for _ in plan.layers]
    for array in plan.arrays:
        for layer in sorted({partition.layer for partition in (*array.partitions, *_homes(plan, array))}):
            if layer < len(found):
                found[layer].append(array.id)
    return found


def _homes(plan: Plan, array: ArrayPlan) -> Iterator[Partition]:
    """Yield the partition that each copy on an array is of."""
    for copy in array.slice_copies:
        yield plan.arrays[copy.array].partitions[copy.partition]


def show_plan(out: Console, plan: Plan, target: Target, verbose: bool) -> None:
    """Print the layers of a plan, its digital operations and its totals; each array too where asked."""
    wide = out.width >= _WIDE
    mixed = wide or len({layer.scheme for layer in plan.layers}) > 1
    columns: list[tuple[str, Justify]] = [("layer", "left"), ("op", "left"), ("matrix", "right")]
    columns += [("scheme", "left")] if mixed else []
    columns += [("zero", "right"), ("folds", "left" if wide else "right")]
    columns += [("mean cell", "right")] if wide else []
    table = new_table(*columns, ("arrays", "right"), ("ids", "left"))
    for layer, ids in zip(plan.layers, _arrays_by_layer(plan), strict=True):
        ops = [fold.op for fold in layer.folds]
        table.add_row(
            *(printable(layer.name), printable(_listed(use.op for use in layer.uses))),
            _matrix(layer.groups, layer.outputs, layer.inputs),
            *([layer.scheme] if mixed else []),
            f"{layer.sparsity:.1%}" if layer.zeros else "",
            printable(_listed(ops)) if wide else str(len(ops) or ""),
            *([siemens_text(layer.mean_cell_conductance)] if wide else []),
            *(f"{len(ids):,}", _ranges(ids)),
        )
    arrays = _arrays(plan) if verbose else None
    if plan.chip is not None:
        show_chip(out, plan.layers, plan.chip)
    print_parts(out, table, arrays, _digital(plan.digital, verbose), facts_table(_totals(plan, target)))


def show_summary(out: Console, deployment: Deployment, verbose: bool) -> None:
    """Print what a compilation made, and what to do next."""
    digital = _digital(deployment.plan.digital, verbose=False) if verbose else None
    folder = printable(shlex.quote(str(deployment.folder)))
    facts = facts_table([*_totals(deployment.plan, deployment.target), ("folder", folder)])
    print_parts(out, digital, facts, Text(f"Next: rerampile show {folder}\n      rerampile verify {folder}"))


def _totals(plan: Plan, target: Target) -> Iterator[tuple[str, str]]:
    totals, cell = plan.totals, target.cell
    kind = "analog cells" if target.analog else f"cells of {cell.levels} levels"
    grid = f"{target.rows} × {target.columns} {kind}, {siemens_text(cell.g_off)} to {siemens_text(cell.g_on)}"
    schemes = ", ".join(dict.fromkeys(layer.scheme for layer in plan.layers))
    scales = " or ".join(dict.fromkeys(layer.scale for layer in plan.layers))
    folds = sum(len(layer.folds) for layer in plan.layers)
    there = "" if target.arrays is None else f" of {target.arrays:,} there are"
    yield "model", f"{printable(plan.model.name)}, sha256 {plan.model.sha256[:16]}…"
    if plan.model.fixed_inputs:
        names = _shortened([f"'{printable(name)}'" for name in plan.model.fixed_inputs])
        yield "inputs", f"{names}: the default values are in cells and biases, others have no effect there"
    yield "target", f"{printable(target.name)}: arrays of {grid}"
    if target.failed_cells != FailedCells():
        yield "failed cells", _failed_words(target)
    yield (
        "mapping",
        f"{schemes}, one scale a {scales}; a pair conducts {siemens_text(totals.mean_pair_conductance)} on average",
    )
    yield "layers", f"{totals.layers:,}, with {_number(totals.weights, 'weight')}, {totals.sparsity:.1%} zero"
    if (clipped := clip_words(plan)) is not None:
        yield "clipped", clipped
    if (copied := copies_words(plan)) is not None:
        yield "copies", copied
    yield "nodes", f"{folds:,} folded into layers, {totals.digital_operations:,} digital"
    yield "arrays", f"{totals.arrays:,}{there}, {totals.utilisation:.1%} of their cells used"
    if totals.weights_without_cells or totals.arrays_saved_by_packing or any(layer.mask for layer in plan.layers):
        saved = f"by pruning {totals.arrays_saved_by_pruning:,}, by packing {totals.arrays_saved_by_packing:,}"
        without = _number(totals.weights_without_cells, "weight")
        yield "saved", f"{saved} of {_number(totals.arrays_without_pruning, 'array')}; {without} without cells"
    if plan.protection is not None:
        yield "protected", _protection(plan, plan.protection)
    if plan.verification is not None:
        found = plan.verification
        share = f"{found.max_weight_error_of_bound:.0%} of what the cells allow"
        yield "weights", f"off by {found.max_weight_error:.2g} at most, {share}"
        yield "outputs", _outputs(found)
        if found.outputs_unquantised:
            unquantised = max(output.relative_error for output in found.outputs_unquantised)
            yield "", f"off by {unquantised:.2g} from those of the weights before they were rounded to levels"


def _protection(plan: Plan, found: ProtectionPlan) -> str:
    """Return what copies protect, and that they took no array, in words."""
    share = f"{found.weights:,} of {_number(found.weights_with_cells, 'weight')}"
    more = plan.totals.arrays - found.arrays_without_protection
    where = "on arrays that hold weights" if not more else f"there and on {more:,} of the arrays that pruning freed"
    return f"{share}: two copies of {_number(found.slices, 'slice')} each, {where}; the {found.vote} of three counts"


def _failed_words(target: Target) -> str:
    """Return how the hardware treats failed cells, and how many of them are of which kind."""
    failed, limits = target.failed_cells, target.failed_limits
    between = f", {' to '.join(siemens_text(limit) for limit in limits)}" if failed.response == "bounded" else ""
    total = sum(category.share for category in failed.categories.values())
    kinds = [f"{c.share / total:.0%} {name.replace('_', '-')}" for name, c in failed.categories.items()]
    return f"{failed.response.replace('_', ' ')}{between}{'; ' if kinds else ''}{', '.join(kinds)}"


def _outputs(found: Verification) -> str:
    """Return how far the outputs are off, in words."""
    if not any(output.numbers for output in found.outputs):
        return "nothing was compared: every output is empty for the shapes that the model declares"
    worst = max(found.outputs, key=lambda output: output.relative_error)
    text = f"'{printable(worst.output)}' off by {worst.relative_error:.2g} of its largest magnitude"
    if len(found.outputs) > 1:
        text += f", the worst of {len(found.outputs)}"
    return f"{text} (tolerance {found.tolerance:.2g})"


def show_verification(out: Console, deployment: Deployment, found: Verification) -> None:
    """Print what ``verify`` checked and found."""
    plan = deployment.plan
    made = "compiled" if plan.chip is None else "programmed"
    of_copies = " of each copy" if any(layer.copy_count > 1 for layer in plan.layers) else ""
    rows = [
        ("checksums", f"the plan and {_number(len(plan.files), 'file')} as {made}"),
        ("placement", f"each of {_number(plan.totals.weights, 'weight')} in one place{of_copies}, none shared"),
        ("cells", f"{_number(len(plan.layers), 'layer')} decoded to the weights that were {made}"),
        ("outputs", f"{_outputs(found)}, ONNX Runtime {found.onnxruntime}"),
        ("verified", printable(str(deployment.folder))),
    ]
    print_parts(out, facts_table(rows))


# Arrays.


def _arrays(plan: Plan) -> Table:
    """Return a table of all arrays and what they hold."""
    table = new_table(("array", "right"), ("chip.tile.core.array", "left"), ("cells", "left"), ("holds", "left"))
    for array in plan.arrays:
        address = f"{array.chip}.{array.tile}.{array.core}.{array.array}"
        copies = (f"copies of slices: {_held(plan, each)}" for each in _copied(plan, array))
        held = "\n".join((*(_held(plan, partition) for partition in array.partitions), *copies))
        table.add_row(str(array.id), address, _roles(array), held)
    return table


def _copied(plan: Plan, array: ArrayPlan) -> Iterator[Partition]:
    """Yield what each copy on an array is of, as a partition at the copy's place."""
    for copy, home in zip(array.slice_copies, _homes(plan, array), strict=True):
        spans = {name: getattr(copy, name) for name in ("inputs", "outputs", "input_index", "output_index")}
        yield msgspec.structs.replace(home, row=copy.row, column=copy.column, **spans)


def _roles(array: ArrayPlan) -> str:
    slices = "" if array.slices == [0] else f", slices {_ranges(array.slices)}"
    twin = "" if array.twin is None else f", twin {array.twin}"
    return " and ".join(array.roles) + slices + twin


def _held(plan: Plan, partition: Partition) -> str:
    """Return what a partition holds, in words."""
    known = partition.layer < len(plan.layers)
    name = f"layer {partition.layer}"
    if known:
        layer = plan.layers[partition.layer]
        name = printable(layer.name) + _groups(partition, layer.groups)
    matrix = f"inputs {_ranges(sorted(partition.input_indices))}, outputs {_ranges(sorted(partition.output_indices))}"
    return f"{name}, {matrix}, at row {partition.row}, column {partition.column}"


def _groups(partition: Partition, groups: int) -> str:
    """Return the groups of a layer that a partition holds, and of which copy, as words behind the layer's name."""
    first, end = partition.groups
    copy = f", copy {partition.copy}" if partition.copy else ""
    return copy if groups == 1 else f", group{'s' if end - first > 1 else ''} {_ranges(range(first, end))}{copy}"


def array_data(deployment: Deployment, array_id: int) -> dict[str, Any]:
    """Return one array as plain data: its part of the plan, and its cells row by row."""
    array = deployment.array_plan(array_id)
    return {
        **msgspec.to_builtins(array),
        "unit": "S" if deployment.target.analog else "level",
        "cells": deployment.array(array_id).tolist(),
    }


def show_array(out: Console, deployment: Deployment, array_id: int) -> None:
    """Print where an array sits, what it holds, and a picture of its cells."""
    plan, target = deployment.plan, deployment.target
    array, cells = deployment.array_plan(array_id), deployment.array(array_id)
    used = np.zeros(cells.shape, np.bool_)
    width = len(array.roles) * len(array.slices)
    table = new_table(("layer", "left"), ("rows", "left"), ("columns", "left"), ("inputs", "left"), ("outputs", "left"))
    for partition in array.partitions:
        blocks = list(partition_blocks(partition, width))
        for _, rows, columns in blocks:
            used[np.ix_(rows, columns)] = True
        layer = plan.layers[partition.layer]
        table.add_row(
            printable(layer.name) + _groups(partition, layer.groups),
            f"{blocks[0][1][0]}-{blocks[-1][1][-1]}",
            f"{blocks[0][2][0]}-{blocks[-1][2][-1]}",
            _ranges(sorted(partition.input_indices)),
            _ranges(sorted(partition.output_indices)),
        )
    for copy, home in zip(array.slice_copies, _homes(plan, array), strict=True):
        tall, wide = copy_span(copy, array, deployment.copied_slices)
        used[tall, wide] = True
        table.add_row(
            f"{printable(plan.layers[home.layer].name)}, copy {copy.number} of slices",
            f"{tall.start}-{tall.stop - 1}",
            f"{wide.start}-{wide.stop - 1}",
            _ranges(copy.input_indices),
            _ranges(copy.output_indices),
        )
    siemens = layer_coding(target, plan.layers[deployment.layers_on(array)[0]]).conductance(cells)
    extremes = f"{siemens_text(siemens[used].min())} to {siemens_text(siemens[used].max())}"
    if not target.analog:
        extremes = f"levels {cells[used].min()} to {cells[used].max()}, {extremes}"
    address = f"chip {array.chip}, tile {array.tile}, core {array.core}, array {array.array}"
    size = f"{cells.shape[0]} × {cells.shape[1]}"
    facts = [
        ("array", f"{array.id} at {address}"),
        ("cells", f"{size}, {_roles(array)}; {used.mean():.1%} used{'' if used.all() else ', the others spare'}"),
        ("range", extremes),
    ]
    print_parts(out, table, cell_picture(out, siemens, used), facts_table(facts))


def show_targets(out: Console, targets: Sequence[Target]) -> None:
    """Print targets as a table."""
    right: Justify = "right"
    columns: list[tuple[str, Justify]] = [("target", "left"), ("array", right), ("cell", "left"), ("range", "left")]
    table = new_table(*columns, ("slices", right), ("arrays", right), ("mapping", "left"), ("source", "left"))
    for target in targets:
        table.add_row(
            printable(target.name),
            f"{target.rows} × {target.columns}",
            "analog" if target.cell.levels is None else f"{target.cell.levels} levels",
            f"{siemens_text(target.cell.g_off)} to {siemens_text(target.cell.g_on)}",
            str(target.slices),
            "unlimited" if target.arrays is None else f"{target.arrays:,}",
            target.mapping,
            printable(target.source),
        )
    print_parts(out, table)
