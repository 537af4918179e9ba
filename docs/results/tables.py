"""What the pages of results share: their arguments, rows of tables, how to repeat them, and files of a comparison."""

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

__all__ = ["HERE", "accuracy", "command", "mean", "page_parser", "page_words", "table", "write_comparison"]

HERE = Path(__file__).resolve().parent
_ROOT = HERE.parent.parent


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def accuracy(found: MetricReport) -> str:
    """Return the mean with its interval, and the worst chip."""
    return f"{mean(found)} ({found.worst:.1f})"


def mean(found: MetricReport) -> str:
    """Return the mean with its interval."""
    low, high = found.interval or (found.mean, found.mean)
    return f"{found.mean:.2f} ± {(high - low) / 2:.2f}"


def page_parser(description: str | None, *, calibration: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of what every page is made from.

    Args:
        description: What the script does.
        calibration: What it learns from calibration data; None where it names none.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="as of 'rerampile validate'")
    parser.add_argument("--shown-data", help="how the page names the data, where they lie elsewhere for others")
    if calibration is not None:
        parser.add_argument("--calibration", help=f"what {calibration} learn from; the data, @train")
        parser.add_argument("--shown-calibration", help="how the page names that")
    parser.add_argument("--name", required=True, help="of the page")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", help="what readers should know")
    parser.add_argument(
        "--work", type=Path, default=Path("results.work"), help="where what is finished is kept; pages may share it"
    )
    return parser


def page_words(options: argparse.Namespace) -> list[str]:
    """Return these arguments as they repeat a page: a model of this project by its path here, others by their name."""
    path = options.model.resolve()
    words = [str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name]
    words += ["--data", options.shown_data or options.data]
    if getattr(options, "calibration", None) is not None:
        words += ["--calibration", options.shown_calibration or options.calibration]
    words += ["--name", options.name, "--title", options.title]
    return words + ([] if options.note is None else ["--note", options.note])


def command(script: str, words: Sequence[str]) -> list[str]:
    """Return the lines that tell how a page is repeated."""
    return ["To repeat it:", "", f"    {shlex.join(['python', f'docs/results/{script}', *words])}"]


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
