"""Free-running and teacher-forced scores of a predictor, by kind of question.

The predictor is handed in; this file knows of it only `answer` and `segment` (see `Asked`). Three ways of asking:

- free: the model gets the picture and the question and must say its seg groups itself. What a user gets.
- teacher-forced: the true answer with its groups is given, the model only draws. Questions without a target are left
  out, because an answer without groups draws nothing and would always be right.
- shuffled: free, but another picture of the same set is shown while the truth stays that of the question's own
  picture: what can be had from the words alone. Questions without a target are left out.

The unit is the question. Its IoU is that of the union of its predicted masks with the union of its true masks, as
gRefCOCO scores sentences with several targets; a question without a target scores 1 when no mask is predicted and
else 0. gIoU is the mean over questions, cIoU the sum of intersections over the sum of unions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import cv2
import numpy as np
from tqdm import tqdm

from utils import metrics
from utils.data.samples import KINDS, TEXT, Sample, Turn
from utils.metrics import Overlap
from utils.scripts import UserError

MAX_NEW_TOKENS = 256


class Answered(Protocol):
    """What is read of an answer: its words, and a bool mask (Q, H, W) for every group."""

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
    """One question about one picture."""

    image_path: str
    dataset: str
    sample_id: str
    turn: Turn


@dataclass(frozen=True)
class Figures:
    """What one question scored; None where that way of asking was not taken. See `Scored` for what was answered."""

    kind: str
    dataset: str
    overlap: Overlap
    iou: float
    matched_iou: float
    count_right: bool
    text_right: bool
    num_broken: int
    forced_overlap: Overlap | None = None
    forced_iou: float | None = None
    shuffled_iou: float | None = None


@dataclass(frozen=True)
class Scored:
    """A question, its true masks uint8 (G, H, W), the free-running answer, and what it scored."""

    question: EvalQuestion
    truths: np.ndarray
    answer: Answered
    figures: Figures

    def as_dict(self) -> dict[str, Any]:
        """Plain enough for a line of JSON; without masks."""
        turn, figures = self.question.turn, self.figures
        return {
            "dataset": self.question.dataset,
            "sample_id": self.question.sample_id,
            "image_path": self.question.image_path,
            "kind": turn.kind,
            "question": turn.question,
            "names": [target.name for target in turn.targets],
            "answer": self.answer.marked_text,
            "phrases": list(self.answer.phrases),
            "scores": list(self.answer.scores),
            "boxes": [list(box) for box in self.answer.boxes],
            "num_broken": figures.num_broken,
            "iou": figures.iou,
            "intersection": figures.overlap.intersection,
            "union": figures.overlap.union,
            "matched_iou": figures.matched_iou,
            "count_right": figures.count_right,
            "text_right": figures.text_right,
            "iou_teacher_forced": figures.forced_iou,
            "iou_shuffled": figures.shuffled_iou,
        }


def evaluate(
    predictor: Asked,
    samples: Iterable[Sample],
    *,
    batch_size: int = 16,
    limit: int = 0,
    teacher_forced: bool = True,
    shuffled: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_scored: Callable[[Scored], None] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask every question of `samples` and return `summarise` of what came out.

    batch_size: questions answered together; those about one picture stay together, so that it is encoded once.
    limit: score this many questions, evenly spread; 0 for all. on_scored: called for every question in turn.
    progress: show a bar on stderr with the running gIoU. Raises UserError when there is no question to score, and
    ValueError when a conversation has several turns or a true mask is not of its picture's size.
    """
    questions = questions_of(samples)
    asked = [question for question in questions if question.turn.kind != TEXT]
    if not asked:
        raise UserError(f"there is nothing to score among {len(questions)} questions: none asks for masks")
    chosen = _spread(asked, limit)
    others = _other_pictures(chosen) if shuffled else {}
    figures: list[Figures] = []
    with tqdm(total=len(chosen), desc="evaluate", unit="question", disable=not progress) as bar:
        for batch in _batches(chosen, batch_size):
            for scored in _score_batch(predictor, batch, teacher_forced, others, max_new_tokens):
                figures.append(scored.figures)
                if on_scored is not None:
                    on_scored(scored)
            bar.update(len(batch))
            bar.set_postfix(giou=f"{metrics.mean([f.iou for f in figures]):.3f}", refresh=False)
    return summarise(figures) | {"left_out": {"text": len(questions) - len(asked), "limit": len(asked) - len(chosen)}}


def questions_of(samples: Iterable[Sample]) -> list[EvalQuestion]:
    """All questions, those about one picture side by side. ValueError when a conversation is not a single turn."""
    by_picture: dict[str, list[EvalQuestion]] = {}
    for sample in samples:
        for conversation in sample.conversations:
            if len(conversation) != 1:
                raise ValueError(
                    f"sample {sample.sample_id} of {sample.dataset} has a conversation of {len(conversation)} turns; "
                    "for evaluation every question is a conversation of its own"
                )
            question = EvalQuestion(sample.image_path, sample.dataset, sample.sample_id, conversation[0])
            by_picture.setdefault(sample.image_path, []).append(question)
    return [question for group in by_picture.values() for question in group]


def summarise(figures: Sequence[Figures]) -> dict[str, Any]:
    """Scores over all questions, by kind and by data set; a score nobody asked for is None. Keys ending in
    `_by_kind` hold the kinds that occur."""
    found = _grouped(figures, lambda one: one.kind)
    by_kind = {kind: found[kind] for kind in KINDS if kind in found}
    result: dict[str, Any] = {"n": len(figures), "n_by_kind": {kind: len(group) for kind, group in by_kind.items()}}
    for name, score in _SCORES.items():
        result[name] = score(figures)
        result[f"{name}_by_kind"] = {kind: score(group) for kind, group in by_kind.items()}
    result["broken_groups"] = sum(one.num_broken for one in figures)
    result["datasets"] = {
        dataset: {"giou": _SCORES["giou"](group), "ciou": _SCORES["ciou"](group), "n": len(group)}
        for dataset, group in _grouped(figures, lambda one: one.dataset).items()
    }
    return result


def _grouped(figures: Sequence[Figures], key: Callable[[Figures], str]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = {}
    for one in figures:
        groups.setdefault(key(one), []).append(one)
    return groups


_SCORES: dict[str, Callable[[Sequence[Figures]], float | None]] = {
    "giou": lambda group: metrics.mean([f.iou for f in group]),
    "ciou": lambda group: metrics.ciou([f.overlap for f in group]),
    "giou_matched": lambda group: metrics.mean([f.matched_iou for f in group]),
    "giou_teacher_forced": lambda group: metrics.mean([f.forced_iou for f in group if f.forced_iou is not None]),
    "ciou_teacher_forced": lambda group: metrics.ciou(
        [f.forced_overlap for f in group if f.forced_overlap is not None]
    ),
    "giou_shuffled": lambda group: metrics.mean([f.shuffled_iou for f in group if f.shuffled_iou is not None]),
    "target_count_accuracy": lambda group: metrics.mean([float(f.count_right) for f in group]),
    "text_accuracy": lambda group: metrics.mean([float(f.text_right) for f in group]),
}


def baseline_giou(samples: Iterable[Sample], draw: Callable[[str], np.ndarray]) -> float | None:
    """gIoU of a rule that draws one mask per picture whatever is asked. draw: picture path -> bool (H, W)."""
    ious = []
    for question in questions_of(samples):
        if question.turn.kind != TEXT:
            mask = draw(question.image_path)
            ious.append(metrics.question_iou(mask[None], _truths(question, mask.shape)))
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


def _truths(question: EvalQuestion, size: tuple[int, ...]) -> np.ndarray:
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
    teacher_forced: bool,
    others: Mapping[str, str],
    max_new_tokens: int,
) -> Iterator[Scored]:
    pictures, image_index = _index([question.image_path for question in batch])
    texts = [question.turn.question for question in batch]
    answers = predictor.answer(pictures, texts, image_index, max_new_tokens)
    truths = [_truths(q, answer.masks.shape[1:]) for q, answer in zip(batch, answers, strict=True)]
    drawn = [number for number, question in enumerate(batch) if question.turn.targets]
    forced: dict[int, Answered] = {}
    if teacher_forced and drawn:
        turns = [[(batch[number].turn.question, batch[number].turn.answer)] for number in drawn]
        pictures, image_index = _index([batch[number].image_path for number in drawn])
        forced = dict(zip(drawn, predictor.segment(pictures, turns, image_index), strict=True))
    elsewhere: dict[int, Answered] = {}
    if others and drawn:
        pictures, image_index = _index([others[batch[number].image_path] for number in drawn])
        asked = [texts[number] for number in drawn]
        elsewhere = dict(zip(drawn, predictor.answer(pictures, asked, image_index, max_new_tokens), strict=True))
    for number, (question, truth, answer) in enumerate(zip(batch, truths, answers, strict=True)):
        yield Scored(
            question, truth, answer, _figures(question, truth, answer, forced.get(number), elsewhere.get(number))
        )


def _figures(
    question: EvalQuestion, truths: np.ndarray, answer: Answered, forced: Answered | None, elsewhere: Answered | None
) -> Figures:
    targets = question.turn.targets
    return Figures(
        kind=question.turn.kind,
        dataset=question.dataset,
        overlap=metrics.question_overlap(answer.masks, truths),
        iou=metrics.question_iou(answer.masks, truths),
        matched_iou=metrics.matched_iou(answer.masks, truths),
        count_right=len(answer.masks) == len(targets),
        text_right=metrics.names_exactly(answer.phrases, [target.name for target in targets]),
        num_broken=answer.num_broken,
        forced_overlap=None if forced is None else metrics.question_overlap(forced.masks, truths),
        forced_iou=None if forced is None else metrics.question_iou(forced.masks, truths),
        shuffled_iou=None
        if elsewhere is None
        else metrics.question_iou(_resized(elsewhere.masks, truths.shape[1:]), truths),
    )


def _resized(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """bool (Q, H, W) stretched to `size` (height, width) by nearest neighbour."""
    if masks.shape[1:] == size:
        return masks
    height, width = size
    stretched = [cv2.resize(m.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for m in masks]
    return np.array(stretched, dtype=bool).reshape(len(masks), height, width)
