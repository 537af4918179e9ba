"""JSON Schemas made from the types that read and write a format.

Descriptions are the ``Attributes`` sections of the docstrings, so that a field is described in one place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

__all__ = ["DRAFT", "Definition", "described_records"]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE = re.compile(r"^ +(\w+): (.+(?:\n(?! *\w+: ).+)*)", re.MULTILINE)

Definition = dict[str, Any]


def described_records(types: Iterable[type]) -> dict[str, Definition]:
    """Return the schema of each record that some types are made of, by name, with all fields described."""
    _, records = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    definitions: dict[str, Definition] = dict(sorted(records.items()))
    for definition in definitions.values():
        _describe(definition)
    return definitions


def _describe(definition: Definition) -> None:
    """Move what a docstring says of each attribute to its property."""
    text, _, attributes = definition["description"].partition("Attributes:")
    definition["description"] = _plain(text)
    for name, meaning in _ATTRIBUTE.findall(attributes):
        definition["properties"][name]["description"] = _plain(meaning)


def _plain(text: str) -> str:
    """Return a docstring's text on one line, as Markdown."""
    return re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
