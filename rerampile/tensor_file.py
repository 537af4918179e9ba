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
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

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
_HASH_CHUNK = 1 << 20
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
    """Writes a safetensors file tensor by tensor and hashes it on the way.

    Args:
        path: The file, which must not exist.
        tensors: Name, dtype and shape of each tensor. They are laid out, and must be written, in the order of
            :attr:`specs`: wider types first (so that all are aligned), then as given.
        metadata: Strings for the header.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, npt.DTypeLike, tuple[int, ...]]],
        metadata: Mapping[str, str],
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
        self._waiting = list(reversed(self.specs))
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._file = path.open("x+b", buffering=0)
        self._worker = ThreadPoolExecutor(max_workers=1)  # hashes what is written while more is computed
        self._pending: list[Future[None]] = []
        self._put(np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8), 0)
        self._hash_up_to(base)

    def write(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write the next tensor."""
        spec = self._next(name)
        if values.shape != spec.shape or values.dtype != spec.dtype:
            raise InternalError(f"{self.path}: tensor '{name}' is {values.dtype} {values.shape}, not as announced")
        self._put(values, spec.offset)
        self._hash_up_to(spec.offset + spec.nbytes)

    def write_rows(self, name: str, blocks: Iterable[tuple[slice, npt.NDArray[Any]]]) -> None:
        """Write the next tensor, [..., rows, columns], from blocks of its rows, so that it is never held as a whole.

        Args:
            name: The tensor.
            blocks: A range of rows and its values, [..., rows of the range, columns]; together they are all rows.
        """
        spec, written = self._next(name), 0
        row_bytes = spec.shape[-1] * spec.dtype.itemsize
        for rows, values in blocks:
            for plane, part in enumerate(values.reshape(-1, *values.shape[-2:])):
                self._put(part, spec.offset + (plane * spec.shape[-2] + rows.start) * row_bytes)
            written += values.nbytes
        if written != spec.nbytes:
            raise InternalError(f"{self.path}: tensor '{name}' has {written} bytes of rows, not as announced")
        self._hash_up_to(spec.offset + spec.nbytes)

    def _next(self, name: str) -> TensorSpec:
        if self._waiting.pop() != name:
            raise InternalError(f"{self.path}: tensor '{name}' written out of order")
        return self.specs[name]

    def _put(self, data: npt.ArrayLike, offset: int) -> None:
        rest = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        while rest.nbytes:
            done = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[done:], offset + done

    def _hash_up_to(self, end: int) -> None:
        self._pending.append(self._worker.submit(self._read_and_hash, end))

    def _read_and_hash(self, end: int) -> None:
        buffer = memoryview(bytearray(min(_HASH_CHUNK, end - self._hashed)))
        while self._hashed < end:
            done = os.preadv(self._file.fileno(), [buffer[: end - self._hashed]], self._hashed)
            if done == 0:
                raise OSError(f"{self.path}: became shorter while it was written")
            self._hash.update(buffer[:done])
            self._hashed += done

    def _wait(self) -> None:
        for pending in self._pending:
            pending.result()
        self._pending.clear()

    @property
    def sha256(self) -> str:
        """Hash of what was written so far."""
        self._wait()
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._worker.shutdown(cancel_futures=True)
            self._file.close()
        if error is None and self._waiting:
            raise InternalError(f"{self.path}: tensor '{self._waiting[-1]}' was never written")


class TensorFile:
    """A safetensors file that outsiders may have touched, mapped into memory read-only.

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
