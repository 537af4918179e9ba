"""What the files of commands share. Only click is imported."""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

__all__ = [
    "PATH",
    "examples",
    "json_option",
    "own_folder",
    "print_json",
    "read_ratios",
    "refuse_given",
    "report_folder",
    "scale_option",
    "target_options",
]

PATH = click.Path(path_type=Path)

# The same as rerampile.schemes.SCALES, which cost the import of numpy.
_SCALES = ("tensor", "channel", "partition")

F = TypeVar("F", bound=Callable[..., Any])


def examples(*lines: str) -> str:
    """Return the end of a help text."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def json_option(command: F) -> F:
    """Give a command ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, for programs.")(command)


def print_json(data: Any) -> None:
    """Print data for programs."""
    click.echo(json.dumps(data, indent=1))


def refuse_given(ctx: click.Context, names: Collection[str], reason: str) -> None:
    """Refuse options of the command line that would have no effect.

    Args:
        ctx: The call.
        names: Names of the parameters.
        reason: Why they have none; follows the option's own name.
    """
    for parameter in ctx.command.params:
        if parameter.name in names and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]}: {reason}")


def report_folder(out: Path, journal: str = "journal.jsonl") -> Path:
    """Make a folder for a report, or take one with an earlier report of the same command in it.

    Args:
        out: The folder.
        journal: Pattern of the names of journals, which tell such a report.

    Raises:
        ConfigError: It cannot be made, or holds a deployment or somebody else's files under a report's names.
    """
    from rerampile.errors import ConfigError

    remedy = "name another folder with -o"
    names = _names_in(out, remedy)
    if "plan.json" in names:
        raise ConfigError(f"-o {out}: a deployment, expected a folder for the report; {remedy}")
    foreign = sorted(name for name in names if name.startswith("report."))
    if foreign and not fnmatch.filter(names, journal):
        raise ConfigError(f"-o {out}: holds a '{foreign[0]}' of something else, which would be lost; {remedy}")
    return out


def own_folder(out: Path, names: Collection[str]) -> Path:
    """Make a folder for a result, or take one with an earlier or unfinished result and nothing else in it.

    Args:
        out: The folder.
        names: What a result consists of.

    Raises:
        ConfigError: It cannot be made, or holds something else.
    """
    from rerampile.errors import ConfigError

    remedy = "name another one with -o"
    present = _names_in(out, remedy)
    others = present - set(names) - set(fnmatch.filter(present, ".*.tmp"))  # the latter a crash has left
    if others:
        raise ConfigError(f"-o {out}: holds '{min(others)}', expected a new or empty folder; {remedy}")
    return out


def _names_in(out: Path, remedy: str) -> set[str]:
    """Make a folder where there is none, and return what is in it."""
    from rerampile.errors import ConfigError
    from rerampile.files import refuse_inside_deployment

    refuse_inside_deployment(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise ConfigError(f"-o {out}: cannot be used as a folder: {error.strerror or error}; {remedy}") from error


def read_ratios(_: click.Context, __: click.Parameter, value: str | None) -> float | dict[str, float] | None:
    """Read ``0.6``, or ``64=0.2,128=0.4``: one pruning ratio, or one for each name."""
    if value is None:
        return None
    try:
        if "=" not in value:
            return float(value)
        parts = [part.rsplit("=", 1) for part in value.split(",")]
        return {name.strip(): float(ratio) for name, ratio in parts}
    except ValueError:
        raise click.BadParameter(f"'{value}': expected a ratio like 0.6, or pairs like 64=0.2,128=0.4") from None


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Read each ``KEY=VALUE``: a dotted key and a value as TOML writes it; a bare word is a string."""
    settings: dict[str, Any] = {}
    for value in values:
        key, sign, text = (part.strip() for part in value.partition("="))
        if not (key and sign):
            raise click.BadParameter(f"'{value}': expected KEY=VALUE, as in cell.levels=16")
        try:
            parsed = tomllib.loads(f"value = {text}")
        except ValueError:
            parsed = {}
        settings[key] = parsed["value"] if list(parsed) == ["value"] else text
    return settings


def target_options(command: F) -> F:
    """Give a command ``--target`` and ``--set``."""
    command = click.option(
        *("--set", "settings"),
        metavar="KEY=VALUE",
        multiple=True,
        callback=_settings,
        help="Change a key of the target, the value as in TOML. May be repeated.",
    )(command)
    return click.option(
        "--target",
        metavar="NAME|FILE.toml",
        default="paper",
        show_default=True,
        help="The hardware: a preset (see 'rerampile targets') or a file.",
    )(command)


scale_option = click.option(
    "--scale",
    type=click.Choice(_SCALES),
    default="channel",
    show_default=True,
    help="One full scale for each output channel, for the whole tensor, or for each output channel on each array.",
)
