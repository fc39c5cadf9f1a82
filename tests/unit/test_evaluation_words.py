"""Answers in words alone: exact match, VQA accuracy, BLEU, perplexity of the true answer, before and after."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit import data_sets
from tests.unit.tiny_pixellm import make_model, noise
from utils.cli.errors import UserError
from utils.data.samples import NO_IMAGE, Sample, Turn
from utils.evaluation import compare, metrics, text_quality
from utils.evaluation import html_report as pages
from utils.evaluation.aggregate import QuestionScores, intervals
from utils.evaluation.ask import ask_text, summary
from utils.evaluation.questions import Plan, make_plan
from utils.evaluation.records import make_text_record
from utils.evaluation.scored_predictor import ScoredPredictor
from utils.evaluation.sets import ScoredSets


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("A cup.", ["cup"], True),
        ("the Cup", ["a mug", "A CUP!"], True),
        ("two cups", ["cups"], False),
        ("", ["cup"], False),
        ("the", ["a"], True),  # nothing but articles on both sides
    ],
)
def test_exact_match_is_of_words(answer: str, references: list[str], right: bool) -> None:
    assert metrics.exact_match(answer, references) is right


def test_vqa_accuracy_leaves_each_reference_out_once() -> None:
    ten = ["red"] * 2 + ["blue"] * 5 + ["green"] * 3
    # Leaving out one of the two reds leaves one who agrees, leaving out another leaves two.
    assert metrics.vqa_accuracy("Red.", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert metrics.vqa_accuracy("blue", ten) == 1.0
    assert metrics.vqa_accuracy("green", ten) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert metrics.vqa_accuracy("pink", ten) == 0.0
    assert metrics.vqa_accuracy("red", ["red"] * 4) == 1.0
    assert metrics.vqa_accuracy("red", ["red"] * 3) is None  # at most two others could agree


def test_bleu() -> None:
    assert text_quality.bleu([], []) is None
    assert text_quality.bleu(["a red cup on a tray"], [["a red cup on a tray"]]) == pytest.approx(100)
    # Precisions 5/6, 3/5, 1/4 and, none of 3 and smoothed once, 1/(2·3); equally long.
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** (1 / 4)
    assert text_quality.bleu(["a red cup by a tray"], [["a red cup on a tray"]]) == pytest.approx(expected)
    # A second reference takes in what the first lacks; not every answer has one.
    both = [["a red cup on a tray", "a red cup by a tray"], ["a dog in the park"]]
    assert text_quality.bleu(["a red cup by a tray", "a dog in the park"], both) == pytest.approx(100)


def talk(*turns: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(question, answer, (), "text") for question, answer in turns)


def samples() -> list[Sample]:
    colours = [talk(("Which colour?", colour)) for colour in ("red", "red", "blue", "Red.")]
    return [
        Sample("a.png", (talk(("What is it?", "A cup."), ("Whose?", "Mine.")), *colours), "vqa", "a"),
        Sample("b.png", (talk(("What is it?", "A dog in the park.")),), "vqa", "b"),
        Sample(NO_IMAGE, (talk(("Hello?", "Hi.")),), "vqa", "c"),
    ]


class Speaker:
    """Says the true answer to some questions; finds each letter of a true answer equally likely."""

    def __init__(self, says: dict[str, str], nll: float) -> None:
        self.says, self.nll = says, nll
        self.asked: list[Any] = []

    def fits(self, turns: Sequence[Any]) -> bool:
        return turns[-1][0] != "Whose?"

    def answer(self, images: Any, questions: Any, image_index: Any, max_new_tokens: int) -> list[Any]:
        self.asked += [(images[at], list(turns)) for at, turns in zip(image_index, questions, strict=True)]
        return [SimpleNamespace(text=self.says.get(turns[-1][0], "No idea.")) for turns in questions]

    def likelihoods(self, images: Any, conversations: Any, image_index: Any) -> list[tuple[float, int] | None]:
        texts = [turns[-1][1] for turns in conversations]
        return [None if text == "Mine." else (self.nll * len(text), len(text)) for text in texts]


def ask(speaker: Speaker, **options: Any) -> tuple[Plan, list[Any], dict[str, Any]]:
    plan = make_plan(samples(), text=True, **options)
    spoken = list(ask_text(speaker, plan, plan.text_batches))
    return plan, spoken, summary(plan, [one.figures for one in spoken])


def test_what_is_said_and_what_is_read() -> None:
    speaker = Speaker({"Which colour?": "RED", "What is it?": "a cup"}, 0.25)
    _, spoken, found = ask(speaker)
    # Two turns, a question with four references, one about the other image; none about no image.
    assert [(one.question.number, len(one.question.references)) for one in spoken] == [(0, 0), (1, 0), (2, 3), (0, 0)]
    assert found["left_out"]["text"] == 1 and found["n"] == 0
    text = found["text"]
    assert (text["n"], text["n_answered"]) == (4, 3)  # the second turn did not fit
    assert text["exact_match"] == 2 / 3  # the dog is no cup
    # "red" of red, red, blue and red: leaving out a red leaves two, leaving out the blue one three.
    assert (text["vqa_accuracy"], text["n_vqa_accuracy"]) == (pytest.approx((3 * 2 / 3 + 1) / 4), 1)
    assert text["perplexity"] == pytest.approx(math.exp(0.25)) and text["nll"] == 0.25
    assert (text["n_read"], text["tokens_read"]) == (3, len("A cup.") + len("red") + len("A dog in the park."))
    assert found["datasets"]["vqa"]["text"] == text
    assert found["datasets"]["vqa"]["giou"] is None and found["datasets"]["vqa"]["n"] == 0
    bounds = intervals([one.figures for one in spoken])["text"]
    # Two images: of the first both answers are right, of the second none is.
    assert bounds["exact_match_interval"] == [0.0, 1.0]
    assert bounds["perplexity_interval"] == pytest.approx([math.exp(0.25)] * 2)
    assert speaker.asked[0] == ("a.png", [("What is it?", None)])


def test_turns_before_are_given_with_their_true_answers() -> None:
    class Roomy(Speaker):
        def fits(self, turns: Sequence[Any]) -> bool:
            return True

    speaker = Roomy({}, 0.25)
    ask(speaker)
    assert ("a.png", [("What is it?", "A cup."), ("Whose?", None)]) in speaker.asked


def test_protocols_say_what_is_done() -> None:
    _, spoken, found = ask(Speaker({}, 0.25), protocols=["teacher"])
    assert {one.text for one in spoken} == {None}
    assert found["text"]["exact_match"] is found["text"]["bleu"] is None and found["text"]["n_answered"] == 0
    assert {make_text_record(one)["protocol"] for one in spoken} == {"teacher"}
    _, spoken, found = ask(Speaker({}, 0.25), protocols=["free"])
    assert found["text"]["perplexity"] is None and found["text"]["exact_match"] == 0.0
    with pytest.raises(UserError, match="nothing to score"):
        ask(Speaker({}, 0.25), protocols=["release"])


def test_training_on_masks_is_compared_in_words() -> None:
    right = {"What is it?": "A dog in the park.", "Which colour?": "red"}
    before = [make_text_record(one) for one in ask(Speaker(right, 0.25))[1]]
    after = [make_text_record(one) for one in ask(Speaker(right | {"What is it?": "A mask."}, 0.5))[1]]
    found = {one.score: one for one in compare.compare(before, after).differences}
    assert (found["exact match"].first, found["exact match"].second) == (2 / 3, 1 / 3)
    # The second image loses its only right answer, the first none: 0 and −1 when one of them is drawn twice.
    assert found["exact match"].interval == pytest.approx((-1.0, 0.0))
    assert found["vqa accuracy"].value == 0.0
    assert (found["perplexity"].first, found["perplexity"].second) == pytest.approx((math.exp(0.25), math.exp(0.5)))
    assert found["-ln p per token"].interval == pytest.approx((0.25, 0.25))
    assert found["BLEU"].second < found["BLEU"].first and found["BLEU"].interval is None
    other = [line | {"num_tokens": 3} for line in after]
    said = compare.compare(before, other)
    assert "different tokens" in said.notes[0] and "perplexity" not in {one.score for one in said.differences}


def test_a_page_shows_what_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "open_image", lambda path: noise(40, 30))
    chosen = pages.Chosen()
    for one in ask(Speaker({}, 0.25))[1]:
        chosen.add(make_text_record(one))
    sections = chosen.sections()
    assert list(sections) == ["in words alone"] and len(sections["in words alone"]) == 3
    pages.write_page(tmp_path / "p.html", "t", sections)
    assert "No idea." in (tmp_path / "p.html").read_text()


def test_llavas_conversations_are_read_turn_by_turn(tmp_path: Path) -> None:
    data_sets.write_vqa(tmp_path)
    plan = make_plan(ScoredSets("llava_instruct_150k|train", str(tmp_path)), text=True)
    assert [(len(one.earlier), one.turn.answer) for one in plan.questions] == [
        (0, "A cup."),
        (1, "Blue."),
        (0, "Because."),
    ]
    assert plan.batches == [] and plan.left_out["text"] == 1  # the one without an image


@pytest.fixture(scope="module")
def predictor() -> ScoredPredictor:
    built = make_model()
    return ScoredPredictor(built.model, built.processor)


def test_likelihood_is_what_the_logits_say(predictor: ScoredPredictor) -> None:
    """Against a pass over one conversation alone, whose last answer is told by its length in tokens."""
    turns = [("where is the red circle?", "it is the red circle."), ("which shapes are there?", "the green star.")]
    images = [noise(24, 32, seed) for seed in (0, 1)]
    processor, model = predictor.processor, predictor.model
    found = predictor.likelihoods(images, [turns, turns[:1], turns], [1, 0, 0])
    for (nll, tokens), (asked, which) in zip(found, [(turns, 1), (turns[:1], 0), (turns, 0)], strict=True):  # type: ignore[misc]
        prompt = processor.encode_prompt([*asked[:-1], (asked[-1][0], None)])
        whole = processor.encode_conversation(asked).input_ids
        encoded = processor.encode_image(images[which])
        wanted = whole[len(prompt) :]
        with torch.inference_mode():
            output = model.eval()(
                input_ids=whole[None],
                attention_mask=torch.ones_like(whole[None]),
                original_sizes=torch.tensor([encoded.original_size]),
                image_index=torch.tensor([0]),
                **predictor.processor.stack_images([encoded], predictor.model.device, predictor.model.dtype),
            )
            hidden = output.last_hidden_state[0, -len(wanted) - 1 : -1]
            logp = torch.log_softmax(model.get_output_embeddings()(hidden).float(), dim=-1)
        expected = -logp[torch.arange(len(wanted)), wanted].sum()
        assert tokens == len(wanted) and nll == pytest.approx(float(expected), rel=1e-4)


def test_what_does_not_fit_is_none(predictor: ScoredPredictor) -> None:
    long = "red circle " * 200
    kept, lost, first = predictor.likelihoods(
        [noise(8, 8)],
        [[("a?", "b.")], [("a?", "b."), ("c?", long)], [("a?", long)]],
        [0, 0, 0],
    )
    assert kept is not None and kept[1] > 0
    assert lost is None and first is None
    assert predictor.likelihoods([noise(8, 8)], [[("a?", long)]], [0]) == [None]
    assert predictor.fits([("a?", None)]) and not predictor.fits([(long, None)])


def test_figures_of_words_have_no_part_in_masks() -> None:
    found = summary(make_plan(samples(), text=True), [QuestionScores("text", "d", "a.png", 0)])
    assert found["giou"] is None
