"""What ``program`` shows in a terminal, and ``show`` of a programmed chip."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rerampile.chip_plan import ChipPlan
from rerampile.failed_cells import counts_text
from rerampile.layer_plan import LayerPlan
from rerampile.terminal import facts_table, new_table, print_parts, printable

__all__ = ["show_bins", "show_chip"]

_LISTED = 10

_WORDS = {
    "none": "as compiled",
    "compensate": "pairs compensated",
    "assign": "better rows and columns",
    "flip": "column segments flipped",
    "repair": "healthy weights moved",
    "gain": "gains adjusted",
    "bias": "biases shifted",
}


def show_chip(
    out: Console,
    layers: Sequence[LayerPlan],
    chip: ChipPlan,
    folder: Path | None = None,
    requirements: Sequence[tuple[str, float, bool]] = (),
) -> None:
    """Print what was done for a chip, and what stays wrong.

    Args:
        out: Where to.
        layers: Layers of the plan.
        chip: The chip.
        folder: Where its deployment is, or None where that is known.
        requirements: Text, what was found, and whether it holds.
    """
    heads: tuple[str, ...] = ("error", "cells touched", "lines moved", "flipped")
    steps = new_table(("step", "left"), *((head, "right") for head in heads))
    for step in chip.steps:
        counts = (f"{count:,}" for count in (step.touched, step.moved, step.flipped))
        steps.add_row(_WORDS[step.step], f"{100 * step.error:.3g} %", *counts)
    heads = ("output", "input", "weight", "read", "array", "row", "column")
    worst = new_table(("stays wrong", "left"), *((head, "right") for head in heads))
    for weight in chip.unrepaired[:_LISTED]:
        name = printable(layers[weight.layer].name) if weight.layer < len(layers) else f"layer {weight.layer}"
        place = (str(number) for number in (weight.array, weight.row, weight.column))
        matrix = str(weight.output), str(weight.input), f"{weight.wanted:.4g}", f"{weight.found:.4g}"
        worst.add_row(name, *matrix, *place)
    number = max(range(len(chip.layers)), key=lambda n: chip.layers[n].errors[-1])
    hit = sum(layer.weights for layer in chip.layers)
    layer, share = printable(layers[number].name), math.sqrt(chip.layers[number].errors[-1])
    stuck = f"{chip.stuck_off:,} cells stuck off, {chip.stuck_on:,} on{counts_text(chip.categories or {})}"
    after, before = _percent(chip.output_error), _percent(chip.output_error_before)
    facts = [
        ("chip", f"{printable(chip.source)}, number {chip.number}: {stuck}"),
        ("weights", f"{hit:,} hit, {chip.unrepaired_total:,} of them stay wrong"),
        ("worst layer", f"{layer}, off by {100 * share:.3g} %"),
        ("outputs", f"off by {after} on the verification's inputs, {before} before"),
    ]
    if shifted := [layer.shift for layer in chip.layers if layer.bias is not None]:
        count = sum(1 for shift in shifted for value in shift if value)
        facts.append(("biases", f"{count:,} outputs of {len(shifted):,} layers shifted"))
    if beside := sum(layer.beside for layer in chip.layers):
        facts.append(
            (
                "beside",
                f"{beside:,} cells stuck that join blocks; no step makes up for what leaks",
            )
        )
    if chip.calibration is not None:
        facts.append(("calibration", f"{printable(chip.calibration)}, {chip.calibration_images:,} images"))
    facts += [("met" if met else "NOT met", f"{printable(text)}: {found:.4g}") for text, found, met in requirements]
    if folder is not None:
        facts.append(("folder", printable(shlex.quote(str(folder)))))
    print_parts(out, steps, worst if chip.unrepaired else None, facts_table(facts))


def show_bins(out: Console, chips: Sequence[tuple[str, ChipPlan, bool | None]]) -> None:
    """Print several chips in a table, the best first.

    Args:
        out: Where to.
        chips: Name, chip, and whether it meets what was required; None where nothing was.
    """
    heads = ("error", "stay wrong", "outputs", "verdict")
    table = new_table(("chip", "left"), *((head, "right") for head in heads))
    for name, chip, met in sorted(chips, key=lambda item: item[1].steps[-1].error):
        verdict = "" if met is None else "met" if met else "NOT met"
        row = f"{100 * chip.steps[-1].error:.3g} %", f"{chip.unrepaired_total:,}", _percent(chip.output_error)
        table.add_row(printable(name), *row, verdict)
    print_parts(out, table)


def _percent(share: float | None) -> str:
    return "an unknown amount" if share is None else f"{100 * share:.3g} %"
