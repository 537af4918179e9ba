"""The example of the page on pruning runs, and shows what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rerampile.passes.pruning.engine import ENGINES


def test_the_example_runs(project_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (project_root / "docs" / "pruning.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(example, "pruning.md", "exec"), {"__name__": "page"})
    *engines, rows = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\w+) +70% zeros, ([\d.]+)% of the outputs' energy lost", line) for line in engines]
    losses = {match[1]: float(match[2]) for match in found if match}
    assert losses["admm"] < losses["sparsegpt"] < losses["magnitude"]
    assert rows == "18 of 72 rows of cells are free"
    assert re.findall(r"^\| `(\w+)`(?: \(default\))? \|", page, re.MULTILINE)[: len(ENGINES)] == list(ENGINES)
