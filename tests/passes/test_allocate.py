"""Where weights sit: read back cell by cell from the pictures of the arrays, without the compiler's own code."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile import CapacityError, Deployment, Target, compile_model
from rerampile.array_plan import ArrayPlan
from rerampile.checks import check_placement
from rerampile.layer_plan import CopiesPlan, LayerPlan
from rerampile.schemes import MAPPINGS
from rerampile.target import Cell

Array = npt.NDArray[Any]
Compile = Callable[..., Deployment]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def model_of(weights: list[Array]) -> onnx.ModelProto:
    """Independent layers: a matrix [inputs, outputs] is a MatMul, a tensor [groups, outputs, inputs] a grouped Conv."""
    declared, body, made = [], [], []
    for n, weight in enumerate(weights):
        tensor = weight
        if weight.ndim == 2:
            declared.append((f"float[1,{weight.shape[0]}] x{n}", f"float[1,{weight.shape[1]}] y{n}"))
            body.append(f"y{n} = MatMul (x{n}, W{n})")
        else:
            groups, outputs, inputs = weight.shape
            tensor = weight.reshape(groups * outputs, inputs, 1)
            declared.append((f"float[1,{groups * inputs},1] x{n}", f"float[1,{groups * outputs},1] y{n}"))
            body.append(f"y{n} = Conv <group={groups}> (x{n}, W{n})")
        made.append(onnx.numpy_helper.from_array(tensor, f"W{n}"))
    inputs_, outputs_ = (", ".join(d[i] for d in declared) for i in (0, 1))
    model = onnx.parser.parse_model(f"{HEADER} g ({inputs_}) => ({outputs_}) {{ {' '.join(body)} }}")
    model.graph.initializer.extend(made)
    return model


@st.composite
def sparse_weights(draw: st.DrawFn) -> list[Array]:
    """A few layers, whole, with scattered zeros, with empty rows and columns, with nothing left, or of ones alone."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    side = st.integers(1, 20)
    made = []
    for _ in range(draw(st.integers(1, 3))):
        grouped = draw(st.booleans())
        shape = (draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 5))) if grouped else None
        weight = rng.uniform(0.1, 1, shape or (draw(side), draw(side))).astype(np.float32)
        weight *= rng.choice([-1, 1], weight.shape)
        kind = draw(st.sampled_from(["whole", "scattered", "lines", "nothing", "ones"]))
        if kind == "scattered":
            weight[rng.random(weight.shape) < draw(st.sampled_from([0.3, 0.9]))] = 0
        elif kind == "lines":
            weight[rng.random(weight.shape[:-1]) < 0.5] = 0
            weight[..., rng.random(weight.shape[-1]) < 0.5] = 0
        elif kind == "nothing":
            weight[:] = 0
        elif kind == "ones":  # for which a single cell is best
            weight[:] = 1
        made.append(weight)
    return made


@st.composite
def targets(draw: st.DrawFn) -> Target:
    levels = draw(st.sampled_from([None, 4, 16]))
    slices = 1 if levels is None else draw(st.integers(1, 2))
    return Target(
        name="drawn",
        rows=draw(st.integers(1, 20)),
        columns=draw(st.integers(2 * slices, 24)),
        slices=slices,
        pair_layout=draw(st.sampled_from(["adjacent", "twin"])),
        cell=Cell(g_off=1e-6, g_on=1e-4, levels=levels),
    )


MAPPING = st.sampled_from(MAPPINGS)


def places(layer: LayerPlan, array: ArrayPlan, number: int) -> list[tuple[int, int, int, int]]:
    """(row, first column, matrix row, matrix column) of every weight of a layer on an array, as the plan tells it."""
    width = len(array.roles) * len(array.slices)
    found = []
    for p in array.partitions:
        if p.layer != number:
            continue
        inputs = list(range(*p.inputs)) if p.inputs is not None else list(p.input_index or ())
        outputs = list(range(*p.outputs)) if p.outputs is not None else list(p.output_index or ())
        for k, group in enumerate(range(*p.groups)):
            for i, input_ in enumerate(inputs):
                for o, output in enumerate(outputs):
                    row = p.row + k * len(inputs) + i
                    column = p.column + (k * len(outputs) + o) * width
                    found.append((row, column, group * layer.outputs + output, input_))
    return found


def value(deployment: Deployment, layer: LayerPlan, plus: Array, minus: Array | None) -> Array:
    """What cells [slices, ...] are worth, from the formula in the plan's conventions."""
    significances = np.array(layer.significances).reshape(-1, *[1] * (plus.ndim - 1))
    total = (plus * significances).sum(axis=0)
    return total - (layer.reference if minus is None else (minus * significances).sum(axis=0))


def read_back(deployment: Deployment) -> None:
    """Rebuild every matrix from the pictures; check that each copy holds every weight once and no line is shared."""
    plan = deployment.plan
    pictures = [deployment.array(array.id) for array in plan.arrays]
    for number, layer in enumerate(plan.layers):
        shape = (layer.groups * layer.outputs, layer.inputs)
        cells = np.zeros((layer.slices, layer.cells, *shape))
        held = np.zeros((layer.cells, *shape), int)
        for array, picture in zip(plan.arrays, pictures, strict=True):
            for row, column, output, input_ in places(layer, array, number):
                for s, slice_ in enumerate(array.slices):
                    for r, role in enumerate(array.roles):
                        cell = picture[row, column + s * len(array.roles) + r]
                        cells[slice_, ["plus", "minus"].index(role), output, input_] = cell
                for role in array.roles:
                    held[["plus", "minus"].index(role), output, input_] += 1
        weights = deployment.weights(layer)
        for region in plan.skipped:
            if region.layer == number:
                outputs = range(*region.outputs) if region.outputs is not None else region.output_index
                inputs = range(*region.inputs) if region.inputs is not None else region.input_index
                block = np.ix_([region.group * layer.outputs + o for o in outputs], list(inputs))
                assert not weights[block].any()
                for role in held:
                    role[block] += layer.copy_count
                cells[:, :, *block] = deployment.cells(layer)[:, :, *block]
        assert (held == layer.copy_count).all()
        gain = deployment.gain(layer).astype(np.float64)[:, None]
        minus = cells[:, 1] if layer.cells == 2 else None
        np.testing.assert_allclose(value(deployment, layer, cells[:, 0], minus) * gain, weights, rtol=1e-5, atol=1e-6)
    for array, picture in zip(plan.arrays, pictures, strict=True):
        check_lines(deployment, array, picture)


def check_lines(deployment: Deployment, array: ArrayPlan, picture: Array) -> None:
    """No two partitions share a row or a column; spare cells do no harm to what is read."""
    assert picture.shape == (deployment.target.rows, deployment.target.columns)
    width = len(array.roles) * len(array.slices)
    rows: dict[int, int] = {}
    columns: dict[int, int] = {}
    used = set()
    for number in {p.layer for p in array.partitions}:
        for row, column, _, _ in places(deployment.plan.layers[number], array, number):
            assert rows.setdefault(row, number) == number
            used.add((row, column))
            for c in range(column, column + width):
                assert columns.setdefault(c, number) == number
    span = [(p.row, p.row + (p.groups[1] - p.groups[0]) * p.input_count) for p in array.partitions]
    assert max(Counter(r for first, last in span for r in range(first, last)).values()) == 1
    zero_cells = {p.layer: zero_weight(deployment, deployment.plan.layers[p.layer]) for p in array.partitions}
    off = 0 if deployment.target.cell.levels else np.float32(deployment.target.cell.g_off)
    for row in range(picture.shape[0]):
        for column in range(0, picture.shape[1] - width + 1, width):
            if (row, column) in used:
                continue
            same = rows.get(row) is not None and rows.get(row) == columns.get(column)
            for s, slice_ in enumerate(array.slices):
                for r, role in enumerate(array.roles):
                    cell = picture[row, column + s * len(array.roles) + r]
                    expected = zero_cells[rows[row]][slice_, ["plus", "minus"].index(role)] if same else off
                    assert cell == expected


def zero_weight(deployment: Deployment, layer: LayerPlan) -> Array:
    """Cells [slices, cells] that are worth nothing, from the definition of the scheme."""
    levels, (off, on) = deployment.target.cell.levels, (np.float32(1e-6), np.float32(1e-4))
    if layer.scheme == "optimal":
        low, high = (off, on) if levels is None else (0, levels - 1)
        aims = np.clip(layer.common_modes, low, high)
        return np.repeat((aims.astype(np.float32) if levels is None else np.rint(aims))[:, None], 2, axis=1)
    if levels is None:
        middle = np.float32((float(off) + float(on)) / 2)
        return np.array([[{"two_column": off, "differential": on}.get(layer.scheme, middle)] * layer.cells])
    top = levels**layer.slices - 1
    number = {"two_column": 0, "differential": top, "offset": (top + 1) // 2, "balanced": top // 2}[layer.scheme]
    return np.array([[number // levels**k % levels] * layer.cells for k in range(layer.slices)])


@settings(max_examples=80)
@given(sparse_weights(), targets(), MAPPING, st.booleans())
def test_every_weight_sits_in_one_place(weights: list[Array], target: Target, mapping: str, pack: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        deployment = compile_model(
            model_of(weights), out=f"{folder}/out", target=target, mapping=mapping, pack=pack, tolerance=1.0
        )
        check_placement(deployment)
        read_back(deployment)
        totals = deployment.plan.totals
        assert totals.arrays == len(deployment.plan.arrays)
        assert totals.arrays_saved_by_pruning >= 0
        assert totals.arrays_saved_by_packing >= 0
        assert totals.cells == totals.arrays * target.rows * target.columns
        assert totals.cells_used <= totals.cells


@settings(max_examples=40)
@given(sparse_weights(), targets(), MAPPING, st.booleans(), st.integers(0, 30))
def test_copies_take_arrays_that_are_left_over(
    weights: list[Array], target: Target, mapping: str, pack: bool, spare: int
) -> None:
    """All of them whole, never more than there are, behind arrays that stay as they are, and no layer for the worse."""
    options: dict[str, Any] = {"mapping": mapping, "pack": pack, "tolerance": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        plain = compile_model(model_of(weights), out=f"{folder}/plain", target=target, **options)
        there = len(plain.plan.arrays)
        target = replace(target, arrays_per_core=max(1, there + spare))
        deployment = compile_model(
            model_of(weights), out=f"{folder}/out", target=target, spend_spare_arrays=True, **options
        )
        check_placement(deployment)
        read_back(deployment)
    plan = deployment.plan
    if mapping not in ("auto", "optimal"):
        assert plan.arrays[:there] == plain.plan.arrays
    assert len(plan.arrays) <= max(1, there + spare)
    assert plan.totals.arrays_spent == len(plan.arrays) - there
    assert plan.totals.arrays_saved_by_packing == plain.plan.totals.arrays_saved_by_packing
    for array in plan.arrays[there:]:
        assert all(partition.copy for partition in array.partitions)
        copies = {(partition.layer, partition.copy) for partition in array.partitions}
        assert len({layer for layer, _ in copies}) == len(copies)
    for layer in plan.layers:
        assert isinstance(layer.copies, CopiesPlan)
        assert layer.copies.error == layer.copies.error_single / layer.copies.count
        assert layer.copies.count == 1 or layer.copies.error < layer.copies.error_single


@settings(max_examples=25)
@given(sparse_weights(), st.integers(1, 12), st.integers(2, 12))
def test_arrays_are_counted_as_a_brute_force_count_does(weights: list[Array], rows: int, columns: int) -> None:
    """For whole matrices: strips of kept outputs, each as many arrays as its needed inputs take."""
    weights = [w if w.ndim == 2 else w[0].T for w in weights]
    target = Target(name="t", rows=rows, columns=columns, cell=Cell(g_off=1e-6, g_on=1e-4))
    with tempfile.TemporaryDirectory() as folder:
        totals = compile_model(model_of(weights), out=f"{folder}/out", target=target).plan.totals
    outputs = columns // 2
    dense = sparse = 0
    for weight in weights:
        dense += -(-weight.shape[0] // rows) * -(-weight.shape[1] // outputs)
        kept = [o for o in range(weight.shape[1]) if weight[:, o].any()]
        for start in range(0, len(kept), outputs):
            needed = weight[:, kept[start : start + outputs]].any(axis=1).sum()
            sparse += -(-int(needed) // rows)
    assert (totals.arrays_without_pruning, totals.arrays_before_packing, totals.arrays) == (dense, sparse, sparse)
    assert totals.arrays_saved_by_pruning == dense - sparse


def rows_by_columns(rows: int, columns: int, **keys: Any) -> Target:
    return Target(name="small", rows=rows, columns=columns, cell=Cell(g_off=1e-6, g_on=1e-4), **keys)


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def test_compaction_lists_what_it_left_out(compile_text: Compile) -> None:
    weight = ones(6, 4)
    weight[:, 1] = 0
    weight[[0, 3]] = 0
    deployment = compile_text(f"{HEADER} g (float[2,6] x) => (float[] y) {{ y = MatMul (x, W) }}", {"W": weight})
    (array,) = deployment.plan.arrays
    (partition,) = array.partitions
    assert (partition.input_index, partition.output_index) == ([1, 2, 4, 5], [0, 2, 3])
    assert [(r.inputs, r.input_index, r.outputs, r.output_index) for r in deployment.plan.skipped] == [
        ((0, 6), None, (1, 2), None),
        (None, [0, 3], None, [0, 2, 3]),
    ]
    assert deployment.plan.totals.weights_without_cells == 12
    assert deployment.plan.totals.cells_used == 24


def test_depthwise_groups_lie_on_the_diagonal(tmp_path: Any) -> None:
    target = rows_by_columns(20, 20)
    deployment = compile_model(model_of([ones(6, 1, 4)]), out=tmp_path / "out", target=target)
    assert [(p.groups, p.row, p.column) for a in deployment.plan.arrays for p in a.partitions] == [
        ((0, 5), 0, 0),
        ((5, 6), 0, 0),
    ]


def test_packing_shares_arrays_of_several_layers(tmp_path: Any) -> None:
    model = model_of([ones(4, 3), ones(4, 3), ones(8, 5), ones(2, 2)])
    apart = compile_model(model, out=tmp_path / "apart", target=rows_by_columns(16, 16))
    packed = compile_model(model, out=tmp_path / "packed", target=rows_by_columns(16, 16), pack=True)
    assert (apart.plan.totals.arrays, packed.plan.totals.arrays) == (4, 2)
    assert packed.plan.totals.arrays_saved_by_packing == 2
    off = np.float32(1e-6)
    picture = packed.array(0)
    first, second = packed.plan.arrays[0].partitions[:2]
    assert first.layer != second.layer
    assert picture[first.row, second.column] == off
    assert picture[second.row, first.column] == off


def test_twins_mirror_one_another(tmp_path: Any) -> None:
    target = rows_by_columns(8, 8, pair_layout="twin", arrays_per_core=3, cores_per_tile=2, tiles_per_chip=None)
    deployment = compile_model(model_of([ones(20, 9)]), out=tmp_path / "out", target=target)
    arrays = deployment.plan.arrays
    assert len(arrays) == 12
    for plus, minus in zip(arrays[::2], arrays[1::2], strict=True):
        assert (plus.roles, minus.roles) == (["plus"], ["minus"])
        assert (plus.twin, minus.twin) == (minus.id, plus.id)
        assert plus.partitions == minus.partitions
    assert [(a.chip, a.tile, a.core, a.array) for a in arrays[:8]] == [
        (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 0),
        (0, 0, 1, 1), (0, 0, 1, 2), (0, 1, 0, 0), (0, 1, 0, 1),
    ]  # fmt: skip


def test_capacity_refusals_say_what_is_needed(tmp_path: Any) -> None:
    model = model_of([ones(20, 9)])
    too_few = rows_by_columns(8, 8, arrays_per_core=4)
    for pack, share in ((False, "let small partitions share arrays with --pack, "), (True, "")):
        needed = f"needs 9 arrays of 8 x 8 cells, target 'small' has 4; prune more, {share}or take a target"
        with pytest.raises(CapacityError, match=needed):
            compile_model(model, out=tmp_path / "out", target=too_few, pack=pack)
    too_narrow = Target(name="narrow", rows=8, columns=5, slices=3, cell=Cell(g_off=1e-6, g_on=1e-4, levels=4))
    with pytest.raises(CapacityError, match=r"one output takes 6 columns \(3 slices of 2 cells\), an array has 5"):
        compile_model(model, out=tmp_path / "out", target=too_narrow)
    assert list(tmp_path.iterdir()) == []
    compile_model(model, out=tmp_path / "out", target=rows_by_columns(8, 8, arrays_per_core=9))
