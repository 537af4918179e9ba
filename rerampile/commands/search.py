"""The command ``search``. Only click is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from rerampile.commands.chip_options import (
    AskedFaults,
    correction_options,
    data_options,
    family,
    fault_options,
    metric_options,
    numbers,
    seed_option,
)
from rerampile.commands.chips_progress import chips_progress
from rerampile.commands.options import PATH, examples, json_option, own_folder, print_json, scale_option, target_options
from rerampile.commands.prune import open_calibration, pruning_options
from rerampile.interruption import cleaned_up

if TYPE_CHECKING:
    from rerampile.runtime.progressive import SearchStep
    from rerampile.schemes import Scale

__all__ = ["search"]


_RULES_OPTIONS = (
    click.option(
        "--threshold", type=float, metavar="X", default=0.5, show_default=True, help="Loss that rejects a step, points."
    ),
    click.option(
        "--on-reject",
        type=click.Choice(["retry", "advance"]),
        default="retry",
        show_default=True,
        help="Go on without the first block at the same ratio, or at the next.",
    ),
    click.option(
        "--reference",
        type=click.Choice(["current", "best"]),
        default="current",
        show_default=True,
        help="What a step is compared with: the one accepted last, or the best.",
    ),
)

_rules_options = family(_RULES_OPTIONS, "rules", dict)
"""Gives the command ``rules``: fields of ``Rules``."""


@click.command(
    epilog=examples(
        "rerampile search m.onnx --data cifar10:DIR --failure-rate 0.01",
        "rerampile search m.onnx --data npz:F --failure-rate 0.01 --on-reject advance",
    )
)
@click.argument("model", type=PATH)
@target_options
@click.option("--mapping", metavar="NAME", help="How a weight becomes cells.  [default: the target's]")
@scale_option
@correction_options
@fault_options
@data_options
@metric_options
@click.option("--selection", metavar="DATA", help="What steps are judged by.  [default: the data, @train]")
@click.option("--selection-images", type=click.IntRange(1), default=1000, show_default=True, help="As many of these.")
@click.option(
    "--calibration", metavar="DATA", help="What pruning, --clip and --correct learn from.  [default: the data, @train]"
)
@click.option("--calibration-images", type=click.IntRange(1), default=256, show_default=True, help="As many of these.")
@pruning_options
@click.option(
    "--ratios",
    metavar="R,...",
    default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    show_default=True,
    callback=numbers(",", "ratios with ',' between them, as in 0.2,0.4,0.6"),
    help="Pruning ratios to try in turn.",
)
@_rules_options
@click.option(
    "--order",
    type=click.Choice(["ascending", "descending", "model"]),
    default="ascending",
    show_default=True,
    help="Which blocks go first: by their weights, or as in the model.",
)
@click.option("--predict", is_flag=True, help="Do not run steps that are predicted to fail by far.")
@click.option(
    "--selection-runs", type=click.IntRange(2), default=20, show_default=True, help="Chips each step is judged by."
)
@click.option("--runs", type=click.IntRange(2), default=100, show_default=True, help="Chips of the final figures.")
@seed_option
@click.option(
    "-o", "--out", metavar="FOLDER", type=PATH, help="Where the result goes.  [default: MODEL's name + .search]"
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def search(
    model: Path,
    target: str,
    settings: dict[str, Any],
    mapping: str | None,
    scale: Scale,
    corrections: dict[str, Any],
    faults: AskedFaults,
    data: dict[str, Any],
    metric: dict[str, Any],
    selection: str | None,
    selection_images: int,
    calibration: str | None,
    calibration_images: int,
    pruning: dict[str, Any],
    ratios: tuple[float, ...],
    rules: dict[str, Any],
    order: Literal["ascending", "descending", "model"],
    predict: bool,
    selection_runs: int,
    runs: int,
    seed: int,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search how far each block of MODEL can be pruned while chips with stuck cells stay as accurate.

    The hierarchical progressive pruning of Yuan et al. 2021. The folder then holds a ready deployment, search.json and
    a picture of the path. Interrupted, the same command goes on.
    """
    import msgspec

    from rerampile.pruning import PruneRequest
    from rerampile.runtime.data import training_split
    from rerampile.runtime.monte_carlo import Experiment
    from rerampile.runtime.progressive import Rules
    from rerampile.runtime.search_report import SEARCH_FILES, write_search
    from rerampile.searcher import DEPLOYMENT, UNFINISHED, SearchRequest, remove_unfinished, search_model
    from rerampile.target import Target

    resolved = Target.load(target, settings)
    models = faults(resolved)
    if len(models) != 1:
        raise click.UsageError("--failure-rate: expected the one rate to search for")
    reported = Experiment(folder=Path(), faults=models, seed=seed, **data, **metric)
    selected = selection or training_split(reported.data)
    learned = {**data, "data": calibration or data["data"], "images": calibration_images}
    request = SearchRequest(
        model=model,
        target=resolved,
        mapping=mapping,
        scale=scale,
        **corrections,
        pruning=PruneRequest(**pruning),
        calibration=open_calibration(model, learned),
        calibration_images=calibration_images,
        selection=replace(reported, data=selected, images=selection_images),
        reported=reported,
        schedule=ratios,
        order=order,
        rules=Rules(**rules),
        selection_runs=selection_runs,
        runs=runs,
        predict=predict,
    )
    place = own_folder(out or Path(f"{model.stem}.search"), {*SEARCH_FILES, DEPLOYMENT, UNFINISHED})
    with cleaned_up(), chips_progress(quiet) as progress:
        found = search_model(request, place, report=_say_step(quiet), progress=progress)
    write_search(place, found)
    remove_unfinished(place)
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    from rerampile.commands.show_search import show_search
    from rerampile.terminal import console

    show_search(console(), found, place)


def _say_step(quiet: bool) -> Callable[[SearchStep], None]:
    """Return what says on stderr how a step went."""
    number = 0

    def say(step: SearchStep) -> None:
        nonlocal number
        if not quiet:
            from rerampile.commands.show_search import step_line

            sys.stderr.write(f"[{number}] {step_line(step)}\n")  # of click's own stream a live bar knows nothing
        number += 1

    return say
