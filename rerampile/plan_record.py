"""What all records of a plan have in common, and the kinds of their numbers."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Count", "Fraction", "Range", "Record", "Sha256"]

Count = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Range = Annotated[tuple[Count, Count], Meta(description="half-open: [first, one past the last)")]


class Record(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A part of the plan; unknown fields are refused."""
