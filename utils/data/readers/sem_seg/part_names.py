"""Category names of part annotations in the words a person uses: "cow:lfleg" is "left front leg of the cow".

A category is a thing ("cow") or a part of one ("cow:lfleg"). Categories that come out alike are one class: the data
number the wheels of a car ("car:wheel_1", "car:wheel_2"), people do not.
"""

import re
from collections.abc import Mapping

_PARTED = ":"

_PASCAL_THINGS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "monitor"}

# Sides of a vehicle; those of a train's head and coaches have an h or a c in front.
_SIDES = {
    "frontside": "front side",
    "leftside": "left side",
    "rightside": "right side",
    "backside": "back side",
    "roofside": "roof",
}
_TRAIN_SECTIONS = {"h": "head", "c": "coach"}
_PASCAL_PARTS = {
    **_SIDES,
    **{
        letter + side: f"{words} of the {section}"
        for letter, section in _TRAIN_SECTIONS.items()
        for side, words in _SIDES.items()
    },
    "leftmirror": "left mirror",
    "rightmirror": "right mirror",
    "fliplate": "front license plate",
    "bliplate": "back license plate",
    "fwheel": "front wheel",
    "bwheel": "back wheel",
    "chainwheel": "chain wheel",
}
# Of bodies: a side, then front or back, then upper or lower, then the part itself. "rear" is a right ear.
_LIMBS = {
    "eye": "eye",
    "ear": "ear",
    "ebrow": "eyebrow",
    "horn": "horn",
    "wing": "wing",
    "arm": "arm",
    "hand": "hand",
    "leg": "leg",
    "foot": "foot",
    "pa": "paw",
    "ho": "hoof",
}
_LIMB = re.compile(f"([lr])([fb]?)([ul]?)({'|'.join(_LIMBS)})")
_LIMB_SIDE = {"l": "left", "r": "right"}
_LIMB_END = {"": "", "f": "front ", "b": "back "}
_LIMB_HEIGHT = {"": "", "u": "upper ", "l": "lower "}

_QUALIFIER = re.compile(r"_\((.*)\)$")
_PARTIMAGENET_PARTS = {"tier": "tire"}


def pascal_part_names(categories: Mapping[int, str]) -> dict[int, str]:
    """Names by category id, from Pascal-Part's abbreviations; what is written out already is left so."""
    return {number: _pascal_name(raw) for number, raw in categories.items()}


def paco_names(categories: Mapping[int, str]) -> dict[int, str]:
    """Names by category id, from LVIS's "mouse_(computer_equipment)" and PACO's "bench:table_top".

    What stands in brackets tells things of one name apart and is left out where there is only one.
    """
    things = {raw.partition(_PARTED)[0] for raw in categories.values()}
    plain = [_QUALIFIER.sub("", thing) for thing in things]
    alone = {thing for thing in things if plain.count(_QUALIFIER.sub("", thing)) == 1}
    names = {}
    for number, raw in categories.items():
        thing, _, part = raw.partition(_PARTED)
        kept = _QUALIFIER.sub("", thing) if thing in alone else thing
        names[number] = _named(_spaced(kept), _spaced(_QUALIFIER.sub("", part)))
    return names


def partimagenet_names(categories: Mapping[int, str]) -> dict[int, str]:
    """Names by category id, from PartImageNet's "Quadruped Head" or "Quadruped:Head"; its tires are called "Tier"."""
    names = {}
    for number, raw in categories.items():
        thing, _, part = raw.lower().replace(_PARTED, " ").partition(" ")
        names[number] = _named(_spaced(thing), _PARTIMAGENET_PARTS.get(part, _spaced(part)))
    return names


def _pascal_name(raw: str) -> str:
    thing, _, part = raw.lower().partition(_PARTED)
    return _named(_PASCAL_THINGS.get(thing, _spaced(thing)), _pascal_part(part))


def _pascal_part(part: str) -> str:
    plain = re.sub(r"_\d+$", "", part)
    limb = _LIMB.fullmatch(plain)
    if limb is None:
        return _PASCAL_PARTS.get(plain, _spaced(plain))
    side, end, height, name = limb.groups()
    return f"{_LIMB_SIDE[side]} {_LIMB_END[end]}{_LIMB_HEIGHT[height]}{_LIMBS[name]}"


def _named(thing: str, part: str) -> str:
    return f"{part} of the {thing}" if part else thing


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").split())
