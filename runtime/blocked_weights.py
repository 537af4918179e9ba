"""Where ONNX Runtime puts each weight when it optimises a graph.

Its optimiser blocks, pads and transposes weights into the order that its kernels read. That is done once: the graph is
optimised with each weight's number in its place, and saved. Where every number comes back exactly once, weights can be
set in the optimised graph itself, which then is never optimised again. A second optimisation, with all numbers
negative, shows that nothing else in the graph was computed from weights.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rerampile.deployment import Deployment
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import ModelFile, iter_graphs
from rerampile.runtime.plain_model import PlainModel, declare_weight, weight_options
from rerampile.runtime.session import open_session, release_memory
from rerampile.runtime.weight_buffers import Place, WeightBuffers, tensor_place

__all__ = ["BlockedModel", "NotApplicableError", "blocked_model", "optimised_once", "plain_buffers"]

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]
_Find = Callable[[str, Array], "Place | None"]  # where the layer lies that a tensor holds

_SMALLEST_NORMAL, _INFINITY, _SIGN = 0x00800000, 0x7F800000, 0x80000000  # bits of float32
_LARGEST_MODEL = 1 << 30  # bytes of digital tensors that the optimised graph may carry


class NotApplicableError(Exception):
    """The weights cannot be set in the optimised graph; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class BlockedModel:
    """An optimised graph whose weights are graph inputs.

    Attributes:
        proto: The model, to be opened without any optimisation.
        shapes: Shape of each weight input, padding included, by name.
        places: Where layers lie in them.
    """

    proto: onnx.ModelProto = field(repr=False)
    shapes: dict[str, tuple[int, ...]]
    places: list[Place] = field(repr=False)


def blocked_model(deployment: Deployment, plain: PlainModel) -> BlockedModel:
    """Optimise a deployment's model once, and find its weights in the result.

    Raises:
        NotApplicableError: A weight is not found once, something else depends on weights, or they are too many.
        FaultRunError: ONNX Runtime refuses the model.
    """
    numbering = _Numbering.of(deployment.plan.layers)

    def optimised(sign: int) -> _Sorted:
        numbers = plain_buffers(deployment, plain)
        for layer in range(len(numbering.layers)):
            numbers.fill(layer, numbering.matrix(layer, sign))
        return _optimised(deployment, plain, numbers.arrays, lambda name, array: numbering.place(name, array, sign))

    found = optimised(0)
    release_memory()
    alike = found.alike(optimised(_SIGN))
    release_memory()
    if not alike:
        raise NotApplicableError("ONNX Runtime's optimised graph holds more of the weights than the weights")
    missing = set(range(len(numbering.layers))) - {place.layer for place in found.places}
    if missing:
        name = numbering.layers[min(missing)].name
        raise NotApplicableError(f"ONNX Runtime's optimised graph does not hold each weight of layer '{name}' once")
    proto = found.proto
    if proto.ByteSize() > _LARGEST_MODEL:
        raise NotApplicableError(f"{proto.ByteSize()} bytes of digital tensors, more than {_LARGEST_MODEL}")
    for name, shape in found.shapes.items():
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return BlockedModel(proto=proto, shapes=found.shapes, places=found.places)


def plain_buffers(
    deployment: Deployment, plain: PlainModel, int8_scales: Mapping[int, npt.NDArray[np.float32]] | None = None
) -> WeightBuffers:
    """Return buffers for the weight tensors as nodes read them, some of them int8."""
    layers = deployment.plan.layers
    places = [tensor_place(name, n, layer) for n, (name, layer) in enumerate(zip(plain.weights, layers, strict=True))]
    shapes = {name: tuple(layer.weight_shape) for name, layer in zip(plain.weights, layers, strict=True)}
    return WeightBuffers(shapes, places, int8_scales)


def optimised_once(deployment: Deployment, plain: PlainModel, values: Mapping[str, Array]) -> PlainModel | None:
    """Return a plain model as ONNX Runtime optimises it, to be opened for each chip without doing that again.

    It is the same for all chips where the optimiser leaves every weight as it is and computes nothing from them, which
    a second optimisation shows, with the bits of all weights inverted.

    Args:
        deployment: The deployment.
        plain: The model, all of whose weights are int8.
        values: Its weights by name; of any chip.

    Returns:
        The model, or None where a weight does not come back as it was, or something else depends on weights.
    """
    layers = deployment.plan.layers
    places = {
        name: tensor_place(name, n, layer) for n, (name, layer) in enumerate(zip(plain.weights, layers, strict=True))
    }

    def optimised(weights: Mapping[str, Array]) -> _Sorted:
        def place(name: str, array: Array) -> Place | None:
            same = name in weights and array.dtype == np.int8 and np.array_equal(array, weights[name])
            return places[name] if same else None

        return _optimised(deployment, plain, weights, place)

    found = optimised(values)
    other = optimised({name: ~array for name, array in values.items()})
    if not found.alike(other) or len(found.places) != len(layers):
        return None
    for name, layer in zip(plain.weights, layers, strict=True):
        declare_weight(found.proto.graph, name, layer.weight_shape, TensorProto.INT8)
    return PlainModel(proto=found.proto, weights=plain.weights, optimised=True)


def _optimised(deployment: Deployment, plain: PlainModel, values: Mapping[str, Array], find: _Find) -> _Sorted:
    """Have ONNX Runtime optimise the model with values for weights; return what it saved, its weights apart."""
    options = weight_options(deployment, values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "256")
        open_session(plain.proto.SerializeToString(), options)
        release_memory()
        proto = onnx.load_model(path, load_external_data=False)
        return _sorted(ModelFile(proto=proto, name=path.name, folder=path.parent, size=0), find)


@dataclass(frozen=True)
class _Numbering:
    """Every weight of every layer has a number: the bits of a float32, which copying does not change.

    Attributes:
        layers: The plan's layers.
        first: Number of each layer's first weight, and one past the last of all; none is zero or subnormal.
    """

    layers: list[LayerPlan]
    first: Integers

    @classmethod
    def of(cls, layers: list[LayerPlan]) -> _Numbering:
        sizes = [layer.groups * layer.outputs * layer.inputs for layer in layers]
        first = np.cumsum([_SMALLEST_NORMAL, *sizes])
        if first[-1] > _INFINITY:
            raise NotApplicableError(f"float32 cannot number {sum(sizes)} weights")
        return cls(layers, first)

    def matrix(self, layer: int, sign: int) -> npt.NDArray[np.float32]:
        """Return a layer's numbers as its weights, float32 [groups * outputs, inputs]."""
        numbers = np.arange(self.first[layer], self.first[layer + 1], dtype=np.uint32) ^ np.uint32(sign)
        return numbers.view(np.float32).reshape(-1, self.layers[layer].inputs)

    def place(self, name: str, array: Array, sign: int) -> Place | None:
        """Return where the layer whose numbers an array holds, each once and nothing else, lies in it."""
        if array.dtype != np.float32:
            return None
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        where = np.flatnonzero(bits & ~np.uint32(_SIGN))
        numbers = (bits[where] ^ np.uint32(sign)).astype(np.int64)
        layer = int(np.searchsorted(self.first, numbers[0], side="right")) - 1 if len(where) else -1
        if not 0 <= layer < len(self.layers) or len(where) != self.first[layer + 1] - self.first[layer]:
            return None
        numbers -= self.first[layer]
        if numbers.min() < 0 or numbers.max() >= len(where):
            return None
        positions = np.full(len(where), -1)
        positions[numbers] = where
        table = positions.reshape(-1, self.layers[layer].inputs)
        place = Place(buffer=name, layer=layer, rows=table[:, 0].copy(), columns=table[0] - table[0, 0])
        return place if np.array_equal(table, place.rows[:, None] + place.columns) else None


@dataclass
class _Sorted:
    """An optimised model, its weights apart from its digital tensors.

    Attributes:
        proto: The model; its weights are removed, its digital tensors lie in it.
        places: Where layers lie.
        shapes: Shape of each weight tensor.
        digests: Hashes of all digital tensors, ascending: their names change from one optimisation to the next.
        operators: All operators, ascending.
    """

    proto: onnx.ModelProto
    places: list[Place]
    shapes: dict[str, tuple[int, ...]]
    digests: list[str]
    operators: list[tuple[str, str]]

    def alike(self, other: _Sorted) -> bool:
        """Return whether two optimisations differ in weights alone."""
        return (self.digests, self.operators) == (other.digests, other.operators)


def _sorted(model: ModelFile, find: _Find) -> _Sorted:
    main, *inner = iter_graphs(model.proto.graph)
    found = _Sorted(model.proto, [], {}, [], sorted((n.domain, n.op_type) for g in (main, *inner) for n in g.node))
    for graph in (main, *inner):
        for tensor in list(graph.initializer):
            array = model.array(tensor)
            place = find(tensor.name, array) if graph is main else None
            if place is not None:
                found.places.append(place)
                found.shapes[tensor.name] = array.shape
                graph.initializer.remove(tensor)
                continue
            found.digests.append(
                hashlib.sha256(repr((array.shape, array.dtype)).encode() + array.tobytes()).hexdigest()
            )
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    found.digests.sort()
    return found
