"""Deployments beside each other: the same chips, paired."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from rerampile import ConfigError, compile_model, load_deployment
from rerampile.cli import main
from rerampile.runtime.comparison import ComparisonReport, compare
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.report import write_report
from rerampile.runtime.report_schema import report_schema
from rerampile.runtime.statistics import t_interval
from rerampile.runtime.validation import ValidationReport, validate

RATES = (0.02, 0.1, 0.4)


@pytest.fixture(scope="module")
def model_file(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(small_model, path)
    return path


@pytest.fixture(scope="module")
def validations(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ValidationReport]:
    folder = tmp_path_factory.mktemp("compared")
    found = []
    for mapping in ("two_column", "differential", "offset"):
        compile_model(model_file, out=folder / mapping, mapping=mapping)
        faults = tuple(FaultModel.of_rate(rate) for rate in RATES)
        experiment = Experiment(folder=folder / mapping, faults=faults, images=12, seed=2)
        found.append(validate(experiment, folder / f"{mapping}.jsonl", runs=6))
    return found


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_differences_are_paired_chip_by_chip(validations: list[ValidationReport]) -> None:
    report = compare(validations)
    assert report.reference == "two_column"
    assert [compared.name for compared in report.compared] == ["two_column", "differential", "offset"]
    assert [compared.same_cells for compared in report.compared] == [True, True, False]
    assert report.compared[0].times is None
    for difference in report.compared[1].differences:
        here, there = (
            next(r for r in v.rates if r.rate == difference.rate).metrics[report.metric].values
            for v in (validations[1], validations[0])
        )
        pairs = np.array(here) - np.array(there)
        assert difference.mean == pytest.approx(pairs.mean())
        expected = t_interval(pairs)
        assert difference.interval == pytest.approx((expected.low, expected.high))


def test_less_is_better_for_an_error(validations: list[ValidationReport]) -> None:
    def only_error(report: ValidationReport) -> ValidationReport:
        rates = [
            msgspec.structs.replace(rate, metrics={"output_error": rate.metrics["output_error"]})
            for rate in report.rates
        ]
        return msgspec.structs.replace(report, clean={"output_error": 0.0}, rates=rates)

    report = compare([only_error(v) for v in validations[:2]], drop=60.0)
    error = [v.rates[0].metrics["output_error"].mean for v in validations[:2]]
    assert report.compared[1].differences[0].mean == pytest.approx(error[0] - error[1])
    assert error[0] > error[1]  # two_column suffers from cells that are stuck on
    assert report.compared[1].times is not None
    assert report.compared[1].times.low > 1


def test_what_cannot_be_compared(validations: list[ValidationReport]) -> None:
    with pytest.raises(ConfigError, match="1 deployment to compare, expected two or more"):
        compare(validations[:1])
    with pytest.raises(ConfigError, match="--drop 0: expected more than 0 points"):
        compare(validations, drop=0.0)
    other = msgspec.structs.replace(validations[1], clean={"map": 1.0})
    with pytest.raises(ConfigError, match="differential: no metric 'top1_agreement', which two_column is measured by"):
        compare([validations[0], other])
    healthy = msgspec.structs.replace(validations[1], rates=[msgspec.structs.replace(validations[1].rates[0], rate=0)])
    with pytest.raises(ConfigError, match="differential: no failure rate above 0"):
        compare([validations[0], healthy])


def test_the_report_shows_all_of_them(validations: list[ValidationReport], tmp_path: Path, model_file: Path) -> None:
    report = compare(validations)
    write_report(tmp_path, report, command="rerampile compare")
    page = (tmp_path / "report.html").read_text()
    for validation in validations:
        assert f"{validation.mapping}, channel scale" in page
    assert "times the reference" in page
    assert page.count("<figure>") == 2
    data = (tmp_path / "report.json").read_bytes()
    assert msgspec.json.decode(data, type=ComparisonReport) == report
    check = jsonschema.Draft202012Validator(report_schema())
    check.validate(json.loads(data))
    check.validate(json.loads(msgspec.json.encode(validations[0])))
    assert not check.is_valid({**json.loads(data), "format": "other"})
    assert not check.is_valid({key: value for key, value in json.loads(data).items() if key != "drop"})


def test_one_model_with_several_mappings(model_file: Path, tmp_path: Path) -> None:
    arguments = [model_file, "--runs", 3, "--images", 8, "--failure-rate", "0.05,0.2", "-o", tmp_path / "out", "-q"]
    done = run(*arguments, "--mappings", "two_column,optimal", "--scale", "tensor", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [v["mapping"] for v in found["validations"]] == ["two_column", "optimal"]
    asked = load_deployment(tmp_path / "out" / "optimal.deployment").plan.options
    assert asked["stuck_off"] + asked["stuck_on"] == pytest.approx(0.2)  # the highest of the rates that are compared
    assert {v["scale"] for v in found["validations"]} == {"tensor"}
    assert found["validations"][0]["prediction"]["rates"][0]["layers"]  # of the reference: the page has its chart
    assert found["validations"][1]["prediction"] is None
    again = run(*arguments, "--mappings", "two_column,optimal", "--scale", "tensor")
    assert "drop of top1_agreement" in again.stdout
    assert "at a drop of 1" in again.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found


def test_one_model_with_several_scales(model_file: Path, tmp_path: Path) -> None:
    """Named with the mapping, or by --scale; each clipped for the highest failure rate, on the data."""
    arguments = ["--runs", 2, "--images", 8, "--failure-rate", "0.02,0.1", "-o", tmp_path / "out", "-q", "--json"]
    forms = "differential/partition,differential,differential/tensor"
    done = run(model_file, *arguments, "--mappings", forms, "--set", "rows=32", "--clip", "--correct")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [v["scale"] for v in found["validations"]] == ["partition", "channel", "tensor"]
    assert [c["same_cells"] for c in found["compared"]] == [True] * 3
    names = ["differential-partition", "differential", "differential-tensor"]
    for name, scale in zip(names, ("partition", "channel", "tensor"), strict=True):
        plan = load_deployment(tmp_path / "out" / f"{name}.deployment").plan
        assert {layer.scale for layer in plan.layers} == {scale}
        assert plan.options["calibration"] == {"data": "generated", "images": 8}
        assert plan.options["stuck_off"] + plan.options["stuck_on"] == pytest.approx(0.1)
        assert all(layer.clip is not msgspec.UNSET and layer.correction is not msgspec.UNSET for layer in plan.layers)


def test_clipping_alone_needs_no_other_options(model_file: Path, tmp_path: Path) -> None:
    """It stays off where it was not asked for, and takes its images from --calibration."""
    np.savez(tmp_path / "seen.npz", image=np.random.default_rng(0).random((12, 3, 4, 4), np.float32))
    common = ["--mappings", "offset,balanced", "--runs", 2, "--images", 4, "--failure-rate", "0.1", "-q"]
    for name, words in (("plain", []), ("clipped", ["--clip", "--calibration", f"npz:{tmp_path / 'seen.npz'}"])):
        assert run(model_file, *common, *words, "-o", tmp_path / name).exit_code == 0
    plain, clipped = (load_deployment(tmp_path / n / "offset.deployment").plan for n in ("plain", "clipped"))
    assert "clip" not in plain.options
    assert plain.options["stuck_off"] is None
    assert clipped.options["calibration"] == {"data": f"npz:{tmp_path / 'seen.npz'}", "images": 12}
    assert (clipped.options["clip"], clipped.options["correct"]) == (True, False)


def test_folders_are_told_apart_by_name(model_file: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        compile_model(model_file, out=tmp_path / place / "same", mapping="offset")
    done = run(tmp_path / "a" / "same", tmp_path / "b" / "same", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "two folders are named 'same', expected different names; rename one" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["only.deployment"], 2, "expected two or more deployment folders, or one model with --mappings"),
        (["a.onnx", "b.onnx", "--mappings", "offset,balanced"], 2, "--mappings: expected one model to compile"),
        (["a.onnx", "--mappings", "offset,offset"], 2, "expected two or more different ones"),
        (["a.onnx", "--mappings", "offset,balanced"], 1, "a.onnx: cannot be read: No such file or directory"),
        (["a.onnx", "--mappings", "offset,balance"], 1, "mapping 'balance': no such scheme (did you mean balanced?)"),
        (
            ["a.onnx", "--mappings", "offset,offset/channel"],
            2,
            "--mappings offset,offset/channel: expected two or more",
        ),
        (["a.onnx", "--mappings", "offset/row,offset"], 1, "scale 'row': expected tensor, channel or partition"),
        (["a.onnx", "--mappings", "offset/,offset"], 1, "scale '': expected tensor, channel or partition"),
        (["a", "b"], 1, "a: no plan.json in it, expected a deployment folder"),
        (["a", "b", "--scale", "tensor"], 2, "--scale: the folders are compiled already; give --mappings, too"),
        (["a", "b", "--clip"], 2, "--clip: the folders are compiled already; give --mappings, too"),
        (["a.onnx", "--mappings", "offset,balanced", "--drop", "-1"], 1, "--drop -1: expected more than 0 points"),
    ],
)
def test_bad_usage(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_unlike_models_are_refused_before_any_chip_runs(
    model_file: Path, tmp_path: Path, parse_model: Callable[..., onnx.ModelProto]
) -> None:
    compile_model(model_file, out=tmp_path / "one")
    other = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        other (float[N, 4] x) => (float[N, 3] y) { y = MatMul (x, W) }
        """,
        W=np.ones((4, 3), np.float32),
    )
    compile_model(other, out=tmp_path / "two")
    done = run(tmp_path / "one", tmp_path / "two", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "two: a model of 'x' [?, 4], 'y' [?, 3], expected 'image' [?, 3, 4, 4], 'scores' [?, 10]" in done.stderr
    assert not (tmp_path / "out").exists()
