"""Text and tables on a terminal.

Names come from models that may be hostile, so whatever is not printable is escaped before it reaches a terminal.
Tables are as wide as the terminal, or as wide as their content where the output goes elsewhere: a pipe loses nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

__all__ = ["Justify", "console", "facts_table", "new_table", "print_parts", "printable", "siemens_text"]

_PIPE_WIDTH = 1000

Justify = Literal["left", "right"]


def printable(text: str) -> str:
    """Return ``text`` with control characters, line breaks and the like written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def console() -> Console:
    """Return a console on stdout that takes text as it is: no markup, no emoji, no guessed colours."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=False, width=None if known else _PIPE_WIDTH)


# Tables.


def new_table(*columns: tuple[str, Justify]) -> Table:
    """Return an empty table; only left-justified columns may be folded when the terminal is narrow."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=justify == "right", overflow="fold", header_style="bold")
    return table


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Return rows of a word and what there is to say about it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for word, text in rows:
        grid.add_row(word, text)
    return grid


def print_parts(out: Console, *parts: RenderableType | None) -> None:
    """Print the parts that there are, a blank line between them."""
    for number, part in enumerate(part for part in parts if part is not None):
        if number:
            out.print()
        out.print(part)


def siemens_text(value: float) -> str:
    """Return a conductance in siemens with the unit that suits it."""
    for factor, unit in ((1.0, "S"), (1e3, "mS"), (1e6, "µS"), (1e9, "nS")):
        if value * factor >= 0.9995:
            return f"{value * factor:.4g} {unit}"
    return f"{value * 1e12:.4g} pS" if value else "0 S"
