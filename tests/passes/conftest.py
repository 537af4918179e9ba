"""Compiling small models written as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import pytest
from onnx import numpy_helper

from rerampile import Deployment, Target, compile_model, verify_deployment
from rerampile.target import Cell


@pytest.fixture(scope="session")
def model_of() -> Callable[..., onnx.ModelProto]:
    """`model_of(text, {"W": array})`: a model from ONNX's text form; outputs written `float[] y` get their shape."""

    def build(text: str, weights: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(found)
        onnx.checker.check_model(model)
        return model

    return build


@pytest.fixture
def compile_text(model_of: Callable[..., onnx.ModelProto], tmp_path: Path) -> Callable[..., Deployment]:
    """`compile_text(text, {"W": array}, mapping=...)`: the deployment, verified when compiled and from its files."""
    number = itertools.count()

    def compile_(text: str, weights: dict[str, np.ndarray] | None = None, **options: Any) -> Deployment:
        deployment = compile_model(model_of(text, weights), out=tmp_path / f"out{next(number)}", **options)
        verify_deployment(deployment.folder)
        return deployment

    return compile_


@pytest.fixture
def weight() -> Callable[..., np.ndarray]:
    """`weight(3, 4, dtype=...)`: weights that are all different, of both signs, and never zero."""

    def make(*shape: int, dtype: Any = np.float32) -> np.ndarray:
        dtype, size = np.dtype(dtype), int(np.prod(shape))
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            return ((np.arange(size) * 37 + 11) % (info.max - info.min) + info.min + 1).astype(dtype).reshape(shape)
        return np.random.default_rng(size).uniform(0.1, 1, shape).astype(dtype) * np.where(
            np.arange(size).reshape(shape) % 3 == 1, -1, 1
        ).astype(dtype)

    return make


@pytest.fixture(scope="session")
def discrete_target() -> Callable[..., Target]:
    """`discrete_target(levels=4, slices=3, rows=16)`: a small target of discrete cells, other keys as given."""

    def make(levels: int | None = 4, level_table: tuple[float, ...] | None = None, **keys: Any) -> Target:
        ends = (1e-6, 100e-6) if level_table is None else (level_table[0], level_table[-1])
        cell = Cell(g_off=ends[0], g_on=ends[1], levels=levels, level_table=level_table)
        return Target(**{"name": "small", "rows": 32, "columns": 32, "cell": cell, **keys})

    return make
