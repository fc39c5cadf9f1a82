"""Evaluation with predictors whose scores are known, each expected number as arithmetic."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.structures import IGNORE_LABEL
from utils.cli.errors import UserError
from utils.data.samples import Sample, Target, Turn
from utils.evaluation import ask as evaluation
from utils.evaluation.aggregate import intervals
from utils.evaluation.metrics import Overlap

SIZE = (4, 6)
LOGIT = np.float32(40.0)  # so sure that BCE and DICE at the sampled points see the masks themselves
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
    """Two images: four questions about the first, one about the second."""
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
        logits=np.where(np.array(masks, dtype=bool).reshape(len(masks), *size), LOGIT, -LOGIT),
        scores=[1.0] * len(masks),
        boxes=[(0, 0, 1, 1)] * len(masks),
        num_broken=broken,
    )


class Fake:
    """Answers by the names in the question; keeps what it was asked."""

    def __init__(self, respond: Callable[[list[str]], Any]) -> None:
        self.respond = respond
        self.calls: list[tuple[str, list[str], list[str]]] = []

    def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
        self.calls.append(("answer", list(images), [images[index] for index in image_index]))
        return [self.respond([name for name in BOXES if name in question]) for question in questions]

    def segment(self, images: Any, conversations: Any, image_index: Any) -> list[Any]:
        self.calls.append(("segment", list(images), [images[index] for index in image_index]))
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
    assert list(found["datasets"]) == ["drawn", "other"]
    for name, n, forced in (("drawn", 4, 3), ("other", 1, 1)):
        entry = found["datasets"][name]
        assert entry["giou"] == entry["ciou"] == entry["giou_teacher_forced"] == entry["ciou_teacher_forced"] == 1.0
        assert (entry["n"], entry["n_teacher_forced"]) == (n, forced)
        assert set(entry["free"]["precision"].values()) == {entry["free"]["box_accuracy"]} == {1.0}
        assert entry["free"]["t_acc"] == 1.0 and entry["free"]["calibration_error"] == 0.0
    assert (found["datasets"]["drawn"]["free"]["n_acc"], found["datasets"]["other"]["free"]["n_acc"]) == (1.0, None)
    assert found["text"] is None
    assert found["left_out"] == {"text": 0, "no_target": 0, "limit": 0, "ignored_pixels": 0}


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


def test_a_images_questions_are_asked_together_and_other_images_are_shown_in_turn() -> None:
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
    found = run(predictor, protocols=["free"], shuffled=False)
    assert {call[0] for call in predictor.calls} == {"answer"}
    assert found["giou_teacher_forced"] is found["ciou_teacher_forced"] is found["giou_shuffled"] is None
    assert found["giou"] == 1.0


def test_a_single_image_cannot_be_exchanged() -> None:
    found = evaluation.evaluate(oracle(), samples()[1:], progress=False)
    assert found["giou_shuffled"] is None


def test_another_images_masks_are_brought_to_the_questions_size() -> None:
    large = (8, 12)
    mixed = [sample("a.png", turn("direct", "red square")), sample("b.png", turn("direct", "dot", size=large))]

    class BySize(Fake):
        def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
            sizes = [SIZE if images[index] == "a.png" else large for index in image_index]
            return [answer(["dot"], [np.ones(size)], size=size) for size in sizes]

    found = evaluation.evaluate(BySize(list), mixed, protocols=["free"], progress=False)
    assert found["giou_shuffled"] == pytest.approx((4 / 24 + 1 / 96) / 2)


def test_limit_spreads_over_the_set() -> None:
    scored: list[evaluation.Scored] = []
    found = run(oracle(), limit=2, on_scored=scored.append)
    assert [(one.question.image_path, one.figures.kind) for one in scored] == [
        ("a.png", "direct"),
        ("a.png", "reasoning"),
    ]
    assert found["left_out"] == {"text": 0, "no_target": 0, "limit": 3, "ignored_pixels": 0}


def test_on_scored_gets_everything() -> None:
    scored: list[evaluation.Scored] = []
    run(oracle(), on_scored=scored.append)
    several = scored[1]
    assert several.truths.shape == (2, *SIZE)
    assert several.protocol == "free"
    assert several.shown.overlap == Overlap(10, 10)
    assert several.shown.matched.of_targets == (1.0, 1.0)


def test_ignored_pixels_take_no_part() -> None:
    truth = region("red square")
    truth[:, 2:] = IGNORE_LABEL
    asked = Turn("red square?", "It is the red square {seg}.", (Target("red square", lambda: truth),), "direct")
    everything = Fake(lambda names: answer(names, [np.ones(SIZE)]))
    found = evaluation.evaluate(everything, [sample("a.png", asked)], progress=False)
    assert found["giou"] == 4 / 8
    assert found["left_out"]["ignored_pixels"] == 24 - 8


def test_text_questions_are_left_out_and_counted() -> None:
    talk = Turn("What is it?", "A drawing.", (), "text")
    found = evaluation.evaluate(oracle(), [*samples(), sample("a.png", talk)], progress=False)
    assert found["n"] == 5
    assert found["left_out"]["text"] == 1
    with pytest.raises(UserError, match="nothing to score among 1 questions"):
        evaluation.evaluate(oracle(), [sample("a.png", talk)], progress=False)


def test_conversations_of_several_turns_are_refused() -> None:
    two = (turn("direct", "dot"), turn("direct", "blue bar"))
    with pytest.raises(UserError, match="conversation of 2 turns"):
        evaluation.evaluate(oracle(), [Sample("a.png", (two,), "drawn", "a")], progress=False)


def test_masks_of_another_size_than_the_truth_are_refused() -> None:
    wrong = Fake(lambda names: answer(names, [np.ones((2, 2)) for _ in names], size=(2, 2)))
    with pytest.raises(ValueError, match=r"\(2, 2\) and its true mask \(4, 6\)"):
        run(wrong)


def test_baseline_draws_one_mask_whatever_is_asked() -> None:
    found = evaluation.baseline_giou(samples(), lambda path: np.ones(SIZE, dtype=bool))
    assert found == pytest.approx((4 / 24 + 10 / 24 + 1 / 24 + 0 + 6 / 24) / 5)


ALL = ["free", "teacher", "release"]


def release(found: dict[str, Any], loop: str) -> tuple[float, float]:
    return found["release"][loop]["giou"], found["release"][loop]["ciou"]


def test_oracle_scores_one_under_every_protocol() -> None:
    found = run(oracle(), protocols=ALL)
    free = found["free"]
    assert set(free["precision"].values()) == {1.0} and list(free["precision"]) == ["0.5", "0.6", "0.7", "0.8", "0.9"]
    assert free["ciou_matched"] == free["box_accuracy"] == free["n_acc"] == free["t_acc"] == 1.0
    assert free["calibration_error"] == 0.0
    # Five masks: 1 + 2 + 1 + 0 + 1.
    assert free["calibration"] == [{"low": 0.9, "high": 1.0, "n": 5, "score": 1.0, "iou": 1.0}]
    assert (free["groups"]["emitted"], free["groups"]["true"], free["groups"]["questions_with_groups"]) == (5, 5, 4)
    teacher = found["teacher"]
    assert teacher["n"] == 4  # the no-target question is left out
    assert teacher["giou_matched"] == teacher["ciou_matched"] == teacher["box_accuracy"] == 1.0
    assert release(found, "validate") == pytest.approx((1.0, 1.0), abs=1e-5)
    assert release(found, "ar_validate") == pytest.approx((1.0, 1.0), abs=1e-5)


def test_silence_under_every_protocol() -> None:
    found = run(Fake(lambda names: answer([], [])), protocols=["free", "teacher"])
    free = found["free"]
    assert free["precision"]["0.5"] == 1 / 5
    assert (free["n_acc"], free["t_acc"]) == (1 / 1, 0 / 4)
    assert free["box_accuracy"] == 0 / 3
    assert free["ciou_matched"] == 0 / (4 + 4 + 6 + 1 + 6)
    assert free["calibration_error"] is None and free["calibration"] == []
    assert free["groups"]["questions_with_too_few"] == 4 and free["groups"]["emitted"] == 0
    assert found["teacher"]["precision"]["0.5"] == 0 / 4


def test_silence_in_the_releases_generation_loop() -> None:
    class Silent(Fake):
        def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
            return [answer([], []) for _ in questions]

    found = run(Silent(lambda names: answer(names, [region(name) for name in names])), protocols=["release"])
    # Five missed targets, each of IoU 0; the question without a target adds nothing, right as it is.
    assert release(found, "ar_validate") == (0.0, 0.0)
    # The answer given, it draws all five.
    assert release(found, "validate") == pytest.approx((5 / 5, 1.0), abs=1e-5)
    assert found["giou"] is None and found["free"] is None and found["teacher"] is None


def test_masking_everything_under_every_protocol() -> None:
    def cover(names: list[str]) -> Any:
        return answer(names or ["moon"], [np.ones(SIZE)] * max(1, len(names)))

    found = run(Fake(cover), protocols=ALL)
    free = found["free"]
    assert free["precision"]["0.5"] == 0.0
    assert (free["n_acc"], free["t_acc"]) == (0 / 1, 4 / 4)
    assert free["box_accuracy"] == 0 / 3  # boxes of 24 against 4, 1 and 6
    # Pairs and the surplus mask: each has a union of 24.
    assert free["ciou_matched"] == (4 + 4 + 6 + 1 + 0 + 6) / (6 * 24)
    # Six masks of score 1 have IoUs of 4, 4, 6, 1, 0 and 6 of 24.
    assert free["calibration_error"] == pytest.approx(1 - (4 + 4 + 6 + 1 + 0 + 6) / 24 / 6)
    assert free["groups"]["questions_with_too_many"] == 1
    assert found["teacher"]["giou_matched"] == pytest.approx((4 + (4 + 6) / 2 + 1 + 6) / 24 / 4)
    assert release(found, "validate") == pytest.approx(((4 + 4 + 6 + 1 + 6) / 24 / 5, 21 / (5 * 24)), abs=1e-5)
    # Image a: four pairs, and a surplus mask whose raw logits of 40 lie outside of [0, 1]: its union is empty, which
    # the release counts as right. So 15 of 24 and 1, image b 6 of 24, over 5 + 1 predictions.
    assert release(found, "ar_validate") == pytest.approx(((15 / 24 + 1 + 6 / 24) / 6, 21 / (5 * 24)), abs=1e-5)


def test_repeated_groups_under_every_protocol() -> None:
    found = run(Fake(lambda names: answer(names * 2, [region(name) for name in names] * 2)), protocols=["free"])
    free = found["free"]
    assert free["groups"] == {
        "emitted": 10,
        "true": 5,
        "broken": 0,
        "questions_with_groups": 4,
        "questions_with_broken_groups": 0,
        "questions_with_too_many": 4,
        "questions_with_too_few": 0,
    }
    assert free["ciou_matched"] == (4 + 10 + 1 + 6) / (2 * (4 + 10 + 1 + 6))
    assert free["calibration_error"] == 1 - 5 / 10  # ten masks of score 1, five of them surplus
    assert free["precision"]["0.9"] == free["n_acc"] == free["t_acc"] == 1.0


def test_repeated_groups_in_the_releases_generation_loop() -> None:
    class Twice(Fake):
        def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
            found = super().answer(images, questions, image_index, max_new_tokens)
            return [answer(one.phrases * 2, [*one.masks, *one.masks]) for one in found]

    found = run(Twice(lambda names: answer(names, [region(name) for name in names])), protocols=["release"])
    # Raw logits of 40 make the surplus masks free, an IoU of 1 each: 5 + 5 over 10 predictions.
    assert release(found, "ar_validate") == pytest.approx((10 / 10, 1.0), abs=1e-5)


def test_broken_groups_under_every_protocol() -> None:
    found = run(Fake(lambda names: answer([], [], broken=len(names))), protocols=["free"])
    groups = found["free"]["groups"]
    assert (groups["broken"], groups["questions_with_broken_groups"]) == (1 + 2 + 1 + 0 + 1, 4)
    assert (groups["emitted"], groups["questions_with_groups"], groups["questions_with_too_few"]) == (0, 0, 4)
    assert found["free"]["n_acc"] == 1.0


def test_the_order_of_instances_costs_only_the_releases_forced_loop() -> None:
    def reverse(names: list[str]) -> Any:
        return answer(names[::-1], [region(name) for name in names[::-1]])

    found = run(Fake(reverse), protocols=ALL)
    assert found["giou"] == found["giou_matched"] == found["text_accuracy"] == found["free"]["ciou_matched"] == 1.0
    assert found["teacher"]["giou_matched"] == 1.0
    assert release(found, "ar_validate") == pytest.approx((1.0, 1.0), abs=1e-5)
    # By position: the two masks of one question do not meet (IoU 0 each), the other three are right.
    assert release(found, "validate")[0] == pytest.approx(3 / 5, abs=1e-5)
    assert release(found, "validate")[1] == pytest.approx((4 + 1 + 6) / (4 + 1 + 6 + 10 + 10), abs=1e-5)


def test_teacher_alone_never_lets_the_model_speak() -> None:
    predictor = oracle()
    scored: list[evaluation.Scored] = []
    found = run(predictor, protocols=["teacher"], on_scored=scored.append)
    assert {call[0] for call in predictor.calls} == {"segment"}
    assert found["n"] == 4 and found["left_out"]["no_target"] == 1
    assert found["giou"] is found["giou_shuffled"] is found["free"] is None
    assert found["giou_teacher_forced"] == 1.0
    assert {one.protocol for one in scored} == {"teacher"}


def test_the_release_needs_logits() -> None:
    def without(names: list[str]) -> Any:
        found = answer(names, [region(name) for name in names])
        del found.logits
        return found

    with pytest.raises(TypeError, match="keep no logits"):
        run(Fake(without), protocols=["release"])


def test_classes_are_scored_over_all_images() -> None:
    shifted = {"red square": 1, "blue bar": 0, "dot": 0}

    def shift(names: list[str]) -> Any:
        return answer(names, [np.roll(region(name), shifted[name], axis=1) for name in names])

    asked = [
        sample("a.png", turn("direct", "red square"), turn("direct", "dot"), dataset="ade20k"),
        sample("b.png", turn("direct", "red square"), turn("no_target", question="moon?"), dataset="ade20k"),
    ]
    found = evaluation.evaluate(Fake(shift), asked, progress=False)["datasets"]["ade20k"]
    # A square of 2 x 2 moved by one: 2 of 6 pixels, in both images.
    assert found["class_iou"] == {"dot": 1.0, "red square": (2 + 2) / (6 + 6)}
    assert found["miou"] == found["miou_teacher_forced"] == pytest.approx((1 + 1 / 3) / 2)


def test_intervals_belong_to_scores() -> None:
    scored: list[evaluation.Scored] = []
    found = run(Fake(lambda names: answer(["red square"], [np.ones(SIZE)])), on_scored=scored.append)
    bounds = intervals([one.figures for one in scored])
    # Two images: a with IoUs of 4, 10, 1 and 0 of 24, b with 6 of 24; a quarter of the draws takes only one of them.
    low, high = bounds["giou"]
    assert (low, high) == pytest.approx(((4 + 10 + 1 + 0) / 24 / 4, 6 / 24))
    assert low <= found["giou"] <= high
    assert bounds["datasets"]["other"]["giou_interval"] == [6 / 24, 6 / 24]
    assert bounds["giou_by_kind"]["several"] == [10 / 24, 10 / 24]
    assert bounds["unit"] == "image" and bounds["draws"] == 10_000
