"""What one question scored, and the scores of many: plain numbers, no masks, no files.

Every score is a sum of numerators over a sum of denominators (`RATIOS`), so that its mean and its bootstrap interval
come from the same place. Questions that have no part in a score give it nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.data.readers.registry import FAMILIES
from utils.data.samples import KINDS
from utils.evaluation import bootstrap, metrics, release_protocol, text_quality
from utils.evaluation.metrics import Matched, Overlap
from utils.evaluation.release_protocol import Counts

CLASS_SETS = frozenset(FAMILIES["sem_seg"])
"""Data sets whose questions ask for a class each: they are scored by class too."""

SHORT, LONG = "short", "long"
"""Queries of ReasonSeg: a phrase, a sentence."""


@dataclass(frozen=True)
class MaskScores:
    """What the masks of one answer scored.

    overlap, iou: of their union with the union of the true ones. matched: mask by mask. box_right: see
    `metrics.box_right`.
    """

    overlap: Overlap
    iou: float
    matched: Matched
    box_right: bool | None


def score_masks(masks: np.ndarray, truths: np.ndarray) -> MaskScores:
    """Score masks bool (P, H, W) against truths uint8 (G, H, W)."""
    return MaskScores(
        overlap=metrics.question_overlap(masks, truths),
        iou=metrics.question_iou(masks, truths),
        matched=metrics.match_masks(masks, truths),
        box_right=metrics.box_right(masks, truths),
    )


@dataclass(frozen=True)
class PhraseScores:
    """What the words of a free-running answer scored. scores: the model's own, one per mask.

    num_named: phrases that name a target, one to one. text_right: the phrases name exactly the true set.
    """

    num_masks: int
    num_broken: int
    num_named: int
    text_right: bool
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ReleaseCounts:
    """What a question adds to the meters of the release's loops; `forced` is None of a question without a target."""

    forced: Counts | None
    generated: Counts


@dataclass(frozen=True)
class WordScores:
    """What an answer in words scored against its references, the first of which is the one that was read.

    text: the answer. exact, vqa: see `metrics`; None without an answer, vqa also where there are too few references.
    nll: the sum of −ln p over the tokens of the true answer, num_tokens of them; None where it was not read.
    """

    text: str | None
    references: tuple[str, ...]
    exact: bool | None
    vqa: float | None
    nll: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class QuestionScores:
    """What one question scored; None where that way of asking was not taken.

    image: the unit of the bootstrap. class_name: of a question that asks for one class. query: SHORT or LONG, of a
    question of ReasonSeg. num_ignored: pixels of the truth that took no part. words: of a question that is answered in
    words alone; all else is then empty.
    """

    kind: str
    dataset: str
    image: str
    num_targets: int
    class_name: str | None = None
    query: str | None = None
    num_ignored: int = 0
    free: MaskScores | None = None
    said: PhraseScores | None = None
    forced: MaskScores | None = None
    shuffled_iou: float | None = None
    release: ReleaseCounts | None = None
    words: WordScores | None = None

    @property
    def count_right(self) -> bool | None:
        """Whether as many masks were drawn as there are targets; None unless free-running."""
        return None if self.said is None else self.said.num_masks == self.num_targets


Ratio = tuple[float, float]


def _share(value: float | bool | None) -> Ratio | None:
    return None if value is None else (float(value), 1)


def _pixels(overlap: Overlap | None) -> Ratio | None:
    return None if overlap is None else (overlap.intersection, overlap.union)


RATIOS: Mapping[str, Callable[[QuestionScores], Ratio | None]] = {
    "giou": lambda f: _share(None if f.free is None else f.free.iou),
    "ciou": lambda f: _pixels(None if f.free is None else f.free.overlap),
    "giou_matched": lambda f: _share(None if f.free is None else f.free.matched.iou),
    "giou_teacher_forced": lambda f: _share(None if f.forced is None else f.forced.iou),
    "ciou_teacher_forced": lambda f: _pixels(None if f.forced is None else f.forced.overlap),
    "giou_shuffled": lambda f: _share(f.shuffled_iou),
    "target_count_accuracy": lambda f: _share(f.count_right),
    "text_accuracy": lambda f: _share(None if f.said is None else f.said.text_right),
}
"""Numerator and denominator that a question about masks adds to each score; None where it has no part in it."""

TEXT_RATIOS: Mapping[str, Callable[[QuestionScores], Ratio | None]] = {
    "exact_match": lambda f: _share(f.words.exact if f.words else None),
    "vqa_accuracy": lambda f: _share(f.words.vqa if f.words else None),
    "nll": lambda f: (
        (f.words.nll, f.words.num_tokens)
        if f.words and f.words.nll is not None and f.words.num_tokens is not None
        else None
    ),
}
"""The same of questions answered in words alone. nll: −ln p of a token, whose exponential is the perplexity."""

_ALL_RATIOS = {**RATIOS, **TEXT_RATIOS}

_OF_SETS = ("giou", "ciou", "giou_teacher_forced", "ciou_teacher_forced")
"""Scores whose intervals are told by data set."""


def score(name: str, figures: Sequence[QuestionScores]) -> float | None:
    """A score of `RATIOS` or `TEXT_RATIOS` over questions; None where none of them has a part, 1.0 where the
    denominators sum to 0."""
    parts = [part for one in figures if (part := _ALL_RATIOS[name](one)) is not None]
    if not parts:
        return None
    below = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / below if below else 1.0


def interval(names: Sequence[str], figures: Sequence[QuestionScores]) -> dict[str, list[float] | None]:
    """[low, high] of the 95% bootstrap interval of each named score, images as units; None where the score is."""
    parts = {name: [_ALL_RATIOS[name](one) for one in figures] for name in names}
    # Scores in which the same questions have a part share their draws, which take nearly all of the time.
    together: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        taking = tuple(number for number, part in enumerate(parts[name]) if part is not None)
        together.setdefault(taking, []).append(name)
    found: dict[str, list[float] | None] = dict.fromkeys(names)
    for taking, group in together.items():
        if taking:
            images = [figures[number].image for number in taking]
            rows = [[part for name in group if (part := parts[name][number]) is not None] for number in taking]
            sums = bootstrap.by_unit(images, np.asarray(rows, dtype=np.float64).reshape(len(rows), -1))
            bounds = bootstrap.ratio_intervals(sums[:, 0::2], sums[:, 1::2])
            found.update({name: list(bound) for name, bound in zip(group, bounds, strict=True)})
    return found


def intervals(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """The 95% intervals of every score over all questions, of gIoU by kind, and of the main scores by data set."""
    by_kind, by_set = _group_by(figures, lambda one: one.kind), _group_by(figures, lambda one: one.dataset)
    return {
        "level": bootstrap.LEVEL,
        "draws": bootstrap.DRAWS,
        "unit": "image",
        **interval(tuple(RATIOS), figures),
        "giou_by_kind": {kind: interval(["giou"], by_kind[kind])["giou"] for kind in KINDS if kind in by_kind},
        "text": _text_intervals(figures),
        "datasets": {name: _intervals_of_set(group) for name, group in by_set.items()},
    }


def _intervals_of_set(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    found: dict[str, Any] = {
        f"{key}_interval": bounds for key, bounds in interval(_OF_SETS, figures).items() if bounds is not None
    }
    if queries := _group_by([one for one in figures if one.query is not None], lambda one: str(one.query)):
        found["by_query"] = {name: _intervals_of_set(_without_query(group)) for name, group in queries.items()}
    if text := _text_intervals(figures):
        found["text"] = text
    return found


def _text_intervals(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    found = {f"{key}_interval": bounds for key, bounds in interval(tuple(TEXT_RATIOS), figures).items() if bounds}
    if "nll_interval" in found:
        found["perplexity_interval"] = [math.exp(bound) for bound in found["nll_interval"]]
    return found


def _without_query(figures: Sequence[QuestionScores]) -> list[QuestionScores]:
    return [replace(one, query=None) for one in figures]


def summarise(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """Scores over all questions, by kind and by data set; a score nobody asked for is None. Keys ending in
    `_by_kind` hold the kinds that occur. Questions answered in words alone are told of under `text` only."""
    masks = [one for one in figures if one.words is None]
    found = _group_by(masks, lambda one: one.kind)
    by_kind = {kind: found[kind] for kind in KINDS if kind in found}
    result: dict[str, Any] = {"n": len(masks), "n_by_kind": {kind: len(group) for kind, group in by_kind.items()}}
    for name in RATIOS:
        result[name] = score(name, masks)
        result[f"{name}_by_kind"] = {kind: score(name, group) for kind, group in by_kind.items()}
    result["broken_groups"] = sum(one.said.num_broken for one in masks if one.said is not None)
    result |= _by_protocol(masks)
    result["text"] = _text_only(figures)
    result["datasets"] = {name: _of_set(group) for name, group in _group_by(figures, lambda one: one.dataset).items()}
    return result


def _by_protocol(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """What is told of each protocol beside the main scores; None where it was not asked for."""
    return {
        "free": _free_only(figures) if any(one.said for one in figures) else None,
        "teacher": _forced_only(figures) if any(one.forced for one in figures) else None,
        "release": _release_only(figures) if any(one.release for one in figures) else None,
    }


def _of_set(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    masks = [one for one in figures if one.words is None]
    found: dict[str, Any] = {"giou": score("giou", masks), "ciou": score("ciou", masks), "n": len(masks)}
    found |= _forced_of_set(masks) | _of_classes(masks)
    found |= {name: told for name, told in _by_protocol(masks).items() if told is not None}
    if queries := _group_by([one for one in masks if one.query is not None], lambda one: str(one.query)):
        found["by_query"] = {name: _of_set(_without_query(group)) for name, group in queries.items()}
    if text := _text_only(figures):
        found["text"] = text
    return found


def _text_only(figures: Sequence[QuestionScores]) -> dict[str, Any] | None:
    """Scores of questions answered in words alone; None without such questions."""
    words = [one.words for one in figures if one.words is not None]
    if not words:
        return None
    nll = score("nll", figures)
    said = [(one.text, one.references) for one in words if one.text is not None]
    return {
        "n": len(words),
        "n_answered": len(said),
        "exact_match": score("exact_match", figures),
        "vqa_accuracy": score("vqa_accuracy", figures),
        "n_vqa_accuracy": sum(one.vqa is not None for one in words),
        "bleu": text_quality.bleu([text for text, _ in said], [references for _, references in said]),
        "nll": nll,
        "perplexity": None if nll is None else math.exp(nll),
        "n_read": sum(one.nll is not None for one in words),
        "tokens_read": sum(one.num_tokens or 0 for one in words),
    }


def _free_only(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """Scores of free-running answers that have no key of their own at the top."""
    pairs = [(one, one.free, one.said) for one in figures if one.free is not None and one.said is not None]
    bins = metrics.calibration(
        [value for _, _, said in pairs for value in said.scores],
        [iou for _, free, _ in pairs for iou in free.matched.of_predictions],
    )
    n_acc, t_acc = metrics.no_target_accuracy(
        [said.num_masks for _, _, said in pairs], [one.num_targets for one, _, _ in pairs]
    )
    return {
        "precision": metrics.precision_at([free.iou for _, free, _ in pairs]),
        "ciou_matched": metrics.ciou([free.matched.overlap for _, free, _ in pairs]),
        "box_accuracy": metrics.mean([float(free.box_right) for _, free, _ in pairs if free.box_right is not None]),
        "n_acc": n_acc,
        "t_acc": t_acc,
        "calibration_error": metrics.calibration_error(bins),
        "calibration": [vars(one) for one in bins],
        "groups": {
            "emitted": sum(said.num_masks for _, _, said in pairs),
            "true": sum(one.num_targets for one, _, _ in pairs),
            "broken": sum(said.num_broken for _, _, said in pairs),
            "questions_with_groups": sum(said.num_masks > 0 for _, _, said in pairs),
            "questions_with_broken_groups": sum(said.num_broken > 0 for _, _, said in pairs),
            "questions_with_too_many": sum(said.num_masks > one.num_targets for one, _, said in pairs),
            "questions_with_too_few": sum(said.num_masks < one.num_targets for one, _, said in pairs),
        },
    }


def _forced_only(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """Scores with the answer given that have no key of their own at the top."""
    answers = [one.forced for one in figures if one.forced is not None]
    return {
        "n": len(answers),
        "precision": metrics.precision_at([one.iou for one in answers]),
        "giou_matched": metrics.mean([one.matched.iou for one in answers]),
        "ciou_matched": metrics.ciou([one.matched.overlap for one in answers]),
        "box_accuracy": metrics.mean([float(one.box_right) for one in answers if one.box_right is not None]),
    }


def _release_only(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """gIoU and cIoU of the release's two loops, each None where it saw no question."""
    images = _group_by([one for one in figures if one.release is not None], lambda one: one.image).values()
    generated = [[one.release.generated for one in group if one.release] for group in images]
    forced = [[one.release.forced for one in group if one.release and one.release.forced] for group in images]
    result: dict[str, Any] = {}
    for name, counts in (("validate", forced), ("ar_validate", generated)):
        giou, ciou = release_protocol.read_meters(counts, generated=name == "ar_validate")
        seen = any(counts)
        result[name] = {"giou": giou if seen else None, "ciou": ciou if seen else None}
    return result


def _forced_of_set(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    forced = sum(one.forced is not None for one in figures)
    if not forced:
        return {}
    names = ("giou_teacher_forced", "ciou_teacher_forced")
    return {"n_teacher_forced": forced} | {name: score(name, figures) for name in names}


def _of_classes(figures: Sequence[QuestionScores]) -> dict[str, Any]:
    """IoU by class and their mean, free-running and with the answer given; nothing unless classes were asked for."""
    named = [(one.class_name, one) for one in figures if one.class_name is not None]
    if not named:
        return {}
    free = metrics.class_ious((name, one.free.overlap) for name, one in named if one.free is not None)
    forced = metrics.class_ious((name, one.forced.overlap) for name, one in named if one.forced is not None)
    return {
        "miou": metrics.mean(list(free.values())),
        "miou_teacher_forced": metrics.mean(list(forced.values())),
        "class_iou": free,
        "class_iou_teacher_forced": forced,
    }


def _group_by(
    figures: Sequence[QuestionScores], key: Callable[[QuestionScores], str]
) -> dict[str, list[QuestionScores]]:
    groups: dict[str, list[QuestionScores]] = {}
    for one in figures:
        groups.setdefault(key(one), []).append(one)
    return groups
