"""Which scenes there are: every scene is a function of (settings, seed, split, number) alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo.scenes.drawing import FORM_SCALE, Background, Scene, Shape
from demo.scenes.words import COLOURS, FORMS

MIN_SHAPES, MAX_SHAPES = 3, 6
_REFERENCE_SIDE = 112
# Nominal sizes: pixels of a circle's diameter in an image of _REFERENCE_SIDE. Gaps between them keep the words clear.
_SIZE_RANGES = {"small": (21.0, 23.0), "medium": (29.0, 31.0), "large": (38.0, 41.0)}
_SMALLEST_IMAGE = 48
_PLACING_TRIES = 60
_SHADE_JITTER = 14
# A second shape of the same colour and form is drawn again this often: equal shapes exist, but stay the exception.
_REDRAW_DOUBLES = 0.9


@dataclass(frozen=True, slots=True)
class SceneSettings:
    """What scenes look like: `side` pixels of the square image, at least 48; lengths below scale with it.

    gap: least distance in pixels between the boxes of two shapes; reading_gap: least difference of their centres in x,
    more than a column is wide, so that "left to right" is never in doubt. Both are for an image of 112 pixels.
    """

    side: int = _REFERENCE_SIDE
    gap: float = 3.0
    reading_gap: float = 9.0

    def __post_init__(self) -> None:
        if self.side < _SMALLEST_IMAGE:
            raise ValueError(f"image side is {self.side} pixels: shapes need at least {_SMALLEST_IMAGE}")

    @property
    def scale(self) -> float:
        return self.side / _REFERENCE_SIDE


def _draw_background(rng: random.Random) -> Background:
    tint = (rng.randint(-6, 6), rng.randint(-6, 6), rng.randint(-6, 6))
    return Background(rng.randint(190, 235), tint, rng.randint(-16, 16), rng.randint(-16, 16))


def _draw_shade(rng: random.Random, colour: str) -> tuple[int, int, int]:
    red, green, blue = (min(max(c + rng.randint(-_SHADE_JITTER, _SHADE_JITTER), 0), 250) for c in COLOURS[colour])
    return red, green, blue


def _draw_names(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(form, colour) of each shape, from a small palette, so that shapes share colours and forms with each other."""
    forms = rng.sample(list(FORMS), rng.choice((2, 3, 3, 4)))
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 3, 4)))
    names: list[tuple[str, str]] = []
    while len(names) < count:
        name = (rng.choice(forms), rng.choice(colours))
        if name in names and len(forms) * len(colours) > len(names) and rng.random() < _REDRAW_DOUBLES:
            continue
        names.append(name)
    return names


def _draw_sizes(rng: random.Random, count: int) -> list[str]:
    """A size word for each shape; often only one shape is large or small, and never more than two are large."""
    sizes = ["medium"] * count
    pattern = rng.random()
    large = 1 if pattern < 0.6 else (2 if pattern < 0.75 else 0)
    small = 1 if rng.random() < 0.6 else rng.randint(0, count - 1)
    for i in range(count):
        if i < large:
            sizes[i] = "large"
        elif i < large + small:
            sizes[i] = "small"
    rng.shuffle(sizes)
    return sizes


def _place(rng: random.Random, settings: SceneSettings, sides: list[int]) -> list[tuple[int, int]] | None:
    """(left, top) for boxes of the given sides, largest first, or None where some box found no room."""
    gap, reading_gap, margin = (
        settings.gap * settings.scale,
        settings.reading_gap * settings.scale,
        round(settings.scale),
    )
    places: dict[int, tuple[int, int]] = {}
    for i in sorted(range(len(sides)), key=lambda i: -sides[i]):
        side, limit = sides[i], settings.side - sides[i] - margin
        for _ in range(_PLACING_TRIES):
            left, top = rng.randint(margin, limit), rng.randint(margin, limit)
            if all(_apart(left, top, side, *places[j], sides[j], gap, reading_gap) for j in places):
                places[i] = (left, top)
                break
        else:
            return None
    return [places[i] for i in range(len(sides))]


def _apart(left: int, top: int, side: int, left2: int, top2: int, side2: int, gap: float, reading_gap: float) -> bool:
    """Whether two boxes keep `gap` between them and their centres `reading_gap` in x."""
    if abs(left + side / 2 - left2 - side2 / 2) < reading_gap:
        return False
    beside = left + side + gap <= left2 or left2 + side2 + gap <= left
    return beside or top + side + gap <= top2 or top2 + side2 + gap <= top


def sample_scene(rng: random.Random, settings: SceneSettings) -> Scene:
    """Draw one scene of 3 to 6 shapes; tries again until everything has found its place."""
    count = rng.randint(MIN_SHAPES, MAX_SHAPES)
    while True:
        names, sizes = _draw_names(rng, count), _draw_sizes(rng, count)
        nominal = [rng.uniform(*_SIZE_RANGES[size]) * settings.scale for size in sizes]
        sides = [max(round(n * FORM_SCALE[form]), 3) for n, (form, _) in zip(nominal, names, strict=True)]
        places = _place(rng, settings, sides)
        if places is None:
            continue
        shapes = [
            Shape(form, colour, size, left, top, side, _draw_shade(rng, colour))
            for (form, colour), size, (left, top), side in zip(names, sizes, places, sides, strict=True)
        ]
        shapes.sort(key=lambda shape: shape.centre_x)
        return Scene(settings.side, tuple(shapes), _draw_background(rng))


def sample_scenes(settings: SceneSettings, seed: int, split: str, taken: set[str]) -> Iterator[Scene]:
    """Endless scenes of a split. One whose key is in `taken` is passed over; the keys of those given out are added."""
    number = 0
    while True:
        scene = sample_scene(random.Random(f"scene/{seed}/{split}/{number}"), settings)
        number += 1
        if scene.key not in taken:
            taken.add(scene.key)
            yield scene
