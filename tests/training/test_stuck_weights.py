"""Defects that are drawn in training are those of chips."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from rerampile.errors import ConfigError
from rerampile.failed_cells import RESPONSES
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import load_model_file
from rerampile.passes.find_layers import find_layers
from rerampile.runtime.faults import FaultModel
from rerampile.stuck_cell import StuckCell
from rerampile.target import Target
from rerampile.training.stuck_weights import Defects, StuckWeights

SCHEMES = ("two_column", "differential", "offset", "balanced")


def layer_of(rows: int, columns: int) -> Layer:
    """A MatMul, whose tensor is its matrix transposed."""
    weights = np.zeros((columns, rows), np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", columns])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", rows])],
        [onnx.numpy_helper.from_array(weights, "W")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    (layer,), _ = find_layers(ModelGraph(load_model_file(model)))
    return layer


def expected_error(scheme: str, u: np.ndarray, off: float, on: float) -> np.ndarray:
    """Mean squared error of normalised weights, by adding up the nine states of a pair (or three of one cell)."""
    plus, minus = {
        "two_column": (np.maximum(u, 0), np.maximum(-u, 0)),
        "differential": (1 - np.maximum(-u, 0), 1 - np.maximum(u, 0)),
        "balanced": ((1 + u) / 2, (1 - u) / 2),
        "offset": ((1 + u) / 2, np.full_like(u, 0.5)),
    }[scheme]
    total, cells = np.zeros_like(u), 1 if scheme == "offset" else 2
    states = [(1 - off - on, None), (off, 0.0), (on, 1.0)]
    scale = 2 if scheme in ("offset",) else 1
    for p, a in states:
        for q, b in states if cells == 2 else [(1.0, None)]:
            read = (plus if a is None else a) - (minus if b is None else b)
            total += p * q * (scale * read - u) ** 2
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scale", ["tensor", "channel", "partition"])
def test_moments_are_those_of_the_cells(scheme: str, scale: str) -> None:
    rng = np.random.default_rng(3)
    faults = FaultModel(stuck_off=0.02, stuck_on=0.05)
    target = Target.load("paper", {"rows": 15})
    defects = Defects(faults=faults, mapping=scheme, scale=scale, target=target)  # type: ignore[arg-type]
    stuck = StuckWeights(defects, layer_of(8, 50))
    tensor = rng.standard_normal((50, 8)).astype(np.float32)
    tensor[:5] = 0  # take no rows: the first array has 20 inputs
    largest = np.abs(tensor).max(axis=0 if scale == "channel" else None, keepdims=True)
    if scale == "partition":
        largest = np.repeat([np.abs(part).max(axis=0) for part in np.split(tensor, [20, 35])], [20, 15, 15], axis=0)
    squares, hits, draws = np.zeros_like(tensor), 0, 3000
    for _ in range(draws):
        index, value = stuck.draw(tensor, rng)
        assert (np.diff(np.sort(index)) > 0).all()
        read = tensor.reshape(-1).copy()
        read[index] = value
        squares += (read.reshape(tensor.shape) - tensor) ** 2 / draws
        hits += len(index)
    wanted = expected_error(scheme, tensor / largest, 0.02, 0.05) * largest**2
    np.testing.assert_allclose(squares.sum(axis=0), wanted.sum(axis=0), rtol=0.04)
    share = 0.07 if scheme == "offset" else 1 - 0.93**2
    assert abs(hits / draws - share * 400) < 5 * np.sqrt(share * 400 / draws)


def test_no_faults_and_all_cells_stuck() -> None:
    tensor = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    rng = np.random.default_rng(1)
    index, _ = StuckWeights(Defects(faults=FaultModel(stuck_off=0, stuck_on=0)), layer_of(4, 6)).draw(tensor, rng)
    assert len(index) == 0
    stuck = StuckWeights(Defects(faults=FaultModel(stuck_off=1, stuck_on=0), mapping="two_column"), layer_of(4, 6))
    index, value = stuck.draw(tensor, rng)
    assert sorted(index) == list(range(24))
    np.testing.assert_allclose(value, 0, atol=1e-6)


def test_levels_and_stuck_values_of_the_target() -> None:
    """A cell stuck on at twice the range, on cells of 16 levels."""
    g_on = Target.load("paper").cell.g_on
    target = Target.load("paper", {"cell.levels": 16, "cell.stuck_on.mean": 2 * g_on})
    g_off = target.cell.g_off
    stuck = StuckWeights(
        Defects(faults=FaultModel(stuck_off=0, stuck_on=1), target=target, mapping="offset"), layer_of(1, 2)
    )
    _, value = stuck.draw(np.array([[1.0], [-1.0]], np.float32), np.random.default_rng(0))
    steps = 15 * (2 * g_on - g_off) / (g_on - g_off)
    np.testing.assert_allclose(value, (steps - 8) / 7, rtol=1e-5)


def test_mappings_that_depend_on_faults() -> None:
    with pytest.raises(ConfigError, match="--mapping auto: cannot be trained with, expected two_column, differential"):
        Defects(faults=FaultModel.of_rate(0.01), mapping="auto")


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("scheme", ["differential", "offset"])
def test_failed_cells_are_those_of_the_target(scheme: str, response: str) -> None:
    """Mean and variance of what is read, beside the closed forms that hold for chips."""
    rng = np.random.default_rng(3)
    formed = {"unformed": {"share": 1, "mean": 0.5e-6}, "over_formed": {"share": 2, "mean": 3e-4, "spread": 1e-4}}
    target = Target.load(
        "paper", {"cell.levels": 4, "slices": 2, "failed_cells": {"response": response, "low": 20e-6, **formed}}
    )
    faults = FaultModel.of_target(0.1, target)
    defects = Defects(faults=faults, target=target, mapping=scheme, scale="tensor")
    stuck = StuckWeights(defects, layer_of(8, 50))
    tensor = rng.uniform(-1, 1, (50, 8)).astype(np.float32)
    tensor[0, 0] = 1
    gain = defects.coding.gain(np.ones(1))
    cells = defects.coding.encode(tensor.reshape(1, -1), gain)
    held = defects.coding.decode(cells, gain)[0]
    errors, draws = np.zeros((2, 400)), 800
    for _ in range(draws):
        index, value = stuck.draw(tensor, rng)
        error = value - held[index]
        errors[:, index] += np.array([error, error**2]) / draws
    cell = StuckCell.of(target, defects.coding, faults.probabilities)
    variance = cell.variance_of(defects.coding, cells, gain[:, None])[0].astype(np.float64)
    mean = gain[0] * cell.shift(defects.coding) - cell.loss * held
    assert errors[0].sum() == pytest.approx(mean.sum(), abs=5 * np.sqrt(variance.sum() / draws))
    assert errors[1].sum() == pytest.approx((variance + mean**2).sum(), rel=0.05)
