"""Golden group `metrics`: gIoU and cIoU as the release's two validation loops count them."""

import re
from itertools import accumulate, pairwise

import numpy as np
import pytest

from tests.golden import vectors
from utils import metrics
from utils.matching import match, matching_cost

GROUP = "metrics"
TEACHER_FORCED, GENERATED = "validate", "ar_validate"
TEACHER_FORCED_CASES, GENERATED_CASES = (vectors.case_names(GROUP, loop) for loop in (TEACHER_FORCED, GENERATED))
SAMPLED_POINTS, POINT_SEED = 12544, 0  # as many as the release draws; which ones does not change these matches
UNION_EPS = 1e-5
SEG_RUN = r"\[SEG\d+\](?: \[SEG\d+\])*"
NO_NAME = "None []"


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
        pictures = [
            (golden.tensor(f"{index}.pred_logits").numpy(), golden.tensor(f"{index}.gt").numpy())
            for index in range(golden.facts["images"])
        ]
        compare_scores(golden, metrics.validate_meters(pictures))


@pytest.mark.parametrize("case", GENERATED_CASES)
def test_generation_loop(case: str) -> None:
    with read(GENERATED, GENERATED_CASES, case) as golden:
        images = golden.facts["images"]
        pictures = []
        for index in range(len(images)):
            questions = matched_questions(golden, images[index], index)
            compare_picture(golden, images[index], index, questions)
            compare_texts(golden, images[index], index, questions)
            pictures.append(questions)
        compare_scores(golden, metrics.ar_validate_meters(pictures))


def cut(masks: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """(sum of counts, H, W) -> one array per question."""
    return [masks[start:end] for start, end in pairwise([0, *accumulate(counts)])]


def matched_questions(golden: vectors.Reading, facts: vectors.Facts, index: int) -> list[metrics.MatchedQuestion]:
    """The questions of a picture, predictions and targets matched by our own matching."""
    logits = cut(golden.tensor(f"{index}.pred_logits").numpy(), facts["pred_counts"])
    targets = cut(golden.tensor(f"{index}.gt").numpy(), facts["gt_counts"])
    points = np.random.default_rng(POINT_SEED).random((SAMPLED_POINTS, 2))
    return [
        metrics.MatchedQuestion(predicted, true, match(matching_cost(predicted, true, points)))
        for predicted, true in zip(logits, targets, strict=True)
    ]


def compare_picture(
    golden: vectors.Reading, facts: vectors.Facts, index: int, questions: list[metrics.MatchedQuestion]
) -> None:
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

    counts = [metrics._release_counts(*pair) for q in questions for pair in metrics._release_generation_pairs(q)]
    golden.same(f"{index}: assign_acc", [[list(i), list(u)] for i, u in counts], facts["assign_acc"])
    ious = sum(i / (u + UNION_EPS) + (u == 0) for i, u in counts) / max(predicted, true)
    for side, (found, expected) in enumerate(zip(ious, facts["mean_iou_bg_fg"], strict=True)):
        golden.number(f"{index}: mean_iou_bg_fg[{side}]", float(found), expected, atol=vectors.METRIC_ATOL)


def compare_texts(
    golden: vectors.Reading, facts: vectors.Facts, index: int, questions: list[metrics.MatchedQuestion]
) -> None:
    """Each prediction gets the name of its target, and stands for its seg group in the answer a judge would read."""
    expected_names, expected_answers = facts["question_gt_category_name"], facts["answers"]
    for number, (question, text, names) in enumerate(zip(questions, facts["texts"], facts["gt_names"], strict=True)):
        target_of = dict(question.pairs)
        given = [f"({NO_NAME})" if p not in target_of else names[target_of[p]] for p in range(len(question.logits))]
        label = f"{index}: question {number}"
        golden.same(f"{label}: names", [name.strip("()") for name in given], expected_names[number])
        answer = text.split("ASSISTANT:")[-1]
        golden.same(f"{label}: groups", len(re.findall(SEG_RUN, answer)), len(given))
        for name in given:
            answer = re.sub(SEG_RUN, name, answer, count=1)
        golden.same(f"{label}: answer", answer, expected_answers[number])
