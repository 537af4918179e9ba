"""Reading a model without copying its large weights: they are left where they lie in the file.

A parser copies every byte of a message, and gives a tensor's data away as one more copy each time. So the outermost
fields of the file are walked first, and each large initializer of the main graph becomes, in what is parsed, an
external tensor: a window into the model's own file. Whatever is not plainly laid out is left to the parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import google.protobuf.message
import onnx

__all__ = ["without_large_data"]

_GRAPH, _INITIALIZER, _RAW_DATA = (
    message.DESCRIPTOR.fields_by_name[name].number
    for message, name in ((onnx.ModelProto, "graph"), (onnx.GraphProto, "initializer"), (onnx.TensorProto, "raw_data"))
)
_BESIDE_RAW_DATA = {  # what may stand beside data that become a window
    onnx.TensorProto.DESCRIPTOR.fields_by_name[name].number for name in ("dims", "data_type", "name", "doc_string")
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10
_LARGE = 1 << 16  # bytes; a window takes about a hundred in the message
_MOST_FIELDS = 1 << 20  # of a message; walking is slower than parsing


class _Field(NamedTuple):
    """A field of a message: its number, its wire type, and where its tag and its value start and end."""

    number: int
    kind: int
    start: int
    value: int
    end: int


def without_large_data(data: memoryview, location: str, size: Callable[[onnx.TensorProto], int]) -> bytes | memoryview:
    """Return a serialised model whose large initializers are windows into the file that holds ``data``.

    Args:
        data: A serialised model, or anything else: it is returned as it is where it is not understood.
        location: What windows have for the location of their external data.
        size: Gives the bytes that a tensor's data have to fill, from its shape and type.
    """
    try:
        (graph,) = (field for field in _fields(data, 0, len(data)) if field.number == _GRAPH)
        if graph.kind != _BYTES:
            return data
        parts, done = list[bytes | memoryview](), graph.value
        for field in _fields(data, graph.value, graph.end):
            if field.number == _INITIALIZER and (window := _window(data, field, location, size)) is not None:
                parts += [data[done : field.start], window]
                done = field.end
    except (ValueError, google.protobuf.message.DecodeError):  # damaged, or not one graph: the parser knows what to say
        return data
    if not parts:
        return data
    parts.append(data[done : graph.end])
    return b"".join((data[: graph.start], _message(_GRAPH, parts), data[graph.end :]))


def _window(data: memoryview, field: _Field, location: str, size: Callable[[onnx.TensorProto], int]) -> bytes | None:
    """Return an initializer as a window, or None where it is small, oddly laid out, or does not fill its shape."""
    if field.kind != _BYTES or field.end - field.value < _LARGE:
        return None
    raw, beside = list[_Field](), list[bytes | memoryview]()
    for part in _fields(data, field.value, field.end):
        if part.number == _RAW_DATA and part.kind == _BYTES:
            raw.append(part)
        elif part.number in _BESIDE_RAW_DATA:
            beside.append(data[part.start : part.end])
        else:
            return None
    if len(raw) != 1:
        return None
    window = onnx.TensorProto.FromString(b"".join(beside))
    offset, length = raw[0].value, raw[0].end - raw[0].value
    if size(window) != length:
        return None
    window.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        window.external_data.add(key=key, value=str(value))
    return _message(_INITIALIZER, [window.SerializeToString()])


def _message(number: int, parts: Sequence[bytes | memoryview]) -> bytes:
    """Return a field that holds a message, from the serialised parts of the message."""
    size = sum(len(part) for part in parts)
    return b"".join((_varint(number << 3 | _BYTES), _varint(size), *parts))


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _fields(data: memoryview, at: int, end: int) -> Iterator[_Field]:
    """Yield the fields of a message.

    Raises:
        ValueError: It is no message, one of absurdly many fields, or one with groups, which ONNX has none of.
    """
    for _ in range(_MOST_FIELDS):
        if at == end:
            return
        start = at
        tag, at = _read_varint(data, at, end)
        kind, value = tag & 7, at
        if kind == _VARINT:
            _, at = _read_varint(data, at, end)
        elif kind == _BYTES:
            size, value = _read_varint(data, at, end)
            at = value + size
        else:
            at += _FIXED_SIZES.get(kind, end)
        if at > end or tag >> 3 == 0:
            raise ValueError("not a message")
        yield _Field(tag >> 3, kind, start, value, at)
    raise ValueError("too many fields")


def _read_varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """Return a number and the position behind it."""
    value = 0
    for k, byte in enumerate(data[at : min(end, at + _LONGEST_VARINT)]):
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value, at + k + 1
    raise ValueError("not a number")
