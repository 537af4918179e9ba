"""Chips whose cells failed in several ways, from the draw to the report: which fail, what is read, what is said."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from scipy import stats

from rerampile import ConfigError, Deployment, Target, compile_model, load_deployment
from rerampile.cli import main
from rerampile.errors import FaultRunError
from rerampile.failed_cells import CATEGORIES, RESPONSES, FailedCells
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.comparison import compare
from rerampile.runtime.fault_map import (
    STATES,
    STUCK_OFF,
    ChipGeometry,
    FaultMap,
    read_fault_maps,
    write_fault_maps,
)
from rerampile.runtime.faults import DISTRIBUTIONS, FaultModel, draw_faults
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.pictures import array_picture, render, stuck_picture
from rerampile.runtime.quantised import require_dot_products
from rerampile.runtime.validation import validate
from rerampile.target import to_toml

FORMED: dict[str, Any] = {
    "unformed": {"share": 3, "mean": 0.5e-6, "spread": 0.5e-6},
    "partially_formed": {"share": 2, "mean": 40e-6, "spread": 30e-6},
    "over_formed": {"share": 5, "mean": 400e-6, "spread": 150e-6},
}
SHARES = {"unformed": 0.3, "partially_formed": 0.2, "over_formed": 0.5}
MODELS = [(distribution, "cell") for distribution in DISTRIBUTIONS] + [("independent", "weight"), ("array", "weight")]


def target_of(response: str = "unbounded", **failed: Any) -> Target:
    return Target(
        name="formed",
        rows=32,
        columns=24,
        cell={"g_off": 1e-6, "g_on": 100e-6},  # type: ignore[arg-type]
        failed_cells={"response": response, **FORMED, **failed},  # type: ignore[arg-type]
    )


def chip(arrays: int = 40) -> ChipGeometry:
    whole = np.arange(arrays)
    return ChipGeometry(
        arrays=arrays, rows=32, columns=24, width=np.full(arrays, 2), twin=whole, roles=np.full(arrays, 2)
    )


def draw(model: FaultModel, run: int = 0, target: Target | None = None) -> FaultMap:
    return draw_faults(chip(), model, target or target_of(), seed=5, run=run)


# Which cells fail, and how.


def test_a_rate_splits_by_the_shares_of_the_target() -> None:
    model = FaultModel.of_target(0.01, target_of())
    assert model.categories == pytest.approx({name: 0.01 * share for name, share in SHARES.items()})
    assert model.rate == pytest.approx(0.01)
    assert model.stuck_off == model.stuck_on == 0
    assert model.key.startswith("stuck_off 0.0 stuck_on 0.0 unformed 0.003 ")
    some = FaultModel.of_target(0.01, target_of(unformed="never", partially_formed="never"))
    assert some == FaultModel(over_formed=0.01)


def test_a_target_without_categories_has_the_default_ratio() -> None:
    model = FaultModel.of_target(0.01, Target.load("paper"), rate_unit="weight")
    assert model == FaultModel.of_rate(0.01, rate_unit="weight")
    assert str(model) == f"FaultModel(stuck_off={model.stuck_off!r}, stuck_on={model.stuck_on!r}, " + (
        "distribution='independent', rate_unit='weight')"
    )
    assert "unformed" not in model.key


@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_every_category_has_its_rate(distribution: str, unit: str) -> None:
    model = FaultModel.of_target(0.06, target_of(), distribution=distribution, rate_unit=unit)
    found = np.zeros((60, len(CATEGORIES)))
    for run in range(len(found)):
        faults = draw(model, run)
        found[run] = [np.count_nonzero(faults.state == STATES[name]) for name in CATEGORIES]
        assert faults.categories == {name: n for name, n in zip(CATEGORIES, found[run], strict=True) if n}
        assert found[run].sum() == len(faults)
    rates = found / (chip().cells / (2 if unit == "weight" else 1))
    for name, own in zip(CATEGORIES, rates.T, strict=True):
        assert abs(own.mean() - 0.06 * SHARES[name]) < 4.9 * own.std(ddof=1) / np.sqrt(len(own))


@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_higher_rates_keep_the_faults_of_lower_ones(distribution: str, unit: str) -> None:
    """With their categories and their values."""
    models = [
        FaultModel.of_target(rate, target_of(), distribution=distribution, rate_unit=unit)
        for rate in (0.001, 0.004, 0.02, 0.1, 0.3)
    ]
    for lower, higher in itertools.pairwise([draw(model, 3) for model in models]):
        at = np.searchsorted(higher.cell, lower.cell)
        np.testing.assert_array_equal(higher.cell[at], lower.cell)
        np.testing.assert_array_equal(higher.state[at], lower.state)
        np.testing.assert_array_equal(higher.conductance[at], lower.conductance)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_cells_fail_as_are_stuck(distribution: str) -> None:
    """Over-formed where others are stuck on, the rest where they are stuck off, at the same ratio."""
    formed = draw(FaultModel.of_target(0.04, target_of(), distribution=distribution))
    stuck = draw(FaultModel.of_rate(0.04, (1, 1), distribution=distribution))
    np.testing.assert_array_equal(formed.cell, stuck.cell)
    np.testing.assert_array_equal(formed.state == STATES["over_formed"], stuck.state != STUCK_OFF)


def test_the_same_chips_serve_every_response() -> None:
    model = FaultModel.of_target(0.04, target_of())
    one, *others = (draw(model, target=target_of(response)) for response in RESPONSES)
    for other in others:
        np.testing.assert_array_equal(one.cell, other.cell)
        np.testing.assert_array_equal(one.state, other.state)
        np.testing.assert_array_equal(one.conductance, other.conductance)


def test_what_they_conduct_is_as_the_target_says() -> None:
    faults = draw(FaultModel(over_formed=0.1, partially_formed=0.1, stuck_on=0.1))
    values = {name: faults.conductance[faults.state == STATES[name]].astype(np.float64) for name in faults.categories}
    assert list(values) == ["partially_formed", "over_formed"]
    above = values["over_formed"][values["over_formed"] > 0]
    assert stats.kstest(above, stats.truncnorm(-400 / 150, np.inf, 400e-6, 150e-6).cdf).pvalue > 1e-3
    np.testing.assert_array_equal(faults.conductance[faults.state == STATES["stuck_on"]], np.float32(100e-6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FaultModel(unformed=-0.1), "--unformed -0.1: expected a probability from 0 to 1"),
        (
            lambda: FaultModel(stuck_on=0.5, partially_formed=0.3, over_formed=0.4),
            "--stuck-off 0 and --stuck-on 0.5 and --partially-formed 0.3 and --over-formed 0.4: expected a sum of at "
            "most 1, got 1.2",
        ),
        (lambda: FaultModel.of_target(2, target_of()), "--failure-rate 2: expected a fraction from 0 to 1"),
        (
            lambda: draw(FaultModel(over_formed=0.1), target=target_of(over_formed="never")),
            "target formed: no cells that are over-formed, expected stuck_off, stuck_on, unformed, partially_formed; "
            "describe them in failed_cells.over_formed",
        ),
    ],
)
def test_what_is_no_fault_model(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


# From the file to the report.


@pytest.fixture(scope="module")
def folders(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Deployment]:
    place = tmp_path_factory.mktemp("failed")
    return {
        response: compile_model(small_model, out=place / response, target=target_of(response)) for response in RESPONSES
    }


@pytest.fixture
def deployment(folders: dict[str, Deployment]) -> Deployment:
    return folders["unbounded"]


@pytest.mark.parametrize("ending", [".csv", ".safetensors"])
def test_fault_maps_hold_what_devices_conduct(ending: str, folders: dict[str, Deployment], tmp_path: Path) -> None:
    """Whatever the hardware reads then, so that one map serves all responses."""
    path, deployment = tmp_path / f"chips{ending}", folders["isolated_pair"]
    geometry, model = ChipGeometry.of(deployment), FaultModel.of_target(0.2, deployment.target)
    drawn = [draw_faults(geometry, model, deployment.target, seed=1, run=run) for run in range(2)]
    write_fault_maps(path, drawn, deployment)
    for found, chip in zip(read_fault_maps(path, folders["bounded"]), drawn, strict=True):
        assert set(chip.categories) == set(CATEGORIES)
        for key in ("cell", "state", "conductance"):
            np.testing.assert_array_equal(getattr(found, key), getattr(chip, key))


def test_a_state_of_a_map_stands_for_its_mean(deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "chips.csv"
    path.write_text("array,row,column,state\n0,0,1,over_formed\n0,0,0,partially_formed\n0,1,0,unformed\n")
    (found,) = read_fault_maps(path, deployment)
    assert found.conductance.tolist() == pytest.approx([40e-6, 400e-6, 0.5e-6])
    assert found.counts_text == "0 cells stuck off, 0 stuck on, 1 unformed, 1 partially-formed, 1 over-formed"


def test_reports_count_each_category(deployment: Deployment, tmp_path: Path) -> None:
    faults = (FaultModel.of_target(0.1, deployment.target), FaultModel.of_rate(0.1))
    experiment = Experiment(folder=deployment.folder, faults=faults, images=8)
    report = validate(experiment, tmp_path / "j", runs=3)
    again = validate(experiment, tmp_path / "j", runs=3)
    assert msgspec.json.encode(report) == msgspec.json.encode(again)  # from the journal alone
    formed, stuck = (rate.faults for rate in report.rates)
    assert formed.categories
    for name, count in formed.categories.items():
        assert count.asked == pytest.approx(0.1 * SHARES[name])
        assert count.observed == pytest.approx(count.asked, abs=5 * np.sqrt(count.asked / formed.cells))
    assert formed.observed_off == formed.observed_on == 0
    assert formed.asked == pytest.approx(0.1)
    assert formed.observed == pytest.approx(0.1, abs=0.02)
    assert (formed.response, stuck.response) == ("unbounded", "unbounded")
    assert stuck.categories is msgspec.UNSET
    assert stuck.observed == pytest.approx(stuck.observed_off + stuck.observed_on)


def test_of_a_rate_a_weight_as_many_cells_are_asked_as_fail(deployment: Deployment, tmp_path: Path) -> None:
    model = FaultModel.of_target(0.3, deployment.target, rate_unit="weight")
    report = validate(Experiment(folder=deployment.folder, faults=(model,), images=8), tmp_path / "j", runs=8)
    faults = report.rates[0].faults
    assert faults.observed == pytest.approx(faults.asked, abs=5 * np.sqrt(faults.asked / faults.cells))


def test_responses_differ_on_the_same_chips(folders: dict[str, Deployment], tmp_path: Path) -> None:
    """Shorts are worst; what is bounded or cut off is far better."""
    error = {}
    for response, deployment in folders.items():
        faults = (FaultModel.of_target(0.02, deployment.target),)
        report = validate(Experiment(folder=deployment.folder, faults=faults, images=16), tmp_path / response, runs=12)
        error[response] = report.rates[0].metrics["output_error"].mean
    assert error["unbounded"] > 2 * max(error["bounded"], error["isolated_pair"])
    assert error["isolated_cell"] > error["isolated_pair"]  # of the differential mapping, whose zeros lie at g_on


@pytest.mark.parametrize("response", ["bounded", "isolated_pair"])
def test_a_chip_is_programmed_around_failed_cells(
    response: str, folders: dict[str, Deployment], tmp_path: Path
) -> None:
    deployment = folders[response]
    model = FaultModel.of_target(0.05, deployment.target)
    faults = draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=1, run=0)
    path = tmp_path / "chips.safetensors"
    write_fault_maps(path, [faults], deployment)
    source = ChipSource(path=path, number=0, faults=faults)
    programmed = program_chip(deployment, source, tmp_path / "chip", steps=("compensate",))
    assert programmed.plan.chip is not None
    assert programmed.plan.chip.categories == faults.categories
    before, after = (step.error for step in programmed.plan.chip.steps)
    assert after < 0.9 * before if response == "bounded" else after == pytest.approx(before)
    report = validate(Experiment(folder=programmed.folder, images=8), tmp_path / "j", runs=1)
    counts = report.rates[0].faults
    assert counts.observed == pytest.approx(len(faults) / counts.cells)


def test_a_picture_shows_the_categories(deployment: Deployment) -> None:
    model = FaultModel.of_target(0.2, deployment.target)
    chip = draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=1, run=0)
    svg, _ = render(stuck_picture(array_picture(deployment, chip, 0, "array")))
    for word in ("stuck off: 0", "unformed: ", "partially-formed: ", "over-formed: "):
        assert word in svg
    stuck = draw_faults(ChipGeometry.of(deployment), FaultModel.of_rate(0.2), deployment.target, seed=1, run=0)
    assert "formed" not in render(stuck_picture(array_picture(deployment, stuck, 0, "array")))[0]


def test_what_fails_decides_what_is_optimal(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    """Where shorts are cut off, pairs lie low; where they are bounded, high; where pairs are cut off, it is all one."""
    chosen = {}
    for response in ("bounded", "isolated_cell", "isolated_pair"):
        formed = {"unformed": {"share": 1, "mean": 0}, "over_formed": {"share": 5, "mean": 400e-6}}
        target = target_of(response, **formed, partially_formed="never")
        deployment = compile_model(small_model, out=tmp_path / response, target=target, mapping="auto")
        assert deployment.plan.options["categories"] == pytest.approx({"unformed": 1e-3 / 6, "over_formed": 5e-3 / 6})
        chosen[response] = deployment.plan.layers[0]
    assert chosen["bounded"].scheme == "optimal"
    assert chosen["bounded"].common_modes == pytest.approx([(1e-6 + 5 * 100e-6) / 6])
    assert chosen["isolated_cell"].scheme == chosen["isolated_pair"].scheme == "two_column"
    errors = {e.scheme: e.error for e in chosen["isolated_pair"].choice.estimates if e.scheme != "offset"}  # type: ignore[union-attr]
    assert max(errors.values()) == pytest.approx(min(errors.values()), rel=1e-4)


# The command line.


def call(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def test_from_a_target_file_to_a_report(small_model_file: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "chip.toml", tmp_path / "out"
    path.write_text(to_toml(target_of("bounded")))
    call("compile", small_model_file, "-q", "-o", folder, "--target", path, "--mapping", "optimal")
    options = load_deployment(folder).plan.options
    assert options["categories"] == pytest.approx({name: 0.001 * share for name, share in SHARES.items()})

    shown = call("show", folder)
    assert "failed cells bounded, 1 µS to 100 µS; 30% unformed, 20% partially-formed, 50% over-formed" in " ".join(
        shown.output.split()
    )
    shown = call("validate", folder, "-q", "--images", 8, "--runs", 2, "--failure-rate", 0.1, "-o", tmp_path / "v")
    assert "bounded; unformed 0.0" in " ".join(shown.output.split())
    faults = json.loads((tmp_path / "v" / "report.json").read_text())["rates"][0]["faults"]
    assert faults["response"] == "bounded"
    assert [faults["categories"][name]["asked"] for name in CATEGORIES] == pytest.approx([0.03, 0.02, 0.05])
    page = (tmp_path / "v" / "report.html").read_text()
    assert "over-formed asked 0.05, found 0.0" in page
    assert "<dt>failed cells</dt><dd>bounded</dd>" in page

    chips = tmp_path / "chips.csv"
    call("faults", "draw", folder, "--failure-rate", 0.1, "--runs", 2, "-o", chips)
    assert ",over_formed," in chips.read_text()
    assert " over-formed" in call("faults", "show", folder, chips).output
    call("validate", folder, "-q", "--images", 8, "--fault-map", chips, "-o", tmp_path / "w")
    predicted = json.loads(call("predict", folder, "-q", "--images", 8, "--failure-rate", 0.1, "--json").output)
    assert predicted["rates"][0]["categories"]["over_formed"] == pytest.approx(0.05)


def test_cells_can_still_be_just_stuck(small_model_file: Path, tmp_path: Path) -> None:
    """By --off-on or the two probabilities, whatever categories the target has."""
    path, folder = tmp_path / "chip.toml", tmp_path / "out"
    path.write_text(to_toml(target_of("isolated_pair")))
    call("compile", small_model_file, "-q", "-o", folder, "--target", path, "--mapping", "optimal", "--off-on", "1:1")
    options = load_deployment(folder).plan.options
    assert (options["stuck_off"], options["stuck_on"]) == (0.0005, 0.0005)
    assert "categories" not in options
    for given in (["--off-on", "1:1", "--failure-rate", 0.1], ["--stuck-off", 0.05, "--stuck-on", 0.05]):
        out = tmp_path / f"chips{len(given)}{given[0]}.csv"
        call("faults", "draw", folder, *given, "-o", out)
        assert "formed" not in out.read_text()
        assert "stuck_on" in out.read_text()


def test_a_setting_chooses_the_response(small_model_file: Path, tmp_path: Path) -> None:
    setting = ("--set", "failed_cells.response=isolated_pair", "--set", "failed_cells.over_formed.share=1")
    setting += ("--set", "failed_cells.over_formed.mean=4e-4")
    call("compile", small_model_file, "-q", "-o", tmp_path / "out", *setting)
    target = load_deployment(tmp_path / "out").target
    assert target.failed_cells.response == "isolated_pair"
    assert list(target.failed_cells.categories) == ["over_formed"]
    wrong = call("compile", small_model_file, "-q", "--set", "failed_cells.response=open", code=1)
    assert "failed_cells.response: expected one of unbounded, bounded, isolated_cell, isolated_pair" in wrong.output


def test_comparing_takes_the_split_of_each_target(folders: dict[str, Deployment], tmp_path: Path) -> None:
    call(
        *("compare", folders["unbounded"].folder, folders["bounded"].folder, "-q", "--images", 8, "--runs", 3),
        *("--failure-rate", 0.01, "-o", tmp_path / "compared"),
    )
    report = json.loads((tmp_path / "compared" / "report.json").read_text())
    one, other = (validation["rates"][0]["faults"] for validation in report["validations"])
    assert one["categories"] == other["categories"]
    assert (one["response"], other["response"]) == ("unbounded", "bounded")
    assert report["compared"][1]["same_cells"]
    assert report["compared"][1]["differences"][0]["mean"] > 0


def test_rates_that_split_otherwise_are_not_the_same_cells(
    folders: dict[str, Deployment], small_model: onnx.ModelProto, tmp_path: Path
) -> None:
    plain = replace(target_of(), failed_cells=FailedCells())
    other = compile_model(small_model, out=tmp_path / "plain", target=plain)
    validations = [
        validate(
            Experiment(folder=d.folder, faults=(FaultModel.of_target(0.01, d.target),), images=8),
            tmp_path / f"{d.folder.name}.j",
            runs=2,
        )
        for d in (folders["unbounded"], folders["bounded"], other)
    ]
    assert [compared.same_cells for compared in compare(validations).compared] == [True, True, False]


@pytest.mark.parametrize("twins", [False, True])
def test_the_other_cell_of_a_pair(twins: bool) -> None:
    """Has the first for its own; the last of an odd number of columns has none."""
    arrays = np.arange(4)
    geometry = ChipGeometry(
        arrays=4,
        rows=3,
        columns=5,
        width=np.full(4, 1 if twins else 2),
        twin=arrays ^ 1 if twins else arrays,
        roles=np.full(4, 1 if twins else 2),
    )
    cell = np.arange(geometry.cells)
    other = geometry.other_of_pair(cell)
    np.testing.assert_array_equal(geometry.other_of_pair(other), cell)
    column = cell % 5
    if twins:
        assert (np.abs(other - cell) == 15).all()
    else:
        np.testing.assert_array_equal(other - cell, np.array([1, -1, 1, -1, 0])[column])
    single = replace(geometry, twin=arrays, width=np.ones(4, np.int64), roles=np.ones(4, np.int64))
    np.testing.assert_array_equal(single.other_of_pair(cell), cell)


def test_int8_holds_what_is_read(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    """Of bounded cells in finer steps than of shorts, which need room."""
    try:
        require_dot_products()
    except FaultRunError as error:
        pytest.skip(str(error))
    cell = {"g_off": 1e-6, "g_on": 100e-6, "levels": 16}
    errors = {}
    for response in ("unbounded", "bounded", "isolated_pair"):
        target = replace(target_of(response), cell=cell)  # type: ignore[arg-type]
        deployment = compile_model(small_model, out=tmp_path / response, target=target)
        experiment = Experiment(
            folder=deployment.folder, faults=(FaultModel.of_target(0.002, target),), images=16, precision="int8"
        )
        report = validate(experiment, tmp_path / f"{response}.j", runs=4)
        errors[response] = report.int8.output_error  # type: ignore[union-attr]
    assert errors["unbounded"] > errors["bounded"]
