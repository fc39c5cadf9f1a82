"""Drawing answers: masks and their phrases over images.

Axes: Q masks, H W pixels of the image. Images are uint8 RGB (H, W, 3), masks bool (Q, H, W).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, product

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom, the last two exclusive."""

# Okabe and Ito's palette, which readers with any colour vision tell apart, without its black.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_WHITE: Colour = (255, 255, 255)
_BLACK: Colour = (0, 0, 0)
_FILL_STRENGTH = 0.45
_MIN_SIDE = 384  # shorter images are enlarged: on a 112 pixel image a legible label would hide everything
_MIN_CANVAS = (24, 96)  # height and width that always leave room for a label
_FONT_SIZE = 15
_PADDING = 3
_ELLIPSIS = "…"
_HIDDEN_SHARE = 0.12  # of any mask that a label may cover while there is another place


def target_colour(index: int) -> Colour:
    """Colour of the target number `index`: the same in masks, labels and coloured text."""
    return PALETTE[index % len(PALETTE)]


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever is read better on `background` (ITU-R BT.601 luma)."""
    red, green, blue = background
    return _BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > sum(_WHITE) / 6 else _WHITE


def to_printable(text: str) -> str:
    """One line without control characters, for labels and terminals."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def draw_overlay(
    image: np.ndarray, masks: np.ndarray, phrases: Sequence[str] = (), *, min_side: int = _MIN_SIDE
) -> np.ndarray:
    """An image with its masks as translucent, outlined areas, each labelled with its phrase in its colour.

    An image whose longest side is under `min_side` is enlarged by a whole factor; one too thin for a label gets a
    white margin at the right or bottom. Where masks overlap their colours mix. Labels stay inside, shortened with an
    ellipsis if they must, and avoid each other and what they would hide while there is room; a line leads from a label
    that had to go elsewhere to its mask. Returns uint8 RGB (h, w, 3).
    """
    _check_inputs(image, masks)
    factor = max(1, -(-min_side // max(image.shape[:2])))
    large = _enlarge(image, factor)
    large_masks = [_enlarge(mask, factor) for mask in masks]
    for index, mask in enumerate(large_masks):
        large[mask] = np.rint(
            (1 - _FILL_STRENGTH) * large[mask] + _FILL_STRENGTH * np.array(target_colour(index))
        ).astype(np.uint8)
    thickness = max(1, round(max(large.shape[:2]) / 250))
    for index, mask in enumerate(large_masks):
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        # A white line under the coloured one keeps it apart from a thing that has the target's colour itself.
        large = cv2.drawContours(np.ascontiguousarray(large), contours, -1, _WHITE, 3 * thickness)
        large = cv2.drawContours(large, contours, -1, target_colour(index), thickness)
    return _draw_labels(_add_margin(large), large_masks, phrases)


def _check_inputs(image: np.ndarray, masks: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image to draw on is {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
    if masks.dtype != np.bool_ or masks.ndim != 3 or (len(masks) and masks.shape[1:] != image.shape[:2]):
        raise ValueError(
            f"masks to draw are {masks.dtype} {masks.shape}; expected bool (number, {image.shape[0]}, "
            f"{image.shape[1]}), the size of the image"
        )


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel becomes a square of `factor` x `factor`; always a copy."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _add_margin(image: np.ndarray) -> np.ndarray:
    """At least _MIN_CANVAS large, white where nothing was."""
    height, width = max(image.shape[0], _MIN_CANVAS[0]), max(image.shape[1], _MIN_CANVAS[1])
    canvas = np.full((height, width, 3), _WHITE, dtype=np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


@lru_cache
def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of labels, `size` pixels high."""
    return ImageFont.load_default(size)


def _shorten_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, or as much of its beginning as fits into `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept and font.getlength(text[:kept].rstrip() + _ELLIPSIS) > width:
        kept -= 1
    return text[:kept].rstrip() + _ELLIPSIS


def _draw_labels(image: np.ndarray, masks: Sequence[np.ndarray], phrases: Sequence[str]) -> np.ndarray:
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    size = max(_FONT_SIZE, round(max(canvas.size) / 45))
    size = min(size, canvas.height - 2 * _PADDING)
    font = label_font(size)
    taken: list[Rectangle] = []
    for index, (mask, phrase) in enumerate(zip(masks, phrases, strict=False)):
        label = _shorten_text(to_printable(phrase), font, canvas.width - 2 * _PADDING)
        if not label or not mask.any():
            continue
        width, height = int(np.ceil(font.getlength(label))) + 2 * _PADDING, size + 2 * _PADDING
        left, top = _find_place(mask, (width, height), canvas.size, taken, masks)
        taken.append((left, top, left + width, top + height))
        background = target_colour(index)
        _draw_leader(draw, mask, taken[-1], background)
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=background)
        draw.text((left + _PADDING, top + height / 2), label, fill=text_colour(background), font=font, anchor="lm")
    return np.asarray(canvas)


def _draw_leader(draw: ImageDraw.ImageDraw, mask: np.ndarray, label: Rectangle, colour: Colour) -> None:
    """A line from a label to its mask's nearest pixel, where they are further apart than the label is high."""
    rows, columns = np.nonzero(mask)
    x0, y0, x1, y1 = label
    beside = np.maximum(np.maximum(x0 - columns, columns - x1 + 1), 0)
    below = np.maximum(np.maximum(y0 - rows, rows - y1 + 1), 0)
    nearest = int(np.argmin(beside**2 + below**2))
    if max(beside[nearest], below[nearest]) > y1 - y0:
        end = int(columns[nearest]), int(rows[nearest])
        draw.line(((x0 + x1) // 2, (y0 + y1) // 2, *end), fill=colour, width=2)


def _find_place(
    mask: np.ndarray,
    label: tuple[int, int],
    canvas: tuple[int, int],
    taken: Sequence[Rectangle],
    masks: Sequence[np.ndarray] = (),
) -> tuple[int, int]:
    """Left and top of a label inside the canvas: the first place, from near its mask outwards, that is off labels
    already drawn and hides little of any mask, its own among them; else the place that hides least.
    """
    width, height = label
    areas = [np.count_nonzero(other) for other in masks]
    best, least = (0, 0), (np.inf, np.inf)
    for left, top in _places(mask, label, canvas):
        covered = sum(
            max(0, min(left + width, x1) - max(left, x0)) * max(0, min(top + height, y1) - max(top, y0))
            for x0, y0, x1, y1 in taken
        )
        hidden = max(
            (
                np.count_nonzero(other[top : top + height, left : left + width]) / area
                for other, area in zip(masks, areas, strict=True)
                if area
            ),
            default=0.0,
        )
        if not covered and hidden <= _HIDDEN_SHARE:
            return left, top
        if (covered, hidden) < least:
            best, least = (left, top), (covered, hidden)
    return best


def _places(mask: np.ndarray, label: tuple[int, int], canvas: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Places for a label, clipped to the canvas: over and under its mask, at its top inside, at its sides, then rows up
    and down from it, then everywhere.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    width, height = label
    right_end, bottom_end = max(0, canvas[0] - width), max(0, canvas[1] - height)
    first, last, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    across = ((left + right - width) // 2, left, right - width)
    beside = ((left - width, (first + last - height) // 2), (right, (first + last - height) // 2))
    near = [first, *range(first, bottom_end, height), *range(first - height, 0, -height)]
    everywhere = product(range(0, right_end + 1, max(1, width // 2)), range(0, bottom_end + 1, height))
    for x, y in chain(
        ((x, y) for y in (first - height, last) for x in across),
        ((x, first) for x in across),
        beside,
        ((x, y) for y in near for x in across),
        everywhere,
    ):
        yield min(max(0, x), right_end), min(max(0, y), bottom_end)
