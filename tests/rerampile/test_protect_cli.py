"""Copies of most significant slices from end to end: compile, verify, show, validate, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

from rerampile import load_deployment
from rerampile.cli import main
from rerampile.plan import encode_plan

TARGET = ("--target", "isaac", "--set", "rows=32", "--set", "columns=32")


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words: Any) -> str:
    done = run(*words)
    assert done.exit_code in (1, 2), done.output
    return " ".join(done.stderr.split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two products, a third of whose rows are pruned."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((30, 12), np.float32), rng.standard_normal((12, 6), np.float32)
    first[::3] = 0
    second[8:] = 0
    found = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        two (float[N, 30] x) => (float[N, 6] y) { a = MatMul (x, A) b = Relu (a) y = MatMul (b, B) }
        """
    )
    found.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in (("A", first), ("B", second)))
    onnx.save(found, tmp_path / "two.onnx")
    return tmp_path / "two.onnx"


def test_from_compile_to_validate(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compile", model, *TARGET, "--protect-msb", 1, "-o", out)
    assert done.exit_code == 0, done.output
    assert "weights with copies" in done.stderr
    plan = load_deployment(out).plan
    assert plan.protection is not None
    assert (plan.protection.slices, plan.protection.vote) == (1, "median")
    assert plan.protection.weights > 0
    assert plan.totals.arrays <= plan.totals.arrays_without_pruning
    assert plan.options["protect_msb"] == 1
    assert run("verify", out).exit_code == 0

    shown = run("show", out, "-v").output
    share = f"{plan.protection.weights:,} of {plan.protection.weights_with_cells:,} weights"
    assert f"{share}: two copies of 1 slice each" in shown
    assert "copies of slices: A" in shown
    data = json.loads(run("show", out, "--json").stdout)
    assert data["protection"]["cells"] == plan.protection.cells
    with_copies = next(array for array in plan.arrays if array.slice_copies)
    assert ", copy 1 of slices" in run("show", out, "--array", with_copies.id).output

    words = ("validate", out, "--failure-rate", 0.02, "--runs", 2, "--images", 8, "-q", "--json")
    done = run(*words, "-o", tmp_path / "report")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["execution"] == "slow: medians of sums are no weights; those of a mean are"
    assert "no closed form" in report["prediction"]
    assert "medians of three sums depend on the inputs" in refused("predict", out, "--failure-rate", 0.01)


def test_a_mean_is_predicted_and_does_less_harm_than_no_copies(model: Path, tmp_path: Path) -> None:
    errors = {}
    for name, words in {"none": (), "mean": ("--protect-msb", 1, "--vote", "mean")}.items():
        assert run("compile", model, *TARGET, *words, "-o", tmp_path / name, "-q").exit_code == 0
        done = run("predict", tmp_path / name, "--failure-rate", 0.001, "--json")
        assert done.exit_code == 0, done.output
        errors[name] = json.loads(done.stdout)["rates"][0]["output_error"]
    assert errors["mean"] < 0.95 * errors["none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--protect-msb", 1), "--protect-msb 1: target 'paper' holds a weight in one slice, expected several"),
        ((*TARGET, "--protect-msb", 9), "--protect-msb 9: expected 1 to 8, the slices of target 'isaac'"),
        (
            (*TARGET, "--set", "chips=1", "--protect-msb", 1, "--spend-spare-arrays"),
            "--protect-msb and --spend-spare-arrays: of an averaged layer no single sums are left to vote on",
        ),
        ((*TARGET, "--vote", "mean"), "--vote: no effect without --protect-msb"),
        ((*TARGET, "--protect-msb", 0), "0 is not in the range x>=1"),
        ((*TARGET, "--protect-msb", 1, "--vote", "mode"), "'mode' is not one of 'median', 'mean'"),
    ],
)
def test_what_compile_refuses(model: Path, tmp_path: Path, words: tuple[Any, ...], message: str) -> None:
    assert message in refused("compile", model, *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_other_commands_refuse(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compile", model, *TARGET, "--protect-msb", 1, "-o", out, "-q").exit_code == 0
    drawn = tmp_path / "chip.csv"
    assert run("faults", "draw", out, "--failure-rate", 0.01, "--runs", 1, "-o", drawn).exit_code == 0
    told = refused("program", out, "--fault-map", drawn, "-o", tmp_path / "chip")
    assert "has copies of slices, whose votes programming does not know; compile it without --protect-msb" in told
    rates = ("--failure-rate", 0.01, "--rate-unit", "weight")
    for words in (
        ("validate", out, "-o", tmp_path / "report", "--images", 4),
        ("predict", out),
        ("faults", "draw", out, "--runs", 1, "-o", tmp_path / "other.csv"),
    ):
        assert "--rate-unit weight: " in refused(*words, *rates)
        assert "cells of a weight lie apart; expected rates of a cell" in refused(*words, *rates)


def test_a_changed_protection_is_found(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("compile", model, *TARGET, "--protect-msb", 1, "-o", out, "-q").exit_code == 0
    plan = load_deployment(out).plan
    assert plan.protection is not None
    other = msgspec.structs.replace(plan.protection, weights=plan.protection.weights + 1)
    (out / "plan.json").write_bytes(encode_plan(msgspec.structs.replace(plan, protection=other)))
    assert f"$.protection.weights: {other.weights}, expected {other.weights - 1}" in refused("verify", out)


def test_another_vote_is_another_experiment(model: Path, tmp_path: Path) -> None:
    """Cells, places and model are the same; chips that were run with the other vote say nothing."""
    out = tmp_path / "out"
    words = ("validate", out, "--failure-rate", 0.05, "--runs", 1, "--images", 8, "-q", "-o", tmp_path / "report")
    run("compile", model, *TARGET, "--protect-msb", 1, "-o", out, "-q")
    assert run(*words).exit_code == 0
    run("compile", model, *TARGET, "--protect-msb", 1, "--vote", "mean", "-o", out, "-q")
    assert 'protection was [1, "median"], now [1, "mean"]; remove it to start anew' in refused(*words)
