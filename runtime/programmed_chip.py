"""The chip that a deployment was programmed for: its stuck cells, and its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

from rerampile.checks import check_checksums
from rerampile.deployment import Deployment, load_deployment
from rerampile.errors import PlanFormatError
from rerampile.failed_cells import counts_text
from rerampile.files import PLAN
from rerampile.runtime.executor import Outputs, open_executor
from rerampile.runtime.fault_map import FaultMap, read_fault_maps
from rerampile.runtime.inject import Injector

__all__ = ["CleanOf", "chip_faults", "chip_outputs", "compiled_deployment", "outputs_with"]


class CleanOf(msgspec.Struct, kw_only=True, frozen=True):
    """What a programmed chip is compared with.

    Attributes:
        compiled: Name of the folder of the deployment that it was programmed from.
        found: Whether that was there, beside the chip's folder or above it: its metrics are ``clean``. Where it was
            not, ``clean`` is of the chip itself, and drops say nothing.
    """

    compiled: str
    found: bool

    @property
    def text(self) -> str:
        """It in words."""
        if self.found:
            return f"of the compiled deployment '{self.compiled}'"
        return (
            f"of the chip itself: the very deployment '{self.compiled}' that it was programmed from is not beside it, "
            f"so that the drop is not known"
        )


def chip_faults(deployment: Deployment) -> FaultMap | None:
    """Return the stuck cells of the chip that a deployment was programmed for, None where it is for any chip.

    Raises:
        PlanFormatError: The plan names a file that is not in the folder, or one with other faults than it says.
        DataError: The file is no fault map of this plan.
    """
    chip = deployment.plan.chip
    if chip is None:
        return None
    if chip.faults not in deployment.plan.files:
        raise PlanFormatError(f"{deployment.folder / PLAN}: $.chip.faults: '{chip.faults}' is not in $.files")
    maps = read_fault_maps(deployment.folder / chip.faults, deployment)
    categories = chip.categories or {}
    expected = (chip.stuck_off, chip.stuck_on, categories)
    if len(maps) != 1 or (maps[0].stuck_off, maps[0].stuck_on, maps[0].categories) != expected:
        raise PlanFormatError(
            f"{deployment.folder / chip.faults}: expected one chip with {chip.stuck_off} cells stuck off and "
            f"{chip.stuck_on} stuck on{counts_text(categories)}, as the plan says"
        )
    return maps[0]


def compiled_deployment(deployment: Deployment) -> Deployment | None:
    """Return the compiled deployment that a chip was programmed from, where it lies beside the chip or above it.

    It is the one of the name and the checksum that the chip's plan has, in a folder around that of the chip. None where
    there is none, and for a deployment that is of no one chip.

    Raises:
        PlanFormatError: It was found, and its files were changed.
    """
    chip = deployment.plan.chip
    if chip is None or Path(chip.compiled).name != chip.compiled:
        return None
    for around in deployment.folder.resolve().parents:
        if not (around / chip.compiled / PLAN).is_file():
            continue
        try:
            found = load_deployment(around / chip.compiled)
        except PlanFormatError:  # another one of that name
            continue
        if found.plan.plan_sha256 == chip.compiled_sha256:
            check_checksums(found)
            return found
    return None


def chip_outputs(deployment: Deployment, inputs: Mapping[str, npt.NDArray[Any]]) -> Outputs:
    """Run the chip that a deployment was programmed for, the slow way."""
    return outputs_with(deployment, chip_faults(deployment), inputs)


def outputs_with(deployment: Deployment, faults: FaultMap | None, inputs: Mapping[str, npt.NDArray[Any]]) -> Outputs:
    """Run a chip with some stuck cells, or with none, the slow way: a session with its very weights and leaks."""
    executor = open_executor(deployment, method="slow")
    executor.apply([] if faults is None else Injector(deployment).faults(faults))
    return executor.run(inputs)
