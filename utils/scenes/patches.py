"""What each patch of a scene shows, as numbers: what a vision tower learns first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .conversations import cell_words
from .drawing import Scene, scene_masks
from .words import COLOURS, FORMS

NOTHING = "nothing"
# A patch shows a shape that covers at least this share of it.
_COVERED = 0.15


def patch_vocabulary(grid: int) -> list[list[str]]:
    """The words for a patch, one list for each kind: colours and forms (the first for background), places."""
    places = [cell_words(row, column) for row in range(1, grid + 1) for column in range(1, grid + 1)]
    return [[NOTHING, *COLOURS], [NOTHING, *FORMS], places]


def patch_words(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(3, patches) in row-major order: for each patch the number of its word in each list of `patch_vocabulary`.

    Args:
        patch: side of a patch in pixels; must divide the scene's side, else ValueError.
    """
    if scene.side % patch:
        raise ValueError(f"patches of {patch} pixels do not tile a picture of {scene.side}: give a divisor")
    grid = scene.side // patch
    words = np.zeros((3, grid, grid), dtype=np.int64)
    words[2] = np.arange(grid * grid).reshape(grid, grid)
    colours, forms = list(COLOURS), list(FORMS)
    for shape, mask in zip(scene.shapes, scene_masks(scene), strict=True):
        covered = mask.reshape(grid, patch, grid, patch).mean(axis=(1, 3)) >= _COVERED
        words[0][covered] = 1 + colours.index(shape.colour)
        words[1][covered] = 1 + forms.index(shape.form)
    return words.reshape(3, -1)
