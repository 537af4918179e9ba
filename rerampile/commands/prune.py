"""The command ``prune``. Only click is imported before a command runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rerampile.commands.chip_options import calibration_options, family
from rerampile.commands.options import PATH, examples, json_option, own_folder, print_json, read_ratios, target_options

if TYPE_CHECKING:
    from rerampile.pruning import PrunedModel, PruneRequest
    from rerampile.runtime.dataset import Dataset

__all__ = ["open_calibration", "prune", "prune_file", "pruning_options"]

_IMAGES = 1024
_MODEL, _MASKS, _RECORD, _UNFINISHED = "model.onnx", "masks.safetensors", "pruning.json", "unfinished"
_FILES = (_MODEL, f"{_MODEL}.data", _MASKS, _RECORD)


_PRUNING_OPTIONS = (
    click.option(
        "--method", metavar="NAME", default="admm", show_default=True, help="admm, sparsegpt, wanda or magnitude."
    ),
    click.option(
        "--structure",
        metavar="WHAT",
        default="weights",
        show_default=True,
        help="What goes: weights, rows or columns of crossbars, channels, partitions, or N:M as in 2:4.",
    ),
    click.option(
        "--values",
        metavar="WHAT",
        default="any",
        show_default=True,
        help="What stays: any, levels of the target's cells, clusters:N, or unified:SHARE of the partitions.",
    ),
    click.option(
        "--allot",
        type=click.Choice(["uniform", "threshold", "sensitivity"]),
        default="uniform",
        show_default=True,
        help="The same ratio for each layer, or one for all together: below one threshold, or by sensitivity.",
    ),
    click.option(
        "--protect",
        metavar="LAYERS",
        default="first,last",
        show_default=True,
        help="Layers that stay whole: first, last, blocks, name patterns.",
    ),
)


def _pruning(*, method: str, protect: str, **more: str) -> dict[str, Any]:
    """Return fields of :class:`~rerampile.pruning.PruneRequest`."""
    return {"engine": method, "protect": tuple(word for word in protect.split(",") if word), **more}


pruning_options = family(_PRUNING_OPTIONS, "pruning", _pruning)
"""Gives a command ``pruning``: how layers are pruned, as fields of a ``PruneRequest``."""


@click.command(
    epilog=examples(
        "rerampile prune model.onnx --prune 0.7 --calibration cifar10:DIR",
        "rerampile prune model.onnx --prune 64=0.5,512=0.8 --calibration npz:FILE",
        "rerampile prune model.onnx --structure 2:4 --calibration imagefolder:DIR",
    )
)
@click.argument("model", type=PATH)
@click.option(
    *("--prune", "ratios"),
    metavar="RATIO|NAME=RATIO,...",
    callback=read_ratios,
    help="Share that goes: one, or one for each block (a number of output channels) or layer name pattern; later ones "
    "win.",
)
@calibration_options
@pruning_options
@target_options
@click.option(
    "-o", "--out", metavar="FOLDER", type=PATH, help="Where the result goes.  [default: MODEL's name + .pruned]"
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def prune(
    model: Path,
    ratios: float | dict[str, float] | None,
    data: dict[str, Any],
    pruning: dict[str, Any],
    target: str,
    settings: dict[str, Any],
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Prune MODEL without training, from calibration images alone.

    Each layer is fitted to what the dense model gives there, so that the others make up for what goes. The folder then
    holds the pruned model, ready for 'rerampile compile', and its masks. Interrupted, the same command goes on.
    """
    from rerampile.asked_constraint import on_target
    from rerampile.pruner import remove_checkpoint
    from rerampile.pruning import PruneRequest
    from rerampile.target import Target

    if ratios is None and ":" not in pruning["structure"] and pruning["values"] == "any":
        raise click.UsageError("--prune: expected a ratio, or --structure N:M, or --values")
    asked = ratios if isinstance(ratios, dict) else {"*": ratios or 0.0}
    request = on_target(PruneRequest(ratios=asked, **pruning), Target.load(target, settings), None)
    place = own_folder(out or Path(f"{model.stem}.pruned"), {*_FILES, _UNFINISHED})
    pruned = prune_file(model, data, request, checkpoint=place / _UNFINISHED, quiet=quiet)
    record = _write(place, pruned, request)
    remove_checkpoint(place / _UNFINISHED)
    if as_json:
        print_json(record)
    else:
        from rerampile.commands.show_pruning import show_pruning
        from rerampile.terminal import console

        show_pruning(console(), pruned, place / _MODEL)


def prune_file(
    model: Path, data: dict[str, Any], request: PruneRequest, *, checkpoint: Path, quiet: bool
) -> PrunedModel:
    """Prune a model file as the command line asks for it.

    Args:
        model: The file.
        data: What the calibration options gave.
        request: What is asked.
        checkpoint: A folder for finished layers; the caller removes it in the end.
        quiet: Whether to say nothing meanwhile.
    """
    from rerampile.graph import ModelGraph
    from rerampile.onnx_file import load_model_file
    from rerampile.pruner import prune_model

    loaded = load_model_file(model)
    images = open_calibration(model, data)
    with _layers_progress(quiet) as progress:
        return prune_model(
            ModelGraph(loaded),
            images,
            request,
            images=data["images"] or _IMAGES,
            checkpoint=checkpoint,
            progress=progress,
        )


def open_calibration(
    model: Path, data: dict[str, Any], images: int = _IMAGES, option: str = "--calibration"
) -> Dataset:
    """Open what options name to learn from, for a model file.

    Args:
        model: The file.
        data: What the options gave.
        images: How many to make where data are generated and the options say nothing.
        option: The one that names the data.
    """
    from rerampile.errors import ConfigError
    from rerampile.runtime.data import open_dataset
    from rerampile.runtime.session import open_declared

    try:
        return open_dataset(
            data["data"],
            open_declared(model),
            data["preprocessing"],
            default_split="train",
            generate=data["images"] or images,
            skip_bad=data["skip_bad"],
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace("--data:", f"{option}:", 1)) from error


def _write(place: Path, pruned: PrunedModel, request: PruneRequest) -> dict[str, Any]:
    """Write the model, the masks and the record, each whole; return the record."""
    from dataclasses import asdict

    import numpy as np

    from rerampile.pruned_folder import write_pruned

    record = {
        "format": "rerampile-pruning",
        "format_version": 1,
        "model": {"name": pruned.model.name, "sha256": pruned.model.sha256},
        "request": asdict(request),
        "sparsity": pruned.sparsity,
        "layers": [
            {
                "name": layer.name,
                "tensor": layer.tensor,
                "ratio": layer.ratio,
                "zeros": int(layer.kept.size - np.count_nonzero(layer.kept)),
                "weights": layer.kept.size,
                "loss": layer.loss,
                "deficient": layer.deficient,
            }
            for layer in pruned.layers
        ],
        "left": pruned.left,
    }
    write_pruned(place, pruned.model, {layer.tensor: layer.kept for layer in pruned.layers}, _RECORD, record)
    return record


@contextmanager
def _layers_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """Say on stderr which layer is next, with the time that the one before took."""
    if quiet:
        yield None
        return
    started = time.perf_counter()

    def report(done: int, count: int, name: str) -> None:
        nonlocal started
        if done:
            click.echo(f"{time.perf_counter() - started:.1f} s", err=True)
        started = time.perf_counter()
        if name:
            click.echo(f"[{done + 1}/{count}] {printable(name)} … ", nl=False, err=True)

    from rerampile.terminal import printable

    yield report
