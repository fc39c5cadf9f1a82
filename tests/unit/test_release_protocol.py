"""The release's validation loops, each with its arithmetic beside the assert."""

import numpy as np
import pytest

from utils.evaluation import release_protocol


def test_release_teacher_forced_meters() -> None:
    # Image 1: IoU 1/2. Image 2: an empty pair (1) and a mask found where there is none (0). Each mask weighs 1.
    first = (np.array([[[3.0, 2.0, -1.0]]]), np.array([[[1, 0, 0]]], dtype=np.uint8))
    second = (np.array([[[-1.0, -1.0]], [[5.0, -1.0]]]), np.zeros((2, 1, 2), dtype=np.uint8))
    giou, ciou = release_protocol.validate_meters([first, second])
    assert giou == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-5)
    assert ciou == pytest.approx((1 + 0 + 0) / (2 + 0 + 1), abs=1e-6)


def test_release_meters_know_ignored_pixels_and_strange_values() -> None:
    logits = np.array([[[1.0, 1.0, 1.0, -1.0]]])
    target = np.array([[[1, 255, 2, 2]]], dtype=np.uint8)
    # The ignored pixel is out; the predicted pixel of value 2 enlarges the union, the other one is nowhere.
    assert release_protocol.validate_meters([(logits, target)])[1] == pytest.approx(1 / 2, abs=1e-5)


def test_release_generation_meters_count_surplus_logits_raw() -> None:
    logits = np.array([[[4.0, 4.0, -4.0, -4.0]], [[0.7, 3.0, -2.0, 0.2]]], dtype=np.float32)
    targets = np.array([[[1, 1, 0, 0]]], dtype=np.uint8)
    giou, ciou = release_protocol.ar_validate_meters([[release_protocol.MatchedQuestion(logits, targets, [(0, 0)])]])
    # Matched: 2 of 2. Surplus: only 0.7 lies in [0.5, 1], so its union is 1. Weight max(2, 1).
    assert giou == pytest.approx((1 + 0) / 2, abs=1e-5)
    assert ciou == pytest.approx(2 / (2 + 1), abs=1e-6)


def test_release_generation_meters_charge_missed_targets() -> None:
    targets = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 1]]], dtype=np.uint8)
    logits = np.array([[[4.0, 4.0, -4.0, -4.0]]], dtype=np.float32)
    giou, ciou = release_protocol.ar_validate_meters([[release_protocol.MatchedQuestion(logits, targets, [(0, 0)])]])
    assert giou == pytest.approx((1 + 0) / 2, abs=1e-5)
    assert ciou == pytest.approx(2 / (2 + 1), abs=1e-6)


def test_a_judge_reads_names_where_groups_were() -> None:
    logits = np.stack([np.full((4, 4), -9.0), np.full((4, 4), 9.0)]).astype(np.float32)
    targets = np.ones((1, 4, 4), dtype=np.uint8)
    question = release_protocol.match_question(logits, targets, np.random.default_rng(0))
    assert question.pairs == [(1, 0)]
    names = release_protocol.names_of_predictions(question, ["(cup)"])
    assert names == [release_protocol.NO_NAME, "(cup)"]
    # Two groups of two tokens side by side, and one in the question, which is not for the judge.
    text = "USER: [SEG0] [SEG1]? ASSISTANT: It is [SEG0] [SEG1] [SEG0] [SEG1]."
    assert release_protocol.text_for_judge(text, names, group_size=2) == " It is (None []) (cup)."
    with pytest.raises(ValueError, match="2 seg groups, and 1 names were given"):
        release_protocol.text_for_judge(text, names[:1], group_size=2)
