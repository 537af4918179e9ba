"""Reading ONNX model files that may be large, damaged or hostile.

Weights stay where they are until someone asks for them: large initializers are windows into the file's bytes, and
external ones are memory-mapped from the model's own folder, and from nowhere else.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google.protobuf.message
import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
from onnx import numpy_helper

from rerampile.background import in_background
from rerampile.detach import without_large_data
from rerampile.errors import ModelError, UnsupportedModelError
from rerampile.tensor_file import TensorSpec

__all__ = [
    "ModelFile",
    "copy_without",
    "external_entries",
    "external_tensor",
    "file_sha256",
    "hash_on_disk",
    "iter_graphs",
    "load_model_file",
    "write_model_file",
]

_PROTOBUF_LIMIT = 2**31 - 1
_LARGEST_MESSAGE = 2**31 - 2**20  # what is left for the graph around large tensors
_OWN_DATA = "\0"  # location of data that lie in the model file itself: no path can have this name
OLDEST_OPSET = 7


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """An ONNX model as its user exported it, never written to.

    Attributes:
        proto: The parsed model; external tensors are not loaded. Model-local functions are inlined.
        name: Name for messages and for the plan: the file's name, or the graph's where there is no file.
        folder: Where external data may lie, or None for a model that came as an object.
        size: Bytes of the model file, external data included.
        data: Bytes of the model file, into which large initializers of ``proto`` are windows; empty where none is.
        hashing: The hashes of the model file and of its external data files, while they are computed.
        inlined_functions: How many model-local functions were inlined.
        converted_from_opset: The operator set that the user's file imports, where it was too old and converted up.
    """

    proto: onnx.ModelProto = field(repr=False)
    name: str
    folder: Path | None
    size: int
    data: memoryview = field(default=memoryview(b""), repr=False)
    hashing: Future[tuple[str, dict[str, str]]] | None = field(default=None, repr=False)
    inlined_functions: int = 0
    converted_from_opset: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the model file (of the serialised message where there is no file)."""
        return self._hashes[0]

    @property
    def external(self) -> dict[str, str]:
        """Hash of each external data file, keyed by its location."""
        return self._hashes[1]

    @property
    def _hashes(self) -> tuple[str, dict[str, str]]:
        return ("", {}) if self.hashing is None else self.hashing.result()

    @property
    def opset(self) -> int:
        """Version of the standard operator set that the model imports."""
        return next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)

    @property
    def path(self) -> Path | None:
        """The user's own file, where there is one."""
        return None if self.folder is None else self.folder / self.name

    def array(self, tensor: onnx.TensorProto) -> npt.NDArray[Any]:
        """Return the values of ``tensor``, read-only (and not always aligned) where they lie in a file."""
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        location, offset, length = external_entries(tensor, self.name)
        if length == 0:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            return np.zeros(tuple(tensor.dims), dtype)
        if self.is_window(tensor):
            raw = np.frombuffer(self.data, np.uint8, length, offset)
        else:
            with _inside(self.folder, location, tensor, self.name).open("rb") as file:
                start = offset - offset % mmap.ALLOCATIONGRANULARITY
                view = mmap.mmap(file.fileno(), length + offset - start, access=mmap.ACCESS_READ, offset=start)
            raw = np.frombuffer(view, np.uint8, length, offset - start)
        if tensor.data_type in _PACKED:
            filled = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
            return numpy_helper.to_array(filled)
        return raw.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))

    def put_back(self, tensor: onnx.TensorProto) -> None:
        """Give a copy of an initializer that is a window into the model file its data again; leave others alone."""
        if self.is_window(tensor):
            _, offset, length = external_entries(tensor, self.name)
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.raw_data = bytes(self.data[offset : offset + length])

    def is_window(self, tensor: onnx.TensorProto) -> bool:
        """Whether the data of an initializer lie in :attr:`data`."""
        return any(entry.key == "location" and entry.value == _OWN_DATA for entry in tensor.external_data)


# Types of less than a byte: their elements share bytes, so the buffer is no array yet.
_PACKED = {
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
}


def load_model_file(model: str | Path | onnx.ModelProto) -> ModelFile:
    """Read and check a model.

    Args:
        model: A path, or a model that is already in memory (it is copied where it has to change).

    Raises:
        ModelError: The file is missing, truncated, not ONNX, refused by ONNX's checker, or its external data are
            missing, too short or outside the model's folder.
        UnsupportedModelError: The operator set is newer than the installed onnx knows, or too old to convert.
    """
    if isinstance(model, onnx.ModelProto):
        data = model.SerializeToString(deterministic=True)
        found = ModelFile(
            proto=model,
            name=model.graph.name or "model",
            folder=None,
            size=len(data),
            hashing=in_background(_hashes, memoryview(data), {}),
        )
    else:
        found = _read(Path(model))
    if not found.proto.graph.node:
        raise ModelError(f"{found.name}: not an ONNX model, or a truncated one: its graph holds no node")
    _check_names(found)
    newest = onnx.defs.onnx_opset_version()
    if found.opset > newest:
        raise UnsupportedModelError(
            f"{found.name}: operator set {found.opset}, expected at most {newest}, the newest that the installed onnx "
            f"knows; upgrade onnx and onnxruntime, or export the model for an older one"
        )
    _check_tensors(found)
    try:
        _check_graph(found)
    except UnicodeDecodeError as error:
        raise ModelError(f"{found.name}: a text in it is not UTF-8; the file is damaged") from error
    if found.opset < OLDEST_OPSET:
        for tensor in found.proto.graph.initializer:
            found.put_back(tensor)
        found = replace(found, proto=_convert_up(found), converted_from_opset=found.opset)
    if found.proto.functions:
        found = replace(found, proto=_inline_functions(found), inlined_functions=len(found.proto.functions))
    return found


def _read(path: Path) -> ModelFile:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: a folder, expected an ONNX model file")
        size = path.stat().st_size
        if size > _PROTOBUF_LIMIT:
            raise ModelError(
                f"{path}: {size} bytes, more than the 2 GiB that an ONNX file can hold; save it with external data"
            )
        data = np.fromfile(path, np.uint8).data
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    proto = onnx.ModelProto()
    parsed = without_large_data(data, _OWN_DATA, _byte_size)
    try:
        proto.ParseFromString(bytes(parsed))
    except google.protobuf.message.DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: protobuf cannot parse it") from error
    windows = memoryview(b"") if parsed is data else data
    found = ModelFile(proto=proto, name=path.name, folder=path.parent, size=size, data=windows)
    locations: dict[str, Path] = {}
    for tensor in _all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not found.is_window(tensor):
            location = external_entries(tensor, path.name)[0]
            locations[location] = _inside(path.parent, location, tensor, path.name)
    total = size + sum(file.stat().st_size for file in locations.values())
    return replace(found, size=total, hashing=in_background(_hashes, data, locations))


def _hashes(data: memoryview, external: Mapping[str, Path]) -> tuple[str, dict[str, str]]:
    """Return the sha256 of a model file's bytes, and of each external data file by its location."""
    return hashlib.sha256(data).hexdigest(), {where: file_sha256(file) for where, file in sorted(external.items())}


def external_entries(tensor: onnx.TensorProto, where: str) -> tuple[str, int, int]:
    """Return (location, offset, length) in bytes of an external tensor."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    expected = _byte_size(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError as error:
        raise ModelError(f"{where}: tensor '{tensor.name}': external data offset or length is not a number") from error
    if offset < 0 or length != expected:
        raise ModelError(
            f"{where}: tensor '{tensor.name}': external data of {length} bytes at offset {offset}, "
            f"expected {expected} bytes at an offset of 0 or more"
        )
    return entries.get("location", ""), offset, length


def external_tensor(name: str, location: str, spec: TensorSpec) -> onnx.TensorProto:
    """Return an initializer whose data are a window of an external file."""
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(spec.dtype),
        dims=spec.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", spec.offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _inside(folder: Path | None, location: str, tensor: onnx.TensorProto, where: str) -> Path:
    """Return the external file at ``location``, which must lie inside ``folder`` and be long enough."""
    if folder is None:
        raise ModelError(
            f"{where}: tensor '{tensor.name}' has external data, but the model came without a folder; pass its path"
        )
    file = (folder / location.replace("\0", "")).resolve()
    if not location or "\0" in location or Path(location).is_absolute() or not file.is_relative_to(folder.resolve()):
        raise ModelError(
            f"{where}: tensor '{tensor.name}': external data at '{location}', outside the model's folder; "
            f"expected a relative path that stays inside it"
        )
    if not file.is_file():
        raise ModelError(
            f"{where}: tensor '{tensor.name}': external data file '{location}' is missing beside the model"
        )
    _, offset, length = external_entries(tensor, where)
    size = file.stat().st_size
    if offset + length > size:
        raise ModelError(
            f"{where}: tensor '{tensor.name}': external data file '{location}' has {size} bytes, "
            f"expected at least {offset + length}"
        )
    return file


def _byte_size(tensor: onnx.TensorProto) -> int:
    """Return the bytes that the raw data of ``tensor`` take, from its shape and type alone."""
    count = 1
    for dim in tensor.dims:
        if dim < 0:
            raise ModelError(f"tensor '{tensor.name}': dimension {dim}, expected 0 or more")
        count *= dim
    if tensor.data_type in _PACKED:
        return -(-count * _PACKED_BITS.get(tensor.data_type, 4) // 8)
    try:
        return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"tensor '{tensor.name}': unknown element type {tensor.data_type}") from error


_PACKED_BITS = {getattr(onnx.TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)}


def _check_names(model: ModelFile) -> None:
    """Refuse names that are no text, types that do not exist, and weights that hide a tensor around their graph.

    ONNX's checker sees none of them.
    """
    for graph in iter_graphs(model.proto.graph):
        names: list[object] = [value.name for value in (*graph.input, *graph.output, *graph.value_info)]
        names += [tensor.name for tensor in graph.initializer]
        names += [d.dim_param for v in (*graph.input, *graph.output) for d in v.type.tensor_type.shape.dim]
        names += [n for node in graph.node for n in (node.name, node.op_type, *node.input, *node.output)]
        for name in names:
            if isinstance(name, bytes):  # how protobuf gives what it cannot decode
                raise ModelError(f"{model.name}: name {name!r} is not UTF-8 text; the file is damaged")
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type not in onnx.TensorProto.DataType.values():
                raise ModelError(
                    f"{model.name}: tensor '{value.name}': unknown element type {value.type.tensor_type.elem_type}"
                )
    _check_hidden(model, model.proto.graph, frozenset())


def _check_hidden(model: ModelFile, graph: onnx.GraphProto, around: frozenset[str]) -> None:
    names = {tensor.name for tensor in graph.initializer}
    if hidden := names & around:
        raise ModelError(
            f"{model.name}: initializer '{min(hidden)}' of graph '{graph.name}' has the name of a tensor around that "
            f"graph, expected one of its own; rename it"
        )
    visible = around.union(names, (value.name for value in graph.input), (o for n in graph.node for o in n.output))
    for inner in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        _check_hidden(model, inner, visible)


def _check_tensors(model: ModelFile) -> None:
    """Refuse tensors whose data do not fill their shape, before anything takes memory for them."""
    for tensor in _all_tensors(model.proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location, offset, length = external_entries(tensor, model.name)
            if not model.is_window(tensor) or offset + length > len(model.data):
                _inside(model.folder, location, tensor, model.name)
            continue
        found, expected, unit = _data_count(tensor)
        if found != expected:
            raise ModelError(
                f"{model.name}: tensor '{tensor.name}' has {found} {unit}, expected {expected} for shape "
                f"{list(tensor.dims)}; the file is damaged"
            )


def _data_count(tensor: onnx.TensorProto) -> tuple[int, int, str]:
    """Return how much data ``tensor`` carries, how much its shape and type ask for, and what is counted."""
    size = _byte_size(tensor)
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data), size, "bytes"
    found = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    if tensor.data_type in _PACKED:
        return found, size, "values"
    parts = 2 if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128) else 1
    return found, parts * math.prod(tensor.dims), "values"


def _check_graph(model: ModelFile) -> None:
    """Run ONNX's checker on the graph, initializers as inputs: their data were checked, and stay out of the copy."""
    skeleton = copy_without(model.proto, "graph")
    skeleton.graph.CopyFrom(copy_without(model.proto.graph, "initializer"))
    initializers = list(model.proto.graph.initializer)
    for inner in iter_graphs(skeleton.graph):  # external data of subgraphs: the checker knows no folder to look in
        external = [t for t in inner.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        initializers += external
        for tensor in external:
            inner.initializer.remove(tensor)
    known = {value.name for value in skeleton.graph.input}
    for tensor in initializers:
        if tensor.name not in known:
            known.add(tensor.name)
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    skeleton.ir_version = max(skeleton.ir_version, 4)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        line = " ".join(str(error).split())
        raise ModelError(f"{model.name}: ONNX's checker refuses it: {line[:400]}") from error


def _convert_up(model: ModelFile) -> onnx.ModelProto:
    """Convert a model of an operator set that ONNX Runtime does not guarantee to the oldest that it does."""
    try:
        return onnx.version_converter.convert_version(model.proto, OLDEST_OPSET)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{model.name}: operator set {model.opset or 'not stated'}, expected {OLDEST_OPSET} or newer, and ONNX's "
            f"converter cannot bring it there: {' '.join(str(error).split())[:200]}; export it again"
        ) from error


def _inline_functions(model: ModelFile) -> onnx.ModelProto:
    """Inline model-local functions, so that weights inside them are found; metadata are kept."""
    inlined = onnx.inliner.inline_local_functions(model.proto)
    if inlined.functions:
        inlined = _inline_other_opsets(model, inlined)
    if not inlined.metadata_props:
        inlined.metadata_props.extend(model.proto.metadata_props)
    return inlined


def _inline_other_opsets(model: ModelFile, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Inline functions that import another operator set; the inliner converts them where it knows every type."""
    known = list(proto.graph.value_info)
    proto.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in proto.graph.initializer
    )
    try:
        typed = onnx.shape_inference.infer_shapes(proto)
        inlined = onnx.inliner.inline_local_functions(typed, convert_version=True)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{model.name}: model-local functions of another operator set than the model's {model.opset} cannot be "
            f"converted: {' '.join(str(error).split())[:200]}; export it with one operator set"
        ) from error
    del inlined.graph.value_info[:]
    inlined.graph.value_info.extend(known)
    return inlined


def write_model_file(model: ModelFile, path: Path) -> None:
    """Write a model, with all its tensors, to a temporary sibling that is renamed.

    What does not fit one ONNX file goes to external data beside it, named after it.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in _all_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(model.array(tensor)), tensor.name))
    temporary = path.with_name(f".{path.name}")
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(proto, temporary, save_as_external_data=proto.ByteSize() > _LARGEST_MESSAGE, location=beside.name)
    temporary.replace(path)


def copy_without(message: Any, *fields: str) -> Any:
    """Return a copy of a protobuf message without some of its fields, which are never copied at all."""
    copy = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in fields:
            continue
        target = getattr(copy, descriptor.name)
        if descriptor.is_repeated:
            target.extend(value)
        elif descriptor.message_type is not None:
            target.CopyFrom(value)
        else:
            setattr(copy, descriptor.name, value)
    return copy


def iter_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield ``graph`` and every graph inside its nodes, outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from iter_graphs(inner)


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and attributes, of subgraphs and functions too."""
    for graph in iter_graphs(proto.graph):
        yield from graph.initializer
        for node in graph.node:
            yield from _attribute_tensors(node)
    for function in proto.functions:
        for node in function.node:
            yield from _attribute_tensors(node)


def _attribute_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def hash_on_disk(path: Path) -> str:
    """Bring a file to the disk and return its sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
