"""A seg group is S * K adjacent ids, and reads back, under every kind of tokenizer."""

import json
import pickle

import pytest

from model.processing_pixellm import (
    ConversationFormatError,
    PixelLMProcessor,
    ProcessorError,
    TextEncoder,
    check_groups,
)
from tests.unit.tokenizer_kinds import CHAT_TEMPLATE, FIXTURES, KINDS, make_processor, make_tokenizer

RECORDED = json.loads((FIXTURES / "recorded_ids.json").read_text(encoding="utf-8"))
RELEASE_PLACEHOLDER = -200

TURNS = [
    (
        "Which shapes are there?",
        "Sure, the red circle {seg} and two others: the blue square {seg}, the green star {seg}.",
    ),
    ("And which of them is green?", "It is the green star {seg}."),
    ("What can you see?", "There is no car."),
]


PIECES = (
    "",
    " ",
    "x",
    "the red circle",
    " the red  circle ",
    "\n",
    "[SEG0] and <image>",
    "</s><s>",
    "Zoë’s café 日本 🙂",
    "a" * 300,
)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_get_the_ids_that_the_tokenizer_gives(kind):
    tokenizer = make_processor(kind).tokenizer
    encoder = TextEncoder(tokenizer)
    for _ in range(2):
        for text in PIECES:
            plain = {"add_special_tokens": False, "verbose": False}
            assert encoder.encode_words(text) == tokenizer.encode(text, split_special_tokens=True, **plain), text
            assert encoder.encode_scaffold(text) == tokenizer.encode(text, split_special_tokens=False, **plain), text
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer(["one", "two and more"], truncation=True, max_length=2, padding="max_length")  # leaves its marks
        encoder.encode_scaffold("x").append(0)  # what is remembered must not be changed by who got it
    revived = pickle.loads(pickle.dumps(encoder))
    assert revived.encode_words("the red circle") == encoder.encode_words("the red circle")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conversation_format", ["llava_v1", "llava_llama_2"])
def test_groups_are_adjacent_and_read_back(kind, conversation_format):
    processor = make_processor(kind, conversation_format=conversation_format)
    check_groups(processor)
    encoded = processor.encode_conversation(TURNS)
    ids, group = encoded.input_ids.tolist(), processor.seg_token_ids
    starts = [at for at, token in enumerate(ids) if token == group[0]]
    assert [ids[at : at + 6] for at in starts] == [group] * 4  # 3 + 1 + 0 targets, 2 scales x 3 tokens each
    assert sum(token in group for token in ids) == 4 * 6
    assert encoded.group_turns == [0, 0, 0, 1]
    assert ids.count(processor.image_token_id) == 1
    # Three answers, each closed by the end token, and all of it labelled.
    labelled = encoded.labels[encoded.labels != -100].tolist()
    assert labelled.count(processor.end_token_id) == 3 and labelled[-1] == processor.end_token_id
    answers = _split(labelled, processor.end_token_id)
    assert [processor.decode_answer(answer).marked_text for answer in answers] == [answer for _, answer in TURNS]
    assert processor.decode_answer(answers[0]).phrases == ["the red circle", "the blue square", "the green star"]
    assert processor.decode_answer(answers[1]).phrases == ["the green star"]
    assert processor.decode_answer(answers[2]).phrases == []


def _split(ids: list[int], end: int) -> list[list[int]]:
    answers: list[list[int]] = [[]]
    for token in ids:
        answers[-1].append(token)
        if token == end:
            answers.append([])
    return answers[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_what_training_began_with(kind):
    processor = make_processor(kind)
    ids = processor.encode_conversation(TURNS).input_ids.tolist()
    for last in range(3):
        prompt = processor.encode_prompt([*TURNS[:last], (TURNS[last][0], None)]).tolist()
        assert ids[: len(prompt)] == prompt
        # The very next id is learned: the prompt stops where the answer begins.
        assert processor.encode_conversation(TURNS).labels[len(prompt)] != -100
        assert processor.encode_conversation(TURNS).labels[len(prompt) - 1] == -100


@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_reserved_tokens(kind):
    processor = make_processor(kind)
    end = processor.tokenizer.eos_token
    turns = [
        (f"Is <image> or [SEG0] {end} written?", f"There is [SEG0][SEG1] and {end} written, <im_start> too {{seg}}.")
    ]
    ids = processor.encode_conversation(turns).input_ids.tolist()
    assert ids.count(processor.image_token_id) == 1
    assert sum(token in processor.seg_token_ids for token in ids) == 6
    assert ids.count(processor.end_token_id) == 1


@pytest.mark.parametrize("kind", ["slow_llama", "fast_llama"])
@pytest.mark.parametrize("key", sorted(RECORDED["input_ids"]))
def test_release_ids(kind, key):
    """The ids the release made of the same conversations, its placeholder apart."""
    conversation_format, name = key.split("/")
    processor = make_processor(kind, conversation_format=conversation_format)
    if name == "generation_empty_answer":
        question = RECORDED["rounds"]["single_target"][0][0]
        ids = processor.encode_prompt([(question, None)]).tolist()
    else:
        ids = processor.encode_conversation([tuple(turn) for turn in RECORDED["rounds"][name]]).input_ids.tolist()
    expected = RECORDED["input_ids"][key]
    assert [RELEASE_PLACEHOLDER if token == processor.image_token_id else token for token in ids] == expected


def test_chat_template_is_the_models_own():
    processor = make_processor("byte_bpe", CHAT_TEMPLATE, conversation_format="chat_template", use_mm_start_end=False)
    check_groups(processor)
    tokenizer, turns = processor.tokenizer, TURNS[1:]
    ids = processor.encode_conversation(turns).input_ids.tolist()
    group = processor.seg_token_ids
    at = ids.index(group[0])
    # Without image and group the ids are the template's own, less the line break after the last end token; the group
    # stands for "_", which is one byte and so one token.
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer.replace(" {seg}", "_")}]
    (underscore,) = tokenizer.encode("_", add_special_tokens=False)
    plain = [token for token in [*ids[:at], underscore, *ids[at + 6 :]] if token != processor.image_token_id]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert tokenizer.decode(plain) == whole
    assert plain == tokenizer.encode(whole, add_special_tokens=False)
    prompt = processor.encode_prompt([(turns[0][0], None)])
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_chat_template_that_does_not_end_with_the_end_token():
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    processor = make_processor("byte_bpe", template, conversation_format="chat_template")
    check_groups(processor)
    text = processor.tokenizer.decode(processor.encode_conversation(TURNS[1:]).input_ids)
    assert text.count("<|im_end|>") == 2 and text.endswith("<|im_end|>")
    assert "[SEG5].<|im_end|>\n[user] What" in text


def test_missing_and_useless_chat_templates():
    with pytest.raises(ConversationFormatError, match="no chat template"):
        make_processor("byte_bpe", conversation_format="chat_template")
    with pytest.raises(ConversationFormatError, match="0 times instead of once"):
        make_processor("byte_bpe", "hello", conversation_format="chat_template")
    with pytest.raises(ConversationFormatError, match="cannot show a question"):
        make_processor("byte_bpe", "{{ raise_exception('no') }}", conversation_format="chat_template")
    with pytest.raises(ConversationFormatError, match="'chatml' is not known: choose one of llava_v1"):
        make_processor("byte_bpe", conversation_format="chatml")


def test_preparing_adds_each_token_once_in_order():
    tokenizer = make_tokenizer("byte_bpe")
    before = len(tokenizer)
    PixelLMProcessor.prepare_tokenizer(tokenizer, 2, 3)
    names = ["[SEG0]", "[SEG1]", "[SEG2]", "[SEG3]", "[SEG4]", "[SEG5]", "<im_start>", "<im_end>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(before, before + 9))  # 2 x 3 seg tokens and three more
    PixelLMProcessor.prepare_tokenizer(tokenizer, 2, 3)
    assert len(tokenizer) == before + 9
    # A larger codebook later keeps the old ids and appends what is new.
    PixelLMProcessor.prepare_tokenizer(tokenizer, 2, 4)
    processor = PixelLMProcessor(tokenizer, tokens_per_scale=4)
    assert processor.seg_token_ids == [*range(before, before + 6), before + 9, before + 10]
    check_groups(processor)


def test_unfit_tokenizers_are_refused():
    with pytest.raises(ProcessorError, match=r"lacks the token\(s\) \[SEG0\].*prepare_tokenizer"):
        PixelLMProcessor(make_tokenizer("words"))
    endless = make_tokenizer("words")
    endless.eos_token = None
    with pytest.raises(ProcessorError, match="no end token"):
        PixelLMProcessor(PixelLMProcessor.prepare_tokenizer(endless, 2, 3))


def test_check_groups_names_what_breaks():
    processor = make_processor("byte_bpe")
    processor._seg_token_ids = [processor.end_token_id, *processor.seg_token_ids[1:]]
    with pytest.raises(ProcessorError, match="share an id"):
        check_groups(processor)
    processor = make_processor("byte_bpe")
    # A group that shares a token with plain words: two answers hold " red", which is then a piece of a group.
    (red,) = processor.tokenizer.encode(" red", add_special_tokens=False)
    processor._seg_token_ids = [red, *processor.seg_token_ids[1:]]
    with pytest.raises(ProcessorError, match="4 groups came out as 4 whole and 1 broken"):
        check_groups(processor)


@pytest.mark.parametrize("kind", ["slow_llama", "byte_bpe"])
def test_processor_goes_to_loader_workers(kind):
    processor = make_processor(kind)
    copy = pickle.loads(pickle.dumps(processor))
    assert copy.encode_conversation(TURNS).input_ids.tolist() == processor.encode_conversation(TURNS).input_ids.tolist()
