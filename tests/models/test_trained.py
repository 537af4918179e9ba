"""The trained model that the project ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest


def test_the_trained_file_is_small_and_right(
    models_folder: Path, run: Callable[..., list[np.ndarray]], data_root: Path
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    path = models_folder / "resnet18_cifar10.onnx"
    assert path.stat().st_size <= 25_000_000
    properties = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    with image_module.open(data_root / "cifar10" / "test_00.webp") as picture:
        sheet = np.asarray(picture)[: 4 * 32]
    pixels = sheet.reshape(4, 32, -1, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    x = (pixels.astype(np.float32) / 255 - np.float32(properties["mean"])) / np.float32(properties["std"])
    logits = run(path, np.ascontiguousarray(x.transpose(0, 3, 1, 2)))[0]
    labels = np.load(data_root / "cifar10" / "test_labels.npy")[: len(pixels)]
    assert len(properties["classes"]) == logits.shape[1]
    assert (logits.argmax(1) == labels).mean() > 0.88
