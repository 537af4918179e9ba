"""Accuracy and agreement, against definitions spelled out in a loop and values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rerampile.errors import ConfigError, DataError
from rerampile.runtime.data import Batch, open_dataset
from rerampile.runtime.metrics import Accuracy, Agreement, MetricResult, open_metric
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.session import open_session, run

LABELS = np.array([0, 1, 2], np.int64)


def batch_of(count: int, targets: Any = None, start: int = 0, rows: int | None = None) -> Batch:
    inputs = {"x": np.zeros((rows or count, 1), np.float32)}
    return Batch(inputs=inputs, targets=targets, indices=np.arange(start, start + count))


def accuracy(scores: Any, labels: Any) -> MetricResult:
    metric = Accuracy(0, "data")
    metric.update([np.array(scores, np.float32)], batch_of(len(labels), np.array(labels)))
    return metric.result()


@given(
    arrays(np.float32, (6, 8), elements=st.integers(-2, 2).map(float)),
    arrays(np.int64, 6, elements=st.integers(0, 7)),
    st.integers(1, 6),
)
def test_accuracy_is_the_place_of_the_label(scores, labels, size):
    metric = Accuracy(0, "data")
    for start in range(0, 6, size):
        part = slice(start, start + size)
        metric.update([scores[part]], batch_of(len(labels[part]), labels[part], start))
    found = metric.result()
    for image, (row, label) in enumerate(zip(scores, labels, strict=True)):
        order = sorted(range(8), key=lambda c: (-row[c], c))
        assert found.scores["top1"][image] == 100 * (order[0] == label)
        assert found.scores["top5"][image] == 100 * (label in order[:5])
    assert found.values == {name: pytest.approx(score.mean()) for name, score in found.scores.items()}
    assert found.indices.tolist() == list(range(6))


def test_a_dead_chip_is_right_about_one_class_only():
    assert accuracy(np.zeros((10, 10)), range(10)).values == {"top1": 10, "top5": 50}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_wrong_and_counted(value):
    scores = np.eye(3)
    scores[1, 2] = value
    found = accuracy(scores, LABELS)
    assert found.scores["top1"].tolist() == found.scores["top5"].tolist() == [100, 0, 100]
    assert found.non_finite == 1


def test_another_output_that_is_not_finite_counts_too():
    metric = Accuracy(0, "data")
    other = np.zeros((3, 2), np.float32)
    other[2, 1] = np.nan
    metric.update([np.eye(3, dtype=np.float32), other], batch_of(3, LABELS, rows=3))
    assert metric.result().non_finite == 1
    assert metric.result().scores["top1"].tolist() == [100, 100, 0]


def test_rows_that_fill_up_a_batch_do_not_count():
    metric = Accuracy(0, "data")
    metric.update([np.eye(3, dtype=np.float32)[[0, 1, 1, 1]]], batch_of(2, LABELS[:2], rows=4))
    assert metric.result().values["top1"] == 100
    assert len(metric.result().indices) == 2


def test_outputs_need_one_row_an_image():
    metric = Accuracy(0, "data", "logits")
    message = "data: output 'logits' has 6 rows for 3 images, expected one row an image; the first axis of inputs"
    with pytest.raises(DataError, match=message):
        metric.update([np.eye(6, dtype=np.float32)], batch_of(3, LABELS))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range(label):
    with pytest.raises(DataError, match=rf"image 1: label {label}, expected 0 to 2 as the model has 3 classes"):
        accuracy(np.eye(3), [0, label, 2])


def test_fresh_forgets_scores():
    metric = Accuracy(0, "data")
    metric.update([np.eye(3, dtype=np.float32)], batch_of(3, LABELS))
    other = metric.fresh()
    other.update([np.eye(3, dtype=np.float32)[[1, 2, 0]]], batch_of(3, LABELS))
    assert (metric.result().values["top1"], other.result().values["top1"]) == (100, 0)


# Agreement with the clean model


def agreement(clean: list[Any], faulty: list[Any], count: int) -> MetricResult:
    metric = Agreement(["y"])
    metric.learn([np.array(part, np.float32) for part in clean], batch_of(count))
    chip = metric.fresh()
    chip.update([np.array(part, np.float32) for part in faulty], batch_of(count))
    return chip.result()


def test_the_clean_model_agrees_with_itself():
    scores = np.random.default_rng(0).standard_normal((4, 7))
    found = agreement([scores], [scores], 4)
    assert found.values == {"top1_agreement": 100, "output_error": 0}
    assert found.non_finite == 0


def test_agreement_by_hand():
    found = agreement([[[3, 4], [0, 2], [5, 0]]], [[[3, 4], [2, 0], [5, 5]]], 3)
    assert found.scores["top1_agreement"].tolist() == [100, 0, 100]
    np.testing.assert_allclose(found.scores["output_error"], [0, 100 * 2**0.5, 100], rtol=1e-6)
    assert found.values["output_error"] == pytest.approx((100 * 2**0.5 + 100) / 3)
    assert found.by_class == {"0": 100, "1": 50}


def test_error_is_over_all_outputs():
    found = agreement([[[3.0]], [[[4.0]]]], [[[3.0]], [[[0.0]]]], 1)
    assert found.values == {"output_error": pytest.approx(80)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_agreement_of_outputs_that_are_not_finite(value):
    found = agreement([[[1, 2], [1, 2]]], [[[1, 2], [value, 2]]], 2)
    assert found.scores["top1_agreement"].tolist() == [100, 0]
    assert found.scores["output_error"].tolist() == [0, 100]
    assert found.non_finite == 1
    with pytest.raises(DataError, match="image 0: the clean model's outputs are not finite"):
        agreement([[[value, 1]]], [[[1, 1]]], 1)


def test_outputs_without_a_batch_axis_belong_to_every_image():
    found = agreement([[1.0, 0, 0, 0, 0, 0]], [[1.0, 1, 0, 0, 0, 0]], 2)
    assert found.scores["output_error"].tolist() == [100, 100]


def test_outputs_that_are_no_arrays_count_too():
    """Text, and lists of arrays of different shapes: no agreement by being left out."""
    metric = Agreement(["words", "parts"])
    clean = [np.array(["yes", "no"], object), [np.ones(2, np.float32), np.ones((3, 1), np.float32)]]
    metric.learn(clean, batch_of(2))
    for outputs, close in ((clean, True), ([np.array(["yes", "on"], object), clean[1]], False)):
        chip = metric.fresh()
        chip.update(outputs, batch_of(2))
        assert (chip.result().values["output_error"] == 0) is close
    chip = metric.fresh()
    chip.update([clean[0], [np.zeros(2, np.float32), clean[1][1]]], batch_of(2))
    assert chip.result().values["output_error"] > 0


def test_what_is_learned_does_not_change_with_the_buffers():
    metric, buffer = Agreement(["y"]), np.ones((2, 3), np.float32)
    metric.learn([buffer], batch_of(2))
    buffer[:] = 5
    metric.update([np.ones((2, 3), np.float32)], batch_of(2))
    assert metric.result().values["output_error"] == 0


# With data and models


@pytest.fixture(scope="module")
def colours(parse_model: Callable[..., onnx.ModelProto]) -> Any:
    """A model whose three scores are the means of red, green and blue."""
    model = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> colours (float[N, 3, 2, 2] x) => (float[N, 3] y) {
            mean = GlobalAveragePool (x) y = Flatten (mean)
        }"""
    )
    return open_session(model.SerializeToString())


def write_npz(path: Path, **changes: Any) -> Path:
    x = np.zeros((3, 3, 2, 2), np.float32)
    x[[0, 1, 2], [0, 1, 2]] = 1
    np.savez(path, **{"x": x, "labels": LABELS, **changes})
    return path


def test_the_metric_that_suits_the_data(tmp_path, colours):
    dataset = open_dataset(f"npz:{write_npz(tmp_path / 'd.npz')}", colours)
    metric = open_metric("auto", dataset, colours)
    for batch in dataset.batches(2):
        metric.update(run(colours, batch.inputs), batch)
    assert metric.result().values == {"top1": 100, "top5": 100}
    assert isinstance(open_metric("auto", open_dataset("generated", colours), colours), Agreement)
    with pytest.raises(ConfigError, match=r"map needs data with boxes, but npz:.* has labels"):
        open_metric("map", dataset, colours)
    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy' \(did you mean accuracy\?\)"):
        open_metric("acuracy", dataset, colours)


def test_classes_that_do_not_fit(tmp_path, colours, parse_model):
    from PIL import Image

    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "1.png")
    dataset = open_dataset(f"imagefolder:{tmp_path}", colours, Preprocessing(preset="raw"))
    with pytest.raises(DataError, match="has 2 classes, but the model's output 'y' has 3"):
        open_metric("auto", dataset, colours)
    identity = parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[N, 3, 2, 2] x) => (float[N, 3, 2, 2] y) { y = Identity(x) }'
    )
    with pytest.raises(DataError, match=r"need an output of one score a class, .* 'y' \['N', 3, 2, 2\]"):
        open_metric("accuracy", dataset, open_session(identity.SerializeToString()))


# Real data and models


def measured(model: Path, spec: str, preprocessing: Preprocessing | None, images: int) -> MetricResult:
    session = open_session(model)
    dataset = open_dataset(spec, session, preprocessing)
    metric = open_metric("auto", dataset, session)
    for batch in dataset.batches(20, np.linspace(0, len(dataset) - 1, images).astype(np.int64)):
        metric.update(run(session, batch.inputs), batch)
    return metric.result()


@pytest.fixture(scope="session")
def cifar10(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 1,000 test images in CIFAR-10's binary layout."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar-10-batches-bin")
    sheet = np.asarray(Image.open(data_root / "cifar10" / "test_00.webp"))
    rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
    pixels = sheet.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3072)
    labels = np.load(data_root / "cifar10" / "test_labels.npy").astype(np.uint8)
    np.concatenate([labels[:, None], pixels[: len(labels)]], axis=1).tofile(folder / "test_batch.bin")
    return folder


@pytest.mark.parametrize(("option", "top1"), [("A", 91.5), ("B", 91.1)])
def test_resnet20_on_cifar10(data_root, cifar10, option, top1):
    model = data_root / "models" / f"resnet20_cifar10_option{option}.onnx"
    found = measured(model, f"cifar10:{cifar10}", Preprocessing(preset="imagenet", resize="none"), 1000)
    assert found.values["top1"] == pytest.approx(top1, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "top1", "top5", "within"),
    [("mobilenetv2_imagenet", 81.6, 95.9, 0.2), ("mobilenetv2_imagenet_qlinear_int8", 81.8, 95.0, 1.0)],
)
def test_mobilenetv2_on_imagenet(data_root, name, top1, top5, within):
    """All images, no options: preset, size and labels are found. int8 results vary with the processor."""
    spec = f"imagefolder:{data_root / 'imagenet' / 'images'}"
    found = measured(data_root / "models" / f"{name}.onnx", spec, None, 1000)
    assert found.values["top1"] == pytest.approx(top1, abs=within)
    assert found.values["top5"] == pytest.approx(top5, abs=within)
