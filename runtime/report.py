"""The report of a validation or comparison: one page that needs nothing else, its pictures, and the numbers."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rerampile.runtime.comparison import Compared, ComparisonReport, Difference, Known
from rerampile.runtime.layer_chart import highest, layers_caption, layers_picture
from rerampile.runtime.pictures import ArrayPicture, chips_picture, rate_text, rates_picture, render, stuck_picture
from rerampile.runtime.predict import Prediction
from rerampile.runtime.validation import FaultCounts, MetricReport, ValidationReport

__all__ = ["int8_text", "known_text", "write_report"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 4px; } figure svg { width: 100%; height: auto; }
figcaption { color: #444; padding: 0 .8rem .6rem; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: .6rem; background: #8881; } dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem;
  overflow-wrap: anywhere; } .met { color: #2e7d32; } .missed { color: #c62828; font-weight: 600; }
@media print { body { max-width: none; font-size: 11px; } figure, table { break-inside: avoid; } }
"""


def write_report(
    folder: Path,
    report: ValidationReport | ComparisonReport,
    *,
    command: str,
    picture: ArrayPicture | None = None,
) -> list[Path]:
    """Write ``report.json``, ``report.html`` and the pictures as SVG and PNG; return the files.

    Args:
        folder: An existing folder.
        report: The numbers.
        command: The command line that repeats it.
        picture: Faults of an array to show.
    """
    validations = [report] if isinstance(report, ValidationReport) else report.validations
    metric = next(iter(validations[0].clean))
    drawings: dict[str, tuple[Callable[[Any], None], str]] = {
        "accuracy": (rates_picture(validations, metric), _rates_caption(validations, metric)),
        "chips": (
            chips_picture(validations, metric),
            "Every chip: its mean loss is not what a chip will do; the worst ones decide the yield.",
        ),
    }
    if isinstance(prediction := validations[0].prediction, Prediction):
        rate = highest(prediction.rates)
        drawings["layers"] = (layers_picture(rate), layers_caption(prediction, rate))
    if picture is not None:
        drawings["array"] = (stuck_picture(picture), picture.title)
    written: list[Path] = []
    figures: list[str] = []
    for name, (draw, caption) in drawings.items():
        svg, png = render(draw)
        for suffix, data in (("svg", svg.encode()), ("png", png)):
            written.append(folder / f"{name}.{suffix}")
            written[-1].write_bytes(data)
        inline = re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
        figures.append(f"<figure>{inline}<figcaption>{html.escape(caption)}</figcaption></figure>")
    data = msgspec.json.format(msgspec.json.encode(report), indent=1)
    for name, content in (("report.json", data + b"\n"), ("report.html", _page(report, figures, command).encode())):
        written.append(folder / name)
        written[-1].write_bytes(content)
    return written


def known_text(known: Known) -> str:
    """Return an estimate in words."""
    if known.high is None:
        return f"more than {known.low:.3g}" if known.low else "not known"
    if known.low == known.high:
        return f"{known.low:.3g}"
    return f"{known.low:.3g} to {known.high:.3g}" if known.low else f"less than {known.high:.3g}"


def _rates_caption(reports: Sequence[ValidationReport], metric: str) -> str:
    counts = [rate.metrics[metric].chips for report in reports for rate in report.rates]
    chips = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    seen, of = reports[0].rates[0].images, reports[0].images
    return (
        f"Mean {metric} of {chips} simulated chips with its 95 % interval; dotted: the worst chip; dashed: no faults. "
        f"{seen:,} images{'' if seen == of else f' a chip, of {of:,}'}."
    )


def _page(report: ValidationReport | ComparisonReport, figures: Sequence[str], command: str) -> str:
    validations = [report] if isinstance(report, ValidationReport) else report.validations
    title = f"{validations[0].model} under stuck-at faults"
    body = [f"<h1>{html.escape(title)}</h1>", *figures[:1]]
    if isinstance(report, ComparisonReport):
        body += _comparison(report)
    for validation in validations:
        body.append(f"<h2>{html.escape(validation.label)}</h2>")
        body += [_requirements(validation), *(_metric_table(validation, name) for name in validation.clean)]
        body.append(_class_table(validation))
    body += ["<h2>Chips, layers and arrays</h2>", *figures[1:], "<h2>How to repeat it</h2>"]
    body.append(f"<pre>{html.escape(command)}</pre>")
    body += [_facts(validation) for validation in validations]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _comparison(report: ComparisonReport) -> list[str]:
    """The tables of a comparison: what failure rate each tolerates, and by how much each beats the reference."""
    labels = {v.folder: v.label for v in report.validations}
    rates = sorted({d.rate for compared in report.compared for d in compared.differences})
    tolerated = _table(
        ("deployment", "tolerated rate", "95 % interval", "times the reference", "95 % interval", "same cells"),
        [
            [
                labels[c.name],
                known_text(c.tolerated),
                _known_interval(c.tolerated),
                *_times(c),
                "yes" if c.same_cells else "no",
            ]
            for c in report.compared
        ],
    )
    differences = _table(
        ("deployment", *(f"at {rate:.6g}" for rate in rates)),
        [
            [labels[c.name], *(_difference({d.rate: d for d in c.differences}.get(rate)) for rate in rates)]
            for c in report.compared[1:]
        ],
    )
    return [
        f"<h2>Tolerated at a {report.drop:g}-point drop of {html.escape(report.metric)}</h2>",
        tolerated,
        f"<h2>Better than {html.escape(labels[report.reference])}, points</h2>",
        differences,
        "<p>Chips with the same number are compared with each other; where the cells are the same, the same ones are "
        "stuck. Intervals are of 95 %.</p>",
    ]


def _times(compared: Compared) -> list[str]:
    if compared.times is None:
        return ["1 (reference)", ""]
    return [known_text(compared.times), _known_interval(compared.times)]


def _known_interval(known: Known) -> str:
    low, high = known.interval
    return f"{low:.3g} … {'' if high is None else f'{high:.3g}'}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    low, high = difference.interval or (difference.mean, difference.mean)
    return f"{difference.mean:+.2f} ± {(high - low) / 2:.2f}"


def _metric_table(report: ValidationReport, metric: str) -> str:
    heads: tuple[str, ...] = (
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
    parted = any(rate.metrics[metric].chip_deviation is not None for rate in report.rates)
    if parted:
        heads = (*heads, "of it between chips", "by the choice of images")
    rows = [[rate_text(rate), *_cells(rate.metrics[metric], parted, report.drop_known)] for rate in report.rates]
    clean = f", {report.clean[metric]:.2f} % without faults" if report.drop_known else ""
    return f"<h3>{html.escape(metric)}{clean}</h3>{_table(heads, rows)}"


def _cells(found: MetricReport, parted: bool, drop_known: bool) -> list[str]:
    parts = (found.chip_deviation, found.image_deviation) if parted else ()
    return [
        f"{found.mean:.2f}",
        _interval(found.interval),
        f"{found.drop:.2f}" if drop_known else "unknown",
        _interval(found.drop_interval),
        "–" if found.deviation is None else f"{found.deviation:.2f}",
        f"{found.fifth_percentile:.2f}",
        f"{found.worst:.2f}",
        str(found.chips),
        *("–" if part is None else f"{part:.2f}" for part in parts),
    ]


def _class_table(report: ValidationReport) -> str:
    """Return a table of the metric by class, where it is known."""
    classes = dict.fromkeys(name for rate in report.rates for name in rate.by_class)
    if not classes:
        return ""
    rows = [
        [name, *(f"{r.by_class[name]:.1f}" if name in r.by_class else "–" for r in report.rates)] for name in classes
    ]
    table = _table(("class", *(rate_text(rate) for rate in report.rates)), rows)
    return f"<details><summary>{html.escape(next(iter(report.clean)))} by class</summary>{table}</details>"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} … {interval[1]:.2f}"


def _requirements(report: ValidationReport) -> str:
    items = "".join(
        f'<li class="{"met" if r.met else "missed"}">{html.escape(r.text)}: found {r.found:.2f}, '
        f"{'met' if r.met else 'not met'}</li>"
        for r in report.requirements
    )
    return f"<ul>{items}</ul>" if items else ""


def int8_text(report: ValidationReport) -> str:
    """Return how far a validation in int8 is from fp32, in a line; empty in fp32."""
    found = report.int8
    if found is None:
        return ""
    clean = ", ".join(f"{name} {report.clean[name]:.2f} % ({value:.2f} %)" for name, value in found.clean_fp32.items())
    return (
        f"{found.layers} of {found.of_layers} layers; without faults (in fp32): {clean}; outputs "
        f"{found.output_error:.2f} % (rms) from fp32 on {found.calibration_images} images of {found.calibration}"
    )


def _categories_text(faults: FaultCounts) -> str:
    """Return asked and found fractions of other ways to fail; empty where there are none."""
    return "".join(
        f", {name.replace('_', '-')} asked {count.asked:.3g}, found {count.observed:.3g}"
        for name, count in (faults.categories or {}).items()
    )


def _facts(report: ValidationReport) -> str:
    faults = "; ".join(
        f"{rate_text(r)}: asked {r.faults.stuck_off:.3g} off and {r.faults.stuck_on:.3g} on, found "
        f"{r.faults.observed_off:.3g} and {r.faults.observed_on:.3g} of {r.faults.cells:,} cells"
        + _categories_text(r.faults)
        for r in report.rates
    )
    response = report.rates[0].faults.response
    facts = {
        "deployment": report.folder,
        "execution": f"{report.precision}, {report.execution}",
        **({} if report.int8 is None else {"int8": int8_text(report)}),
        **({} if isinstance(report.clean_of, msgspec.UnsetType) else {"clean": report.clean_of.text}),
        "images": f"{report.images:,}",
        **({"images left out": "; ".join(f"{k}: {v}" for k, v in report.skipped.items())} if report.skipped else {}),
        "faults": faults,
        **({"failed cells": response.replace("_", " ")} if response else {}),
        "distribution": f"{report.rates[0].distribution}, rates of a {report.rates[0].rate_unit}",
        "outputs that were not finite": str(sum(r.non_finite for r in report.rates)),
        **({"no chart of layers": report.prediction} if isinstance(report.prediction, str) else {}),
        **{key.replace("_", " "): str(value) for key, value in report.plan.items() if key != "versions"},
        **{f"{name} version": version for name, version in report.versions.items()},
    }
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"
