"""Average precision of detections, judged by pycocotools, of all images or without some of them."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["JudgedDetections", "annotated", "drop_variance"]

Array = npt.NDArray[Any]

_GROUPS = 10  # of images, each of which is left out once


def annotated(annotations: Mapping[str, Any]) -> Any:
    """Return the COCO object of annotations, as in an instances file."""
    from pycocotools.coco import COCO

    judge = COCO()
    judge.dataset = dict(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.createIndex()
    return judge


class JudgedDetections:
    """Detections beside the annotations of their images.

    Args:
        judge: See :func:`annotated`.
        rows: Image id, x, y, width, height, score and category of each detection, float64 [n, 7].
        images: Ids of the images that were seen.
        categories: Ids of the categories that count.
    """

    def __init__(self, judge: Any, rows: Array, images: Sequence[int], categories: Sequence[int]) -> None:
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            found = judge.loadRes(rows) if len(rows) else annotated({**judge.dataset, "annotations": []})
            self._evaluation = COCOeval(judge, found, "bbox")
            self._evaluation.params.imgIds = sorted(images)
            self._evaluation.params.catIds = list(categories)
            self._evaluation.params.areaRng, self._evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            self._evaluation.params.maxDets = [100]
            self._evaluation.evaluate()
        self._by_image = self._evaluation.evalImgs

    def by_category(self, without: Collection[int] = ()) -> Array:
        """Return AP at 0.5 and over 0.5 to 0.95, percent, float64 [categories, 2]; NaN for one without any box.

        Args:
            without: Ids of images that do not count.
        """
        # accumulate() cannot be asked for some of the images: it takes the first ones, however they are called.
        left = [None if part is None or part["image_id"] in without else part for part in self._by_image]
        self._evaluation.evalImgs = left
        with contextlib.redirect_stdout(io.StringIO()):
            self._evaluation.accumulate()
        precision = self._evaluation.eval["precision"][:, :, :, 0, 0]  # [overlaps, recalls, categories], -1 if no boxes
        by_overlap = np.where(precision[:, 0] < 0, np.nan, 100 * precision.mean(axis=1))
        return np.stack([by_overlap[0], by_overlap.mean(axis=0)], axis=1)

    def means(self, without: Collection[int] = ()) -> Array:
        """Return the means over the categories that have boxes, float64 [2]; NaN where none has."""
        found = self.by_category(without)
        seen = ~np.isnan(found[:, 0])
        return found[seen].mean(axis=0) if seen.any() else np.full(2, math.nan)


def drop_variance(clean: JudgedDetections, chip: JudgedDetections, images: Sequence[int]) -> Array:
    """Return the variance that the choice of images gives the drop of a chip, times their number: float64 [2].

    By the jackknife over groups of images (Shao and Wu 1989): a mean average precision is no mean over images, but
    what it moves by when a few of them are left out tells how it varies.

    Args:
        clean: Detections of the fault-free model.
        chip: Those of the chip.
        images: Ids of the images that both saw, in the order that they were drawn in.
    """
    groups = min(_GROUPS, len(images))
    if groups < 2:
        return np.zeros(2)
    parts = [set(images[first::groups]) for first in range(groups)]
    drops = np.array([clean.means(part) - chip.means(part) for part in parts])
    known = drops[~np.isnan(drops).any(axis=1)]  # the others left no image with a box
    if len(known) < 2:
        return np.zeros(2)
    variance: Array = (len(known) - 1) * known.var(axis=0)
    return variance * len(images)
