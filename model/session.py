"""Questions about one image: single, many together, streamed, and as a conversation with a history.

Axes: Q targets of one answer, H W pixels of the image itself.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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

from .answers import Answer
from .beams import loop_class
from .generation import CHECKED, Decoding, DecodingLoop, Row
from .geometry import restore_masks
from .processing_pixellm import ConversationTooLong
from .structures import Box, Question

if TYPE_CHECKING:
    from .predictor import Predictor

MAX_NEW_TOKENS = 256
QUESTIONS_AT_ONCE = 16

# The end of a text that is still growing: what comes next may take spaces and marks away, or complete a letter.
_UNSETTLED = re.compile(r"(?:[^\w]|\ufffd)*\Z")


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is worded; as it stands, the most likely token every time.

    temperature: above 0 tokens are drawn, the hotter the wilder. top_p: only from the likeliest tokens that together
    have this probability. seed: the same seed gives the same answer; question number n of several gets seed + n.
    repetition_penalty: above 1 makes words said before less likely. stop: an answer ends after any of these texts.
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

    def decoding(self, tokenizer: Any, count: int) -> Decoding:
        """For `count` prompts."""
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


@dataclass(frozen=True)
class TextPiece:
    """The next piece of an answer's text; all pieces together are the text."""

    text: str


@dataclass(frozen=True)
class TargetStarted:
    """A seg group has begun: its mask is to come, unless the model breaks the group off. number: counted from 0."""

    number: int


@dataclass(frozen=True)
class MaskReady:
    """The mask of a target, while the text goes on; fields as in `Answer`, logits: float32 (H, W)."""

    number: int
    phrase: str
    mask: np.ndarray
    score: float
    box: Box
    logits: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """The whole answer, equal to what `ask` gives."""

    answer: Answer


Event = TextPiece | TargetStarted | MaskReady | Finished


class Asked:
    """What can be asked about an image."""

    @property
    def current(self) -> "Session":
        """The session whose image is asked about."""
        raise NotImplementedError

    def ask(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Answer:
        """Answer one question, or turns (question, answer) of which the last has the answer None."""
        return self.current.answers([question], max_new_tokens, options)[0]

    def ask_many(
        self,
        questions: Sequence[Question],
        max_new_tokens: int = MAX_NEW_TOKENS,
        options: AnswerOptions | None = None,
    ) -> list[Answer]:
        """Answer questions together, each as if it were asked alone; `QUESTIONS_AT_ONCE` share a pass."""
        return self.current.answers(questions, max_new_tokens, options)

    def stream(
        self, question: Question, max_new_tokens: int = MAX_NEW_TOKENS, options: AnswerOptions | None = None
    ) -> Iterator[Event]:
        """The same answer while it is made: pieces of text, targets as they begin, masks as soon as they can be had.

        With beams everything comes at the end, when it is known which answer is the best.
        """
        return self.current.events(question, max_new_tokens, options)

    def chat(self, options: AnswerOptions | None = None) -> "Chat":
        """A conversation about the image."""
        return Chat(self.current, options)


class Session(Asked):
    """Questions about one image, which goes through the models once, at the first question.

    image: uint8 RGB (H, W, 3), turned the way it is viewed. Sessions of one predictor may be used from different
    threads; they take turns, a stream after each of its passes.
    """

    def __init__(self, predictor: "Predictor", image: Any) -> None:
        """image: path, bytes, PIL image, array (H, W, 3) uint8 or tensor; ImageError when it is none."""
        self.predictor = predictor
        self.image: np.ndarray = predictor.processor.open_image(image)
        self.encoded = predictor.processor.encode_image(self.image)
        self._seen: Any = None

    @property
    def current(self) -> "Session":
        return self

    def answers(
        self, questions: Sequence[Question], max_new_tokens: int, options: AnswerOptions | None
    ) -> list[Answer]:
        """What `ask_many` gives."""
        decoding = (options or AnswerOptions()).decoding(self.predictor.processor.tokenizer, len(questions))
        answers: list[Answer] = []
        for start in range(0, len(questions), QUESTIONS_AT_ONCE):
            some = questions[start : start + QUESTIONS_AT_ONCE]
            seeds = decoding.seeds and decoding.seeds[start : start + len(some)]
            with self.predictor.inference():
                generated = self.predictor.model.generate_answers(
                    prompts=[self.predictor.prompt(question) for question in some],
                    image_index=self._index(len(some)),
                    end_token_id=self.predictor.processor.end_token_id,
                    max_new_tokens=max_new_tokens,
                    pixel_values=None,
                    resized_sizes=None,
                    images=self._images(),
                    decoding=replace(decoding, seeds=seeds),
                )
                answers += [self.predictor.finish(one, self.encoded) for one in generated]
        return answers

    def events(self, question: Question, max_new_tokens: int, options: AnswerOptions | None) -> Iterator[Event]:
        """What `stream` gives."""
        decoding = (options or AnswerOptions()).decoding(self.predictor.processor.tokenizer, 1)
        with self.predictor.inference():
            loop = loop_class(decoding)(
                self.predictor.model,
                self._images(),
                [self.predictor.prompt(question)],
                self._index(1),
                self.predictor.processor.end_token_id,
                max_new_tokens,
                decoding,
            )
        yield from _Stream(self, loop).events()

    def _images(self) -> Any:
        """The image as the model sees it; inside `inference` only."""
        if self._seen is None:
            inputs = self.predictor.image_inputs([self.encoded])
            self._seen = self.predictor.model.see(**inputs)
        return self._seen

    def _index(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.predictor.model.device)


class _Stream:
    """One answer while it is made."""

    def __init__(self, session: Session, loop: DecodingLoop) -> None:
        self.session, self.predictor, self.loop = session, session.predictor, loop
        self.said = ""
        self.started = 0
        self.logits: list[torch.Tensor] = []

    @property
    def row(self) -> Row:
        """The answer; another one at the end of a loop that is not settled before."""
        return self.loop.rows[0]

    def events(self) -> Iterator[Event]:
        passes = self.loop.passes()
        while not self.row.done:
            with self.predictor.inference():
                next(passes)
                found = self._news() if self.loop.settled else []
            yield from found
        with self.predictor.inference():
            found = [*self._masks(), *self._text(final=True), Finished(self._answer())]
        yield from found

    def _news(self) -> list[Event]:
        if self.predictor.model.config.group_rule == "release":
            return self._text(final=False)  # which tokens make groups is known at the end only
        found = self._masks()
        if self.row.run % len(self.loop.seg_token_ids):
            found += self._starts(len(self.logits) + 1)
        return found + self._text(final=False)

    def _starts(self, begun: int) -> list[Event]:
        """A group that was broken off and one that begins after it are the same target, announced once."""
        first, self.started = self.started, max(self.started, begun)
        return [TargetStarted(number) for number in range(first, begun)]

    def _text(self, final: bool) -> list[Event]:
        text = self.predictor.processor.decode_answer(self.row.answer).text
        settled = text if final else _UNSETTLED.sub("", text)
        if len(settled) <= len(self.said):
            return []
        piece, self.said = settled[len(self.said) :], settled
        return [TextPiece(piece)]

    def _masks(self) -> list[Event]:
        groups, _ = self.loop.group_states(self.row)
        fresh = groups[len(self.logits) :]
        if not fresh:
            return []
        phrases = self.predictor.processor.decode_answer(self.row.answer).phrases
        phrases = ([""] * len(groups) + phrases)[len(phrases) :]
        _, low_res = self.loop.decode_groups(fresh, [0] * len(fresh))
        encoded = self.session.encoded
        found: list[Event] = []
        for logits in restore_masks(low_res, encoded.resized_size, encoded.original_size):
            number = len(self.logits)
            self.logits.append(logits)
            found += self._starts(number + 1)
            found.append(self.predictor.mask_ready(number, phrases[number], logits))
        return found

    def _answer(self) -> Answer:
        whole = self.loop.decode_groups([], [])[1].new_zeros((0, *self.session.encoded.original_size))
        logits = torch.stack(self.logits) if self.logits else whole
        return self.predictor.compose([self.row.answer], logits)


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
        answer: Answer | None = None
        for event in self.stream(question, max_new_tokens):
            if isinstance(event, Finished):
                answer = event.answer
        assert answer is not None
        return answer

    def stream(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[Event]:
        """The same as events; the turn counts once the last of them is taken."""
        for event in self.session.stream(self._fitting(question), max_new_tokens, self.options):
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

    def _fitting(self, question: str) -> list[tuple[str, str | None]]:
        """The turns to ask with, the oldest left out until the prompt is short enough."""
        while True:
            turns: list[tuple[str, str | None]] = [(asked, answer.marked_text) for asked, answer in self.turns]
            try:
                self.session.predictor.prompt([*turns, (question, None)])
            except ConversationTooLong:
                if not turns:
                    raise
            else:
                return [*turns, (question, None)]
            del self.turns[0]
            self.num_forgotten += 1
