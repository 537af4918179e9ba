r"""Measure what training gives a pruned model, with and without stuck cells, and write a page about it.

Three ways to the same ratio: pruned by magnitude, pruned by the default engine, and ADMM with backpropagation (Zhang et
al. 2018), which Yuan et al. 2021 prune with; beside them the dense model. Each is measured as it is, trained, and
trained with random defects at every step (Kim et al. 2020), without faults and as chips with stuck cells. Every layer
but the first and the last is pruned. Pruned and trained models, epochs and chips are kept, so that an interrupted
measurement goes on where it was.

The first training images are used: 40,000 of CIFAR-10 are what models/train_resnet18.py trained with, and leave
data_batch_5 unseen.

Example:
    python docs/results/training.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-training --title "Training, ResNet18 on CIFAR-10"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from pruned_models import PrunedModels, parser_of, repeat
from tables import HERE, accuracy, command, table

from rerampile import compile_model
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file, write_model_file
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import open_dataset, training_split
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.journal import Journal
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.pictures import render
from rerampile.runtime.session import open_session
from rerampile.runtime.validation import MetricReport, validate
from rerampile.training.finetune import FinetuneRequest, finetune
from rerampile.training.stuck_weights import Defects

Way = Literal["dense", "magnitude", "admm", "admm-backprop"]
Training = Literal["none", "plain", "defects"]

WAYS: dict[Way, str] = {
    "dense": "dense",
    "magnitude": "`prune --method magnitude`",
    "admm": "`prune`",
    "admm-backprop": "ADMM with backpropagation",
}
TRAININGS: dict[Training, str] = {"none": "none", "plain": "without defects", "defects": "with random defects"}


@dataclass(frozen=True)
class Case:
    """A model: how it was pruned, and how it was trained then, or meanwhile."""

    way: Way
    ratio: float
    training: Training

    @property
    def name(self) -> str:
        """What names its files."""
        return f"{self.way}-{self.ratio:g}-{self.training}"


@dataclass(frozen=True)
class Found:
    """What a case came to.

    Attributes:
        chips: Accuracy without faults, and of chips.
        seconds: How long training took; None where there was none, or it was interrupted.
    """

    chips: MetricReport
    seconds: float | None


def cases(ratios: str) -> Iterator[Case]:
    """Yield all of them: what is trained with weights of its own choice is never untrained."""
    for training in TRAININGS:
        yield Case("dense", 0.0, training)
    for ratio in map(float, ratios.split(",")):
        for way in WAYS:
            if way != "dense":
                yield from (Case(way, ratio, t) for t in TRAININGS if (way, t) != ("admm-backprop", "none"))


class TrainedModels:
    """Trained models, each made once, in a folder that belongs to the model, the data and how they are trained.

    Args:
        options: See :func:`main`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options, self._pruned = options, PrunedModels(options)
        self._data = open_dataset(
            options.calibration or training_split(options.data), open_session(options.model), default_split="train"
        )
        words = [options.epochs, options.train_images, options.batch, f"{options.learning_rate:g}", f"{options.rate:g}"]
        words += [options.mapping, options.scale, *(["augment"] if options.augment else [])]
        self.folder = options.work / "-".join(["trained", *map(str, words)])
        self.folder.mkdir(exist_ok=True)
        model = load_model_file(options.model)
        self._journal = Journal(self.folder / "seconds.jsonl", {"model": model.sha256, "data": self._data.digest})

    def find(self, case: Case) -> tuple[Path, float | None]:
        """Return a case's model and how long its training took; train it where it is not there yet."""
        if case.training == "none":
            return self._start(case), None
        path = self.folder / f"{case.name}.onnx"
        if case.name not in self._journal.done:
            self._journal.add(case.name, self._train(case, path))
        return path, self._journal.done[case.name]

    def _start(self, case: Case) -> Path:
        if case.way in ("dense", "admm-backprop"):
            return self._pruned.dense.path
        return self._pruned.find(PruneRequest(ratios={"*": case.ratio}, engine=case.way)).path

    def _train(self, case: Case, path: Path) -> float | None:
        """Write a trained model; return the seconds, None where it was gone on with."""
        checkpoint = path.with_suffix(".unfinished.safetensors")
        resumed, started = checkpoint.exists(), time.perf_counter()
        found = finetune(
            ModelGraph(load_model_file(self._start(case))),
            self._data,
            self._request(case),
            images=self._options.train_images,
            checkpoint=checkpoint,
        )
        seconds = time.perf_counter() - started
        write_model_file(found.model, path)
        checkpoint.unlink()
        losses = ", ".join(f"{epoch.loss:.4f}" for epoch in found.epochs)
        print(f"{case.name}: {seconds:.0f} s, loss {losses}", flush=True)
        return None if resumed else seconds

    def _request(self, case: Case) -> FinetuneRequest:
        options = self._options
        defects = Defects(faults=FaultModel.of_rate(options.rate), mapping=options.mapping, scale=options.scale)
        return FinetuneRequest(
            epochs=options.epochs,
            batch=options.batch,
            learning_rate=options.learning_rate,
            augment=options.augment,
            ratios={"*": case.ratio} if case.way == "admm-backprop" else {},
            defects=defects if case.training == "defects" else None,
        )

    def run(self, case: Case) -> Found:
        """Run the chips of a case's model."""
        options = self._options
        model, seconds = self.find(case)
        folder = self.folder / "chips.deployment"
        compile_model(model, out=folder, mapping=options.mapping, scale=options.scale)
        experiment = Experiment(
            folder=folder,
            faults=(FaultModel.of_rate(options.rate),),
            data=options.data,
            images_per_run=options.images_per_run,
        )
        report = validate(experiment, self.folder / f"{case.name}.journal.jsonl", runs=options.runs)
        found = Found(next(iter(report.rates[0].metrics.values())), seconds)
        print(f"{case.name}: {found.chips.clean:.2f} % without faults, {found.chips.mean:.2f} % as chips", flush=True)
        return found


def page(found: dict[Case, Found], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    few = options.images_per_run
    seen = "all test images" if few is None else f"{few} of the test images a chip, drawn anew for each"
    moved = ", mirrored and moved at random" if options.augment else ""
    lines = [
        f"# {options.title}",
        "",
        f"Accuracy, percent, without faults and as {options.runs} simulated chips: the mean with its 95 % interval,",
        f"and the worst chip in brackets. Failure rate {options.rate:g}, `{options.mapping}`, one scale a",
        f"{options.scale}, {seen}. Every layer but the first and the last loses the share.",
        f"Pruned without training from {options.images} images, trained with `rerampile finetune`: {options.epochs}",
        f"epochs of the first {options.train_images:,} training images{moved}, {options.batch} a step, learning rate",
        f"{options.learning_rate:g}; random defects are of the chips' own rate, mapping and scale. Each model was",
        "trained once, so what another seed would give is not in the intervals.",
        "",
        f"![accuracy of chips]({options.name}.svg)",
        "",
        *table(
            ["share that goes", "pruned by", "training", "without faults", "chips", "drop", "minutes of training"],
            [row(case, result) for case, result in found.items()],
        ),
        "",
        *([] if options.note is None else [options.note, ""]),
        f"Every chip's value is in [{options.name}.json]({options.name}.json).",
        *command("training.py", words(options)),
    ]
    return "\n".join(lines) + "\n"


def row(case: Case, found: Found) -> list[str]:
    """Return a line of the table."""
    chips, time_taken = found.chips, "" if found.seconds is None else f"{found.seconds / 60:.0f}"
    low, high = chips.drop_interval or (chips.drop, chips.drop)
    pruned, drop = [f"{case.ratio:.0%}", WAYS[case.way]], f"{chips.drop:.2f} ± {(high - low) / 2:.2f}"
    return [*pruned, TRAININGS[case.training], f"{chips.clean:.2f}", accuracy(chips), drop, time_taken]


def words(options: argparse.Namespace) -> list[str]:
    """Return the arguments that repeat the page."""
    found = repeat(options)
    for name in ("epochs", "train_images", "batch", "learning_rate", "rate", "mapping", "scale", "runs"):
        found += [f"--{name.replace('_', '-')}", f"{getattr(options, name)}"]
    found += [] if options.images_per_run is None else ["--images-per-run", str(options.images_per_run)]
    found += [] if options.augment else ["--no-augment"]
    return found + ([] if options.cases is None else ["--cases", options.cases])


def picture(found: dict[Case, Found]) -> Callable[[Any], None]:
    """Return what draws the accuracy of each way, training beside training; a dash is the one without faults."""
    places = {place: n for n, place in enumerate(dict.fromkeys((case.way, case.ratio) for case in found))}

    def draw(axes: Any) -> None:
        for number, (training, label) in enumerate(TRAININGS.items()):
            chosen = [(case, result.chips) for case, result in found.items() if case.training == training]
            x = [places[case.way, case.ratio] + 0.25 * (number - 1) for case, _ in chosen]
            half = [(m.interval[1] - m.interval[0]) / 2 if m.interval else 0.0 for _, m in chosen]
            means = [m.mean for _, m in chosen]
            (line, *_) = axes.errorbar(x, means, half, fmt="o", ms=4, capsize=2, label=f"training: {label}")
            axes.plot(x, [m.clean for _, m in chosen], "_", ms=9, color=line.get_color())
        axes.set_xticks(list(places.values()), [f"{way}\n{ratio:.0%}" for way, ratio in places], fontsize=7)
        axes.set_ylabel("accuracy (%)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=7)

    return draw


def main() -> None:
    """Measure, and write the page, its picture and its numbers."""
    parser = parser_of(__doc__, ratios="0.7,0.9")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--train-images", type=int, default=40_000, help="the first that many, to train with")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rate", type=float, default=0.01, help="failure rate, of chips and of random defects")
    parser.add_argument("--mapping", default="differential")
    parser.add_argument("--scale", choices=["tensor", "channel"], default="tensor")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images-per-run", type=int)
    parser.add_argument("--cases", help="some of them by name, as in admm-0.7-plain, with commas")
    options = parser.parse_args()
    models = TrainedModels(options)
    chosen = None if options.cases is None else options.cases.split(",")
    found = {case: models.run(case) for case in cases(options.ratios) if chosen is None or case.name in chosen}
    (HERE / f"{options.name}.md").write_text(page(found, options))
    svg, _ = render(picture(found))
    (HERE / f"{options.name}.svg").write_text(svg)
    numbers = {case.name: result.chips for case, result in found.items()}
    (HERE / f"{options.name}.json").write_bytes(msgspec.json.encode(numbers) + b"\n")


if __name__ == "__main__":
    main()
