"""Which questions of a data set are asked, and in which batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from utils.cli.errors import UserError
from utils.data.samples import NO_IMAGE, TEXT, Sample, Turn
from utils.evaluation.protocols import FREE, RELEASE, TEACHER

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class EvalQuestion:
    """One question about one image; number: its place among those of its sample.

    earlier: the turns of its conversation before it, whose true answers the model is given. references: of a question
    in words, other true answers to it.
    """

    image_path: str
    dataset: str
    sample_id: str
    number: int
    turn: Turn
    earlier: tuple[Turn, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is asked and how: batches of questions about masks, and of questions that are answered in words alone.

    others: the image that is shown in place of each where images are exchanged. left_out: questions by cause.
    """

    batches: list[list[EvalQuestion]]
    text_batches: list[list[EvalQuestion]]
    protocols: tuple[str, ...]
    others: Mapping[str, str]
    max_new_tokens: int
    left_out: Mapping[str, int]
    pair: bool = False

    @property
    def questions(self) -> list[EvalQuestion]:
        """All questions in order."""
        return [question for batch in (*self.batches, *self.text_batches) for question in batch]


def make_plan(
    samples: Iterable[Sample],
    *,
    batch_size: int = 16,
    limit: int = 0,
    protocols: Sequence[str] = (FREE, TEACHER),
    shuffled: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    text: bool = False,
    pair: bool = False,
) -> Plan:
    """What to ask about `samples`.

    batch_size: questions answered together; those about one image stay together, so that it is encoded once.
    limit: take this many questions, evenly spread; 0 for all. protocols: of PROTOCOLS. shuffled: also show other
    images, where free is among them. text: questions without masks too, freely answered, or their true answers read.
    pair: match the masks of MUSE's answers as `Pairing` says, for which they keep their logits. UserError when there is
    no question to score, or one about masks is not the only one of its conversation.
    """
    questions = list_questions(samples)
    speaks = bool({FREE, RELEASE} & set(protocols))
    in_words = [one for one in questions if one.turn.kind == TEXT]
    asked = [one for one in questions if one.turn.kind != TEXT]
    eligible = asked if speaks else [one for one in asked if one.turn.targets]
    readable = [one for one in in_words if one.image_path != NO_IMAGE] if text else []
    readable = _with_references(readable) if {FREE, TEACHER} & set(protocols) else []
    if not readable and not any(one.turn.targets or speaks for one in asked):
        raise UserError(f"there is nothing to score among {len(questions)} questions: none asks for masks")
    chosen = _spread([*eligible, *readable], limit)
    masked = [one for one in chosen if one.turn.kind != TEXT]
    return Plan(
        batches=list(_batches(masked, batch_size)),
        text_batches=list(_batches([one for one in chosen if one.turn.kind == TEXT], batch_size)),
        protocols=tuple(protocols),
        others=_other_images(masked) if shuffled and FREE in protocols else {},
        max_new_tokens=max_new_tokens,
        left_out={
            "text": len(in_words) - sum(1 + len(one.references) for one in readable),
            "no_target": len(asked) - len(eligible),
            "limit": len(eligible) + len(readable) - len(chosen),
        },
        pair=pair,
    )


def list_questions(samples: Iterable[Sample]) -> list[EvalQuestion]:
    """All questions, those about one image side by side; each turn of a conversation in words is one.

    UserError when a conversation of several turns asks for masks.
    """
    by_image: dict[str, list[EvalQuestion]] = {}
    for sample in samples:
        number = 0
        for conversation in sample.conversations:
            if len(conversation) != 1 and any(turn.kind != TEXT for turn in conversation):
                raise UserError(
                    f"sample {sample.sample_id} of {sample.dataset} has a conversation of {len(conversation)} turns; "
                    "for scoring every question about masks has to be a conversation of its own: split it"
                )
            for place, turn in enumerate(conversation):
                found = EvalQuestion(
                    sample.image_path, sample.dataset, sample.sample_id, number, turn, tuple(conversation[:place])
                )
                by_image.setdefault(sample.image_path, []).append(found)
                number += 1
    return [question for group in by_image.values() for question in group]


def _with_references(questions: Sequence[EvalQuestion]) -> list[EvalQuestion]:
    """Each question in words once: where it is asked of one image again, with the same words before it, the other
    true answers are its references."""
    found: dict[tuple[Any, ...], EvalQuestion] = {}
    for one in questions:
        said = tuple((turn.question, turn.answer) for turn in one.earlier)
        key = (one.dataset, one.image_path, said, one.turn.question)
        first = found.setdefault(key, one)
        if first is not one:
            found[key] = replace(first, references=(*first.references, one.turn.answer))
    return list(found.values())


def _spread(questions: Sequence[EvalQuestion], limit: int) -> list[EvalQuestion]:
    if limit == 0 or limit >= len(questions):
        return list(questions)
    return [questions[number * len(questions) // limit] for number in range(limit)]


def _batches(questions: Sequence[EvalQuestion], batch_size: int) -> Iterator[list[EvalQuestion]]:
    """Runs of at most `batch_size` questions; an image's questions are parted only where they are more than that."""
    batch: list[EvalQuestion] = []
    for _, group in groupby(questions, key=lambda question: question.image_path):
        rest = list(group)
        if batch and len(batch) + len(rest) > batch_size:
            yield batch
            batch = []
        batch += rest
        while len(batch) >= batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def _other_images(questions: Sequence[EvalQuestion]) -> dict[str, str]:
    """Another image of the set for every image, far from it in the set's order; empty for a single image."""
    paths = list(dict.fromkeys(question.image_path for question in questions))
    shift = max(1, len(paths) // 2)
    return {path: paths[(place + shift) % len(paths)] for place, path in enumerate(paths)} if len(paths) > 1 else {}


def decode_truths(question: EvalQuestion, size: tuple[int, ...]) -> np.ndarray:
    """(G, H, W) uint8; `size` is that of the image, for questions without a target."""
    masks = [target.decode() for target in question.turn.targets]
    return np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
