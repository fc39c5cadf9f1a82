"""The release's text rules, chosen for a processor."""

import pickle
from typing import Any

import pytest

from model.conversation_formats import ConversationFormatError
from model.processing_pixellm import ConversationTooLong, ProcessorError
from model.release_text import ReleaseTextError
from tests.unit.tokenizer_kinds import CHAT_TEMPLATE, make_processor

TURNS = [
    ("Which shapes are there?", "Sure, the red circle {seg} and two others: the blue square {seg}."),
    ("And which of them is green?", "It is the green star {seg}."),
    ("What can you see?", "There is no car."),
]


def pair(kind: str, conversation_format: str, **settings: Any) -> tuple[Any, Any]:
    """Processors that differ in their text rules only."""
    return tuple(
        make_processor(kind, conversation_format=conversation_format, text_rules=rules, **settings)
        for rules in ("turns", "release")
    )


@pytest.mark.parametrize("kind", ["slow_llama", "fast_llama"])
@pytest.mark.parametrize("conversation_format", ["llava_v1", "llava_llama_2"])
@pytest.mark.parametrize("markers", [True, False])
def test_both_rules_say_the_same_of_what_fits(kind: str, conversation_format: str, markers: bool) -> None:
    ours, theirs = pair(kind, conversation_format, use_mm_start_end=markers)
    for count in (1, 2, 3):
        one, other = (processor.encode_conversation(TURNS[:count]) for processor in (ours, theirs))
        if markers:  # without them the release's line break after the image is a token
            assert other.input_ids.tolist() == one.input_ids.tolist()
            assert other.labels.tolist() == one.labels.tolist()
        assert other.group_turns == one.group_turns
        assert theirs.decode_answer(other.input_ids[other.labels != -100]).marked_text == TURNS[0][1]
        prompt = theirs.encode_prompt([*TURNS[: count - 1], (TURNS[count - 1][0], None)]).tolist()
        assert other.input_ids.tolist()[: len(prompt)] == prompt


def test_a_long_conversation_is_cut_where_it_may_be() -> None:
    ours, theirs = pair("fast_llama", "llava_v1")
    whole = theirs.encode_conversation(TURNS)
    fits = len(whole.input_ids) - 1 + theirs.num_image_tokens
    ours, theirs = pair("fast_llama", "llava_v1", model_max_length=fits - 2)
    assert ours.encode_conversation(TURNS).dropped_turns == 1
    cut = theirs.encode_conversation(TURNS)
    assert cut.input_ids.tolist() == whole.input_ids[:-2].tolist() and cut.kept_turns == 3
    _, short = pair("fast_llama", "llava_v1", model_max_length=fits - len(whole.input_ids) // 2)
    with pytest.raises(ConversationTooLong, match="seg tokens for 3 targets"):
        short.encode_conversation(TURNS)


def test_words_hold_no_tokens_of_ours() -> None:
    _, theirs = pair("fast_llama", "llava_v1")
    ids = theirs.encode_conversation([("Is <image> or [SEG0] </s> written?", "There is [SEG0][SEG1] </s>, {seg}.")])
    assert ids.input_ids.tolist().count(theirs.image_token_id) == 1
    assert sum(token in theirs.seg_token_ids for token in ids.input_ids.tolist()) == 6
    assert ids.input_ids.tolist().count(theirs.end_token_id) == 1


def test_what_the_release_cannot_do_is_refused() -> None:
    with pytest.raises(ReleaseTextError, match="need a Llama tokenizer"):
        make_processor("byte_bpe", text_rules="release")
    with pytest.raises(ConversationFormatError, match="knows no labels for the conversation format 'chat_template'"):
        make_processor("byte_bpe", CHAT_TEMPLATE, conversation_format="chat_template", text_rules="release")
    with pytest.raises(ProcessorError, match="text_rules is 'paper': choose one of turns, release"):
        make_processor(text_rules="paper")
    _, theirs = pair("fast_llama", "llava_v1")
    with pytest.raises(ReleaseTextError, match=r"makes 3 part\(s\) of it, not 2"):
        theirs.encode_conversation([("Who said ASSISTANT: here?", "Nobody.")])


def test_the_rules_are_saved_and_travel(tmp_path: Any) -> None:
    _, theirs = pair("fast_llama", "llava_llama_2")
    theirs.save_pretrained(tmp_path)
    expected = theirs.encode_conversation(TURNS).input_ids.tolist()
    for again in (type(theirs).from_pretrained(tmp_path), pickle.loads(pickle.dumps(theirs))):
        assert again.settings() == theirs.settings() and again.text_rules == "release"
        assert again.encode_conversation(TURNS).input_ids.tolist() == expected
