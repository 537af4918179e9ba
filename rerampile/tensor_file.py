"""Writing and reading tensors one at a time in the safetensors format.

The library writes a file from tensors that are all in memory at once; a deployment has gigabytes of cells that exist
one layer at a time. So the header, which is known from the shapes, is written first, and the tensors follow in order.
Reading maps the file into memory after the header has been checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import operator
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from rerampile.background import in_background
from rerampile.errors import InternalError, PlanFormatError
from rerampile.files import require_regular

__all__ = ["TensorFile", "TensorSpec", "TensorWriter"]

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64
_HASH_CHUNK = 1 << 24  # a multiple of the page size; it is given back when it is hashed
_LARGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Where a tensor lies in a file.

    Attributes:
        dtype: Element type.
        shape: Shape.
        offset: First byte, counted from the start of the file.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def stores(dtype: npt.DTypeLike) -> bool:
    """Whether the format has a name for a dtype."""
    return np.dtype(dtype) in _NAMES


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in any order and from any thread.

    The file is hashed on the way and brought to the disk once it is whole, both in the background.

    Args:
        path: The file, which must not exist.
        tensors: Name, dtype and shape of each tensor. They are laid out in the order of :attr:`specs`: wider types
            first (so that all are aligned), then as given. To be hashed early, they are best written in that order.
        metadata: Strings for the header.
        lasting: Whether the file is to stay: one that is not is neither hashed nor brought to the disk.

    Attributes:
        path: The file.
        specs: Where each tensor lies.
        sha256: Hash of the file, done once the file is whole and on the disk; empty for a file that is not to stay.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, npt.DTypeLike, tuple[int, ...]]],
        metadata: Mapping[str, str],
        *,
        lasting: bool = True,
    ) -> None:
        ordered = sorted(((n, np.dtype(d), s) for n, d, s in tensors), key=lambda t: -t[1].itemsize)
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        position = 0
        for name, dtype, shape in ordered:
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        base = len(text) + 8
        self.path = path
        self.specs = {
            name: TensorSpec(dtype=dtype, shape=shape, offset=base + header[name]["data_offsets"][0])
            for name, dtype, shape in ordered
        }
        self._lock = threading.Lock()
        self._unwritten = dict.fromkeys(self.specs)
        self._whole_up_to = SimpleQueue[int | None]()  # None: all is written, or never will be
        self._file = path.open("x+b", buffering=0)
        self._file.truncate(base + position)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._put(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8), 0)
        self._whole_up_to.put(base)
        self._on_disk: Future[None] | None = None
        self._lasting = lasting
        self.sha256: Future[str] = in_background(self._hash)

    def write(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write a tensor."""
        spec = self._announced(name)
        if values.shape != spec.shape or values.dtype != spec.dtype:
            raise InternalError(f"{self.path}: tensor '{name}' is {values.dtype} {values.shape}, not as announced")
        self._put(values, spec.offset)
        self._written(name)

    def write_rows(self, name: str, blocks: Iterable[tuple[slice, npt.NDArray[Any]]]) -> None:
        """Write a tensor, [..., rows, columns], from blocks of its rows, so that it is never held as a whole.

        Args:
            name: The tensor.
            blocks: A range of rows and its values, [..., rows of the range, columns]; together they are all rows. The
                values are not needed any more when the next block is asked for.
        """
        spec, written = self._announced(name), 0
        row_bytes = spec.shape[-1] * spec.dtype.itemsize
        for rows, values in blocks:
            for plane, part in enumerate(values.reshape(-1, *values.shape[-2:])):
                self._put(part, spec.offset + (plane * spec.shape[-2] + rows.start) * row_bytes)
            written += values.nbytes
        if written != spec.nbytes:
            raise InternalError(f"{self.path}: tensor '{name}' has {written} bytes of rows, not as announced")
        self._written(name)

    def _announced(self, name: str) -> TensorSpec:
        if name not in self._unwritten:
            raise InternalError(f"{self.path}: tensor '{name}' was not announced, or is written twice")
        return self.specs[name]

    def _put(self, data: npt.ArrayLike, offset: int) -> None:
        rest = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        while rest.nbytes:
            done = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def _written(self, name: str) -> None:
        with self._lock:
            del self._unwritten[name]
            first = next(iter(self._unwritten), None)
            self._whole_up_to.put(len(self._map) if first is None else self.specs[first].offset)

    def _hash(self) -> str:
        """Hash what is whole, while more is written, until nothing more comes; then wait for the disk."""
        if not self._lasting:
            return ""
        digest, start = hashlib.sha256(), 0
        with memoryview(self._map) as view:
            for whole in iter(self._whole_up_to.get, None):
                while start < whole:
                    end = min(whole, start - start % _HASH_CHUNK + _HASH_CHUNK)
                    digest.update(view[start:end])
                    if end % _HASH_CHUNK == 0:
                        self._map.madvise(mmap.MADV_DONTNEED, end - _HASH_CHUNK, _HASH_CHUNK)
                    start = end
        if self._on_disk is not None:
            self._on_disk.result()
        return digest.hexdigest()

    def _sync(self) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lasting and error is None and not self._unwritten:
            self._on_disk = in_background(self._sync)
        else:
            self._file.close()
        self._whole_up_to.put(None)
        if error is None and self._unwritten:
            raise InternalError(f"{self.path}: tensor '{next(iter(self._unwritten))}' was never written")


class TensorFile:
    """A safetensors file that outsiders may have touched, mapped into memory read-only.

    Attributes:
        metadata: Strings of the header, by name.
        specs: Where each tensor lies.

    Raises:
        PlanFormatError: It is missing, truncated, or its header does not describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            require_regular(path)
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                    raise PlanFormatError(f"{path}: not a safetensors file, or a truncated one ({size} bytes)")
                header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PlanFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, PlanFormatError):
                raise
            raise PlanFormatError(f"{path}: not a safetensors file: its header is not JSON") from error
        self.specs = self._parse(header, length + 8, size)
        metadata = header.get("__metadata__")
        entries = metadata.items() if isinstance(metadata, dict) else ()
        self.metadata = {name: text for name, text in entries if isinstance(text, str)}

    def _parse(self, header: Any, base: int, size: int) -> dict[str, TensorSpec]:
        if not isinstance(header, dict):
            raise PlanFormatError(f"{self.path}: safetensors header is not an object")
        specs: dict[str, TensorSpec] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(operator.index(n) for n in entry["shape"])
                first, last = (operator.index(n) for n in entry["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise PlanFormatError(f"{self.path}: tensor '{name}': unreadable header entry") from error
            spec = TensorSpec(dtype=dtype, shape=shape, offset=base + first)
            countable = math.prod(n or 1 for n in shape) * dtype.itemsize <= sys.maxsize
            if min((*shape, first)) < 0 or last - first != spec.nbytes or base + last > size or not countable:
                raise PlanFormatError(
                    f"{self.path}: tensor '{name}': bytes [{first}, {last}) for shape {list(shape)} of {dtype}, "
                    f"expected {spec.nbytes} bytes inside the {size - base} that the file holds"
                )
            specs[name] = spec
        return specs

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor, read-only, without copying it.

        Raises:
            PlanFormatError: There is no tensor of that name.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise PlanFormatError(f"{self.path}: no tensor '{name}'; it belongs to another plan or is damaged")
        count = math.prod(spec.shape)
        return np.frombuffer(self._map, spec.dtype, count, spec.offset if count else 0).reshape(spec.shape)

    def drop_pages(self) -> None:
        """Give back the memory of what was read, which stays on disk."""
        self._map.madvise(mmap.MADV_DONTNEED)
