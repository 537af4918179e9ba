"""The chart of the layers that hurt, and the files of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rerampile.files import write_files
from rerampile.runtime.pictures import render
from rerampile.runtime.predict import LayerPrediction, Prediction, RatePrediction

__all__ = ["PREDICTION_FILES", "highest", "layers_caption", "layers_picture", "ranking", "write_prediction"]

PREDICTION_FILES = ("prediction.json", "layers.svg", "layers.png")

_MOST_BARS = 16
_LONGEST_NAME = 36
_COLOUR, _OTHERS = "#1b6ca8", "#9aa5b1"


def highest(rates: Sequence[RatePrediction]) -> RatePrediction:
    """Return the highest failure rate."""
    return max(rates, key=lambda rate: rate.rate)


def ranking(rate: RatePrediction, most: int) -> tuple[list[LayerPrediction], int, float]:
    """Return the layers that hurt most, and of the others how many there are and their share.

    Args:
        rate: The layers at a failure rate.
        most: How many to tell apart.
    """
    others = rate.layers[most:]
    return rate.layers[:most], len(others), sum(layer.share for layer in others)


def layers_picture(rate: RatePrediction) -> Callable[[Any], None]:
    """Return what draws each layer's share of the output error as a bar, the largest first, its NSR beside it."""
    layers, others, rest = ranking(rate, _MOST_BARS)
    bars = [(_short(layer.layer), layer.share, f"{100 * layer.nsr:.2g} %", _COLOUR) for layer in layers]
    if others:
        bars.append((f"{others} others", rest, "", _OTHERS))

    def draw(axes: Any) -> None:
        names, shares, notes, colours = zip(*bars, strict=True)
        places, widths = range(len(bars)), [100 * share for share in shares]
        axes.barh(places, widths, color=colours)
        axes.set_yticks(places, names, fontsize=8, parse_math=False)
        axes.invert_yaxis()
        for place, width, note in zip(places, widths, notes, strict=True):
            axes.annotate(note, (width, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
        axes.set_xlim(0, 1.12 * max(*widths, 1e-9))
        axes.set_xlabel("share of the predicted squared output error (%)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)

    return draw


def layers_caption(prediction: Prediction, rate: RatePrediction) -> str:
    """Return what the chart shows, in words."""
    left_out = len(prediction.not_predicted)
    return (
        f"The layers that hurt at a failure rate of {rate.rate:.6g}, predicted from the plan and {prediction.images} "
        f"images, not measured: each layer's share of a predicted output error of {rate.output_error:.2g} %, and "
        f"beside it the layer's own error (noise-to-signal ratio of its products)."
        + (f" {left_out} layers are left out." if left_out else "")
    )


def write_prediction(folder: Path, prediction: Prediction) -> None:
    """Write ``prediction.json`` and the chart at the highest failure rate, ``layers.svg`` and ``layers.png``.

    Raises:
        ConfigError: A file cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(prediction), indent=1) + b"\n"
    svg, png = render(layers_picture(highest(prediction.rates)))
    write_files(folder, dict(zip(PREDICTION_FILES, (data, svg.encode(), png), strict=True)))


def _short(name: str) -> str:
    """Return a name as every font has it, its end if it is long."""
    plain = name.encode("unicode_escape").decode()
    return plain if len(plain) <= _LONGEST_NAME else f"…{plain[1 - _LONGEST_NAME :]}"
