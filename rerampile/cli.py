"""The command line: parse, call one function, print.

Only click is imported here, so that ``--help`` is instant; each command imports what it works with. Data goes to
stdout; progress and messages go to stderr. Exit codes: 0 done, 1 an error that the user can mend, 2 wrong usage, 70 a
bug of rerampile, 130 interrupted (128 + the signal's number where it was another one).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rerampile.chip_options import AskedFault, correction_options, fault_rate_options, optional_calibration_options
from rerampile.command import (
    PATH,
    examples,
    json_option,
    print_json,
    read_ratios,
    refuse_given,
    scale_option,
    target_options,
)
from rerampile.compare_command import compare
from rerampile.fault_commands import fault_maps
from rerampile.finetune_command import finetune
from rerampile.interruption import cleaned_up, received_signal
from rerampile.predict_command import predict
from rerampile.program_command import program
from rerampile.prune_command import open_calibration, prune, prune_file
from rerampile.search_command import search
from rerampile.validate_command import validate

if TYPE_CHECKING:
    from types import TracebackType

    from rerampile.deployment import Deployment
    from rerampile.plan import Vote
    from rerampile.pruning import PrunedModel
    from rerampile.schemes import Scale

__all__ = ["main"]

# The same as rerampile.schemes.MAPPINGS and WEIGHED, which cost the import of numpy.
_MAPPINGS = ("two_column", "differential", "offset", "balanced", "optimal", "auto")
_WEIGHED = ("optimal", "auto")

_INTERNAL_ERROR = 70
_BUG = (
    "This is a bug of rerampile. Please report it with the lines above, the command, and the model if you can share it."
)

# Errors, signals, progress.


class _Commands(click.Group):
    """Commands whose exceptions become one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from rerampile.errors import RerampileError

        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own business; a reader that left is no error
        except RerampileError as error:
            _stop(f"Error: {error}")
        except KeyboardInterrupt as error:
            _stop("Aborted", 128 + (error.args[0] if error.args else signal.SIGINT))
        except MemoryError as error:
            _stop(f"Error: out of memory{f' ({error})' if str(error) else ''}; use a machine with more of it")
        except OSError as error:
            _stop(f"Error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        except Exception as error:
            if (number := received_signal()) is not None:  # a library made something else of it
                _stop("Aborted", 128 + number)
            traceback.print_exc()
            click.echo(_BUG, err=True)
            raise click.exceptions.Exit(_INTERNAL_ERROR) from error


def _stop(line: str, exit_code: int = 1) -> NoReturn:
    """End the program with a line on stderr."""
    from rerampile.terminal import printable

    click.echo(printable(line), err=True)
    raise click.exceptions.Exit(exit_code)


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


# Options.


class _NearChoice(click.Choice[str]):
    """A choice that names the near ones where the word is unknown."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            from rerampile.errors import did_you_mean

            self.fail(f"'{value}' is not one of them{did_you_mean(str(value), self.choices)}", param, ctx)
        return super().convert(value, param, ctx)


# Commands.


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog=examples("rerampile compile model.onnx --mapping differential", "rerampile show model.deployment"),
)
@click.version_option(package_name="rerampile", message="rerampile %(version)s")
def main() -> None:
    """Compile exported ONNX models for ReRAM crossbar accelerators.

    A model becomes a deployment folder: a plan that says where every weight sits, the conductance of every cell, and a
    model that ONNX Runtime runs from those cells.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot write is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@main.command(
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
    if (prune_method is not None) > given or given > (prune_method is not None or calibrated):
        raise click.UsageError("--prune-method and --calibration: expected both or none of them")
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
    from rerampile.show import show_summary
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


@main.command(epilog=examples("rerampile inspect model.onnx", "rerampile inspect model.onnx --json"))
@click.argument("model", type=PATH)
@click.option("-v", "--verbose", is_flag=True, help="List every digital node with its reason.")
@json_option
def inspect(model: Path, verbose: bool, as_json: bool) -> None:
    """Show what of MODEL maps, and what stays digital.

    Nothing is compiled. Each layer comes with its matrix and what folds into it, each digital node with its reason.
    """
    from rerampile.graph import ModelGraph
    from rerampile.onnx_file import load_model_file
    from rerampile.passes.find_layers import find_layers
    from rerampile.show import model_data, show_model
    from rerampile.terminal import console

    loaded = load_model_file(model)
    graph = ModelGraph(loaded)
    layers, digital = find_layers(graph)
    data = model_data(loaded, graph, [layer.block for layer in layers], layers, digital)
    if as_json:
        print_json(data)
    else:
        show_model(console(), data, verbose)


@main.command(epilog=examples("rerampile verify model.deployment"))
@click.argument("folder", type=PATH)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Verify a deployment again, from its files alone.

    Checksums, the place of every weight, the weights that the cells hold, and the outputs of the deployed model against
    those recorded when it was compiled.
    """
    from rerampile.deployment import load_deployment
    from rerampile.runtime.verify import verify_deployment
    from rerampile.show import show_verification
    from rerampile.terminal import console

    found = verify_deployment(folder)
    deployment = load_deployment(folder)
    if as_json:
        import msgspec

        print_json({"folder": str(deployment.folder), "verification": msgspec.to_builtins(found)})
    else:
        show_verification(console(), deployment, found)


@main.command(
    epilog=examples(
        "rerampile show model.deployment",
        "rerampile show model.deployment/plan.json --json",
        "rerampile show model.deployment --array 0 --npy array0.npy",
    )
)
@click.argument("plan", metavar="FOLDER|plan.json", type=PATH)
@click.option(
    "--array",
    "array_id",
    metavar="ID",
    type=int,
    help="Show one array: its address, what it holds, its cells.",
)
@click.option(
    "--npy",
    metavar="FILE",
    type=PATH,
    help="Write the cells of that array, [rows, columns], spare ones included.",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="List every array and every digital node, and what schemes, full scales and copies were weighed.",
)
@json_option
def show(plan: Path, array_id: int | None, npy: Path | None, verbose: bool, as_json: bool) -> None:
    """Show the plan of a deployment, or one of its arrays."""
    from rerampile.show import array_data, plan_data, show_array, show_plan
    from rerampile.terminal import console

    if array_id is None:
        if npy is not None:
            raise click.UsageError("--npy needs --array ID: which array is to be written?")
        from rerampile.plan import read_plan
        from rerampile.show_mapping import show_calibrated, show_choices, show_copies
        from rerampile.target import Target

        path = plan / "plan.json" if plan.is_dir() else plan
        read = read_plan(path)
        if as_json:
            print_json(plan_data(read))
        else:
            show_plan(console(), read, Target.from_dict(read.target, where=f"{path}: $.target"), verbose)
            if verbose:
                show_choices(console(), read)
                show_calibrated(console(), read)
                show_copies(console(), read)
        return
    from rerampile.checks import check_placement
    from rerampile.deployment import load_deployment

    deployment = load_deployment(plan)
    check_placement(deployment)
    if npy is not None:
        _write_npy(npy, deployment, array_id)
    if as_json:
        print_json(array_data(deployment, array_id))
    else:
        show_array(console(), deployment, array_id)


def _write_npy(path: Path, deployment: Deployment, array_id: int) -> None:
    """Write the picture of an array to a temporary sibling and rename it."""
    import numpy as np

    from rerampile.errors import ConfigError

    deployment.require_outside(path)
    cells = deployment.array(array_id)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with cleaned_up():
        try:
            with temporary.open("wb") as file:
                np.save(file, cells, allow_pickle=False)
            temporary.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
    click.echo(f"{path}: {cells.dtype} {list(cells.shape)}", err=True)


@main.command(epilog=examples("rerampile targets", "rerampile targets isaac > my-chip.toml"))
@click.argument("name", required=False)
@json_option
def targets(name: str | None, as_json: bool) -> None:
    """List the hardware presets, or print one."""
    from rerampile.target import Target, preset_names, preset_text

    if name is not None:
        if as_json:
            preset_text(name)  # refuses what is no preset
            print_json(Target.load(name).to_dict())
        else:
            click.echo(preset_text(name), nl=False)
        return
    presets = [Target.load(preset) for preset in preset_names()]
    if as_json:
        print_json([target.to_dict() for target in presets])
        return
    from rerampile.show import show_targets
    from rerampile.terminal import console

    show_targets(console(), presets)


for command in (prune, finetune, search, program, validate, compare, predict, fault_maps):
    main.add_command(command)
