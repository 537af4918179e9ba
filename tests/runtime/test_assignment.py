"""The best rows and columns of an array: against brute force, and where spare ones help."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from rerampile import Deployment, Target, compile_model, verify_deployment
from rerampile.array_plan import Partition
from rerampile.programmer import ChipSource, program_chip
from rerampile.runtime.assignment import assigned, with_partitions
from rerampile.runtime.fault_map import STUCK_OFF, STUCK_ON, ChipGeometry, FaultMap, stuck_ends
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.layer_program import LayerProgram
from rerampile.target import Cell

CELLS = {
    "analog": Cell(g_off=1e-6, g_on=100e-6),
    "levels": Cell(g_off=1e-6, g_on=100e-6, levels=16),
}


def build(
    out: Path, inputs: int, outputs: int, cell: str = "analog", layout: str = "adjacent", **how: object
) -> Deployment:
    """One product with weights of one full scale, on arrays of 4 rows and of columns for 4 outputs."""
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        tiny (float[N, {inputs}] x) => (float[N, {outputs}] y) {{ y = MatMul (x, W) }}
        """
    )
    values = np.random.default_rng(inputs).uniform(-1, 1, (inputs, outputs)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "W"))
    columns = 4 if layout == "twin" or how.get("mapping") == "offset" else 8
    target = Target(name="tiny", rows=4, columns=columns, pair_layout=layout, cell=CELLS[cell])
    return compile_model(model, out=out, target=target, **how)


def chip(deployment: Deployment, seed: int, rate: float = 0.6) -> FaultMap:
    model = FaultModel.of_rate(rate, (1.0, 1.0))
    return draw_faults(ChipGeometry.of(deployment), model, deployment.target, seed=seed, run=0)


def only(deployment: Deployment) -> Partition:
    return deployment.plan.arrays[0].partitions[0]


def energy(deployment: Deployment, partition: Partition, faults: FaultMap, steps: tuple[str, ...]) -> float:
    """What a chip is off with a partition as it lies, whatever lay there before."""
    plan = with_partitions(deployment.plan, [[partition] for _ in deployment.plan.arrays])
    placed = dataclasses.replace(deployment, plan=plan)
    program = LayerProgram(placed, 0, Injector(placed).stuck(faults)[0], None)
    for step in steps:
        program.step(step)
    return program.errors[-1]


def everywhere(partition: Partition, axis: str, places: str, count: int, of: int) -> list[Partition]:
    """The partition with the lines of one axis at all places, in all orders."""
    listed = getattr(partition, f"{axis}_indices")
    return [
        msgspec.structs.replace(partition, **{f"{axis}s": None, f"{axis}_index": list(order), places: list(chosen)})
        for order in itertools.permutations(listed)
        for chosen in itertools.combinations(range(of), count)
    ]


@pytest.mark.parametrize("layout", ["adjacent", "twin"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mapping", ["differential", "two_column", "offset"])
@pytest.mark.parametrize("steps", [("compensate", "flip"), ("compensate",), ("flip",), ()])
def test_no_order_of_columns_or_rows_is_better(
    steps: tuple[str, ...], mapping: str, cell: str, layout: str, tmp_path: Path
) -> None:
    """Best columns for the rows as compiled, then the best rows for those; spare ones of both among them."""
    deployment = build(tmp_path / "out", 3, 2, cell, layout, mapping=mapping)
    moved = 0
    for seed in range(4):
        faults = chip(deployment, seed)
        found = assigned(deployment, faults, {}, compensating="compensate" in steps, flipping="flip" in steps)
        partition = only(found.deployment)
        least = energy(deployment, partition, faults, steps)
        columns = everywhere(only(deployment), "output", "output_slots", 2, 4)
        best = min(energy(deployment, p, faults, steps) for p in columns)
        assert least <= best * (1 + 1e-5) + 1e-9
        straight = tuple(step for step in steps if step != "flip")
        if straight == steps:  # roles may change once more for other rows
            rows = everywhere(partition, "input", "input_rows", 3, 4)
            assert least == pytest.approx(min(energy(deployment, p, faults, steps) for p in rows), rel=1e-4, abs=1e-9)
        moved += found.moved
        assert (found.moved > 0) == (partition != only(deployment))
    assert moved


def test_spare_lines_are_taken_for_broken_ones_and_nothing_else_moves(tmp_path: Path) -> None:
    deployment = build(tmp_path / "out", 3, 3)
    geometry = ChipGeometry.of(deployment)
    column = geometry.cell(np.zeros(8, np.int64), np.repeat(np.arange(4), 2), np.tile([2, 3], 4))  # all of output 1
    state = np.tile(np.array([STUCK_ON, STUCK_OFF], np.uint8), 4)
    broken = FaultMap(cell=column, state=state, conductance=stuck_ends(deployment.target, state))
    found = assigned(deployment, broken, {}, compensating=True, flipping=True)
    lies = only(found.deployment)
    assert lies.output_slots == [0, 2, 3]
    assert lies.output_index == [0, 2, 1]
    assert lies.input_index is None
    assert found.moved == 1

    row = geometry.cell(np.zeros(8, np.int64), np.zeros(8, np.int64), np.arange(8))
    off = np.full(8, STUCK_OFF, np.uint8)
    broken = FaultMap(cell=row, state=off, conductance=stuck_ends(deployment.target, off))
    lies = only(assigned(deployment, broken, {}, compensating=True, flipping=False).deployment)
    assert lies.input_rows == [1, 2, 3]
    assert lies.output_index is None

    spare = FaultMap(cell=column[:0], state=off[:0], conductance=broken.conductance[:0])
    assert assigned(deployment, spare, {}, compensating=True, flipping=True).deployment.plan == deployment.plan


def test_inputs_that_count_more_get_the_better_rows(tmp_path: Path) -> None:
    deployment = build(tmp_path / "out", 4, 4)
    power = np.diag([100.0, 1.0, 1.0, 0.0]).astype(np.float32)[None]
    wanted = deployment.weights(deployment.plan.layers[0])

    def weighed(found: Deployment, faults: FaultMap) -> float:
        program = LayerProgram(found, 0, Injector(found).stuck(faults)[0], power)
        program.step("compensate")
        error = program.weights() - wanted
        return float(np.einsum("oi,i,oi->", error, np.diagonal(power[0]), error))

    chips = [chip(deployment, seed) for seed in range(6)]
    known, unknown = (
        sum(
            weighed(assigned(deployment, faults, moments, compensating=True, flipping=False).deployment, faults)
            for faults in chips
        )
        for moments in ({0: power}, {})
    )
    assert known < 0.9 * unknown


def test_a_chip_with_other_rows_and_spare_columns_verifies(tmp_path: Path) -> None:
    deployment = build(tmp_path / "out", 11, 10)
    (tmp_path / "map.csv").write_text("array,row,column,state\n")
    source = ChipSource(path=tmp_path / "map.csv", number=0, faults=chip(deployment, 5))
    done = program_chip(deployment, source, tmp_path / "chip", steps=("compensate", "assign", "flip"))
    parts = [part for array in done.plan.arrays for part in array.partitions]
    assert any(part.output_slots is not None for part in parts)
    assert any(part.input_rows is not None for part in parts)
    verify_deployment(done.folder)
    assert done.plan.chip is not None
    assert [step.moved > 0 for step in done.plan.chip.steps] == [False, False, True, True]
