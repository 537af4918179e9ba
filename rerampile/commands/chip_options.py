"""Options that commands about chips share. Only click is imported before a command runs.

Each decorator reads a family of options and hands the command one argument made of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rerampile.runtime.faults import FaultModel
    from rerampile.target import Target

__all__ = [
    "IMAGE_OPTIONS",
    "AskedFault",
    "AskedFaults",
    "calibration_options",
    "chip_fault_options",
    "data_options",
    "defect_options",
    "effort_options",
    "execution_options",
    "family",
    "fault_options",
    "fault_rate_options",
    "metric_options",
    "numbers",
    "optional_calibration_options",
    "seed_option",
    "training_data_options",
]

_DEFAULT_RATES = (0.001, 0.005, 0.01)

AskedFault = Callable[["Target"], "FaultModel"]
"""What is asked of one chip: on a target, which says in what ways its cells fail, that is a fault model."""
AskedFaults = Callable[["Target"], "tuple[FaultModel, ...]"]
"""The same for several failure rates."""


def family(
    options: tuple[Callable[[Any], Any], ...], argument: str, make: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command some options, and passes them on as one argument.

    Args:
        options: The options, in the order of the help text.
        argument: The command's argument.
        make: Makes its value of the options, by their names.
    """
    names = [option.name for option in _parameters(options)]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def read(*args: Any, **given: Any) -> Any:
            family = {name: given.pop(name) for name in names}
            return command(*args, **{argument: make(**family)}, **given)

        for option in reversed(options):
            read = option(read)
        return read

    return decorate


def _parameters(options: tuple[Callable[[Any], Any], ...]) -> list[click.Parameter]:
    """Return the parameters that option decorators make."""

    def nothing() -> None: ...

    for option in reversed(options):
        option(nothing)
    found: list[click.Parameter] = nothing.__click_params__  # type: ignore[attr-defined]
    return found[::-1]


def numbers(separator: str, expected: str | None = None) -> Callable[..., Any]:
    """Return a callback that reads numbers between separators.

    Args:
        separator: What stands between them.
        expected: What the message asks for.
    """
    wanted = expected or f"numbers with '{separator}' between them"

    def read(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            return tuple(float(part) for part in value.split(separator))
        except ValueError:
            raise click.BadParameter(f"'{value}': expected {wanted}") from None

    return read


# What chips suffer from.

_KIND_OPTIONS = (
    click.option(
        "--off-on",
        metavar="A:B",
        callback=numbers(":"),
        help="How the rate splits into stuck off and stuck on.  [default: as the target says, or 1:5.2]",
    ),
    click.option("--stuck-off", type=float, metavar="P", help="Fraction stuck off, instead of a failure rate."),
    click.option("--stuck-on", type=float, metavar="P", help="Fraction stuck on, instead of a failure rate."),
)

_PLACE_OPTIONS = (
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
)

_FAULT_OPTIONS = (
    click.option(
        "--failure-rate",
        "rates",
        metavar="F,...",
        callback=numbers(","),
        help="Fractions of cells that are stuck.  [default: 0.001,0.005,0.01]",
    ),
    *_KIND_OPTIONS,
    *_PLACE_OPTIONS,
)


def _fault_models(
    rates: Sequence[float] | None,
    off_on: tuple[float, ...] | None,
    stuck_off: float | None,
    stuck_on: float | None,
    rate_unit: Any = "cell",
    distribution: Any = "independent",
) -> AskedFaults:
    """Return a fault model for each asked rate, once it is known on which target."""
    given = stuck_off is not None or stuck_on is not None
    if given and rates is not None:
        raise click.UsageError("--failure-rate and --stuck-off or --stuck-on: expected one of the two ways")
    if given and off_on is not None:
        raise click.UsageError("--off-on and --stuck-off or --stuck-on: it splits a --failure-rate; leave it out")
    if off_on is not None and len(off_on) != 2:
        raise click.UsageError("--off-on: expected two numbers, as in 1:5.2")
    if rates is not None and len(set(rates)) < len(rates):
        raise click.UsageError("--failure-rate: a rate is there twice, expected different ones")

    def models(target: Target) -> tuple[FaultModel, ...]:
        from rerampile.runtime.faults import FaultModel

        more = {"rate_unit": rate_unit, "distribution": distribution}
        if given:
            return (FaultModel(stuck_off=stuck_off or 0.0, stuck_on=stuck_on or 0.0, **more),)
        asked = rates or _DEFAULT_RATES
        if off_on is None:
            return tuple(FaultModel.of_target(rate, target, **more) for rate in asked)
        return tuple(FaultModel.of_rate(rate, (off_on[0], off_on[1]), **more) for rate in asked)

    return models


fault_options = family(_FAULT_OPTIONS, "faults", _fault_models)
"""Gives a command ``faults``: the :data:`AskedFaults`, a fault model for each failure rate."""


def _rate_option(help_text: str) -> Callable[[Any], Any]:
    return click.option("--failure-rate", "rate", metavar="F", type=float, help=help_text)


def _fault_rate(rate: float | None, **split: Any) -> AskedFault | None:
    """Return the fault model of one rate, None where nothing was asked for."""
    if rate is None and all(value is None for value in split.values()):
        return None
    models = _fault_models(None if rate is None else (rate,), **split)
    return lambda target: models(target)[0]


_FOR_ONE_RATE = "for mappings optimal and auto, --clip, --correct and --spend-spare-arrays"
_BY_DEFAULT = f"[default: {_DEFAULT_RATES[0]}]"

fault_rate_options = family(
    (_rate_option(f"Fraction of cells that is stuck, {_FOR_ONE_RATE}.  {_BY_DEFAULT}"), *_KIND_OPTIONS),
    "faults",
    _fault_rate,
)
"""Gives a command ``faults``: the :data:`AskedFault` of one rate of independent cells, or None for the default."""

chip_fault_options = family(
    (_rate_option(f"Fraction of cells that is stuck.  {_BY_DEFAULT}"), *_KIND_OPTIONS, *_PLACE_OPTIONS),
    "faults",
    _fault_rate,
)
"""The same for a command that draws chips: with where faults lie, and never None."""

defect_options = family(
    (_rate_option("Fraction of cells that is stuck, others each step."), *_KIND_OPTIONS),
    "faults",
    _fault_rate,
)
"""The :data:`AskedFault` of a command that trains with defects, or None for none."""

correction_options = family(
    (
        click.option(
            "--clip",
            is_flag=True,
            help="Full scales of the least expected output error on --calibration, which clip the largest weights.",
        ),
        click.option(
            "--correct",
            is_flag=True,
            help="Gains and biases that make up for what stuck cells do to outputs on average, on --calibration.",
        ),
    ),
    "corrections",
    dict,
)
"""Gives a command ``corrections``: ``clip`` and ``correct`` of :func:`rerampile.compile_model`."""

# What they are measured on.

_ADAPTERS = "cifar10:DIR or imagefolder:DIR (with @train or @test), coco:IMAGES,instances.json, npz:FILE"

_IMAGE_OPTIONS = (
    click.option("--images", type=click.IntRange(1), help="Use that many, spread over the data."),
    click.option(
        "--preprocess",
        "preset",
        metavar="PRESET",
        help="imagenet, cifar10, yolo or raw; the following change a piece of it.",
    ),
    click.option("--size", metavar="H,W", help="Height and width."),
    click.option("--resize", metavar="WAY", help="short, stretch, letterbox or none: how images get that size."),
    click.option("--crop", metavar="SHARE", help="Share of the short side that 'short' keeps."),
    click.option("--mean", metavar="A,B,C", help="Subtracted from red, green, blue."),
    click.option("--std", metavar="A,B,C", help="What they are then divided by."),
    click.option("--channels", metavar="ORDER", help="rgb or bgr."),
    click.option("--layout", metavar="ORDER", help="nchw or nhwc."),
    click.option("--pixel-range", metavar="LOW,HIGH", help="What black and white become before mean and std."),
    click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be read."),
    click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images run at once."),
)

IMAGE_OPTIONS = tuple(option.name for option in _parameters(_IMAGE_OPTIONS))
"""Names of the parameters that say how data are read, which have no effect without any."""


def _data(*, data: str | None, images: int | None, skip_bad: bool, batch: int, **pieces: str | None) -> dict[str, Any]:
    """Return fields of :class:`~rerampile.runtime.monte_carlo.Experiment`."""
    from rerampile.runtime.preprocessing import Preprocessing

    preprocessing = Preprocessing.parse(**pieces)
    return {"data": data, "preprocessing": preprocessing, "images": images, "skip_bad": skip_bad, "batch": batch}


data_options = family(
    (
        click.option(
            "--data",
            metavar="DATA",
            default="generated",
            show_default=True,
            help=f"{_ADAPTERS}, or generated inputs.",
        ),
        *_IMAGE_OPTIONS,
    ),
    "data",
    _data,
)
"""Gives a command ``data``: what to run on, as fields of an ``Experiment``."""


def _calibration_options(required: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    option = click.option(
        *("--calibration", "data"),
        metavar="DATA",
        required=required,
        help=f"Images to learn from: {_ADAPTERS}; @train where it has splits.",
    )
    return family((option, *_IMAGE_OPTIONS), "data", _data)


calibration_options = _calibration_options(required=True)
"""Gives a command ``data``: what to calibrate with, as fields of an ``Experiment``."""

optional_calibration_options = _calibration_options(required=False)
"""The same for a command that may do without; the field ``data`` is then None."""

training_data_options = family(
    (
        click.option(
            "--data",
            metavar="DATA",
            required=True,
            help=f"Images with labels: {_ADAPTERS}; @train where it has splits.",
        ),
        click.option("--images", type=click.IntRange(1), help="Use the first that many."),
        *_IMAGE_OPTIONS[1:-1],
        click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images a step."),
    ),
    "data",
    _data,
)
"""Gives a command ``data``: what to train with, under the same names."""

_METRIC_OPTIONS = (
    click.option(
        "--detection",
        metavar="FILE.json",
        type=click.Path(path_type=Path),
        help="How outputs become boxes, where the model does not say: heads, classes, boxes, normalised.",
    ),
    click.option("--images-per-run", type=click.IntRange(1), help="Images each chip sees, drawn anew for each."),
    click.option(
        "--metric", default="auto", show_default=True, help="accuracy, map, agreement, or the one that suits."
    ),
)


def _metric(*, detection: Path | None, **options: Any) -> dict[str, Any]:
    """Return fields of :class:`~rerampile.runtime.monte_carlo.Experiment`."""
    if detection is None:
        return options
    from rerampile.runtime.detection import read_detection_options

    return {**options, "detection": read_detection_options(detection)}


metric_options = family(_METRIC_OPTIONS, "metric", _metric)
"""Gives a command ``metric``: how chips are scored, as fields of an ``Experiment``."""

# How many chips, and how they run.

_EFFORT_OPTIONS = (
    click.option("--runs", type=click.IntRange(1), default=100, show_default=True, help="Chips a failure rate."),
    click.option(
        "--precision-points", type=float, metavar="X", help="Instead: chips until the mean is known to X points."
    ),
    click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes."),
    click.option("--dask", metavar="ADDRESS", help="Instead: the workers of a Dask cluster, by its scheduler."),
)


def _effort(**options: Any) -> dict[str, Any]:
    if options["dask"] is not None and options["jobs"] != 1:
        raise click.UsageError("--jobs and --dask: expected one of the two ways")
    return options


effort_options = family(_EFFORT_OPTIONS, "effort", _effort)
"""Gives a command ``effort``: keywords of :func:`~rerampile.runtime.validation.validate`."""

_EXECUTION_OPTIONS = (
    click.option(
        "--precision",
        type=click.Choice(["fp32", "int8"]),
        default="fp32",
        show_default=True,
        help="Arithmetic; int8 where cells hold at most 8 bits.",
    ),
    click.option(
        "--calibration", metavar="DATA", help="Where int8 learns ranges of activations.  [default: the data, @train]"
    ),
    click.option(
        "--provider", default="CPUExecutionProvider", show_default=True, help="ONNX Runtime execution provider."
    ),
)

execution_options = family(_EXECUTION_OPTIONS, "execution", dict)
"""Gives a command ``execution``: how chips run, as fields of an ``Experiment``."""

seed_option = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the chips.")
