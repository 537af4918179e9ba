"""What can go wrong, as a small tree of exceptions.

Everything below :class:`RerampileError` is something that a user can cause and mend: its message says what is wrong,
where (node, tensor, key or JSON path), what was expected against what was found, and how to mend it. The command line
prints that one line and exits with 1. :class:`InternalError` stands apart on purpose: it is a bug of rerampile, keeps
its traceback and exits with 70.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CapacityError",
    "ConfigError",
    "DataError",
    "FaultRunError",
    "InternalError",
    "ModelError",
    "PlanFormatError",
    "RerampileError",
    "UnsupportedModelError",
    "did_you_mean",
]

_LISTED = 20  # words that a message lists


class RerampileError(Exception):
    """A user can cause it and mend it."""


class ModelError(RerampileError):
    """The model file is unreadable, damaged or not valid ONNX."""


class UnsupportedModelError(ModelError):
    """The model is valid ONNX, but it cannot be deployed."""


class ConfigError(RerampileError, ValueError):
    """An option, a target file or a masks file asks for something that does not exist or does not fit."""


class CapacityError(RerampileError):
    """The target has too few or too small arrays for the model."""


class PlanFormatError(RerampileError, ValueError):
    """A deployment folder, its plan or its conductances are damaged, incomplete or of another version."""


class DataError(RerampileError):
    """Input data is missing, damaged or does not fit the model."""


class FaultRunError(RerampileError):
    """ONNX Runtime refused the model or its inputs, or processes that ran it were lost."""


class InternalError(Exception):
    """An invariant broke: a bug of rerampile, not of its user."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean a, b?)"``, or the first known words where none is near."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    if near:
        return f" (did you mean {', '.join(near)}?)"
    more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return f" (known: {', '.join(words[:_LISTED]) or 'none'}{more})"
