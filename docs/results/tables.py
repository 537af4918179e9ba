"""What the pages of results share: rows of tables, and the command that repeats a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rerampile.runtime.validation import MetricReport

__all__ = ["HERE", "accuracy", "command", "shown_model", "table"]

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
