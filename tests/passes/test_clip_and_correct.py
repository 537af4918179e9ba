"""`compile --clip` and `--correct`: what the plan says, that deployments are whole, and expectations beside chips."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner

from rerampile import ConfigError, Deployment, Target, compile_model, verify_deployment
from rerampile.cli import main
from rerampile.layer_plan import ClipPlan, CorrectionPlan
from rerampile.passes import map as map_pass
from rerampile.runtime.dataset import ArrayDataset
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.session import open_session, run

Compile = Callable[..., Deployment]
Floats = npt.NDArray[np.float32]
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
ONE = f"{HEADER} g (float[N,24] x) => (float[] y) {{ y = Gemm <transB=1> (x, W) }}"
FOLDED = (
    f"{HEADER} g (float[N,4,6,6] x) => (float[] y) {{"
    " a = Conv <pads=[1,1,1,1]> (x, W) b = BatchNormalization (a, scale, shift, mean, variance)"
    " c = Relu (b) y = Conv <group=2> (c, V) }"
)
FAULTS = FaultModel(stuck_off=0.005, stuck_on=0.03)


def outliers(*shape: int, seed: int = 0) -> Floats:
    """Weights of which some are far larger than most."""
    return np.random.default_rng([seed, *shape]).standard_t(3, shape).astype(np.float32)


def images(*shape: int) -> ArrayDataset:
    """Inputs that are not centred, and not all alike."""
    rng = np.random.default_rng(5)
    values = (np.maximum(rng.standard_normal(shape), 0) * rng.uniform(0.2, 2, shape[1:])).astype(np.float32)
    return ArrayDataset(
        name="images",
        count=len(values),
        rows=None,
        fetch=lambda indices: {"x": values[indices]},
        hash_data=lambda found: found.update(values.tobytes()),
    )


def inputs_of(data: ArrayDataset) -> Floats:
    (batch,) = data.batches(len(data))
    values: Floats = batch.inputs["x"]
    return values


def clip_of(deployment: Deployment, number: int = 0) -> ClipPlan:
    clip = deployment.plan.layers[number].clip
    assert isinstance(clip, ClipPlan)
    return clip


def correction_of(deployment: Deployment, number: int = 0) -> CorrectionPlan:
    correction = deployment.plan.layers[number].correction
    assert isinstance(correction, CorrectionPlan)
    return correction


def folded_weights() -> dict[str, Floats]:
    rng = np.random.default_rng(1)
    channels = {name: rng.uniform(0.3, 2, 6).astype(np.float32) for name in ("scale", "shift", "mean", "variance")}
    return {"W": outliers(6, 4, 3, 3), "V": outliers(8, 3, 2, 2), **channels}


def errors_of_chips(deployment: Deployment, weights: Floats, faults: FaultModel, chips: int) -> npt.NDArray[np.float64]:
    """What chips hold in the only layer, less the weights, [chips, outputs, inputs]."""
    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    held = deployment.weights(deployment.plan.layers[0])
    found = np.repeat(held[None].astype(np.float64), chips, axis=0).reshape(chips, -1)
    for number in range(chips):
        for layer in injector.faults(draw_faults(geometry, faults, deployment.target, seed=1, run=number)):
            found[number, layer.index] = layer.value
    return found.reshape(chips, *held.shape) - weights


@pytest.mark.parametrize(
    ("mapping", "scale"),
    [
        ("two_column", "channel"),
        ("differential", "tensor"),
        ("optimal", "channel"),
        ("offset", "tensor"),
        ("differential", "partition"),
        ("offset", "partition"),
    ],
)
def test_the_expected_error_is_that_of_many_chips(mapping: str, scale: str, compile_text: Compile) -> None:
    """Of the outputs of the very model, on the calibration images; less than without clipping."""
    weights, data = outliers(16, 24), images(50, 24)
    x = inputs_of(data).astype(np.float64)
    energy = np.sum((x @ weights.T) ** 2)
    target = Target.load("paper", {"rows": 8})  # three partitions, which see inputs that have something in common
    options: dict[str, Any] = {"mapping": mapping, "scale": scale, "target": target, "faults": FAULTS}
    deployment = compile_text(ONE, {"W": weights}, clip=True, calibration=data, **options)
    clip = clip_of(deployment)
    assert clip.error is not None
    assert clip.error_unclipped is not None

    def simulated(folder: Deployment) -> float:
        errors = errors_of_chips(folder, weights, FAULTS, 500)
        return float(np.mean(np.sum((errors @ x.T) ** 2, axis=(1, 2))) / energy)

    plain = {**options, "faults": FAULTS if mapping in ("optimal", "auto") else None}
    assert clip.error == pytest.approx(simulated(deployment), rel=0.06)
    assert clip.error_unclipped == pytest.approx(simulated(compile_text(ONE, {"W": weights}, **plain)), rel=0.06)
    assert clip.error < 0.95 * clip.error_unclipped
    held = deployment.weights(deployment.plan.layers[0])
    assert clip.output_change == pytest.approx(np.sum((x @ (held - weights).T) ** 2) / energy, rel=1e-4)
    changed = np.count_nonzero(np.abs(held - weights) > 1e-6 * np.abs(weights).max())
    at_a_weight = 2 if scale == "partition" else 0  # full scales that are one, but for rounding
    assert changed <= clip.clipped <= changed + at_a_weight
    axis = {"tensor": None, "channel": (1, 2), "partition": 2}[scale]
    shares = np.divide(*(np.abs(matrix.reshape(16, 3, 8)).max(axis=axis) for matrix in (held, weights)))
    assert clip.full_scale == pytest.approx(np.mean(shares), rel=1e-5)


def test_without_images_errors_are_those_of_weights(compile_text: Compile) -> None:
    weights = outliers(16, 24)
    deployment = compile_text(ONE, {"W": weights}, clip=True, faults=FAULTS)
    clip, power = clip_of(deployment), np.sum(weights.astype(np.float64) ** 2)
    errors = errors_of_chips(deployment, weights, FAULTS, 500)
    assert clip.error == pytest.approx(np.sum(errors**2, axis=(1, 2)).mean() / power, rel=0.06)
    held = deployment.weights(deployment.plan.layers[0])
    assert clip.output_change == pytest.approx(np.sum((held - weights) ** 2) / power, rel=1e-4)
    assert deployment.plan.options["calibration"] == {}


@pytest.mark.parametrize("scale", ["channel", "tensor", "partition"])
@pytest.mark.parametrize("levels", [None, 32])
def test_a_clipped_model_is_what_is_deployed(
    levels: int | None, scale: str, model_of: Callable[..., onnx.ModelProto], tmp_path: Path, discrete_target: Any
) -> None:
    """With folds, groups, pruning and levels: verified, and run beside the user's graph with clipped weights."""
    weights, data = folded_weights(), images(20, 4, 6, 6)
    model = model_of(FOLDED, weights)
    target = replace(discrete_target(levels=levels), rows=20)
    options: dict[str, Any] = {"target": target, "scale": scale, "prune": 0.3}
    deployment = compile_model(model, out=tmp_path / "out", clip=True, calibration=data, faults=FAULTS, **options)

    verify_deployment(deployment.folder)

    assert [clip_of(deployment, n).clipped > 0 for n in range(2)] == [True, True]
    held = deployment.weights(deployment.plan.layers[0]).reshape(6, 4, 3, 3)
    factor = weights["scale"] / np.sqrt(weights["variance"] + 1e-5)
    clipped = model_of(FOLDED, {**weights, "W": held / factor[:, None, None, None], "V": _second(deployment)})
    x = {"x": inputs_of(data)}
    (expected,) = run(open_session(clipped.SerializeToString()), x)
    (found,) = run(open_session(deployment.model_path), x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def _second(deployment: Deployment) -> Floats:
    return deployment.weights(deployment.plan.layers[1]).reshape(8, 3, 2, 2)


BIASED = f"{HEADER} g (float[N,24] x) => (float[] y) {{ y = Gemm <transB=1, alpha=0.5> (x, W, B) }}"


@pytest.mark.parametrize("scale", ["channel", "partition"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("mapping", ["two_column", "offset"])
def test_corrected_chips_are_right_on_average(mapping: str, clip: bool, scale: str, compile_text: Compile) -> None:
    """Their mean outputs are the user's, and their mean squared error is the expected one, less than uncorrected."""
    weights, data, bias = outliers(16, 24), images(50, 24), outliers(16, seed=1)
    x = inputs_of(data).astype(np.float64)
    hardware: dict[str, Any] = {"mapping": mapping, "scale": scale, "target": Target.load("paper", {"rows": 8})}
    options: dict[str, Any] = {**hardware, "clip": clip, "correct": True, "faults": FAULTS}
    deployment = compile_text(BIASED, {"W": weights, "B": bias}, calibration=data, **options)
    correction = correction_of(deployment)

    held = deployment.weights(deployment.plan.layers[0])
    (found,) = run(open_session(deployment.model_path), {"x": x.astype(np.float32)})
    addend = (found - (0.5 * x @ held.T.astype(np.float64) + bias)).mean(axis=0)
    errors = 0.5 * errors_of_chips(deployment, weights, FAULTS, 500) @ x.T + addend[:, None]
    energy = np.sum((0.5 * x @ weights.T) ** 2)

    spread = errors.mean(axis=2).std(axis=0) / np.sqrt(500)
    assert (np.abs(errors.mean(axis=(0, 2))) < 4.5 * spread).all()
    assert correction.error == pytest.approx(np.sum(errors**2, axis=(1, 2)).mean() / energy, rel=0.06)
    assert correction.bias
    if mapping == "offset":
        assert correction.error < correction.error_uncorrected
        assert np.median(np.abs(addend) / spread) > 10
    if not clip:
        plain = errors_of_chips(compile_text(BIASED, {"W": weights, "B": bias}, **hardware), weights, FAULTS, 500)
        simulated = np.sum((0.5 * plain @ x.T) ** 2, axis=(1, 2)).mean() / energy
        assert correction.error_uncorrected == pytest.approx(simulated, rel=0.06)


def test_a_pair_that_is_not_clipped_is_divided_by_the_share_of_healthy_cells(compile_text: Compile) -> None:
    """Its cells are the same as ever, and nothing is added to its bias."""
    weights, data = {"W": outliers(16, 24)}, images(50, 24)
    corrected = compile_text(ONE, weights, correct=True, calibration=data, faults=FAULTS)
    plain = compile_text(ONE, weights)
    (layer,) = corrected.plan.layers
    np.testing.assert_allclose(corrected.gain(layer), plain.gain(plain.plan.layers[0]) / 0.965, rtol=1e-6)
    np.testing.assert_allclose(corrected.cells(layer), plain.cells(plain.plan.layers[0]), rtol=0, atol=3e-11)
    assert correction_of(corrected).gain == pytest.approx(1 / 0.965)
    x = {"x": inputs_of(data)}
    (found,), (expected,) = (run(open_session(d.model_path), x) for d in (corrected, plain))
    np.testing.assert_allclose(found, expected / 0.965, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mapping", ["differential", "offset"])
@pytest.mark.parametrize("levels", [None, 32])
def test_corrected_models_are_whole(
    mapping: str, levels: int | None, compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    """Folds, groups, a bias of its own and one that a fold made: run beside the user's graph, and verified again."""
    options: dict[str, Any] = {"mapping": mapping, "clip": True, "correct": True, "faults": FAULTS}
    target = discrete_target(levels=levels)
    deployment = compile_text(FOLDED, folded_weights(), calibration=images(20, 4, 6, 6), target=target, **options)
    for number in range(2):
        assert correction_of(deployment, number).bias
        assert correction_of(deployment, number).gain > 1 / 0.965


def test_a_product_without_a_bias_gets_a_gain_alone(compile_text: Compile) -> None:
    text = f"{HEADER} g (float[N,24] x) => (float[] y) {{ y = MatMul (x, W) }}"
    weights = {"W": outliers(24, 16)}
    deployment = compile_text(text, weights, correct=True, calibration=images(50, 24), mapping="offset", faults=FAULTS)
    correction = correction_of(deployment)
    assert not correction.bias
    assert correction.gain == pytest.approx(1 / 0.965)


def test_few_faults_clip_nothing_for_nothing(compile_text: Compile) -> None:
    """Where no scale is better the cells are byte for byte those without clipping."""
    weights = {"W": np.where(np.arange(16 * 24).reshape(16, 24) % 2, 1, -1).astype(np.float32)}
    clipped = compile_text(ONE, weights, clip=True, calibration=images(50, 24), faults=FaultModel.of_rate(1e-6))
    plain = compile_text(ONE, weights)
    assert clip_of(clipped).clipped == 0
    assert clip_of(clipped).full_scale == 1
    for name in plain.conductances.specs:
        np.testing.assert_array_equal(clipped.conductances.read(name), plain.conductances.read(name))
    assert "clip" not in json.loads((plain.folder / "plan.json").read_text())["layers"][0]
    assert not {"clip", "correct", "calibration"} & plain.plan.options.keys()


def test_layers_whose_inputs_are_not_seen_stay_as_they_are(
    compile_text: Compile, discrete_target: Callable[..., Any]
) -> None:
    text = (
        f"{HEADER} g (uint8[N,8] x) => (float[] z) {{"
        " y = MatMulInteger (x, whole) f = Cast <to=1> (y) z = MatMul (f, W) }"
    )
    weights = {"whole": np.arange(-16, 16, dtype=np.int8).reshape(8, 4), "W": outliers(4, 30)}
    data = images(20, 8)
    data.fetch = lambda indices: {"x": np.full((len(indices), 8), 7, np.uint8)}
    deployment = compile_text(
        text, weights, clip=True, calibration=data, faults=FAULTS, target=discrete_target(levels=64)
    )
    assert clip_of(deployment) == ClipPlan(
        clipped=0,
        full_scale=1,
        output_change=0,
        error=None,
        error_unclipped=None,
        reason="its weights are whole numbers",
    )
    assert clip_of(deployment, 1).reason is None


def test_moments_are_held_for_some_layers_at_a_time(compile_text: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one or together, the result is the same."""
    options: dict[str, Any] = {"clip": True, "calibration": images(20, 4, 6, 6), "faults": FAULTS}
    together = compile_text(FOLDED, folded_weights(), **options)
    monkeypatch.setattr(map_pass, "_MOMENTS_HELD", 1)
    apart = compile_text(FOLDED, folded_weights(), **options)
    assert [clip_of(together, n) for n in (0, 1)] == [clip_of(apart, n) for n in (0, 1)]


def test_the_plan_says_from_what_it_was_chosen(compile_text: Compile) -> None:
    deployment = compile_text(
        ONE, {"W": outliers(16, 24)}, clip=True, calibration=images(50, 24), calibration_images=10
    )
    options = deployment.plan.options
    assert options["calibration"] == {"data": "images", "images": 10}
    assert (options["clip"], options["correct"]) == (True, False)
    assert (options["stuck_off"], options["stuck_on"]) == pytest.approx((0.001 / 6.2, 0.0052 / 6.2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"faults": FaultModel.of_rate(0)},
            "--clip, --correct and --spend-spare-arrays: 0 of all cells stuck, expected more than 0 and less than 1",
        ),
        (
            {"faults": FaultModel.of_rate(0.01, rate_unit="weight")},
            "--clip, --correct and --spend-spare-arrays: a failure rate of a weight, expected one",
        ),
        ({"current_weight": 0.1}, "'differential' is the same for all current weights, expected none; leave them out"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, compile_text: Compile) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_text(ONE, {"W": outliers(16, 24)}, **{"clip": True, "calibration": images(50, 24), **options})


def test_the_command_line(model_of: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    onnx.save(model_of(ONE, {"W": outliers(16, 24)}), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=inputs_of(images(50, 24)))
    arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out"), "--clip"]
    refused = CliRunner().invoke(main, [*arguments, "--correct"])
    assert refused.exit_code == 2
    assert "--correct: expected --calibration DATA, which shows the mean of each input" in refused.stderr

    alike = CliRunner().invoke(main, arguments)
    assert alike.exit_code == 0, alike.stderr
    assert "weights, all inputs counted alike; that changes the outputs of 'W' most" in " ".join(alike.stdout.split())

    arguments += ["--failure-rate", "0.03", "--calibration", f"npz:{tmp_path / 'x.npz'}"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["layers"][0]["clip"]["clipped"] > 0
    assert f"clipped {plan['layers'][0]['clip']['clipped']}" in done.stderr
    assert f"clipped {plan['layers'][0]['clip']['clipped']} weights; that changes the outputs of 'W' most" in " ".join(
        done.stdout.split()
    )
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "out"), "-v"]).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("W ") and line.count("%") == 4)
    assert line.split()[1] == str(plan["layers"][0]["clip"]["clipped"])
    assert f"{plan['layers'][0]['clip']['error']:.3%}" in line
    assert plan["options"]["stuck_on"] == pytest.approx(0.03 * 5.2 / 6.2)
