"""What ``predict`` shows in a terminal."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rich.console import Console

from rerampile.runtime.layer_chart import highest, ranking
from rerampile.runtime.predict import Prediction, RatePrediction
from rerampile.terminal import facts_table, new_table, print_parts, printable

__all__ = ["show_prediction"]

_LISTED = 10  # layers of a table, those that hurt most


def show_prediction(out: Console, found: Prediction, verbose: bool, folder: Path | None) -> None:
    """Print a prediction.

    Args:
        out: Where to.
        found: The prediction.
        verbose: List every layer.
        folder: Where its files were written, or None.
    """
    rates = new_table(("failure rate", "left"), ("output error", "right"), ("of it in every chip", "right"))
    for rate in found.rates:
        rates.add_row(f"{rate.rate:.6g}", f"{rate.output_error:.2f} %", f"{rate.coherent_error:.2f} %")
    print_parts(out, rates)
    worst = highest(found.rates)
    _show_layers(out, worst, len(worst.layers) if verbose else _LISTED)
    known = [("data", f"{found.data}, {found.images:,} images; noise in each layer on {found.probe_images:,}")]
    layers_of: dict[str, list[str]] = defaultdict(list)
    for layer, reason in found.not_predicted.items():
        layers_of[reason].append(layer)
    known += [("not predicted", f"{', '.join(layers)}: {reason}") for reason, layers in layers_of.items()]
    if folder is not None:
        known.append(("written", str(folder)))
    print_parts(out, facts_table([(word, printable(text)) for word, text in known]))


def _show_layers(out: Console, rate: RatePrediction, most: int) -> None:
    """Print the ranking at one failure rate."""
    heads = ("share", "NSR", "sensitivity")
    table = new_table((f"layers that hurt at {rate.rate:.6g}", "left"), *((head, "right") for head in heads))
    listed, others, share = ranking(rate, most)
    for layer in listed:
        parts = (f"{100 * layer.share:.1f} %", f"{100 * layer.nsr:.3g} %", f"{layer.sensitivity:.3g}")
        table.add_row(printable(layer.layer), *parts)
    if others:
        table.add_row(f"{others} others", f"{100 * share:.1f} %")
    print_parts(out, table)
