"""The predictor over a real tiny model: masks in the image's own pixels, batches equal to single questions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.geometry import restore_masks
from model.predictor import Answer, ModelFolderError, Predictor, mask_box, mask_scores
from tests.unit.tiny_pixellm import make_model, noise, same, saying
from utils.checkpoints.builder import BuiltModel, save_model


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    return make_model()


@pytest.fixture
def predictor(built: BuiltModel) -> Predictor:
    return Predictor(built.model, built.processor)


def test_score_is_the_mean_probability_inside_the_mask() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.0, 1.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    inside = (torch.tensor(2.0).sigmoid() + torch.tensor(1.0).sigmoid()) / (2 + 1e-6)
    assert mask_scores(logits) == pytest.approx([float(inside), 0.0])
    assert mask_scores(torch.zeros(0, 3, 4)) == []


def test_box_ends_are_exclusive() -> None:
    mask = np.zeros((5, 7), dtype=bool)
    assert mask_box(mask) == (0, 0, 0, 0)
    mask[2, 3] = True
    assert mask_box(mask) == (3, 2, 4, 3)
    mask[4, 6] = True
    assert mask_box(mask) == (3, 2, 7, 5)


def test_answer_has_a_mask_for_every_group(predictor: Predictor, built: BuiltModel) -> None:
    with saying(built, ["It is the red circle {seg} and the blue square {seg}."]):
        predictor.set_image(noise(20, 30))
        answer = predictor.ask("Where are they?")
    assert answer.text == "It is the red circle and the blue square."
    assert answer.marked_text == "It is the red circle {seg} and the blue square {seg}."
    assert [phrase.removeprefix("the ") for phrase in answer.phrases] == ["red circle", "blue square"]
    assert answer.masks.shape == (2, 20, 30) and answer.masks.dtype == np.bool_
    assert answer.areas == [int(mask.sum()) for mask in answer.masks]
    assert answer.boxes == [mask_box(mask) for mask in answer.masks]
    assert len(answer.scores) == 2 and all(0 <= score <= 1 for score in answer.scores)
    assert answer.num_broken == 0


def test_answer_without_groups(predictor: Predictor, built: BuiltModel) -> None:
    with saying(built, ["There is none."]):
        (answer,) = predictor.answer([noise(20, 30)], ["Where is it?"], [0])
    assert answer.text == "There is none."
    assert answer.masks.shape == (0, 20, 30)
    assert answer.phrases == answer.scores == answer.boxes == answer.areas == []


def test_broken_group_is_counted_and_the_whole_one_kept(predictor: Predictor, built: BuiltModel) -> None:
    said = "the red circle {seg} and the blue square {seg}"
    encoded = built.processor.encode_conversation([("?", said)])
    tokens = int((encoded.labels != -100).sum())
    with saying(built, [said]):
        # Two tokens early: without the end token and the last of the second group.
        (cut,) = predictor.answer([noise(9, 9)], ["?"], [0], max_new_tokens=tokens - 2)
    assert cut.num_broken == 1
    assert cut.phrases == ["the red circle"]
    assert cut.masks.shape == (1, 9, 9)


def test_groups_of_earlier_answers_have_no_words_by_the_releases_rule(
    predictor: Predictor, built: BuiltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built.model.config, "group_rule", "release")
    turns = [("Where is it?", "It is the red circle {seg}."), ("And the other?", None)]
    with saying(built, ["It is the blue square {seg}."]):
        (whole,) = predictor.answer([noise(20, 30)], [turns], [0])
    assert whole.masks.shape == (2, 20, 30) and len(whole.phrases) == len(whole.scores) == 2
    assert whole.phrases[0] == "" and whole.phrases[1].endswith("blue square")
    with saying(built, ["It is the blue square {seg} {seg}"]):
        (cut,) = predictor.answer([noise(20, 30)], [turns], [0], max_new_tokens=tokens_said(built, whole) + 1)
    assert cut.masks.shape == (0, 20, 30) and cut.phrases == [] and cut.num_broken == 1


def tokens_said(built: BuiltModel, answer: Answer) -> int:
    """Tokens of an answer, its end token included."""
    encoded = built.processor.encode_conversation([("?", answer.marked_text)])
    return int((encoded.labels != -100).sum())


def test_masks_come_from_the_low_resolution_logits(predictor: Predictor, built: BuiltModel, monkeypatch: Any) -> None:
    kept: list[Any] = []
    original = built.model.generate_answers

    def keep(**arguments: Any) -> Any:
        kept.extend(original(**arguments))
        return kept

    monkeypatch.setattr(built.model, "generate_answers", keep)
    with saying(built, ["a {seg}"]):
        (answer,) = predictor.answer([noise(20, 30)], ["?"], [0])
    # 30 pixels become the square's 32, so 20 become int(20 * 32 / 30 + 0.5) = 21.
    logits = restore_masks(kept[0].low_res_mask_logits, (21, 32), (20, 30))
    assert np.array_equal(answer.masks, (logits > 0).numpy())
    assert answer.scores == pytest.approx(mask_scores(logits))


def test_a_batch_gives_what_single_questions_give(predictor: Predictor) -> None:
    images = [noise(20, 30), noise(40, 10, seed=1)]
    questions = ["Where is the red circle?", "Which?", "the blue square and the green star?"]
    index = [1, 0, 1]
    together = predictor.answer(images, questions, index, max_new_tokens=8)
    for question, place, answer in zip(questions, index, together, strict=True):
        predictor.set_image(images[place])
        assert same(answer, predictor.ask(question, max_new_tokens=8))


def test_given_answers_are_drawn_as_when_the_model_says_them(predictor: Predictor, built: BuiltModel) -> None:
    image, said = noise(20, 30), "It is the red circle {seg} and the blue square {seg}."
    with saying(built, [said]):
        (free,) = predictor.answer([image], ["Where are they?"], [0])
    (given,) = predictor.segment([image], [[("Where are they?", said)]], [0])
    assert same(free, given)


def test_segment_returns_answers_in_the_order_asked(predictor: Predictor) -> None:
    images = [noise(20, 30), noise(8, 8, seed=1)]
    conversations = [
        [("Which?", "the red circle {seg}."), ("And?", "the blue square {seg} and the star {seg}.")],
        [("Where?", "There is none.")],
        [("Where?", "the green star {seg}.")],
        [("Where is it?", "the blue square {seg}.")],
    ]
    index = [1, 0, 0, 1]
    answers = predictor.segment(images, conversations, index)
    assert [answer.masks.shape for answer in answers] == [(3, 8, 8), (0, 20, 30), (1, 20, 30), (1, 8, 8)]
    assert answers[0].phrases == ["the red circle", "the blue square", "the star"]
    for conversation, place, answer in zip(conversations, index, answers, strict=True):
        assert same(answer, predictor.segment([images[place]], [conversation], [0])[0])


def test_history_is_part_of_the_prompt(predictor: Predictor, built: BuiltModel, monkeypatch: Any) -> None:
    turns = [("Which?", "the red circle {seg}."), ("And?", None)]
    prompts: list[torch.Tensor] = []
    original = built.model.generate_answers

    def keep(**arguments: Any) -> Any:
        prompts.extend(arguments["prompts"])
        return original(**arguments)

    monkeypatch.setattr(built.model, "generate_answers", keep)
    with saying(built, ["the star {seg}."]):
        (answer,) = predictor.answer([noise(8, 8)], [turns], [0])
    assert prompts[0].tolist() == built.processor.encode_prompt(turns).tolist()
    assert len(answer.masks) == 1  # that of the turn that was asked, none of the history's


def test_nothing_asked_gives_nothing(predictor: Predictor) -> None:
    assert predictor.answer([noise(4, 4)], [], []) == []
    assert predictor.segment([noise(4, 4)], [], []) == []


@pytest.mark.parametrize("index", [[], [0, 1], [-1], [1]])
def test_indices_that_do_not_fit_are_refused(predictor: Predictor, index: list[int]) -> None:
    with pytest.raises(ValueError, match="does not fit 1 questions about 1 images"):
        predictor.answer([noise(4, 4)], ["Where?"], index)


def test_bad_questions_and_images_pass_the_processors_sentence_on(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        predictor.answer([noise(4, 4)], ["  "], [0])
    with pytest.raises(ValueError, match=r"\{seg\}"):
        predictor.answer([noise(4, 4)], ["Where is {seg}?"], [0])
    with pytest.raises(ValueError, match="does not exist"):
        predictor.set_image("nowhere.png")
    with pytest.raises(RuntimeError, match="set_image"):
        Predictor(predictor.model, predictor.processor).ask("Where?")


def test_lost_turns_are_refused(predictor: Predictor) -> None:
    turn = ("Which shapes are there?", "the red circle {seg} and the blue square {seg}.")
    with pytest.raises(ValueError, match="conversation 0 is too long"):
        predictor.segment([noise(4, 4)], [[turn] * 40], [0])


def test_mode_and_gradients_are_put_back(predictor: Predictor) -> None:
    predictor.model.train()
    predictor.answer([noise(4, 4)], ["Where?"], [0], max_new_tokens=2)
    assert predictor.model.training
    assert torch.is_grad_enabled()
    predictor.model.eval()


def test_odd_images(predictor: Predictor, built: BuiltModel, tmp_path: Path) -> None:
    Image.fromarray(noise(1, 1)).save(tmp_path / "one.png")
    Image.fromarray(noise(12, 20)).convert("L").save(tmp_path / "grey.png")
    images = [tmp_path / "one.png", (tmp_path / "grey.png").read_bytes(), Image.fromarray(noise(1, 40))]
    with saying(built, ["a {seg}"] * 3):
        answers = predictor.answer(images, ["Where?"] * 3, [0, 1, 2])
    assert [answer.masks.shape for answer in answers] == [(1, 1, 1), (1, 12, 20), (1, 1, 40)]


def test_saved_folder_answers_alike(predictor: Predictor, built: BuiltModel, tmp_path: Path) -> None:
    save_model(built.model, built.processor, tmp_path / "model")
    loaded = Predictor.from_pretrained(tmp_path / "model", device="cpu")
    asked = ([noise(20, 30)], ["Where is the red circle?"], [0])
    assert same(predictor.answer(*asked, max_new_tokens=6)[0], loaded.answer(*asked, max_new_tokens=6)[0])
    halved = Predictor.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert halved.model.dtype == torch.bfloat16
    assert len(halved.segment([noise(20, 30)], [[("Where?", "a {seg}")]], [0])[0].masks) == 1


def test_a_folder_that_is_no_model_is_refused(built: BuiltModel, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"holds no config\.json"):
        Predictor.from_pretrained(tmp_path)
    save_model(built.model, built.processor, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelFolderError, match="cannot load the model"):
        Predictor.from_pretrained(tmp_path / "model")


def test_a_device_that_is_not_there_is_refused(built: BuiltModel, tmp_path: Path) -> None:
    save_model(built.model, built.processor, tmp_path / "model")
    with pytest.raises(ModelFolderError, match="on nonsense"):
        Predictor.from_pretrained(tmp_path / "model", device="nonsense")
