"""Mask sources: small picklable callables that give a target's mask (H, W) uint8 of 0, 1 and IGNORE_LABEL.

Parts of one object are a union, never a sum: a pixel covered twice is still 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_rle

from model.structures import IGNORE_LABEL
from utils.data.errors import DataError

_POINTS_OF_A_TRIANGLE = 3
_FARTHEST = 1_000_000
"""No image reaches so far; beyond, rastering would take all memory there is."""

_MALFORMED = "malformed segmentation"
_BROKEN_RLE = "broken run lengths"

_FIRST_DIGIT, _MORE_FOLLOW, _SIGN = 48, 32, 16
_MOST_DIGITS = 7
"""Of five bits each; more would be a run longer than any image."""

_CODES = np.arange(256) - _FIRST_DIGIT
_DIGITS = (_CODES & 31) - np.where(_CODES & (_MORE_FOLLOW | _SIGN) == _SIGN, 32, 0)
"""Of every byte of compressed run lengths: its five bits, less 32 where it is the last of a number below 0."""

PlainMask = tuple[int, int, tuple[bytes, ...], tuple[bytes, ...]]
"""Of a CocoMask: height, width, the float64 numbers of each polygon, the compressed counts of each RLE."""


@dataclass(frozen=True, slots=True)
class CocoMask:
    """The union of polygons (each x0 y0 x1 y1 …) and run-length encodings, rastered as pycocotools does it."""

    height: int
    width: int
    polygons: tuple[np.ndarray, ...] = ()
    rles: tuple[dict[str, Any], ...] = ()

    def __call__(self) -> np.ndarray:
        outlines = coco_rle.frPyObjects(list(self.polygons), self.height, self.width) if self.polygons else []
        rle = coco_rle.merge([*self.rles, *outlines])
        return cv2.transpose(coco_rle.decode(rle).T)  # columns come first in pycocotools' memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CocoMask) and self.to_plain() == other.to_plain()

    def to_plain(self) -> PlainMask:
        """Plain values that `mask_from_plain` makes the same mask of."""
        return (
            self.height,
            self.width,
            tuple(polygon.tobytes() for polygon in self.polygons),
            tuple(rle["counts"] for rle in self.rles),
        )


def mask_from_plain(plain: PlainMask) -> CocoMask:
    """The mask whose `to_plain` values these are."""
    height, width, polygons, counts = plain
    return CocoMask(
        height,
        width,
        tuple(np.frombuffer(polygon) for polygon in polygons),
        tuple({"size": [height, width], "counts": count} for count in counts),
    )


@dataclass(frozen=True, slots=True)
class UnionMask:
    """The union of several sources of one image; pixels of `ignored` alone become IGNORE_LABEL."""

    sources: tuple[CocoMask, ...]
    ignored: tuple[CocoMask, ...] = ()

    def __call__(self) -> np.ndarray:
        mask = np.maximum.reduce([source() for source in self.sources])
        for source in self.ignored:
            mask[(mask == 0) & (source() == 1)] = IGNORE_LABEL
        return mask


def make_union(sources: Sequence[PlainMask], ignored: Sequence[PlainMask] = ()) -> CocoMask | UnionMask:
    """The mask of one target made of `sources`, at least one; pixels of `ignored` alone become IGNORE_LABEL."""
    if len(sources) == 1 and not ignored:
        return mask_from_plain(sources[0])
    return UnionMask(tuple(map(mask_from_plain, sources)), tuple(map(mask_from_plain, ignored)))


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


def pixels_outside_image(source: object) -> float:
    """How many pixels the polygons of a mask source reach out of their image; 0 for what has none."""
    if isinstance(source, UnionMask):
        return max(map(pixels_outside_image, source.sources))
    if not isinstance(source, CocoMask | PaintedMask):
        return 0.0
    farthest = 0.0
    for polygon in source.polygons:
        points = polygon.reshape(-1, 2)
        beyond = np.concatenate([-points.min(axis=0), points.max(axis=0) - (source.width, source.height)])
        farthest = max(farthest, float(beyond.max()))
    return farthest


def parse_coco_mask(segmentation: Any, height: int, width: int, where: str) -> CocoMask | None:
    """The source of a COCO `segmentation`: polygons, an RLE (counts compressed or not) or a list of RLEs.

    Polygons of fewer than three points, or with all of them on one line, have no inside and are left out; None when
    nothing is left. DataError, starting with `where`, when it is anything else, is not finite, or belongs to an image
    of another size.
    """
    if height < 1 or width < 1:
        raise DataError(
            f"{where} belongs to an image of {height}×{width} pixels; expected at least 1×1: correct the file",
            cause="image of no size",
        )
    if isinstance(segmentation, dict):
        segmentation = [segmentation]
    if not isinstance(segmentation, list):
        raise DataError(
            f"{where} is neither polygons nor run lengths but {type(segmentation).__name__}: correct the file",
            cause=_MALFORMED,
        )
    if segmentation and all(isinstance(part, dict) for part in segmentation):
        rles = tuple(_check_rle(part, height, width, where) for part in segmentation)
        return CocoMask(height, width, rles=rles)
    polygons = tuple(
        polygon
        for polygon in (_check_polygon(part, where) for part in segmentation)
        if has_inside(polygon.reshape(-1, 2))
    )
    return CocoMask(height, width, polygons=polygons) if polygons else None


def has_inside(points: np.ndarray) -> bool:
    """Whether the polygon through `points` (N, 2) encloses anything: three of its points are not on one line."""
    if len(points) < _POINTS_OF_A_TRIANGLE:
        return False
    (x, y), (x1, y1), (x2, y2) = points[:_POINTS_OF_A_TRIANGLE].tolist()
    if (x1 - x) * (y2 - y) != (x2 - x) * (y1 - y):  # nearly always, and much faster
        return True
    arms = points - points[0]
    longest = arms[np.abs(arms).sum(axis=1).argmax()]
    return bool((arms[:, 0] * longest[1] != arms[:, 1] * longest[0]).any())


def parse_points(polygon: Any, where: str) -> np.ndarray:
    """[[x, y], …] as (N, 2) float64. DataError, starting with `where`, when it is anything else or not finite."""
    points = _parse_numbers(polygon, where)
    if points.size == 0:
        return points.reshape(0, 2)
    if points.ndim != 2 or points.shape[1] != 2:
        raise DataError(
            f"{where} has points of shape {points.shape}; expected pairs of x and y: correct the file", _MALFORMED
        )
    return points


def _check_polygon(part: Any, where: str) -> np.ndarray:
    polygon = _parse_numbers(part, where)
    if polygon.ndim != 1 or polygon.size % 2:
        raise DataError(
            f"{where} has a polygon of shape {polygon.shape}; expected x0 y0 x1 y1 …: correct the file", _MALFORMED
        )
    return polygon


def _parse_numbers(values: Any, where: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has a polygon that is not made of numbers: correct the file", _MALFORMED) from error
    if not np.isfinite(numbers).all():
        raise DataError(
            f"{where} has a polygon with a coordinate that is not finite: correct the file",
            cause="coordinate that is not finite",
        )
    if numbers.size and max(numbers.max(), -numbers.min()) > _FARTHEST:
        raise DataError(
            f"{where} has a polygon with a coordinate beyond {_FARTHEST} pixels: correct the file",
            cause="coordinate beyond every image",
        )
    return numbers


def _check_rle(rle: dict[str, Any], height: int, width: int, where: str) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or list(size) != [height, width]:
        raise DataError(
            f"{where} has run lengths for a size of {size}; its image has {[height, width]}: correct the file",
            cause="run lengths of another size",
        )
    if isinstance(counts, list):
        return _compress_counts(counts, height, width, where)
    if not isinstance(counts, str | bytes) or not counts:
        raise DataError(f"{where} has run lengths without counts: correct the file", _BROKEN_RLE)
    packed = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    if _count_packed_pixels(packed) != height * width:
        raise DataError(
            f"{where} has run lengths that do not add up to {height}×{width} pixels: correct the file", _BROKEN_RLE
        )
    return {"size": [height, width], "counts": packed}


def _count_packed_pixels(counts: bytes) -> int:
    """How many pixels compressed run lengths cover; −1 where they are none.

    pycocotools fills the rest of a mask whose runs end early with whatever is in memory. COCO's coding (maskApi.c,
    rleToString): digits of 5 bits from character 48 on, lowest first, bit 32 says that more follow, the highest bit
    of the last is the sign; from the fourth on a run is told as the difference to the one before the last.
    """
    codes = np.frombuffer(counts, dtype=np.uint8)
    if codes.min() < _FIRST_DIGIT or codes.max() > _FIRST_DIGIT + 63 or codes[-1] >= _FIRST_DIGIT + _MORE_FOLLOW:
        return -1
    ends = np.flatnonzero(codes < _FIRST_DIGIT + _MORE_FOLLOW)  # the place of each number's last digit
    digits = np.diff(ends, prepend=-1)
    if digits.max() > _MOST_DIGITS:
        return -1
    starts = ends - digits + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, digits))
    runs = np.add.reduceat(_DIGITS[codes] << shifts, starts)
    for differences in (runs[1::2], runs[2::2]):
        differences.cumsum(out=differences)
    return int(runs.sum()) if runs.min() >= 0 else -1


def _compress_counts(counts: list[Any], height: int, width: int, where: str) -> dict[str, Any]:
    whole = all(isinstance(count, int) and count >= 0 for count in counts)
    if not whole or sum(counts) != height * width:
        raise DataError(
            f"{where} has run lengths that do not add up to {height}×{width} pixels: correct the file", _BROKEN_RLE
        )
    return coco_rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
