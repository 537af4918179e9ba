"""What the tests share: where the project and its data are, and small models written as text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, settings

PROJECT = Path(__file__).resolve().parent.parent

# The machines that run these are shared: how long one example takes says nothing about the code.
settings.register_profile("rerampile", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rerampile")


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder with pyproject.toml."""
    return PROJECT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real models and data sets, which are no part of the checkout; RERAMPILE_TEST_DATA says where they are."""
    root = Path(os.environ.get("RERAMPILE_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set RERAMPILE_TEST_DATA to the folder that holds it")
    return root


@pytest.fixture(scope="session")
def parse_model() -> Callable[..., onnx.ModelProto]:
    """`parse_model(text, W=array, ...)`: a checked model from ONNX's text form, its large weights given as arrays."""

    def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
        onnx.checker.check_model(model, full_check=True)
        return model

    return parse


@pytest.fixture(scope="session")
def small_model(parse_model: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """Conv, Relu, Flatten, Gemm with a free batch: two layers of 8x27 and 10x128 weights, for end-to-end runs."""
    rng = np.random.default_rng(1)
    return parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        small (float[N, 3, 4, 4] image) => (float[N, 10] scores) {
            features = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, conv_weight)
            active = Relu (features)
            flat = Flatten (active)
            scores = Gemm <transB = 1> (flat, fc_weight, fc_bias)
        }
        """,
        conv_weight=rng.standard_normal((8, 3, 3, 3), dtype=np.float32),
        fc_weight=rng.standard_normal((10, 128), dtype=np.float32),
        fc_bias=rng.standard_normal(10, dtype=np.float32),
    )


@pytest.fixture
def small_model_file(small_model: onnx.ModelProto, tmp_path: Path) -> Path:
    """The small model as a file of its own for each test."""
    path = tmp_path / "small.onnx"
    onnx.save(small_model, path)
    return path
