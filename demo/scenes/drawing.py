"""Shapes, scenes and how they look.

Drawing uses hard edges: a pixel belongs to a shape or to the background, so that the mask of a shape is exactly the set
of pixels that bear its colour. Axes: H W pixels of the image, N shapes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.scenes.words import COLUMNS, FORMS, ROWS

# The side of a form's box for a shape whose nominal size is 1: it brings the areas of all forms close together (0.64 to
# 0.81 of the square of the nominal size), so that "larger" means the same by area and to the eye.
FORM_SCALE = {"circle": 1.0, "square": 0.9, "triangle": 1.15, "star": 1.25, "cross": 1.08}
_CROSS_ARM = 0.4  # width of an arm as a share of the box
_STAR_INNER = 0.5  # inner radius as a share of the outer one


@dataclass(frozen=True, slots=True)
class Shape:
    """One upright shape: its box starts at pixel column `left` and row `top` and is `side` pixels wide and high."""

    form: str
    colour: str
    size: str
    left: int
    top: int
    side: int
    shade: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"

    @property
    def centre_x(self) -> float:
        return self.left + self.side / 2

    @property
    def centre_y(self) -> float:
        return self.top + self.side / 2

    @property
    def area(self) -> int:
        """Number of pixels of the mask."""
        return _glyph_area(self.form, self.side)


@dataclass(frozen=True, slots=True)
class Background:
    """A grey with a slight tint (added per channel) and a slope: how much it brightens from one edge to the other."""

    grey: int
    tint: tuple[int, int, int]
    slope_x: int
    slope_y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """An image of `side` x `side` pixels; its shapes are listed in reading order, left to right by centre."""

    side: int
    shapes: tuple[Shape, ...]
    background: Background

    def place(self, shape: Shape) -> tuple[str, str]:
        """The words for the column and the row of a shape's centre."""
        column, row = (int(c / self.side * len(COLUMNS)) for c in (shape.centre_x, shape.centre_y))
        return COLUMNS[column], ROWS[row]

    def where(self, shape: Shape) -> str:
        """ "c3 r5": the column and the row of a shape's centre."""
        return " ".join(self.place(shape))

    @property
    def key(self) -> str:
        """Hash of what is where: forms, colours, sizes and places.

        Shades and background are left out: two scenes that differ in nothing else count as the same one.
        """
        content = (self.side, sorted((s.form, s.colour, s.side, s.left, s.top) for s in self.shapes))
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _inside_polygon(
    points: list[tuple[float, float]], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Even-odd rule: whether each (x, y) lies inside the closed polygon."""
    inside = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if y0 == y1:
            continue
        crosses = (y0 > y) != (y1 > y)
        inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _star_points() -> list[tuple[float, float]]:
    """Five-pointed star that fills the box [-1, 1] x [-1, 1], one tip up."""
    raw = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else _STAR_INNER
        angle = math.pi * i / 5
        raw.append((radius * math.sin(angle), -radius * math.cos(angle)))
    left, right = min(x for x, _ in raw), max(x for x, _ in raw)
    top, bottom = min(y for _, y in raw), max(y for _, y in raw)
    return [(2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1) for x, y in raw]


@functools.lru_cache(maxsize=4096)
def shape_glyph(form: str, side: int) -> NDArray[np.bool_]:
    """The mask of a form inside its own box, (side, side) bool, read-only. ValueError for an unknown form or no box."""
    if form not in FORMS or side < 1:
        raise ValueError(
            f"cannot draw a {form!r} of {side} pixels: expected one of {', '.join(FORMS)} and at least 1 pixel"
        )
    centres = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = centres[None, :], centres[:, None]
    if form == "circle":
        glyph = x**2 + y**2 <= 1
    elif form == "square":
        glyph = np.ones((side, side), dtype=bool)
    elif form == "triangle":
        glyph = np.abs(x) <= (y + 1) / 2
    elif form == "cross":
        glyph = (np.abs(x) <= _CROSS_ARM) | (np.abs(y) <= _CROSS_ARM)
    else:
        glyph = _inside_polygon(_star_points(), x, y)
    glyph = np.ascontiguousarray(np.broadcast_to(glyph, (side, side)))
    glyph.setflags(write=False)
    return glyph


@functools.lru_cache(maxsize=4096)
def _glyph_area(form: str, side: int) -> int:
    return int(np.count_nonzero(shape_glyph(form, side)))


def shape_mask(shape: Shape, side: int) -> NDArray[np.uint8]:
    """The pixels of one shape in an image of `side` pixels: (H, W) uint8, 0 or 1."""
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[shape.top : shape.top + shape.side, shape.left : shape.left + shape.side] = shape_glyph(shape.form, shape.side)
    return mask


def scene_masks(scene: Scene) -> NDArray[np.uint8]:
    """The masks of all shapes in the order of `scene.shapes`: (N, H, W) uint8, 0 or 1."""
    return np.stack([shape_mask(shape, scene.side) for shape in scene.shapes])


def draw_scene(scene: Scene) -> NDArray[np.uint8]:
    """The image of a scene: (H, W, 3) uint8, RGB."""
    back = scene.background
    ramp = np.linspace(-0.5, 0.5, scene.side, dtype=np.float32)
    level = back.grey + back.slope_x * ramp[None, :] + back.slope_y * ramp[:, None]
    limits = np.iinfo(np.uint8)
    image = np.clip(level[:, :, None] + np.asarray(back.tint, dtype=np.float32), limits.min, limits.max).astype(
        np.uint8
    )
    for shape in scene.shapes:
        box = image[shape.top : shape.top + shape.side, shape.left : shape.left + shape.side]
        box[shape_glyph(shape.form, shape.side)] = shape.shade
    return image
