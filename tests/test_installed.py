"""The installed package does its work without the checkout; `make wheel-test` runs this beside nothing but a wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import rerampile
import rerampile.passes
import rerampile.runtime

COMMAND = Path(sysconfig.get_path("scripts")) / "rerampile"

needs_wheel = pytest.mark.skipif(
    "RERAMPILE_TEST_WHEEL" not in os.environ, reason="only `make wheel-test` installs a wheel"
)


@needs_wheel
def test_it_is_the_wheel_that_is_tested() -> None:
    installed = Path(sysconfig.get_path("purelib")) / "rerampile"
    assert [Path(module.__file__ or "").parent for module in (rerampile, rerampile.passes, rerampile.runtime)] == [
        installed,
        installed / "passes",
        installed / "runtime",
    ]


@needs_wheel
def test_only_one_name_is_taken() -> None:
    names = {path.parts[0] for path in importlib.metadata.files("rerampile") or [] if path.parts[0] != ".."}
    assert {name for name in names if not name.endswith(".dist-info")} == {"rerampile"}


def test_the_data_files_are_there() -> None:
    package = files("rerampile")
    assert (package / "py.typed").is_file()
    assert json.loads((package / "plan.schema.json").read_text())["$schema"].startswith("https://json-schema.org/")
    assert tomllib.loads((package / "targets" / "paper.toml").read_text())


def test_the_command_works_from_end_to_end(small_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run("compile", small_model_file, "--mapping", "differential", "-o", out)
    assert {"plan.json", "conductances.safetensors", "deployed.onnx"} <= {path.name for path in out.iterdir()}
    _run("verify", out)
    assert _run("show", out / "plan.json")


def test_the_api_works_from_end_to_end(small_model_file: Path, tmp_path: Path) -> None:
    rerampile.compile_model(small_model_file, out=tmp_path / "out")
    plan = rerampile.load_deployment(tmp_path / "out").plan
    assert len(plan.layers) == 2


def test_the_module_is_the_command() -> None:
    shown = [_run_raw(*command, "--version") for command in ([COMMAND], [sys.executable, "-m", "rerampile"])]
    assert all(importlib.metadata.version("rerampile") in line for line in shown)


def _run(*args: object) -> str:
    return _run_raw(COMMAND, *args)


def _run_raw(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
