"""int8 chips whose graph was optimised once: the very bits that optimising it for each chip gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from rerampile import Deployment, FaultRunError, Target, compile_model
from rerampile.runtime.blocked_weights import optimised_once
from rerampile.runtime.executor import open_executor
from rerampile.runtime.fault_map import ChipGeometry
from rerampile.runtime.faults import FaultModel, draw_faults
from rerampile.runtime.inject import Injector
from rerampile.runtime.plain_model import PlainModel, declare_weight
from rerampile.runtime.quantised import require_dot_products

INPUTS = {"x": np.random.default_rng(9).standard_normal((16, 4, 8, 8), dtype=np.float32)}


@pytest.fixture(scope="module")
def deployment(parse_model: Callable[..., onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """Two layers, both of which int8 has kernels for."""
    rng = np.random.default_rng(7)
    model = parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, 8, 8] x) => (float[N, 10] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, A, v)
            b = Relu (a)
            c = GlobalAveragePool (b)
            d = Flatten (c)
            y = Gemm <transB = 1> (d, C)
        }
        """,
        A=rng.standard_normal((8, 4, 3, 3), dtype=np.float32),
        v=rng.standard_normal(8, dtype=np.float32),
        C=rng.standard_normal((10, 8), dtype=np.float32),
    )
    target = Target.load("paper", {"cell.levels": 16})
    return compile_model(model, out=tmp_path_factory.mktemp("once") / "out", target=target)


def test_chips_are_those_of_the_graph_optimised_for_each(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        require_dot_products()
    except FaultRunError as error:
        pytest.skip(str(error))
    tried: list[PlainModel | None] = []

    def once(*arguments: Any) -> PlainModel | None:
        tried.append(optimised_once(*arguments))
        return tried[-1]

    monkeypatch.setattr("rerampile.runtime.executor.optimised_once", once)
    optimised = open_executor(deployment, precision="int8", calibration=[INPUTS])
    monkeypatch.setattr("rerampile.runtime.executor.optimised_once", lambda *_: None)
    plain = open_executor(deployment, precision="int8", calibration=[INPUTS])
    assert [found is not None and found.optimised for found in tried] == [True]

    geometry, injector, model = ChipGeometry.of(deployment), Injector(deployment), FaultModel.of_rate(0.1)
    chips = [injector.faults(draw_faults(geometry, model, deployment.target, seed=0, run=run)) for run in range(3)]
    seen = set()
    for chip in ([], *chips):
        outputs = []
        for executor in (optimised, plain):
            executor.apply(chip)
            outputs.append(executor.run(INPUTS)[0].tobytes())
        assert outputs[0] == outputs[1]
        seen.add(outputs[0])
    assert len(seen) == 4


def test_graph_that_computes_from_weights_is_left_alone(deployment: Deployment) -> None:
    """What the optimiser folds from weights is of one chip alone."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3, 10] x, float[3, 8] z) => (float[3, 8] y, float[3, 3] u)'
        "{ c = Cast <to = 1> (C) f = Mul (c, c) y = MatMul (x, f) a = Cast <to = 1> (A) b = Reshape (a, s)"
        " u = MatMul (z, b) }"
    )
    shapes = {"A": (8, 4, 3, 3), "C": (10, 8)}
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([8, -1]), "s"))
    model.graph.output[1].type.tensor_type.shape.dim[1].dim_value = 36
    for name, shape in shapes.items():
        declare_weight(model.graph, name, shape, TensorProto.INT8)
    weights = {name: np.ones(shape, np.int8) for name, shape in shapes.items()}
    assert optimised_once(deployment, PlainModel(proto=model, weights=("A", "C")), weights) is None
