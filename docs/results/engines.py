r"""Prune a model with every engine at several ratios, without faults, and write a page about what is left.

Every layer but the first and the last loses the same share of its weights. Finished layers and figures are kept, so
that an interrupted measurement goes on where it was.

Example:
    python docs/results/engines.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-engines --title "ResNet18 on CIFAR-10, pruned without training"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tables import HERE, command, shown_model, table

from rerampile import compile_model
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file
from rerampile.passes.pruning.engine import ENGINES
from rerampile.pruner import prune_model, remove_checkpoint
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import open_dataset, training_split
from rerampile.runtime.journal import Journal
from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.pictures import render
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.session import open_session


class Figure(msgspec.Struct, kw_only=True, frozen=True):
    """One pruned model."""

    engine: str
    ratio: float
    accuracy: float
    seconds: float


def measure(options: argparse.Namespace) -> tuple[float, list[Figure]]:
    """Return the accuracy of the dense model, and of every pruned one, percent."""
    graph = ModelGraph(load_model_file(options.model))
    data = open_dataset(
        options.calibration or training_split(options.data),
        open_session(options.model),
        Preprocessing(),
        default_split="train",
        generate=options.images,
    )
    options.work.mkdir(parents=True, exist_ok=True)
    experiment = {"model": graph.model.sha256, "calibration": data.digest, "images": options.images}
    with Journal(options.work / "journal.jsonl", {**experiment, "data": options.data}) as journal:

        def kept(key: str, make: Callable[[], Any]) -> Any:
            if key not in journal.done:
                journal.add(key, make())
            return journal.done[key]

        def pruned(engine: str, ratio: float) -> dict[str, float]:
            started = time.perf_counter()
            request = PruneRequest(ratios={"*": ratio}, engine=engine)
            layers = options.work / "layers"
            found = prune_model(graph, data, request, images=options.images, checkpoint=layers)
            seconds = time.perf_counter() - started
            remove_checkpoint(layers)
            print(f"{engine} {ratio:g}: {seconds:.0f} s", flush=True)
            return {"accuracy": clean(found, options), "seconds": seconds}

        dense = kept("dense", lambda: clean(options.model, options))
        return dense, [
            Figure(engine=engine, ratio=ratio, **kept(f"{engine} {ratio:g}", lambda e=engine, r=ratio: pruned(e, r)))
            for ratio in map(float, options.ratios.split(","))
            for engine in ENGINES
        ]


def clean(model: Any, options: argparse.Namespace) -> float:
    """Return the accuracy of a deployment of a model without faults."""
    folder = options.work / "clean.deployment"
    compile_model(model, out=folder)
    return next(iter(Bench(Experiment(folder=folder, data=options.data)).clean.values.values()))


def page(dense: float, figures: list[Figure], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    ratios = sorted({figure.ratio for figure in figures})
    found = {(figure.engine, figure.ratio): figure for figure in figures}
    words = [shown_model(options.model), "--data", options.shown_data, "--name", options.name]
    words += ["--title", options.title, "--images", str(options.images), "--ratios", options.ratios]
    lines = [
        f"# {options.title}",
        "",
        f"Accuracy without faults, percent, after pruning at once from {options.images} training images, without",
        f"labels or training; {dense:.2f} % for the dense model. Every layer but the first and the last loses the same",
        "share.",
        "",
        f"![accuracy over pruning ratio]({options.name}.svg)",
        "",
        *table(
            ["engine", *(f"{ratio:.0%}" for ratio in ratios), "seconds a model"],
            [
                [f"`{engine}`", *(f"{found[engine, r].accuracy:.1f}" for r in ratios), seconds(found, engine, ratios)]
                for engine in ENGINES
            ],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        *command("engines.py", words),
    ]
    return "\n".join(lines) + "\n"


def seconds(found: dict[tuple[str, float], Figure], engine: str, ratios: list[float]) -> str:
    """Return how long an engine took."""
    times = [found[engine, ratio].seconds for ratio in ratios]
    return f"{min(times):.0f} … {max(times):.0f}"


def picture(dense: float, figures: list[Figure]) -> Callable[[Any], None]:
    """Return what draws accuracy over ratio."""

    def draw(axes: Any) -> None:
        for engine in ENGINES:
            points = [(figure.ratio, figure.accuracy) for figure in figures if figure.engine == engine]
            axes.plot(*zip(*points, strict=True), "o-", label=engine)
        axes.axhline(dense, color="0.4", lw=0.8, ls="--", label="dense")
        axes.set_xlabel("share of the weights that goes")
        axes.set_ylabel("accuracy without faults (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return draw


def main() -> None:
    """Measure, and write the page and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="what accuracy is measured on, as of 'rerampile validate'")
    parser.add_argument("--shown-data", help="how the page names the data, where they lie elsewhere for others")
    parser.add_argument("--calibration", help="what pruning learns from; the data, @train")
    parser.add_argument("--images", type=int, default=512, help="of the calibration")
    parser.add_argument("--ratios", default="0.3,0.5,0.6,0.7,0.8,0.9")
    parser.add_argument("--name", required=True, help="of the page")
    parser.add_argument("--title", required=True)
    parser.add_argument("--note", help="what readers should know")
    parser.add_argument("--work", type=Path, default=Path("results.work"), help="where finished figures are kept")
    options = parser.parse_args()
    options.shown_data = options.shown_data or options.data
    dense, figures = measure(options)
    (HERE / f"{options.name}.md").write_text(page(dense, figures, options))
    svg, _ = render(picture(dense, figures))
    (HERE / f"{options.name}.svg").write_text(svg)


if __name__ == "__main__":
    main()
