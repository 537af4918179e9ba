"""The pictures of reports, and which array to show.

A picture is drawn once and written as SVG and PNG, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.deployment import Deployment, load_deployment
from rerampile.runtime.fault_map import STATES, STUCK_ON, ChipGeometry, FaultMap, read_fault_maps
from rerampile.runtime.faults import draw_faults
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.programmed_chip import chip_faults
from rerampile.runtime.validation import RateReport, ValidationReport

__all__ = [
    "ArrayPicture",
    "array_picture",
    "chips_picture",
    "most_hit_array",
    "rate_text",
    "rates_picture",
    "render",
    "stuck_picture",
]

_SIZE = (6.4, 4.0)  # inches
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b00", "#4f5d75", "#c46bae", "#2a9d8f")
_STUCK_COLOURS = ("#f4f4f4", "#3b6fb6", "#c0392b", "#7fb3d5", "#8e8ea0", "#e59866")  # healthy, then by state


@dataclass(frozen=True, kw_only=True)
class ArrayPicture:
    """The faults of one array of one chip, for the page.

    Attributes:
        title: What it shows.
        state: uint8 [rows, columns]: 0 healthy, else one of :data:`~rerampile.runtime.fault_map.STATES`.
    """

    title: str
    state: npt.NDArray[np.uint8]


def array_picture(deployment: Deployment, chip: FaultMap, array: int, title: str) -> ArrayPicture:
    """Return the stuck cells of one array of a chip."""
    geometry = ChipGeometry.of(deployment)
    arrays, rows, columns = geometry.locate(chip.cell)
    here = arrays == array
    state = np.zeros((geometry.rows, geometry.columns), np.uint8)
    state[rows[here], columns[here]] = chip.state[here]
    return ArrayPicture(title=title, state=state)


def most_hit_array(experiment: Experiment) -> ArrayPicture:
    """Return the array with the most stuck cells of the first chip, at the highest failure rate."""
    deployment = load_deployment(experiment.folder)
    geometry = ChipGeometry.of(deployment)
    own = chip_faults(deployment)
    if own is not None:
        chip, at = own, "its known stuck cells"
    elif experiment.fault_map is not None:
        chip, at = read_fault_maps(experiment.fault_map, deployment)[0], experiment.fault_map.name
    else:
        model = max(experiment.faults, key=lambda faults: faults.rate)
        chip = draw_faults(geometry, model, deployment.target, seed=experiment.seed, run=0)
        at = f"a failure rate of {model.rate:.6g}"
    array = int(np.bincount(geometry.locate(chip.cell)[0], minlength=1).argmax())
    return array_picture(
        deployment, chip, array, f"Array {array} of chip 0 at {at}, the array with the most stuck cells."
    )


def render(draw: Callable[[Any], None]) -> tuple[str, bytes]:
    """Draw once and return the picture as SVG text and PNG bytes, the same for the same numbers."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "rerampile", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def rate_text(rate: RateReport) -> str:
    """Return a failure rate as a table shows it."""
    return "measured" if rate.rate is None else f"{rate.rate:.6g}"


def rates_picture(reports: Sequence[ValidationReport], metric: str) -> Callable[[Any], None]:
    """Return what draws the mean over chips, with its interval, against failure rate; the clean value as a line."""

    def draw(axes: Any) -> None:
        for report, colour, rates in _series(reports):
            x = [1.0 if r.rate is None else r.rate for r in rates]
            found = [r.metrics[metric] for r in rates]
            ends = [m.interval or (m.mean, m.mean) for m in found]
            bars = [[m.mean - low for m, (low, _) in zip(found, ends, strict=True)]]
            bars.append([high - m.mean for m, (_, high) in zip(found, ends, strict=True)])
            axes.errorbar(
                x, [m.mean for m in found], bars, color=colour, marker="o", ms=4, capsize=3, label=report.label
            )
            axes.plot(x, [m.worst for m in found], color=colour, ls=":", lw=1)
            axes.axhline(report.clean[metric], color=colour, lw=0.6, ls="--")
        if all(r.rate for report in reports for r in report.rates):
            axes.set_xscale("log")
            ticks = sorted({r.rate for report in reports for r in report.rates if r.rate})
            axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
            axes.minorticks_off()
        _label_axes(axes, f"failure rate of a {_unit(reports)}", f"{metric} (%)")

    return draw


def chips_picture(reports: Sequence[ValidationReport], metric: str) -> Callable[[Any], None]:
    """Return what draws every chip as a point, deployments side by side, by failure rate."""

    def draw(axes: Any) -> None:
        width = 0.8 / len(reports)
        for number, (report, colour, rates) in enumerate(_series(reports)):
            for place, rate in enumerate(rates):
                values = np.sort(rate.metrics[metric].values)
                spread = (np.arange(len(values)) / max(1, len(values) - 1) - 0.5) * width * 0.8
                x = place + (number - (len(reports) - 1) / 2) * width + spread
                axes.plot(x, values, ".", ms=3, color=colour, label=None if place else report.label)
        rates = next(_series(reports))[2]
        axes.set_xticks(range(len(rates)), [rate_text(r) for r in rates])
        _label_axes(axes, f"failure rate of a {_unit(reports)}; chips from worst to best", f"{metric} (%)")

    return draw


def _series(reports: Sequence[ValidationReport]) -> Iterator[tuple[ValidationReport, str, list[RateReport]]]:
    """Yield each report, its colour, and its failure rates in rising order."""
    for number, report in enumerate(reports):
        yield report, _COLOURS[number % len(_COLOURS)], sorted(report.rates, key=lambda r: r.rate or 0.0)


def _unit(reports: Sequence[ValidationReport]) -> str:
    return reports[0].rates[0].rate_unit


def _label_axes(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def stuck_picture(picture: ArrayPicture) -> Callable[[Any], None]:
    """Return what draws the stuck cells of an array."""

    def draw(axes: Any) -> None:
        from matplotlib.colors import ListedColormap

        shown = {name: state for name, state in STATES.items() if state <= STUCK_ON or (picture.state == state).any()}
        colours, most = _STUCK_COLOURS[: max(shown.values()) + 1], max(shown.values())
        axes.imshow(
            picture.state, cmap=ListedColormap(colours), vmin=0, vmax=most, interpolation="nearest", aspect="auto"
        )
        for name, state in shown.items():
            word = name.replace("_", " ") if state <= STUCK_ON else name.replace("_", "-")
            axes.plot([], [], "s", color=colours[state], label=f"{word}: {int((picture.state == state).sum())}")
        axes.set_xlabel("bit line (column)")
        axes.set_ylabel("word line (row)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

    return draw
