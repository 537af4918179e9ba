"""The small BERT: its builder, its trainer, and the trained file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from rerampile.errors import ConfigError, DataError, ModelError

Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def bert(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("bert")


@pytest.fixture(scope="module")
def trainer(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("train_bert")


def random_weights(bert: ModuleType, shape: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s, np.float32) for name, s in bert.parameter_shapes(shape).items()}


def library(folder: Path, families: dict[str, tuple[str, ...]]) -> Path:
    """A standard library of a few invented words a family."""
    rng = np.random.default_rng(1)
    for family, places in families.items():
        (folder / places[0]).parent.mkdir(parents=True, exist_ok=True)
        place = folder / places[0] if places[0].endswith(".py") else folder / places[0] / "module.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        words = [f"{family}{''.join(rng.choice(list('abcd'), 3))}" for _ in range(20)]
        place.write_text(" ".join(rng.choice(words, 2000)))
    return folder


def test_every_weight_is_a_product_that_maps(bert: ModuleType) -> None:
    shape = bert.Shape(words=11, length=5, width=8, heads=2, inner=12, blocks=1, classes=3)
    model = onnx.shape_inference.infer_shapes(bert.build(shape, random_weights(bert, shape)), strict_mode=True)
    stored = {t.name for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    assert len(products) == 6 + 1
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 5]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_a_parameter_of_another_shape_is_refused(bert: ModuleType) -> None:
    weights = random_weights(bert, bert.Shape())
    with pytest.raises(ModelError, match=r"parameter 'words': \[3\], expected \[1024, 128\]"):
        bert.build(bert.Shape(), weights | {"words": np.zeros(3, np.float32)})
    del weights["classes.bias"]
    with pytest.raises(ModelError, match=r"parameter 'classes.bias': none, expected \[8\]"):
        bert.build(bert.Shape(), weights)


def test_the_file_is_small_and_right(models_folder: Path, run: Run) -> None:
    path = models_folder / "bert_stdlib.onnx"
    assert path.stat().st_size < 2_000_000
    properties = {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}
    with np.load(models_folder / "bert_stdlib_test.npz") as held_out:
        tokens, labels = held_out["tokens"], held_out["labels"]
    assert tokens.shape == (1736, 32)
    logits = run(path, tokens)[0]
    assert logits.shape == (1736, len(properties["classes"]))
    assert (logits.argmax(1) == labels).mean() == pytest.approx(0.8738, abs=0.003)
    with np.load(models_folder / "bert_stdlib_calibration.npz") as seen:
        assert seen["tokens"].shape == (512, 32)
        assert seen["tokens"].max() < len(properties["words"])


def test_passages_are_cut_evenly_and_hold_no_family_name(trainer: ModuleType, bert: ModuleType, tmp_path: Path) -> None:
    words = trainer.read_words(library(tmp_path, trainer.FAMILIES))
    tokens, labels, table = trainer.passages(words, bert.Shape(words=50), 10)
    assert tokens.shape == (80, 32)
    assert np.bincount(labels).tolist() == [10] * 8
    assert len(table) <= 50
    assert not set(trainer.FAMILIES) & set(table)
    with pytest.raises(DataError, match="no sources of asyncio"):
        trainer.read_words(tmp_path / "elsewhere")


def test_what_is_trained_is_what_is_written(trainer: ModuleType, models_folder: Path, tmp_path: Path, run: Run) -> None:
    torch = pytest.importorskip("torch")
    folder = library(tmp_path / "library", trainer.FAMILIES)
    files = {name: tmp_path / name for name in ("out.onnx", "test.npz", "seen.npz")}
    words = ["--out", files["out.onnx"], "--test", files["test.npz"], "--calibration", files["seen.npz"]]
    command = [sys.executable, models_folder / "train_bert.py", *words, "--stdlib", folder, "--epochs", "2"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "epoch 2  loss" in done.stdout
    model = onnx.load(files["out.onnx"])
    p = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    with np.load(files["test.npz"]) as held_out:
        tokens, labels = held_out["tokens"], held_out["labels"]
    found = run(files["out.onnx"], tokens)[0]
    expected = trainer.logits(torch.from_numpy(tokens), p, trainer.Shape()).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found.argmax(1) == labels).mean() > 0.5


def test_options_out_of_range_are_refused(trainer: ModuleType) -> None:
    pytest.importorskip("torch")
    options = trainer.argparse.Namespace(epochs=0, batch=1, passages=1)
    with pytest.raises(ConfigError, match="--epochs, --batch and --passages: expected 1 or more"):
        trainer.train(options)
