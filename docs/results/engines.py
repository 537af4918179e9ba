r"""Prune a model with every engine at several ratios, without faults, and write a page about what is left.

Every layer but the first and the last loses the same share of its weights. Finished layers and figures are kept, so
that an interrupted measurement goes on where it was.

Example:
    python docs/results/engines.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-engines --title "ResNet18 on CIFAR-10, pruned without training"
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from pruned_models import Pruned, PrunedModels, draw_curves, parser_of, repeat
from tables import HERE, command, table

from rerampile.passes.pruning.engine import ENGINES
from rerampile.pruning import PruneRequest
from rerampile.runtime.pictures import render

Found = dict[tuple[str, float], Pruned]


def measure(models: PrunedModels, options: argparse.Namespace) -> Found:
    """Return every pruned model by engine and ratio."""
    return {
        (engine, ratio): models.find(PruneRequest(ratios={"*": ratio}, engine=engine))
        for ratio in map(float, options.ratios.split(","))
        for engine in ENGINES
    }


def page(models: PrunedModels, found: Found, options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    dense, tested = models.dense.accuracy, models.tested
    spread = 196 * math.sqrt(dense / 100 * (1 - dense / 100) / tested)
    ratios = sorted({ratio for _, ratio in found})
    heads = ["engine", *(f"{ratio:.0%}" for ratio in ratios)]
    lines = [
        f"# {options.title}",
        "",
        f"Accuracy without faults, percent, after pruning at once from {options.images} training images, without",
        f"labels or training; {dense:.2f} % for the dense model. Every layer but the first and the last loses the same",
        f"share. {tested:,} test images tell {dense:.0f} % to ± {spread:.1f} points; two models on the same images are",
        "compared better than that, but tenths of a point mean nothing.",
        "",
        f"![accuracy over pruning ratio]({options.name}.svg)",
        "",
        *table(
            [*heads, "seconds a model"],
            [
                [f"`{engine}`", *(f"{found[engine, r].accuracy:.1f}" for r in ratios), seconds(found, engine, ratios)]
                for engine in ENGINES
            ],
        ),
        "",
        "Error of the outputs, root mean square, percent of the dense model's outputs, on the same images. It tells",
        "engines apart where accuracy does not:",
        "",
        *table(
            heads,
            [[f"`{engine}`", *(f"{models.output_error(found[engine, r]):.1f}" for r in ratios)] for engine in ENGINES],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        *command("engines.py", repeat(options)),
    ]
    return "\n".join(lines) + "\n"


def seconds(found: Found, engine: str, ratios: list[float]) -> str:
    """Return how long an engine took."""
    times = [time for ratio in ratios if (time := found[engine, ratio].seconds) is not None]
    return f"{min(times):.0f} … {max(times):.0f}" if times else ""


def picture(dense: float, found: Found) -> Callable[[Any], None]:
    """Return what draws accuracy over ratio."""

    def draw(axes: Any) -> None:
        curves = {e: [(r, pruned.accuracy) for (name, r), pruned in found.items() if name == e] for e in ENGINES}
        draw_curves(axes, curves, "share of the weights that goes")
        axes.axhline(dense, color="0.4", lw=0.8, ls="--", label="dense")
        axes.legend(frameon=False)

    return draw


def main() -> None:
    """Measure, and write the page and its picture."""
    options = parser_of(__doc__, ratios="0.3,0.5,0.6,0.7,0.8,0.9").parse_args()
    models = PrunedModels(options)
    found = measure(models, options)
    (HERE / f"{options.name}.md").write_text(page(models, found, options))
    svg, _ = render(picture(models.dense.accuracy, found))
    (HERE / f"{options.name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
