"""The command ``compare``. Only click is imported before a command runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rerampile.commands.chip_options import (
    AskedFaults,
    correction_options,
    data_options,
    effort_options,
    execution_options,
    fault_options,
    metric_options,
    seed_option,
)
from rerampile.commands.chips_progress import chips_progress
from rerampile.commands.options import (
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

if TYPE_CHECKING:
    from rerampile.schemes import MappingName, Scale

__all__ = ["compare"]


@click.command(
    epilog=examples(
        "rerampile compare plain.deployment pruned.deployment --data cifar10:DIR",
        "rerampile compare model.onnx --mappings two_column,offset,differential",
        "rerampile compare m.onnx --mappings optimal/channel,optimal/partition",
    )
)
@click.argument("sources", type=PATH, nargs=-1, required=True)
@click.option(
    "--mappings",
    metavar="NAME[/SCALE],...",
    help="SOURCES is one model: compile it with each of these mappings, and scales where they are there.",
)
@target_options
@scale_option
@correction_options
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
    scale: Scale,
    corrections: dict[str, Any],
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
    failure rate do the others tolerate? --clip and --correct learn from --calibration, or the data's training images.
    Finished chips are kept in the report's folder: interrupted, the same command goes on.
    """
    import msgspec

    from rerampile.deployment import load_deployment
    from rerampile.runtime.comparison import check_alike, check_drop
    from rerampile.runtime.comparison import compare as compare_validations
    from rerampile.runtime.data import training_split
    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.pictures import most_hit_array
    from rerampile.runtime.predict import predict_beside
    from rerampile.runtime.report import write_report
    from rerampile.runtime.validation import validate
    from rerampile.target import Target

    if mappings is None:
        compiling = ("target", "settings", "scale", "clip", "correct")
        refuse_given(ctx, compiling, "the folders are compiled already; give --mappings, too")
        folders = _distinct(sources)
        check_alike(folders)
    elif len(sources) > 1:
        raise click.UsageError("--mappings: expected one model to compile")
    check_drop(drop)
    place = report_folder(out or Path(f"{sources[0].resolve().stem}.comparison"), "*.journal.jsonl")
    if mappings is not None:
        resolved = Target.load(target, settings)
        worst = max(faults(resolved), key=lambda model: model.rate)
        seen = {**data, "data": execution["calibration"] or training_split(data["data"])}
        options = {"target": resolved, "faults": worst, **corrections}
        folders = _compiled(sources[0], _forms(mappings, scale), place, options, seen)
        if any(corrections.values()) and execution["precision"] == "fp32":
            execution = {**execution, "calibration": None}  # it has had its effect
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
    from rerampile.commands.show_validation import show_comparison
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


def _forms(mappings: str, scale: Scale) -> dict[str, tuple[MappingName, Scale]]:
    """Return the mappings and scales that a list names, by the names of their folders."""
    from rerampile.schemes import known_mapping, known_scale

    forms: dict[str, tuple[MappingName, Scale]] = {}
    words = [word.strip() for word in mappings.split(",")]
    for word in words:
        name, slash, own = word.partition("/")
        forms[word.replace("/", "-")] = known_mapping(name), known_scale(own) if slash else scale
    if len(forms) < 2 or len(set(forms.values())) < len(words):
        raise click.UsageError(f"--mappings {','.join(words)}: expected two or more different ones")
    return forms


def _compiled(
    model: Path,
    forms: dict[str, tuple[MappingName, Scale]],
    place: Path,
    options: dict[str, Any],
    seen: dict[str, Any],
) -> list[Path]:
    """Compile a model in each form into the report's folder; what depends on faults and images takes the given ones.

    Args:
        model: The model.
        forms: Mapping and scale by the name of the folder.
        place: The report's folder.
        options: What they have in common, of :func:`rerampile.compile_model`.
        seen: Calibration images, as fields of an ``Experiment``.
    """
    from rerampile.commands.prune import open_calibration
    from rerampile.compiler import CALIBRATION_IMAGES, compile_model
    from rerampile.schemes import WEIGHED

    calibrated = options["clip"] or options["correct"]
    with cleaned_up():
        images = open_calibration(model, seen, CALIBRATION_IMAGES) if calibrated else None
        return [
            compile_model(
                model,
                out=place / f"{name}.deployment",
                mapping=mapping,
                scale=scale,
                calibration=images,
                **options | ({} if calibrated or mapping in WEIGHED else {"faults": None}),
            ).folder
            for name, (mapping, scale) in forms.items()
        ]
