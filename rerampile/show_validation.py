"""What ``validate`` shows in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rerampile.runtime.validation import ValidationReport
from rerampile.show import facts_table, new_table, print_parts, printable

__all__ = ["show_validation"]


def show_validation(out: Console, report: ValidationReport, page: Path) -> None:
    """Print a validation: a table of failure rates for each metric, what was required, where the report is."""
    for name, clean in report.clean.items():
        rows = new_table(
            (f"{name}, {clean:.2f} % clean", "left"),
            *((head, "right") for head in ("mean", "± 95 %", "drop", "± 95 %", "deviation", "worst", "chips")),
        )
        for rate in report.rates:
            found = rate.metrics[name]
            rows.add_row(
                "measured chips" if rate.rate is None else f"{rate.rate:.6g}",
                f"{found.mean:.2f}",
                _half_width(found.interval),
                f"{found.drop:.2f}",
                _half_width(found.drop_interval),
                "" if found.deviation is None else f"{found.deviation:.2f}",
                f"{found.worst:.2f}",
                str(found.chips),
            )
        print_parts(out, rows)
    known = [
        ("images", f"{report.images:,}"),
        ("ran", report.execution),
        *(("required", f"{r.text}: {r.found:.2f}, {'met' if r.met else 'not met'}") for r in report.requirements),
        ("report", str(page)),
    ]
    print_parts(out, facts_table([(name, printable(text)) for name, text in known]))


def _half_width(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{(interval[1] - interval[0]) / 2:.2f}"
