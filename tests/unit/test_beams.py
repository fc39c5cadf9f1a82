"""Beams over our own loop: what they find is what trying everything finds."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from model.generation import FORCED, Decoding, GeneratedAnswer
from model.predictor import AnswerOptions, Predictor
from model.session import Finished, MaskReady, TextPiece
from tests.unit.tiny_bases import options, write_language_model, write_tower
from tests.unit.tiny_pixellm import make_model, noise, same
from utils.checkpoints.builder import BuiltModel, build_model

SIZES = [(32, 32), (20, 40), (1, 400)]
QUESTIONS = ["the red circle", "which shapes are there, and which is left?", "blue?"]
LENGTH = 4


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BuiltModel:
    """Tests leave it as it is. Its weights are large, so that words differ in how likely they are."""
    place = tmp_path_factory.mktemp(request.param)
    base = write_language_model(place / "base", request.param)
    return build_model(str(base), str(write_tower(place / "tower", "siglip")), options())


class OnlyThese(LogitsProcessor):
    """Leaves a choice among a few tokens: seg tokens among them, so that groups and broken ones come up."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.ids] = scores[:, self.ids]
        return kept


def allowed(built: BuiltModel) -> list[int]:
    return [built.processor.end_token_id, built.processor.seg_token_ids[0], 7, 11]


def images(built: BuiltModel) -> dict[str, Any]:
    seen = [built.processor.encode_image(noise(*size, seed=number)) for number, size in enumerate(SIZES)]
    return {
        "pixel_values": {"vision_tower": torch.stack([one.pixel_values for one in seen])},
        "resized_sizes": torch.tensor([one.resized_size for one in seen]),
    }


def prompts(built: BuiltModel) -> list[torch.Tensor]:
    return [built.processor.encode_prompt([(question, None)]) for question in QUESTIONS]


def generate(
    built: BuiltModel, numbers: Sequence[int], decoding: Decoding, length: int = LENGTH
) -> list[GeneratedAnswer]:
    asked = prompts(built)
    return built.model.generate_answers(
        prompts=[asked[number] for number in numbers],
        image_index=torch.tensor(list(numbers)),
        end_token_id=built.processor.end_token_id,
        max_new_tokens=length,
        decoding=decoding,
        **images(built),
    )


@torch.no_grad()
def log_probability(built: BuiltModel, number: int, ids: Sequence[int]) -> float:
    """Of an answer to a question, in one pass without a cache, among the allowed tokens."""
    asked, index = prompts(built)[number], torch.tensor([number])
    row = torch.cat([asked, torch.tensor(list(ids))])[None]
    rows = built.model.merge_multimodal_embeddings(
        row, torch.ones_like(row), built.model.encode_images(**images(built)), index
    )
    states = built.model.hidden_states(rows, index)[0, -len(ids) - 1 : -1]
    logits = built.model.get_output_embeddings()(states)[:, allowed(built)].log_softmax(dim=-1)
    return sum(float(logits[place, allowed(built).index(token)]) for place, token in enumerate(ids))


def whole_answers(tokens: Sequence[int], end: int) -> list[tuple[int, ...]]:
    """All answers of at most LENGTH tokens: they end with the end token, or with the length."""
    words = [token for token in tokens if token != end]
    ended = [(*some, end) for count in range(LENGTH) for some in itertools.product(words, repeat=count)]
    return [*ended, *itertools.product(words, repeat=LENGTH)]


def test_beams_enough_for_everything_find_the_best_of_all(built: BuiltModel) -> None:
    """3 words and the end: 1 + 3 + 9 + 27 answers that end in time, and 81 that are cut off."""
    everything = whole_answers(allowed(built), built.processor.end_token_id)
    assert len(everything) == 1 + 3 + 9 + 27 + 81
    decoding = Decoding(LogitsProcessorList([OnlyThese(allowed(built))]), num_beams=128)
    found = generate(built, range(len(QUESTIONS)), decoding)
    for number, answer in enumerate(found):
        weights = {ids: log_probability(built, number, ids) / len(ids) for ids in everything}
        best = max(weights, key=weights.__getitem__)
        assert weights[tuple(answer.ids.tolist())] == pytest.approx(weights[best], abs=1e-5)
        assert answer.finished == (answer.ids[-1] == built.processor.end_token_id)


def searched(built: BuiltModel, number: int, beams: int) -> tuple[int, ...]:
    """Beam search as its description says it, each answer weighed anew from its beginning."""
    end, live, ended = built.processor.end_token_id, [()], dict[tuple[int, ...], float]()
    while live and (len(ended) < beams or weight(built, number, live[0]) > min(ended.values())):
        longer = {(*ids, token): 0.0 for ids in live for token in allowed(built)}
        scored = {ids: log_probability(built, number, ids) for ids in longer}
        ranked = sorted(scored, key=scored.__getitem__, reverse=True)[: 2 * beams]
        over = [ids for ids in ranked if ids[-1] == end or len(ids) == LENGTH]
        for ids in over:
            if ranked.index(ids) < beams:
                ended[ids] = scored[ids] / len(ids)
        ended = dict(sorted(ended.items(), key=lambda item: -item[1])[:beams])
        live = [ids for ids in ranked if ids not in over][:beams]
    return max(ended, key=ended.__getitem__)


def weight(built: BuiltModel, number: int, ids: tuple[int, ...]) -> float:
    return log_probability(built, number, ids) / len(ids) if ids else math.inf


@pytest.mark.parametrize("beams", [2, 3])
def test_few_beams_are_those_of_a_search_without_a_cache(built: BuiltModel, beams: int) -> None:
    decoding = Decoding(LogitsProcessorList([OnlyThese(allowed(built))]), num_beams=beams)
    together = generate(built, range(len(QUESTIONS)), decoding)
    for number, answer in enumerate(together):
        assert tuple(answer.ids.tolist()) == searched(built, number, beams)
        (alone,) = generate(built, [number], decoding)
        assert alone.ids.tolist() == answer.ids.tolist()


class Trap(LogitsProcessor):
    """5 with 0.6, else 6; after 5 one of four words, after 6 always the end."""

    def __init__(self, end: int) -> None:
        self.table = {5: {7: 0.25, 8: 0.25, 9: 0.25, 10: 0.25}, 6: {end: 1.0}}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chances = torch.full_like(scores, -torch.inf)
        for token, chance in self.table.get(int(input_ids[0, -1]), {5: 0.6, 6: 0.4}).items():
            chances[:, token] = math.log(chance)
        return chances


def test_beams_do_not_fall_for_the_likeliest_word() -> None:
    """(ln 0.6 + ln 0.25) / 2 = -0.95 for 5 and any word; (ln 0.4 + ln 1) / 2 = -0.46 for 6 and the end."""
    made = make_model()
    end = made.processor.end_token_id
    processors = LogitsProcessorList([Trap(end)])
    (plain,) = generate(made, [0], Decoding(processors), 2)
    (wide,) = generate(made, [0], Decoding(processors, num_beams=2), 2)
    assert plain.ids.tolist()[0] == 5 and not plain.finished
    assert wide.ids.tolist() == [6, end] and wide.finished


class Ends(StoppingCriteria):
    """Ends answers whose last token is this one."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_groups_of_the_best_answer_get_their_masks(built: BuiltModel) -> None:
    """Only a group, or a word and a group, can be said; the masks are those of the same tokens chosen one by one."""
    seg = built.processor.seg_token_ids

    class Group(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            last = int(input_ids[0, -1])
            if last in seg:
                follow = [seg[(seg.index(last) + 1) % len(seg)]]
            else:
                follow = [seg[0]] if last == 7 else [seg[0], 7]
            return OnlyThese(follow)(input_ids, scores)

    processors, stopping = LogitsProcessorList([Group()]), StoppingCriteriaList([Ends(seg[-1])])
    beams = generate(built, [0, 1], Decoding(processors, stopping, num_beams=3), 12)
    for number, answer in enumerate(beams):
        assert answer.ids.tolist()[-len(seg) :] == seg and len(answer.low_res_mask_logits) == 1
        with_these = _forced(answer.ids.tolist(), len(prompts(built)[number]))
        (again,) = generate(built, [number], Decoding(with_these, stopping), 12)
        assert again.ids.tolist() == answer.ids.tolist()
        assert torch.allclose(again.low_res_mask_logits, answer.low_res_mask_logits, atol=2e-5)


def _forced(ids: list[int], prompt_length: int) -> LogitsProcessorList:
    class Said(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return OnlyThese([ids[input_ids.shape[1] - prompt_length]])(input_ids, scores)

    return LogitsProcessorList([Said()])


def test_what_does_not_go_with_beams_is_refused() -> None:
    with pytest.raises(ValueError, match="num_beams must be at least 1, found 0"):
        Decoding(num_beams=0)
    with pytest.raises(ValueError, match="2 beams and seeds to draw with"):
        Decoding(num_beams=2, seeds=[1])
    with pytest.raises(ValueError, match="2 beams and forced groups"):
        Decoding(num_beams=2, groups=FORCED)


def test_a_stream_and_a_batch_of_beams_are_the_answer() -> None:
    made = make_model()
    predictor, how = Predictor(made.model, made.processor), AnswerOptions(num_beams=3)
    predictor.set_image(noise(20, 30))
    whole = predictor.ask("the red circle?", 8, how)
    events = list(predictor.stream("the red circle?", 8, how))
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == whole.text
    assert [event.number for event in events if isinstance(event, MaskReady)] == list(range(len(whole.masks)))
    assert isinstance(events[-1], Finished) and same(events[-1].answer, whole)
    other, one = predictor.answer([noise(9, 9), noise(20, 30)], ["blue?", "the red circle?"], [0, 1], 8, how)
    assert same(one, whole) and same(other, predictor.session(noise(9, 9)).ask("blue?", 8, how))
