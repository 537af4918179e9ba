r"""Measure what every universal option of 'rerampile compile' brings under stuck cells, and write a page about it.

Options that depend on the failure rate are chosen for each rate; the same chips are run on all deployments. A chip's
drop is counted from what the user's model has without faults on the images that this chip saw, so that options which
change the fault-free model are not flattered. Finished chips are kept, so that an interrupted measurement goes on where
it was.

Example:
    python docs/results/options.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-options --title "Options of compile, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from chips import finish_rates, known_cells, rates_of, run_chips
from tables import HERE, accuracy, command, page_parser, page_words, table

from rerampile import compile_model
from rerampile.deployment import load_deployment
from rerampile.runtime.comparison import known
from rerampile.runtime.data import open_dataset, training_split
from rerampile.runtime.dataset import Dataset
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.pictures import render
from rerampile.runtime.session import open_session
from rerampile.runtime.tolerance import Curve, rate_ratio, tolerated_rate
from rerampile.runtime.validation import MetricReport
from rerampile.schemes import WEIGHED, MappingName, Scale
from rerampile.target import Target

DROP = 1.0
"""Points at which failure rates are compared."""


@dataclass(frozen=True)
class Option:
    """A way to compile."""

    mapping: MappingName
    scale: Scale
    clip: bool = False
    correct: bool = False
    spend: bool = False

    @property
    def name(self) -> str:
        """As on the command line."""
        flags = {"--clip": self.clip, "--correct": self.correct, "--spend-spare-arrays": self.spend}
        return " ".join([self.mapping, self.scale, *(flag for flag, used in flags.items() if used)])

    @property
    def any_rate(self) -> bool:
        """Whether the deployment is the same for all failure rates."""
        return self.mapping not in WEIGHED and not (self.clip or self.correct or self.spend)


OPTIONS = (
    Option("two_column", "tensor"),
    Option("differential", "tensor"),
    Option("optimal", "tensor"),
    Option("two_column", "channel"),
    Option("differential", "channel"),
    Option("optimal", "channel"),
    Option("auto", "channel"),
    Option("optimal", "partition"),
    Option("optimal", "channel", spend=True),
    Option("optimal", "channel", clip=True),
    Option("optimal", "channel", correct=True),
    Option("optimal", "channel", clip=True, correct=True),
    Option("optimal", "channel", clip=True, correct=True, spend=True),
)
"""The first is the baseline: the paper's two columns."""


@dataclass(frozen=True)
class Line:
    """What an option came to, by failure rate; it ends where it had lost too much."""

    option: Option
    metric: str
    found: dict[float, MetricReport]

    @property
    def clean(self) -> list[float]:
        """What the compiled model has without faults on the images that each chip saw, the same at all rates."""
        first = next(iter(self.found.values()))
        return [value + drop for value, drop in zip(first.values, first.drops, strict=True)]

    def curve(self, clean: list[float]) -> Curve:
        """Return drops of the chips from a clean model, percent by rate and chip."""
        drops = [np.subtract(clean, metric.values) for metric in self.found.values()]
        return Curve(rates=np.array(list(self.found)), drops=np.array(drops))


def measure(options: argparse.Namespace) -> list[Line]:
    """Run the chips of each option, from the lowest rate up to the one at which it has lost too much."""
    options.work.mkdir(parents=True, exist_ok=True)
    session = open_session(options.model)
    spec = options.calibration or training_split(options.data)
    images = open_dataset(spec, session, default_split="train", generate=options.calibration_images)
    lines = []
    for option in [option for option in OPTIONS if option.name in options.lines]:
        found: dict[float, MetricReport] = {}
        for rate in rates_of(options):
            metric, found[rate] = run(option, rate, images, options)
            print(f"{option.name} {rate:g}: {found[rate].mean:.2f}, drop {found[rate].drop:.2f}", flush=True)
            if found[rate].drop > options.give_up:
                break
        lines.append(Line(option, metric, found))
    return lines


def run(option: Option, rate: float, images: Dataset, options: argparse.Namespace) -> tuple[str, MetricReport]:
    """Run the chips of an option at a rate; return the metric's name, and what it came to."""
    name = option.name.replace(" --", "-").replace(" ", "-")
    faults = FaultModel.of_rate(rate)
    folder = options.work / f"{name}.deployment"
    if not (option.any_rate and folder.exists()):
        compile_model(
            options.model,
            out=folder,
            target=Target.load("paper", {"arrays_per_core": 2 * needed(options)} if option.spend else {}),
            mapping=option.mapping,
            faults=None if option.any_rate else faults,
            scale=option.scale,
            clip=option.clip,
            correct=option.correct,
            spend_spare_arrays=option.spend,
            calibration=images if option.clip or option.correct else None,
            calibration_images=options.calibration_images,
        )
    report = run_chips(folder, options, [faults], name=f"{name}-{rate:g}", batch=options.batch)
    return next(iter(report.rates[0].metrics.items()))


def needed(options: argparse.Namespace) -> int:
    """Return how many arrays the model takes: spare ones are beside those."""
    return load_deployment(options.work / f"{OPTIONS[0].name.replace(' ', '-')}.deployment").plan.totals.arrays


def page(lines: list[Line], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    rates = rates_of(options)
    few = options.images_per_run
    seen = "all test images" if few is None else f"{few} of the test images a chip, drawn anew for each"
    first = next(iter(lines[0].found.values()))
    text = [
        f"# {options.title}",
        "",
        f"Mean {lines[0].metric} of {options.runs} simulated chips for each failure rate of a cell (stuck off : stuck",
        "on = 1 : 5.2), percent, with its 95 % interval, and the worst chip in brackets; the same chips for all",
        f"options, {seen}; {first.clean:.2f} % without faults. `optimal`, `auto`, `--clip` and `--correct`",
        f"are chosen for each rate; the latter two from {options.calibration_images} training images. Nothing is known",
        "of a chip. `--spend-spare-arrays` has a target of twice the arrays that the model needs. Where an option had",
        f"lost more than {options.give_up:g} points, higher rates were not run.",
        "",
        *([] if options.note is None else [options.note, ""]),
        f"![drop over failure rate]({options.name}.svg)",
        "",
        *table(
            ["option", *(f"{rate:g}" for rate in rates)],
            [[f"`{x.option.name}`", *(accuracy(x.found[r]) if r in x.found else "" for r in rates)] for x in lines],
        ),
        "",
        f"## Failure rate tolerated at a drop of {DROP:g} point",
        "",
        "The drop is from the user's model without faults on the same images. *Times* is in units of the first line.",
        "Between two rates the drop is taken as a power of the rate; intervals are of 95 %, by resampling chips.",
        "",
        *table(["option", "tolerated", "interval", "times", "interval"], [tolerance(x, lines[0]) for x in lines]),
        "",
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("options.py", repeat(options)),
    ]
    return "\n".join(text) + "\n"


def tolerance(line: Line, baseline: Line) -> list[str]:
    """Return the row of an option; drops are from the baseline's clean model, which is the user's."""
    curve, reference = line.curve(baseline.clean), baseline.curve(baseline.clean)
    times = ["1", ""] if line is baseline else known_cells(known(rate_ratio(curve, reference, DROP)))
    return [f"`{line.option.name}`", *known_cells(known(tolerated_rate(curve, DROP))), *times]


def picture(lines: list[Line]) -> Callable[[Any], None]:
    """Return what draws the drop over failure rate."""

    def draw(axes: Any) -> None:
        for number, line in enumerate(lines):
            curve = line.curve(lines[0].clean)
            style = {"color": f"C{number % 10}", "ls": "--" if number > 9 else "-"}
            axes.plot(curve.rates, curve.drops.mean(axis=1), marker="o", ms=3, label=line.option.name, **style)
        axes.axhline(DROP, color="0.6", lw=0.8)
        axes.set_yscale("symlog", linthresh=1)
        finish_rates(axes, "mean drop (points)", below=True)

    return draw


def repeat(options: argparse.Namespace) -> list[str]:
    """Return the arguments that repeat a measurement."""
    words = [*page_words(options), "--failure-rate", options.failure_rate]
    words += ["--runs", str(options.runs), "--calibration-images", str(options.calibration_images)]
    words += [] if options.images_per_run is None else ["--images-per-run", str(options.images_per_run)]
    if len(options.lines) < len(OPTIONS):
        words += ["--lines", "; ".join(option.name for option in OPTIONS if option.name in options.lines)]
    return words


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    parser = page_parser(__doc__, calibration="--clip and --correct")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--failure-rate", default="0.0005,0.001,0.005,0.01,0.02,0.04")
    parser.add_argument("--lines", default="; ".join(o.name for o in OPTIONS), help="the ones to measure")
    parser.add_argument("--give-up", type=float, default=20.0, help="drop in points above which higher rates are left")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    parser.add_argument("--batch", type=int, default=32, help="images run at once; of no consequence")
    options = parser.parse_args()
    options.lines = {OPTIONS[0].name} | {line.strip() for line in options.lines.split(";")}
    if not options.lines <= {option.name for option in OPTIONS}:
        parser.error(f"--lines: expected some of: {'; '.join(option.name for option in OPTIONS)}")
    lines = measure(options)
    (HERE / f"{options.name}.md").write_text(page(lines, options))
    svg, _ = render(picture(lines))
    (HERE / f"{options.name}.svg").write_text(svg)
    numbers = {line.option.name: {f"{rate:g}": found for rate, found in line.found.items()} for line in lines}
    (HERE / f"{options.name}.json").write_bytes(msgspec.json.encode(numbers) + b"\n")


if __name__ == "__main__":
    main()
