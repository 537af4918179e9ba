"""The progress of chips on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rerampile.runtime.monte_carlo import ChipResult

__all__ = ["chips_progress"]


@contextmanager
def chips_progress(quiet: bool, label: str = "chips") -> Iterator[Callable[[int, int, ChipResult | None], None] | None]:
    """Show a bar with rate and time left on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rerampile.show import printable

    columns = (
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, label=printable(label))

        def update(finished: int, wanted: int, result: ChipResult | None) -> None:
            text = "" if result is None else ", ".join(f"{name} {value:.2f}" for name, value in result.values.items())
            bar.update(task, completed=finished, total=wanted, description=text)

        yield update
