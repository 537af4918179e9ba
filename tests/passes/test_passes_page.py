"""The page on passes tells the truth: its table, its protocol and its example."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import rerampile


@pytest.fixture(scope="module")
def page(project_root: Path) -> str:
    return (project_root / "docs" / "passes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_table_lists_the_passes_in_order(page: str, project_root: Path) -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| `([\w/.]+)`", page, re.MULTILINE)
    assert [name for name, _ in rows] == [step.name for step in rerampile.PASSES]
    homes = [Path(inspect.getfile(type(step))).name for step in rerampile.PASSES]
    assert [Path(file).name for _, file in rows] == homes
    assert all((project_root / file).is_file() for _, file in rows)


def test_the_protocol_is_the_real_one(blocks: list[str]) -> None:
    shown: dict[str, Any] = {}
    exec(blocks[0], shown)
    real = {name for name in vars(rerampile.Pass) if not name.startswith("_")}
    assert {*shown["Pass"].__annotations__, "run", "summary"} == real
    for name in ("run", "summary"):
        parameters = inspect.signature(getattr(rerampile.Pass, name)).parameters
        assert list(inspect.signature(getattr(shown["Pass"], name)).parameters) == list(parameters)


def test_the_example_saves_arrays(
    blocks: list[str],
    parse_model: Callable[..., onnx.ModelProto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A matrix of 300 inputs needs three arrays of 128 rows, half of it two."""
    weights = np.random.default_rng(5).standard_normal((300, 8)).astype(np.float32)
    text = '<ir_version: 8, opset_import: ["" : 17]> wide (float[N, 300] x) => (float[N, 8] y) { y = MatMul (x, W) }'
    wide = parse_model(text, W=weights)
    onnx.save(wide, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    exec(compile(blocks[1], "passes.md", "exec"), namespace)
    assert capsys.readouterr().out == "1 arrays saved\n"
    assert namespace["deployment"].plan.totals.zeros == 150 * 8
