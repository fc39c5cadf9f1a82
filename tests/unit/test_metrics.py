"""Scores of masks, counts and words, each with its arithmetic beside the assert."""

import numpy as np
import pytest

from utils import metrics
from utils.data.samples import IGNORE_LABEL


def mask(*rows: str) -> np.ndarray:
    """A picture drawn in characters: '#' target, '.' background, '?' ignored."""
    return np.array([[{".": 0, "#": 1, "?": IGNORE_LABEL}[c] for c in row] for row in rows], dtype=np.uint8)


def stack(*masks: np.ndarray) -> np.ndarray:
    return np.stack(masks)


NONE = np.zeros((0, 2, 4), dtype=np.uint8)
LEFT = mask("##..", "##..")
RIGHT = mask("..##", "..##")
TOP = mask("####", "....")


def test_overlap_counts_pixels() -> None:
    found = metrics.overlap(LEFT == 1, TOP)
    assert (found.intersection, found.union) == (2, 4 + 4 - 2)
    assert found.iou == 2 / 6


def test_ignored_pixels_leave_both_sides() -> None:
    # 5 pixels are known: of the 4 true ones 1 is predicted, and so is the 1 of the background.
    found = metrics.overlap(mask("#.#.", "##..") == 1, mask("##.?", "??##"))
    assert (found.intersection, found.union) == (1, 4 + 1)


@pytest.mark.parametrize(
    ("predicted", "truth", "said"),
    [
        (LEFT, TOP, "dtype uint8"),
        (LEFT == 1, TOP[:1], r"\(2, 4\) and its true mask \(1, 4\)"),
        (LEFT == 1, TOP * 2, r"\[0, 2\]"),
    ],
)
def test_overlap_refuses_what_it_cannot_count(predicted: np.ndarray, truth: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        metrics.overlap(predicted, truth)


def test_empty_target_and_empty_prediction_score_one() -> None:
    assert metrics.overlap(mask("....") == 1, mask("....")).iou == 1.0
    assert metrics.overlap(mask("#...") == 1, mask("....")).iou == 0.0
    assert metrics.overlap(mask("#...") == 1, mask("?...")).iou == 1.0


def test_a_question_scores_the_union_of_its_masks() -> None:
    both = stack(LEFT, RIGHT)
    assert metrics.question_iou(both == 1, both) == 1.0
    assert metrics.question_iou(stack(LEFT | RIGHT) == 1, both) == 1.0
    assert metrics.question_iou(stack(LEFT) == 1, both) == 4 / 8
    assert metrics.question_iou(NONE == 1, both) == 0.0


def test_a_truth_united_ignores_only_where_nothing_is_true() -> None:
    united = metrics.unite_truths(stack(mask("#?.."), mask("?.?.")))
    assert united.tolist() == mask("#??.").tolist()


def test_without_a_target_any_predicted_mask_is_wrong() -> None:
    assert metrics.question_iou(NONE == 1, NONE) == 1.0
    assert metrics.question_iou(stack(LEFT) == 1, NONE) == 0.0
    assert metrics.question_iou(stack(mask("....", "....")) == 1, NONE) == 0.0


def test_matched_iou_pairs_one_to_one() -> None:
    truths = stack(LEFT, RIGHT)
    assert metrics.matched_iou(stack(RIGHT, LEFT) == 1, truths) == 1.0
    assert metrics.matched_iou(stack(LEFT | RIGHT) == 1, truths) == (4 / 8) / 2
    assert metrics.matched_iou(stack(LEFT, LEFT, RIGHT) == 1, truths) == (1 + 1) / 3
    assert metrics.matched_iou(NONE == 1, truths) == 0.0
    assert metrics.matched_iou(stack(LEFT) == 1, NONE) == 0.0
    assert metrics.matched_iou(NONE == 1, NONE) == 1.0


def test_matching_maximises_the_sum_rather_than_taking_the_best_first() -> None:
    # Greedy takes (a, x) = 2/3 and leaves (b, y) = 0. The best pairing is (a, y) and (b, x).
    a, b = mask("###."), mask("#...")
    x, y = mask("##.."), mask("..#.")
    assert metrics.pairwise_iou(stack(a, b) == 1, stack(x, y)).tolist() == [[2 / 3, 1 / 3], [1 / 2, 0]]
    assert metrics.matched_iou(stack(a, b) == 1, stack(x, y)) == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_giou_is_a_mean_and_ciou_a_ratio_of_sums() -> None:
    overlaps = [metrics.Overlap(1, 2), metrics.Overlap(9, 10)]
    assert metrics.mean([o.iou for o in overlaps]) == (1 / 2 + 9 / 10) / 2
    assert metrics.ciou(overlaps) == (1 + 9) / (2 + 10)
    assert metrics.ciou([metrics.Overlap(0, 0)]) == 1.0
    assert metrics.mean([]) is None
    assert metrics.ciou([]) is None


def test_target_count_accuracy() -> None:
    assert metrics.target_count_accuracy([1, 2, 0, 3], [1, 2, 0, 2]) == 3 / 4
    assert metrics.target_count_accuracy([], []) is None


@pytest.mark.parametrize(
    ("phrases", "names", "right"),
    [
        (["The red circle"], ["red circle"], True),
        (["it is a big red circle,"], ["the red circle"], True),
        (["scarred circle"], ["red circle"], False),
        (["red circle"], ["big red circle"], False),
        (["the blue square", "a red circle"], ["red circle", "blue square"], True),
        (["red circle", "circle"], ["circle", "red circle"], True),
        (["red circle", "red circle"], ["red circle", "blue square"], False),
        (["red circle"], ["red circle", "red circle"], False),
        ([], [], True),
        (["red circle"], [], False),
        ([""], ["red circle"], False),
        (["man's left-hand glove"], ["left-hand glove"], True),
    ],
)
def test_phrases_name_exactly_the_true_set(phrases: list[str], names: list[str], right: bool) -> None:
    assert metrics.names_exactly(phrases, names) is right
