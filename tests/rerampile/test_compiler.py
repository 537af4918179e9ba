"""The pipeline around the passes: the output folder, what a failure leaves behind, and that bytes repeat."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from rerampile import PASSES, ConfigError, FaultRunError, InternalError, compile_model, load_deployment
from rerampile.unit import Pass, Unit


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Fails:
    """A pass that raises, once files were written."""

    error: BaseException
    name: str = "fails"

    def run(self, unit: Unit) -> Unit:
        (unit.folder / "half").write_text("written")
        raise self.error

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        return {}


def failing_after(count: int, error: BaseException) -> tuple[Pass, ...]:
    return (*PASSES[:count], Fails(error))


# The output folder


def test_a_new_folder_and_the_folders_above_it(small_model_file: Path, tmp_path: Path) -> None:
    deployment = compile_model(small_model_file, out=tmp_path / "a" / "b" / "out")
    assert sorted(path.name for path in deployment.folder.iterdir()) == sorted(["plan.json", *deployment.plan.files])
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_an_earlier_deployment_is_replaced(small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model_file, out=out, prune=0.5)
    again = compile_model(small_model_file, out=out, keep_stages=True)
    assert not (out / "masks.safetensors").exists()
    assert again.plan.totals.zeros == 0
    compile_model(small_model_file, out=out)
    assert not (out / "stages").exists()


def test_a_damaged_deployment_is_replaced(small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model_file, out=out)
    os.truncate(out / "plan.json", 1000)
    compile_model(small_model_file, out=out)
    load_deployment(out)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_earlier_deployment_with_files_of_the_user(damaged: bool, small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model_file, out=out)
    (out / "notes.txt").write_text("mine")
    if damaged:
        os.truncate(out / "plan.json", 1000)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"holds 'notes.txt' beside an earlier deployment, which would be lost"):
        compile_model(small_model_file, out=out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "1-notes.json", "folder", "link.json"])
def test_files_of_the_user_among_the_stages(name: str, small_model_file: Path, tmp_path: Path) -> None:
    stages = tmp_path / "out" / "stages"
    compile_model(small_model_file, out=tmp_path / "out", keep_stages=True)
    if name == "folder":
        (stages / name).mkdir()
        (stages / name / "1-find-layers.json").write_text("mine")
    elif name == "link.json":
        (stages / name).symlink_to("1-find-layers.json")
    else:
        (stages / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"out: holds 'stages/{name}' beside an earlier deployment"):
        compile_model(small_model_file, out=tmp_path / "out")
    assert contents(tmp_path) == before
    assert (stages / name).is_symlink() or (stages / name).exists()


def test_stages_of_a_pass_of_the_users_own_are_ours(small_model_file: Path, tmp_path: Path) -> None:
    passes = (PASSES[0], replace(PASSES[1], name="my own pruner"), *PASSES[2:])
    compile_model(small_model_file, out=tmp_path / "out", keep_stages=True, passes=passes)
    compile_model(small_model_file, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["deployed.onnx", "plan.json", "stages"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_only_has_the_name_of_our_files(name: str, kind: str, small_model_file: Path, tmp_path: Path) -> None:
    """A folder or a link of the user's is nothing that we wrote."""
    out = tmp_path / "out"
    compile_model(small_model_file, out=out)
    mine = tmp_path / "mine"
    if kind == "link":
        mine.mkdir() if name == "stages" else (out / name).rename(mine)
        (out / name).symlink_to(mine)
    elif name == "stages":
        (out / name).write_text("mine")  # where ours is a folder
    else:
        (out / name).unlink()
        (out / name).mkdir()
        (out / name / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"holds '.*' beside an earlier deployment|holds something else"):
        compile_model(small_model_file, out=out)
    assert contents(tmp_path) == before


def test_the_model_in_the_folder_that_would_be_replaced(small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model_file, out=out)
    (tmp_path / "linked").symlink_to("out")
    before = contents(tmp_path)
    for model in (out / "deployed.onnx", tmp_path / "linked" / "deployed.onnx"):
        with pytest.raises(ConfigError, match=r"deployed.onnx: lies in '.*out', which would be replaced; name another"):
            compile_model(model, out=out)
    assert contents(tmp_path) == before
    compile_model(out / "deployed.onnx", out=tmp_path / "elsewhere")


@pytest.mark.parametrize("option", ["masks", "inputs"])
def test_what_is_read_in_the_folder_that_would_be_replaced(option: str, small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model_file, out=out, prune=0.5)
    before = contents(out)
    path = out / ("masks.safetensors" if option == "masks" else "verification.safetensors")
    with pytest.raises(ConfigError, match=rf"{path.name}: lies in '.*out', which would be replaced"):
        compile_model(small_model_file, out=out, **{option: path})
    assert contents(out) == before


def test_external_data_in_the_folder_that_would_be_replaced(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_model(small_model, out=out)
    model = onnx.ModelProto()
    model.CopyFrom(small_model)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (out / "masks.safetensors").write_bytes((tmp_path / "w.bin").read_bytes())
    data = (tmp_path / "m.onnx").read_bytes()
    external = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in external.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "out/masks.safetensors"
    onnx.save(external, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() != data
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"masks.safetensors: lies in '.*out', which would be replaced"):
        compile_model(tmp_path / "m.onnx", out=out)
    assert contents(tmp_path) == before


def test_a_folder_that_holds_something_else(small_model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds something else than a deployment, expected a new or empty folder"):
        compile_model(small_model_file, out=tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_plan_of_somebody_else(small_model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text('{"holiday": "Norway"}')
    with pytest.raises(ConfigError, match="holds something else"):
        compile_model(small_model_file, out=tmp_path / "out")


def test_a_file_in_the_way(small_model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="out: a file, expected a folder to write the deployment into"):
        compile_model(small_model_file, out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"below: cannot be written: (Not a directory|File exists)"):
        compile_model(small_model_file, out=tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_to_a_folder(small_model_file: Path, tmp_path: Path) -> None:
    """What it points to is replaced; the link stays."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        compile_model(small_model_file, out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "small.onnx"]
    load_deployment(tmp_path / "real")


def test_the_current_folder(small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model(small_model_file, out=tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ConfigError, match="the current folder or one around it"):
        compile_model(small_model_file, out=".")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(small_model_file: Path, tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        compile_model(small_model_file, out=parent / "out")


def test_a_file_system_that_is_read_only(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="cannot be written: Read-only file system"):
        compile_model(small_model_file, out=tmp_path / "out")


# Failures


@pytest.mark.parametrize("count", range(len(PASSES) + 1))
@pytest.mark.parametrize(
    "error", [FaultRunError("why"), InternalError("bug"), KeyboardInterrupt(), MemoryError(), ZeroDivisionError()]
)
def test_nothing_is_left_behind(count: int, error: BaseException, small_model_file: Path, tmp_path: Path) -> None:
    """Whatever a pass raises comes out as it is; neither files of ours nor changes to the user's stay."""
    before = contents(tmp_path)
    with pytest.raises(type(error)) as caught:
        compile_model(small_model_file, out=tmp_path / "a" / "out", prune=0.5, passes=failing_after(count, error))
    assert caught.value is error
    assert contents(tmp_path) == before
    assert not (tmp_path / "a").exists()


def test_the_earlier_deployment_survives_a_failure(small_model_file: Path, tmp_path: Path) -> None:
    compile_model(small_model_file, out=tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(FaultRunError):
        compile_model(small_model_file, out=tmp_path / "out", passes=failing_after(5, FaultRunError("why")))
    assert contents(tmp_path) == before


def test_the_earlier_deployment_survives_a_failed_rename(
    small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_model(small_model_file, out=tmp_path / "out")
    before = contents(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConfigError, match="Input/output error"):
        compile_model(small_model_file, out=tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("module", ["rerampile.tensor_file", "rerampile.runtime.verify", "rerampile.passes.emit"])
def test_no_space_left(module: str, small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk fills up: one line, and the space is given back."""
    before = contents(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: Any, **__: Any) -> None:
        raise full

    names = {
        "rerampile.tensor_file": "TensorWriter.write",
        "rerampile.runtime.verify": "encode_plan",
        "rerampile.passes.emit": "deployed_model",
    }
    monkeypatch.setattr(f"{module}.{names[module]}", refuse)
    with pytest.raises(
        ConfigError, match=r"No space left on device; '.*out' was not written, and nothing was left"
    ) as e:
        compile_model(small_model_file, out=tmp_path / "out")
    assert e.value.__cause__ is full
    assert contents(tmp_path) == before


def test_the_model_is_never_written_to(small_model_file: Path, small_model: onnx.ModelProto, tmp_path: Path) -> None:
    small_model_file.chmod(0o400)
    data, given = small_model_file.read_bytes(), small_model.SerializeToString()
    compile_model(small_model_file, out=tmp_path / "1", prune=0.5)
    compile_model(small_model, out=tmp_path / "2", prune=0.5)
    assert small_model_file.read_bytes() == data
    assert small_model.SerializeToString() == given


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "diferential"}, r"mapping 'diferential': no such scheme \(did you mean differential\?\)"),
        ({"scale": "row"}, "scale 'row': expected tensor, channel or partition"),
        ({"target": "papper"}, r"unknown target 'papper' \(did you mean paper\?\)"),
        ({"target": "missing.toml"}, "missing.toml: no such target file"),
        ({"prune": "0.5"}, r"prune '0.5': expected a number from 0 up to 1"),
        ({"prune": {"8": "half"}}, r"prune 8='half': expected a number from 0 up to 1"),
        ({"passes": ()}, "passes none: wrote no verified plan, expected 'emit' and 'verify' last, as in PASSES"),
        ({"passes": PASSES[:2]}, "passes find layers, prune: wrote no verified plan"),
        ({"passes": PASSES[:5]}, "passes find layers, prune, map, allocate, emit: wrote no verified plan"),
        ({"seed": -1}, "seed -1: expected 0 or more"),
        ({"tolerance": float("nan")}, "tolerance nan: expected 0 or more"),
        ({"tolerance": -1.0}, "tolerance -1: expected 0 or more"),
    ],
)
def test_options_that_do_not_exist(
    options: dict[str, Any], message: str, small_model_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_model(small_model_file, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_above_tolerance_is_a_failure(small_model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FaultRunError, match=r"output 'scores' of the deployed model is .*, expected at most 1e-30"):
        compile_model(small_model_file, out=tmp_path / "out", tolerance=1e-30)
    assert not (tmp_path / "out").exists()


def test_progress_names_every_pass(small_model_file: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str, bool]] = []

    def progress(number: int, count: int, name: str, seconds: float | None, summary: Mapping[str, Any]) -> None:
        assert seconds is None or (seconds >= 0 and summary)
        seen.append((number, count, name, seconds is None))

    compile_model(small_model_file, out=tmp_path / "out", progress=progress)
    names = ["find layers", "prune", "map", "allocate", "emit", "verify"]
    assert seen == [(n, 6, name, start) for n, name in enumerate(names, 1) for start in (True, False)]


def test_stages_are_kept(small_model_file: Path, tmp_path: Path) -> None:
    deployment = compile_model(small_model_file, out=tmp_path / "out", keep_stages=True, prune=0.5)
    stages = sorted((deployment.folder / "stages").iterdir())
    assert [path.name for path in stages] == [
        "1-find-layers.json",
        "2-prune.json",
        "3-map.json",
        "4-allocate.json",
        "5-emit.json",
        "6-verify.json",
    ]
    records = [json.loads(path.read_text()) for path in stages]
    assert [record["layers"][1]["kept"] for record in records] == [None, 640, 640, 640, 640, 640]
    assert [len(record["arrays"]) for record in records] == [0, 0, 0, *[len(deployment.plan.arrays)] * 3]


# Bytes


SCRIPT = """
import sys, rerampile
rerampile.compile_model(sys.argv[1], out=sys.argv[2], prune={"8": 0.25, "fc_*": 0.75}, pack=True)
"""


def test_same_bytes(small_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, from elsewhere, with another hash seed, with the keys of what does not overlap in another order."""
    options: dict[str, Any] = {"prune": {"8": 0.25, "fc_*": 0.75}, "pack": True}
    first = contents(compile_model(small_model_file, out=tmp_path / "1", **options).folder)

    monkeypatch.chdir(tmp_path)
    assert contents(compile_model("small.onnx", out="2", **options).folder) == first

    for seed in ("1", "2"):
        folder = tmp_path / f"seed{seed}"
        command = [sys.executable, "-c", SCRIPT, str(small_model_file), str(folder)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, cwd="/")
        assert contents(folder) == first

    options["prune"] = dict(reversed(options["prune"].items()))
    shuffled = contents(compile_model(small_model_file, out=tmp_path / "3", **options).folder)
    assert {**shuffled, "plan.json": ""} == {**first, "plan.json": ""}  # the plan repeats the options as given


@pytest.mark.parametrize("change", [{"mapping": "balanced"}, {"prune": 0.5}, {"scale": "tensor"}])
def test_other_options_give_other_bytes(change: dict[str, Any], small_model_file: Path, tmp_path: Path) -> None:
    first = contents(compile_model(small_model_file, out=tmp_path / "1").folder)
    assert contents(compile_model(small_model_file, out=tmp_path / "2", **change).folder) != first


def test_a_pass_of_your_own(small_model_file: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Count:
        name: str = "count"

        def run(self, unit: Unit) -> Unit:
            seen.append(len(unit.layers))
            return unit

        def summary(self, unit: Unit) -> Mapping[str, Any]:
            return {"layers": len(unit.layers)}

    first, *rest = PASSES
    compile_model(small_model_file, out=tmp_path / "out", passes=(Count(), first, Count(), *rest))
    assert seen == [0, 2]


def test_what_the_user_puts_there_meanwhile_stays(small_model: onnx.ModelProto, tmp_path: Path) -> None:
    """The folder is looked at when the compilation starts and again when it would be replaced."""

    def progress(number: int, count: int, name: str, seconds: float | None, summary: Mapping[str, Any]) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "thesis.txt").write_text("precious")

    with pytest.raises(ConfigError, match="holds something else than a deployment"):
        compile_model(small_model, out=tmp_path / "out", progress=progress)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/thesis.txt"]
