"""Plans of tiny models, byte for byte: a change of the format or of a decision shows as a diff.

What depends on versions of other software is left out: the producer's version, hashes and sizes of files that ONNX or
ONNX Runtime have a hand in, the verification; means are rounded. All else is compared, the hash of the conductance
file and of the decoded weights included. To write the files again after a change that is meant::

    RERAMPILE_WRITE_GOLDEN=1 pytest tests/rerampile/test_golden.py

and read the diff before it is committed. Files of an older ``format_version`` are never written again: they stay in
their folder and are read for as long as that version is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from rerampile import Plan, Target, compile_model
from rerampile.plan import FORMAT_VERSION, FileRecord, decode_plan, encode_plan
from rerampile.plan_schema import plan_schema

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
ANALOG = {"g_off": 1e-6, "g_on": 1e-4}


def counting(*shape: int, every: int = 0) -> np.ndarray:
    """Weights in sixteenths, by arithmetic alone; each ``every``-th is zero."""
    numbers = np.arange(int(np.prod(shape)))
    weights = ((numbers * 7) % 31 - 15.5) / 16
    return np.where(numbers % every == 0 if every else False, 0, weights).astype(np.float32).reshape(shape)


def target(rows: int, columns: int, **keys: Any) -> Target:
    return Target.from_dict({"name": "golden", "rows": rows, "columns": columns, "cell": ANALOG, **keys})


# Text, weights, options.
MODELS: dict[str, tuple[str, dict[str, np.ndarray], dict[str, Any]]] = {
    "folded_depthwise_twins": (
        "g (float[N,6,4,4] image) => (float[N,4,2,2] out) {"
        " a = Conv <group=6, pads=[1,1,1,1]> (image, depthwise)"
        " b = BatchNormalization (a, scale, shift, mean, variance)"
        " c = Relu (b)"
        " out = Conv <strides=[2,2]> (c, pointwise) }",
        {
            "depthwise": counting(6, 1, 3, 3),
            "pointwise": counting(4, 6, 1, 1),
            "scale": np.full(6, 0.5, np.float32),
            "shift": counting(6),
            "mean": counting(6),
            "variance": np.full(6, 4, np.float32),
        },
        {"target": target(32, 8, pair_layout="twin", arrays_per_core=2, cores_per_tile=None), "mapping": "two_column"},
    ),
    "pruned_sliced_packed": (
        "g (float[N,12] features) => (float[N,3] out) {"
        " a = Gemm <transB=1> (features, first)"
        " b = Tanh (a)"
        " out = MatMul (b, second) }",
        {"first": counting(10, 12) * np.tile([1, 1 / 64], 6).astype(np.float32), "second": counting(10, 3, every=3)},
        {
            "target": target(8, 24, slices=2, cell={**ANALOG, "levels": 4}),
            "mapping": "differential",
            "prune": {"10": 0.5},  # the inputs that count little go
            "pack": True,
        },
    ),
    "quantised_measured_table": (
        "g (uint8[N,8] x) => (int32[N,5] y, float[N,3] z) {"
        " y = MatMulInteger (x, whole, x_zero, whole_zero)"
        " f = Cast <to=1> (x)"
        " t = Transpose (behind)"
        " z = MatMul (f, t) }",
        {
            "whole": ((np.arange(40) * 7) % 31).astype(np.int8).reshape(8, 5),
            "x_zero": np.array(128, np.uint8),
            "whole_zero": np.array(3, np.int8),
            "behind": counting(3, 8),
        },
        {
            "target": target(
                16, 16, cell={"g_off": 0.0, "g_on": 8e-5, "levels": 4, "level_table": [0.0, 2e-5, 5e-5, 8e-5]}
            ),
            "mapping": "offset",
            "scale": "tensor",
        },
    ),
    "partitions_with_gains": (
        "g (float[N,20] features, float[N,4,3,3] image) => (float[N,3] out, float[N,4,1,1] pooled) {"
        " out = MatMul (features, tall)"
        " pooled = Conv <group=2> (image, grouped) }",
        {
            "tall": counting(20, 3) * (np.arange(20) % 7 != 0).astype(np.float32)[:, None],
            "grouped": counting(4, 2, 3, 3),
        },
        {"target": target(12, 8), "scale": "partition"},
    ),
}


def compiled(name: str, folder: Path) -> Plan:
    text, weights, options = MODELS[name]
    model = onnx.parser.parse_model(f"{HEADER} {text}")
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in weights.items())
    return stable(compile_model(model, out=folder / "out", **options).plan)


def stable(plan: Plan) -> Plan:
    """The plan without what depends on versions of other software."""
    replace = msgspec.structs.replace
    unknown = FileRecord(sha256="0" * 64, bytes=0)
    ours = ("conductances.safetensors", "masks.safetensors")
    return replace(
        plan,
        producer=replace(plan.producer, version="0"),
        model=replace(plan.model, sha256=unknown.sha256, bytes=0),
        files={name: record if name in ours else unknown for name, record in plan.files.items()},
        verification=None,
        totals=replace(plan.totals, mean_pair_conductance=rounded(plan.totals.mean_pair_conductance)),
        layers=[replace(p, mean_cell_conductance=rounded(p.mean_cell_conductance)) for p in plan.layers],
    )


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_as_they_were(name: str, tmp_path: Path) -> None:
    path = GOLDEN / f"v{FORMAT_VERSION}" / f"{name}.json"
    data = encode_plan(compiled(name, tmp_path))
    if os.environ.get("RERAMPILE_WRITE_GOLDEN"):
        path.write_bytes(data)
        pytest.skip(f"{path.name} was written; read the diff")
    assert data.decode() == path.read_text(encoding="utf-8"), "if this change is meant, see the top of this file"


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_files_of_every_version_are_read(path: Path) -> None:
    data = path.read_bytes()
    plan = decode_plan(data, path.name)
    assert f"v{plan.format_version}" == path.parent.name
    Target.from_dict(plan.target)
    if plan.format_version == FORMAT_VERSION:
        assert encode_plan(plan) == data
        jsonschema.validate(json.loads(data), plan_schema())


def test_what_the_golden_plans_show() -> None:
    """The tiny models keep exercising what they are there for."""
    plans = {name: decode_plan((GOLDEN / "v1" / f"{name}.json").read_bytes(), name) for name in MODELS}
    twins, packed, table, partitions = plans.values()
    assert [fold.op for fold in twins.layers[0].folds] == ["BatchNormalization"]
    assert twins.arrays[0].twin == 1
    assert twins.arrays[0].partitions[0].groups == (0, 3)
    assert {layer.slices for layer in packed.layers} == {2}
    assert packed.totals.arrays_saved_by_pruning > 0
    assert packed.totals.arrays_saved_by_packing > 0
    assert any(partition.input_index for array in packed.arrays for partition in array.partitions)
    assert table.layers[0].element_type == "int8"
    assert table.layers[1].constant_chain == ["Transpose_t"]
    assert table.layers[0].reference is not None
    assert [layer.segments for layer in partitions.layers] == [[(0, 15), (15, 20)], [(0, 12), (12, 18)]]
