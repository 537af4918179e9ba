"""Many simulated chips of one deployment: each is drawn, run on the data, scored, and put back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime

from rerampile.checks import check_checksums
from rerampile.deployment import Deployment, load_deployment
from rerampile.errors import ConfigError, DataError
from rerampile.files import CONDUCTANCES, DEPLOYED
from rerampile.onnx_file import file_sha256
from rerampile.runtime.copy_places import refuse_weight_rates
from rerampile.runtime.data import (
    Dataset,
    ImageDataset,
    open_dataset,
    training_split,
    with_absolute_paths,
    write_first_image,
)
from rerampile.runtime.dataset import spread
from rerampile.runtime.detection import DetectionOptions
from rerampile.runtime.executor import Executor, Inputs, Layout, Precision, open_executor
from rerampile.runtime.fault_map import ChipGeometry, FaultMap, placement_digest, read_fault_maps
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector, LayerFaults
from rerampile.runtime.journal import Journal
from rerampile.runtime.metrics import Metric, MetricResult, open_metric
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.programmed_chip import chip_faults, compiled_deployment
from rerampile.runtime.quantised import require_int8
from rerampile.runtime.random_field import Field
from rerampile.runtime.session import open_declared, release_memory
from rerampile.runtime.workers import Workers
from rerampile.version import __version__

__all__ = ["Bench", "ChipResult", "Experiment", "Learned", "experiment_record", "run_chips", "software_versions"]

_CALIBRATION_IMAGES = 64  # of which int8 learns ranges
_CALIBRATION_BATCH = 8  # all activations of as many are in memory at once
_IMAGES = 100  # purpose of the random field that chooses each chip's images; faults use smaller numbers

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a chip's result depends on, but for the number of the chip.

    Attributes:
        folder: The deployment.
        faults: A fault model for each failure rate; empty where ``fault_map`` is given.
        fault_map: A file of measured or drawn chips to run instead of drawing any, or None.
        data: What it is measured on, as the command line names it.
        preprocessing: How images become inputs.
        metric: ``auto``, or the name of a metric.
        detection: How outputs become boxes, where the model does not say.
        images: Images of the data to use, evenly spread over it, or None for all.
        images_per_run: Images that each chip sees, drawn anew for each, or None for all that are used.
        batch: Images run at once.
        seed: Seed of the faults and of the choice of images.
        provider: ONNX Runtime execution provider.
        precision: The arithmetic of the chips and of the fault-free model that they are compared with.
        calibration: Data from which int8 learns the ranges of activations; None for the training images beside
            ``data``, or ``data`` where it has no splits.
        skip_bad: Whether images that cannot be read are left out.
        first_image: Where to write the first image as the model sees it, or None.
    """

    folder: Path
    faults: tuple[FaultModel, ...] = ()
    fault_map: Path | None = None
    data: str = "generated"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    metric: str = "auto"
    detection: DetectionOptions = field(default_factory=DetectionOptions)
    images: int | None = None
    images_per_run: int | None = None
    batch: int = 32
    seed: int = 0
    provider: str = "CPUExecutionProvider"
    precision: Precision = "fp32"
    calibration: str | None = None
    skip_bad: bool = False
    first_image: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ChipResult:
    """One chip at one failure rate.

    Attributes:
        run: Number of the chip.
        rate: Index of the fault model in the experiment; 0 for chips of a fault map.
        values: Metrics, percent.
        clean: The same metrics of the fault-free deployment on the same images.
        within: How much the drop varies with the choice of images, times their number, squared points, by metric; see
            :class:`~rerampile.runtime.metrics.Beside`.
        stuck_off: Cells found stuck off.
        stuck_on: Cells found stuck on.
        non_finite: Images with an output that is not finite.
        by_class: The first of the values by class, where it has classes.
        categories: Cells found that failed in other ways, by name.
    """

    run: int
    rate: int
    values: dict[str, float]
    clean: dict[str, float]
    within: dict[str, float]
    stuck_off: int
    stuck_on: int
    non_finite: int
    by_class: dict[str, float]
    categories: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """What int8 learns the ranges of activations from.

    Attributes:
        name: The data.
        images: How many of its images.
        inputs: Their batches, held in memory.
    """

    name: str
    images: int
    inputs: list[Inputs]

    @property
    def digest(self) -> str:
        """sha256 of the inputs, as hex."""
        found = hashlib.sha256()
        for name, array in (item for inputs in self.inputs for item in inputs.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a bench finds out when it is opened, and others of the same experiment on the same machine need not.

    Attributes:
        metric: The metric, with what it learned from the fault-free model.
        clean: The fault-free score on all images.
        layout: Of the executor; None where it has none.
    """

    metric: Metric
    clean: MetricResult
    layout: Layout | None


class Bench:
    """Everything that one process needs to measure chips, opened once.

    Args:
        experiment: What is measured.
        learned: What another bench of the same experiment on this machine found out.

    Raises:
        RerampileError: The deployment, the data or the options do not fit together.
    """

    def __init__(self, experiment: Experiment, learned: Learned | None = None) -> None:
        self.experiment = experiment
        self.deployment = load_deployment(experiment.folder)
        if learned is None:
            check_checksums(self.deployment)
        self.compiled = compiled_deployment(self.deployment)
        refuse_weight_rates(self.deployment, experiment.faults)
        self.injector = Injector(self.deployment)
        self.geometry = ChipGeometry.of(self.deployment)
        session = open_declared(self.deployment.model_path)
        self.data = self._open_data(experiment.data, session)
        self.calibration = self._open_calibration(session) if learned is None or learned.layout is None else None
        self.executor = self._open_executor(experiment.precision, None if learned is None else learned.layout)
        self.metric = (
            open_metric(experiment.metric, self.data, session, experiment.detection)
            if learned is None
            else learned.metric
        )
        self.images = spread(len(self.data), min(len(self.data), experiment.images or len(self.data)))
        self.measured = self._measured()
        del session
        release_memory()
        if experiment.first_image is not None:
            self.deployment.require_outside(experiment.first_image)
            if not isinstance(self.data, ImageDataset):
                raise ConfigError(f"--first-image: {self.data.name} has no images; name a data set of images")
            write_first_image(self.data, experiment.first_image)
        self.clean = self._learn() if learned is None else learned.clean
        self.images = self.clean.indices  # without those that could not be read
        if experiment.images_per_run is not None:
            self._check_images_per_run(experiment.images_per_run)

    def _measured(self) -> list[FaultMap]:
        """Return the chips that are known: those of a fault map, or the one that the deployment was programmed for."""
        own, experiment = chip_faults(self.deployment), self.experiment
        if own is None:
            return [] if experiment.fault_map is None else read_fault_maps(experiment.fault_map, self.deployment)
        if experiment.fault_map is not None:
            raise ConfigError(
                f"{self.deployment.folder}: programmed for one chip, whose stuck cells it holds; leave --fault-map out"
            )
        return [own]

    @property
    def is_measured(self) -> bool:
        """Whether chips are known, not drawn."""
        return self.experiment.fault_map is not None or self.deployment.plan.chip is not None

    @property
    def skipped(self) -> dict[str, str]:
        """Images that could not be read and were left out, by name, with the reason."""
        if not isinstance(self.data, ImageDataset):
            return {}
        return {str(self.data.names[index]): reason for index, reason in sorted(self.data.skipped.items())}

    @property
    def learned(self) -> Learned:
        """What other benches of the experiment on this machine need not find out again."""
        return Learned(metric=self.metric, clean=self.clean, layout=self.executor.layout)

    def _open_data(self, spec: str, session: Any, split: str = "test") -> Dataset:
        experiment = self.experiment
        return open_dataset(
            spec,
            session,
            experiment.preprocessing,
            default_split=split,
            generate=experiment.images or 64,
            seed=experiment.seed,
            skip_bad=experiment.skip_bad,
        )

    def _open_calibration(self, session: Any) -> Calibration | None:
        """Read what int8 learns ranges from."""
        experiment, given = self.experiment, self.experiment.calibration
        if experiment.precision != "int8":
            if given is not None:
                raise ConfigError("--calibration: nothing to calibrate in fp32; leave it out, or say --precision int8")
            return None
        require_int8(self.deployment)
        spec = given or training_split(experiment.data)
        try:
            data = self._open_data(spec, session, "train")
            wanted = spread(len(data), min(len(data), _CALIBRATION_IMAGES))
            batches = list(data.batches(_CALIBRATION_BATCH, wanted))
            return Calibration(spec, sum(len(b.indices) for b in batches), [b.inputs for b in batches])
        except (ConfigError, DataError) as error:
            more = "" if given else "; name other data with --calibration"
            raise type(error)(f"--calibration {spec}: {str(error).removeprefix('--data: ')}{more}") from error

    def _open_executor(
        self, precision: Precision, layout: Layout | None = None, deployment: Deployment | None = None
    ) -> Executor:
        inputs = self.calibration.inputs if precision == "int8" and self.calibration is not None else ()
        return open_executor(
            self.deployment if deployment is None else deployment,
            precision=precision,
            provider=self.experiment.provider,
            calibration=inputs,
            layout=layout,
        )

    def clean_in_fp32(self) -> dict[str, float]:
        """Return the metrics of the fault-free deployment on all images in fp32, whatever chips run in."""
        return self._score(self.images, self._open_executor("fp32", deployment=self.compiled)).values

    def _check_images_per_run(self, count: int) -> None:
        if not 0 < count <= len(self.images):
            raise ConfigError(f"--images-per-run {count}: expected 1 to {len(self.images)}, the images that are used")

    def _learn(self) -> MetricResult:
        """Score the fault-free deployment on all images; metrics that compare with it learn its outputs first.

        Of a programmed chip that is the deployment that was compiled; where that is not there, the chip as far as its
        cells can hold what they are stuck at.
        """
        executor, scored = self.executor, self.metric.fresh()
        if self.compiled is not None:
            executor = self._open_executor(self.experiment.precision, deployment=self.compiled)
        for batch in self.data.batches(self.experiment.batch, self.images):
            outputs = executor.run(batch.inputs)
            self.metric.learn(outputs, batch)
            scored.update(outputs, batch)
        return scored.result()

    def _score(self, indices: Indices, executor: Executor) -> MetricResult:
        metric = self.metric.fresh()
        for batch in self.data.batches(self.experiment.batch, indices):
            metric.update(executor.run(batch.inputs), batch)
        return metric.result()

    @property
    def rates(self) -> int:
        """How many failure rates each chip is run at."""
        return 1 if self.is_measured else len(self.experiment.faults)

    def fault_map(self, run: int, rate: int) -> FaultMap:
        """Return the faults of a chip at a failure rate."""
        if self.is_measured:
            return self.measured[run]
        model = self.experiment.faults[rate]
        return draw_faults(self.geometry, model, self.deployment.target, seed=self.experiment.seed, run=run)

    def key(self, run: int, rate: int) -> str:
        """Return the key of a chip's result in the journal, the same whatever other rates are run."""
        return f"run {run}" if self.is_measured else f"run {run} {self.experiment.faults[rate].key}"

    def images_of(self, run: int) -> Indices:
        """Return which images a chip sees."""
        count = self.experiment.images_per_run
        if count is None:
            return self.images
        numbers = Field(self.experiment.seed, run, _IMAGES).at(self.images)
        return self.images[np.sort(np.argsort(numbers, kind="stable")[:count])]

    def chip(self, run: int, rate: int) -> ChipResult:
        """Measure one chip at one failure rate."""
        found = self.fault_map(run, rate)
        faults: Sequence[LayerFaults] = self.injector.faults(found)
        indices = self.images_of(run)
        self.executor.apply(faults)
        try:
            result = self._score(indices, self.executor)
        finally:
            self.executor.restore()
        beside = self.metric.beside(result, self.clean)
        return ChipResult(
            run=run,
            rate=rate,
            values=result.values,
            clean=beside.clean,
            within=beside.variances,
            stuck_off=found.stuck_off,
            stuck_on=found.stuck_on,
            non_finite=result.non_finite,
            by_class=result.by_class,
            categories=found.categories,
        )


def run_chips(
    bench: Bench,
    work: Sequence[tuple[int, int]],
    journal: Journal,
    *,
    workers: Workers | None = None,
    progress: Callable[[ChipResult], None] | None = None,
) -> list[ChipResult]:
    """Measure chips, each once: what the journal holds is not done again.

    Results depend on the experiment and on the number of the chip alone, never on the number of workers or on the
    order in which they finish.

    Args:
        bench: What is measured; used itself without workers, its experiment opened anew by each of them.
        work: (run, rate) of each wanted result.
        journal: Where results are kept as they come.
        workers: What measures instead of this process.
        progress: Called with each new result.

    Raises:
        FaultRunError: Workers were lost; what was finished is in the journal.
        DataError: A worker has other files or other software.
    """
    waiting = [item for item in work if bench.key(*item) not in journal.done]
    measured = (
        workers.each(_Chips.of(bench), waiting) if workers is not None else (bench.chip(*item) for item in waiting)
    )
    for result in measured:
        kept = dataclasses.asdict(result)
        del kept["rate"]  # a position, which another start may count otherwise
        journal.add(bench.key(result.run, result.rate), kept)
        if progress is not None:
            progress(result)
    try:
        return [msgspec.convert({**journal.done[bench.key(*item)], "rate": item[1]}, ChipResult) for item in work]
    except (msgspec.ValidationError, TypeError) as error:
        raise DataError(
            f"{journal.path}: an entry is no result of a chip: {error}; remove the file to start anew"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Chips:
    """Chips as work for workers, which give the very results that a bench gives.

    Attributes:
        experiment: What is measured.
        expected: What a worker elsewhere has to have alike: software and the experiment's record.
        learned: What the bench found out; None where each worker does itself.
    """

    experiment: Experiment
    expected: Mapping[str, Any]
    learned: Learned | None = field(compare=False)

    @classmethod
    def of(cls, bench: Bench) -> _Chips:
        """Return the chips of a bench."""
        return cls(
            experiment=replace(bench.experiment, first_image=None),
            expected={**software_versions(), **experiment_record(bench)},
            learned=bench.learned,
        )

    def open(self) -> Callable[[tuple[int, int]], ChipResult]:
        """Open a bench.

        Raises:
            RerampileError: It cannot be opened here, or would give other results.
        """
        if self.learned is None:
            self._check(software_versions())
        bench = Bench(self.experiment, self.learned)
        if self.learned is None:
            self._check(experiment_record(bench))
        return lambda item: bench.chip(*item)

    def _check(self, found: Mapping[str, Any]) -> None:
        for key, value in found.items():
            if value != self.expected[key]:
                raise DataError(
                    f"{key} is {json.dumps(value)}, expected {json.dumps(self.expected[key])} as where the run was "
                    f"started; give workers the same software, and the same files under the same paths"
                )

    def elsewhere(self) -> _Chips:
        """Return the same chips for other machines."""
        experiment = self.experiment
        return replace(
            self,
            experiment=replace(
                experiment,
                folder=experiment.folder.absolute(),
                fault_map=None if experiment.fault_map is None else experiment.fault_map.absolute(),
                data=with_absolute_paths(experiment.data),
                calibration=None if experiment.calibration is None else with_absolute_paths(experiment.calibration),
            ),
            learned=None,
        )


def software_versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    return {"rerampile": __version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def experiment_record(bench: Bench) -> Mapping[str, Any]:
    """Return what makes results of two starts comparable, for the head of the journal."""
    experiment = bench.experiment
    plan = bench.deployment.plan
    chip, protection = plan.chip, plan.protection
    return {
        "plan": placement_digest(plan),
        "target": hashlib.sha256(json.dumps(plan.target, sort_keys=True).encode()).hexdigest(),
        "conductances": plan.files[CONDUCTANCES].sha256,
        "model": plan.files[DEPLOYED].sha256,
        "fault_map": None if experiment.fault_map is None else _digest(experiment.fault_map),
        "data": bench.data.digest,
        "preprocessing": dataclasses.asdict(experiment.preprocessing),
        "metric": experiment.metric,
        "images": len(bench.images),
        "images_per_run": experiment.images_per_run,
        "batch": experiment.batch,
        "seed": experiment.seed,
        "provider": experiment.provider,
        "precision": experiment.precision,
        "calibration": None if bench.calibration is None else bench.calibration.digest,
        "detection": dataclasses.asdict(experiment.detection),
        "versions": software_versions(),
        **({} if chip is None else {"compiled": bench.compiled and chip.compiled_sha256}),
        **({} if chip is None else {"faults": plan.files[chip.faults].sha256}),
        **({} if protection is None else {"protection": [protection.slices, protection.vote]}),
    }


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
