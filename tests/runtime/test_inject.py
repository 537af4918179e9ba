"""Weights on a faulty chip, against a simulation of the arrays' currents and against the closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from rerampile import Deployment, Target, compile_model, verify_deployment
from rerampile.deployment import layer_coding, layer_segments, partition_blocks
from rerampile.errors import PlanFormatError
from rerampile.failed_cells import FailedCells
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import STUCK_OFF, STUCK_ON, ChipGeometry, FaultMap, stuck_ends
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector, LayerFaults
from rerampile.runtime.random_field import Field
from rerampile.schemes import SCHEMES
from rerampile.target import Cell, Stuck

Floats = npt.NDArray[np.float64]

OUTSIDE = {"stuck_off": Stuck(mean=0.5e-6, spread=0.2e-6), "stuck_on": Stuck(mean=150e-6, spread=30e-6)}
TABLE = (1e-6, 20e-6, 37e-6, 100e-6)
CELLS = {
    "analog": Cell(g_off=1e-6, g_on=100e-6, **OUTSIDE),
    "levels": Cell(g_off=1e-6, g_on=100e-6, levels=4, **OUTSIDE),
    "table": Cell(g_off=1e-6, g_on=100e-6, levels=4, level_table=TABLE, **OUTSIDE),
}

# Groups of one kind and of another, a matrix that takes several arrays, a depthwise one, and empty rows and columns.
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[2, 6, 4, 4] image) => (float[2, 21] scores) {
    a = Conv <group = 2, pads = [1, 1, 1, 1]> (image, grouped)
    b = Conv <group = 8, pads = [1, 1, 1, 1]> (a, depthwise)
    c = Flatten (b)
    scores = MatMul (c, dense)
}
"""


QUICK = {  # the scheme that is always tested
    ("analog", "adjacent"): "differential",
    ("analog", "twin"): "offset",
    ("levels", "adjacent"): "offset",
    ("levels", "twin"): "optimal",
    ("table", "adjacent"): "two_column",
    ("table", "twin"): "balanced",
}


def weights() -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(3)
    made = {
        "grouped": rng.standard_normal((8, 3, 3, 3), np.float32),
        "depthwise": rng.standard_normal((8, 1, 3, 3), np.float32),
        "dense": rng.standard_normal((128, 21), np.float32),
    }
    made["dense"][5:40:3] = 0
    made["dense"][:, 7] = 0
    made["grouped"][6, 1] = 0
    return made


def build(text: str, values: dict[str, npt.NDArray[np.float32]], out: Path, **options: Any) -> Deployment:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.items())
    return compile_model(model, out=out, **options)


def target_of(cell: Cell, slices: int = 1, layout: str = "adjacent", rows: int = 64, columns: int = 44) -> Target:
    return Target(name="small", rows=rows, columns=columns, slices=slices, pair_layout=layout, cell=cell)


def simulate(deployment: Deployment, number: int, faults: FaultMap) -> Floats:
    """The matrix [groups * outputs, groups * inputs] that a layer's arrays compute, one driven input at a time.

    Of copies it is the mean. The sum of each column has the gain of the partition that the column is of.
    """
    plan, target, geometry = deployment.plan, deployment.target, ChipGeometry.of(deployment)
    layer = plan.layers[number]
    coding = layer_coding(target, layer)
    step = (float(np.float32(target.cell.g_on)) - float(np.float32(target.cell.g_off))) / ((coding.levels or 2) - 1)
    matrix = np.zeros((layer.groups * layer.outputs, layer.groups * layer.inputs))
    gains = deployment.gain(layer).reshape(len(matrix), -1).astype(np.float64)
    where = geometry.locate(faults.cell)
    for array in plan.arrays:
        picture = deployment.array(array.id)
        picture = (np.array(TABLE)[picture] if coding.level_table else picture).astype(np.float64)
        on_it = where[0] == array.id
        stuck = faults.conductance[on_it].astype(np.float64)
        if coding.integer:
            stuck = (stuck - float(np.float32(target.cell.g_off))) / step
        picture[where[1][on_it], where[2][on_it]] = stuck

        in_row, out_row = np.full(target.rows, -1), np.full(target.columns, -1)
        sign, gain = np.zeros((2, target.columns))
        width = len(array.slices) * len(array.roles)
        signs = [coding.significances[k] * (1 if role == "plus" else -1) for k in array.slices for role in array.roles]
        for partition in (p for p in array.partitions if p.layer == number):
            for group, rows, columns in partition_blocks(partition, width):
                in_row[rows] = group * layer.inputs + np.array(partition.input_indices)
                out_row[columns] = np.repeat(group * layer.outputs + np.array(partition.output_indices), width)
                turned = np.isin(  # their currents are subtracted the other way round
                    np.arange(partition.output_count) + (group - partition.groups[0]) * partition.output_count,
                    partition.flipped or [],
                )
                segment = layer_segments(layer).number_of(np.array(partition.input_indices))[0]
                gain[columns] = gains[out_row[columns], segment]
                sign[columns] = np.tile(signs, partition.output_count) * np.repeat(np.where(turned, -1, 1), width)
        for driven in np.unique(in_row[in_row >= 0]):
            inputs = (in_row == driven).astype(np.float64)
            currents = inputs @ picture * sign * gain
            np.add.at(matrix[:, driven], out_row[out_row >= 0], currents[out_row >= 0])
            if coding.cells == 1:
                reference = coding.reference * inputs.sum() * gain[out_row >= 0][::width]
                np.subtract.at(matrix[:, driven], out_row[out_row >= 0][::width], reference)
    copies = {partition.copy for array in plan.arrays for partition in array.partitions if partition.layer == number}
    return matrix / max(1, len(copies))


def injected(deployment: Deployment, number: int, faults: list[LayerFaults]) -> Floats:
    """The same matrix from what the injector returns."""
    layer = deployment.plan.layers[number]
    values = deployment.weights(layer).astype(np.float64)
    matrix = np.zeros((layer.groups * layer.outputs, layer.groups * layer.inputs))
    for found in (f for f in faults if f.layer == number):
        values.reshape(-1)[found.index] = found.value
        if found.leaks is not None:
            matrix[found.leaks.out_row, found.leaks.in_row] += found.leaks.value
            assert (found.leaks.in_row // layer.inputs != found.leaks.out_row // layer.outputs).all()
            assert (np.diff(found.leaks.out_row * matrix.shape[1] + found.leaks.in_row) > 0).all()
        assert len(np.unique(found.index)) == len(found.index)
    for group in range(layer.groups):
        rows, columns = slice(group * layer.outputs, None), slice(group * layer.inputs, None)
        block = values[rows][: layer.outputs]
        matrix[rows, columns][: layer.outputs, : layer.inputs] += block
    return matrix


def check_against_simulation(
    deployment: Deployment, faults: FaultMap, read: FaultMap | None = None
) -> list[LayerFaults]:
    """``read`` is what the hardware reads, where that is not what cells conduct."""
    found = Injector(deployment).faults(faults)
    for number, layer in enumerate(deployment.plan.layers):
        expected = simulate(deployment, number, read or faults)
        coding = layer_coding(deployment.target, layer)
        ulp = 4e-7 * coding.high * max(1.0, float(faults.conductance.max(initial=0)) / coding.g_on)
        gain = deployment.gain(layer).reshape(len(expected), -1).max(axis=1, keepdims=True).astype(np.float64)
        assert (np.abs(injected(deployment, number, found) - expected) <= ulp * gain).all()
    return found


def random_faults(deployment: Deployment, rate: float = 0.15, run: int = 0) -> FaultMap:
    model = FaultModel(stuck_off=rate / 2, stuck_on=rate / 2)
    return draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=1, run=run)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layout", ["adjacent", "twin"])
@pytest.mark.parametrize(("kind", "slices"), [("analog", 1), ("levels", 1), ("levels", 3), ("table", 1), ("table", 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_and_leaks_are_what_the_arrays_compute(
    scheme: str, kind: str, slices: int, layout: str, pack: bool, tmp_path: Path
) -> None:
    target = target_of(CELLS[kind], slices, layout)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, mapping=scheme, pack=pack)
    assert any(len(array.partitions) > 1 for array in deployment.plan.arrays) or not pack

    found = check_against_simulation(deployment, random_faults(deployment))

    assert [f.layer for f in found] == [0, 1, 2]
    assert all(len(f.index) for f in found)
    assert found[1].leaks is not None
    assert found[2].leaks is None
    assert {f.value.dtype for f in found} == {np.dtype(np.float32)}
    assert {f.index.dtype for f in found} == {np.dtype(np.int64)}


def as_read(deployment: Deployment, faults: FaultMap) -> FaultMap:
    """What hardware that bounds or cuts off failed cells reads of them, cell by cell."""
    target, geometry = deployment.target, ChipGeometry.of(deployment)
    response, read = target.failed_cells.response, {}
    for cell, conductance in zip(faults.cell.tolist(), faults.conductance.tolist(), strict=True):
        read[cell] = min(max(conductance, 5e-6), 120e-6) if response == "bounded" else 0.0
        id_, row, column = (int(part[0]) for part in geometry.locate(np.array([cell])))
        array = deployment.plan.arrays[id_]
        if response == "isolated_pair" and array.twin is not None:
            read[(array.twin * target.rows + row) * target.columns + column] = 0.0
        elif response == "isolated_pair" and len(array.roles) == 2:
            role = column % (2 * len(array.slices)) % 2  # the two roles of a slice are neighbours
            if role or column + 1 < target.columns:
                read[cell - 1 if role else cell + 1] = 0.0
    cells = np.array(sorted(read))
    values = np.array([read[cell] for cell in cells.tolist()], np.float32)
    return FaultMap(cell=cells, state=np.ones(len(cells), np.uint8), conductance=values)


@pytest.mark.parametrize("response", ["bounded", "isolated_cell", "isolated_pair"])
@pytest.mark.parametrize("layout", ["adjacent", "twin"])
@pytest.mark.parametrize(("kind", "slices"), [("analog", 1), ("levels", 3), ("table", 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_failed_cells_are_read_as_the_hardware_does(
    scheme: str, kind: str, slices: int, layout: str, response: str, tmp_path: Path
) -> None:
    """On arrays with an odd number of columns, of which the last has no neighbour, and packed ones."""
    failed = FailedCells(response=response, low=5e-6, high=120e-6)
    target = replace(target_of(CELLS[kind], slices, layout, columns=45), failed_cells=failed)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, mapping=scheme, pack=True)
    faults = random_faults(deployment)
    plain = replace(deployment, target=replace(target, failed_cells=FailedCells()))

    found = check_against_simulation(deployment, faults, as_read(deployment, faults))

    assert len(found) == 3
    assert (found[1].leaks is None) == (response == "isolated_pair" and scheme != "offset")
    more = len(found[2].index) / len(Injector(plain).faults(faults)[2].index)
    assert more == pytest.approx(1) if scheme == "offset" or response != "isolated_pair" else more >= 1


COPIED = [
    pytest.param(scheme, kind, slices, layout, pack, marks=() if scheme == QUICK[kind, layout] else pytest.mark.slow)
    for scheme in SCHEMES
    for kind, slices in (("analog", 1), ("levels", 3), ("table", 1))
    for layout in ("adjacent", "twin")
    for pack in (False, True)
]


@pytest.mark.parametrize(("scheme", "kind", "slices", "layout", "pack"), COPIED)
def test_copies_are_averaged(scheme: str, kind: str, slices: int, layout: str, pack: bool, tmp_path: Path) -> None:
    """The weights and leaks of chips whose copies have stuck cells of their own, sometimes the same cell in several."""
    target = replace(target_of(CELLS[kind], slices, layout), arrays_per_core=60)
    options = {"target": target, "mapping": scheme, "pack": pack, "spend_spare_arrays": True}
    deployment = build(TEXT, weights(), tmp_path / "out", **options)
    verify_deployment(deployment.folder)
    assert [layer.copy_count > 2 for layer in deployment.plan.layers[:2]] == [True, True]

    found = check_against_simulation(deployment, random_faults(deployment))

    assert [f.layer for f in found] == [0, 1, 2]
    assert found[1].leaks is not None
    assert all(len(np.unique(f.index)) == len(f.index) for f in found)


@pytest.mark.parametrize("response", ["bounded", "isolated_pair"])
def test_hardware_reads_failed_cells_of_each_copy_by_itself(response: str, tmp_path: Path) -> None:
    """A pair that is cut off takes its share of the mean along."""
    failed = FailedCells(response=response, low=5e-6, high=120e-6)
    target = replace(target_of(CELLS["analog"]), arrays_per_core=60, failed_cells=failed)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, spend_spare_arrays=True)
    faults = random_faults(deployment)

    found = check_against_simulation(deployment, faults, as_read(deployment, faults))

    assert len(found) == 3
    assert max(layer.copy_count for layer in deployment.plan.layers) > 2


def test_copies_leave_a_chip_without_faults_as_it_is(tmp_path: Path) -> None:
    """To the bit, where each cell is stuck at what it holds; and the first arrays are those without copies."""
    target = replace(target_of(Cell(g_off=1e-6, g_on=100e-6)), arrays_per_core=60)
    plain = build(TEXT, weights(), tmp_path / "plain", target=target)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, spend_spare_arrays=True)
    coding = layer_coding(target, deployment.plan.layers[0])
    held = np.concatenate([coding.conductance(deployment.array(a.id)).reshape(-1) for a in deployment.plan.arrays])
    state = np.full(len(held), STUCK_OFF, np.uint8)

    found = Injector(deployment).faults(FaultMap(cell=np.arange(len(held)), state=state, conductance=held))

    assert {layer.copy_count for layer in deployment.plan.layers} - {1, 2, 4}  # whose shares of a weight round
    for faults, layer in zip(found, deployment.plan.layers, strict=True):
        assert faults.leaks is None
        np.testing.assert_array_equal(faults.value, deployment.weights(layer).reshape(-1)[faults.index])
    assert deployment.plan.arrays[: len(plain.plan.arrays)] == plain.plan.arrays
    for name in ("conductances.safetensors", "deployed.onnx"):
        assert (deployment.folder / name).read_bytes() == (plain.folder / name).read_bytes()


def test_both_ways_run_copies_alike(tmp_path: Path) -> None:
    target = replace(target_of(CELLS["analog"]), rows=36, columns=16, arrays_per_core=90)  # a group of an array's own
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, spend_spare_arrays=True)
    assert deployment.plan.layers[0].copy_count > 1
    inputs = {"image": np.random.default_rng(2).standard_normal((2, 6, 4, 4), np.float32)}
    faults = [f for f in Injector(deployment).faults(random_faults(deployment)) if f.leaks is None]
    outputs = []
    for method in ("fast", "slow"):
        executor = open_executor(deployment, method=method, threads=1)
        executor.apply(faults)
        outputs.append(executor.run(inputs)[0])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4 * np.abs(outputs[1]).max())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("kind", "slices"), [("analog", 1), ("levels", 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_partition_has_a_gain_of_its_own(scheme: str, kind: str, slices: int, pack: bool, tmp_path: Path) -> None:
    """Leaks into a column have the gain of what that column sums."""
    target = target_of(CELLS[kind], slices, rows=12)
    options: dict[str, Any] = {"mapping": scheme, "pack": pack, "scale": "partition"}
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, **options)
    found = check_against_simulation(deployment, random_faults(deployment))
    assert all(len(f.index) for f in found)
    if not pack:
        joined = two_arrays_in_one(deployment)
        check_against_simulation(joined, random_faults(joined))


@pytest.mark.parametrize("scale", ["channel", "partition"])
@pytest.mark.parametrize("layout", ["adjacent", "twin"])
@pytest.mark.parametrize(("kind", "slices"), [("analog", 1), ("levels", 3), ("table", 1)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_programmed_chips_are_what_the_arrays_compute(
    scheme: str, kind: str, slices: int, layout: str, scale: str, tmp_path: Path
) -> None:
    """With columns that have changed roles, groups on a diagonal, packed arrays, and no less error than before."""
    target = target_of(CELLS[kind], slices, layout)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, mapping=scheme, pack=True, scale=scale)
    source = ChipSource(path=tmp_path / "out" / "plan.json", number=0, faults=random_faults(deployment))

    chip = program_chip(deployment, source, tmp_path / "chip", steps=("compensate", "assign", "flip", "gain"))

    check_against_simulation(chip, source.faults)
    verify_deployment(chip.folder)
    flips = sum(len(p.flipped or []) for array in chip.plan.arrays for p in array.partitions)
    assert (flips > 0) == (scheme != "offset")
    assert chip.plan.chip is not None
    errors = [step.error for step in chip.plan.chip.steps]
    assert errors[-1] < 0.8 * errors[0] if scheme != "offset" else errors[-1] < errors[0]
    assert errors[4] <= errors[3] * (1 + 1e-6)
    assert errors[3] < errors[1]
    assert any(p.output_index is not None for array in chip.plan.arrays for p in array.partitions)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leaks_inside_a_group_are_weights(scheme: str, tmp_path: Path) -> None:
    """Pieces of one matrix side by side on a diagonal, as plans of others may have them."""
    target = target_of(CELLS["analog"], rows=12, columns=8)
    small = build(TEXT, weights(), tmp_path / "out", target=target, mapping=scheme)
    deployment = two_arrays_in_one(small)

    found = check_against_simulation(deployment, random_faults(deployment))

    assert found[2].leaks is None
    without = Injector(small).faults(random_faults(small))
    assert len(found[2].index) > 1.5 * len(without[2].index)


def two_arrays_in_one(deployment: Deployment) -> Deployment:
    """The same deployment on arrays of twice the rows and columns, two of the small ones on the diagonal of each."""
    target = replace(deployment.target, rows=2 * deployment.target.rows, columns=2 * deployment.target.columns)
    arrays = []
    for array in deployment.plan.arrays:
        corner = array.id % 2
        moved = [
            msgspec.structs.replace(
                p, row=p.row + corner * deployment.target.rows, column=p.column + corner * deployment.target.columns
            )
            for p in array.partitions
        ]
        if corner:
            arrays[-1] = msgspec.structs.replace(arrays[-1], partitions=arrays[-1].partitions + moved)
        else:
            arrays.append(msgspec.structs.replace(array, id=len(arrays), partitions=moved))
    plan = msgspec.structs.replace(deployment.plan, arrays=arrays, target=target.to_dict())
    return replace(deployment, plan=plan, target=target)


def test_no_faults_and_faults_of_spare_cells_do_nothing(tmp_path: Path) -> None:
    deployment = build(TEXT, weights(), tmp_path / "out", target=target_of(CELLS["analog"], rows=64, columns=64))
    geometry = ChipGeometry.of(deployment)
    used = np.zeros((geometry.arrays, geometry.rows, geometry.columns), np.bool_)
    for array in deployment.plan.arrays:
        for partition in array.partitions:
            blocks = list(partition_blocks(partition, 2))
            used[array.id, blocks[0][1][0] : blocks[-1][1][-1] + 1, blocks[0][2][0] : blocks[-1][2][-1] + 1] = True
    spare = np.flatnonzero(~used.reshape(-1))
    state = np.full(len(spare), STUCK_ON, np.uint8)
    all_spare = FaultMap(cell=spare, state=state, conductance=stuck_ends(deployment.target, state))
    none = random_faults(deployment, rate=0)
    injector = Injector(deployment)

    assert len(spare) > 1000
    assert injector.faults(all_spare) == []
    assert injector.faults(none) == []


@pytest.mark.parametrize("ends", [(1e-6, 1e-4), (3e-6, 7e-5), (0.1e-6, 33.3e-6), (0, 1e-3)])
@pytest.mark.parametrize("kind", ["analog", "levels"])
@pytest.mark.parametrize("scheme", ["two_column", "differential"])
def test_cells_stuck_at_what_they_hold_change_nothing(
    scheme: str, kind: str, ends: tuple[float, float], tmp_path: Path
) -> None:
    """Every cell of the chip, so that every healthy weight comes back to the bit."""
    cell = Cell(g_off=ends[0], g_on=ends[1], levels=2 if kind == "levels" else None)
    target = target_of(cell, 3 if kind == "levels" else 1)
    deployment = build(TEXT, weights(), tmp_path / "out", target=target, mapping=scheme, pack=True)
    coding = layer_coding(target, deployment.plan.layers[0])
    held = np.concatenate([coding.conductance(deployment.array(a.id)).reshape(-1) for a in deployment.plan.arrays])
    state = np.full(len(held), STUCK_OFF, np.uint8)

    found = Injector(deployment).faults(FaultMap(cell=np.arange(len(held)), state=state, conductance=held))

    for faults, layer in zip(found, deployment.plan.layers, strict=True):
        assert faults.leaks is None
        np.testing.assert_array_equal(faults.value, deployment.weights(layer).reshape(-1)[faults.index])
        skipped = layer.name == "dense"  # zero rows and columns of it have no cells
        assert (len(faults.index) == layer.groups * layer.outputs * layer.inputs) != skipped


DENSE = """
<ir_version: 8, opset_import: ["" : 17]>
dense (float[1, {inputs}] x) => (float[1, {outputs}] y) {{
    y = MatMul (x, w)
}}
"""


def dense(w: npt.NDArray[np.float32], out: Path, **options: Any) -> Deployment:
    """A deployment of the matrix ``w`` [outputs, inputs]."""
    text = DENSE.format(inputs=w.shape[1], outputs=w.shape[0])
    return build(text, {"w": np.ascontiguousarray(w.T)}, out, **options)


@pytest.mark.parametrize(
    ("scheme", "state", "cell", "expected"),
    [  # method of Yuan et al.: what each fault makes of 0.25, -0.5, 0 and 1
        ("two_column", "off", 0, [0, -0.5, 0, 0]),
        ("two_column", "on", 0, [1, 0.5, 1, 1]),
        ("two_column", "off", 1, [0.25, 0, 0, 1]),
        ("two_column", "on", 1, [-0.75, -1, -1, 0]),
        ("differential", "off", 0, [-0.75, -1, -1, 0]),
        ("differential", "on", 0, [0.25, 0, 0, 1]),
        ("differential", "off", 1, [1, 0.5, 1, 1]),
        ("differential", "on", 1, [0, -0.5, 0, 0]),
        ("balanced", "off", 0, [-0.375, -0.75, -0.5, 0]),
        ("balanced", "on", 1, [-0.375, -0.75, -0.5, 0]),
        ("offset", "off", 0, [-1, -1, -1, -1]),
        ("offset", "on", 0, [1, 1, 1, 1]),
    ],
)
def test_one_fault(scheme: str, state: str, cell: int, expected: list[float], tmp_path: Path) -> None:
    """Placed by hand: it changes the weight that it should, to what it should, and no other."""
    w = np.array([[0.25, -0.5, 0, 1], [-1, 0.1, 0.2, 0.3]], np.float32)
    target = target_of(Cell(g_off=1e-6, g_on=100e-6), rows=8, columns=8)
    deployment = dense(w, tmp_path / "out", target=target, mapping=scheme, scale="tensor")
    injector = Injector(deployment)
    code = np.array([STUCK_ON if state == "on" else STUCK_OFF], np.uint8)
    for input_, value in enumerate(expected):
        faults = FaultMap(
            cell=np.array([input_ * 8 + cell]), state=code, conductance=stuck_ends(deployment.target, code)
        )

        (found,) = injector.faults(faults)

        assert (found.layer, found.index.tolist(), found.leaks) == (0, [input_], None)
        assert found.value[0] == pytest.approx(value, abs=2e-7)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_moments_are_those_of_the_closed_forms(scheme: str, outside: bool, tmp_path: Path) -> None:
    """Mean and mean square of the weight error for stuck values inside and outside the range, within 4.9 errors."""
    off, on = 10e-6, 110e-6
    stuck = {"stuck_off": Stuck(mean=6e-6, spread=1e-6), "stuck_on": Stuck(mean=160e-6, spread=20e-6)}
    target = target_of(Cell(g_off=off, g_on=on, **(stuck if outside else {})), rows=128, columns=128)
    rng = np.random.default_rng(1)
    w = np.clip(rng.standard_normal((150, 200)) * 0.3, -1, 1).astype(np.float32)
    w[0, 0] = 1
    w[np.abs(w) < 0.1] = 0
    w[:, 0] += np.float32(1e-3)
    w = np.clip(w, -1, 1)
    p0, p1 = 0.03, 0.07
    options = {"faults": FaultModel(stuck_off=p0, stuck_on=p1)} if scheme == "optimal" else {}
    deployment = dense(w, tmp_path / "out", target=target, mapping=scheme, scale="tensor", **options)
    p = p0 + p1
    (v0, s0), (v1, s1) = ((-0.04, 0.01), (1.5, 0.2)) if outside else ((0, 0), (1, 0))
    mean = (p0 * v0 + p1 * v1) / p
    variance = (p0 * (v0**2 + s0**2) + p1 * (v1**2 + s1**2)) / p - mean**2
    u = w.astype(np.float64)
    if scheme == "offset":
        error = p * (2 * mean - 1 - u)
        square = p * (4 * variance + (2 * mean - 1 - u) ** 2)
    else:
        half = np.abs(u) / 2
        c = {
            "two_column": half,
            "differential": 1 - half,
            "balanced": np.full_like(u, 0.5),
            "optimal": np.clip(mean, half, 1 - half),
        }[scheme]
        error = -p * u
        square = 2 * p * (1 - p) * (c - mean) ** 2 + 2 * p * variance + p * (1 + p) * u**2 / 2

    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    found = []
    for run in range(40):
        faults = draw_faults(geometry, FaultModel(stuck_off=p0, stuck_on=p1), target, seed=1, run=run)
        (layer,) = injector.faults(faults)
        e = layer.value - u.reshape(-1)[layer.index]
        zero = u.reshape(-1)[layer.index] == 0
        found.append([e.sum(), (e**2).sum(), (e**2)[zero].sum()])
    observed = np.array(found)
    for k, expected in enumerate([error.sum(), square.sum(), square[u == 0].sum()]):
        standard_error = observed[:, k].std(ddof=1) / np.sqrt(len(observed))
        assert abs(observed[:, k].mean() - expected) < 4.9 * standard_error
        assert standard_error < 0.05 * square.sum()


def test_differential_is_the_dual_of_two_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under exchanged rates and mirrored numbers, with mirrored weights: equal to the bit."""
    target = target_of(Cell(g_off=1e-6, g_on=100e-6, levels=16), 2)
    w = np.random.default_rng(2).standard_normal((30, 70)).astype(np.float32)
    differential = dense(w, tmp_path / "a", target=target, mapping="differential")
    two_column = dense(-w, tmp_path / "b", target=target, mapping="two_column")
    geometry = ChipGeometry.of(differential)
    faults = draw_faults(geometry, FaultModel(stuck_off=0.02, stuck_on=0.1), target, seed=1, run=0)
    (one,) = Injector(differential).faults(faults)
    straight = Field.tails

    def mirrored(field: Field, low: float, high: float, size: int) -> tuple[Any, Any]:
        items, u = straight(field, high, low, size)
        return items, 1 - u

    monkeypatch.setattr(Field, "tails", mirrored)
    dual_faults = draw_faults(geometry, FaultModel(stuck_off=0.1, stuck_on=0.02), target, seed=1, run=0)
    (dual,) = Injector(two_column).faults(dual_faults)

    np.testing.assert_array_equal(faults.cell, dual_faults.cell)
    np.testing.assert_array_equal(faults.state, STUCK_OFF + STUCK_ON - dual_faults.state)
    np.testing.assert_array_equal(one.index, dual.index)
    np.testing.assert_array_equal(one.value, -dual.value)


def test_higher_rates_change_the_weights_of_lower_ones_too(tmp_path: Path) -> None:
    deployment = build(TEXT, weights(), tmp_path / "out", target=target_of(CELLS["analog"]))
    geometry, injector = ChipGeometry.of(deployment), Injector(deployment)
    low, high = (
        injector.faults(draw_faults(geometry, FaultModel.of_rate(rate), deployment.target, seed=1, run=0))
        for rate in (0.02, 0.05)
    )
    by_layer = {f.layer: f for f in high}
    for fewer in low:
        assert np.isin(fewer.index, by_layer[fewer.layer].index).all()


def test_a_weight_rate_hits_that_share_of_weights(tmp_path: Path) -> None:
    """And of each cell of a pair as many; for adjacent pairs and for twins."""
    w = np.random.default_rng(2).uniform(0.1, 0.9, (300, 260)).astype(np.float32)
    for layout in ("adjacent", "twin"):
        cell = Cell(g_off=1e-6, g_on=100e-6)
        deployment = dense(w, tmp_path / layout, target=target_of(cell, 1, layout), mapping="two_column")
        model = FaultModel(stuck_off=0.1, stuck_on=0, rate_unit="weight")
        faults = draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=1, run=0)

        (found,) = Injector(deployment).faults(faults)

        share = len(found.index) / w.size
        assert abs(share - 0.1) < 4.9 * np.sqrt(0.09 / w.size)
        in_plus = (found.value == 0).mean()  # of a positive weight, stuck off
        assert abs(in_plus - 0.5) < 4.9 * np.sqrt(0.25 / len(found.index))
        minus = found.value != 0
        np.testing.assert_array_equal(
            found.value[minus], deployment.weights(deployment.plan.layers[0]).flat[found.index[minus]]
        )


def test_a_plan_that_holds_a_weight_twice_is_refused(tmp_path: Path) -> None:
    """As replicas do: one weight would be two."""
    deployment = build(TEXT, weights(), tmp_path / "out", target=target_of(CELLS["analog"]))
    number = len(deployment.plan.arrays)
    copy = msgspec.structs.replace(deployment.plan.arrays[0], id=number, array=number)
    plan = msgspec.structs.replace(deployment.plan, arrays=[*deployment.plan.arrays, copy])
    with pytest.raises(PlanFormatError, match="in 2 places, expected 1"):
        Injector(replace(deployment, plan=plan))


@pytest.mark.parametrize("pack", [False, True])
def test_one_stuck_cell_of_a_plan_changes_the_outputs_as_its_array_says(pack: bool, tmp_path: Path) -> None:
    """From a cell of an array to an output of the model: first in the block of a channel, then beside it, a leak."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4, 5, 5] x) => (float[N, 4, 3, 3] y) {
        y = Conv <kernel_shape = [3, 3], group = 4> (x, w)
    }
    """
    kernels = np.random.default_rng(2).standard_normal((4, 1, 3, 3)).astype(np.float32)
    deployment = build(
        text, {"w": kernels}, tmp_path / "out", target=target_of(CELLS["analog"], 1, "adjacent"), pack=pack
    )
    executor, injector = open_executor(deployment), Injector(deployment)
    image = np.random.default_rng(3).standard_normal((2, 4, 5, 5)).astype(np.float32)
    (clean,) = executor.run({"x": image})
    geometry = ChipGeometry.of(deployment)
    patches = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    columns = patches.reshape(2, 3, 3, 36).astype(np.float64)
    seen = set()
    for row, column in ((0, 0), (0, 2), (10, 1), (10, 3)):
        stuck = FaultMap(
            cell=np.array([row * geometry.columns + column]),
            state=np.array([2], np.uint8),
            conductance=np.array([deployment.target.cell.g_on], np.float32),
        )
        expected = np.einsum("nhwi,oi->nohw", columns, simulate(deployment, 0, stuck))
        executor.apply(injector.faults(stuck))
        (found,) = executor.run({"x": image})
        executor.restore()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        changed = np.abs(found - clean).max(axis=(0, 2, 3)) > 1e-6
        assert changed.sum() <= 1
        seen.update(np.flatnonzero(changed).tolist())
        (back,) = executor.run({"x": image})
        np.testing.assert_array_equal(back, clean)
    assert seen
