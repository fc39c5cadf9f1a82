"""Scores of masks, counts and words: pure functions of arrays and strings, no model, no files.

Axes: Q masks of one question, P predicted masks, G true masks, H W pixels of the image.
True masks are uint8 with 0 background, 1 target, IGNORE_LABEL pixels that take no part in any score.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from model.structures import IGNORE_LABEL

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoUs from which a question counts as right."""

BOX_RIGHT_AT = 0.5
CALIBRATION_BINS = 10

VQA_AGREE = 3
"""As many people have to agree on an answer for it to be right."""

_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"\w+(?:['-]\w+)*")


@dataclass(frozen=True)
class Overlap:
    """Pixel counts of one predicted against one true region."""

    intersection: int
    union: int

    @property
    def iou(self) -> float:
        """Intersection over union in [0, 1]; 1 when both regions are empty."""
        return self.intersection / self.union if self.union else 1.0


def overlap(predicted: np.ndarray, truth: np.ndarray) -> Overlap:
    """Overlap of a bool mask (H, W) with a true mask (H, W) of 0, 1 and IGNORE_LABEL (those pixels are left out).

    Raises ValueError when the shapes differ, the prediction is not boolean or the truth holds another value.
    """
    if predicted.dtype != np.bool_:
        raise ValueError(f"A predicted mask has dtype {predicted.dtype}; expected bool. Threshold the logits first.")
    if predicted.shape != truth.shape:
        raise ValueError(
            f"A predicted mask is {predicted.shape} and its true mask {truth.shape} (height, width); "
            "both must be given at the image's own size."
        )
    counted = truth != IGNORE_LABEL
    positive = truth == 1
    if not np.all(positive | ~counted | (truth == 0)):
        raise ValueError(f"A true mask holds {np.unique(truth)[:8].tolist()}; only 0, 1 and {IGNORE_LABEL} are known.")
    seen = predicted & counted
    return Overlap(int(np.count_nonzero(seen & positive)), int(np.count_nonzero(seen | positive)))


def unite_predictions(masks: np.ndarray) -> np.ndarray:
    """(P, H, W) bool -> (H, W) bool: where any mask is set (nowhere for P = 0)."""
    return np.any(masks, axis=0)


def unite_truths(masks: np.ndarray) -> np.ndarray:
    """(G, H, W) -> (H, W): 1 where any mask is 1, else IGNORE_LABEL where any says so, else 0 (all 0 for G = 0)."""
    positive = (masks == 1).any(axis=0)
    ignored = (masks == IGNORE_LABEL).any(axis=0)
    return np.where(positive, 1, np.where(ignored, IGNORE_LABEL, 0)).astype(np.uint8)


def question_overlap(predicted: np.ndarray, truths: np.ndarray) -> Overlap:
    """What a question scores: the union of its predicted masks (P, H, W) against the union of its true ones (G, H, W).

    This is how gRefCOCO scores a sentence with several targets. See `question_iou` for questions without a target.
    """
    return overlap(unite_predictions(predicted), unite_truths(truths))


def question_iou(predicted: np.ndarray, truths: np.ndarray) -> float:
    """IoU of `question_overlap`; without a true mask 1.0 if nothing was predicted (P = 0) and 0.0 otherwise.

    A predicted mask with no pixel set still is a prediction: the model has named something that is not there.
    """
    if len(truths) == 0:
        return float(len(predicted) == 0)
    return question_overlap(predicted, truths).iou


def pairwise_iou(predicted: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """(P, H, W), (G, H, W) -> IoU of every pair, float64 (P, G)."""
    scores = np.zeros((len(predicted), len(truths)))
    for row, one_predicted in enumerate(predicted):
        for column, truth in enumerate(truths):
            scores[row, column] = overlap(one_predicted, truth).iou
    return scores


@dataclass(frozen=True)
class Matched:
    """The best one-to-one matching of P predicted and G true masks.

    of_predictions, of_targets: IoU of every predicted and of every true mask with its partner, 0 without one.
    overlap: summed over the pairs and the masks without a partner, which face an empty mask.
    """

    of_predictions: tuple[float, ...]
    of_targets: tuple[float, ...]
    overlap: Overlap

    @property
    def iou(self) -> float:
        """Sum of the pairs' IoUs over max(P, G); 1.0 when there are no masks at all."""
        most = max(len(self.of_predictions), len(self.of_targets))
        return math.fsum(self.of_targets) / most if most else 1.0


def match_masks(predicted: np.ndarray, truths: np.ndarray) -> Matched:
    """(P, H, W) bool and (G, H, W) matched so that the sum of the IoUs is largest; see `pair_masks`."""
    scores = pairwise_iou(predicted, truths)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return pair_masks(predicted, truths, list(zip(rows.tolist(), columns.tolist(), strict=True)))


def pair_masks(predicted: np.ndarray, truths: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Matched:
    """What (P, H, W) bool and (G, H, W) score with the partners in `pairs`, (predicted, true), one to one.

    A predicted mask without a partner is charged with its pixels outside of what `unite_truths` ignores.
    """
    of_predictions, of_targets = [0.0] * len(predicted), [0.0] * len(truths)
    overlaps = []
    for row, column in pairs:
        overlaps.append(overlap(predicted[row], truths[column]))
        of_predictions[row] = of_targets[column] = overlaps[-1].iou
    matched, found = {row for row, _ in pairs}, {column for _, column in pairs}
    overlaps += [Overlap(0, int(np.count_nonzero(t == 1))) for g, t in enumerate(truths) if g not in found]
    if len(matched) < len(predicted):
        counted = unite_truths(truths) != IGNORE_LABEL
        surplus = (mask for row, mask in enumerate(predicted) if row not in matched)
        overlaps += [Overlap(0, int(np.count_nonzero(mask & counted))) for mask in surplus]
    return Matched(tuple(of_predictions), tuple(of_targets), summed(overlaps))


def matched_iou(predicted: np.ndarray, truths: np.ndarray) -> float:
    """Sum of IoUs of the best one-to-one matching over max(P, G); 1.0 when both are empty.

    A target found twice, missed, or melted into one mask with another costs here, while `question_iou` does not mind.
    """
    return match_masks(predicted, truths).iou


def summed(overlaps: Iterable[Overlap]) -> Overlap:
    """Intersections and unions added up."""
    counted = list(overlaps)
    return Overlap(sum(o.intersection for o in counted), sum(o.union for o in counted))


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The smallest box around a bool mask (H, W) as (x0, y0, x1, y1) pixels, end exclusive; None of an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """IoU in [0, 1] of two boxes (x0, y0, x1, y1), end exclusive; 0.0 when both are without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - shared
    return shared / union if union else 0.0


def box_right(predicted: np.ndarray, truths: np.ndarray) -> bool | None:
    """Whether the box around all predicted masks (P, H, W) has an IoU of BOX_RIGHT_AT with that of the true one.

    Ignored pixels count for neither box. None unless there is exactly one true mask and it has a pixel to find.
    """
    if len(truths) != 1:
        return None
    true = mask_box(truths[0] == 1)
    if true is None:
        return None
    found = mask_box(unite_predictions(predicted) & (truths[0] != IGNORE_LABEL))
    return found is not None and box_iou(found, true) >= BOX_RIGHT_AT


def precision_at(ious: Sequence[float], thresholds: Sequence[float] = PRECISION_AT) -> dict[str, float | None]:
    """For every threshold, as text, the share of IoUs that reach it; None without IoUs."""
    return {str(threshold): mean([float(iou >= threshold) for iou in ious]) for threshold in thresholds}


def no_target_accuracy(predicted: Sequence[int], true: Sequence[int]) -> tuple[float | None, float | None]:
    """(N-acc, T-acc) of gRefCOCO from each question's number of predicted masks and of targets.

    N-acc: share of the questions without a target that were answered without a mask. T-acc: share of those with one
    that were answered with a mask, whichever. None where there is no such question.
    """
    pairs = list(zip(predicted, true, strict=True))
    without = [float(p == 0) for p, t in pairs if t == 0]
    with_targets = [float(p > 0) for p, t in pairs if t > 0]
    return mean(without), mean(with_targets)


def class_ious(answers: Iterable[tuple[str, Overlap]]) -> dict[str, float]:
    """IoU of every class by its name, sorted: its intersections over its unions, summed over all images.

    The mean of the values is the mIoU of the classes that occur. Only pixels of questions that were asked can count.
    """
    by_class: dict[str, list[Overlap]] = {}
    for name, one in answers:
        by_class.setdefault(name, []).append(one)
    return {name: summed(overlaps).iou for name, overlaps in sorted(by_class.items())}


@dataclass(frozen=True)
class CalibrationBin:
    """Masks whose score lies in [low, high): how many, their mean score and their mean IoU."""

    low: float
    high: float
    n: int
    score: float
    iou: float


def calibration(scores: Sequence[float], ious: Sequence[float], bins: int = CALIBRATION_BINS) -> list[CalibrationBin]:
    """The bins of equal width over [0, 1] that hold a score; 1.0 belongs to the last.

    scores: what the model says of its masks. ious: what each mask has with its matched target, 0 for a surplus one.
    ValueError when a score is outside of [0, 1].
    """
    held: dict[int, list[tuple[float, float]]] = {}
    for score, iou in zip(scores, ious, strict=True):
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"a mask has the score {score}; expected a probability in [0, 1]")
        held.setdefault(min(int(score * bins), bins - 1), []).append((score, iou))
    found = []
    for number, pairs in sorted(held.items()):
        score, iou = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
        found.append(CalibrationBin(number / bins, (number + 1) / bins, len(pairs), score, iou))
    return found


def calibration_error(found: Sequence[CalibrationBin]) -> float | None:
    """ECE: mean over masks of |mean score - mean IoU| of the mask's bin (Guo et al. 2017, IoU for accuracy)."""
    total = sum(one.n for one in found)
    return math.fsum(one.n * abs(one.score - one.iou) for one in found) / total if total else None


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing. Of per-question IoUs this is the gIoU, of rights and wrongs an accuracy."""
    return sum(values) / len(values) if values else None


def ciou(overlaps: Iterable[Overlap]) -> float | None:
    """Sum of intersections over sum of unions; 1.0 when every union is empty, None without questions."""
    counted = list(overlaps)
    if not counted:
        return None
    return summed(counted).iou


def target_count_accuracy(predicted: Sequence[int], true: Sequence[int]) -> float | None:
    """Share of questions whose number of groups is the true number of targets; None without questions."""
    return mean([float(p == t) for p, t in zip(predicted, true, strict=True)])


def name_words(text: str) -> tuple[str, ...]:
    """The words of a name or phrase in lower case, without punctuation and without leading articles."""
    words = _WORD.findall(text.lower())
    while words and words[0] in _ARTICLES:
        words.pop(0)
    return tuple(words)


def count_named(phrases: Sequence[str], names: Sequence[str]) -> int:
    """How many phrases pair one to one with a name of which they end with the words."""
    said, true = [name_words(phrase) for phrase in phrases], [name_words(name) for name in names]
    fits = np.zeros((len(said), len(true)))
    for row, words in enumerate(said):
        fits[row] = [bool(name) and words[-len(name) :] == name for name in true]
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return int(fits[rows, columns].sum())


def names_exactly(phrases: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the phrases name exactly the true set.

    There are as many phrases as names, and they pair one to one so that each phrase ends with the words of its name
    ("it is the big red circle" names "red circle"). No phrase for no name is right.
    """
    return len(phrases) == len(names) == count_named(phrases, names)


def plain_words(text: str) -> str:
    """An answer as it is compared: lower case, words alone, without articles anywhere."""
    return " ".join(word for word in _WORD.findall(text.lower()) if word not in _ARTICLES)


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Whether the words of an answer are those of one of the true answers (`plain_words`)."""
    return plain_words(answer) in {plain_words(reference) for reference in references}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float | None:
    """VQA's accuracy: min(how many others gave this answer / 3, 1), averaged over leaving out each reference once.

    (Antol et al. 2015.) None of fewer than four references: nothing could score 1.
    """
    if len(references) <= VQA_AGREE:
        return None
    same = [plain_words(reference) == plain_words(answer) for reference in references]
    return mean([min((sum(same) - one) / VQA_AGREE, 1.0) for one in same])
