"""Stuck cells of a chip, and the files that hold them: safetensors for programs, CSV for people.

``docs/fault-map.md`` is the normative description of both layouts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from rerampile.deployment import Deployment
from rerampile.errors import ConfigError, DataError
from rerampile.failed_cells import CATEGORIES, counts_text
from rerampile.files import require_regular
from rerampile.plan import Plan
from rerampile.target import Target
from rerampile.tensor_file import TensorWriter

__all__ = [
    "MOST_CHIPS",
    "STATES",
    "STUCK_OFF",
    "STUCK_ON",
    "ChipGeometry",
    "FaultMap",
    "placement_digest",
    "read_fault_maps",
    "stuck_ends",
    "stuck_spreads",
    "write_fault_maps",
]

STUCK_OFF, STUCK_ON = 1, 2
STATES = {"stuck_off": STUCK_OFF, "stuck_on": STUCK_ON, "unformed": 3, "partially_formed": 4, "over_formed": 5}
"""Numbers of the states that a cell can have failed in, by their names in :attr:`Target.failures`."""

_FORMAT, _VERSION = "rerampile-faults", 1
_COLUMNS = {"chip": np.uint32, "array": np.uint32, "row": np.uint16, "column": np.uint16}
_REQUIRED = ("array", "row", "column", "state")
_KNOWN = (*_COLUMNS, "state", "conductance")
MOST_CHIPS = 1_000_000

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChipGeometry:
    """The arrays of a chip as far as faults see them. A cell is counted ``(array * rows + row) * columns + column``.

    Attributes:
        arrays: Number of arrays.
        rows: Rows of an array.
        columns: Columns of an array.
        width: Columns that one weight takes on each array, int64 [arrays].
        twin: The array with the other cells of each array's weights, itself where it holds them all, int64 [arrays].
        roles: Columns of an array that are each other's pair: 2 neighbours, or 1 where a twin or nothing is, int64
            [arrays].
    """

    arrays: int
    rows: int
    columns: int
    width: Integers = field(repr=False)
    twin: Integers = field(repr=False)
    roles: Integers = field(repr=False)

    @classmethod
    def of(cls, deployment: Deployment) -> ChipGeometry:
        """Return the geometry of the chip that a plan is for.

        Raises:
            ConfigError: It takes no array.
        """
        arrays = deployment.plan.arrays
        if not arrays:
            raise ConfigError(
                f"{deployment.folder}: has no arrays, because every weight is zero: there is no cell that could fail"
            )
        return cls(
            arrays=len(arrays),
            rows=deployment.target.rows,
            columns=deployment.target.columns,
            width=np.array([len(a.roles) * len(a.slices) for a in arrays], np.int64),
            twin=np.array([a.id if a.twin is None else a.twin for a in arrays], np.int64),
            roles=np.array([len(a.roles) for a in arrays], np.int64),
        )

    @property
    def cells(self) -> int:
        """Physical cells of all arrays."""
        return self.arrays * self.rows * self.columns

    def locate(self, cell: Integers) -> tuple[Integers, Integers, Integers]:
        """Return array, row and column of cells."""
        line, column = np.divmod(cell, self.columns)
        array, row = np.divmod(line, self.rows)
        return array, row, column

    def cell(self, array: Integers, row: Integers, column: Integers) -> Integers:
        """Return the cells at places: the inverse of :meth:`locate`."""
        return (array * self.rows + row) * self.columns + column

    def other_of_pair(self, cell: Integers) -> Integers:
        """Return the other cell of each cell's pair, or itself where it has none."""
        array, row, column = self.locate(cell)
        neighbour = np.where(self.roles[array] == 2, column ^ 1, column)  # a weight takes whole pairs, from column 0
        return self.cell(self.twin[array], row, np.where(neighbour < self.columns, neighbour, column))


@dataclass(frozen=True, kw_only=True, eq=False)
class FaultMap:
    """The stuck cells of one chip, ascending by cell, each once.

    Attributes:
        cell: int64 [faults], as :class:`ChipGeometry` counts them.
        state: uint8 [faults], one of :data:`STATES`.
        conductance: float32 [faults], what each cell is stuck at, siemens, whatever the hardware makes of it.
    """

    cell: Integers = field(repr=False)
    state: npt.NDArray[np.uint8] = field(repr=False)
    conductance: npt.NDArray[np.float32] = field(repr=False)

    def __len__(self) -> int:
        return len(self.cell)

    @property
    def stuck_off(self) -> int:
        """Number of cells that are stuck off."""
        return int(np.count_nonzero(self.state == STUCK_OFF))

    @property
    def stuck_on(self) -> int:
        """Number of cells that are stuck on."""
        return int(np.count_nonzero(self.state == STUCK_ON))

    @property
    def categories(self) -> dict[str, int]:
        """Number of cells that failed in other ways, by the names of these; none where there are none."""
        counts = np.bincount(self.state, minlength=len(STATES) + 1)
        return {name: int(counts[STATES[name]]) for name in CATEGORIES if counts[STATES[name]]}

    @property
    def counts_text(self) -> str:
        """How many cells failed in which way, in words."""
        return f"{self.stuck_off:,} cells stuck off, {self.stuck_on:,} stuck on{counts_text(self.categories)}"


def stuck_ends(target: Target, state: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the mean conductance of failed cells, float32 siemens, by their states, all of which the target has."""
    means = _by_state({name: failure.mean for name, failure in target.failures.items()})
    return means.astype(np.float32)[state]


def stuck_spreads(target: Target, state: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the standard deviation of that, float64 siemens."""
    return _by_state({name: failure.spread for name, failure in target.failures.items()})[state]


def _by_state(values: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Return values by the numbers of states."""
    table = np.zeros(len(STATES) + 1)
    for name, value in values.items():
        table[STATES[name]] = value
    return table


def placement_digest(plan: Plan) -> str:
    """Return a hash of the arrays of a plan and of what sits where on them: whether a fault map belongs to a plan.

    What the cells hold has no part in it: deployments of one model with different weights, or by schemes that use the
    same cells, share their fault maps.
    """
    layers = [(layer.groups, layer.outputs, layer.inputs) for layer in plan.layers]
    content = msgspec.json.encode((plan.target["rows"], plan.target["columns"], layers, plan.arrays))
    return hashlib.sha256(content).hexdigest()


def write_fault_maps(
    path: Path, chips: Sequence[FaultMap], deployment: Deployment, *, notes: Mapping[str, str] | None = None
) -> None:
    """Write the stuck cells of chips, to a temporary sibling that is renamed; the same bytes for the same faults.

    Args:
        path: A file that ends in ``.safetensors`` or ``.csv``.
        chips: Faults of chip 0, 1, ...
        deployment: The deployment whose arrays they are of.
        notes: What else to keep in the metadata of a safetensors file, such as how the faults were drawn.

    Raises:
        ConfigError: The name has another ending, the file cannot be written, or the last of several chips would be lost
            in it.
    """
    writers = {".safetensors": _write_safetensors, ".csv": _write_csv}
    ending = path.suffix.lower()
    if ending not in writers:
        raise ConfigError(f"{path}: a fault map ends in {' or '.join(writers)}, got '{path.suffix}'")
    if ending == ".csv" and len(chips) > 1 and not len(chips[-1]):
        raise ConfigError(
            f"{path}: chip {len(chips) - 1}, the last, has no stuck cell, which a .csv file cannot say; write a "
            f".safetensors file"
        )
    geometry = ChipGeometry.of(deployment)
    array, row, column = geometry.locate(_joined([c.cell for c in chips], np.int64))
    table: dict[str, Array] = {
        "chip": np.repeat(np.arange(len(chips)), [len(c) for c in chips]),
        "array": array,
        "row": row,
        "column": column,
        "state": _joined([c.state for c in chips], np.uint8),
        "conductance": _joined([c.conductance for c in chips], np.float32),
    }
    table |= {name: table[name].astype(dtype) for name, dtype in _COLUMNS.items()}
    metadata = {
        **(notes or {}),
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "chips": str(len(chips)),
        "plan": placement_digest(deployment.plan),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writers[ending](temporary, table, metadata)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _joined(parts: Sequence[Array], dtype: npt.DTypeLike) -> Array:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _write_safetensors(path: Path, table: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    with TensorWriter(path, [(name, v.dtype, v.shape) for name, v in table.items()], metadata) as writer:
        for name in writer.specs:
            writer.write(name, table[name])


def _write_csv(path: Path, table: Mapping[str, Array], _: Mapping[str, str]) -> None:
    words = np.array(["", *STATES])[table["state"]]
    text = {**table, "state": words, "conductance": table["conductance"].astype(str)}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(text)
        writer.writerows(zip(*(column.tolist() for column in text.values()), strict=True))


def read_fault_maps(path: Path, deployment: Deployment) -> list[FaultMap]:
    """Read the stuck cells of chips from a file of either layout, and check them against a deployment.

    Raises:
        DataError: The file is missing, damaged or of another layout, belongs to another plan, names a cell that is in
            no array, a state that is none, or the same cell twice with different values.
    """
    geometry = ChipGeometry.of(deployment)
    digest = placement_digest(deployment.plan)
    try:
        require_regular(path)
        if path.suffix.lower() == ".csv":
            table, chips = _read_csv(path), None
        else:
            table, chips = _read_safetensors(path, digest)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; expected a fault map") from error
    _check_names(path, table)
    table.setdefault("chip", np.zeros(len(table["array"]), np.int64))
    _check_values(path, table, geometry, deployment.target, MOST_CHIPS if chips is None else chips)
    return _split(path, table, geometry, deployment.target, chips)


def _read_safetensors(path: Path, digest: str) -> tuple[dict[str, Array], int | None]:
    """Return the tensors of a file and the number of its chips, where it says how many."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, digest)
            table = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, TypeError) as error:
        raise DataError(f"{path}: no fault map in safetensors or .csv: {' '.join(str(error).split())}") from error
    chips = metadata.get("chips")
    if chips is not None and not (chips.isdecimal() and 1 <= int(chips) <= MOST_CHIPS):
        raise DataError(f"{path}: metadata 'chips' is '{chips}', expected a number from 1 to {MOST_CHIPS}")
    lengths = {name: column.shape for name, column in table.items()}
    if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise DataError(f"{path}: tensors of shapes {lengths}, expected one axis of the same length for all")
    for name, column in table.items():
        if column.dtype.kind not in ("f" if name == "conductance" else "iu"):
            kind = "floating-point" if name == "conductance" else "integer"
            raise DataError(f"{path}: tensor '{name}' is {column.dtype}, expected {kind} numbers")
    return table, None if chips is None else int(chips)


def _check_metadata(path: Path, metadata: Mapping[str, str], digest: str) -> None:
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{path}: metadata 'format' is '{metadata.get('format')}', expected '{_FORMAT}'")
    version = metadata.get("format_version")
    if version != str(_VERSION):
        raise DataError(f"{path}: format version {version}, expected {_VERSION}; it may need a newer rerampile")
    plan = metadata.get("plan", digest)
    if plan != digest:
        raise DataError(
            f"{path}: belongs to another plan (placement {plan[:16]}, expected {digest[:16]}); take the deployment "
            "that it was made for, or draw faults for this one"
        )


def _read_csv(path: Path) -> dict[str, Array]:
    """Return the columns of a file, states as numbers; a word that is no state is refused here."""
    try:
        head, _, body = path.read_text(encoding="utf-8-sig").partition("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from None
    names = [name.strip() for name in head.split(",")]
    kinds = {**dict.fromkeys(_COLUMNS, "i8"), "state": "U20", "conductance": "f8"}
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a column of the header '{head.strip()}' is there twice")
    _check_names(path, names)
    dtype = np.dtype([(name, kinds[name]) for name in names])
    try:
        rows = np.loadtxt(io.StringIO(body), dtype, delimiter=",", comments=None, ndmin=1) if body.strip() else None
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: {_wrong_line(body, names) or ' '.join(str(error).split())}") from error
    rows = np.zeros(0, dtype) if rows is None else rows
    words = np.char.strip(rows["state"])
    state = sum((words == word) * code for word, code in STATES.items())
    _refuse(path, state == 0, lambda i: f"state '{words[i]}', expected {_one_of(STATES)}")
    return {name: state if name == "state" else rows[name] for name in names}


def _wrong_line(body: str, names: Sequence[str]) -> str | None:
    """Say what is wrong with the first line below the header that is no fault; None where each looks like one."""
    for number, line in enumerate(body.splitlines(), 2):
        values = line.split(",") if line.strip() else []
        if values and len(values) != len(names):
            return f"line {number}: {len(values)} values, expected {len(names)}: {', '.join(names)}"
        for name, value in zip(names, values, strict=False):
            try:
                {"state": str, "conductance": float}.get(name, np.int64)(value)
            except (ValueError, OverflowError):
                wanted = "a number" if name == "conductance" else "a whole number of 64 bits"
                return f"line {number}: {name} '{value.strip()}', expected {wanted}"
    return None


def _check_names(path: Path, names: Sequence[str] | Mapping[str, Array]) -> None:
    missing = [name for name in _REQUIRED if name not in names]
    unknown = [name for name in names if name not in _KNOWN]
    if missing or unknown:
        wrong = f"no column '{missing[0]}'" if missing else f"unknown column '{unknown[0]}'"
        optional = "chip and conductance are optional"
        raise DataError(f"{path}: {wrong}, expected {', '.join(_KNOWN)} ({optional})")


def _check_values(path: Path, table: Mapping[str, Array], geometry: ChipGeometry, target: Target, chips: int) -> None:
    sizes = {"chip": chips, "array": geometry.arrays, "row": geometry.rows, "column": geometry.columns}
    for name, size in sizes.items():
        wrong = (table[name] < 0) | (table[name] >= size)
        _refuse(path, wrong, lambda i, name=name, size=size: f"{name} {table[name][i]}, expected 0 to {size - 1}")  # type: ignore[misc]
    state = table["state"]
    known = _one_of([f"{number} ({name})" for name, number in STATES.items()])
    _refuse(path, ~np.isin(state, [*STATES.values()]), lambda i: f"state {state[i]}, expected {known}")
    if "conductance" not in table:
        words = ["", *STATES]
        lacks = ~np.isin(state, [STATES[name] for name in target.failures])
        _refuse(
            path,
            lacks,
            lambda i: f"no conductance, and target {target.name} has no cells that are {words[state[i]]}; give one",
        )
    else:
        g = table["conductance"]
        _refuse(path, ~((g >= 0) & (g <= 10)), lambda i: f"conductance {g[i]:g}, expected siemens from 0 to 10")


def _one_of(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"


def _refuse(path: Path, wrong: Array, message: Callable[[int], str]) -> None:
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{path}: fault {first} (counted from 0): {message(first)}")


def _split(
    path: Path, table: Mapping[str, Array], geometry: ChipGeometry, target: Target, chips: int | None
) -> list[FaultMap]:
    """Return the faults of each chip in order; faults that are listed twice are taken once."""
    chip, array, row, column = (table[name].astype(np.int64) for name in _COLUMNS)
    cell, state = geometry.cell(array, row, column), table["state"].astype(np.uint8)
    value = table["conductance"].astype(np.float32) if "conductance" in table else stuck_ends(target, state)
    order = np.lexsort((cell, chip))
    chip, cell, state, value = chip[order], cell[order], state[order], value[order]
    again = np.zeros(len(cell), np.bool_)
    again[1:] = (cell[1:] == cell[:-1]) & (chip[1:] == chip[:-1])
    differs = again & ((state != np.roll(state, 1)) | (value != np.roll(value, 1)))
    if differs.any():
        i = int(np.flatnonzero(differs)[0])
        place = ", ".join(f"{n} {v[order[i]]}" for n, v in (("array", array), ("row", row), ("column", column)))
        words = ["", *STATES]
        raise DataError(
            f"{path}: chip {chip[i]}, {place} is there twice, {words[state[i - 1]]} at {value[i - 1]:g} S and "
            f"{words[state[i]]} at {value[i]:g} S; keep one"
        )
    chip, cell, state, value = chip[~again], cell[~again], state[~again], value[~again]
    count = int(chip.max(initial=0)) + 1 if chips is None else chips
    edges = np.searchsorted(chip, np.arange(count + 1))
    return [FaultMap(cell=cell[a:b], state=state[a:b], conductance=value[a:b]) for a, b in itertools.pairwise(edges)]
