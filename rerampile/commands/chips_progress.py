"""The progress of chips on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rerampile.runtime.monte_carlo import ChipResult

__all__ = ["chips_progress"]

_MEASURED_SECONDS = 3600.0  # over which the rate is taken: a chip may need minutes


@contextmanager
def chips_progress(quiet: bool, label: str = "chips") -> Iterator[Callable[[int, int, ChipResult | None], None] | None]:
    """Show a bar with rate and time left on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from rerampile.terminal import printable

    columns = (
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=_MEASURED_SECONDS) as bar:
        task = bar.add_task("", total=None, label=printable(label), rate="")

        def update(finished: int, wanted: int, result: ChipResult | None) -> None:
            if result is None:  # what was finished before says nothing about the rate
                bar.reset(task, completed=finished, total=wanted)
                return
            speed = bar.tasks[0].speed
            bar.update(
                task,
                completed=finished,
                description=", ".join(f"{name} {value:.2f}" for name, value in result.values.items()),
                rate="" if speed is None else f"{60 * speed:,.1f} chips/min",
            )

        yield update
