r"""Measure accuracy over pruning ratio under stuck cells, and write a page about it (Yuan et al. 2021, figure 3).

The paper injects stuck-off cells alone, at a rate of 0.016, into a two-column mapping. Here every layer but the first
and the last is pruned by the default engine, without training, and the same chips are run at each ratio: with those
faults, and with both kinds under each mapping. Finished layers and chips are kept, so that an interrupted measurement
goes on where it was.

Example:
    python docs/results/pruning_ratio.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-pruning-ratio --title "Pruning ratio and stuck cells, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from pruned_models import Pruned, PrunedModels, parser_of, repeat
from tables import HERE, accuracy, command, table

from rerampile import compile_model
from rerampile.pruning import PruneRequest
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.pictures import render
from rerampile.runtime.validation import MetricReport, validate
from rerampile.schemes import Scale


@dataclass(frozen=True)
class Setting:
    """A mapping and its faults."""

    mapping: str
    scale: Scale
    faults: FaultModel

    @property
    def label(self) -> str:
        """What tells it from others."""
        return f"{self.mapping}, {self.scale} scale, off {self.faults.stuck_off:.4g} on {self.faults.stuck_on:.4g}"


OFF_ALONE = FaultModel(stuck_off=0.016, stuck_on=0.0)


def settings(rate: float) -> list[Setting]:
    """Return the paper's setting, and both kinds of faults under each mapping."""
    both = FaultModel.of_rate(rate)
    return [
        Setting("two_column", "tensor", OFF_ALONE),
        Setting("two_column", "tensor", both),
        Setting("offset", "tensor", both),
        Setting("differential", "tensor", both),
        Setting("differential", "channel", both),
    ]


def measure(options: argparse.Namespace) -> dict[float, list[MetricReport]]:
    """Return what chips do in each setting, by pruning ratio."""
    models = PrunedModels(options)
    found: dict[float, list[MetricReport]] = {}
    for ratio in map(float, options.ratios.split(",")):
        pruned = models.find(PruneRequest(ratios={"*": ratio})) if ratio > 0 else models.dense
        found[ratio] = [
            run(pruned, setting, f"{n}-{ratio:g}", options) for n, setting in enumerate(settings(options.rate))
        ]
        print(f"{ratio:g}: {', '.join(f'{m.clean:.2f} {m.mean:.2f}' for m in found[ratio])}", flush=True)
    return found


def run(model: Pruned, setting: Setting, name: str, options: argparse.Namespace) -> MetricReport:
    """Run the chips of a setting at one ratio."""
    folder = options.work / "chips.deployment"
    compile_model(model.path, out=folder, mapping=setting.mapping, scale=setting.scale)
    few = options.images_per_run
    experiment = Experiment(folder=folder, faults=(setting.faults,), data=options.data, images_per_run=few)
    report = validate(experiment, options.work / f"{name}.journal.jsonl", runs=options.runs)
    return next(iter(report.rates[0].metrics.values()))


def page(found: dict[float, list[MetricReport]], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    clean = {ratio: metrics[0].clean for ratio, metrics in found.items()}
    words = [*repeat(options), "--rate", f"{options.rate:g}", "--runs", str(options.runs)]
    words += [] if options.images_per_run is None else ["--images-per-run", str(options.images_per_run)]
    few = options.images_per_run
    seen = "all test images" if few is None else f"{few} of the test images a chip, drawn anew for each"
    lines = [
        f"# {options.title}",
        "",
        f"Mean accuracy of {options.runs} simulated chips at each pruning ratio, percent, with its 95 % interval, and",
        f"the worst chip in brackets; the same chips at all ratios, {seen}. Pruned without",
        f"training from {options.images} training images.",
        "",
        f"![accuracy over pruning ratio]({options.name}.svg)",
        "",
        *table(
            ["ratio", "without faults", *(setting.label for setting in settings(options.rate))],
            [[f"{r:g}", f"{clean[r]:.2f}", *map(accuracy, metrics)] for r, metrics in found.items()],
        ),
        "",
        "## Drop against the model of the same ratio without faults",
        "",
        *table(
            ["ratio", *(setting.label for setting in settings(options.rate))],
            [[f"{r:g}", *(drop(m) for m in metrics)] for r, metrics in found.items()],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("pruning_ratio.py", words),
    ]
    return "\n".join(lines) + "\n"


def drop(found: MetricReport) -> str:
    """Return the drop with its interval."""
    low, high = found.drop_interval or (found.drop, found.drop)
    return f"{found.drop:.2f} ± {(high - low) / 2:.2f}"


def picture(found: dict[float, list[MetricReport]], rate: float) -> Callable[[Any], None]:
    """Return what draws accuracy over pruning ratio."""

    def draw(axes: Any) -> None:
        for number, setting in enumerate(settings(rate)):
            metrics = [found[ratio][number] for ratio in found]
            half = [(m.interval[1] - m.interval[0]) / 2 if m.interval else 0.0 for m in metrics]
            label = setting.label
            axes.errorbar(list(found), [m.mean for m in metrics], half, marker="o", ms=3, capsize=2, label=label)
        axes.plot(list(found), [m[0].clean for m in found.values()], "--", color="0.4", lw=0.8, label="without faults")
        axes.set_xlabel("share of the weights that goes")
        axes.set_ylabel("accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)

    return draw


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    parser = parser_of(__doc__, ratios="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--rate", type=float, default=0.005, help="failure rate where both kinds of faults are drawn")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    options = parser.parse_args()
    found = measure(options)
    (HERE / f"{options.name}.md").write_text(page(found, options))
    svg, _ = render(picture(found, options.rate))
    (HERE / f"{options.name}.svg").write_text(svg)
    (HERE / f"{options.name}.json").write_bytes(msgspec.json.encode({f"{r:g}": m for r, m in found.items()}) + b"\n")


if __name__ == "__main__":
    main()
