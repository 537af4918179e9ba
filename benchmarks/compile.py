"""How long compiling takes and how much memory, as multiples of reading the model and writing the same bytes.

Each figure comes from fresh processes, which alternate between the compiler and the yardstick; medians are shown, or
the fastest where the machine has other work. The compiler does all its work, decoding every cell from the files
included, but for running the models in ONNX Runtime.

Example:
    python benchmarks/compile.py                    # ResNet18 and YOLOv4; a minute on two cores
    python benchmarks/compile.py --large            # and a model of 300 million weights: 5 GB of disk for a while
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper

PROJECT = Path(__file__).resolve().parent.parent
BUILDERS = {
    "ResNet18": ("resnet18.py", "--stem", "imagenet", "--classes", "1000"),
    "YOLOv4": ("yolov4.py",),
}
LARGE_LAYERS, LARGE_SIZE = 18, 4096
MEGABYTE = 1e6

Pick = Callable[[Iterable[float]], float]


def on_disk(folder: Path) -> float:
    """Return the seconds until the files of a folder are on the disk."""
    start = time.perf_counter()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def yardstick(model: Path, out: Path, conductance_bytes: int) -> float:
    """Return the seconds that it takes to read a model's files and to write as many bytes as its cells take."""
    cells = np.full(conductance_bytes // 4, 1e-4, np.float32)
    start = time.perf_counter()
    files = [np.fromfile(path, np.uint8) for path in sorted(model.parent.glob(f"{model.stem}.*"))]
    cells.tofile(out)
    return time.perf_counter() - start if files else 0.0


def compiled(model: Path, out: Path) -> dict[str, Any]:
    """Compile a model, all but ONNX Runtime's part of the verification; return seconds by pass and sizes."""
    from rerampile import compile_model
    from rerampile.plan import Verification

    def not_run(unit: Any, deployment: Any, errors: tuple[float, float]) -> Verification:
        return Verification(
            max_weight_error=errors[0],
            max_weight_error_of_bound=errors[1],
            onnxruntime="",
            seed=0,
            inputs="none",
            tolerance=0.0,
            outputs=[],
        )

    passes: dict[str, float] = {}

    def progress(number: int, count: int, name: str, seconds: float | None, summary: Any) -> None:
        passes[name] = seconds or 0.0

    start = time.perf_counter()
    with mock.patch("rerampile.runtime.verify._run_both", not_run):
        deployment = compile_model(model, out=out, mapping="differential", progress=progress)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "load": seconds - sum(passes.values()),
        **passes,
        "weights": deployment.plan.totals.weights,
        "conductances": deployment.plan.files["conductances.safetensors"].bytes,
    }


def child(options: argparse.Namespace) -> None:
    """Do one measurement in this process and print it."""
    folder, found = options.out / "deployment", dict[str, Any]()
    if options.yardstick:
        folder.mkdir()
        found["seconds"] = yardstick(options.child, folder / "cells", options.yardstick)
    else:
        found = compiled(options.child, folder)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["to disk"] = found["seconds"] + on_disk(folder)
    shutil.rmtree(folder)
    print(json.dumps(found))


def measured(model: Path, scratch: Path, conductance_bytes: int = 0) -> dict[str, Any]:
    """Measure one model in a fresh process: the compiler, or the yardstick where a number of bytes is given."""
    arguments = ["--child", model, "--out", scratch, "--yardstick", str(conductance_bytes)]
    os.sync()  # what earlier processes wrote must not slow this one down
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def large_model(path: Path) -> None:
    """Write a chain of square Gemm layers, 302 million weights in external data."""
    count = LARGE_SIZE * LARGE_SIZE
    rng = np.random.default_rng(0)
    weights = []
    with path.with_suffix(".data").open("wb") as file:
        for k in range(LARGE_LAYERS):
            (rng.standard_normal(count, np.float32) / np.float32(LARGE_SIZE**0.5)).tofile(file)
            tensor = TensorProto(name=f"weight_{k}", data_type=TensorProto.FLOAT, dims=[LARGE_SIZE, LARGE_SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": f"{path.stem}.data", "offset": 4 * count * k, "length": 4 * count}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
    nodes = [helper.make_node("Gemm", [f"x{k}", f"weight_{k}"], [f"x{k + 1}"]) for k in range(LARGE_LAYERS)]
    first, last = (
        helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["N", LARGE_SIZE]) for k in (0, LARGE_LAYERS)
    )
    graph = helper.make_graph(nodes, path.stem, [first], [last], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def report(name: str, model: Path, scratch: Path, repeats: int, pick: Pick) -> None:
    """Measure one model and print its row."""
    runs, sticks = [], []
    for _ in range(repeats):
        runs.append(measured(model, scratch))
        sticks.append(measured(model, scratch, runs[-1]["conductances"]))
    middle = {key: pick(run[key] for run in runs) for key in runs[0]}
    stick = {key: pick(run[key] for run in sticks) for key in sticks[0]}
    size = sum(path.stat().st_size for path in model.parent.glob(f"{model.stem}.*"))
    cells = (
        name,
        f"{middle['weights'] / 1e6:.1f} M",
        f"{size / MEGABYTE:.0f} MB",
        f"{middle['conductances'] / MEGABYTE:.0f} MB",
        *(
            f"{stick[key]:.3f} s | {middle[key]:.3f} s | **{middle[key] / stick[key]:.1f} ×**"
            for key in ("seconds", "to disk")
        ),
        f"{middle['seconds'] / middle['weights'] * 1e9:.0f} ns",
        f"{middle['peak'] / MEGABYTE:.0f} MB",
        f"**{middle['peak'] / (2.5 * size + 300 * MEGABYTE):.2f}**",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    parts = {key: middle[key] for key in middle if key not in ("seconds", "to disk", "weights", "conductances", "peak")}
    print(f"{name}: " + ", ".join(f"{key} {seconds:.3f} s" for key, seconds in parts.items()), file=sys.stderr)


COLUMNS = (
    "model",
    "weights",
    "model file",
    "cells",
    *("yardstick", "compile", "ratio"),
    *("yardstick, to disk", "compile, to disk", "ratio, to disk"),
    "a weight",
    "peak memory",
    "of what is allowed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (5)")
    parser.add_argument("--large", action="store_true", help="measure the model of 300 million weights too")
    parser.add_argument("--best", action="store_true", help="show the fastest run of each kind, not the median")
    parser.add_argument("--only", help="measure this model alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--yardstick", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    with tempfile.TemporaryDirectory(prefix="rerampile-benchmark-") as folder:
        for name in [*BUILDERS, *(["Gemm chain"] if options.large else [])]:
            if options.only not in (None, name):
                continue
            model = Path(folder) / "model" / "model.onnx"
            model.parent.mkdir()
            if name in BUILDERS:
                script, *arguments = BUILDERS[name]
                command = [sys.executable, PROJECT / "models" / script, *arguments, "-o", model]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            else:
                large_model(model)
            report(name, model, Path(folder), options.repeats, min if options.best else statistics.median)
            for path in model.parent.iterdir():
                path.unlink()
            model.parent.rmdir()


if __name__ == "__main__":
    main()
