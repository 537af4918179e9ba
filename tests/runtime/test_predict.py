"""Predicted errors beside Monte Carlo: every scheme and cell, every operator, leaks, ResNet18, and the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from rerampile import ConfigError, DataError, Deployment, Target, compile_model
from rerampile.crossbar_functions import DOMAIN
from rerampile.failed_cells import FailedCells
from rerampile.runtime.data import Batch, open_dataset
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.predict import RatePrediction, predict
from rerampile.runtime.session import open_session, run
from rerampile.runtime.weight_errors import LayerErrors
from rerampile.schemes import SCHEMES
from rerampile.target import Cell, Stuck

OUTSIDE = {"stuck_off": Stuck(mean=0.5e-6, spread=0.4e-6), "stuck_on": Stuck(mean=150e-6, spread=30e-6)}
CELLS = {
    "analog": (Cell(g_off=1e-6, g_on=100e-6), 1),
    "stuck outside": (Cell(g_off=10e-6, g_on=100e-6, **OUTSIDE), 1),
    "levels": (Cell(g_off=1e-6, g_on=100e-6, levels=4, **OUTSIDE), 3),
    "table": (Cell(g_off=1e-6, g_on=100e-6, levels=4, level_table=(1e-6, 20e-6, 37e-6, 100e-6)), 2),
}

# Operators side by side, so that each layer's product is an output: attributes that move, repeat and drop inputs.
OPERATORS = (
    "(float[N,8,6,7] x, float[N,3,4,8] s) => (float[] conv, float[] dw, float[] up, float[] fc, float[] left,"
    " float[] batch) {"
    " conv = Conv <strides=[2,1], dilations=[1,2], pads=[1,2,0,2]> (x, C)"
    " dw = Conv <group=8, pads=[1,1,1,1]> (x, D)"
    " up = ConvTranspose <group=2, strides=[2,2], pads=[1,0,1,1]> (x, U)"
    " flat = Flatten (x)"
    " fc = Gemm <transB=1, alpha=0.5, beta=2.0> (flat, F, f)"
    " left = MatMul (L, x)"
    " batch = MatMul (s, B) }"
)
SHAPES = {
    "C": (12, 8, 3, 3),
    "D": (24, 1, 3, 3),
    "U": (8, 5, 3, 3),
    "F": (9, 336),
    "f": (9,),
    "L": (60, 6),
    "B": (3, 8, 16),
}


@dataclass
class Arrays:
    """A data set of arrays in memory: what users write for their own data."""

    arrays: dict[str, NDArray[Any]]
    name: str = "arrays"
    kind: Literal["labels", "boxes", "none"] = "none"
    classes: int | None = None
    skipped: dict[int, str] = field(default_factory=dict)
    digest: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self, size: int, indices: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        numbers = np.arange(len(self)) if indices is None else indices
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            yield Batch({name: array[some] for name, array in self.arrays.items()}, None, some)


def model_of(text: str, shapes: Mapping[str, tuple[int, ...]], zeros: bool = False) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g ' + text)
    rng = np.random.default_rng(7)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape, np.float32)
        if zeros and name == "F":
            array[:, 40:140] = 0
            array[5] = 0
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(found)
    return model


def positive_inputs(images: int = 4) -> Arrays:
    """Inputs with a mean, as activations have: what the shift of ``offset`` adds up."""
    rng = np.random.default_rng(5)
    shapes = {"x": (images, 8, 6, 7), "s": (images, 3, 4, 8)}
    return Arrays({n: np.maximum(rng.standard_normal(s, np.float32) + 0.3, 0) for n, s in shapes.items()})


def monte_carlo(deployment: Deployment, model: FaultModel, data: Arrays, chips: int) -> NDArray[np.float64]:
    """Mean squared error of each output over that of the fault-free one, whose bias is none of the crossbar's."""
    executor, injector, geometry = (
        open_executor(deployment, threads=1),
        Injector(deployment),
        ChipGeometry.of(deployment),
    )
    clean = executor.run(data.arrays)
    bias = next((numpy_helper.to_array(t) for t in model_tensors(deployment) if t.name == "f"), None)
    energy = []
    for name, value in zip((v.name for v in open_session(deployment.model_path).get_outputs()), clean, strict=True):
        product = value - 2 * bias if name == "fc" and bias is not None else value
        energy.append(np.square(product, dtype=np.float64).sum())
    total = np.zeros(len(clean))
    for number in range(chips):
        chip = draw_faults(geometry, model, deployment.target, seed=3, run=number)
        executor.apply(injector.faults(chip))
        found = executor.run(data.arrays)
        total += [np.square(f - c, dtype=np.float64).sum() for f, c in zip(found, clean, strict=True)]
    return total / chips / energy


def model_tensors(deployment: Deployment) -> list[onnx.TensorProto]:
    return list(onnx.load(deployment.model_path).graph.initializer)


def nsr_of(prediction: RatePrediction, deployment: Deployment) -> NDArray[np.float64]:
    by_name = {found.layer: found.nsr for found in prediction.layers}
    return np.array([by_name[layer.name] for layer in deployment.plan.layers])


QUICK = dict(zip(SCHEMES, ("levels", "analog", "stuck outside", "table", "levels"), strict=True))
PAIRINGS = [
    pytest.param(scheme, kind, marks=() if QUICK[scheme] == kind else pytest.mark.slow)
    for scheme in SCHEMES
    for kind in CELLS
]


@pytest.mark.parametrize(("scheme", "kind"), PAIRINGS)
def test_each_layer_is_within_a_tenth_of_monte_carlo(scheme: str, kind: str, tmp_path: Path) -> None:
    cell, slices = CELLS[kind]
    target = Target(name="small", rows=48, columns=72, slices=slices, cell=cell)
    deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / "out", target=target, mapping=scheme)
    faults = FaultModel.of_rate(0.1)

    found = predict(deployment, [faults], positive_inputs(), probe_images=1)

    assert not found.not_predicted
    expected = monte_carlo(deployment, faults, positive_inputs(), 120)
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.1)


FORMED: dict[str, Any] = {
    "unformed": {"share": 3, "mean": 0.5e-6, "spread": 0.5e-6},
    "partially_formed": {"share": 2, "mean": 40e-6, "spread": 30e-6},
    "over_formed": {"share": 5, "mean": 400e-6, "spread": 150e-6},
}


@pytest.mark.parametrize(
    ("response", "scheme", "kind", "unit"),
    [
        ("unbounded", "differential", "analog", "cell"),
        ("bounded", "optimal", "levels", "cell"),
        ("isolated_cell", "balanced", "stuck outside", "cell"),
        ("isolated_cell", "offset", "table", "weight"),
        ("isolated_pair", "two_column", "levels", "cell"),
        ("isolated_pair", "differential", "table", "weight"),
        ("isolated_pair", "offset", "analog", "cell"),
    ],
)
def test_failed_cells_of_several_kinds(response: str, scheme: str, kind: str, unit: str, tmp_path: Path) -> None:
    cell, slices = CELLS[kind]
    failed = FailedCells(response=response, **FORMED)
    target = Target(name="small", rows=48, columns=72, slices=slices, cell=cell, failed_cells=failed)
    deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / "out", target=target, mapping=scheme)
    faults = FaultModel.of_target(0.1, target, rate_unit=unit)

    found = predict(deployment, [faults], positive_inputs(), probe_images=1)

    expected = monte_carlo(deployment, faults, positive_inputs(), 120)
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.12)


@pytest.mark.parametrize("mapping", ["differential", "offset"])
@pytest.mark.parametrize("pack", [False, True])
def test_copies_that_are_averaged(mapping: str, pack: bool, tmp_path: Path) -> None:
    """Variances and leaks by the number of copies, mean errors and the shift of ``offset`` as with one."""
    cell, slices = CELLS["analog"]
    faults = FaultModel.of_rate(0.1)
    target = Target(name="small", rows=48, columns=72, slices=slices, cell=cell, arrays_per_core=60)
    found, plans = [], []
    for spend in (False, True):
        deployment = compile_model(
            model_of(OPERATORS, SHAPES),
            out=tmp_path / f"out{spend}",
            target=target,
            mapping=mapping,
            pack=pack,
            spend_spare_arrays=spend,
        )
        found.append(predict(deployment, [faults], positive_inputs(), probe_images=1).rates[0])
        plans.append(deployment.plan)
    expected = monte_carlo(deployment, faults, positive_inputs(), 120)

    np.testing.assert_allclose(nsr_of(found[1], deployment), expected, rtol=0.1)
    copies = {layer.name: layer.copy_count for layer in plans[1].layers}
    assert max(copies.values()) > 2
    before = {layer.layer: layer for layer in found[0].layers}
    for after in found[1].layers:
        one = before[after.layer]
        assert after.coherent == pytest.approx(one.coherent, rel=1e-5 if mapping == "differential" or not pack else 0.2)
        if not pack:  # packed arrays leak within a layer; copies never share one
            random = (one.nsr - one.coherent) / copies[after.layer]
            assert after.nsr - after.coherent == pytest.approx(random, rel=1e-5)
        assert after.nsr <= one.nsr * (1 + 1e-6)


@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_gains_of_partitions(scheme: str, tmp_path: Path) -> None:
    """Each output of each partition has its own full scale, so its own errors and shifts."""
    target = Target(name="small", rows=48, columns=72, cell=CELLS["stuck outside"][0])
    options: dict[str, Any] = {"target": target, "mapping": scheme, "scale": "partition"}
    deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / "out", **options)
    assert [len(layer.segments) for layer in deployment.plan.layers] == [2, 1, 1, 7, 1, 1]  # type: ignore[arg-type]
    faults = FaultModel.of_rate(0.1)

    found = predict(deployment, [faults], positive_inputs(), probe_images=1)

    assert found.scale == "partition"
    expected = monte_carlo(deployment, faults, positive_inputs(), 120)
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.1)


@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_gains_of_partitions_that_share_an_array(scheme: str, tmp_path: Path) -> None:
    """Leaks have the gain of the column that they reach: pieces of a layer whose weights differ by a factor of ten.

    The last output is alone in its strip and needs few rows of each of two segments, which share an array.
    """
    text = "(float[N,8,6,7] x) => (float[] fc) { flat = Flatten (x) fc = Gemm <transB=1> (flat, F) }"
    model = model_of(text, {"F": (9, 336)})
    weights = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights[:, 80:] *= 0.1
    weights[8, :60] = weights[8, 100:] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "F"))
    target = Target(name="small", rows=80, columns=8 if scheme == "offset" else 16, cell=CELLS["stuck outside"][0])
    options: dict[str, Any] = {"target": target, "mapping": scheme, "scale": "partition", "pack": True}
    deployment = compile_model(model, out=tmp_path / "out", **options)
    assert [p.inputs for p in deployment.plan.arrays[-1].partitions] == [(60, 80), (80, 100)]
    data = Arrays({"x": positive_inputs().arrays["x"]})
    faults = FaultModel.of_rate(0.1)

    found = predict(deployment, [faults], data).rates[0].layers[0]

    np.testing.assert_allclose(found.nsr, monte_carlo(deployment, faults, data, 200), rtol=0.1)
    if scheme == "differential":
        expected = expected_squares(deployment, faults)
        squares = squared_errors(deployment, faults, 600)
        for part in (slice(60, 80), slice(80, 100)):  # mostly leaks in the second, into a column of large weights
            assert expected[8, part].sum() == pytest.approx(squares[8, part].sum(), rel=0.1)
        assert expected[8, 80:100].sum() > 0.5 * expected[8, 60:80].sum()


def test_directions_do_not_leak_into_each_other(tmp_path: Path) -> None:
    """Two directions of an LSTM on one array run one after the other: cells beside their blocks do nothing."""
    text = '(float[5,2,6] x) => (float[] y) { y = LSTM <hidden_size=4,direction="bidirectional"> (x, W, R) }'
    target = Target(name="small", rows=48, columns=72, cell=CELLS["stuck outside"][0])
    model = model_of(text, {"W": (2, 16, 6), "R": (2, 16, 4)})
    deployment = compile_model(model, out=tmp_path / "out", target=target)
    assert deployment.plan.layers[0].groups_take_turns
    assert deployment.plan.arrays[0].partitions[0].groups == (0, 2)
    faults = FaultModel.of_rate(0.1)

    squares = squared_errors(deployment, faults, 600)

    assert expected_squares(deployment, faults).sum() == pytest.approx(squares.sum(), rel=0.05)


def expected_squares(deployment: Deployment, faults: FaultModel) -> NDArray[np.float32]:
    """The closed form of what :func:`squared_errors` counts."""
    errors = LayerErrors(deployment, 0)
    weights = deployment.weights(deployment.plan.layers[0])
    return errors.variance(faults) + np.square(errors.mean_weights(faults) - weights)


def squared_errors(deployment: Deployment, faults: FaultModel, chips: int) -> NDArray[np.float64]:
    """Mean squared error of each weight of the first layer, [groups * outputs, inputs]."""
    weights = deployment.weights(deployment.plan.layers[0]).reshape(-1)
    injector, geometry, total = Injector(deployment), ChipGeometry.of(deployment), np.zeros(weights.size)
    for number in range(chips):
        for found in injector.faults(draw_faults(geometry, faults, deployment.target, seed=4, run=number))[:1]:
            total[found.index] += np.square(found.value - weights[found.index], dtype=np.float64) / chips
    return total.reshape(-1, deployment.plan.layers[0].inputs)


def test_one_cell_of_a_weight(tmp_path: Path) -> None:
    """Rates of weights: at most one of the cells of a weight is stuck."""
    target = Target(name="small", rows=48, columns=64, pair_layout="twin", cell=CELLS["stuck outside"][0])
    deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / "out", target=target, mapping="balanced")
    faults = FaultModel(stuck_off=0.5, stuck_on=0.3, rate_unit="weight")

    found = predict(deployment, [faults], positive_inputs(), probe_images=1)

    expected = monte_carlo(deployment, faults, positive_inputs(), 60)
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.1)


def test_weights_without_cells_have_no_errors(tmp_path: Path) -> None:
    """Rows and columns of zeros take no cells: the shift of the others adds up fewer inputs."""
    text = "(float[N,8,6,7] x) => (float[] fc) { flat = Flatten (x) fc = Gemm <transB=1> (flat, F) }"
    model = model_of(text, {"F": SHAPES["F"]}, zeros=True)
    target = Target(name="small", rows=48, columns=8, cell=CELLS["analog"][0])
    deployment = compile_model(model, out=tmp_path / "out", target=target, mapping="offset")
    assert deployment.plan.totals.weights_without_cells > 1000
    data = Arrays({"x": positive_inputs().arrays["x"]})
    faults = FaultModel.of_rate(0.1)

    found = predict(deployment, [faults], data).rates[0].layers[0]

    assert found.coherent > 0.5 * found.nsr
    np.testing.assert_allclose(found.nsr, monte_carlo(deployment, faults, data, 400), rtol=0.1)


def test_mirrored_faults_on_the_mirrored_scheme(tmp_path: Path) -> None:
    """``differential`` under (off, on) is ``two_column`` under (on, off)."""
    found = []
    for scheme, off, on in (("differential", 0.01, 0.07), ("two_column", 0.07, 0.01)):
        target = Target(name="small", rows=48, columns=64, cell=CELLS["analog"][0])
        deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / scheme, target=target, mapping=scheme)
        prediction = predict(deployment, [FaultModel(stuck_off=off, stuck_on=on)], positive_inputs())
        found.append(nsr_of(prediction.rates[0], deployment))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_batches_and_rates_do_not_change_a_layer(tmp_path: Path) -> None:
    target = Target(name="small", rows=48, columns=64, cell=CELLS["analog"][0])
    deployment = compile_model(model_of(OPERATORS, SHAPES), out=tmp_path / "out", target=target, mapping="offset")
    rates = [FaultModel.of_rate(f) for f in (0.0, 0.01, 0.1)]
    together = predict(deployment, rates, positive_inputs(5), batch=5)
    alone = [predict(deployment, [rate], positive_inputs(5), batch=2) for rate in rates]
    for a, b in zip(together.rates, alone, strict=True):
        np.testing.assert_allclose(nsr_of(a, deployment), nsr_of(b.rates[0], deployment), rtol=1e-4)
    assert together.rates[0].output_error == 0
    assert {layer.nsr for layer in together.rates[0].layers} == {0.0}


NETWORK = (
    "(float[N,3,12,12] x) => (float[N,10] y) { a = Conv <pads=[1,1,1,1]> (x, A) b = Relu (a)"
    " c = Conv <pads=[1,1,1,1]> (b, B) d = Add (c, a) e = Relu (d) p = GlobalAveragePool (e) q = Flatten (p)"
    " r = Mul (q, small) big = Gemm (q, C) tiny = Gemm (r, D) y = Add (big, tiny) }"
)


def test_output_error_and_what_hurts_most(tmp_path: Path) -> None:
    shapes = {"A": (24, 3, 3, 3), "B": (24, 24, 3, 3), "C": (24, 10), "D": (24, 10), "small": ()}
    model = model_of(NETWORK, {**shapes, "small": ()})
    next(t for t in model.graph.initializer if t.name == "small").CopyFrom(
        numpy_helper.from_array(np.float32(1e-3), "small")
    )
    target = Target(name="small", rows=64, columns=64, cell=CELLS["analog"][0])
    deployment = compile_model(model, out=tmp_path / "out", target=target)
    data = Arrays({"x": np.random.default_rng(1).standard_normal((16, 3, 12, 12), np.float32)})
    faults = FaultModel.of_rate(0.003)

    found = predict(deployment, [faults], data, probe_images=16).rates[0]

    assert found.layers[-1].layer == "D"
    assert found.layers[-1].share < 1e-4
    assert [layer.share for layer in found.layers] == sorted((layer.share for layer in found.layers), reverse=True)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    expected = 100 * np.sqrt(monte_carlo(deployment, faults, data, 300)[0])
    assert found.output_error == pytest.approx(expected, rel=0.2)


def test_layers_that_feed_back_or_hide_are_named(tmp_path: Path) -> None:
    text = (
        "(float[5,2,6] x, bool c) => (float[] y, float[] z)"
        "{ y = LSTM <hidden_size=4> (x, W, R) s = ReduceMean <axes=[0], keepdims=0> (x)"
        " k = MatMul (s, K)"
        " z = If (c) <then_branch = t () => (float[2,5] p) { p = MatMul (k, A) },"
        " else_branch = e () => (float[2,5] q) { q = Gemm <transB=1> (k, B) }> }"
    )
    shapes = {"W": (1, 16, 6), "R": (1, 16, 4), "A": (6, 5), "B": (5, 6), "K": (6, 6)}
    deployment = compile_model(model_of(text, shapes), out=tmp_path / "out")

    found = predict(deployment, [FaultModel.of_rate(0.01)], open_data(deployment))

    assert set(found.not_predicted) == {"W", "R", "A", "B"}
    assert "LSTM" in found.not_predicted["W"]
    assert "subgraph" in found.not_predicted["A"]
    assert [layer.layer for layer in found.rates[0].layers] == ["K"]


def open_data(deployment: Deployment) -> Any:
    return open_dataset("generated", open_session(deployment.model_path), generate=2)


def test_refusals(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    deployment = compile_model(small_model, out=tmp_path / "out")
    data = open_data(deployment)
    with pytest.raises(ConfigError, match=r"--distribution line.*rerampile validate"):
        predict(deployment, [FaultModel.of_rate(0.01, distribution="line")], data)
    with pytest.raises(ConfigError, match="no rate to predict"):
        predict(deployment, [], data)
    with pytest.raises(ConfigError, match="--probe-images 0"):
        predict(deployment, [FaultModel.of_rate(0.01)], data, probe_images=0)
    with pytest.raises(DataError, match="no images"):
        predict(deployment, [FaultModel.of_rate(0.01)], data, images=0)


def test_quantised_layers(tmp_path: Path) -> None:
    text = "(uint8[N,6] x) => (int32[N,9] y) { y = MatMulInteger (x, W, zero) }"
    rng = np.random.default_rng(2)
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g ' + text)
    values = {"W": rng.integers(-127, 128, (6, 9)).astype(np.int8), "zero": np.array(100, np.uint8)}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    target = Target(name="small", rows=48, columns=72, slices=2, cell=Cell(g_off=1e-6, g_on=100e-6, levels=16))
    deployment = compile_model(model, out=tmp_path / "out", target=target)
    data = Arrays({"x": rng.integers(0, 256, (32, 6)).astype(np.uint8)})
    faults = FaultModel.of_rate(0.1)

    found = predict(deployment, [faults], data)

    expected = monte_carlo(deployment, faults, data, 600)
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_layer_of_resnet18(scheme: str, project_root: Path, tmp_path: Path) -> None:
    """Every layer of the shipped model on its own inputs, beside chips whose mean is known to 2 %."""
    source = onnx.load(project_root / "models" / "resnet18_cifar10.onnx")
    deployment = compile_model(source, out=tmp_path / "out", mapping=scheme)
    data = open_dataset("generated", open_session(deployment.model_path), generate=4)
    faults = FaultModel.of_rate(0.05)

    found = predict(deployment, [faults], data, probe_images=1)

    assert len(found.rates[0].layers) == 21
    assert not found.not_predicted
    inputs = layer_inputs(deployment, next(data.batches(4)).inputs)
    injector = Injector(deployment)
    expected = [
        layer_by_monte_carlo(source, deployment, injector, number, inputs[number], faults)
        for number in range(len(deployment.plan.layers))
    ]
    np.testing.assert_allclose(nsr_of(found.rates[0], deployment), expected, rtol=0.1)


def layer_inputs(deployment: Deployment, inputs: dict[str, Any]) -> list[NDArray[np.float32]]:
    """What each layer of a deployed model reads."""
    deployed = onnx.load(deployment.model_path, load_external_data=False)
    calls = {n.name: n.input[0] for n in deployed.graph.node if n.domain == DOMAIN}
    names = [calls[layer.uses[0].node] for layer in deployment.plan.layers]
    made = [name for name in dict.fromkeys(names) if name not in inputs]
    del deployed.graph.output[:]
    deployed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    path = deployment.folder / "captured.onnx"
    path.write_bytes(deployed.SerializeToString())
    captured = dict(zip(made, run(open_session(path), inputs), strict=True)) | inputs
    return [captured[name] for name in names]


def layer_by_monte_carlo(
    source: onnx.ModelProto,
    deployment: Deployment,
    injector: Injector,
    number: int,
    x: NDArray[np.float32],
    model: FaultModel,
) -> float:
    """Mean squared error of a layer's products over their energy: chips of its arrays alone, until it is known to 2 %.

    The cells of few arrays fail as the same cells of a whole chip do.
    """
    layer = deployment.plan.layers[number]
    arrays = [a.id for a in deployment.plan.arrays if any(p.layer == number for p in a.partitions)]
    first, whole = arrays[0], ChipGeometry.of(deployment)
    assert arrays == list(range(first, first + len(arrays)))
    geometry = replace(
        whole, arrays=len(arrays), width=whole.width[arrays], twin=np.arange(len(arrays)), roles=whole.roles[arrays]
    )
    energy = layer_energy(next(n for n in source.graph.node if n.name == layer.uses[0].node))
    healthy = deployment.weights(layer)
    found: list[float] = []
    while len(found) < 24 or np.std(found, ddof=1) > 0.02 * np.mean(found) * np.sqrt(len(found)):
        chip = draw_faults(geometry, model, deployment.target, seed=3 + number, run=len(found))
        chip = replace(chip, cell=chip.cell + first * whole.rows * whole.columns)
        (fault,) = injector.faults(chip)
        assert fault.layer == number
        errors = np.zeros_like(healthy)
        errors.reshape(-1)[fault.index] = fault.value - healthy.take(fault.index)
        found.append(energy(x, layer.view.tensor(errors)))
    return float(np.mean(found)) / energy(x, layer.view.tensor(healthy))


def layer_energy(node: onnx.NodeProto) -> Callable[[NDArray[np.float32], NDArray[np.float32]], float]:
    """The sum of squares of what an operator makes of inputs and weights, without bias."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    graph = onnx.GraphProto(name="errors")
    graph.node.append(helper.make_node(node.op_type, ["x", "w"], ["y"], **attributes))
    graph.node.append(helper.make_node("ReduceSumSquare", ["y"], ["e"], keepdims=0))
    graph.input.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xw")
    graph.output.append(helper.make_tensor_value_info("e", onnx.TensorProto.FLOAT, None))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(proto.SerializeToString())
    return lambda x, w: float(run(session, {"x": x, "w": w})[0])
