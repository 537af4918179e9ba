"""Reading .npz files that a user gives: no pickles, and no memory for arrays that are absurdly large."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rerampile.files import require_regular

__all__ = ["ArrayHeader", "npz_headers", "read_npz"]

# What zipfile and numpy raise for files that are damaged, encrypted, packed in an unknown way, or no .npz at all.
_UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


class ArrayHeader(NamedTuple):
    """What a file says of an array before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its element type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz_headers(path: Path, largest: float = float("inf")) -> dict[str, ArrayHeader]:
    """Return the shape and the type of each array of a file by name; no array is read.

    Args:
        path: The file.
        largest: Most elements that an array may have.

    Raises:
        ValueError: The file cannot be read, or an array is larger than that or than its part of the file; the message
            is one line.
    """
    with _one_line():
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _header(archive, member, largest) for member in archive.infolist()
            }


def read_npz(path: Path, largest: float = float("inf")) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield the arrays of a file by name, one at a time, as :func:`npz_headers` describes them.

    Raises:
        ValueError: As :func:`npz_headers` does.
    """
    npz_headers(path, largest)
    with _one_line(), np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            yield name, arrays[name]


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(" ".join(reason.split())[:200]) from error


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, largest: float) -> ArrayHeader:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    what = f"'{member.filename.removesuffix('.npy')}': shape {list(shape)} of type {dtype}, expected"
    count = math.prod(shape)
    if dtype.hasobject or count > largest:
        raise ValueError(f"{what} numbers of at most {largest} elements")
    if min(shape, default=0) < 0 or count * dtype.itemsize > member.file_size:
        raise ValueError(f"{what} what {member.file_size} bytes hold")
    return ArrayHeader(shape, dtype)
