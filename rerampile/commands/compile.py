"""The command ``compile``. Only click is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rerampile.commands.chip_options import (
    IMAGE_OPTIONS,
    AskedFault,
    correction_options,
    fault_rate_options,
    optional_calibration_options,
)
from rerampile.commands.options import (
    PATH,
    examples,
    json_option,
    print_json,
    read_ratios,
    refuse_given,
    scale_option,
    target_options,
)
from rerampile.commands.prune import open_calibration, prune_file
from rerampile.interruption import cleaned_up

if TYPE_CHECKING:
    from types import TracebackType

    from rerampile.plan import Vote
    from rerampile.pruning import PrunedModel
    from rerampile.schemes import Scale

__all__ = ["compile_"]

# The same as rerampile.schemes.MAPPINGS and WEIGHED, which cost the import of numpy.
_MAPPINGS = ("two_column", "differential", "offset", "balanced", "optimal", "auto")
_WEIGHED = ("optimal", "auto")


class _Progress:
    """One line a pass on stderr: begun before and ended after it on a terminal, written after it elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._begun = False

    def __call__(self, number: int, count: int, name: str, seconds: float | None, summary: Mapping[str, Any]) -> None:
        head = f"[{number}/{count}] {name} … "
        if seconds is None:
            if self._live:
                self._write(head)
            self._begun = self._live
            return
        facts = ", ".join(
            f"{word} {value:,}" if isinstance(value, int) else f"{word} {value}" for word, value in summary.items()
        )
        self._write(f"{'' if self._begun else head}{seconds:.2f} s  {facts}\n")
        self._begun = False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._begun:
            self._write("\n")

    def _write(self, text: str) -> None:
        if not self._quiet:
            with suppress(BrokenPipeError):  # nobody reads the progress: no reason to stop
                click.echo(text, nl=False, err=True)


class _NearChoice(click.Choice[str]):
    """A choice that names the near ones where the word is unknown."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            from rerampile.errors import did_you_mean

            self.fail(f"'{value}' is not one of them{did_you_mean(str(value), self.choices)}", param, ctx)
        return super().convert(value, param, ctx)


@click.command(
    "compile",
    epilog=examples(
        "rerampile compile model.onnx",
        "rerampile compile model.onnx --mapping differential --prune 0.6 -o out",
        "rerampile compile model.onnx --prune 64=0.2,128=0.4,512=0.8 --pack",
        "rerampile compile m.onnx --prune 0.7 --prune-method admm --calibration npz:F",
        "rerampile compile model.onnx --target neurram --set cell.levels=16",
        "rerampile compile model.onnx --mapping auto --failure-rate 0.005",
        "rerampile compile m.onnx --clip --correct --calibration npz:F",
        "rerampile compile model-pruned --target isaac --protect-msb 2",
    ),
)
@click.argument("model", type=PATH)
@click.option(
    *("-o", "--out"),
    metavar="FOLDER",
    type=PATH,
    help="Folder to write; an earlier deployment there is replaced.  [default: MODEL's name + .deployment, here]",
)
@target_options
@click.option(
    "--mapping",
    type=_NearChoice(_MAPPINGS),
    help="How a weight becomes cells; auto: the best for each layer.  [default: the target's]",
)
@fault_rate_options
@click.option(
    "--current-weight",
    metavar="X",
    type=float,
    default=0.0,
    show_default=True,
    help="For optimal and auto: squared error, in full scales, that read current of one cell at g_on is worth.",
)
@scale_option
@correction_options
@click.option(
    "--prune",
    metavar="RATIO|NAME=RATIO,...",
    callback=read_ratios,
    help="Zero the smallest weights: one ratio, or one for each block (a number of output channels) or layer name "
    "pattern; later ones win.",
)
@click.option(
    "--prune-method",
    metavar="NAME",
    help="Prune as 'rerampile prune' does, from images: admm, sparsegpt, wanda or magnitude.  [default: by magnitude, "
    "without images]",
)
@optional_calibration_options
@click.option("--masks", metavar="FILE", type=PATH, help="Zero what an .npz or .safetensors file of masks says.")
@click.option("--pack", is_flag=True, help="Let small partitions share arrays.")
@click.option(
    "--spend-spare-arrays",
    is_flag=True,
    help="Put further copies of the layers that stuck cells hurt most on arrays left over, and average all copies.",
)
@click.option(
    "--protect-msb",
    metavar="T",
    type=click.IntRange(min=1),
    help="Put two copies of the T most significant slices of weights into cells that pruning freed.",
)
@click.option(
    "--vote",
    type=click.Choice(["median", "mean"]),
    default="median",
    show_default=True,
    help="What counts of the three sums of such a slice.",
)
@click.option("--inputs", metavar="FILE.npz", type=PATH, help="Verify with these inputs.  [default: generated ones]")
@click.option(
    "--tolerance",
    metavar="X",
    type=float,
    help="Largest output error that passes, as a share of the output's largest magnitude.  [default: by the model's "
    "arithmetic]",
)
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True, help="Of the inputs.")
@click.option("--keep-stages", is_flag=True, help="Write what each pass produced into FOLDER/stages.")
@click.option("-q", "--quiet", is_flag=True, help="No progress lines.")
@click.option("-v", "--verbose", is_flag=True, help="Also say what stays digital and why, and name the versions.")
@json_option
@click.pass_context
def compile_(
    ctx: click.Context,
    /,
    model: Path,
    out: Path | None,
    target: str,
    settings: dict[str, Any],
    mapping: str | None,
    faults: AskedFault | None,
    current_weight: float,
    scale: Scale,
    corrections: dict[str, Any],
    prune: float | dict[str, float] | None,
    prune_method: str | None,
    data: dict[str, Any],
    masks: Path | None,
    pack: bool,
    spend_spare_arrays: bool,
    protect_msb: int | None,
    vote: Vote,
    inputs: Path | None,
    tolerance: float | None,
    seed: int,
    keep_stages: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Compile MODEL into a deployment folder, and verify it.

    MODEL is an ONNX file. The folder is written whole or not at all; the model itself is never changed.
    """
    from rerampile.compiler import CALIBRATION_IMAGES, compile_model
    from rerampile.target import Target

    calibrated, given = any(corrections.values()) or spend_spare_arrays, data["data"] is not None
    if corrections["correct"] and not given:
        raise click.UsageError("--correct: expected --calibration DATA, which shows the mean of each input")
    if prune_method is not None and not given:
        raise click.UsageError("--prune-method and --calibration: expected both or none of them")
    if not given:
        refuse_given(ctx, IMAGE_OPTIONS, "no effect without --calibration")
    if given and prune_method is None and not calibrated:
        raise click.UsageError(
            "--calibration: no effect without --prune-method, --clip, --correct or --spend-spare-arrays; leave it out"
        )
    if prune_method is not None and (prune is None or masks is not None):
        raise click.UsageError("--prune-method: expected a ratio, --prune, and no --masks")
    if protect_msb is None:
        refuse_given(ctx, ("vote",), "no effect without --protect-msb")
    out = out or Path(f"{model.stem}.deployment")
    resolved = Target.load(target, settings)
    weighed = (mapping or resolved.mapping) in _WEIGHED
    if not weighed:
        names = ("current_weight",) if calibrated else ("rate", "off_on", "stuck_off", "stuck_on", "current_weight")
        reason = f"no effect on mapping {mapping or resolved.mapping}; use it with {' or '.join(_WEIGHED)}"
        refuse_given(ctx, names, reason)
    if verbose:
        _say_versions()
    pruned = None if prune_method is None else _pruned(model, prune, prune_method, data, out, quiet)
    with cleaned_up(), _Progress(quiet) as progress:
        deployment = compile_model(
            pruned or model,
            out=out,
            target=resolved,
            mapping=mapping,
            faults=faults(resolved) if faults is not None and (weighed or calibrated) else None,
            current_weight=current_weight,
            scale=scale,
            **corrections,
            calibration=open_calibration(model, data) if calibrated and given else None,
            calibration_images=data["images"] or CALIBRATION_IMAGES,
            prune=None if pruned else prune,
            masks=masks,
            pack=pack,
            spend_spare_arrays=spend_spare_arrays,
            protect_msb=protect_msb or 0,
            vote=vote,
            inputs=inputs,
            tolerance=tolerance,
            seed=seed,
            keep_stages=keep_stages,
            progress=progress,
        )
    if pruned:
        from rerampile.pruner import remove_checkpoint

        remove_checkpoint(_unfinished(out))
    if as_json:
        import msgspec

        plan = deployment.plan
        print_json(
            {
                "folder": str(deployment.folder),
                "totals": msgspec.to_builtins(plan.totals),
                "verification": msgspec.to_builtins(plan.verification),
            }
        )
        return
    from rerampile.commands.show import show_summary
    from rerampile.terminal import console

    show_summary(console(), deployment, verbose)


def _pruned(
    model: Path, prune: float | dict[str, float] | None, method: str, data: dict[str, Any], out: Path, quiet: bool
) -> PrunedModel:
    """Prune a model from images before it is compiled; interrupted, the same command goes on."""
    from rerampile.compiler import check_replaceable
    from rerampile.pruning import PruneRequest

    check_replaceable(out)  # now: pruning takes minutes
    ratios = {"*": prune} if isinstance(prune, float) else prune or {}
    return prune_file(model, data, PruneRequest(ratios=ratios, engine=method), checkpoint=_unfinished(out), quiet=quiet)


def _unfinished(out: Path) -> Path:
    """Return where the layers of an unfinished pruning are kept."""
    return out.with_name(f"{out.name}.unfinished")


def _say_versions() -> None:
    from importlib.metadata import version

    names = ("rerampile", "numpy", "onnx", "onnxruntime")
    click.echo(", ".join(f"{name} {version(name)}" for name in names), err=True)
