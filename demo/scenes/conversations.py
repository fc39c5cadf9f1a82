"""Conversations in words about a scene: what is there, where it is, how it relates. No masks.

An answer that names things often points at them in words, in the very spot where it will give a mask, by saying what is
seen there and where: "Sure, the red circle red circle c3 r5." Whoever is to say that keeps in mind what was named.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from demo.scenes.drawing import Scene, Shape
from demo.scenes.questions import SIZE_RATIO, Ask, directly, find_asks, names_of, training_piles
from demo.scenes.sampling import SceneSettings, sample_scene
from demo.scenes.words import (
    COLOURS,
    COLUMNS,
    DIRECTIONS,
    FORMS,
    OF_ALL,
    OF_COLOUR,
    OF_FORM,
    ROWS,
    SIZES,
    TIMES,
    capital,
    category_names,
    join_list,
)
from model.structures import SEG_MARKER
from utils.data.templates import NUMBERS, pick_phrasing, target_name

# Two places differ clearly when they are this share of the image's side apart; leaders must lead by half of it.
_CLEARLY_APART = 1 / 14
_DESCRIBE = (
    "Describe the picture.",
    "What is in the picture?",
    "What do you see?",
    "Name all shapes.",
    "List the shapes from left to right.",
)
# How often an answer that could have masks gives places, and how it is asked to.
_PLACES_ASKED_FOR = 0.7
_SAY_WHERE = ("Say where.", "Give places.", "Add the places.")
_EXISTS = ("Is there {} in the picture?", "Do you see {}?", "Does the picture show {}?")
_HOW_MANY = ("How many {} are there?", "Count the {}.")
_HOW_LARGE = ("What size is the {}?", "How large is the {}?")
_IS_WHERE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_OUTERMOST = {"left": "leftmost", "right": "rightmost", "above": "highest", "below": "lowest"}

Turn = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Speaker:
    """What turns are made from: the scene, what can be asked about it, and the random sources.

    more_phrasings: ask for things in the readers' long list of wordings.
    """

    scene: Scene
    asks: Mapping[str, Mapping[str, list[Ask]]]
    more_phrasings: bool
    rng: random.Random
    phrasing_rng: np.random.Generator

    def draw_ask(self, kind: str) -> Ask | None:
        """One fact of a kind, each of its piles as likely as the others; None where there is none."""
        piles = training_piles(self.asks[kind])
        return self.rng.choice(self.rng.choice(piles)) if piles else None


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _describe(speaker: Speaker) -> Turn:
    shapes = speaker.scene.shapes
    detailed = speaker.rng.random() < 0.5
    items = [_a(f"{s.size} {s.name}" if detailed else s.name) for s in shapes]
    return speaker.rng.choice(_DESCRIBE), f"There are {NUMBERS[len(shapes)]} shapes: {join_list(items)}."


def _pointer(scene: Scene, shape: Shape) -> str:
    """ "red circle c3 r5": what the patch at a shape's centre shows, then its column and row, of 14 each."""
    return f"{shape.name} {scene.where(shape)}"


def _with_places(speaker: Speaker, ask: Ask, question: str, answer: str) -> Turn:
    """A turn whose answer mostly points in words where it could point with masks.

    Places are asked for where there is nothing, too, or being asked would tell that there is something.
    """
    scene = speaker.scene
    if speaker.rng.random() >= _PLACES_ASKED_FOR:
        return question, answer.replace(f" {SEG_MARKER}", "")
    for target in ask.targets:
        answer = answer.replace(SEG_MARKER, _pointer(scene, scene.shapes[target]), 1)
    return f"{question} {speaker.rng.choice(_SAY_WHERE)}", answer


def _reasoning(speaker: Speaker) -> Turn | None:
    """A reasoning question as it is asked for masks."""
    ask = speaker.draw_ask("reasoning")
    if ask is None:
        return None
    phrased = ask.phrase(speaker.rng, speaker.scene)
    return _with_places(speaker, ask, phrased.question, phrased.answer)


def _referring(kind: str) -> Callable[[Speaker], Turn | None]:
    """A question for named things, in the wordings of the refer readers."""

    def turn(speaker: Speaker) -> Turn | None:
        ask = speaker.draw_ask(kind)
        if ask is None:
            return None
        asked = target_name(ask.phrase(speaker.rng, speaker.scene).question)
        phrasing = pick_phrasing(speaker.phrasing_rng, speaker.more_phrasings)
        if not ask.targets:
            return _with_places(speaker, ask, phrasing.question([asked]), phrasing.denial([asked]))
        shapes = [speaker.scene.shapes[i] for i in ask.targets]
        names = [asked] if len(shapes) == 1 else [target_name(shape.name) for shape in shapes]
        return _with_places(speaker, ask, phrasing.question([asked]), phrasing.answer(names))

    return turn


def _read_off(speaker: Speaker) -> Turn | None:
    """What is at some columns, or rows: found by one word, the simplest way of looking something up in an image."""
    by_column = speaker.rng.random() < 0.5
    found: dict[str, str] = {}
    for shape in speaker.scene.shapes:
        column, row = speaker.scene.place(shape)
        key, rest = (column, row) if by_column else (row, column)
        found[key] = "" if key in found else f"{shape.name} {rest}"
    keys = [key for key, said in found.items() if said]
    if not keys:
        return None
    speaker.rng.shuffle(keys)
    return f"Read {', '.join(keys)}.", f"{', '.join(f'{key} {found[key]}' for key in keys)}."


def _exists(speaker: Speaker) -> Turn:
    rng, scene = speaker.rng, speaker.scene
    counts = names_of(scene)
    if rng.random() < 0.5:
        name = rng.choice(list(counts))
    else:
        name = rng.choice([absent for absent in category_names() if absent not in counts])
    question = rng.choice(_EXISTS).format(_a(name))
    if counts[name] == 0:
        return question, f"No, there is no {name}."
    return question, f"Yes, there is {_a(name)}."


def _how_many(speaker: Speaker) -> Turn:
    rng, shapes = speaker.rng, speaker.scene.shapes
    manner = rng.random()
    if manner < 0.2:
        things, count = "shapes", len(shapes)
    elif manner < 0.6:
        form = rng.choice(list(FORMS))
        things, count = FORMS[form], sum(s.form == form for s in shapes)
    else:
        colour = rng.choice(list(COLOURS))
        things, count = f"{colour} shapes", sum(s.colour == colour for s in shapes)
    words = things.removesuffix("s") if count == 1 and things.endswith("shapes") else things
    if count == 1 and words == things:
        words = next(form for form, plural in FORMS.items() if plural == things)
    verb = "is" if count == 1 else "are"
    return rng.choice(_HOW_MANY).format(things), f"There {verb} {'no' if count == 0 else NUMBERS[count]} {words}."


def _single(scene: Scene) -> list[int]:
    """Indices of the shapes whose name occurs once."""
    counts = names_of(scene)
    return [i for i, s in enumerate(scene.shapes) if counts[s.name] == 1]


def _how_large(speaker: Speaker) -> Turn | None:
    single = _single(speaker.scene)
    if not single:
        return None
    shape = speaker.scene.shapes[speaker.rng.choice(single)]
    return speaker.rng.choice(_HOW_LARGE).format(shape.name), f"The {shape.name} is {shape.size}."


def _two_of(speaker: Speaker) -> tuple[int, int] | None:
    single = _single(speaker.scene)
    if len(single) < 2:
        return None
    first, second = speaker.rng.sample(single, 2)
    return first, second


def _is_larger(speaker: Speaker) -> Turn | None:
    pair = _two_of(speaker)
    if pair is None:
        return None
    first, second = (speaker.scene.shapes[i] for i in pair)
    if max(first.area, second.area) < SIZE_RATIO * min(first.area, second.area):
        return None
    larger = first.area > second.area
    word = speaker.rng.choice(("larger", "smaller"))
    truth = larger == (word == "larger")
    verdict = f"Yes, the {first.name} is {word}." if truth else f"No, the {second.name} is {word}."
    return f"Is the {first.name} {word} than the {second.name}?", verdict


def _is_beside(speaker: Speaker) -> Turn | None:
    pair = _two_of(speaker)
    if pair is None:
        return None
    first, second = (speaker.scene.shapes[i] for i in pair)
    dx, dy = first.centre_x - second.centre_x, first.centre_y - second.centre_y
    if max(abs(dx), abs(dy)) < _CLEARLY_APART * speaker.scene.side:
        return None
    if abs(dx) > abs(dy):
        true_direction, other = ("left", "right") if dx < 0 else ("right", "left")
    else:
        true_direction, other = ("above", "below") if dy < 0 else ("below", "above")
    asked = speaker.rng.choice((true_direction, other))
    verdict = "Yes" if asked == true_direction else "No"
    sentence = f"the {first.name} is {_IS_WHERE[true_direction]} the {second.name}"
    return f"Is the {first.name} {_IS_WHERE[asked]} the {second.name}?", f"{verdict}, {sentence}."


def _neighbours(speaker: Speaker) -> Turn | None:
    """A relation asked for from its reference."""
    single = _single(speaker.scene)
    if not single:
        return None
    index, direction = speaker.rng.choice(single), speaker.rng.choice(list(DIRECTIONS))
    target = directly(speaker.scene, index, direction)
    if target is None:
        return None
    here, there = speaker.scene.shapes[index], speaker.scene.shapes[target]
    where = _IS_WHERE[direction]
    return f"Look at the {here.name}. What is directly {where} it?", f"{capital(where)} it is the {there.name}."


def _outermost(speaker: Speaker) -> Turn | None:
    direction = speaker.rng.choice(list(DIRECTIONS))
    sign = -1 if direction in ("right", "below") else 1
    ranked = sorted(
        (sign * (s.centre_x if direction in ("left", "right") else s.centre_y), i)
        for i, s in enumerate(speaker.scene.shapes)
    )
    if ranked[1][0] - ranked[0][0] < _CLEARLY_APART / 2 * speaker.scene.side:
        return None
    shape = speaker.scene.shapes[ranked[0][1]]
    word = _OUTERMOST[direction]
    return f"Which shape is the {word}?", f"The {word} shape is the {shape.name}."


# (weight, turn): what a conversation is mixed from. Nearly all are the questions that will be asked for masks, most of
# all those that need a list.
_TURNS: tuple[tuple[float, Callable[[Speaker], Turn | None]], ...] = (
    (3.0, _referring("direct")),
    (7.0, _referring("several")),
    (8.0, _reasoning),
    (6.0, _referring("no_target")),
    (0.3, _read_off),
    (0.5, _describe),
    (0.5, _exists),
    (1.5, _how_many),
    (0.3, _how_large),
    (0.2, _is_larger),
    (0.2, _is_beside),
    (0.2, _neighbours),
    (0.2, _outermost),
)


_WEIGHTS, _MAKERS = zip(*_TURNS, strict=True)
_CORPUS_TURNS = 8


def make_conversation(
    scene: Scene,
    rng: random.Random,
    turns: int,
    more_phrasings: bool = False,
    asks: Mapping[str, Mapping[str, list[Ask]]] | None = None,
) -> list[Turn]:
    """`turns` different (question, answer) pairs in words about a scene.

    `asks` is find_asks(scene) where that is known already.
    """
    phrasing_rng = np.random.default_rng(rng.getrandbits(64))
    speaker = Speaker(scene, asks or find_asks(scene), more_phrasings, rng, phrasing_rng)
    conversation: list[Turn] = []
    while len(conversation) < turns:
        turn = rng.choices(_MAKERS, _WEIGHTS)[0](speaker)
        if turn is not None and turn[0] not in {question for question, _ in conversation}:
            conversation.append(turn)
    return conversation


def tokenizer_corpus(scenes: int = 500) -> list[str]:
    """Text to train a tokenizer on: every word of the closed vocabulary and what is said about some scenes.

    Deterministic; holds the wordings of the readers' questions and answers too. The scenes are no part of any data set.
    """
    corpus = [*category_names(), *FORMS.values(), *SIZES, *NUMBERS, *TIMES.values()]
    corpus += [*_IS_WHERE.values(), *_OUTERMOST.values()]
    corpus += [f"at {place}" for place in (*COLUMNS, *ROWS)]
    corpus += [f"so many: {number}" for number in (*OF_COLOUR, *OF_FORM, *OF_ALL)]
    rng = random.Random("tokenizer corpus")
    for number in range(scenes):
        scene = sample_scene(rng, SceneSettings())
        for question, answer in make_conversation(scene, rng, _CORPUS_TURNS, more_phrasings=number % 2 == 1):
            corpus += [question, answer]
        for families in find_asks(scene).values():
            for ask in [rng.choice(asks) for asks in families.values() if asks]:
                phrased = ask.phrase(rng, scene)
                corpus += [phrased.question, phrased.answer.replace(f" {SEG_MARKER}", "")]
    return [text for text in corpus if text]
