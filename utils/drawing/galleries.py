"""Galleries: many answers on one sheet, each with its image, its truth and its prediction.

Axes: Q masks, H W pixels of the image. Images are uint8 RGB (H, W, 3), masks bool (Q, H, W).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw

from model.overlay import draw_overlay, label_font, to_printable

_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), (110, 110, 110)
_PADDING = 3


@dataclass(frozen=True)
class GalleryItem:
    """One question of a gallery: its image, the true masks with their names, and what was answered.

    image: uint8 (H, W, 3); true_masks, masks: bool (Q, H, W). note: one short line, such as a score.
    """

    question: str
    image: np.ndarray
    true_masks: np.ndarray
    true_names: Sequence[str]
    answer: str
    masks: np.ndarray
    phrases: Sequence[str]
    note: str = ""


def draw_gallery(items: Sequence[GalleryItem], *, columns: int = 2, tile: int = 224) -> np.ndarray:
    """A sheet of answers: for each the question, then image, truth and prediction side by side, then the answer.

    columns: items side by side. tile: side in pixels of the square every image is fitted into. Returns uint8 RGB;
    ValueError without items.
    """
    if not items:
        raise ValueError("a gallery of no answers was asked for; give at least one")
    cards = [_draw_card(item, tile) for item in items]
    height, width = max(card.shape[0] for card in cards), cards[0].shape[1]
    used = min(columns, len(cards))
    sheet = np.full((-(-len(cards) // used) * height, used * width, 3), _WHITE, dtype=np.uint8)
    for number, card in enumerate(cards):
        top, left = number // used * height, number % used * width
        sheet[top : top + card.shape[0], left : left + width] = card
    return sheet


def _fit_tile(image: np.ndarray, masks: np.ndarray, phrases: Sequence[str], side: int) -> np.ndarray:
    """An image and its masks in a white square of `side`, centred; drawn at that size, so that labels stay legible."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    small_masks = [cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for m in masks]
    drawn = draw_overlay(
        small, np.array(small_masks, dtype=bool).reshape(len(masks), *small.shape[:2]), phrases, min_side=1
    )
    drawn = drawn[:side, :side]
    square = np.full((side, side, 3), _WHITE, dtype=np.uint8)
    top, left = (side - drawn.shape[0]) // 2, (side - drawn.shape[1]) // 2
    square[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return square


def _draw_card(item: GalleryItem, tile: int) -> np.ndarray:
    """One gallery item as an image of 3 tiles' width; all cards are equally wide."""
    gap, size = 2 * _PADDING, 13
    font, line = label_font(size), size + 4
    width = 3 * tile + 4 * gap
    letters = max(8, int((width - 2 * gap) / font.getlength("n")))
    above = textwrap.wrap(f"Q: {to_printable(item.question)}", letters) or [""]
    answered = f"A: {to_printable(item.answer)}" + (f"   [{to_printable(item.note)}]" if item.note else "")
    below = textwrap.wrap(answered, letters) or [""]
    height = (len(above) + len(below) + 1) * line + tile + 5 * gap
    image = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(image)
    for number, text in enumerate(above):
        draw.text((gap, gap + number * line), text, fill=_BLACK, font=font)
    top = gap + len(above) * line
    tiles = (
        ("image", item.masks[:0], ()),
        ("truth", item.true_masks, item.true_names),
        ("prediction", item.masks, item.phrases),
    )
    for number, (title, masks, phrases) in enumerate(tiles):
        left = gap + number * (tile + gap)
        draw.text((left, top), title, fill=_GREY, font=font)
        image.paste(Image.fromarray(_fit_tile(item.image, masks, phrases, tile)), (left, top + line))
    for number, text in enumerate(below):
        draw.text((gap, top + line + tile + gap + number * line), text, fill=_BLACK, font=font)
    draw.line((0, height - 1, width, height - 1), fill=(200, 200, 200))
    return np.asarray(image)
