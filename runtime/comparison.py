"""Compare deployments on the same chips: differences paired chip by chip, and tolerated failure rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx

from rerampile.checks import check_checksums
from rerampile.deployment import load_deployment
from rerampile.errors import ConfigError
from rerampile.runtime.metrics import LOWER_IS_BETTER
from rerampile.runtime.statistics import Interval, interval_of
from rerampile.runtime.tolerance import Curve, Estimate, rate_ratio, tolerated_rate
from rerampile.runtime.validation import ValidationReport

__all__ = ["Compared", "ComparisonReport", "Difference", "Known", "check_alike", "check_drop", "compare", "known"]


class Known(msgspec.Struct, kw_only=True, frozen=True):
    """A number estimated from chips.

    Attributes:
        low: The estimate, or, where it differs from ``high``, all that the rates that were run say: not below this.
        high: The estimate, or not above this; null where nothing bounds it.
        interval: 95 % interval of the estimate, by resampling chips; an end that nothing bounds is null.
    """

    low: float
    high: float | None
    interval: tuple[float, float | None]


class Difference(msgspec.Struct, kw_only=True, frozen=True):
    """How much better than the reference a deployment is at one failure rate, points; more is better.

    Attributes:
        rate: Failure rate.
        chips: Pairs of chips.
        mean: Mean over pairs of the metric minus that of the reference (the other way round where less is better).
        interval: 95 % interval of the mean, paired; null for one pair.
    """

    rate: float
    chips: int
    mean: float
    interval: tuple[float, float] | None


class Compared(msgspec.Struct, kw_only=True, frozen=True):
    """One deployment beside the reference.

    Attributes:
        name: Its name in the comparison.
        same_cells: Whether its arrays are those of the reference, and rates split alike, so that the same cells are
            stuck on each chip.
        tolerated: Failure rate at which the mean drop, against its own fault-free model, reaches the asked one.
        times: How many times the failure rate that the reference tolerates; null for the reference itself.
        differences: By failure rate; empty for the reference itself.
    """

    name: str
    same_cells: bool
    tolerated: Known
    times: Known | None
    differences: list[Difference]


class ComparisonReport(msgspec.Struct, kw_only=True, frozen=True, tag_field="format", tag="rerampile-comparison"):
    """What ``report.json`` of a comparison holds.

    Attributes:
        format: What kind of file this is.
        format_version: Version of the format.
        metric: The metric that is compared.
        drop: Drop of the metric, points, at which failure rates are compared.
        reference: Name of the deployment that the others are compared with.
        compared: The deployments, the reference first.
        validations: What the chips of each did, in the same order.
    """

    format_version: int = 1
    metric: str
    drop: float
    reference: str
    compared: list[Compared]
    validations: list[ValidationReport]


def check_drop(drop: float) -> None:
    """Refuse a drop at which nothing can be compared.

    Raises:
        ConfigError: It is not above 0.
    """
    if not drop > 0:
        raise ConfigError(f"--drop {drop:g}: expected more than 0 points")


def check_alike(folders: Sequence[Path]) -> None:
    """Refuse deployments that cannot be compared, before any work is done.

    Raises:
        PlanFormatError: One is no deployment, or damaged.
        ConfigError: Their models have other inputs or outputs, or one was programmed for one chip.
    """
    signatures = []
    for folder in folders:
        deployment = load_deployment(folder)
        if deployment.plan.chip is not None:
            raise ConfigError(
                f"{folder}: programmed for one chip, none is drawn, expected deployments written by compile; run "
                f"'rerampile validate', which compares the chip with what it was programmed from"
            )
        check_checksums(deployment)
        graph = onnx.load_model(deployment.model_path, load_external_data=False).graph
        signatures.append([_shape_text(value) for value in (*graph.input, *graph.output)])
    for folder, signature in zip(folders, signatures, strict=True):
        if signature != signatures[0]:
            raise ConfigError(
                f"{folder}: a model of {', '.join(signature)}, expected {', '.join(signatures[0])} as in {folders[0]}; "
                f"compare deployments that take and give the same"
            )


def _shape_text(value: onnx.ValueInfoProto) -> str:
    sizes = (d.dim_value if d.HasField("dim_value") else "?" for d in value.type.tensor_type.shape.dim)
    return f"'{value.name}' [{', '.join(map(str, sizes))}]"


def compare(validations: Sequence[ValidationReport], *, drop: float = 1.0) -> ComparisonReport:
    """Compare validations of several deployments, the first of which is the reference.

    Args:
        validations: Of the same data, seed and failure rates; their folders' names tell them apart.
        drop: Drop of the first metric, points, at which failure rates are compared.

    Raises:
        ConfigError: They have nothing to compare, or the drop is not above 0.
    """
    check_drop(drop)
    if len(validations) < 2:
        raise ConfigError(f"{len(validations)} deployment to compare, expected two or more")
    reference, metric = validations[0], next(iter(validations[0].clean))
    for other in validations[1:]:
        if metric not in other.clean:
            raise ConfigError(f"{other.folder}: no metric '{metric}', which {reference.folder} is measured by")
    curves = [_curve(validation, metric) for validation in validations]
    return ComparisonReport(
        metric=metric,
        drop=drop,
        reference=reference.folder,
        compared=[
            Compared(
                name=validation.folder,
                same_cells=_cells(validation) == _cells(reference),
                tolerated=known(tolerated_rate(curve, drop)),
                times=None if validation is reference else known(rate_ratio(curve, curves[0], drop)),
                differences=[] if validation is reference else _differences(validation, reference, metric),
            )
            for validation, curve in zip(validations, curves, strict=True)
        ],
        validations=list(validations),
    )


def _cells(validation: ValidationReport) -> tuple[object, ...]:
    """Return what decides which cells are stuck, and how: their places, and how rates split into states."""
    splits = [(r.faults.stuck_off, r.faults.stuck_on, r.faults.categories or {}) for r in validation.rates]
    asked = [(off, on, {name: count.asked for name, count in found.items()}) for off, on, found in splits]
    return validation.plan["plan"], asked


def _curve(validation: ValidationReport, metric: str) -> Curve:
    """Return the drops of a validation's chips; where rates have different numbers of chips, the first of each."""
    rates = sorted((r for r in validation.rates if r.rate), key=lambda r: r.rate or 0.0)
    if not rates:
        raise ConfigError(f"{validation.folder}: no failure rate above 0, expected one or more to compare at")
    chips = min(r.metrics[metric].chips for r in rates)
    return Curve(
        rates=np.array([r.rate for r in rates], np.float64),
        drops=np.array([r.metrics[metric].drops[:chips] for r in rates], np.float64),
    )


def _differences(validation: ValidationReport, reference: ValidationReport, metric: str) -> list[Difference]:
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    there = {r.rate: r.metrics[metric].values for r in reference.rates}
    found = []
    for rate in validation.rates:
        if rate.rate is None or rate.rate not in there:
            continue
        here = rate.metrics[metric].values
        chips = min(len(here), len(there[rate.rate]))
        pairs = sign * (np.array(here[:chips]) - np.array(there[rate.rate][:chips]))
        found.append(
            Difference(
                rate=rate.rate,
                chips=chips,
                mean=float(pairs.mean()),
                interval=interval_of(pairs),
            )
        )
    return found


def known(estimate: Estimate) -> Known:
    """Return an estimate as reports have it."""

    def closed(interval: Interval) -> tuple[float, float | None]:
        return interval.low, None if math.isinf(interval.high) else interval.high

    low, high = closed(estimate.range)
    return Known(low=low, high=high, interval=closed(estimate.interval))
