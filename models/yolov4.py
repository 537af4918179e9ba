"""Write YOLOv4 as ONNX: CSPDarknet53 with Mish, spatial pyramid pooling, path aggregation, three raw heads.

The definition below is darknet's own YOLOv4 layer by layer (64,296,032 convolution weights with 80 classes), so the
official ``yolov4.weights`` fits it; it goes through the importer in ``darknet.py``. Without weights they are random.

Example:
    python models/yolov4.py yolov4.weights -o yolov4.onnx --size 416
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import darknet
import onnx
from darknet import Section
from model_graph import write

from rerampile.errors import ConfigError, RerampileError

ANCHORS = "12,16,19,36,40,28,36,75,76,55,72,146,142,110,192,243,459,401"
BRANCHES = {54: 128, 85: 256}
"""Channels that the neck takes from the backbone's layers, by darknet's layer number."""


class Definition:
    """A list of darknet sections, written with one short call a layer."""

    def __init__(self, classes: int) -> None:
        self.sections = [Section("net", "yolov4", {"width": "608", "height": "608", "channels": "3"})]
        self.classes = classes

    def add(self, name: str, **options: object) -> None:
        """Add a section."""
        where = f"yolov4, layer {len(self.sections) - 1}"
        self.sections.append(Section(name, where, {key: str(value) for key, value in options.items()}))

    def conv(self, filters: int, size: int, stride: int = 1, activation: str = "leaky") -> None:
        """Add a convolution, batch-normalised unless it is linear."""
        options = {"filters": filters, "size": size, "stride": stride, "pad": 1, "activation": activation}
        self.add("convolutional", batch_normalize=int(activation != "linear"), **options)

    def route(self, *layers: int) -> None:
        """Join layers."""
        self.add("route", layers=",".join(map(str, layers)))

    def stage(self, filters: int, inner: int, squeezed: int, blocks: int) -> None:
        """Halve the map, then split it: one half goes through residual blocks, the other around them."""
        self.conv(filters, 3, 2, "mish")
        self.conv(inner, 1, 1, "mish")
        self.route(-2)
        self.conv(inner, 1, 1, "mish")
        for _ in range(blocks):
            self.conv(squeezed, 1, 1, "mish")
            self.conv(inner, 3, 1, "mish")
            self.add("shortcut", **{"from": -3})
        self.conv(inner, 1, 1, "mish")
        self.route(-1, -(3 * blocks + 4))
        self.conv(filters, 1, 1, "mish")

    def alternate(self, filters: int, count: int) -> None:
        """Add ``count`` convolutions, in turn 1 × 1 and, with twice the filters, 3 × 3."""
        for k in range(count):
            self.conv(filters << k % 2, 1 + 2 * (k % 2))

    def pyramid(self) -> None:
        """Pool over windows of 5, 9 and 13 and join all with the map itself."""
        for k, size in enumerate((5, 9, 13)):
            if k:
                self.route(-2 * k)
            self.add("maxpool", size=size, stride=1)
        self.route(-1, -3, -5, -6)

    def head(self, filters: int, first_anchor: int, scale: float) -> None:
        """Add one detection head."""
        self.conv(filters, 3)
        self.conv(3 * (self.classes + 5), 1, 1, "linear")
        mask = ",".join(str(first_anchor + k) for k in range(3))
        self.add("yolo", mask=mask, anchors=ANCHORS, classes=self.classes, num=9, scale_x_y=scale)


def definition(classes: int = 80) -> list[Section]:
    """Return the sections of YOLOv4."""
    net = Definition(classes)
    net.conv(32, 3, 1, "mish")
    net.stage(64, 64, 32, 1)
    for filters, blocks in ((128, 2), (256, 8), (512, 8), (1024, 4)):
        net.stage(filters, filters // 2, filters // 2, blocks)
    net.alternate(512, 3)
    net.pyramid()
    net.alternate(512, 3)
    for layer in sorted(BRANCHES, reverse=True):
        filters = BRANCHES[layer]
        net.conv(filters, 1)
        net.add("upsample", stride=2)
        net.route(layer)
        net.conv(filters, 1)
        net.route(-1, -3)
        net.alternate(filters, 5)
    net.head(256, 0, 1.2)
    for filters, back, first_anchor, scale in ((256, -16, 3, 1.1), (512, -37, 6, 1.05)):
        net.route(-4)
        net.conv(filters, 3, 2)
        net.route(-1, back)
        net.alternate(filters, 5)
        net.head(2 * filters, first_anchor, scale)
    return net.sections


def build(
    weights: darknet.WeightsFile | None = None, *, size: int = 608, classes: int = 80, seed: int = 0, half: bool = False
) -> onnx.ModelProto:
    """Build YOLOv4 for images of ``size`` × ``size`` pixels, a multiple of 32 (darknet's are 416, 512 and 608)."""
    if size < 32 or size % 32:
        raise ConfigError(f"size is {size} pixels, expected a multiple of 32 such as 416 or 608")
    return darknet.build(definition(classes), weights, size=size, seed=seed, half=half, name="yolov4")


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?", help="darknet's yolov4.weights (random weights without)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--size", type=int, default=608, help="height and width in pixels, a multiple of 32")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights")
    parser.add_argument("--half", action="store_true", help="store the weights as float16 behind Cast nodes")
    options = vars(parser.parse_args())
    weights, out = options.pop("weights"), options.pop("out")
    try:
        write(out, build(darknet.read_weights(weights) if weights else None, **options))
    except RerampileError as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
