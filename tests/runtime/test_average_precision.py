"""Average precision on some of the images, and how much the choice of images moves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from PIL import Image

from rerampile.cli import main
from rerampile.runtime.average_precision import JudgedDetections, annotated, drop_variance
from rerampile.runtime.statistics import variance_parts

SIDE = 8


def annotations(images: int, seed: int = 0) -> dict[str, Any]:
    """Return annotations of one box an image, of two categories by turns."""
    generator = np.random.default_rng(seed)
    boxes = generator.uniform(1, 3, (images, 2)).round(2)
    return {
        "images": [{"id": k + 1, "file_name": f"{k:03}.png", "width": SIDE, "height": SIDE} for k in range(images)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": k + 1,
                "category_id": 7 + 2 * (k % 2),
                "iscrowd": 0,
                "bbox": [*map(float, box), 4.0, 4.0],
                "area": 16.0,
            }
            for k, box in enumerate(boxes)
        ],
    }


def detections(record: dict[str, Any], right: float, seed: int) -> npt.NDArray[np.float64]:
    """Return one detection an image, which is right with a probability, and surer then."""
    generator = np.random.default_rng(seed)
    rows = []
    for entry in record["annotations"]:
        good = generator.random() < right
        x, y, width, height = entry["bbox"]
        score = generator.uniform(0.3, 1) if good else generator.uniform(0, 0.7)
        rows.append([entry["image_id"], x if good else 0, y if good else 7, width, height, score, entry["category_id"]])
    return np.array(rows, np.float64)


def test_leaving_images_out_is_judging_the_others_alone() -> None:
    """By category and in the mean."""
    record = annotations(24)
    judge, rows = annotated(record), detections(annotations(24), 0.6, 1)
    every = JudgedDetections(judge, rows, range(1, 25), [7, 9])
    left_out = {2, 3, 11, 24}
    kept = [image for image in range(1, 25) if image not in left_out]
    alone = JudgedDetections(judge, rows[~np.isin(rows[:, 0], list(left_out))], kept, [7, 9])
    np.testing.assert_array_equal(every.by_category(left_out), alone.by_category())
    np.testing.assert_array_equal(every.means(left_out), alone.means())
    assert every.means()[0] != every.means(left_out)[0]
    assert np.isnan(every.means(range(1, 25))).all()


def test_the_jackknife_finds_what_the_choice_of_images_adds() -> None:
    """Against drops measured on many choices, with the correction for drawing without replacement."""
    count, seen = 60, 20
    record = annotations(count)
    judge = annotated(record)
    clean, chip = detections(record, 0.9, 1), detections(record, 0.5, 2)
    generator = np.random.default_rng(3)
    drops, within = [], []
    for number in range(120):
        images = np.sort(generator.choice(count, seen, replace=False) + 1).tolist()
        same, found = (JudgedDetections(judge, r[np.isin(r[:, 0], images)], images, [7, 9]) for r in (clean, chip))
        drops.append((same.means() - found.means())[0])
        if number < 12:
            within.append(drop_variance(same, found, images)[0])
    parts = variance_parts(np.array(drops), np.array(within), seen, count)
    assert parts.images == pytest.approx(np.var(drops, ddof=1), rel=0.35)


def test_one_image_has_no_variance() -> None:
    """Nothing can be left out."""
    record = annotations(1)
    judged = JudgedDetections(annotated(record), detections(record, 1.0, 0), [1], [7, 9])
    assert drop_variance(judged, judged, [1]).tolist() == [0, 0]


def test_images_a_chip_on_the_command_line(tmp_path: Path) -> None:
    """Each chip is compared with the clean model on the images that it saw."""
    record = annotations(12)
    (tmp_path / "images").mkdir()
    for entry in record["images"]:
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / entry["file_name"])
    (tmp_path / "i.json").write_text(json.dumps(record))
    (tmp_path / "d.json").write_text(json.dumps({"classes": ["dog", "cat"], "boxes": "xyxy"}))
    onnx.save(_always_one_box(), tmp_path / "m.onnx")
    run = CliRunner()
    folder = tmp_path / "m.deployment"
    compiled = run.invoke(main, ["compile", str(tmp_path / "m.onnx"), "-o", str(folder), "-q"])
    assert compiled.exit_code == 0, compiled.output
    words = ["validate", str(folder), "--data", f"coco:{tmp_path / 'images'},{tmp_path / 'i.json'}", "-q", "--json"]
    words += ["--detection", str(tmp_path / "d.json"), "--failure-rate", "0.2", "--runs", "4", "--pixel-range", "0,1"]
    done = run.invoke(main, [*words, "--images-per-run", "6", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rate = json.loads(done.stdout)["rates"][0]
    found = rate["metrics"]["map50"]
    assert rate["images"] == 6
    assert found["image_deviation"] is not None
    clean = np.array(found["values"]) + np.array(found["drops"])
    assert len(set(clean.round(6))) > 1  # other images, another clean value
    assert found["clean"] == pytest.approx(clean.mean())
    (tmp_path / "i.json").write_text(json.dumps({**record, "annotations": record["annotations"][:1]}))
    refused = run.invoke(main, [*words, "--images-per-run", "1", "-o", str(tmp_path / "other")])
    assert refused.exit_code == 1
    assert "--images-per-run 1: a chip drew images without a box of the model's classes; give more" in refused.stderr


def _always_one_box() -> onnx.ModelProto:
    """Return a detector that finds a dog at the same place everywhere, through weights on a crossbar."""
    weights = np.zeros((6, 3 * SIDE * SIDE), np.float32)
    bias = np.array([2, 2, 6, 6, 0.9, 0.1], np.float32)
    weights[:, 0] = bias / 10
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1),
        helper.make_node("Split", ["y", "parts"], ["box", "score"], axis=1),
        helper.make_node("Reshape", ["box", "box_shape"], ["boxes"]),
        helper.make_node("Reshape", ["score", "score_shape"], ["scores"]),
    ]
    constants = {
        "w": weights,
        "b": bias,
        "parts": np.array([4, 2]),
        "box_shape": np.array([-1, 1, 4]),
        "score_shape": np.array([-1, 1, 2]),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "detector",
        [value("x", onnx.TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [value("boxes", onnx.TensorProto.FLOAT, ["N", 1, 4]), value("scores", onnx.TensorProto.FLOAT, ["N", 1, 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
