"""Votes of three readings, against a simulation of the arrays' currents that knows nothing of injection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from rerampile import ConfigError, Deployment, FaultRunError, Target, compile_model
from rerampile.deployment import layer_coding, layer_segments
from rerampile.failed_cells import FailedCells
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry, FaultMap, stuck_ends
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector, as_read
from rerampile.target import Cell, Stuck

Doubles = npt.NDArray[np.float64]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
STUCK = {"stuck_off": Stuck(mean=0.5e-6, spread=0.2e-6), "stuck_on": Stuck(mean=150e-6, spread=30e-6)}
TABLE = (1e-6, 20e-6, 37e-6, 100e-6)

MODELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "MatMul": ("(float[5,20] x) => (float[5,9] y) { y = MatMul (x, W) }", (20, 9)),
    "left MatMul": ("(float[20,5] x) => (float[9,5] y) { y = MatMul (W, x) }", (9, 20)),
    "Gemm": (
        "(float[5,20] x) => (float[5,9] y) { c = Constant <value_floats = [0.5]> () "
        "y = Gemm <transB = 1, alpha = -0.5> (x, W, c) }",
        (9, 20),
    ),
    "left Gemm": ("(float[5,20] x) => (float[9,5] y) { y = Gemm <transB = 1> (W, x) }", (9, 20)),
    "Conv": ("(float[2,5,6,6] x) => (float[] y) { y = Conv <strides=[2,1], pads=[1,0,1,0]> (x, W) }", (9, 5, 2, 2)),
}


def target_of(layout: str = "adjacent", table: tuple[float, ...] | None = None, **keys: Any) -> Target:
    cell = Cell(g_off=1e-6, g_on=100e-6, levels=4, level_table=table, **STUCK)
    return Target(name="small", **{"rows": 12, "columns": 30, "cell": cell, "slices": 3, "pair_layout": layout, **keys})


def build(kind: str, out: Path, **options: Any) -> Deployment:
    text, shape = MODELS[kind]
    rng = np.random.default_rng(4)
    scales = rng.uniform(0.5, 2, (shape[0], *(1 for _ in shape[1:])))
    weight = rng.standard_normal(shape, np.float32) * scales.astype(np.float32)
    if kind == "MatMul":
        weight[3:8] = 0
        weight[:, 6:] = 0
    else:
        weight[6:] = 0
        weight[:, :2] = 0
    model = onnx.parser.parse_model(f"{HEADER} g {text}")
    model.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    model = onnx.shape_inference.infer_shapes(model)
    options = {"target": target_of(), "mapping": "offset", "protect_msb": 2, **options}
    return compile_model(model, out=out, **options)


def inputs_of(kind: str) -> npt.NDArray[np.float32]:
    model = onnx.parser.parse_model(f"{HEADER} g {MODELS[kind][0]}")
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(5).standard_normal(shape, np.float32)


def patches(kind: str, x: npt.NDArray[np.float32]) -> Doubles:
    """The inputs of the layer's matrix, [products, inputs]."""
    if kind == "Conv":
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2, 2), axis=(2, 3))[:, :, ::2]
        return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 20).astype(np.float64)
    return (x.T if kind == "left MatMul" else x).astype(np.float64)


def shaped(kind: str, products: Doubles, x: npt.NDArray[np.float32]) -> Doubles:
    """Products [products, outputs] as the model gives them."""
    if kind == "Conv":
        return products.reshape(len(x), 4, 5, -1).transpose(0, 3, 1, 2)
    if kind == "Gemm":
        return -0.5 * products + 0.5
    return products.T if kind.startswith("left") else products


def simulate(deployment: Deployment, faults: FaultMap, rows_in: Doubles) -> Doubles:
    """Drive the rows of every array and vote on what its columns sum to: products [products, outputs]."""
    plan = deployment.plan
    layer, protection = plan.layers[0], plan.protection
    assert protection is not None
    coding, gains = layer_coding(deployment.target, layer), deployment.gain(layer).astype(np.float64)
    geometry = ChipGeometry.of(deployment)
    cell, conductance = as_read(deployment.target, geometry, faults)
    at, row, column = geometry.locate(cell)
    pictures = []
    for array in plan.arrays:
        codes = deployment.array(array.id)
        values = (codes if coding.cell_values is None else coding.cell_values[codes]).astype(np.float64)
        mine = at == array.id
        values[row[mine], column[mine]] = coding.worth(conductance[mine])
        pictures.append(values)
    result = np.zeros((len(rows_in), layer.outputs))
    for array in plan.arrays:
        first = array.id if array.twin is None else min(array.id, array.twin)
        width = len(array.roles) * len(array.slices)
        for position, part in enumerate(array.partitions):
            inputs, outputs = np.array(part.input_indices), part.output_indices
            gain = gains.reshape(layer.outputs, -1)[:, layer_segments(layer).number_of(inputs[:1])[0]]
            currents = rows_in[:, inputs] @ pictures[array.id][part.row : part.row + len(inputs)]
            copies = np.zeros((2, len(rows_in), len(outputs), protection.slices * len(array.roles)))
            there = set()
            for other in plan.arrays:
                for copy in other.slice_copies:
                    if (copy.array, copy.partition) == (first, position) and other.roles == array.roles:
                        own = np.array(copy.input_indices)
                        sums = rows_in[:, own] @ pictures[other.id][copy.row : copy.row + len(own)]
                        for b, output in enumerate(copy.output_indices):
                            k = copy.column + b * copies.shape[3]
                            there.add(output)
                            copies[copy.number - 1, :, outputs.index(output)] += sums[:, k : k + copies.shape[3]]
            for b, output in enumerate(outputs):
                sums = currents[:, part.column + b * width : part.column + (b + 1) * width].copy()
                if output in there:
                    top = sums[:, -copies.shape[3] :]
                    three = np.stack([top, *copies[:, :, b]])
                    top[:] = np.median(three, axis=0) if protection.vote == "median" else three.mean(axis=0)
                for s in range(len(array.slices)):
                    for r, role in enumerate(array.roles):
                        sign = 1 if role == "plus" else -1
                        factor = sign * coding.significances[s] * gain[output]
                        result[:, output] += factor * sums[:, s * len(array.roles) + r]
                if coding.cells == 1:
                    result[:, output] -= gain[output] * coding.reference * rows_in[:, inputs].sum(axis=1)
    return result


@pytest.mark.parametrize("vote", ["median", "mean"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MatMul", {}),
        ("MatMul", {"mapping": "differential"}),
        ("MatMul", {"mapping": "two_column", "target": target_of("twin")}),
        ("MatMul", {"target": target_of(table=TABLE)}),
        (
            "MatMul",
            {"mapping": "differential", "target": target_of(failed_cells=FailedCells(response="isolated_pair"))},
        ),
        (
            "MatMul",
            {
                "mapping": "differential",
                "target": target_of("twin", failed_cells=FailedCells(response="isolated_pair")),
            },
        ),
        ("MatMul", {"target": target_of(failed_cells=FailedCells(response="bounded"))}),
        ("MatMul", {"mapping": "differential", "scale": "partition"}),
        ("left MatMul", {}),
        ("Gemm", {"mapping": "balanced"}),
        ("left Gemm", {}),
        ("Conv", {}),
    ],
)
def test_outputs_are_those_of_voting_arrays(kind: str, options: dict[str, Any], vote: str, tmp_path: Path) -> None:
    deployment = build(kind, tmp_path / "out", vote=vote, **options)
    assert deployment.plan.protection is not None
    assert deployment.plan.protection.weights > 0
    x = inputs_of(kind)
    injector, executor = Injector(deployment), open_executor(deployment)
    rows_in = patches(kind, x)
    clean = executor.run({"x": x})[0]
    scale = np.abs(clean).max()
    for rate in (0.03, 0.3):
        for run in range(2):
            model = FaultModel.of_rate(rate)
            faults = draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=1, run=run)
            executor.apply(injector.faults(faults))
            found = executor.run({"x": x})[0]
            expected = shaped(kind, simulate(deployment, faults, rows_in), x)
            np.testing.assert_allclose(found, expected, atol=2e-5 * max(scale, np.abs(expected).max()))
    executor.restore()
    np.testing.assert_array_equal(executor.run({"x": x})[0], clean)


@pytest.mark.parametrize("vote", ["median", "mean"])
def test_no_fault_and_faults_that_hold_what_they_should_change_nothing(vote: str, tmp_path: Path) -> None:
    deployment = build("MatMul", tmp_path / "out", vote=vote)
    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    none = FaultMap(cell=np.zeros(0, np.int64), state=np.zeros(0, np.uint8), conductance=np.zeros(0, np.float32))
    assert injector.faults(none) == []
    picture = np.concatenate([deployment.array(array.id).reshape(-1) for array in deployment.plan.arrays])
    coding = layer_coding(deployment.target, deployment.plan.layers[0])
    every = FaultMap(
        cell=np.arange(geometry.cells),
        state=np.ones(geometry.cells, np.uint8),
        conductance=coding.conductance(picture),
    )
    x, executor = inputs_of("MatMul"), open_executor(deployment)
    clean = executor.run({"x": x})[0]
    executor.apply(injector.faults(every))
    np.testing.assert_allclose(executor.run({"x": x})[0], clean, atol=1e-5 * np.abs(clean).max())


def one_copy_stuck(deployment: Deployment, number: int) -> FaultMap:
    """All cells of one copy of everything stuck on."""
    geometry = ChipGeometry.of(deployment)
    mask = np.zeros((geometry.arrays, geometry.rows, geometry.columns), np.bool_)
    for array in deployment.plan.arrays:
        for copy in array.slice_copies:
            if copy.number == number:
                width = copy.output_count * deployment.copied_slices * len(array.roles)
                mask[array.id, copy.row : copy.row + copy.input_count, copy.column : copy.column + width] = True
    cell = np.flatnonzero(mask)
    state = np.full(len(cell), 2, np.uint8)
    return FaultMap(cell=cell, state=state, conductance=stuck_ends(deployment.target, state))


def test_a_median_does_not_see_one_bad_copy_and_a_mean_does(tmp_path: Path) -> None:
    median = build("MatMul", tmp_path / "median", vote="median")
    mean = build("MatMul", tmp_path / "mean", vote="mean")
    for number in (1, 2):
        assert Injector(median).faults(one_copy_stuck(median, number)) == []
        assert len(Injector(mean).faults(one_copy_stuck(mean, number))[0].index)


def test_only_a_mean_runs_the_fast_way_and_agrees_with_the_slow_one(tmp_path: Path) -> None:
    median = build("Conv", tmp_path / "median")
    with pytest.raises(ConfigError, match="the fast way does not apply: medians of sums are no weights"):
        open_executor(median, method="fast")
    assert open_executor(median).method == "slow"
    mean = build("Conv", tmp_path / "mean", vote="mean")
    fast, slow = open_executor(mean, method="fast"), open_executor(mean, method="slow")
    faults = draw_faults(ChipGeometry.of(mean), FaultModel.of_rate(0.1), mean.target, seed=1, run=0)
    for executor in (fast, slow):
        executor.apply(Injector(mean).faults(faults))
    x = inputs_of("Conv")
    np.testing.assert_allclose(fast.run({"x": x})[0], slow.run({"x": x})[0], rtol=1e-4, atol=1e-4)
    faults = draw_faults(ChipGeometry.of(median), FaultModel.of_rate(0.3), median.target, seed=1, run=0)
    voted = Injector(median).faults(faults)
    with pytest.raises(FaultRunError, match="need the slow way"):
        fast.apply(voted)


def test_variances_of_a_mean_are_those_that_are_drawn(tmp_path: Path) -> None:
    from rerampile.runtime.weight_errors import LayerErrors

    deployment = build("MatMul", tmp_path / "out", vote="mean")
    model, geometry, injector = FaultModel.of_rate(0.2), ChipGeometry.of(deployment), Injector(deployment)
    clean = deployment.weights(deployment.plan.layers[0]).astype(np.float64)
    drawn = np.repeat(clean.reshape(1, -1), 4000, axis=0)
    for run in range(len(drawn)):
        for faults in injector.faults(draw_faults(geometry, model, deployment.target, seed=2, run=run)):
            drawn[run, faults.index] = faults.value
    errors = LayerErrors(deployment, 0)
    variance = errors.variance(model).reshape(-1)
    held = variance > 0
    np.testing.assert_allclose(drawn.var(axis=0)[held].sum(), variance[held].sum(), rtol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0)[held], variance[held], rtol=0.35)
    np.testing.assert_allclose(drawn.mean(axis=0).sum(), errors.mean_weights(model).sum(), rtol=0.1)
    plain = LayerErrors(build("MatMul", tmp_path / "plain", protect_msb=0), 0).variance(model).reshape(-1)
    assert 2.5 < plain[held].sum() / variance[held].sum() <= 3


def test_what_a_median_and_a_mean_of_three_leave() -> None:
    """The page's closed forms, of sums that are wrong by a normal error with probability q."""
    rng = np.random.default_rng(0)
    for q in (0.1, 0.5, 0.9):
        errors = rng.standard_normal((400_000, 3)) * (rng.random((400_000, 3)) < q)
        median = 1.5 * (1 - 2 / np.pi) * q**2 * (1 - q) + (1 - np.sqrt(3) / np.pi) * q**3
        assert np.square(np.median(errors, axis=1)).mean() == pytest.approx(median, rel=0.03)
        assert np.square(errors.mean(axis=1)).mean() == pytest.approx(q / 3, rel=0.03)
        assert (median < q / 3) == (q < 0.7)
