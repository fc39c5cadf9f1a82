"""Golden group `collate`: conversations to text, ids, labels and batches.

Every text goes the release's way (`text_rules` "release"); where the image comes first and nothing is cut, our own
way must give the same.
"""

import functools
import inspect
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.conversation_formats import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    ConversationFormatError,
    build_format,
)
from model.processing_pixellm import (
    RELEASE_RULES,
    TURNS_RULES,
    ConversationTooLong,
    EncodedConversation,
    PixelLMProcessor,
    seg_token_names,
)
from model.release_text import (
    LegacyTokenizer,
    ReleaseSequences,
    ReleaseTextError,
    answer_separator,
    encode_sequences,
    wrap_image_tokens,
)
from model.structures import CONVERSATION_FORMATS, IGNORE_TOKEN, LLAVA_V1, SEG_MARKER
from tests.golden import vectors
from utils.checkpoints.folders import load_tokenizer
from utils.checkpoints.layouts.published_names import RELEASE_IMAGE_TOKEN_POOL
from utils.data.collate import Batch, Example, collate
from utils.data.text import remove_image_marker

GROUP = "collate"
PROMPTS = vectors.case_names(GROUP, "prompts")
BATCHES = vectors.case_names(GROUP, "collate")
TEMPLATES = vectors.case_names(GROUP, "templates")
COMMON = (
    "tokenizer",
    "plain_tokenisation",
    "rounds",
    "decode",
    "templates_messages",
    "vqa_image_placeholder_normalisation",
)
INTENDED = "llama2_intended_"  # recorded with the separator that the release means (fact C1)
TEXT_LIMIT_OFF = 10**6


def test_every_entry_belongs_to_a_case() -> None:
    paths = [*((name,) for name in COMMON), *(("prompts", case) for case in PROMPTS)]
    paths += [("collate", case) for case in BATCHES] + [("templates", case) for case in TEMPLATES]
    vectors.assert_all_in_cases(GROUP, [*PROMPTS, *BATCHES, *TEMPLATES], paths)


def facts() -> Any:
    return vectors.read_json(GROUP)


def placeholder() -> int:
    """The release's id for an image: one that is no token."""
    return vectors.read_json("weights")["model_dims"]["image_token_index"]


@functools.cache
def tokens_per_group() -> tuple[int, int]:
    """Scales, and tokens of each, of the recorded seg tokens."""
    dims = vectors.read_json("weights")["model_dims"]
    return dims["image_feature_scale_num"], len(facts()["tokenizer"]["seg_token_ids"]) // dims[
        "image_feature_scale_num"
    ]


@functools.cache
def positions_of_image() -> tuple[int, int, int]:
    """Side of the square, side of a patch, patches per side of an image token."""
    weights = vectors.read_json("weights")
    side, patch = weights["model_dims"]["resize_vision_tower_size"], weights["clip_dims"]["patch_size"]
    return side, patch, RELEASE_IMAGE_TOKEN_POOL


@functools.cache
def processor(
    conversation_format: str, text_rules: str = TURNS_RULES, model_max_length: int = TEXT_LIMIT_OFF
) -> PixelLMProcessor:
    """Our processor over the recorded tokenizer, loaded as a base's is."""
    with tempfile.TemporaryDirectory() as folder:
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(vectors.path_of(file), Path(folder) / file)
        tokenizer = load_tokenizer(Path(folder))
    scales, tokens = tokens_per_group()
    side, patch, pool = positions_of_image()
    return PixelLMProcessor(
        PixelLMProcessor.prepare_tokenizer(tokenizer, scales, tokens),
        image_size=side,
        patch_size=patch,
        image_token_pool=pool,
        num_scales=scales,
        tokens_per_scale=tokens,
        conversation_format=conversation_format,
        model_max_length=model_max_length,
        text_rules=text_rules,
    )


def legacy(conversation_format: str) -> LegacyTokenizer:
    return LegacyTokenizer(processor(conversation_format).tokenizer, facts()["tokenizer"]["added_in_order"])


def turns_of(rounds: list[list[str]]) -> list[tuple[str, str]] | None:
    """Recorded rounds as our turns; None where a question does not begin with the image, as ours all do."""
    (first, _), *_ = rounds
    if not first.startswith(IMAGE_TOKEN):
        return None
    names = " ".join(f"[SEG{number}]" for number in range(len(facts()["tokenizer"]["seg_token_ids"])))
    return [(question.removeprefix(IMAGE_TOKEN), said.replace(names, SEG_MARKER)) for question, said in rounds]


def our_ids(conversation_format: str, rounds: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Ids (with the release's placeholder) and labels by our own rules; a prompt without an answer has no labels."""
    turns = turns_of(rounds)
    if turns is None:
        return None
    ours = processor(conversation_format)
    *_, (question, said) = turns
    if said:
        encoded = ours.encode_conversation(turns)
        ids, labels = encoded.input_ids, encoded.labels
    else:
        ids, labels = ours.encode_prompt([*turns[:-1], (question, None)]), None
    return torch.where(ids == ours.image_token_id, placeholder(), ids), labels


def rounds_called(sample: str | list[list[str]]) -> list[list[str]]:
    """A sample of a batch is the name of recorded rounds, or the rounds themselves."""
    return facts()["rounds"][sample] if isinstance(sample, str) else sample


def test_tokenizer() -> None:
    ours = processor(LLAVA_V1)
    tokenizer = ours.tokenizer
    with vectors.Reading(GROUP, facts()["tokenizer"], {}, "tokenizer") as golden:
        recorded = golden.facts
        added = recorded["added_in_order"]
        first = recorded["base_vocab_size"]
        golden.same("added", tokenizer.convert_tokens_to_ids(added), list(range(first, first + len(added))))
        golden.same("seg ids", [[token] for token in ours.seg_token_ids], recorded["seg_token_ids"])
        ends = tokenizer.convert_tokens_to_ids([IMAGE_START_TOKEN, IMAGE_END_TOKEN])
        golden.same("image's ends", ends, recorded["im_start_end_ids"])
        golden.same("padding", tokenizer.convert_tokens_to_ids(recorded["pad_token"]), recorded["pad_token_id"])
        default = inspect.signature(PixelLMProcessor).parameters["model_max_length"].default
        golden.same("model_max_length", default, recorded["model_max_length_default"])
        golden.same("rows are padded on the", "right", recorded["padding_side"])


def test_plain_tokenisation() -> None:
    probes = facts()["plain_tokenisation"]
    assert probes
    for text, ids in probes.items():
        assert legacy(LLAVA_V1).ids(text) == ids, text


def test_reading_back() -> None:
    """A group is read as a group, whatever the blanks around its tokens."""
    ours = processor(LLAVA_V1)
    with vectors.Reading(GROUP, facts()["decode"], {}, "decode") as golden:
        text = golden.facts["skip_special_false"]
        names = r"\s*".join(re.escape(name) for name in seg_token_names(ours.num_scales, ours.tokens_per_scale))
        words = re.sub(names, SEG_MARKER, text.removeprefix(ours.tokenizer.bos_token))
        words = words.removesuffix(ours.tokenizer.eos_token)
        answer = ours.decode_answer(legacy(LLAVA_V1).ids(text)[1:])
        golden.same("marked text", answer.marked_text, " ".join(words.split()))
        golden.check(SEG_MARKER in words, "the recorded text holds no group")


def test_place_of_the_image() -> None:
    """The release moves a placeholder to the front; our reader takes it out, the processor puts it there."""
    probes = facts()["vqa_image_placeholder_normalisation"]
    assert probes
    for probe in probes:
        assert sorted(probe) == ["in", "out"]
        assert (IMAGE_TOKEN in probe["in"]) == (IMAGE_TOKEN in probe["out"])
        assert remove_image_marker(probe["in"]) == probe["out"].removeprefix(IMAGE_TOKEN).strip(), probe


@pytest.mark.parametrize("case", TEMPLATES)
def test_template(case: str) -> None:
    """Those that a PixelLM can be trained with, word for word. The release carries others that it never trains with;
    they are refused by name.
    """
    with vectors.Reading(GROUP, facts()["templates"][case], {}, case) as golden:
        if case not in CONVERSATION_FORMATS:
            golden.facts.read_all()
            with pytest.raises(ConversationFormatError, match=re.escape(repr(case))):
                build_format(case, processor(LLAVA_V1).tokenizer)
            return
        recorded, tokenizer = golden.facts, processor(case).tokenizer
        scaffold = build_format(case, tokenizer)
        messages = [(question, said) for question, said in facts()["templates_messages"]]
        text = scaffold.write(messages, tokenizer.bos_token, tokenizer.eos_token)
        golden.same("text", text, recorded["prompt"])
        golden.same("end", tokenizer.eos_token, recorded["sep2"])
        asks, answers = recorded["roles"]
        golden.same("as written", answer_separator(case, as_written=True), f"{recorded['sep']}{answers}: ")
        golden.check(recorded["sep_style"] != "TWO" or f"{asks}: " in text, "the roles are not in the text")


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt(case: str) -> None:
    """Text, text with the image's ends, and ids: the release's way, and our own where the image comes first."""
    conversation_format, name = case.split("/")
    tokenizer = processor(conversation_format).tokenizer
    scaffold = build_format(conversation_format, tokenizer)
    with vectors.read_case(GROUP, case, "prompts", case) as golden:
        recorded = golden.facts
        rounds = facts()["rounds"].get(name) or asked_only(recorded["prompt"])
        text = scaffold.write(rounds, tokenizer.bos_token, tokenizer.eos_token)
        golden.same("text", text, recorded["prompt"])
        golden.same("text with ends", wrap_image_tokens(text), recorded["prompt_with_image_markers"])
        ids = legacy(conversation_format).ids_with_image(wrap_image_tokens(text), placeholder())
        golden.same("ids", ids, recorded["input_ids"])
        ours = our_ids(conversation_format, rounds)
        if ours is not None:
            golden.same("our own ids", ours[0].tolist(), recorded["input_ids"])


def asked_only(prompt: str) -> list[list[str]]:
    """The rounds of a prompt that waits for its answer; one question is all it holds."""
    (question,) = {rounds[0][0] for rounds in facts()["rounds"].values() if len(rounds) == 1 and rounds[0][0] in prompt}
    return [[question, ""]]


@pytest.mark.parametrize("case", BATCHES)
def test_batch(case: str) -> None:
    with vectors.read_case(GROUP, case, "collate", case) as golden:
        recorded = golden.facts
        conversation_format, samples = recorded["template"], recorded["samples"]
        ours = processor(conversation_format)
        scaffold, tokenizer = build_format(conversation_format, ours.tokenizer), ours.tokenizer
        rounds = [[rounds_called(sample) for sample in conversations] for conversations in samples]
        texts = [[scaffold.write(r, tokenizer.bos_token, tokenizer.eos_token) for r in rows] for rows in rounds]
        golden.same("texts", texts, recorded["conversations"])
        marked = [wrap_image_tokens(text) for rows in texts for text in rows]
        longest = recorded["model_max_length"]
        limit = None if recorded["inference"] else longest - ours.num_image_tokens + 1

        def encode() -> ReleaseSequences:
            return encode_sequences(
                marked,
                legacy(conversation_format),
                answer_separator(conversation_format, as_written=not case.startswith(INTENDED)),
                end=tokenizer.eos_token,
                image_id=placeholder(),
                padding_id=facts()["tokenizer"]["pad_token_id"],
                longest=limit,
            )

        if "upstream_error" in recorded:
            golden.check(recorded["upstream_error"].startswith("AssertionError"), recorded["upstream_error"])
            with pytest.raises(ReleaseTextError, match=r"makes 1 part\(s\) of it, not 2"):
                encode()
            return
        golden.same("marked texts", marked, recorded["conversation_list"])
        rows = encode()
        golden.same("shape", list(rows.input_ids.shape), recorded["shape"])
        golden.close("input_ids", rows.input_ids)
        golden.close("labels", rows.labels)
        golden.close("attention_masks", rows.attention_mask)
        batch = our_batch(conversation_format, rounds, rows)
        golden.close("offset", torch.tensor([0, *torch.bincount(batch.image_index).cumsum(0).tolist()]))
        kept = all(torch.can_cast(masks.dtype, getattr(torch, recorded["masks_dtype"][6:])) for masks in batch.masks)
        golden.check(kept, f"our masks do not fit into {recorded['masks_dtype']}")
        if all(turns_of(r) for conversations in rounds for r in conversations):
            compare_ours(golden, batch, [said for rows in rounds for *_, (_, said) in rows], rows, limit)
            if limit is not None:
                compare_chosen(golden, processor(conversation_format, RELEASE_RULES, longest), rounds, rows)


def our_batch(conversation_format: str, rounds: list[list[list[list[str]]]], rows: ReleaseSequences) -> Batch:
    """Our batch of the same conversations, uncut; one that does not begin with its image as the release writes it."""
    release, examples = iter(zip(rows.input_ids, rows.labels, strict=True)), []
    for conversations in rounds:
        encoded = []
        for one, written in zip(conversations, release, strict=False):
            ids, labels = our_ids(conversation_format, one) or written
            hidden = torch.full_like(ids, IGNORE_TOKEN)
            encoded.append(EncodedConversation(ids, hidden if labels is None else labels, [], len(one), 0))
        examples.append(
            Example(torch.zeros(3, 1, 1), (1, 1), (1, 1), encoded, torch.zeros(0, 1, 1, dtype=torch.uint8), {})
        )
    return collate(examples, facts()["tokenizer"]["pad_token_id"])


def compare_ours(
    golden: vectors.Reading, batch: Batch, last_answers: list[str], rows: ReleaseSequences, limit: int | None
) -> None:
    """Ids and mask are the same; labels too, down to the first row that waits for its answer: from there on the release
    learns everything (fact C2), and ours still learns answers only.
    """
    golden.compare("our ids", batch.input_ids[:, :limit], rows.input_ids)
    golden.compare("our mask", batch.attention_mask[:, :limit], rows.attention_mask)
    answered = last_answers.index("") if "" in last_answers else len(last_answers)
    labels = batch.labels[:, :limit]
    golden.compare("our labels", labels[:answered], rows.labels[:answered])
    for number in range(answered, len(last_answers)):
        golden.compare(f"labels of row {number}", rows.labels[number], rows.input_ids[number])
        learns = bool((labels[number] != IGNORE_TOKEN).any())
        golden.same(f"row {number} teaches", learns, bool(last_answers[number]))


def compare_chosen(
    golden: vectors.Reading, chosen: PixelLMProcessor, rounds: list[list[list[list[str]]]], rows: ReleaseSequences
) -> None:
    """A processor whose `text_rules` is the release's makes each of these rows, up to its padding; one that lost groups
    it refuses, as the release's own training then fails.
    """
    group = len(chosen.seg_token_ids)
    for number, one in enumerate(r for conversations in rounds for r in conversations):
        turns = turns_of(one) or []
        named = sum(said.count(SEG_MARKER) for _, said in turns)
        if torch.isin(rows.input_ids[number], torch.tensor(chosen.seg_token_ids)).sum() != named * group:
            with pytest.raises(ConversationTooLong, match=rf"keeps \d+ seg tokens for {named} targets"):
                chosen.encode_conversation(turns)
            continue
        if not turns[-1][1]:
            ids = chosen.encode_prompt([*turns[:-1], (turns[-1][0], None)])
        else:
            encoded = chosen.encode_conversation(turns)
            ids = encoded.input_ids
            if all(said for *_, (_, said) in rounds[0]):  # else the release learns everything
                golden.compare(f"chosen labels of row {number}", encoded.labels, rows.labels[number, : len(ids)])
        ids = torch.where(ids == chosen.image_token_id, placeholder(), ids)
        golden.compare(f"chosen ids of row {number}", ids, rows.input_ids[number, : len(ids)])
        padding = rows.attention_mask[number, len(ids) :]
        golden.check(not bool(padding.any()), f"row {number} goes on after {len(ids)} tokens")
