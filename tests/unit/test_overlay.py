"""Drawn answers: colours, outlines, labels and galleries, down to one pixel."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from model import overlay

GREY = 200


def image(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def box(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def has_colour(drawn: np.ndarray, colour: overlay.Colour) -> bool:
    return bool((drawn == np.array(colour)).all(axis=-1).any())


def test_without_masks_the_image_stays_as_it_is() -> None:
    original = image(400, 500)
    drawn = overlay.draw_overlay(original, np.zeros((0, 400, 500), dtype=bool))
    assert np.array_equal(drawn, original)
    assert drawn is not original


def test_inside_a_mask_the_colours_mix_and_outside_nothing_changes() -> None:
    mask = box(400, 500, 100, 300, 100, 300)
    original = image(400, 500)
    drawn = overlay.draw_overlay(original, mask[None])
    colour = overlay.target_colour(0)
    strength = overlay._FILL_STRENGTH
    assert drawn[200, 200].tolist() == [round((1 - strength) * GREY + strength * channel) for channel in colour]
    assert has_colour(drawn, colour)
    assert (drawn[:90] == GREY).all() and (drawn[:, 310:] == GREY).all()
    assert (original == GREY).all()


def test_every_target_has_its_own_colour_in_outline_and_label() -> None:
    masks = np.stack([box(400, 500, 50 * n, 50 * n + 30, 60 * n, 60 * n + 40) for n in range(len(overlay.PALETTE))])
    drawn = overlay.draw_overlay(image(400, 500), masks, [f"thing {n}" for n in range(len(masks))])
    assert len(set(overlay.PALETTE)) == len(overlay.PALETTE)
    assert all(has_colour(drawn, overlay.target_colour(number)) for number in range(len(masks)))
    assert overlay.target_colour(len(overlay.PALETTE)) == overlay.target_colour(0)


@pytest.mark.parametrize(
    ("size", "drawn_size"),
    [
        ((1, 1), (384, 384)),
        ((112, 112), (448, 448)),
        ((384, 10), (384, 96)),
        ((1, 400), (24, 400)),
        ((400, 1), (400, 96)),
    ],
)
def test_small_images_are_enlarged_and_thin_ones_get_room(size: tuple[int, int], drawn_size: tuple[int, int]) -> None:
    drawn = overlay.draw_overlay(image(*size), np.ones((2, *size), dtype=bool), ["a thing", "another thing"])
    assert drawn.shape == (*drawn_size, 3)
    assert drawn.dtype == np.uint8


@pytest.mark.parametrize("corner", [(0, 0), (0, 380), (280, 0), (280, 380)])
@pytest.mark.parametrize("text", ["x", "a phrase of some length", "words " * 60])
def test_labels_stay_inside_the_image(corner: tuple[int, int], text: str) -> None:
    top, left = corner
    mask = box(300, 400, top, top + 20, left, left + 20)
    before = overlay.draw_overlay(image(300, 400), mask[None])
    after = overlay.draw_overlay(image(300, 400), mask[None], [text])
    rows, columns = np.nonzero((before != after).any(axis=-1))
    label = after[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    # All four corners of the label are its background: no side of it was cut off by the image's edge.
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert tuple(label[row, column]) == overlay.target_colour(0)


def test_labels_do_not_cover_each_other_while_there_is_room() -> None:
    masks = np.repeat(box(400, 400, 180, 220, 180, 220)[None], 4, axis=0)
    taken: list[tuple[int, int, int, int]] = []
    for mask in masks:
        left, top = overlay._find_place(mask, (120, 21), (400, 400), taken)
        taken.append((left, top, left + 120, top + 21))
    for number, (left, top, right, bottom) in enumerate(taken):
        assert min(left, top) >= 0 and max(right, bottom) <= 400
        for other_left, other_top, other_right, other_bottom in taken[:number]:
            assert left >= other_right or other_left >= right or top >= other_bottom or other_top >= bottom


def test_an_empty_mask_has_no_label() -> None:
    empty = np.zeros((1, 400, 400), dtype=bool)
    assert np.array_equal(overlay.draw_overlay(image(400, 400), empty, ["nothing"]), image(400, 400))


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "\x00", "", "日本語", "a" * 500])
def test_odd_phrases_are_drawn_all_the_same(text: str) -> None:
    drawn = overlay.draw_overlay(image(50, 50), np.ones((1, 50, 50), dtype=bool), [text])
    assert drawn.shape == (400, 400, 3)


def test_printable_has_no_control_characters() -> None:
    assert overlay.to_printable(" a\x1b[31m\n b\t\x07 ") == "a [31m b"


def test_text_is_black_on_light_and_white_on_dark() -> None:
    assert overlay.text_colour((240, 228, 66)) == (0, 0, 0)
    assert overlay.text_colour((0, 114, 178)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image_given", "masks", "said"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((0, 4, 4), bool), "an image to draw on is uint8"),
        (np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 4), bool), "an image to draw on is float32"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 5), bool), "expected bool"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4), np.uint8), "masks to draw are uint8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(image_given: np.ndarray, masks: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        overlay.draw_overlay(image_given, masks)


def hidden_shares(masks: np.ndarray, phrases: list[str]) -> list[float]:
    """What share of each mask a label lies on."""
    grey = image(*masks.shape[1:])
    covered = (overlay.draw_overlay(grey, masks) != overlay.draw_overlay(grey, masks, phrases)).any(axis=-1)
    return [float((covered & mask).sum() / mask.sum()) for mask in masks]


def test_labels_hide_neither_small_masks_nor_those_of_others() -> None:
    # A thing of 10 x 10 pixels, smaller than any label; two beside it where labels would go; one that fills most.
    masks = np.stack(
        [
            box(400, 400, 200, 210, 200, 210),
            box(400, 400, 165, 195, 150, 260),
            box(400, 400, 215, 245, 150, 260),
            box(400, 400, 260, 400, 0, 400),
        ]
    )
    assert max(hidden_shares(masks, ["the tiny thing", "one over it", "one under it", "the ground"])) <= 0.12 + 0.01


def test_thirty_four_labels_do_not_cover_each_other() -> None:
    masks = np.stack([box(900, 900, 20 + 24 * n, 40 + 24 * n, 440, 460) for n in range(34)])
    taken: list[overlay.Rectangle] = []
    for mask in masks:
        left, top = overlay._find_place(mask, (120, 26), (900, 900), taken, list(masks))
        assert all(left >= x1 or x0 >= left + 120 or top >= y1 or y0 >= top + 26 for x0, y0, x1, y1 in taken)
        assert not (masks[:, top : top + 26, left : left + 120]).any()
        taken.append((left, top, left + 120, top + 26))


def test_a_line_leads_to_a_mask_whose_label_had_to_leave() -> None:
    mask = box(100, 200, 50, 60, 10, 20)
    for label, drawn in [((20, 45, 80, 65), False), ((20, 60, 80, 80), False), ((120, 45, 180, 65), True)]:
        image = Image.new("RGB", (200, 100), (GREY,) * 3)
        overlay._draw_leader(ImageDraw.Draw(image), mask, label, (1, 2, 3))
        line = (np.asarray(image) == (1, 2, 3)).all(axis=-1)
        assert line.any() == drawn
        # From the middle of the label, x = 150, to the mask's nearest column, 19, on its rows.
        assert not drawn or (line[45:65, 19:150].any(axis=0).all() and not line[:, :18].any())


def test_places_for_labels_are_inside() -> None:
    for mask in (box(100, 200, 0, 1, 0, 1), box(100, 200, 99, 100, 199, 200), box(100, 200, 0, 100, 0, 200)):
        for left, top in overlay._places(mask, (90, 21), (200, 100)):
            assert 0 <= left <= 110 and 0 <= top <= 79
