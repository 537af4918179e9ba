"""Adapters: data sets in the layouts that they come in, opened by a short specification.

:func:`open_dataset` turns ``cifar10:DIR@train``, ``imagefolder:DIR``, ``coco:IMAGES,instances.json``, ``npz:FILE`` or
``generated`` into a :class:`~rerampile.runtime.dataset.Dataset`. Installed packages
add adapters of their own by entry points of the group ``rerampile.data``.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, DataError, RerampileError, did_you_mean
from rerampile.files import require_regular
from rerampile.npz_file import ArrayHeader, npz_headers, read_npz
from rerampile.onnx_file import file_sha256
from rerampile.runtime.dataset import (
    ArrayDataset,
    Batch,
    BoxDataset,
    BoxTarget,
    Dataset,
    ImageDataset,
    Indices,
    spread,
    write_first_image,
)
from rerampile.runtime.inputs import declared_dtype, fitting_inputs, random_array
from rerampile.runtime.preprocessing import Pipeline, Pixels, Placement, Preprocessing

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Batch",
    "BoxDataset",
    "BoxTarget",
    "DataSource",
    "Dataset",
    "ImageDataset",
    "open_dataset",
    "spread",
    "training_split",
    "with_absolute_paths",
    "write_first_image",
]

_GROUP = "rerampile.data"  # of entry points
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def open_dataset(
    spec: str,
    session: Any,
    preprocessing: Preprocessing | None = None,
    *,
    default_split: str = "test",
    generate: int = 64,
    seed: int = 0,
    skip_bad: bool = False,
) -> Dataset:
    """Open a data set for a model.

    Args:
        spec: ``ADAPTER:WHERE@SPLIT``, see docs/data.md.
        session: The model's ONNX Runtime session; the data have to fit its inputs.
        preprocessing: How images become inputs; by default as the data, the model's input and its metadata say.
        default_split: The split where ``spec`` names none.
        generate: How many inputs ``generated`` makes.
        seed: Seed of generated inputs.
        skip_bad: Leave out images that cannot be read instead of raising.

    Raises:
        ConfigError: Adapter, split or preprocessing are not known.
        DataError: The data are missing, damaged, or do not fit the model.
    """
    adapter, _, rest = spec.partition(":")
    known = _adapters()
    if adapter not in known:
        raise ConfigError(f"--data: unknown adapter '{adapter}'{did_you_mean(adapter, known)}")
    if generate < 1:
        raise ConfigError(f"--images: {generate}, expected 1 or more")
    where, split = _split_of(rest)
    if not where and adapter != "generated":
        raise ConfigError(f"--data: '{spec}' names no data, expected {known[adapter].form}")
    source = DataSource(
        spec=spec,
        where=where,
        split=split or default_split,
        split_named=split is not None,
        session=session,
        preprocessing=preprocessing or Preprocessing(),
        generate=generate,
        seed=seed,
        skip_bad=skip_bad,
    )
    return known[adapter].open(source)


def training_split(spec: str) -> str:
    """Return the specification of the training images beside some data; the data themselves if they have no splits."""
    adapter, _, rest = spec.partition(":")
    where, split = _split_of(rest)
    folder = Path(where.rpartition(",")[0] or where)
    splits = split is not None or adapter == "cifar10" or (adapter == "imagefolder" and (folder / "test").is_dir())
    return f"{adapter}:{where}@train" if splits else spec


def with_absolute_paths(spec: str) -> str:
    """Return a specification that names the same data whatever the current folder is."""
    adapter, _, rest = spec.partition(":")
    if adapter not in _ADAPTERS or not rest or adapter == "generated":
        return spec
    parts = rest.rsplit(",", 1) if "," in _ADAPTERS[adapter].form else [rest]
    return f"{adapter}:{','.join(str(Path(part).absolute()) for part in parts)}"


def _split_of(text: str) -> tuple[str, str | None]:
    """Part ``WHERE@SPLIT``; an @ inside a path is part of it."""
    found = re.fullmatch(r"(.*)@([\w-]+)", text)
    return (found[1], found[2]) if found else (text, None)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """What an adapter gets; see :func:`open_dataset`.

    Attributes:
        spec: All of what the user wrote, for messages.
        where: What stands between the adapter's name and the split.
        split: The split, named or by default.
        split_named: Whether the user named it.
        session: The model's ONNX Runtime session; the data have to fit its inputs.
        preprocessing: How images become inputs.
        generate: How many inputs to make where data are generated.
        seed: Seed of these.
        skip_bad: Leave out images that cannot be read.
    """

    spec: str
    where: str
    split: str
    split_named: bool
    session: Any
    preprocessing: Preprocessing
    generate: int
    seed: int
    skip_bad: bool

    def pipeline(self, preset: str) -> Pipeline:
        """Return the preprocessing, where it is not said otherwise that of a preset."""
        return self.preprocessing.pipeline(self.session, preset)

    def require(self, images: int) -> None:
        """Refuse data without images."""
        if images == 0:
            raise DataError(f"{self.spec}: no images ({', '.join(IMAGE_SUFFIXES)}), expected at least one")

    def no_split(self) -> None:
        """Refuse a split where the adapter has none."""
        if self.split_named:
            raise ConfigError(
                f"--data: '{self.spec}' names a split, but these data have none; leave out '@{self.split}'"
            )


def _fixed_rows(session: Any) -> int | None:
    """Return the batch that every input of a model declares, None where one leaves it open or they differ."""
    firsts = {value.shape[0] if value.shape else None for value in session.get_inputs()}
    only = firsts.pop() if len(firsts) == 1 else None
    return only if isinstance(only, int) and only > 0 else None


# cifar10 ------------------------------------------------------------------------------------------

_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32  # label, then red, green and blue planes
_CIFAR_BATCHES = tuple(f"data_batch_{k}" for k in range(1, 6))
_CIFAR_SPLITS = {"train": _CIFAR_BATCHES, "test": ("test_batch",), **{name: (name,) for name in _CIFAR_BATCHES}}


def _open_cifar10(source: DataSource) -> ImageDataset:
    if source.split not in _CIFAR_SPLITS:
        raise ConfigError(f"--data: cifar10 has no split '{source.split}'{did_you_mean(source.split, _CIFAR_SPLITS)}")
    folder = Path(source.where)
    folder = folder / _CIFAR_FOLDER if (folder / _CIFAR_FOLDER).is_dir() else folder
    paths = [folder / f"{name}.bin" for name in _CIFAR_SPLITS[source.split]]
    files = [_cifar_file(path) for path in paths]
    starts = np.cumsum([0, *map(len, files)])

    def record(index: int) -> tuple[Path, int, Pixels]:
        number = int(np.searchsorted(starts, index, "right")) - 1
        row = index - int(starts[number])
        return paths[number], row, files[number][row]

    def load(index: int) -> Image.Image:
        from PIL import Image

        planes = record(index)[2][1:].reshape(3, 32, 32)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    return ImageDataset(
        name=source.spec,
        kind="labels",
        classes=10,
        pipeline=source.pipeline("cifar10"),
        rows=_fixed_rows(source.session),
        names=_Names(int(starts[-1]), lambda index: "{}: image {}".format(*record(index)[:2])),
        load=load,
        target=lambda index, _: int(record(index)[2][0]),
        hash_data=lambda found: _hash_files(found, paths),
    )


class _Names(Sequence[str]):
    """Names made when they are asked for."""

    def __init__(self, count: int, name: Callable[[int], str]) -> None:
        self._count, self._name = count, name

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._name(index)


def _cifar_file(path: Path) -> Pixels:
    """Return the records of one file, uint8 [images, 3073], mapped into memory."""
    try:
        size = path.stat().st_size
        if size == 0 or size % _CIFAR_RECORD:
            raise DataError(f"{path}: {size} bytes, expected a multiple of {_CIFAR_RECORD}; the file is damaged")
        records = np.memmap(path, np.uint8, "r").reshape(-1, _CIFAR_RECORD)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}), expected the binary layout of CIFAR-10"
        ) from error
    wrong = np.flatnonzero(records[:, 0] > 9)
    if wrong.size:
        raise DataError(f"{path}: image {wrong[0]}: label {records[wrong[0], 0]}, expected 0 to 9; the file is damaged")
    return records


# imagefolder --------------------------------------------------------------------------------------


def _open_imagefolder(source: DataSource) -> ImageDataset:
    folder, listing = _folder_and_list(source)
    images = _images_below(folder)
    if listing is None:
        images, labels, classes = _labels_by_folder(folder, images)
    elif _lists_images(listing):
        images, labels, classes = _labels_by_list(folder, listing)
    else:
        images, labels, classes = _labels_by_class(images, listing)
    source.require(len(images))

    def hash_data(found: Any) -> None:
        for image, label in zip(images, labels, strict=True):
            found.update(f"{image.relative_to(folder).as_posix()} {label}\n".encode())
        _hash_files(found, images)

    return ImageDataset(
        name=source.spec,
        kind="labels",
        classes=classes,
        pipeline=source.pipeline("imagenet"),
        rows=_fixed_rows(source.session),
        names=[str(image) for image in images],
        load=lambda index: _open_image(images[index]),
        target=lambda index, _: labels[index],
        hash_data=hash_data,
        skip_bad=source.skip_bad,
    )


def _folder_and_list(source: DataSource) -> tuple[Path, Path | None]:
    """Return the folder of the images and the file that labels them, None for one folder a class."""
    text, comma, named = source.where.rpartition(",")
    folder = Path(text if comma else named)
    if comma and not Path(named).is_file():
        raise DataError(f"{named}: no such file, expected a list of labels or classes (see docs/data.md)")
    split = folder / source.split
    if source.split_named or split.is_dir():
        folder = split
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with images")
    if comma:
        return folder, Path(named)
    known = [folder / "labels.txt", folder / "labels.csv", folder / "synset.txt", folder.parent / "synset.txt"]
    flat = any(_is_image(entry.name) for entry in folder.iterdir())
    listing = next((path for path in known if path.is_file()), None)
    if flat and listing is None:
        raise DataError(
            f"{folder}: images without labels, expected one folder a class, or labels.txt with lines 'image label'"
        )
    return folder, listing


def _images_below(folder: Path) -> list[Path]:
    """Return the images of a folder and of those in it, in the order of their paths."""
    found = [
        Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names if _is_image(name)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _labels_by_folder(folder: Path, images: list[Path]) -> tuple[list[Path], list[int], int | None]:
    """Label each image by the folder that it lies in; folders are numbered in the order of their names."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    number = {name: k for k, name in enumerate(names)}
    return images, [number[image.relative_to(folder).parts[0]] for image in images], len(names)


def _lists_images(listing: Path) -> bool:
    """Whether a file lists images with their labels, rather than classes; its first line may be a heading."""
    return any(_is_image(_entry(line)[0]) for line in _lines(listing)[:2])


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")


def _labels_by_list(folder: Path, listing: Path) -> tuple[list[Path], list[int], int | None]:
    """Read lines ``image label``; labels are numbers, or names that are numbered in their order."""
    lines = _lines(listing)
    entries = [_entry(line) for line in lines[0 if _is_image(_entry(lines[0])[0]) else 1 :]]
    bad = next((entry for entry in entries if len(entry) != 2), None)
    if bad is not None:
        raise DataError(f"{listing}: '{bad[0][:60]}' has no label, expected lines 'image label'")
    images, words = [folder / name for name, _ in entries], [word for _, word in entries]
    missing = next((image for image in images if not image.is_file()), None)
    if missing is not None:
        raise DataError(f"{listing}: '{missing.relative_to(folder)}' is not in {folder}")
    labels = dict(zip(images, words, strict=True))
    twice = next((image for image, word in zip(images, words, strict=True) if labels[image] != word), None)
    if twice is not None:
        raise DataError(f"{listing}: '{twice.relative_to(folder)}' is there twice, with different labels")
    if any(_NUMBER.fullmatch(word) for word in words):
        odd = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) <= 9)), None)
        if odd is not None:
            raise DataError(
                f"{listing}: label '{odd}', expected a class number from 0 for each image, or a name for each"
            )
        return images, [int(word) for word in words], None
    names = {word: k for k, word in enumerate(sorted(set(words)))}
    return images, [names[word] for word in words], len(names)


def _labels_by_class(images: list[Path], listing: Path) -> tuple[list[Path], list[int], int | None]:
    """Label each image by the class, of a list with one a line, that its folder or the end of its name says."""
    number = {line.split()[0]: k for k, line in enumerate(_lines(listing))}
    labels = []
    for image in images:
        label = number.get(image.parent.name, number.get(image.stem.rpartition("_")[2]))
        if label is None:
            raise DataError(
                f"{image}: neither its folder nor the end of its name is a class of {listing}, "
                f"expected a name such as 000_{next(iter(number), 'class')}{image.suffix}"
            )
        labels.append(label)
    return images, labels, len(number)


def _lines(path: Path) -> list[str]:
    """Return the lines that are neither empty nor comments."""
    try:
        require_regular(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise DataError(f"{path}: is empty, expected lines 'image label', or one class a line")
    return found


def _entry(line: str) -> list[str]:
    """Split a line at its last tab, comma or blank: an image's name may hold blanks, its label none."""
    mark = next((mark for mark in "\t," if mark in line), None)
    return [part.strip() for part in line.rsplit(mark, 1)]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _open_image(path: Path) -> Image.Image:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.mode.startswith(("I", "F")):  # Pillow would cut all values above 255 off
            raise ValueError(f"pixels of more than eight bits (mode {image.mode}), expected eight bits a channel")
        return image


def _hash_files(found: Any, paths: Iterable[Path]) -> None:
    for path in paths:
        found.update(bytes.fromhex(file_sha256(path)))


# coco ---------------------------------------------------------------------------------------------


def _open_coco(source: DataSource) -> BoxDataset:
    source.no_split()
    folder_text, comma, file_text = source.where.rpartition(",")
    if not comma:
        raise ConfigError(f"--data: '{source.spec}', expected {_ADAPTERS['coco'].form}")
    folder, file = Path(folder_text), Path(file_text)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected one with images")
    annotations = _coco_annotations(file)
    records = annotations["images"]
    source.require(len(records))
    paths = [folder / record["file_name"] for record in records]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None and not source.skip_bad:
        raise DataError(f"{missing}: no such image, but {file} lists it; add it, or go on without it with --skip-bad")

    def load(index: int) -> Image.Image:
        image, record = _open_image(paths[index]), records[index]
        if image.size != (record["width"], record["height"]):
            raise ValueError(
                f"width,height {image.width},{image.height}, expected {record['width']},{record['height']} as in {file}"
            )
        return image

    def target(index: int, placement: Placement) -> BoxTarget:
        record = records[index]
        return BoxTarget(record["id"], record["width"], record["height"], placement)

    return BoxDataset(
        name=source.spec,
        kind="boxes",
        classes=len(annotations["categories"]),
        pipeline=source.pipeline("yolo"),
        rows=_fixed_rows(source.session),
        names=[str(path) for path in paths],
        load=load,
        target=target,
        hash_data=lambda found: _hash_files(found, [file, *(path for path in paths if path.is_file())]),
        skip_bad=source.skip_bad,
        annotations=annotations,
    )


def _coco_annotations(file: Path) -> dict[str, Any]:
    """Read and check the parts of a COCO instances file that detection needs."""
    try:
        require_regular(file)
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected an object with images, annotations and categories")
    images = _entries(file, found, "images", {"id": int, "file_name": str, "width": int, "height": int})
    categories = _entries(file, found, "categories", {"id": int, "name": str})
    boxes = _entries(file, found, "annotations", {"image_id": int, "category_id": int, "bbox": list})
    known = {record["id"] for record in images}, {record["id"] for record in categories}
    if len(known[0]) != len(images) or len(known[1]) != len(categories):
        raise DataError(f"{file}: images or categories share an id, expected one each")
    filled = []
    for k, box in enumerate(boxes):
        where = f"{file}: annotations[{k}]"
        if box["image_id"] not in known[0]:
            raise DataError(f"{where}: image_id {box['image_id']} is not one of the images")
        if box["category_id"] not in known[1]:
            raise DataError(f"{where}: category_id {box['category_id']} is not one of the categories")
        sides = box["bbox"]
        if len(sides) != 4 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in sides):
            raise DataError(f"{where}: bbox {sides}, expected four numbers x, y, width, height")
        if min(sides[2:]) < 0:
            raise DataError(f"{where}: bbox {sides}, expected a width and a height of 0 or more")
        area, crowd = box.get("area", sides[2] * sides[3]), box.get("iscrowd", 0)
        if not (isinstance(area, (int, float)) and 0 <= area < math.inf):
            raise DataError(f"{where}: area {json.dumps(area)}, expected a number of 0 or more")
        if crowd not in (0, 1):
            raise DataError(f"{where}: iscrowd {json.dumps(crowd)}, expected 0 or 1")
        filled.append({**box, "id": k + 1, "area": area, "iscrowd": int(crowd)})
    return {"images": images, "categories": sorted(categories, key=lambda c: c["id"]), "annotations": filled}


def _entries(file: Path, found: Mapping[str, Any], name: str, keys: Mapping[str, type]) -> list[dict[str, Any]]:
    entries = found.get(name)
    if not isinstance(entries, list):
        raise DataError(f"{file}: no list '{name}', expected the COCO instances format")
    for k, entry in enumerate(entries):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise DataError(
                    f"{file}: {name}[{k}]: no '{key}' ({kind.__name__}), expected the COCO instances format"
                )
    return entries


# npz and generated --------------------------------------------------------------------------------


def _open_npz(source: DataSource) -> ArrayDataset:
    source.no_split()
    path = Path(source.where)
    declared = {value.name: value for value in source.session.get_inputs()}
    arrays = _read_npz(path, declared)
    labels = arrays.pop("labels", None) if "labels" not in declared else None
    counts = {name: len(array) for name, array in arrays.items()} | ({} if labels is None else {"labels": len(labels)})
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise DataError(f"{path}: rows of the arrays: {found}, expected the same number of images, at least one")
    if labels is not None:
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, expected one integer an image")
        if labels.min() < 0:
            raise DataError(f"{path}: image {labels.argmin()}: label {labels.min()}, expected 0 or more")
    return ArrayDataset(
        name=source.spec,
        count=next(iter(counts.values())),
        rows=_fixed_rows(source.session),
        fetch=lambda indices: {name: array[indices] for name, array in arrays.items()},
        hash_data=lambda found: _hash_files(found, [path]),
        labels=None if labels is None else labels.astype(np.int64),
    )


def _read_npz(path: Path, declared: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Read the inputs of a model and perhaps labels, once their headers are known to fit."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path}: not an .npz file; write one with numpy.savez(FILE, input_name=array, labels=array)")
    try:
        headers = npz_headers(path)
    except ValueError as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    for name in headers:
        if name not in declared and name != "labels":
            raise DataError(
                f"{path}: '{name}' is neither labels nor an input of the model{did_you_mean(name, declared)}"
            )
    for name, value in declared.items():
        _check_array(path, value, headers.get(name))
    try:
        return dict(read_npz(path))
    except ValueError as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error


def _check_array(path: Path, value: Any, header: ArrayHeader | None) -> None:
    """Refuse an array that does not fit an input; its first axis counts the images."""
    if header is None:
        raise DataError(f"{path}: input '{value.name}' is missing, expected an array of {value.type} {value.shape}")
    dtype, shape = np.dtype(declared_dtype(value.name, value.type)), header.shape
    fits = 0 < len(shape) == len(value.shape) and all(
        not isinstance(d, int) or d == s for d, s in zip(value.shape[1:], shape[1:], strict=True)
    )
    if header.dtype != dtype or not fits:
        raise DataError(f"{path}: input '{value.name}' is {header.dtype} {list(shape)}, expected {dtype} {value.shape}")


def _open_generated(source: DataSource) -> ArrayDataset:
    source.no_split()
    count = source.generate
    if source.where:
        if not source.where.isdecimal() or int(source.where) < 1:
            raise ConfigError(f"--data: '{source.spec}', expected {_ADAPTERS['generated'].form}")
        count = int(source.where)
    example, _ = fitting_inputs(source.session, source.seed)
    firsts = {array.shape[:1] for array in example.values()}
    whole = len(firsts) != 1 or () in firsts  # inputs that no common first axis counts are generated as a whole

    seed = source.seed  # by itself: what fetches must not keep the session alive

    def one(index: int) -> list[npt.NDArray[Any]]:
        return [
            random_array(
                array.dtype, array.shape if whole else array.shape[1:], np.random.default_rng([seed, k, index])
            )
            for k, array in enumerate(example.values())
        ]

    def fetch(indices: Indices) -> dict[str, npt.NDArray[Any]]:
        rows = [one(int(index)) for index in indices]
        arrays = rows[0] if whole else [np.stack(parts) for parts in zip(*rows, strict=True)]
        return dict(zip(example, arrays, strict=True))

    recipe = [source.seed, count, [(name, str(array.dtype), array.shape) for name, array in example.items()]]
    return ArrayDataset(
        name=source.spec,
        count=count,
        rows=_fixed_rows(source.session),
        fetch=fetch,
        hash_data=lambda found: found.update(json.dumps(recipe).encode()),
        at_once=1 if whole else None,
    )


class _Adapter(NamedTuple):
    """How a kind of data is written in a spec, and what opens it."""

    form: str
    open: Callable[[DataSource], Dataset]


_ADAPTERS: Mapping[str, _Adapter] = {
    "cifar10": _Adapter("cifar10:DIR or cifar10:DIR@train", _open_cifar10),
    "imagefolder": _Adapter("imagefolder:DIR or imagefolder:DIR,labels.txt", _open_imagefolder),
    "coco": _Adapter("coco:IMAGES,instances.json", _open_coco),
    "npz": _Adapter("npz:FILE", _open_npz),
    "generated": _Adapter("generated or generated:COUNT", _open_generated),
}


def _adapters() -> dict[str, _Adapter]:
    """Return the adapters by name, those of installed packages included; no package takes the name of another."""
    added = {
        point.name: _Adapter(f"{point.name}:...", partial(_open_added, point)) for point in entry_points(group=_GROUP)
    }
    return {**added, **_ADAPTERS}


def _open_added(point: EntryPoint, source: DataSource) -> Dataset:
    """Open data with the adapter of another package, whose errors are not ours."""
    try:
        dataset: Dataset = point.load()(source)
    except RerampileError:
        raise
    except Exception as error:
        raise DataError(
            f"--data: '{source.spec}': the adapter {point.value} failed: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(dataset, "batches"):
        raise DataError(
            f"--data: '{source.spec}': the adapter {point.value} gave a {type(dataset).__name__}, expected a data set "
            f"(see docs/data.md)"
        )
    return dataset
