"""Inputs for a model: generated from what it declares, or from a file."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.errors import DataError, FaultRunError, did_you_mean
from rerampile.npz_file import ArrayHeader, npz_headers, read_npz
from rerampile.runtime.session import run

__all__ = ["declared_dtype", "fitting_inputs", "inputs_from_file", "random_array"]

Inputs = dict[str, npt.NDArray[Any]]

_DTYPES: dict[str, Any] = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
}
# Sizes tried for dimensions that a model leaves open, until one runs: first axis (the batch), then all others.
_BATCHES = (2, 1)
_SIZES = (32, 64, 224, 416, 8, 16, 128, 4, 1, 3, 2, 299)
_LARGEST_INPUT = 1 << 28  # elements: what a file declares must not take all memory
_TOKENS = 8  # generated integers of 32 or 64 bits are indices more often than not: kept small


def inputs_from_file(path: Path, session: Any) -> Inputs:
    """Read inputs by name from an .npz file.

    Raises:
        DataError: The file is unreadable, or its names, types or shapes do not fit the model.
    """
    try:
        _check_headers(path, npz_headers(path, _LARGEST_INPUT), session)
        return dict(read_npz(path))
    except ValueError as error:
        raise DataError(
            f"{path}: not a readable .npz file: {error}; write one with numpy.savez(FILE, input_name=array)"
        ) from error


def _check_headers(path: Path, found: Mapping[str, ArrayHeader], session: Any) -> None:
    """Compare what a file says of its arrays with the inputs of a model, before any is read."""
    declared = {value.name: value for value in session.get_inputs()}
    for name in found:
        if name not in declared:
            raise DataError(f"{path}: input '{name}' is not one of the model's{did_you_mean(name, declared)}")
    for name, value in declared.items():
        if name not in found:
            raise DataError(f"{path}: input '{name}' is missing, expected an array of {value.type} {value.shape}")
        dtype, shape = declared_dtype(name, value.type), found[name].shape
        fits = len(shape) == len(value.shape) and all(
            not isinstance(d, int) or d == s for d, s in zip(value.shape, shape, strict=True)
        )
        if found[name].dtype != dtype or not fits:
            raise DataError(
                f"{path}: input '{name}' is {found[name].dtype} {list(shape)}, expected {np.dtype(dtype)} {value.shape}"
            )


def fitting_inputs(session: Any, seed: int) -> tuple[Inputs, list[Any]]:
    """Generate inputs that fit a model's declared inputs, and run them.

    Dimensions that the model leaves open are tried in a fixed order of sizes until ONNX Runtime runs.

    Returns:
        The inputs and the outputs.

    Raises:
        DataError: An input is of a kind that cannot be generated, or no size runs.
    """
    last: FaultRunError | None = None
    for sizes in _assignments(session.get_inputs()):
        if max((math.prod(_shape(value, sizes)) for value in session.get_inputs()), default=0) > _LARGEST_INPUT:
            continue
        inputs = {
            value.name: _generate(value, sizes, np.random.default_rng([seed, number]))
            for number, value in enumerate(session.get_inputs())
        }
        try:
            return inputs, list(run(session, inputs))
        except FaultRunError as error:
            last = error
    reason = last or f"an input would have more than {_LARGEST_INPUT} elements"
    raise DataError(f"no generated inputs fit the model; give real ones with --inputs FILE.npz ({reason})") from last


def _assignments(declared: Any) -> Iterator[dict[tuple[str, int] | str, int]]:
    """Yield sizes for the open dimensions: by symbol, or by (input, axis) where a dimension has no name."""
    batch: set[tuple[str, int] | str] = set()
    other: set[tuple[str, int] | str] = set()
    for value in declared:
        for axis, dim in enumerate(value.shape):
            if not isinstance(dim, int) or dim < 0:
                (batch if axis == 0 else other).add(_key(value, axis))
    other -= batch
    for size, first in itertools.product(_SIZES if other else (0,), _BATCHES if batch else (0,)):
        yield {**dict.fromkeys(batch, first), **dict.fromkeys(other, size)}


def _key(value: Any, axis: int) -> tuple[str, int] | str:
    dim = value.shape[axis]
    return dim if isinstance(dim, str) else (value.name, axis)


def _shape(value: Any, sizes: dict[tuple[str, int] | str, int]) -> list[int]:
    return [sizes.get(_key(value, axis), dim) for axis, dim in enumerate(value.shape)]


def _generate(value: Any, sizes: dict[tuple[str, int] | str, int], rng: np.random.Generator) -> npt.NDArray[Any]:
    return random_array(np.dtype(declared_dtype(value.name, value.type)), _shape(value, sizes), rng)


def random_array(dtype: np.dtype[Any], shape: Sequence[int], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Draw an array: standard normal numbers, any byte, fair booleans, small indices."""
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.itemsize == 1:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return rng.integers(0, _TOKENS, shape, dtype)


def declared_dtype(name: str, kind: str) -> Any:
    """Return the numpy type of a declared input such as ``tensor(float)``.

    Raises:
        DataError: It is no tensor of numbers.
    """
    found = re.fullmatch(r"tensor\((\w+)\)", kind)
    if found is None or found[1] not in _DTYPES:
        raise DataError(f"input '{name}' is a {kind}, expected a tensor of numbers; it cannot be generated or read")
    return _DTYPES[found[1]]
