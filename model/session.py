"""Questions about one image: single, many together, streamed, and as a conversation with a history.

Axes: Q targets of one answer, H W pixels of the image itself.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .answer_text import DecodedAnswer
from .answers import (
    Answer,
    Event,
    Finished,
    MaskReady,
    TargetStarted,
    TextPiece,
    align_phrases,
    compose_answer,
    mask_box,
    mask_scores,
)
from .beams import loop_class
from .generation import CHECKED, Decoding, DecodingLoop
from .geometry import restore_masks
from .modeling_base import EncodedImages
from .modeling_pixellm import PixelLMForCausalLM
from .onednn_linear import onednn_linear
from .processing_pixellm import ConversationTooLong, PixelLMProcessor
from .structures import Question

MAX_NEW_TOKENS = 256
QUESTIONS_AT_ONCE = 16

# The end of a text that is still growing: what comes next may take spaces and marks away, or complete a letter.
_OPEN_END = re.compile(r"(?:[^\w]|\ufffd)*\Z")


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is worded; as it stands, the most likely token every time.

    temperature: above 0 tokens are drawn, the hotter the wilder. top_p: only from the likeliest tokens that together
    have this probability. seed: the same seed gives the same answer; question number n of several gets seed + n.
    repetition_penalty: above 1 makes words used before less likely. stop: an answer ends after any of these texts.
    groups, num_beams: see `generation.Decoding`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    groups: str = CHECKED
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError(
                f"temperature is {self.temperature}, top_p {self.top_p}, repetition_penalty {self.repetition_penalty}; "
                "expected at least 0, above 0 and at most 1, and above 0"
            )
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"top_p is {self.top_p} but temperature 0 draws nothing: give a temperature above 0")

    def make_decoding(self, tokenizer: Any, count: int) -> Decoding:
        """How the loop chooses tokens for `count` prompts."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        stopping = StoppingCriteriaList([StopStringCriteria(tokenizer, list(self.stop))] if self.stop else [])
        seeds = [self.seed + number for number in range(count)] if self.temperature > 0 else None
        return Decoding(processors, stopping, seeds, self.groups, self.num_beams)


@contextmanager
def inference(model: PixelLMForCausalLM, lock: AbstractContextManager[Any]) -> Iterator[None]:
    """A thread's turn at the model: eval mode and no gradients inside; the mode found is put back, so that training
    can ask in between. lock: a reentrant one.
    """
    with lock:
        was_training = model.training
        if was_training:
            model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            if was_training:
                model.train()


class Session:
    """Questions about one image, which goes through the models once, at the first question.

    image: uint8 RGB (H, W, 3), turned the way it is viewed. Sessions that share a lock may be used from different
    threads; they take turns, a stream after each of its steps.
    """

    def __init__(
        self,
        model: PixelLMForCausalLM,
        processor: PixelLMProcessor,
        image: Any,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        """image: path, bytes, PIL image, array (H, W, 3) uint8 or tensor; ImageError when it is none."""
        self.model, self.processor = model, processor
        self.image: np.ndarray = processor.open_image(image)
        self.encoded = processor.encode_image(self.image)
        self._lock = lock or RLock()
        self._model_images: EncodedImages | None = None

    def ask(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Answer:
        """Answer one question, or turns (question, answer) of which the last has the answer None."""
        return self.ask_many([question], max_new_tokens, options)[0]

    def ask_many(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = MAX_NEW_TOKENS,
        options: AnswerOptions | None = None,
    ) -> list[Answer]:
        """Answer questions together, each as if it were asked alone; `QUESTIONS_AT_ONCE` share a pass."""
        decoding = (options or AnswerOptions()).make_decoding(self.processor.tokenizer, len(questions))
        answers: list[Answer] = []
        for start in range(0, len(questions), QUESTIONS_AT_ONCE):
            some = questions[start : start + QUESTIONS_AT_ONCE]
            seeds = decoding.seeds and decoding.seeds[start : start + len(some)]
            with self._inference():
                generated = self.model.generate_answers(
                    prompts=[self._encode_question(question) for question in some],
                    image_index=self._image_index(len(some)),
                    end_token_id=self.processor.end_token_id,
                    max_new_tokens=max_new_tokens,
                    pixel_values=None,
                    resized_sizes=None,
                    images=self._encode_image(),
                    decoding=replace(decoding, seeds=seeds),
                )
                answers += [
                    self._compose(self.processor.decode_answer(one.ids), self._restore(one.low_res_mask_logits))
                    for one in generated
                ]
        return answers

    def stream(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Iterator[Event]:
        """The same answer while it is made: pieces of text, targets as they begin, masks as soon as they can be had.

        With beams everything comes at the end, when it is known which answer is the best.
        """
        yield from self._stream_prompt(self._encode_question(question), max_new_tokens, options)

    def chat(self, options: AnswerOptions | None = None) -> "Chat":
        """A conversation about the image."""
        return Chat(self, options)

    def _stream_prompt(
        self, prompt: torch.Tensor, max_new_tokens: int, options: AnswerOptions | None
    ) -> Iterator[Event]:
        decoding = (options or AnswerOptions()).make_decoding(self.processor.tokenizer, 1)
        with self._inference():
            loop = loop_class(decoding)(
                self.model,
                self._encode_image(),
                [prompt],
                self._image_index(1),
                self.processor.end_token_id,
                max_new_tokens,
                decoding,
            )
        yield from _Stream(self, loop).events()

    def _inference(self) -> AbstractContextManager[None]:
        return inference(self.model, self._lock)

    def _encode_question(self, question: Question) -> torch.Tensor:
        with self._lock:  # a tokenizer serves one thread at a time
            return self.processor.encode_question(question).to(self.model.device)

    def _encode_image(self) -> EncodedImages:
        """What the model computes of the image, once; inside `_inference` only."""
        if self._model_images is None:
            inputs = self.processor.stack_images([self.encoded], self.model.device, self.model.dtype)
            with onednn_linear(self.model.device):
                self._model_images = self.model.encode_images(**inputs)
        return self._model_images

    def _image_index(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.model.device)

    def _restore(self, low_res_mask_logits: torch.Tensor) -> torch.Tensor:
        return restore_masks(low_res_mask_logits, self.encoded.resized_size, self.encoded.original_size)

    def _compose(self, decoded: DecodedAnswer, logits_QHW: torch.Tensor) -> Answer:
        return compose_answer([decoded], logits_QHW, release_groups=self.model.config.group_rule == "release")


class _Stream:
    """One answer while it is made."""

    def __init__(self, session: Session, loop: DecodingLoop) -> None:
        self.session, self.loop = session, loop
        self.text = ""
        self.num_started = 0
        self.logits: list[torch.Tensor] = []

    def events(self) -> Iterator[Event]:
        steps = self.loop.decode_steps()
        # With beams this is another sequence once the best is known.
        while not self.loop.sequences[0].done:
            with self.session._inference():
                next(steps)
                found = self._new_events() if self.loop.is_final else []
            yield from found
        with self.session._inference():
            decoded = self._decode()
            found = [*self._new_masks(decoded), *self._new_text(decoded.text)]
            no_logits = self.loop.decode_groups([], [])[1].new_zeros((0, *self.session.encoded.original_size))
            logits_QHW = torch.stack(self.logits) if self.logits else no_logits
            found.append(Finished(self.session._compose(decoded, logits_QHW)))
        yield from found

    def _decode(self) -> DecodedAnswer:
        return self.session.processor.decode_answer(self.loop.sequences[0].answer)

    def _new_events(self) -> list[Event]:
        decoded = self._decode()
        text = _OPEN_END.sub("", decoded.text)
        if self.session.model.config.group_rule == "release":
            return self._new_text(text)  # which tokens make groups is known at the end only
        found = self._new_masks(decoded)
        if self.loop.sequences[0].run % len(self.loop.seg_token_ids):
            found += self._new_starts(len(self.logits) + 1)
        return found + self._new_text(text)

    def _new_starts(self, count: int) -> list[Event]:
        """A group that was broken off and one that begins after it are the same target, announced once."""
        first, self.num_started = self.num_started, max(self.num_started, count)
        return [TargetStarted(number) for number in range(first, count)]

    def _new_text(self, text: str) -> list[Event]:
        if len(text) <= len(self.text):
            return []
        piece, self.text = text[len(self.text) :], text
        return [TextPiece(piece)]

    def _new_masks(self, decoded: DecodedAnswer) -> list[Event]:
        groups, _ = self.loop.group_states(self.loop.sequences[0])
        new_groups = groups[len(self.logits) :]
        if not new_groups:
            return []
        phrases = align_phrases(decoded.phrases, len(groups))
        _, low_res = self.loop.decode_groups(new_groups, [0] * len(new_groups))
        found: list[Event] = []
        for logits_HW in self.session._restore(low_res):
            number, mask = len(self.logits), (logits_HW > 0).cpu().numpy()
            self.logits.append(logits_HW)
            found += self._new_starts(number + 1)
            score = mask_scores(logits_HW[None])[0]
            found.append(MaskReady(number, phrases[number], mask, score, mask_box(mask), logits_HW))
        return found


class Chat:
    """A conversation about one image: every question is asked with the turns before it, their groups among them, so
    that it may refer to things that have a mask.

    turns: (question, answer) so far. Turns that do not fit any more are forgotten from the oldest on; `num_forgotten`
    counts them.
    """

    def __init__(self, session: Session, options: AnswerOptions | None = None) -> None:
        self.session, self.options = session, options
        self.turns: list[tuple[str, Answer]] = []
        self.num_forgotten = 0

    def ask(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
        """Answer a question and remember it; an answer without any words or masks is not remembered."""
        *_, last = self.stream(question, max_new_tokens)
        assert isinstance(last, Finished)
        return last.answer

    def stream(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[Event]:
        """The same as events; the turn counts once the last of them is taken."""
        for event in self.session._stream_prompt(self._encode_prompt(question), max_new_tokens, self.options):
            if isinstance(event, Finished) and event.answer.marked_text.strip():
                self.turns.append((question, event.answer))
            yield event

    def undo(self) -> tuple[str, Answer] | None:
        """Take the last turn back; None when there is none."""
        return self.turns.pop() if self.turns else None

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.num_forgotten = 0

    def _encode_prompt(self, question: str) -> torch.Tensor:
        """(T,) ids of the question with the turns before it, the oldest left out until the prompt is short enough."""
        while True:
            turns: list[tuple[str, str | None]] = [(earlier, answer.marked_text) for earlier, answer in self.turns]
            try:
                return self.session._encode_question([*turns, (question, None)])
            except ConversationTooLong:
                if not turns:
                    raise
            del self.turns[0]
            self.num_forgotten += 1
