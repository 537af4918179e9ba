"""Drawing stuck cells: how likely they are, where they lie, and what they are stuck at.

Faults belong to physical cells of the arrays of a plan, spare and pruned cells included. Each cell of each simulated
chip has one uniform number ``u``: it is stuck off where ``u < p_off`` and stuck on where ``u >= 1 - p_on`` (Yuan et al.
2021). The same chips serve every mapping, and a higher rate of the same ratio keeps the faults of a lower one. The
other distributions draw lines, the centres of clusters, or arrays in the same way, with the same marginal probability
of every cell.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rerampile.errors import ConfigError
from rerampile.runtime.fault_map import STUCK_OFF, STUCK_ON, ChipGeometry, FaultMap, stuck_ends
from rerampile.runtime.random_field import Field
from rerampile.target import Target

__all__ = ["DISTRIBUTIONS", "RATE_UNITS", "Distribution", "FaultModel", "RateUnit", "draw_faults"]

Distribution = Literal["independent", "line", "cluster", "array"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
RateUnit = Literal["cell", "weight"]
RATE_UNITS: tuple[RateUnit, ...] = get_args(RateUnit)

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Purposes of random fields.
_CELL, _VALUE, _WEIGHT, _CHOICE, _LINE, _SHORT, _CENTRE, _COUNT, _DOWN, _ACROSS, _ARRAY = range(11)

_CHILDREN = 8.0  # mean number of hits around the centre of a cluster
_SPREAD = 1.5  # standard deviation of their distance along rows and along columns, cells
_REACH = 12  # where the Gaussian ends: 8 standard deviations
_MOST_CHILDREN = 64
_ARRAY_SHAPE = 2.0  # of the Beta distribution of an array's own rate: its spread is about 0.7 of its mean


@dataclass(frozen=True, kw_only=True)
class FaultModel:
    """How likely a cell is stuck, and where stuck cells lie.

    Attributes:
        stuck_off: Probability that a cell is stuck at G_off.
        stuck_on: Probability that a cell is stuck at G_on.
        distribution: ``independent`` cells; ``line``: whole bit lines, half of them together with the next one;
            ``cluster``: some eight cells close together; ``array``: a rate of its own for each array.
        rate_unit: Whether the probabilities are of a cell, or of a weight one of whose cells (each as likely) is hit.
    """

    stuck_off: float
    stuck_on: float
    distribution: Distribution = "independent"
    rate_unit: RateUnit = "cell"

    def __post_init__(self) -> None:
        for name, value in (("stuck-off", self.stuck_off), ("stuck-on", self.stuck_on)):
            if not 0 <= value <= 1:
                raise ConfigError(f"--{name} {value:g}: expected a probability from 0 to 1")
        if self.rate > 1 + 1e-12:
            raise ConfigError(
                f"--stuck-off {self.stuck_off:g} and --stuck-on {self.stuck_on:g}: expected a sum of at most 1, got "
                f"{self.rate:g}"
            )
        for option, word, words in (
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("rate-unit", self.rate_unit, RATE_UNITS),
        ):
            if word not in words:
                raise ConfigError(f"--{option} {word}: expected one of {', '.join(words)}")
        if self.rate_unit == "weight" and self.distribution in ("line", "cluster"):
            raise ConfigError(f"--rate-unit weight: a {self.distribution} is made of cells; use --rate-unit cell")
        if self.distribution == "cluster" and self.rate >= 1 - math.exp(-_CHILDREN):
            raise ConfigError(f"a failure rate of {self.rate:g}: clusters cover at most {1 - math.exp(-_CHILDREN):.4f}")

    @classmethod
    def of_rate(cls, rate: float, off_on: tuple[float, float] = (1.0, 5.2), **more: Any) -> FaultModel:
        """Split a failure rate by a ratio of stuck-off to stuck-on (default 1:5.2, Chen et al. 2015)."""
        if not 0 <= rate <= 1:
            raise ConfigError(f"--failure-rate {rate:g}: expected a fraction from 0 to 1")
        off, on = off_on
        if not (off >= 0 and on >= 0 and 0 < off + on < math.inf):
            raise ConfigError(f"--off-on {off:g}:{on:g}: expected two numbers of 0 or more, not both 0")
        return cls(stuck_off=rate * off / (off + on), stuck_on=rate * on / (off + on), **more)

    @property
    def key(self) -> str:
        """All of it in one line, exactly."""
        return f"stuck_off {self.stuck_off!r} stuck_on {self.stuck_on!r} {self.distribution} by {self.rate_unit}"

    @property
    def rate(self) -> float:
        """Failure rate: the probability that a cell (or weight) is stuck at all."""
        return self.stuck_off + self.stuck_on


@dataclass(frozen=True)
class _Draw:
    """What every distribution needs: chip, probabilities, and the random numbers of one run."""

    geometry: ChipGeometry
    model: FaultModel
    seed: int
    run: int

    def field(self, purpose: int) -> Field:
        return Field(self.seed, self.run, purpose)

    def at(self, purpose: int, items: Integers) -> Floats:
        return self.field(purpose).at(items)

    def events(self, purpose: int, probability: float, size: int) -> tuple[Integers, Flags, Floats]:
        """Return which of ``range(size)`` are hit with a probability, whether stuck on, and the order of coming.

        The order is that in which they come as the failure rate rises, so that where two events hit one cell the
        first decides its state at every rate.
        """
        share = probability / self.model.rate if self.model.rate else 0.0
        off, on = share * self.model.stuck_off, share * self.model.stuck_on
        items, u = self.field(purpose).tails(off, on, size)
        is_on = u >= 1 - on
        tiny = np.finfo(np.float64).tiny
        return items, is_on, np.where(is_on, (1 - u) / max(on, tiny), u / max(off, tiny))


def draw_faults(geometry: ChipGeometry, model: FaultModel, target: Target, *, seed: int, run: int) -> FaultMap:
    """Draw the faults of one simulated chip.

    The result depends on the arguments alone, cell by cell: more arrays, another mapping or a higher rate leave the
    faults of the other cells as they are.

    Args:
        geometry: The chip.
        model: How likely faults are.
        target: Its cells' stuck values, siemens.
        seed: Seed of the experiment, 0 or more.
        run: Number of the chip, from 0.
    """
    draw = _Draw(geometry, model, seed, run)
    by_distribution = {"independent": _independent, "line": _lines, "cluster": _clusters, "array": _independent}
    cell, on = by_distribution[model.distribution](draw)
    state = np.array([STUCK_OFF, STUCK_ON], np.uint8)[on.view(np.uint8)]
    return FaultMap(cell=cell, state=state, conductance=_stuck_values(draw, target, cell, state))


def _independent(draw: _Draw) -> tuple[Integers, Flags]:
    """Each cell, or each weight, by itself; at one rate or at that of its array."""
    geometry, model = draw.geometry, draw.model
    by_weight = model.rate_unit == "weight"
    places = np.flatnonzero(geometry.twin >= np.arange(geometry.arrays)) if by_weight else np.arange(geometry.arrays)
    rates = _rates(draw, places)
    off_share, on_share = (p / model.rate if model.rate else 0.0 for p in (model.stuck_off, model.stuck_on))
    most = float(rates.max(initial=0.0))
    area = geometry.rows * geometry.columns
    items, u = draw.field(_WEIGHT if by_weight else _CELL).tails(most * off_share, most * on_share, len(places) * area)
    own = rates[items // area]
    on = u >= 1 - own * on_share
    hit = np.flatnonzero(on | (u < own * off_share))
    items, on = items[hit], on[hit]
    return _cells_of_weights(draw, places, items, on) if by_weight else (items, on)


def _rates(draw: _Draw, places: Integers) -> Floats:
    """Return the failure rate of each array: the same, or by its quantile of a Beta distribution of that mean.

    With one parameter fixed, every quantile grows with the mean, so that higher rates keep the faults of lower ones.
    """
    rate = min(1.0, draw.model.rate)
    if draw.model.distribution != "array" or rate in (0.0, 1.0):
        return np.full(len(places), rate)
    rates: Floats = special.betaincinv(_ARRAY_SHAPE, _ARRAY_SHAPE * (1 - rate) / rate, draw.at(_ARRAY, places))
    return rates


def _cells_of_weights(draw: _Draw, places: Integers, items: Integers, on: Flags) -> tuple[Integers, Flags]:
    """Return one cell of each weight that is hit: any of its slices and roles, on its array or the twin.

    An array has ``rows * columns`` items, of which a row uses as many as it has room for weights: so the same weight
    has the same number whatever columns it takes.
    """
    geometry = draw.geometry
    place, row, slot = geometry.locate(items)
    array = places[place]
    width, twin = geometry.width[array], geometry.twin[array]
    chosen = (draw.at(_CHOICE, items) * width * np.where(twin == array, 1, 2)).astype(np.int64)
    column = slot * width + chosen % width
    cell = geometry.cell(np.where(chosen < width, array, twin), row, column)
    there = np.flatnonzero((slot + 1) * width <= geometry.columns)
    there = there[np.argsort(cell[there], kind="stable")]
    return cell[there], on[there]


def _lines(draw: _Draw) -> tuple[Integers, Flags]:
    """Whole bit lines; half of the events also take the next line of the array (a short between two)."""
    geometry, rate = draw.geometry, draw.model.rate
    rows, columns = geometry.rows, geometry.columns
    # A line is healthy unless it is hit, or its left neighbour is and takes it along: (1 - q)(1 - q / 2) = 1 - f.
    hit = (3 - math.sqrt(max(1.0, 9 - 8 * rate))) / 2 if columns > 1 else rate
    line, on, order = draw.events(_LINE, hit, geometry.arrays * columns)
    short = draw.at(_SHORT, line) < 0.5
    neighbour = np.where((line + 1) % columns > 0, line + 1, line + 1 - columns)  # the last line's next is the first
    line, on = _first_come(
        np.concatenate([line, neighbour[short]]),
        np.concatenate([on, on[short]]),
        np.concatenate([order, order[short]]),
    )
    array, column = np.divmod(line, columns)
    cell = geometry.cell(array[:, None], np.arange(rows), column[:, None]).reshape(-1)
    by_cell = np.argsort(cell)
    return cell[by_cell], np.repeat(on, rows)[by_cell]


def _clusters(draw: _Draw) -> tuple[Integers, Flags]:
    """Neyman-Scott: centres anywhere, a Poisson number of hits around each, the same state for all of one cluster.

    Distances are Gaussian along rows and columns, and an array's opposite edges count as neighbours, so that every
    cell is as likely.
    """
    geometry = draw.geometry
    centre, on, order = draw.events(
        _CENTRE, _centre_probability(draw.model.rate, geometry.rows, geometry.columns), geometry.cells
    )
    counts = np.searchsorted(special.pdtr(np.arange(_MOST_CHILDREN - 1), _CHILDREN), draw.at(_COUNT, centre), "right")
    child = np.repeat(centre * _MOST_CHILDREN, counts) + _count_up(counts)
    array, row, column = (np.repeat(part, counts) for part in geometry.locate(centre))
    reach = np.cumsum(_kernel())
    row = (row + np.searchsorted(reach, draw.at(_DOWN, child), "right") - _REACH) % geometry.rows
    column = (column + np.searchsorted(reach, draw.at(_ACROSS, child), "right") - _REACH) % geometry.columns
    return _first_come(geometry.cell(array, row, column), np.repeat(on, counts), np.repeat(order, counts))


def _kernel() -> Floats:
    """Return the probability of each distance from -_REACH to _REACH cells."""
    distance = np.arange(-_REACH, _REACH + 1)
    weight = np.exp(-0.5 * (distance / _SPREAD) ** 2)
    return np.asarray(weight / weight.sum(), np.float64)


@functools.lru_cache(maxsize=64)
def _centre_probability(rate: float, rows: int, columns: int) -> float:
    """Return the probability of a centre at a cell that makes a cell stuck with probability ``rate``.

    With probability k(d) of a hit at distance d, a centre there leaves a cell alone with exp(-m k(d)), for a mean of m
    hits; centres are independent, so a cell is healthy with the product over d of 1 - q (1 - exp(-m k(d))).
    """
    distance = np.arange(-_REACH, _REACH + 1)
    down, across = (np.bincount(distance % size, _kernel()) for size in (rows, columns))
    reached = -np.expm1(-_CHILDREN * np.outer(down, across))
    if not rate:
        return 0.0

    def excess(q: float) -> float:
        return float(np.log1p(-q * reached).sum() - math.log1p(-rate))

    return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-18, rtol=1e-14))


def _count_up(counts: Integers) -> Integers:
    """Return 0, 1, ... for each count, one after another."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) - np.repeat(starts, counts)


def _first_come(items: Integers, on: Flags, order: Floats) -> tuple[Integers, Flags]:
    """Return each item once, ascending, with the state of its first event."""
    sort = np.lexsort((order, items))
    items = items[sort]
    first = np.ones(len(items), np.bool_)
    first[1:] = items[1:] != items[:-1]
    return items[first], on[sort[first]]


def _stuck_values(draw: _Draw, target: Target, cell: Integers, state: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return what each cell is stuck at: the target's mean, or normal around it; a cell's own at every rate."""
    values = stuck_ends(target, state)
    off, on = target.cell.stuck_off.spread, target.cell.stuck_on.spread
    if off or on:
        spread = np.where(state == STUCK_ON, on, off)
        values = np.maximum(values + spread * special.ndtri(draw.at(_VALUE, cell)), 0).astype(np.float32)
    return values
