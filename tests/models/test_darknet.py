"""The darknet importer against layers computed here by hand, and against a real network."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from rerampile.errors import ModelError, UnsupportedModelError

NET = "[net]\nwidth=8\nheight=6\nchannels=4\n"
CONV = "[convolutional]\nfilters=4\nsize=1\nactivation=linear\n"
Run = Callable[..., list[np.ndarray]]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 4, 6, 8), np.float32)


@pytest.fixture
def layer(darknet: ModuleType, run: Run, image: np.ndarray) -> Callable[..., np.ndarray]:
    """`layer(cfg, floats)`: what the network below [net] makes of `image`."""

    def evaluate(cfg: str, floats: np.ndarray | None = None) -> np.ndarray:
        weights = darknet.WeightsFile("tiny.weights", np.zeros(0, np.float32) if floats is None else floats)
        model = darknet.build(darknet.parse(NET + cfg, "tiny.cfg"), weights)
        y = run(model, image)[0]
        declared = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
        assert list(y.shape[1:]) == declared[1:]
        return y

    return evaluate


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int, pad: int, groups: int, dilation: int = 1) -> np.ndarray:
    """Convolution straight from its definition, [n, c, h, w] with [out, c / groups, k, k]."""
    (n, _, h, w), (outputs, _, k, _) = x.shape, kernel.shape
    extent = dilation * (k - 1) + 1
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))).reshape(n, groups, -1, h + 2 * pad, w + 2 * pad)
    kernel = kernel.reshape(groups, outputs // groups, -1, k, k)
    height, width = (h + 2 * pad - extent) // stride + 1, (w + 2 * pad - extent) // stride + 1
    y = np.zeros((n, groups, outputs // groups, height, width))
    for r, c in np.ndindex(k, k):
        rows = slice(dilation * r, dilation * r + stride * (height - 1) + 1, stride)
        columns = slice(dilation * c, dilation * c + stride * (width - 1) + 1, stride)
        y += np.einsum("ngihw,goi->ngohw", x[..., rows, columns], kernel[..., r, c])
    return y.reshape(n, outputs, height, width)


@pytest.mark.parametrize(
    ("options", "size", "stride", "pad", "groups", "dilation"),
    [
        ("size=3\npad=1", 3, 1, 1, 1, 1),
        ("size=3\npad=1\nstride=2\ngroups=2", 3, 2, 1, 2, 1),
        ("size=2\npadding=1\nstride=2", 2, 2, 1, 1, 1),
        ("size=5\npad=1\ngroups=4", 5, 1, 2, 4, 1),
        ("size=3\npad=0\npadding=1\ndilation=2", 3, 1, 2, 1, 2),
        ("size=3\npad=1\ndilation=3", 3, 1, 3, 1, 3),
        ("size=1\npad=1\ndilation=3\nstride_x=2\nstride_y=2", 1, 2, 0, 1, 1),
    ],
)
def test_convolution_normalisation_and_leaky_read_the_floats_in_darknets_order(
    layer: Callable[..., np.ndarray],
    image: np.ndarray,
    options: str,
    size: int,
    stride: int,
    pad: int,
    groups: int,
    dilation: int,
) -> None:
    rng = np.random.default_rng(1)
    bias, scale, mean = (rng.standard_normal(8, np.float32) for _ in range(3))
    variance = rng.random(8, np.float32) + 0.5
    kernel = rng.standard_normal((8, 4 // groups, size, size), np.float32)
    floats = np.concatenate([bias, scale, mean, variance, kernel.ravel()])

    found = layer(f"[convolutional]\nfilters=8\n{options}\nbatch_normalize=1\nactivation=leaky\n", floats)

    column = (slice(None), None, None)
    y = convolve(image, kernel, stride, pad, groups, dilation)
    y = (y - mean[column]) / np.sqrt(variance[column] + 1e-5) * scale[column] + bias[column]
    np.testing.assert_allclose(found, np.where(y > 0, y, 0.1 * y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("linear", lambda x: x),
        ("leaky", lambda x: np.where(x > 0, x, 0.1 * x)),
        ("relu", lambda x: np.maximum(x, 0)),
        ("logistic", lambda x: 1 / (1 + np.exp(-x))),
        ("tanh", np.tanh),
        ("swish", lambda x: x / (1 + np.exp(-x))),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("mish", lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    ],
)
def test_activations_follow_their_formulas(
    layer: Callable[..., np.ndarray], image: np.ndarray, name: str, formula: Callable[[np.ndarray], np.ndarray]
) -> None:
    bias, kernel = np.arange(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    found = layer(CONV.replace("linear", name), np.concatenate([bias, kernel.ravel()]))
    np.testing.assert_allclose(found, formula(image + bias[:, None, None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "reduce"), [("maxpool", np.max), ("local_avgpool", np.mean)])
@pytest.mark.parametrize(("size", "stride"), [(2, 1), (2, 2), (3, 1), (3, 2), (5, 1)])
def test_pools_pad_as_darknet_does(
    layer: Callable[..., np.ndarray],
    image: np.ndarray,
    name: str,
    reduce: Callable[..., np.ndarray],
    size: int,
    stride: int,
) -> None:
    pad = size - 1
    found = layer(f"[{name}]\nsize={size}\nstride={stride}\n")
    height, width = ((n + pad - size) // stride + 1 for n in image.shape[2:])
    assert found.shape == (2, 4, height, width)
    for row, column in np.ndindex(height, width):
        top, left = row * stride - pad // 2, column * stride - pad // 2
        window = image[:, :, max(top, 0) : top + size, max(left, 0) : left + size]
        np.testing.assert_allclose(found[:, :, row, column], reduce(window, axis=(2, 3)), atol=1e-6)


def test_upsample_repeats_and_avgpool_averages(layer: Callable[..., np.ndarray], image: np.ndarray) -> None:
    np.testing.assert_array_equal(layer("[upsample]\nstride=3\n"), image.repeat(3, 2).repeat(3, 3))
    np.testing.assert_allclose(layer("[avgpool]\n"), image.mean((2, 3), keepdims=True), atol=1e-6)


def test_routes_join_layers_and_take_groups(layer: Callable[..., np.ndarray], image: np.ndarray) -> None:
    pool = "[maxpool]\nsize=3\nstride=1\n"
    pooled = layer(pool)
    twice = layer(pool + pool)
    np.testing.assert_array_equal(layer(pool + pool + "[route]\nlayers = -1, 0\n"), np.concatenate([twice, pooled], 1))
    np.testing.assert_array_equal(layer(pool + "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n"), pooled[:, 2:])
    both = layer(pool + pool + "[route]\nlayers=-1,-2\ngroups=4\ngroup_id=2\n")
    np.testing.assert_array_equal(both, np.concatenate([twice[:, 2:3], pooled[:, 2:3]], 1))


def test_shortcuts_add_and_attention_multiplies(layer: Callable[..., np.ndarray], image: np.ndarray) -> None:
    pool = "[maxpool]\nsize=3\nstride=1\n[dropout]\nprobability=.5\n"
    pooled, twice = layer(pool), layer(pool + pool)
    np.testing.assert_array_equal(layer(pool + pool + "[shortcut]\nfrom=-3\n"), twice + pooled)
    rectified = layer(pool + pool + "[shortcut]\nfrom=-3,0\nactivation=relu\n")
    np.testing.assert_array_equal(rectified, np.maximum(twice + pooled + pooled, 0))
    np.testing.assert_allclose(layer(pool + pool + "[sam]\nfrom=0\n"), twice * pooled, rtol=1e-6)
    scaled = layer(pool + "[avgpool]\n[scale_channels]\nfrom=0\n")
    np.testing.assert_allclose(scaled, pooled * pooled.mean((2, 3), keepdims=True), rtol=1e-4, atol=1e-6)


def test_heads_become_outputs_with_their_decoding(darknet: ModuleType, run: Run, image: np.ndarray) -> None:
    head = "[convolutional]\nfilters=14\nsize=1\nactivation=linear\n"
    yolo = "[yolo]\nmask={}\nanchors=10,14, 23,27, 37,58\nclasses=2\nscale_x_y=1.05\n"
    cfg = f"{NET}{head}{yolo.format('1,2')}[route]\nlayers=0\n[maxpool]\nsize=2\nstride=2\n{head}{yolo.format('0,1')}"
    model = darknet.build(darknet.parse(cfg, "two.cfg"), seed=3)
    properties = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert properties["yolo"] == {
        "classes": 2,
        "anchors": [[10, 14], [23, 27], [37, 58]],
        "out0": {"mask": [1, 2], "stride": 1, "scale_x_y": 1.05},
        "out1": {"mask": [0, 1], "stride": 2, "scale_x_y": 1.05},
    }
    assert [out.name for out in model.graph.output] == ["out0", "out1"]
    assert [y.shape for y in run(model, image)] == [(2, 14, 6, 8), (2, 14, 3, 4)]


def test_size_replaces_that_of_the_file_and_half_halves_the_weights(darknet: ModuleType, run: Run) -> None:
    sections = darknet.parse(NET + CONV.replace("size=1", "size=3\npad=1\nbatch_normalize=1"), "tiny.cfg")
    x = np.random.default_rng(0).standard_normal((1, 4, 10, 10), np.float32)
    full, half = (darknet.build(sections, size=10, seed=1, half=half) for half in (False, True))
    np.testing.assert_allclose(run(half, x)[0], run(full, x)[0], rtol=2e-2, atol=2e-3)
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    assert kinds["layer0.weight_fp16"] == onnx.TensorProto.FLOAT16
    assert kinds["layer0.bn.mean"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(("version", "seen"), [((0, 1, 0), "<i"), ((0, 2, 0), "<q"), ((0, 2, 5), "<q")])
def test_the_header_is_as_long_as_its_version_says(
    darknet: ModuleType, tmp_path: Path, version: tuple[int, int, int], seen: str
) -> None:
    floats = np.arange(5, dtype=np.float32)
    path = tmp_path / "x.weights"
    path.write_bytes(struct.pack("<3i", *version) + struct.pack(seen, 32_013_312) + floats.tobytes())
    np.testing.assert_array_equal(darknet.read_weights(path).floats, floats)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.weights: 0 bytes, expected a header of 16 and 4 a weight"),
        (struct.pack("<3iq", 0, 2, 0, 7)[:-1], "19 bytes, expected a header of 20 and 4 a weight; the file is damaged"),
        (struct.pack("<3iq2f", 0, 2, 0, 7, 1.0, math.nan), "weight 1 is not finite; the file is damaged"),
    ],
)
def test_damaged_weights_are_refused(darknet: ModuleType, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.weights"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        darknet.read_weights(path)


def test_every_float_must_be_used(darknet: ModuleType) -> None:
    sections = darknet.parse(NET + CONV, "tiny.cfg")
    for count, what in ((17, "3 are missing"), (23, "3 are left over")):
        weights = darknet.WeightsFile("x.weights", np.zeros(count, np.float32))
        with pytest.raises(ModelError, match=f"x.weights: {count} floats, expected 20 for this network: {what}"):
            darknet.build(sections, weights)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        (NET + "[lstm]\noutput=4\n", UnsupportedModelError, r"bad.cfg:5: \[lstm\]: unknown section"),
        (NET + "[maxpol]\n", UnsupportedModelError, "did you mean maxpool"),
        (NET + CONV.replace("linear", "mush"), UnsupportedModelError, r"bad.cfg:5: .*unknown activation 'mush' .*mish"),
        (NET + CONV + "xnor=1\n", UnsupportedModelError, "xnor=1 is not supported, expected 0"),
        (NET + CONV + CONV + "share_index=0\n", UnsupportedModelError, "share_index=0 is not supported$"),
        (NET + CONV + "[shortcut]\nfrom=-1\nweights_type=per_channel\n", UnsupportedModelError, "per_channel is not"),
        (NET + CONV + "[upsample]\nscale=2\n", UnsupportedModelError, "scale=2 is not supported, expected 1"),
        (NET + CONV.replace("4", "four"), ModelError, "filters=four, expected a whole number"),
        (NET + CONV.replace("4", "0"), ModelError, "filters=0, expected 1 to"),
        (NET + CONV + "groups=3\n", ModelError, "groups=3, expected a divisor of 4 inputs and 4 filters"),
        (NET + CONV.replace("size=1", "size=9"), ModelError, "a window of 9 does not fit a map of 4×6×8"),
        (NET + CONV + "[route]\n", ModelError, "no layers, expected numbers"),
        (NET + CONV + "[route]\nlayers=-1,x\n", ModelError, "layers=-1,x, expected numbers"),
        (NET + CONV + "[route]\nlayers=1.5\n", ModelError, "layers=1.5, expected whole numbers"),
        (NET + CONV + "[route]\nlayers=-2\n", ModelError, "refers to layer -2, expected one of the 1 layers above it"),
        (NET + CONV + "[maxpool]\nstride=2\n[route]\nlayers=0,1\n", ModelError, "joins maps of 4×6×8 and 4×3×4"),
        (NET + CONV + "[maxpool]\nstride=2\n[shortcut]\nfrom=0\n", UnsupportedModelError, "adds maps of 4×3×4 and"),
        (NET + CONV + "[sam]\nfrom=0\n[avgpool]\n[sam]\nfrom=0\n", ModelError, "multiplies maps .* which do not fit"),
        (NET + CONV + "[yolo]\nmask=0\nanchors=1,2\nclasses=1\n", ModelError, r"4 channels, expected 1 anchors × \(1"),
        (NET + CONV + "[yolo]\nmask=1\nanchors=1,2\nclasses=1\n", ModelError, "2 anchor numbers and mask=1, which do"),
        (NET + 3 * "[upsample]\nstride=1024\n", ModelError, "a map of 4×6442450944×8589934592, expected at most"),
        (NET, ModelError, "the network computes nothing, expected at least one layer"),
        (NET + "[dropout]\n", ModelError, "the network computes nothing, expected at least one layer"),
        (CONV, ModelError, r"bad.cfg: not a darknet network, expected \[net\] as its first section"),
        (NET + "width 8\n", ModelError, r"bad.cfg:5: 'width 8', expected \[section\] or key=value"),
        (
            NET + CONV.replace("4", "2000000000"),
            UnsupportedModelError,
            "more than 532,676,608 weights, which do not fit",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    darknet: ModuleType, cfg: str, error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        darknet.build(darknet.parse(cfg, "bad.cfg"))
    assert type(caught.value) is error


def test_nothing_takes_the_output_of_a_raw_head(darknet: ModuleType) -> None:
    yolo = "[yolo]\nmask=0\nanchors=1,2\nclasses=1\n"
    cfg = NET + CONV.replace("filters=4", "filters=6") + yolo + CONV
    with pytest.raises(UnsupportedModelError, match=r"takes the output of layer 1, a \[yolo\] head that is not"):
        darknet.build(darknet.parse(cfg, "bad.cfg"))


def test_the_command_writes_a_model_or_one_line(models_folder: Path, tmp_path: Path) -> None:
    cfg, out = tmp_path / "tiny.cfg", tmp_path / "tiny.onnx"

    def command(text: str) -> subprocess.CompletedProcess[str]:
        cfg.write_text(text)
        arguments = [sys.executable, models_folder / "darknet.py", cfg, "-o", out, "--size", "16"]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    refused = command(NET + "[crop]\n")
    assert (refused.returncode, refused.stderr.count("\n"), out.exists()) == (1, 1, False)
    assert refused.stderr.startswith("error: tiny.cfg:5: [crop]: unknown section")
    assert command(NET + CONV).returncode == 0
    assert [d.dim_value for d in onnx.load(out).graph.input[0].type.tensor_type.shape.dim][1:] == [4, 16, 16]


def test_a_real_network_uses_every_float_and_finds_what_is_there(
    darknet: ModuleType, run: Run, data_root: Path
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    name = "yolo-fastest-1.1-xl"
    sections = darknet.read_cfg(data_root / "models" / f"{name}.cfg")
    assert darknet.count_weights(sections) == 923_486
    model = darknet.build(sections, darknet.read_weights(data_root / "models" / f"{name}.weights"))
    truth = json.loads((data_root / "coco" / "instances_val2017_first128.json").read_text())
    categories = [c["id"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    decoding = json.loads(model.metadata_props[0].value)

    hits = 0
    for entry in truth["images"][:24]:
        picture = image_module.open(data_root / "coco" / "images" / entry["file_name"]).convert("RGB")
        x = np.asarray(picture.resize((320, 320)), np.float32).transpose(2, 0, 1)[None] / 255
        kind, box = max((_best(decoding, k, y[0]) for k, y in enumerate(run(model, x))), key=lambda b: b[0])[1:]
        scale = np.array([picture.width, picture.height] * 2) / 320
        boxes = [a for a in truth["annotations"] if a["image_id"] == entry["id"]]
        hits += any(categories[kind] == a["category_id"] and _iou(box * scale, a["bbox"]) > 0.5 for a in boxes)
    assert hits >= 18, "the surest box of an image is nearly always one of the annotated objects"


def _best(decoding: dict[str, Any], k: int, y: np.ndarray) -> tuple[float, int, np.ndarray]:
    """Score, class and box (left, top, width, height in input pixels) of the surest cell of head k, [c, h, w]."""
    head = decoding[f"out{k}"]
    y = y.reshape(len(head["mask"]), -1, *y.shape[1:]).astype(np.float64)
    sure = 1 / (1 + np.exp(-y))
    scores = sure[:, 4:5] * sure[:, 5:]
    a, kind, row, column = np.unravel_index(scores.argmax(), scores.shape)
    size = np.exp(y[a, 2:4, row, column]) * decoding["anchors"][head["mask"][a]]
    centre = (sure[a, :2, row, column] + (column, row)) * head["stride"]
    return float(scores.max()), int(kind), np.concatenate([centre - size / 2, size])


def _iou(a: np.ndarray, b: list[float]) -> float:
    """Intersection over union of two boxes (left, top, width, height)."""
    sides = np.minimum(a[:2] + a[2:], np.add(b[:2], b[2:])) - np.maximum(a[:2], b[:2])
    inner = float(np.prod(np.maximum(sides, 0)))
    return inner / (float(a[2] * a[3]) + b[2] * b[3] - inner)
