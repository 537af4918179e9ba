"""Validation in int8 from the command line: what it learns from, how far it is from fp32, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from rerampile import DataError, Deployment, FaultRunError, Target, compile_model
from rerampile.cli import main
from rerampile.runtime.data import training_split
from rerampile.runtime.executor import open_executor
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.quantised import require_dot_products
from rerampile.runtime.validation import validate


@pytest.fixture
def _exact_int8() -> None:
    """Skip where this CPU's int8 products saturate."""
    try:
        require_dot_products()
    except FaultRunError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(parse_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """A network for CIFAR-10 of two layers."""
    rng = np.random.default_rng(1)
    return parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        tiny (float[N, 3, 32, 32] image) => (float[N, 10] scores) {
            features = Conv <kernel_shape = [3, 3], strides = [4, 4]> (image, conv_weight)
            active = Relu (features)
            flat = Flatten (active)
            scores = Gemm <transB = 1> (flat, fc_weight)
        }
        """,
        conv_weight=rng.standard_normal((8, 3, 3, 3), dtype=np.float32),
        fc_weight=rng.standard_normal((10, 512), dtype=np.float32),
    )


@pytest.fixture(scope="module")
def deployment(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    target = Target.load("paper", {"cell.levels": 16})
    return compile_model(model, out=tmp_path_factory.mktemp("int8") / "tiny.deployment", target=target)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's binary layout: 100 training images of middling contrast, 90 test images."""
    rng = np.random.default_rng(2)
    folder = tmp_path_factory.mktemp("cifar")
    for name, count in (*((f"data_batch_{k}", 20) for k in range(1, 6)), ("test_batch", 90)):
        records = rng.integers(40, 216, (count, 3073), np.uint8)
        records[:, 0] = rng.integers(0, 10, count)
        records.tofile(folder / f"{name}.bin")
    return folder


def run(*args: object, code: int = 0, env: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(main, ["validate", *map(str, args)], env=env)
    assert result.exit_code == code, result.output
    return result


@pytest.mark.usefixtures("_exact_int8")
def test_int8_says_how_far_it_is_from_fp32(deployment: Deployment, cifar: Path, tmp_path: Path) -> None:
    """Chips come out as in fp32 within a point or two, and the report holds both clean figures."""
    common = (deployment.folder, "--data", f"cifar10:{cifar}", "--runs", 2, "--failure-rate", "0.05", "-q")
    exact = json.loads(run(*common, "-o", tmp_path / "fp32", "--json").stdout)
    shown = run(*common, "-o", tmp_path / "int8", "--precision", "int8", env={"COLUMNS": "400"}).stdout
    report = json.loads((tmp_path / "int8" / "report.json").read_bytes())

    assert (exact["precision"], exact["int8"]) == ("fp32", None)
    assert report["precision"] == "int8"
    assert report["execution"].startswith("slow: ")
    found = report["int8"]
    assert (found["layers"], found["of_layers"]) == (2, 2)
    assert (found["calibration"], found["calibration_images"]) == (f"cifar10:{cifar}@train", 64)
    assert 0 < found["output_error"] < 3
    assert found["clean_fp32"] == exact["clean"]
    for name, value in report["clean"].items():
        assert value == pytest.approx(exact["clean"][name], abs=5)
    for name, metric in report["rates"][0]["metrics"].items():
        assert metric["values"] == pytest.approx(exact["rates"][0]["metrics"][name]["values"], abs=5)
    page = (tmp_path / "int8" / "report.html").read_text()
    for text in (shown, page):
        clean = f"top1 {report['clean']['top1']:.2f} % ({exact['clean']['top1']:.2f} %)"
        assert f"2 of 2 layers; without faults (in fp32): {clean}" in text
        assert f"outputs {found['output_error']:.2f} % (rms) from fp32 on 64 images of cifar10:" in text


@pytest.mark.usefixtures("_exact_int8")
def test_agreement_compares_fp32_with_int8(deployment: Deployment, tmp_path: Path) -> None:
    """Without labels, the metric itself says how far fp32 is from int8."""
    experiment = Experiment(
        folder=deployment.folder, faults=(FaultModel.of_rate(0.01),), data="generated:20", precision="int8"
    )
    report = validate(experiment, tmp_path / "j", runs=1)
    assert report.clean == {"top1_agreement": 100, "output_error": 0}
    assert report.int8 is not None
    assert report.int8.calibration == "generated:20"
    assert 0 < report.int8.clean_fp32["output_error"] < 3


@pytest.mark.usefixtures("_exact_int8")
def test_comparison_in_int8(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Each deployment says how far it is from fp32."""
    onnx.save(model, tmp_path / "m.onnx")
    words = ["compare", tmp_path / "m.onnx", "--mappings", "offset,differential", "--set", "cell.levels=16"]
    effort = ["--precision", "int8", "--images", 8, "--runs", 2, "--failure-rate", "0.02,0.05", "-o", tmp_path / "c"]
    done = CliRunner().invoke(main, [*map(str, [*words, *effort]), "-q"], env={"COLUMNS": "400"})
    assert done.exit_code == 0, done.output
    assert done.stdout.count("2 of 2 layers; without faults (in fp32): top1_agreement 100.00 %") == 2
    assert (tmp_path / "c" / "report.html").read_text().count("2 of 2 layers; without faults (in fp32)") == 2


@pytest.mark.usefixtures("_exact_int8")
def test_int8_goes_on_where_it_was_interrupted(deployment: Deployment, cifar: Path, tmp_path: Path) -> None:
    """Other calibration data make another experiment, as fp32 does; processes change nothing."""
    experiment = Experiment(
        folder=deployment.folder,
        faults=(FaultModel.of_rate(0.05),),
        data=f"cifar10:{cifar}",
        images=20,
        precision="int8",
    )
    whole = msgspec.json.encode(validate(experiment, tmp_path / "whole", runs=4))
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    header = json.loads(lines[0])["experiment"]
    assert header["precision"] == "int8"
    assert len(header["calibration"]) == 64
    (tmp_path / "cut").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    seen: list[int] = []
    resumed = validate(experiment, tmp_path / "cut", runs=4, jobs=2, progress=lambda done, *_: seen.append(done))
    assert msgspec.json.encode(resumed) == whole
    assert seen == [2, 3, 4]
    other = replace(experiment, calibration=f"cifar10:{cifar}@data_batch_2")
    with pytest.raises(DataError, match="journal of another run: calibration was"):
        validate(other, tmp_path / "cut", runs=4)
    with pytest.raises(DataError, match=r"journal of another run: (calibration|precision) was .*, now"):
        validate(replace(experiment, precision="fp32"), tmp_path / "cut", runs=4)


@pytest.mark.usefixtures("_exact_int8")
def test_few_images_are_calibrated_with_once_each(deployment: Deployment, cifar: Path) -> None:
    bench = Bench(
        Experiment(
            folder=deployment.folder,
            data=f"cifar10:{cifar}",
            precision="int8",
            calibration=f"cifar10:{cifar}@data_batch_1",
        )
    )
    assert bench.calibration is not None
    assert bench.calibration.images == 20
    assert [len(inputs["image"]) for inputs in bench.calibration.inputs] == [8, 8, 4]


@pytest.mark.usefixtures("_exact_int8")
@pytest.mark.parametrize("op", ["Relu", "Clip"])
def test_an_output_that_is_cut_off_for_another_keeps_its_range(
    op: str, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """The quantiser would give it the range of what a Relu, its only reader, leaves."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.standard_normal((12, 9), np.float32), "V": rng.standard_normal((9, 5), np.float32)}
    cut = "Relu (t)" if op == "Relu" else "Clip (t, zero)"
    net = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,12] x) => (float[N,9] t, float[N,5] y) <float zero = {{0}}> {{
        t = MatMul (x, W) r = {cut} y = MatMul (r, V)
    }}"""
    target = Target.load("paper", {"cell.levels": 64})
    deployment = compile_model(parse_model(net, **weights), out=tmp_path / "out", target=target)
    batches = [{"x": rng.standard_normal((8, 12), np.float32)} for _ in range(4)]
    exact, rounded = open_executor(deployment), open_executor(deployment, precision="int8", calibration=batches)
    for found, expected in zip(rounded.run(batches[0]), exact.run(batches[0]), strict=True):
        assert expected.min() < -1
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_training_images_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    assert training_split("cifar10:d") == "cifar10:d@train"
    assert training_split("cifar10:d@data_batch_5") == "cifar10:d@train"
    assert training_split("imagefolder:d,labels.txt@val") == "imagefolder:d,labels.txt@train"
    assert training_split(f"imagefolder:{tmp_path},x.txt") == f"imagefolder:{tmp_path},x.txt@train"
    for without in ("generated", "npz:a@b.npz", "coco:images,boxes.json", "imagefolder:d"):
        assert training_split(without) == without


@pytest.mark.usefixtures("_exact_int8")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cifar10:{part}"], "--calibration cifar10:{part}@train: {part}/data_batch_1.bin: cannot be read "),
        (["--data", "cifar10:{part}"], "binary layout of CIFAR-10; name other data with --calibration"),
        (["--calibration", "cifar11:{part}"], "--calibration cifar11:{part}: unknown adapter 'cifar11' (did you mean"),
        (["--calibration", "npz:none.npz"], "--calibration npz:none.npz: none.npz: not a readable .npz file"),
        (["--provider", "CUDAExecutionProvider"], "--provider CUDAExecutionProvider: not in this ONNX Runtime"),
        (["--precision", "fp32", "--calibration", "generated"], "--calibration: nothing to calibrate in fp32; leave"),
    ],
)
def test_wrong_calibration_is_one_line(
    deployment: Deployment, cifar: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    """``part`` is a folder with the test images alone."""
    part = tmp_path / "part"
    part.mkdir()
    (part / "test_batch.bin").write_bytes((cifar / "test_batch.bin").read_bytes())
    words = [word.format(part=part) for word in options]
    failed = run(deployment.folder, "--precision", "int8", *words, "-o", tmp_path / "out", code=1)
    assert message.format(part=part) in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.usefixtures("_exact_int8")
@pytest.mark.parametrize(("changes", "found"), [({}, "analog cells"), ({"cell.levels": 512}, "cells of 512 levels")])
def test_cells_that_do_not_fit_say_what_would(
    model: onnx.ModelProto, tmp_path: Path, changes: dict[str, object], found: str
) -> None:
    """The refusal comes before calibration data are read, and what it advises runs."""
    onnx.save(model, tmp_path / "m.onnx")
    compile_model(model, out=tmp_path / "out", target=Target.load("paper", changes))
    data = ("--calibration", "cifar10:nowhere", "--precision", "int8")
    line = run(tmp_path / "out", *data, "-o", tmp_path / "v", code=1).stderr
    remedy = "cell.levels=128"
    assert f"--precision int8: {found} in layer 'conv_weight', expected at most 256 levels; compile with --set" in line
    assert f"{remedy}, or use fp32" in line

    given = [f"{key}={value}" for key, value in changes.items()] + [remedy]
    arguments = [part for word in given for part in ("--set", word)]
    done = CliRunner().invoke(main, ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "new"), *arguments])
    assert done.exit_code == 0, done.output
    run(tmp_path / "new", "--precision", "int8", "--images", 8, "--runs", 1, "-o", tmp_path / "v", "-q")


@pytest.mark.usefixtures("_exact_int8")
def test_several_gains_an_output(model: onnx.ModelProto, tmp_path: Path) -> None:
    """One for each partition: int8 kernels know one, so that weights are rounded to the coarsest."""
    target = Target.load("paper", {"cell.levels": 64, "rows": 16})
    deployment = compile_model(model, out=tmp_path / "out", target=target, scale="partition")
    assert deployment.gain(deployment.plan.layers[-1]).shape[1] > 1
    run(tmp_path / "out", "--precision", "int8", "--images", 8, "--runs", 1, "-o", tmp_path / "v", "-q")
    report = json.loads((tmp_path / "v" / "report.json").read_bytes())
    assert 0 < report["int8"]["output_error"] < 3
