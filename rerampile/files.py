"""Names of the files in a deployment folder, and which files are read at all."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["CONDUCTANCES", "DEPLOYED", "DIGITAL", "MASKS", "PLAN", "REFERENCE", "STAGES", "require_regular"]

PLAN = "plan.json"
CONDUCTANCES = "conductances.safetensors"
DEPLOYED = "deployed.onnx"
DIGITAL = "digital.safetensors"
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
