"""What ``validate`` and ``compare`` show in a terminal."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

from rerampile.runtime.comparison import ComparisonReport, Known
from rerampile.runtime.report import int8_text, known_text
from rerampile.runtime.validation import FaultCounts, ValidationReport
from rerampile.terminal import facts_table, new_table, print_parts, printable

__all__ = ["show_comparison", "show_validation"]


def show_validation(out: Console, report: ValidationReport, page: Path) -> None:
    """Print a validation: a table of failure rates for each metric, what was required, where the report is."""
    for name, clean in report.clean.items():
        rows = new_table(
            (f"{name}, {clean:.2f} % clean" if report.drop_known else name, "left"),
            *((head, "right") for head in ("mean", "± 95 %", "drop", "± 95 %", "deviation", "worst", "chips")),
        )
        for rate in report.rates:
            found = rate.metrics[name]
            rows.add_row(
                "measured chips" if rate.rate is None else f"{rate.rate:.6g}",
                f"{found.mean:.2f}",
                _half_width(found.interval),
                f"{found.drop:.2f}" if report.drop_known else "unknown",
                _half_width(found.drop_interval),
                "" if found.deviation is None else f"{found.deviation:.2f}",
                f"{found.worst:.2f}",
                str(found.chips),
            )
        print_parts(out, rows)
    lost = sum(rate.non_finite for rate in report.rates)
    known = [
        ("images", images_text(report)),
        *(
            [("faults", f"{report.rates[0].distribution}, rates of a {report.rates[0].rate_unit}")]
            if _unusual(report)
            else []
        ),
        ("stuck", stuck_text(report)),
        *([] if (failed := failed_text(report)) is None else [("failed cells", failed)]),
        *([("not finite", f"{lost:,} images with an output that is no number")] if lost else []),
        *([] if isinstance(report.clean_of, msgspec.UnsetType) else [("clean", report.clean_of.text)]),
        ("ran", f"{report.precision}, {report.execution}"),
        *([] if report.int8 is None else [("int8", int8_text(report))]),
        *(("required", f"{r.text}: {r.found:.2f}, {'met' if r.met else 'not met'}") for r in report.requirements),
        ("report", str(page)),
    ]
    print_parts(out, facts_table([(name, printable(text)) for name, text in known]))


def images_text(report: ValidationReport) -> str:
    """Return how many images there were, how many a chip saw, and how many were left out."""
    seen = report.rates[0].images
    words = f"{report.images:,}" if seen == report.images else f"{seen:,} a chip, of {report.images:,}"
    first = next(iter(report.skipped), "")
    return words + (f"; {len(report.skipped)} left out, such as {first}" if report.skipped else "")


def _unusual(report: ValidationReport) -> bool:
    return report.rates[0].distribution != "independent" or report.rates[0].rate_unit != "cell"


def stuck_text(report: ValidationReport) -> str:
    """Return asked and found fractions of stuck cells at the highest rate."""
    faults = _most_faults(report)
    return f"{faults.observed:.4g} of {faults.cells:,} cells found at the highest rate, {faults.asked:.4g} asked"


def failed_text(report: ValidationReport) -> str | None:
    """Return how the hardware treats failed cells, and how many there are of each kind, where the target says so."""
    faults = _most_faults(report)
    counts = [f"{name.replace('_', '-')} {count.observed:.4g}" for name, count in (faults.categories or {}).items()]
    response = [faults.response.replace("_", " ")] if faults.response else []
    return "; ".join([*response, *([", ".join(counts)] if counts else [])]) or None


def _most_faults(report: ValidationReport) -> FaultCounts:
    return max(report.rates, key=lambda rate: rate.rate or 0.0).faults


def _half_width(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{(interval[1] - interval[0]) / 2:.2f}"


def show_comparison(out: Console, report: ComparisonReport, page: Path) -> None:
    """Print a comparison: drops by failure rate, what each deployment tolerates, where the report is."""
    rates = [rate.rate for rate in report.validations[0].rates]
    drops = new_table(
        (f"drop of {report.metric}", "left"),
        ("clean", "right"),
        *((f"at {rate:.6g}", "right") for rate in rates),
    )
    better = new_table(
        (f"better than {printable(report.validations[0].name)}", "left"),
        *((f"at {rate:.6g}", "right") for rate in rates),
        ("same cells", "right"),
    )
    for compared, validation in zip(report.compared, report.validations, strict=True):
        found = [rate.metrics[report.metric] for rate in validation.rates]
        cells = (f"{m.drop:.2f} ± {_half_width(m.drop_interval) or '–'}" for m in found)
        drops.add_row(printable(validation.name), f"{validation.clean[report.metric]:.2f}", *cells)
        if compared.differences:
            pairs = (f"{d.mean:+.2f} ± {_half_width(d.interval) or '–'}" for d in compared.differences)
            better.add_row(printable(validation.name), *pairs, "yes" if compared.same_cells else "no")
    heads = ("tolerated rate", "95 % interval", "times", "95 % interval")
    tolerated = new_table((f"at a drop of {report.drop:g}", "left"), *((head, "right") for head in heads))
    for compared, validation in zip(report.compared, report.validations, strict=True):
        times = ("1", "") if compared.times is None else (known_text(compared.times), _ends(compared.times))
        tolerated.add_row(printable(validation.name), known_text(compared.tolerated), _ends(compared.tolerated), *times)
    for table in (drops, better, tolerated):
        print_parts(out, table)
    chips = min(rate.metrics[report.metric].chips for v in report.validations for rate in v.rates)
    known = [
        ("chips", f"{chips:,}"),
        ("images", f"{report.validations[0].images:,}"),
        *((f"int8 {v.name}", int8_text(v)) for v in report.validations if v.int8 is not None),
        ("report", str(page)),
    ]
    print_parts(out, facts_table([(name, printable(text)) for name, text in known]))


def _ends(known: Known) -> str:
    low, high = known.interval
    return f"{low:.3g} to {'?' if high is None else f'{high:.3g}'}"
