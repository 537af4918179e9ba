"""What the pages that run chips share: how they are run, and how accuracy over failure rate is shown."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rerampile.runtime.comparison import Compared, Known
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import ChipResult, Experiment
from rerampile.runtime.report import known_text
from rerampile.runtime.validation import ValidationReport, validate

__all__ = ["finish_rates", "known_cells", "rates_of", "run_chips", "tolerated"]


def rates_of(options: argparse.Namespace) -> list[float]:
    """Return the failure rates that are asked for, rising."""
    return sorted(map(float, options.failure_rate.split(",")))


def run_chips(
    folder: Path, options: argparse.Namespace, faults: Sequence[FaultModel], *, name: str | None = None, **how: Any
) -> ValidationReport:
    """Run the chips of a deployment; those that are finished are kept in ``options.work``.

    Args:
        folder: The deployment.
        options: Of the page.
        faults: What happens to cells.
        name: Of the journal; that of the folder where None.
        how: Further fields of the experiment.
    """
    name = name or folder.name
    few = options.images_per_run
    experiment = Experiment(folder=folder, faults=tuple(faults), data=options.data, images_per_run=few, **how)
    return validate(experiment, options.work / f"{name}.journal.jsonl", runs=options.runs, progress=_say(name))


def _say(name: str) -> Callable[[int, int, ChipResult | None], None]:
    """Return what prints a line now and then."""

    def progress(finished: int, wanted: int, result: ChipResult | None) -> None:
        if finished % 20 == 0 or finished == wanted:
            print(f"{name}: {finished} of {wanted}", flush=True)

    return progress


def tolerated(compared: Compared) -> list[str]:
    """Return the cells about tolerated failure rates."""
    return known_cells(compared.tolerated) + (["1", ""] if compared.times is None else known_cells(compared.times))


def known_cells(known: Known) -> list[str]:
    """Return an estimate, and its interval with open ends."""
    low, high = known.interval
    return [known_text(known), f"{low:.2g} …{'' if high is None else f' {high:.2g}'}"]


def finish_rates(axes: Any, metric: str, size: int = 7, *, below: bool = False) -> None:
    """Label a picture of a metric over failure rate; below it where there are too many lines for names beside them."""
    axes.set_xscale("log")
    axes.set_xlabel("failure rate of a cell")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    if below:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=size, handlelength=4)
    else:
        axes.legend(frameon=False, fontsize=size)
