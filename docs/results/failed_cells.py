r"""Measure what each way of treating failed cells buys, under several mappings, and write a page about it.

Cells fail in three ways (docs/failed-cells.md): without a filament, with one that cannot be programmed, or with one
that is far too thick. A model is compiled for hardware that takes them as they are, bounds them, or cuts off the cell
or its pair, each with several mappings. The same devices of the same chips fail in all of them. Finished chips are
kept, so that an interrupted measurement goes on where it was.

Example:
    python docs/results/failed_cells.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-failed-cells --title "Failed cells, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from chips import finish_rates, rates_of, run_chips, tolerated
from mappings import cells, in_fp32, parser_of, repeat
from tables import accuracy, command, table, write_comparison

from rerampile import compile_model
from rerampile.failed_cells import RESPONSES
from rerampile.runtime.comparison import ComparisonReport, compare
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.validation import ValidationReport
from rerampile.schemes import WEIGHED
from rerampile.target import Target

MAPPINGS = ("two_column", "differential", "optimal")
# Share, and mean and spread in units of g_on. Over-formed cells are as many, beside the others, as stuck-on ones in
# other results; 3 is the middle of what Liu et al. (DAC 2017) have for those: 300 to 1200 µS, beside a range up to 300.
FORMED = {"unformed": (0.5, 0.001, 0.0), "partially_formed": (0.5, 0.5, 0.25), "over_formed": (5.2, 3.0, 1.0)}
LINES = {"unbounded": "-", "bounded": "--", "isolated_cell": ":", "isolated_pair": "-."}


def target_of(response: str, options: argparse.Namespace) -> Target:
    """Return the hardware with one response."""
    changes: dict[str, Any] = {} if options.levels is None else {"cell.levels": options.levels}
    g_on = Target.load(options.target).cell.g_on
    for name, (share, mean, spread) in FORMED.items():
        changes[f"failed_cells.{name}"] = {"share": share, "mean": mean * g_on, "spread": spread * g_on}
    return Target.load(options.target, changes | {"failed_cells.response": response})


def measure(options: argparse.Namespace) -> list[ValidationReport]:
    """Run the chips of each response and mapping; a bare crossbar of two columns comes first."""
    reports = []
    for response in RESPONSES:
        target = target_of(response, options)
        faults = [FaultModel.of_target(rate, target) for rate in rates_of(options)]
        for mapping in MAPPINGS:
            folder = options.work / f"{response}-{mapping}"
            weighed = faults[0] if mapping in WEIGHED else None  # on whose ratio alone the mapping depends
            compile_model(options.model, out=folder, target=target, mapping=mapping, faults=weighed)
            reports.append(run_chips(folder, options, faults, batch=options.batch, precision=options.precision))
    return reports


def page(report: ComparisonReport, options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    first, metric = report.validations[0], report.metric
    names = [[f"`{response}`", f"`{mapping}`"] for response in RESPONSES for mapping in MAPPINGS]
    seen = f"{first.images:,} images"
    if options.images_per_run is not None:
        seen = f"{options.images_per_run} of {first.images:,} images a chip, drawn anew for each"
    lines = [
        f"# {options.title}",
        "",
        f"Mean {metric} of {options.runs} simulated chips for each rate of failed cells, percent, with its 95 %",
        "interval, and the worst chip in brackets; the same cells of the same chips fail in all lines. What hardware",
        "makes of them is said in [failed cells](../failed-cells.md); bounds are the ends of the programmable range.",
        f"{first.clean[metric]:.2f} % without faults (first line). {seen}, target `{options.target}` {cells(options)},",
        f"one scale a channel, {options.precision}.{in_fp32(first, metric)}",
        *([] if options.note is None else ["", options.note]),
        "",
        *table(["failed cells", "share", "mean", "spread"], shares(target_of("unbounded", options))),
        "",
        f"![{metric} over failure rate]({options.name}.svg)",
        "",
        *table(
            ["response", "mapping", *(f"{rate.rate:g}" for rate in first.rates)],
            [
                [*name, *(accuracy(rate.metrics[metric]) for rate in validation.rates)]
                for name, validation in zip(names, report.validations, strict=True)
            ],
        ),
        "",
        f"## Failure rate tolerated at a drop of {report.drop:g} point",
        "",
        "Each against its own fault-free model, between the rates above; *times* is in units of the first line, a bare",
        "crossbar with two columns. Intervals are of 95 %, by resampling chips.",
        "",
        *table(
            ["response", "mapping", "tolerated", "interval", "times", "interval"],
            [[*name, *tolerated(compared)] for name, compared in zip(names, report.compared, strict=True)],
        ),
        "",
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("failed_cells.py", repeat(options)),
    ]
    return "\n".join(lines) + "\n"


def shares(target: Target) -> list[list[str]]:
    """Return what is assumed of failed cells, as rows of a table."""
    categories = target.failed_cells.categories
    total = sum(category.share for category in categories.values())
    return [
        [
            name.replace("_", "-"),
            f"{100 * category.share / total:.1f} %",
            f"{1e6 * category.mean:.3g} µS",
            f"{1e6 * category.spread:.3g} µS",
        ]
        for name, category in categories.items()
    ]


def picture(report: ComparisonReport) -> Callable[[Any], None]:
    """Return what draws accuracy over failure rate: a colour a mapping, a kind of line a response."""

    def draw(axes: Any) -> None:
        names = [(response, mapping) for response in RESPONSES for mapping in MAPPINGS]
        for (response, mapping), found in zip(names, report.validations, strict=True):
            axes.plot(
                [rate.rate for rate in found.rates],
                [rate.metrics[report.metric].mean for rate in found.rates],
                LINES[response],
                color=f"C{MAPPINGS.index(mapping)}",
                marker="o",
                ms=3,
                label=f"{response.replace('_', ' ')}, {mapping}",
            )
        finish_rates(axes, f"{report.metric} (%)", 6)

    return draw


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    options = parser_of(__doc__).parse_args()
    options.shown_data = options.shown_data or options.data
    report = compare(measure(options))
    write_comparison(report, page(report, options), picture(report), options)


if __name__ == "__main__":
    main()
