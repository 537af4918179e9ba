"""Turn a darknet network (``.cfg`` and ``.weights``) into ONNX, without torch or darknet.

The layers of the YOLOv3 and YOLOv4 families are known; anything else is refused by its name and line. Each ``[yolo]``
head is left raw: the convolution in front of it is an output (``out0``, ``out1``, … in the order of the file), and the
model's metadata property ``yolo`` says how to decode it:

    {"classes": 80, "anchors": [[w, h], …], "out0": {"mask": [0, 1, 2], "stride": 8, "scale_x_y": 1.2}, …}

Input is ``images``, float32 [N, channels, height, width], RGB / 255. Without a weights file the weights are seeded
random ones.

Example:
    python models/darknet.py yolov4.cfg yolov4.weights -o yolov4.onnx --size 608
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from model_graph import ModelGraph, write

from rerampile.errors import ModelError, RerampileError, UnsupportedModelError, did_you_mean

MOST_FLOATS = (2**31 - 2**24) // 4
"""Weights that fit one ONNX file, whose limit is 2 GiB."""

UNSUPPORTED_KEYS: dict[str, dict[str, str]] = {
    "convolutional": {"share_index": ""}
    | dict.fromkeys(("antialiasing", "assisted_excitation", "binary", "coordconv", "dontload", "dontloadscales"), "0")
    | dict.fromkeys(("flipped", "rotate", "stretch", "stretch_sway", "sway", "xnor"), "0"),
    "maxpool": {"antialiasing": "0", "maxpool_depth": "0"},
    "shortcut": {"weights_type": "none"},
    "scale_channels": {"scale_wh": "0"},
    "upsample": {"scale": "1"},
}
"""Options that change what a layer computes and that no ONNX is written for, with their harmless value."""

ACTIVATIONS = {
    "linear": (),
    "leaky": ("LeakyRelu",),
    "relu": ("Relu",),
    "logistic": ("Sigmoid",),
    "tanh": ("Tanh",),
    "swish": ("Sigmoid", "Mul"),
    "silu": ("Sigmoid", "Mul"),
    "mish": ("Softplus", "Tanh", "Mul"),
}
"""The operators that each activation is made of; Mul multiplies with what went in."""


@dataclass(frozen=True)
class Section:
    """One ``[name]`` of a cfg file; ``where`` is the file and line for messages."""

    name: str
    where: str
    options: dict[str, str] = field(default_factory=dict)

    def integer(self, key: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
        """Return an option as an integer within bounds."""
        text = self.options.get(key, str(default))
        try:
            value = int(text)
        except ValueError:
            raise self.wrong(f"{key}={text}, expected a whole number") from None
        if not least <= value <= most:
            raise self.wrong(f"{key}={value}, expected {least} to {most}")
        return value

    def real(self, key: str, default: float) -> float:
        """Return an option as a finite number."""
        return self._numbers(key, self.options.get(key, str(default)))[0]

    def numbers(self, key: str) -> list[float]:
        """Return an option that must be there as a list of finite numbers."""
        if key not in self.options:
            raise self.wrong(f"no {key}, expected numbers with commas between them")
        return self._numbers(key, self.options[key])

    def integers(self, key: str) -> list[int]:
        """Return an option that must be there as a list of integers."""
        values = self.numbers(key)
        if any(value != int(value) for value in values):
            raise self.wrong(f"{key}={self.options[key]}, expected whole numbers")
        return [int(value) for value in values]

    def wrong(self, what: str) -> ModelError:
        """Return the error that says what is wrong in this section."""
        return ModelError(f"{self.where}: [{self.name}]: {what}")

    def unsupported(self, what: str) -> UnsupportedModelError:
        """Return the error that says what this importer does not know."""
        return UnsupportedModelError(f"{self.where}: [{self.name}]: {what}")

    def _numbers(self, key: str, text: str) -> list[float]:
        try:
            values = [float(part) for part in text.rstrip(",").split(",")]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise self.wrong(f"{key}={text}, expected numbers with commas between them")
        return values


def parse(text: str, name: str) -> list[Section]:
    """Split a cfg file into its sections, as darknet reads it: blanks do not matter, the first of equal keys counts.

    Args:
        text: The cfg file's text.
        name: The file's name, for messages.
    """
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = "".join(line.split()).partition("#")[0]
        key, equals, value = bare.partition("=")
        if not bare or bare.startswith(";"):
            continue
        if bare.startswith("[") and bare.endswith("]"):
            sections.append(Section(bare[1:-1], f"{name}:{number}"))
        elif key and equals and sections:
            sections[-1].options.setdefault(key, value)
        else:
            raise ModelError(f"{name}:{number}: '{line.strip()[:40]}', expected [section] or key=value below a section")
    if not sections or sections[0].name not in ("net", "network"):
        raise ModelError(f"{name}: not a darknet network, expected [net] as its first section")
    return sections


class Weights(Protocol):
    """Where a network's numbers come from, in darknet's order."""

    def take(self, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the next float32 array; ``role`` is bias, scale, mean, variance or weight."""
        ...


class CountedWeights:
    """Counts what a network needs; its arrays take no memory, so that sizes are known before anything is allocated."""

    def __init__(self) -> None:
        self.count = 0

    def take(self, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return zeros that all lie in one place."""
        self.count += math.prod(shape)
        if self.count > MOST_FLOATS:
            raise UnsupportedModelError(
                f"the network has more than {MOST_FLOATS:,} weights, which do not fit an ONNX file of 2 GiB"
            )
        return np.broadcast_to(np.float32(0), shape)


class RandomWeights:
    """Seeded He-normal kernels and normalisations that start as the identity."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def take(self, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the next random array."""
        if role == "weight":
            return self._rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        return np.full(shape, role in ("scale", "variance"), np.float32)


class FileWeights:
    """The floats of a ``.weights`` file, from first to last."""

    def __init__(self, floats: np.ndarray) -> None:
        self._floats = floats
        self._next = 0

    def take(self, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the next array."""
        start, self._next = self._next, self._next + math.prod(shape)
        return self._floats[start : self._next].reshape(shape)


class WeightsFile(NamedTuple):
    """The floats of a ``.weights`` file, float32 [n], and its name for messages."""

    name: str
    floats: np.ndarray


def read_weights(path: Path) -> WeightsFile:
    """Read a ``.weights`` file.

    Its header is major, minor and revision as int32 and the count of images seen: int32 before version 0.2, then int64.
    """
    data = _read(path)
    version = np.frombuffer(data[:8].ljust(8, b"\0"), "<i4")
    header = 12 + (8 if version[0] * 10 + version[1] >= 2 else 4)
    if len(data) < header or (len(data) - header) % 4:
        raise ModelError(
            f"{path}: {len(data)} bytes, expected a header of {header} and 4 a weight; the file is damaged"
        )
    floats = np.frombuffer(data, "<f4", offset=header)
    if not np.isfinite(floats).all():
        raise ModelError(f"{path}: weight {int(np.argmin(np.isfinite(floats)))} is not finite; the file is damaged")
    return WeightsFile(path.name, floats)


def read_cfg(path: Path) -> list[Section]:
    """Read a ``.cfg`` file."""
    return parse(_read(path).decode(errors="replace"), path.name)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


class Map(NamedTuple):
    """A feature map: its tensor and the shape of one image."""

    tensor: gs.Variable
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return "×".join(map(str, self.shape))


class Importer:
    """Builds the graph section by section; layer numbers are darknet's own.

    Args:
        net: The ``[net]`` section.
        weights: Where the numbers come from.
        size: Height and width in pixels in place of those in ``[net]``.
        half: Store the weights as float16 (see ModelGraph).
        name: Name of the graph.
    """

    def __init__(self, net: Section, weights: Weights, size: int | None, half: bool, name: str) -> None:
        channels = net.integer("channels", 3, 1)
        height, width = (net.integer(key, 416, 1) if size is None else size for key in ("height", "width"))
        self.graph = ModelGraph(name, "images", (channels, height, width), half=half)
        self.weights = weights
        self.image = Map(self.graph.input, channels, height, width)
        self.layers: list[Map | None] = []
        self.heads: dict[str, Map] = {}
        self.decoding: dict[str, Any] = {}

    def add(self, section: Section) -> None:
        """Add the layer of one section."""
        if section.name not in LAYERS:
            raise section.unsupported(f"unknown section{did_you_mean(section.name, LAYERS)}")
        for key, harmless in UNSUPPORTED_KEYS.get(section.name, {}).items():
            if (value := section.options.get(key, harmless)) != harmless:
                raise section.unsupported(f"{key}={value} is not supported{harmless and f', expected {harmless}'}")
        found = LAYERS[section.name](self, section)
        if found and max(found.shape) >= 2**31:
            raise section.wrong(f"a map of {found}, expected at most {2**31 - 1} along each axis")
        self.layers.append(found)

    def name(self, part: str) -> str:
        """Return a name for a node or tensor of the layer under construction."""
        return f"layer{len(self.layers)}.{part}"

    def layer(self, section: Section, index: int) -> Map:
        """Return a layer's output by its number, or by its distance where negative."""
        number = index + len(self.layers) if index < 0 else index
        if not 0 <= number < len(self.layers):
            raise section.wrong(f"refers to layer {index}, expected one of the {len(self.layers)} layers above it")
        found = self.layers[number]
        if found is None:
            raise section.unsupported(f"takes the output of layer {number}, a [yolo] head that is not decoded here")
        return found

    def previous(self, section: Section) -> Map:
        """Return what the section's layer takes when it names no other."""
        return self.layer(section, -1) if self.layers else self.image

    def activation(self, section: Section, x: gs.Variable, default: str) -> gs.Variable:
        """Add the section's activation."""
        name = section.options.get("activation", default)
        if name not in ACTIVATIONS:
            raise section.unsupported(f"unknown activation '{name}'{did_you_mean(name, ACTIVATIONS)}")
        y = x
        for op in ACTIVATIONS[name]:
            attributes = {"alpha": 0.1} if op == "LeakyRelu" else {}
            y = self.graph.node(op, self.name(op.lower()), *((x, y) if op == "Mul" else (y,)), **attributes)
        return y

    def convolutional(self, section: Section) -> Map:
        """Convolution, batch normalisation where asked, activation.

        darknet's order: biases (those of the normalisation where there is one), scales, means, variances, kernels.
        """
        x = self.previous(section)
        filters, groups = section.integer("filters", 1, 1), section.integer("groups", 1, 1)
        if x.channels % groups or filters % groups:
            raise section.wrong(f"groups={groups}, expected a divisor of {x.channels} inputs and {filters} filters")
        size, strides = section.integer("size", 1, 1), self._strides(section)
        dilation = section.integer("dilation", 1, 1) if size > 1 else 1
        pad = dilation * (size // 2 if section.integer("pad", 0) else section.integer("padding", 0))
        normalised = section.integer("batch_normalize", 0) > 0
        roles = ("bias", "scale", "mean", "variance") if normalised else ("bias",)
        vectors = {role: self.weights.take(role, (filters,)) for role in roles}
        kernel = self.weights.take("weight", (filters, x.channels // groups, size, size))
        inputs = [x.tensor, self.graph.constant(self.name("weight"), kernel)]
        if not normalised:
            inputs.append(self.graph.constant(self.name("bias"), vectors["bias"]))
        attributes = {"kernel_shape": [size] * 2, "strides": strides, "pads": [pad] * 4, "dilations": [dilation] * 2}
        y = self.graph.node("Conv", self.name("conv"), *inputs, group=groups, **attributes)
        if normalised:
            parts = [
                self.graph.constant(self.name(f"bn.{r}"), vectors[r]) for r in ("scale", "bias", "mean", "variance")
            ]
            y = self.graph.node("BatchNormalization", self.name("bn"), y, *parts, epsilon=1e-5)
        extent = dilation * (size - 1) + 1
        height, width = self._sizes(section, x, extent, strides, 2 * pad)
        return Map(self.activation(section, y, "logistic"), filters, height, width)

    def pool(self, section: Section) -> Map:
        """Greatest value or mean; padded by size − 1 in all unless told otherwise, the smaller half in front."""
        x, strides = self.previous(section), self._strides(section)
        size = section.integer("size", section.integer("stride", 1, 1), 1)
        pad = section.integer("padding", size - 1, 0, 2 * (size - 1))
        attributes = {"kernel_shape": [size] * 2, "strides": strides, "pads": [pad // 2] * 2 + [pad - pad // 2] * 2}
        op = "MaxPool" if section.name == "maxpool" else "AveragePool"
        y = self.graph.node(op, self.name("pool"), x.tensor, **attributes)
        return Map(y, x.channels, *self._sizes(section, x, size, strides, pad))

    def avgpool(self, section: Section) -> Map:
        """Mean over all positions."""
        x = self.previous(section)
        return Map(self.graph.node("GlobalAveragePool", self.name("avgpool"), x.tensor), x.channels, 1, 1)

    def upsample(self, section: Section) -> Map:
        """Repeat every value ``stride`` times in both directions."""
        x = self.previous(section)
        stride = section.integer("stride", 2, 1, 1024)
        scales = gs.Constant(self.name("scales"), np.array([1, 1, stride, stride], np.float32))
        modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        y = self.graph.node("Resize", self.name("upsample"), x.tensor, gs.Variable.empty(), scales, **modes)
        return Map(y, x.channels, x.height * stride, x.width * stride)

    def route(self, section: Section) -> Map:
        """Join the channels of other layers, or of one group of each."""
        maps = [self.layer(section, index) for index in section.integers("layers")]
        groups = section.integer("groups", 1, 1)
        group = section.integer("group_id", 0, 0, groups - 1)
        for x in maps:
            if x.shape[1:] != maps[0].shape[1:]:
                raise section.wrong(f"joins maps of {maps[0]} and {x}, expected equal height and width")
            if x.channels % groups:
                raise section.wrong(f"groups={groups}, expected a divisor of {x.channels} channels")
        parts = [self._group(x, k, groups, group) if groups > 1 else x.tensor for k, x in enumerate(maps)]
        y = parts[0] if len(parts) == 1 else self.graph.node("Concat", self.name("route"), *parts, axis=1)
        return Map(y, sum(x.channels for x in maps) // groups, *maps[0].shape[1:])

    def _group(self, x: Map, k: int, groups: int, group: int) -> gs.Variable:
        count = x.channels // groups
        numbers = {"starts": count * group, "ends": count * (group + 1), "axes": 1}
        bounds = [gs.Constant(self.name(f"group{k}.{key}"), np.array([n])) for key, n in numbers.items()]
        return self.graph.node("Slice", self.name(f"group{k}"), x.tensor, *bounds)

    def shortcut(self, section: Section) -> Map:
        """Add other layers of the same shape to the previous one."""
        x = self.previous(section)
        y = x.tensor
        for k, index in enumerate(section.integers("from")):
            other = self.layer(section, index)
            if other.shape != x.shape:
                raise section.unsupported(f"adds maps of {x} and {other}, expected equal shapes")
            y = self.graph.node("Add", self.name(f"add{k}"), y, other.tensor)
        return x._replace(tensor=self.activation(section, y, "linear"))

    def scaled(self, section: Section) -> Map:
        """Multiply another layer with the previous one: ``[sam]`` by position, ``[scale_channels]`` by channel."""
        x, other = self.previous(section), self.layer(section, section.integer("from", 0, -(2**31)))
        if x.shape != (other.shape if section.name == "sam" else (other.channels, 1, 1)):
            raise section.wrong(f"multiplies maps of {other} and {x}, which do not fit")
        y = self.graph.node("Mul", self.name(section.name), other.tensor, x.tensor)
        return other._replace(tensor=self.activation(section, y, "linear"))

    def dropout(self, section: Section) -> Map:
        """Nothing: dropout acts in training only."""
        return self.previous(section)

    def yolo(self, section: Section) -> None:
        """Make the map in front an output and note how it is decoded."""
        x = self.previous(section)
        classes, mask = section.integer("classes", 20, 1), section.integers("mask")
        sizes = section.numbers("anchors")
        anchors = [[int(v) if v == int(v) else v for v in pair] for pair in zip(sizes[::2], sizes[1::2], strict=False)]
        if len(sizes) % 2 or not all(0 <= k < len(anchors) for k in mask):
            raise section.wrong(f"{len(sizes)} anchor numbers and mask={section.options['mask']}, which do not fit")
        if x.channels != len(mask) * (classes + 5):
            raise section.wrong(f"{x.channels} channels, expected {len(mask)} anchors × ({classes} classes + 5)")
        if any(x.tensor is head.tensor for head in self.heads.values()) or x is self.image:
            raise section.unsupported("takes no convolution of its own, expected one in front of each head")
        if (
            self.decoding.setdefault("classes", classes) != classes
            or self.decoding.setdefault("anchors", anchors) != anchors
        ):
            raise section.unsupported("classes or anchors differ from those of the heads above")
        head = {"mask": mask, "stride": self.image.width // x.width, "scale_x_y": section.real("scale_x_y", 1)}
        if section.integer("new_coords", 0):
            head["new_coords"] = True
        name = f"out{len(self.heads)}"
        self.heads[name], self.decoding[name] = x, head

    @staticmethod
    def _strides(section: Section) -> list[int]:
        stride = section.integer("stride", 1, 1)
        return [section.integer(key, stride, 1) for key in ("stride_y", "stride_x")]

    @staticmethod
    def _sizes(section: Section, x: Map, extent: int, strides: Sequence[int], pad: int) -> tuple[int, int]:
        height, width = ((n + pad - extent) // s + 1 for n, s in zip(x.shape[1:], strides, strict=True))
        if height < 1 or width < 1:
            raise section.wrong(f"a window of {extent} does not fit a map of {x}")
        return height, width

    def export(self) -> onnx.ModelProto:
        """Return the model: its heads, or its last layer where it has none."""
        last = self.layers[-1] if self.layers else None
        outputs = self.heads or ({"output": last} if last else {})
        if not outputs or any(x.tensor is self.image.tensor for x in outputs.values()):
            raise ModelError("the network computes nothing, expected at least one layer below [net]")
        metadata = {"yolo": self.decoding} if self.heads else {}
        return self.graph.export({name: (x.tensor, x.shape) for name, x in outputs.items()}, metadata)


LAYERS: dict[str, Callable[[Importer, Section], Map | None]] = {
    "convolutional": Importer.convolutional,
    "maxpool": Importer.pool,
    "local_avgpool": Importer.pool,
    "avgpool": Importer.avgpool,
    "upsample": Importer.upsample,
    "route": Importer.route,
    "shortcut": Importer.shortcut,
    "sam": Importer.scaled,
    "scale_channels": Importer.scaled,
    "dropout": Importer.dropout,
    "yolo": Importer.yolo,
}


def assemble(
    sections: Sequence[Section], weights: Weights, size: int | None, half: bool = False, name: str = "darknet"
) -> Importer:
    """Return an importer that has added every section."""
    importer = Importer(sections[0], weights, size, half, name)
    for section in sections[1:]:
        importer.add(section)
    return importer


def count_weights(sections: Sequence[Section]) -> int:
    """Return how many floats a network's weights file holds."""
    counted = CountedWeights()
    assemble(sections, counted, None)
    return counted.count


def build(
    sections: Sequence[Section],
    weights: WeightsFile | None = None,
    *,
    size: int | None = None,
    seed: int = 0,
    half: bool = False,
    name: str = "darknet",
) -> onnx.ModelProto:
    """Build the model of a darknet network.

    Args:
        sections: The network, ``[net]`` first.
        weights: Its weights; random ones where None.
        size: Height and width in pixels in place of those in ``[net]``.
        seed: Seed of the random weights.
        half: Store the weights as float16 (see ModelGraph).
        name: Name of the graph.

    Raises:
        ModelError: The network is not valid, or the weights file has too few or too many floats for it.
        UnsupportedModelError: The network has a layer, an option or an activation that is not known here.
    """
    if size is not None and not 1 <= size < 2**31:
        raise ModelError(f"size is {size} pixels, expected 1 or more")
    needed = count_weights(sections)
    if weights is None:
        return assemble(sections, RandomWeights(seed), size, half, name).export()
    if difference := weights.floats.size - needed:
        raise ModelError(
            f"{weights.name}: {weights.floats.size:,} floats, expected {needed:,} for this network: "
            f"{abs(difference):,} are {'left over' if difference > 0 else 'missing'}; use the weights of this cfg"
        )
    return assemble(sections, FileWeights(weights.floats), size, half, name).export()


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cfg", type=Path, help="darknet's network definition")
    parser.add_argument("weights", type=Path, nargs="?", help="its weights (seeded random ones without)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--size", type=int, help="height and width in pixels in place of the cfg's")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights")
    parser.add_argument("--half", action="store_true", help="store the weights as float16 behind Cast nodes")
    options = parser.parse_args()
    try:
        weights = read_weights(options.weights) if options.weights else None
        common = {"size": options.size, "seed": options.seed, "half": options.half, "name": options.cfg.stem}
        write(options.out, build(read_cfg(options.cfg), weights, **common))
    except RerampileError as error:
        sys.exit(f"error: {error}")
    print(options.out)


if __name__ == "__main__":
    main()
