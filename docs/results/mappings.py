r"""Measure how every mapping fares under stuck-at faults, with each scale, and write a page about it.

A model is compiled twelve times: four mappings, each with one scale a tensor (as in Yuan et al. 2021), a channel and a
partition (which int8 kernels do not know). The same chips are run on all of them, 100 for each failure rate. Finished
chips are kept, so that an interrupted measurement goes on where it was.

Example:
    python docs/results/mappings.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-cifar10 --title "ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse

from chips import rates_of, run_chips, tolerated
from tables import accuracy, command, page_parser, page_words, table, write_comparison

from rerampile import compile_model
from rerampile.runtime.comparison import ComparisonReport, compare
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.pictures import rates_picture
from rerampile.runtime.validation import ValidationReport
from rerampile.schemes import SCALES
from rerampile.target import Target

MAPPINGS = ("two_column", "offset", "differential", "balanced")
BATCH = 32
TARGET = "paper"


def measure(options: argparse.Namespace) -> list[ValidationReport]:
    """Compile the model with each mapping and scale, and run the chips; the baseline of the paper comes first."""
    target = Target.load(options.target, {} if options.levels is None else {"cell.levels": options.levels})
    faults, reports = [FaultModel.of_rate(rate) for rate in rates_of(options)], []
    for scale in (scale for scale in SCALES if options.precision == "fp32" or scale != "partition"):
        for mapping in MAPPINGS:
            folder = options.work / f"{mapping}-{scale}"
            compile_model(options.model, out=folder, target=target, mapping=mapping, scale=scale)
            reports.append(run_chips(folder, options, faults, batch=options.batch, precision=options.precision))
    return reports


def page(report: ComparisonReport, options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    first, metric = report.validations[0], report.metric
    chips = min(rate.metrics[metric].chips for v in report.validations for rate in v.rates)
    seen = f"{first.images:,} images"
    if options.images_per_run is not None:
        seen = f"{options.images_per_run} of {first.images:,} images a chip, drawn anew for each"
    rates = [rate.rate for rate in first.rates]
    lines = [
        f"# {options.title}",
        "",
        f"Mean {metric} of {chips} simulated chips for each failure rate of a cell (stuck off : stuck on = 1 : 5.2),",
        "percent, with its 95 % interval, and the worst chip in brackets;",
        f"{first.clean[metric]:.2f} % without faults (first line).",
        f"{seen}, target `{options.target}` {cells(options)}, {options.precision} in ONNX Runtime",
        f"{first.versions['onnxruntime']}.{in_fp32(first, metric)}",
        *([] if options.note is None else ["", options.note]),
        "",
        f"![{metric} over failure rate]({options.name}.svg)",
        "",
        *table(
            ["mapping", "scale", *(f"{rate:g}" for rate in rates)],
            [[f"`{v.mapping}`", v.scale, *(accuracy(r.metrics[metric]) for r in v.rates)] for v in report.validations],
        ),
        "",
        f"## Failure rate tolerated at a drop of {report.drop:g} point",
        "",
        "Each against its own fault-free model, between the rates above; *times* is in units of the first line, the",
        "paper's baseline. Intervals are of 95 %, by resampling chips.",
        "",
        *table(
            ["mapping", "scale", "tolerated", "interval", "times", "interval"],
            [
                [f"`{v.mapping}`", v.scale, *tolerated(compared)]
                for v, compared in zip(report.validations, report.compared, strict=True)
            ],
        ),
        "",
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("mappings.py", repeat(options)),
    ]
    return "\n".join(lines) + "\n"


def cells(options: argparse.Namespace) -> str:
    """Return what the cells hold."""
    return "with analog cells" if options.levels is None else f"with cells of {options.levels} levels"


def in_fp32(report: ValidationReport, metric: str) -> str:
    """Return what int8 costs without faults."""
    return "" if report.int8 is None else f" In fp32 it has {report.int8.clean_fp32[metric]:.2f} % without faults."


def repeat(options: argparse.Namespace) -> list[str]:
    """Return the arguments that repeat a measurement."""
    words = page_words(options)
    words += ["--failure-rate", options.failure_rate, "--runs", str(options.runs)]
    words += [] if options.images_per_run is None else ["--images-per-run", str(options.images_per_run)]
    words += [] if options.batch == BATCH else ["--batch", str(options.batch)]
    words += [] if options.target == TARGET else ["--target", options.target]
    words += [] if options.levels is None else ["--levels", str(options.levels), "--precision", options.precision]
    return words


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return what reads the arguments of a measurement of chips."""
    parser = page_parser(description)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--failure-rate", default="0.001,0.005,0.01")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    parser.add_argument("--batch", type=int, default=BATCH, help="images run at once; of no consequence")
    parser.add_argument("--levels", type=int, help="of a cell, for cells that are not analog")
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32")
    return parser


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    options = parser_of(__doc__).parse_args()
    options.shown_data = options.shown_data or options.data
    report = compare(measure(options))
    write_comparison(report, page(report, options), rates_picture(report.validations, report.metric), options)


if __name__ == "__main__":
    main()
