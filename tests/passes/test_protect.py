"""Copies of most significant slices: where the compiler puts them, read back without its own code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile import ConfigError, Deployment, PlanFormatError, Target, compile_model, verify_deployment
from rerampile.array_plan import ArrayPlan
from rerampile.checks import check_placement
from rerampile.layer_plan import CopiesPlan
from rerampile.plan import Plan
from rerampile.slice_copies import check_slice_copies
from rerampile.target import Cell

Floats = npt.NDArray[np.float32]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'


def products(*weights: Floats) -> onnx.ModelProto:
    """Independent layers, each a matrix [inputs, outputs] that a MatMul reads."""
    inputs = ", ".join(f"float[1,{w.shape[0]}] x{n}" for n, w in enumerate(weights))
    outputs = ", ".join(f"float[1,{w.shape[1]}] y{n}" for n, w in enumerate(weights))
    body = " ".join(f"y{n} = MatMul (x{n}, W{n})" for n in range(len(weights)))
    model = onnx.parser.parse_model(f"{HEADER} g ({inputs}) => ({outputs}) {{ {body} }}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, f"W{n}") for n, w in enumerate(weights))
    return model


def target_of(rows: int = 16, columns: int = 24, slices: int = 3, **keys: Any) -> Target:
    cell = Cell(g_off=1e-6, g_on=100e-6, levels=4)
    return Target(name="small", rows=rows, columns=columns, cell=cell, slices=slices, **keys)


def pruned(rows: int, columns: int, freed_rows: int, freed_columns: int, seed: int = 0) -> Floats:
    """A matrix with the first rows and the last columns zero, whose columns have scales of their own."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns), np.float32) * rng.uniform(0.5, 2, columns).astype(np.float32)
    weight[:freed_rows] = 0
    weight[:, columns - freed_columns :] = 0
    return weight


def cells_of_copies(plan: Plan, array: ArrayPlan) -> list[tuple[int, int, int, int, int, int, int, int]]:
    """Every cell of every copy: row, column; and of which layer, output, input, slice, role and number."""
    assert plan.protection is not None
    top = array.slices[-plan.protection.slices :]
    found = []
    for copy in array.slice_copies:
        home = plan.arrays[copy.array].partitions[copy.partition]
        outputs = copy.output_index or range(*(copy.outputs or (0, 0)))
        inputs = copy.input_index or range(*(copy.inputs or (0, 0)))
        for a, input_ in enumerate(inputs):
            column = copy.column
            for output in outputs:
                for slice_ in top:
                    for role in array.roles:
                        cell = 0 if role == "plus" else 1
                        found.append((copy.row + a, column, home.layer, output, input_, slice_, cell, copy.number))
                        column += 1
    return found


def cells_of_weights(plan: Plan, array: ArrayPlan) -> list[tuple[int, int, int, int, int]]:
    """Every cell of every partition of one group: row, column; layer, output, input."""
    width = len(array.roles) * len(array.slices)
    return [
        (part.row + a, part.column + b * width + k, part.layer, output, input_)
        for part in array.partitions
        for a, input_ in enumerate(part.input_indices)
        for b, output in enumerate(part.output_indices)
        for k in range(width)
    ]


def check(deployment: Deployment, unprotected: Deployment) -> None:
    plan, before = deployment.plan, unprotected.plan
    protection = plan.protection
    assert protection is not None
    assert plan.totals.arrays <= max(plan.totals.arrays_without_pruning, before.totals.arrays)
    assert protection.arrays_without_protection == before.totals.arrays
    assert [a.partitions for a in plan.arrays[: before.totals.arrays]] == [a.partitions for a in before.arrays]
    seen: dict[tuple[int, int, int, int, int], set[int]] = {}
    count = 0
    for array in plan.arrays:
        own, copied = cells_of_weights(plan, array), cells_of_copies(plan, array)
        places = [cell[:2] for cell in own] + [cell[:2] for cell in copied]
        assert len(set(places)) == len(places)
        assert all(0 <= r < deployment.target.rows and 0 <= c < deployment.target.columns for r, c in places)
        picture = deployment.array(array.id)
        for row, column, layer, output, input_, slice_, cell, number in copied:
            assert picture[row, column] == deployment.cells(plan.layers[layer])[slice_, cell, output, input_]
            numbers = seen.setdefault((layer, output, input_, slice_, cell), set())
            assert number not in numbers
            numbers.add(number)
        count += len(copied)
    assert all(numbers == {1, 2} for numbers in seen.values())
    assert count == protection.cells
    assert len({key[:3] for key in seen}) == protection.weights
    held = {cell[2:] for array in plan.arrays for cell in cells_of_weights(plan, array)}
    assert len(held) == protection.weights_with_cells
    for number, layer in enumerate(plan.layers):  # whole outputs, those of the largest gain
        outputs = {key[1] for key in seen if key[0] == number}
        whole = {key[1:] for key in held if key[0] == number and key[1] in outputs}
        assert {key[1:3] for key in seen if key[0] == number} == whole
        gain = deployment.gain(layer)
        others = {k[1] for k in held if k[0] == number} - outputs
        if outputs and others:
            assert min(gain[sorted(outputs)]) >= max(gain[sorted(others)])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    side = st.integers(1, 40)
    weights = []
    for seed in range(draw(st.integers(1, 2))):
        rows, columns = draw(side), draw(side)
        weights.append(pruned(rows, columns, draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1)), seed))
    slices = draw(st.integers(2, 4))
    return {
        "weights": weights,
        "mapping": draw(st.sampled_from(["offset", "differential", "two_column"])),
        "target": target_of(
            rows=draw(st.integers(1, 20)),
            columns=draw(st.integers(2 * slices, 30)),
            slices=slices,
            pair_layout=draw(st.sampled_from(["adjacent", "twin"])),
        ),
        "pack": draw(st.booleans()),
        "protect_msb": draw(st.integers(1, slices)),
    }


@settings(max_examples=40)
@given(case=cases())
def test_copies_take_no_array_and_no_cell_twice(case: dict[str, Any]) -> None:
    model, slices = products(*case.pop("weights")), case.pop("protect_msb")
    with tempfile.TemporaryDirectory() as folder:
        without = compile_model(model, out=Path(folder, "without"), **case)
        deployment = compile_model(model, out=Path(folder, "with"), protect_msb=slices, **case)
        check(deployment, without)
        verify_deployment(deployment.folder)


def compiled(path: Path, *weights: Floats, **options: Any) -> Deployment:
    options = {"target": target_of(), "mapping": "offset", "protect_msb": 1, **options}
    deployment = compile_model(products(*weights), out=path, **options)
    verify_deployment(deployment.folder)
    return deployment


def test_freed_columns_hold_copies_in_the_rows_of_the_originals(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "out", pruned(16, 8, 0, 4)).plan  # 4 outputs of 3 slices: 12 of 24 columns
    (array,) = plan.arrays
    assert [(c.number, c.row, c.column, c.inputs, c.outputs) for c in array.slice_copies] == [
        (1, 0, 12, (0, 16), (0, 4)),
        (2, 0, 16, (0, 16), (0, 4)),
    ]
    assert plan.protection is not None
    assert (plan.protection.weights, plan.protection.cells) == (64, 128)


def test_freed_rows_hold_copies_below_in_parts(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "out", pruned(16, 6, 8, 0), target=target_of(columns=18)).plan
    (array,) = plan.arrays  # 8 inputs stay: 8 rows of 18 columns are free
    assert [(c.number, c.row, c.column, c.inputs, c.outputs) for c in array.slice_copies] == [
        (1, 8, 0, (8, 16), (0, 6)),
        (2, 8, 6, (8, 16), (0, 6)),
    ]
    plan = compiled(tmp_path / "parts", pruned(16, 6, 6, 0), target=target_of(columns=18)).plan
    (array,) = plan.arrays  # 10 inputs stay, 6 rows are free: a copy takes two places, read one after the other
    assert plan.protection is not None
    assert plan.protection.weights == 4 * 10
    assert all(copy.row >= 10 and copy.input_count <= 6 for copy in array.slice_copies)


def test_arrays_that_pruning_freed_are_used_last_and_no_more_than_there_were(tmp_path: Path) -> None:
    weight = pruned(16, 16, 0, 8)  # 2 arrays unpruned, 1 full one pruned
    deployment = compiled(tmp_path / "out", weight)
    assert deployment.plan.protection is not None
    assert (deployment.plan.totals.arrays, deployment.plan.totals.arrays_without_pruning) == (2, 2)
    assert deployment.plan.protection.arrays_without_protection == 1
    assert deployment.plan.protection.weights == 16 * 8
    assert deployment.plan.arrays[1].partitions == []
    assert deployment.plan.totals.arrays_saved_by_packing == 0
    limited = target_of(arrays_per_core=1, cores_per_tile=1, tiles_per_chip=1, chips=1)
    plan = compiled(tmp_path / "limited", weight, target=limited).plan  # a chip that has no further array
    assert plan.protection is not None
    assert (plan.totals.arrays, plan.protection.weights) == (1, 0)


def test_an_unpruned_layer_that_fills_its_arrays_has_no_copies(tmp_path: Path) -> None:
    deployment = compiled(tmp_path / "out", pruned(16, 8, 0, 0))
    assert deployment.plan.protection is not None
    assert deployment.plan.protection.weights == 0
    assert deployment.plan.totals.arrays == 1


def test_grouped_layers_and_other_operators_have_no_copies(
    compile_text: Callable[..., Deployment], weight: Callable[..., Any]
) -> None:
    deployment = compile_text(
        f"""{HEADER} g (float[1,4,3,3] x) => (float[] y) {{
            a = Conv <group=2> (x, A) b = ConvTranspose (a, B) y = Conv (b, C) }}""",
        {"A": weight(4, 2, 1, 1), "B": weight(4, 2, 2, 2), "C": weight(3, 2, 1, 1)},
        target=target_of(64, 64),
        protect_msb=1,
    )
    homes = [
        deployment.plan.arrays[c.array].partitions[c.partition] for a in deployment.plan.arrays for c in a.slice_copies
    ]
    assert {deployment.plan.layers[home.layer].name for home in homes} == {"C"}


def test_without_the_option_the_plan_says_nothing_of_it(tmp_path: Path) -> None:
    deployment = compiled(tmp_path / "out", pruned(16, 8, 6, 0), protect_msb=0)
    text = (deployment.folder / "plan.json").read_text()
    assert "slice_copies" not in text.split('"totals"')[1]
    assert "protect" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "paper"}, "--protect-msb 1: target 'paper' holds a weight in one slice, expected several"),
        ({"protect_msb": 4}, "--protect-msb 4: expected 1 to 3, the slices of target 'small'"),
        ({"vote": "mode"}, "vote 'mode': expected median or mean"),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compiled(tmp_path / "out", pruned(16, 8, 6, 0), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": 0, "column": 0}, "takes cells that are taken"),
        ({"row": 16}, "reaches row"),
        ({"array": 9}, "a copy of partition 0 of array 9, expected one of the plan"),
        ({"partition": 1}, "a copy of partition 1 of array 0, expected one of the plan"),
        ({"number": 2}, "copy 2 of a weight is there twice"),
        ({"outputs": (7, 8)}, "a copy of outputs that its partition does not have"),
        ({"input_index": [1, 2]}, "expected either 'inputs' or 'input_index'"),
        ({"inputs": (0, 15)}, "copies of some of its inputs or one copy alone"),
    ],
)
def test_a_plan_whose_copies_were_changed_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    deployment = compiled(tmp_path / "out", pruned(16, 8, 0, 4))
    (array,) = deployment.plan.arrays
    copies = [msgspec.structs.replace(array.slice_copies[0], **change), *array.slice_copies[1:]]
    with pytest.raises(PlanFormatError, match=message):
        check_placement(changed(deployment, [msgspec.structs.replace(array, slice_copies=copies)]))


def test_copies_need_their_part_of_the_plan_and_all_partitions(tmp_path: Path) -> None:
    deployment = compiled(tmp_path / "out", pruned(20, 8, 0, 4))  # two partitions, one below the other
    arrays = list(deployment.plan.arrays)
    with pytest.raises(PlanFormatError, match=r"copies without \$\.protection"):
        check_placement(changed(deployment, arrays, protection=None))
    first = [msgspec.structs.replace(a, slice_copies=[c for c in a.slice_copies if c.array == 0]) for a in arrays]
    with pytest.raises(PlanFormatError, match="an output has copies in one partition and not in another"):
        check_placement(changed(deployment, first))
    averaged = [
        msgspec.structs.replace(layer, copies=CopiesPlan(count=2, error=0.5, error_single=1.0))
        for layer in deployment.plan.layers
    ]
    doubled = msgspec.structs.replace(deployment.plan, layers=averaged)
    with pytest.raises(PlanFormatError, match="of a programmed chip or beside averaged copies"):
        check_slice_copies(with_plan(deployment, doubled))
    turned = msgspec.structs.replace(deployment.plan.protection, slices=4)
    with pytest.raises(PlanFormatError, match="copies of 4 slices of layer 'W0', expected at most the 3"):
        check_placement(changed(deployment, arrays, protection=turned))


def test_a_copy_among_columns_of_other_roles_is_refused(tmp_path: Path) -> None:
    twins = compiled(
        tmp_path / "out", pruned(16, 8, 0, 4), mapping="differential", target=target_of(pair_layout="twin")
    )
    first, second = twins.plan.arrays
    copies = [msgspec.structs.replace(copy, array=1) for copy in first.slice_copies]
    both = [msgspec.structs.replace(array, slice_copies=copies) for array in (first, second)]
    with pytest.raises(PlanFormatError, match="on the first of two twins"):
        check_placement(changed(twins, both))
    with pytest.raises(PlanFormatError, match="differs from its twin"):
        check_placement(changed(twins, [first, msgspec.structs.replace(second, slice_copies=[])]))


def changed(deployment: Deployment, arrays: list[ArrayPlan], **fields: Any) -> Deployment:
    return with_plan(deployment, msgspec.structs.replace(deployment.plan, arrays=arrays, **fields))


def with_plan(deployment: Deployment, plan: Plan) -> Deployment:
    return Deployment(
        folder=deployment.folder, plan=plan, target=deployment.target, conductances=deployment.conductances
    )
