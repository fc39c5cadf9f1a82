"""Scores as the release's two validation loops count them, surprises included (docs/facts.md, V1): pure functions.

For quoting beside published numbers only. What our own scores are, and why they differ, is in `metrics`.

Axes: P predicted masks, G true masks, H W pixels of the image.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from model.structures import IGNORE_LABEL
from utils.evaluation.matching import match, matching_cost

# As many points as the release samples to match masks (fact V1).
MATCHING_POINTS = 12544

# What a judge reads in place of a seg group that belongs to no target.
NO_NAME = "(None [])"
_SEG_TOKEN = r"\[SEG\d+\]"
_ASSISTANT = "ASSISTANT:"

# An IoU is intersection / (union + the first); a mean divides by count + the same; a cIoU adds the second to its union.
_IOU_EPS, _CIOU_EPS = 1e-5, 1e-10


def histogram_counts(output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersections and unions of (background, foreground) as the release's two-bin histogram over [0, 1] counts them.

    `output` float (H, W): values in [0, 0.5) are background, in [0.5, 1] foreground, all others in neither bin.
    """
    output = np.where(target == IGNORE_LABEL, IGNORE_LABEL, output)
    target = target.astype(output.dtype)

    def histogram(values: np.ndarray) -> np.ndarray:
        return np.histogram(values, bins=2, range=(0, 1))[0].astype(np.float64)

    intersection = histogram(output[output == target])
    return intersection, histogram(output) + histogram(target) - intersection


def pair_iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """IoU of (background, foreground); an empty pair counts as right: the release adds 1 to a ratio that is 0 there."""
    return intersection / (union + _IOU_EPS) + (union == 0)


@dataclass(frozen=True)
class Counts:
    """What a question adds to a loop's meters: sums over its pairs, each for (background, foreground).

    predicted, true: how many masks were predicted, and how many targets there are.
    """

    intersection: tuple[float, float]
    union: tuple[float, float]
    iou: tuple[float, float]
    predicted: int
    true: int


def _count(pairs: Iterable[tuple[np.ndarray, np.ndarray]], predicted: int, true: int) -> Counts:
    sums = np.zeros((3, 2))
    for output, target in pairs:
        intersection, union = histogram_counts(output, target)
        sums += np.stack([intersection, union, pair_iou(intersection, union)])
    intersections, unions, ious = ((float(background), float(foreground)) for background, foreground in sums)
    return Counts(intersections, unions, ious, predicted, true)


def count_forced(logits: np.ndarray, targets: np.ndarray) -> Counts:
    """A question of the teacher-forced loop: logits (Q, H, W) and targets (Q, H, W) uint8, paired by position."""
    return _count(zip((logits > 0).astype(np.float32), targets, strict=True), len(logits), len(targets))


def count_generated(question: "MatchedQuestion") -> Counts:
    """A question of the generation loop, after matching."""
    return _count(generation_pairs(question), len(question.logits), len(question.targets))


def read_meters(images: Iterable[Sequence[Counts]], *, generated: bool) -> tuple[float, float]:
    """(gIoU, cIoU) of all images, each the counts of its questions, as the loops' meters read at the end.

    An image weighs by its targets, in the generation loop by max(all predictions, all targets).
    """
    intersection, union, iou, weight = 0.0, 0.0, 0.0, 0
    for questions in images:
        intersection += sum(one.intersection[1] for one in questions)
        union += sum(one.union[1] for one in questions)
        iou += sum(one.iou[1] for one in questions)
        true, predicted = sum(one.true for one in questions), sum(one.predicted for one in questions)
        weight += max(predicted, true) if generated else true
    return iou / (weight + _IOU_EPS), intersection / (union + _CIOU_EPS)


def validate_meters(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """(gIoU, cIoU) as the release's teacher-forced validation loop counts them.

    Every image: mask logits (Q, H, W) and targets (Q, H, W) uint8, paired by position. Differs from the mean of
    `metrics.question_iou` and from `metrics.ciou` by its small constants and by taking each mask, not each question, as
    the unit; a target value other than 0, 1 and IGNORE_LABEL is in neither class: a prediction there only enlarges the
    union.
    """
    return read_meters(([count_forced(*image)] for image in images), generated=False)


@dataclass(frozen=True)
class MatchedQuestion:
    """Predictions and targets of one question, and which belong together.

    logits (P, H, W) float, targets (G, H, W) uint8, pairs: (index of a prediction, index of its target), one to one.
    """

    logits: np.ndarray
    targets: np.ndarray
    pairs: Sequence[tuple[int, int]]


def generation_pairs(question: MatchedQuestion) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (output, target) pairs of a question in the release's generation loop; see `ar_validate_meters`."""
    pairs = [((question.logits[p] > 0).astype(np.float32), question.targets[t]) for p, t in question.pairs]
    matched_predictions = {p for p, _ in question.pairs}
    matched_targets = {t for _, t in question.pairs}
    for index, logits in enumerate(question.logits):
        if index not in matched_predictions:
            pairs.append((logits, np.zeros(logits.shape, dtype=np.uint8)))
    for index, target in enumerate(question.targets):
        if index not in matched_targets:
            pairs.append((np.zeros(target.shape, dtype=np.float32), target))
    return pairs


def ar_validate_meters(images: Iterable[Sequence[MatchedQuestion]]) -> tuple[float, float]:
    """(gIoU, cIoU) as the release's generation loop counts them, after matching.

    An image's IoUs are summed over matched pairs, surplus predictions (against an empty target) and missed targets
    (against an empty prediction) and divided by max(all predictions, all targets) of the image, so that an image
    with several questions may exceed 1. Surplus predictions stay RAW logits: only logits in [0.5, 1] count there.
    """
    return read_meters(([count_generated(one) for one in questions] for questions in images), generated=True)


def match_question(logits: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> MatchedQuestion:
    """Predictions (P, H, W) and targets (G, H, W) of a question, matched at random points as the release does."""
    points = rng.random((MATCHING_POINTS, 2))
    return MatchedQuestion(logits, targets, match(matching_cost(logits, targets, points)))


def names_of_predictions(question: MatchedQuestion, names: Sequence[str]) -> list[str]:
    """For every prediction the name of the target it was matched with, or NO_NAME. names: of the G targets."""
    target_of = dict(question.pairs)
    return [names[target_of[index]] if index in target_of else NO_NAME for index in range(len(question.logits))]


def text_for_judge(text: str, names: Sequence[str], group_size: int) -> str:
    """The answer in a generated text, every seg group replaced by its prediction's name, for a judge to read.

    text: prompt and answer, seg tokens by name. names: one per group. group_size: tokens of a group.

    Raises:
        ValueError: there are not as many names as groups.
    """
    answer = text.split(_ASSISTANT)[-1]
    group = re.compile(" ".join([_SEG_TOKEN] * group_size))
    groups = len(group.findall(answer))
    if groups != len(names):
        raise ValueError(f"the answer {answer!r} holds {groups} seg groups, and {len(names)} names were given")
    rest = iter(names)
    return group.sub(lambda _: next(rest), answer)
