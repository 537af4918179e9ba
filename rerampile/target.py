"""The hardware a model is compiled for: arrays of cells, how they are grouped, and what their cells can hold.

A target comes from a named preset or a TOML file; ``docs/targets.md`` lists the keys. Values check themselves when they
are made, so a :class:`Target` that exists is consistent, however it came about. Errors name the key relative to the
object at hand, and whoever holds that object puts its own part in front: ``my.toml: cell.g_on: expected …, got …``.

TOML has no null. A field that is None here is a word there, and in :meth:`Target.to_dict`: ``"unlimited"`` counts,
``"analog"`` levels, a ``"uniform"`` level table, ``"ideal"`` converters.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rerampile.errors import CapacityError, ConfigError, did_you_mean
from rerampile.failed_cells import Category, FailedCells, Stuck
from rerampile.field_checks import (
    WORDS_FOR_NONE,
    Check,
    build,
    check_fields,
    choice,
    expected,
    integer,
    keys,
    line,
    or_none,
    record,
    siemens,
)
from rerampile.schemes import MAPPINGS, TABLE_LIMIT

__all__ = [
    "LEFT_OUT",
    "PAIR_LAYOUTS",
    "Address",
    "Category",
    "Cell",
    "FailedCells",
    "Stuck",
    "Target",
    "preset_names",
    "preset_text",
    "to_toml",
]

PAIR_LAYOUTS = ("adjacent", "twin")

_COUNTS = ("arrays_per_core", "cores_per_tile", "tiles_per_chip", "chips")  # inner to outer
LEFT_OUT = ("failed_cells",)
"""Keys that a written target leaves out where they say nothing; it has all others."""

_FILE_LIMIT = 1_000_000  # bytes: room for a table of 2**15 levels, and nothing that takes long to parse
_CODE_LIMIT = 2**24  # whole numbers up to here are exact in float32
_PRESETS = Path(__file__).parent / "targets"

_AT_RANGE_END = Stuck(mean=0.0)  # stands for "not given"; compared by identity
_JUST_STUCK = FailedCells()  # off or on, and read as what they conduct


def _level_table(key: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise expected(key, f'a list of conductances in siemens or "{WORDS_FOR_NONE[key]}"', value)
    return tuple(siemens(f"{key}[{level}]", conductance) for level, conductance in enumerate(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One ReRAM device.

    Attributes:
        g_off: Lowest programmable conductance (HRS), siemens.
        g_on: Highest programmable conductance (LRS), siemens.
        levels: Number of discrete conductances, or None for an analog cell.
        level_table: Measured conductance of each level, siemens, ascending from ``g_off`` to ``g_on``; None where the
            levels are uniform in conductance.
        stuck_off: What a stuck-off cell conducts; exactly ``g_off`` where not given.
        stuck_on: What a stuck-on cell conducts; exactly ``g_on`` where not given.
    """

    g_off: float
    g_on: float
    levels: int | None = None
    level_table: tuple[float, ...] | None = None
    stuck_off: Stuck = _AT_RANGE_END
    stuck_on: Stuck = _AT_RANGE_END

    def __post_init__(self) -> None:
        check_fields(self, {"g_off": siemens, "g_on": siemens, "levels": or_none(integer(2, 65536))})
        # Conductances are stored as float32: a narrower range would leave too few digits for the weights.
        if self.g_on - self.g_off < max(1e-3 * self.g_on, 1e-15):
            raise expected("g_on", f"at least 0.1 % (and 1 fS) above g_off = {self.g_off!r}", self.g_on)
        for key, end in (("stuck_off", self.g_off), ("stuck_on", self.g_on)):
            stuck = getattr(self, key)
            if stuck is _AT_RANGE_END:
                object.__setattr__(self, key, Stuck(mean=end))
            elif isinstance(stuck, Mapping):
                object.__setattr__(self, key, {"mean": end, **stuck})
        check_fields(
            self, {"level_table": or_none(_level_table), "stuck_off": record(Stuck), "stuck_on": record(Stuck)}
        )
        self._check_level_table()

    def _check_level_table(self) -> None:
        table = self.level_table
        if table is None:
            return
        if self.levels != len(table):
            raise expected("level_table", f"as many values as levels = {self.levels or 'analog'}", len(table))
        for level, (low, high) in enumerate(itertools.pairwise(table)):
            if low >= high:
                raise expected(f"level_table[{level + 1}]", f"ascending values, above {low!r}", high)
        for level, key, end in ((0, "g_off", self.g_off), (len(table) - 1, "g_on", self.g_on)):
            if table[level] != end:
                raise expected(f"level_table[{level}]", f"{key} = {end!r}", table[level])


class Address(NamedTuple):
    """Where an array sits, counted from zero at every level."""

    chip: int
    tile: int
    core: int
    array: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A crossbar accelerator.

    Arrays are counted through core, tile and chip, inner to outer. One of the four counts may be None (unlimited);
    those outside it must be 1, for counting never reaches a second one.

    Attributes:
        name: Short name for messages and the plan.
        source: Where the numbers come from.
        rows: Word lines of an array (inputs).
        columns: Bit lines of an array (outputs).
        mapping: Default mapping, one of :data:`rerampile.schemes.MAPPINGS`.
        slices: Cells that one value is sliced over, least significant first; more than one needs discrete levels.
        pair_layout: ``adjacent``: the cells of a pair are neighbouring columns of one array. ``twin``: they are at the
            same place in two arrays.
        arrays_per_core: Arrays in a core.
        cores_per_tile: Cores in a tile.
        tiles_per_chip: Tiles on a chip.
        chips: Chips there are.
        dac_bits: Resolution of the row drivers, None where ideal.
        adc_bits: Resolution of the column converters, None where ideal.
        cell: What one cell can hold.
        failed_cells: How cells fail, and what the hardware makes of those that did.
    """

    name: str
    source: str = ""
    rows: int
    columns: int
    mapping: str = "differential"
    slices: int = 1
    pair_layout: str = "adjacent"
    arrays_per_core: int | None = None
    cores_per_tile: int | None = 1
    tiles_per_chip: int | None = 1
    chips: int | None = 1
    dac_bits: int | None = None
    adc_bits: int | None = None
    cell: Cell
    failed_cells: FailedCells = _JUST_STUCK

    def __post_init__(self) -> None:
        check_fields(self, _TARGET_CHECKS)
        self._check_slices()
        self._check_counts()
        low, high = self.failed_limits
        if low > high:
            raise expected("failed_cells.high", f"at least low = {low!r}", high)

    def _check_slices(self) -> None:
        levels = self.cell.levels
        if levels is None:
            if self.slices > 1:
                raise expected("slices", "1 with analog cells (set cell.levels for more)", self.slices)
            return
        measured = self.cell.level_table is not None
        limit, kind = (TABLE_LIMIT, "measured levels") if measured else (_CODE_LIMIT, "levels")
        if levels**self.slices > limit:
            most = max(n for n in range(25) if levels**n <= limit)
            raise expected("slices", f"at most {most} with {levels} {kind} (levels ** slices <= {limit})", self.slices)

    def _check_counts(self) -> None:
        inner = None
        for key in _COUNTS:
            count = getattr(self, key)
            if inner is not None and count != 1:
                raise expected(key, f'1, never exceeded because {inner} = "unlimited"', count or "unlimited")
            if count is None:
                inner = key

    @property
    def unlimited(self) -> str | None:
        """The key of the count that has no limit, or None where all have one."""
        return next((key for key in _COUNTS if getattr(self, key) is None), None)

    @property
    def arrays(self) -> int | None:
        """Number of arrays there are, or None where unlimited."""
        counts = [getattr(self, key) for key in _COUNTS]
        return None if None in counts else math.prod(counts)

    @property
    def failures(self) -> dict[str, Stuck | Category]:
        """What a cell conducts by the state it failed in: stuck off or on, and the categories that there are."""
        return {"stuck_off": self.cell.stuck_off, "stuck_on": self.cell.stuck_on, **self.failed_cells.categories}

    def failure(self, state: str) -> Stuck | Category:
        """Return what a cell conducts that failed in a way.

        Raises:
            ConfigError: Cells of this target do not fail in that way.
        """
        failures = self.failures
        if state not in failures:
            raise ConfigError(
                f"target {self.name}: no cells that are {state.replace('_', '-')}, expected {', '.join(failures)}; "
                f"describe them in failed_cells.{state}"
            )
        return failures[state]

    @property
    def failed_limits(self) -> tuple[float, float]:
        """The least and the most that a failed cell is read as, siemens."""
        return self.failed_cells.limits(self.cell.g_off, self.cell.g_on)

    @property
    def analog(self) -> bool:
        """Whether cells take any conductance between ``g_off`` and ``g_on``."""
        return self.cell.levels is None

    @property
    def cell_steps(self) -> int | None:
        """Steps between the lowest and the highest level of one cell, or None for analog cells."""
        return None if self.cell.levels is None else self.cell.levels - 1

    def address(self, index: int) -> Address:
        """Return where array number ``index`` sits; arrays fill a core, then a tile, then a chip."""
        arrays = self.arrays
        if index < 0 or (arrays is not None and index >= arrays):
            there = "unlimited" if arrays is None else arrays
            raise CapacityError(f"target {self.name}: array {index} does not exist (arrays = {there}, counted from 0)")
        rest, parts = index, []
        for size in (self.arrays_per_core, self.cores_per_tile, self.tiles_per_chip):
            rest, part = divmod(rest, size) if size else (0, rest)
            parts.append(part)
        return Address(rest, *reversed(parts))

    def index(self, address: tuple[int, int, int, int]) -> int:
        """Return the number of the array at ``(chip, tile, core, array)``: the inverse of :meth:`address`."""
        index = 0
        for key, part, level in zip(reversed(_COUNTS), address, Address._fields, strict=True):
            count = getattr(self, key)
            if part < 0 or (count is not None and part >= count):
                there = "unlimited" if count is None else count
                raise CapacityError(
                    f"target {self.name}: {level} {part} does not exist ({key} = {there}, counted from 0)"
                )
            index = index * (count or 1) + part
        return index

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers, words, lists and dicts, in a fixed order, for JSON or TOML.

        Every field is written out, but for ``failed_cells`` where they say nothing.
        """
        return _plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "target") -> Target:
        """Make a target from a table like that of :meth:`to_dict`; keys with a default may be left out.

        Args:
            data: The table.
            where: What errors name as the place of the table, such as a file name.
        """
        return build(cls, keys(where, data), f"{where}: ")

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Target:
        """Read a preset by its name, or a TOML file by its path (which ends in ``.toml`` or has a folder).

        Args:
            name_or_path: The name or the path.
            changes: Values that replace or add to those of the file, by dotted key (``cell.levels``). What the file
                leaves out follows from them as if they were written there.
        """
        text = os.fspath(name_or_path)
        is_path = not isinstance(name_or_path, str) or text.endswith(".toml") or Path(text).name != text
        where, toml = (text, _read(Path(text))) if is_path else (f"preset {text}", preset_text(text))
        return cls.from_dict(_changed(_parse(toml, where), changes or {}, where), where)


_TARGET_CHECKS: dict[str, Check] = {
    "name": line(1, 100),
    "source": line(0, 1000),
    "rows": integer(1, 65536),
    "columns": integer(1, 65536),
    "mapping": choice(MAPPINGS),
    "slices": integer(1, 24),
    "pair_layout": choice(PAIR_LAYOUTS),
    **dict.fromkeys(_COUNTS, or_none(integer(1, 2**20))),
    "dac_bits": or_none(integer(1, 32)),
    "adc_bits": or_none(integer(1, 32)),
    "cell": record(Cell),
    "failed_cells": record(FailedCells),
}


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets, in alphabetical order."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))


def preset_text(name: str) -> str:
    """Return a preset's TOML file as it is written, with its comments on where each number comes from."""
    if name not in preset_names():
        near = did_you_mean(name, preset_names())
        raise ConfigError(f"unknown target {name!r}{near}: name a preset or the path of a .toml file")
    return (_PRESETS / f"{name}.toml").read_text(encoding="utf-8")


def to_toml(target: Target) -> str:
    """Return a target as TOML text, written out as by :meth:`Target.to_dict`; reading it gives the same target."""
    return "\n".join(_toml_lines(target.to_dict(), "")) + "\n"


def _plain(instance: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in fields(instance):
        value = getattr(instance, field.name)
        if field.name in LEFT_OUT and value == field.default:
            continue
        if value is None:
            value = WORDS_FOR_NONE[field.name]
        elif is_dataclass(value):
            value = _plain(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[field.name] = value
    return plain


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    # Texts are printable, so their JSON form is a TOML string; so is that of numbers and of lists of numbers.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items() if not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such target file")
        size = path.stat().st_size
        if size > _FILE_LIMIT:
            raise ConfigError(f"{path}: expected a target file of at most {_FILE_LIMIT} bytes, got {size} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ConfigError(f"{path}: expected UTF-8 text, got {byte}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number too long to convert is a plain ValueError
        raise ConfigError(f"{where}: not valid TOML: {error}") from None


def _changed(data: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a freshly parsed table with single values set by dotted key."""
    for dotted, value in changes.items():
        *parts, key = dotted.split(".")
        table = data
        for part in parts:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{where}: {dotted}: '{part}' is a value, expected a table of keys")
        table[key] = value
    return data
