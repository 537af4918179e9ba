"""What a run is scored by.

A :class:`Metric` sees the outputs of one chip batch by batch and then gives its :class:`MetricResult`; ``fresh`` starts
the next chip. :func:`open_metric` chooses the one that suits the data: top-1 and top-5 for labels, mean average
precision for boxes, agreement with the clean model for data without either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError, DataError, did_you_mean
from rerampile.runtime.compare import flat
from rerampile.runtime.dataset import Batch, Dataset

__all__ = ["LOWER_IS_BETTER", "Accuracy", "Agreement", "Beside", "Metric", "MetricResult", "open_metric"]

LOWER_IS_BETTER = frozenset({"output_error"})

Scores = npt.NDArray[np.float32]
Outputs = Sequence[Any]

_WRONG = np.iinfo(np.int64).max  # the rank of a label in outputs that are not finite


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """The score of one chip.

    Attributes:
        values: Percent by name.
        scores: Percent of each image by name, float32 [images], where images have scores of their own.
        indices: int64 [images], the images, in the order that they were seen.
        non_finite: Images with an output that is not finite; they are scored as wrong.
        by_class: The first value by class, where it has classes: the agreement by the clean model's class, and mAP.
        detections: Where boxes are found: image id, x, y, width, height, score and category, float64 [n, 7].
        image_ids: Where boxes are found: id of each of the images, int64 [images].
    """

    values: dict[str, float]
    scores: dict[str, Scores]
    indices: npt.NDArray[np.int64]
    non_finite: int
    by_class: dict[str, float] = field(default_factory=dict)
    detections: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 7)), repr=False)
    image_ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)


class Beside(NamedTuple):
    """The clean model beside a chip that saw some of the images.

    Attributes:
        clean: Values of the clean model on the chip's images, percent by name.
        variances: How much the drop varies with the choice of images, times their number, squared points by name: of a
            mean over images the variance of their score differences.
    """

    clean: dict[str, float]
    variances: dict[str, float]


class Metric(Protocol):
    """Scores the outputs of one chip.

    Attributes:
        names: Names of the values, the most telling first.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, the most telling first."""
        ...

    def learn(self, outputs: Outputs, batch: Batch) -> None:
        """See a batch of the clean model's outputs; once for each batch, before any outputs for it are scored."""
        ...

    def fresh(self) -> Metric:
        """Return a metric with the same settings, and what it learned, that has scored nothing yet."""
        ...

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score a batch of outputs, in the model's order."""
        ...

    def result(self) -> MetricResult:
        """Return the score of all batches."""
        ...

    def beside(self, chip: MetricResult, clean: MetricResult) -> Beside:
        """Return the clean model's values on the images of a chip, from its result on all of them."""
        ...


def open_metric(name: str, dataset: Dataset, session: Any, options: Any = None) -> Metric:
    """Return the metric for a data set and a model.

    Args:
        name: ``accuracy``, ``map``, ``agreement``, or ``auto`` for the one that suits the data.
        dataset: What it scores.
        session: The model's ONNX Runtime session.
        options: A :class:`~rerampile.runtime.detection.DetectionOptions` for ``map``.

    Raises:
        ConfigError: The metric is not known, or does not suit the data.
        DataError: The data's classes do not fit the model's output.
    """
    needs = {"accuracy": "labels", "map": "boxes", "agreement": "none"}
    if name == "auto":
        name = next(metric for metric, kind in needs.items() if kind == dataset.kind)
    if name not in needs:
        raise ConfigError(f"--metric: unknown metric '{name}'{did_you_mean(name, [*needs, 'auto'])}")
    if name == "agreement":
        return Agreement([value.name for value in session.get_outputs()])
    if needs[name] != dataset.kind:
        raise ConfigError(f"--metric: {name} needs data with {needs[name]}, but {dataset.name} has {dataset.kind}")
    if name == "accuracy":
        return Accuracy.open(dataset, session)
    from rerampile.runtime.detection import open_detection

    return open_detection(dataset, session, options)


class _ImageScores:
    """A metric whose values are means of the scores of images."""

    def beside(self, chip: MetricResult, clean: MetricResult) -> Beside:
        """Average the clean model's scores over the chip's images; see :class:`Beside`."""
        place = np.searchsorted(clean.indices, chip.indices)
        values, variances = {}, {}
        for name, scores in chip.scores.items():
            same = clean.scores[name][place].astype(np.float64)
            values[name] = float(same.mean())
            variances[name] = float((same - scores).var(ddof=1)) if len(same) > 1 else 0.0
        return Beside(values, variances)


class Accuracy(_ImageScores):
    """Top-1 and top-5 accuracy of the first output that holds one score a class.

    Args:
        output: Position of that output.
        where: Name of the data, for messages.
        name: Name of the output, for messages.
    """

    names = ("top1", "top5")

    def __init__(self, output: int, where: str, name: str = "") -> None:
        self._output, self._where, self._name = output, where, name
        self._ranks: list[npt.NDArray[np.int64]] = []
        self._indices: list[npt.NDArray[np.int64]] = []
        self._non_finite = 0

    @classmethod
    def open(cls, dataset: Dataset, session: Any) -> Accuracy:
        """Choose the output, and compare its classes with those of the data."""
        outputs = session.get_outputs()
        chosen = next((k for k, value in enumerate(outputs) if _is_class_shape(value.shape)), None)
        if chosen is None:
            shapes = ", ".join(f"'{value.name}' {value.shape}" for value in outputs)
            raise DataError(f"labels need an output of one score a class, [N, classes], but the model has {shapes}")
        width = outputs[chosen].shape[1]
        if dataset.classes is not None and isinstance(width, int) and width != dataset.classes:
            raise DataError(
                f"{dataset.name} has {dataset.classes} classes, but the model's output '{outputs[chosen].name}' has "
                f"{width}; number the labels as the model does (see labels.txt in docs/data.md)"
            )
        return cls(chosen, dataset.name, outputs[chosen].name)

    def learn(self, outputs: Outputs, batch: Batch) -> None:
        """Nothing to learn."""

    def fresh(self) -> Accuracy:
        """Return the same metric without scores."""
        return Accuracy(self._output, self._where, self._name)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score a batch.

        Raises:
            DataError: A label is not one of the output's classes, or the output has not one row an image.
        """
        labels, count = batch.targets, len(batch.indices)
        found = np.asarray(outputs[self._output])
        if len(found) not in {count, *(array.shape[0] for array in batch.inputs.values() if array.ndim)}:
            raise DataError(
                f"{self._where}: output '{self._name}' has {len(found)} rows for {count} images, expected one row an "
                f"image; the first axis of inputs and outputs has to count images"
            )
        scores = found[:count].reshape(count, -1)
        wrong = np.flatnonzero((labels < 0) | (labels >= scores.shape[1]))
        if wrong.size:
            raise DataError(
                f"{self._where}: image {batch.indices[wrong[0]]}: label {labels[wrong[0]]}, expected 0 to "
                f"{scores.shape[1] - 1} as the model has {scores.shape[1]} classes"
            )
        finite = np.array([all(np.isfinite(part).all() for part in row) for row in _rows(outputs, batch)])
        ranks = np.where(finite, _ranks(scores, labels), _WRONG)
        self._ranks.append(ranks)
        self._indices.append(batch.indices)
        self._non_finite += int(count - finite.sum())

    def result(self) -> MetricResult:
        """Return both accuracies and the score of each image, 0 or 100."""
        ranks = _joined(self._ranks)
        scores = {name: np.float32(100) * (ranks < k) for name, k in zip(self.names, (1, 5), strict=True)}
        return MetricResult(
            values={name: _mean(score) for name, score in scores.items()},
            scores=scores,
            indices=_joined(self._indices),
            non_finite=self._non_finite,
        )


def _ranks(scores: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many classes come before the label, int64 [n]; of equal scores the first counts, as in argmax.

    A chip whose scores are all the same is thereby right about class 0 only, not about everything.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    first = np.arange(scores.shape[1]) < labels[:, None]
    with np.errstate(invalid="ignore"):
        before: npt.NDArray[np.int64] = ((scores > own) | ((scores == own) & first)).sum(axis=1)
    return before


def _is_class_shape(shape: Sequence[Any]) -> bool:
    """Whether an output is [N, classes], or that with further axes of length 1."""
    return len(shape) >= 2 and shape[1] != 1 and all(side == 1 for side in shape[2:])


class Agreement(_ImageScores):
    """How close a chip is to the clean model: the same class on top, and the relative error of the outputs.

    Needs no labels. ``output_error`` is ‖faulty − clean‖ / ‖clean‖ over all outputs, in percent, the mean over images;
    an image with an output that is not finite counts as 100 % at least, for that is what no output at all would cost.

    Args:
        outputs: Names of the model's outputs.
    """

    def __init__(self, outputs: Sequence[str]) -> None:
        self._outputs = tuple(outputs)
        self._clean: dict[int, list[npt.NDArray[Any]]] = {}
        self._same: list[Scores] = []
        self._errors: list[Scores] = []
        self._indices: list[npt.NDArray[np.int64]] = []
        self._non_finite = 0

    @property
    def names(self) -> tuple[str, ...]:
        """``top1_agreement`` where an output has classes, and ``output_error``."""
        return ("output_error",) if self._class_output() is None else ("top1_agreement", "output_error")

    def learn(self, outputs: Outputs, batch: Batch) -> None:
        """Keep the clean model's outputs.

        Raises:
            DataError: The clean model's own outputs are not finite.
        """
        for index, row in zip(batch.indices, _rows(outputs, batch), strict=True):
            if not all(np.isfinite(part).all() for part in row):
                raise DataError(
                    f"image {index}: the clean model's outputs are not finite, nothing can agree with them; give real "
                    f"inputs with --data"
                )
            self._clean[int(index)] = [part.copy() for part in row]  # what ran may use its buffers again

    def fresh(self) -> Agreement:
        """Return the same metric, with the clean outputs but without scores."""
        other = Agreement(self._outputs)
        other._clean = self._clean
        return other

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Score a batch."""
        chosen = self._class_output()
        same, errors = [], []
        for index, row in zip(batch.indices, _rows(outputs, batch), strict=True):
            clean = self._clean[int(index)]
            finite = all(np.isfinite(part).all() for part in row)
            self._non_finite += not finite
            error = _relative_error(row, clean)
            errors.append(error if finite else max(error, 100.0))
            if chosen is not None:
                same.append(100.0 * (finite and row[chosen].argmax() == clean[chosen].argmax()))
        self._same.append(np.array(same, np.float32))
        self._errors.append(np.array(errors, np.float32))
        self._indices.append(batch.indices)

    def result(self) -> MetricResult:
        """Return both values, the score of each image, and the agreement by the clean model's class."""
        indices = _joined(self._indices)
        scores = {"output_error": _joined(self._errors)}
        by_class: dict[str, float] = {}
        chosen = self._class_output()
        if chosen is not None:
            same = _joined(self._same)
            scores = {"top1_agreement": same, **scores}
            tops = np.array([self._clean[int(index)][chosen].argmax() for index in indices], np.int64)
            by_class = {str(top): _mean(same[tops == top]) for top in np.unique(tops)}
        return MetricResult(
            values={name: _mean(score) for name, score in scores.items()},
            scores=scores,
            indices=indices,
            non_finite=self._non_finite,
            by_class=by_class,
        )

    def _class_output(self) -> int | None:
        """Return the position of the first output that holds one score a class, None where none does."""
        row = next(iter(self._clean.values()), [])
        return next((k for k, part in enumerate(row) if part.size > 1 and part.size == part.shape[0]), None)


def _rows(outputs: Outputs, batch: Batch) -> list[list[npt.NDArray[Any]]]:
    """Return the outputs of each image as numbers; one without a batch axis belongs to every image of the batch."""
    count = len(batch.indices)
    sizes = {array.shape[:1] for array in batch.inputs.values()}
    numeric = [o if isinstance(o, np.ndarray) and o.dtype.kind in "fiub" else flat(o) for o in outputs]
    split = [array.shape[:1] in sizes and array.shape[0] >= count for array in numeric]
    return [
        [a[k] if by_row else np.atleast_1d(a) for a, by_row in zip(numeric, split, strict=True)] for k in range(count)
    ]


def _relative_error(found: Sequence[npt.NDArray[Any]], clean: Sequence[npt.NDArray[Any]]) -> float:
    """Return ‖found − clean‖ / ‖clean‖ in percent; parts that are not finite, or of another shape, count as zeros."""
    error = energy = 0.0
    for a, b in zip(found, clean, strict=True):
        reference = b.astype(np.float64)
        value = np.where(np.isfinite(a), a, 0).astype(np.float64) if a.shape == b.shape else np.zeros_like(reference)
        error += float(np.square(value - reference).sum())
        energy += float(np.square(reference).sum())
    if energy == 0:
        return 0.0 if error == 0 else 100.0
    return float(100 * np.sqrt(error / energy))


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _mean(scores: npt.NDArray[Any]) -> float:
    return float(scores.mean(dtype=np.float64)) if scores.size else float("nan")
