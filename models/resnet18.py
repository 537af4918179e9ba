"""Build ResNet18 as ONNX, without torch: CIFAR-10 or ImageNet stem, any width, any number of classes.

The weights are seeded He-normal ones, or those of a torch state dict as numpy arrays; initializers have torch's names
(``layer1.0.conv1.weight``). BatchNormalization nodes are kept as exporters leave them: folding is the compiler's work.

Example:
    python models/resnet18.py -o resnet18.onnx --stem imagenet --classes 1000
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from model_graph import ModelGraph, write

from rerampile.errors import ConfigError, ModelError, RerampileError, did_you_mean

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_METADATA = {"classes": CIFAR10_CLASSES, "mean": CIFAR10_MEAN, "std": CIFAR10_STD}
"""What a caller needs to feed the model: it takes (RGB / 255 − mean) / std."""


class Stem(NamedTuple):
    """How the network begins: the first convolution, a max pool or none, and the usual image size in pixels."""

    kernel: int
    stride: int
    pool: bool
    size: int


STEMS = {"cifar": Stem(3, 1, False, 32), "imagenet": Stem(7, 2, True, 224)}


class Block(NamedTuple):
    """One residual block of two 3 × 3 convolutions; one with a stride has a 1 × 1 convolution as its shortcut."""

    name: str
    inputs: int
    outputs: int
    stride: int


def blocks(width: int) -> list[Block]:
    """Return the eight blocks in order; the first stage has ``width`` channels and each next one twice as many."""
    stages = [Block(f"layer{k + 1}.0", width << max(k - 1, 0), width << k, 2 if k else 1) for k in range(4)]
    return [b for first in stages for b in (first, Block(f"{first.name[:-1]}1", first.outputs, first.outputs, 1))]


def convolutions(width: int, stem: Stem) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """Yield the name of each convolution, of the normalisation behind it, and the weight shape [out, in, k, k]."""
    yield "conv1", "bn1", (width, 3, stem.kernel, stem.kernel)
    for name, inputs, outputs, stride in blocks(width):
        yield f"{name}.conv1", f"{name}.bn1", (outputs, inputs, 3, 3)
        yield f"{name}.conv2", f"{name}.bn2", (outputs, outputs, 3, 3)
        if stride > 1:
            yield f"{name}.downsample.0", f"{name}.downsample.1", (outputs, inputs, 1, 1)


def parameter_shapes(width: int, classes: int, stem: Stem) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its torch name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv, norm, shape in convolutions(width, stem):
        shapes[f"{conv}.weight"] = shape
        shapes |= {f"{norm}.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"fc.weight": (classes, 8 * width), "fc.bias": (classes,)}


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return He-normal float32 weights; normalisations start as the identity."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) > 1:
            return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / math.prod(shape[1:])))
        return np.full(shape, name.endswith(("weight", "running_var")), np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def checked(weights: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the weights as float32 arrays of exactly the expected names and shapes.

    Raises:
        ModelError: A parameter is missing, unknown or of another shape.
    """
    known = {name: array for name, array in weights.items() if not name.endswith("num_batches_tracked")}
    if missing := [name for name in shapes if name not in known]:
        raise ModelError(f"weights: {len(missing)} parameters are missing, the first is '{missing[0]}'")
    for name, array in known.items():
        if name not in shapes:
            raise ModelError(f"weights: unknown parameter '{name}'{did_you_mean(name, shapes)}")
        if array.shape != shapes[name]:
            raise ModelError(f"weights: '{name}' has shape {list(array.shape)}, expected {list(shapes[name])}")
    return {name: np.ascontiguousarray(known[name], np.float32) for name in shapes}


def build(
    *,
    width: int = 64,
    classes: int = 10,
    stem: str = "cifar",
    size: int | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    half: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Build ResNet18: input ``input`` float32 [N, 3, size, size], output ``logits`` float32 [N, classes].

    Args:
        width: Channels of the first stage; 64 is the ResNet18 of the literature.
        classes: Number of classes.
        stem: ``cifar`` (3 × 3, stride 1, no pool) or ``imagenet`` (7 × 7, stride 2, max pool).
        size: Height and width of the images in pixels; the stem's usual one where None.
        weights: Parameters by torch's names; random ones where None.
        seed: Seed of the random weights.
        half: Store the weights as float16 (see ModelGraph).
        metadata: Metadata properties for the model.
    """
    if stem not in STEMS:
        raise ConfigError(f"unknown stem '{stem}'{did_you_mean(stem, STEMS)}")
    start = STEMS[stem]
    size = start.size if size is None else size
    for name, value in (("width", width), ("classes", classes), ("size", size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")
    shapes = parameter_shapes(width, classes, start)
    values = random_weights(shapes, seed) if weights is None else checked(weights, shapes)
    graph = ModelGraph("resnet18", "input", (3, size, size), half=half)
    logits = _classifier(graph, values, _trunk(graph, values, width, start))
    return graph.export({"logits": (logits, (classes,))}, metadata or {})


def _trunk(graph: ModelGraph, values: Mapping[str, np.ndarray], width: int, stem: Stem) -> gs.Variable:
    """Add everything up to the last feature map."""

    def conv_bn(conv: str, norm: str, x: gs.Variable, stride: int) -> gs.Variable:
        weight = values[f"{conv}.weight"]
        kernel = weight.shape[2:]
        pads = [k // 2 for k in kernel] * 2
        kernel_input = graph.constant(f"{conv}.weight", weight)
        y = graph.node("Conv", conv, x, kernel_input, kernel_shape=list(kernel), strides=[stride] * 2, pads=pads)
        parts = (f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))
        constants = [graph.constant(part, values[part]) for part in parts]
        return graph.node("BatchNormalization", norm, y, *constants, epsilon=1e-5)

    x = graph.node("Relu", "relu", conv_bn("conv1", "bn1", graph.input, stem.stride))
    if stem.pool:
        x = graph.node("MaxPool", "maxpool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for name, _, _, stride in blocks(width):
        y = graph.node("Relu", f"{name}.relu1", conv_bn(f"{name}.conv1", f"{name}.bn1", x, stride))
        y = conv_bn(f"{name}.conv2", f"{name}.bn2", y, 1)
        if stride > 1:
            x = conv_bn(f"{name}.downsample.0", f"{name}.downsample.1", x, stride)
        x = graph.node("Relu", f"{name}.relu2", graph.node("Add", f"{name}.add", y, x))
    return x


def _classifier(graph: ModelGraph, values: Mapping[str, np.ndarray], x: gs.Variable) -> gs.Variable:
    """Add the mean over positions and the linear layer."""
    x = graph.node("Flatten", "flatten", graph.node("GlobalAveragePool", "avgpool", x), axis=1)
    weight, bias = (graph.constant(name, values[name]) for name in ("fc.weight", "fc.bias"))
    return graph.node("Gemm", "fc", x, weight, bias, transB=1)


def main() -> None:
    """Parse the command line and write a model with random weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--stem", default="cifar", help="cifar or imagenet")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (64 is ResNet18)")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--size", type=int, help="image height and width in pixels (32 or 224, after the stem)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true", help="store the weights as float16 behind Cast nodes")
    options = vars(parser.parse_args())
    out = options.pop("out")
    try:
        write(out, build(**options))
    except RerampileError as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
