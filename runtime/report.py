"""The report of a validation: one page that needs nothing else, and its pictures."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.deployment import Deployment, load_deployment
from rerampile.runtime.fault_map import ChipGeometry, FaultMap, read_fault_maps
from rerampile.runtime.faults import draw_faults
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.validation import MetricReport, RateReport, ValidationReport

__all__ = ["ArrayPicture", "array_picture", "draw_png", "most_hit_array", "write_report"]

_SIZE = (6.4, 4.0)  # inches
_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b00", "#4f5d75")
_STUCK_COLOURS = ("#f4f4f4", "#3b6fb6", "#c0392b")  # healthy, stuck off, stuck on

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 4px; } figure svg { width: 100%; height: auto; }
figcaption { color: #444; padding: 0 .8rem .6rem; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: .6rem; background: #8881; } dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem;
  overflow-wrap: anywhere; } .met { color: #2e7d32; } .missed { color: #c62828; font-weight: 600; }
@media print { body { max-width: none; font-size: 11px; } figure, table { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class ArrayPicture:
    """The faults of one array of one chip, for the page.

    Attributes:
        title: What it shows.
        state: uint8 [rows, columns]: 0 healthy, 1 stuck off, 2 stuck on.
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
    if experiment.fault_map is not None:
        chip, at = read_fault_maps(experiment.fault_map, deployment)[0], experiment.fault_map.name
    else:
        model = max(experiment.faults, key=lambda faults: faults.rate)
        chip = draw_faults(geometry, model, deployment.target, seed=experiment.seed, run=0)
        at = f"a failure rate of {model.rate:.6g}"
    array = int(np.bincount(geometry.locate(chip.cell)[0], minlength=1).argmax())
    return array_picture(
        deployment, chip, array, f"Array {array} of chip 0 at {at}, the array with the most stuck cells."
    )


def draw_png(picture: ArrayPicture) -> bytes:
    """Return a picture as PNG bytes."""
    return _render(lambda axes: _draw_array(axes, picture))[1]


def write_report(
    folder: Path, reports: Sequence[ValidationReport], *, command: str, picture: ArrayPicture | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.html`` and the pictures as SVG and PNG; return the files.

    Args:
        folder: An existing folder.
        reports: One for each deployment that is compared.
        command: The command line that repeats it.
        picture: Faults of an array to show.
    """
    metric = next(iter(reports[0].clean))
    drawings: dict[str, tuple[Callable[[Any], None], str]] = {
        "accuracy": (lambda axes: _draw_rates(axes, reports, metric), _rates_caption(reports, metric)),
        "chips": (
            lambda axes: _draw_chips(axes, reports, metric),
            "Every chip: its mean loss is not what a chip will do; the worst ones decide the yield.",
        ),
    }
    if picture is not None:
        drawings["array"] = (lambda axes: _draw_array(axes, picture), picture.title)
    written: list[Path] = []
    figures: list[str] = []
    for name, (draw, caption) in drawings.items():
        svg, png = _render(draw)
        for suffix, data in (("svg", svg.encode()), ("png", png)):
            written.append(folder / f"{name}.{suffix}")
            written[-1].write_bytes(data)
        inline = re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
        figures.append(f"<figure>{inline}<figcaption>{html.escape(caption)}</figcaption></figure>")
    data = msgspec.json.format(msgspec.json.encode(list(reports) if len(reports) > 1 else reports[0]), indent=1)
    for name, content in (("report.json", data + b"\n"), ("report.html", _page(reports, figures, command).encode())):
        written.append(folder / name)
        written[-1].write_bytes(content)
    return written


def _render(draw: Callable[[Any], None]) -> tuple[str, bytes]:
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


def _measured(reports: Sequence[ValidationReport]) -> list[tuple[ValidationReport, list[RateReport]]]:
    return [(report, sorted(report.rates, key=lambda r: r.rate or 0.0)) for report in reports]


def _label(report: ValidationReport) -> str:
    return f"{report.mapping}, {report.scale} scale"


def _draw_rates(axes: Any, reports: Sequence[ValidationReport], metric: str) -> None:
    """Mean over chips with its interval against failure rate; the clean value as a line."""
    for number, (report, rates) in enumerate(_measured(reports)):
        colour = _COLOURS[number % len(_COLOURS)]
        x = [r.rate if r.rate is not None else 1.0 for r in rates]
        found = [r.metrics[metric] for r in rates]
        low = [m.mean - (m.interval[0] if m.interval else m.mean) for m in found]
        high = [(m.interval[1] if m.interval else m.mean) - m.mean for m in found]
        axes.errorbar(
            x, [m.mean for m in found], [low, high], color=colour, marker="o", ms=4, capsize=3, label=_label(report)
        )
        axes.plot(x, [m.worst for m in found], color=colour, ls=":", lw=1)
        axes.axhline(report.clean[metric], color=colour, lw=0.6, ls="--")
    if all(r.rate for report in reports for r in report.rates):
        axes.set_xscale("log")
    axes.set_xlabel("failure rate of a cell")
    axes.set_ylabel(f"{metric} (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _rates_caption(reports: Sequence[ValidationReport], metric: str) -> str:
    chips = reports[0].rates[0].metrics[metric].chips
    return (
        f"Mean {metric} of {chips} simulated chips with its 95 % interval; dotted: the worst chip; dashed: no faults. "
        f"{reports[0].images} images."
    )


def _draw_chips(axes: Any, reports: Sequence[ValidationReport], metric: str) -> None:
    """Every chip as a point, side by side by failure rate."""
    measured = _measured(reports)
    width = 0.8 / len(measured)
    for number, (report, rates) in enumerate(measured):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, rate in enumerate(rates):
            values = np.sort(rate.metrics[metric].values)
            spread = (np.arange(len(values)) / max(1, len(values) - 1) - 0.5) * width * 0.8
            centre = place + (number - (len(measured) - 1) / 2) * width
            axes.plot(centre + spread, values, ".", ms=3, color=colour, label=_label(report) if place == 0 else None)
    axes.set_xticks(range(len(measured[0][1])), [_rate_text(r) for r in measured[0][1]])
    axes.set_xlabel("failure rate of a cell; chips from worst to best")
    axes.set_ylabel(f"{metric} (%)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)


def _draw_array(axes: Any, picture: ArrayPicture) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(
        picture.state, cmap=ListedColormap(_STUCK_COLOURS), vmin=0, vmax=2, interpolation="nearest", aspect="auto"
    )
    for state, word in ((1, "stuck off"), (2, "stuck on")):
        axes.plot([], [], "s", color=_STUCK_COLOURS[state], label=f"{word}: {int((picture.state == state).sum())}")
    axes.set_xlabel("bit line (column)")
    axes.set_ylabel("word line (row)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _rate_text(rate: RateReport) -> str:
    return "measured" if rate.rate is None else f"{rate.rate:.6g}"


def _page(reports: Sequence[ValidationReport], figures: Sequence[str], command: str) -> str:
    title = f"{reports[0].model} under stuck-at faults"
    body = [f"<h1>{html.escape(title)}</h1>", *figures[:1]]
    for report in reports:
        body.append(f"<h2>{html.escape(_label(report))}</h2>")
        body += [_requirements(report), *(_table(report, name) for name in report.clean)]
    body += ["<h2>Chips and arrays</h2>", *figures[1:], "<h2>How to repeat it</h2>"]
    body.append(f"<pre>{html.escape(command)}</pre>")
    body += [_facts(report) for report in reports]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _table(report: ValidationReport, metric: str) -> str:
    heads = (
        "failure rate",
        "mean",
        "95 % interval",
        "drop",
        "95 % interval",
        "deviation",
        "5th percentile",
        "worst",
        "chips",
    )
    rows = [[_rate_text(rate), *_cells(rate.metrics[metric])] for rate in report.rates]
    head = "".join(f"<th>{h}</th>" for h in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f"<h3>{html.escape(metric)}, {report.clean[metric]:.2f} % without faults</h3>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _cells(found: MetricReport) -> list[str]:
    return [
        f"{found.mean:.2f}",
        _interval(found.interval),
        f"{found.drop:.2f}",
        _interval(found.drop_interval),
        "–" if found.deviation is None else f"{found.deviation:.2f}",
        f"{found.fifth_percentile:.2f}",
        f"{found.worst:.2f}",
        str(found.chips),
    ]


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} … {interval[1]:.2f}"


def _requirements(report: ValidationReport) -> str:
    items = "".join(
        f'<li class="{"met" if r.met else "missed"}">{html.escape(r.text)}: found {r.found:.2f}, '
        f"{'met' if r.met else 'not met'}</li>"
        for r in report.requirements
    )
    return f"<ul>{items}</ul>" if items else ""


def _facts(report: ValidationReport) -> str:
    faults = "; ".join(
        f"{_rate_text(r)}: asked {r.faults.stuck_off:.3g} off and {r.faults.stuck_on:.3g} on, found "
        f"{r.faults.observed_off:.3g} and {r.faults.observed_on:.3g} of {r.faults.cells:,} cells"
        for r in report.rates
    )
    facts = {
        "deployment": report.folder,
        "execution": report.execution,
        "images": f"{report.images:,}",
        "faults": faults,
        "outputs that were not finite": str(sum(r.non_finite for r in report.rates)),
        **{key.replace("_", " "): str(value) for key, value in report.plan.items()},
        **{f"{name} version": version for name, version in report.versions.items()},
    }
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"
