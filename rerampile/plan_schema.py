"""The JSON Schema of a plan, made from the types that read and write it.

It ships in the package as ``plan.schema.json``; ``python docs/plan_format.py`` writes that file. Descriptions are the
``Attributes`` sections of the docstrings, so that a field is described in one place.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from rerampile.plan import Plan
from rerampile.target import WORDS_FOR_NONE, Target

__all__ = ["plan_schema"]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ATTRIBUTE = re.compile(r"^ +(\w+): (.+(?:\n(?! *\w+: ).+)*)", re.MULTILINE)

_EITHER_RANGE_OR_INDEX = [
    {"oneOf": [{"required": [f"{axis}s"]}, {"required": [f"{axis}_index"]}]} for axis in ("input", "output")
]

Definition = dict[str, Any]


def plan_schema() -> Definition:
    """Return the JSON Schema (draft 2020-12) of a plan."""
    _, records = msgspec.json.schema_components([Plan, Target], ref_template="#/$defs/{name}")
    definitions: dict[str, Definition] = dict(sorted(records.items()))
    for definition in definitions.values():
        _describe(definition)
    for name in ("Target", "Cell", "Stuck"):
        _as_written(definitions[name])
    for name in ("Partition", "Region"):
        definitions[name]["allOf"] = _EITHER_RANGE_OR_INDEX
    plan = definitions.pop("Plan")
    plan["properties"]["target"] |= {"$ref": "#/$defs/Target"}
    del plan["properties"]["target"]["type"]
    return {"$schema": _DRAFT, **plan, "title": "rerampile deployment plan", "$defs": definitions}


def _as_written(definition: Definition) -> None:
    """Turn a part of the target into what plans hold: every key written out, and words for None."""
    properties = definition["properties"]
    for key, value in properties.items():
        value.pop("default", None)
        for choice in value.get("anyOf", ()):
            if choice == {"type": "null"}:
                choice.clear()
                choice["const"] = WORDS_FOR_NONE[key]
                value["description"] = value["description"].replace("None", f'"{choice["const"]}"')
    definition["required"] = list(properties)
    definition["additionalProperties"] = False


def _describe(definition: Definition) -> None:
    """Move what a docstring says of each attribute to its property."""
    text, _, attributes = definition["description"].partition("Attributes:")
    definition["description"] = _plain(text)
    for name, meaning in _ATTRIBUTE.findall(attributes):
        definition["properties"][name]["description"] = _plain(meaning)


def _plain(text: str) -> str:
    """Return a docstring's text on one line, as Markdown."""
    return re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
