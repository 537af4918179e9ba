"""The JSON Schema of ``report.json`` and ``prediction.json``, made from the types that write it.

It ships in the package as ``report.schema.json``; ``python docs/plan_format.py`` writes that file.
"""

from __future__ import annotations

from rerampile.json_schema import DRAFT, Definition, described_records
from rerampile.runtime.comparison import ComparisonReport
from rerampile.runtime.predict import Prediction
from rerampile.runtime.validation import ValidationReport

__all__ = ["report_schema"]

_REPORTS = (ValidationReport, ComparisonReport, Prediction)


def report_schema() -> Definition:
    """Return the JSON Schema (draft 2020-12) of the reports of ``validate``, ``compare`` and ``predict``."""
    return {
        "$schema": DRAFT,
        "title": "rerampile report",
        "oneOf": [{"$ref": f"#/$defs/{report.__name__}"} for report in _REPORTS],
        "$defs": described_records(_REPORTS),
    }
