"""What can be asked about a scene, and how it is put into words.

`find_asks` lists every fact of a scene worth asking about; an `Ask` becomes a question and an answer in one of several
wordings. Every condition that keeps a question honest (a distractor, no doubt which shape is meant) is here.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from demo.scenes.drawing import Scene, Shape
from demo.scenes.words import COLOURS, FORMS, TIMES
from model.structures import SEG_MARKER
from utils.data.templates import NUMBERS

# The largest (smallest) shape has at least this many times the area of the next one, wherever it is asked for.
SIZE_RATIO = 1.3
# Relations: the meant shape lies within _NARROW (across / along) of the direction; another one within _WIDE of it must
# be at least _FARTHER times as far away.
_NARROW, _WIDE, _FARTHER = 0.6, 1.25, 1.4
_MOST_EXCLUSION_TARGETS = 3
_MANY = 3
_MOST_TIMES = 3  # how often the colour or form of a count question occurs at most

# kind -> its families
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "direct": ("name",),
    "several": ("form", "colour", "pair", "double"),
    "reasoning": ("relation", "size", "count", "exclusion"),
    "no_target": ("absent_name", "absent_half", "absent_colour", "absent_form"),
}

# Referring expressions: what the refer files hold. Their answers are the readers' business.
_NAME = (
    "the {colour} {form}",
    "the {colour} {form}",
    "{colour} {form}",
    "the {form} that is {colour}",
    "the {form} in {colour}",
)
_FORM_GROUP = (
    "all the {forms}",
    "all {forms}",
    "every {form}",
    "the {forms}",
    "each {form}",
    "all shapes that are {forms}",
)
_COLOUR_GROUP = (
    "everything {colour}",
    "all the {colour} shapes",
    "every {colour} shape",
    "the {colour} shapes",
    "each {colour} shape",
    "all shapes that are {colour}",
)
_DOUBLE = ("all the {colour} {forms}", "the {colour} {forms}", "every {colour} {form}", "all {forms} that are {colour}")
_PAIR = (
    "the {first} and the {second}",
    "the {second} and the {first}",
    "{first} and {second}",
    "{second} and {first}",
    "both the {first} and the {second}",
)

# Questions to be reasoned about, each with the answer that goes with it: who reads the question knows how the answer
# begins. An answer shows its steps: what was asked, where that leads, what is there.
_RELATION = {
    "Which shape is directly {where} the {reference}?": "The {reference} {start}, {direction} {found}.",
    "What is directly {where} the {reference}?": "From the {reference} {start}, {direction} {found}.",
    "Find the shape directly {where} the {reference}.": "Found the {reference} {start}, {direction} {found}.",
    "Which shape comes first {where} the {reference}?": "After the {reference} {start}, {direction} {found}.",
    "What is the nearest shape {where} the {reference}?": "Near the {reference} {start}, {direction} {found}.",
}
_WHERE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_SIZE = {
    "Which {thing} is the {extreme}?": "The {extreme} {thing}: {found}.",
    "What is the {extreme} {thing}?": "Here is the {extreme} {thing}: {found}.",
    "Find the {extreme} {thing}.": "Found the {extreme} {thing}: {found}.",
    "Which is the {extreme} {thing} in the picture?": "In the picture the {extreme} {thing}: {found}.",
    "Show me the {extreme} {thing}.": "This is the {extreme} {thing}: {found}.",
}
_EXTREME = {"largest": ("largest", "biggest"), "smallest": ("smallest", "tiniest")}
_COUNT = {
    "Which shapes have the {attribute} that occurs exactly {times}?": "Counted {tally}; {number} {value}: {placed}.",
    "Find the shapes of the {attribute} that appears exactly {times}.": "Found {tally}; {number} {value}: {placed}.",
    "One {attribute} occurs {times}: show its shapes.": "Seen {tally}; {number} {value}: {placed}.",
    "Which {attribute} is there exactly {times}? Show all of it.": "There: {tally}; {number} {value}: {placed}.",
}
_EXCEPT = {
    "form": (
        "Find all {forms} except the {colour} {one}.",
        "Which {forms} are not {colour}?",
        "Show every {form} of a colour other than {colour}.",
        "All the {forms} but not the {colour} {one}.",
    ),
    "colour": (
        "Find everything {colour} except the {form_or_forms}.",
        "Which {colour} shapes are not {forms}?",
        "Show every {colour} shape that is not a {form}.",
        "All the {colour} shapes but not the {form_or_forms}.",
    ),
    "neither": (
        "Which shapes are neither {colour} nor {forms}?",
        "Find every shape that is neither {colour} nor a {form}.",
        "Show the shapes that are not {colour} and not {forms}.",
    ),
    "not_colour": (
        "Which shapes are not {colour}?",
        "Find every shape that is not {colour}.",
        "Show everything except the {colour} shapes.",
    ),
    "not_form": (
        "Which shapes are not {forms}?",
        "Find every shape that is not a {form}.",
        "Show everything except the {forms}.",
    ),
}
_EXCEPT_OPENINGS = ("Here", "Only", "Found", "Left over")
_EXCEPT_RESTATED = {
    "form": "{forms} not {colour}",
    "colour": "{colour} shapes not {forms}",
    "neither": "not {colour}, not {forms}",
    "not_colour": "not {colour}",
    "not_form": "not {forms}",
}
# Which shapes each manner of exclusion keeps: (shape, colour, form) -> bool.
_KEEPS: Mapping[str, Callable[[Shape, str, str], bool]] = {
    "form": lambda shape, colour, form: shape.form == form and shape.colour != colour,
    "colour": lambda shape, colour, form: shape.colour == colour and shape.form != form,
    "neither": lambda shape, colour, form: shape.colour != colour and shape.form != form,
    "not_colour": lambda shape, colour, form: shape.colour != colour,
    "not_form": lambda shape, colour, form: shape.form != form,
}


# Which shapes an answer to it goes through, one by one.
_LOOKED_AT: Mapping[str, Callable[[Shape, str, str], bool]] = {
    "form": lambda shape, colour, form: shape.form == form,
    "colour": lambda shape, colour, form: shape.colour == colour,
    "neither": lambda shape, colour, form: True,
    "not_colour": lambda shape, colour, form: True,
    "not_form": lambda shape, colour, form: True,
}

# What an answer says of a shape that it goes through and that is not meant; it denies nothing else.
NOT_MEANT = "skipped"

# What fills a template: words, or several of which one is drawn.
Fields = Mapping[str, str | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Phrased:
    """One wording. `question`: a full question for reasoning, a referring expression ("the red circle") otherwise.

    `answer`: for reasoning, every target named right before its mark; "" for a referring expression.
    """

    question: str
    answer: str


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One fact worth asking about.

    `targets` are indices into scene.shapes, in reading order; so is `looked_at`, what an answer goes through that says
    of each shape whether it is meant. `answers` are empty or go with `questions` one to one.
    Both are templates that take `fields`; a field with several choices is a tuple. Asks are told apart by identity.
    """

    kind: str
    family: str
    targets: tuple[int, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    fields: Fields
    looked_at: tuple[int, ...] = ()

    def phrase(
        self, rng: random.Random, scene: Scene, mark: Callable[[Shape], str] = lambda shape: SEG_MARKER
    ) -> Phrased:
        """Word it. `mark` gives what follows the name of each target: the seg marker, or words that say where it is."""
        fields = {k: v if isinstance(v, str) else rng.choice(v) for k, v in self.fields.items()}
        wording = rng.randrange(len(self.questions))
        question = self.questions[wording].format(**fields)
        if not self.answers:
            return Phrased(question, "")
        shapes = [scene.shapes[i] for i in self.targets]
        named = [f"{shape.name} {mark(shape)}" for shape in shapes]
        placed = [f"{scene.where(shape)} {words}" for shape, words in zip(shapes, named, strict=True)]
        fields |= {"found": placed[0], "placed": " and ".join(placed)}
        verdicts = {i: f"{scene.shapes[i].name} {NOT_MEANT}" for i in self.looked_at}
        verdicts |= dict(zip(self.targets, named, strict=True))
        fields["verdicts"] = ", ".join(f"{scene.place(scene.shapes[i])[0]} {verdicts[i]}" for i in self.looked_at)
        return Phrased(question, self.answers[wording].format(**fields))


def names_of(scene: Scene) -> Counter[str]:
    """How often each "colour form" occurs."""
    return Counter(shape.name for shape in scene.shapes)


def has_distractor(scene: Scene, index: int) -> bool:
    """Whether another shape shares the colour or the form (not both) of this one."""
    shape = scene.shapes[index]
    return any((s.colour == shape.colour) != (s.form == shape.form) for i, s in enumerate(scene.shapes) if i != index)


def _words(colour: str, form: str) -> dict[str, str | tuple[str, ...]]:
    return {"colour": colour, "form": form, "forms": FORMS[form]}


def _reasoning(
    family: str,
    targets: tuple[int, ...],
    wordings: Mapping[str, str],
    fields: Fields,
    looked_at: tuple[int, ...] = (),
) -> Ask:
    return Ask("reasoning", family, targets, tuple(wordings), tuple(wordings.values()), fields, looked_at)


def _ask_direct(scene: Scene) -> list[Ask]:
    counts = names_of(scene)
    return [
        Ask("direct", "name", (i,), _NAME, (), _words(shape.colour, shape.form))
        for i, shape in enumerate(scene.shapes)
        if counts[shape.name] == 1 and has_distractor(scene, i)
    ]


def _number_of(count: int, things: str) -> str:
    """ "both circles" for two, "the three circles" for three to six."""
    return f"both {things}" if count == 2 else f"the {NUMBERS[count]} {things}"


def _ask_several(scene: Scene) -> list[Ask]:
    shapes, counts = scene.shapes, names_of(scene)
    asks, wordings = [], tuple[str, ...]()
    for form, count in Counter(s.form for s in shapes).items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(shapes) if s.form == form)
            wordings = (*_FORM_GROUP, _number_of(count, "{forms}"))
            asks.append(Ask("several", "form", targets, wordings, (), {"form": form, "forms": FORMS[form]}))
    for colour, count in Counter(s.colour for s in shapes).items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(shapes) if s.colour == colour)
            wordings = (*_COLOUR_GROUP, _number_of(count, "{colour} shapes"))
            asks.append(Ask("several", "colour", targets, wordings, (), {"colour": colour}))
    for name, count in counts.items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(shapes) if s.name == name)
            wordings = (*_DOUBLE, _number_of(count, "{colour} {forms}"))
            asks.append(Ask("several", "double", targets, wordings, (), _words(*name.split())))
    single = [i for i, s in enumerate(shapes) if counts[s.name] == 1]
    for i, j in itertools.combinations(single, 2):
        asks.append(Ask("several", "pair", (i, j), _PAIR, (), {"first": shapes[i].name, "second": shapes[j].name}))
    return asks


def _ask_absent(scene: Scene) -> list[Ask]:
    colours, forms, names = {s.colour for s in scene.shapes}, {s.form for s in scene.shapes}, names_of(scene)
    asks = []
    for colour in COLOURS:
        if colour not in colours:
            asks.append(Ask("no_target", "absent_colour", (), _COLOUR_GROUP, (), {"colour": colour}))
        for form in FORMS:
            present = (colour in colours) + (form in forms)
            if present and f"{colour} {form}" not in names:
                family = "absent_name" if present == 2 else "absent_half"
                asks.append(Ask("no_target", family, (), _NAME, (), _words(colour, form)))
    for form in FORMS:
        if form not in forms:
            asks.append(Ask("no_target", "absent_form", (), _FORM_GROUP, (), {"form": form, "forms": FORMS[form]}))
    return asks


def directly(scene: Scene, index: int, direction: str) -> int | None:
    """The shape directly left of, right of, above or below shape `index`; None where there is none or in doubt."""
    here = scene.shapes[index]
    candidates = []
    for j, other in enumerate(scene.shapes):
        dx, dy = other.centre_x - here.centre_x, other.centre_y - here.centre_y
        along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[direction]
        across = abs(dy if direction in ("left", "right") else dx)
        if j != index and along > 0 and across <= _WIDE * along:
            candidates.append((math.hypot(dx, dy), across / along, j))
    if not candidates:
        return None
    candidates.sort()
    distance, skew, nearest = candidates[0]
    if skew > _NARROW or (len(candidates) > 1 and candidates[1][0] < _FARTHER * distance):
        return None
    return nearest


def _ask_relation(scene: Scene) -> list[Ask]:
    counts = names_of(scene)
    asks = []
    for i, shape in enumerate(scene.shapes):
        if counts[shape.name] > 1:
            continue
        for direction, where in _WHERE.items():
            target = directly(scene, i, direction)
            if target is not None:
                fields: Fields = {
                    "where": where,
                    "reference": shape.name,
                    "direction": direction,
                    "start": scene.where(shape),
                }
                asks.append(_reasoning("relation", (target,), _RELATION, fields))
    return asks


def extreme_shape(scene: Scene, indices: list[int], largest: bool) -> int | None:
    """Which of these shapes is the largest (smallest), by SIZE_RATIO in area and by extent too; None if in doubt."""
    ranked = sorted(indices, key=lambda i: scene.shapes[i].area, reverse=largest)
    first, second = scene.shapes[ranked[0]], scene.shapes[ranked[1]]
    if max(first.area, second.area) < SIZE_RATIO * min(first.area, second.area):
        return None
    sides = [scene.shapes[i].side for i in ranked[1:]]
    clear = first.side > max(sides) if largest else first.side < min(sides)
    return ranked[0] if clear else None


def _ask_size(scene: Scene) -> list[Ask]:
    groups: dict[str, list[int]] = {"shape": list(range(len(scene.shapes)))}
    for i, shape in enumerate(scene.shapes):
        groups.setdefault(shape.form, []).append(i)
        groups.setdefault(f"{shape.colour} shape", []).append(i)
    asks = []
    for thing, indices in groups.items():
        if len(indices) < 2:
            continue
        for extreme, words in _EXTREME.items():
            target = extreme_shape(scene, indices, extreme == "largest")
            if target is not None:
                fields: Fields = {"thing": thing, "extreme": words}
                asks.append(_reasoning("size", (target,), _SIZE, fields))
    return asks


def _tally(scene: Scene, values: list[str]) -> str:
    """ "red c2 and c9 two, blue c5 one": where each value is, from left to right, and how often."""
    columns: dict[str, list[str]] = {value: [] for value in (*COLOURS, *FORMS) if value in values}
    for shape, value in zip(scene.shapes, values, strict=True):
        columns[value].append(scene.place(shape)[0])
    return ", ".join(f"{value} {' and '.join(found)} {NUMBERS[len(found)]}" for value, found in columns.items())


def _ask_count(scene: Scene) -> list[Ask]:
    asks = []
    for attribute, values in (("colour", [s.colour for s in scene.shapes]), ("form", [s.form for s in scene.shapes])):
        how_many = Counter(values)
        for times in range(1, _MOST_TIMES + 1):
            matching = [value for value, count in how_many.items() if count == times]
            if len(matching) != 1 or len(how_many) == 1:
                continue
            targets = tuple(i for i, v in enumerate(values) if v == matching[0])
            tally = _tally(scene, values)
            fields: Fields = {
                "attribute": attribute,
                "times": TIMES[times],
                "number": NUMBERS[times],
                "value": matching[0],
                "tally": tally,
            }
            asks.append(_reasoning("count", targets, _COUNT, fields))
    return asks


def _ask_exclusion(scene: Scene) -> list[Ask]:
    counts = names_of(scene)
    colours, forms = sorted({s.colour for s in scene.shapes}), sorted({s.form for s in scene.shapes})
    manners = [("not_colour", colour, forms[0]) for colour in colours]
    manners += [("not_form", colours[0], form) for form in forms]
    for colour, form in itertools.product(colours, forms):
        if counts[f"{colour} {form}"]:
            manners += [("form", colour, form), ("colour", colour, form)]
        if {s for s in scene.shapes if s.colour == colour} != {s for s in scene.shapes if s.form == form}:
            manners.append(("neither", colour, form))
    asks = []
    for manner, colour, form in manners:
        targets = tuple(i for i, s in enumerate(scene.shapes) if _KEEPS[manner](s, colour, form))
        if 1 <= len(targets) <= _MOST_EXCLUSION_TARGETS:
            single = counts[f"{colour} {form}"] == 1
            fields = _words(colour, form)
            fields |= {"one": "one" if single else "ones", "form_or_forms": form if single else FORMS[form]}
            wordings = {
                question: f"{opening}, {_EXCEPT_RESTATED[manner]}: {{verdicts}}."
                for question, opening in zip(_EXCEPT[manner], _EXCEPT_OPENINGS, strict=False)
            }
            looked_at = tuple(i for i, s in enumerate(scene.shapes) if _LOOKED_AT[manner](s, colour, form))
            asks.append(_reasoning("exclusion", targets, wordings, fields, looked_at))
    return asks


def training_piles(families: Mapping[str, list[Ask]]) -> list[list[Ask]]:
    """The asks of one kind, in piles that training draws from equally: what is hard and rare comes often.

    Lists of three and more are piles of their own, or an answer learns to stop after two. Lists by colour or form, of
    which nothing in the question says how long they are, come twice, and the long ones by form, which are hardest, a
    third time; two shapes of one name come twice; so do exclusions, by how much they leave, but where it is one shape.
    Names whose colour and form both occur, on different shapes, are two piles of the five that ask for what is not
    there.
    """
    piles = []
    for family, asks in families.items():
        if family == "absent_name":
            piles += [asks[::2], asks[1::2]]
        elif family == "count":
            piles.append(asks)
        elif family == "exclusion":
            by_number = [[ask for ask in asks if len(ask.targets) == n] for n in range(1, _MOST_EXCLUSION_TARGETS + 1)]
            piles += [*by_number, *by_number[1:]]
        else:
            few = [ask for ask in asks if len(ask.targets) < _MANY]
            many = [ask for ask in asks if len(ask.targets) >= _MANY]
            piles += [few, many] * (1 + (family in ("form", "colour")))
            piles += [many] * (family == "form") + [few] * (family == "double")
    return [pile for pile in piles if pile]


def find_asks(scene: Scene) -> dict[str, dict[str, list[Ask]]]:
    """Everything that may be asked about a scene: kind -> family -> asks (lists may be empty)."""
    found: dict[str, dict[str, list[Ask]]] = {
        kind: {family: [] for family in families} for kind, families in FAMILIES.items()
    }
    for finder in (_ask_direct, _ask_several, _ask_absent, _ask_relation, _ask_size, _ask_count, _ask_exclusion):
        for ask in finder(scene):
            found[ask.kind][ask.family].append(ask)
    return found
