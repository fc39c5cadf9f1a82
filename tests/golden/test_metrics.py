"""Golden group `metrics`: gIoU and cIoU as the release's two validation loops count them."""

from itertools import accumulate, pairwise

import numpy as np
import pytest

from tests.golden import vectors
from utils.evaluation import release_protocol
from utils.evaluation.release_protocol import MatchedQuestion

GROUP = "metrics"
TEACHER_FORCED, GENERATED = "validate", "ar_validate"
TEACHER_FORCED_CASES, GENERATED_CASES = (vectors.case_names(GROUP, loop) for loop in (TEACHER_FORCED, GENERATED))
POINT_SEED = 0  # which points are drawn does not change these matches


def test_every_entry_belongs_to_a_case() -> None:
    loops = ((TEACHER_FORCED, TEACHER_FORCED_CASES), (GENERATED, GENERATED_CASES))
    cases = [f"{loop}.{case}" for loop, names in loops for case in names]
    vectors.assert_all_in_cases(GROUP, cases, [(loop, index) for loop, names in loops for index in range(len(names))])


def read(loop: str, names: list[str], case: str) -> vectors.Reading:
    reading = vectors.read_case(GROUP, f"{loop}.{case}", loop, names.index(case))
    reading.same("name", reading.facts["name"], case)
    return reading


def compare_scores(golden: vectors.Reading, scores: tuple[float, float]) -> None:
    for name, score in zip(("giou", "ciou"), scores, strict=True):
        golden.number(name, score, golden.facts[name], atol=vectors.METRIC_ATOL)


@pytest.mark.parametrize("case", TEACHER_FORCED_CASES)
def test_teacher_forced_loop(case: str) -> None:
    with read(TEACHER_FORCED, TEACHER_FORCED_CASES, case) as golden:
        images = [
            (golden.tensor(f"{index}.pred_logits").numpy(), golden.tensor(f"{index}.gt").numpy())
            for index in range(golden.facts["images"])
        ]
        compare_scores(golden, release_protocol.validate_meters(images))


@pytest.mark.parametrize("case", GENERATED_CASES)
def test_generation_loop(case: str) -> None:
    with read(GENERATED, GENERATED_CASES, case) as golden:
        recorded, images = golden.facts["images"], []
        for index in range(len(recorded)):
            questions = matched_questions(golden, recorded[index], index)
            compare_image(golden, recorded[index], index, questions)
            compare_texts(golden, recorded[index], index, questions)
            images.append(questions)
        compare_scores(golden, release_protocol.ar_validate_meters(images))


def cut(masks: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """(sum of counts, H, W) -> one array per question."""
    return [masks[start:end] for start, end in pairwise([0, *accumulate(counts)])]


def matched_questions(golden: vectors.Reading, facts: vectors.Facts, index: int) -> list[MatchedQuestion]:
    """The questions of an image, predictions and targets matched by our own matching."""
    logits = cut(golden.tensor(f"{index}.pred_logits").numpy(), facts["pred_counts"])
    targets = cut(golden.tensor(f"{index}.gt").numpy(), facts["gt_counts"])
    return [
        release_protocol.match_question(predicted, true, np.random.default_rng(POINT_SEED))
        for predicted, true in zip(logits, targets, strict=True)
    ]


def compare_image(golden: vectors.Reading, facts: vectors.Facts, index: int, questions: list[MatchedQuestion]) -> None:
    """Pairs, the histogram counts of each, and their mean per class (background, foreground)."""
    larger = [max(len(question.logits), len(question.targets)) for question in questions]
    golden.same(f"{index}: total_pred_count", larger, facts["total_pred_count"])
    predicted, true = (sum(len(getattr(q, kind)) for q in questions) for kind in ("logits", "targets"))
    golden.same(f"{index}: max_num", max(predicted, true), facts["max_num"])
    golden.same(f"{index}: assign_indice", [[p for p, _ in q.pairs] for q in questions], facts["assign_indice"])
    is_matched = [
        number < len(q.pairs) for q, all_pairs in zip(questions, larger, strict=True) for number in range(all_pairs)
    ]
    golden.same(f"{index}: assign_length", is_matched, facts["assign_length"])

    counts = [
        release_protocol.histogram_counts(*pair) for q in questions for pair in release_protocol.generation_pairs(q)
    ]
    golden.same(f"{index}: assign_acc", [[list(i), list(u)] for i, u in counts], facts["assign_acc"])
    ious = sum(release_protocol.pair_iou(i, u) for i, u in counts) / max(predicted, true)
    for side, (found, expected) in enumerate(zip(ious, facts["mean_iou_bg_fg"], strict=True)):
        golden.number(f"{index}: mean_iou_bg_fg[{side}]", float(found), expected, atol=vectors.METRIC_ATOL)


def compare_texts(golden: vectors.Reading, facts: vectors.Facts, index: int, questions: list[MatchedQuestion]) -> None:
    """Each prediction gets the name of its target, and stands for its seg group in the answer a judge would read."""
    dims = vectors.read_json("weights")["model_dims"]
    group_size = dims["seg_token_num"] * dims["image_feature_scale_num"]
    expected_names, expected_answers = facts["question_gt_category_name"], facts["answers"]
    for number, (question, text, names) in enumerate(zip(questions, facts["texts"], facts["gt_names"], strict=True)):
        given = release_protocol.names_of_predictions(question, names)
        label = f"{index}: question {number}"
        golden.same(f"{label}: names", [name.strip("()") for name in given], expected_names[number])
        answer = release_protocol.text_for_judge(text, given, group_size)
        golden.same(f"{label}: answer", answer, expected_answers[number])
