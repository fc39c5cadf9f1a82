"""What each patch of a scene shows, as numbers: what a vision tower learns first."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .drawing import Scene, scene_masks
from .words import COLOURS, COLUMNS, FORMS, OF_ALL, OF_COLOUR, OF_FORM, ROWS, SIZES

NOTHING = "nothing"
# The word lists that `patch_words` numbers, by kind; each begins with the word for what is not there.
PATCH_WORDS = MappingProxyType(
    {
        kind: (NOTHING, *words)
        for kind, words in (
            *(("colour", COLOURS), ("form", FORMS), ("size", SIZES)),
            *(("of_colour", OF_COLOUR), ("of_form", OF_FORM), ("of_all", OF_ALL)),
            *(("column", COLUMNS), ("row", ROWS)),
        )
    }
)
# A patch shows a shape that covers at least this share of it.
_COVERED = 0.15


def patch_words(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(8, patches) in row-major order: for each patch the number of its word in each list of `PATCH_WORDS`.

    Every patch of a shape bears its colour and form. The rest is said once, where its centre is: its size, how many
    shapes are like it, and its place. Who compares or orders shapes will find one patch for each; who counts, the
    number.

    Args:
        patch: side of a patch in pixels; must divide the scene's side, else ValueError.
    """
    if scene.side % patch:
        raise ValueError(f"patches of {patch} pixels do not tile a picture of {scene.side}: give a divisor")
    grid = scene.side // patch
    words = np.zeros((len(PATCH_WORDS), grid, grid), dtype=np.int64)
    colours, forms = list(COLOURS), list(FORMS)
    covered = scene_masks(scene).reshape(len(scene.shapes), grid, patch, grid, patch).mean(axis=(2, 4))
    for number, shape in enumerate(scene.shapes):
        centre = int(shape.centre_y) // patch, int(shape.centre_x) // patch
        covered[number][centre] = 1.0
        shown = (covered[number] >= _COVERED) & (covered[number] >= covered.max(axis=0))
        words[:2, shown] = [[1 + colours.index(shape.colour)], [1 + forms.index(shape.form)]]
        of_colour = _so_many(OF_COLOUR, sum(other.colour == shape.colour for other in scene.shapes))
        of_form = _so_many(OF_FORM, sum(other.form == shape.form for other in scene.shapes))
        said = shape.size, of_colour, of_form, _so_many(OF_ALL, len(scene.shapes)), *scene.place(shape)
        lists = list(PATCH_WORDS.values())[2:]
        words[2:, centre[0], centre[1]] = [names.index(word) for names, word in zip(lists, said, strict=True)]
    return words.reshape(len(PATCH_WORDS), -1)


def _so_many(words: Sequence[str], count: int) -> str:
    return words[min(count, len(words)) - 1]
