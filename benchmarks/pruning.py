"""What pruning one layer costs and how near it stays, for every engine.

The inputs are made up but correlated as those of a 3 x 3 convolution behind a ReLU: neighbouring pixels alike, channels
mixed. The loss is the mean squared change of the outputs over their mean square. The yardstick is magnitude pruning
with the best weights on its support: what engines take is a multiple of its processor time, which other work on the
machine disturbs less than the clock.

Example:
    python benchmarks/pruning.py                    # 576 inputs x 64 outputs and 4,608 x 512
    python benchmarks/pruning.py --large            # 4,608 x 1,024 too, the largest of YOLOv4
    python benchmarks/pruning.py --only 576x64 --engines admm
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rerampile.passes.pruning.constraint import Sparsity
from rerampile.passes.pruning.engine import ENGINES, magnitude
from rerampile.passes.pruning.problem import LayerProblem, layer_problem
from rerampile.passes.pruning.refit import refit

LAYERS = {"576x64": (576, 64), "4608x512": (4608, 512), "4608x1024": (4608, 1024)}
RATIOS = (0.5, 0.7, 0.8, 0.9)
YARDSTICK = "magnitude + refit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the largest layer too")
    parser.add_argument("--only", choices=LAYERS, help="this layer")
    parser.add_argument(
        "--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="these engines (all)"
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="pruning ratios (0.5 0.7 0.8 0.9)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(Path(options.child[0]), options.child[1], options.ratios)
        return
    names = [options.only] if options.only else [name for name in LAYERS if options.large or name != "4608x1024"]
    losses = " | ".join(f"loss at {ratio:.0%}" for ratio in options.ratios)
    print(f"| layer | engine | seconds | processor seconds | of {YARDSTICK} | peak memory | {losses} |")
    print("|---" * (6 + len(options.ratios)) + "|", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), *LAYERS[name])
            unit = 0.0
            for engine in (YARDSTICK, *options.engines):
                seconds, busy, peak, found = in_a_process(Path(folder), engine, options.ratios)
                unit = unit or busy
                cells = " | ".join(f"{loss:.5f}" for loss in found)
                cost = f"{seconds:.2f} | {busy:.2f} | **{busy / unit:.1f} ×** | {peak / 1024:,.0f} MB"
                print(f"| {name} | {engine} | {cost} | {cells} |", flush=True)


def make(folder: Path, inputs: int, outputs: int) -> None:
    """Write weights and the second moment of inputs that look like those of a convolution."""
    rng = np.random.default_rng(0)
    channels = inputs // 9
    at = np.stack(np.unravel_index(np.arange(9), (3, 3)), axis=1)
    near = np.exp(-np.linalg.norm(at[:, None] - at[None], axis=2) / 1.5)
    pixels = np.linalg.cholesky(near).astype(np.float32)
    mix = rng.standard_normal((channels, channels), dtype=np.float32) * np.arange(1, channels + 1) ** -0.5
    moment = np.zeros((inputs, inputs))
    batches = 4
    for _ in range(batches):
        noise = rng.standard_normal((inputs // 2, channels, 9), dtype=np.float32)
        samples = np.maximum(mix @ noise @ pixels.T - 0.5, 0).reshape(len(noise), inputs)
        moment += samples.T @ samples / (batches * len(noise))
    np.save(folder / "moment.npy", moment)
    np.save(folder / "weights.npy", rng.laplace(size=(outputs, inputs)).astype(np.float32))


def in_a_process(folder: Path, engine: str, ratios: list[float]) -> tuple[float, float, int, list[float]]:
    """Return what a process of its own takes: mean seconds of a ratio, of the clock and of processors, and peak KiB.

    The loss at each ratio comes last.
    """
    command = [sys.executable, __file__, "--child", str(folder), engine, "--ratios", *map(str, ratios)]
    seconds, busy, peak, losses = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return seconds, busy, peak, losses


def measure(folder: Path, engine: str, ratios: list[float]) -> None:
    weights, moment = np.load(folder / "weights.npy")[None], np.load(folder / "moment.npy")[None]
    spent = np.zeros(2)
    problem = timed(spent, lambda: layer_problem(weights, moment))
    spent *= len(ratios)  # the mean below is of ratios, and each would have to be prepared
    energy, losses = problem.loss(np.zeros_like(problem.weights)), []
    for ratio in ratios:
        found = timed(spent, partial(prune, problem, engine, Sparsity(ratio)))
        losses.append(problem.loss(found) / energy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([*(spent / len(ratios)), peak, losses]))


def prune(problem: LayerProblem, engine: str, constraint: Sparsity) -> np.ndarray:
    if engine == YARDSTICK:
        return refit(problem, magnitude(problem, constraint), constraint)
    return ENGINES[engine](problem, constraint)


def timed(spent: np.ndarray, work: Callable[[], Any]) -> Any:
    """Do work and add what it took, by the clock and of processors."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = work()
    spent += np.array([time.perf_counter(), time.process_time()]) - start
    return result


if __name__ == "__main__":
    main()
