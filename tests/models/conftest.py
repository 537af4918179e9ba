"""The reference models are scripts beside the package, not part of it: each is loaded from its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest


@pytest.fixture(scope="session")
def models_folder(project_root: Path) -> Path:
    """The folder of the reference models, from now on importable."""
    folder = project_root / "models"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def load(models_folder: Path) -> Callable[[str], ModuleType]:
    """`load(name)`: one script of the folder as a module."""
    return importlib.import_module


@pytest.fixture(scope="session")
def darknet(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("darknet")


@pytest.fixture(scope="session")
def resnet18(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("resnet18")


@pytest.fixture(scope="session")
def run() -> Callable[..., list[np.ndarray]]:
    """`run(model, x)`: the outputs of a model, or of a model file, for its only input."""

    def run_model(model: onnx.ModelProto | Path, x: np.ndarray) -> list[np.ndarray]:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        return list(session.run(None, {session.get_inputs()[0].name: x}))

    return run_model
