"""Asks a predictor every question of a data set and hands what comes back to the scores, by protocol.

The predictor is handed in; this file knows of it only `answer` and `segment` (see `Predictor`). The protocols:

- free: the model gets the image and the question and must say its seg groups itself. What a user gets.
- teacher: the true answer with its groups is given, the model only draws. Questions without a target are left out,
  because an answer without groups draws nothing and would always be right.
- release: both of the release's validation loops with their quirks (`release_protocol`), for quoting beside
  numbers that were made so. Needs answers that keep their logits.

Beside free, another image of the same set may be shown ("shuffled") while the truth stays that of the question's own
image: what can be had from the words alone. Questions without a target are left out there too.

Questions answered in words alone have scores of their own (`ask_text`).

The unit is the question. Its IoU is that of the union of its predicted masks with the union of its true masks, as
gRefCOCO scores sentences with several targets; a question without a target scores 1 when no mask is predicted and
else 0. gIoU is the mean over questions, cIoU the sum of intersections over the sum of unions.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from model.answers import Answer
from model.predictor import Predictor
from model.structures import IGNORE_LABEL
from utils.data.readers.registry import MUSE, REASON_SEG
from utils.data.samples import TEXT, Sample
from utils.data.templates import REGION_ASKED_FOR
from utils.evaluation import metrics, release_protocol
from utils.evaluation.aggregate import (
    CLASS_SETS,
    LONG,
    SHORT,
    MaskScores,
    PhraseScores,
    QuestionScores,
    ReleaseCounts,
    WordScores,
    score_masks,
    summarise,
)
from utils.evaluation.metrics import Matched
from utils.evaluation.protocols import FREE, RELEASE, TEACHER
from utils.evaluation.questions import EvalQuestion, Plan, decode_truths, list_questions, make_plan


@dataclass(frozen=True)
class Pairing:
    """Which predicted masks belong to which targets by MUSE's matching, and what they score so.

    partners: for every predicted mask the number of its target, None where it has none.
    """

    partners: tuple[int | None, ...]
    matched: Matched


@dataclass(frozen=True)
class Scored:
    """A question, its true masks uint8 (G, H, W), an answer to it, what that answer scored, and the question's figures.

    protocol: which way of asking the answer and `shown` are from: free wherever the model said its groups itself.
    pairing: of MUSE's free-running answers.
    """

    question: EvalQuestion
    truths: np.ndarray
    answer: Answer
    protocol: str
    shown: MaskScores
    figures: QuestionScores
    pairing: Pairing | None = None


@dataclass(frozen=True)
class ScoredText:
    """A question that is answered in words alone, what the model said (None where it was not let speak), and the
    question's figures."""

    question: EvalQuestion
    text: str | None
    figures: QuestionScores


def evaluate(
    predictor: Predictor,
    samples: Iterable[Sample],
    *,
    on_scored: Callable[[Scored], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Ask every question of `samples` and return `summary` of what came out.

    options: those of `make_plan`, but for text. on_scored: called for every question in turn. progress: show a bar on
    stderr with the running gIoU. Raises what `make_plan` does, and ValueError when a true mask is not of its image's
    size.
    """
    plan = make_plan(samples, **options)
    figures: list[QuestionScores] = []
    with Progress(len(plan.questions), progress) as bar:
        for scored in ask(predictor, plan, plan.batches):
            figures.append(scored.figures)
            bar.add(scored.shown.iou)
            if on_scored is not None:
                on_scored(scored)
    return summary(plan, figures)


def summary(plan: Plan, figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """`summarise`, with what took no part."""
    ignored = sum(one.num_ignored for one in figures)
    return summarise(figures) | {"left_out": {**plan.left_out, "ignored_pixels": ignored}}


class Progress:
    """A bar on stderr that counts questions and shows the gIoU so far."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="evaluate", unit="question", disable=not shown)
        self._sum, self._n = 0.0, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, iou: float | None) -> None:
        """Count a question; iou: None where it has none."""
        if iou is not None:
            self._sum, self._n = self._sum + iou, self._n + 1
            self._bar.set_postfix(giou=f"{self._sum / self._n:.3f}", refresh=False)
        self._bar.update()


def baseline_giou(samples: Iterable[Sample], draw: Callable[[str], np.ndarray]) -> float | None:
    """gIoU of a rule that draws one mask per image whatever is asked. draw: image path -> bool (H, W)."""
    ious = []
    for question in list_questions(samples):
        if question.turn.kind != TEXT:
            mask = draw(question.image_path)
            ious.append(metrics.question_iou(mask[None], decode_truths(question, mask.shape)))
    return metrics.mean(ious)


def ask(predictor: Predictor, plan: Plan, batches: Iterable[Sequence[EvalQuestion]]) -> Iterator[Scored]:
    """Ask batches of questions about masks as the plan says, and score the answers in order."""
    return (scored for batch in batches for scored in _score_batch(predictor, batch, plan))


def ask_text(predictor: Any, plan: Plan, batches: Iterable[Sequence[EvalQuestion]]) -> Iterator[ScoredText]:
    """Ask batches of questions that are answered in words alone, each after the true turns before it.

    free: the model answers. teacher: how likely it finds the true answer. predictor: `Predictor` and `ScoredPredictor`.
    """
    for batch in batches:
        images, image_index = _index([one.image_path for one in batch])
        earlier = [[(turn.question, turn.answer) for turn in one.earlier] for one in batch]
        said: list[str | None] = [None] * len(batch)
        read: Sequence[tuple[float, int] | None] = [None] * len(batch)
        if FREE in plan.protocols:
            said = _answer_texts(predictor, batch, earlier, plan.max_new_tokens)
        if TEACHER in plan.protocols:
            whole = [[*turns, (one.turn.question, one.turn.answer)] for turns, one in zip(earlier, batch, strict=True)]
            read = predictor.likelihoods(images, whole, image_index)
        for question, text, likelihood in zip(batch, said, read, strict=True):
            yield ScoredText(question, text, _score_text(question, text, likelihood))


def _answer_texts(
    predictor: Any, batch: Sequence[EvalQuestion], earlier: Sequence[list[tuple[str, str]]], max_new_tokens: int
) -> list[str | None]:
    """The answers, None where there is no room for the question."""
    asked = [[*turns, (one.turn.question, None)] for turns, one in zip(earlier, batch, strict=True)]
    fitting = [number for number, turns in enumerate(asked) if predictor.fits(turns)]
    images, image_index = _index([batch[number].image_path for number in fitting])
    answers = predictor.answer(images, [asked[number] for number in fitting], image_index, max_new_tokens)
    said: list[str | None] = [None] * len(batch)
    for number, answer in zip(fitting, answers, strict=True):
        said[number] = answer.text
    return said


def _score_text(question: EvalQuestion, text: str | None, likelihood: tuple[float, int] | None) -> QuestionScores:
    references = (question.turn.answer, *question.references)
    nll, tokens = likelihood or (None, None)
    words = WordScores(
        text=text,
        references=references,
        exact=None if text is None else metrics.exact_match(text, references),
        vqa=None if text is None else metrics.vqa_accuracy(text, references),
        nll=nll,
        num_tokens=tokens,
    )
    return QuestionScores(TEXT, question.dataset, question.image_path, 0, words=words)


def _score_batch(predictor: Predictor, batch: Sequence[EvalQuestion], plan: Plan) -> Iterator[Scored]:
    protocols, others, max_new_tokens = plan.protocols, plan.others, plan.max_new_tokens
    everything = range(len(batch))
    with_targets = [number for number in everything if batch[number].turn.targets]
    free: dict[int, Answer] = {}
    forced: dict[int, Answer] = {}
    elsewhere: dict[int, Answer] = {}
    if {FREE, RELEASE} & set(protocols):
        free = _answers(predictor, batch, everything, max_new_tokens)
    if with_targets and {TEACHER, RELEASE} & set(protocols):
        turns = [[(batch[number].turn.question, batch[number].turn.answer)] for number in with_targets]
        images, image_index = _index([batch[number].image_path for number in with_targets])
        forced = dict(zip(with_targets, predictor.segment(images, turns, image_index), strict=True))
    if with_targets and others:
        elsewhere = _answers(predictor, batch, with_targets, max_new_tokens, others)
    for number, question in enumerate(batch):
        shown = free.get(number) or forced[number]
        truths = decode_truths(question, shown.masks.shape[1:])
        ways = _Answers(free.get(number), forced.get(number), elsewhere.get(number))
        measured = score_masks(shown.masks, truths)
        figures = _score_question(question, truths, measured, ways, protocols)
        paired = plan.pair and FREE in protocols and _set_of(question) == MUSE
        pairing = _pair_masks(question, truths, shown) if paired else None
        yield Scored(question, truths, shown, FREE if ways.free is not None else TEACHER, measured, figures, pairing)


def _answers(
    predictor: Predictor,
    batch: Sequence[EvalQuestion],
    numbers: Sequence[int],
    max_new_tokens: int,
    others: Mapping[str, str] | None = None,
) -> dict[int, Answer]:
    """Free-running answers to the questions `numbers` of a batch, each about its own image or that in `others`."""
    paths = [batch[number].image_path for number in numbers]
    images, image_index = _index(paths if others is None else [others[path] for path in paths])
    texts = [batch[number].turn.question for number in numbers]
    return dict(zip(numbers, predictor.answer(images, texts, image_index, max_new_tokens), strict=True))


@dataclass(frozen=True)
class _Answers:
    """The answers to one question; None where that way of asking was not taken."""

    free: Answer | None
    forced: Answer | None
    elsewhere: Answer | None


def _score_question(
    question: EvalQuestion, truths: np.ndarray, shown: MaskScores, ways: _Answers, protocols: Sequence[str]
) -> QuestionScores:
    """shown: what the free-running answer scored where there is one, else the teacher-forced one."""
    turn = question.turn
    of_class = _set_of(question) in CLASS_SETS and len(turn.targets) == 1
    told: dict[str, Any] = {}
    if FREE in protocols and ways.free is not None:
        told |= {"free": shown, "said": _score_phrases(ways.free, [target.name for target in turn.targets])}
    if TEACHER in protocols and ways.forced is not None:
        told["forced"] = shown if ways.free is None else score_masks(ways.forced.masks, truths)
    if ways.elsewhere is not None:
        told["shuffled_iou"] = metrics.question_iou(_resize_masks(ways.elsewhere.masks, truths.shape[1:]), truths)
    if RELEASE in protocols and ways.free is not None:
        told["release"] = _release(question, truths, ways.free, ways.forced)
    return QuestionScores(
        kind=turn.kind,
        dataset=question.dataset,
        image=question.image_path,
        num_targets=len(turn.targets),
        class_name=" ".join(metrics.name_words(turn.targets[0].name)) if of_class else None,
        query=_query(question),
        num_ignored=int(np.count_nonzero(metrics.unite_truths(truths) == IGNORE_LABEL)),
        **told,
    )


def _score_phrases(answer: Answer, names: Sequence[str]) -> PhraseScores:
    return PhraseScores(
        num_masks=len(answer.masks),
        num_broken=answer.num_broken,
        num_named=metrics.count_named(answer.phrases, names),
        text_right=metrics.names_exactly(answer.phrases, names),
        scores=tuple(min(float(value), 1.0) for value in answer.scores),
    )


def _set_of(question: EvalQuestion) -> str:
    """The data set of a question, without split."""
    return question.dataset.split("|")[0]


def _query(question: EvalQuestion) -> str | None:
    """Of ReasonSeg's questions, whether they are sentences, which name no target, or phrases; else None."""
    if _set_of(question) != REASON_SEG:
        return None
    return LONG if any(target.name == REGION_ASKED_FOR for target in question.turn.targets) else SHORT


def _rng(question: EvalQuestion) -> np.random.Generator:
    """Always the same for a question. (The release draws its points anew at every run.)"""
    return np.random.default_rng(zlib.crc32(f"{question.sample_id}#{question.number}".encode()))


def _pair_masks(question: EvalQuestion, truths: np.ndarray, answer: Answer) -> Pairing:
    matched = release_protocol.match_question(_require_logits(answer), truths, _rng(question))
    partner_of = dict(matched.pairs)
    partners = tuple(partner_of.get(number) for number in range(len(answer.masks)))
    return Pairing(partners, metrics.pair_masks(answer.masks, truths, matched.pairs))


def _release(question: EvalQuestion, truths: np.ndarray, free: Answer, forced: Answer | None) -> ReleaseCounts:
    return ReleaseCounts(
        forced=None if forced is None else release_protocol.count_forced(_require_logits(forced), truths),
        generated=release_protocol.count_generated(
            release_protocol.match_question(_require_logits(free), truths, _rng(question))
        ),
    )


def _require_logits(answer: Answer) -> np.ndarray:
    found = getattr(answer, "logits", None)
    if found is None:
        raise TypeError(
            f"answers of this predictor ({type(answer).__name__}) keep no logits, which the protocol {RELEASE!r} and "
            "MUSE's matching need; give a predictor whose answers have them as `logits`"
        )
    return np.asarray(found)


def _resize_masks(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """bool (Q, H, W) stretched to `size` (height, width) by nearest neighbour."""
    if masks.shape[1:] == size:
        return masks
    height, width = size
    stretched = [cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for m in masks]
    return np.array(stretched, dtype=bool).reshape(len(masks), height, width)


def _index(paths: Sequence[str]) -> tuple[list[str], list[int]]:
    """Distinct paths in order, and the number of each path among them."""
    distinct = list(dict.fromkeys(paths))
    numbers = {path: number for number, path in enumerate(distinct)}
    return distinct, [numbers[path] for path in paths]
