"""Geometry, order of channels and normalisation, against values worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from PIL import Image

from rerampile.errors import ConfigError, DataError
from rerampile.runtime.preprocessing import PRESETS, Pipeline, Preprocessing
from rerampile.runtime.session import open_session

Taking = Callable[..., object]


@pytest.fixture(scope="module")
def taking(parse_model: Callable[..., onnx.ModelProto]) -> Taking:
    """`taking("float[N, 3, 8, 8]", mean="...")`: the session of a model with that input and those properties."""

    def open_model(declared: str, **properties: str) -> object:
        result = declared.partition("[")[0] + "[A, B, C, D]"
        model = parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> m ({declared} x) => ({result} y) {{ y = Identity(x) }}'
        )
        onnx.helper.set_model_props(model, properties)
        return open_session(model.SerializeToString())

    return open_model


@pytest.fixture
def noise() -> Callable[[int, int], Image.Image]:
    """`noise(height, width)`: an image of random pixels."""
    rng = np.random.default_rng(3)
    return lambda height, width: Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def tensor_of(pipeline: Pipeline, image: Image.Image) -> np.ndarray:
    return pipeline.tensor(pipeline.place(image, "image")[0][None])


@pytest.mark.parametrize(
    ("preset", "mean", "std", "scale"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255),
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 1 / 255),
        ("yolo", (0, 0, 0), (1, 1, 1), 1 / 255),
        ("raw", (0, 0, 0), (1, 1, 1), 1),
    ],
)
def test_presets_normalise(taking, noise, preset, mean, std, scale):
    image = noise(8, 8)
    pipeline = Preprocessing(preset=preset).pipeline(taking("float[N, 3, 8, 8]"), "raw")
    expected = (np.asarray(image, np.float64) * scale - mean) / std
    np.testing.assert_allclose(tensor_of(pipeline, image)[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5)


def test_every_preset_is_complete(taking):
    for preset in PRESETS:
        pipeline = Preprocessing(preset=preset, size=(8, 8)).pipeline(taking("float[N, C, H, W]"), "raw")
        assert None not in pipeline.describe().values()


def test_short_cuts_out_the_centre_without_resampling_what_has_the_size(taking, noise):
    image = noise(256, 301)
    pipeline = Preprocessing(preset="imagenet").pipeline(taking("float[N, 3, 224, 224]"), "raw")
    pixels, placement = pipeline.place(image, "image")
    np.testing.assert_array_equal(pixels.transpose(1, 2, 0), np.asarray(image)[16:240, 38:262])
    assert placement == (1, 1, -38, -16)


@pytest.mark.parametrize("sides", [(100, 37), (37, 100), (8, 8), (9, 8), (1000, 3)])
@pytest.mark.parametrize("resize", ["short", "stretch", "letterbox"])
def test_placement_finds_a_mark_again(taking, sides, resize):
    """A white half on black, cut through the middle: its edge lies where the placement says."""
    pixels = np.zeros((*sides, 3), np.uint8)
    pixels[:, sides[1] // 2 :] = 255
    pipeline = Preprocessing(preset="raw", resize=resize).pipeline(taking("float[N, 3, 64, 64]"), "raw")
    placed, placement = pipeline.place(Image.fromarray(pixels), "image")
    assert placed.shape == (3, 64, 64)
    edge = sides[1] // 2 * placement.scale_x + placement.left
    row = placed[0, 32].astype(int)
    inside = slice(max(0, round(placement.left)), min(64, round(placement.left + sides[1] * placement.scale_x)))
    soft = max(1.0, placement.scale_x)  # bilinear interpolation blurs an edge by one pixel of the image
    if resize != "letterbox" or edge - inside.start > soft:
        found = inside.start + (row[inside] < 128).sum()
        assert abs(found - edge) <= soft
    corners = np.array([[0, 0, sides[1], sides[0]]], np.float32)
    moved = corners.copy()
    moved[:, 0::2] = corners[:, 0::2] * placement.scale_x + placement.left
    moved[:, 1::2] = corners[:, 1::2] * placement.scale_y + placement.top
    np.testing.assert_allclose(placement.undo(moved), corners, atol=1e-3)


def test_letterbox_has_grey_bars_and_keeps_the_shape(taking):
    white = Image.new("RGB", (40, 20), (255, 255, 255))
    pipeline = Preprocessing(preset="yolo").pipeline(taking("float[N, 3, 32, 32]"), "raw")
    pixels, placement = pipeline.place(white, "image")
    assert (pixels[:, :8] == 114).all()
    assert (pixels[:, 8:24] == 255).all()
    assert (pixels[:, 24:] == 114).all()
    assert placement == (0.8, 0.8, 0, 8)


def test_channels_and_layout(taking, noise):
    image = noise(8, 8)
    rgb = tensor_of(Preprocessing(preset="imagenet").pipeline(taking("float[N, 3, 8, 8]"), "raw"), image)
    bgr = Preprocessing(preset="imagenet", channels="bgr").pipeline(taking("float[N, 8, 8, 3]"), "raw")
    assert bgr.layout == "nhwc"
    np.testing.assert_array_equal(tensor_of(bgr, image)[0], rgb[0, ::-1].transpose(1, 2, 0))


def test_integer_and_half_inputs(taking, noise):
    image = noise(8, 8)
    raw = tensor_of(Preprocessing().pipeline(taking("uint8[N, 8, 8, 3]"), "raw"), image)
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw[0], np.asarray(image))
    assert tensor_of(Preprocessing().pipeline(taking("float16[N, 3, 8, 8]"), "raw"), image).dtype == np.float16


def test_grey_inputs(taking, noise):
    image = noise(8, 8)
    found = tensor_of(Preprocessing(mean=(0.5,), std=(0.5,)).pipeline(taking("float[N, 1, 8, 8]"), "cifar10"), image)
    np.testing.assert_allclose(found[0, 0], np.asarray(image.convert("L")) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("declared", ["float[N, 3, 8, 8]", "float[N, 8, 8, 3]", "uint8[N, 3, 8, 8]"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_picture_undoes_the_normalisation(taking, noise, declared, channels):
    image = noise(8, 8)
    preset = "raw" if declared.startswith("uint8") else "imagenet"
    pipeline = Preprocessing(preset=preset, channels=channels).pipeline(taking(declared), "raw")
    np.testing.assert_array_equal(np.asarray(pipeline.picture(tensor_of(pipeline, image)[0])), np.asarray(image))


def test_a_piece_overrides_the_preset(taking):
    pieces = Preprocessing.parse(
        preset="imagenet", size="6,10", resize="stretch", mean="1,2,3", std="4,5,6", pixel_range="-1,1", layout="nhwc"
    )
    pipeline = pieces.pipeline(taking("float[N, H, W, C]"), "cifar10")
    found = tensor_of(pipeline, Image.new("RGB", (20, 20), (0, 255, 0)))
    assert found.shape == (1, 6, 10, 3)
    np.testing.assert_allclose(found[0, 0, 0], [(-1 - 1) / 4, (1 - 2) / 5, (-1 - 3) / 6])


def test_metadata_speaks_where_no_preset_is_named(taking):
    session = taking("float[N, 3, 8, 8]", mean=json.dumps([0.1, 0.2, 0.3]), std=json.dumps([0.4, 0.5, 0.6]))
    assert Preprocessing().pipeline(session, "cifar10").mean == (0.1, 0.2, 0.3)
    assert Preprocessing(mean=(0.7,)).pipeline(session, "cifar10").mean == (0.7,)
    assert Preprocessing(preset="imagenet").pipeline(session, "cifar10").mean == PRESETS["imagenet"].mean


@pytest.mark.parametrize("mean", ["not json", "[1, 2", '"text"', "[NaN, 0, 0]", "7"])
def test_metadata_that_is_something_else_is_left_alone(taking, mean):
    session = taking("float[N, 3, 8, 8]", mean=mean, std="[1, 1, 1]")
    assert Preprocessing().pipeline(session, "cifar10").mean == PRESETS["cifar10"].mean


def test_raw_heads_are_fed_as_darknet_feeds_them(taking):
    session = taking("float[N, 3, 8, 8]", yolo='{"classes": 2}')
    assert Preprocessing().pipeline(session, "yolo").resize == "stretch"
    assert Preprocessing(preset="yolo").pipeline(session, "yolo").resize == "letterbox"
    letterboxed = taking("float[N, 3, 8, 8]", yolo='{"classes": 2, "letterbox": true}')
    assert Preprocessing().pipeline(letterboxed, "yolo").resize == "letterbox"


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({"preset": "imagnet"}, r"--preprocess: unknown preset 'imagnet' \(did you mean imagenet\?\)"),
        ({"resize": "crop"}, "--resize: 'crop', expected short, stretch, letterbox or none"),
        ({"channels": "rbg"}, "--channels: 'rbg', expected rgb or bgr"),
        ({"size": "224"}, "--size: '224', expected two numbers"),
        ({"size": "0,5"}, "--size: 0,5, expected height,width of 1 to"),
        ({"mean": "a,b"}, "--mean: 'a,b', expected numbers"),
        ({"mean": "nan"}, "--mean: 'nan', expected numbers"),
        ({"std": "1,0,1"}, "--std: 1,0,1, expected numbers above 0"),
        ({"pixel_range": "1,0"}, "--pixel-range: 1,0, expected low,high"),
        ({"crop": "1.5"}, "--crop: 1.5, expected a share"),
    ],
)
def test_wrong_options(pieces, message):
    with pytest.raises(ConfigError, match=message):
        Preprocessing.parse(**pieces)


@pytest.mark.parametrize(
    ("declared", "pieces", "error", "message"),
    [
        ("float[N, 3, 8, 8]", {"size": (4, 4)}, DataError, "--size 4,4 does not fit .* height,width 8,8"),
        ("float[N, 4, 8, 8]", {}, DataError, "4 channels, expected 3 or 1"),
        ("float[N, 1, 8, 8]", {"preset": "imagenet"}, ConfigError, "--mean: 3 numbers for an input of 1 channel"),
        ("float[N, 3, 8]", {}, DataError, r"\['N', 3, 8\], expected four dimensions"),
    ],
)
def test_pieces_that_do_not_fit_the_model(parse_model, taking, declared, pieces, error, message):
    if declared.count(",") < 3:
        model = parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> m ({declared} x) => (float[A, B, C] y) {{ y = Identity(x) }}'
        )
        session = open_session(model.SerializeToString())
    else:
        session = taking(declared)
    with pytest.raises(error, match=message):
        Preprocessing(**pieces).pipeline(session, "raw")


def test_none_refuses_another_size(taking):
    pipeline = Preprocessing(preset="raw").pipeline(taking("float[N, 3, 8, 8]"), "raw")
    with pytest.raises(DataError, match=r"cat\.png: height,width 9,7, expected 8,8; choose a --resize"):
        pipeline.place(Image.new("RGB", (7, 9)), "cat.png")
