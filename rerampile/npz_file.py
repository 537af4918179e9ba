"""Reading .npz files that a user gives: no pickles, and no memory for arrays that are absurdly large."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_npz"]

# What zipfile and numpy raise for files that are damaged, encrypted, packed in an unknown way, or no .npz at all.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, largest: float = float("inf")) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the arrays of a file by name, one at a time.

    Args:
        path: The file.
        largest: Most elements that an array may have, compared with its header before it is read.

    Raises:
        ValueError: The file cannot be read, or an array is larger; the message is one line.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_header(archive, member, largest)
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                yield name, arrays[name]
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(" ".join(reason.split())[:200]) from error


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, largest: float) -> None:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject or np.prod(shape, dtype=np.float64) > largest:
        raise ValueError(
            f"'{member.filename.removesuffix('.npy')}': shape {list(shape)} of type {dtype}, expected numbers of at "
            f"most {largest} elements"
        )
