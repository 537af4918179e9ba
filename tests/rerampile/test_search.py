"""The search on a model: every step pruned, compiled and run; the command, its files, going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator

from rerampile import DataError, load_deployment, searcher, verify_deployment
from rerampile.cli import main
from rerampile.runtime import monte_carlo
from rerampile.runtime.forecast import with_noise
from rerampile.runtime.progressive import Measured
from rerampile.runtime.report_schema import report_schema
from rerampile.runtime.search_report import beside

IMAGES = 120


@pytest.fixture(scope="module")
def folder(parse_model: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three prunable blocks, and images labelled with what it says of them, in two halves."""
    rng = np.random.default_rng(5)

    def weights(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)

    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 3, 6, 6] image) => (float[N, 5] scores) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, first)
            b = Relu (a)
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (b, second)
            d = Relu (c)
            e = Conv <kernel_shape = [3, 3]> (d, third)
            f = Relu (e)
            g = Flatten (f)
            scores = Gemm <transB = 1> (g, last)
        }
        """,
        first=weights(8, 3, 3, 3),
        second=weights(12, 8, 3, 3),
        third=weights(6, 12, 3, 3),
        last=weights(5, 96),
    )
    out = tmp_path_factory.mktemp("search")
    onnx.save(model, out / "net.onnx")
    images = rng.standard_normal((2 * IMAGES, 3, 6, 6)).astype(np.float32)
    (scores,) = onnxruntime.InferenceSession(out / "net.onnx").run(None, {"image": images})
    for name, part in (("train", slice(IMAGES)), ("test", slice(IMAGES, None))):
        np.savez(out / f"{name}.npz", image=images[part], labels=scores[part].argmax(axis=1))
    return out


def run(folder: Path, out: Path, *arguments: object) -> Result:
    words = ["search", folder / "net.onnx", "--data", f"npz:{folder / 'test.npz'}", "-o", out]
    words += ["--selection", f"npz:{folder / 'train.npz'}", "--calibration", f"npz:{folder / 'train.npz'}"]
    words += ["--failure-rate", "0.01", "--selection-runs", 4, "--runs", 5, "--ratios", "0.3,0.6,0.9", *arguments]
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("out") / "net.search"
    done = run(folder, out, "--threshold", 2)
    assert done.exit_code == 0, done.output
    return out, done


def test_a_search_leaves_a_deployment_and_its_path(finished: tuple[Path, Result]) -> None:
    out, done = finished
    assert {entry.name for entry in out.iterdir()} == {"deployment", "search.json", "search.svg", "search.png"}
    record = json.loads((out / "search.json").read_text())
    Draft202012Validator(report_schema()).validate(record)
    steps = record["steps"]
    assert steps[0]["ratios"] == {"6": 0.0, "12": 0.0}  # the block of fewer weights goes first
    assert steps[1]["searched"] == ["6", "12"]
    assert any(step["accepted"] for step in steps[1:])
    assert not all(step["accepted"] for step in steps)
    assert f"[{len(steps) - 1}] " in done.stderr
    assert "unpruned" in done.stdout
    best = steps[record["best"]]
    assert best["mean"] >= steps[0]["mean"]
    assert record["ratios"] in (best["ratios"], steps[0]["ratios"])
    assert record["final"]["chips"] == 5
    assert "clip" not in record
    found = verify_deployment(out / "deployment")
    assert all(output.relative_error < 1e-4 for output in found.outputs)
    layers = {layer.name: layer for layer in load_deployment(out / "deployment").plan.layers}
    for name, block in (("second", "12"), ("third", "6")):
        assert layers[name].sparsity == pytest.approx(record["ratios"][block], abs=0.01)


def test_the_final_figures_are_those_of_validate(folder: Path, finished: tuple[Path, Result], tmp_path: Path) -> None:
    """The deployment that is left has, on the same chips, the accuracy that was reported."""
    out, _ = finished
    words = ["validate", out / "deployment", "--data", f"npz:{folder / 'test.npz'}", "--failure-rate", "0.01"]
    words += ["--runs", 5, "--seed", 2, "-o", tmp_path / "report", "--json"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    final = json.loads((out / "search.json").read_text())["final"]
    assert json.loads(done.stdout)["rates"][0]["metrics"]["top1"]["mean"] == pytest.approx(final["mean"], abs=1e-12)


def test_a_stopped_search_goes_on_to_the_same_bytes(
    folder: Path, finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    chips, real = 0, monte_carlo.draw_faults

    def stopping(*arguments: object, **more: object) -> object:
        nonlocal chips
        chips += 1
        if chips == 6:  # in the middle of the first pruned step
            raise KeyboardInterrupt
        return real(*arguments, **more)  # type: ignore[arg-type]

    again = tmp_path / "net.search"
    monkeypatch.setattr(monte_carlo, "draw_faults", stopping)
    assert run(folder, again, "--threshold", 2).exit_code == 130
    assert (again / "unfinished").is_dir()
    assert not (again / "search.json").exists()
    before = chips
    assert run(folder, again, "--threshold", 2).exit_code == 0
    total = 4 * sum(step["mean"] is not None for step in json.loads((out / "search.json").read_text())["steps"])
    record = json.loads((out / "search.json").read_text())
    total += (8 if record["confirmed"] else 0) + (10 if any(record["ratios"].values()) else 5)
    assert chips - before == total - 5  # five chips had been finished
    for name in ("search.json", "search.svg", "deployment/plan.json", "deployment/conductances.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name


def test_every_step_is_clipped_and_corrected_where_asked(folder: Path, tmp_path: Path) -> None:
    """From the calibration images; results of steps that were not are not taken for theirs."""
    place = tmp_path / "out"
    words = ["--clip", "--correct", "--scale", "partition", "--set", "rows=32", "--threshold", 2, "-q"]
    done = run(folder, place, *words)
    assert done.exit_code == 0, done.output
    record = json.loads((place / "search.json").read_text())
    Draft202012Validator(report_schema()).validate(record)
    assert (record["scale"], record["clip"], record["correct"]) == ("partition", True, True)
    plan = load_deployment(place / "deployment").plan
    assert plan.options["calibration"] == {"data": f"npz:{folder / 'train.npz'}", "images": IMAGES}
    assert plan.options["stuck_off"] + plan.options["stuck_on"] == pytest.approx(0.01)
    assert {layer.scale for layer in plan.layers} == {"partition"}
    assert all(layer.clip is not msgspec.UNSET and layer.correction is not msgspec.UNSET for layer in plan.layers)
    verify_deployment(place / "deployment")


def test_steps_that_nothing_can_be_predicted_of_are_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: object) -> float:
        raise DataError("outputs are not finite")

    monkeypatch.setattr("rerampile.searcher.forecast", nothing)
    done = run(folder, tmp_path / "out", "--predict", "--ratios", "0.9", "--json", "-q")
    assert done.exit_code == 0, done.output
    steps = json.loads(done.stdout)["steps"]
    assert steps
    assert not any("predicted" in (step["reason"] or "") for step in steps)


def test_steps_predicted_to_fail_are_not_run(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "out", "--predict", "--threshold", 2, "--json", "-q")
    assert done.exit_code == 0, done.output
    skipped = [step for step in json.loads(done.stdout)["steps"] if step["mean"] is None]
    assert skipped
    assert all("predicted to lose" in step["reason"] and step["ratio"] > 0.3 for step in skipped)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("gains", "holds"),
    [([1.0, 2.0, 3.0], True), ([-1.0, 0.5, -0.2], True), ([-1.0, -1.1, -0.9], False), ([-5.0], True)],
)
def test_the_unpruned_model_is_taken_where_fresh_chips_show_it_to_be_better(gains: list[float], holds: bool) -> None:
    unpruned = np.linspace(80, 90, len(gains))
    outcome = beside(Measured(92.0, unpruned), Measured(92.0, unpruned + gains))
    assert searcher._holds(outcome) is holds
    assert searcher._holds(None)


def test_noise_has_the_asked_energy() -> None:
    output = np.random.default_rng(0).standard_normal((1000, 50)).astype(np.float32) * 3
    noise = with_noise(output, 0.2, np.random.default_rng(1)) - output
    assert np.sqrt(np.square(noise).mean() / np.square(output).mean()) == pytest.approx(0.2, rel=0.02)
    np.testing.assert_array_equal(with_noise(output, 0.0, np.random.default_rng(1)), output)
    whole = np.arange(5)
    assert with_noise(whole, 0.2, np.random.default_rng(1)) is whole


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--failure-rate", "0.01,0.02"], 2, "--failure-rate: expected the one rate to search for"),
        (["--failure-rate", "0.3"], 1, "the unpruned model keeps"),
        (["--ratios", "some"], 2, "'some': expected ratios with ','"),
        (["--ratios", "0.5,0.2"], 1, "--ratios 0.5,0.2: expected ratios above 0 and below 1, ascending"),
        (["--structure", "2:4"], 1, "--structure 2:4: has one ratio only"),
        (["--threshold", "0"], 1, "--threshold 0: expected more than 0 points"),
        (["--method", "adm"], 1, "pruning method adm: no such engine"),
        (["--protect", "first,last,12,6"], 1, "no block to search"),
        (["--data", "generated"], 1, "--data generated: has no labels"),
        (["--protect", "fist"], 1, "--protect fist: no block and no layer of that name"),
    ],
)
def test_bad_searches(folder: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(folder, tmp_path / "out", "-q", *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "deployment").exists()
