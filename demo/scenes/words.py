"""The closed vocabulary of the scenes: colours, forms, sizes, directions, and how they are put into words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from utils.data.templates import NUMBERS

# Name -> (red, green, blue), 0..255. Far apart from each other and from the greys of the background.
COLOURS = MappingProxyType(
    {
        "red": (214, 40, 40),
        "green": (46, 160, 67),
        "blue": (38, 84, 214),
        "yellow": (242, 206, 34),
        "purple": (140, 50, 170),
        "orange": (242, 124, 22),
    }
)
# Singular -> plural.
FORMS = MappingProxyType(
    {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
)
PLURALS = MappingProxyType({plural: form for form, plural in FORMS.items()})
SIZES = ("small", "medium", "large")
TIMES = MappingProxyType({1: "once", 2: "twice", 3: "three times", 4: "four times", 5: "five times", 6: "six times"})
# Places along the image's width and height, from the top left.
COLUMNS = tuple(f"c{number}" for number in range(1, 15))
ROWS = tuple(f"r{number}" for number in range(1, 15))
# How many shapes of a scene share a shape's colour, or its form, itself included, and how many there are; the last one
# stands for more, too.
OF_COLOUR = tuple(f"k{number}" for number in range(1, 6))
OF_FORM = tuple(f"f{number}" for number in range(1, 6))
OF_ALL = tuple(f"n{number}" for number in range(1, 7))
# Which of them say what number of shapes.
COUNTED = MappingProxyType(
    {word: number for words in (OF_COLOUR, OF_FORM) for word, number in zip(words, NUMBERS[1:], strict=False)}
)
# Where a shape stands, from left to right, among those of its colour, or of its form.
ORDER = ("only", "last", "first", "between")
# Word -> (to the right, down). What comes next in a list is to the right of what was named last.
DIRECTIONS = MappingProxyType({"left": (-1.0, 0.0), "right": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)})
LIST_WORDS = MappingProxyType({"and": (0.5, 0.0)})
# Word -> which extreme of size: 1 for the largest, -1 for the smallest.
EXTREMES = MappingProxyType({"largest": 1.0, "biggest": 1.0, "smallest": -1.0, "tiniest": -1.0})
# What words of questions and answers mean, beside the names of colours, forms and places.
MEANINGS: Mapping[str, Any] = MappingProxyType(
    {"plurals": PLURALS, "sizes": EXTREMES, "directions": {**DIRECTIONS, **LIST_WORDS}, "numbers": COUNTED}
)

_SHAPE_NAME = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(FORMS)})\b")
_COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b")
_FORM_WORD = re.compile(rf"\b({'|'.join(FORMS)})\b")


def category_names() -> list[str]:
    """Every "colour form" there is, in the fixed order that numbers the categories (the first one is category 1)."""
    return [f"{colour} {form}" for colour in COLOURS for form in FORMS]


def join_list(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def capital(sentence: str) -> str:
    """With a capital first letter."""
    return sentence[:1].upper() + sentence[1:]


def named_shape(phrase: str) -> str | None:
    """The "colour form" a phrase ends in, or None where it names none.

    A phrase may name other shapes before it ("the shape left of the blue star is the red circle"): the last one counts.
    "the circle that is red" is understood too.
    """
    names = _SHAPE_NAME.findall(phrase)
    if names:
        return " ".join(names[-1])
    colours, forms = _COLOUR_WORD.findall(phrase), _FORM_WORD.findall(phrase)
    return f"{colours[-1]} {forms[-1]}" if colours and forms else None
