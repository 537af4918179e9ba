"""ONNX's own node tests, their weights made constant: the deployed model must give the outputs that ONNX publishes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from rerampile import compile_model, verify_deployment
from rerampile.errors import FaultRunError
from rerampile.runtime.session import open_session, run
from rerampile.weight_slots import SLOTS

Arrays = dict[str, npt.NDArray[Any]]

RECURRENT = ("LSTM", "GRU", "RNN")
SCALES = {"QLinearConv": (4,), "QLinearMatMul": (1, 4)}  # beside the weights: they belong to them

# What ONNX Runtime's CPU provider itself does not run, in its own words.
NOT_RUN = {
    "test_convinteger_with_padding": "IsScalarOr1ElementVector",
    "test_gru_batchwise": "layout_ == 0",
    "test_lstm_batchwise": "layout_ == 0",
    "test_simple_rnn_batchwise": "layout_ == 0",
}


def _constant_names(node: onnx.NodeProto, operand: int) -> list[str]:
    """Name the inputs that become constant: all weights of a recurrent layer, else those of one operand."""
    slots = SLOTS[node.op_type]
    chosen = slots if node.op_type in RECURRENT else slots[operand : operand + 1]
    wanted = [index for slot in chosen for index in (slot.weight, slot.zero_point) if index is not None]
    wanted += [s for s in SCALES.get(node.op_type, ()) if any(s == slot.weight + 1 for slot in chosen)]
    wanted += [3] if node.op_type in RECURRENT else []
    return [node.input[index] for index in wanted if index < len(node.input)]


def _with_constants(model: onnx.ModelProto, given: Arrays, operand: int) -> onnx.ModelProto | None:
    """Return a copy whose weights are initializers, or None where the model has no such operand among its inputs."""
    nodes = [node for node in model.graph.node if node.op_type in SLOTS]
    nodes = [node for node in nodes if operand == 0 or node.op_type not in RECURRENT]
    constant = {name for node in nodes for name in _constant_names(node, operand)} & given.keys()
    if not constant:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.input[:]
    copy.graph.input.extend(value for value in model.graph.input if value.name not in constant)
    copy.graph.initializer.extend(numpy_helper.from_array(given[name], name) for name in sorted(constant))
    return copy


def _cases() -> Iterator[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases of other operators overflow on purpose while they are made
        cases = [case for case in collect_testcases(None) if {n.op_type for n in case.model.graph.node} & SLOTS.keys()]
    for case in cases:
        given, expected = case.data_sets[0]
        arrays = {v.name: np.asarray(a) for v, a in zip(case.model.graph.input, given, strict=True)}
        for operand in (0, 1):
            model = _with_constants(case.model, arrays, operand)
            if model is not None:
                inputs = {value.name: arrays[value.name] for value in model.graph.input}
                yield pytest.param(case.name, model, inputs, expected, id=f"{case.name}-{operand}")


CASES = list(_cases())


@pytest.mark.parametrize(("name", "model", "inputs", "expected"), CASES)
def test_the_deployed_case_gives_what_onnx_publishes(
    name: str, model: onnx.ModelProto, inputs: Arrays, expected: list[Any], tmp_path: Path
) -> None:
    given = tmp_path / "inputs.npz"
    np.savez(given, **inputs)
    if name in NOT_RUN:
        with pytest.raises(FaultRunError, match=NOT_RUN[name]):
            compile_model(model, out=tmp_path / "deployment", inputs=given)
        return
    deployment = compile_model(model, out=tmp_path / "deployment", inputs=given)
    assert deployment.plan.layers
    verify_deployment(deployment.folder)
    found = run(open_session(deployment.model_path), inputs)
    tolerance = 2e-3 if any(np.asarray(e).dtype == np.float16 for e in expected) else 1e-5
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == np.asarray(reference).shape
        scale = max(float(np.abs(reference).max(initial=0)), 1e-30)
        np.testing.assert_allclose(value.astype(np.float64) / scale, reference / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("target", ["isaac", "neurram", "hermes"])
@pytest.mark.parametrize("mapping", ["two_column", "differential", "balanced", "offset", "auto"])
def test_every_operator_verifies_in_every_mapping(target: str, mapping: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    for case in CASES:
        name, model, inputs, _ = case.values
        operators = {node.op_type for node in model.graph.node} & SLOTS.keys()
        if name in NOT_RUN or operators <= seen:
            continue
        seen |= operators
        given = tmp_path / f"{name}.npz"
        np.savez(given, **inputs)
        deployment = compile_model(model, out=tmp_path / name, inputs=given, target=target, mapping=mapping)
        verify_deployment(deployment.folder)
    assert seen == SLOTS.keys()
