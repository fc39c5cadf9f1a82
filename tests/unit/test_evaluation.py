"""Evaluation with predictors whose scores are known, each expected number as arithmetic."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from utils import evaluation
from utils.data.samples import IGNORE_LABEL, Sample, Target, Turn
from utils.scripts import UserError

SIZE = (4, 6)
BOXES = {"red square": (0, 2, 0, 2), "blue bar": (3, 4, 0, 6), "dot": (0, 1, 5, 6)}  # areas 4, 6, 1 of 24


def region(name: str, size: tuple[int, int] = SIZE) -> np.ndarray:
    top, bottom, left, right = BOXES[name]
    mask = np.zeros(size, dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def turn(kind: str, *names: str, size: tuple[int, int] = SIZE, question: str = "") -> Turn:
    answer = " and ".join(f"the {name} {{seg}}" for name in names) or "There is none."
    targets = tuple(Target(name, lambda name=name: region(name, size)) for name in names)
    return Turn(question or f"Which? {' '.join(names)}", answer, targets, kind)


def sample(path: str, *turns: Turn, dataset: str = "drawn") -> Sample:
    return Sample(path, tuple((one,) for one in turns), dataset, path)


def samples() -> list[Sample]:
    """Two pictures: four questions about the first, one about the second."""
    return [
        sample(
            "a.png",
            turn("direct", "red square"),
            turn("several", "red square", "blue bar"),
            turn("reasoning", "dot"),
            turn("no_target", question="Where is the moon?"),
        ),
        sample("b.png", turn("direct", "blue bar"), dataset="other"),
    ]


def answer(names: Sequence[str], masks: Sequence[np.ndarray], size: tuple[int, int] = SIZE, broken: int = 0) -> Any:
    words = " and ".join(f"the {name}" for name in names)
    return SimpleNamespace(
        text=words,
        marked_text=words,
        phrases=[f"the {name}" for name in names],
        masks=np.array(masks, dtype=bool).reshape(len(masks), *size),
        scores=[1.0] * len(masks),
        boxes=[(0, 0, 1, 1)] * len(masks),
        num_broken=broken,
    )


class Fake:
    """Answers by the names in the question; keeps what it was asked."""

    def __init__(self, respond: Callable[[list[str]], Any]) -> None:
        self.respond = respond
        self.calls: list[tuple[str, list[str], list[str]]] = []

    def answer(self, pictures: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
        self.calls.append(("answer", list(pictures), [pictures[index] for index in image_index]))
        return [self.respond([name for name in BOXES if name in question]) for question in questions]

    def segment(self, pictures: Any, conversations: Any, image_index: Any) -> list[Any]:
        self.calls.append(("segment", list(pictures), [pictures[index] for index in image_index]))
        return [self.respond([n for n in BOXES if n in given]) for ((_, given),) in conversations]


def oracle() -> Fake:
    return Fake(lambda names: answer(names, [region(name) for name in names]))


def run(predictor: Fake, **options: Any) -> dict[str, Any]:
    return evaluation.evaluate(predictor, samples(), progress=False, **options)


def test_oracle_scores_one_everywhere() -> None:
    found = run(oracle())
    assert found["n"] == 5
    assert found["n_by_kind"] == {"direct": 2, "several": 1, "reasoning": 1, "no_target": 1}
    for name in ("giou", "ciou", "giou_matched", "giou_teacher_forced", "target_count_accuracy", "text_accuracy"):
        assert found[name] == 1.0, name
    assert found["giou_by_kind"] == {"direct": 1.0, "several": 1.0, "reasoning": 1.0, "no_target": 1.0}
    assert found["datasets"] == {"drawn": {"giou": 1, "ciou": 1, "n": 4}, "other": {"giou": 1, "ciou": 1, "n": 1}}
    assert found["left_out"] == {"text": 0, "limit": 0}


def test_silence_is_right_only_without_a_target() -> None:
    found = run(Fake(lambda names: answer([], [])))
    assert found["giou"] == 1 / 5
    assert found["giou_by_kind"] == {"direct": 0.0, "several": 0.0, "reasoning": 0.0, "no_target": 1.0}
    assert found["ciou"] == 0 / (4 + 10 + 1 + 0 + 6)
    assert found["target_count_accuracy"] == found["text_accuracy"] == 1 / 5
    assert found["giou_teacher_forced"] == 0.0  # no-target questions are not among its four


def test_masking_everything() -> None:
    found = run(Fake(lambda names: answer(["red square"], [np.ones(SIZE)])))
    assert found["giou"] == pytest.approx((4 / 24 + 10 / 24 + 1 / 24 + 0 + 6 / 24) / 5)
    assert found["ciou"] == pytest.approx((4 + 10 + 1 + 0 + 6) / (5 * 24))
    assert found["giou_teacher_forced"] == pytest.approx((4 + 10 + 1 + 6) / 24 / 4)
    assert found["ciou_teacher_forced"] == pytest.approx((4 + 10 + 1 + 6) / (4 * 24))
    assert found["giou_shuffled"] == pytest.approx((4 + 10 + 1 + 6) / 24 / 4)
    # One group is right for the two direct questions and the reasoning one, its name for the first alone.
    assert found["target_count_accuracy"] == 3 / 5
    assert found["text_accuracy"] == 1 / 5
    # Of the two true masks the bar fits best: 6 of 24 pixels, over two.
    assert found["giou_matched_by_kind"]["several"] == pytest.approx((6 / 24) / 2)


def test_repeated_groups_cost_count_and_matching_but_not_the_union() -> None:
    found = run(Fake(lambda names: answer(names * 2, [region(name) for name in names] * 2)))
    assert found["giou"] == 1.0
    assert found["giou_matched"] == pytest.approx((4 * (1 / 2) + 1) / 5)
    assert found["target_count_accuracy"] == found["text_accuracy"] == 1 / 5


def test_broken_groups_are_counted() -> None:
    found = run(Fake(lambda names: answer([], [], broken=2)))
    assert found["broken_groups"] == 5 * 2


def test_wrong_names_with_right_masks() -> None:
    found = run(Fake(lambda names: answer(["blue bar"] * len(names), [region(name) for name in names])))
    assert found["giou"] == 1.0
    assert found["text_accuracy"] == 2 / 5  # the bar itself, and no name where there is none


def test_a_pictures_questions_are_asked_together_and_other_pictures_are_shown_in_turn() -> None:
    predictor = oracle()
    run(predictor, batch_size=4)
    a, b = "a.png", "b.png"
    assert predictor.calls == [
        ("answer", [a], [a, a, a, a]),
        ("segment", [a], [a, a, a]),
        ("answer", [b], [b, b, b]),
        ("answer", [b], [b]),
        ("segment", [b], [b]),
        ("answer", [a], [a]),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_scores_do_not_depend_on_the_batch(batch_size: int) -> None:
    def smudge(names: list[str]) -> Any:
        return answer(names, [np.roll(region(name), 1, axis=1) for name in names])

    assert run(Fake(smudge), batch_size=batch_size) == run(Fake(smudge), batch_size=4)


def test_ways_of_asking_can_be_left_out() -> None:
    predictor = oracle()
    found = run(predictor, teacher_forced=False, shuffled=False)
    assert {call[0] for call in predictor.calls} == {"answer"}
    assert found["giou_teacher_forced"] is found["ciou_teacher_forced"] is found["giou_shuffled"] is None
    assert found["giou"] == 1.0


def test_a_single_picture_cannot_be_exchanged() -> None:
    found = evaluation.evaluate(oracle(), samples()[1:], progress=False)
    assert found["giou_shuffled"] is None


def test_another_pictures_masks_are_brought_to_the_questions_size() -> None:
    large = (8, 12)
    mixed = [sample("a.png", turn("direct", "red square")), sample("b.png", turn("direct", "dot", size=large))]

    class BySize(Fake):
        def answer(self, pictures: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
            sizes = [SIZE if pictures[index] == "a.png" else large for index in image_index]
            return [answer(["dot"], [np.ones(size)], size=size) for size in sizes]

    found = evaluation.evaluate(BySize(list), mixed, teacher_forced=False, progress=False)
    assert found["giou_shuffled"] == pytest.approx((4 / 24 + 1 / 96) / 2)


def test_limit_spreads_over_the_set() -> None:
    scored: list[evaluation.Scored] = []
    found = run(oracle(), limit=2, on_scored=scored.append)
    assert [(one.question.image_path, one.figures.kind) for one in scored] == [
        ("a.png", "direct"),
        ("a.png", "reasoning"),
    ]
    assert found["left_out"] == {"text": 0, "limit": 3}


def test_on_scored_gets_everything_and_is_plain() -> None:
    scored: list[evaluation.Scored] = []
    run(oracle(), on_scored=scored.append)
    several = scored[1]
    assert several.truths.shape == (2, *SIZE)
    line = several.as_dict()
    assert line["names"] == ["red square", "blue bar"]
    assert line["phrases"] == ["the red square", "the blue bar"]
    assert (line["intersection"], line["union"], line["iou"]) == (10, 10, 1.0)


def test_ignored_pixels_take_no_part() -> None:
    truth = region("red square")
    truth[:, 2:] = IGNORE_LABEL
    asked = Turn("red square?", "It is the red square {seg}.", (Target("red square", lambda: truth),), "direct")
    everything = Fake(lambda names: answer(names, [np.ones(SIZE)]))
    found = evaluation.evaluate(everything, [sample("a.png", asked)], progress=False)
    assert found["giou"] == 4 / 8


def test_text_questions_are_left_out_and_counted() -> None:
    talk = Turn("What is it?", "A drawing.", (), "text")
    found = evaluation.evaluate(oracle(), [*samples(), sample("a.png", talk)], progress=False)
    assert found["n"] == 5
    assert found["left_out"]["text"] == 1
    with pytest.raises(UserError, match="nothing to score among 1 questions"):
        evaluation.evaluate(oracle(), [sample("a.png", talk)], progress=False)


def test_conversations_of_several_turns_are_refused() -> None:
    two = (turn("direct", "dot"), turn("direct", "blue bar"))
    with pytest.raises(ValueError, match="conversation of 2 turns"):
        evaluation.evaluate(oracle(), [Sample("a.png", (two,), "drawn", "a")], progress=False)


def test_masks_of_another_size_than_the_truth_are_refused() -> None:
    wrong = Fake(lambda names: answer(names, [np.ones((2, 2)) for _ in names], size=(2, 2)))
    with pytest.raises(ValueError, match=r"\(2, 2\) and its true mask \(4, 6\)"):
        run(wrong)


def test_baseline_draws_one_mask_whatever_is_asked() -> None:
    found = evaluation.baseline_giou(samples(), lambda path: np.ones(SIZE, dtype=bool))
    assert found == pytest.approx((4 / 24 + 10 / 24 + 1 / 24 + 0 + 6 / 24) / 5)
