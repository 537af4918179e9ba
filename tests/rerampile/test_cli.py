"""The command line: what each command prints, where, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from rerampile.cli import main
from rerampile.commands import compile as compile_command
from rerampile.commands.show import show_array
from rerampile.compiler import PASSES
from rerampile.deployment import Deployment, load_deployment
from rerampile.errors import InternalError, PlanFormatError
from rerampile.passes.map import Map
from rerampile.plan import read_plan
from rerampile.schemes import MAPPINGS, SCHEMES, WEIGHED
from rerampile.target import preset_names, preset_text
from rerampile.tensor_file import TensorFile
from rerampile.terminal import printable

COMMANDS = sorted(main.commands)


def call(*args: object, code: int = 0, **env: str) -> Result:
    """Run the command in this process and check its exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], env={"COLUMNS": "120", **env})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def fail(*args: object, code: int = 1) -> str:
    """Run a command that fails, and return its one line on stderr."""
    result = call(*args, code=code)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert code != 1 or [line for line in lines if not line.startswith("[")] == lines[-1:]
    return lines[-1]


@pytest.fixture
def folder(small_model_file: Path, tmp_path: Path) -> Path:
    """A deployment of the small model, pruned."""
    call("compile", small_model_file, "-o", tmp_path / "out", "--prune", "0.5", "-q")
    return tmp_path / "out"


# Compile.


def test_compile_says_what_it_does_and_what_it_made(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("compile", "small.onnx", "--mapping", "differential")
    assert load_deployment(tmp_path / "small.deployment").plan.model.name == "small.onnx"
    lines = result.stderr.splitlines()
    assert [re.match(r"\[(\d)/(\d)\] ([\w ]+) … \d+\.\d\d s  \w", line)[3] for line in lines] == [  # type: ignore[index]
        step.name for step in PASSES
    ]
    for fact in ("small.onnx", "128 × 128 analog cells", "differential", "1,496 weights", "rerampile show small.dep"):
        assert fact in result.stdout
    assert "'scores' off by" in result.stdout


def test_compile_prints_one_json_object(small_model_file: Path, tmp_path: Path) -> None:
    result = call("compile", small_model_file, "-o", tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    plan = load_deployment(tmp_path / "out").plan
    assert data["folder"] == str(tmp_path / "out")
    assert data["totals"]["arrays"] == len(plan.arrays)
    assert data["verification"]["outputs"][0]["output"] == "scores"


def test_quiet_and_verbose(small_model_file: Path, tmp_path: Path) -> None:
    assert call("compile", small_model_file, "-o", tmp_path / "out", "-q").stderr == ""
    result = call("compile", small_model_file, "-o", tmp_path / "out", "-v")
    assert f"onnx {onnx.__version__}" in result.stderr.splitlines()[0]
    assert "not an operator whose weights map" in result.stdout


def test_every_option_reaches_the_compiler(small_model_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", image=np.ones((3, 3, 4, 4), np.float32))
    out = tmp_path / "out"
    call(
        *("compile", small_model_file, "-o", out, "--target", "neurram", "--set", "cell.levels = 16"),
        *("--set", "pair_layout=twin", "--set", 'name="my chip"', "--set", "rows=100", "--mapping", "balanced"),
        *("--scale", "tensor", "--prune", "8=0.25,fc_*=0.5", "--pack", "--inputs", tmp_path / "in.npz"),
        *("--tolerance", "0.25", "--seed", "7", "--keep-stages"),
    )
    plan = read_plan(out / "plan.json")
    assert (plan.target["name"], plan.target["rows"], plan.target["columns"]) == ("my chip", 100, 256)
    assert (plan.target["cell"]["levels"], plan.target["pair_layout"]) == (16, "twin")
    assert {(layer.scheme, layer.scale) for layer in plan.layers} == {("balanced", "tensor")}
    assert [layer.mask and layer.mask.kept for layer in plan.layers] == [162, 640]
    assert plan.totals.arrays_saved_by_packing > 0
    assert plan.verification is not None
    assert (plan.verification.inputs, plan.verification.tolerance, plan.verification.seed) == ("in.npz", 0.25, 7)
    assert (out / "stages").is_dir()


def test_masks_are_read(small_model_file: Path, tmp_path: Path) -> None:
    masks = {"conv_weight": np.zeros((8, 3, 3, 3), np.uint8)}
    np.savez(tmp_path / "masks.npz", **masks)
    call("compile", small_model_file, "-o", tmp_path / "out", "--masks", tmp_path / "masks.npz")
    assert read_plan(tmp_path / "out" / "plan.json").layers[0].sparsity == 1.0


def test_a_changed_range_takes_the_stuck_cells_along(small_model_file: Path, tmp_path: Path) -> None:
    call("compile", small_model_file, "-o", tmp_path / "out", "--set", "cell.g_on=5e-5")
    cell = read_plan(tmp_path / "out" / "plan.json").target["cell"]
    assert cell["g_on"] == cell["stuck_on"]["mean"] == 5e-5


# Inspect, verify, show, targets.


def test_inspect_shows_layers_and_reasons(small_model_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    shown = call("inspect", small_model_file).stdout
    for fact in (
        "conv_weight",
        "8 × 27",
        "10 × 128",
        "Relu",
        "not an operator whose weights map",
        "2, with 1,496 weights",
    ):
        assert fact in shown
    assert "Relu_active" in call("inspect", small_model_file, "-v").stdout
    data = json.loads(call("inspect", small_model_file, "--json").stdout)
    assert [layer["weights"] for layer in data["layers"]] == [216, 1280]
    assert [node["op"] for node in data["digital"]] == ["Relu", "Flatten"]
    assert sorted(tmp_path.iterdir()) == before


def test_inspect_shows_folds_and_shared_weights(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        m (float[1, 4] x) => (float[1, 4] y, float[1, 4] z) {
            a = MatMul (x, W)
            b = MatMul (a, W)
            y = Relu (b)
            c = MatMul (x, V)
            z = Mul (c, s)
        }
        """,
        W=np.eye(4, dtype=np.float32),
        V=np.ones((4, 4), np.float32),
        s=np.full(4, 2, np.float32),
    )
    onnx.save(model, tmp_path / "m.onnx")
    shown = call("inspect", tmp_path / "m.onnx").stdout
    assert re.search(r"^W +MatMul +4 +4 × 4 +16 +1 *$", shown, re.MULTILINE)
    assert re.search(r"^V +MatMul +4 +4 × 4 +16 +Mul *$", shown, re.MULTILINE)
    layers = json.loads(call("inspect", tmp_path / "m.onnx", "--json").stdout)["layers"]
    assert [len(layer["uses"]) for layer in layers] == [2, 1]
    assert layers[1]["folds"] == [{"node": "Mul_z", "op": "Mul", "side": "after"}]


def test_inspect_of_a_model_where_nothing_maps(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    onnx.save(
        parse_model('<ir_version: 8, opset_import: ["" : 17]> m (float[1] x) => (float[1] y) { y = Relu (x) }'),
        tmp_path / "m.onnx",
    )
    assert "compile would refuse it" in call("inspect", tmp_path / "m.onnx").stdout
    assert "nothing maps" in fail("compile", tmp_path / "m.onnx", "-o", tmp_path / "out")


def test_verify_says_what_it_checked(folder: Path) -> None:
    shown = call("verify", folder).stdout
    for fact in (
        "the plan and 4 files as compiled",
        "1,496 weights in one place",
        "2 layers decoded",
        "'scores' off by",
        "verified",
    ):
        assert fact in shown
    data = json.loads(call("verify", folder, "--json").stdout)
    assert data["verification"]["outputs"][0]["relative_error"] < 1e-4


def test_what_compared_nothing_says_so(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    model = '<ir_version: 8, opset_import: ["" : 17]> m (float[0, 2] x) => (float[0, 2] y) { y = MatMul (x, W) }'
    onnx.save(parse_model(model, W=np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    compiled = call("compile", tmp_path / "m.onnx", "-o", tmp_path / "out")
    assert "output error nothing to compare" in compiled.stderr
    for shown in (compiled.stdout, call("verify", tmp_path / "out").stdout, call("show", tmp_path / "out").stdout):
        assert "nothing was compared: every output is empty" in shown


def test_values_that_cannot_be_given_any_more_are_shown(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path, folder: Path
) -> None:
    model = (
        '<ir_version: 8, opset_import: ["" : 17]> m (float[1,2] x, float[2,2] W) => (float[1,2] y) {y = MatMul (x, W)}'
    )
    onnx.save(parse_model(model, W=np.eye(2, dtype=np.float32)), tmp_path / "m.onnx")
    shown = call("compile", tmp_path / "m.onnx", "-o", tmp_path / "other").stdout
    assert re.search(r"^inputs +'W': the default values are in cells and biases, others have no", shown, re.MULTILINE)
    assert not re.search(r"^inputs ", call("show", folder).stdout, re.MULTILINE)


def test_verify_fails_on_a_changed_file(folder: Path) -> None:
    path = folder / "conductances.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "was changed after it was compiled" in fail("verify", folder)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_show_prints_layers_and_totals(folder: Path, columns: str) -> None:
    shown = call("show", folder, COLUMNS=columns).stdout
    assert re.search(r"^conv_weight +Conv +8 × 27 .*50\.0% .* 1 +0", shown, re.MULTILINE)
    assert re.search(r"^fc_weight +Gemm +10 × 128 .*50\.0% ", shown, re.MULTILINE)
    assert ("scheme" in shown.splitlines()[0]) is (columns == "120")
    assert max(map(len, shown.splitlines())) <= int(columns)
    assert shown == call("show", folder / "plan.json", COLUMNS=columns).stdout


def test_show_needs_no_more_than_the_plan(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_bytes((folder / "plan.json").read_bytes())
    assert "1,496 weights" in call("show", tmp_path / "other.json").stdout
    assert "expected a deployment folder" in fail("show", tmp_path / "other.json", "--array", "0")


def test_show_verbose_lists_arrays_and_digital_nodes(folder: Path) -> None:
    shown = call("show", folder, "-v").stdout
    assert re.search(r"^ +0 +0\.0\.0\.0 +plus and minus +conv_weight, inputs 0-.*, outputs 0-7, at row 0", shown, re.M)
    assert re.search(r"^Relu_active +Relu ", shown, re.MULTILINE)


def test_show_json_is_the_plan_without_its_long_lists(folder: Path) -> None:
    data = json.loads(call("show", folder, "--json").stdout)
    assert data["format"] == "rerampile-plan"
    assert [layer["arrays"] for layer in data["layers"]] == [1, 1]
    assert not {"arrays", "skipped"} & data.keys()


def test_a_pipe_loses_nothing(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    name = "layer_" + "x" * 200
    model = (
        f'<ir_version: 8, opset_import: ["" : 17]> m (float[1, 2] x) => (float[1, 2] y) {{ y = MatMul (x, {name}) }}'
    )
    onnx.save(parse_model(model, **{name: np.eye(2, dtype=np.float32)}), tmp_path / "m.onnx")
    env = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", "rerampile", "inspect", tmp_path / "m.onnx"], capture_output=True, env=env, check=True
    )
    assert name in done.stdout.decode()


def test_targets(tmp_path: Path) -> None:
    shown = call("targets").stdout
    assert all(re.search(rf"^{name} ", shown, re.MULTILINE) for name in preset_names())
    assert [target["name"] for target in json.loads(call("targets", "--json").stdout)] == list(preset_names())
    assert call("targets", "isaac").stdout == preset_text("isaac")
    assert json.loads(call("targets", "isaac", "--json").stdout)["name"] == "isaac"
    assert "did you mean isaac" in fail("targets", "issac")
    assert "did you mean isaac" in fail("targets", "issac", "--json")
    assert tomllib.loads(call("targets", "paper").stdout)["rows"] == 128


# Pipes and devices.


@pytest.mark.parametrize("option", ["--masks", "--inputs", "--target"])
@pytest.mark.parametrize("ending", ["npz", "safetensors", "toml"])
def test_pipes_are_not_opened(option: str, ending: str, small_model_file: Path, tmp_path: Path) -> None:
    """Nobody writes into it: opened, it would wait forever."""
    pipe = tmp_path / f"pipe.{ending}"
    os.mkfifo(pipe)
    assert f"pipe.{ending}: " in fail("compile", small_model_file, "-o", tmp_path / "out", option, pipe)


def test_a_plan_that_is_a_pipe(folder: Path) -> None:
    (folder / "plan.json").unlink()
    os.mkfifo(folder / "plan.json")
    assert "no plan.json in it" in fail("verify", folder)
    assert "plan.json: cannot be read: a device or a pipe" in fail("show", folder)
    (folder / "conductances.safetensors").unlink()
    os.mkfifo(folder / "conductances.safetensors")
    with pytest.raises(PlanFormatError, match="cannot be read: a device or a pipe"):
        TensorFile(folder / "conductances.safetensors")


# One array.


def test_show_array(folder: Path, tmp_path: Path) -> None:
    cells = load_deployment(folder).array(0)
    result = call("show", folder, "--array", "0", "--npy", tmp_path / "array.npy", COLUMNS="80")
    assert np.array_equal(np.load(tmp_path / "array.npy"), cells)
    for fact in ("conv_weight", "0-25", "0-15", "0 at chip 0, tile 0, core 0, array 0", "plus and minus"):
        assert fact in result.stdout
    data = json.loads(call("show", folder, "--array", "0", "--json").stdout)
    assert np.array_equal(np.array(data["cells"], np.float32), cells)
    assert (data["unit"], data["partitions"][0]["layer"]) == ("S", 0)


def test_npy_replaces_a_file_and_leaves_nothing_else(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    path.write_text("old")
    call("show", folder, "--array", "1", "--npy", path)
    assert np.array_equal(np.load(path), load_deployment(folder).array(1))
    before = sorted(tmp_path.rglob("*"))
    assert "No such file or directory" in fail("show", folder, "--array", "1", "--npy", tmp_path / "none" / "a.npy")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["plan.json", "conductances.safetensors", "array.npy", "stages/array.npy"])
def test_nothing_is_written_into_a_deployment(name: str, folder: Path, tmp_path: Path) -> None:
    """Its own files would be lost, and others would be in the way of the next one."""
    call("faults", "draw", folder, "--failure-rate", "0.01", "-o", tmp_path / "chips.csv")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = f"{name}: lies in the deployment '{folder}', which holds its own files only; name another place"
    assert message in fail("show", folder, "--array", "0", "--npy", folder / name)
    assert message in fail("faults", "draw", folder, "--failure-rate", "0.01", "-o", folder / name)
    result = call("faults", "show", folder, tmp_path / "chips.csv", "--png", folder / name, code=1)
    assert message in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_deployment_without_arrays(small_model_file: Path, tmp_path: Path) -> None:
    """Everything pruned is legal, and has nothing that could fail."""
    masks = {"conv_weight": np.zeros((8, 3, 3, 3), np.bool_), "fc_weight": np.zeros((10, 128), np.bool_)}
    np.savez(tmp_path / "masks.npz", **masks)
    out = tmp_path / "out"
    call("compile", small_model_file, "-o", out, "--masks", tmp_path / "masks.npz", "-q")
    call("verify", out)
    assert "arrays   0" in call("show", out).stdout
    assert f"{out}: no array 0, there is none: every weight is zero" in fail("show", out, "--array", "0")
    message = f"{out}: has no arrays, because every weight is zero: there is no cell that could fail"
    assert message in fail("validate", out, "--runs", "1", "--images", "2", "-o", tmp_path / "report")
    assert message in fail("faults", "draw", out, "--failure-rate", "0.1", "-o", tmp_path / "chips.csv")


def _picture(deployment: Deployment, **options: Any) -> list[str]:
    """Return the lines between the edges of the picture of array 0, on a terminal of 80 columns."""
    out = Console(file=io.StringIO(), width=80, markup=False, highlight=False, **options)
    show_array(out, deployment, 0)
    assert isinstance(out.file, io.StringIO)
    return [line for line in out.file.getvalue().splitlines() if line.startswith(("│", "|"))]


def test_the_picture_is_blank_where_cells_are_spare(folder: Path) -> None:
    lines = _picture(load_deployment(folder))
    assert [len(line) for line in lines] == [66] * 32  # 128 columns at two a character, 128 rows at four
    drawn = [(y, x) for y, line in enumerate(lines) for x, c in enumerate(line[1:-1]) if c != " "]
    assert drawn == [(y, x) for y in range(7) for x in range(8)]  # 26 rows, 16 columns
    assert {c for line in lines for c in line} == set("│ ░▒▓█")


def test_the_picture_in_colour(folder: Path) -> None:
    lines = _picture(load_deployment(folder), force_terminal=True, color_system="truecolor", no_color=False)
    assert len(lines) == 32
    assert all(line.count("▀") == 64 for line in lines)
    assert "\x1b[38;2;24;24;24;48;2;24;24;24m▀" in lines[-1]  # spare above spare
    assert "\x1b[38;2;24;24;24;48;2;24;24;24m▀" not in lines[0].split("▀")[0]


def test_the_picture_of_levels(small_model_file: Path, tmp_path: Path) -> None:
    call("compile", small_model_file, "-o", tmp_path / "out", "--target", "isaac")
    shown = call("show", tmp_path / "out", "--array", "0").stdout
    assert "levels 0 to 3, 1 µS to 100 µS" in shown
    assert "plus, slices 0-7" in shown


# What goes wrong.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no.onnx"], "no.onnx: "),
        (["bad.onnx"], "bad.onnx: not an ONNX model"),
        (["small.onnx", "--target", "papr"], "did you mean paper"),
        (["small.onnx", "--target", "no.toml"], "no.toml: no such target file"),
        (["small.onnx", "--set", "cell.levles=16"], "cell.levles: unknown key (did you mean levels"),
        (["small.onnx", "--set", "rows.x=16"], "'rows' is a value, expected a table"),
        (["small.onnx", "--set", "rows=many"], "rows: expected an integer from 1 to 65536, got 'many'"),
        (["small.onnx", "--set", "rows=1\nx=2"], "rows: expected an integer from 1 to 65536, got '1\\nx=2'"),
        (["small.onnx", "--prune", "1.5"], "expected a ratio of 0 or more and less than 1"),
        (["small.onnx", "--prune", "conv=0.5"], "no block and no layer of that name"),
        (["small.onnx", "--masks", "no.npz"], "no.npz: not a readable masks file"),
        (["small.onnx", "--tolerance", "nan"], "tolerance nan: expected 0 or more"),
        (["small.onnx", "--set", "cell.levels=2", "--set", "chips=1", "--set", "arrays_per_core=1"], "needs 2 arrays"),
        (["small.onnx", "-o", "bad.onnx"], "bad.onnx: a file, expected a folder"),
        (["small.onnx", "-o", "full"], "full: holds something else than a deployment"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.onnx").write_bytes(b"\x00\x01")
    Path("full").mkdir()
    Path("full", "thesis.tex").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert message in fail("compile", *args)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("command", [["show"], ["show", "--array", "0"], ["verify"]])
def test_what_is_no_deployment_is_refused(tmp_path: Path, command: list[str]) -> None:
    assert "deployment folder" in fail(*command, tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    assert "plan.json: not a deployment plan" in fail(*command, tmp_path)


def test_an_array_that_is_not_there(folder: Path) -> None:
    assert "no array 7, expected 0 to 1" in fail("show", folder, "--array", "7")
    assert "no array -1, expected 0 to 1" in fail("show", folder, "--array", "-1")


def test_an_inconsistent_plan_is_an_error_not_a_bug(folder: Path) -> None:
    path = folder / "plan.json"
    path.write_text(path.read_text().replace('"partitions":[{"layer":0', '"partitions":[{"layer":9'))
    assert "layer 9, expected 0 to 1" in fail("show", folder, "--array", "0")
    assert "layer 9" in call("show", folder, "-v").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile"], "Missing argument 'MODEL'"),
        (
            ["compile", "m.onnx", "--mapping", "diferential"],
            "'diferential' is not one of them (did you mean differential?)",
        ),
        (["compile", "m.onnx", "--mapping", "z"], "(known: auto, balanced, differential, offset, optimal, two_column)"),
        (
            ["compile", "m.onnx", "--failure-rate", "0.01"],
            "--failure-rate: no effect on mapping differential; use it with optimal or auto",
        ),
        (
            ["compile", "m.onnx", "--target", "neurram", "--off-on", "1:1"],
            "--off-on: no effect on mapping two_column; use it with optimal or auto",
        ),
        (
            ["compile", "m.onnx", "--mapping", "offset", "--current-weight", "0.1"],
            "--current-weight: no effect on mapping offset",
        ),
        (
            ["compile", "m.onnx", "--mapping", "auto", "--failure-rate", "0.1", "--stuck-on", "0.1"],
            "--failure-rate and --stuck-off or --stuck-on: expected one of the two ways",
        ),
        (["compile", "m.onnx", "--mapping", "auto", "--failure-rate", "1,2"], "'1,2' is not a valid float"),
        (["compile", "m.onnx", "--prune", "lots"], "'lots': expected a ratio like 0.6, or pairs"),
        (["compile", "m.onnx", "--prune", "64=0.2,128"], "expected a ratio like 0.6, or pairs"),
        (["compile", "m.onnx", "--set", "rows"], "'rows': expected KEY=VALUE"),
        (["compile", "m.onnx", "--seed", "-1"], "-1 is not in the range"),
        (["show", "out", "--npy", "a.npy"], "--npy needs --array ID"),
        (["compiel"], "No such command 'compiel'"),
    ],
)
def test_wrong_usage(args: list[str], message: str) -> None:
    assert message in fail(*args, code=2)


@pytest.mark.parametrize("error", [InternalError("emit lost a layer"), ZeroDivisionError("division by zero")])
def test_a_bug_keeps_its_traceback(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _break(monkeypatch, error)
    result = call("compile", small_model_file, "-o", tmp_path / "out", code=70)
    assert "Traceback (most recent call last)" in result.stderr
    assert f"{type(error).__name__}: {error}" in result.stderr
    assert "Please report it" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [small_model_file]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "Error: out of memory; use a machine with more of it"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            "Error: out of memory (Unable to allocate 9 TiB); use a machine with",
        ),
        (OSError(28, "No space left on device"), "No space left on device; '"),
    ],
)
def test_what_the_machine_refuses(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    _break(monkeypatch, error)
    assert line in fail("compile", small_model_file, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [small_model_file]


def _break(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(Map, "run", run)


def test_no_room_for_the_deployment(small_model_file: Path, tmp_path: Path) -> None:
    probe = (
        "import resource, sys\nfrom rerampile.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nmain(sys.argv[1:])"
    )
    done = _python(probe, "compile", small_model_file, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [small_model_file]


# Tests may run under nohup, which has this signal ignored by all that it starts.
HEARS_HANGUPS = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"

# Map stops there until a signal comes, whatever the machine's speed.
STOPS_IN_MAP = f"""
{HEARS_HANGUPS}
import sys, time
from rerampile.__main__ import main
from rerampile.passes.map import Map
def run(*_):
    print("in map", file=sys.stderr, flush=True)
    time.sleep(60)
Map.run = run
main()
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_an_interrupted_compile_leaves_nothing_behind(
    small_model_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-c", STOPS_IN_MAP, "compile", small_model_file, "-o", tmp_path / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "in map\n":
            assert process.poll() is None
        assert len(list(tmp_path.iterdir())) == 2  # the temporary folder is there
        process.send_signal(number)
        assert process.stderr.read() == "Aborted\n"
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == [small_model_file]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
@pytest.mark.parametrize("module", ["click", "numpy", "onnxruntime"])
def test_a_signal_while_libraries_are_imported(
    module: str, number: int, code: int, small_model_file: Path, tmp_path: Path
) -> None:
    """There is nothing to clean up, and a library that is interrupted half-way may raise anything."""
    probe = f"""
{HEARS_HANGUPS}
import os, sys
from rerampile.__main__ import main

class Interrupts:
    def find_spec(self, name, *_):
        if name == {module!r}:
            try:
                os.kill(os.getpid(), {int(number)})
            except KeyboardInterrupt:
                raise ImportError("a library that makes something else of it")

sys.meta_path.insert(0, Interrupts())
main()
"""
    done = _python(probe, "compile", small_model_file, "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (code, "Aborted\n")
    assert list(tmp_path.iterdir()) == [small_model_file]


def test_an_interruption_that_a_library_makes_something_else_of(small_model_file: Path, tmp_path: Path) -> None:
    change = "try: os.kill(os.getpid(), signal.SIGTERM)\n    except KeyboardInterrupt: raise ImportError('numpy')"
    probe = "import os, signal\n" + STOPS_IN_MAP.replace("time.sleep(60)", change)
    done = _python(probe, "compile", small_model_file, "-o", tmp_path / "out")
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "Aborted"
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [small_model_file]


def test_an_interrupted_compile_keeps_the_earlier_deployment(small_model_file: Path, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    probe = STOPS_IN_MAP.replace("time.sleep(60)", "raise KeyboardInterrupt")
    assert _python(probe, "compile", small_model_file, "-o", folder).returncode == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_signals_that_are_ignored_stay_so(small_model_file: Path, tmp_path: Path) -> None:
    probe = STOPS_IN_MAP.replace("SIG_DFL", "SIG_IGN").replace(
        "time.sleep(60)", "import os; os.kill(os.getpid(), signal.SIGHUP); raise ZeroDivisionError"
    )
    assert _python(probe, "compile", small_model_file, "-o", tmp_path / "out").returncode == 70


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rerampile", "show", folder]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], stdout=writing, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (1, b"")
    os.close(writing)


def test_progress_that_nobody_reads_stops_nothing(small_model_file: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rerampile", "compile", small_model_file, "-o", tmp_path / "out"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert b"arrays" in done.stdout
    call("verify", tmp_path / "out")


def test_progress_is_live_on_a_terminal(small_model_file: Path, tmp_path: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-c", STOPS_IN_MAP.replace("time.sleep(60)", "raise KeyboardInterrupt")]
    process = subprocess.Popen(
        [*command, "compile", small_model_file, "-o", tmp_path / "out"], stderr=stderr, stdout=subprocess.DEVNULL
    )
    os.close(stderr)
    shown = b""
    while chunk := _read(terminal):
        shown += chunk
    os.close(terminal)
    assert process.wait() == 130
    lines = shown.decode().splitlines()
    assert lines[0].startswith("[1/6] find layers … ")
    assert lines[-3:] == ["[3/6] map … in map", "", "Aborted"]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux tells that the other side is closed
        return b""


# Hostile names.


def test_names_cannot_steer_the_terminal(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    evil = "w\x1b[2J\r\n\u202e[bold]"
    model.graph.initializer[0].name = model.graph.node[0].input[1] = evil
    model.graph.node[1].name = "\x1b]0;title\x07"
    onnx.save(model, tmp_path / "m.onnx")
    shown = [
        call("inspect", tmp_path / "m.onnx", "-v"),
        call("compile", tmp_path / "m.onnx", "-o", tmp_path / "out", "-v"),
        call("show", tmp_path / "out", "-v"),
        call("show", tmp_path / "out", "--array", "0"),
        call("compile", tmp_path / "m.onnx", "-o", tmp_path / "out", "--prune", "w=0.5", code=1),
    ]
    for result in shown:
        assert not set("\x1b\r\u202e\x07") & set(result.output)
    assert "w\\x1b[2J\\r\\n\\u202e[bold]" in shown[0].stdout


def test_printable() -> None:
    assert printable("µS × 3 – 'é'") == "µS × 3 – 'é'"
    assert printable("a\nb\x00\udc80\U000e0001") == "a\\nb\\x00\\udc80\\U000e0001"


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_parse(command: str) -> None:
    for option in ("--help", "-h"):
        text = call(command, option, COLUMNS="80").stdout
    examples = text.split("  Examples:\n")[1].splitlines()
    assert examples
    for line in examples:
        words = shlex.split(line)
        assert words[:2] == ["rerampile", command]
        arguments = words[2 : words.index(">") if ">" in words else None]
        main.commands[command].make_context(command, arguments)
    assert max(map(len, text.splitlines())) <= 80


def test_show_tells_what_was_weighed(small_model_file: Path, tmp_path: Path) -> None:
    options = ["--mapping", "auto", "--failure-rate", "0.01", "--off-on", "1:3", "--current-weight", "0.0001"]
    call("compile", small_model_file, "-o", tmp_path / "out", *options, "-q")
    plan = load_deployment(tmp_path / "out").plan
    assert [plan.options[key] for key in ("stuck_off", "stuck_on", "current_weight")] == [0.0025, 0.0075, 0.0001]
    shown = call("show", tmp_path / "out", "-v").stdout
    assert "times that of the layer's own scheme" in shown
    rows = [line.split() for line in shown.splitlines()]
    for layer in plan.layers:
        (row,) = (row for row in rows if len(row) == 7 and row[:2] == [layer.name, layer.scheme])
        assert row[2:][SCHEMES.index(layer.scheme)] == "1"
    assert "own scheme" not in call("show", tmp_path / "out").stdout
    call("compile", small_model_file, "-o", tmp_path / "plain", "-q")
    assert "own scheme" not in call("show", tmp_path / "plain", "-v").stdout


def test_every_option_is_explained() -> None:
    for name, command in main.commands.items():
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"


def test_the_mappings_on_offer_are_those_there_are() -> None:
    (mapping,) = (option for option in main.commands["compile"].params if option.name == "mapping")
    assert isinstance(mapping.type, click.Choice)
    assert tuple(mapping.type.choices) == MAPPINGS
    assert compile_command._WEIGHED == WEIGHED


def test_no_help_loads_anything_heavy() -> None:
    probe = (
        "import sys, contextlib\nfrom rerampile.cli import main\n"
        "for command in main.commands:\n"
        "    with contextlib.suppress(SystemExit): main([command, '--help'])\n"
        "print(*sorted({'numpy', 'onnx', 'onnxruntime', 'rich', 'msgspec'} & set(sys.modules)), file=sys.stderr)"
    )
    assert _python(probe).stderr == "\n"


def _python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
