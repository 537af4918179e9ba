"""What a data set is: images in a fixed order, read as a stream of batches.

Anything with the members of :class:`Dataset` is one. :class:`ImageDataset` and :class:`ArrayDataset` are those that the
adapters in :mod:`rerampile.runtime.data` make, of pictures and of arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, DataError
from rerampile.runtime.preprocessing import Pipeline, Pixels, Placement

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ArrayDataset",
    "Batch",
    "BoxDataset",
    "BoxTarget",
    "Dataset",
    "ImageDataset",
    "Indices",
    "spread",
    "write_first_image",
]

Indices = npt.NDArray[np.int64]

_CACHE_BYTES = 256 << 20  # decoded images kept between passes: 1,700 of 224 × 224


@dataclass(frozen=True)
class Batch:
    """Some images and what is known of them.

    Attributes:
        inputs: Arrays by input name. Where the model's batch is fixed, the last batch is filled up by repeating its
            last image: only the first ``len(indices)`` rows count.
        targets: Labels, int64 [n]; or a list of :class:`BoxTarget`; or None.
        indices: int64 [n], which images of the data set these are.
    """

    inputs: dict[str, npt.NDArray[Any]]
    targets: Any
    indices: Indices


class Dataset(Protocol):
    """Images in a fixed order, with what is known of them.

    Attributes:
        name: For messages and reports.
        kind: What the targets are: ``labels``, ``boxes`` or ``none``.
        digest: sha256 of all that is read, as hex, for reports.
        classes: How many classes the labels come from; None where the data do not say.
        skipped: Images that could not be read and were left out so far, by index.
    """

    name: str
    kind: Literal["labels", "boxes", "none"]
    classes: int | None
    skipped: dict[int, str]

    @property
    def digest(self) -> str:
        """sha256 of all that is read."""
        ...

    def __len__(self) -> int: ...

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield the images, or those of ``indices``, in order and ``size`` at a time."""
        ...


class BoxTarget(NamedTuple):
    """One image of a COCO data set: its id, its size in pixels, and where it lies in the input."""

    image_id: int
    width: int
    height: int
    placement: Placement


@dataclass(kw_only=True)
class ImageDataset:
    """Images that go through a pipeline; the base of the adapters that read pictures.

    Decoded images of the model's size are kept in memory up to a bound, so that the next pass need not decode them.

    Attributes:
        name: For messages and reports.
        kind: What the targets are.
        classes: How many classes the labels come from, None where the data do not say.
        pipeline: How an image becomes an input.
        rows: The model's fixed batch, None where it is free.
        names: Names of the images, for messages.
        load: Opens an image by index.
        target: Makes the target of an image from its index and placement.
        hash_data: Feeds all that is read to a hash.
        skip_bad: Leave out images that cannot be read.
        skipped: Those left out so far.
    """

    name: str
    kind: Literal["labels", "boxes", "none"]
    classes: int | None
    pipeline: Pipeline
    rows: int | None
    names: Sequence[str]
    load: Callable[[int], Image.Image]
    target: Callable[[int, Placement], Any]
    hash_data: Callable[[Any], None]
    skip_bad: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    _kept: dict[int, tuple[Pixels, Placement]] = field(default_factory=dict, repr=False)
    _kept_bytes: int = field(default=0, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is read, in order."""
        found = hashlib.sha256()
        self.hash_data(found)
        return found.hexdigest()

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield the images, or those of ``indices``, in order and ``size`` at a time.

        Raises:
            DataError: An image cannot be read and ``skip_bad`` is off, or none can be read.
        """
        wanted = np.arange(len(self), dtype=np.int64) if indices is None else indices
        empty = True
        for chunk in _chunks(wanted, self.rows or size):
            found = [(index, placed) for index in chunk if (placed := self._placed(int(index))) is not None]
            if not found:
                continue
            empty = False
            targets = [self.target(int(index), placement) for index, (_, placement) in found]
            tensor = self.pipeline.tensor(_stack([pixels for _, (pixels, _) in found], self.rows, self.name))
            yield Batch(
                inputs={self.pipeline.input: tensor},
                targets=np.array(targets, np.int64) if self.kind == "labels" else targets,
                indices=np.array([index for index, _ in found], np.int64),
            )
        if empty:
            raise DataError(f"{self.name}: none of its {len(wanted)} images can be read")

    def _placed(self, index: int) -> tuple[Pixels, Placement] | None:
        """Return an image at the model's size and where it lies in it, None where it is left out."""
        kept = self._kept.get(index)
        if kept is not None or index in self.skipped:
            return kept
        try:
            placed = self.pipeline.place(self.load(index), self.names[index])
        except (OSError, SyntaxError, ValueError, _bomb()) as error:
            self.skipped[index] = " ".join(str(error).split())[:200]
            if not self.skip_bad:
                raise DataError(
                    f"{self.names[index]}: not a readable image ({self.skipped.pop(index)}); mend or remove it, or go "
                    f"on without it with --skip-bad"
                ) from error
            return None
        if self._kept_bytes < _CACHE_BYTES:
            self._kept[index] = placed
            self._kept_bytes += placed[0].nbytes
        return placed


@dataclass(kw_only=True)
class BoxDataset(ImageDataset):
    """Images with boxes.

    Attributes:
        annotations: The data set in the COCO instances format, area and crowd flag of each box filled in.
    """

    annotations: dict[str, Any]


@dataclass(kw_only=True)
class ArrayDataset:
    """Inputs that need no preprocessing.

    Attributes:
        name: For messages and reports.
        count: How many images there are.
        rows: The model's fixed batch, None where it is free.
        fetch: Makes the inputs of some images: arrays by input name, one row an image.
        hash_data: Feeds all that is read to a hash.
        labels: int64 [count], None where there are none.
        at_once: The most images that a batch can hold.
        kind: What the targets are.
    """

    name: str
    count: int
    rows: int | None
    fetch: Callable[[Indices], dict[str, npt.NDArray[Any]]]
    hash_data: Callable[[Any], None]
    labels: npt.NDArray[np.int64] | None = None
    at_once: int | None = None
    kind: Literal["labels", "boxes", "none"] = field(init=False)
    classes: int | None = None
    skipped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kind = "none" if self.labels is None else "labels"

    def __len__(self) -> int:
        return self.count

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is read, in order."""
        found = hashlib.sha256()
        self.hash_data(found)
        return found.hexdigest()

    def batches(self, size: int, indices: Indices | None = None) -> Iterator[Batch]:
        """Yield the images, or those of ``indices``, in order and ``size`` at a time."""
        wanted = np.arange(self.count, dtype=np.int64) if indices is None else indices
        for chunk in _chunks(wanted, self.at_once or self.rows or size):
            filled = chunk
            if self.rows is not None and self.at_once is None:
                filled = np.append(chunk, np.repeat(chunk[-1:], self.rows - len(chunk)))
            targets = None if self.labels is None else self.labels[chunk]
            yield Batch(inputs=self.fetch(filled), targets=targets, indices=chunk)


def spread(total: int, count: int) -> Indices:
    """Return ``count`` of ``total`` images, evenly spread: data that are sorted by class keep all of them."""
    return np.linspace(0, total - 1, count).astype(np.int64)


def write_first_image(dataset: ImageDataset, path: Path) -> None:
    """Write the first image to a PNG as the model sees it, its normalisation undone.

    Raises:
        DataError: The file cannot be written, or has another ending.
    """
    if path.suffix.lower() != ".png":
        raise DataError(f"--first-image {path}: expected a name that ends in .png")
    batch = next(dataset.batches(1))
    picture = dataset.pipeline.picture(batch.inputs[dataset.pipeline.input][0])
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _bomb() -> type[Exception]:
    from PIL import Image

    return Image.DecompressionBombError


def _stack(pixels: Sequence[Pixels], rows: int | None, name: str) -> Pixels:
    """Stack images to a batch, filled up to ``rows`` by repeating the last."""
    if len({image.shape for image in pixels}) > 1:
        raise DataError(f"{name}: images of different sizes, and neither model nor --size says which; give --size")
    return np.stack([*pixels, *[pixels[-1]] * ((rows or 0) - len(pixels))])


def _chunks(indices: Indices, size: int) -> Iterator[Indices]:
    if size < 1:
        raise ConfigError(f"--batch: {size}, expected 1 or more")
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
