"""The ResNet18 builder, its trainer, and the trained file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from rerampile.errors import ConfigError, DataError, ModelError

Run = Callable[..., list[np.ndarray]]


@pytest.fixture(scope="module")
def trainer(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("train_resnet18")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)


@pytest.mark.parametrize(("stem", "classes", "learned"), [("cifar", 10, 11_173_962), ("imagenet", 1000, 11_689_512)])
def test_it_has_the_published_number_of_parameters(resnet18: ModuleType, stem: str, classes: int, learned: int) -> None:
    shapes = resnet18.parameter_shapes(64, classes, resnet18.STEMS[stem])
    assert sum(np.prod(shape) for name, shape in shapes.items() if "running" not in name) == learned


@pytest.mark.parametrize(("stem", "size", "last"), [("cifar", 32, 4), ("imagenet", 224, 7)])
def test_each_stem_leads_to_its_last_feature_map(resnet18: ModuleType, stem: str, size: int, last: int) -> None:
    model = onnx.shape_inference.infer_shapes(resnet18.build(width=4, classes=7, stem=stem), strict_mode=True)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert shapes["layer4.1.relu2"][1:] == [32, last, last]
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == ["N", 3, size, size]
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("Conv"), kinds.count("BatchNormalization"), kinds.count("Gemm")) == (20, 20, 1)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(resnet18: ModuleType) -> None:
    first, again, other = (resnet18.build(width=2, seed=seed).SerializeToString() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_given_weights_are_the_ones_in_the_file(resnet18: ModuleType, run: Run, images: np.ndarray) -> None:
    shapes = resnet18.parameter_shapes(4, 10, resnet18.STEMS["cifar"])
    weights = resnet18.random_weights(shapes, 5)
    given = resnet18.build(width=4, weights=weights | {"bn1.num_batches_tracked": np.zeros(())})
    found = {t.name: onnx.numpy_helper.to_array(t) for t in given.graph.initializer}
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)
    half = resnet18.build(width=4, weights=weights, half=True, metadata=resnet18.CIFAR10_METADATA)
    np.testing.assert_allclose(run(half, images)[0], run(given, images)[0], rtol=2e-2, atol=2e-2)
    assert json.loads({p.key: p.value for p in half.metadata_props}["classes"])[3] == "cat"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": None}, "weights: 1 parameters are missing, the first is 'fc.bias'"),
        ({"fc.bais": np.zeros(10)}, "weights: unknown parameter 'fc.bais' (did you mean fc.bias"),
        ({"fc.bias": np.zeros(9)}, "weights: 'fc.bias' has shape [9], expected [10]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(resnet18: ModuleType, change: dict[str, Any], message: str) -> None:
    weights = resnet18.random_weights(resnet18.parameter_shapes(2, 10, resnet18.STEMS["cifar"]), 0) | change
    with pytest.raises(ModelError, match=re.escape(message)):
        resnet18.build(width=2, weights={name: array for name, array in weights.items() if array is not None})


def test_float16_that_cannot_hold_a_weight_is_refused(resnet18: ModuleType) -> None:
    weights = resnet18.random_weights(resnet18.parameter_shapes(2, 10, resnet18.STEMS["cifar"]), 0)
    weights["layer1.0.conv1.weight"][0, 0, 0, 0] = 1e5
    with pytest.raises(
        ModelError, match=r"'layer1\.0\.conv1\.weight': greatest magnitude 100000, expected at most 65504"
    ):
        resnet18.build(width=2, weights=weights, half=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "cifer"}, r"unknown stem 'cifer' \(did you mean cifar\?\)"),
        ({"width": 0}, "width is 0, expected 1 or more"),
        ({"classes": -1}, "classes is -1, expected 1 or more"),
        ({"size": 0}, "size is 0, expected 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(resnet18: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resnet18.build(**options)


def test_a_file_that_cannot_be_written_leaves_nothing(models_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    arguments = [sys.executable, models_folder / "resnet18.py", "--width", "2", "-o", tmp_path / "folder.onnx"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "folder.onnx: cannot be written: Is a directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def test_cifar10_records_are_labels_and_planes(trainer: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1.bin"
    record = np.arange(3073) % 251
    record.astype(np.uint8).tofile(path)
    images, labels = trainer.read_batch(path)
    assert (images.shape, labels.tolist()) == ((1, 32, 32, 3), [0])
    assert images[0, 2, 5].tolist() == [record[1 + plane * 1024 + 2 * 32 + 5] for plane in range(3)]
    path.write_bytes(b"\0" * 3072)
    with pytest.raises(DataError, match="3072 bytes, expected a multiple of 3073"):
        trainer.read_batch(path)
    with pytest.raises(DataError, match=r"data_batch_2\.bin: cannot be read: No such file or directory"):
        trainer.read_batch(tmp_path / "data_batch_2.bin")


def test_torch_and_the_builder_agree(trainer: ModuleType, resnet18: ModuleType, run: Run, images: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = trainer.network(4)
    for _ in range(3):
        network(torch.randn(8, 3, 32, 32))
    state = {name: value.numpy() for name, value in network.eval().state_dict().items()}
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(resnet18.build(width=4, weights=state), images)[0], expected, rtol=1e-3, atol=1e-4)


def test_training_resumes_where_it_stopped(models_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        records = rng.integers(0, 256, (16, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / f"{name}.bin")

    def train(checkpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
        # Torch 2.13 corrupts its heap with narrower networks, on processors without AVX-512.
        script = [sys.executable, str(models_folder / "train_resnet18.py"), str(tmp_path), "--width", "8"]
        common = ["--batch", "16", "--threads", "1", "--no-bf16", "--checkpoint", str(tmp_path / checkpoint)]
        return subprocess.run([*script, *common, *options], capture_output=True, text=True, check=False)

    whole = train("whole.pt", "--epochs", "2", "--small-epochs", "1", "--out", str(tmp_path / "whole.onnx"))
    assert whole.returncode == 0, whole.stderr
    stopped = train("stopped.pt", "--epochs", "2", "--small-epochs", "1", "--stop-after", "1")
    assert "epoch 1/2" in stopped.stdout
    assert "epoch 2/2" not in stopped.stdout
    rest = train("stopped.pt", "--epochs", "2", "--small-epochs", "1", "--out", str(tmp_path / "rest.onnx"))
    assert "resumed" in rest.stdout
    assert (tmp_path / "rest.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    other = train("whole.pt", "--epochs", "3")
    assert (other.returncode, other.stderr.count("\n")) == (1, 1)
    assert "use another --checkpoint" in other.stderr
    (tmp_path / "broken.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1000])
    broken = train("broken.pt", "--epochs", "2")
    assert (broken.returncode, broken.stderr.count("\n")) == (1, 1)
    assert "broken.pt: not a whole checkpoint of this trainer; delete it to start anew" in broken.stderr
