r"""Measure what programming a chip for its known stuck cells brings, step by step, and write a page about it.

The model is compiled once. For each failure rate chips are drawn, programmed with more and more steps, and run on the
data, as they are. Finished figures are kept, so that an interrupted measurement goes on where it was.

Example:
    python docs/results/programming.py models/resnet18_cifar10.onnx --data cifar10:DIR \
        --name resnet18-cifar10-programming --title "Programming ResNet18 chips"
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tables import HERE, command, page_parser, page_words, table

from rerampile import Deployment, compile_model
from rerampile.chip_calibration import Calibration, calibrate
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.data import open_dataset, training_split
from rerampile.runtime.fault_map import ChipGeometry, write_fault_maps
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.layer_program import CALIBRATED, STEPS
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.session import open_declared
from rerampile.runtime.statistics import interval_of
from rerampile.runtime.validation import validate

VARIANTS: dict[str, tuple[str, ...]] = {
    "as compiled": (),
    "compensate": ("compensate",),
    "compensate, flip": ("compensate", "flip"),
    "compensate, flip, gain": ("compensate", "flip", "gain"),
    "compensate, flip, gain, bias": ("compensate", "flip", "gain", "bias"),
    "compensate, flip, repair": ("compensate", "flip", "repair"),
    "compensate, flip, repair, gain": ("compensate", "flip", "repair", "gain"),
    "compensate, flip, repair, gain, bias": ("compensate", "flip", "repair", "gain", "bias"),
    "compensate, assign, flip": ("compensate", "assign", "flip"),
    "compensate, assign, flip, repair": ("compensate", "assign", "flip", "repair"),
    "compensate, assign, flip, repair, gain": ("compensate", "assign", "flip", "repair", "gain"),
    "all": STEPS,
}
CALIBRATED_VARIANTS = tuple(variant for variant, steps in VARIANTS.items() if set(steps) & set(CALIBRATED))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a figure for each failure rate, chip and variant: the metric, the errors, and the seconds."""
    deployment = compile_model(options.model, out=options.work / "deployment", mapping=options.mapping)
    kept = Kept(options.work / "programming.jsonl", {**identity(options), "plan": deployment.plan.plan_sha256})
    calibration = None
    for rate in options.rates:
        for chip in range(options.runs):
            for variant in [v for v in options.lines if not kept.has(rate, chip, v)]:
                if variant in CALIBRATED_VARIANTS and calibration is None:
                    calibration = calibrated(deployment, options)
                seen = calibration if variant in CALIBRATED_VARIANTS else None
                kept.add(one(deployment, rate, chip, variant, seen, options))
                print(f"{rate:g}, chip {chip}, {variant}: {kept.figures[-1]['value']:.2f}", flush=True)
    return [
        f
        for f in kept.figures
        if f["rate"] in options.rates and f["chip"] < options.runs and f["variant"] in options.lines
    ]


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """Return what figures depend on, but for the rate and the number of the chip."""
    return {
        "data": options.shown_data,
        "images": options.images,
        "calibration_images": options.calibration_images,
        "steps": list(STEPS),
    }


class Kept:
    """Finished figures, one a line, behind a line that says of what."""

    def __init__(self, path: Path, experiment: dict[str, Any]) -> None:
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if lines and lines[0] != experiment:
            raise SystemExit(
                f"{path}: of another experiment, {lines[0]}; remove it, or name another folder with --work"
            )
        self.figures: list[dict[str, Any]] = lines[1:]
        if not lines:
            path.write_text(json.dumps(experiment) + "\n")

    def has(self, rate: float, chip: int, variant: str) -> bool:
        """Whether a figure is there."""
        return any((f["rate"], f["chip"], f["variant"]) == (rate, chip, variant) for f in self.figures)

    def add(self, figure: dict[str, Any]) -> None:
        """Keep a figure."""
        with self.path.open("a") as file:
            file.write(json.dumps(figure) + "\n")
        self.figures.append(figure)


def calibrated(deployment: Deployment, options: argparse.Namespace) -> Calibration:
    """Return what layers see on training images, and say how long that took."""
    started = time.perf_counter()
    session = open_declared(deployment.model_path)
    data = open_dataset(training_split(options.data), session, Preprocessing(), default_split="train")
    found = calibrate(deployment, data, options.calibration_images)
    print(f"calibration: {time.perf_counter() - started:.1f} s", flush=True)
    return found


def one(
    deployment: Deployment,
    rate: float,
    chip: int,
    variant: str,
    calibration: Calibration | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Program one chip and run it; without steps, run the chip on what was compiled."""
    faults = draw_faults(
        ChipGeometry.of(deployment), FaultModel.of_rate(rate), deployment.target, seed=options.seed, run=chip
    )
    path, folder = options.work / "chip.safetensors", options.work / "chip"
    write_fault_maps(path, [faults], deployment)
    experiment = Experiment(folder=deployment.folder, fault_map=path, data=options.data, images=options.images)
    seconds, processor, error, wrong = 0.0, 0.0, None, None
    if VARIANTS[variant]:
        started, busy = time.perf_counter(), time.process_time()
        source = ChipSource(path=path, number=0, faults=faults)
        done = program_chip(deployment, source, folder, steps=VARIANTS[variant], calibration=calibration).plan.chip
        seconds, processor = time.perf_counter() - started, time.process_time() - busy
        if done is not None:
            error, wrong = done.steps[-1].error, done.unrepaired_total
        experiment = Experiment(folder=folder, data=options.data, images=options.images)
    journal = options.work / "journal.jsonl"
    journal.unlink(missing_ok=True)
    report = validate(experiment, journal)
    journal.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    name, metric = next(iter(report.rates[0].metrics.items()))
    return {
        "rate": rate,
        "chip": chip,
        "variant": variant,
        "metric": name,
        "value": metric.mean,
        "clean": metric.clean,
        "error": error,
        "unrepaired": wrong,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
    }


def page(figures: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the page in Markdown."""
    clean = figures[0]["clean"]
    images = "all images" if options.images is None else f"{options.images:,} images"
    heads = ["steps", *(f"{rate:g}" for rate in options.rates)]
    lines = [
        f"# {options.title}",
        "",
        f"Mean drop of {figures[0]['metric']} in points against {clean:.2f} % without faults, of {options.runs} chips",
        "for each failure rate of a cell (stuck off : stuck on = 1 : 5.2), with its 95 % interval over chips, and the",
        f"worst chip in brackets; {images}, mapping `{options.mapping}`. Lines with `repair` or `bias` learn from",
        f"{options.calibration_images} training images without their labels; the others know nothing of inputs.",
        "",
        *([] if options.note is None else [options.note, ""]),
        *table(heads, rows(figures, options.lines, options.rates, drop)),
        "",
        "What `rerampile program` predicts: mean error of the layers in percent, and in brackets the weights that",
        "faults hit and that stay wrong. Lines that learn from images weigh errors by what layers see.",
        "",
        *table(heads, rows(figures, options.lines[1:], options.rates, predicted)),
        "",
        "Median seconds that a chip takes from fault map to verified folder, in brackets those of all processors.",
        "The calibration is done once for any number of chips, and not counted.",
        "",
        *table(heads, rows(figures, options.lines[1:], options.rates, times)),
        "",
        f"Every chip's figures are in [{options.name}.json]({options.name}.json).",
        *command("programming.py", repeat(options)),
    ]
    return "\n".join(lines) + "\n"


def found(figures: list[dict[str, Any]], rate: float, variant: str) -> list[dict[str, Any]]:
    """Return the figures of the chips of a rate, with some steps."""
    return [f for f in figures if (f["rate"], f["variant"]) == (rate, variant)]


def rows(
    figures: list[dict[str, Any]], variants: list[str], rates: list[float], cell: Callable[[list[dict[str, Any]]], str]
) -> list[list[str]]:
    """Return a row for each variant, of a cell for each rate, made of the figures of its chips."""
    return [[variant, *(cell(found(figures, rate, variant)) for rate in rates)] for variant in variants]


def drop(chips: list[dict[str, Any]]) -> str:
    """Return the mean drop with its interval, and the worst."""
    drops = np.array([f["clean"] - f["value"] for f in chips])
    low, high = interval_of(drops) or (drops.mean(), drops.mean())
    return f"{drops.mean():.2f} ± {(high - low) / 2:.2f} ({drops.max():.1f})"


def times(chips: list[dict[str, Any]]) -> str:
    """Return the median seconds, by the clock and of all processors."""
    wall, all_ = (statistics.median(f[name] for f in chips) for name in ("seconds", "processor_seconds"))
    return f"{wall:.1f} ({all_:.1f})"


def predicted(chips: list[dict[str, Any]]) -> str:
    """Return the mean predicted error, and the weights that stay wrong."""
    error, wrong = (statistics.mean(f[name] for f in chips) for name in ("error", "unrepaired"))
    return f"{100 * error:.2f} ({wrong:,.0f})"


def repeat(options: argparse.Namespace) -> list[str]:
    """Return the arguments that repeat a measurement."""
    words = page_words(options)
    words += ["--failure-rate", ",".join(f"{rate:g}" for rate in options.rates), "--runs", str(options.runs)]
    words += [] if options.images is None else ["--images", str(options.images)]
    words += [] if options.lines == list(VARIANTS) else ["--lines", "; ".join(options.lines[1:])]
    return [*words, "--calibration-images", str(options.calibration_images), "--mapping", options.mapping]


def main() -> None:
    """Measure, and write the page and its numbers."""
    parser = page_parser(__doc__)
    parser.add_argument("--mapping", default="differential")
    parser.add_argument("--failure-rate", default="0.02,0.108")
    parser.add_argument("--lines", default="; ".join(VARIANTS), help="the ones to measure, beside 'as compiled'")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--images", type=int)
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.shown_data = options.shown_data or options.data
    chosen = {line.strip() for line in options.lines.split(";")} | {next(iter(VARIANTS))}
    if not chosen <= set(VARIANTS):
        parser.error(f"--lines: expected some of: {'; '.join(VARIANTS)}")
    options.lines = [line for line in VARIANTS if line in chosen]
    options.rates = [float(rate) for rate in options.failure_rate.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    figures = measure(options)
    (HERE / f"{options.name}.md").write_text(page(figures, options))
    (HERE / f"{options.name}.json").write_text(json.dumps({**identity(options), "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
