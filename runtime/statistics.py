"""What many simulated chips say about chips to come: means, spreads, intervals, and when there are enough of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

__all__ = [
    "ChipStatistics",
    "Interval",
    "VarianceParts",
    "chip_statistics",
    "chips_needed",
    "interval_of",
    "t_interval",
    "two_stage_interval",
    "variance_parts",
]

Vector = npt.NDArray[np.float64]

CONFIDENCE = 0.95
_MOST = 1e6  # root of more chips than anybody runs
FIRST_STAGE = 20  # chips before the number of chips is decided


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of a mean."""

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of its length."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class ChipStatistics:
    """One metric over the chips of one failure rate, in percent (points).

    Attributes:
        chips: Number of chips.
        clean: The metric without faults, on the same images.
        mean: Mean over chips.
        deviation: Standard deviation over chips.
        worst: The worst chip.
        fifth_percentile: One chip in twenty is worse.
        interval: 95 % t-interval of the mean.
        drops: Loss of each chip, float64 [chips].
        drop: Mean loss (clean minus faulty, or faulty minus clean of an error), on the images that each chip saw.
        drop_interval: 95 % t-interval of the drop.
    """

    chips: int
    clean: float
    mean: float
    deviation: float
    worst: float
    fifth_percentile: float
    interval: Interval
    drops: Vector
    drop: float
    drop_interval: Interval


def chip_statistics(values: Vector, clean: Vector, *, lower_is_better: bool = False) -> ChipStatistics:
    """Summarise chips.

    Args:
        values: The metric of each chip, float64 [chips].
        clean: The metric of the clean model on the images that each chip saw, float64 [chips].
        lower_is_better: Whether the metric is an error: a drop is then a rise, and the worst chip has the highest.
    """
    drops = values - clean if lower_is_better else clean - values
    return ChipStatistics(
        chips=len(values),
        clean=float(clean.mean()),
        mean=float(values.mean()),
        deviation=_deviation(values),
        worst=float(values.max() if lower_is_better else values.min()),
        fifth_percentile=float(np.percentile(values, 95 if lower_is_better else 5)),
        interval=t_interval(values),
        drops=drops,
        drop=float(drops.mean()),
        drop_interval=t_interval(drops),
    )


def _deviation(values: Vector) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def t_interval(values: Vector) -> Interval:
    """Return the t-interval of a mean; unbounded for a single value."""
    n = len(values)
    if n < 2:
        return Interval(-math.inf, math.inf)
    half = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * _deviation(values) / math.sqrt(n)
    mean = float(values.mean())
    return Interval(mean - half, mean + half)


def interval_of(values: Vector) -> tuple[float, float] | None:
    """Return both ends of :func:`t_interval`; None for one value, which has none."""
    if len(values) < 2:
        return None
    found = t_interval(values)
    return found.low, found.high


def chips_needed(first_stage: Vector, half_width: float) -> int:
    """Return how many chips make the interval of a mean as narrow as asked: Stein's two-stage rule (Stein 1945).

    The spread is estimated once, from the first stage, and the number of chips follows from it; so the rule never looks
    at the mean, and the interval ``mean +- t * s1 / sqrt(n)`` with the first stage's ``s1`` and degrees of freedom has
    at least its nominal coverage for normal values, whatever the spread. (Stopping when the running interval first is
    narrow enough has less.)

    Args:
        first_stage: Values of the first chips, float64 [chips], at least two.
        half_width: Wanted half width.
    """
    n = len(first_stage)
    t = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return max(n, math.ceil(min(t * _deviation(first_stage) / half_width, _MOST) ** 2))


def two_stage_interval(values: Vector, first_stage: int) -> Interval:
    """Return the interval that belongs to :func:`chips_needed`, with the spread of the first stage."""
    t = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, first_stage - 1))
    half = t * _deviation(values[:first_stage]) / math.sqrt(len(values))
    mean = float(values.mean())
    return Interval(mean - half, mean + half)


@dataclass(frozen=True)
class VarianceParts:
    """Where the spread of measured drops comes from, in squared points.

    Attributes:
        chips: Variance between chips, were each measured on all images.
        images: Variance of one chip's measured drop because it saw a sample of the images.
    """

    chips: float
    images: float


def variance_parts(drops: Vector, within: Vector, images: int, population: int) -> VarianceParts:
    """Separate the variance between chips from that of the images that each chip saw.

    Args:
        drops: Measured drop of each chip, points, float64 [chips].
        within: How much each chip's drop varies with the choice of images, times their number, squared points,
            float64 [chips]; of a mean over images, the variance of the score differences.
        images: Images that each chip saw, drawn without replacement.
        population: Images to draw from.
    """
    sampling = float(within.mean()) / images * (1 - images / population)
    return VarianceParts(chips=max(0.0, float(drops.var(ddof=1)) - sampling), images=sampling)
