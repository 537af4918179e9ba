"""The command ``compare``. Only click is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import click

from rerampile.chip_options import (
    AskedFaults,
    data_options,
    effort_options,
    execution_options,
    fault_options,
    metric_options,
    seed_option,
)
from rerampile.chips_progress import chips_progress
from rerampile.command import (
    PATH,
    examples,
    json_option,
    print_json,
    refuse_given,
    report_folder,
    scale_option,
    target_options,
)
from rerampile.interruption import cleaned_up

__all__ = ["compare"]


@click.command(
    epilog=examples(
        "rerampile compare plain.deployment pruned.deployment --data cifar10:DIR",
        "rerampile compare model.onnx --mappings two_column,offset,differential",
    )
)
@click.argument("sources", type=PATH, nargs=-1, required=True)
@click.option(
    "--mappings",
    metavar="NAME,...",
    help="SOURCES is one model: compile it with each of these mappings.",
)
@target_options
@scale_option
@click.option(
    "--drop", type=float, default=1.0, show_default=True, metavar="X", help="Compare failure rates at X points lost."
)
@data_options
@metric_options
@fault_options
@seed_option
@effort_options
@execution_options
@click.option("-o", "--out", metavar="FOLDER", type=PATH, help="Where the report goes.  [default: NAME.comparison]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    sources: tuple[Path, ...],
    mappings: str | None,
    target: str,
    settings: dict[str, Any],
    scale: Literal["channel", "tensor"],
    drop: float,
    data: dict[str, Any],
    metric: dict[str, Any],
    faults: AskedFaults,
    seed: int,
    effort: dict[str, Any],
    execution: dict[str, Any],
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the same chips on several deployments, and report paired differences.

    SOURCES are deployment folders, or one model with --mappings. The first is the reference: how many times its
    failure rate do the others tolerate? Finished chips are kept in the report's folder: interrupted, the same command
    goes on.
    """
    import msgspec

    from rerampile.deployment import load_deployment
    from rerampile.runtime.comparison import check_alike, check_drop
    from rerampile.runtime.comparison import compare as compare_validations
    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.pictures import most_hit_array
    from rerampile.runtime.predict import predict_beside
    from rerampile.runtime.report import write_report
    from rerampile.runtime.validation import validate

    if mappings is None:
        refuse_given(ctx, ("target", "settings", "scale"), "the folders are compiled already; give --mappings, too")
        folders = _distinct(sources)
        check_alike(folders)
    elif len(sources) > 1:
        raise click.UsageError("--mappings: expected one model to compile")
    check_drop(drop)
    place = report_folder(out or Path(f"{sources[0].resolve().stem}.comparison"))
    if mappings is not None:
        folders = _compiled(
            sources[0], mappings.split(","), place, faults, target=target, settings=settings, scale=scale
        )
    experiments = [
        Experiment(
            folder=folder, faults=faults(load_deployment(folder).target), seed=seed, **data, **metric, **execution
        )
        for folder in folders
    ]
    validations = []
    for experiment in experiments:
        name = experiment.folder.resolve().name
        with cleaned_up(), chips_progress(quiet, name) as progress:
            validations.append(validate(experiment, place / f"{name}.journal.jsonl", progress=progress, **effort))
    validations[0] = msgspec.structs.replace(validations[0], prediction=predict_beside(experiments[0]))
    report = compare_validations(validations, drop=drop)
    command = f"rerampile {shlex.join(sys.argv[1:])}"
    with cleaned_up():
        write_report(place, report, command=command, picture=most_hit_array(experiments[0]))
    if as_json:
        print_json(msgspec.to_builtins(report))
        return
    from rerampile.show_validation import show_comparison
    from rerampile.terminal import console

    show_comparison(console(), report, place / "report.html")


def _distinct(folders: tuple[Path, ...]) -> list[Path]:
    """Refuse folders that cannot be told apart: journals and tables go by their names."""
    names = [folder.resolve().name for folder in folders]
    if len(folders) < 2:
        raise click.UsageError("expected two or more deployment folders, or one model with --mappings")
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two folders are named '{name}', expected different names; rename one")
    return list(folders)


def _compiled(
    model: Path,
    mappings: list[str],
    place: Path,
    faults: AskedFaults,
    *,
    target: str,
    settings: dict[str, Any],
    scale: Any,
) -> list[Path]:
    """Compile a model with each mapping into the report's folder; those that depend on faults take the given ones."""
    from rerampile.compiler import compile_model
    from rerampile.schemes import WEIGHED, known_mapping
    from rerampile.target import Target

    names = [known_mapping(mapping.strip()) for mapping in mappings]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise click.UsageError(f"--mappings {','.join(names)}: expected two or more different ones")
    resolved = Target.load(target, settings)
    worst = max(faults(resolved), key=lambda model: model.rate)
    with cleaned_up():
        return [
            compile_model(
                model,
                out=place / f"{name}.deployment",
                target=resolved,
                mapping=name,
                faults=worst if name in WEIGHED else None,
                scale=scale,
            ).folder
            for name in names
        ]
