r"""Prune in the shapes of crossbars, and write a page about the arrays that this saves and what it costs.

Single weights leave holes in arrays; whole rows, columns, channels and partitions leave arrays out. The totals are
those of the plan. Every layer but the first and the last is pruned by the default engine, without training. Finished
models are kept, so that an interrupted measurement goes on where it was.

Example:
    python docs/results/shapes.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-shapes --title "Arrays saved by pruning, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruned_models import Pruned, PrunedModels, draw_curves, parser_of, repeat
from tables import HERE, command, table

from rerampile import compile_model
from rerampile.asked_constraint import on_target
from rerampile.plan import Totals
from rerampile.pruning import PruneRequest
from rerampile.runtime.pictures import render
from rerampile.target import Target


@dataclass(frozen=True)
class Shape:
    """A model pruned in one shape at one ratio, and what its plan comes to."""

    structure: str
    ratio: float
    accuracy: float
    totals: Totals


def measure(options: argparse.Namespace) -> list[Shape]:
    """Return the dense model, then every pruned one."""
    models, target = PrunedModels(options), Target.load(options.target)

    def shape(structure: str, ratio: float, pruned: Pruned) -> Shape:
        plan = compile_model(pruned.path, out=options.work / "shapes.deployment", target=target).plan
        return Shape(structure, ratio, pruned.accuracy, plan.totals)

    found = [shape("weights", 0.0, models.dense)]
    for structure in options.structures.split(","):
        for ratio in map(float, options.ratios.split(",")):
            request = on_target(PruneRequest(ratios={"*": ratio}, structure=structure), target, None)
            found.append(shape(structure, ratio, models.find(request)))
    return found


def page(found: list[Shape], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    dense, *pruned = found
    lines = [
        f"# {options.title}",
        "",
        f"Accuracy without faults, percent, and the arrays of the plan for target `{options.target}`, after pruning at",
        f"once from {options.images} training images, without labels or training. The dense model has",
        f"{dense.accuracy:.2f} % on {dense.totals.arrays:,} arrays.",
        "",
        f"![accuracy over arrays]({options.name}.svg)",
        "",
        *table(
            ["what goes", "share", "accuracy", "weights left", "arrays", "arrays saved", "cells used"],
            [
                [
                    shape.structure,
                    f"{shape.ratio:.0%}",
                    f"{shape.accuracy:.1f}",
                    f"{1 - shape.totals.zeros / shape.totals.weights:.1%}",
                    f"{shape.totals.arrays:,}",
                    f"{1 - shape.totals.arrays / dense.totals.arrays:.1%}",
                    f"{shape.totals.cells_used:,}",
                ]
                for shape in pruned
            ],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        *command("shapes.py", [*repeat(options), "--structures", options.structures, "--target", options.target]),
    ]
    return "\n".join(lines) + "\n"


def picture(found: list[Shape], options: argparse.Namespace) -> Callable[[Any], None]:
    """Return what draws accuracy over arrays."""

    def draw(axes: Any) -> None:
        names = options.structures.split(",")
        draw_curves(
            axes, {n: [(s.totals.arrays, s.accuracy) for s in found if s.structure == n] for n in names}, "arrays"
        )
        axes.plot(found[0].totals.arrays, found[0].accuracy, "k*", label="dense")
        axes.legend(frameon=False)

    return draw


def main() -> None:
    """Measure, and write the page and its picture."""
    parser = parser_of(__doc__, ratios="0.1,0.2,0.3,0.5")
    parser.add_argument("--structures", default="rows,columns,channels,partitions", help="what goes")
    parser.add_argument("--target", default="paper", help="whose arrays")
    options = parser.parse_args()
    found = measure(options)
    (HERE / f"{options.name}.md").write_text(page(found, options))
    svg, _ = render(picture(found, options))
    (HERE / f"{options.name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
