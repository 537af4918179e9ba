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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rerampile.commands.compare import compare
from rerampile.commands.compile import compile_
from rerampile.commands.faults import fault_maps
from rerampile.commands.finetune import finetune
from rerampile.commands.options import (
    PATH,
    examples,
    json_option,
    print_json,
)
from rerampile.commands.predict import predict
from rerampile.commands.program import program
from rerampile.commands.prune import prune
from rerampile.commands.search import search
from rerampile.commands.validate import validate
from rerampile.interruption import cleaned_up, received_signal

if TYPE_CHECKING:
    from rerampile.deployment import Deployment

__all__ = ["main"]

_INTERNAL_ERROR = 70
_BUG = (
    "This is a bug of rerampile. Please report it with the lines above, the command, and the model if you can share it."
)

# Errors and signals.


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


@main.command(epilog=examples("rerampile inspect model.onnx", "rerampile inspect model.onnx --json"))
@click.argument("model", type=PATH)
@click.option("-v", "--verbose", is_flag=True, help="List every digital node with its reason.")
@json_option
def inspect(model: Path, verbose: bool, as_json: bool) -> None:
    """Show what of MODEL maps, and what stays digital.

    Nothing is compiled. Each layer comes with its matrix and what folds into it, each digital node with its reason.
    """
    from rerampile.commands.show import model_data, show_model
    from rerampile.graph import ModelGraph
    from rerampile.onnx_file import load_model_file
    from rerampile.passes.find_layers import find_layers
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
    from rerampile.commands.show import show_verification
    from rerampile.deployment import load_deployment
    from rerampile.runtime.verify import verify_deployment
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
    from rerampile.commands.show import array_data, plan_data, show_array, show_plan
    from rerampile.terminal import console

    if array_id is None:
        if npy is not None:
            raise click.UsageError("--npy needs --array ID: which array is to be written?")
        from rerampile.commands.show_mapping import show_calibrated, show_choices, show_copies
        from rerampile.plan import read_plan
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
    from rerampile.commands.show import show_targets
    from rerampile.terminal import console

    show_targets(console(), presets)


for command in (compile_, prune, finetune, search, program, validate, compare, predict, fault_maps):
    main.add_command(command)
