"""What can be asked about a scene, and how it is put into words.

`find_asks` lists every fact of a scene worth asking about; an `Ask` turns itself into a question and an answer in one of several
wordings. Every condition that keeps a question honest (a distractor, no doubt which shape is meant) is checked here.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .drawing import Scene, Shape
from .words import COLOURS, FORMS, NUMBERS, SEG_MARKER, TIMES, join_list

# The largest (smallest) shape has at least this many times the area of the next one, wherever it is asked for.
SIZE_RATIO = 1.3
# Relations: the meant shape lies within _NARROW (across / along) of the direction; another shape within _WIDE of it must be at
# least _FARTHER times as far away.
_NARROW, _WIDE, _FARTHER = 0.6, 1.25, 1.4
_MOST_EXCLUSION_TARGETS = 3

# kind -> its families
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "direct": ("name",),
    "several": ("form", "colour", "pair", "double"),
    "reasoning": ("relation", "size", "count", "exclusion"),
    "no_target": ("absent_name", "absent_half", "absent_colour", "absent_form"),
}

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

_ONE_ANSWER = ("The {named}.", "It is the {named}.", "That is the {named}.", "Here is the {named}.")
_MANY_ANSWERS = ("{Listed}.", "They are {listed}.", "These are {listed}.", "Here are {listed}.")

_RELATION = (
    "Which shape is directly {where} the {reference}?",
    "What is directly {where} the {reference}?",
    "Find the shape directly {where} the {reference}.",
    "Which shape comes first {where} the {reference}?",
    "What is the nearest shape {where} the {reference}?",
)
_RELATION_ANSWER = (
    "The shape {where} the {reference} is the {named}.",
    "The {named} is directly {where} the {reference}.",
)
_WHERE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_EXTREME = {"largest": ("largest", "biggest"), "smallest": ("smallest", "tiniest")}
_SIZE = (
    "Which {thing} is the {extreme}?",
    "What is the {extreme} {thing}?",
    "Find the {extreme} {thing}.",
    "Which is the {extreme} {thing} in the picture?",
    "Show me the {extreme} {thing}.",
)
_SIZE_ANSWER = ("The {extreme} {thing} is the {named}.", "The {named} is the {extreme} {thing}.")
_COUNT = (
    "Which shapes have the {attribute} that occurs exactly {times}?",
    "Find the shapes of the {attribute} that appears exactly {times}.",
    "One {attribute} occurs {times}: show its shapes.",
    "Which {attribute} is there exactly {times}? Show every shape of it.",
)
_COUNT_ANSWER = ("The {attribute} that occurs {times} is {value}: {listed}.", "It is {value}: {listed}.")
_EXCEPT = {
    "form": (
        "Find all {forms} except the {colour} {one}.",
        "Which {forms} are not {colour}?",
        "Show every {form} that is not {colour}.",
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
_NO_NAME = ("There is no {colour} {form} in the picture.", "There is no {colour} {form}.", "I see no {colour} {form}.")
_NO_COLOUR = ("There is nothing {colour} in the picture.", "There are no {colour} shapes.", "I see nothing {colour}.")
_NO_FORM = ("There are no {forms} in the picture.", "There are no {forms}.", "I see no {forms}.")


@dataclass(frozen=True, slots=True)
class Phrased:
    """One wording. `question`: a full question for reasoning, a referring expression ("the red circle") otherwise. In `answer`
    every target is named right before its mark."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One fact worth asking about. `targets` are indices into scene.shapes in reading order; templates take `fields`, of which
    those with several choices are given as tuples."""

    kind: str
    family: str
    targets: tuple[int, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    fields: dict[str, str | tuple[str, ...]] = field(default_factory=dict)

    def phrase(
        self, rng: random.Random, scene: Scene, mark: Callable[[Shape], str] = lambda shape: SEG_MARKER
    ) -> Phrased:
        """Word it. `mark` gives what follows the name of each target: the seg marker, or words that say where it is."""
        fields = {k: v if isinstance(v, str) else rng.choice(v) for k, v in self.fields.items()}
        named = [f"{scene.shapes[i].name} {mark(scene.shapes[i])}" for i in self.targets]
        if named:
            listed = join_list([f"the {item}" for item in named])
            fields |= {"named": named[0], "listed": listed, "Listed": listed[0].upper() + listed[1:]}
        return Phrased(rng.choice(self.questions).format(**fields), rng.choice(self.answers).format(**fields))


def names_of(scene: Scene) -> Counter[str]:
    """How often each "colour form" occurs."""
    return Counter(shape.name for shape in scene.shapes)


def has_distractor(scene: Scene, index: int) -> bool:
    """Whether another shape shares the colour or the form (not both) of this one."""
    shape = scene.shapes[index]
    return any((s.colour == shape.colour) != (s.form == shape.form) for i, s in enumerate(scene.shapes) if i != index)


def _words(colour: str, form: str) -> dict[str, str | tuple[str, ...]]:
    return {"colour": colour, "form": form, "forms": FORMS[form]}


def _ask_direct(scene: Scene) -> list[Ask]:
    counts = names_of(scene)
    return [
        Ask("direct", "name", (i,), _NAME, _ONE_ANSWER, _words(shape.colour, shape.form))
        for i, shape in enumerate(scene.shapes)
        if counts[shape.name] == 1 and has_distractor(scene, i)
    ]


def _number_phrases(count: int, template: str) -> tuple[str, ...]:
    """ "both circles" for two, "the three circles" for three to six."""
    return (template.format("both" if count == 2 else f"the {NUMBERS[count]}"),)


def _ask_several(scene: Scene) -> list[Ask]:
    asks = []
    for form, count in Counter(s.form for s in scene.shapes).items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(scene.shapes) if s.form == form)
            questions = _FORM_GROUP + _number_phrases(count, "{} {{forms}}")
            asks.append(Ask("several", "form", targets, questions, _MANY_ANSWERS, {"form": form, "forms": FORMS[form]}))
    for colour, count in Counter(s.colour for s in scene.shapes).items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(scene.shapes) if s.colour == colour)
            questions = _COLOUR_GROUP + _number_phrases(count, "{} {{colour}} shapes")
            asks.append(Ask("several", "colour", targets, questions, _MANY_ANSWERS, {"colour": colour}))
    counts = names_of(scene)
    for name, count in counts.items():
        if count > 1:
            targets = tuple(i for i, s in enumerate(scene.shapes) if s.name == name)
            questions = _DOUBLE + _number_phrases(count, "{} {{colour}} {{forms}}")
            asks.append(Ask("several", "double", targets, questions, _MANY_ANSWERS, _words(*name.split())))
    single = [i for i, s in enumerate(scene.shapes) if counts[s.name] == 1]
    for position, i in enumerate(single):
        for j in single[position + 1 :]:
            first, second = scene.shapes[i].name, scene.shapes[j].name
            questions = (
                f"the {first} and the {second}",
                f"the {second} and the {first}",
                f"{first} and {second}",
                f"{second} and {first}",
            )
            asks.append(Ask("several", "pair", (i, j), questions, _MANY_ANSWERS))
    return asks


def _ask_absent(scene: Scene) -> list[Ask]:
    colours, forms, names = {s.colour for s in scene.shapes}, {s.form for s in scene.shapes}, names_of(scene)
    asks = []
    for colour in COLOURS:
        if colour not in colours:
            asks.append(Ask("no_target", "absent_colour", (), _COLOUR_GROUP, _NO_COLOUR, {"colour": colour}))
        for form in FORMS:
            present = (colour in colours) + (form in forms)
            if present and f"{colour} {form}" not in names:
                family = "absent_name" if present == 2 else "absent_half"
                asks.append(Ask("no_target", family, (), _NAME, _NO_NAME, _words(colour, form)))
    for form in FORMS:
        if form not in forms:
            asks.append(
                Ask("no_target", "absent_form", (), _FORM_GROUP, _NO_FORM, {"form": form, "forms": FORMS[form]})
            )
    return asks


def directly(scene: Scene, index: int, direction: str) -> int | None:
    """The shape directly left of, right of, above or below shape `index`, or None where there is none or it could be disputed."""
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
                fields: dict[str, str | tuple[str, ...]] = {"where": where, "reference": shape.name}
                answers = _RELATION_ANSWER + _ONE_ANSWER[1:3]
                asks.append(Ask("reasoning", "relation", (target,), _RELATION, answers, fields))
    return asks


def extreme_shape(scene: Scene, indices: list[int], largest: bool) -> int | None:
    """Which of these shapes is the largest (smallest) by at least SIZE_RATIO in area, and by its extent too; None where disputed."""
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
                answers = _SIZE_ANSWER + _ONE_ANSWER[1:3]
                asks.append(Ask("reasoning", "size", (target,), _SIZE, answers, {"thing": thing, "extreme": words}))
    return asks


def _ask_count(scene: Scene) -> list[Ask]:
    asks = []
    for attribute, values in (("colour", [s.colour for s in scene.shapes]), ("form", [s.form for s in scene.shapes])):
        how_many = Counter(values)
        for times, times_word in TIMES.items():
            matching = [value for value, count in how_many.items() if count == times]
            if len(matching) != 1 or len(how_many) == 1 or times > MAX_COUNT:
                continue
            value = matching[0]
            targets = tuple(i for i, v in enumerate(values) if v == value)
            word = value if attribute == "colour" else f"the {value}"
            fields: dict[str, str | tuple[str, ...]] = {"attribute": attribute, "times": times_word, "value": word}
            asks.append(Ask("reasoning", "count", targets, _COUNT, _COUNT_ANSWER, fields))
    return asks


def _ask_exclusion(scene: Scene) -> list[Ask]:
    shapes, asks = scene.shapes, []

    def add(manner: str, keep: Callable[[Shape], bool], fields: dict[str, str | tuple[str, ...]]) -> None:
        targets = tuple(i for i, s in enumerate(shapes) if keep(s))
        if 1 <= len(targets) <= _MOST_EXCLUSION_TARGETS:
            answers = _MANY_ANSWERS if len(targets) > 1 else _ONE_ANSWER
            asks.append(Ask("reasoning", "exclusion", targets, _EXCEPT[manner], answers, fields))

    counts = names_of(scene)
    for name, count in counts.items():
        colour, form = name.split()
        words = _words(colour, form)
        words |= {"one": "one" if count == 1 else "ones", "form_or_forms": form if count == 1 else FORMS[form]}
        add("form", lambda s, c=colour, f=form: s.form == f and s.colour != c, words)  # type: ignore[misc]
        add("colour", lambda s, c=colour, f=form: s.colour == c and s.form != f, words)  # type: ignore[misc]
    colours, forms = sorted({s.colour for s in shapes}), sorted({s.form for s in shapes})
    for colour in colours:
        add("not_colour", lambda s, c=colour: s.colour != c, {"colour": colour})  # type: ignore[misc]
        for form in forms:
            if {i for i, s in enumerate(shapes) if s.colour == colour} != {
                i for i, s in enumerate(shapes) if s.form == form
            }:
                add("neither", lambda s, c=colour, f=form: s.colour != c and s.form != f, _words(colour, form))  # type: ignore[misc]
    for form in forms:
        add("not_form", lambda s, f=form: s.form != f, {"form": form, "forms": FORMS[form]})  # type: ignore[misc]
    return asks


MAX_COUNT = 3


def find_asks(scene: Scene) -> dict[str, dict[str, list[Ask]]]:
    """Everything that may be asked about a scene: kind -> family -> asks (lists may be empty)."""
    found: dict[str, dict[str, list[Ask]]] = {
        kind: {family: [] for family in families} for kind, families in FAMILIES.items()
    }
    for finder in (_ask_direct, _ask_several, _ask_absent, _ask_relation, _ask_size, _ask_count, _ask_exclusion):
        for ask in finder(scene):
            found[ask.kind][ask.family].append(ask)
    return found


def all_templates() -> list[str]:
    """Every template string of this module, fields unfilled."""
    single = (
        *_NAME,
        *_FORM_GROUP,
        *_COLOUR_GROUP,
        *_DOUBLE,
        *_ONE_ANSWER,
        *_MANY_ANSWERS,
        *_RELATION,
        *_RELATION_ANSWER,
    )
    rest = (*_SIZE, *_SIZE_ANSWER, *_COUNT, *_COUNT_ANSWER, *_NO_NAME, *_NO_COLOUR, *_NO_FORM)
    nested = [t for group in (*_EXCEPT.values(), *_WHERE.values(), *_EXTREME.values()) for t in group]
    return [*single, *rest, *nested, "both", *(f"the {number}" for number in NUMBERS[2:])]
