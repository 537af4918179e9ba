"""Names of the files in a deployment folder, which files are read at all, and how small ones are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from rerampile.errors import ConfigError

__all__ = [
    "CONDUCTANCES",
    "DEPLOYED",
    "DIGITAL",
    "FAULTS",
    "MASKS",
    "PLAN",
    "REFERENCE",
    "STAGES",
    "begins_with",
    "holds_plan",
    "refuse_inside_deployment",
    "require_regular",
    "resolved",
    "write_files",
]

PLAN = "plan.json"
CONDUCTANCES = "conductances.safetensors"
DEPLOYED = "deployed.onnx"
DIGITAL = "digital.safetensors"
FAULTS = "faults.safetensors"
MASKS = "masks.safetensors"
REFERENCE = "verification.safetensors"
STAGES = "stages"


def require_regular(path: Path) -> None:
    """Refuse what is there and may never end (a device) or never begin (a pipe).

    Raises:
        OSError: It is no regular file, or cannot be looked at. What is not there passes: opening it says so.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "a device or a pipe, expected a regular file", str(path))


def begins_with(path: Path, text: bytes) -> bool:
    """Whether a text stands in the first line or two of a file."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return text in file.read(200)
    except OSError:
        return False


def holds_plan(folder: Path) -> bool:
    """Whether a deployment lies there, be it damaged or newer."""
    return begins_with(folder / PLAN, b'"rerampile-plan"')


def refuse_inside_deployment(out: Path) -> None:
    """Refuse a place in a deployment folder: one with a plan and its cells.

    Raises:
        ConfigError: It is in one, or its links lead back to themselves.
    """
    whole = (folder for folder in resolved(out).parents if (folder / CONDUCTANCES).exists() and holds_plan(folder))
    if around := next(whole, None):
        raise ConfigError(
            f"{out}: lies in the deployment '{around}', which holds its own files only; name another place with -o"
        )


def resolved(path: Path) -> Path:
    """Return an absolute path without links.

    Raises:
        ConfigError: Its links lead back to themselves.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: a link that leads back to itself; name another place") from error
    return path.resolve()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files into a folder, which is made where it is not there; each is renamed once it is whole.

    Raises:
        ConfigError: A file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(content)
            temporary.replace(folder / name)
    except OSError as error:
        raise ConfigError(f"{os.fspath(folder)}: cannot be written: {error.strerror or error}") from error
