"""How long the calibration pass of pruning takes and how much memory, beside a plain run of the same images.

Example:
    python benchmarks/calibration.py models/resnet18_cifar10.onnx --data cifar10:DIR@train --images 1024
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from rerampile.graph import ModelGraph
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.runtime.data import open_dataset
from rerampile.runtime.dataset import spread
from rerampile.runtime.second_moments import second_moments
from rerampile.runtime.session import open_session, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="generated:64", help="as rerampile validate takes it")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int)
    asked = parser.parse_args()

    session = open_session(asked.model)
    data = open_dataset(asked.data, session)
    images = spread(len(data), min(asked.images, len(data)))
    graph = ModelGraph(load_model_file(asked.model))
    layers, _ = find_layers(graph)
    start = time.perf_counter()
    found, reasons = second_moments(graph, layers, data, images, batch=asked.batch)
    seconds = time.perf_counter() - start
    sums = sum(moments.moment.nbytes for moments in {id(m): m for m in found.values()}.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plain = 0.0
    for batch in data.batches(asked.batch or 16, images):
        start = time.perf_counter()
        run(session, batch.inputs)
        plain += time.perf_counter() - start
    widest = max(layer.view.inputs for layer in layers)
    print(f"{asked.model.name}: {len(found)} layers of up to {widest} inputs, {len(reasons)} not seen")
    print(f"{len(images)} images: {seconds:.1f} s, plain run {plain:.1f} s, ratio {seconds / plain:.1f}")
    print(f"results {sums / 2**30:.2f} GiB, peak memory of the process {peak / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
