"""What each patch of a scene shows, as numbers: what a vision tower learns first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .drawing import Scene, scene_masks
from .words import COLOURS, FORMS

# For each kind of word how many there are, background included: colours, forms.
PATCH_CLASSES = (1 + len(COLOURS), 1 + len(FORMS))
# A patch shows a shape that covers at least this share of it.
_COVERED = 0.15


def patch_words(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(2, patches) in row-major order: number of the colour and of the form a patch shows, from 1; 0 is background.

    Args:
        patch: side of a patch in pixels; must divide the scene's side, else ValueError.
    """
    if scene.side % patch:
        raise ValueError(f"patches of {patch} pixels do not tile a picture of {scene.side}: give a divisor")
    grid = scene.side // patch
    words = np.zeros((2, grid, grid), dtype=np.int64)
    colours, forms = list(COLOURS), list(FORMS)
    for shape, mask in zip(scene.shapes, scene_masks(scene), strict=True):
        covered = mask.reshape(grid, patch, grid, patch).mean(axis=(1, 3))
        words[0][covered >= _COVERED] = 1 + colours.index(shape.colour)
        words[1][covered >= _COVERED] = 1 + forms.index(shape.form)
    return words.reshape(2, -1)
