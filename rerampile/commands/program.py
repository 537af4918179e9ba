"""The command ``program``. Only click is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rerampile.commands.chip_options import IMAGE_OPTIONS, optional_calibration_options
from rerampile.commands.options import PATH, examples, json_option, print_json, refuse_given
from rerampile.commands.prune import open_calibration
from rerampile.interruption import cleaned_up

if TYPE_CHECKING:
    from rerampile.chip_calibration import Calibration
    from rerampile.chip_plan import ChipPlan
    from rerampile.deployment import Deployment

__all__ = ["program"]

_UNMET = 3  # exit code: a requirement does not hold
_IMAGES = 256


@click.command(
    epilog=examples(
        "rerampile program model.deployment --fault-map chip17.safetensors -o chip17",
        "rerampile program out --fault-map chip.csv --calibration npz:FILE -o chip",
        "rerampile program out --fault-map maps/ --require 'error <= 0.05' -o chips",
    )
)
@click.argument("folder", type=PATH)
@click.option(
    "--fault-map",
    metavar="FILE|FOLDER",
    type=PATH,
    required=True,
    help="The chip's measured stuck cells; of several chips, each gets a folder of its own.",
)
@click.option(
    "--steps",
    metavar="NAME,...",
    help="Some of compensate, assign, flip, repair, gain, bias.  [default: all; without --calibration the first three]",
)
@optional_calibration_options
@click.option(
    "--require", "required", metavar="TEXT", multiple=True, help="Exit with 3 if a chip misses it: 'error <= 0.05'."
)
@click.option("-o", "--out", metavar="FOLDER", type=PATH, required=True, help="The chip's deployment folder.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@click.pass_context
def program(
    ctx: click.Context,
    /,
    folder: Path,
    fault_map: Path,
    steps: str | None,
    data: dict[str, Any],
    required: tuple[str, ...],
    out: Path,
    quiet: bool,
    as_json: bool,
) -> None:
    """Program a deployment for one chip whose stuck cells are known, without labels and without training.

    FOLDER is a deployment. What is written is one too, of that very chip: 'verify', 'show' and 'validate' take it.
    """
    import msgspec

    from rerampile.checks import check_checksums
    from rerampile.commands.show_program import show_bins, show_chip
    from rerampile.compiler import check_replaceable
    from rerampile.deployment import load_deployment
    from rerampile.programmer import ChipRequirement, check_steps, chip_sources, program_chip
    from rerampile.runtime.layer_program import STEPS, UNCALIBRATED, require_programmable
    from rerampile.terminal import console

    requirements = [ChipRequirement.parse(text) for text in required]
    calibrated = data["data"] is not None
    if not calibrated:
        refuse_given(ctx, IMAGE_OPTIONS, "no effect without --calibration")
    wanted = STEPS if calibrated else UNCALIBRATED
    ordered = check_steps(wanted if steps is None else steps.split(","), calibrated)
    deployment = load_deployment(folder)
    check_checksums(deployment)
    require_programmable(deployment)  # before a calibration, which takes minutes
    deployment.require_outside(out)
    sources = chip_sources(fault_map, deployment, out)
    for _, place in sources:
        check_replaceable(place)
    calibration = _calibration(deployment, data, quiet) if calibrated else None
    records: list[dict[str, Any]] = []
    bins: list[tuple[str, ChipPlan, bool | None]] = []
    for source, place in sources:
        with cleaned_up(), _progress(quiet, place.name) as progress:
            chip = program_chip(
                deployment, source, place, steps=ordered, calibration=calibration, progress=progress
            ).plan.chip
        if chip is None:
            continue
        results = [(requirement.text, *requirement.check(chip)) for requirement in requirements]
        bins.append((place.name, chip, all(met for _, _, met in results) if results else None))
        if as_json:
            verdicts = [{"text": text, "found": found, "met": met} for text, found, met in results]
            records.append({"folder": str(place), "chip": msgspec.to_builtins(chip), "requirements": verdicts})
        else:
            show_chip(console(), deployment.plan.layers, chip, place, results)
    if as_json:
        print_json({"chips": records})
    elif len(bins) > 1:
        show_bins(console(), bins)
    if any(met is False for _, _, met in bins):
        ctx.exit(_UNMET)


def _calibration(deployment: Deployment, data: dict[str, Any], quiet: bool) -> Calibration:
    """Run the calibration images that the options name."""
    from rerampile.chip_calibration import calibrate

    count = data["images"] or _IMAGES
    images = open_calibration(deployment.model_path, data, count)
    with _progress(quiet, "calibration") as progress:
        return calibrate(deployment, images, count, progress)


@contextmanager
def _progress(quiet: bool, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from rerampile.terminal import printable

    with Progress(TextColumn(printable(what)), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, steps: bar.update(task, completed=done, total=steps)
