"""Conversations in, labels out, answers back; what is refused; and a saved processor in a process elsewhere."""

import json
import subprocess
import sys

import pytest
import torch

from model.answer_text import phrases_before_groups
from model.processing_pixellm import (
    ConversationError,
    ConversationTooLong,
    ProcessorError,
    PromptError,
)
from tests.unit.tokenizer_kinds import make_processor

ONE = ("Which shapes are there?", "It is the red circle {seg}.")
TWO = ("And which of them is green?", "the green star {seg} and the big triangle {seg}")
THREE = ("What can you see?", "There is no car.")


def test_numbers_that_follow_from_the_settings():
    processor = make_processor(image_size=448, num_scales=3, tokens_per_scale=2)
    assert processor.num_image_tokens == 256  # (448 / 14 / 2)^2 = 16^2
    assert len(processor.seg_token_ids) == 6  # 3 * 2
    assert make_processor(image_size=112).num_image_tokens == 16  # (112 / 14 / 2)^2 = 4^2
    settings = processor.settings()
    assert settings["image_mean"] == pytest.approx([122.7709, 116.7460, 104.0937], abs=1e-4)  # 255 * CLIP's
    assert settings["image_std"] == pytest.approx([68.5005, 66.6322, 70.3232], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_size": 120}, r"image_size is 120: give a multiple of .* 14 \* 2 = 28"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"model_max_length": 1.5}, "model_max_length is 1.5"),
        ({"image_mean": (1.0, 2.0)}, "three numbers each"),
        ({"image_std": (1.0, 0.0, 1.0)}, "no deviation of 0"),
    ],
)
def test_impossible_settings(settings, sentence):
    with pytest.raises(ProcessorError, match=sentence):
        make_processor(**settings)


def test_labels_cover_answers_and_end_tokens_only():
    processor = make_processor()
    encoded = processor.encode_conversation([ONE, THREE])
    learned = encoded.labels != -100
    assert torch.equal(encoded.labels[learned], encoded.input_ids[learned])
    text = processor.tokenizer.decode(encoded.input_ids[learned])
    group = "".join(f"[SEG{index}]" for index in range(6))
    assert text == f" It is the red circle{group}.<|im_end|> There is no car.<|im_end|>"
    rest = processor.tokenizer.decode(encoded.input_ids[~learned])
    assert rest.endswith(
        "USER:<im_start><image><im_end>Which shapes are there? ASSISTANT:USER: What can you see? ASSISTANT:"
    )


def test_whole_turns_are_dropped_from_the_end():
    processor = make_processor(model_max_length=10_000)
    turns = [ONE, TWO, THREE]
    lengths = [len(processor.encode_conversation(turns[: n + 1]).input_ids) for n in range(3)]
    assert lengths[0] < lengths[1] < lengths[2]
    # The image takes 16 positions, its placeholder's own included: T - 1 + 16.
    fits_two = lengths[1] - 1 + 16
    for limit, kept, group_turns in [
        (lengths[2] + 15, 3, [0, 1, 1]),
        (lengths[2] + 14, 2, [0, 1, 1]),
        (fits_two, 2, [0, 1, 1]),
        (fits_two - 1, 1, [0]),
        (lengths[0] + 15, 1, [0]),
    ]:
        encoded = make_processor(model_max_length=limit).encode_conversation(turns)
        assert (encoded.kept_turns, encoded.dropped_turns) == (kept, 3 - kept)
        assert encoded.group_turns == group_turns
        assert len(encoded.input_ids) == len(encoded.labels) == lengths[kept - 1]
    short = make_processor(model_max_length=lengths[0] + 14)
    with pytest.raises(
        ConversationTooLong, match=f"takes {lengths[0] + 15} positions, 16 of them .* is {lengths[0] + 14}"
    ):
        short.encode_conversation(turns)
    with pytest.raises(ConversationTooLong):
        make_processor(model_max_length=20).encode_prompt([(ONE[0], None)])


def test_a_conversation_in_words_alone_has_no_image():
    processor = make_processor(model_max_length=10_000)
    vocabulary = processor.tokenizer.get_vocab()
    shown, alone = (processor.encode_conversation([ONE, TWO], with_image=given) for given in (True, False))
    marks = [vocabulary[name] for name in ("<im_start>", "<image>", "<im_end>")]
    assert not set(marks) & set(alone.input_ids.tolist())
    words = [
        "".join(processor.tokenizer.decode([token for token in encoded.input_ids if token not in marks]).split())
        for encoded in (shown, alone)
    ]
    assert words[0] == words[1]
    assert (alone.labels != -100).sum() == (shown.labels != -100).sum()
    length = len(alone.input_ids)
    assert make_processor(model_max_length=length).encode_conversation([ONE, TWO], with_image=False).kept_turns == 2
    assert make_processor(model_max_length=length - 1).encode_conversation([ONE, TWO], with_image=False).kept_turns == 1
    with pytest.raises(ConversationTooLong, match="0 of them for the image"):
        make_processor(model_max_length=8).encode_conversation([ONE], with_image=False)


@pytest.mark.parametrize(
    "turns",
    [[], [("", "yes")], [("what?", " ")], [("where is {seg}?", "here")], [("what?", None)], [ONE, ("  ", "yes")]],
)
def test_malformed_conversations(turns):
    with pytest.raises(ConversationError):
        make_processor().encode_conversation(turns)


@pytest.mark.parametrize(
    "turns", [[], [ONE], [("", None)], [("what?", None), ("and?", None)], [("where is {seg}?", None)]]
)
def test_malformed_prompts(turns):
    with pytest.raises(ConversationError):
        make_processor().encode_prompt(turns)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "the {seg}",
        "[SEG0]",
        "a [SEG5] b",
        "<image>",
        "x<im_start>",
        "<im_end>",
        "bye<|im_end|>",
        "<|endoftext|>",
    ],
)
def test_reserved_words_in_a_prompt(text):
    with pytest.raises(PromptError):
        make_processor().check_user_text(text)


def test_ordinary_prompts_pass():
    processor = make_processor()
    for text in ("Where is the dog?", "seg [SEG6] <img> {x}", "猫はどこ?"):  # six seg tokens: 0 to 5
        processor.check_user_text(text)


def test_broken_groups():
    processor = make_processor()
    seg, end = processor.seg_token_ids, processor.end_token_id
    words = [
        processor.tokenizer.encode(text, add_special_tokens=False)
        for text in (" the red circle", " and the blue square")
    ]
    whole, shuffled = seg, seg[::-1]
    for run, groups, broken in [
        (whole, 1, 0),
        (shuffled, 1, 0),  # only membership counts
        (whole + shuffled, 2, 0),  # 12 = 2 * 6
        (whole[:5], 0, 1),
        (whole + whole[:2], 1, 1),  # 8 = 6 + 2: the first group stands
    ]:
        decoded = processor.decode_answer([*words[0], *run, *words[1], *whole, end, *whole])
        assert decoded.num_groups == groups + 1, run
        assert decoded.num_broken == broken, run
        assert len(decoded.phrases) == decoded.num_groups == decoded.marked_text.count("{seg}")
        assert decoded.text == "the red circle and the blue square"
        assert decoded.phrases[-1].endswith("the blue square")
    assert processor.decode_answer(torch.tensor([end])).text == ""
    assert processor.decode_answer([]).phrases == []


@pytest.mark.parametrize(
    ("marked", "phrases"),
    [
        (
            "Sure, the red circle {seg} and two others: the blue square {seg}, the green star {seg}.",
            ["the red circle", "the blue square", "the green star"],
        ),
        ("It is the red circle {seg}.", ["the red circle"]),
        ("Here are the cat {seg} and also the dog {seg}", ["the cat", "the dog"]),
        ("There it is: the cat {seg}", ["the cat"]),
        ("They're the two cups {seg}{seg}", ["the two cups", ""]),
        ("The plate is {seg} and the spoon is {seg}.", ["The plate", "the spoon"]),
        ("Sure, {seg}.", [""]),
        ("It is {seg}.", [""]),
        ("A dog and the red circle {seg}", ["A dog and the red circle"]),
        ("the circle 3.5 cm wide {seg}; (the 10:30 train {seg})", ["the circle 3.5 cm wide", "the 10:30 train"]),
        ("The circles, {seg}, {seg} and {seg}", ["The circles", "", ""]),
        ("No groups here.", []),
        ("{seg}", [""]),
    ],
)
def test_phrases(marked, phrases):
    assert phrases_before_groups(marked) == phrases


def test_words_without_groups_read_well():
    processor = make_processor()
    answer = "Sure, {seg}. And the pair ({seg}), or {seg}!"
    ids = processor.encode_conversation([("what?", answer)])
    decoded = processor.decode_answer(ids.input_ids[ids.labels != -100])
    assert decoded.marked_text == answer
    assert decoded.text == "Sure. And the pair (), or!"


def test_rare_letters_survive_the_slow_tokenizer():
    processor = make_processor("slow_llama")
    answer = "Das ist ein Café: 猫 {seg}, naïve."
    encoded = processor.encode_conversation([("Was?", answer)])
    assert processor.decode_answer(encoded.input_ids[encoded.labels != -100]).marked_text == answer


def test_pieces_of_a_conversation_say_what_is_learned():
    processor = make_processor()
    prompt, answer = processor.conversation_pieces(processor.encode_conversation([THREE]))
    assert prompt[0].endswith("ASSISTANT:") and not prompt[1]
    assert answer == (" There is no car.<|im_end|>", True)


def test_settings_make_the_same_processor_again():
    processor = make_processor(image_std=[1, 2, 3], pad_before_normalize=True, use_mm_start_end=False)
    again = type(processor)(processor.tokenizer, **processor.settings())
    assert again.settings() == processor.settings()
    assert processor.settings()["image_std"] == [1.0, 2.0, 3.0] and "tokenizer" not in processor.settings()


ELSEWHERE = """
import json, sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name == "model" or name.startswith("model.") for name in sys.modules)
turns = json.loads(sys.argv[2])
encoded = processor.encode_conversation(turns)
answer = processor.decode_answer(encoded.input_ids[encoded.labels != -100])
pixels = processor.encode_image(processor.open_image(sys.argv[3])).pixel_values
processor.save_pretrained(sys.argv[4])
print(json.dumps([processor.settings(), encoded.input_ids.tolist(), answer.marked_text, float(pixels.double().sum())]))
"""


def test_saved_processor_works_elsewhere(tmp_path, elsewhere_env):
    """No config.json beside it, no repository on the path; and what is saved there loads again."""
    from PIL import Image

    processor = make_processor("slow_llama", model_max_length=300, conversation_format="llava_llama_2")
    image = tmp_path / "image.png"
    Image.linear_gradient("L").save(image)
    folder, again = tmp_path / "saved", tmp_path / "again"
    processor.save_pretrained(folder)
    command = [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps([ONE]), str(image), str(again)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=elsewhere_env, check=False)
    assert done.returncode == 0, done.stderr
    settings, ids, marked, total = json.loads(done.stdout.splitlines()[-1])
    assert settings == processor.settings()
    assert ids == processor.encode_conversation([ONE]).input_ids.tolist()
    assert marked == ONE[1]
    assert total == float(processor.encode_image(processor.open_image(image)).pixel_values.double().sum())
    assert type(processor).from_pretrained(again).settings() == settings


@pytest.mark.parametrize("kind", ["fast_llama", "byte_bpe", "unigram", "words"])
def test_saved_tokenizers_come_back_the_same(kind, tmp_path):
    processor = make_processor(kind)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert again.settings() == processor.settings()
    turns = [ONE, TWO, THREE]
    assert (
        again.encode_conversation(turns).input_ids.tolist() == processor.encode_conversation(turns).input_ids.tolist()
    )
