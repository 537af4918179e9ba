"""The command that programs chips: folders, verdicts, replay, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from rerampile import Deployment, PlanFormatError, Target, compile_model, load_deployment, verify_deployment
from rerampile.chip_calibration import calibrate
from rerampile.cli import main
from rerampile.deployment import layer_coding
from rerampile.plan import FileRecord, encode_plan, read_plan
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.data import open_dataset
from rerampile.runtime.fault_map import STATES, ChipGeometry, FaultMap, read_fault_maps, write_fault_maps
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.layer_program import STEPS, LayerProgram
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.repair import output_energies, repair_errors
from rerampile.runtime.session import open_declared


@pytest.fixture
def deployment(small_model_file: Path, tmp_path: Path) -> Deployment:
    return compile_model(small_model_file, out=tmp_path / "out", mapping="differential")


def drawn(deployment: Deployment, rate: float = 0.05, chips: int = 1) -> list[FaultMap]:
    model, geometry = FaultModel.of_rate(rate), ChipGeometry.of(deployment)
    return [draw_faults(geometry, model, deployment.target, seed=3, run=run) for run in range(chips)]


def map_file(deployment: Deployment, path: Path, **how: Any) -> Path:
    write_fault_maps(path, drawn(deployment, **how), deployment)
    return path


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_chip_is_programmed_verified_and_validated(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "chip17.safetensors")
    done = run("program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", "--json", "-q")
    assert done.exit_code == 0, done.output
    chip = json.loads(done.stdout)["chips"][0]["chip"]
    assert [step["step"] for step in chip["steps"]] == ["none", "compensate", "assign", "flip"]
    errors = [step["error"] for step in chip["steps"]]
    assert errors[0] > errors[1] > errors[3]
    assert errors[2] > errors[3]
    assert chip["output_error"] < 0.7 * chip["output_error_before"]
    assert chip["unrepaired_total"] == sum(layer["unrepaired"] for layer in chip["layers"])
    shares = [weight["share"] for weight in chip["unrepaired"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == min(100, chip["unrepaired_total"]) > 0

    assert run("verify", tmp_path / "chip").exit_code == 0
    shown = run("show", tmp_path / "chip").output
    assert "pairs compensated" in shown
    assert "chip17.safetensors" in shown
    done = run("validate", tmp_path / "chip", "-o", tmp_path / "report", "-q", "--json", "--images", 8)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [rate["distribution"] for rate in report["rates"]] == ["measured"]
    assert report["rates"][0]["metrics"]["output_error"]["chips"] == 1
    observed = report["rates"][0]["faults"]
    stuck = drawn(deployment)[0]
    assert observed["observed_on"] * observed["cells"] == pytest.approx(stuck.stuck_on)

    geometry = ChipGeometry.of(deployment)
    for weight in chip["unrepaired"]:
        cell = geometry.cell(*(np.array(weight[name]) for name in ("array", "row", "column")))
        assert cell in stuck.cell


def test_a_chip_is_compared_with_what_was_compiled(deployment: Deployment, tmp_path: Path) -> None:
    """Found in a folder around the chip's, by name and checksum; where it is not, no drop is claimed."""
    faults = map_file(deployment, tmp_path / "map.safetensors")
    chip = tmp_path / "chips" / "wafer" / "chip"
    assert run("program", deployment.folder, "--fault-map", faults, "-o", chip, "-q").exit_code == 0
    call = ["validate", chip, "-q", "--images", 8, "-o"]
    done = run(*call, tmp_path / "with", "--json")
    report = json.loads(done.stdout)
    assert report["clean_of"] == {"compiled": "out", "found": True}
    found = report["rates"][0]["metrics"]["output_error"]
    assert found["clean"] == 0
    assert found["drop"] == found["mean"] > 0
    assert "of the compiled deployment 'out'" in run(*call, tmp_path / "with").output

    (tmp_path / "other.onnx").write_bytes((tmp_path / "small.onnx").read_bytes())
    deployment.folder.rename(tmp_path / "away")
    compile_model(tmp_path / "other.onnx", out=tmp_path / "chips" / "out", mapping="two_column")  # of that name alone
    report = json.loads(run(*call, tmp_path / "without", "--json").stdout)
    assert report["clean_of"] == {"compiled": "out", "found": False}
    shown = " ".join(run(*call, tmp_path / "without").output.split())
    assert "that it was programmed from is not beside it, so that the drop is not known" in shown
    assert "unknown" in shown
    assert "clean" not in shown.split("measured chips")[0].split("mean")[0]
    page = (tmp_path / "without" / "report.html").read_text()
    assert "<td>unknown</td>" in page
    assert "without faults" not in page

    (tmp_path / "away").rename(tmp_path / "out")
    with (tmp_path / "out" / "conductances.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    assert "conductances.safetensors: sha256" in run(*call, tmp_path / "changed").output


def test_the_same_chip_has_the_same_bytes(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    for name in ("a", "b"):
        data = ["--calibration", "generated", "--images", 16]
        assert (
            run("program", deployment.folder, "--fault-map", faults, *data, "-o", tmp_path / name, "-q").exit_code == 0
        )
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


@pytest.mark.parametrize("left_out", [None, *STEPS])
@pytest.mark.parametrize("alone", [False, True])
def test_each_step_is_optional(alone: bool, left_out: str | None, deployment: Deployment, tmp_path: Path) -> None:
    """Each by itself, and all but one of them: the folder verifies, and says what was done."""
    steps = [step for step in STEPS if (step == left_out) == alone]
    data = open_dataset("generated", open_declared(deployment.model_path), Preprocessing(), generate=8)
    source = ChipSource(path=tmp_path / "out" / "plan.json", number=0, faults=drawn(deployment, 0.1)[0])
    done = program_chip(deployment, source, tmp_path / "chip", steps=steps, calibration=calibrate(deployment, data, 8))
    verify_deployment(done.folder)
    assert done.plan.chip is not None
    assert [step.step for step in done.plan.chip.steps] == ["none", *steps]
    last = done.plan.chip.steps[-1]
    assert (last.moved > 0) == ("assign" in steps)
    assert (last.flipped > 0) == ("flip" in steps)
    assert any(layer.shift for layer in done.plan.chip.layers) == ("bias" in steps)
    assert (last.touched > 0) == bool({"compensate", "repair"} & set(steps))


def test_a_folder_of_maps_gives_a_folder_for_each_chip(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    map_file(deployment, tmp_path / "maps" / "single.csv")
    map_file(deployment, tmp_path / "maps" / "wafer.safetensors", chips=2)
    done = run("program", deployment.folder, "--fault-map", tmp_path / "maps", "-o", tmp_path / "chips", "-q")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "chips").iterdir()) == ["single", "wafer-0", "wafer-1"]
    for folder in (tmp_path / "chips").iterdir():
        verify_deployment(folder)
    assert "verdict" in done.output
    assert " met" not in done.output
    call = ["program", deployment.folder, "--fault-map", tmp_path / "maps", "-o", tmp_path / "chips", "-q"]
    ends = [json.loads(p.joinpath("plan.json").read_text())["chip"] for p in (tmp_path / "chips").iterdir()]
    middle = sorted(chip["steps"][-1]["error"] for chip in ends)[1]
    done = run(*call, "--require", f"error <= {middle!r}")
    assert done.exit_code == 3
    table = done.output[done.output.rindex("verdict") :].splitlines()
    assert [line.split()[-1] for line in table if "%" in line] == ["met", "met", "met"]
    assert sum("NOT met" in line for line in table) == 1


def test_requirements_bin_chips(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    call = ["program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", "-q"]
    assert run(*call, "--require", "error <= 1").exit_code == 0
    done = run(*call, "--require", "error <= 1", "--require", "unrepaired < 1")
    assert done.exit_code == 3
    assert "NOT met" in done.output
    assert (tmp_path / "chip" / "plan.json").exists()
    done = run(*call, "--require", "top1 >= 90")
    assert done.exit_code == 1
    assert "--require 'top1 >= 90': expected error, worst, unrepaired or output_error <= NUMBER" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--steps", "compensate,mend"],
            "--steps: no step 'mend', expected some of compensate, assign, flip, repair, gain, bias",
        ),
        (["--steps", "repair"], "--steps: 'repair' has to know what layers see; name images with --calibration"),
        (["--steps", "bias"], "--steps: 'bias' has to know what layers see; name images with --calibration"),
    ],
)
def test_steps_that_cannot_be_taken(deployment: Deployment, tmp_path: Path, words: list[str], message: str) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    done = run("program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", *words)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "chip").exists()


def test_what_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    assert run("program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", "-q").exit_code == 0
    again = run("program", tmp_path / "chip", "--fault-map", faults, "-o", tmp_path / "other", "-q")
    assert again.exit_code == 1
    assert "programmed already, expected a deployment written by compile" in again.output
    again = run(
        *("program", tmp_path / "chip", "--fault-map", faults, "--calibration", "npz:none.npz"),
        *("-o", tmp_path / "other", "-q"),
    )
    assert "programmed already" in again.output  # before the images are opened
    done = run("predict", tmp_path / "chip", "-q")
    assert "programmed for one chip, whose cells are known: there is nothing to predict" in done.output
    done = run("compare", deployment.folder, tmp_path / "chip", "-o", tmp_path / "r", "-q")
    assert "programmed for one chip, none is drawn, expected deployments written by compile" in done.output
    assert not (tmp_path / "r").exists()
    done = run("validate", tmp_path / "chip", "--fault-map", faults, "-o", tmp_path / "r", "-q")
    assert "programmed for one chip, whose stuck cells it holds; leave --fault-map out" in done.output
    done = run("validate", tmp_path / "chip", "--runs", 3, "-o", tmp_path / "r", "-q")
    assert done.exit_code == 2
    assert "was programmed for one chip, none is drawn; leave it out" in done.output
    done = run("validate", tmp_path / "chip", "--require", "top1 >= 1 @ 0.1", "-o", tmp_path / "r", "-q")
    assert "programmed for one chip: no failure rate to require something of" in done.output
    (tmp_path / "empty").mkdir()
    done = run("program", deployment.folder, "--fault-map", tmp_path / "empty", "-o", tmp_path / "x", "-q")
    assert "no .safetensors and no .csv file in it, expected fault maps" in done.output
    (tmp_path / "twice").mkdir()
    for ending in ("csv", "safetensors"):
        map_file(deployment, tmp_path / "twice" / f"map.{ending}")
    done = run("program", deployment.folder, "--fault-map", tmp_path / "twice", "-o", tmp_path / "x", "-q")
    assert "two chips would go to" in done.output


def test_a_damaged_deployment_is_not_programmed(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    path = deployment.folder / "conductances.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for words in (
        ["program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip"],
        ["predict", deployment.folder],
        ["faults", "draw", deployment.folder, "-o", tmp_path / "drawn.csv"],
        ["faults", "show", deployment.folder, faults],
    ):
        done = run(*words)
        assert (done.exit_code, done.output.count("\n")) == (1, 1)
        assert "conductances.safetensors: sha256" in done.output
    assert not {"chip", "drawn.csv"} & {path.name for path in tmp_path.iterdir()}


def test_places_and_images_that_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    one, two = map_file(deployment, tmp_path / "one.csv"), map_file(deployment, tmp_path / "two.safetensors", chips=2)
    call = ["program", deployment.folder, "-q", "--fault-map"]
    assert run(*call, one, "-o", tmp_path / "chip").exit_code == 0
    before = folder_bytes(tmp_path / "chip")
    done = run(*call, two, "-o", tmp_path / "chip")
    assert done.exit_code == 1
    assert f"two-0: lies in the deployment '{tmp_path / 'chip'}', which holds its own files only" in done.output
    assert folder_bytes(tmp_path / "chip") == before
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    done = run(*call, one, "-o", tmp_path / "loop")
    assert done.exit_code == 1
    assert "loop: a link that leads back to itself; name another place" in done.output
    done = run(*call, one, "-o", tmp_path / "other", "--preprocess", "raw")
    assert done.exit_code == 2
    assert "--preprocess: no effect without --calibration" in done.output
    done = run(*call, one, "-o", tmp_path / "other", "--batch", 4)
    assert done.exit_code == 2
    assert "--batch: no effect without --calibration" in done.output
    done = run(*call, one, "-o", tmp_path / "other", "--calibration", "foo:x")
    assert "--calibration: unknown adapter 'foo'" in done.output
    inputs = open_declared(deployment.model_path).get_inputs()
    np.savez(tmp_path / "nan.npz", **{i.name: np.full((2, *i.shape[1:]), np.nan, np.float32) for i in inputs})
    done = run(*call, one, "-o", tmp_path / "other", "--calibration", f"npz:{tmp_path / 'nan.npz'}")
    assert done.exit_code == 1
    assert "nothing to learn for any layer: its inputs are not finite, or too large to be squared" in done.output
    assert not (tmp_path / "other").exists()


def test_weights_that_are_too_large(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,3] y) { y = MatMul (x, W) }'
    model = parse_model(text, W=np.full((4, 3), 1e30, np.float32))
    deployment = compile_model(model, out=tmp_path / "out")
    faults = map_file(deployment, tmp_path / "map.csv")
    done = run("program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", "-q")
    assert done.exit_code == 1
    assert "weights of layer 'W' are too large to be squared" in done.output


@pytest.mark.parametrize("mapping", ["differential", "offset"])
def test_what_stays_wrong_is_what_the_chip_reads(mapping: str, small_model_file: Path, tmp_path: Path) -> None:
    """Behind changed gains, too."""
    compiled = compile_model(small_model_file, out=tmp_path / "out", mapping=mapping)
    source = ChipSource(
        path=map_file(compiled, tmp_path / "map.csv", rate=0.2), number=0, faults=drawn(compiled, 0.2)[0]
    )
    chip = program_chip(compiled, source, tmp_path / "chip", steps=("compensate", "gain"))
    assert chip.plan.chip is not None
    assert any(not np.array_equal(chip.gain(layer), compiled.gain(layer)) for layer in chip.plan.layers)
    read = {}
    for found in Injector(chip).faults(source.faults):
        read |= {(found.layer, int(i)): float(v) for i, v in zip(found.index, found.value, strict=True)}
    assert len(chip.plan.chip.unrepaired) > 20
    for weight in chip.plan.chip.unrepaired:
        index = weight.output * chip.plan.layers[weight.layer].inputs + weight.input
        assert weight.found == pytest.approx(read[weight.layer, index])


def test_of_a_pair_that_is_cut_off_the_failed_cell_is_named(small_model_file: Path, tmp_path: Path) -> None:
    target = Target.load("paper", {"failed_cells.response": "isolated_pair"})
    compiled = compile_model(small_model_file, out=tmp_path / "out", target=target)
    partition = compiled.plan.arrays[0].partitions[0]
    column = partition.column + 1
    (tmp_path / "map.csv").write_text(f"array,row,column,state\n0,{partition.row},{column},stuck_on\n")
    (faults,) = read_fault_maps(tmp_path / "map.csv", compiled)
    source = ChipSource(path=tmp_path / "map.csv", number=0, faults=faults)
    chip = program_chip(compiled, source, tmp_path / "chip", steps=("compensate",)).plan.chip
    assert chip is not None
    (weight,) = chip.unrepaired
    assert (weight.array, weight.row, weight.column) == (0, partition.row, column)


def test_nothing_joins_directions_that_take_turns(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    text = '(float[5,2,6] x) => (float[5,2,2,4] y) { y = LSTM <hidden_size=4,direction="bidirectional"> (x, W, R) }'
    rng = np.random.default_rng(0)
    weights = {"W": rng.standard_normal((2, 16, 6), np.float32), "R": rng.standard_normal((2, 16, 4), np.float32)}
    model = parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}', **weights)
    compiled = compile_model(model, out=tmp_path / "out")
    source = ChipSource(path=map_file(compiled, tmp_path / "map.csv"), number=0, faults=drawn(compiled)[0])
    assert any((~stuck.at_home).any() for stuck in Injector(compiled).stuck(source.faults))
    chip = program_chip(compiled, source, tmp_path / "chip", steps=("compensate",)).plan.chip
    assert chip is not None
    assert [layer.beside for layer in chip.layers] == [0, 0]


def test_verify_sees_another_map_and_other_flips(deployment: Deployment, tmp_path: Path) -> None:
    faults = map_file(deployment, tmp_path / "map.csv")
    run("program", deployment.folder, "--fault-map", faults, "-o", tmp_path / "chip", "-q")
    chip = load_deployment(tmp_path / "chip")
    path = chip.folder / "faults.safetensors"
    path.unlink()
    write_fault_maps(path, drawn(deployment, rate=0.01), chip)
    record = FileRecord(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
    plan = msgspec.structs.replace(chip.plan, files={**chip.plan.files, path.name: record})
    (chip.folder / "plan.json").write_bytes(encode_plan(plan))
    with pytest.raises(PlanFormatError, match=r"expected one chip with .* cells stuck off"):
        verify_deployment(chip.folder)

    arrays = [
        msgspec.structs.replace(
            plan.arrays[0], partitions=[msgspec.structs.replace(plan.arrays[0].partitions[0], flipped=[1, 1])]
        ),
        *plan.arrays[1:],
    ]
    (chip.folder / "plan.json").write_bytes(encode_plan(msgspec.structs.replace(plan, arrays=arrays)))
    assert read_plan(chip.folder / "plan.json").arrays[0].partitions[0].flipped == [1, 1]
    with pytest.raises(PlanFormatError, match=r"flipped \[1, 1\], expected some of 0 to .*, ascending, each once"):
        verify_deployment(chip.folder)


def test_what_a_chip_adds_up_to_is_counted_again(deployment: Deployment, tmp_path: Path) -> None:
    source = ChipSource(path=tmp_path / "map.safetensors", number=0, faults=drawn(deployment, rate=0.1)[0])
    write_fault_maps(source.path, [source.faults], deployment)
    plan = program_chip(deployment, source, tmp_path / "chip", steps=("compensate", "flip")).plan
    assert plan.chip is not None
    assert plan.chip.steps[-1].flipped > 0
    last = msgspec.structs.replace(plan.chip.steps[-1], flipped=plan.chip.steps[-1].flipped + 1)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"unrepaired_total": plan.chip.unrepaired_total + 1}, r"\$.chip.unrepaired_total: \d+, expected \d+"),
        ({"steps": [*plan.chip.steps[:-1], last]}, r"\$.chip.steps\[-1:\].flipped: \[\d+\], expected \[\d+\]"),
        ({"steps": []}, r"\$.chip.steps\[-1:\].flipped: \[\], expected \[\d+\]"),
    )
    for change, message in changes:
        changed = msgspec.structs.replace(plan, chip=msgspec.structs.replace(plan.chip, **change))
        (tmp_path / "chip" / "plan.json").write_bytes(encode_plan(changed))
        with pytest.raises(PlanFormatError, match=message):
            verify_deployment(tmp_path / "chip")


def test_repair_minimises_the_energy() -> None:
    """Against a dense solve of every output's own system; what may not move does not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, 24)).astype(np.float32) @ rng.standard_normal((24, 24)).astype(np.float32)
    moments = (x.transpose(0, 2, 1) @ x / 40).astype(np.float32)
    free = rng.random((2, 6, 24)) < 0.7
    errors = np.where(free, 0, rng.standard_normal((2, 6, 24))).astype(np.float32)
    moved = repair_errors(errors, free, moments)
    assert not moved[~free].any()
    found = output_energies(errors + moved, moments)
    for g, o in np.ndindex(2, 6):
        r = free[g, o]
        best = errors[g, o].astype(np.float64)
        best[r] = -np.linalg.solve(moments[g][np.ix_(r, r)].astype(np.float64), (moments[g] @ errors[g, o])[r])
        least = best @ moments[g] @ best
        assert least <= found[g, o] * (1 + 1e-4)
        assert found[g, o] <= 1.1 * least + 0.01 * float(errors[g, o] @ moments[g] @ errors[g, o])


def correlated(inputs: int) -> np.ndarray:
    """Second moments [1, inputs, inputs] of inputs that go together, as those of images do; generated ones do not."""
    mixing = np.random.default_rng(5).standard_normal((inputs, inputs // 3))
    return (mixing @ mixing.T + 0.01 * np.eye(inputs))[None].astype(np.float32)


@pytest.mark.parametrize("levels", [None, 16])
def test_no_step_raises_the_objective_of_an_output(small_model_file: Path, tmp_path: Path, levels: int | None) -> None:
    cell = {"g_off": 1e-6, "g_on": 1e-4, "levels": levels}
    target = Target.from_dict({"name": "small", "rows": 32, "columns": 32, "cell": cell})
    deployment = compile_model(small_model_file, out=tmp_path / "out", target=target)
    data = open_dataset("generated", open_declared(deployment.model_path), Preprocessing(), generate=64)
    calibration = calibrate(deployment, data, 64)
    assert sorted(calibration.moments) == [0, 1]
    stuck = Injector(deployment).stuck(drawn(deployment, 0.1)[0])
    for number, layer in enumerate(deployment.plan.layers):
        moments = correlated(layer.inputs)
        program = LayerProgram(deployment, number, stuck[number], moments)
        wanted = deployment.weights(layer)

        def energies(
            program: LayerProgram = program, wanted: np.ndarray = wanted, moments: np.ndarray = moments
        ) -> np.ndarray:
            return output_energies((program.weights() - wanted)[None], moments)[0]

        program.step("compensate")
        program.step("flip")
        before = energies()
        program.step("repair")
        middle = energies()
        program.step("gain")
        assert (middle <= before * (1 + 1e-6)).all()
        assert (energies() <= middle * (1 + 1e-6)).all()
        if levels is None:
            assert middle.sum() < 0.5 * before.sum()
        coding = layer_coding(deployment.target, layer)
        assert program.cells.dtype == coding.dtype
    done = program_chip(
        deployment,
        ChipSource(path=tmp_path / "out" / "plan.json", number=0, faults=drawn(deployment, 0.1)[0]),
        tmp_path / "chip",
        steps=("compensate", "flip", "repair", "gain"),
        calibration=calibration,
    )
    verify_deployment(done.folder)


@pytest.mark.parametrize("steps", [("compensate", "bias"), ("compensate", "gain", "bias")])
def test_biases_make_the_means_right(steps: tuple[str, ...], small_model_file: Path, tmp_path: Path) -> None:
    """Against the inputs themselves: means are those of the compiled weights, and the energy is what is left then."""
    deployment = compile_model(small_model_file, out=tmp_path / "out")
    stuck = Injector(deployment).stuck(drawn(deployment, 0.1)[0])
    layer = deployment.plan.layers[1]
    x = np.random.default_rng(2).uniform(0, 1, (500, layer.inputs)).astype(np.float32)
    moments, mean = (x.T @ x / len(x))[None], x.mean(axis=0)[None]
    program = LayerProgram(deployment, 1, stuck[1], moments, mean=mean)
    for step in steps:
        program.step(step)
    wanted = x @ deployment.weights(layer).T
    found = x @ program.weights().T + program.shift
    np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), rtol=1e-4, atol=1e-4)
    left, before = np.square(found - wanted).mean(axis=0).sum(), np.square(wanted).mean(axis=0).sum()
    assert program.errors[-1] == pytest.approx(left / before, rel=1e-3)
    assert program.errors[-1] < 0.7 * program.errors[-2]
    if "gain" in steps:  # no gain beside the one found is better
        for factor in (0.99, 1.01):
            other = x @ (program.weights() * factor).T
            other += (wanted - other).mean(axis=0)
            assert (np.square(other - wanted).mean(axis=0) >= np.square(found - wanted).mean(axis=0) * (1 - 1e-4)).all()


def test_no_energy_is_negative_where_a_shift_makes_all_good(small_model_file: Path, tmp_path: Path) -> None:
    """Inputs that are the same in all images: what float32 makes of their square is not the square of their mean."""
    deployment = compile_model(small_model_file, out=tmp_path / "out")
    stuck = Injector(deployment).stuck(drawn(deployment, 0.1)[0])
    layer = deployment.plan.layers[1]
    for seed in range(5):
        mean = np.random.default_rng(seed).uniform(0.1, 1, (1, layer.inputs)).astype(np.float32)
        program = LayerProgram(deployment, 1, stuck[1], mean[:, :, None] * mean[:, None, :], mean=mean)
        program.step("bias")
        assert 0 <= program.errors[1] < 1e-6 * program.errors[0]
        assert program.errors[1] < program.errors[0]


def test_a_chip_with_other_stuck_cells_is_another_experiment(deployment: Deployment, tmp_path: Path) -> None:
    """Cells stuck further and further outside of their range: what is programmed is the same, what is read is not."""
    stuck, path = drawn(deployment)[0], tmp_path / "map.safetensors"
    on, done, cells = stuck.state == STATES["stuck_on"], [], []
    for factor in (3, 4):
        conductance = np.where(on, stuck.conductance * np.float32(factor), stuck.conductance)
        write_fault_maps(path, [replace(stuck, conductance=conductance)], deployment)
        words = ("program", deployment.folder, "--fault-map", path, "--steps", "compensate", "-o", tmp_path / "c", "-q")
        assert run(*words).exit_code == 0
        cells.append((tmp_path / "c" / "conductances.safetensors").read_bytes())
        done.append(run("validate", tmp_path / "c", "-o", tmp_path / "r", "-q", "--images", 8))
    assert cells[0] == cells[1]
    assert done[0].exit_code == 0, done[0].output
    assert "journal of another run: faults was" in done[1].output


def test_biases_of_the_deployed_model_are_shifted(deployment: Deployment, tmp_path: Path) -> None:
    """That of the Gemm; the convolution has none. The plan says so, and one that says something else is refused."""
    faults = map_file(deployment, tmp_path / "map.csv")
    call = ["program", deployment.folder, "--fault-map", faults, "--calibration", "generated", "--images", 16, "-q"]
    assert run(*call, "-o", tmp_path / "plain", "--steps", "compensate,flip,repair,gain").exit_code == 0
    done = run(*call, "-o", tmp_path / "chip")
    assert done.exit_code == 0, done.output
    assert "biases" in done.output
    chip, plain = load_deployment(tmp_path / "chip"), load_deployment(tmp_path / "plain")
    assert (plain.folder / "deployed.onnx").read_bytes() == (deployment.folder / "deployed.onnx").read_bytes()
    assert chip.plan.chip is not None
    assert plain.plan.chip is not None
    assert [layer.bias for layer in plain.plan.chip.layers] == [None, None]
    assert [layer.bias for layer in chip.plan.chip.layers] == [None, "fc_bias"]

    def biases(of: Deployment) -> np.ndarray:
        model = onnx.load(of.model_path, load_external_data=False)
        return onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "fc_bias"))

    shift = np.array(chip.plan.chip.layers[1].shift)
    np.testing.assert_allclose(biases(chip) - biases(deployment), shift, rtol=1e-3, atol=1e-6)
    assert shift.any()
    verify_deployment(chip.folder)

    for change, message in (
        ({"shift": [0.5]}, r"layers\[1\].shift: 1 numbers, expected 10"),
        (
            {"bias": "nowhere"},
            r"'nowhere', expected an initializer of deployed.onnx with 10 numbers that one node reads",
        ),
    ):
        layers = [chip.plan.chip.layers[0], msgspec.structs.replace(chip.plan.chip.layers[1], **change)]
        plan = msgspec.structs.replace(chip.plan, chip=msgspec.structs.replace(chip.plan.chip, layers=layers))
        (chip.folder / "plan.json").write_bytes(encode_plan(plan))
        with pytest.raises(PlanFormatError, match=message):
            verify_deployment(chip.folder)
    more = msgspec.structs.replace(chip.plan.chip, layers=[*chip.plan.chip.layers, chip.plan.chip.layers[0]])
    (chip.folder / "plan.json").write_bytes(encode_plan(msgspec.structs.replace(chip.plan, chip=more)))
    with pytest.raises(PlanFormatError, match=r"chip.layers: 3, expected one for each of the 2 layers"):
        verify_deployment(chip.folder)


def test_a_bias_of_two_layers_is_left_alone(parse_model: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        shared (float[N, 6] x) => (float[N, 6] z) {
            y = Gemm (x, first, both)
            z = Gemm <alpha = 0.5> (y, second, both)
        }
        """,
        first=rng.standard_normal((6, 6), dtype=np.float32),
        second=rng.standard_normal((6, 6), dtype=np.float32),
        both=rng.standard_normal(6, dtype=np.float32),
    )
    deployment = compile_model(model, out=tmp_path / "out")
    data = open_dataset("generated", open_declared(deployment.model_path), Preprocessing(), generate=8)
    calibration = calibrate(deployment, data, 8)
    assert sorted(calibration.moments) == [0, 1]
    assert not calibration.biases


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_leaks_between_groups_is_in_the_errors(
    calibrated: bool, parse_model: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    """Two groups on twin arrays, with a gain a partition: a cell that joins them, by hand."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 1, 1), np.float32)
    text = "agraph (float[N, 6, 2, 2] x) => (float[N, 4, 2, 2] y) { y = Conv <group: int = 2> (x, W) }"
    target = Target.from_dict(
        {"name": "t", "rows": 8, "columns": 8, "pair_layout": "twin", "cell": {"g_off": 1e-6, "g_on": 1e-4}}
    )
    deployment = compile_model(
        parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}', W=weight),
        out=tmp_path / "out",
        target=target,
        mapping="two_column",
        scale="partition",
    )
    (tmp_path / "map.csv").write_text("array,row,column,state\n0,0,2,stuck_on\n")
    words = ["program", deployment.folder, "--fault-map", tmp_path / "map.csv", "-o", tmp_path / "chip", "-q"]
    words += ["--calibration", "generated", "--images", "8", "--steps", "compensate,flip"] if calibrated else []
    done = run(*words)
    assert done.exit_code == 0, done.output
    chip = load_deployment(tmp_path / "chip").plan.chip
    assert chip is not None
    layer = deployment.plan.layers[0]
    (leaks,) = (f.leaks for f in Injector(deployment).faults(read_fault_maps(tmp_path / "map.csv", deployment)[0]))
    assert leaks is not None
    power, wanted = np.ones((2, 3)), deployment.weights(layer).astype(np.float64).reshape(2, 2, 3)
    moments = np.broadcast_to(np.eye(3), (2, 3, 3))
    if calibrated:
        data = open_dataset("generated", open_declared(deployment.model_path), Preprocessing(), generate=8)
        moments = calibrate(deployment, data, 8).moments[0].astype(np.float64)
        power = np.einsum("gii->gi", moments)
    energy = np.einsum("goi,gij,goj->", wanted, moments, wanted)
    leaked = np.sum(np.square(leaks.value.astype(np.float64)) * power.reshape(-1)[leaks.in_row]) / energy
    assert leaked > 0.001
    assert chip.layers[0].errors == pytest.approx([leaked] * len(chip.steps), rel=1e-4)
    assert chip.layers[0].beside == 1
    assert "1 cells stuck that join blocks; no step makes up for what leaks" in " ".join(done.output.split())
    verify_deployment(tmp_path / "chip")


def test_a_chip_without_faults_is_what_was_compiled(deployment: Deployment, tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("array,row,column,state\n")
    done = run("program", deployment.folder, "--fault-map", tmp_path / "none.csv", "-o", tmp_path / "chip", "-q")
    assert done.exit_code == 0, done.output
    same = ("conductances.safetensors", "deployed.onnx")
    assert all((tmp_path / "chip" / n).read_bytes() == (deployment.folder / n).read_bytes() for n in same)
    assert len(read_fault_maps(tmp_path / "chip" / "faults.safetensors", load_deployment(tmp_path / "chip"))[0]) == 0


def test_the_best_columns_leave_less_error(small_model_file: Path, tmp_path: Path) -> None:
    """Before `flip` and after it; a chip so assigned is read as the arrays have it, each output once."""
    target = Target.from_dict({"name": "s", "rows": 16, "columns": 16, "cell": {"g_off": 1e-6, "g_on": 1e-4}})
    deployment = compile_model(small_model_file, out=tmp_path / "out", target=target)
    source = ChipSource(path=tmp_path / "out" / "plan.json", number=0, faults=drawn(deployment, 0.1)[0])
    steps = {"plain": ("compensate", "flip"), "assigned": ("compensate", "assign", "flip")}
    chips = {
        name: program_chip(deployment, source, tmp_path / name, steps=some).plan.chip for name, some in steps.items()
    }
    assert chips["plain"] is not None
    assert chips["assigned"] is not None
    for plain, assigned in zip(chips["plain"].layers, chips["assigned"].layers, strict=True):
        assert assigned.errors[-1] < 0.8 * plain.errors[-1]
    orders = [p.output_index for a in load_deployment(tmp_path / "assigned").plan.arrays for p in a.partitions]
    assert any(order is not None and order != sorted(order) for order in orders)
    verify_deployment(tmp_path / "assigned")
