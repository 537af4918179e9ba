"""How long simulated chips take, as multiples of plain ONNX Runtime on the same images.

A chip is drawn, injected, run on all images and undone: in fp32, the fast and the slow way, from analog cells, and in
int8 from cells of 16 levels. The yardstick runs the deployed model itself in fp32 on the same images, with the same
threads and batch. All alternate in one process, and medians of the ratios are shown, because machines vary by more than
what is measured. Where PyTorch is installed, its usual loop is timed beside them: faults drawn as dense masks of both
cells into a copy of the weights, and the exported model's operators one by one.

Example:
    python benchmarks/execution.py                          # ResNet18 for CIFAR, 1,000 images a chip
    python benchmarks/execution.py --stem imagenet --images 64 --batch 4
    python benchmarks/execution.py --model yolov4-tiny.onnx --images 64 --batch 4 --ways fast int8
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rerampile import Deployment, Target, compile_model
from rerampile.onnx_file import load_model_file
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.inputs import fitting_inputs
from rerampile.runtime.session import open_session, run

MODELS = Path(__file__).resolve().parent.parent / "models"
STUCK_OFF, STUCK_ON = (share / 6.2 for share in (1, 5.2))

Batches = list[dict[str, np.ndarray]]


class Chips:
    """Simulated chips of a deployment, one after another on the same images."""

    def __init__(self, way: str, deployment: Deployment, batches: Batches, rate: float, threads: int) -> None:
        self.deployment, self.batches = deployment, batches
        options: dict[str, Any] = {"method": way}
        if way == "int8":
            options = {"precision": "int8", "calibration": batches[:2]}
        self.executor = open_executor(deployment, threads=threads, **options)
        self.model = FaultModel(stuck_off=rate * STUCK_OFF, stuck_on=rate * STUCK_ON)
        self.injector, self.geometry = Injector(deployment), ChipGeometry.of(deployment)
        self.number, self.drawing, self.setting = 0, 0.0, 0.0

    def run_one(self) -> None:
        """Draw, inject, run and undo the next chip; note how long drawing and setting up took."""
        start = time.perf_counter()
        found = draw_faults(self.geometry, self.model, self.deployment.target, seed=0, run=self.number)
        faults = self.injector.faults(found)
        drawn = time.perf_counter()
        self.executor.apply(faults)
        applied = time.perf_counter()
        runs = [seconds(partial(self.executor.run, batch)) for batch in self.batches]
        ran = time.perf_counter()
        self.executor.restore()
        self.number += 1
        slow = self.executor.method == "slow"  # it opens its session when it first runs
        opening = runs[0] - statistics.median(runs[1:] or runs) if slow else 0.0
        self.drawing, self.setting = drawn - start, applied - drawn + opening + time.perf_counter() - ran


def clean(session: Any, batches: Batches) -> None:
    """Run all images on the deployed model."""
    for batch in batches:
        run(session, batch)


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def torch_loop(model: Path, batches: Batches, rate: float, threads: int) -> Callable[[], None] | None:
    """Return the usual PyTorch loop for one chip of an exported model, or None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    from rerampile.training.torch_graph import TorchGraph

    torch.set_num_threads(threads)
    exported = gs.import_onnx(onnx.load(model)).fold_constants().cleanup()  # casts of stored weights
    weighty = [node for node in exported.nodes if node.op in ("Conv", "Gemm", "MatMul")]
    network = TorchGraph(load_model_file(gs.export_onnx(exported)))
    weights = {node.inputs[1].name: torch.from_numpy(node.inputs[1].values.copy()) for node in weighty}
    images = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]

    def one_chip() -> None:
        with torch.inference_mode():
            faulty = {}
            for name, w in weights.items():
                scale = w.abs().amax()
                plus, minus = 1 - (-w / scale).clamp(min=0), 1 - (w / scale).clamp(min=0)
                for cell in (plus, minus):
                    u = torch.rand_like(cell)
                    cell[u < rate * STUCK_OFF] = 0.0
                    cell[u >= 1 - rate * STUCK_ON] = 1.0
                faulty[name] = (plus - minus) * scale
            for batch in images:
                network.run(batch, faulty)

    return one_chip


def measure(model: Path, deployments: dict[str, Deployment], options: argparse.Namespace) -> None:
    """Print the table of one model; its deployments by way."""
    import onnxruntime as ort

    deployment = next(iter(deployments.values()))
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session = open_session(deployment.model_path, session_options)
    batches = make_batches(session, options.images, options.batch)
    torch_chip = torch_loop(model, batches, options.rate, options.threads)
    ways = {way: Chips(way, d, batches, options.rate, options.threads) for way, d in deployments.items()}
    work: dict[str, Callable[[], None]] = {way: chips.run_one for way, chips in ways.items()}
    if torch_chip is not None:
        work["PyTorch loop"] = torch_chip
    ratios: dict[str, list[float]] = {name: [] for name in work}
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    clean(session, batches[:1])
    yardsticks = [seconds(partial(clean, session, batches))]
    for _ in range(options.rounds):
        for name, one_chip in work.items():  # between two yardsticks: drifts cancel
            spent = seconds(one_chip)
            yardsticks.append(seconds(partial(clean, session, batches)))
            ratios[name].append(2 * spent / (yardsticks[-2] + yardsticks[-1]))
        for way, chips in ways.items():
            parts[way].append((1e3 * chips.drawing, 1e3 * chips.setting))
    weights = deployment.plan.totals.weights
    print(f"{weights / 1e6:.1f} M weights, {options.images} images a chip, batch {options.batch}, f = {options.rate:g}")
    print(f"{'plain ONNX Runtime':<20}1.000 ({statistics.median(yardsticks):.3f} s)")
    for name, found in ratios.items():
        low, high = min(found), max(found)
        print(f"{name:<20}{statistics.median(found):.3f} ({low:.3f} to {high:.3f} in {len(found)} rounds)")
    for way, spent_parts in parts.items():
        draw, setting = (statistics.median(column) for column in zip(*spent_parts, strict=True))
        print(f"{way}: a chip is set up in {draw + setting:.1f} ms, {draw:.1f} to draw its faults and inject them")


def make_batches(session: Any, images: int, size: int) -> Batches:
    """Return random images in batches, as the model's first input wants them."""
    inputs, _ = fitting_inputs(session, 0)
    (name, example), *others = inputs.items()
    if others:
        raise SystemExit(f"expected a model of one input, found {len(inputs)}")
    rng = np.random.default_rng(0)
    sizes = [size] * (images // size) + ([images % size] if images % size else [])
    return [{name: rng.standard_normal((count, *example.shape[1:]), dtype=np.float32)} for count in sizes]


def main() -> None:
    """Compile a model, and time chips of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an ONNX model of one input with a free batch (default: ResNet18)")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar", help="of ResNet18")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.01, help="failure rate of a cell")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["fast", "slow", "int8"], choices=("fast", "slow", "int8"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "resnet18.onnx"
        if options.model is None:
            arguments = ["-o", str(model), "--stem", options.stem]
            subprocess.run([sys.executable, str(MODELS / "resnet18.py"), *arguments], check=True)
        targets = {way: Target.load("paper", {"cell.levels": 16} if way == "int8" else {}) for way in options.ways}
        folder = Path(scratch)
        ways = {way: compile_model(model, out=folder / way, target=targets[way]) for way in options.ways}
        measure(model, ways, options)


if __name__ == "__main__":
    main()
