"""How a weight becomes cells, and back: the mapping schemes.

A weight is read as a difference ``w = gain * (P - N)``. ``P`` is the value of its + cell; ``N`` is the value of its
- cell, or, for ``offset``, a constant reference that is subtracted digitally. With the normalised weight ``u`` in
[-1, 1] and the normalised conductance ``g = (G - G_off) / (G_on - G_off)`` in [0, 1] (Yuan et al. 2021):

=============  ==========================  ==========================  ==========
scheme         + cell                      - cell                      zero holds
=============  ==========================  ==========================  ==========
two_column     max(u, 0)                   max(-u, 0)                  (off, off)
differential   1 - max(-u, 0)              1 - max(u, 0)               (on, on)
balanced       (1 + u) / 2                 (1 - u) / 2                 (mid, mid)
offset         (1 + u) / 2                 none: reference 1/2         mid
optimal        c + u / 2                   c - u / 2                   (c, c)
=============  ==========================  ==========================  ==========

The pairs are one family, ``(c + u/2, c - u/2)`` with the common mode ``c``: |u|/2 for two_column, 1 - |u|/2 for
differential, 1/2 for balanced. ``optimal`` takes the one nearest to its aim, :attr:`Coding.common_modes`
(:mod:`rerampile.common_mode`).

Analog cells hold siemens. Discrete cells hold level codes; a weight may be sliced over several cells, least significant
slice first, so that slice ``k`` counts ``levels**k``. With levels uniform in G all arithmetic is on integers: the
difference ``P - N`` is rounded once, to a whole number of steps, and decodes exactly. With a measured level table each
cell takes the nearest of the values that the table can form; ``optimal`` then takes the pair nearest to its aims that
any of the pair schemes, or its own common mode, comes to. A zero weight decodes to exactly zero in every scheme.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rerampile.common_mode import StepPairs, centre
from rerampile.errors import ConfigError, did_you_mean

__all__ = [
    "MAPPINGS",
    "SCALES",
    "SCHEMES",
    "TABLE_LIMIT",
    "WEIGHED",
    "Coding",
    "MappingName",
    "Scale",
    "Scheme",
    "known_mapping",
    "known_scale",
    "row_chunks",
]

Scheme = Literal["two_column", "differential", "offset", "balanced", "optimal"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
MappingName = Literal[Scheme, "auto"]
MAPPINGS: tuple[MappingName, ...] = get_args(MappingName)
WEIGHED = ("optimal", "auto")
"""Mappings that depend on how likely cells are stuck."""
Scale = Literal["tensor", "channel", "partition"]
"""What one full scale is for: a tensor, an output channel, or the piece of an output channel that is on one array."""
SCALES: tuple[Scale, ...] = get_args(Scale)

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_CHUNK = 1 << 16  # weights handled at a time: a chunk and its temporaries stay in the second-level cache
TABLE_LIMIT = 1 << 16  # values of a measured table that are listed and sorted


def known_mapping(name: str) -> MappingName:
    """Return the mapping of a name: a scheme, or ``auto``.

    Raises:
        ConfigError: There is none.
    """
    for mapping in MAPPINGS:
        if mapping == name:
            return mapping
    raise ConfigError(f"mapping '{name}': no such scheme{did_you_mean(name, MAPPINGS)}")


def known_scale(name: str) -> Scale:
    """Return the scale of a name.

    Raises:
        ConfigError: There is none.
    """
    for scale in SCALES:
        if scale == name:
            return scale
    raise ConfigError(f"scale '{name}': expected {', '.join(SCALES[:-1])} or {SCALES[-1]}")


@dataclass(frozen=True, kw_only=True)
class Coding:
    """The coding of one layer's weights into cells.

    Attributes:
        scheme: One of :data:`SCHEMES`.
        g_off: Lowest programmable conductance, siemens.
        g_on: Highest programmable conductance, siemens.
        levels: Number of discrete levels of a cell, or None for analog cells.
        level_table: Measured conductance of each level in siemens, ascending; None where levels are uniform in G.
        slices: Cells a weight is sliced over (times two for a pair); more than one needs discrete levels.
        common_modes: For ``optimal``, what the pair of cells of each slice lies around, in siemens, or in level codes
            where levels are uniform; may be outside the range of a cell. None for the other schemes.
    """

    scheme: Scheme
    g_off: float
    g_on: float
    levels: int | None = None
    level_table: tuple[float, ...] | None = None
    slices: int = 1
    common_modes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        expected = self.slices if self.scheme == "optimal" else 0
        if len(self.common_modes or ()) != expected:
            raise ValueError(f"{self.scheme}: common modes {self.common_modes}, expected {expected}")

    @property
    def cells(self) -> int:
        """Cells a weight takes in one slice: 2 for a pair, 1 for offset."""
        return 1 if self.scheme == "offset" else 2

    @property
    def dtype(self) -> np.dtype[Any]:
        """What a cell is stored as: float32 siemens, or a level code of one or two bytes."""
        if self.levels is None:
            return np.dtype(np.float32)
        return np.dtype(np.uint8 if self.levels <= 256 else np.uint16)

    @property
    def integer(self) -> bool:
        """Whether differences are whole numbers of steps (levels uniform in G)."""
        return self.levels is not None and self.level_table is None

    @property
    def unit(self) -> Literal["S", "level"]:
        """What one unit of a difference is, so what ``gain`` is weight units of."""
        return "level" if self.integer else "S"

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest value of all slices together (discrete levels only)."""
        if self.levels is None:
            raise ValueError("analog cells have no steps")
        return int(self.levels**self.slices) - 1

    @cached_property
    def low(self) -> float:
        """Smallest value that the + cell (all slices) can take, in units of the difference."""
        return 0.0 if self.integer else float(np.float32(self.g_off))

    @cached_property
    def high(self) -> float:
        """Largest value that the + cell (all slices) can take."""
        return float(self.steps) if self.integer else float(np.float32(self.g_on))

    @cached_property
    def reference(self) -> float:
        """The constant that ``offset`` subtracts: the representable value of a zero weight."""
        if self.integer:
            return float((self.steps + 1) // 2)
        middle = (self.low + self.high) / 2
        if self.level_table is None:
            return float(np.float32(middle))
        number = self._order[self._nearest(np.array([middle]))[0]]
        levels, table = self.levels or 0, np.array(self.level_table, np.float32)
        return float(self._sum([table[number // levels**k % levels] for k in range(self.slices)]))

    @property
    def span(self) -> float:
        """Largest difference that both signs can reach: the full scale of the weights maps here."""
        if self.scheme == "offset":
            return min(self.reference - self.low, self.high - self.reference)
        return self.high - self.low

    @property
    def significances(self) -> tuple[float, ...]:
        """Weight of each slice in a value, least significant first.

        Uniform levels count in steps (1, L, L**2, ...); a measured table in siemens, with significances that sum to
        one, so that all slices at ``g_on`` are worth ``g_on``.
        """
        if self.levels is None:
            return (1.0,)
        unit = 1.0 if self.integer else (self.levels - 1) / self.steps
        return tuple(unit * self.levels**k for k in range(self.slices))

    @cached_property
    def signs(self) -> npt.NDArray[np.float64]:
        """What a unit of each cell adds to a difference: its significance, negative for minus, [slices, cells]."""
        signs: npt.NDArray[np.float64] = np.outer(self.significances, [1.0, -1.0][: self.cells])
        return signs

    def gain(self, full_scale: Array) -> Floats:
        """Return the gain, float32 of the same shape: weight units a unit of difference, zero scales read as one.

        Args:
            full_scale: Largest magnitude to represent in each output, [outputs], or in each segment of one.
        """
        safe = np.where(full_scale > 0, full_scale, 1.0).astype(np.float64)
        return np.maximum(safe / self.span, np.finfo(np.float32).tiny).astype(np.float32)

    def holds_integers(self, smallest: float, largest: float) -> bool:
        """Whether whole numbers from ``smallest`` to ``largest`` fit as they are, one step a unit: held exactly."""
        if not self.integer:
            return False
        if self.scheme == "offset":
            return smallest >= self.low - self.reference and largest <= self.high - self.reference
        return max(-smallest, largest) <= self.steps

    def encode(self, weights: Floats, gain: Floats, out: Array | None = None) -> Array:
        """Return the cells of ``weights`` as [slices, cells, outputs, inputs] in :attr:`dtype`.

        Args:
            weights: float32 [outputs, inputs], finite.
            gain: float32 [outputs], or as it meets the weights, [outputs, inputs] or [outputs, 1].
            out: Where to write the cells, or None for a new array.
        """
        gain = _column(gain)
        out = np.empty((self.slices, self.cells, *weights.shape), self.dtype) if out is None else out
        for rows in row_chunks(weights.shape):
            part = out[:, :, rows]
            if self.levels is None:
                self._encode_analog(np.divide(weights[rows], gain[rows], out=part[0, -1]), part)
            else:
                self._encode_levels(weights[rows] / gain[rows], part)
        return out

    def decode(self, cells: Array, gain: Floats) -> Floats:
        """Return the weights, float32 [outputs, inputs], that cells [slices, cells, outputs, inputs] hold.

        Args:
            cells: The cells.
            gain: As of :meth:`encode`.
        """
        gain = _column(gain)
        out = np.empty(cells.shape[2:], np.float32)
        for rows in row_chunks(out.shape):
            np.multiply(self.difference(cells[:, :, rows]), gain[rows], out=out[rows])
        return out

    def difference(self, cells: Array) -> Floats:
        """Return ``P - N`` of cells [slices, cells, ...] as float32 [...], in steps or siemens."""
        return self.combine(cells if self.cell_values is None else self.cell_values[cells])

    def combine(self, values: Array) -> Floats:
        """Return ``P - N`` of what cells [slices, cells, ...] are worth: siemens, or levels, which may be fractions."""
        if self.cells == 1:
            return np.subtract(self._sum(values[:, 0]), np.float32(self.reference))
        if self.slices == 1:
            plain: Floats = np.subtract(values[0, 0], values[0, 1], dtype=np.float32)
            return plain
        return np.subtract(self._sum(values[:, 0]), self._sum(values[:, 1]))

    def _sum(self, slices: Iterable[Array]) -> Floats:
        """Return the value that a + or - cell, sliced over values [slices, ...], adds up to, float32 [...]."""
        parts = (np.float32(s) * value for s, value in zip(self.significances, slices, strict=True))
        total: Floats = functools.reduce(np.add, parts).astype(np.float32, copy=False)
        return total

    @cached_property
    def cell_values(self) -> Floats | None:
        """Value of each level code of one cell, float32 [levels]; None where the stored number is the value."""
        return None if self.level_table is None else np.array(self.level_table, np.float32)

    def worth(self, conductance: Floats) -> Floats:
        """Return what conductances are worth in a cell: themselves, or levels (fractions, or outside the range)."""
        if not self.integer:
            return conductance
        off, on = np.float32(self.g_off), np.float32(self.g_on)
        steps = (self.levels or 0) - 1
        return ((conductance.astype(np.float64) - off) / (np.float64(on) - off) * steps).astype(np.float32)

    def conductance(self, cells: Array) -> Floats:
        """Return the conductance in siemens, float32, of stored cells of any shape."""
        if self.levels is None:
            return cells.astype(np.float32)
        if self.level_table is not None:
            return np.array(self.level_table, np.float32)[cells]
        return (self.g_off + cells * ((self.g_on - self.g_off) / (self.levels - 1))).astype(np.float32)

    def error_bound(self, gain: Floats) -> npt.NDArray[np.float64]:
        """Return the largest ``|decode(encode(w)) - w|`` for each gain: float32 rounding, or half a level."""
        rounding = 4 * float(np.finfo(np.float32).eps) * max(self.high, abs(self.reference))
        half_level = 0.0
        if self.integer:
            half_level = 0.5
        elif self.levels is not None:
            half_level = float(np.diff(self._values).max()) / 2
        return gain.astype(np.float64) * (half_level + rounding)

    @cached_property
    def zero_cells(self) -> Array:
        """Cells of a zero weight, [slices, cells] in :attr:`dtype`."""
        return self.encode(np.zeros((1, 1), np.float32), np.ones(1, np.float32))[:, :, 0, 0]

    @cached_property
    def mean_zero_conductance(self) -> float:
        """Mean conductance of the cells of a zero weight, siemens."""
        return float(self.conductance(self.zero_cells).astype(np.float64).mean())

    def _encode_analog(self, difference: Floats, out: Array) -> None:
        """Write the pair of siemens of ``difference`` [rows, inputs] into ``out`` [1, cells, rows, inputs].

        The difference lies where the last cell is to be, so that a chunk takes no memory beside its cells.
        """
        off, on = np.float32(self.low), np.float32(self.high)
        plus, minus = out[0, 0], out[0, -1]
        if self.scheme == "two_column":
            np.maximum(difference, 0, out=plus)
            np.subtract(plus, difference, out=minus)
            out += off
        elif self.scheme == "differential":
            np.minimum(difference, 0, out=plus)
            np.subtract(plus, difference, out=minus)
            out += on
        elif self.scheme == "balanced":
            np.multiply(difference, np.float32(0.5), out=plus)
            np.negative(plus, out=minus)
            out += np.float32(self.reference)
        elif self.common_modes is not None:
            centre(difference, self.common_modes[0], off, on, out[0])
        else:
            np.add(difference, np.float32(self.reference), out=plus)
        np.clip(out, off, on, out=out)

    def _encode_levels(self, difference: Floats, out: Array) -> None:
        """Write the level codes of ``difference`` [rows, inputs] into ``out`` [slices, cells, rows, inputs]."""
        if self.integer:
            steps = np.rint(difference).astype(np.int32)
            if self.scheme == "optimal":
                self._step_pairs.encode(np.clip(steps, -self.steps, self.steps), out)
                return
            numbers = self._split_steps(steps)
        else:
            numbers = self._value_numbers(difference.astype(np.float64))
        levels = self.levels or 0
        for cell, rest in enumerate(numbers):
            for k in range(self.slices):
                higher = rest // levels  # numpy divides by a scalar fast, and takes remainders slowly
                np.subtract(rest, higher * levels, out=out[k, cell], casting="unsafe")
                rest = higher  # noqa: PLW2901

    def _split_steps(self, d: Array) -> tuple[Array, ...]:
        """Split whole differences into whole + and - values (uniform levels)."""
        n = self.steps
        if self.scheme == "offset":
            return (np.clip(d + int(self.reference), 0, n),)
        d = np.clip(d, -n, n)
        if self.scheme == "two_column":
            return np.maximum(d, 0), np.maximum(-d, 0)
        if self.scheme == "differential":
            return n + np.minimum(d, 0), n - np.maximum(d, 0)
        plus = (n + d) // 2
        return plus, plus - d

    @cached_property
    def _step_pairs(self) -> StepPairs:
        return StepPairs(self.levels or 0, self.common_modes or ())

    def _value_numbers(self, d: Array) -> tuple[Array, ...]:
        """Return the combinations of levels that differences in siemens take (measured table), by their numbers."""
        if self.scheme != "optimal":
            return self._numbers(d, self.scheme)
        pairs = [self._numbers(d, scheme) for scheme in SCHEMES if scheme != "offset"]
        costs = self._combination_costs
        best = np.argmin([costs[plus] + costs[minus] for plus, minus in pairs], axis=0)
        return tuple(np.choose(best, cells) for cells in zip(*pairs, strict=True))

    def _numbers(self, d: Array, scheme: Scheme) -> tuple[Array, ...]:
        """Return the combinations of levels nearest to a scheme's targets, the second chosen against the first."""
        return tuple(self._order[self._nearest(part)] for part in self._split_values(d, scheme))

    def _split_values(self, d: Array, scheme: Scheme) -> tuple[Array, ...]:
        """Split differences in siemens into + and - targets (measured table)."""
        if scheme == "offset":
            return (d + self.reference,)
        if scheme == "two_column":
            return self.low + np.maximum(d, 0), self.low + np.maximum(-d, 0)
        if scheme == "differential":
            return self.high + np.minimum(d, 0), self.high - np.maximum(d, 0)
        middle = (self.low + self.high) / 2
        if scheme == "optimal":
            middle = sum(s * aim for s, aim in zip(self.significances, self.common_modes or (), strict=True))
        lowest = np.clip(middle - np.abs(d) / 2, self.low, np.maximum(self.high - np.abs(d), self.low))
        small = self._values[self._nearest(lowest)]
        large = small + np.abs(d)
        return np.where(d >= 0, large, small), np.where(d >= 0, small, large)

    @cached_property
    def _combination_costs(self) -> npt.NDArray[np.float64]:
        """What a cell of each combination of levels costs beside one at its aims, but for a constant."""
        table, levels = np.array(self.level_table, np.float32).astype(np.float64), self.levels or 0
        numbers = np.arange(self.steps + 1)
        costs = np.zeros(len(numbers))
        for k, (s, aim) in enumerate(zip(self.significances, self.common_modes or (), strict=True)):
            value = table[numbers // levels**k % levels]
            costs += s**2 * (value**2 - 2 * aim * value)
        return costs

    @cached_property
    def _combinations(self) -> npt.NDArray[np.float64]:
        """Value of every combination of level codes of all slices (measured table), indexed by the whole number."""
        if self.steps >= TABLE_LIMIT:
            raise ValueError(f"{self.steps + 1} combinations of measured levels, more than {TABLE_LIMIT}")
        table = np.array(self.level_table, np.float32).astype(np.float64)
        numbers = np.arange(self.steps + 1)
        levels = self.levels or 0
        return sum(
            (s * table[numbers // levels**k % levels] for k, s in enumerate(self.significances)),
            start=np.zeros(len(numbers)),
        )

    @cached_property
    def _order(self) -> npt.NDArray[np.int64]:
        return np.argsort(self._combinations, kind="stable")

    @cached_property
    def _values(self) -> npt.NDArray[np.float64]:
        return self._combinations[self._order]

    def _nearest(self, target: Array) -> npt.NDArray[np.int64]:
        """Return the position in :attr:`_values` nearest to each target."""
        return np.searchsorted((self._values[1:] + self._values[:-1]) / 2, target).astype(np.int64)


def _column(gain: Floats) -> Floats:
    """Return gains as they meet weights [outputs, inputs]."""
    return gain[:, None] if gain.ndim == 1 else gain


def row_chunks(shape: tuple[int, ...]) -> list[slice]:
    """Return slices of the rows of a matrix that hold few enough elements to stay in a processor's cache."""
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
