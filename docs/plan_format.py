"""Write what is generated of the formats: the JSON Schemas, and the tables and the example of the plan's page.

    python docs/plan_format.py

Tests compare the files with what this would write.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser

import rerampile
from rerampile.plan_schema import plan_schema
from rerampile.runtime.report_schema import report_schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {"plan.schema.json": plan_schema, "report.schema.json": report_schema}
PAGE = ROOT / "docs" / "plan-format.md"

TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EXAMPLE = re.compile(r"(<!-- example -->\n+```json\n)(.*?)(```\n)", re.DOTALL)

LEFT_OUT = {
    "LayerPlan": ("clip", "correction", "segments", "copies"),
    "Totals": ("arrays_spent",),
    "ChipPlan": ("categories",),
    "Target": ("failed_cells",),
}
"""Fields of records that write out all others."""

Definition = dict[str, Any]


def schema_text(schema: Definition) -> str:
    """A schema file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def page_text(page: str) -> str:
    """The page with its tables and its example renewed; an example that differs only in what varies is kept."""
    schema = plan_schema()
    page = TABLE.sub(lambda found: found[1] + _table(schema, found[2]) + found[3], page)
    with tempfile.TemporaryDirectory() as folder:
        new = (example(Path(folder)) / "plan.json").read_text()
    return EXAMPLE.sub(lambda found: found[1] + (found[2] if _same(found[2], new) else new) + found[3], page)


def example(folder: Path) -> Path:
    """Compile the example of the page into a folder, and return the deployment."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        tiny (float[N, 3] x) => (float[N, 2] y) { z = MatMul (x, W)  y = Relu (z) }
        """
    )
    weights = np.array([[1, 0.5], [-2, 0], [0, -1]], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "W"))
    onnx.save(model, folder / "tiny.onnx")
    target = rerampile.Target(name="tiny", rows=4, columns=4, cell={"g_off": 1e-6, "g_on": 9e-6})
    return rerampile.compile_model(folder / "tiny.onnx", out=folder / "tiny", target=target).folder


def stable(plan: Definition) -> Definition:
    """A plan without what differs between versions of the packages that made it."""
    verification = {
        key: value for key, value in plan["verification"].items() if not key.startswith(("max", "onnx", "out"))
    }
    varying = {"producer": plan["producer"]["name"], "files": sorted(plan["files"]), "verification": verification}
    return {**plan, **varying, "plan_sha256": None}


def _same(shown: str, new: str) -> bool:
    try:
        return stable(json.loads(shown)) == stable(json.loads(new))
    except (ValueError, KeyError):
        return False


def _table(schema: Definition, name: str) -> str:
    definition = schema if name == "Plan" else schema["$defs"][name]
    lines = ["\n", "| field | type | meaning |\n", "|---|---|---|\n"]
    for field, value in definition["properties"].items():
        left_out = name in ("Plan", "ArrayPlan", "Partition", "Region") or field in LEFT_OUT.get(name, ())
        optional = left_out and field not in definition["required"]
        kind = _type(value).removesuffix(" or null") + ", optional" if optional else _type(value)
        lines.append(f"| `{field}` | {kind} | {value['description']} |\n")
    return "".join(lines) + "\n"


def _type(value: Definition) -> str:
    """A field's type in a few words."""
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    if "anyOf" in value:
        kinds = dict.fromkeys(_type(choice) for choice in value["anyOf"])
        return "number" if set(kinds) == {"integer", "number"} else " or ".join(kinds)
    if "enum" in value or "const" in value:
        return ", ".join(f"`{json.dumps(word)}`" for word in value.get("enum", [value.get("const")]))
    if "prefixItems" in value:
        return "range"
    if value["type"] == "array":
        return f"[{_type(value['items'])}, …]"
    if value["type"] == "object":
        return f"object of {_type(value['additionalProperties'])}" if "additionalProperties" in value else "object"
    return "sha256" if "pattern" in value else value["type"]


if __name__ == "__main__":
    for name, schema in SCHEMAS.items():
        (ROOT / "rerampile" / name).write_text(schema_text(schema()))
    PAGE.write_text(page_text(PAGE.read_text()))
