"""The page on the plan format tells the truth: its tables, its example, its picture and its reader."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

import rerampile
from rerampile.matrix_view import MatrixView
from rerampile.plan_schema import plan_schema
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.schemes import MAPPINGS

REMEDY = "regenerate it with: python docs/plan_format.py"

ANALOG = {"g_off": 1e-6, "g_on": 100e-6}
TARGETS: dict[str, dict[str, Any]] = {
    "analog": {"cell": ANALOG},
    "twin": {"cell": ANALOG, "pair_layout": "twin"},
    "levels": {"cell": {**ANALOG, "levels": 16}},
    "many levels": {"cell": {**ANALOG, "levels": 1000}},
    "slices": {"cell": {**ANALOG, "levels": 4}, "slices": 3},
    "twin slices": {"cell": {**ANALOG, "levels": 4}, "slices": 3, "pair_layout": "twin"},
    "measured": {"cell": {**ANALOG, "levels": 4, "level_table": [1e-6, 30e-6, 72e-6, 100e-6]}, "slices": 2},
}


@pytest.fixture(scope="module")
def writer(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_format", project_root / "docs" / "plan_format.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(project_root: Path) -> str:
    return (project_root / "docs" / "plan-format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(page: str) -> dict[str, Any]:
    found = re.search(r"<!-- reader -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    namespace: dict[str, Any] = {}
    exec(compile(found[1], "plan-format.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def example(writer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writer.example(tmp_path_factory.mktemp("example"))


def test_tables_and_example_are_current(writer: ModuleType, page: str) -> None:
    assert writer.page_text(page) == page, REMEDY


def test_the_example_has_its_own_checksum(page: str) -> None:
    found = re.search(r"<!-- example -->\n+```json\n(.*?)```\n", page, re.DOTALL)
    assert found
    digits = json.loads(found[1])["plan_sha256"]
    assert hashlib.sha256(found[1].replace(digits, "0" * 64).encode()).hexdigest() == digits


def test_every_record_has_a_table(page: str) -> None:
    assert sorted(re.findall(r"<!-- table: (\w+) -->", page)) == sorted({"Plan", *plan_schema()["$defs"]})


def test_the_example_by_hand_is_what_is_compiled(page: str, example: Path) -> None:
    drawn = re.search(r"<!-- picture -->\n```text\n(.*?)```", page, re.DOTALL)
    assert drawn
    rows = [re.findall(r"(\d+) µS", line) for line in drawn[1].splitlines()[2:]]
    array = rerampile.load_deployment(example).array(0)
    np.testing.assert_allclose(array, np.array(rows, float) * 1e-6, rtol=1e-6)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("prune_and_pack", [False, True])
@pytest.mark.parametrize("scale", ["channel", "partition"])
def test_the_reader_reads_what_was_written(
    reader: dict[str, Any],
    model: onnx.ModelProto,
    tmp_path: Path,
    target: str,
    mapping: str,
    prune_and_pack: bool,
    scale: str,
) -> None:
    size = 48 if prune_and_pack else 24
    hardware = rerampile.Target(name="test", rows=size, columns=size, **TARGETS[target])
    prune = {"rows": 0.8, "grouped": 0.7} if prune_and_pack else None
    options: dict[str, Any] = {"mapping": mapping, "scale": scale, "prune": prune, "pack": prune_and_pack}
    deployment = rerampile.compile_model(model, out=tmp_path / "out", target=hardware, **options)
    plan, tensors = reader["read"](deployment.folder)
    for layer, record in zip(deployment.plan.layers, plan["layers"], strict=True):
        view = MatrixView(
            groups=layer.groups,
            outputs=layer.outputs,
            inputs=layer.inputs,
            tensor_shape=tuple(layer.weight_shape),
            stored_shape=tuple(layer.stored_shape),
            permutation=None if layer.permutation is None else tuple(layer.permutation),
        )
        read = reader["weights"](plan, tensors, record)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, view.tensor(deployment.weights(layer)))
    for array in plan["arrays"]:
        np.testing.assert_array_equal(reader["picture"](plan, tensors, array), deployment.array(array["id"]))


def test_the_reader_reads_copies(reader: dict[str, Any], model: onnx.ModelProto, tmp_path: Path) -> None:
    """Their arrays are those of the first copy; the sum of all results times ``gain / count`` is that of one."""
    hardware = rerampile.Target(name="test", rows=24, columns=24, arrays_per_core=500, **TARGETS["analog"])
    deployment = rerampile.compile_model(model, out=tmp_path / "out", target=hardware, spend_spare_arrays=True)
    plan, tensors = reader["read"](deployment.folder)
    assert max(layer["copies"]["count"] for layer in plan["layers"]) > 1
    for array in plan["arrays"]:
        np.testing.assert_array_equal(reader["picture"](plan, tensors, array), deployment.array(array["id"]))
    for number, layer in enumerate(plan["layers"]):
        parts = [p for array in plan["arrays"] for p in array["partitions"] if p["layer"] == number]
        copies = [[{**p, "copy": 0} for p in parts if p.get("copy", 0) == c] for c in range(layer["copies"]["count"])]
        assert all(copy == copies[0] for copy in copies)


@pytest.mark.parametrize("target", ["analog", "twin", "slices"])
def test_the_reader_knows_columns_that_changed_roles(
    reader: dict[str, Any], model: onnx.ModelProto, tmp_path: Path, target: str
) -> None:
    hardware = rerampile.Target(name="test", rows=24, columns=24, **TARGETS[target])
    deployment = rerampile.compile_model(model, out=tmp_path / "out", target=hardware)
    faults = draw_faults(ChipGeometry.of(deployment), FaultModel.of_rate(0.1), hardware, seed=0, run=0)
    source = ChipSource(path=deployment.folder / "plan.json", number=0, faults=faults)
    chip = program_chip(deployment, source, tmp_path / "chip", steps=("compensate", "assign", "flip"))
    plan, tensors = reader["read"](chip.folder)
    assert any("flipped" in part for array in plan["arrays"] for part in array["partitions"])
    for array in plan["arrays"]:
        np.testing.assert_array_equal(reader["picture"](plan, tensors, array), chip.array(array["id"]))


@pytest.mark.parametrize("target", ["slices", "twin slices", "measured"])
def test_the_reader_knows_copies(reader: dict[str, Any], model: onnx.ModelProto, tmp_path: Path, target: str) -> None:
    hardware = rerampile.Target(name="test", rows=24, columns=24, **TARGETS[target])
    prune = {"rows": 0.8}
    deployment = rerampile.compile_model(model, out=tmp_path / "out", target=hardware, prune=prune, protect_msb=1)
    plan, tensors = reader["read"](deployment.folder)
    assert any("slice_copies" in array for array in plan["arrays"])
    for array in plan["arrays"]:
        np.testing.assert_array_equal(reader["picture"](plan, tensors, array), deployment.array(array["id"]))


def test_the_reader_gives_the_weights_that_went_in(
    reader: dict[str, Any], model: onnx.ModelProto, tmp_path: Path
) -> None:
    deployment = rerampile.compile_model(model, out=tmp_path / "out")
    plan, tensors = reader["read"](deployment.folder)
    went_in = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert {layer["name"] for layer in plan["layers"]} == set(went_in)
    for layer in plan["layers"]:
        np.testing.assert_allclose(reader["weights"](plan, tensors, layer), went_in[layer["name"]], rtol=0, atol=1e-5)


def test_the_reader_refuses_a_newer_version(reader: dict[str, Any], example: Path, tmp_path: Path) -> None:
    newer = json.loads((example / "plan.json").read_text()) | {"format_version": 2}
    (tmp_path / "plan.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="version"):
        reader["read"](tmp_path)


def test_the_deployed_model_has_windows_into_the_cells(
    reader: dict[str, Any], model: onnx.ModelProto, tmp_path: Path
) -> None:
    hardware = rerampile.Target(name="test", rows=24, columns=24, **TARGETS["slices"])
    folder = rerampile.compile_model(model, out=tmp_path / "out", target=hardware).folder
    plan, tensors = reader["read"](folder)
    data = (folder / "conductances.safetensors").read_bytes()
    windows: dict[str, np.ndarray] = {}
    for tensor in onnx.load(folder / "deployed.onnx", load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where.get("location") == "conductances.safetensors":
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = np.frombuffer(data, dtype, int(where["length"]) // dtype.itemsize, int(where["offset"]))
            windows[tensor.name] = values.reshape(tuple(tensor.dims))
    for layer in plan["layers"]:
        name, cells = layer["name"], tensors[layer["cells_tensor"]]
        for k in range(layer["slices"]):
            for cell, role in enumerate(("plus", "minus")):
                np.testing.assert_array_equal(windows.pop(f"{name}.g_{role}_{k}"), cells[k, cell])
        np.testing.assert_array_equal(windows.pop(f"{name}.gain"), tensors[layer["gain_tensor"]][:, None])
    assert windows == {}


@pytest.fixture(scope="module")
def model(parse_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """Every way in which a matrix lies on arrays: split, whole, grouped, depthwise, transposed; `rows` loses rows."""
    rng = np.random.default_rng(3)

    def weights(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    rows = weights(40, 20)
    rows[rng.permutation(40)[:25]] *= 1e-3
    return parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        odd (float[N, 6, 5, 5] image) => (float[N, 20] scores) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 2> (image, grouped)
            b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 4> (a, depthwise)
            c = ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]> (b, transposed)
            d = GlobalAveragePool (c)
            e = Flatten (d)
            f = Gemm <transB = 1> (e, gemm)
            scores = MatMul (f, rows)
        }
        """,
        grouped=weights(4, 3, 3, 3),
        depthwise=weights(4, 1, 3, 3),
        transposed=weights(4, 3, 2, 2),
        gemm=weights(40, 3),
        rows=rows,
    )
