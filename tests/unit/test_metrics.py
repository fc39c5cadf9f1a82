"""Scores of masks, counts and words, each with its arithmetic beside the assert."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_rle

from model.structures import IGNORE_LABEL
from utils.evaluation import metrics


def mask(*rows: str) -> np.ndarray:
    """An image drawn in characters: '#' target, '.' background, '?' ignored."""
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


def test_matching_charges_masks_without_a_partner() -> None:
    found = metrics.match_masks(stack(LEFT, TOP) == 1, stack(LEFT))
    assert (found.of_predictions, found.of_targets) == ((1.0, 0.0), (1.0,))
    assert (found.overlap.intersection, found.overlap.union) == (4, 4 + 4)
    missed = metrics.match_masks(stack(LEFT) == 1, stack(RIGHT, LEFT))
    assert (missed.of_predictions, missed.of_targets) == ((1.0,), (0.0, 1.0))
    assert missed.overlap == metrics.Overlap(4 + 0, 4 + 4)


def test_a_surplus_mask_is_not_charged_for_ignored_pixels() -> None:
    truth = mask("##??", "##??")
    found = metrics.match_masks(stack(LEFT, RIGHT, TOP) == 1, stack(truth))
    # The right half is ignored: of the surplus masks only the left two pixels of TOP count.
    assert found.overlap == metrics.Overlap(4, 4 + 0 + 2)


def test_the_order_of_instances_does_not_matter_to_matching() -> None:
    a, b, c = mask("##..", "...."), mask("..#.", "..#."), mask("...#", ".#.#")
    truths = stack(mask("#...", "#..."), b, mask("...#", "..##"))
    # a 1/3, b 1, c 2/4.
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]):
        predicted = stack(a, b, c)[order] == 1
        assert metrics.matched_iou(predicted, truths) == pytest.approx((1 / 3 + 1 + 2 / 4) / 3)


def test_boxes() -> None:
    assert metrics.mask_box(mask("....", ".##.") == 1) == (1, 1, 3, 2)
    assert metrics.mask_box(mask("....") == 1) is None
    assert metrics.box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 2 / (4 + 4 - 2)
    assert metrics.box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0 / 2
    assert metrics.box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_a_box_is_right_from_half_on() -> None:
    assert metrics.box_right(stack(mask("#...", "...#")) == 1, stack(TOP)) is True  # box 8, true box 4: 4 / 8
    assert metrics.box_right(stack(mask("#...", "....")) == 1, stack(TOP)) is False  # 1 / 4
    assert metrics.box_right(NONE == 1, stack(TOP)) is False
    # The predicted pixel under '?' stretches no box: 4 / 4 rather than 4 / 8.
    assert metrics.box_right(stack(mask("####", "...#")) == 1, stack(mask("####", "...?"))) is True
    assert metrics.box_right(stack(LEFT) == 1, stack(LEFT, RIGHT)) is None
    assert metrics.box_right(NONE == 1, NONE) is None
    assert metrics.box_right(stack(LEFT) == 1, stack(mask("??..", "...."))) is None


def test_precision_counts_from_the_threshold_on() -> None:
    found = metrics.precision_at([0.5, 0.65, 0.9, 0.0])
    assert found == {"0.5": 3 / 4, "0.6": 2 / 4, "0.7": 1 / 4, "0.8": 1 / 4, "0.9": 1 / 4}
    assert metrics.precision_at([])["0.5"] is None


def test_no_target_accuracy() -> None:
    # Three without a target, two of them answered so; two with one, one of them answered with masks.
    assert metrics.no_target_accuracy([0, 0, 2, 3, 0], [0, 0, 0, 1, 2]) == (2 / 3, 1 / 2)
    assert metrics.no_target_accuracy([1], [1]) == (None, 1.0)
    assert metrics.no_target_accuracy([], []) == (None, None)


def test_a_class_adds_up_over_images() -> None:
    answers = [("wall", metrics.Overlap(1, 2)), ("sky", metrics.Overlap(3, 3)), ("wall", metrics.Overlap(8, 8))]
    assert metrics.class_ious(answers) == {"sky": 3 / 3, "wall": (1 + 8) / (2 + 8)}
    assert metrics.class_ious([]) == {}


def test_calibration_compares_scores_with_ious() -> None:
    found = metrics.calibration([0.95, 1.0, 0.25, 0.2], [0.5, 1.0, 0.5, 0.0])
    low, high = found
    assert (low.low, low.high, low.n) == (0.2, 0.3, 2)
    assert (low.score, low.iou) == pytest.approx(((0.25 + 0.2) / 2, (0.5 + 0) / 2))
    assert (high.low, high.high, high.n) == (0.9, 1.0, 2)
    assert (high.score, high.iou) == pytest.approx(((0.95 + 1) / 2, (0.5 + 1) / 2))
    assert metrics.calibration_error(found) == pytest.approx((2 * (0.25 - 0.225) + 2 * (0.975 - 0.75)) / 4)
    assert metrics.calibration_error([]) is None
    with pytest.raises(ValueError, match=r"score 1\.5"):
        metrics.calibration([1.5], [1.0])


def test_real_mask_pairs_score_as_pycocotools_says(realdata: Path) -> None:
    path = realdata / "reference" / "mask_pairs_pycocotools_shared.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    overlaps = []
    for pair in stored["pairs"]:
        predicted, truth = (coco_rle.decode(pair[key]) for key in ("pred_panoptic_rle", "gt_instance_rle"))
        overlaps.append(metrics.overlap(predicted == 1, truth))
        assert (overlaps[-1].intersection, overlaps[-1].union) == (pair["inter"], pair["union"])
        assert overlaps[-1].iou == pytest.approx(pair["iou"], abs=1e-12)
    summary, ious = stored["summary"], [one.iou for one in overlaps]
    assert len(ious) == summary["n"]
    assert metrics.mean(ious) == pytest.approx(summary["gIoU"], abs=1e-12)
    assert metrics.ciou(overlaps) == pytest.approx(summary["cIoU"], abs=1e-12)
    precision = {f"Pr@{threshold}": share for threshold, share in metrics.precision_at(ious).items()}
    assert precision == pytest.approx({name: value for name, value in summary.items() if name.startswith("Pr@")})
