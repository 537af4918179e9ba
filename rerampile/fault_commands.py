"""The commands about faults: ``validate`` and ``faults``. Only click is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rerampile.command import PATH, examples, json_option, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rerampile.runtime.faults import FaultModel
    from rerampile.runtime.monte_carlo import ChipResult

__all__ = ["faults", "validate"]

_UNMET = 3  # exit code: a requirement does not hold

F = TypeVar("F", bound=Callable[..., Any])


def _numbers(separator: str, kind: Callable[[str], Any] = float) -> Callable[..., Any]:
    """Return a callback that reads numbers between separators."""

    def read(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            return tuple(kind(part) for part in value.split(separator))
        except ValueError:
            raise click.BadParameter(f"'{value}': expected numbers with '{separator}' between them") from None

    return read


_FAULT_OPTIONS = (
    click.option(
        "--failure-rate",
        "rates",
        metavar="F,...",
        callback=_numbers(","),
        help="Fractions of cells that are stuck.  [default: 0.001,0.005,0.01]",
    ),
    click.option(
        "--off-on",
        metavar="A:B",
        default="1:5.2",
        show_default=True,
        callback=_numbers(":"),
        help="How the rate splits into stuck off and stuck on.",
    ),
    click.option("--stuck-off", type=float, metavar="P", help="Fraction stuck off, instead of a failure rate."),
    click.option("--stuck-on", type=float, metavar="P", help="Fraction stuck on, instead of a failure rate."),
    click.option(
        "--rate-unit",
        type=click.Choice(["cell", "weight"]),
        default="cell",
        show_default=True,
        help="What rates are of.",
    ),
    click.option(
        "--distribution",
        type=click.Choice(["independent", "line", "cluster", "array"]),
        default="independent",
        show_default=True,
        help="How faults lie, at the same rate.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the chips."),
)

_PREPROCESSING = (
    ("--preprocess", "preset", "imagenet|cifar10|yolo|raw", "How images become inputs; the following change a piece."),
    ("--size", "size", "H,W", "Height and width."),
    ("--resize", "resize", "short|stretch|letterbox|none", "How images are brought to that size."),
    ("--crop", "crop", "SHARE", "Share of the short side that 'short' keeps."),
    ("--mean", "mean", "A,B,C", "Subtracted from red, green, blue."),
    ("--std", "std", "A,B,C", "What they are then divided by."),
    ("--channels", "channels", "rgb|bgr", "Order of the channels."),
    ("--layout", "layout", "nchw|nhwc", "Order of the axes."),
    ("--pixel-range", "pixel_range", "LOW,HIGH", "What black and white become before mean and std."),
)


def _fault_options(command: F) -> F:
    for option in reversed(_FAULT_OPTIONS):
        command = option(command)
    return command


def _preprocessing_options(command: F) -> F:
    for flag, name, metavar, text in reversed(_PREPROCESSING):
        command = click.option(flag, name, metavar=metavar, help=text)(command)
    return command


def _fault_models(
    rates: tuple[float, ...] | None,
    off_on: tuple[float, ...],
    stuck_off: float | None,
    stuck_on: float | None,
    rate_unit: Any,
    distribution: Any,
) -> tuple[FaultModel, ...]:
    """Return a fault model for each asked rate."""
    from rerampile.runtime.faults import FaultModel

    more = {"rate_unit": rate_unit, "distribution": distribution}
    if stuck_off is not None or stuck_on is not None:
        if rates is not None:
            raise click.UsageError("--failure-rate and --stuck-off or --stuck-on: expected one of the two ways")
        return (FaultModel(stuck_off=stuck_off or 0.0, stuck_on=stuck_on or 0.0, **more),)
    if len(off_on) != 2:
        raise click.UsageError("--off-on: expected two numbers, as in 1:5.2")
    return tuple(FaultModel.of_rate(rate, (off_on[0], off_on[1]), **more) for rate in rates or (0.001, 0.005, 0.01))


@click.command(
    epilog=examples(
        "rerampile validate model.deployment",
        "rerampile validate model.deployment --data cifar10:DIR --failure-rate 0.01",
        "rerampile validate out --data imagefolder:DIR --precision-points 0.2",
        "rerampile validate out --data cifar10:DIR --require 'top1 >= 90 @ 0.001'",
    )
)
@click.argument("folder", type=PATH)
@click.option(
    "--data",
    metavar="DATA",
    default="generated",
    show_default=True,
    help="cifar10:DIR, imagefolder:DIR, "
    "coco:IMAGES,instances.json, npz:FILE (each with @train or @test), or generated inputs.",
)
@_fault_options
@click.option("--fault-map", metavar="FILE", type=PATH, help="Run the chips of this file instead of drawing any.")
@click.option("--runs", type=click.IntRange(1), default=100, show_default=True, help="Chips a failure rate.")
@click.option("--precision-points", type=float, metavar="X", help="Instead: chips until the mean is known to X points.")
@click.option("--images", type=click.IntRange(1), help="Use that many, spread over the data.")
@click.option("--images-per-run", type=click.IntRange(1), help="Images each chip sees, drawn anew for each.")
@click.option("--metric", default="auto", show_default=True, help="accuracy, map, agreement, or the one that suits.")
@_preprocessing_options
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read.")
@click.option("--first-image", metavar="FILE.png", type=PATH, help="Write the first image as the model sees it.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images run at once.")
@click.option("--provider", default="CPUExecutionProvider", show_default=True, help="ONNX Runtime execution provider.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option(
    "--require", "required", metavar="TEXT", multiple=True, help="Exit with 3 if not met, as in 'top1 >= 90 @ 0.001'."
)
@click.option("-o", "--out", metavar="FOLDER", type=PATH, help="Where the report goes.  [default: NAME.validation]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@click.pass_context
def validate(
    ctx: click.Context,
    /,
    folder: Path,
    data: str,
    rates: tuple[float, ...] | None,
    off_on: tuple[float, ...],
    stuck_off: float | None,
    stuck_on: float | None,
    rate_unit: str,
    distribution: str,
    seed: int,
    fault_map: Path | None,
    runs: int,
    precision_points: float | None,
    images: int | None,
    images_per_run: int | None,
    metric: str,
    skip_bad: bool,
    first_image: Path | None,
    batch: int,
    provider: str,
    jobs: int,
    required: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    as_json: bool,
    **pieces: str | None,
) -> None:
    """Run chips of a deployment with stuck cells, and report how accurate they are.

    FOLDER is a deployment. Finished chips are kept in the report's folder: interrupted, the same command goes on.
    """
    import msgspec

    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.preprocessing import Preprocessing
    from rerampile.runtime.report import most_hit_array, write_report
    from rerampile.runtime.validation import Requirement
    from rerampile.runtime.validation import validate as run_validation

    models = _fault_models(rates, off_on, stuck_off, stuck_on, rate_unit, distribution)
    experiment = Experiment(
        folder=folder,
        faults=() if fault_map is not None else models,
        fault_map=fault_map,
        data=data,
        preprocessing=Preprocessing.parse(**pieces),
        metric=metric,
        images=images,
        images_per_run=images_per_run,
        batch=batch,
        seed=seed,
        provider=provider,
        skip_bad=skip_bad,
        first_image=first_image,
    )
    requirements = [Requirement.parse(text) for text in required]
    place = out or Path(f"{folder.resolve().name.removesuffix('.deployment')}.validation")
    place.mkdir(parents=True, exist_ok=True)
    with _chips_progress(quiet) as progress:
        report = run_validation(
            experiment,
            place / "journal.jsonl",
            runs=runs,
            precision_points=precision_points,
            requirements=requirements,
            jobs=jobs,
            progress=progress,
        )
    command = f"rerampile {shlex.join(sys.argv[1:])}"
    written = write_report(place, [report], command=command, picture=most_hit_array(experiment))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        from rerampile.show import console
        from rerampile.show_validation import show_validation

        show_validation(console(), report, next(path for path in written if path.suffix == ".html"))
    if not all(requirement.met for requirement in report.requirements):
        ctx.exit(_UNMET)


@contextmanager
def _chips_progress(quiet: bool) -> Iterator[Callable[[int, int, ChipResult | None], None] | None]:
    """Show a bar with rate and time left on stderr where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("chips"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def update(finished: int, wanted: int, result: ChipResult | None) -> None:
            text = "" if result is None else ", ".join(f"{name} {value:.2f}" for name, value in result.values.items())
            bar.update(task, completed=finished, total=wanted, description=text)

        yield update


@click.group(epilog=examples("rerampile faults draw model.deployment --failure-rate 0.01 -o chips.csv"))
def faults() -> None:
    """Write fault maps, and look at them."""


@faults.command(epilog=examples("rerampile faults draw out --failure-rate 0.01 --runs 8 -o chips.safetensors"))
@click.argument("folder", type=PATH)
@_fault_options
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Chips.")
@click.option("-o", "--out", metavar="FILE", type=PATH, required=True, help="A .safetensors or .csv file.")
def draw(
    folder: Path,
    rates: tuple[float, ...] | None,
    off_on: tuple[float, ...],
    stuck_off: float | None,
    stuck_on: float | None,
    rate_unit: str,
    distribution: str,
    seed: int,
    runs: int,
    out: Path,
) -> None:
    """Draw the stuck cells of chips of a deployment, as 'validate' would, and write them to a file."""
    from rerampile.deployment import load_deployment
    from rerampile.runtime.fault_map import ChipGeometry, write_fault_maps
    from rerampile.runtime.faults import draw_faults

    models = _fault_models(rates, off_on, stuck_off, stuck_on, rate_unit, distribution)
    if len(models) != 1 or (rates is None and stuck_off is None and stuck_on is None):
        raise click.UsageError("--failure-rate: expected one rate to draw chips at")
    deployment = load_deployment(folder)
    geometry = ChipGeometry.of(deployment)
    chips = [draw_faults(geometry, models[0], deployment.target, seed=seed, run=run) for run in range(runs)]
    write_fault_maps(out, chips, deployment, notes={"seed": str(seed), "model": str(models[0])})
    cells = sum(len(chip) for chip in chips)
    click.echo(f"{out}: {runs} chips, {cells:,} stuck of {runs * geometry.cells:,} cells", err=True)


@faults.command("show", epilog=examples("rerampile faults show out chips.safetensors --array 0 --png faults.png"))
@click.argument("folder", type=PATH)
@click.argument("file", type=PATH)
@click.option("--chip", type=click.IntRange(0), default=0, show_default=True, help="Number of the chip.")
@click.option("--array", "array_id", type=click.IntRange(0), default=0, show_default=True, help="Id of the array.")
@click.option("--png", metavar="FILE", type=PATH, help="Draw the array's stuck cells.")
def show_faults(folder: Path, file: Path, chip: int, array_id: int, png: Path | None) -> None:
    """Count the stuck cells of a fault map, and picture those of one array."""
    from rerampile.deployment import load_deployment
    from rerampile.errors import ConfigError
    from rerampile.runtime.fault_map import read_fault_maps
    from rerampile.runtime.report import array_picture, draw_png

    deployment = load_deployment(folder)
    deployment.array_plan(array_id)
    chips = read_fault_maps(file, deployment)
    if chip >= len(chips):
        raise ConfigError(f"{file}: no chip {chip}, expected 0 to {len(chips) - 1}")
    for number, found in enumerate(chips):
        click.echo(f"chip {number}: {found.stuck_off:,} cells stuck off, {found.stuck_on:,} stuck on")
    if png is not None:
        png.write_bytes(draw_png(array_picture(deployment, chips[chip], array_id, f"array {array_id} of chip {chip}")))
        click.echo(str(png), err=True)
