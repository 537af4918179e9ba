"""YOLOv4 as written in code is darknet's YOLOv4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rerampile.errors import ConfigError


@pytest.fixture(scope="module")
def yolov4(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("yolov4")


def test_it_has_the_published_number_of_weights(darknet: ModuleType, yolov4: ModuleType) -> None:
    class KernelsOnly(darknet.CountedWeights):  # type: ignore[name-defined, misc]
        def take(self, role: str, shape: tuple[int, ...]) -> np.ndarray:
            array: np.ndarray = super().take(role, shape) if role == "weight" else np.zeros(shape, np.float32)
            return array

    kernels = KernelsOnly()
    darknet.assemble(yolov4.definition(), kernels, 416)
    assert kernels.count == 64_296_032
    # The published yolov4.weights has 257,717,640 bytes, 20 of them the header.
    assert 20 + 4 * darknet.count_weights(yolov4.definition()) == 257_717_640


def test_every_layer_is_that_of_the_cfg_file(darknet: ModuleType, yolov4: ModuleType, data_root: Path) -> None:
    ours, theirs = yolov4.definition(), darknet.read_cfg(data_root / "models" / "yolov4.cfg")
    assert [s.name for s in ours] == [s.name for s in theirs]
    defaults = {"batch_normalize": "0"}
    for mine, other in zip(ours, theirs, strict=True):
        found = {key: (defaults | other.options).get(key) for key in mine.options}
        assert {k: _plain(v) for k, v in mine.options.items()} == {k: _plain(v) for k, v in found.items()}, mine.where


def _plain(text: str | None) -> str | list[float] | None:
    """Numbers as numbers: 1.20 is 1.2."""
    try:
        return [float(part) for part in (text or "").split(",")]
    except ValueError:
        return text


@pytest.mark.parametrize("size", [0, 400, -32])
def test_a_size_that_the_strides_do_not_divide_is_refused(yolov4: ModuleType, size: int) -> None:
    with pytest.raises(ConfigError, match=f"size is {size} pixels, expected a multiple of 32 such as 416 or 608"):
        yolov4.build(size=size)


@pytest.mark.slow
def test_it_runs(yolov4: ModuleType, run: Callable[..., list[np.ndarray]]) -> None:
    x = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    heads = run(yolov4.build(size=64, classes=3), x)
    assert [head.shape for head in heads] == [(1, 24, 8, 8), (1, 24, 4, 4), (1, 24, 2, 2)]
    assert all(np.isfinite(head).all() and head.std() > 0 for head in heads)
