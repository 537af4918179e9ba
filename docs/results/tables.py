"""What the pages of results share: rows of tables, the command that repeats a page, and the files of a comparison."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rerampile.runtime.comparison import ComparisonReport
from rerampile.runtime.pictures import render
from rerampile.runtime.validation import MetricReport

__all__ = ["HERE", "accuracy", "command", "shown_model", "table", "write_comparison"]

HERE = Path(__file__).resolve().parent
_ROOT = HERE.parent.parent


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def accuracy(found: MetricReport) -> str:
    """Return the mean with its interval, and the worst chip."""
    low, high = found.interval or (found.mean, found.mean)
    return f"{found.mean:.2f} ± {(high - low) / 2:.2f} ({found.worst:.1f})"


def shown_model(model: Path) -> str:
    """Return how a page names a model: by its path in the project, by its name where it is somewhere else."""
    path = model.resolve()
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else model.name


def command(script: str, words: Sequence[str]) -> list[str]:
    """Return the lines that tell how a page is repeated."""
    return ["To repeat it:", "", f"    python docs/results/{script} {shlex.join(words)}"]


def write_comparison(
    report: ComparisonReport, page: str, draw: Callable[[Any], None], options: argparse.Namespace
) -> None:
    """Write a page, its picture and its numbers, with the data named as they are shown."""
    (HERE / f"{options.name}.md").write_text(page)
    svg, _ = render(draw)
    (HERE / f"{options.name}.svg").write_text(svg)
    shown = options.shown_data or options.data
    numbers = msgspec.json.encode(report).replace(options.data.encode(), shown.encode())
    (HERE / f"{options.name}.json").write_bytes(numbers + b"\n")
