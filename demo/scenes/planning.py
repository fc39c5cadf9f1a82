"""How much data there is, which scenes, and what is asked about each of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo.scenes.conversations import Turn, make_conversation
from demo.scenes.drawing import Scene
from demo.scenes.questions import FAMILIES, Ask, Phrased, find_asks, training_piles
from demo.scenes.sampling import SceneSettings, sample_scenes

TRAIN, HELD_OUT = "train", "val"
# Shares of the held-out questions by kind, and of the families within a kind.
KIND_SHARES = {"direct": 0.35, "several": 0.27, "reasoning": 0.28, "no_target": 0.10}
_FAMILY_SHARES = {
    "direct": {"name": 1.0},
    "several": {"form": 0.3, "colour": 0.3, "pair": 0.3, "double": 0.1},
    "reasoning": {"relation": 0.25, "size": 0.25, "count": 0.25, "exclusion": 0.25},
    "no_target": {"absent_name": 0.4, "absent_half": 0.3, "absent_colour": 0.15, "absent_form": 0.15},
}
# Facts asked for about each training image, and how many wordings of each are given.
_TRAIN_ASKS = {"direct": 4, "several": 3, "reasoning": 6, "no_target": 4}
_TRAIN_WORDINGS = {"direct": 2, "several": 2, "reasoning": 1, "no_target": 2}

Question = tuple[Ask, Phrased]


@dataclass(frozen=True, slots=True)
class SceneDataSettings:
    """How much is made, and what it looks like. Everything follows from these values.

    train, heldout: numbers of scenes; questions: number of held-out questions; conversations, turns: conversations in
    words per training image, and least and most turns of each; more_phrasings: conversations in words use the
    readers' long list of wordings (--use_expand_question_list).
    """

    train: int = 6000
    heldout: int = 600
    questions: int = 1000
    seed: int = 0
    scene: SceneSettings = dataclasses.field(default_factory=SceneSettings)
    conversations: int = 5
    turns: tuple[int, int] = (1, 3)
    more_phrasings: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "heldout", "questions", "conversations"):
            if getattr(self, name) < 1:
                raise ValueError(f"the number {name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, slots=True)
class PlacedScene:
    """A scene with its number, from 1, which is its image id, and its split: TRAIN or HELD_OUT."""

    number: int
    split: str
    scene: Scene


def place_scenes(settings: SceneDataSettings) -> Iterator[PlacedScene]:
    """All scenes of a data set, the held-out ones last. No scene comes twice."""
    taken: set[str] = set()
    number = 0
    for split, count in ((TRAIN, settings.train), (HELD_OUT, settings.heldout)):
        source = sample_scenes(settings.scene, settings.seed, split, taken)
        for _ in range(count):
            number += 1
            yield PlacedScene(number, split, next(source))


def split_exactly(total: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers that add up to `total`, as near to the shares as can be (largest remainder first)."""
    exact = {name: total * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def plan_training(placed: PlacedScene, settings: SceneDataSettings) -> tuple[list[Question], list[list[Turn]]]:
    """What is asked about a training image, and the conversations in words about it.

    Of each kind up to _TRAIN_ASKS facts are taken, from its families in turn, each in up to _TRAIN_WORDINGS wordings.
    """
    scene, rng = placed.scene, random.Random(f"questions/{settings.seed}/{placed.number}")
    found = find_asks(scene)
    questions: list[Question] = []
    for kind, families in found.items():
        for ask in _in_turn(rng, training_piles(families))[: _TRAIN_ASKS[kind]]:
            wordings = dict.fromkeys(ask.phrase(rng, scene) for _ in range(_TRAIN_WORDINGS[kind]))
            questions += [(ask, phrased) for phrased in wordings]
    conversations = [
        make_conversation(scene, rng, rng.randint(*settings.turns), settings.more_phrasings, found)
        for _ in range(settings.conversations)
    ]
    return questions, conversations


def _in_turn(rng: random.Random, piles: list[list[Ask]]) -> list[Ask]:
    """All asks, drawn from the piles in turn; piles and their order are shuffled."""
    piles = [rng.sample(pile, len(pile)) for pile in piles]
    rng.shuffle(piles)
    drawn: list[Ask] = []
    while any(piles):
        drawn += [pile.pop() for pile in piles if pile]
    return drawn


def plan_held_out(scenes: list[Scene], settings: SceneDataSettings) -> list[list[Question]]:
    """For each held-out scene its questions: exactly `settings.questions` in all, in the shares of kinds and families.

    They are spread over the scenes; nothing is asked twice about one. ValueError when the scenes do not give as many.
    """
    rng = random.Random(f"held-out/{settings.seed}")
    found = [find_asks(scene) for scene in scenes]
    chosen: list[list[Question]] = [[] for _ in scenes]
    for kind, kind_count in split_exactly(settings.questions, KIND_SHARES).items():
        for family, needed in split_exactly(kind_count, _FAMILY_SHARES[kind]).items():
            piles = {i: rng.sample(asks[kind][family], len(asks[kind][family])) for i, asks in enumerate(found)}
            while needed:
                left = [i for i, pile in piles.items() if pile]
                if not left:
                    raise ValueError(
                        f"{len(scenes)} held-out scenes are {needed} {kind} questions about {family} short of "
                        f"{settings.questions} questions in all: ask for more held-out scenes or for fewer questions"
                    )
                rng.shuffle(left)
                left.sort(key=lambda i: len(chosen[i]))
                for i in left[:needed]:
                    ask = piles[i].pop()
                    chosen[i].append((ask, ask.phrase(rng, scenes[i])))
                needed -= len(left[:needed])
    return chosen


def by_kind(questions: list[Question]) -> dict[str, list[Question]]:
    """The questions of each kind, in their order."""
    return {kind: [question for question in questions if question[0].kind == kind] for kind in FAMILIES}
