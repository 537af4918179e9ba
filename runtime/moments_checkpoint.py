"""A file of running sums, from which an interrupted calibration goes on to the same bytes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rerampile.errors import DataError, PlanFormatError
from rerampile.runtime.moment_sums import MomentSums
from rerampile.tensor_file import TensorFile, TensorWriter

__all__ = ["MomentsCheckpoint"]

_FORMAT = "rerampile-moments-1"


class MomentsCheckpoint:
    """Sums that are kept in a file; what is there already is taken over.

    Args:
        path: The file; made where it does not exist, replaced as a whole.
        experiment: Everything that the sums depend on, as strings.
        sums: The sums, filled from the file.
        seconds: Least time between two versions of the file.

    Attributes:
        batches: How many batches the sums are of.
        complete: Whether these are all.

    Raises:
        DataError: The file is unreadable, damaged or of another experiment.
    """

    def __init__(self, path: Path, experiment: Mapping[str, str], sums: Sequence[MomentSums], seconds: float) -> None:
        self.path, self.batches, self.complete = path, 0, False
        self._experiment, self._sums, self._seconds = dict(experiment), sums, seconds
        self._written = time.monotonic()
        if path.exists():
            try:
                self._read(TensorFile(path))
            except PlanFormatError as error:
                raise DataError(f"{error}; remove it to start anew, or name another file") from error

    def _read(self, file: TensorFile) -> None:
        if file.metadata.get("format") != _FORMAT:
            raise DataError(f"{self.path}: not a checkpoint of moments; name another file")
        there = json.loads(file.metadata["experiment"])
        for key, here in self._experiment.items():
            if there.get(key) != here:
                raise DataError(
                    f"{self.path}: checkpoint of another calibration: {key} was {there.get(key)}, now {here}; remove "
                    f"it to start anew, or name another file"
                )
        for number, sums in enumerate(self._sums):
            sums.moment[...] = file.read(f"{number}.moment")
            sums.total[...] = file.read(f"{number}.total")
            sums.count = int(file.read(f"{number}.count"))
            file.drop_pages()
        self.batches, self.complete = int(file.metadata["batches"]), file.metadata["complete"] == "yes"

    def add_batch(self) -> None:
        """Note that the sums have one batch more; write them where it is time to."""
        self.batches += 1
        if time.monotonic() - self._written >= self._seconds:
            self.write()

    def finish(self) -> None:
        """Write the sums of all batches."""
        self.complete = True
        self.write()

    def write(self) -> None:
        """Replace the file, so that a crash leaves the earlier version or this one.

        Raises:
            DataError: It cannot be written.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        arrays = {
            f"{number}.{name}": array
            for number, sums in enumerate(self._sums)
            for name, array in (
                ("moment", sums.moment),
                ("total", sums.total),
                ("count", np.array(sums.count, np.int64)),
            )
        }
        metadata = {
            "format": _FORMAT,
            "experiment": json.dumps(self._experiment),
            "batches": str(self.batches),
            "complete": "yes" if self.complete else "no",
        }
        try:
            with TensorWriter(temporary, [(n, a.dtype, a.shape) for n, a in arrays.items()], metadata) as writer:
                for name in writer.specs:
                    writer.write(name, arrays[name])
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: the checkpoint cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._written = time.monotonic()
