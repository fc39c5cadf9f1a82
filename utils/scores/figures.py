"""What one question scored, and the scores of many: plain numbers, no masks, no files.

Every score is a sum of numerators over a sum of denominators (`RATIOS`), so that its mean and its bootstrap interval
come from the same place. Questions that have no part in a score give it nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils import metrics, release_protocol
from utils.data.readers import FAMILIES
from utils.data.samples import KINDS
from utils.metrics import Matched, Overlap
from utils.release_protocol import Counts
from utils.scores import bootstrap

CLASS_SETS = frozenset(FAMILIES["sem_seg"])
"""Data sets whose questions ask for a class each: they are scored by class too."""


@dataclass(frozen=True)
class Drawn:
    """What the masks of one answer scored.

    overlap, iou: of their union with the union of the true ones. matched: mask by mask. box_right: see
    `metrics.box_right`.
    """

    overlap: Overlap
    iou: float
    matched: Matched
    box_right: bool | None


def drawn(masks: np.ndarray, truths: np.ndarray) -> Drawn:
    """Score masks bool (P, H, W) against truths uint8 (G, H, W)."""
    return Drawn(
        overlap=metrics.question_overlap(masks, truths),
        iou=metrics.question_iou(masks, truths),
        matched=metrics.match_masks(masks, truths),
        box_right=metrics.box_right(masks, truths),
    )


@dataclass(frozen=True)
class Said:
    """What the words of a free-running answer scored. scores: the model's own, one per mask.

    num_named: phrases that name a target, one to one. text_right: the phrases name exactly the true set.
    """

    num_masks: int
    num_broken: int
    num_named: int
    text_right: bool
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Release:
    """What a question adds to the meters of the release's loops; `forced` is None of a question without a target."""

    forced: Counts | None
    generated: Counts


@dataclass(frozen=True)
class Figures:
    """What one question scored; None where that way of asking was not taken.

    picture: the unit of the bootstrap. class_name: of a question that asks for one class. num_ignored: pixels of the
    truth that took no part.
    """

    kind: str
    dataset: str
    picture: str
    num_targets: int
    class_name: str | None = None
    num_ignored: int = 0
    free: Drawn | None = None
    said: Said | None = None
    forced: Drawn | None = None
    shuffled_iou: float | None = None
    release: Release | None = None

    @property
    def count_right(self) -> bool | None:
        """Whether as many masks were drawn as there are targets; None unless free-running."""
        return None if self.said is None else self.said.num_masks == self.num_targets


Ratio = tuple[float, float]


def _share(value: float | bool | None) -> Ratio | None:
    return None if value is None else (float(value), 1)


def _pixels(overlap: Overlap | None) -> Ratio | None:
    return None if overlap is None else (overlap.intersection, overlap.union)


RATIOS: Mapping[str, Callable[[Figures], Ratio | None]] = {
    "giou": lambda f: _share(None if f.free is None else f.free.iou),
    "ciou": lambda f: _pixels(None if f.free is None else f.free.overlap),
    "giou_matched": lambda f: _share(None if f.free is None else f.free.matched.iou),
    "giou_teacher_forced": lambda f: _share(None if f.forced is None else f.forced.iou),
    "ciou_teacher_forced": lambda f: _pixels(None if f.forced is None else f.forced.overlap),
    "giou_shuffled": lambda f: _share(f.shuffled_iou),
    "target_count_accuracy": lambda f: _share(f.count_right),
    "text_accuracy": lambda f: _share(None if f.said is None else f.said.text_right),
}
"""Numerator and denominator that a question adds to each score; None where it has no part in it."""


_OF_SETS = ("giou", "ciou", "giou_teacher_forced", "ciou_teacher_forced")
"""Scores whose intervals are told by data set."""


def score(name: str, figures: Sequence[Figures]) -> float | None:
    """A score of `RATIOS` over questions; None where none of them has a part, 1.0 where the denominators sum to 0."""
    parts = [part for one in figures if (part := RATIOS[name](one)) is not None]
    if not parts:
        return None
    below = sum(part[1] for part in parts)
    return sum(part[0] for part in parts) / below if below else 1.0


def interval(names: Sequence[str], figures: Sequence[Figures]) -> dict[str, list[float] | None]:
    """[low, high] of the 95% bootstrap interval of each named score, pictures as units; None where the score is."""
    parts = {name: [RATIOS[name](one) for one in figures] for name in names}
    # Scores in which the same questions have a part share their draws, which take nearly all of the time.
    together: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        taking = tuple(number for number, part in enumerate(parts[name]) if part is not None)
        together.setdefault(taking, []).append(name)
    found: dict[str, list[float] | None] = dict.fromkeys(names)
    for taking, group in together.items():
        if taking:
            pictures = [figures[number].picture for number in taking]
            rows = [[part for name in group if (part := parts[name][number]) is not None] for number in taking]
            sums = bootstrap.by_unit(pictures, np.asarray(rows, dtype=np.float64).reshape(len(rows), -1))
            bounds = bootstrap.ratio_intervals(sums[:, 0::2], sums[:, 1::2])
            found.update({name: list(bound) for name, bound in zip(group, bounds, strict=True)})
    return found


def intervals(figures: Sequence[Figures]) -> dict[str, Any]:
    """The 95% intervals of every score over all questions, of gIoU by kind, and of the main scores by data set."""
    by_kind, by_set = _grouped(figures, lambda one: one.kind), _grouped(figures, lambda one: one.dataset)
    return {
        "level": bootstrap.LEVEL,
        "draws": bootstrap.DRAWS,
        "unit": "picture",
        **interval(tuple(RATIOS), figures),
        "giou_by_kind": {kind: interval(["giou"], by_kind[kind])["giou"] for kind in KINDS if kind in by_kind},
        "datasets": {
            name: {f"{key}_interval": found for key, found in interval(_OF_SETS, group).items() if found is not None}
            for name, group in by_set.items()
        },
    }


def summarise(figures: Sequence[Figures]) -> dict[str, Any]:
    """Scores over all questions, by kind and by data set; a score nobody asked for is None. Keys ending in
    `_by_kind` hold the kinds that occur."""
    found = _grouped(figures, lambda one: one.kind)
    by_kind = {kind: found[kind] for kind in KINDS if kind in found}
    result: dict[str, Any] = {"n": len(figures), "n_by_kind": {kind: len(group) for kind, group in by_kind.items()}}
    for name in RATIOS:
        result[name] = score(name, figures)
        result[f"{name}_by_kind"] = {kind: score(name, group) for kind, group in by_kind.items()}
    said = [one.said for one in figures if one.said is not None]
    result["broken_groups"] = sum(one.num_broken for one in said)
    result |= {
        "free": _free_only(figures) if said else None,
        "teacher": _forced_only(figures) if any(one.forced for one in figures) else None,
        "release": _release_only(figures) if any(one.release for one in figures) else None,
    }
    result["datasets"] = {
        name: {"giou": score("giou", group), "ciou": score("ciou", group), "n": len(group)}
        | _forced_of_set(group)
        | _of_classes(group)
        for name, group in _grouped(figures, lambda one: one.dataset).items()
    }
    return result


def _free_only(figures: Sequence[Figures]) -> dict[str, Any]:
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


def _forced_only(figures: Sequence[Figures]) -> dict[str, Any]:
    """Scores with the answer given that have no key of their own at the top."""
    answers = [one.forced for one in figures if one.forced is not None]
    return {
        "n": len(answers),
        "precision": metrics.precision_at([one.iou for one in answers]),
        "giou_matched": metrics.mean([one.matched.iou for one in answers]),
        "ciou_matched": metrics.ciou([one.matched.overlap for one in answers]),
        "box_accuracy": metrics.mean([float(one.box_right) for one in answers if one.box_right is not None]),
    }


def _release_only(figures: Sequence[Figures]) -> dict[str, Any]:
    """gIoU and cIoU of the release's two loops, each None where it saw no question."""
    pictures = _grouped([one for one in figures if one.release is not None], lambda one: one.picture).values()
    generated = [[one.release.generated for one in group if one.release] for group in pictures]
    forced = [[one.release.forced for one in group if one.release and one.release.forced] for group in pictures]
    result: dict[str, Any] = {}
    for name, counts in (("validate", forced), ("ar_validate", generated)):
        giou, ciou = release_protocol.read_meters(counts, generated=name == "ar_validate")
        seen = any(counts)
        result[name] = {"giou": giou if seen else None, "ciou": ciou if seen else None}
    return result


def _forced_of_set(figures: Sequence[Figures]) -> dict[str, Any]:
    forced = sum(one.forced is not None for one in figures)
    if not forced:
        return {}
    names = ("giou_teacher_forced", "ciou_teacher_forced")
    return {"n_teacher_forced": forced} | {name: score(name, figures) for name in names}


def _of_classes(figures: Sequence[Figures]) -> dict[str, Any]:
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


def _grouped(figures: Sequence[Figures], key: Callable[[Figures], str]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = {}
    for one in figures:
        groups.setdefault(key(one), []).append(one)
    return groups
