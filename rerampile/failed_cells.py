"""Cells that failed, and how the hardware treats them: in which ways forming goes wrong, and what a circuit reads then.

Forming gives each cell its filament, once. It can leave none at all (*unformed*: the cell is nearly open), one that can
no longer be programmed (*partially formed*: anything in between), or one far too thick (*over-formed*: nearly a short).
Hardware can bound the value that such a cell has in a sum of currents (Kim et al., Hardware and software
co-optimization for the initialization failure of the ReRAM based cross-bar array, ACM JETC 16(4), 2020; its abstract is
followed here, no circuit and no number of it). What it can do:

==================  =================================================================
``unbounded``       the cell is read as what it conducts; an over-formed one is a short
``bounded``         the cell is read as at least ``low`` and at most ``high``
``isolated_cell``   the cell is cut off: read as open, 0 S
``isolated_pair``   both cells of its pair are cut off, so that their difference is 0
==================  =================================================================

A device has its own conductance whatever the circuit: the same chips serve all four.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rerampile.field_checks import check_fields, choice, or_none, positive, record, siemens

__all__ = ["CATEGORIES", "RESPONSES", "Category", "FailedCells", "Stuck", "counts_text"]

RESPONSES = ("unbounded", "bounded", "isolated_cell", "isolated_pair")
CATEGORIES = ("unformed", "partially_formed", "over_formed")
"""In which ways forming fails, by rising conductance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """What a stuck cell conducts. May lie outside the range that healthy cells are programmed in.

    Attributes:
        mean: Mean conductance, siemens.
        spread: Standard deviation of the conductance, siemens.
    """

    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, {"mean": siemens, "spread": siemens})


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """One way in which forming fails.

    Attributes:
        share: How many of the failed cells are of this kind, beside the shares of the other kinds.
        mean: Mean conductance, siemens.
        spread: Standard deviation of the conductance, siemens.
    """

    share: float
    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, {"share": positive, "mean": siemens, "spread": siemens})


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedCells:
    """How cells fail, and what the hardware makes of those that did.

    Attributes:
        response: ``unbounded``, ``bounded``, ``isolated_cell`` or ``isolated_pair``; holds for all failed cells, those
            that are stuck off or on among them.
        low: The least that a ``bounded`` cell is read as, siemens; None for the cell's ``g_off``.
        high: The most, siemens; None for ``g_on``.
        unformed: Cells that have no filament; None where there are none.
        partially_formed: Cells whose filament cannot be programmed; None where there are none.
        over_formed: Cells whose filament is too thick; None where there are none.
    """

    response: str = "unbounded"
    low: float | None = None
    high: float | None = None
    unformed: Category | None = None
    partially_formed: Category | None = None
    over_formed: Category | None = None

    def __post_init__(self) -> None:
        checks = {"response": choice(RESPONSES), "low": or_none(siemens), "high": or_none(siemens)}
        check_fields(self, checks | dict.fromkeys(CATEGORIES, or_none(record(Category))))

    @property
    def categories(self) -> dict[str, Category]:
        """The ways in which forming fails, by name; none where cells are just stuck off or on."""
        found = {name: getattr(self, name) for name in CATEGORIES}
        return {name: category for name, category in found.items() if category is not None}

    @property
    def isolates_pairs(self) -> bool:
        """Whether a failed cell takes the other cell of its pair along."""
        return self.response == "isolated_pair"

    def limits(self, g_off: float, g_on: float) -> tuple[float, float]:
        """Return the least and the most that a failed cell is read as, siemens; beyond them, it is read as the limit.

        Args:
            g_off: Lowest conductance of a healthy cell, siemens.
            g_on: Highest, siemens.
        """
        if self.response == "unbounded":
            return 0.0, math.inf
        if self.response == "bounded":
            return g_off if self.low is None else self.low, g_on if self.high is None else self.high
        return 0.0, 0.0


def counts_text(categories: Mapping[str, int]) -> str:
    """Return how many cells failed in which way, to be put behind those that are stuck; empty where none did."""
    return "".join(f", {count:,} {name.replace('_', '-')}" for name, count in categories.items())
