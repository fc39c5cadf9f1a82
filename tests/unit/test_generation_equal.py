"""Every way of decoding says and draws the same: cached or not, batched or single, in groups or token by token."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TopKLogitsWarper

from model import PixelLMForCausalLM
from model.generation import CHECKED, FORCED, STEPWISE, Decoding, GeneratedAnswer, GrowingLayer, keeps_all_positions
from model.predictor import Predictor
from model.session import Finished, MaskReady, TextPiece
from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_pixellm import make_model, noise, same, saying, saying_ids
from utils.checkpoints.builder import BuiltModel, build_model

# Wide, tall and square images: at most 1 of 2 x 2 cells is left of the extreme ones.
SIZES = [(1, 400), (400, 1), (32, 32), (20, 40)]
QUESTIONS = ["the red circle", "which shapes are there, and which is left?", "blue?", "the green star", "no?"]
INDEX = [0, 1, 1, 2, 3]
LENGTH = 24


@pytest.fixture(
    scope="module", params=[(kind, attention) for kind in ("llama", "qwen3") for attention in ("eager", "sdpa")]
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """Tests leave it as it is."""
    kind, attention = request.param
    place = tmp_path_factory.mktemp(kind)
    base, tower = write_language_model(place / "base", kind), write_tower(place / "tower", "siglip")
    made = build_model(str(base), str(tower), options(), attn_implementation=attention)
    assert made.model.config.text_config._attn_implementation == attention
    return made


@pytest.fixture(scope="module")
def tiny() -> BuiltModel:
    return make_model()


def prompts_of(built: BuiltModel, questions: Sequence[str] = QUESTIONS) -> list[torch.Tensor]:
    return [built.processor.encode_prompt([(question, None)]) for question in questions]


def pixels(built: BuiltModel) -> dict[str, Any]:
    seen = [built.processor.encode_image(noise(*size, seed=number)) for number, size in enumerate(SIZES)]
    return {
        "pixel_values": {"vision_tower": torch.stack([one.pixel_values for one in seen]).to(built.model.dtype)},
        "resized_sizes": torch.tensor([one.resized_size for one in seen]),
    }


def generate(
    built: BuiltModel,
    prompts: list[torch.Tensor],
    index: Sequence[int],
    decoding: Decoding | None = None,
    max_new_tokens: int = LENGTH,
    **images: Any,
) -> list[GeneratedAnswer]:
    seen = images or pixels(built)
    return built.model.generate_answers(
        pixel_values=seen.get("pixel_values"),
        resized_sizes=seen.get("resized_sizes"),
        images=seen.get("images"),
        prompts=prompts,
        image_index=torch.tensor(list(index)),
        end_token_id=built.processor.end_token_id,
        max_new_tokens=max_new_tokens,
        decoding=decoding,
    )


@torch.no_grad()
def without_cache(built: BuiltModel, prompt: torch.Tensor, image: int) -> list[int]:
    """Everything encoded again for every token, padded positions of the image included."""
    model, said = built.model, []
    while len(said) < LENGTH and built.processor.end_token_id not in said:
        ids = torch.cat([prompt, torch.tensor(said, dtype=torch.long)])[None]
        seen = model.encode_images(**pixels(built))
        rows = model.merge_multimodal_embeddings(ids, torch.ones_like(ids), seen, torch.tensor([image]))
        state = model.hidden_states(rows, torch.tensor([image]))[:, -1]
        said.append(int(model.get_output_embeddings()(state).argmax()))
    return said


def given_masks(built: BuiltModel, prompt: torch.Tensor, answer: torch.Tensor, image: int) -> torch.Tensor:
    """(Q, h, w) of an answer that is given, in one pass without a cache."""
    ids = torch.cat([prompt, answer])[None]
    with torch.no_grad():
        output = built.model.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids).bool(),
            original_sizes=torch.tensor(SIZES),
            image_index=torch.tensor([image]),
            **pixels(built),
        )
    return output.low_res_mask_logits[image]


def assert_alike(one: GeneratedAnswer, other: GeneratedAnswer, atol: float = 2e-5) -> None:
    assert one.ids.tolist() == other.ids.tolist()
    assert (one.num_broken, one.finished) == (other.num_broken, other.finished)
    assert one.low_res_mask_logits.shape == other.low_res_mask_logits.shape
    scale = max(1.0, float(other.low_res_mask_logits.abs().max())) if len(other.low_res_mask_logits) else 1.0
    assert torch.allclose(one.low_res_mask_logits, other.low_res_mask_logits, atol=atol * scale)
    assert torch.allclose(one.embeddings, other.embeddings, atol=atol * max(1.0, scale))


class Biased(LogitsProcessor):
    """Pushes seg tokens, so that a random head starts groups, leaves them half way and starts them again."""

    def __init__(self, ids: list[int], push: float) -> None:
        self.ids, self.push = ids, push

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pushed = scores.clone()
        pushed[:, self.ids] += self.push
        return pushed


def test_a_cache_says_what_is_said_without_one(built: BuiltModel) -> None:
    """Over images of extreme shape, whose padding must stay masked, batched and with shared prefixes."""
    prompts = prompts_of(built)
    said = generate(built, prompts, INDEX)
    for answer, prompt, image in zip(said, prompts, INDEX, strict=True):
        assert answer.ids.tolist() == without_cache(built, prompt, image)
    assert len({tuple(answer.ids.tolist()) for answer in said}) > 1


def test_masks_with_a_cache_are_those_without_one(built: BuiltModel) -> None:
    prompts = prompts_of(built)
    texts = ["a {seg} b {seg} {seg}.", "None.", "{seg}", "the {seg}", "{seg}{seg}"]
    with saying(built, texts):
        said = generate(built, prompts, INDEX, max_new_tokens=60)
    for answer, prompt, image, text in zip(said, prompts, INDEX, texts, strict=True):
        assert answer.finished and len(answer.low_res_mask_logits) == text.count("{seg}")
        if text.count("{seg}"):
            expected = given_masks(built, prompt, answer.ids, image)
            scale = max(1.0, float(expected.abs().max()))
            assert torch.allclose(answer.low_res_mask_logits, expected, atol=2e-5 * scale)


@pytest.mark.parametrize("push", [0.0, 0.4, 2.0, 50.0])
def test_whole_groups_at_once_are_the_same_as_token_by_token(built: BuiltModel, push: float) -> None:
    """With heads that never start a group, leave it half way in every row at another place, or never end it."""
    prompts, seg = prompts_of(built), built.processor.seg_token_ids
    processors = LogitsProcessorList([Biased(seg, push)])
    checked = generate(built, prompts, INDEX, Decoding(processors))
    stepwise = generate(built, prompts, INDEX, Decoding(processors, groups=STEPWISE))
    for number, (one, other) in enumerate(zip(checked, stepwise, strict=True)):
        assert_alike(one, other)
        (alone,) = generate(built, [prompts[number]], INDEX[number : number + 1], Decoding(processors))
        assert_alike(one, alone)


def adversaries(built: BuiltModel) -> Iterator[list[int]]:
    """Answers that a head may want: a group left after each of its tokens, in odd order, started over, too long."""
    seg, end, word = built.processor.seg_token_ids, built.processor.end_token_id, 5
    for kept in range(1, len(seg) + 1):
        yield [word, *seg[:kept], word, *seg, end]
        yield [*seg[:kept], end]
    yield [*reversed(seg), end]
    yield [seg[0]] * len(seg) + [word, end]
    yield [*seg, *seg[:3], *seg, word, end]
    yield [seg[0], word] * 4 + [end]
    yield [*seg, *seg, *seg, end]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5, 7, 8, 13, LENGTH])
def test_heads_that_leave_a_group_half_way(tiny: BuiltModel, max_new_tokens: int) -> None:
    """All together, so that rows need different numbers of passes; cut off anywhere, also after a group's first."""
    wanted = list(adversaries(tiny))
    prompts = prompts_of(tiny, [QUESTIONS[number % len(QUESTIONS)] for number in range(len(wanted))])
    index = sorted(number % len(SIZES) for number in range(len(wanted)))
    with saying_ids(wanted):
        checked = generate(tiny, prompts, index, max_new_tokens=max_new_tokens)
        stepwise = generate(tiny, prompts, index, Decoding(groups=STEPWISE), max_new_tokens)
    for one, other, ids in zip(checked, stepwise, wanted, strict=True):
        assert one.ids.tolist() == ids[:max_new_tokens]
        assert_alike(one, other)


def test_a_forced_group_is_whole_whatever_the_head_wants(tiny: BuiltModel) -> None:
    seg, end = tiny.processor.seg_token_ids, tiny.processor.end_token_id
    prompts = prompts_of(tiny, QUESTIONS[:2])
    # Only the group's first token is asked of the head; what it wants after its last one is the seventh.
    with saying_ids([[5, seg[0], 5, 5, 5, 5, 5, 5, end], [5, 5, end]]):
        left, _ = generate(tiny, prompts, [0, 1], Decoding(groups=CHECKED))
        whole, plain = generate(tiny, prompts, [0, 1], Decoding(groups=FORCED))
        (cut,) = generate(tiny, prompts[:1], [0], Decoding(groups=FORCED), max_new_tokens=4)
    assert left.ids.tolist() == [5, seg[0], 5, 5, 5, 5, 5, 5, end] and left.num_broken == 1
    assert whole.ids.tolist() == [5, *seg, 5, end] and len(whole.low_res_mask_logits) == 1
    assert plain.ids.tolist() == [5, 5, end]
    assert cut.ids.tolist() == [5, *seg[:3]] and cut.num_broken == 1 and not cut.finished
    expected = given_masks(tiny, prompts[0], whole.ids, 0)
    assert torch.allclose(whole.low_res_mask_logits, expected, atol=2e-5 * max(1.0, float(expected.abs().max())))
    with pytest.raises(ValueError, match="one of checked, forced, stepwise, found 'guess'"):
        Decoding(groups="guess")


def test_thirty_four_targets_and_none(tiny: BuiltModel) -> None:
    prompts, seg, end = prompts_of(tiny, QUESTIONS[:3]), tiny.processor.seg_token_ids, tiny.processor.end_token_id
    many = [token for _ in range(34) for token in (5, *seg)] + [end]
    with saying_ids([many, [5, end], [end]]):
        answers = generate(tiny, prompts, [0, 1, 1], max_new_tokens=len(many))
        (cut,) = generate(tiny, prompts[:1], [0], max_new_tokens=len(many) - 2)
    assert [len(answer.low_res_mask_logits) for answer in answers] == [34, 0, 0]
    expected = given_masks(tiny, prompts[0], answers[0].ids, 0)
    assert torch.allclose(answers[0].low_res_mask_logits, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))
    # The length ends within the last group: it is broken, the 33 whole ones are kept.
    assert (len(cut.low_res_mask_logits), cut.num_broken, cut.finished) == (33, 1, False)
    assert torch.allclose(cut.low_res_mask_logits, answers[0].low_res_mask_logits[:33], atol=1e-5)


def test_bfloat16_within_its_tolerance() -> None:
    """bfloat16 keeps 8 bits: masks differ from those of one pass by some 2 ** -8 of their size, layer after layer.

    Single pixels may differ by more: where the channels of a random map are nearly equal, LayerNorm2d divides by next
    to nothing, and which pixels these are depends on the CPU. Float32 and bfloat16 differ there as much.
    """
    half = make_model()
    half.model.to(torch.bfloat16)
    prompts = prompts_of(half)
    texts = ["a {seg} b {seg}.", "None.", "{seg}", "the {seg}", "{seg}{seg}"]
    with saying(half, texts):
        checked = generate(half, prompts, INDEX, max_new_tokens=60)
        stepwise = generate(half, prompts, INDEX, Decoding(groups=STEPWISE), 60)
    for one, other, prompt, image in zip(checked, stepwise, prompts, INDEX, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.low_res_mask_logits.dtype == torch.bfloat16
        if len(one.low_res_mask_logits):
            expected = given_masks(half, prompt, one.ids, image).float()
            scale = float(expected.abs().max())
            for answer in (one, other):
                distance = (answer.low_res_mask_logits.float() - expected).abs()
                assert float((distance > 0.05 * scale).float().mean()) < 0.01
                assert float(distance.mean()) < 0.005 * scale


def test_encoded_images_remember(tiny: BuiltModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked again about an encoded image, neither it nor the prefix goes through a model again."""
    model, prompts = tiny.model, prompts_of(tiny)
    first = generate(tiny, prompts, INDEX)
    with torch.no_grad():
        images = model.encode_images(**pixels(tiny))
    fed: list[int] = []
    handle = model.language_model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, keywords: fed.append(keywords["inputs_embeds"].shape[1]), with_kwargs=True
    )
    again = [generate(tiny, [prompt], [index], images=images)[0] for prompt, index in zip(prompts, INDEX, strict=True)]
    handle.remove()
    for one, other in zip(first, again, strict=True):
        assert_alike(one, other)
    prefix = prompts[0].tolist().index(tiny.processor.image_token_id) + 1
    assert sorted({image for image, _ in images.prefixes}) == [0, 1, 2, 3]
    for (image, ids), known in images.prefixes.items():
        cells = int(images.image_token_mask[image].sum())
        assert list(ids) == prompts[0][:prefix].tolist()
        assert (known.width, known.length) == (prefix - 1 + cells, prefix - 1 + tiny.processor.num_image_tokens)
    # The second question about image 1 is fed from its first own token on.
    assert fed.count(len(prompts[2]) - prefix) >= 1
    with pytest.raises(ValueError, match="no image was given"):
        model.generate_answers(None, None, prompts, torch.tensor(INDEX), tiny.processor.end_token_id, 4)


def test_seeds_draw_the_same_alone_in_a_batch_and_token_by_token(tiny: BuiltModel) -> None:
    prompts, seg = prompts_of(tiny), tiny.processor.seg_token_ids
    processors = LogitsProcessorList([TopKLogitsWarper(40), Biased(seg, 1.0)])
    seeds = [3, 3, 4, 5, 6]
    together = generate(tiny, prompts, INDEX, Decoding(processors, seeds=seeds))
    stepwise = generate(tiny, prompts, INDEX, Decoding(processors, seeds=seeds, groups=STEPWISE))
    for number, one in enumerate(together):
        alone = generate(
            tiny, [prompts[number]], INDEX[number : number + 1], Decoding(processors, seeds=[seeds[number]])
        )
        assert one.ids.tolist() == alone[0].ids.tolist() == stepwise[number].ids.tolist()
    other = generate(tiny, prompts, INDEX, Decoding(processors, seeds=[9] * 5))
    assert [one.ids.tolist() for one in other] != [one.ids.tolist() for one in together]
    with pytest.raises(ValueError, match="2 seeds were given for 5 prompts"):
        generate(tiny, prompts, INDEX, Decoding(seeds=[1, 2]))


class AfterTokens(StoppingCriteria):
    """Stops a row of `length` ids."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        assert len(input_ids) == 1
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_criteria_stop_a_row_and_within_a_group_it_is_broken(tiny: BuiltModel) -> None:
    prompts, seg, end = prompts_of(tiny, QUESTIONS[:2]), tiny.processor.seg_token_ids, tiny.processor.end_token_id
    stop = Decoding(stopping=StoppingCriteriaList([AfterTokens(len(prompts[0]) + 3)]))
    with saying_ids([[5, *seg, end], [end]]):
        cut, other = generate(tiny, prompts, [0, 1], stop)
    assert cut.ids.tolist() == [5, *seg[:2]] and (cut.num_broken, cut.finished) == (1, False)
    assert other.finished


def test_a_cache_with_room_is_the_same_cache() -> None:
    layer, parts = GrowingLayer(), [torch.randn(2, 3, length, 4) for length in (5, 1, 70, 1, 3)]
    for part in parts:
        keys, values = layer.update(part, 2 * part)
    whole = torch.cat(parts, dim=2)
    assert torch.equal(keys, whole) and torch.equal(values, 2 * whole) and layer.get_seq_length() == 80
    layer.batch_select_indices(torch.tensor([1]))
    keys, _ = layer.update(parts[1][1:], parts[1][1:])
    assert torch.equal(keys, torch.cat([whole[1:], parts[1][1:]], dim=2))


def test_a_limited_window_is_not_shared(tmp_path: Any) -> None:
    base = write_language_model(tmp_path / "base", "mistral", sliding_window=12)
    made = build_model(str(base), str(write_tower(tmp_path / "tower", "siglip")), options())
    assert isinstance(made.model, PixelLMForCausalLM) and not keeps_all_positions(made.model.config.text_config)
    with torch.no_grad():
        images = made.model.encode_images(**pixels(made))
    with saying(made, ["a {seg} b {seg}"]):
        (said,) = generate(made, prompts_of(made)[:1], [0], images=images)
    assert not images.prefixes and len(said.low_res_mask_logits) == 2


def test_a_stream_is_the_whole_answer(built: BuiltModel) -> None:
    """Of a head that leaves groups half way, too, for every kind of language model and attention."""
    predictor = Predictor(built.model, built.processor)
    for number, size in enumerate(SIZES):
        predictor.set_image(noise(*size, seed=number))
        for wanted in [*adversaries(built)][:: len(SIZES)]:
            with saying_ids([wanted]):
                whole, events = predictor.ask("Where?", LENGTH), list(predictor.stream("Where?", LENGTH))
            assert isinstance(events[-1], Finished) and same(events[-1].answer, whole)
            assert "".join(event.text for event in events if isinstance(event, TextPiece)) == whole.text
            assert [event.number for event in events if isinstance(event, MaskReady)] == list(range(len(whole.masks)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_all_ways_are_alike_in_bfloat16_too(kind: str, attention: str, tmp_path: Path) -> None:
    """8 bits of a number are kept, so that another order of sums may move a mask by some hundredths of its size.

    The decoder's last layer norm stands over an eighth of its width: over two channels it would be a step function.
    """
    torch.manual_seed(0)
    base = write_language_model(tmp_path / "base", kind, initializer_range=0.1)
    tower = write_tower(tmp_path / "tower", "siglip")
    made = build_model(str(base), str(tower), options(embedding_dim=64), attn_implementation=attention)
    made.model.to(torch.bfloat16)
    prompts, seg, end = prompts_of(made), made.processor.seg_token_ids, made.processor.end_token_id
    wanted = [[5, *seg, 7, *seg, end], [5, end], [*seg, end], [5, *seg[:3], 5, *seg, end], [*seg, *seg[:2], end]]
    with saying_ids(wanted):
        together = generate(made, prompts, INDEX)
        stepwise = generate(made, prompts, INDEX, Decoding(groups=STEPWISE))
    assert [len(one.low_res_mask_logits) for one in together] == [2, 0, 1, 1, 1]
    for number, (one, other) in enumerate(zip(together, stepwise, strict=True)):
        with saying_ids([wanted[number]]):
            (alone,) = generate(made, [prompts[number]], INDEX[number : number + 1])
        assert one.low_res_mask_logits.dtype == torch.bfloat16
        for found in (other, alone):
            assert_alike(found, one, atol=0.05)
