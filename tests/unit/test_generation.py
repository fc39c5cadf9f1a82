"""Decoding: a batch says what its prompts say alone, and draws what is drawn when the answer is given."""

from typing import Any

import pytest
import torch

from model.generation import GeneratedAnswer
from model.seg_codebook import group_positions, release_groups
from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_pixellm import make_model, noise, saying
from utils.checkpoints.builder import BuiltModel, build_model

SIZES = [(20, 40), (32, 32), (50, 10)]
# Prompts of different lengths about images with different padding, two about the same one.
QUESTIONS = ["the red circle", "which shapes are there, and which of them is to the left?", "blue?", "the green star"]
INDEX = torch.tensor([0, 1, 1, 2])
# A window of attention shorter than the prompts makes a cache forget; GPT-2 learns its positions, others turn by them.
KINDS = [
    ("llama", {}),
    ("mistral", {"sliding_window": 12}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
]


@pytest.fixture(scope="module", params=KINDS, ids=[kind for kind, _ in KINDS])
def any_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """A PixelLM over one kind of language model, with logits far enough apart to choose the same words twice."""
    kind, changes = request.param
    place = tmp_path_factory.mktemp(kind)
    base = write_language_model(place / "base", kind, **changes)
    return build_model(str(base), str(write_tower(place / "tower", "siglip")), options())


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    """Tests leave it as it is."""
    return make_model()


def prompts(built: BuiltModel, questions: list[str] = QUESTIONS) -> list[torch.Tensor]:
    return [built.processor.encode_prompt([(question, None)]) for question in questions]


def generate(
    built: BuiltModel, rows: list[torch.Tensor], index: torch.Tensor, max_new_tokens: int = 40
) -> list[GeneratedAnswer]:
    images = [built.processor.encode_image(noise(*size, seed=number)) for number, size in enumerate(SIZES)]
    return built.model.generate_answers(
        pixel_values={"vision_tower": torch.stack([image.pixel_values for image in images])},
        resized_sizes=torch.tensor([image.resized_size for image in images]),
        prompts=rows,
        image_index=index,
        end_token_id=built.processor.end_token_id,
        max_new_tokens=max_new_tokens,
    )


def without_image(built: BuiltModel, prompt: torch.Tensor) -> torch.Tensor:
    return prompt[prompt != built.processor.image_token_id]


def test_a_batch_says_what_its_prompts_say_alone(any_kind: BuiltModel) -> None:
    rows = prompts(any_kind)
    rows.insert(2, without_image(any_kind, rows[1]))
    index = torch.tensor([0, 1, 1, 1, 2])
    together = generate(any_kind, rows, index)
    said = set()
    for number, row in enumerate(rows):
        (alone,) = generate(any_kind, [row], index[number : number + 1])
        assert together[number].ids.tolist() == alone.ids.tolist()
        assert together[number].finished == alone.finished == (any_kind.processor.end_token_id in alone.ids)
        said.add(tuple(alone.ids.tolist()))
    assert len(said) > 1, "what is said depends on what is asked"


@pytest.mark.parametrize(
    "answers",
    [
        ["Sure, the red circle {seg}.", "A {seg} and b {seg}, c {seg}.", "There is none.", "{seg}"],
        ["It is there {seg}{seg}.", "No.", "No, there is none of them at all.", "the big triangle {seg} of all"],
    ],
)
def test_masks_are_those_of_the_same_answer_given(answers: list[str], any_kind: BuiltModel) -> None:
    """Free-running with a cache and left padding, against one pass over right-padded rows."""
    with saying(any_kind, answers):
        free = ask_all(any_kind)
    forced = given(any_kind, answers)
    assert [len(answer.low_res_mask_logits) for answer in free] == [answer.count("{seg}") for answer in answers]
    for answer, expected, text in zip(free, forced, answers, strict=True):
        assert answer.finished and answer.num_broken == 0
        assert any_kind.processor.decode_answer(answer.ids).marked_text.replace(" ", "") == text.replace(" ", "")
        if len(expected):
            scale = max(1.0, expected.abs().max().item())
            assert torch.allclose(answer.low_res_mask_logits, expected, atol=1e-4 * scale)


def ask_all(built: BuiltModel) -> list[GeneratedAnswer]:
    return generate(built, prompts(built), INDEX)


def given(built: BuiltModel, answers: list[str]) -> list[torch.Tensor]:
    """Masks over the square for each answer, teacher-forced."""
    encoded = [built.processor.encode_conversation([turn]).input_ids for turn in zip(QUESTIONS, answers, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    images = [built.processor.encode_image(noise(*size, seed=number)) for number, size in enumerate(SIZES)]
    with torch.no_grad():
        output = built.model.eval()(
            input_ids=pad(encoded, batch_first=True),
            attention_mask=pad([torch.ones_like(row) for row in encoded], batch_first=True).bool(),
            pixel_values={"vision_tower": torch.stack([image.pixel_values for image in images])},
            resized_sizes=torch.tensor([image.resized_size for image in images]),
            original_sizes=torch.tensor([image.original_size for image in images]),
            image_index=INDEX,
        )
    masks = torch.cat(list(output.low_res_mask_logits))
    return list(masks.split([answer.count("{seg}") for answer in answers]))


def test_a_group_cut_off_is_broken_and_whole_ones_are_kept(built: BuiltModel) -> None:
    answer = "a {seg} b {seg}"
    with saying(built, [answer]):
        (whole,) = generate(built, prompts(built)[:1], INDEX[:1])
    ids = whole.ids.tolist()
    assert whole.finished and ids[-1] == built.processor.end_token_id and len(whole.low_res_mask_logits) == 2
    size = len(built.processor.seg_token_ids)
    for lost in range(2, size + 1):
        with saying(built, [answer]):
            (cut,) = generate(built, prompts(built)[:1], INDEX[:1], max_new_tokens=len(ids) - lost)
        assert cut.ids.tolist() == ids[: len(ids) - lost] and not cut.finished
        assert cut.num_broken == 1 and len(cut.low_res_mask_logits) == 1
        assert torch.allclose(cut.low_res_mask_logits[0], whole.low_res_mask_logits[0], atol=1e-5)
    with saying(built, [answer]):
        (cut,) = generate(built, prompts(built)[:1], INDEX[:1], max_new_tokens=len(ids) - size - 1)
    assert cut.num_broken == 0 and len(cut.low_res_mask_logits) == 1


def test_the_first_token_may_be_the_last(built: BuiltModel) -> None:
    (answer,) = generate(built, prompts(built)[:1], INDEX[:1], max_new_tokens=1)
    assert len(answer.ids) == 1 and answer.low_res_mask_logits.shape[0] == 0


def test_each_image_is_seen_once_and_a_batch_stops_when_all_are_done(
    built: BuiltModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    widths: list[tuple[int, int]] = []
    encode = built.model.vision_tower.forward

    def count(pixel_values: torch.Tensor, *others: Any) -> Any:
        seen.append(len(pixel_values))
        return encode(pixel_values, *others)

    monkeypatch.setattr(built.model.vision_tower, "forward", count)

    def watch(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        widths.append(tuple(keywords["inputs_embeds"].shape[:2]))

    handle = built.model.language_model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with saying(built, ["{seg}", "b", "c {seg} d", "e"]):
            answers = ask_all(built)
    finally:
        handle.remove()
    assert seen == [len(SIZES)]
    # First the three prefixes, then the four prompts.
    assert [rows for rows, _ in widths[:2]] == [3, 4]
    # A pass feeds each row one token, or a group of six; a row that has its end token is not there any more.
    passes = [len(answer.ids) - 1 - 5 * len(answer.low_res_mask_logits) for answer in answers]
    assert [rows for rows, _ in widths[2:]] == [sum(n > step for n in passes) for step in range(max(passes))]


def test_nothing_to_do_and_nothing_allowed(built: BuiltModel) -> None:
    assert generate(built, [], INDEX[:0]) == []
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, found 0"):
        generate(built, prompts(built)[:1], INDEX[:1], max_new_tokens=0)


def test_groups_by_the_releases_rule(built: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's groups count, and come first; a broken one costs every mask of its answer, and of no other."""
    turns = [("the red circle", "It is {seg}."), ("blue?", None)]
    rows = [built.processor.encode_prompt(turns), *prompts(built)[:1]]
    index = torch.tensor([0, 1])
    answer = "a {seg} b {seg}"
    with saying(built, [answer, "{seg}"]):
        plain = generate(built, rows, index)
    monkeypatch.setattr(built.model.config, "group_rule", "release")
    with saying(built, [answer, "{seg}"]):
        whole = generate(built, rows, index)
    assert [len(one.low_res_mask_logits) for one in plain] == [2, 1]
    assert [len(one.low_res_mask_logits) for one in whole] == [len(one.embeddings) for one in whole] == [3, 1]
    assert torch.allclose(whole[0].low_res_mask_logits[1:], plain[0].low_res_mask_logits, atol=1e-5)
    assert torch.allclose(whole[1].low_res_mask_logits, plain[1].low_res_mask_logits, atol=1e-5)
    given_group = forced_first_group(built, built.processor.encode_conversation([("the red circle", "It is {seg}.")]))
    assert torch.allclose(whole[0].low_res_mask_logits[0], given_group, atol=1e-4)
    with saying(built, [answer, "{seg}"]):
        cut = generate(built, rows, index, max_new_tokens=len(whole[0].ids) - 2)
    assert [(len(one.low_res_mask_logits), one.num_broken) for one in cut] == [(0, 1), (1, 0)]


def forced_first_group(built: BuiltModel, encoded: Any) -> torch.Tensor:
    """(h, w) mask of the only group of a conversation about the first image, its answer given."""
    image = built.processor.encode_image(noise(*SIZES[0], seed=0))
    with torch.no_grad():
        output = built.model.eval()(
            input_ids=encoded.input_ids[None],
            attention_mask=torch.ones_like(encoded.input_ids)[None].bool(),
            pixel_values={"vision_tower": image.pixel_values[None]},
            resized_sizes=torch.tensor([image.resized_size]),
            original_sizes=torch.tensor([image.original_size]),
            image_index=torch.zeros(1, dtype=torch.long),
        )
    return output.low_res_mask_logits[0][0]


def test_any_tokens_in_order_make_a_group_in_the_release() -> None:
    assert release_groups([1, 7, 3, 8, 8, 7], [7, 8]) == ([[1, 3], [4, 5]], 0)
    assert release_groups([1, 7, 3, 8, 8], [7, 8]) == ([], 1)
    assert release_groups([1, 3], [7, 8]) == ([], 0)
    ids = torch.tensor([[1, 7, 3, 8], [8, 7, 2, 2]])
    rows, columns = group_positions(ids, [7, 8], adjacent=False)
    assert rows.tolist() == [0, 1] and columns.tolist() == [[1, 3], [0, 1]]
    with pytest.raises(ValueError, match="not whole groups of 2 adjacent tokens"):
        group_positions(ids, [7, 8])
    with pytest.raises(ValueError, match=r"\[1, 3\], not whole groups of 2 tokens"):
        group_positions(torch.tensor([[1, 7, 3, 3], [8, 7, 8, 2]]), [7, 8], adjacent=False)
