"""Validate a deployment under stuck-at faults: chips, statistics, and the report's numbers."""

from __future__ import annotations

import dataclasses
import operator
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rerampile.errors import ConfigError
from rerampile.failed_cells import CATEGORIES, FailedCells
from rerampile.runtime.fault_map import MOST_CHIPS
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.journal import Journal
from rerampile.runtime.metrics import LOWER_IS_BETTER
from rerampile.runtime.monte_carlo import (
    Bench,
    ChipResult,
    Experiment,
    experiment_record,
    run_chips,
    software_versions,
)
from rerampile.runtime.predict import Prediction
from rerampile.runtime.programmed_chip import CleanOf
from rerampile.runtime.statistics import (
    FIRST_STAGE,
    ChipStatistics,
    chip_statistics,
    chips_needed,
    two_stage_interval,
    variance_parts,
)
from rerampile.runtime.workers import Workers, open_workers

__all__ = ["Int8Report", "RateReport", "Requirement", "RequirementResult", "ValidationReport", "validate"]


class CategoryCount(msgspec.Struct, kw_only=True, frozen=True):
    """Cells of all chips of a rate that failed in one way, as a fraction of all cells.

    Attributes:
        asked: As asked for, in the same way as ``stuck_off``.
        observed: As found.
    """

    asked: float
    observed: float


class FaultCounts(msgspec.Struct, kw_only=True, frozen=True):
    """Stuck cells of all chips of a rate, asked and observed.

    Attributes:
        cells: Physical cells of all chips.
        stuck_off: Fraction of cells asked to be stuck off; of a rate a weight, what it means for cells.
        stuck_on: Fraction of cells asked to be stuck on, the same.
        observed_off: Fraction found stuck off.
        observed_on: Fraction found stuck on.
        response: How the hardware treats failed cells; left out where the target does not say.
        categories: Cells that failed in other ways, by name; left out where none do.
    """

    cells: int
    stuck_off: float
    stuck_on: float
    observed_off: float
    observed_on: float
    response: str | msgspec.UnsetType = msgspec.UNSET
    categories: dict[str, CategoryCount] | msgspec.UnsetType = msgspec.UNSET

    @property
    def asked(self) -> float:
        """Fraction of cells asked to fail in any way."""
        return self.stuck_off + self.stuck_on + sum(count.asked for count in (self.categories or {}).values())

    @property
    def observed(self) -> float:
        """Fraction found."""
        return self.observed_off + self.observed_on + sum(c.observed for c in (self.categories or {}).values())


class MetricReport(msgspec.Struct, kw_only=True, frozen=True):
    """One metric at one failure rate, percent (see :class:`~rerampile.runtime.statistics.ChipStatistics`).

    Attributes:
        chips: Number of chips.
        clean: Without faults, on the same images.
        mean: Mean over chips.
        deviation: Standard deviation over chips; null for one chip.
        worst: The worst chip.
        fifth_percentile: One chip in twenty is worse.
        interval: 95 % interval of the mean; null for one chip.
        drop: Mean drop against clean, points.
        drop_interval: Its 95 % interval, paired chip by chip; null for one chip.
        chip_deviation: Standard deviation between chips, were each measured on all images; null where all were.
        image_deviation: Standard deviation that sampling images adds to a chip; null where chips saw all of them.
        values: The metric of every chip, in the order of runs.
        drops: The drop of every chip against clean on the images that it saw, points.
    """

    chips: int
    clean: float
    mean: float
    deviation: float | None
    worst: float
    fifth_percentile: float
    interval: tuple[float, float] | None
    drop: float
    drop_interval: tuple[float, float] | None
    chip_deviation: float | None
    image_deviation: float | None
    values: list[float]
    drops: list[float]


class RateReport(msgspec.Struct, kw_only=True, frozen=True):
    """One failure rate.

    Attributes:
        rate: Failure rate a cell (or weight); null for measured chips.
        distribution: How faults lie.
        rate_unit: What the rate is of.
        images: Images that each chip saw.
        faults: Asked and observed fractions.
        non_finite: Images, over all chips, with an output that was not finite; scored as wrong.
        metrics: By name.
        by_class: The first metric by class, the mean over chips: agreement by the class of the fault-free model, or
            mAP by category. Empty where the metric has no classes.
    """

    rate: float | None
    distribution: str
    rate_unit: str
    images: int
    faults: FaultCounts
    non_finite: int
    metrics: dict[str, MetricReport]
    by_class: dict[str, float]


class Int8Report(msgspec.Struct, kw_only=True, frozen=True):
    """How far int8 is from fp32, without faults.

    Attributes:
        layers: Layers in int8; the others stay in fp32.
        of_layers: All layers.
        calibration: Data from which the ranges of activations were learned.
        calibration_images: How many images of them.
        output_error: On these images, ‖int8 − fp32‖ / ‖fp32‖ over all outputs, percent.
        clean_fp32: The report's ``clean`` metrics in fp32: on all images, percent. Those that compare with the model
            itself compare with it in int8.
    """

    layers: int
    of_layers: int
    calibration: str
    calibration_images: int
    output_error: float
    clean_fp32: dict[str, float]


class ValidationReport(msgspec.Struct, kw_only=True, frozen=True, tag_field="format", tag="rerampile-validation"):
    """What ``report.json`` of a validation holds.

    Attributes:
        format: What kind of file this is.
        format_version: Version of the format.
        versions: Versions of what ran.
        folder: Name of the deployment folder.
        model: Name of the compiled model.
        plan: What makes results comparable: digests, data, options.
        mapping: Mapping scheme.
        scale: One scale a tensor, a channel or a partition.
        execution: How the model ran, and why so.
        precision: The arithmetic, fp32 or int8.
        int8: Of int8: how far it is from fp32.
        images: Images used.
        skipped: Images that could not be read and were left out, with the reason.
        clean: Metrics without faults on all images, percent.
        rates: Results by failure rate.
        requirements: What was required, and whether it holds.
        clean_of: What ``clean`` is of, for a programmed chip; left out for others.
        prediction: What each layer does to the outputs at the highest failure rate, predicted; or why there is none;
            null where none was asked for.
    """

    format_version: int = 1
    versions: dict[str, str]
    folder: str
    model: str
    plan: dict[str, Any]
    mapping: str
    scale: str
    execution: str
    precision: str
    int8: Int8Report | None
    images: int
    skipped: dict[str, str]
    clean: dict[str, float]
    rates: list[RateReport]
    requirements: list[RequirementResult]
    prediction: Prediction | str | None = None
    clean_of: CleanOf | msgspec.UnsetType = msgspec.UNSET

    @property
    def drop_known(self) -> bool:
        """Whether there is a fault-free model that drops are against."""
        return isinstance(self.clean_of, msgspec.UnsetType) or self.clean_of.found

    @property
    def name(self) -> str:
        """What tells it from others in tables."""
        return self.folder.removesuffix(".deployment")

    @property
    def label(self) -> str:
        """What tells it from others in pictures: its name, mapping and scale."""
        what = f"{self.mapping}, {self.scale} scale"
        return what if self.name == self.mapping else f"{self.name} ({what})"


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A floor (or ceiling) of a metric's mean at a failure rate: ``top1 >= 90 @ 0.001``."""

    text: str
    metric: str
    relation: str
    bound: float
    rate: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Read a requirement.

        Raises:
            ConfigError: It is not of the form.
        """
        found = re.fullmatch(r"\s*([\w.:\[\]@-]+?)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*@\s*([.\deE+-]+)\s*", text)
        try:
            if found is not None:
                return cls(text.strip(), found[1], found[2], float(found[3]), float(found[4]))
        except ValueError:
            pass
        raise ConfigError(f"--require '{text}': expected METRIC >= NUMBER @ RATE, as in 'top1 >= 90 @ 0.001'")

    def check_measured(self, rates: Sequence[float], metrics: Sequence[str]) -> None:
        """Refuse a requirement that no result can meet or miss, before any work is done.

        Raises:
            ConfigError: The metric or the rate is not measured.
        """
        if not any(self.is_at(rate) for rate in rates):
            known = ", ".join(f"{rate:g}" for rate in rates) or "none"
            raise ConfigError(
                f"--require '{self.text}': failure rate {self.rate:g} is not run, expected one of {known}"
            )
        if self.metric not in metrics:
            raise ConfigError(
                f"--require '{self.text}': no metric '{self.metric}', expected one of {', '.join(metrics)}"
            )

    def is_at(self, rate: float) -> bool:
        """Whether the requirement is about a failure rate."""
        return bool(np.isclose(rate, self.rate, rtol=1e-9, atol=0))

    def check(self, rates: Sequence[RateReport]) -> RequirementResult:
        """Compare the mean over chips with the bound."""
        at = next(r for r in rates if r.rate is not None and self.is_at(r.rate))
        compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[self.relation]
        found = at.metrics[self.metric].mean
        return RequirementResult(text=self.text, found=found, met=bool(compare(found, self.bound)))


class RequirementResult(msgspec.Struct, kw_only=True, frozen=True):
    """Whether a requirement holds.

    Attributes:
        text: The requirement.
        found: What was measured.
        met: Whether it holds.
    """

    text: str
    found: float
    met: bool


def validate(
    experiment: Experiment,
    journal: Path,
    *,
    runs: int = 100,
    precision_points: float | None = None,
    requirements: Sequence[Requirement] = (),
    jobs: int = 1,
    dask: str | None = None,
    progress: Callable[[int, int, ChipResult | None], None] | None = None,
) -> ValidationReport:
    """Run chips of a deployment and say what came out.

    Args:
        experiment: What is measured.
        journal: Where finished chips are kept; an interrupted validation goes on from it.
        runs: Number of chips a failure rate (the number of measured chips where a fault map is given).
        precision_points: Instead of a fixed number: chips until the interval of each rate's mean is this many points
            to each side, by a two-stage rule.
        requirements: What has to hold.
        jobs: Processes.
        dask: Address of a Dask scheduler whose workers measure instead.
        progress: Called with (finished, wanted, the new result or None) as work goes on.

    Raises:
        RerampileError: What the user can mend.
    """
    if not 1 <= runs <= MOST_CHIPS:
        raise ConfigError(f"--runs {runs}: expected 1 to {MOST_CHIPS:,}")
    if precision_points is not None and not precision_points > 0:
        raise ConfigError(f"--precision-points {precision_points:g}: expected more than 0")
    if precision_points is not None and experiment.fault_map is not None:
        raise ConfigError("--precision-points: a fault map holds as many chips as it does; leave one of the two out")
    if requirements and experiment.fault_map is not None:
        raise ConfigError("--require: holds for a failure rate, and chips of a fault map have none; leave it out")
    with open_workers(jobs, dask) as workers:  # first: whether they answer is known at once
        return _validate(experiment, journal, runs, precision_points, requirements, workers, progress)


def _validate(
    experiment: Experiment,
    journal: Path,
    runs: int,
    precision_points: float | None,
    requirements: Sequence[Requirement],
    workers: Workers | None,
    progress: Callable[[int, int, ChipResult | None], None] | None,
) -> ValidationReport:
    bench = Bench(experiment)
    if bench.is_measured and (precision_points is not None or requirements):
        raise ConfigError(
            f"{bench.deployment.folder}: programmed for one chip: no failure rate to require something of, no more "
            f"chips to run; leave --require and --precision-points out"
        )
    for requirement in requirements:
        requirement.check_measured([model.rate for model in experiment.faults], bench.metric.names)
    int8 = _int8_report(bench)
    count = len(bench.measured) if bench.is_measured else runs
    rates = range(bench.rates)
    with Journal(journal, experiment_record(bench)) as record:

        def measure(chips: Sequence[int], rate_of: Sequence[int]) -> list[ChipResult]:
            work = [(run, rate) for run in chips for rate in rate_of]
            finished = sum(bench.key(*item) in record.done for item in work)
            if progress is not None:
                progress(finished, len(work), None)

            def report(result: ChipResult) -> None:
                nonlocal finished
                finished += 1
                if progress is not None:
                    progress(finished, len(work), result)

            return run_chips(bench, work, record, workers=workers, progress=report)

        if precision_points is None:
            results = measure(range(count), rates)
        else:
            first = measure(range(FIRST_STAGE), rates)
            primary = bench.metric.names[0]
            needed = [
                chips_needed(np.array([r.values[primary] for r in first if r.rate == rate]), precision_points)
                for rate in rates
            ]
            if max(needed) > MOST_CHIPS:
                raise ConfigError(
                    f"--precision-points {precision_points:g}: needs more than {MOST_CHIPS:,} chips, by how the first "
                    f"{FIRST_STAGE} differ; ask for less precision"
                )
            results = [r for rate in rates for r in measure(range(needed[rate]), [rate])]
    reports = [_rate_report(bench, [r for r in results if r.rate == rate], rate, precision_points) for rate in rates]
    plan = bench.deployment.plan
    return ValidationReport(
        versions={**software_versions(), "python": platform.python_version()},
        folder=bench.deployment.folder.name,
        model=plan.model.name,
        plan=dict(experiment_record(bench)),
        mapping=str(plan.options["mapping"]),
        scale=str(plan.options["scale"]),
        execution=f"{bench.executor.method}: {bench.executor.reason}",
        precision=experiment.precision,
        int8=int8,
        images=len(bench.images),
        skipped=bench.skipped,
        clean=bench.clean.values,
        rates=reports,
        requirements=[requirement.check(reports) for requirement in requirements],
        clean_of=msgspec.UNSET
        if plan.chip is None
        else CleanOf(compiled=plan.chip.compiled, found=bench.compiled is not None),
    )


def _int8_report(bench: Bench) -> Int8Report | None:
    fidelity, calibration = bench.executor.fidelity, bench.calibration
    if fidelity is None or calibration is None:
        return None
    return Int8Report(
        layers=fidelity.layers,
        of_layers=len(bench.deployment.plan.layers),
        calibration=calibration.name,
        calibration_images=calibration.images,
        output_error=100 * fidelity.rms,
        clean_fp32=bench.clean_in_fp32(),
    )


def _rate_report(bench: Bench, results: Sequence[ChipResult], rate: int, precision: float | None) -> RateReport:
    experiment = bench.experiment
    model = None if bench.is_measured else experiment.faults[rate]
    return RateReport(
        rate=None if model is None else model.asked,
        distribution="measured" if model is None else model.distribution,
        rate_unit="cell" if model is None else model.rate_unit,
        images=experiment.images_per_run or len(bench.images),
        faults=_fault_counts(bench, results, model),
        non_finite=sum(r.non_finite for r in results),
        metrics={name: _metric_report(bench, results, name, precision) for name in bench.clean.values},
        by_class=_by_class(results),
    )


def _fault_counts(bench: Bench, results: Sequence[ChipResult], model: FaultModel | None) -> FaultCounts:
    """Return the failed cells of all chips of a rate; measured ones count as asked for."""
    cells = bench.geometry.cells * len(results)
    found = {"stuck_off": sum(r.stuck_off for r in results), "stuck_on": sum(r.stuck_on for r in results)}
    found |= {name: sum(r.categories.get(name, 0) for r in results) for name in CATEGORIES}
    observed = {name: count / cells for name, count in found.items()}
    asked = observed
    if model is not None:
        share = _sites(bench) / bench.geometry.cells if model.rate_unit == "weight" else 1.0
        asked = dict.fromkeys(CATEGORIES, 0.0) | {name: share * p for name, p in model.probabilities.items()}
    categories = {
        name: CategoryCount(asked=asked[name], observed=observed[name])
        for name in CATEGORIES
        if asked[name] or observed[name]
    }
    treated = bench.deployment.target.failed_cells
    return FaultCounts(
        cells=cells,
        stuck_off=asked["stuck_off"],
        stuck_on=asked["stuck_on"],
        observed_off=observed["stuck_off"],
        observed_on=observed["stuck_on"],
        response=msgspec.UNSET if treated == FailedCells() else treated.response,
        categories=categories or msgspec.UNSET,
    )


def _sites(bench: Bench) -> int:
    """Return how many weights the arrays have room for: each of them may be hit, in one of its cells."""
    rows, columns = bench.geometry.rows, bench.geometry.columns
    arrays = [array for array in bench.deployment.plan.arrays if "plus" in array.roles]  # not the other one of twins
    return sum(rows * (columns // (len(array.roles) * len(array.slices))) for array in arrays)


def _by_class(results: Sequence[ChipResult]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.by_class.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(found[name])) for name in sorted(found, key=_by_number)}


def _by_number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (-1, name)


def _metric_report(bench: Bench, results: Sequence[ChipResult], name: str, precision: float | None) -> MetricReport:
    values = np.array([r.values[name] for r in results])
    clean = np.array([r.clean[name] for r in results])
    found: ChipStatistics = chip_statistics(values, clean, lower_is_better=name in LOWER_IS_BETTER)
    interval, drop_interval, several = found.interval, found.drop_interval, len(results) > 1
    if precision is not None:  # how many chips were run depends on the first ones, so on chance
        interval = two_stage_interval(values, FIRST_STAGE)
        drop_interval = two_stage_interval(found.drops, FIRST_STAGE)
    seen = bench.experiment.images_per_run
    parts = None
    if seen is not None and several and name in results[0].within:
        within = np.array([r.within[name] for r in results])
        parts = variance_parts(clean - values, within, seen, len(bench.images))
    return MetricReport(
        chips=found.chips,
        clean=found.clean,
        mean=found.mean,
        deviation=found.deviation if several else None,
        worst=found.worst,
        fifth_percentile=found.fifth_percentile,
        interval=(interval.low, interval.high) if several else None,
        drop=found.drop,
        drop_interval=(drop_interval.low, drop_interval.high) if several else None,
        chip_deviation=None if parts is None else parts.chips**0.5,
        image_deviation=None if parts is None else parts.images**0.5,
        values=[float(v) for v in values],
        drops=[float(d) for d in found.drops],
    )
