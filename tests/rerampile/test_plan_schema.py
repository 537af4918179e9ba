from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import jsonschema
import onnx
import pytest

import rerampile
from rerampile.errors import PlanFormatError
from rerampile.json_schema import Definition
from rerampile.plan import decode_plan
from rerampile.plan_schema import plan_schema
from rerampile.runtime.report_schema import report_schema

REMEDY = "regenerate it with: python docs/plan_format.py"


@pytest.fixture(scope="module")
def plan(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = rerampile.compile_model(small_model, out=tmp_path_factory.mktemp("out") / "small", prune=0.5).folder
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture(scope="module")
def valid() -> Callable[[object], bool]:
    return jsonschema.Draft202012Validator(plan_schema()).is_valid


SCHEMAS = pytest.mark.parametrize(("name", "schema"), [("plan", plan_schema()), ("report", report_schema())])


@SCHEMAS
def test_the_shipped_schema_is_current(name: str, schema: Definition) -> None:
    shipped = json.loads((files("rerampile") / f"{name}.schema.json").read_text(encoding="utf-8"))
    assert shipped == schema, REMEDY


@SCHEMAS
def test_it_is_a_schema_of_draft_2020_12(name: str, schema: Definition) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


@SCHEMAS
def test_every_record_and_every_field_is_described(name: str, schema: Definition) -> None:
    records = schema["$defs"] | ({name: schema} if "properties" in schema else {})
    silent = [
        f"{name}.{field}" if field else name
        for name, record in records.items()
        for field, value in {"": record, **record["properties"]}.items()
        if not value.get("description")
    ]
    assert silent == [], "say what it is in the docstring of its class, under Attributes"


def test_a_real_plan_is_valid(plan: dict[str, Any], valid: Callable[[object], bool]) -> None:
    assert valid(plan)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: plan.pop("format_version"),
        lambda plan: plan.update(format_version=2),
        lambda plan: plan.update(format="other-plan"),
        lambda plan: plan.update(surprise=1),
        lambda plan: plan["layers"][0].update(scheme="differentiall"),
        lambda plan: plan["layers"][0].update(groups=-1),
        lambda plan: plan["arrays"][0]["partitions"][0].pop("row"),
        lambda plan: plan["arrays"][0].update(surprise=1),
        lambda plan: plan["files"]["deployed.onnx"].update(sha256="abc"),
    ],
)
def test_schema_and_reader_refuse_the_same(
    plan: dict[str, Any], valid: Callable[[object], bool], spoil: Callable[[dict[str, Any]], object]
) -> None:
    spoiled = json.loads(json.dumps(plan))
    spoil(spoiled)
    assert not valid(spoiled)
    with pytest.raises(PlanFormatError):
        decode_plan(json.dumps(spoiled).encode(), "spoiled")


def test_a_partition_has_a_range_or_a_list(plan: dict[str, Any], valid: Callable[[object], bool]) -> None:
    partition = plan["arrays"][0]["partitions"][0]
    both = json.loads(json.dumps(plan))
    both["arrays"][0]["partitions"][0] |= {"inputs": [0, 1], "input_index": [0]}
    neither = json.loads(json.dumps(plan))
    neither["arrays"][0]["partitions"][0] = {key: partition[key] for key in ("layer", "row", "column", "groups")}
    assert not valid(both)
    assert not valid(neither)


def test_the_target_has_its_words(plan: dict[str, Any], valid: Callable[[object], bool]) -> None:
    assert plan["target"]["cell"]["levels"] == "analog"
    assert not valid({**plan, "target": {**plan["target"], "chips": "many"}})
