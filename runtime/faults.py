"""Drawing stuck cells: how likely they are, where they lie, and what they are stuck at.

Faults belong to physical cells of the arrays of a plan, spare and pruned cells included. Each cell of each simulated
chip has one uniform number ``u``: it is stuck off where ``u < p_off`` and stuck on where ``u >= 1 - p_on`` (Yuan et al.
2021). The same chips serve every mapping, and a higher rate of the same ratio keeps the faults of a lower one. The
other distributions draw lines, the centres of clusters, or arrays in the same way, with the same marginal probability
of every cell.

Where forming fails in several ways (:mod:`rerampile.failed_cells`), cells that are unformed or partially formed fail
where others are stuck off, and over-formed ones where others are stuck on. Which of several states that share an end it
is, a second number says: a cell's own at every rate, too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from rerampile.errors import ConfigError
from rerampile.failed_cells import CATEGORIES
from rerampile.runtime.fault_map import STATES, ChipGeometry, FaultMap, stuck_ends, stuck_spreads
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
States = npt.NDArray[np.uint8]

# Purposes of random fields.
_CELL, _VALUE, _WEIGHT, _CHOICE, _LINE, _SHORT, _CENTRE, _COUNT, _DOWN, _ACROSS, _ARRAY, _STATE = range(12)

_LOW_END = ("stuck_off", "unformed", "partially_formed")  # states of cells whose number is near 0,
_HIGH_END = ("stuck_on", "over_formed")  # and near 1

_CHILDREN = 8.0  # mean number of hits around the centre of a cluster
_SPREAD = 1.5  # standard deviation of their distance along rows and along columns, cells
_REACH = 12  # where the Gaussian ends: 8 standard deviations
_MOST_CHILDREN = 64
_ARRAY_SHAPE = 2.0  # of the Beta distribution of an array's own rate: its spread is about 0.7 of its mean


@dataclass(frozen=True, kw_only=True)
class FaultModel:
    """How likely a cell fails, and where failed cells lie.

    Attributes:
        stuck_off: Probability that a cell is stuck at G_off.
        stuck_on: Probability that a cell is stuck at G_on.
        unformed: Probability that a cell has no filament; as of the other two, the target says what it conducts then.
        partially_formed: Probability that it has one that cannot be programmed.
        over_formed: Probability that it has one that is too thick.
        distribution: ``independent`` cells; ``line``: whole bit lines, half of them together with the next one;
            ``cluster``: some eight cells close together; ``array``: a rate of its own for each array.
        rate_unit: Whether the probabilities are of a cell, or of a weight one of whose cells (each as likely) is hit.
    """

    stuck_off: float = 0.0
    stuck_on: float = 0.0
    unformed: float = 0.0
    partially_formed: float = 0.0
    over_formed: float = 0.0
    distribution: Distribution = "independent"
    rate_unit: RateUnit = "cell"

    def __post_init__(self) -> None:
        for name, value in self.probabilities.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected a probability from 0 to 1")
        if self.rate > 1 + 1e-12:
            given = " and ".join(f"--{name.replace('_', '-')} {p:g}" for name, p in self.probabilities.items())
            raise ConfigError(f"{given}: expected a sum of at most 1, got {self.rate:g}")
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

    @classmethod
    def of_target(cls, rate: float, target: Target, **more: Any) -> FaultModel:
        """Split a failure rate by the shares of the target's categories; where it has none, by the default ratio."""
        model, categories = cls.of_rate(rate, **more), target.failed_cells.categories
        shares = sum(category.share for category in categories.values())
        split: dict[str, Any] = {name: rate * category.share / shares for name, category in categories.items()}
        return replace(model, stuck_off=0.0, stuck_on=0.0, **split) if split else model

    def __repr__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if name not in CATEGORIES or value}
        return f"FaultModel({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each state: stuck off, stuck on, and the categories that there are."""
        return {"stuck_off": self.stuck_off, "stuck_on": self.stuck_on, **self.categories}

    @property
    def categories(self) -> dict[str, float]:
        """The probability of each way in which forming fails; none where cells are just stuck off or on."""
        return {name: getattr(self, name) for name in CATEGORIES if getattr(self, name) != 0}

    @property
    def key(self) -> str:
        """All of it in one line, exactly."""
        states = " ".join(f"{name} {p!r}" for name, p in self.probabilities.items())
        return f"{states} {self.distribution} by {self.rate_unit}"

    @property
    def asked(self) -> float:
        """The failure rate as reports name it: without what adding its parts up has rounded."""
        return float(f"{self.rate:.14g}")

    @property
    def rate(self) -> float:
        """Failure rate: the probability that a cell (or weight) fails at all."""
        return sum(self.probabilities.values())


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

    @property
    def ends(self) -> tuple[float, float]:
        """How likely a failure at the low, and at the high end of a number is."""
        low, high = (sum(getattr(self.model, name) for name in end) for end in (_LOW_END, _HIGH_END))
        return low, high

    def states(self, items: Integers, high: Flags) -> States:
        """Return the state of each of some items, by the end that it failed at and a number of its own."""
        low_names, high_names = (
            [name for name in names if getattr(self.model, name)] or [names[0]] for names in (_LOW_END, _HIGH_END)
        )
        found = np.where(high, np.uint8(STATES[high_names[0]]), np.uint8(STATES[low_names[0]]))
        for names, at_end in ((low_names, ~high), (high_names, high)):
            if len(names) > 1:
                at, state = np.flatnonzero(at_end), np.array([STATES[name] for name in names], np.uint8)
                reach = np.cumsum([getattr(self.model, name) for name in names])
                found[at] = state[np.searchsorted(reach[:-1] / reach[-1], self.at(_STATE, items[at]), "right")]
        return found

    def events(self, purpose: int, probability: float, size: int) -> tuple[Integers, States, Floats]:
        """Return which of ``range(size)`` are hit with a probability, their states, and the order of coming.

        The order is that in which they come as the failure rate rises, so that where two events hit one cell the
        first decides its state at every rate.
        """
        share = probability / self.model.rate if self.model.rate else 0.0
        low, high = (share * end for end in self.ends)
        items, u = self.field(purpose).tails(low, high, size)
        is_high = u >= 1 - high
        tiny = np.finfo(np.float64).tiny
        order = np.where(is_high, (1 - u) / max(high, tiny), u / max(low, tiny))
        return items, self.states(items, is_high), order


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
    for name in model.categories:
        target.failure(name)  # or it says that there is none
    cell, state = by_distribution[model.distribution](draw)
    return FaultMap(cell=cell, state=state, conductance=_stuck_values(draw, target, cell, state))


def _independent(draw: _Draw) -> tuple[Integers, States]:
    """Each cell, or each weight, by itself; at one rate or at that of its array."""
    geometry, model = draw.geometry, draw.model
    by_weight = model.rate_unit == "weight"
    places = np.flatnonzero(geometry.twin >= np.arange(geometry.arrays)) if by_weight else np.arange(geometry.arrays)
    rates = _rates(draw, places)
    low, high = (p / model.rate if model.rate else 0.0 for p in draw.ends)
    most = float(rates.max(initial=0.0))
    area = geometry.rows * geometry.columns
    items, u = draw.field(_WEIGHT if by_weight else _CELL).tails(most * low, most * high, len(places) * area)
    own: Any = most
    if rates.min(initial=most) < most:
        own = rates[items // area]
        hit = np.flatnonzero((u >= 1 - own * high) | (u < own * low))
        items, u, own = items[hit], u[hit], own[hit]
    state = draw.states(items, u >= 1 - own * high)
    return _cells_of_weights(draw, places, items, state) if by_weight else (items, state)


def _rates(draw: _Draw, places: Integers) -> Floats:
    """Return the failure rate of each array: the same, or by its quantile of a Beta distribution of that mean.

    With one parameter fixed, every quantile grows with the mean, so that higher rates keep the faults of lower ones.
    """
    rate = min(1.0, draw.model.rate)
    if draw.model.distribution != "array" or rate in (0.0, 1.0):
        return np.full(len(places), rate)
    rates: Floats = special.betaincinv(_ARRAY_SHAPE, _ARRAY_SHAPE * (1 - rate) / rate, draw.at(_ARRAY, places))
    return rates


def _cells_of_weights(draw: _Draw, places: Integers, items: Integers, state: States) -> tuple[Integers, States]:
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
    return cell[there], state[there]


def _lines(draw: _Draw) -> tuple[Integers, States]:
    """Whole bit lines; half of the events also take the next line of the array (a short between two)."""
    geometry, rate = draw.geometry, draw.model.rate
    rows, columns = geometry.rows, geometry.columns
    # A line is healthy unless it is hit, or its left neighbour is and takes it along: (1 - q)(1 - q / 2) = 1 - f.
    hit = (3 - math.sqrt(max(1.0, 9 - 8 * rate))) / 2 if columns > 1 else rate
    line, state, order = draw.events(_LINE, hit, geometry.arrays * columns)
    short = draw.at(_SHORT, line) < 0.5
    neighbour = np.where((line + 1) % columns > 0, line + 1, line + 1 - columns)  # the last line's next is the first
    line, state = _first_come(
        np.concatenate([line, neighbour[short]]),
        np.concatenate([state, state[short]]),
        np.concatenate([order, order[short]]),
    )
    array, column = np.divmod(line, columns)
    cell = geometry.cell(array[:, None], np.arange(rows), column[:, None]).reshape(-1)
    by_cell = np.argsort(cell)
    return cell[by_cell], np.repeat(state, rows)[by_cell]


def _clusters(draw: _Draw) -> tuple[Integers, States]:
    """Neyman-Scott: centres anywhere, a Poisson number of hits around each, the same state for all of one cluster.

    Distances are Gaussian along rows and columns, and an array's opposite edges count as neighbours, so that every
    cell is as likely.
    """
    geometry = draw.geometry
    centre, state, order = draw.events(
        _CENTRE, _centre_probability(draw.model.rate, geometry.rows, geometry.columns), geometry.cells
    )
    counts = np.searchsorted(special.pdtr(np.arange(_MOST_CHILDREN - 1), _CHILDREN), draw.at(_COUNT, centre), "right")
    child = np.repeat(centre * _MOST_CHILDREN, counts) + _count_up(counts)
    array, row, column = (np.repeat(part, counts) for part in geometry.locate(centre))
    reach = np.cumsum(_kernel())
    row = (row + np.searchsorted(reach, draw.at(_DOWN, child), "right") - _REACH) % geometry.rows
    column = (column + np.searchsorted(reach, draw.at(_ACROSS, child), "right") - _REACH) % geometry.columns
    return _first_come(geometry.cell(array, row, column), np.repeat(state, counts), np.repeat(order, counts))


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


def _first_come(items: Integers, state: States, order: Floats) -> tuple[Integers, States]:
    """Return each item once, ascending, with the state of its first event."""
    sort = np.lexsort((order, items))
    items = items[sort]
    first = np.ones(len(items), np.bool_)
    first[1:] = items[1:] != items[:-1]
    return items[first], state[sort[first]]


def _stuck_values(draw: _Draw, target: Target, cell: Integers, state: States) -> npt.NDArray[np.float32]:
    """Return what each cell is stuck at: the target's mean, or normal around it; a cell's own at every rate."""
    values = stuck_ends(target, state)
    spread = stuck_spreads(target, state)
    if spread.any():
        values = np.maximum(values + spread * special.ndtri(draw.at(_VALUE, cell)), 0).astype(np.float32)
    return values
