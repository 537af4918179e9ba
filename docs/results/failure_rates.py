r"""Measure accuracy over failure rate, unpruned and pruned, and write a page about it (Yuan et al. 2021, figures 2, 6).

The paper's baselines are the unpruned model in a two-column and in an offset mapping; its own method prunes and takes
the differential mapping. Here the default engine prunes, without training. The same chips are run on all of them.
Finished chips are kept, so that an interrupted measurement goes on where it was.

Example:
    python docs/results/failure_rates.py models/resnet18_cifar10.onnx --data cifar10:DIR --ratios 0.7 \
        --name resnet18-failure-rates --title "Failure rates, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from chips import finish_rates, rates_of, run_chips, tolerated
from pruned_models import PrunedModels, parser_of, repeat
from tables import accuracy, command, table, write_comparison

from rerampile import compile_model
from rerampile.pruning import PruneRequest
from rerampile.runtime.comparison import ComparisonReport, compare
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.validation import ValidationReport
from rerampile.schemes import Scale

Line = tuple[float, str, Scale]  # ratio, mapping, scale


def lines_of(options: argparse.Namespace) -> list[Line]:
    """Return what is compared; the paper's baseline comes first."""
    ours: list[Line] = [
        (float(ratio), "differential", scale) for ratio in options.ratios.split(",") for scale in ("tensor", "channel")
    ]
    return [(0.0, "two_column", "tensor"), (0.0, "offset", "tensor"), *ours]


def measure(options: argparse.Namespace) -> list[ValidationReport]:
    """Run the chips of each line."""
    models, reports = PrunedModels(options), []
    faults = [FaultModel.of_rate(rate) for rate in rates_of(options)]
    for ratio, mapping, scale in lines_of(options):
        pruned = models.find(PruneRequest(ratios={"*": ratio})) if ratio > 0 else models.dense
        folder = options.work / f"rates-{mapping}-{scale}-{ratio:g}"
        compile_model(pruned.path, out=folder, mapping=mapping, scale=scale)
        reports.append(run_chips(folder, options, faults))
    return reports


def page(report: ComparisonReport, options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    metric, rates = report.metric, [rate.rate for rate in report.validations[0].rates]
    names = [f"{'unpruned' if ratio == 0 else f'{ratio:.0%} pruned'}, `{m}`, {s}" for ratio, m, s in lines_of(options)]
    words = [*repeat(options), "--failure-rate", options.failure_rate, "--runs", str(options.runs)]
    few = options.images_per_run
    words += [] if few is None else ["--images-per-run", str(few)]
    seen = "All test images" if few is None else f"{few} of the test images a chip, drawn anew for each"
    lines = [
        f"# {options.title}",
        "",
        f"Mean {metric} of {options.runs} simulated chips for each failure rate of a cell (stuck off : stuck on = 1 :",
        "5.2), percent, with its 95 % interval, and the worst chip in brackets; the same chips in all lines.",
        f"{seen}. Pruned without training from {options.images} training images.",
        "",
        f"![{metric} over failure rate]({options.name}.svg)",
        "",
        *table(
            ["model, mapping, scale", "without faults", *(f"{rate:g}" for rate in rates)],
            [
                [name, f"{v.clean[metric]:.2f}", *(accuracy(r.metrics[metric]) for r in v.rates)]
                for name, v in zip(names, report.validations, strict=True)
            ],
        ),
        "",
        f"## Failure rate tolerated at a drop of {report.drop:g} point",
        "",
        "Each against its own fault-free model, between the rates above; *times* is in units of the first line.",
        "",
        *table(
            ["model, mapping, scale", "tolerated", "interval", "times", "interval"],
            [[name, *tolerated(compared)] for name, compared in zip(names, report.compared, strict=True)],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("failure_rates.py", words),
    ]
    return "\n".join(lines) + "\n"


def picture(report: ComparisonReport, options: argparse.Namespace) -> Callable[[Any], None]:
    """Return what draws accuracy over failure rate."""

    def draw(axes: Any) -> None:
        for (ratio, mapping, scale), found in zip(lines_of(options), report.validations, strict=True):
            metrics = [rate.metrics[report.metric] for rate in found.rates]
            half = [(m.interval[1] - m.interval[0]) / 2 if m.interval else 0.0 for m in metrics]
            label = f"{mapping}, {scale} scale, {'unpruned' if ratio == 0 else f'{ratio:.0%} pruned'}"
            rates = [rate.rate for rate in found.rates]
            axes.errorbar(rates, [m.mean for m in metrics], half, marker="o", ms=3, capsize=2, label=label)
        finish_rates(axes, f"{report.metric} (%)")

    return draw


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    parser = parser_of(__doc__, ratios="0.7")
    parser.add_argument("--failure-rate", default="0.0002,0.001,0.005,0.01")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    options = parser.parse_args()
    report = compare(measure(options))
    write_comparison(report, page(report, options), picture(report, options), options)


if __name__ == "__main__":
    main()
