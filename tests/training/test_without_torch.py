"""The command where PyTorch is not installed; this runs wherever the tests do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rerampile.cli import main


def test_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = CliRunner().invoke(main, ["finetune", "m.onnx", "--data", "npz:x.npz", "-o", str(tmp_path / "out")])
    assert found.exit_code == 1
    assert "Error: finetune: PyTorch is not installed; pip install 'rerampile[train]'" in found.output
    assert not (tmp_path / "out").exists()
