"""Asks a predictor every question of a data set and hands what comes back to the scores, by protocol.

The predictor is handed in; this file knows of it only `answer` and `segment` (see `Asked`). The protocols:

- free: the model gets the picture and the question and must say its seg groups itself. What a user gets.
- teacher: the true answer with its groups is given, the model only draws. Questions without a target are left out,
  because an answer without groups draws nothing and would always be right.
- release: both of the release's validation loops with their quirks (`utils.release_protocol`), for quoting beside
  numbers that were made so. Needs answers that keep their logits.

Beside free, another picture of the same set may be shown ("shuffled") while the truth stays that of the question's own
picture: what can be had from the words alone. Questions without a target are left out there too.

The unit is the question. Its IoU is that of the union of its predicted masks with the union of its true masks, as
gRefCOCO scores sentences with several targets; a question without a target scores 1 when no mask is predicted and
else 0. gIoU is the mean over questions, cIoU the sum of intersections over the sum of unions.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import cv2
import numpy as np
from tqdm import tqdm

from utils import metrics, release_protocol
from utils.data.samples import IGNORE_LABEL, TEXT, Sample, Turn
from utils.scores.figures import CLASS_SETS, Drawn, Figures, Release, Said, drawn, summarise
from utils.scores.protocols import FREE, RELEASE, TEACHER
from utils.scripts import UserError

MAX_NEW_TOKENS = 256


class Answered(Protocol):
    """What is read of an answer: its words, and a bool mask (Q, H, W) for every group.

    For the protocol `release` it also has `logits`, float (Q, H, W), from which the masks were made.
    """

    @property
    def text(self) -> str: ...
    @property
    def marked_text(self) -> str: ...
    @property
    def phrases(self) -> list[str]: ...
    @property
    def masks(self) -> np.ndarray: ...
    @property
    def scores(self) -> list[float]: ...
    @property
    def boxes(self) -> list[tuple[int, int, int, int]]: ...
    @property
    def num_broken(self) -> int: ...


class Asked(Protocol):
    """What evaluation needs of a predictor; pictures are paths."""

    def answer(
        self, pictures: Sequence[Any], questions: Sequence[str], image_index: Sequence[int], max_new_tokens: int
    ) -> Sequence[Answered]: ...

    def segment(
        self, pictures: Sequence[Any], conversations: Sequence[list[tuple[str, str]]], image_index: Sequence[int]
    ) -> Sequence[Answered]: ...


@dataclass(frozen=True)
class EvalQuestion:
    """One question about one picture; number: its place among those of its sample."""

    image_path: str
    dataset: str
    sample_id: str
    number: int
    turn: Turn


@dataclass(frozen=True)
class Scored:
    """A question, its true masks uint8 (G, H, W), an answer to it, what that answer scored, and the question's figures.

    protocol: which way of asking the answer and `shown` are from: free wherever the model said its groups itself.
    """

    question: EvalQuestion
    truths: np.ndarray
    answer: Answered
    protocol: str
    shown: Drawn
    figures: Figures


def evaluate(
    predictor: Asked,
    samples: Iterable[Sample],
    *,
    batch_size: int = 16,
    limit: int = 0,
    protocols: Sequence[str] = (FREE, TEACHER),
    shuffled: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_scored: Callable[[Scored], None] | None = None,
    restore: Callable[[EvalQuestion], Scored | None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask every question of `samples` and return `summarise` of what came out.

    batch_size: questions answered together; those about one picture stay together, so that it is encoded once.
    limit: score this many questions, evenly spread; 0 for all. protocols: of PROTOCOLS. shuffled: also show other
    pictures, where free is among them. on_scored: called for every question in turn. restore: gives a question as it
    was scored before; a batch of which it has all is not asked again. progress: show a bar on stderr
    with the running gIoU. Raises UserError when there is no question to score, and ValueError when a conversation has
    several turns or a true mask is not of its picture's size.
    """
    questions = questions_of(samples)
    asked = [question for question in questions if question.turn.kind != TEXT]
    if not any(question.turn.targets or {FREE, RELEASE} & set(protocols) for question in asked):
        raise UserError(f"there is nothing to score among {len(questions)} questions: none asks for masks")
    eligible = asked if {FREE, RELEASE} & set(protocols) else [question for question in asked if question.turn.targets]
    chosen = _spread(eligible, limit)
    others = _other_pictures(chosen) if shuffled and FREE in protocols else {}
    figures: list[Figures] = []
    total = 0.0
    with tqdm(total=len(chosen), desc="evaluate", unit="question", disable=not progress) as bar:
        for batch in _batches(chosen, batch_size):
            before = [one for question in batch if restore and (one := restore(question))]
            whole = len(before) == len(batch)
            for scored in before if whole else _score_batch(predictor, batch, protocols, others, max_new_tokens):
                figures.append(scored.figures)
                total += scored.shown.iou
                if on_scored is not None:
                    on_scored(scored)
            bar.update(len(batch))
            bar.set_postfix(giou=f"{total / len(figures):.3f}", refresh=False)
    return summarise(figures) | {
        "left_out": {
            "text": len(questions) - len(asked),
            "no_target": len(asked) - len(eligible),
            "limit": len(eligible) - len(chosen),
            "ignored_pixels": sum(one.num_ignored for one in figures),
        }
    }


def questions_of(samples: Iterable[Sample]) -> list[EvalQuestion]:
    """All questions, those about one picture side by side. ValueError when a conversation is not a single turn."""
    by_picture: dict[str, list[EvalQuestion]] = {}
    for sample in samples:
        for number, conversation in enumerate(sample.conversations):
            if len(conversation) != 1:
                raise ValueError(
                    f"sample {sample.sample_id} of {sample.dataset} has a conversation of {len(conversation)} turns; "
                    "for evaluation every question is a conversation of its own"
                )
            question = EvalQuestion(sample.image_path, sample.dataset, sample.sample_id, number, conversation[0])
            by_picture.setdefault(sample.image_path, []).append(question)
    return [question for group in by_picture.values() for question in group]


def baseline_giou(samples: Iterable[Sample], draw: Callable[[str], np.ndarray]) -> float | None:
    """gIoU of a rule that draws one mask per picture whatever is asked. draw: picture path -> bool (H, W)."""
    ious = []
    for question in questions_of(samples):
        if question.turn.kind != TEXT:
            mask = draw(question.image_path)
            ious.append(metrics.question_iou(mask[None], truths_of(question, mask.shape)))
    return metrics.mean(ious)


def _spread(questions: Sequence[EvalQuestion], limit: int) -> list[EvalQuestion]:
    if limit == 0 or limit >= len(questions):
        return list(questions)
    return [questions[number * len(questions) // limit] for number in range(limit)]


def _batches(questions: Sequence[EvalQuestion], batch_size: int) -> Iterator[list[EvalQuestion]]:
    """Runs of at most `batch_size` questions; a picture's questions are parted only where they are more than that."""
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


def _other_pictures(questions: Sequence[EvalQuestion]) -> dict[str, str]:
    """Another picture of the set for every picture, far from it in the set's order; empty for a single picture."""
    paths = list(dict.fromkeys(question.image_path for question in questions))
    shift = max(1, len(paths) // 2)
    return {path: paths[(place + shift) % len(paths)] for place, path in enumerate(paths)} if len(paths) > 1 else {}


def truths_of(question: EvalQuestion, size: tuple[int, ...]) -> np.ndarray:
    """(G, H, W) uint8; `size` is that of the picture, for questions without a target."""
    masks = [target.decode() for target in question.turn.targets]
    return np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)


def _index(paths: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct paths in order, and the number of each path among them."""
    distinct = list(dict.fromkeys(paths))
    numbers = {path: number for number, path in enumerate(distinct)}
    return distinct, [numbers[path] for path in paths]


def _score_batch(
    predictor: Asked,
    batch: Sequence[EvalQuestion],
    protocols: Sequence[str],
    others: Mapping[str, str],
    max_new_tokens: int,
) -> Iterator[Scored]:
    everything = range(len(batch))
    with_targets = [number for number in everything if batch[number].turn.targets]
    free: dict[int, Answered] = {}
    forced: dict[int, Answered] = {}
    elsewhere: dict[int, Answered] = {}
    if {FREE, RELEASE} & set(protocols):
        free = _answers(predictor, batch, everything, max_new_tokens)
    if with_targets and {TEACHER, RELEASE} & set(protocols):
        turns = [[(batch[number].turn.question, batch[number].turn.answer)] for number in with_targets]
        pictures, image_index = _index([batch[number].image_path for number in with_targets])
        forced = dict(zip(with_targets, predictor.segment(pictures, turns, image_index), strict=True))
    if with_targets and others:
        elsewhere = _answers(predictor, batch, with_targets, max_new_tokens, others)
    for number, question in enumerate(batch):
        shown = free.get(number) or forced[number]
        truths = truths_of(question, shown.masks.shape[1:])
        ways = _Ways(free.get(number), forced.get(number), elsewhere.get(number))
        measured = drawn(shown.masks, truths)
        figures = _figures(question, truths, measured, ways, protocols)
        yield Scored(question, truths, shown, FREE if ways.free is not None else TEACHER, measured, figures)


def _answers(
    predictor: Asked,
    batch: Sequence[EvalQuestion],
    numbers: Sequence[int],
    max_new_tokens: int,
    others: Mapping[str, str] | None = None,
) -> dict[int, Answered]:
    """Free-running answers to the questions `numbers` of a batch, each about its own picture or that in `others`."""
    paths = [batch[number].image_path for number in numbers]
    pictures, image_index = _index(paths if others is None else [others[path] for path in paths])
    texts = [batch[number].turn.question for number in numbers]
    return dict(zip(numbers, predictor.answer(pictures, texts, image_index, max_new_tokens), strict=True))


@dataclass(frozen=True)
class _Ways:
    """The answers to one question; None where that way of asking was not taken."""

    free: Answered | None
    forced: Answered | None
    elsewhere: Answered | None


def _figures(
    question: EvalQuestion, truths: np.ndarray, shown: Drawn, ways: _Ways, protocols: Sequence[str]
) -> Figures:
    """shown: what the free-running answer scored where there is one, else the teacher-forced one."""
    turn = question.turn
    of_class = question.dataset in CLASS_SETS and len(turn.targets) == 1
    told: dict[str, Any] = {}
    if FREE in protocols and ways.free is not None:
        told |= {"free": shown, "said": _said(ways.free, [target.name for target in turn.targets])}
    if TEACHER in protocols and ways.forced is not None:
        told["forced"] = shown if ways.free is None else drawn(ways.forced.masks, truths)
    if ways.elsewhere is not None:
        told["shuffled_iou"] = metrics.question_iou(_resized(ways.elsewhere.masks, truths.shape[1:]), truths)
    if RELEASE in protocols and ways.free is not None:
        told["release"] = _release(question, truths, ways.free, ways.forced)
    return Figures(
        kind=turn.kind,
        dataset=question.dataset,
        picture=question.image_path,
        num_targets=len(turn.targets),
        class_name=turn.targets[0].name if of_class else None,
        num_ignored=int(np.count_nonzero(metrics.unite_truths(truths) == IGNORE_LABEL)),
        **told,
    )


def _said(answer: Answered, names: Sequence[str]) -> Said:
    return Said(
        num_masks=len(answer.masks),
        num_broken=answer.num_broken,
        num_named=metrics.named(answer.phrases, names),
        text_right=metrics.names_exactly(answer.phrases, names),
        scores=tuple(min(float(value), 1.0) for value in answer.scores),
    )


def _release(question: EvalQuestion, truths: np.ndarray, free: Answered, forced: Answered | None) -> Release:
    # The release draws its points anew at every run; here a question always gets the same ones.
    rng = np.random.default_rng(zlib.crc32(f"{question.sample_id}#{question.number}".encode()))
    return Release(
        forced=None if forced is None else release_protocol.count_forced(_logits(forced), truths),
        generated=release_protocol.count_generated(release_protocol.match_question(_logits(free), truths, rng)),
    )


def _logits(answer: Answered) -> np.ndarray:
    found = getattr(answer, "logits", None)
    if found is None:
        raise TypeError(
            f"answers of this predictor ({type(answer).__name__}) keep no logits, which the protocol {RELEASE!r} "
            "counts; give a predictor whose answers have them as `logits`"
        )
    return np.asarray(found)


def _resized(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """bool (Q, H, W) stretched to `size` (height, width) by nearest neighbour."""
    if masks.shape[1:] == size:
        return masks
    height, width = size
    stretched = [cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for m in masks]
    return np.array(stretched, dtype=bool).reshape(len(masks), height, width)
