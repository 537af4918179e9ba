"""Search what to prune so that chips tolerate stuck cells: every step is pruned, compiled and run as a deployment."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from rerampile.asked_constraint import inputs_of_pattern, on_target
from rerampile.compiler import check_replaceable, compile_model
from rerampile.deployment import Deployment
from rerampile.errors import ConfigError, DataError
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.passes.pruning.ratios import protected_layers
from rerampile.pruner import check_request, prune_model
from rerampile.pruning import PruneRequest
from rerampile.runtime.data import open_dataset
from rerampile.runtime.dataset import Dataset
from rerampile.runtime.forecast import forecast
from rerampile.runtime.journal import Journal
from rerampile.runtime.monte_carlo import ChipResult, Experiment, software_versions
from rerampile.runtime.progressive import Hopeless, Measured, Rules, SearchStep, check_search, search
from rerampile.runtime.search_report import Outcome, SearchReport, beside
from rerampile.runtime.session import open_session
from rerampile.runtime.validation import ValidationReport, validate
from rerampile.schemes import WEIGHED, Scale
from rerampile.target import Target

__all__ = ["DEPLOYMENT", "UNFINISHED", "SearchRequest", "remove_unfinished", "search_model"]

DEPLOYMENT, UNFINISHED = "deployment", "unfinished"
_FORLORN = 0.5  # share of the clean accuracy that chips of the unpruned model have to keep
_FAR = 2.0  # thresholds by which a step has to be predicted to fail before it is skipped

ChipsProgress = Callable[[int, int, ChipResult | None], None]


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What is searched.

    Attributes:
        model: The model file.
        target: The hardware.
        mapping: As of :func:`rerampile.compile_model`.
        scale: As of :func:`rerampile.compile_model`.
        clip: The same.
        correct: The same.
        pruning: How blocks are pruned; its ratios are what is searched.
        calibration: Images that pruning, clipping and correcting learn from.
        calibration_images: How many of them.
        selection: Chips, of one fault model, and data by which steps are judged; its folder has no meaning.
        reported: The same for the final figures; other data than those of ``selection`` where there are any.
        schedule: Ratios to try, ascending.
        order: Which blocks are taken off the search first: those with the fewest weights, with the most, or in the
            order of the model.
        rules: What is accepted.
        selection_runs: Chips a step.
        runs: Chips of the final figures.
        predict: Whether steps that are predicted to fail by far are not run.
    """

    model: Path
    target: Target
    mapping: str | None = None
    scale: Scale = "channel"
    clip: bool = False
    correct: bool = False
    pruning: PruneRequest
    calibration: Dataset
    calibration_images: int = 256
    selection: Experiment
    reported: Experiment
    schedule: Sequence[float]
    order: Literal["ascending", "descending", "model"] = "ascending"
    rules: Rules = field(default_factory=Rules)
    selection_runs: int = 20
    runs: int = 100
    predict: bool = False


def search_model(
    request: SearchRequest,
    out: Path,
    *,
    report: Callable[[SearchStep], None] = lambda _: None,
    progress: ChipsProgress | None = None,
) -> SearchReport:
    """Search, and leave the best deployment in ``out``.

    The best step is run on fresh chips beside the unpruned model before it is chosen, because the best of many is
    partly the luckiest; where it is worse there, the unpruned model is the result. The final figures come from other
    chips again.

    Args:
        request: What is searched.
        out: A folder; finished steps are kept in it, so that the same call goes on.
        report: Called with each step.
        progress: Called with the chips of a step as they end.

    Raises:
        RerampileError: What the user can mend.
    """
    check_replaceable(out / DEPLOYMENT)
    bench = _Steps(request, out / UNFINISHED, progress)
    start = bench.measure({}, None)
    _check_start(start, bench.metric, request.selection)
    path = search(bench.blocks, request.schedule, bench.judge(start), start, request.rules, report)
    best = path.steps[path.best].ratios
    fresh = replace(request.selection, seed=request.selection.seed + 1)
    confirmed = bench.beside(best, fresh, request.selection_runs) if path.best else None
    kept = best if _holds(confirmed) else dict.fromkeys(bench.blocks, 0.0)
    final = bench.beside(kept, replace(request.reported, seed=request.reported.seed + 2), request.runs)
    bench.compile(kept, out / DEPLOYMENT)
    return SearchReport(
        metric=bench.metric,
        model=request.model.name,
        failure_rate=request.selection.faults[0].rate,
        faults=request.selection.faults[0].key,
        seed=request.selection.seed,
        mapping=bench.mapping,
        scale=request.scale,
        engine=request.pruning.engine,
        structure=request.pruning.structure,
        protect=request.pruning.protect,
        schedule=tuple(request.schedule),
        order=request.order,
        rules=request.rules,
        selection=request.selection.data,
        reported=request.reported.data,
        steps=path.steps,
        best=path.best,
        ratios=dict(kept),
        confirmed=confirmed,
        final=final,
        clip=request.clip or msgspec.UNSET,
        correct=request.correct or msgspec.UNSET,
    )


def remove_unfinished(out: Path) -> None:
    """Remove what a search that is written kept to go on from."""
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _labelled(experiment: Experiment, model: Path) -> Dataset:
    """Open the data; refuse those on which a pruned model can only be compared with itself."""
    preprocessing, skip_bad = experiment.preprocessing, experiment.skip_bad
    data = open_dataset(
        experiment.data, open_session(model), preprocessing, default_split="test", generate=1, skip_bad=skip_bad
    )
    if data.kind == "none" or experiment.metric == "agreement":
        raise ConfigError(
            f"--data {experiment.data}: has no labels or they are not used, expected some to judge pruned models by"
        )
    return data


def _check_start(start: Measured, metric: str, selection: Experiment) -> None:
    if start.mean < _FORLORN * start.clean:
        raise ConfigError(
            f"--failure-rate {selection.faults[0].rate:g}: the unpruned model keeps {start.mean:.1f} of "
            f"{start.clean:.1f} % {metric}, expected half of it or more to search from; choose a lower rate, another "
            f"mapping or --scale channel"
        )


def _holds(confirmed: Outcome | None) -> bool:
    """Whether fresh chips don't show the best step to be worse than the unpruned model."""
    return confirmed is None or confirmed.gain_interval is None or confirmed.gain_interval[1] >= 0


def blocks_of(layers: Sequence[Layer], protected: set[str], order: str) -> list[str]:
    """Return the blocks with layers that can be pruned, in the order in which they are taken off the search."""
    sizes: dict[str, int] = {}
    for layer in layers:
        if layer.name not in protected and not layer.integer:
            sizes[layer.block] = sizes.get(layer.block, 0) + layer.view.shape[0] * layer.view.shape[1]
    if order == "model":
        return list(sizes)
    return sorted(sizes, key=lambda block: sizes[block], reverse=order == "descending")


class _Steps:
    """Measures choices of ratios; each result is kept, so that it is measured once.

    Args:
        request: What is searched.
        folder: Where results, and what is under way, are kept.
        progress: Called as chips end.
    """

    def __init__(self, request: SearchRequest, folder: Path, progress: ChipsProgress | None) -> None:
        self._pruning = on_target(request.pruning, request.target, request.mapping)
        check_request(self._pruning)
        if inputs_of_pattern(self._pruning.structure):
            raise ConfigError(
                f"--structure {self._pruning.structure}: has one ratio only, expected a structure whose ratio can be "
                f"searched, such as weights or columns"
            )
        self._data = [_labelled(experiment, request.model) for experiment in (request.selection, request.reported)]
        folder.mkdir(parents=True, exist_ok=True)
        self._request, self._folder, self._progress = request, folder, progress
        self._graph = ModelGraph(load_model_file(request.model))
        layers, _ = find_layers(self._graph)
        self.blocks = blocks_of(layers, protected_layers(request.pruning.protect, layers), request.order)
        check_search(self.blocks, request.schedule, request.rules)
        self.metric = ""
        self.mapping = request.mapping or request.target.mapping
        self._forecasts: dict[str, float] = {}

    def measure(self, ratios: Mapping[str, float], _: Measured | None) -> Measured:
        """Run the chips of the selection on a choice of ratios."""
        return self._run(ratios, self._request.selection, self._request.selection_runs)

    def judge(self, start: Measured) -> Callable[[Mapping[str, float], Measured], Measured | Hopeless]:
        """Return what measures a step, or skips one that is predicted to fail by far."""
        if not self._request.predict:
            return self.measure

        def measure(ratios: Mapping[str, float], reference: Measured) -> Measured | Hopeless:
            moved = self._forecast(ratios) - self._forecast({})
            loss = reference.mean - (start.mean + moved)
            if loss > _FAR * self._request.rules.threshold:
                return Hopeless(f"predicted to lose {loss:.2f} points, not run")
            return self.measure(ratios, reference)

        return measure

    def beside(self, ratios: Mapping[str, float], experiment: Experiment, runs: int) -> Outcome:
        """Run the same chips on a choice of ratios and on the unpruned model."""
        unpruned = self._run({}, experiment, runs)
        return beside(unpruned, self._run(ratios, experiment, runs) if any(ratios.values()) else unpruned)

    def compile(self, ratios: Mapping[str, float], out: Path) -> Deployment:
        """Prune and compile."""
        request, pruned = self._request, {block: ratio for block, ratio in ratios.items() if ratio > 0}
        calibrated = request.clip or request.correct
        source = (
            prune_model(
                self._graph,
                request.calibration,
                replace(self._pruning, ratios=pruned),
                images=request.calibration_images,
                checkpoint=self._folder / "layers",
            )
            if pruned
            else request.model
        )
        return compile_model(
            source,
            out=out,
            target=request.target,
            mapping=request.mapping,
            faults=request.selection.faults[0] if calibrated or self.mapping in WEIGHED else None,
            scale=request.scale,
            clip=request.clip,
            correct=request.correct,
            calibration=request.calibration if calibrated else None,
            calibration_images=request.calibration_images,
        )

    def _run(self, ratios: Mapping[str, float], experiment: Experiment, runs: int) -> Measured:
        """Return what chips do, from the journal where they were run before."""
        key = json.dumps([sorted(ratios.items()), experiment.data, experiment.seed, runs])
        with Journal(self._folder / "steps.jsonl", self._record()) as journal:
            if key not in journal.done:
                found = self._validated(ratios, experiment, runs)
                metric = next(iter(found.clean))
                values = found.rates[0].metrics[metric].values
                journal.add(key, {"metric": metric, "clean": found.clean[metric], "values": values})
                self._forget(ratios, experiment)
            result = journal.done[key]
        self.metric = result["metric"]
        return Measured(result["clean"], np.array(result["values"]))

    def _validated(self, ratios: Mapping[str, float], experiment: Experiment, runs: int) -> ValidationReport:
        folder = self._place(ratios, experiment)
        shutil.rmtree(folder, ignore_errors=True)  # what a stop left of it
        self.compile(ratios, folder)
        journal = folder.with_suffix(".jsonl")
        return validate(replace(experiment, folder=folder), journal, runs=runs, progress=self._progress)

    def _place(self, ratios: Mapping[str, float], experiment: Experiment) -> Path:
        """Return where the deployment of a step lies; its chips are kept beside it."""
        name = hashlib.sha256(json.dumps([sorted(ratios.items()), experiment.data, experiment.seed]).encode())
        return self._folder / f"{name.hexdigest()[:16]}.deployment"

    def _forget(self, ratios: Mapping[str, float], experiment: Experiment) -> None:
        """Remove what was kept to go on within a step; its result is in the journal now."""
        folder = self._place(ratios, experiment)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".jsonl").unlink(missing_ok=True)

    def _forecast(self, ratios: Mapping[str, float]) -> float:
        """Return roughly what chips do to the metric, from the closed forms alone; NaN where these say nothing."""
        key = json.dumps(sorted(ratios.items()))
        if key not in self._forecasts:
            folder = self._folder / "forecast.deployment"
            shutil.rmtree(folder, ignore_errors=True)
            self.compile(ratios, folder)
            try:
                self._forecasts[key] = forecast(replace(self._request.selection, folder=folder))
            except DataError:  # outputs of the closed forms are not finite: chips have to tell
                self._forecasts[key] = math.nan
            shutil.rmtree(folder)
        return self._forecasts[key]

    def _record(self) -> dict[str, object]:
        """Return what the result of a step depends on, beside its ratios and its chips."""
        request, selection = self._request, self._request.selection
        return {
            "model": self._graph.model.sha256,
            "target": request.target.to_dict(),
            "mapping": self.mapping,
            "scale": request.scale,
            "corrected": [request.clip, request.correct],
            "pruning": asdict(replace(self._pruning, ratios={})),
            "calibration": [request.calibration.digest, request.calibration_images],
            "faults": selection.faults[0].key,
            "selection": [selection.data, self._data[0].digest, selection.images],
            "reported": [request.reported.data, self._data[1].digest, request.reported.images],
            "scored": [selection.metric, selection.images_per_run, asdict(selection.detection), selection.skip_bad],
            "versions": software_versions(),
            "preprocessing": asdict(selection.preprocessing),
        }
