r"""Measure accuracy over failure rate with and without copies of slices, and write a page (Li et al. 2024).

One model is pruned in whole rows of crossbars, without training, and compiled for sliced cells: as it is, and with
copies of its most significant slices in what the rows left free, read by either vote. Arrays are the same and so are
the chips: a cell is stuck or not whatever lies in it. Finished chips are kept, so that an interrupted measurement goes
on where it was.

Example:
    python docs/results/protection.py models/bert_stdlib.onnx --data npz:models/bert_stdlib_test.npz \
        --calibration npz:models/bert_stdlib_calibration.npz --ratios 0.3 \
        --name bert-protection --title "Copies in a small BERT's own zeros"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from chips import rates_of, run_chips, tolerated
from pruned_models import PrunedModels, parser_of, repeat
from tables import accuracy, command, table, write_comparison

from rerampile import Plan, compile_model
from rerampile.pruning import PruneRequest
from rerampile.runtime.comparison import ComparisonReport, compare
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.pictures import rates_picture
from rerampile.runtime.validation import ValidationReport

LINES: dict[str, dict[str, Any]] = {
    "unprotected": {},
    "1 slice, mean": {"protect_msb": 1, "vote": "mean"},
    "1 slice, median": {"protect_msb": 1, "vote": "median"},
    "2 slices, median": {"protect_msb": 2, "vote": "median"},
}


def measure(options: argparse.Namespace) -> tuple[list[ValidationReport], list[Plan], float]:
    """Run the chips of each line; also return the plans, and the accuracy of the model before it was pruned."""
    models = PrunedModels(options)
    pruned = models.find(PruneRequest(ratios={"*": float(options.ratios)}, structure="rows"))
    faults = [FaultModel.of_rate(rate) for rate in rates_of(options)]
    reports, plans = [], []
    for name, how in LINES.items():
        folder = options.work / name.replace(", ", "-").replace(" ", "-")
        plans.append(compile_model(pruned.path, out=folder, target=options.target, **how).plan)
        reports.append(run_chips(folder, options, faults, batch=options.batch))
    return reports, plans, models.dense.accuracy


def page(report: ComparisonReport, plans: Sequence[Plan], dense: float, options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    metric, rates = report.metric, [rate.rate for rate in report.validations[0].rates]
    words = [*repeat(options), "--failure-rate", options.failure_rate, "--runs", str(options.runs)]
    few, first = options.images_per_run, report.validations[0]
    words += [] if few is None else ["--images-per-run", str(few)]
    pruned = f"{float(options.ratios):.0%} of the rows pruned without training from {options.images} examples of the"
    seen = f"All {first.images:,} examples" if few is None else f"{few} of {first.images:,} a chip, drawn anew for each"
    lines = [
        f"# {options.title}",
        "",
        f"Mean {metric} of {options.runs} simulated chips for each failure rate of a cell (stuck off : stuck on = 1 :",
        "5.2), percent, with its 95 % interval, and the worst chip in brackets; the same chips in all lines.",
        f"{seen}. {pruned}",
        f"training set: {first.clean[metric]:.2f} % without faults, {dense:.2f} % before pruning.",
        f"Target `{options.target}`.",
        "",
        f"![{metric} over failure rate]({options.name}.svg)",
        "",
        *table(
            ["copies, vote", *(f"{rate:g}" for rate in rates)],
            [
                [name, *(accuracy(r.metrics[metric]) for r in v.rates)]
                for name, v in zip(LINES, report.validations, strict=True)
            ],
        ),
        "",
        "## What it takes",
        "",
        *table(
            ["copies, vote", "arrays", "unpruned", "weights with copies", "of", "cells used"],
            [[name, *spent(plan)] for name, plan in zip(LINES, plans, strict=True)],
        ),
        "",
        f"## Failure rate tolerated at a drop of {report.drop:g} point",
        "",
        "Each against the same fault-free model, between the rates above; *times* is in units of the first line.",
        "",
        *table(
            ["copies, vote", "tolerated", "interval", "times", "interval"],
            [[name, *tolerated(compared)] for name, compared in zip(LINES, report.compared, strict=True)],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("protection.py", words),
    ]
    return "\n".join(lines) + "\n"


def spent(plan: Plan) -> list[str]:
    """Return the cells about arrays and copies."""
    totals, found = plan.totals, plan.protection
    copies = ["0", ""] if found is None else [f"{found.weights:,}", f"{found.weights_with_cells:,}"]
    used = totals.cells_used + (0 if found is None else found.cells)
    return [f"{totals.arrays:,}", f"{totals.arrays_without_pruning:,}", *copies, f"{used / totals.cells:.1%}"]


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    parser = parser_of(__doc__, ratios="0.3")
    parser.add_argument("--target", default="isaac")
    parser.add_argument("--failure-rate", default="0.003,0.01,0.03,0.1")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    parser.add_argument("--batch", type=int, default=256, help="examples run at once; of no consequence")
    options = parser.parse_args()
    reports, plans, dense = measure(options)
    report = compare(reports)
    draw = rates_picture(report.validations, report.metric)
    write_comparison(report, page(report, plans, dense, options), draw, options)


if __name__ == "__main__":
    main()
