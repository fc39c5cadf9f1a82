"""Mask sources: small picklable callables that give a target's mask (H, W) uint8 of 0, 1 and IGNORE_LABEL.

Parts of one object are a union, never a sum: a pixel covered twice is still 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_rle

from utils.data.errors import DataError
from utils.data.samples import IGNORE_LABEL

_COORDINATES_OF_A_TRIANGLE = 6
_FARTHEST = 1_000_000
"""No picture reaches so far; beyond, rastering would take all memory there is."""


@dataclass(frozen=True, slots=True)
class CocoMask:
    """The union of polygons (each x0 y0 x1 y1 …) and run-length encodings, rastered as pycocotools does it."""

    height: int
    width: int
    polygons: tuple[np.ndarray, ...] = ()
    rles: tuple[dict[str, Any], ...] = ()

    def __call__(self) -> np.ndarray:
        parts = list(self.rles)
        if self.polygons:
            parts += coco_rle.frPyObjects(list(self.polygons), self.height, self.width)
        return coco_rle.decode(coco_rle.merge(parts) if len(parts) > 1 else parts[0])


@dataclass(frozen=True, slots=True)
class UnionMask:
    """The union of several sources of one picture."""

    sources: tuple[CocoMask, ...]

    def __call__(self) -> np.ndarray:
        return np.maximum.reduce([source() for source in self.sources])


@dataclass(frozen=True, slots=True)
class LabelMask:
    """One class of a label map (H, W); pixels of `ignored` become IGNORE_LABEL."""

    labels: np.ndarray
    value: int
    ignored: int

    def __call__(self) -> np.ndarray:
        mask = (self.labels == self.value).astype(np.uint8)
        mask[self.labels == self.ignored] = IGNORE_LABEL
        return mask


@dataclass(frozen=True, slots=True)
class PaintedMask:
    """Polygons (N, 2) of x, y painted over each other, outlines included, largest first.

    `ignored` tells of each polygon whether it paints IGNORE_LABEL instead of 1. This is how ReasonSeg's official
    masks are made; outlines make them a little larger than pycocotools would.
    """

    height: int
    width: int
    polygons: tuple[np.ndarray, ...]
    ignored: tuple[bool, ...]

    def __call__(self) -> np.ndarray:
        areas = [int(self._painted(polygon, 1).sum()) for polygon in self.polygons]
        canvas = np.zeros((self.height, self.width), dtype=np.uint8)
        for index in sorted(range(len(areas)), key=areas.__getitem__, reverse=True):
            self._paint(canvas, self.polygons[index], IGNORE_LABEL if self.ignored[index] else 1)
        return canvas

    def _painted(self, polygon: np.ndarray, value: int) -> np.ndarray:
        canvas = np.zeros((self.height, self.width), dtype=np.uint8)
        self._paint(canvas, polygon, value)
        return canvas

    @staticmethod
    def _paint(canvas: np.ndarray, polygon: np.ndarray, value: int) -> None:
        points = [polygon.astype(np.int32)]
        cv2.polylines(canvas, points, True, value, 1)
        cv2.fillPoly(canvas, points, value)


def coco_mask(segmentation: Any, height: int, width: int, where: str) -> CocoMask | None:
    """The source of a COCO `segmentation`: polygons, an RLE (counts compressed or not) or a list of RLEs.

    Polygons of fewer than three points have no inside and are left out; None when nothing is left. DataError,
    starting with `where`, when it is anything else, is not finite, or belongs to a picture of another size.
    """
    if height < 1 or width < 1:
        raise DataError(
            f"{where} belongs to a picture of {height}×{width} pixels; expected at least 1×1: correct the file"
        )
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if not isinstance(segmentation, list):
        raise DataError(
            f"{where} is neither polygons nor run lengths but {type(segmentation).__name__}: correct the file"
        )
    if segmentation and all(isinstance(part, dict) for part in segmentation):
        rles = tuple(_checked_rle(part, height, width, where) for part in segmentation)
        return CocoMask(height, width, rles=rles)
    polygons = tuple(
        polygon
        for polygon in (_checked_polygon(part, where) for part in segmentation)
        if polygon.size >= _COORDINATES_OF_A_TRIANGLE
    )
    return CocoMask(height, width, polygons=polygons) if polygons else None


def points_of(polygon: Any, where: str) -> np.ndarray:
    """[[x, y], …] as (N, 2) float64. DataError, starting with `where`, when it is anything else or not finite."""
    points = _numbers(polygon, where)
    if points.size == 0:
        return points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise DataError(f"{where} has points of shape {points.shape}; expected pairs of x and y: correct the file")
    return points


def _checked_polygon(part: Any, where: str) -> np.ndarray:
    polygon = _numbers(part, where)
    if polygon.ndim != 1 or polygon.size % 2:
        raise DataError(f"{where} has a polygon of shape {polygon.shape}; expected x0 y0 x1 y1 …: correct the file")
    return polygon


def _numbers(values: Any, where: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has a polygon that is not made of numbers: correct the file") from error
    if not np.isfinite(numbers).all():
        raise DataError(f"{where} has a polygon with a coordinate that is not finite: correct the file")
    if numbers.size and max(numbers.max(), -numbers.min()) > _FARTHEST:
        raise DataError(f"{where} has a polygon with a coordinate beyond {_FARTHEST} pixels: correct the file")
    return numbers


def _checked_rle(rle: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise DataError(
            f"{where} has run lengths for a size of {size}; its picture has {[height, width]}: correct the file"
        )
    if isinstance(counts, list):
        return _compressed(counts, height, width, where)
    if not isinstance(counts, str | bytes) or not counts:
        raise DataError(f"{where} has run lengths without counts: correct the file")
    return {"size": [height, width], "counts": counts.encode("ascii", "replace") if isinstance(counts, str) else counts}


def _compressed(counts: list[Any], height: int, width: int, where: str) -> dict[str, Any]:
    whole = all(isinstance(count, int) and count >= 0 for count in counts)
    if not whole or sum(counts) != height * width:
        raise DataError(f"{where} has run lengths that do not add up to {height}×{width} pixels: correct the file")
    return coco_rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
