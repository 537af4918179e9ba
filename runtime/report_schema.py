"""The JSON Schema of ``report.json``, ``prediction.json`` and ``search.json``, made from the types that write it.

It ships in the package as ``report.schema.json``; ``python docs/plan_format.py`` writes that file.
"""

from __future__ import annotations

from rerampile.json_schema import DRAFT, Definition, described_records
from rerampile.runtime.comparison import ComparisonReport
from rerampile.runtime.predict import Prediction
from rerampile.runtime.search_report import SearchReport
from rerampile.runtime.validation import ValidationReport

__all__ = ["report_schema"]

_REPORTS = (ValidationReport, ComparisonReport, Prediction, SearchReport)


def report_schema() -> Definition:
    """Return the JSON Schema (draft 2020-12) of what ``validate``, ``compare``, ``predict`` and ``search`` report."""
    return {
        "$schema": DRAFT,
        "title": "rerampile report",
        "oneOf": [{"$ref": f"#/$defs/{report.__name__}"} for report in _REPORTS],
        "$defs": described_records(_REPORTS),
    }
