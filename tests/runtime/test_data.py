"""Adapters: what they read, in which order, and what they say of data that they cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from rerampile.errors import ConfigError, DataError
from rerampile.runtime.data import open_dataset, spread, write_first_image
from rerampile.runtime.preprocessing import Preprocessing
from rerampile.runtime.session import open_session

RAW = Preprocessing(preset="raw")


@pytest.fixture(scope="module")
def opened(parse_model: Callable[..., onnx.ModelProto]) -> Callable[[str], Any]:
    """`opened("float[N, 3, 8, 8] x")`: the session of a model with these inputs."""

    def open_model(inputs: str) -> Any:
        model = parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> m ({inputs}) => (int64[A] y) {{ y = Shape (x) }}'
        )
        return open_session(model.SerializeToString())

    return open_model


@pytest.fixture(scope="module")
def images8(opened: Callable[[str], Any]) -> Any:
    return opened("float[N, 3, 8, 8] x")


def grey(path: Path, value: int) -> Path:
    """Write an 8 x 8 image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)
    return path


def read(dataset: Any, size: int = 3, indices: np.ndarray | None = None) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """Return inputs, targets and indices of all batches."""
    batches = list(dataset.batches(size, indices))
    tensors = [next(iter(batch.inputs.values()))[: len(batch.indices)] for batch in batches]
    targets = [target for batch in batches for target in (batch.targets if batch.targets is not None else [])]
    return np.concatenate(tensors), targets, np.concatenate([batch.indices for batch in batches])


# cifar10


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A folder in CIFAR-10's binary layout, and its records: 7 test images, 3 in each training file."""
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (22, 3073), np.uint8)
    records[:, 0] = rng.integers(0, 10, 22)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for k in range(5):
        records[3 * k : 3 * k + 3].tofile(folder / f"data_batch_{k + 1}.bin")
    records[15:].tofile(folder / "test_batch.bin")
    return folder, records


@pytest.mark.parametrize(
    ("split", "rows"),
    [("", slice(15, 22)), ("@test", slice(15, 22)), ("@train", slice(15)), ("@data_batch_5", slice(12, 15))],
)
@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_splits(cifar, opened, split, rows, inside):
    folder, records = cifar
    dataset = open_dataset(
        f"cifar10:{folder if inside else folder.parent}{split}", opened("float[N, 3, 32, 32] x"), RAW
    )
    tensor, labels, indices = read(dataset)
    np.testing.assert_array_equal(tensor.reshape(len(tensor), -1), records[rows, 1:])
    assert labels == records[rows, 0].tolist()
    assert indices.tolist() == list(range(len(dataset)))


def test_default_split(cifar, opened):
    session = opened("float[N, 3, 32, 32] x")
    assert len(open_dataset(f"cifar10:{cifar[0]}", session, default_split="train")) == 15
    assert len(open_dataset(f"cifar10:{cifar[0]}@test", session, default_split="train")) == 7


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_batches_do_not_change_images(cifar, opened, size):
    dataset = open_dataset(f"cifar10:{cifar[0]}", opened("float[N, 3, 32, 32] x"))
    whole, labels, _ = read(dataset, 7)
    for wanted in (None, np.array([1, 4, 5])):
        tensor, some, indices = read(dataset, size, wanted)
        chosen = np.arange(7) if wanted is None else wanted
        np.testing.assert_array_equal(tensor, whole[chosen])
        np.testing.assert_array_equal(indices, chosen)
        assert some == [labels[k] for k in chosen]


def test_a_fixed_batch_is_filled_up(cifar, opened):
    dataset = open_dataset(f"cifar10:{cifar[0]}", opened("float[4, 3, 32, 32] x"))
    batches = list(dataset.batches(100))
    assert [batch.inputs["x"].shape[0] for batch in batches] == [4, 4]
    assert [len(batch.indices) for batch in batches] == [4, 3]
    np.testing.assert_array_equal(batches[1].inputs["x"][2], batches[1].inputs["x"][3])


def test_digest_is_of_the_data(cifar, opened):
    session, (folder, records) = opened("float[N, 3, 32, 32] x"), cifar
    before = open_dataset(f"cifar10:{folder}", session).digest
    assert before == open_dataset(f"cifar10:{folder.parent}", session).digest
    records[21, 5] ^= 1
    records[15:].tofile(folder / "test_batch.bin")
    assert before != open_dataset(f"cifar10:{folder}", session).digest


def test_cifar10_that_is_damaged(cifar, opened):
    session, (folder, records) = opened("float[N, 3, 32, 32] x"), cifar
    with pytest.raises(ConfigError, match=r"cifar10 has no split 'tset' \(did you mean test\?\)"):
        open_dataset(f"cifar10:{folder}@tset", session)
    records[18, 0] = 77
    records[15:].tofile(folder / "test_batch.bin")
    with pytest.raises(DataError, match=r"test_batch\.bin: image 3: label 77, expected 0 to 9"):
        open_dataset(f"cifar10:{folder}", session)
    (folder / "test_batch.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"test_batch\.bin: 5 bytes, expected a multiple of 3073"):
        open_dataset(f"cifar10:{folder}", session)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: cannot be read \(No such file"):
        open_dataset(f"cifar10:{folder}", session)


# imagefolder


def test_class_folders(tmp_path, images8):
    for number, name in enumerate(["b/2.png", "a/1.png", "b/1.jpg", "c/x.webp", "a/deep/0.bmp"]):
        grey(tmp_path / name, 10 * number)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    dataset = open_dataset(f"imagefolder:{tmp_path}", images8, RAW)
    tensor, labels, _ = read(dataset)
    assert labels == [0, 0, 1, 1, 2]
    assert tensor[:, 0, 0, 0].tolist() == [10, 40, 20, 0, 30]
    assert dataset.classes == 3


@pytest.mark.parametrize(
    ("listing", "text", "expected"),
    [
        ("labels.txt", "b 1.png 4\na.png 7\n", [4, 7]),
        ("labels.txt", "# name and label\n\nb 1.png\t4\na.png\t7\n", [4, 7]),
        ("labels.csv", "image,label\nb 1.png,4\na.png,7\n", [4, 7]),
        ("labels.txt", "b 1.png dog\na.png cat\n", [1, 0]),
        ("other.lst", "b 1.png 4\na.png 7\n", [4, 7]),
    ],
)
def test_list_of_labels(tmp_path, images8, listing, text, expected):
    grey(tmp_path / "b 1.png", 20)
    grey(tmp_path / "a.png", 10)
    (tmp_path / listing).write_text(text)
    named = f",{tmp_path / listing}" if listing.startswith("other") else ""
    tensor, labels, _ = read(open_dataset(f"imagefolder:{tmp_path}{named}", images8, RAW))
    assert labels == expected
    assert tensor[:, 0, 0, 0].tolist() == [20, 10]


@pytest.mark.parametrize("below", ["images/{}_n{}.png", "n{1}/{0}.png"])
def test_list_of_classes(tmp_path, images8, below):
    (tmp_path / "synset.txt").write_text("n03 cat, a pet\nn01 dog\nn02 fish, cold, wet\n")
    for number, name in enumerate(["01", "02", "03"]):
        grey(tmp_path / below.format(number, name), 10 * number)
    folder = tmp_path / "images" if below.startswith("images") else tmp_path
    dataset = open_dataset(f"imagefolder:{folder}", images8, RAW)
    assert read(dataset)[1] == [1, 2, 0]
    assert dataset.classes == 3


def test_split_folders(tmp_path, images8):
    grey(tmp_path / "test" / "a" / "1.png", 1)
    grey(tmp_path / "train" / "a" / "1.png", 2)
    assert read(open_dataset(f"imagefolder:{tmp_path}", images8, RAW))[0].max() == 1
    assert read(open_dataset(f"imagefolder:{tmp_path}@train", images8, RAW))[0].max() == 2
    with pytest.raises(DataError, match="val: no such folder"):
        open_dataset(f"imagefolder:{tmp_path}@val", images8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"images without labels, expected one folder a class, or labels\.txt"),
        ("", r"labels\.txt: is empty"),
        ("a.png\n", "'a.png' has no label"),
        ("a.png 1\nmissing.png 2\n", "'missing.png' is not in"),
        ("a.png -1\n", r"labels\.txt: label '-1', expected a class number from 0 for each image, or a name for each"),
        ("a.png 1.0\n", r"label '1\.0', expected a class number from 0"),
        ("a.png 99999999999999999999\n", "label '99999999999999999999', expected a class number"),
        ("a.png 1\na.png 2\n", r"'a\.png' is there twice, with different labels"),
        ("n01 cat\n", r"a\.png: neither its folder nor the end of its name is a class of .*labels\.txt"),
    ],
)
def test_labels_that_are_wrong(tmp_path, images8, text, message):
    grey(tmp_path / "a.png", 1)
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(f"imagefolder:{tmp_path}", images8)


def test_bad_images_are_named_or_skipped(tmp_path, images8):
    for number in range(5):
        grey(tmp_path / "a" / f"{number}.png", number)
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    cut = tmp_path / "a" / "3.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a/1\.png: not a readable image .*--skip-bad"):
        read(open_dataset(f"imagefolder:{tmp_path}", images8))
    dataset = open_dataset(f"imagefolder:{tmp_path}", images8, RAW, skip_bad=True)
    for _ in range(2):  # the second pass comes from memory
        tensor, _, indices = read(dataset, 2)
        assert indices.tolist() == [0, 2, 4]
        assert tensor[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert sorted(dataset.skipped) == [1, 3]
    with pytest.raises(DataError, match="none of its 2 images can be read"):
        read(dataset, 2, np.array([1, 3]))


def test_images_of_sixteen_bits_are_not_cut_off(tmp_path, images8):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "a" / "1.png")
    with pytest.raises(DataError, match=r"a/1\.png: .*pixels of more than eight bits .* expected eight bits a channel"):
        read(open_dataset(f"imagefolder:{tmp_path}", images8))


def test_images_of_different_sizes_need_a_size(tmp_path, opened):
    grey(tmp_path / "a" / "1.png", 1)
    Image.new("RGB", (9, 8)).save(tmp_path / "a" / "2.png")
    session = opened("float[N, 3, H, W] x")
    with pytest.raises(DataError, match="images of different sizes"):
        read(open_dataset(f"imagefolder:{tmp_path}", session, RAW))
    sized = Preprocessing(preset="raw", size=(4, 4), resize="stretch")
    assert read(open_dataset(f"imagefolder:{tmp_path}", session, sized))[0].shape == (2, 3, 4, 4)


def test_first_image_as_the_model_sees_it(tmp_path, images8):
    grey(tmp_path / "a" / "1.png", 137)
    write_first_image(open_dataset(f"imagefolder:{tmp_path}", images8), tmp_path / "first.png")
    assert np.unique(Image.open(tmp_path / "first.png")).tolist() == [137]


# coco


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, Any]:
    """Two images, 8 x 8 and 16 x 8, and what is in them; `write` in the tests puts it beside them."""
    grey(tmp_path / "images" / "a.png", 10)
    Image.new("RGB", (16, 8), (20,) * 3).save(tmp_path / "images" / "b.png")
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 8, "height": 8},
            {"id": 3, "file_name": "b.png", "width": 16, "height": 8},
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4]}],
    }


def open_coco(folder: Path, content: Any, session: Any, **options: Any) -> Any:
    (folder / "instances.json").write_text(json.dumps(content))
    return open_dataset(f"coco:{folder / 'images'},{folder / 'instances.json'}", session, **options)


def test_coco(tmp_path, coco, images8):
    dataset = open_coco(tmp_path, coco, images8)
    _, targets, _ = read(dataset)
    assert [(t.image_id, t.width, t.height) for t in targets] == [(7, 8, 8), (3, 16, 8)]
    assert targets[1].placement == (0.5, 0.5, 0, 2)
    assert [c["id"] for c in dataset.annotations["categories"]] == [2, 5]
    assert dataset.annotations["annotations"][0] | {"area": 12, "iscrowd": 0} == dataset.annotations["annotations"][0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images",), 5, "no list 'images', expected the COCO"),
        (("images",), [], "no images"),
        (("images", 1, "file_name"), "c.png", r"c\.png: no such image"),
        (("images", 1, "id"), 7, "share an id"),
        (("images", 1, "width"), "wide", r"images\[1\]: no 'width' \(int\)"),
        (("annotations", 0, "image_id"), 9, r"annotations\[0\]: image_id 9 is not one"),
        (("annotations", 0, "category_id"), 9, r"annotations\[0\]: category_id 9 is not one"),
        (("annotations", 0, "bbox"), [1, 2, 3], r"annotations\[0\]: bbox \[1, 2, 3\], expected four numbers"),
        (("annotations", 0, "bbox"), [1, 2, 3, "x"], "expected four numbers"),
        (("annotations", 0, "bbox"), [1, 2, -3, 4], "expected a width and a height of 0 or more"),
        (("annotations", 0, "area"), "x", r'annotations\[0\]: area "x", expected a number of 0 or more'),
        (("annotations", 0, "iscrowd"), "x", r'iscrowd "x", expected 0 or 1'),
    ],
)
def test_coco_that_is_wrong(tmp_path, coco, images8, path, value, message):
    part: Any = coco
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    if path == ("images",) and value == []:
        coco["annotations"] = []
    with pytest.raises(DataError, match=message):
        open_coco(tmp_path, coco, images8)


def test_coco_image_of_another_size(tmp_path, coco, images8):
    coco["images"][1]["width"] = 17
    with pytest.raises(DataError, match=r"b\.png: not a readable image \(width,height 16,8, expected 17,8"):
        read(open_coco(tmp_path, coco, images8))
    assert read(open_coco(tmp_path, coco, images8, skip_bad=True))[2].tolist() == [0]


# npz


def test_npz(tmp_path, opened):
    session = opened("float[N, 2] x, int64[N] z")
    x, z = np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5)
    np.savez(tmp_path / "d.npz", x=x, z=z, labels=np.array([3, 1, 4, 1, 5], np.uint8))
    dataset = open_dataset(f"npz:{tmp_path / 'd.npz'}", session)
    batches = list(dataset.batches(2))
    np.testing.assert_array_equal(np.concatenate([batch.inputs["x"] for batch in batches]), x)
    np.testing.assert_array_equal(np.concatenate([batch.inputs["z"] for batch in batches]), z)
    assert np.concatenate([batch.targets for batch in batches]).tolist() == [3, 1, 4, 1, 5]
    assert dataset.kind == "labels"
    np.savez(tmp_path / "e.npz", x=x, z=z)
    assert open_dataset(f"npz:{tmp_path / 'e.npz'}", session).kind == "none"


F32 = np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((5, 3), F32)}, r"input 'x' is float32 \[5, 3\], expected float32 \['N', 2\]"),
        ({"x": np.zeros((5, 2))}, "input 'x' is float64"),
        ({"y": np.zeros((5, 2), F32)}, "'y' is neither labels nor an input"),
        ({}, "input 'x' is missing"),
        ({"x": np.zeros((5, 2), F32), "labels": np.zeros(4, int)}, "'x' 5, 'labels' 4, expected the same number"),
        ({"x": np.zeros((0, 2), F32)}, "at least one"),
        ({"x": np.zeros((1, 2), F32), "labels": np.zeros(1)}, r"labels are float64 \[1\], expected one integer"),
        ({"x": np.zeros((2, 2), F32), "labels": np.array([0, -1])}, "image 1: label -1, expected 0 or more"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, opened, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(f"npz:{tmp_path / 'd.npz'}", opened("float[N, 2] x"))


def test_npz_that_is_no_archive(tmp_path, opened):
    (tmp_path / "d.npz").write_text("text")
    with pytest.raises(DataError, match=r"d\.npz: not an \.npz file"):
        open_dataset(f"npz:{tmp_path / 'd.npz'}", opened("float[N, 2] x"))
    with pytest.raises(DataError, match=r"e\.npz: not a readable \.npz file"):
        open_dataset(f"npz:{tmp_path / 'e.npz'}", opened("float[N, 2] x"))


# generated


def test_generated_fits_any_model(opened):
    dataset = open_dataset("generated:5", opened("float[N, 3, H, W] x, int64[N, T] ids"), seed=1)
    whole = next(iter(dataset.batches(5)))
    assert whole.inputs["x"].shape[:2] == (5, 3)
    assert whole.inputs["ids"].dtype == np.int64
    for batch in dataset.batches(2):
        for name, array in batch.inputs.items():
            np.testing.assert_array_equal(array, whole.inputs[name][batch.indices])


def test_generated_follows_the_seed(opened):
    session = opened("float[N, 2] x")
    one, again, other = (open_dataset("generated", session, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(read(one)[0], read(again)[0])
    assert not np.array_equal(read(one)[0], read(other)[0])
    assert one.digest == again.digest != other.digest
    assert len(one) == 64
    assert len(open_dataset("generated", session, generate=3)) == 3


@pytest.mark.parametrize("inputs", ["float x", "float[2, 3] x, float[5, 3] z", "float[4, 3] x, float z"])
def test_inputs_without_a_common_first_axis_are_generated_as_a_whole(opened, inputs):
    batches = list(open_dataset("generated:3", opened(inputs)).batches(8))
    assert [batch.indices.tolist() for batch in batches] == [[0], [1], [2]]
    assert not np.array_equal(batches[0].inputs["x"], batches[1].inputs["x"])


# specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar:x", r"unknown adapter 'cifar' \(did you mean cifar10\?\)"),
        ("/some/folder", "unknown adapter '/some/folder'"),
        ("cifar10", "'cifar10' names no data, expected cifar10:DIR"),
        ("npz:", "names no data, expected npz:FILE"),
        ("coco:images", "expected coco:IMAGES,instances.json"),
        ("generated:few", "expected generated or generated:COUNT"),
        ("generated:3@train", "these data have none; leave out '@train'"),
    ],
)
def test_specs_that_are_wrong(images8, spec, message):
    with pytest.raises(ConfigError, match=message):
        open_dataset(spec, images8)


def test_an_at_sign_inside_a_path_is_no_split(tmp_path, opened):
    np.savez(tmp_path / "a@b.npz", x=np.zeros((1, 2), np.float32))
    assert len(open_dataset(f"npz:{tmp_path / 'a@b.npz'}", opened("float[N, 2] x"))) == 1


def test_images_need_one_input(tmp_path, opened):
    grey(tmp_path / "a" / "1.png", 1)
    with pytest.raises(DataError, match=r"the model has 2 \('x', 'z'\); use npz:FILE"):
        open_dataset(f"imagefolder:{tmp_path}", opened("float[N, 3, 8, 8] x, float[N] z"))
    with pytest.raises(DataError, match="missing: no such folder"):
        open_dataset(f"imagefolder:{tmp_path / 'missing'}", opened("float[N, 3, 8, 8] x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_dataset(f"imagefolder:{tmp_path / 'empty'}", opened("float[N, 3, 8, 8] x"))


def test_spread_covers_the_whole():
    assert spread(1000, 4).tolist() == [0, 333, 666, 999]
    assert spread(7, 7).tolist() == list(range(7))
