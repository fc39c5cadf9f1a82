"""Scores of masks, counts and words: pure functions of arrays and strings, no model, no files.

Axes: Q masks of one question, P predicted masks, G true masks, H W pixels of the picture.
True masks are uint8 with 0 background, 1 target, IGNORE_LABEL pixels that take no part in any score.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from utils.data.samples import IGNORE_LABEL

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
            "both must be given at the picture's own size."
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


def matched_iou(predicted: np.ndarray, truths: np.ndarray) -> float:
    """Sum of IoUs of the best one-to-one matching over max(P, G); 1.0 when both are empty.

    A target found twice, missed, or melted into one mask with another costs here, while `question_iou` does not mind.
    """
    if len(predicted) == 0 and len(truths) == 0:
        return 1.0
    scores = pairwise_iou(predicted, truths)
    rows, columns = linear_sum_assignment(scores, maximize=True)
    return float(scores[rows, columns].sum() / max(len(predicted), len(truths)))


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing. Of per-question IoUs this is the gIoU, of rights and wrongs an accuracy."""
    return sum(values) / len(values) if values else None


def ciou(overlaps: Iterable[Overlap]) -> float | None:
    """Sum of intersections over sum of unions; 1.0 when every union is empty, None without questions."""
    counted = list(overlaps)
    if not counted:
        return None
    return Overlap(sum(o.intersection for o in counted), sum(o.union for o in counted)).iou


def target_count_accuracy(predicted: Sequence[int], true: Sequence[int]) -> float | None:
    """Share of questions whose number of groups is the true number of targets; None without questions."""
    return mean([float(p == t) for p, t in zip(predicted, true, strict=True)])


def name_words(text: str) -> tuple[str, ...]:
    """The words of a name or phrase in lower case, without punctuation and without leading articles."""
    words = _WORD.findall(text.lower())
    while words and words[0] in _ARTICLES:
        words.pop(0)
    return tuple(words)


def names_exactly(phrases: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the phrases name exactly the true set.

    There are as many phrases as names, and they pair one to one so that each phrase ends with the words of its name
    ("it is the big red circle" names "red circle"). No phrase for no name is right.
    """
    if len(phrases) != len(names):
        return False
    said, true = [name_words(phrase) for phrase in phrases], [name_words(name) for name in names]
    fits = np.zeros((len(said), len(true)))
    for row, words in enumerate(said):
        fits[row] = [bool(name) and words[-len(name) :] == name for name in true]
    rows, columns = linear_sum_assignment(fits, maximize=True)
    return bool(fits[rows, columns].all())
