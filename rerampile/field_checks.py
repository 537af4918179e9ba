"""Checks of records that come from TOML or JSON: each takes a key and the value found there, and returns the field's.

Errors name the key relative to the object at hand, and whoever holds that object puts its own part in front. TOML has
no null: a field that is None is a word there (:data:`WORDS_FOR_NONE`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from rerampile.errors import ConfigError, did_you_mean

__all__ = [
    "WORDS_FOR_NONE",
    "Check",
    "build",
    "check_fields",
    "choice",
    "expected",
    "integer",
    "keys",
    "line",
    "or_none",
    "positive",
    "record",
    "siemens",
]

WORDS_FOR_NONE = {
    "levels": "analog",
    "level_table": "uniform",
    "dac_bits": "ideal",
    "adc_bits": "ideal",
    **dict.fromkeys(("arrays_per_core", "cores_per_tile", "tiles_per_chip", "chips"), "unlimited"),
    **dict.fromkeys(("unformed", "partially_formed", "over_formed"), "never"),
    "low": "g_off",
    "high": "g_on",
}

T = TypeVar("T")
Check = Callable[[str, Any], Any]


def expected(key: str, what: str, found: object) -> ConfigError:
    """Return the error of a value that is not what its key asks for."""
    return ConfigError(f"{key}: expected {what}, got {reprlib.repr(found)}")


def or_none(check: Check) -> Check:
    """Return a check that takes None, and the key's word for it, besides."""

    def checked(key: str, value: Any) -> Any:
        return None if value is None or value == WORDS_FOR_NONE[key] else check(key, value)

    return checked


def _or_word(key: str) -> str:
    return f' or "{WORDS_FOR_NONE[key]}"' if key in WORDS_FOR_NONE else ""


def integer(low: int, high: int) -> Check:
    """Return the check of a whole number in a range."""

    def check(key: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise expected(key, f"an integer from {low} to {high}{_or_word(key)}", value)

    return check


def siemens(key: str, value: Any) -> float:
    """Check a conductance."""
    # No cell conducts 10 S; whoever writes 100 means 100 µS.
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 10:
        return float(value)
    raise expected(key, f"a conductance in siemens from 0 to 10 (100 µS is 100e-6){_or_word(key)}", value)


def positive(key: str, value: Any) -> float:
    """Check a number above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise expected(key, "a number above 0", value)


def choice(words: tuple[str, ...]) -> Check:
    """Return the check of one word of some."""

    def check(key: str, value: Any) -> str:
        if isinstance(value, str) and value in words:
            return value
        raise expected(key, f"one of {', '.join(words)}", value)

    return check


def line(shortest: int, longest: int) -> Check:
    """Return the check of one line of text."""

    def check(key: str, value: Any) -> str:
        if isinstance(value, str) and value.isprintable() and shortest <= len(value) <= longest:
            return value
        raise expected(key, f"one line of {shortest} to {longest} printable characters", value)

    return check


def keys(key: str, value: Any) -> Mapping[str, Any]:
    """Check a table of keys."""
    if isinstance(value, Mapping):
        return value
    raise expected(key, f"a table of keys{_or_word(key)}", value)


def record(cls: type[T]) -> Check:
    """Return the check of a dataclass, which may be given as a table of its fields."""

    def check(key: str, value: Any) -> T:
        return value if isinstance(value, cls) else build(cls, keys(key, value), f"{key}.")

    return check


def check_fields(instance: object, checks: Mapping[str, Check]) -> None:
    """Check fields of a frozen dataclass, and set them to what the checks return."""
    for key, check in checks.items():
        object.__setattr__(instance, key, check(key, getattr(instance, key)))


def build(cls: type[T], values: Mapping[str, Any], part: str) -> T:
    """Make a dataclass from a table of its fields, with ``part`` in front of every error."""
    known = {field.name: field.default is MISSING for field in fields(cls)}  # type: ignore[arg-type]
    try:
        for key in values:
            if key not in known:
                raise ConfigError(f"{key}: unknown key{did_you_mean(str(key), known)}")
        for key, required in known.items():
            if required and key not in values:
                needed = ", ".join(name for name, needed in known.items() if needed)
                raise ConfigError(f"{key}: missing key (required: {needed})")
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{part}{error}") from None
