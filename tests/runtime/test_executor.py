"""The executor: what a chip's faults do to the outputs, the fast way beside the slow one, leaks beside brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference

from rerampile import ConfigError, Deployment, FaultRunError, Target, compile_model
from rerampile.deployment import layer_coding
from rerampile.layer_plan import LayerPlan
from rerampile.matrix_view import MatrixView
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector, LayerFaults, Leaks
from rerampile.runtime.inputs import fitting_inputs
from rerampile.runtime.plain_model import plain_model
from rerampile.runtime.quantised import quantised_model, require_dot_products
from rerampile.runtime.session import open_session, run
from rerampile.target import Cell, Stuck

Floats = NDArray[np.float32]
Case = tuple[str, dict[str, tuple[int, ...]]]

# ONNX Runtime's optimiser lays out the weights of each in its own way: blocked, padded, depthwise, transposed.
MODELS: dict[str, Case] = {
    "conv": (
        "(float[N,3,9,9] x) => (float[] y) "
        "{ a = Conv <pads=[1,1,1,1]> (x, A) b = Relu(a) y = Conv <strides=[2,2]> (b, B) }",
        {"A": (20, 3, 3, 3), "B": (32, 20, 3, 3)},
    ),
    "pointwise": ("(float[2,32,5,5] x) => (float[] y) { y = Conv (x, A) }", {"A": (64, 32, 1, 1)}),
    "depthwise": (
        "(float[2,32,8,8] x) => (float[] y) { a = Conv <group=32> (x, A) y = Conv (a, B) }",
        {"A": (32, 1, 3, 3), "B": (16, 32, 1, 1)},
    ),
    "grouped": (
        "(float[2,64,6,6] x) => (float[] y) { a = Conv <group=4> (x, A) y = Conv <group=3> (a, B) }",
        {"A": (96, 16, 3, 3), "B": (9, 32, 1, 1)},
    ),
    "one dimension": ("(float[2,8,20] x) => (float[] y) { y = Conv <dilations=[2]> (x, A) }", {"A": (12, 8, 3)}),
    "shared": (
        "(float[2,16,8,8] x) => (float[] y, float[] z)"
        "{ a = Conv <pads=[1,1,1,1]> (x, A) y = Conv <strides=[2,2]> (a, A) z = Sigmoid (y) }",
        {"A": (16, 16, 3, 3)},
    ),
    "transposed": (
        "(float[2,16,5,5] x) => (float[] y)"
        "{ a = ConvTranspose <strides=[2,2]> (x, A) y = ConvTranspose <group=2> (a, B) }",
        {"A": (16, 8, 3, 3), "B": (8, 3, 2, 2)},
    ),
    "products": (
        "(float[4,6] x) => (float[] y) { a = MatMul (x, A) b = Relu (a) c = Gemm <transB=1> (b, B) y = MatMul (L, c) }",
        {"A": (6, 40), "B": (10, 40), "L": (5, 4)},
    ),
    "batch of products": ("(float[3,4,6] x) => (float[] y) { y = MatMul (x, A) }", {"A": (3, 6, 5)}),
    "residual": (
        "(float[2,16,8,8] x) => (float[] y) { a = Conv <pads=[1,1,1,1]> (x, A) b = Add (a, x) c = Relu (b)"
        " d = GlobalAveragePool (c) e = Flatten (d) y = Gemm (e, B, v) }",
        {"A": (16, 16, 3, 3), "B": (16, 10), "v": (10,)},
    ),
    "recurrent": (
        "(float[5,2,6] x) => (float[] y) { y = LSTM <hidden_size=4> (x, W, R) }",
        {"W": (1, 16, 6), "R": (1, 16, 4)},
    ),
    "subgraph": (
        "(float[2,6] x, bool c) => (float[] y)"
        "{ y = If (c) <then_branch = t () => (float[2,5] p) { p = MatMul (x, A) },"
        " else_branch = e () => (float[2,5] q) { q = Gemm <transB=1> (x, B) }> }",
        {"A": (6, 5), "B": (5, 6)},
    ),
}


def _model(case: Case) -> onnx.ModelProto:
    text, shapes = case
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g ' + text)
    rng = np.random.default_rng(7)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name))
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(found)
    return model


def _faults(deployment: Deployment, seed: int, rate: float = 0.05) -> list[LayerFaults]:
    """A chip with at least one fault in each layer."""
    rng = np.random.default_rng(seed)
    chip = []
    for number, layer in enumerate(deployment.plan.layers):
        size = layer.groups * layer.outputs * layer.inputs
        index = np.sort(rng.choice(size, max(1, int(rate * size)), replace=False)).astype(np.int64)
        value = rng.standard_normal(len(index), dtype=np.float32)
        chip.append(LayerFaults(layer=number, index=index, value=value, leaks=None))
    return chip


def _tensor(layer: LayerPlan, matrix: Floats) -> Floats:
    view = MatrixView(
        groups=layer.groups,
        outputs=layer.outputs,
        inputs=layer.inputs,
        tensor_shape=tuple(layer.weight_shape),
        stored_shape=tuple(layer.stored_shape),
        permutation=None if layer.permutation is None else tuple(layer.permutation),
    )
    return view.tensor(matrix)


def _oracle(model: onnx.ModelProto, deployment: Deployment, chip: Sequence[LayerFaults]) -> onnx.ModelProto:
    """The user's own model with the weights of a chip in its file: it has never been near a crossbar function."""
    faulty = onnx.ModelProto()
    faulty.CopyFrom(model)
    matrices = [deployment.weights(layer).copy() for layer in deployment.plan.layers]
    for fault in chip:
        matrices[fault.layer].reshape(-1)[fault.index] = fault.value
    by_name = {layer.name: _tensor(layer, m) for layer, m in zip(deployment.plan.layers, matrices, strict=True)}
    for tensor in faulty.graph.initializer:
        if tensor.name in by_name:
            tensor.CopyFrom(numpy_helper.from_array(by_name[tensor.name], tensor.name))
    return faulty


def _outputs(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[NDArray[Any]]:
    return list(run(open_session(model.SerializeToString()), inputs))


def _error(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """The largest difference, relative to the largest magnitude of its output."""
    return max(
        float(np.abs(f.astype(np.float64) - e).max() / max(np.abs(e).max(), 1e-30))
        for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_chips_give_what_their_weights_give(name: str, tmp_path: Path) -> None:
    """Both ways give the outputs of the user's model with the chip's weights, and the first outputs after a chip."""
    model = _model(MODELS[name])
    deployment = compile_model(model, out=tmp_path / "out")
    inputs, deployed = fitting_inputs(open_session(deployment.model_path), 0)
    for method in ("fast", "slow"):
        executor = open_executor(deployment, method=method)
        assert executor.method == method
        clean = executor.run(inputs)
        assert _error(clean, deployed) <= (0 if method == "slow" else 1e-6)
        for seed in range(2):
            chip = _faults(deployment, seed)
            executor.apply(chip)
            faulty = executor.run(inputs)
            assert _error(faulty, _outputs(_oracle(model, deployment, chip), inputs)) < 2e-6
            assert _error(faulty, deployed) > 1e-3
        executor.restore()
        assert [output.tobytes() for output in executor.run(inputs)] == [output.tobytes() for output in clean]


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("residual", "fast", "every weight was found in the optimised graph"),
        ("depthwise", "slow", "array 0 holds several groups of layer 'A', whose stuck spare cells leak"),
        ("products", "slow", "3 of 3 layers are products, fastest with weights that stay packed"),
    ],
)
def test_the_way_is_chosen_from_the_deployment(name: str, method: str, reason: str, tmp_path: Path) -> None:
    executor = open_executor(compile_model(_model(MODELS[name]), out=tmp_path / "out"))
    assert (executor.method, executor.reason) == (method, reason)


@pytest.mark.parametrize("method", ["fast", "slow"])
def test_single_fault_changes_the_predicted_output(method: Any, tmp_path: Path) -> None:
    """Weight (output 4, input 2) of 6 more than it was adds six times input 2 to output 4, and nothing elsewhere."""
    model = _model(("(float[3,5] x) => (float[] y) { y = Gemm <transB=1> (x, A) }", {"A": (7, 5)}))
    deployment = compile_model(model, out=tmp_path / "out")
    executor = open_executor(deployment, method=method)
    x = np.random.default_rng(1).standard_normal((3, 5), dtype=np.float32)
    clean = executor.run({"x": x})[0]
    value = deployment.weights(deployment.plan.layers[0])[4, 2] + np.float32(6)
    executor.apply([LayerFaults(layer=0, index=np.array([4 * 5 + 2]), value=np.array([value]), leaks=None)])
    change = executor.run({"x": x})[0] - clean
    expected = np.zeros((3, 7), np.float32)
    expected[:, 4] = 6 * x[:, 2]
    np.testing.assert_allclose(change, expected, atol=2e-5)
    assert not np.delete(change, 4, axis=1).any()


LEAKING: dict[str, Case] = {
    "depthwise": (
        "(float[2,10,6,6] x) => (float[] y) { y = Conv <group=10,pads=[1,1,1,1]> (x, A, b) }",
        {"A": (10, 1, 3, 3), "b": (10,)},
    ),
    "grouped": ("(float[2,10,6,6] x) => (float[] y) { y = Conv <group=5> (x, A) }", {"A": (15, 2, 3, 3)}),
    "transposed": (
        "(float[2,10,4,4] x) => (float[] y) { y = ConvTranspose <group=5,strides=[2,2]> (x, A, b) }",
        {"A": (10, 3, 3, 2), "b": (15,)},
    ),
}


def _leaks(layer: LayerPlan, pairs: Sequence[tuple[int, int]], seed: int) -> Leaks:
    """Three leaks from the first to the second group of each pair."""
    rng = np.random.default_rng(seed)
    found = {}
    for source, target in pairs:
        for _ in range(3):
            row = source * layer.inputs + int(rng.integers(layer.inputs))
            found[target * layer.outputs + int(rng.integers(layer.outputs)), row] = rng.standard_normal()
    rows = np.array(sorted(found), np.int64)
    value = np.array([found[tuple(pair)] for pair in rows.tolist()], np.float32)
    return Leaks(in_row=rows[:, 1], out_row=rows[:, 0], value=value)


def _dense(layer: LayerPlan, matrix: Floats, leaks: Leaks) -> Floats:
    """All groups as one matrix [groups * outputs, groups * inputs], cell by cell."""
    dense = np.zeros((layer.groups * layer.outputs, layer.groups * layer.inputs), np.float32)
    for row in range(len(dense)):
        group = row // layer.outputs
        dense[row, group * layer.inputs : (group + 1) * layer.inputs] = matrix[row]
    for in_row, out_row, value in zip(leaks.in_row, leaks.out_row, leaks.value, strict=True):
        dense[out_row, in_row] += value
    return dense


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("pairs", [[(0, 1), (1, 0)], [(1, 3), (3, 2)], [(0, 4)], [(4, 3), (0, 1), (1, 2)]])
def test_leaks_of_convolutions(name: str, pairs: list[tuple[int, int]], tmp_path: Path) -> None:
    """The layer is the dense convolution of its array: blocks on the diagonal, leaks beside them."""
    model = _model(LEAKING[name])
    deployment = compile_model(model, out=tmp_path / "out")
    layer = deployment.plan.layers[0]
    inputs, _ = fitting_inputs(open_session(deployment.model_path), 0)
    (fault,) = _faults(deployment, 3)
    leaks = _leaks(layer, pairs, 5)
    executor = open_executor(deployment)
    assert (executor.method, "several groups of layer 'A'" in executor.reason) == ("slow", True)
    clean = executor.run(inputs)
    executor.apply([LayerFaults(layer=0, index=fault.index, value=fault.value, leaks=leaks)])
    found = executor.run(inputs)
    matrix = deployment.weights(layer).copy()
    matrix.reshape(-1)[fault.index] = fault.value
    kernel = layer.weight_shape[2:]
    dense = _dense(layer, matrix, leaks)
    if name == "transposed":  # [inputs, outputs, kernel]
        dense = dense.T
    tensor = dense.reshape(len(dense), -1, *kernel)
    for node in model.graph.node:
        next(a for a in node.attribute if a.name == "group").i = 1
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(tensor), "A"))
    assert _error(found, _outputs(model, inputs)) < 2e-6
    assert _error(found, clean) > 1e-3
    executor.restore()
    assert executor.run(inputs)[0].tobytes() == clean[0].tobytes()


@pytest.mark.parametrize(
    ("text", "shape", "equation"),
    [
        ("(float[2,3,4,6] x) => (float[] y) { y = MatMul (x, A) }", (3, 6, 5), "nbmi,bico->ncmo"),
        ("(float[4,6] x) => (float[] y) { y = MatMul (x, A) }", (3, 6, 5), "mi,bico->cmo"),
        ("(float[6] x) => (float[] y) { y = MatMul (x, A) }", (3, 6, 5), "i,bico->co"),
        ("(float[2,3,6,4] x) => (float[] y) { y = MatMul (A, x) }", (3, 5, 6), "nbim,bico->ncom"),
    ],
)
def test_leaks_of_batched_products(text: str, shape: tuple[int, ...], equation: str, tmp_path: Path) -> None:
    """Every product of the batch adds what leaks from the inputs of the others."""
    deployment = compile_model(_model((text, {"A": shape})), out=tmp_path / "out")
    layer = deployment.plan.layers[0]
    leaks = _leaks(layer, [(0, 2), (2, 1), (1, 0)], 5)
    executor = open_executor(deployment, method="slow")
    inputs, _ = fitting_inputs(open_session(deployment.model_path), 0)
    executor.apply([LayerFaults(layer=0, index=np.zeros(0, np.int64), value=np.zeros(0, np.float32), leaks=leaks)])
    dense = _dense(layer, deployment.weights(layer), leaks).T.reshape(3, layer.inputs, 3, layer.outputs)
    expected = np.einsum(equation, inputs["x"], dense)
    assert _error(executor.run(inputs), [expected]) < 2e-6


def test_directions_run_one_after_the_other(tmp_path: Path) -> None:
    """Stuck spare cells of their array join them in nothing: a chip is the model with the weights of its layers."""
    text = '(float[5,2,6] x) => (float[] y) { y = LSTM <hidden_size=4,direction="bidirectional"> (x, W, R) }'
    model = _model((text, {"W": (2, 16, 6), "R": (2, 16, 4)}))
    deployment = compile_model(model, out=tmp_path / "out")
    assert {len(array.partitions) for array in deployment.plan.arrays} == {1}
    faults = draw_faults(
        ChipGeometry.of(deployment), FaultModel(stuck_off=0.1, stuck_on=0.2), deployment.target, seed=0, run=0
    )
    chip = Injector(deployment).faults(faults)
    executor = open_executor(deployment)
    inputs, _ = fitting_inputs(open_session(deployment.model_path), 0)
    executor.apply(chip)
    faulty = onnx.ModelProto()
    faulty.CopyFrom(model)
    for fault, tensor in zip(chip, faulty.graph.initializer, strict=True):
        assert fault.leaks is None
        weights = deployment.weights(deployment.plan.layers[fault.layer]).copy()
        weights.reshape(-1)[fault.index] = fault.value
        tensor.CopyFrom(numpy_helper.from_array(weights.reshape(tuple(tensor.dims)), tensor.name))
    expected = run(open_session(faulty.SerializeToString()), inputs)
    assert _error(executor.run(inputs), expected) < 2e-6


def test_half_precision_and_sliced_cells(tmp_path: Path) -> None:
    """Weights that nodes read as float16, held by sliced cells: faults arrive in the nodes' own type."""
    text = "(float16[2,4,5,5] x) => (float16[] y) { y = Conv <group=2> (x, A) }"
    model = _model((text, {}))
    weight = np.random.default_rng(1).standard_normal((6, 2, 3, 3)).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(weight, "A"))
    model = shape_inference.infer_shapes(model)
    target = Target(name="small", rows=64, columns=64, cell=Cell(g_off=1e-6, g_on=1e-4, levels=16), slices=3)
    deployment = compile_model(model, out=tmp_path / "out", target=target)
    layer = deployment.plan.layers[0]
    with pytest.raises(ConfigError, match=r"the fast way does not apply: .*; use the slow one"):
        open_executor(deployment, method="fast")
    executor = open_executor(deployment)
    inputs, deployed = fitting_inputs(open_session(deployment.model_path), 0)
    assert _error(executor.run(inputs), deployed) == 0
    leaks = _leaks(layer, [(0, 1)], 2)
    executor.apply([LayerFaults(layer=0, index=np.array([3]), value=np.array([2.0], np.float32), leaks=leaks)])
    matrix = deployment.weights(layer).copy()
    matrix.reshape(-1)[3] = 2
    tensor = _dense(layer, matrix, leaks).astype(np.float16).reshape(6, 4, 3, 3)
    model.graph.node[0].attribute[0].i = 1
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(tensor, "A"))
    assert _error(executor.run(inputs), _outputs(model, inputs)) < 2e-3


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    deployment = compile_model(_model(MODELS["subgraph"]), out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--provider CUDAExecutionProvider: not in this ONNX Runtime, .*CPU"):
        open_executor(deployment, provider="CUDAExecutionProvider")
    with pytest.raises(FaultRunError, match="ONNX Runtime cannot run the model"):
        open_executor(deployment).run({"x": np.zeros((1, 1), np.float32), "c": np.array(True)})


# Two quantised layers, and one whose groups share an array: it stays in fp32.
INT8: Case = (
    "(float[N,4,8,8] x) => (float[] y) { a = Conv <pads=[1,1,1,1]> (x, A, v) b = Relu (a)"
    " c = Conv <group=4> (b, B) d = GlobalAveragePool (c) e = Flatten (d) y = Gemm <transB=1> (e, C, u) }",
    {"A": (8, 4, 3, 3), "v": (8,), "B": (12, 2, 3, 3), "C": (10, 12), "u": (10,)},
)
CALIBRATION = [{"x": np.random.default_rng(9).standard_normal((16, 4, 8, 8), dtype=np.float32)}]


def _levels(levels: int, slices: int = 1, table: tuple[float, ...] | None = None) -> Target:
    cell = Cell(g_off=1e-6, g_on=1e-4, levels=levels, level_table=table)
    return Target(name="t", rows=64, columns=64, cell=cell, slices=slices)


@pytest.fixture
def _exact_int8() -> None:
    """Skip where this CPU's int8 products saturate."""
    try:
        require_dot_products()
    except FaultRunError as error:
        pytest.skip(str(error))


def test_int8_needs_a_cpu_that_does_not_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("rerampile.runtime.processor._DOT_PRODUCTS", set())
    with pytest.raises(FaultRunError, match="this CPU has neither VNNI nor AMX, its int8 products saturate; use fp32"):
        require_dot_products()


@pytest.mark.usefixtures("_exact_int8")
@pytest.mark.parametrize(
    ("levels", "slices", "mapping"),
    [
        (128, 1, "differential"),
        (16, 2, "two_column"),
        (256, 1, "offset"),
        (4, 8, "offset"),
        ((1e-6, 20e-6, 35e-6, 60e-6, 61e-6, 100e-6), 4, "optimal"),
    ],
)
def test_int8_beside_fp32(levels: int | tuple[float, ...], slices: int, mapping: Any, tmp_path: Path) -> None:
    """Chips give what they give in fp32 but for rounded activations, and weights of many values; leaks included."""
    target = _levels(levels, slices) if isinstance(levels, int) else _levels(len(levels), slices, table=levels)
    deployment = compile_model(_model(INT8), out=tmp_path / "out", target=target, mapping=mapping)
    int8 = open_executor(deployment, precision="int8", calibration=CALIBRATION)
    exact = open_executor(deployment, method="slow")
    assert int8.fidelity is not None
    assert int8.fidelity.layers == 2
    assert 0 < int8.fidelity.rms < 0.03
    clean = int8.run(CALIBRATION[0])[0]
    chip = _faults(deployment, 1, rate=0.02)
    span = layer_coding(target, deployment.plan.layers[0]).span
    steps = [
        deployment.gain(layer)[fault.index // layer.inputs]
        for fault, layer in zip(chip, deployment.plan.layers, strict=True)
    ]
    chip = [
        LayerFaults(
            layer=fault.layer,
            index=fault.index,
            value=step * np.float32(span / 14),
            leaks=_leaks(deployment.plan.layers[1], [(0, 1)], 4) if fault.layer == 1 else None,
        )
        for fault, step in zip(chip, steps, strict=True)
    ]
    for executor in (int8, exact):
        executor.apply(chip)
    found, expected = int8.run(CALIBRATION[0])[0], exact.run(CALIBRATION[0])[0]
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.05
    int8.restore()
    assert int8.run(CALIBRATION[0])[0].tobytes() == clean.tobytes()
    handed = open_executor(deployment, precision="int8", layout=int8.layout)  # to another process, say
    handed.apply(chip)
    assert handed.run(CALIBRATION[0])[0].tobytes() == found.tobytes()


@pytest.mark.usefixtures("_exact_int8")
@pytest.mark.parametrize(("levels", "mapping"), [(128, "differential"), (256, "offset")])
def test_int8_holds_cells_that_are_stuck_outside_the_levels(levels: int, mapping: Any, tmp_path: Path) -> None:
    """Twice the range: not cut off, which would be an error of 37 % and more."""
    stuck = {"stuck_on": Stuck(mean=200e-6, spread=10e-6), "stuck_off": Stuck(mean=0.0)}
    target = Target(name="t", rows=64, columns=64, cell=Cell(g_off=20e-6, g_on=1e-4, levels=levels, **stuck))
    text = "(float[N,40] x) => (float[] y) { y = MatMul (x, A) }"
    deployment = compile_model(_model((text, {"A": (40, 12)})), out=tmp_path / "out", target=target, mapping=mapping)
    x = {"x": np.random.default_rng(1).standard_normal((50, 40), dtype=np.float32)}
    faults = FaultModel(stuck_off=0.01, stuck_on=0.03)
    chip = Injector(deployment).faults(draw_faults(ChipGeometry.of(deployment), faults, target, seed=0, run=0))
    changes = []
    for options in ({"precision": "int8", "calibration": [{"x": 3 * x["x"]}]}, {}):
        executor = open_executor(deployment, **options)
        clean = executor.run(x)[0]
        executor.apply(chip)
        changes.append(executor.run(x)[0] - clean)
    found, expected = changes
    assert np.linalg.norm(found - expected) < 0.06 * np.linalg.norm(expected)


@pytest.mark.parametrize(("levels", "mapping"), [(8, "differential"), (16, "offset"), (16, "differential")])
def test_int8_holds_means_of_copies(levels: int, mapping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, between two levels: weights of a chip are whole multiples of the scale. No int8 product is run."""
    monkeypatch.setattr("rerampile.runtime.quantised.require_dot_products", lambda: None)
    text = "(float[N,40] x) => (float[] z) { y = MatMul (x, A) z = MatMul (y, B) }"
    target = replace(_levels(levels), arrays_per_core=9)
    deployment = compile_model(
        _model((text, {"A": (40, 12), "B": (12, 7)})),
        out=tmp_path / "out",
        target=target,
        mapping=mapping,
        spend_spare_arrays=True,
    )
    copies = [layer.copy_count for layer in deployment.plan.layers]
    assert sum(copies) == 9
    assert min(copies) > 2
    x = {"x": np.random.default_rng(1).standard_normal((50, 40), dtype=np.float32)}
    scales = quantised_model(deployment, plain_model(deployment), [x], ()).scales
    faults = FaultModel(stuck_off=0.01, stuck_on=0.03)
    chip = Injector(deployment).faults(draw_faults(ChipGeometry.of(deployment), faults, target, seed=0, run=0))
    assert len(chip) == 2
    for found, layer in zip(chip, deployment.plan.layers, strict=True):
        whole = found.value / scales[found.layer][found.index // layer.inputs]
        np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)
        assert np.abs(whole).max() <= 127
        steps = found.value / deployment.gain(layer)[found.index // layer.inputs]
        assert (np.abs(steps - np.rint(steps)) > 0.1).any()


@pytest.mark.usefixtures("_exact_int8")
def test_int8_single_fault(tmp_path: Path) -> None:
    """One step more on weight (4, 2) of a product adds one gain times the rounded input 2 to output 4 alone."""
    text = "(float[N,5] x) => (float[] y) { y = Gemm <transB=1> (x, A, v) }"
    deployment = compile_model(_model((text, {"A": (7, 5), "v": (7,)})), out=tmp_path / "out", target=_levels(64))
    x = np.random.default_rng(1).standard_normal((30, 5), dtype=np.float32)
    executor = open_executor(deployment, precision="int8", calibration=[{"x": x}])
    clean = executor.run({"x": x})[0]
    layer = deployment.plan.layers[0]
    gain = deployment.gain(layer)[4]
    value = deployment.weights(layer)[4, 2] + 20 * gain
    executor.apply([LayerFaults(layer=0, index=np.array([22]), value=np.array([value], np.float32), leaks=None)])
    change = executor.run({"x": x})[0] - clean
    step = np.ptp(clean) / 255  # of the outputs, which are rounded to uint8 too
    np.testing.assert_allclose(
        change[:, 4], np.clip(clean[:, 4] + 20 * gain * x[:, 2], clean.min(), clean.max()) - clean[:, 4], atol=3 * step
    )
    assert not np.delete(change, 4, axis=1).any()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            None,
            {"calibration": CALIBRATION},
            "analog cells in layer 'A', expected at most 256 levels; compile with --set",
        ),
        (_levels(512), {"calibration": CALIBRATION}, "cells of 512 levels in layer 'A', expected at most 256 levels"),
        (_levels(16), {}, "no calibration inputs, expected at least one batch"),
        (
            _levels(16),
            {"calibration": CALIBRATION, "method": "fast"},
            "runs the slow way on CPUExecutionProvider alone",
        ),
    ],
)
def test_int8_refusals(target: Target | None, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    more = {} if target is None else {"target": target}
    deployment = compile_model(_model(INT8), out=tmp_path / "out", **more)
    with pytest.raises(ConfigError, match=f"--precision int8: {message}"):
        open_executor(deployment, precision="int8", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10_optionA", "resnet20_cifar10_optionB", "mobilenetv2_imagenet"])
def test_real_networks_fast_beside_slow(name: str, data_root: Path, tmp_path: Path) -> None:
    deployment = compile_model(data_root / "models" / f"{name}.onnx", out=tmp_path / "out")
    fast, slow = (open_executor(deployment, method=method) for method in ("fast", "slow"))
    inputs, deployed = fitting_inputs(open_session(deployment.model_path), 0)
    assert _error(fast.run(inputs), deployed) <= 1e-6
    assert _error(slow.run(inputs), deployed) == 0
    clean = fast.run(inputs)[0].tobytes()
    for seed in range(2):
        chip = _faults(deployment, seed, rate=0.001)
        fast.apply(chip)
        slow.apply(chip)
        assert _error(fast.run(inputs), slow.run(inputs)) < 1e-5
    fast.restore()
    assert fast.run(inputs)[0].tobytes() == clean
