"""The command ``validate``. Only click is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from rerampile.commands.chip_options import (
    AskedFaults,
    data_options,
    effort_options,
    execution_options,
    fault_options,
    metric_options,
    seed_option,
)
from rerampile.commands.chips_progress import chips_progress
from rerampile.commands.options import PATH, examples, json_option, print_json, refuse_given, report_folder
from rerampile.interruption import cleaned_up

__all__ = ["validate"]

_UNMET = 3  # exit code: a requirement does not hold
_OF_DRAWN_CHIPS = ("rates", "off_on", "stuck_off", "stuck_on", "rate_unit", "distribution", "runs")


@click.command(
    epilog=examples(
        "rerampile validate model.deployment",
        "rerampile validate model.deployment --data cifar10:DIR --failure-rate 0.01",
        "rerampile validate out --data imagefolder:DIR --precision-points 0.2",
        "rerampile validate out --data cifar10:DIR --precision int8",
        "rerampile validate out --data cifar10:DIR --require 'top1 >= 90 @ 0.001'",
    )
)
@click.argument("folder", type=PATH)
@data_options
@metric_options
@click.option("--first-image", metavar="FILE.png", type=PATH, help="Write the first image as the model sees it.")
@fault_options
@click.option("--fault-map", metavar="FILE", type=PATH, help="Run the chips of this file instead of drawing any.")
@seed_option
@effort_options
@execution_options
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
    data: dict[str, Any],
    metric: dict[str, Any],
    first_image: Path | None,
    faults: AskedFaults,
    fault_map: Path | None,
    seed: int,
    effort: dict[str, Any],
    execution: dict[str, Any],
    required: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run chips of a deployment with stuck cells, and report how accurate they are.

    FOLDER is a deployment. Finished chips are kept in the report's folder: interrupted, the same command goes on.
    """
    import msgspec

    from rerampile.deployment import load_deployment
    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.pictures import most_hit_array
    from rerampile.runtime.predict import predict_beside
    from rerampile.runtime.report import write_report
    from rerampile.runtime.validation import Requirement
    from rerampile.runtime.validation import validate as run_validation

    deployment = load_deployment(folder)
    if deployment.plan.chip is not None:
        refuse_given(ctx, _OF_DRAWN_CHIPS, f"{folder} was programmed for one chip, none is drawn; leave it out")
    if fault_map is not None:
        refuse_given(ctx, _OF_DRAWN_CHIPS, "the chips of --fault-map are not drawn; leave one of the two out")
    experiment = Experiment(
        folder=folder,
        faults=() if fault_map is not None else faults(deployment.target),
        fault_map=fault_map,
        seed=seed,
        first_image=first_image,
        **data,
        **metric,
        **execution,
    )
    requirements = [Requirement.parse(text) for text in required]
    place = report_folder(out or Path(f"{folder.resolve().name.removesuffix('.deployment')}.validation"))
    with cleaned_up(), chips_progress(quiet) as progress:
        report = run_validation(
            experiment,
            place / "journal.jsonl",
            requirements=requirements,
            progress=progress,
            **effort,
        )
    report = msgspec.structs.replace(report, prediction=predict_beside(experiment))
    command = f"rerampile {shlex.join(sys.argv[1:])}"
    with cleaned_up():
        written = write_report(place, report, command=command, picture=most_hit_array(experiment))
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        from rerampile.commands.show_validation import show_validation
        from rerampile.terminal import console

        show_validation(console(), report, next(path for path in written if path.suffix == ".html"))
    if not all(requirement.met for requirement in report.requirements):
        ctx.exit(_UNMET)
