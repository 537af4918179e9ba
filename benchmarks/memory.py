"""How much memory a process takes for simulated chips, beyond the libraries: for a moment, and with chips.

Each way runs in a process of its own, which first runs a small deployment the same way, so that libraries are loaded.
A worker is handed the layout of the weights, or the model in int8, as `rerampile validate --jobs` does; the process
that starts the workers finds them (`fast`, `int8`). Linux only.

Example:
    python benchmarks/memory.py
    python benchmarks/memory.py --ways worker
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rerampile import Deployment, Target, compile_model, load_deployment
from rerampile.errors import FaultRunError
from rerampile.runtime.executor import Executor, open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector

MODELS = Path(__file__).resolve().parent.parent / "models"
WAYS = ("worker", "int8-worker", "fast", "slow", "int8")
BATCH = 32
ALIVE = 4  # activations at once: what a residual block reads, holds and writes, and a kernel's workspace
LARGEST = 4 * BATCH * 64 * 32 * 32  # bytes of the largest activation of ResNet18 for CIFAR
MIB = 1 << 20
IMAGES = {"input": np.zeros((BATCH, 3, 32, 32), np.float32)}


def anonymous() -> int:
    """Return the bytes of this process that no file holds: pages of the deployment's files are shared and can go."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Watches the memory of this process from another thread, each millisecond."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, anonymous())


def open_way(way: str, deployment: Deployment, images: dict[str, np.ndarray], layout: Any) -> Executor:
    """Open a deployment in one of the ways."""
    if way.startswith("int8"):
        return open_executor(deployment, precision="int8", calibration=[images], layout=layout, threads=2)
    method: Any = "slow" if way == "slow" else "fast"
    return open_executor(deployment, method=method, layout=layout, threads=2)


def layout_of(way: str, folder: Path) -> Any:
    """Return what workers are handed."""
    return open_way(way, load_deployment(folder), IMAGES, None).layout


def run_chips(executor: Executor, deployment: Deployment, images: dict[str, np.ndarray], chips: int) -> None:
    """Run chips at a failure rate of 0.01."""
    model = FaultModel.of_rate(0.01)
    injector, geometry = Injector(deployment), ChipGeometry.of(deployment)
    for chip in range(chips):
        executor.apply(injector.faults(draw_faults(geometry, model, deployment.target, seed=0, run=chip)))
        executor.run(images)
        executor.restore()


def measure(way: str, small: Path, large: Path, layouts: Sequence[Any]) -> tuple[int, int]:
    """Return the bytes that one way takes while it is opened, and with chips."""
    warm = load_deployment(small)
    run_chips(open_way(way, warm, IMAGES, layouts[0]), warm, IMAGES, 1)
    before = anonymous()
    deployment = load_deployment(large)
    with Peak() as opening:
        executor = open_way(way, deployment, IMAGES, layouts[1])
    with Peak() as running:
        run_chips(executor, deployment, IMAGES, 3)
    return opening.bytes - before, running.bytes - before


def main() -> None:
    """Compile ResNet18 twice, narrow and as it is, and measure each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        folder = Path(scratch)
        for width in (4, 64):
            model = folder / f"{width}.onnx"
            words = ["-o", str(model), "--width", str(width)]
            subprocess.run([sys.executable, str(MODELS / "resnet18.py"), *words], check=True, stdout=subprocess.DEVNULL)
            for way, target in (("int8", Target.load("paper", {"cell.levels": 16})), ("fp32", Target.load("paper"))):
                compile_model(model, out=folder / f"{way}-{width}", target=target)
        limit = 2 * 4 * load_deployment(folder / "fp32-64").plan.totals.weights + ALIVE * LARGEST
        print(f"two copies of the weights and the activations: {limit / MIB:.0f} MiB")
        for way in options.ways:
            kind = "int8" if way.startswith("int8") else "fp32"
            folders = [folder / f"{kind}-{width}" for width in (4, 64)]
            finder = kind.replace("fp32", "fast")
            try:
                layouts = [layout_of(finder, f) if way.endswith("worker") else None for f in folders]
                opening, running = pool.apply(measure, (way, *folders, layouts))
            except FaultRunError as error:  # int8, where the processor has no exact products
                print(f"{way}: {error}")
                continue
            print(f"{way}: {opening / MIB:.0f} MiB while it opens, {running / MIB:.0f} MiB with chips", flush=True)


if __name__ == "__main__":
    main()
