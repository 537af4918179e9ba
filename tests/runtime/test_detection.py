"""Detection: heads decoded, candidates suppressed, boxes moved back to the image, and pycocotools' verdict."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rerampile import compile_model
from rerampile.cli import main
from rerampile.errors import ConfigError, DataError
from rerampile.runtime.data import Batch, open_dataset
from rerampile.runtime.detection import (
    Candidates,
    DetectionOptions,
    YoloHeads,
    open_detection,
    read_detection_options,
    suppress,
)
from rerampile.runtime.metrics import MetricResult, open_metric
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.session import open_session, run

HEADS: dict[str, Any] = {
    "classes": 2,
    "anchors": [[8, 8], [32, 16]],
    "out0": {"mask": [1], "stride": 16, "scale_x_y": 1.2},
}


def logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-np.asarray(p))


def raw_head(box: tuple[float, float, float, float], kind: int, score: float) -> np.ndarray:
    """Return the head of `HEADS`, [1, 7, 4, 4], that says one box (centre, size, in pixels of the input)."""
    head = np.full((1, 7, 4, 4), -20, np.float32)
    column, row = int(box[0] // 16), int(box[1] // 16)
    offset = (np.array(box[:2]) / 16 - [column, row] + 0.1) / 1.2
    head[0, :2, row, column] = logit(offset)
    head[0, 2:4, row, column] = np.log(np.array(box[2:]) / [32, 16])
    head[0, 4, row, column] = logit(score)
    head[0, 5 + kind, row, column] = 20
    return head


class Session:
    """What a metric asks of a session: outputs and metadata."""

    def __init__(self, outputs: dict[str, tuple[Any, str]], properties: dict[str, str]) -> None:
        self._outputs = [type("Output", (), {"name": n, "shape": s, "type": t}) for n, (s, t) in outputs.items()]
        self.custom_metadata_map = properties

    def get_outputs(self) -> list[Any]:
        return self._outputs

    def get_modelmeta(self) -> Session:
        return self


@pytest.fixture(scope="module")
def head_session(parse_model: Callable[..., onnx.ModelProto]) -> Any:
    """A model with an image as its input and one raw head of `HEADS`, described in its metadata."""
    model = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        heads (float[N, 3, 64, 64] images) => (float[N, 7, 4, 4] out0) {
            out0 = Conv <strides = [16, 16]> (images, w)
        }""",
        w=np.zeros((7, 3, 16, 16), np.float32),
    )
    onnx.helper.set_model_props(model, {"yolo": json.dumps(HEADS | {"letterbox": True}), "names": '["dog", "cat"]'})
    return open_session(model.SerializeToString())


@pytest.fixture
def pictures(tmp_path: Path, head_session: Any) -> Any:
    """A data set of two images, 100 x 50 and 32 x 64, each with one object."""
    for name, size in (("a.png", (100, 50)), ("b.png", (32, 64))):
        Image.new("RGB", size).save(tmp_path / name)
    content = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 50},
            {"id": 2, "file_name": "b.png", "width": 32, "height": 64},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}, {"id": 9, "name": "bird"}],
        "annotations": [
            {"image_id": 1, "category_id": 4, "bbox": [20, 10, 50, 30]},
            {"image_id": 2, "category_id": 3, "bbox": [2, 30, 20, 12]},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return open_dataset(f"coco:{tmp_path},{tmp_path / 'instances.json'}", head_session)


# Both objects as the letterboxed input holds them: centre, size, the model's class.
INPUT_BOXES = (((45 * 0.64, 25 * 0.64 + 16, 50 * 0.64, 30 * 0.64), 0), ((12 + 16, 36, 20, 12), 1))


def judged(metric: Any, dataset: Any, heads: np.ndarray) -> MetricResult:
    metric = metric.fresh()
    for batch in dataset.batches(1):
        metric.update([heads[batch.indices]], batch)
    return metric.result()


def test_a_head_is_decoded_by_the_book():
    rng = np.random.default_rng(5)
    raw = rng.standard_normal((2, 7, 3, 3)).astype(np.float32)
    outputs = [type("Output", (), {"name": "out0", "shape": ["N", 7, 3, 3]})]
    for new_coords in (False, True):
        head = {"mask": [1], "stride": 16, "scale_x_y": 1.2, "new_coords": new_coords}
        value = 1 / (1 + np.exp(-raw)) if new_coords else raw
        found = YoloHeads.parse({**HEADS, "out0": head}, outputs).decode([value], 2, 0.0)
        for image in range(2):
            expected = []
            for y in range(3):
                for x in range(3):
                    v = raw[image, :, y, x].astype(np.float64)
                    s = 1 / (1 + np.exp(-v))
                    cx, cy = ((s[0] * 1.2 - 0.1 + x) * 16, (s[1] * 1.2 - 0.1 + y) * 16)
                    w, h = (4 * s[2:4] ** 2 if new_coords else np.exp(v[2:4])) * [32, 16]
                    kind = int(s[6] > s[5])
                    expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, s[4] * s[5 + kind], kind])
            rows = np.column_stack([found[image].boxes, found[image].scores, found[image].classes])
            np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_perfect_detections_of_letterboxed_images(pictures, head_session, capsys):
    heads = np.concatenate([raw_head(box, kind, 0.9) for box, kind in INPUT_BOXES])
    metric = open_detection(pictures, head_session)
    found = judged(metric, pictures, heads)
    assert found.values == {"map50": pytest.approx(100), "map": pytest.approx(100)}
    assert found.by_class == {"cat": pytest.approx(100), "dog": pytest.approx(100)}
    assert capsys.readouterr().out == ""


def test_a_detection_that_is_off_counts_for_loose_overlaps_only(pictures, head_session):
    """A box moved by a quarter of its width overlaps 0.6: right at 0.5 to 0.6, wrong at 0.65 to 0.95."""
    (box, kind), second = INPUT_BOXES
    moved = (box[0] + box[2] / 4.1, *box[1:])
    heads = np.concatenate([raw_head(moved, kind, 0.9), raw_head(*second, 0.9)])
    found = judged(open_detection(pictures, head_session), pictures, heads)
    assert found.values == {"map50": pytest.approx(100), "map": pytest.approx((30 + 100) / 2)}


def test_wrong_classes_missing_and_spoilt_images(pictures, head_session):
    metric = open_detection(pictures, head_session)
    nothing = np.full((2, 7, 4, 4), -20, np.float32)
    assert judged(metric, pictures, nothing).values == {"map50": 0, "map": 0}
    swapped = np.concatenate([raw_head(box, 1 - kind, 0.9) for box, kind in INPUT_BOXES])
    assert judged(metric, pictures, swapped).values["map50"] == 0
    spoilt = np.concatenate([raw_head(box, kind, 0.9) for box, kind in INPUT_BOXES])
    spoilt[1, 3, 0, 0] = np.nan
    found = judged(metric, pictures, spoilt)
    assert found.values["map50"] == pytest.approx(50)
    assert found.non_finite == 1


def test_huge_outputs_do_not_stop_a_run(pictures, head_session):
    heads = np.full((2, 7, 4, 4), 1e30, np.float32)
    assert judged(open_detection(pictures, head_session), pictures, heads).non_finite == 0


boxes = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(1, 8)] * 2)


@given(st.lists(st.tuples(boxes, st.integers(0, 4), st.integers(0, 1)), max_size=12), st.sampled_from([0.0, 0.3, 0.5]))
def test_suppression_is_the_greedy_one(found, overlap):
    def iou(a: Any, b: Any) -> float:
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        return float(shared / (a[2] * a[3] + b[2] * b[3] - shared))

    kept: list[int] = []
    for k in sorted(range(len(found)), key=lambda k: (-found[k][1], k)):
        box, _, kind = found[k]
        if all(found[j][2] != kind or iou(box, found[j][0]) <= overlap for j in kept):
            kept.append(k)
    corners = np.array([[x, y, x + w, y + h] for (x, y, w, h), _, _ in found], np.float32).reshape(-1, 4)
    given_candidates = Candidates(
        corners, np.array([s for _, s, _ in found], np.float32), np.array([c for *_, c in found], np.int64)
    )
    best = suppress(given_candidates, overlap)
    np.testing.assert_array_equal(best.boxes, corners[kept])
    assert best.classes.tolist() == [found[k][2] for k in kept]


@pytest.mark.parametrize("form", ["xyxy", "yxyx", "xywh", "labels", "normalised", "no batch", "rows", "across"])
def test_models_that_give_boxes(pictures, form):
    """The same two objects, in every form that a model may give them."""
    centres = np.array([[box] for box, _ in INPUT_BOXES], np.float32)
    corners = np.concatenate([centres[..., :2] - centres[..., 2:] / 2, centres[..., :2] + centres[..., 2:] / 2], -1)
    scores, labels = np.array([[[0.9, 0.1]], [[0.1, 0.9]]], np.float32), np.array([[0], [1]])
    options: dict[str, Any] = {"classes": ["dog", "cat"]}
    floats = "tensor(float)"
    outputs = {"boxes": (["N", "M", 4], floats), "scores": (["N", "M", 2], floats)}
    values = [corners, scores]
    if form in ("yxyx", "xywh"):
        options["boxes"] = form
        values[0] = corners[..., [1, 0, 3, 2]] if form == "yxyx" else centres
    elif form in ("labels", "no batch"):
        outputs = {"scores": (["M"], floats), "labels": (["M"], "tensor(int64)"), "boxes": (["M", 4], floats)}
        values = [scores.max(axis=2), labels, corners]
    elif form == "normalised":
        options["normalised"] = True
        values[0] = corners / 64
    elif form == "rows":
        outputs = {"y": (["N", "M", 7], floats)}
        values = [np.concatenate([centres, np.ones((2, 1, 1), np.float32), scores], axis=2)]
    elif form == "across":
        outputs = {"y": (["N", 6, "M"], floats)}
        values = [np.concatenate([centres, scores], axis=2).transpose(0, 2, 1)]
    metric = open_detection(pictures, Session(outputs, {}), DetectionOptions(**options))
    for k, batch in enumerate(pictures.batches(1)):
        metric.update([v[k] if form == "no batch" else v[k : k + 1] for v in values], batch)
    assert metric.result().values == {"map50": pytest.approx(100), "map": pytest.approx(100)}


def test_boxes_without_a_batch_axis_go_one_at_a_time(pictures):
    outputs = {"boxes": (["M", 4], "tensor(float)"), "scores": (["M", 2], "tensor(float)")}
    metric = open_detection(pictures, Session(outputs, {}), DetectionOptions(classes=["dog", "cat"]))
    batch: Batch = next(iter(pictures.batches(2)))
    with pytest.raises(DataError, match="one image a run; give --batch 1"):
        metric.update([np.zeros((3, 4), np.float32), np.zeros((3, 2), np.float32)], batch)


def with_heads(changes: dict[str, Any]) -> DetectionOptions:
    return DetectionOptions(heads={**HEADS, **changes}, classes=["dog", "cat"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (with_heads({"classes": 3}), ConfigError, r"output 'out0' is \['N', 7, 4, 4\], expected 8 channels"),
        (with_heads({"anchors": "text"}), ConfigError, "yolo heads: not complete or not numbers"),
        (with_heads({"out0": {"mask": [5], "stride": 16}}), ConfigError, "yolo heads: not complete or not numbers"),
        (with_heads({"out0": 1}), ConfigError, "no output is described"),
        (with_heads({"out1": {"mask": [0], "stride": 8}}), ConfigError, r"no output 'out1' \(did you mean out0\?\)"),
        (DetectionOptions(classes=["tree", "car"]), DataError, "none of the model's 2 classes is one of its 3"),
    ],
)
def test_options_that_do_not_fit(pictures, head_session, options, error, message):
    with pytest.raises(error, match=message):
        open_detection(pictures, head_session, options)


def test_models_that_say_nothing(pictures):
    session = Session({"y": (["N", 7, 4, 4], "tensor(float)")}, {})
    with pytest.raises(ConfigError, match=r"nothing says how the outputs become boxes: 'y' \['N', 7, 4, 4\]"):
        open_detection(pictures, session)
    heads = {"classes": 2, "anchors": HEADS["anchors"], "y": HEADS["out0"]}
    open_detection(pictures, session, DetectionOptions(heads=heads, classes=["cat", "dog"]))
    with pytest.raises(DataError, match="the model has 2 classes, the data 3 categories; name the model's classes"):
        open_detection(pictures, session, DetectionOptions(heads=heads))
    with pytest.raises(ConfigError, match="--overlap: 2, expected 0 to 1"):
        DetectionOptions(overlap=2)


# Real data and models


def measured(model: Path, data_root: Path, images: int, preprocessing: Preprocessing | None = None) -> dict[str, float]:
    session = open_session(model)
    coco = data_root / "coco"
    dataset = open_dataset(f"coco:{coco / 'images'},{coco / 'instances_val2017_first128.json'}", session, preprocessing)
    metric = open_metric("auto", dataset, session)
    for batch in dataset.batches(8, np.arange(images)):
        metric.update(run(session, batch.inputs), batch)
    return metric.result().values


def test_yolov4_tiny_on_some_images(data_root):
    """The names of its 20 classes differ from COCO's, and the letterbox serves it as well as stretching."""
    found = measured(data_root / "models" / "yolov4_tiny_voc.onnx", data_root, 24, Preprocessing(preset="yolo"))
    assert found["map50"] > 40


@pytest.mark.slow
def test_yolov4_tiny_on_coco(data_root):
    found = measured(data_root / "models" / "yolov4_tiny_voc.onnx", data_root, 128)
    assert found == {"map50": pytest.approx(49.5, abs=1), "map": pytest.approx(23.9, abs=1)}


@pytest.mark.slow
def test_yolo_fastest_on_coco(data_root, project_root, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(project_root / "models"), *sys.path])
    darknet = importlib.import_module("darknet")
    stem = data_root / "models" / "yolo-fastest-1.1-xl"
    model = darknet.build(darknet.read_cfg(Path(f"{stem}.cfg")), darknet.read_weights(Path(f"{stem}.weights")))
    onnx.save(model, tmp_path / "fastest.onnx")
    found = measured(tmp_path / "fastest.onnx", data_root, 128)
    assert found == {"map50": pytest.approx(43.2, abs=1), "map": pytest.approx(21.9, abs=1)}


BOXES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 1, 4] boxes, float[N, 1, 2] scores) {
    a = Flatten (x)
    b = Gemm <transB = 1> (a, w, bias)
    c = Reshape (b, shape)
    boxes, scores = Split <axis = 2> (c, sizes)
}
"""


def test_a_file_says_what_the_model_does_not(parse_model, tmp_path):
    """Two classes without names, and boxes as shares of the input: refused without the file, right with it."""
    bias = np.array([0.25, 0.25, 0.75, 0.75, 0.9, 0.1], np.float32)
    tensors = {"w": np.full((6, 192), 1e-9, np.float32), "bias": bias}
    tensors |= {"sizes": np.array([4, 2]), "shape": np.array([-1, 1, 6])}
    folder = compile_model(parse_model(BOXES, **tensors), out=tmp_path / "net.deployment").folder
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
    record = {
        "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 8}],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 2, 4, 4], "area": 16, "iscrowd": 0}],
    }
    (tmp_path / "i.json").write_text(json.dumps(record))
    words = ["validate", folder, "--data", f"coco:{tmp_path / 'images'},{tmp_path / 'i.json'}", "--runs", "1", "-q"]
    words += ["--failure-rate", "0", "-o", tmp_path / "out", "--json"]

    def run(*more: object) -> Any:
        return CliRunner().invoke(main, [str(word) for word in [*words, *more]])

    assert run().exit_code == 1
    (tmp_path / "d.json").write_text(json.dumps({"classes": ["dog", "cat"], "boxes": "xyxy", "normalised": True}))
    done = run("--detection", tmp_path / "d.json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["clean"]["map50"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"class": ["dog"]}', "unknown field `class`; expected the fields of docs/data.md"),
        ('{"boxes": 3}', r"Expected `str | null`, got `int` - at `\$.boxes`"),
        ('{"boxes": "corners"}', "--boxes: 'corners', expected xyxy, yxyx or xywh"),
        ("{", "--detection"),
        (" " * (1 << 20) + "{}", "expected a small JSON object"),
    ],
)
def test_files_of_detection_options_that_make_no_sense(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_detection_options(tmp_path / "d.json")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        read_detection_options(tmp_path / "none.json")
