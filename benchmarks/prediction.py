"""How long a prediction takes, as a share of two fault runs on the same machine.

A fault run is one chip as `validate` measures it: drawn, injected, run on all images, scored, undone; what is opened
once for all chips is not counted. The prediction is counted from opening the deployment and its data to its last
number, with the defaults of `predict`. Each is timed between two fault runs, which cancels drifts, and the median of
the ratios is shown.

Example:
    python benchmarks/prediction.py                         # the shipped ResNet18, 1,000 generated images
    python benchmarks/prediction.py --data cifar10:DIR
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rerampile import compile_model
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.predict import predict_experiment

MODEL = Path(__file__).resolve().parent.parent / "models" / "resnet18_cifar10.onnx"
PARTS = ("opening", "calibration run", "noisy runs", "mean chips")


def fault_run(bench: Bench, number: int) -> float:
    """Return how long a chip takes at the highest failure rate."""
    start = time.perf_counter()
    bench.chip(number, bench.rates - 1)
    return time.perf_counter() - start


def prediction(experiment: Experiment) -> list[float]:
    """Return how long each part of a prediction takes."""
    times = [time.perf_counter()]
    layers = 0

    def reached(done: int, steps: int) -> None:
        nonlocal layers
        layers = steps - 1
        times.append(time.perf_counter())

    predict_experiment(replace(experiment, images=None), progress=reached)
    ends = [times[0], times[1], times[2], times[2 + layers], time.perf_counter()]
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--mapping", default="differential")
    parser.add_argument("--data", default="generated", help="as `rerampile validate --data` names it (generated)")
    parser.add_argument("--images", type=int, default=1000, help="images of a fault run (1,000)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        deployment = compile_model(options.model, out=Path(scratch) / "deployment", mapping=options.mapping)
        rates = tuple(FaultModel.of_rate(rate) for rate in (0.001, 0.005, 0.01))
        experiment = Experiment(folder=deployment.folder, faults=rates, data=options.data, images=options.images)
        bench = Bench(experiment)
        fault_run(bench, 0)
        rounds = [
            (fault_run(bench, 2 * k), prediction(experiment), fault_run(bench, 2 * k + 1))
            for k in range(options.rounds)
        ]
    runs = statistics.median(run for before, _, after in rounds for run in (before, after))
    ratios = sorted(sum(parts) / (before + after) for before, parts, after in rounds)
    print(f"{len(bench.images)} images, {len(rates)} failure rates, {len(deployment.plan.layers)} layers")
    print(f"a fault run: {runs:.2f} s")
    for name, times in zip(PARTS, zip(*(parts for _, parts, _ in rounds), strict=True), strict=True):
        print(f"{name}: {statistics.median(times):.2f} s")
    middle = statistics.median(ratios)
    print(f"prediction over two fault runs: {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
