"""Mean average precision of detection models, with raw YOLO heads or with boxes and scores of their own.

A :class:`Decoder` turns outputs into candidates in pixels of the input; :class:`DetectionMetric` keeps the best of them
(non-maximum suppression, class by class), moves them back to the image and lets pycocotools judge them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, DataError, did_you_mean
from rerampile.files import require_regular
from rerampile.runtime.average_precision import JudgedDetections, annotated, drop_variance
from rerampile.runtime.dataset import Batch, BoxTarget, Dataset
from rerampile.runtime.metrics import Beside, MetricResult

__all__ = [
    "Candidates",
    "Decoder",
    "DetectionMetric",
    "DetectionOptions",
    "open_detection",
    "read_detection_options",
    "suppress",
]

Array = npt.NDArray[Any]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The order of every model with 20 classes."""

_ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_CANDIDATES = 1000  # an image, the best before suppression: faulty chips see objects everywhere
_DETECTIONS = 300  # an image, the best after it
_TORCHVISION_CLASSES = 91  # models that number classes by COCO's own ids, 0 for the background


_LARGEST_OPTIONS = 1 << 20  # bytes of a file of options


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    """How outputs become boxes, where the model itself does not say.

    Attributes:
        heads: Raw YOLO heads, as in the metadata property ``yolo``: classes, anchors, and mask, stride, scale_x_y and
            new_coords by output. None: the metadata property, or a model that gives boxes.
        classes: Names of the model's classes in order; by default its metadata, VOC for 20, COCO's own for 80 or 91.
        boxes: For models that give boxes: ``xyxy`` (two corners), ``yxyx`` (the same, y first) or ``xywh`` (centre,
            width, height); None: corners for boxes of their own, centres for rows that hold box and scores.
        normalised: Boxes are shares of the input's width and height, not pixels.
        confidence: Least score of a candidate.
        overlap: Intersection over union above which the lower score of the same class goes.
    """

    heads: Mapping[str, Any] | None = None
    classes: Sequence[str] | None = None
    boxes: str | None = None
    normalised: bool = False
    confidence: float = 0.005
    overlap: float = 0.5

    def __post_init__(self) -> None:
        if self.boxes not in (None, "xyxy", "yxyx", "xywh"):
            raise ConfigError(f"--boxes: '{self.boxes}', expected xyxy, yxyx or xywh")
        for name in ("confidence", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name}: {getattr(self, name):g}, expected 0 to 1")


def read_detection_options(path: Path) -> DetectionOptions:
    """Read a JSON object with the fields of :class:`DetectionOptions`.

    Raises:
        ConfigError: The file is unreadable or too large, or a field is unknown or of another kind.
    """
    try:
        require_regular(path)
        if path.stat().st_size > _LARGEST_OPTIONS:
            raise ConfigError(f"--detection {path}: {path.stat().st_size:,} bytes, expected a small JSON object")
        return msgspec.convert(msgspec.json.decode(path.read_bytes()), _DetectionFields, strict=True).options()
    except OSError as error:
        raise ConfigError(f"--detection {path}: cannot be read: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--detection {path}: {error}; expected the fields of docs/data.md") from error


class _DetectionFields(msgspec.Struct, forbid_unknown_fields=True):
    """A file of options."""

    heads: dict[str, Any] | None = None
    classes: list[str] | None = None
    boxes: str | None = None
    normalised: bool = False
    confidence: float = 0.005
    overlap: float = 0.5

    def options(self) -> DetectionOptions:
        """Return them checked."""
        return DetectionOptions(**msgspec.structs.asdict(self))


class Candidates(NamedTuple):
    """Possible objects of one image, each box with its best class.

    Attributes:
        boxes: float32 [n, 4], x1, y1, x2, y2 in pixels of the input.
        scores: float32 [n].
        classes: int64 [n].
    """

    boxes: Array
    scores: Array
    classes: Array


class Decoder(Protocol):
    """Turns outputs into candidates.

    Attributes:
        classes: How many classes the model knows; None where its outputs do not say.
    """

    @property
    def classes(self) -> int | None:
        """How many classes the model knows; None where its outputs do not say."""
        ...

    def decode(self, outputs: Sequence[Array], count: int, confidence: float) -> list[Candidates]:
        """Return the candidates of the first ``count`` images, at least as sure as ``confidence``."""
        ...


@dataclass(frozen=True)
class _Head:
    output: int  # position among the model's outputs
    anchors: Array  # float32 [a, 2], pixels
    stride: int
    scale: float
    new_coords: bool


@dataclass(frozen=True)
class YoloHeads:
    """Raw heads of the YOLOv3 and YOLOv4 families: [N, anchors · (5 + classes), rows, columns] each."""

    classes: int
    heads: tuple[_Head, ...]

    @classmethod
    def parse(cls, description: Mapping[str, Any], outputs: Sequence[Any]) -> YoloHeads:
        """Read the description of heads and compare it with the model's outputs.

        Raises:
            ConfigError: It lacks a part, or does not fit the outputs.
        """
        names = [value.name for value in outputs]
        try:
            classes, anchors = int(description["classes"]), np.array(description["anchors"], np.float32).reshape(-1, 2)
            entries = {name: value for name, value in description.items() if isinstance(value, Mapping)}
            unknown = next((name for name in entries if name not in names), None)
            if unknown is not None:
                raise ConfigError(f"yolo heads: the model has no output '{unknown}'{did_you_mean(unknown, names)}")
            heads = tuple(
                _Head(
                    names.index(name),
                    anchors[np.array(head["mask"], np.int64)],
                    int(head["stride"]),
                    float(head.get("scale_x_y", 1)),
                    bool(head.get("new_coords", False)),
                )
                for name, head in entries.items()
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"yolo heads: not complete or not numbers ({error!r}), expected "
                '{"classes": 80, "anchors": [[w, h], …], "OUTPUT": {"mask": [0, 1, 2], "stride": 8}, …}'
            ) from error
        for head in heads:
            shape, channels = outputs[head.output].shape, len(head.anchors) * (5 + classes)
            if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != channels):
                raise ConfigError(
                    f"yolo heads: output '{names[head.output]}' is {shape}, expected {channels} channels: "
                    f"{len(head.anchors)} anchors × (5 + {classes} classes)"
                )
        if not heads:
            raise ConfigError('yolo heads: no output is described, expected "OUTPUT": {"mask": [0, 1, 2], "stride": 8}')
        return cls(classes, heads)

    def decode(self, outputs: Sequence[Array], count: int, confidence: float) -> list[Candidates]:
        """Return the candidates of the first ``count`` images.

        A score is objectness times class, so cells whose objectness is too small are never decoded.
        """
        parts = [self._decode_head(head, outputs[head.output][:count], confidence) for head in self.heads]
        image, boxes, scores, classes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return [Candidates(boxes[own], scores[own], classes[own]) for own in (image == k for k in range(count))]

    def _decode_head(self, head: _Head, raw: Array, confidence: float) -> tuple[Array, Array, Array, Array]:
        """Return image, box, score and class of each candidate of one head."""
        act = np.asarray if head.new_coords else _sigmoid
        grid = raw.reshape(len(raw), len(head.anchors), 5 + self.classes, *raw.shape[2:])
        objectness = act(grid[:, :, 4])
        image, anchor, row, column = np.nonzero(objectness >= confidence)
        found = grid[image, anchor, :, row, column]
        kind = found[:, 5:].argmax(axis=1)
        scores = objectness[image, anchor, row, column] * act(found[:, 5:].max(axis=1))
        centre = (act(found[:, :2]) * head.scale - (head.scale - 1) / 2 + np.stack([column, row], axis=1)) * head.stride
        size = np.square(2 * found[:, 2:4]) if head.new_coords else np.exp(np.clip(found[:, 2:4], -20, 20))
        boxes = _corners(np.concatenate([centre, size * head.anchors[anchor]], axis=1))
        sure = scores >= confidence
        return image[sure], boxes[sure].astype(np.float32), scores[sure].astype(np.float32), kind[sure]


@dataclass(frozen=True)
class BoxesAndScores:
    """Models that give boxes: [N, M, 4] with scores [N, M, classes], or with scores and classes [N, M].

    Without a batch axis, as torchvision exports them, one image a run.
    """

    boxes: int
    scores: int
    labels: int | None
    form: str  # of the boxes, see DetectionOptions
    classes: int | None
    unit: tuple[float, float] = (1, 1)  # width and height that a box of 1 × 1 has in pixels

    def decode(self, outputs: Sequence[Array], count: int, confidence: float) -> list[Candidates]:
        """Return the candidates of the first ``count`` images."""
        boxes, scores = outputs[self.boxes], outputs[self.scores]
        labels = None if self.labels is None else outputs[self.labels]
        if boxes.ndim == 2:
            if count > 1:
                raise DataError(f"the model's boxes are {list(boxes.shape)}, one image a run; give --batch 1")
            boxes, scores, labels = boxes[None], scores[None], None if labels is None else labels[None]
        found = []
        for k in range(count):
            box = boxes[k].reshape(-1, 4).astype(np.float32)
            score = scores[k].reshape(len(box), -1).astype(np.float32)
            classes = score.argmax(axis=1) if labels is None else labels[k].reshape(-1).astype(np.int64)
            best = score.max(axis=1)
            sure = best >= confidence
            found.append(Candidates(self._corners(box[sure]), best[sure], classes[sure]))
        return found

    def _corners(self, boxes: Array) -> Array:
        if self.form == "xywh":
            boxes = _corners(boxes)
        elif self.form == "yxyx":
            boxes = boxes[:, [1, 0, 3, 2]]
        return boxes * np.array(self.unit * 2, np.float32)


@dataclass(frozen=True)
class Rows:
    """Models with one output of rows: centre box, perhaps objectness, and one score a class.

    [N, M, 5 + classes] as YOLOv5 exports it, or [N, 4 + classes, M] as YOLOv8 does.
    """

    output: int
    classes: int
    objectness: bool
    across: bool  # rows lie along the last axis
    form: str
    unit: tuple[float, float] = (1, 1)

    def decode(self, outputs: Sequence[Array], count: int, confidence: float) -> list[Candidates]:
        """Return the candidates of the first ``count`` images."""
        rows = outputs[self.output][:count]
        if self.across:
            rows = rows.transpose(0, 2, 1)
        scores = rows[:, :, 4:] if not self.objectness else rows[:, :, 5:] * rows[:, :, 4:5]
        inner = BoxesAndScores(0, 1, None, self.form, self.classes, self.unit)
        return inner.decode([rows[:, :, :4], scores], count, confidence)


def suppress(found: Candidates, overlap: float) -> Candidates:
    """Keep the best candidates: of two of the same class that overlap more than ``overlap``, the surer one.

    Of equal scores the earlier counts, so that the order is the same everywhere.
    """
    order = np.argsort(-found.scores, kind="stable")[:_CANDIDATES]
    boxes = found.boxes[order].astype(np.float64)
    # Classes are moved so far apart that boxes of different ones never overlap.
    extent = float(np.abs(boxes).max(initial=0)) * 2 + 1
    x1, y1, x2, y2 = (boxes + (found.classes[order] * extent)[:, None]).T
    area = (x2 - x1) * (y2 - y1)
    left, kept = np.arange(len(order)), list[int]()
    while left.size and len(kept) < _DETECTIONS:
        best, left = left[0], left[1:]
        kept.append(int(order[best]))
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        left = left[shared <= overlap * (area[best] + area[left] - shared)]
    return Candidates(*(part[kept] for part in found))


class DetectionMetric:
    """mAP at an overlap of 0.5, and its mean over overlaps of 0.5 to 0.95, of the categories that the model knows.

    Args:
        judge: See :func:`rerampile.runtime.average_precision.annotated`.
        decoder: Turns outputs into candidates.
        categories: int64 [classes], COCO category of each class of the model, -1 for none.
        options: Thresholds.
    """

    names = ("map50", "map")

    def __init__(self, judge: Any, decoder: Decoder, categories: Array, options: DetectionOptions) -> None:
        self._judge, self._decoder, self._categories, self._options = judge, decoder, categories, options
        self._found: list[Array] = []
        self._indices: list[Array] = []
        self._images: list[int] = []
        self._non_finite = 0

    def learn(self, outputs: Sequence[Any], batch: Batch) -> None:
        """Nothing to learn."""

    def fresh(self) -> DetectionMetric:
        """Return the same metric without detections."""
        return DetectionMetric(self._judge, self._decoder, self._categories, self._options)

    def update(self, outputs: Sequence[Any], batch: Batch) -> None:
        """Collect the detections of a batch; an image with an output that is not finite has none."""
        count = len(batch.indices)
        arrays = [np.asarray(output) for output in outputs]
        finite = np.array([_finite(arrays, k, count) for k in range(count)])
        self._non_finite += int(count - finite.sum())
        found = self._decoder.decode(arrays, count, self._options.confidence)
        for target, candidates, good in zip(batch.targets, found, finite, strict=True):
            self._images.append(target.image_id)
            if good:
                self._found.append(self._detections(candidates, target))
        self._indices.append(batch.indices)

    def _detections(self, found: Candidates, target: BoxTarget) -> Array:
        """Return rows of image id, x, y, width, height, score and category in pixels of the image: float64 [n, 7]."""
        known = (found.classes >= 0) & (found.classes < len(self._categories))
        known[known] = self._categories[found.classes[known]] >= 0
        best = suppress(Candidates(*(part[known] for part in found)), self._options.overlap)
        boxes = target.placement.undo(best.boxes)
        boxes = np.clip(boxes, 0, np.array([target.width, target.height] * 2, np.float32)).astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        image, category = np.full(len(boxes), target.image_id), self._categories[best.classes]
        rows = np.column_stack([image, boxes, best.scores, category])
        return rows[(boxes[:, 2:] > 0).all(axis=1)]

    def result(self) -> MetricResult:
        """Return both means, and the precision of each category."""
        rows = np.concatenate(self._found) if self._found else np.zeros((0, 7))
        judged = self._judged(rows, self._images)
        names = {category: entry["name"] for category, entry in self._judge.cats.items()}
        return MetricResult(
            values=self._named(judged.means()),
            scores={},
            indices=np.concatenate(self._indices) if self._indices else np.zeros(0, np.int64),
            non_finite=self._non_finite,
            by_class={
                names[category]: float(value)
                for category, (value, _) in zip(self._known, judged.by_category(), strict=True)
                if not math.isnan(value)
            },
            detections=rows,
            image_ids=np.array(self._images, np.int64),
        )

    def beside(self, chip: MetricResult, clean: MetricResult) -> Beside:
        """Judge the clean model's detections on the chip's images alone; see :class:`Beside`.

        Raises:
            ConfigError: None of these images shows anything that the model knows.
        """
        if len(chip.indices) == len(clean.indices):
            return Beside(clean.values, {})
        images = chip.image_ids.tolist()
        rows = clean.detections[np.isin(clean.detections[:, 0], chip.image_ids)]
        same, found = self._judged(rows, images), self._judged(chip.detections, images)
        if np.isnan(same.means()).any():
            raise ConfigError(
                f"--images-per-run {len(images)}: a chip drew images without a box of the model's classes; give more"
            )
        return Beside(self._named(same.means()), self._named(drop_variance(same, found, images)))

    @property
    def _known(self) -> list[int]:
        """The categories that the model knows."""
        return sorted({int(category) for category in self._categories if category >= 0})

    def _judged(self, rows: Array, images: Sequence[int]) -> JudgedDetections:
        return JudgedDetections(self._judge, rows, images, self._known)

    def _named(self, values: Array) -> dict[str, float]:
        return dict(zip(self.names, map(float, values), strict=True))


def open_detection(dataset: Dataset, session: Any, options: DetectionOptions | None = None) -> DetectionMetric:
    """Return the metric for a data set with boxes and a model.

    Raises:
        ConfigError: Nothing says how the outputs become boxes, or a description does not fit them.
        DataError: Model and data have no class in common.
    """
    options = options or DetectionOptions()
    annotations = getattr(dataset, "annotations", None)
    if annotations is None:
        raise DataError(f"{dataset.name} has no annotations, expected a data set with boxes such as coco:IMAGES,FILE")
    categories = annotations["categories"]
    properties = session.get_modelmeta().custom_metadata_map
    names = list(options.classes) if options.classes is not None else _class_names(properties)
    unit = _unit(dataset) if options.normalised else (1.0, 1.0)
    decoder = _choose_decoder(session, properties, options, len(names) if names else None, unit)
    by_class = _categories(names, decoder.classes, categories)
    if (by_class < 0).all():
        raise DataError(
            f"{dataset.name}: none of the model's {len(by_class)} classes is one of its {len(categories)} categories; "
            f"name the model's classes"
        )
    return DetectionMetric(annotated(annotations), decoder, by_class, options)


def _choose_decoder(
    session: Any,
    properties: Mapping[str, str],
    options: DetectionOptions,
    named: int | None,
    unit: tuple[float, float],
) -> Decoder:
    """Return the decoder that the options, the metadata or the shapes of the outputs ask for."""
    outputs = session.get_outputs()
    heads = options.heads
    if heads is None and "yolo" in properties:
        try:
            heads = json.loads(properties["yolo"])
        except ValueError as error:
            raise ConfigError(f"the model's metadata property 'yolo' is not JSON: {error}") from error
    if heads is not None:
        if not isinstance(heads, Mapping):
            raise ConfigError("yolo heads: expected an object with classes, anchors and the outputs")
        return YoloHeads.parse(heads, outputs)
    decoder = _boxes_decoder(outputs, options, named, unit) or _rows_decoder(outputs, options, named, unit)
    if decoder is not None:
        return decoder
    shapes = ", ".join(f"'{value.name}' {value.shape}" for value in outputs)
    raise ConfigError(
        f"nothing says how the outputs become boxes: {shapes}; describe raw heads as in the metadata property 'yolo', "
        f"or export the model with boxes [N, M, 4] and scores"
    )


def _boxes_decoder(
    outputs: Sequence[Any], options: DetectionOptions, named: int | None, unit: tuple[float, float]
) -> Decoder | None:
    """Return the decoder of a model with an output whose last axis is 4, and scores beside it."""
    boxes = next((k for k, v in enumerate(outputs) if len(v.shape) >= 2 and v.shape[-1] == 4), None)
    if boxes is None:
        return None
    rest = [k for k in range(len(outputs)) if k != boxes]
    labels = next((k for k in rest if "int" in outputs[k].type or _sounds(outputs[k].name, "class", "label")), None)
    scores = next((k for k in rest if k != labels and "float" in outputs[k].type), None)
    if scores is None:
        return None
    last = outputs[scores].shape[-1]
    classes = last if labels is None and isinstance(last, int) else named
    return BoxesAndScores(boxes, scores, labels, options.boxes or "xyxy", classes, unit)


def _rows_decoder(
    outputs: Sequence[Any], options: DetectionOptions, named: int | None, unit: tuple[float, float]
) -> Decoder | None:
    """Return the decoder of a model with one output of rows, as wide as box and classes ask for."""
    for k, value in enumerate(outputs):
        for axis in (2, 1):
            if len(value.shape) != 3 or not isinstance(value.shape[axis], int):
                continue
            for classes in (named,) if named else (80, 20):
                extra = (
                    value.shape[axis] - classes if len(value.shape) == 3 and isinstance(value.shape[axis], int) else 0
                )
                if extra in (4, 5):
                    return Rows(k, classes, extra == 5, axis == 1, options.boxes or "xywh", unit)
    return None


def _unit(dataset: Dataset) -> tuple[float, float]:
    size = getattr(getattr(dataset, "pipeline", None), "size", None)
    if size is None:
        raise ConfigError("normalised boxes need an input of one size; give --size")
    return float(size[1]), float(size[0])


def _sounds(name: str, *words: str) -> bool:
    return any(word in name.lower() for word in words)


def _class_names(properties: Mapping[str, str]) -> list[str] | None:
    """Return the class names of a model's metadata: a JSON list, or a map by number, under ``names`` or ``classes``."""
    for key in ("names", "classes"):
        try:
            found = json.loads(properties[key].replace("'", '"') if key == "names" else properties[key])
        except (KeyError, ValueError):
            continue
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
    return None


def _categories(names: Sequence[str] | None, count: int | None, categories: Sequence[Mapping[str, Any]]) -> Array:
    """Return the COCO category id of each class of a model, int64 [classes], -1 for a class that is none.

    By name (VOC's names are translated); without names by number: 20 classes are VOC's, as many as there are categories
    are these in the order of their ids, 91 are the ids themselves.
    """
    ids = [int(entry["id"]) for entry in categories]
    if names is None and count == len(VOC_CLASSES) != len(ids):
        names = VOC_CLASSES
    if names is not None:
        by_name = {entry["name"]: int(entry["id"]) for entry in categories}
        return np.array([by_name.get(name, by_name.get(_ALIASES.get(name, ""), -1)) for name in names], np.int64)
    if count == len(ids):
        return np.array(ids, np.int64)
    if count in (None, _TORCHVISION_CLASSES) and max(ids) < _TORCHVISION_CLASSES:
        return np.array([k if k in ids else -1 for k in range(_TORCHVISION_CLASSES)], np.int64)
    raise DataError(f"the model has {count} classes, the data {len(ids)} categories; name the model's classes")


def _finite(arrays: Sequence[Array], k: int, count: int) -> bool:
    """Whether the outputs of image ``k`` are finite; an output without a batch axis belongs to the only image."""
    parts = (array[k] if array.ndim and len(array) >= count > 1 else array for array in arrays)
    return all(part.dtype.kind != "f" or bool(np.isfinite(part).all()) for part in parts)


def _sigmoid(x: Array) -> Array:
    return 0.5 * np.tanh(0.5 * x) + 0.5


def _corners(boxes: Array) -> Array:
    """Return centre, width, height as two corners."""
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)
