"""The JSON Schema of a plan, made from the types that read and write it.

It ships in the package as ``plan.schema.json``; ``python docs/plan_format.py`` writes that file.
"""

from __future__ import annotations

from rerampile.field_checks import WORDS_FOR_NONE
from rerampile.json_schema import DRAFT, Definition, described_records
from rerampile.plan import Plan
from rerampile.target import LEFT_OUT, Target

__all__ = ["plan_schema"]

_EITHER_RANGE_OR_INDEX = [
    {"oneOf": [{"required": [f"{axis}s"]}, {"required": [f"{axis}_index"]}]} for axis in ("input", "output")
]


def plan_schema() -> Definition:
    """Return the JSON Schema (draft 2020-12) of a plan."""
    definitions = described_records([Plan, Target])
    for name in ("Target", "Cell", "Stuck", "FailedCells", "Category"):
        _as_written(definitions[name])
    for name in ("Partition", "SliceCopy", "Region"):
        definitions[name]["allOf"] = _EITHER_RANGE_OR_INDEX
    plan = definitions.pop("Plan")
    plan["properties"]["target"] |= {"$ref": "#/$defs/Target"}
    del plan["properties"]["target"]["type"]
    return {"$schema": DRAFT, **plan, "title": "rerampile deployment plan", "$defs": definitions}


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
    definition["required"] = [key for key in properties if key not in LEFT_OUT]
    definition["additionalProperties"] = False
