"""Compile and verify every model at hand, and write down which do and why the others do not.

The models: those of the installed onnx package's backend test data, those that `models/` writes, and the real ones of
the folder that RERAMPILE_TEST_DATA names (default ../shared/data), where it is there.

Example:
    python benchmarks/coverage.py          # writes docs/coverage.md; three minutes on two cores
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.backend.test
import onnxruntime

from rerampile import Plan, compile_model, verify_deployment
from rerampile.errors import RerampileError, UnsupportedModelError
from rerampile.plan import OutputError

PROJECT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("RERAMPILE_TEST_DATA", PROJECT.parent / "shared" / "data"))
ONNX_DATA = Path(onnx.backend.test.__file__).parent / "data"

BUILT = {
    "ResNet18, CIFAR-10 stem, random weights": ("resnet18.py",),
    "ResNet18, ImageNet stem, random weights": ("resnet18.py", "--stem", "imagenet", "--classes", "1000"),
    "ResNet18, CIFAR-10 stem, float16 behind Cast": ("resnet18.py", "--half"),
    "YOLOv4 416, random weights": ("yolov4.py", "--size", "416"),
    "YOLOv4 608, random weights": ("yolov4.py",),
}
DARKNET = {
    "yolo-fastest-1.1-xl (darknet, real weights)": ("yolo-fastest-1.1-xl.cfg", "yolo-fastest-1.1-xl.weights"),
    "yolov4-tiny (darknet, random weights)": ("yolov4-tiny.cfg",),
    "yolov4 (darknet, random weights)": ("yolov4.cfg",),
}

PAGE = """\
# Which models compile

Written by `python benchmarks/coverage.py` with onnx {onnx} and ONNX Runtime {ort}, target `paper`, every option at its
default. Compiled means: compiled, decoded, run in ONNX Runtime beside the original, and verified a second time from the
files alone. {compiled} of {total} models compile. Of the {refused} that are refused, {nothing} have no weight matrix.

* *layers*: weight matrices found; *weights*: numbers in them; *arrays*: crossbars of 128 × 128 cells.
* *mapped*, *folded*, *digital*: nodes that run on crossbars, that became part of one that does, and that stay digital
  (constants are not counted).
* *error*: largest difference of an output, relative to that output's largest magnitude; it must not be above *allowed*.
* *by layer*: for networks that quantise their activations, the largest such error of any one mapped node on the same
  inputs as the node that it replaces. There, a step up or down early on is amplified by what follows, most of all on
  random inputs; so *allowed* is twice the model's own answer to inputs changed by one part in ten thousand.

The `light` networks of ONNX carry one number for all weights of a layer, so most of their outputs are the same number
too: they show that a graph compiles, not how exact it is.

## Compiled and verified

| model | opset | layers | weights | arrays | mapped | folded | digital | error | allowed | by layer |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

## Refused

{refusals}

## Refused, because nothing in them is a weight matrix

One-operator tests whose operators hold no weights, or whose operands are all inputs. The message reads "nothing maps to
a crossbar, expected at least one of Conv, … with constant weights; found" and goes on:

| model | opset | found |
|---|---|---|
{empty}
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one model: its plan, or why there is none."""

    name: str
    opset: str
    plan: Plan | None = None
    refusal: RerampileError | None = None


def models(scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each model; what is built is gone after its turn."""
    shipped = sorted((PROJECT / "models").glob("*.onnx"))
    yield from ((f"models/{path.name}", path) for path in shipped)
    darknet = {name: tuple(str(DATA / "models" / file) for file in files) for name, files in DARKNET.items()}
    present = {name: ("darknet.py", *files) for name, files in darknet.items() if Path(files[0]).is_file()}
    for name, (script, *arguments) in (BUILT | present).items():
        path = scratch / "built.onnx"
        command = [sys.executable, PROJECT / "models" / script, *arguments, "-o", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        yield name, path
        path.unlink()
    yield from ((path.name, path) for path in sorted((DATA / "models").glob("*.onnx")))
    for path in sorted(ONNX_DATA.rglob("*.onnx")):
        name = path.parent if path.name == "model.onnx" else path.with_suffix("")
        yield f"onnx {name.relative_to(ONNX_DATA)}", path


def outcome(name: str, path: Path, scratch: Path) -> Outcome:
    """Compile and verify one model."""
    model = onnx.load(path, load_external_data=False)
    opset = str(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))
    try:
        plan = compile_model(path, out=scratch / "deployment").plan
        verify_deployment(scratch / "deployment")
    except RerampileError as refusal:
        return Outcome(name, opset, refusal=refusal)
    return Outcome(name, opset, plan=plan)


def row(found: Outcome, plan: Plan) -> str:
    """Return the table row of a model that compiled."""
    verification = plan.verification
    cells: list[object] = [
        found.name,
        found.opset,
        len(plan.layers),
        f"{plan.totals.weights:,}",
        f"{plan.totals.arrays:,}",
        len({use.node for layer in plan.layers for use in layer.uses}),
        sum(len(layer.folds) for layer in plan.layers),
        sum(operation.code != "constant" for operation in plan.digital),
    ]
    if verification is not None:
        cells += [largest(verification.outputs), f"{verification.tolerance:.2g}", largest(verification.layers)]
    return f"| {' | '.join(map(str, cells))} |"


def largest(errors: Sequence[OutputError]) -> str:
    error = max((o.relative_error for o in errors), default=None)
    return "" if error is None else f"{error:.1e}" if error else "0"


def reason(refusal: RerampileError) -> str:
    """Return a refusal's own text, fit for a table cell, without the folders of this machine."""
    text = str(refusal).partition("; found ")[2] if nothing_maps(refusal) else str(refusal)
    words = (Path(word).name if word.startswith("/") else word for word in text.split())
    return " ".join(words).replace("|", "\\|")


def nothing_maps(refusal: RerampileError | None) -> bool:
    return isinstance(refusal, UnsupportedModelError) and "nothing maps" in str(refusal)


def page(found: Sequence[Outcome]) -> str:
    """Return the page."""
    refused = [o for o in found if o.refusal is not None]
    lines = {nothing: [] for nothing in (True, False)}
    for o in refused:
        if o.refusal is not None:
            lines[nothing_maps(o.refusal)].append(f"| {o.name} | {o.opset} | {reason(o.refusal)} |")
    other = "\n".join(["| model | opset | message |", "|---|---|---|", *lines[False]]) if lines[False] else "None."
    return PAGE.format(
        onnx=onnx.__version__,
        ort=onnxruntime.__version__,
        compiled=len(found) - len(refused),
        total=len(found),
        refused=len(refused),
        nothing=len(lines[True]),
        rows="\n".join(row(o, o.plan) for o in found if o.plan is not None),
        refusals=other,
        empty="\n".join(lines[True]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=PROJECT / "docs" / "coverage.md", help="page to write")
    options = parser.parse_args()
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="rerampile-coverage-") as scratch:
        for name, path in models(Path(scratch)):
            found.append(outcome(name, path, Path(scratch)))
            print(f"{'refused ' if found[-1].refusal else 'compiled'}  {name}", file=sys.stderr)
    options.out.write_text(page(found), encoding="utf-8")
    print(f"{options.out}: {len(found)} models", file=sys.stderr)


if __name__ == "__main__":
    main()
