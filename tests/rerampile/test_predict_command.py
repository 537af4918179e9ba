"""The command `predict`: tables, JSON, files, and what it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from rerampile import Deployment, compile_model
from rerampile.cli import main
from rerampile.runtime.predict import Prediction


@pytest.fixture(scope="module")
def deployment(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return compile_model(small_model, out=tmp_path_factory.mktemp("predict") / "small.deployment")


def call(deployment: Deployment, *arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["predict", str(deployment.folder), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_tables_rank_the_layers_that_hurt(deployment: Deployment) -> None:
    shown = call(deployment, "--failure-rate", "0.001,0.02", "--images", "8").stdout
    assert "of it in every chip" in shown
    assert "layers that hurt at 0.02" in shown
    assert "generated, 8 images; noise in each layer on 4" in shown
    found = json.loads(call(deployment, "--failure-rate", "0.001,0.02", "--images", "8", "--json").stdout)
    ranked = [layer["layer"] for layer in found["rates"][1]["layers"]]
    assert {"conv_weight", "fc_weight"} == set(ranked)
    assert shown.index(ranked[0]) < shown.index(ranked[1])
    assert f"{found['rates'][1]['output_error']:.2f} %" in shown


def test_files_hold_what_is_printed(deployment: Deployment, tmp_path: Path) -> None:
    printed = call(deployment, "--failure-rate", "0.01", "--json", "-o", tmp_path / "out").stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"prediction.json", "layers.svg", "layers.png"}
    written = (tmp_path / "out" / "prediction.json").read_bytes()
    assert json.loads(written) == json.loads(printed)
    found = msgspec.json.decode(written, type=Prediction)
    assert found.images == 64
    assert "share of the predicted squared output error" in (tmp_path / "out" / "layers.svg").read_text()
    again = tmp_path / "again"
    call(deployment, "--failure-rate", "0.01", "-o", again)
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_few_layers_of_many_are_listed(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = " ".join(f"x{k + 1} = MatMul (x{k}, w{k}_)" for k in range(20))
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x0) => (float[N, 4] x20) {{ {steps} }}'
    weights = {f"w{k}_": rng.standard_normal((4, 4), np.float32) for k in range(20)}
    deep = compile_model(parse_model(text, **weights), out=tmp_path / "deep")
    few = call(deep).stdout
    assert "10 others" in few, few
    everything = call(deep, "-v").stdout
    assert "others" not in everything
    assert all(name in everything for name in weights)
    call(deep, "-o", tmp_path / "out")
    assert "4 others" in (tmp_path / "out" / "layers.svg").read_text()


def test_names_that_no_font_or_page_can_take(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    odd = onnx.ModelProto()
    odd.CopyFrom(small_model)
    for tensor in odd.graph.initializer:
        tensor.name = {"conv_weight": "$\x1b\n重<b>$"}.get(tensor.name, tensor.name)
    odd.graph.node[0].input[1] = "$\x1b\n重<b>$"
    named = compile_model(odd, out=tmp_path / "odd")
    shown = call(named, "-o", tmp_path / "out").stdout
    assert "\x1b" not in shown
    assert r"$\x1b\n\u91cd&lt;b&gt;$" in (tmp_path / "out" / "layers.svg").read_text()


RECURRENT = "g (float[3, 2, 6] x) => (float[3, 1, 2, 4] y) { $ y = LSTM <hidden_size = 4> (a, W, R) }"


@pytest.mark.parametrize("also", [True, False])
def test_layers_that_are_left_out_are_named(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path, also: bool
) -> None:
    rng = np.random.default_rng(3)
    shapes = {"W": (1, 16, 6), "R": (1, 16, 4)} | ({"F": (6, 6)} if also else {})
    text = RECURRENT.replace("$", f"a = {'MatMul (x, F)' if also else 'Relu (x)'}")
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    recurrent = compile_model(
        parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}', **weights), out=tmp_path / "out"
    )
    if also:
        assert "not predicted  W, R: LSTM feeds its own errors back" in call(recurrent).stdout
    else:
        assert "no layer to predict: LSTM feeds its own errors back" in call(recurrent, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distribution", "line"], "--distribution line: the closed forms hold for independent faults; run 'rer"),
        (["--distribution", "cluster"], "--distribution cluster: the closed forms hold for independent faults"),
        (["--failure-rate", "1.5"], "--failure-rate 1.5: expected a fraction from 0 to 1"),
        (["--data", "cifar11:x"], "--data: unknown adapter 'cifar11' (did you mean cifar10?)"),
        (["--data", "cifar10:nowhere"], "data_batch_1.bin: cannot be read"),
        (["--data", "imagefolder:empty"], "empty: no images"),
        (["-o", "taken"], "taken: cannot be used as a folder: File exists; name another one with -o"),
        (["-o", "theirs"], "theirs: holds 'notes.txt', expected a new or empty folder"),
        (["-o", "{folder}/sub"], "/sub: lies in the deployment '"),
        (["-o", "{folder}"], "holds 'conductances.safetensors', expected a new or empty folder"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("taken").write_text("a file")
    Path("theirs").mkdir()
    Path("theirs/notes.txt").touch()
    before = sorted(deployment.folder.iterdir())
    error = call(deployment, *(word.format(folder=deployment.folder) for word in arguments), code=1).stderr
    assert sorted(deployment.folder.iterdir()) == before
    assert message in error
    assert error.count("\n") == 1


def test_wrong_usage(deployment: Deployment) -> None:
    assert "0 is not in the range" in call(deployment, "--images", "0", code=2).stderr
    both = call(deployment, "--stuck-off", "0.1", "--off-on", "1:3", code=2).stderr
    assert "--off-on and --stuck-off or --stuck-on: it splits a --failure-rate; leave it out" in both
    assert "expected a deployment folder" in CliRunner().invoke(main, ["predict", "nowhere"]).stderr


def test_data_that_name_no_split_are_those_for_training(deployment: Deployment, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (4, 4), "red" if split == "train" else "blue").save(tmp_path / split / "a" / "1.png")
    options = ["--preprocess", "raw", "--failure-rate", "0.01", "--json"]
    by_default = json.loads(call(deployment, "--data", f"imagefolder:{tmp_path}", *options).stdout)
    train = json.loads(call(deployment, "--data", f"imagefolder:{tmp_path}@train", *options).stdout)
    test = json.loads(call(deployment, "--data", f"imagefolder:{tmp_path}@test", *options).stdout)
    assert by_default["rates"] == train["rates"] != test["rates"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_progress_is_a_bar_on_a_terminal(deployment: Deployment) -> None:
    for quiet in ([], ["-q"]):
        main_end, terminal = pty.openpty()
        with os.fdopen(main_end, "rb", buffering=0) as shown:
            command = [sys.executable, "-m", "rerampile", "predict", str(deployment.folder), "--images", "2", *quiet]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True)
            os.set_blocking(shown.fileno(), False)
            text = shown.read(1 << 16) or b""
            os.close(terminal)
        assert (b"3/3" in text) is not quiet
        assert bool(quiet) is (text == b"")
