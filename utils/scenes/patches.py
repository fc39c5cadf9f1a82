"""What each patch of a scene shows, as numbers: what a vision tower learns first."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .drawing import Scene, Shape, scene_masks
from .words import (
    COLOURS,
    COLUMNS,
    FORMS,
    NEXT_COLOUR,
    NEXT_FORM,
    OF_COLOUR,
    OF_FORM,
    ORDER_OF_COLOUR,
    ORDER_OF_FORM,
    ROWS,
    SIZES,
)

NOTHING, NOT_ASKED = "nothing", -1
# The word lists that `patch_words` numbers, by kind; each begins with the word for what is not there.
PATCH_WORDS = MappingProxyType(
    {
        kind: (NOTHING, *words)
        for kind, words in (
            *(("colour", COLOURS), ("form", FORMS), ("size", SIZES)),
            *(("order_of_colour", ORDER_OF_COLOUR), ("order_of_form", ORDER_OF_FORM)),
            *(("of_colour", OF_COLOUR), ("of_form", OF_FORM)),
            *(("next_form", NEXT_FORM), ("next_colour", NEXT_COLOUR)),
            *(("column", COLUMNS), ("row", ROWS)),
        )
    }
)
# The kinds that a centre may have nothing of; and those that are to be seen early, in which hidden state of the tiny
# tower: what shapes are before they are put in order, their order before they are counted.
HOW_ASKED: Mapping[str, Any] = MappingProxyType(
    {
        "may_lack": ("next_form", "next_colour"),
        "early": {"colour": 3, "form": 3, "size": 3, "order_of_colour": 4, "order_of_form": 4},
    }
)
# A patch shows a shape that covers at least this share of it.
_COVERED = 0.15


def patch_words(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(11, patches) in row-major order: for each patch the number of its word in each list of `PATCH_WORDS`, 0 for
    nothing, -1 where it is not asked.

    Every patch of a shape bears its colour and form. The rest is said once, where its centre is: its size, where it
    stands among those like it, how many these are and which of them comes next, and its place. Who compares, counts or
    lists shapes will find one patch for each, and there whether the list goes on.

    Args:
        patch: side of a patch in pixels; must divide the scene's side, else ValueError.
    """
    if scene.side % patch:
        raise ValueError(f"patches of {patch} pixels do not tile a picture of {scene.side}: give a divisor")
    grid = scene.side // patch
    words = np.full((len(PATCH_WORDS), grid, grid), NOT_ASKED, dtype=np.int64)
    words[0] = 0
    colours, forms = list(COLOURS), list(FORMS)
    covered = scene_masks(scene).reshape(len(scene.shapes), grid, patch, grid, patch).mean(axis=(2, 4))
    for number, shape in enumerate(scene.shapes):
        centre = int(shape.centre_y) // patch, int(shape.centre_x) // patch
        covered[number][centre] = 1.0
        shown = (covered[number] >= _COVERED) & (covered[number] >= covered.max(axis=0))
        words[:2, shown] = [[1 + colours.index(shape.colour)], [1 + forms.index(shape.form)]]
        said = shape.size, *_among_alike(scene, shape), *scene.place(shape)
        lists = list(PATCH_WORDS.values())[2:]
        words[2:, centre[0], centre[1]] = [names.index(word) for names, word in zip(lists, said, strict=True)]
    return words.reshape(len(PATCH_WORDS), -1)


def _among_alike(scene: Scene, shape: Shape) -> tuple[str, ...]:
    """Where a shape stands among those of its colour and of its form, how many these are, and what comes next."""
    alike = (
        [other for other in scene.shapes if other.colour == shape.colour],
        [other for other in scene.shapes if other.form == shape.form],
    )
    of_colour, of_form = (
        order[(group[0] is not shape) + 2 * (group[-1] is not shape)]
        for order, group in zip((ORDER_OF_COLOUR, ORDER_OF_FORM), alike, strict=True)
    )
    so_many = (words[min(len(group), len(words)) - 1] for words, group in zip((OF_COLOUR, OF_FORM), alike, strict=True))
    same_colour, same_form = (group[group.index(shape) + 1 :] for group in alike)
    next_form = NEXT_FORM[list(FORMS).index(same_colour[0].form)] if same_colour else NOTHING
    next_colour = NEXT_COLOUR[list(COLOURS).index(same_form[0].colour)] if same_form else NOTHING
    return of_colour, of_form, *so_many, next_form, next_colour
