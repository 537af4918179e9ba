"""What `optimal` and `auto` choose, what they expect of it, and that deployments of mixed schemes are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from rerampile import ConfigError, Deployment, compile_model, verify_deployment
from rerampile.layer_plan import MappingChoice
from rerampile.runtime.data import open_dataset
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.predict import predict
from rerampile.runtime.session import open_session
from rerampile.runtime.validation import validate
from rerampile.schemes import SCHEMES

Compile = Callable[..., Deployment]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
ONE = f"{HEADER} g (float[2,24] x) => (float[] y) {{ y = Gemm <transB=1> (x, W) }}"
MIXED = (
    f"{HEADER} g (float[N,8,4,4] x) => (float[] y) {{"
    " a = Conv <group=8> (x, ones) b = Relu (a) c = Conv (b, W) y = GlobalAveragePool (c) }"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "analog": {"levels": None},
    "levels": {"levels": 16},
    "slices": {"levels": 4, "slices": 3},
    "table": {"levels": 4, "slices": 2, "level_table": (1e-6, 20e-6, 37e-6, 100e-6)},
}


def gaussian(*shape: int) -> npt.NDArray[np.float32]:
    """Weights of both signs that add up to nothing."""
    half = np.random.default_rng(3).standard_normal((shape[0], shape[1] // 2)).astype(np.float32)
    return np.concatenate([half, -half], axis=1)


def choice_of(deployment: Deployment, number: int = 0) -> MappingChoice:
    choice = deployment.plan.layers[number].choice
    assert choice is not None
    return choice


def schemes_of(deployment: Deployment) -> list[str]:
    return [layer.scheme for layer in deployment.plan.layers]


@pytest.mark.parametrize("mapping", ["optimal", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cell(
    family: str, mapping: str, compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    """Levels of one step decode to the very weights of other pairs; all are verified, when compiled and after."""
    target, weights = discrete_target(**FAMILIES[family]), {"W": gaussian(20, 24)}
    deployment = compile_text(ONE, weights, target=target, mapping=mapping)
    other = compile_text(ONE, weights, target=target, mapping="differential")

    (layer,), (reference,) = deployment.plan.layers, other.plan.layers
    if family == "table" and mapping == "auto":  # no level lies between the aim and the highest
        assert layer.scheme == "differential"
    else:
        assert layer.scheme == "optimal"
        assert layer.common_modes is not None
        assert len(layer.common_modes) == layer.slices
    found, expected = deployment.weights(layer), other.weights(reference)
    if family in ("levels", "slices"):
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 if family == "analog" else 0.5)
    choice = choice_of(deployment)
    assert [estimate.scheme for estimate in choice.estimates] == list(SCHEMES)
    errors = {estimate.scheme: estimate.error for estimate in choice.estimates}
    assert errors["optimal"] <= min(errors.values()) * (1 + 1e-6)
    assert f"two_column {errors['two_column'] / errors['optimal']:.3g}" in choice.reason
    assert other.plan.layers[0].choice is None


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_those_of_many_chips(
    family: str, compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    """Of every scheme: squared errors of the weights that chips hold, and the conductance in the plan of that scheme.

    The shift of offset counts as many times as there are inputs.
    """
    target, weights = discrete_target(**FAMILIES[family]), {"W": gaussian(20, 24)}
    faults = FaultModel(stuck_off=0.02, stuck_on=0.06)
    auto = compile_text(ONE, weights, target=target, mapping="auto", faults=faults)
    for estimate in choice_of(auto).estimates:
        options = {"faults": faults} if estimate.scheme == "optimal" else {}
        deployment = compile_text(ONE, weights, target=target, mapping=estimate.scheme, **options)
        assert estimate.pair_conductance == pytest.approx(deployment.plan.totals.mean_pair_conductance, rel=1e-5)
        assert estimate.cost == estimate.error
        errors = chip_errors(deployment, faults, 600)
        expected = np.mean(np.sum(errors**2, axis=2), axis=0)
        if estimate.scheme == "offset":
            shift = errors.mean(axis=(0, 2))  # the mean of -p w over the inputs of an output is nothing
            expected += shift**2 * (24**2 - 24)
        tolerance = 0.1 if estimate.scheme == "offset" else 0.03
        assert estimate.error == pytest.approx(expected.sum() / np.sum(weights["W"] ** 2), rel=tolerance)


def chip_errors(deployment: Deployment, faults: FaultModel, chips: int) -> npt.NDArray[np.float64]:
    """Errors of the weights of the only layer, [chips, outputs, inputs]."""
    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    weights = deployment.weights(deployment.plan.layers[0])
    found = np.zeros((chips, weights.size))
    for number in range(chips):
        chip = draw_faults(geometry, faults, deployment.target, seed=1, run=number)
        for layer in injector.faults(chip):
            found[number, layer.index] = layer.value - weights.reshape(-1)[layer.index]
    return found.reshape(chips, *weights.shape)


@pytest.mark.parametrize(
    ("off", "on", "expected"),
    [(0, 0.01, "differential"), (0.01, 0, "two_column"), (0.01, 0.01, "balanced"), (0.01, 0.05, "optimal")],
)
def test_equal_schemes_are_taken_in_order(off: float, on: float, expected: str, compile_text: Compile) -> None:
    """Where the best common mode is that of a plain scheme, the plain one is chosen."""
    deployment = compile_text(
        ONE, {"W": gaussian(20, 24)}, mapping="auto", faults=FaultModel(stuck_off=off, stuck_on=on)
    )
    assert schemes_of(deployment) == [expected]


@pytest.mark.parametrize("layout", ["adjacent", "twin"])
@pytest.mark.parametrize("family", ["analog", "slices"])
def test_layers_of_different_schemes_in_one_deployment(
    family: str,
    layout: str,
    model_of: Callable[..., onnx.ModelProto],
    discrete_target: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Ones in a depthwise layer, with one input an output, are best in one cell; it is run, predicted and validated."""
    model = model_of(MIXED, {"ones": np.ones((8, 1, 1, 1), np.float32), "W": gaussian(6, 8).reshape(6, 8, 1, 1)})
    target = discrete_target(**FAMILIES[family], pair_layout=layout)
    deployment = compile_model(model, out=tmp_path / "out", target=target, mapping="auto", pack=True)

    verify_deployment(deployment.folder)

    assert schemes_of(deployment) == ["offset", "optimal"]
    assert [layer.cells for layer in deployment.plan.layers] == [1, 2]
    roles = {(*array.roles, array.twin is None) for array in deployment.plan.arrays}
    pairs = {("plus", "minus", True)} if layout == "adjacent" else {("plus", False), ("minus", False)}
    assert roles == {("plus", True), *pairs}
    data = open_dataset("generated", open_session(deployment.model_path))
    found = predict(deployment, [FaultModel.of_rate(0.01)], data, images=4)
    assert {layer.layer for layer in found.rates[0].layers} == {"ones", "W"}
    experiment = Experiment(folder=deployment.folder, faults=(FaultModel.of_rate(0.05),), data="generated", images=4)
    report = validate(experiment, tmp_path / "journal.jsonl", runs=2)
    assert report.mapping == "auto"
    assert report.rates[0].faults.observed_on > 0


@pytest.mark.parametrize(("inputs", "expected"), [(2, "offset"), (60, "two_column")])
def test_the_shift_of_offset_adds_up_over_inputs(inputs: int, expected: str, compile_text: Compile) -> None:
    """Weights that a single cell suits: better than a pair for a few inputs, worse for many."""
    text = f"{HEADER} g (float[2,{inputs}] x) => (float[] y) {{ y = Gemm <transB=1> (x, W) }}"
    weights = {"W": np.ones((4, inputs), np.float32)}
    deployment = compile_text(text, weights, mapping="auto", faults=FaultModel.of_rate(0.05))
    assert schemes_of(deployment) == [expected]


def test_a_cell_of_two_levels_leaves_offset_out(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    deployment = compile_text(ONE, {"W": gaussian(20, 24)}, mapping="auto", target=discrete_target(levels=2))
    assert [e.scheme for e in choice_of(deployment).estimates] == ["two_column", "differential", "balanced", "optimal"]


def test_weights_that_only_pairs_hold_leave_offset_out(compile_text: Compile) -> None:
    """Half the span takes twice the gain, which leaves float32 first."""
    deployment = compile_text(ONE, {"W": gaussian(20, 24) * np.float32(8e33)}, mapping="auto")
    assert "offset" not in [estimate.scheme for estimate in choice_of(deployment).estimates]
    assert np.isfinite([estimate.error for estimate in choice_of(deployment).estimates]).all()


def test_nothing_but_zeros(compile_text: Compile) -> None:
    deployment = compile_text(ONE, {"W": np.zeros((20, 24), np.float32)}, mapping="auto")
    assert schemes_of(deployment) == ["two_column"]
    assert choice_of(deployment).reason == "two_column: no weight has an error to expect"


def test_what_takes_no_cells_has_no_error(compile_text: Compile) -> None:
    """Empty rows and columns change nothing; zeros between weights do."""
    weights = gaussian(20, 24)
    emptied = np.zeros((20, 24), np.float32)
    emptied[:10, :12] = weights[:10, :12]
    dense = np.array(emptied[:10, :12])
    text = f"{HEADER} g (float[2,12] x) => (float[] y) {{ y = Gemm <transB=1> (x, W) }}"
    found, expected = (
        choice_of(compile_text(model, {"W": matrix}, mapping="auto")).estimates
        for model, matrix in ((ONE, emptied), (text, dense))
    )
    for one, other in zip(found, expected, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-6)
        assert one.pair_conductance == pytest.approx(other.pair_conductance, rel=1e-6)


def test_whole_numbers_stay_whole(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    text = f"{HEADER} g (uint8[2,3] x) => (int32[] y) {{ y = MatMulInteger (x, W) }}"
    values = np.array([[9, 14], [-5, 3], [7, -15]], np.int8)
    for mapping in ("optimal", "auto"):
        deployment = compile_text(text, {"W": values}, mapping=mapping, target=discrete_target(levels=16))
        (layer,) = deployment.plan.layers
        np.testing.assert_array_equal(deployment.weights(layer), values.T)


def test_read_current_is_traded_for_error(compile_text: Compile) -> None:
    """The more it counts the less of it there is; where nothing else counts, two columns idle at off."""
    faults, conductances, errors = FaultModel.of_rate(0.01), [], []
    for weight in (0.0, 1e-4, 2e-3, 0.02, 1.0):
        options: dict[str, Any] = {"faults": faults, "current_weight": weight}
        deployment = compile_text(ONE, {"W": gaussian(20, 24)}, mapping="optimal", **options)
        conductances.append(deployment.plan.totals.mean_pair_conductance)
        errors.append(next(e.error for e in choice_of(deployment).estimates if e.scheme == "optimal"))
        costs = {estimate.scheme: estimate.cost for estimate in choice_of(deployment).estimates}
        assert costs["optimal"] <= min(costs[scheme] for scheme in ("two_column", "differential", "balanced"))
    assert conductances == sorted(conductances, reverse=True)
    assert errors == sorted(errors)
    assert conductances[0] > 1.3 * conductances[-1]
    auto = compile_text(ONE, {"W": gaussian(20, 24)}, mapping="auto", faults=faults, current_weight=1.0)
    assert "expected error and current" in choice_of(auto).reason


def test_options_and_target(compile_text: Compile, discrete_target: Callable[..., Any]) -> None:
    """A target may ask for a mapping that weighs; the plan records what it was weighed with."""
    deployment = compile_text(ONE, {"W": gaussian(20, 24)}, target=discrete_target(mapping="auto"))
    options = deployment.plan.options
    assert options["mapping"] == "auto"
    assert (options["stuck_off"], options["stuck_on"]) == pytest.approx((0.001 / 6.2, 0.0052 / 6.2))
    assert options["current_weight"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mapping": "balanced", "faults": FaultModel.of_rate(0.1)},
            "mapping 'balanced' is the same for all fault",
        ),
        ({"mapping": "balanced", "current_weight": 0.1}, "leave them out, or use optimal or auto"),
        (
            {"mapping": "auto", "faults": FaultModel.of_rate(0)},
            "mapping 'auto': 0 of all cells stuck, expected more",
        ),
        (
            {"mapping": "optimal", "faults": FaultModel.of_rate(1)},
            "1 of all cells stuck, expected more than 0 and",
        ),
        (
            {"mapping": "auto", "faults": FaultModel.of_rate(0.01, rate_unit="weight")},
            "a failure rate of a weight, expected one of a cell; leave out --rate-unit weight",
        ),
        ({"mapping": "optimal", "current_weight": 1.5}, "--current-weight 1.5: expected a number from 0 to 1"),
        ({"mapping": "optimal", "current_weight": float("nan")}, "--current-weight nan: expected a number from 0 to 1"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, compile_text: Compile) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_text(ONE, {"W": gaussian(20, 24)}, **options)
