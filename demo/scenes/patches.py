"""What each patch of a scene shows, as numbers: what a vision tower learns first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.scenes.drawing import Scene, Shape, scene_masks
from demo.scenes.words import COLOURS, COLUMNS, FORMS, OF_ALL, OF_COLOUR, OF_FORM, ORDER, ROWS, SIZES

NOTHING = "nothing"
# The word lists that `patch_words` numbers first, by kind; each begins with the word for what is not there.
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
# What it numbers after these: no words of image tokens, but steps on the way to counting. Where a shape stands among
# those alike, and what the next of its colour, or of its form, is like.
HINTS = MappingProxyType(
    {
        **dict.fromkeys(("order_of_colour", "order_of_form"), (NOTHING, *ORDER)),
        "next_of_colour": (NOTHING, *FORMS),
        "next_of_form": (NOTHING, *COLOURS),
    }
)
# How many layers before the one whose states become tokens what is to be known: what shapes are before they are put in
# order, and their order before they are gone through and counted.
SEEN_EARLY = MappingProxyType(
    {
        **dict.fromkeys(("colour", "form", "size"), 2),
        **dict.fromkeys(("order_of_colour", "order_of_form"), 1),
        **dict.fromkeys(("next_of_colour", "next_of_form"), 0),
    }
)
# All that a tower is taught about patches.
PRETRAINING_TARGETS: Mapping[str, Any] = MappingProxyType({"words": PATCH_WORDS, "hints": HINTS, "early": SEEN_EARLY})
# A patch shows a shape that covers at least this share of it.
_COVERED = 0.15


def patch_words(scene: Scene, patch: int) -> NDArray[np.int64]:
    """(12, patches) in row-major order: for each patch the number of its word in each list of `PATCH_WORDS`, then of
    `HINTS`.

    Every patch of a shape bears its colour and form. The rest is said once, where its centre is: its size, how many
    shapes are like it, and its place. Who compares or orders shapes will find one patch for each; who counts, the
    number.

    Args:
        patch: side of a patch in pixels; must divide the scene's side, else ValueError.
    """
    if scene.side % patch:
        raise ValueError(f"patches of {patch} pixels do not tile an image of {scene.side}: give a divisor")
    grid = scene.side // patch
    lists = [*PATCH_WORDS.values(), *HINTS.values()]
    words = np.zeros((len(lists), grid, grid), dtype=np.int64)
    colours, forms = list(COLOURS), list(FORMS)
    covered = scene_masks(scene).reshape(len(scene.shapes), grid, patch, grid, patch).mean(axis=(2, 4))
    for number, shape in enumerate(scene.shapes):
        centre = int(shape.centre_y) // patch, int(shape.centre_x) // patch
        covered[number][centre] = 1.0
        shown = (covered[number] >= _COVERED) & (covered[number] >= covered.max(axis=0))
        words[:2, shown] = [[1 + colours.index(shape.colour)], [1 + forms.index(shape.form)]]
        of_colour = [other for other in scene.shapes if other.colour == shape.colour]
        of_form = [other for other in scene.shapes if other.form == shape.form]
        groups = (OF_COLOUR, of_colour), (OF_FORM, of_form), (OF_ALL, scene.shapes)
        numbers = [names[min(len(group), len(names)) - 1] for names, group in groups]
        order = _order(shape, of_colour), _order(shape, of_form)
        after = [group[group.index(shape) + 1 :] for group in (of_colour, of_form)]
        following = after[0][0].form if after[0] else NOTHING, after[1][0].colour if after[1] else NOTHING
        said = shape.size, *numbers, *scene.place(shape), *order, *following
        words[2:, centre[0], centre[1]] = [names.index(word) for names, word in zip(lists[2:], said, strict=True)]
    return words.reshape(len(lists), -1)


def _order(shape: Shape, alike: Sequence[Shape]) -> str:
    """Where a shape stands among those alike, itself included, which are sorted from left to right."""
    return ORDER[(alike[0] is not shape) + 2 * (alike[-1] is not shape)]
