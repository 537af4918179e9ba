"""Pruned versions of a model, each made once and kept: what the pages about pruning share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tables import page_parser, page_words

from rerampile import compile_model
from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file, write_model_file
from rerampile.pruner import prune_model, remove_checkpoint
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import open_dataset, training_split
from rerampile.runtime.journal import Journal
from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.session import open_session, run

__all__ = ["Pruned", "PrunedModels", "draw_curves", "parser_of", "repeat"]

_BATCH = 32


@dataclass(frozen=True)
class Pruned:
    """A pruned model.

    Attributes:
        path: Where it is.
        accuracy: Without faults, percent.
        seconds: How long pruning took; None where that is not known, because it was interrupted.
    """

    path: Path
    accuracy: float
    seconds: float | None


class PrunedModels:
    """Pruned versions of one model, in a folder that belongs to this model, calibration and number of images.

    Args:
        options: See :func:`parser_of`.

    Attributes:
        tested: Images that accuracy is measured on.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        options.work.mkdir(parents=True, exist_ok=True)
        self._options, self._graph = options, ModelGraph(load_model_file(options.model))
        spec = options.calibration or training_split(options.data)
        session = open_session(options.model)
        self._data = open_dataset(spec, session, default_split="train", generate=options.images)
        self.tested = len(open_dataset(options.data, session))
        identity = {"model": self._graph.model.sha256, "calibration": self._data.digest, "images": options.images}
        self._journal = Journal(options.work / "pruned.jsonl", {**identity, "data": options.data})

    @property
    def dense(self) -> Pruned:
        """The model itself."""
        return Pruned(self._options.model, self._kept("dense", lambda: self._accuracy(self._options.model)), None)

    def find(self, request: PruneRequest) -> Pruned:
        """Return the model pruned as requested, and make it where it is not there yet."""
        words = [request.engine, request.structure, request.values, *(f"{k}={r:g}" for k, r in request.ratios.items())]
        name = "-".join(words).replace("*=", "").replace(":", "of")
        path = self._options.work / f"{name}.onnx"

        def make() -> float | None:
            layers = self._options.work / "layers"
            resumed, started = layers.exists(), time.perf_counter()
            found = prune_model(self._graph, self._data, request, images=self._options.images, checkpoint=layers)
            seconds = time.perf_counter() - started
            write_model_file(found.model, path)
            remove_checkpoint(layers)
            print(f"{name}: {seconds:.0f} s", flush=True)
            return None if resumed else seconds

        seconds = self._kept(f"{name} seconds", make)
        return Pruned(path, self._kept(name, lambda: self._accuracy(path)), seconds)

    def output_error(self, pruned: Pruned) -> float:
        """Return the root mean square by which outputs differ from the dense model's, as a share of theirs, percent.

        It tells models apart that accuracy on few images does not.
        """
        return self._kept(f"{pruned.path.stem} error", lambda: self._output_error(pruned.path))

    def _kept(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._journal.done:
            self._journal.add(key, make())
        return self._journal.done[key]

    def _accuracy(self, model: Path) -> float:
        folder = self._options.work / "clean.deployment"
        compile_model(model, out=folder)
        return next(iter(Bench(Experiment(folder=folder, data=self._options.data)).clean.values.values()))

    def _output_error(self, model: Path) -> float:
        expected = self._dense_outputs
        return 100 * float(np.linalg.norm(self._outputs(model) - expected) / np.linalg.norm(expected))

    @cached_property
    def _dense_outputs(self) -> Any:
        return self._outputs(self._options.model)

    def _outputs(self, model: Path) -> Any:
        session = open_session(model)
        batches = open_dataset(self._options.data, session).batches(_BATCH)
        return np.concatenate([run(session, batch.inputs)[0] for batch in batches]).astype(np.float64)


def parser_of(description: str | None, *, ratios: str) -> argparse.ArgumentParser:
    """Return a parser of what all pages about pruning are made from."""
    parser = page_parser(description, calibration="pruning methods")
    parser.add_argument("--images", type=int, default=512, help="of the calibration")
    parser.add_argument("--ratios", default=ratios)
    return parser


def draw_curves(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]], across: str) -> None:
    """Draw accuracy without faults over something, one line for each name."""
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set_xlabel(across)
    axes.set_ylabel("accuracy without faults (%)")
    axes.grid(alpha=0.3)


def repeat(options: argparse.Namespace) -> list[str]:
    """Return the arguments that repeat a page, but for those that it alone has."""
    return [*page_words(options), "--images", str(options.images), "--ratios", options.ratios]
