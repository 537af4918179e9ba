"""The command ``predict``. Only click is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rerampile.commands.chip_options import AskedFaults, data_options, fault_options
from rerampile.commands.options import PATH, examples, json_option, own_folder, print_json

__all__ = ["predict"]


@click.command(
    epilog=examples(
        "rerampile predict model.deployment",
        "rerampile predict model.deployment --data cifar10:DIR --failure-rate 0.01",
        "rerampile predict model.deployment --data imagefolder:DIR -o predicted",
    )
)
@click.argument("folder", type=PATH)
@data_options
@fault_options
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the noise and of generated inputs."
)
@click.option("-o", "--out", metavar="FOLDER", type=PATH, help="Write prediction.json and a chart of the layers there.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="List every layer.")
@json_option
def predict(
    folder: Path,
    data: dict[str, Any],
    faults: AskedFaults,
    seed: int,
    out: Path | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Predict what stuck cells do to each layer and to the outputs, without running chips.

    FOLDER is a deployment. 64 images calibrate it, or as many as --images says; where --data names no split, those of
    @train.
    """
    import msgspec

    from rerampile.checks import check_checksums
    from rerampile.deployment import load_deployment
    from rerampile.runtime.layer_chart import PREDICTION_FILES, write_prediction
    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.predict import predict_experiment

    deployment = load_deployment(folder)
    check_checksums(deployment)
    experiment = Experiment(folder=folder, faults=faults(deployment.target), seed=seed, **data)
    place = None if out is None else own_folder(out, PREDICTION_FILES)
    with _progress(quiet) as progress:
        found = predict_experiment(experiment, progress=progress)
    if place is not None:
        write_prediction(place, found)
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    from rerampile.commands.show_prediction import show_prediction
    from rerampile.terminal import console

    show_prediction(console(), found, verbose, out)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("calibration and layers"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, steps: bar.update(task, completed=done, total=steps)
