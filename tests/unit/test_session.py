"""Sessions: asked one by one, together, as a stream or in a conversation, an image gets the same answers."""

import io
import struct
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.predictor import Answer, Predictor
from model.session import (
    QUESTIONS_AT_ONCE,
    AnswerOptions,
    Chat,
    Event,
    Finished,
    MaskReady,
    Session,
    TargetStarted,
    TextPiece,
)
from tests.unit.tiny_pixellm import make_model, noise, same, saying, saying_ids
from utils.checkpoints.builder import BuiltModel

SAID = "It is the red circle {seg} and, to the left (of it), the blue square {seg}. Two in all!"


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    return make_model()


@pytest.fixture
def predictor(built: BuiltModel) -> Predictor:
    return Predictor(built.model, built.processor)


def whole_text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def finished(events: Sequence[Event]) -> Answer:
    (last,) = [event for event in events if isinstance(event, Finished)]
    assert events[-1] is last
    return last.answer


def assert_streamed(events: Sequence[Event], whole: Answer) -> None:
    assert whole_text(events) == whole.text
    assert same(finished(events), whole)
    ready = [event for event in events if isinstance(event, MaskReady)]
    assert [event.number for event in ready] == list(range(len(whole.masks)))
    for event in ready:
        assert np.array_equal(event.mask, whole.masks[event.number])
        assert (event.phrase, event.box) == (whole.phrases[event.number], whole.boxes[event.number])
        assert event.score == pytest.approx(whole.scores[event.number], abs=1e-5)
        assert events.index(TargetStarted(event.number)) < events.index(event)


def test_a_stream_is_the_whole_answer_in_pieces(predictor: Predictor, built: BuiltModel) -> None:
    predictor.set_image(noise(20, 30))
    with saying(built, [SAID]):
        whole, events = predictor.ask("Where?"), list(predictor.stream("Where?"))
    assert_streamed(events, whole)
    kinds = [type(event) for event in events]
    # The first mask is there before the second target is named.
    assert kinds.index(MaskReady) < len(kinds) - 1 - kinds[::-1].index(TargetStarted)
    assert len(whole.masks) == 2 and kinds.count(TextPiece) > 5


@pytest.mark.parametrize("rule", ["adjacent", "release"])
def test_a_stream_of_broken_groups(predictor: Predictor, built: BuiltModel, rule: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(built.model.config, "group_rule", rule)
    seg, end = built.processor.seg_token_ids, built.processor.end_token_id
    predictor.set_image(noise(20, 30))
    for ids in (
        [*seg[:3], 5, *seg, 5, *seg[:2], end],
        [*seg, *seg, *seg[:3], 5, end],
        [end],
        [*seg, end],
        [5, *seg[:1]],
    ):
        with saying_ids([ids]):
            whole, events = predictor.ask("?", len(ids)), list(predictor.stream("?", len(ids)))
        assert_streamed(events, whole)
        started = [event.number for event in events if isinstance(event, TargetStarted)]
        assert started == sorted(set(started))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from(["word", "{seg}", ",", ".", " ", "(", ")", "3.5", "é", "日本", "a-b", "\n", "…", "!?"]))
)
def test_any_text_streams_as_it_is(pieces: list[str]) -> None:
    built = make_cached()
    text = "".join(pieces)
    if not text.strip():
        return
    predictor = Predictor(built.model, built.processor)
    predictor.set_image(noise(8, 8))
    with saying(built, [text]):
        events = list(predictor.stream("?", 400))
    assert whole_text(events) == finished(events).text


_cached: list[BuiltModel] = []


def make_cached() -> BuiltModel:
    if not _cached:
        _cached.append(make_model())
    return _cached[0]


def test_questions_together_are_answered_as_if_alone(predictor: Predictor) -> None:
    session = predictor.session(noise(40, 10))
    questions = [f"{'the red circle ' * (number % 3)}number {number}?" for number in range(QUESTIONS_AT_ONCE + 2)]
    together = session.ask_many(questions, 6)
    assert len(together) == len(questions)
    for number in (0, 1, 2, QUESTIONS_AT_ONCE - 1, QUESTIONS_AT_ONCE, QUESTIONS_AT_ONCE + 1):
        assert same(together[number], predictor.session(noise(40, 10)).ask(questions[number], 6))
    assert session.ask_many([]) == []


def test_a_image_goes_through_the_models_once(predictor: Predictor, built: BuiltModel, monkeypatch: Any) -> None:
    seen: list[int] = []
    encode = built.model.encode_images
    monkeypatch.setattr(built.model, "encode_images", lambda **inputs: seen.append(1) or encode(**inputs))
    predictor.set_image(noise(20, 30))
    predictor.ask("Where?", 3)
    predictor.ask_many(["Where?", "Which?"], 3)
    list(predictor.stream("Where?", 3))
    predictor.chat().ask("Where?", 3)
    assert seen == [1]
    predictor.set_image(noise(20, 31))
    predictor.ask("Where?", 3)
    assert seen == [1, 1]


def test_nothing_can_be_asked_without_a_image(predictor: Predictor) -> None:
    assert predictor.image is None
    for ask in (predictor.ask, predictor.stream, predictor.chat, lambda question: predictor.ask_many([question])):
        with pytest.raises(RuntimeError, match="set_image"):
            ask("Where?")  # type: ignore[operator]


def test_a_conversation_sees_its_own_groups(predictor: Predictor, built: BuiltModel, monkeypatch: Any) -> None:
    prompts: list[list[int]] = []
    encode = built.processor.encode_question

    def keep(turns: Any) -> torch.Tensor:
        prompts.append(encode(turns).tolist())
        return encode(turns)

    monkeypatch.setattr(built.processor, "encode_question", keep)
    predictor.set_image(noise(20, 30))
    chat = predictor.chat()
    with saying(built, ["the red circle {seg}."]):
        first, second = chat.ask("Where?"), chat.ask("And what is beside it?")
    assert [question for question, _ in chat.turns] == ["Where?", "And what is beside it?"]
    assert prompts[-1] == encode([("Where?", "the red circle {seg}."), ("And what is beside it?", None)]).tolist()
    assert len(prompts) == 2, "a prompt is encoded once"
    assert len(first.masks) == len(second.masks) == 1
    undone = chat.undo()
    assert undone is not None and undone[0] == "And what is beside it?" and len(chat.turns) == 1
    chat.reset()
    assert chat.turns == [] and chat.undo() is None
    with pytest.raises(ValueError, match="prompt is empty"):
        chat.ask(" ")
    assert chat.turns == []


def test_an_empty_answer_is_no_turn(predictor: Predictor, built: BuiltModel) -> None:
    chat = predictor.session(noise(9, 9)).chat()
    with saying_ids([[built.processor.end_token_id]]):
        assert chat.ask("Where?").text == ""
    assert chat.turns == []


def test_a_long_conversation_forgets_its_oldest_turns(predictor: Predictor, built: BuiltModel) -> None:
    chat: Chat = predictor.session(noise(9, 9)).chat()
    with saying(built, ["the red circle {seg} and the blue square {seg}."]):
        for number in range(12):
            chat.ask(f"Where is number {number}?")
    assert chat.num_forgotten > 0 and len(chat.turns) + chat.num_forgotten == 12
    assert chat.turns[-1][0] == "Where is number 11?"
    with pytest.raises(ValueError, match="model_max_length"):
        chat.ask("word " * 300)


def test_an_interrupted_stream_leaves_no_turn_and_no_lock(predictor: Predictor, built: BuiltModel) -> None:
    chat = predictor.session(noise(9, 9)).chat()
    with saying(built, [SAID]):
        events = chat.stream("Where?")
        next(events)
        other = threading.Thread(target=lambda: predictor.session(noise(9, 9)).ask("Where?"), daemon=True)
        other.start()
        other.join(60)
        assert not other.is_alive(), "a stream that waits must not keep the model from others"
        events.close()  # type: ignore[attr-defined]
        assert chat.turns == []
        assert chat.ask("Where?").text


def test_options_change_what_is_said_and_repeat(predictor: Predictor) -> None:
    session = predictor.session(noise(20, 30))
    questions = ["the red circle?", "which?"]
    drawn = [session.ask_many(questions, 12, AnswerOptions(1.5, 0.9, seed=seed)) for seed in (1, 1, 2)]
    assert [one.text for one in drawn[0]] == [one.text for one in drawn[1]] != [one.text for one in drawn[2]]
    assert session.ask(questions[1], 12, AnswerOptions(1.5, 0.9, seed=2)).text == drawn[0][1].text  # seed 1 + 1
    assert same(session.ask(questions[0], 12, AnswerOptions()), session.ask(questions[0], 12))
    plain, varied = (session.ask("which?", 20, AnswerOptions(repetition_penalty=value)).text for value in (1.0, 50.0))
    assert plain != varied
    with pytest.raises(ValueError, match="temperature is -1"):
        AnswerOptions(temperature=-1)
    with pytest.raises(ValueError, match="temperature 0 draws nothing"):
        AnswerOptions(top_p=0.5)


def test_stop_strings_end_an_answer(predictor: Predictor, built: BuiltModel) -> None:
    predictor.set_image(noise(20, 30))
    with saying(built, [SAID]):
        answer = predictor.ask("Where?", options=AnswerOptions(stop=("left", "nowhere")))
        events = list(predictor.stream("Where?", options=AnswerOptions(stop=("left",))))
    assert answer.text.endswith("left") and len(answer.masks) == 1
    assert_streamed(events, answer)


def test_two_threads_share_a_model(predictor: Predictor) -> None:
    images, asked = [noise(20, 30), noise(40, 10, seed=1)], ["the red circle?", "blue?"]
    expected = [predictor.session(image).ask(question, 8) for image, question in zip(images, asked, strict=True)]
    wrong: list[Any] = []

    def work(number: int) -> None:
        session: Session = predictor.session(images[number])
        for _ in range(6):
            if not same(session.ask(asked[number], 8), expected[number]):
                wrong.append(number)
            if not same(finished(list(session.stream(asked[number], 8))), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert not torch.is_inference_mode_enabled()


def written(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def odd_images() -> dict[str, tuple[Any, tuple[int, int]]]:
    """What may come, and the (height, width) a viewer shows."""
    photo = Image.fromarray(noise(20, 30))
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn right to view"
    palette = photo.quantize(8)
    frames = [Image.fromarray(noise(12, 14, seed=seed)).quantize(16) for seed in range(3)]
    return {
        "one pixel": (noise(1, 1), (1, 1)),
        "one row": (noise(1, 4000), (1, 4000)),
        "one column": (noise(4000, 1), (4000, 1)),
        "cmyk": (written(photo.convert("CMYK"), "JPEG"), (20, 30)),
        "animated": (written(frames[0], "GIF", save_all=True, append_images=frames[1:]), (12, 14)),
        "palette": (written(palette, "PNG", transparency=0), (20, 30)),
        "turned": (written(photo, "JPEG", exif=turned), (30, 20)),
        "grey": (photo.convert("L"), (20, 30)),
        "tensor": (torch.rand(3, 9, 7), (9, 7)),
    }


@pytest.mark.parametrize("kind", list(odd_images()))
def test_odd_images_get_masks_as_the_viewer_sees_them(kind: str, predictor: Predictor, built: BuiltModel) -> None:
    image, size = odd_images()[kind]
    predictor.set_image(image)
    with saying(built, ["a {seg}"]):
        answer = predictor.ask("Where?")
    assert predictor.image is not None and predictor.image.shape == (*size, 3)
    assert answer.masks.shape == (1, *size)


def test_a_turned_image_is_seen_as_its_upright_copy(predictor: Predictor, built: BuiltModel) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.fromarray(noise(20, 30))
    turned, upright = written(photo, "PNG", exif=exif), photo.transpose(Image.Transpose.ROTATE_270)
    with saying(built, ["a {seg}"]):
        one, other = (predictor.session(image).ask("Where?") for image in (turned, upright))
    assert same(one, other)


def test_a_image_too_large_to_be_opened_safely_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    # A whole small PNG whose header claims more: its length and type, then the sides, then the rest and a checksum.
    png = bytearray(written(Image.new("1", (8, 8)), "PNG"))
    png[16:24] = struct.pack(">II", 20000, 20000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    (tmp_path / "huge.png").write_bytes(png)
    with pytest.raises(ValueError, match=r"huge\.png' claims more than .* pixels .*: scale it down first"):
        predictor.set_image(tmp_path / "huge.png")


@pytest.mark.long
def test_memory_stays_flat_over_a_thousand_calls(predictor: Predictor, built: BuiltModel) -> None:
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("the system does not tell how much memory is resident")
    sizes: list[int] = []  # in pages
    with saying(built, ["the red circle {seg}."]):
        for number in range(1000):
            predictor.set_image(noise(20 + number % 60, 90 - number % 50, seed=number))
            predictor.ask("Where?")
            sizes.append(int(resident.read_text().split()[1]))
    assert sizes[-1] < 1.02 * sizes[99], f"{sizes[99]} pages after 100 calls, {sizes[-1]} after all"
