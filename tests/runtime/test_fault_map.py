"""Fault maps in files: what is written is read, and what cannot be is refused in one line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rerampile import Deployment, Target, compile_model
from rerampile.errors import ConfigError, DataError
from rerampile.runtime import fault_map
from rerampile.runtime.fault_map import (
    STUCK_OFF,
    STUCK_ON,
    ChipGeometry,
    FaultMap,
    placement_digest,
    read_fault_maps,
    write_fault_maps,
)
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.target import Cell, Stuck

CELL = Cell(g_off=1e-6, g_on=1e-4, stuck_off=Stuck(mean=5e-7, spread=1e-7), stuck_on=Stuck(mean=1.5e-4, spread=1e-5))
SMALL = Target(name="small", rows=32, columns=16, cell=CELL)
FORMAT = {"format": "rerampile-faults", "format_version": "1"}
ENDINGS = [".safetensors", ".csv"]


@pytest.fixture(scope="module")
def deployment(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return compile_model(small_model, out=tmp_path_factory.mktemp("maps") / "out", target=SMALL)


@pytest.fixture
def chips(deployment: Deployment) -> list[FaultMap]:
    """Four: drawn ones and, in the middle and at the end, two without a fault."""
    geometry = ChipGeometry.of(deployment)
    rates = (0.01, 0.0, 0.05, 0.0)
    return [
        draw_faults(geometry, FaultModel.of_rate(rate), deployment.target, seed=1, run=run)
        for run, rate in enumerate(rates)
    ]


def assert_same(one: list[FaultMap], other: list[FaultMap]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("cell", "state", "conductance"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_is_read(ending: str, deployment: Deployment, chips: list[FaultMap], tmp_path: Path) -> None:
    """To the bit, and the file has the same bytes again."""
    path = tmp_path / f"chips{ending}"
    if ending == ".csv":
        with pytest.raises(
            ConfigError, match=r"chips.csv: chip 3, the last, has no stuck cell, which a .csv file cann"
        ):
            write_fault_maps(path, chips, deployment)
        chips = chips[:3]
    write_fault_maps(path, chips, deployment, notes={"seed": "1"})

    read = read_fault_maps(path, deployment)

    assert len(chips[0]) > 10
    assert_same(read, chips)
    before = path.read_bytes()
    write_fault_maps(path, chips, deployment, notes={"seed": "1"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_safetensors_layout(deployment: Deployment, chips: list[FaultMap], tmp_path: Path) -> None:
    """As the page describes it, read with the format's own library."""
    path = tmp_path / "chips.safetensors"
    write_fault_maps(path, chips, deployment, notes={"distribution": "independent"})

    with safe_open(path, framework="numpy") as file:
        table = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()

    plan = json.loads((deployment.folder / "plan.json").read_text())
    layers = [[layer[key] for key in ("groups", "outputs", "inputs")] for layer in plan["layers"]]
    content = json.dumps([32, 16, layers, plan["arrays"]], separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert metadata == {**FORMAT, "chips": "4", "plan": digest, "distribution": "independent"}
    assert list(map(len, table.values())) == [sum(map(len, chips))] * 6
    first = table["chip"] == 0
    assert (
        chips[0].cell == (table["array"].astype(int) * 32 + table["row"])[first] * 16 + table["column"][first]
    ).all()
    np.testing.assert_array_equal(table["state"][first], chips[0].state)
    assert chips[0].stuck_off == np.count_nonzero(table["state"][first] == 1)
    assert chips[0].stuck_on == np.count_nonzero(table["state"][first] == 2)


def page(project_root: Path, tag: str) -> str:
    text = (project_root / "docs" / "fault-map.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {tag} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_examples_of_the_page(
    project_root: Path, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chips.csv").write_text(page(project_root, "csv"), encoding="utf-8")
    exec(compile(page(project_root, "writer"), "fault-map.md", "exec"), {})

    csv = read_fault_maps(Path("chips.csv"), deployment)
    (binary,) = read_fault_maps(Path("chip.safetensors"), deployment)

    cells = [3 * 16 + 1, 2 * 32 * 16 + 7]
    assert [chip.cell.tolist() for chip in csv] == [cells, cells[:1]]
    assert [chip.state.tolist() for chip in csv] == [[STUCK_ON, STUCK_OFF], [STUCK_ON]]
    assert [chip.conductance.tolist() for chip in csv] == [
        np.array([1e-4, 1e-6], np.float32).tolist(),
        [np.float32(1.3e-4)],
    ]
    assert binary.cell.tolist() == cells
    assert binary.state.tolist() == [STUCK_ON, STUCK_OFF]
    np.testing.assert_array_equal(binary.conductance, np.array([1.5e-4, 5e-7], np.float32))
    write_fault_maps(Path("again.csv"), csv, deployment)
    assert Path("again.csv").read_text(encoding="utf-8") == page(project_root, "csv")


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("array,row,column,state\n", [[]]),
        ("array,row,column,state", [[]]),
        ("column,state,row,array\r\n1,stuck_on,0,0\r\n", [[1]]),
        ("\ufeffarray, row, column, state\n0, 0, 5, stuck_off\n0,0,2,stuck_off\n", [[2, 5]]),
        ("chip,array,row,column,state\n2,0,0,1,stuck_off\n0,0,0,3,stuck_on\n", [[3], [], [1]]),
        ("array,row,column,state\n0,0,1,stuck_on\n0,0,1,stuck_on\n", [[1]]),
    ],
)
def test_csv_as_people_write_it(text: str, cells: list[list[int]], deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_bytes(text.encode())
    assert [chip.cell.tolist() for chip in read_fault_maps(path, deployment)] == cells


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'array', expected chip, array, row, column, state, conductance"),
        ("array,row,column\n", "no column 'state'"),
        ("array,row,column,state,x\n", "unknown column 'x'"),
        ("array,row,row,column,state\n", "a column of the header 'array,row,row,column,state' is there twice"),
        (
            "array,row,column,state\n0,0,0,SA0\n",
            "fault 0 (counted from 0): state 'SA0', expected stuck_off, stuck_on, ",
        ),
        ("array,row,column,state\n0,0,0,stuck_on\n0,0,1,\n", "fault 1 (counted from 0): state ''"),
        (
            "array,row,column,state\n0,0,0,stuck_on_and_more\n",
            "expected stuck_off, stuck_on, ",
        ),
        ("array,row,column,state\n99,0,0,stuck_on\n", "array 99, expected 0 to "),
        ("array,row,column,state\n0,32,0,stuck_on\n", "row 32, expected 0 to 31"),
        (
            "array,row,column,state\n0,0,0,stuck_on\n0,0,16,stuck_on\n",
            "fault 1 (counted from 0): column 16, expected 0 to 15",
        ),
        ("array,row,column,state\n0,0,0\n", "line 2: 3 values, expected 4: array, row, column, state"),
        (
            "array,row,column,state\n0,0,1,stuck_on\n0,1.5,0,stuck_on\n",
            "line 3: row '1.5', expected a whole numb",
        ),
        ("array,row,column,state,conductance\n0,0,0,stuck_on,much\n", "conductance 'much', expected a number"),
        ("array,row,column,state\n-1,0,0,stuck_on\n", "array -1, expected 0 to "),
        ("chip,array,row,column,state\n1000000,0,0,0,stuck_on\n", "chip 1000000, expected 0 to 999999"),
        ("array,row,column,state\n0,0,99999999999999999999,stuck_on\n", "line 2: column '99999999999999999999', exp"),
        ("array,row,column,state,conductance\n0,0,0,stuck_on,nan\n", "conductance nan, expected siemens from 0 to 10"),
        ("array,row,column,state,conductance\n0,0,0,stuck_on,-1\n", "conductance -1, expected siemens"),
        ("array,row,column,state,conductance\n0,0,0,stuck_on,150\n", "conductance 150, expected siemens"),
        (
            "chip,array,row,column,state\n3,0,1,2,stuck_on\n0,0,1,2,stuck_on\n3,0,1,2,stuck_off\n",
            "chip 3, array 0, row 1, column 2 is there twice, stuck_on at 0.00015 S and stuck_off at 5e-07 S; keep one",
        ),
        (
            "array,row,column,state,conductance\n0,1,2,stuck_on,1e-4\n0,1,2,stuck_on,2e-4\n",
            "is there twice, stuck_on at 0.0001 S and stuck_on at 0.0002 S",
        ),
    ],
)
def test_what_is_no_csv_map(text: str, message: str, deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text(text, encoding="utf-8")
    refused(lambda: read_fault_maps(path, deployment), f"{path}: ", message)


def refused(act: Callable[[], object], start: str, message: str, kind: type[Exception] = DataError) -> None:
    with pytest.raises(kind) as caught:
        act()
    text = str(caught.value)
    assert text.startswith(start)
    assert message in text
    assert "\n" not in text


def table(**changes: Any) -> dict[str, np.ndarray]:
    values = {"array": [0, 1], "row": [3, 0], "column": [1, 7], "state": [2, 1], **changes}
    return {name: np.asarray(column) for name, column in values.items() if column is not None}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (table(), {}, "metadata 'format' is 'None', expected 'rerampile-faults'"),
        (table(), {**FORMAT, "format_version": "2"}, "format version 2, expected 1; it may need a newer rerampile"),
        (table(), {**FORMAT, "plan": "0" * 64}, "belongs to another plan (placement 0000000000000000, expected "),
        (table(), {**FORMAT, "chips": "many"}, "metadata 'chips' is 'many', expected a number from 1 to 1000000"),
        (table(), {**FORMAT, "chips": "9999999"}, "metadata 'chips' is '9999999'"),
        (table(chip=[0, 2]), {**FORMAT, "chips": "2"}, "fault 1 (counted from 0): chip 2, expected 0 to 1"),
        (table(), {**FORMAT, "chips": "0"}, "metadata 'chips' is '0', expected a number from 1 to 1000000"),
        (table(row=None), FORMAT, "no column 'row'"),
        (table(rows=[1, 2]), FORMAT, "unknown column 'rows'"),
        (table(row=[1, 2, 3]), FORMAT, "expected one axis of the same length for all"),
        (table(row=[[1, 2]]), FORMAT, "expected one axis of the same length for all"),
        (table(row=[1.0, 2.0]), FORMAT, "tensor 'row' is float64, expected integer numbers"),
        (table(state=[True, False]), FORMAT, "tensor 'state' is bool, expected integer numbers"),
        (table(conductance=[1, 2]), FORMAT, "tensor 'conductance' is int64, expected floating-point numbers"),
        (table(state=[1, 6]), FORMAT, "fault 1 (counted from 0): state 6, expected 1 (stuck_off), 2 (stuck_on), "),
        (table(state=[0, 1]), FORMAT, "fault 0 (counted from 0): state 0, expected 1 (stuck_off), 2 (stuck_on), "),
        (table(state=[1, 5]), FORMAT, "fault 1 (counted from 0): no conductance, and target "),
        (table(array=np.array([0, 2**64 - 1], np.uint64)), FORMAT, "array 18446744073709551615, expected 0 to"),
        (table(conductance=[1e-4, np.inf]), FORMAT, "conductance inf, expected siemens from 0 to 10"),
    ],
)
def test_what_is_no_safetensors_map(
    tensors: dict[str, np.ndarray], metadata: dict[str, str], message: str, deployment: Deployment, tmp_path: Path
) -> None:
    path = tmp_path / "map.safetensors"
    save_file(tensors, path, metadata=metadata)
    refused(lambda: read_fault_maps(path, deployment), f"{path}: ", message)


def test_what_cannot_be_read(deployment: Deployment, tmp_path: Path) -> None:
    for name in ("none.csv", "none.safetensors"):
        refused(
            lambda n=name: read_fault_maps(tmp_path / n, deployment), str(tmp_path / name), "cannot be read: No such"
        )
    for name in ("x.csv", "x.safetensors", "plain"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00not a map")
    refused(lambda: read_fault_maps(tmp_path / "x.csv", deployment), "", "expected UTF-8 text, got byte 0xff")
    for name in ("x.safetensors", "plain"):
        refused(lambda n=name: read_fault_maps(tmp_path / n, deployment), "", "no fault map in safetensors or .csv")


def test_a_truncated_file(deployment: Deployment, chips: list[FaultMap], tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    write_fault_maps(path, chips, deployment)
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: read_fault_maps(path, deployment), f"{path}: no fault map", "")


def test_writing_is_all_or_nothing(
    deployment: Deployment, chips: list[FaultMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure keeps what was there, and leaves nothing else."""
    path = tmp_path / "map.csv"
    path.write_text("precious")

    def full(folder: Path, *_: object) -> None:
        folder.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fault_map, "_write_csv", full)
    refused(
        lambda: write_fault_maps(path, chips[:1], deployment),
        f"{path}: ",
        "cannot be written: No space left on device",
        ConfigError,
    )
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_other_endings_are_refused(deployment: Deployment, chips: list[FaultMap], tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    message = "a fault map ends in .safetensors or .csv, got '.json'"
    refused(lambda: write_fault_maps(path, chips, deployment), f"{path}: ", message, ConfigError)


def test_placements_are_told_apart(small_model: onnx.ModelProto, deployment: Deployment, tmp_path: Path) -> None:
    """By where the cells are, not by what they hold."""

    def digest(**options: Any) -> str:
        return placement_digest(compile_model(small_model, out=tmp_path / "o", **{"target": SMALL, **options}).plan)

    here = placement_digest(deployment.plan)
    assert digest(mapping="two_column", scale="tensor") == here
    assert digest(mapping="offset") != here
    assert digest(target=Target(name="small", rows=31, columns=16, cell=CELL)) != here
    assert digest(target=Target(name="small", rows=32, columns=17, cell=CELL)) != here
