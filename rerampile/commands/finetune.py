"""The command ``finetune``. Only click is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rerampile.commands.chip_options import AskedFault, defect_options, training_data_options
from rerampile.commands.options import (
    PATH,
    examples,
    json_option,
    own_folder,
    print_json,
    read_ratios,
    scale_option,
    target_options,
)
from rerampile.commands.prune import open_calibration

if TYPE_CHECKING:
    from rerampile.training.stuck_weights import Defects

__all__ = ["finetune"]

_RECORD, _CHECKPOINT = "training.json", "unfinished.safetensors"


@click.command(
    epilog=examples(
        "rerampile finetune model.onnx --data cifar10:DIR --augment",
        "rerampile finetune model.onnx --masks FILE --data imagefolder:DIR",
        "rerampile finetune model.onnx --prune 0.7 --epochs 10 --data cifar10:DIR",
        "rerampile finetune model.onnx --failure-rate 0.01 --data cifar10:DIR",
    )
)
@click.argument("model", type=PATH)
@training_data_options
@click.option("--masks", metavar="FILE", type=PATH, help="Zero what an .npz or .safetensors file of masks says.")
@click.option(
    *("--prune", "ratios"),
    metavar="RATIO|NAME=RATIO,...",
    callback=read_ratios,
    help="Draw that share of the weights to zero, by ADMM: one, or one for each block or layer name pattern.",
)
@click.option(
    "--protect",
    metavar="LAYERS",
    default="first,last",
    show_default=True,
    help="Layers that --prune leaves whole: first, last, blocks, name patterns.",
)
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True, help="Passes over the images.")
@click.option(
    "--learning-rate",
    type=float,
    metavar="X",
    default=3e-4,
    show_default=True,
    help="The largest; rises to it, and falls to 0.",
)
@click.option("--augment", is_flag=True, help="Mirror images at random, and move them by up to an eighth.")
@defect_options
@click.option("--mapping", metavar="NAME", help="How weights lie on the cells that are stuck.  [default: the target's]")
@scale_option
@target_options
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order, and of stuck cells.")
@click.option(
    "-o", "--out", metavar="FOLDER", type=PATH, help="Where the result goes.  [default: MODEL's name + .finetuned]"
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
def finetune(
    model: Path,
    data: dict[str, Any],
    masks: Path | None,
    ratios: float | dict[str, float] | None,
    protect: str,
    epochs: int,
    learning_rate: float,
    augment: bool,
    faults: AskedFault | None,
    mapping: str | None,
    scale: Any,
    target: str,
    settings: dict[str, Any],
    seed: int,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train the weights of MODEL with PyTorch, and write it as ONNX again.

    Weights that are zero stay zero, and those that masks say become so. With --prune, weights are drawn to zero while
    they are trained, in the first half of the epochs. With --failure-rate, other cells are stuck at every step. All of
    it can be combined. The folder then holds the model, its masks, and what each epoch came to. Interrupted, the same
    command goes on with the epoch. Needs the extra rerampile[train].
    """
    from rerampile.errors import ConfigError
    from rerampile.pruned_folder import MASKS, MODEL, write_pruned

    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError("finetune: PyTorch is not installed; pip install 'rerampile[train]'") from None
    from dataclasses import asdict, replace

    from rerampile.graph import ModelGraph
    from rerampile.onnx_file import load_model_file
    from rerampile.passes.find_layers import find_layers
    from rerampile.passes.prune import read_masks
    from rerampile.target import Target
    from rerampile.training.finetune import FinetuneRequest
    from rerampile.training.finetune import finetune as train
    from rerampile.training.stuck_weights import Defects

    defects = None
    if faults is not None:
        resolved = Target.load(target, settings)
        defects = Defects(faults=faults(resolved), target=resolved, mapping=mapping, scale=scale)
    request = FinetuneRequest(
        epochs=epochs,
        batch=data["batch"],
        learning_rate=learning_rate,
        augment=augment,
        seed=seed,
        ratios=ratios if isinstance(ratios, dict) else {} if ratios is None else {"*": ratios},
        protect=tuple(word for word in protect.split(",") if word),
        defects=defects,
    )
    names = {MODEL, f"{MODEL}.data", MASKS, _RECORD, _CHECKPOINT}
    place = own_folder(out or Path(f"{model.stem}.finetuned"), names | {f".{name}" for name in names})
    graph = ModelGraph(load_model_file(model))
    images = open_calibration(model, data, option="--data")
    read = {} if masks is None else read_masks(masks, find_layers(graph)[0])
    found = train(
        graph,
        images,
        request,
        masks={name: mask.kept for name, mask in read.items()},
        images=data["images"],
        checkpoint=place / _CHECKPOINT,
        progress=None if quiet else _say,
    )
    record = {
        "format": "rerampile-training",
        "format_version": 1,
        "model": {"name": graph.model.name, "sha256": graph.model.sha256},
        "data": {
            "name": images.name,
            "sha256": images.digest,
            "images": min(data["images"] or len(images), len(images)),
        },
        "request": {**asdict(replace(request, defects=None)), "defects": _recorded(request.defects)},
        "epochs": [asdict(epoch) for epoch in found.epochs],
        "zeros": {name: int(kept.size - kept.sum()) for name, kept in found.kept.items()},
    }
    write_pruned(place, found.model, found.kept, _RECORD, record)
    (place / _CHECKPOINT).unlink()
    if as_json:
        print_json(record)
        return
    zeros, weights = sum(int(k.size - k.sum()) for k in found.kept.values()), sum(k.size for k in found.kept.values())
    click.echo(f"zeros  {zeros:,} of {weights:,} weights in {len(found.kept)} layers")
    click.echo(f"model  {place / MODEL}")


def _recorded(defects: Defects | None) -> dict[str, Any] | None:
    """Return defects in plain data, None where none were drawn."""
    if defects is None:
        return None
    return {
        **defects.faults.probabilities,
        "mapping": defects.coding.scheme,
        "scale": defects.scale,
        "target": defects.target.to_dict(),
    }


def _say(epoch: int, epochs: int, done: int, images: int, loss: float) -> None:
    """Say on stderr how far an epoch is: all the time on a terminal, at its end elsewhere."""
    import sys

    live = sys.stderr.isatty()
    if live or done == images:
        line = f"[{epoch + 1}/{epochs}] {done:,} of {images:,} images, loss {loss:.4f}"
        click.echo(f"\r{line}" if live else line, nl=not live or done == images, err=True)
