"""Which failure rate a deployment tolerates, and how many times that of another, from chips at a few rates.

The mean drop is known at each rate that was run. Between two of them it is taken to follow a power of the rate, as it
does while faults are few. Below the lowest and above the highest rate nothing is said but a bound, so that every result
is a range: a point where it is known.

Confidence intervals come from resampling chips (the percentile bootstrap, Efron 1979). A resampled chip counts at every
rate and for every deployment: chips of the same number are the same chips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

from rerampile.runtime.statistics import CONFIDENCE, Interval

__all__ = ["Curve", "Estimate", "rate_ratio", "tolerated_rate"]

Floats = npt.NDArray[np.float64]

_RESAMPLES = 4000
_LEAST_DROP = 0.01  # of the wanted drop: less, or a gain, is none


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Drops of the chips of a deployment.

    Attributes:
        rates: Failure rates above 0, rising, float64 [rates].
        drops: Drop of each chip against the fault-free model, points, float64 [rates, chips].
    """

    rates: Floats
    drops: Floats


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number estimated from chips.

    Attributes:
        range: Where the estimate lies: a point where rates on both sides were run, else open on one side or both.
        interval: Its 95 % interval.
    """

    range: Interval
    interval: Interval


def tolerated_rate(curve: Curve, drop: float, *, seed: int = 0) -> Estimate:
    """Return the failure rate at which the mean drop reaches ``drop`` points.

    Args:
        curve: The chips.
        drop: The drop, above 0.
        seed: Seed of the bootstrap.
    """
    return _estimate(*_reached(curve, drop, _resamples(curve.drops.shape[1], seed)))


def rate_ratio(curve: Curve, reference: Curve, drop: float, *, seed: int = 0) -> Estimate:
    """Return how many times the failure rate of a reference a deployment tolerates at the same drop.

    Args:
        curve: The chips of the deployment.
        reference: The chips of the reference, of the same numbers.
        drop: The drop, points, above 0.
        seed: Seed of the bootstrap.
    """
    chips = min(curve.drops.shape[1], reference.drops.shape[1])
    weights = _resamples(chips, seed)
    low, high = _reached(curve, drop, weights)
    reference_low, reference_high = _reached(reference, drop, weights)
    with np.errstate(divide="ignore"):
        return _estimate(low / reference_high, high / reference_low)


def _resamples(chips: int, seed: int) -> Floats:
    """Return how much each chip counts, float64 [1 + resamples, chips]: once each, then as often as it is drawn.

    Resampled means of few chips scatter too little, by what parts the t distribution from the normal one and the two
    estimates of the variance from each other; their distance from the plain mean is stretched by that.
    """
    drawn = np.random.default_rng([seed, chips]).multinomial(chips, np.full(chips, 1 / chips), _RESAMPLES)
    stretch = 1.0
    if chips > 1:
        tail = (1 + CONFIDENCE) / 2
        student = scipy.stats.t.ppf(tail, chips - 1) / scipy.stats.norm.ppf(tail)
        stretch = float(student) * math.sqrt(chips / (chips - 1))
    return np.concatenate([np.ones((1, chips)), 1 + stretch * (drawn - 1)]) / chips


def _reached(curve: Curve, drop: float, weights: Floats) -> tuple[Floats, Floats]:
    """Return between which rates the mean drop first reaches a drop, for each row of weights of the chips.

    Both ends are the same where a power law of the rate can be drawn: between two rates that were run, the lower of
    which shows a drop. Where that one shows none, the drop begins somewhere between the two.
    """
    means = weights @ curve.drops[:, : weights.shape[1]].T
    first = np.where((means >= drop).any(axis=1), (means >= drop).argmax(axis=1), len(curve.rates))
    edges = np.concatenate([[0.0], curve.rates, [math.inf]])
    low, high = edges[first], edges[first + 1]
    rows = np.arange(len(means))
    inside = np.flatnonzero((first > 0) & (first < len(curve.rates)) & (means[rows, first - 1] > _LEAST_DROP * drop))
    after = first[inside]
    before, reached = (np.log(means[inside, k]) for k in (after - 1, after))
    share = (math.log(drop) - before) / (reached - before)
    low[inside] = high[inside] = low[inside] * (high[inside] / low[inside]) ** share
    return low, high


def _estimate(low: Floats, high: Floats) -> Estimate:
    """Return the estimate of the first row, with the spread of the others."""
    tail = (1 - CONFIDENCE) / 2
    return Estimate(
        range=Interval(float(low[0]), float(high[0])),
        interval=Interval(
            float(np.quantile(low[1:], tail, method="lower")), float(np.quantile(high[1:], 1 - tail, method="higher"))
        ),
    )
