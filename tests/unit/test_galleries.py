"""Galleries: a grid of equal cells, truths and predictions in their colours."""

import numpy as np
import pytest

from model.overlay import target_colour
from utils.drawing import galleries


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def item(height: int, width: int, masks: int, question: str = "Where is it?") -> galleries.GalleryItem:
    full = np.ones((masks, height, width), dtype=bool)
    names = [f"thing {number}" for number in range(masks)]
    return galleries.GalleryItem(
        question, grey(height, width), full, names, "It is here.", full[:1], names[:1], "IoU 1"
    )


def test_gallery_is_a_grid_of_equal_cells() -> None:
    items = [item(30, 40, 1), item(1, 1, 2), item(700, 20, 0), item(40, 30, 1, "long question " * 20), item(5, 900, 3)]
    two, one = galleries.draw_gallery(items, columns=2, tile=120), galleries.draw_gallery(items, columns=1, tile=120)
    assert two.shape[1] == 2 * one.shape[1]
    assert two.shape[0] * 5 == one.shape[0] * 3
    assert (two != 255).any()


def test_gallery_shows_truth_and_prediction_in_their_colours() -> None:
    truth_only = galleries.draw_gallery([item(50, 50, 2)])
    assert all((truth_only == target_colour(index)).all(axis=-1).any() for index in (0, 1))


def test_gallery_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        galleries.draw_gallery([])
