"""The processor: the only place that knows pixels, token ids and labels.

Images become the square the vision tower sees; conversations become token ids and labels in one pass, piece by piece,
so that a seg group is the same S * K adjacent ids under every tokenizer; answers are read back from ids.

Axes: T tokens, P pixels per side of the square, S scales, K tokens per scale.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AddedToken, PreTrainedTokenizerFast, ProcessorMixin

from .answer_text import DecodedAnswer, phrases_before_groups, remove_seg_markers, tidy_text
from .conversation_formats import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    ConversationFormat,
    ConversationFormatError,
    build_format,
)
from .image_processing_pixellm import (
    PIXEL_MAX,
    EncodedImage,
    ImageError,
    PixelStatistics,
    PreparedImage,
    encode_image,
    open_image,
    prepare_image,
)
from .release_text import LegacyTokenizer, answer_separator, encode_sequences, wrap_image_tokens
from .seg_codebook import whole_groups
from .structures import IGNORE_TOKEN, LLAVA_V1, SEG_MARKER, TOWER_KEY, PixelLMError, Question

__all__ = [
    "SEG_MARKER",
    "ConversationFormatError",
    "ConversationTooLong",
    "DecodedAnswer",
    "EncodedConversation",
    "EncodedImage",
    "ImageError",
    "PixelLMProcessor",
    "ProcessorError",
    "PromptError",
    "check_groups",
]

TURNS_RULES, RELEASE_RULES = "turns", "release"
TEXT_RULES = (TURNS_RULES, RELEASE_RULES)

# CLIP's own statistics, published for pixels in 0..1.
CLIP_MEAN = tuple(PIXEL_MAX * value for value in (0.48145466, 0.4578275, 0.40821073))
CLIP_STD = tuple(PIXEL_MAX * value for value in (0.26862954, 0.26130258, 0.27577711))


class ProcessorError(PixelLMError):
    """A processor cannot be made from what it was given, or its tokenizer breaks groups."""


class ConversationError(PixelLMError):
    """A conversation is malformed."""


class ConversationTooLong(PixelLMError):
    """Not even the first turn of a conversation fits into the maximal length."""


class PromptError(PixelLMError):
    """A user's text is empty or holds reserved tokens."""


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as the language model is trained on it.

    input_ids (T,). labels (T,): the ids of answers and their end tokens, -100 elsewhere. group_turns: for each group,
    in order, the index of its turn. kept_turns, dropped_turns: whole turns that fit, and that did not.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    group_turns: list[int]
    kept_turns: int
    dropped_turns: int


def _reserved_names(num_scales: int, tokens_per_scale: int) -> list[str]:
    return [*seg_token_names(num_scales, tokens_per_scale), IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN]


def seg_token_names(num_scales: int, tokens_per_scale: int) -> list[str]:
    """Names of the tokens of a group, in order: scale 0 first."""
    return [f"[SEG{index}]" for index in range(num_scales * tokens_per_scale)]


def required_vocab_size(tokenizer: Any) -> int:
    """Rows for every token that is ever embedded or predicted: all but the image's placeholder, if that is last."""
    ids = tokenizer.get_vocab()
    return 1 + max(number for name, number in ids.items() if name != IMAGE_TOKEN)


class TextEncoder:
    """Texts to token ids as the tokenizer itself encodes them, without beginning and end tokens.

    Args:
        tokenizer: as `PixelLMProcessor` has it. One with a core in Rust is asked there, without the bookkeeping that
            `encode` does around every text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._scaffolds: dict[str, list[int]] = {}

    def encode_words(self, text: str) -> list[int]:
        """Ids of words that people wrote: names of special tokens in them are words like any other."""
        return self._encode(text, split_special_tokens=True)

    def encode_scaffold(self, text: str) -> list[int]:
        """Ids of a text that the conversation format puts around words; it may hold special tokens."""
        if text not in self._scaffolds:  # there are only a few
            self._scaffolds[text] = self._encode(text, split_special_tokens=False)
        return list(self._scaffolds[text])

    def _encode(self, text: str, split_special_tokens: bool) -> list[int]:
        tokenizer = self._tokenizer
        is_fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        if not is_fast or type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
            return tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
            )
        core = tokenizer._tokenizer
        # What the tokenizer's own `encode` sets before every call, too.
        core.encode_special_tokens = split_special_tokens
        if core.truncation is not None:
            core.no_truncation()
        if core.padding is not None:
            core.no_padding()
        return core.encode_batch_fast([text], add_special_tokens=False)[0].ids


class _Writer:
    """Token ids and labels of one conversation while it is written.

    Texts and ready ids are appended in order. A space between two pieces belongs to the text after it, because
    tokenizers glue a space to the word it precedes; before ready ids it is dropped.
    """

    def __init__(self, encoder: TextEncoder, implies_space: bool, reserved_ids: set[int]) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._encoder = encoder
        self._implies_space = implies_space
        self._reserved_ids = reserved_ids
        self._space_before_next = False

    def add_text(self, text: str, *, labelled: bool = False, scaffold: bool = False, keep_end: bool = False) -> None:
        """Append a text; only a scaffold can hold special tokens, and keep_end keeps a space at the end."""
        if self._space_before_next:
            text = " " + text
        kept = text if keep_end else text.rstrip(" ")
        self._space_before_next = kept != text
        if self._implies_space:
            kept = kept.removeprefix(" ")
        if kept and scaffold:
            self._append(self._encoder.encode_scaffold(kept), labelled)
        elif kept:
            # Tokenizers of the unigram kind find their special tokens in plain text whatever they are told.
            words = self._encoder.encode_words(kept)
            self._append([token for token in words if token not in self._reserved_ids], labelled)

    def add_ids(self, ids: list[int], *, labelled: bool = False) -> None:
        """Append ready ids."""
        self._space_before_next = False
        self._append(ids, labelled)

    def _append(self, ids: list[int], labelled: bool) -> None:
        self.ids.extend(ids)
        self.labels.extend(ids if labelled else [IGNORE_TOKEN] * len(ids))


class PixelLMProcessor(ProcessorMixin):
    """Images and conversations to tensors, and answers back.

    Args:
        tokenizer: one that went through `prepare_tokenizer` with the same num_scales and tokens_per_scale.
        image_size: side P of the square in pixels, a multiple of patch_size * image_token_pool.
        patch_size: side of a patch of the vision tower, pixels.
        image_token_pool: side of the square of patches that is averaged into one image token.
        image_mean, image_std: three numbers each, in units of 0..255. CLIP's own by default; the release was trained
            with SAM's (docs/facts.md, P1).
        pad_before_normalize: True pads with black pixels before normalisation, False (release) with zeros after it.
        num_scales, tokens_per_scale: a seg group is S * K tokens.
        conversation_format: "llava_v1", "llava_llama_2" or "chat_template" (the tokenizer's own).
        use_mm_start_end: wrap the image in <im_start> and <im_end>.
        model_max_length: the most positions a conversation may take, those of its image included.
        text_rules: "turns" writes a conversation piece by piece, under any tokenizer, and leaves whole turns out where
            it is too long. "release" (docs/facts.md, C) writes one text for a Llama tokenizer, and cuts its tokens.

    Raises:
        ProcessorError: a number is impossible, or the tokenizer has no end token or was not prepared.
        ReleaseTextError: the release's text_rules are asked for, and the tokenizer is none of Llama's.
        ConversationFormatError: the format is unknown or does not go with the tokenizer.
    """

    # No keyword-only parameters: ProcessorMixin would not find them when it loads what it saved.
    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 448,
        patch_size: int = 14,
        image_token_pool: int = 2,
        image_mean: tuple[float, ...] | list[float] = CLIP_MEAN,
        image_std: tuple[float, ...] | list[float] = CLIP_STD,
        pad_before_normalize: bool = False,
        num_scales: int = 2,
        tokens_per_scale: int = 3,
        conversation_format: str = LLAVA_V1,
        use_mm_start_end: bool = True,
        model_max_length: int = 512,
        text_rules: str = TURNS_RULES,
    ) -> None:
        super().__init__(tokenizer)
        self.image_size, self.patch_size, self.image_token_pool = image_size, patch_size, image_token_pool
        self.image_mean, self.image_std = [float(x) for x in image_mean], [float(x) for x in image_std]
        self.pad_before_normalize = pad_before_normalize
        self.num_scales, self.tokens_per_scale = num_scales, tokens_per_scale
        self.conversation_format = conversation_format
        self.use_mm_start_end = use_mm_start_end
        self.model_max_length = model_max_length
        self.text_rules = text_rules
        self._check_numbers()
        self._check_tokens()
        self._format: ConversationFormat = build_format(conversation_format, tokenizer)
        self._encoder = TextEncoder(tokenizer)
        # A tokenizer looks them up by their names every time, which takes as long as a piece of text.
        self._bos_token_id, self._end_token_id = tokenizer.bos_token_id, int(tokenizer.eos_token_id)
        word = tokenizer.encode("x", add_special_tokens=False)
        self._implies_space = tokenizer.encode("x x", add_special_tokens=False) == word * 2
        if text_rules == RELEASE_RULES:
            self._separator = answer_separator(conversation_format)
            self._legacy = LegacyTokenizer(tokenizer, self._reserved[:-1])

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments but the tokenizer, as this processor has them."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "tokenizer"}

    @classmethod
    def prepare_tokenizer(cls, tokenizer: Any, num_scales: int, tokens_per_scale: int) -> Any:
        """Add the tokens a PixelLM needs, in the release's order, to the tokenizer itself; what is there already stays.

        Returns the tokenizer. The embedding table of a model must then have at least len(tokenizer) rows.
        """
        names = _reserved_names(num_scales, tokens_per_scale)
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names], special_tokens=True)
        return tokenizer

    def _check_numbers(self) -> None:
        counts = ("image_size", "patch_size", "image_token_pool", "num_scales", "tokens_per_scale", "model_max_length")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProcessorError(f"{name} is {value!r}: give a whole number of at least 1")
        cell = self.patch_size * self.image_token_pool
        if self.image_size % cell:
            raise ProcessorError(
                f"image_size is {self.image_size}: give a multiple of patch_size * image_token_pool, "
                f"here {self.patch_size} * {self.image_token_pool} = {cell}"
            )
        if self.text_rules not in TEXT_RULES:
            raise ProcessorError(f"text_rules is {self.text_rules!r}: choose one of {', '.join(TEXT_RULES)}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ProcessorError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}: give three numbers each, in units of "
                "0..255, and no deviation of 0 or less"
            )

    def _check_tokens(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ProcessorError("the tokenizer has no end token, with which every answer ends: set its eos_token")
        vocabulary = self.tokenizer.get_vocab()
        names = self._reserved = _reserved_names(self.num_scales, self.tokens_per_scale)
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise ProcessorError(
                f"the tokenizer lacks the token(s) {', '.join(missing)}: "
                "call PixelLMProcessor.prepare_tokenizer on it first"
            )
        *self._seg_token_ids, self._image_start_id, self._image_end_id, self._image_token_id = (
            int(vocabulary[name]) for name in names
        )
        unknown = self.tokenizer.unk_token_id
        self._reserved_ids = {*self.tokenizer.all_special_ids, *(int(vocabulary[name]) for name in names)} - {unknown}

    @property
    def seg_token_ids(self) -> list[int]:
        """Ids of the S * K tokens of a group, in order."""
        return list(self._seg_token_ids)

    @property
    def image_token_id(self) -> int:
        """Id of the one placeholder that the model replaces by an image's positions."""
        return self._image_token_id

    @property
    def end_token_id(self) -> int:
        """Id with which every answer ends: the tokenizer's own end token."""
        return self._end_token_id

    @property
    def num_image_tokens(self) -> int:
        """Positions an image takes in a conversation."""
        return (self.image_size // self.patch_size // self.image_token_pool) ** 2

    # -- images ------------------------------------------------------------------------------------------------------

    def open_image(self, source: Any) -> np.ndarray:
        """Anything that holds an image -> (H, W, 3) uint8 RGB, or ImageError."""
        return open_image(source)

    def encode_image(self, array: np.ndarray) -> EncodedImage:
        """(H, W, 3) uint8 RGB -> EncodedImage with pixel_values (3, P, P) float32, resized_size and original_size."""
        return encode_image(
            array, self.image_size, self.image_mean, self.image_std, pad_before_normalize=self.pad_before_normalize
        )

    def prepare_image(self, source: Any) -> PreparedImage:
        """Anything that holds an image, resized for its square as bytes; `pixel_statistics` makes of it what
        `encode_image` gives. ImageError as `open_image`.
        """
        return prepare_image(source, self.image_size)

    def stack_images(self, images: Sequence[EncodedImage], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """B encoded images as the model takes them: pixel_values (B, 3, P, P) of `dtype` under TOWER_KEY, and
        resized_sizes (B, 2).
        """
        pixels = torch.stack([image.pixel_values for image in images])
        return {
            "pixel_values": {TOWER_KEY: pixels.to(device, dtype)},
            "resized_sizes": torch.tensor([image.resized_size for image in images], device=device),
        }

    @property
    def pixel_statistics(self) -> PixelStatistics:
        """From prepared images to pixel_values."""
        return PixelStatistics(tuple(self.image_mean), tuple(self.image_std), self.pad_before_normalize)

    # -- conversations -------------------------------------------------------------------------------------------------

    def encode_conversation(self, turns: list[tuple[str, str]], with_image: bool = True) -> EncodedConversation:
        """Token ids and labels of a conversation about one image.

        Args:
            turns: (question, answer) pairs; in answers every target is written SEG_MARKER.
            with_image: False for a conversation in words alone. It has no placeholder, so that the model sees nothing
                of the image its sequence belongs to in a batch.

        Returns:
            As many whole turns from the beginning as fit: ids of the text, less the placeholder, plus num_image_tokens
            are at most model_max_length; without an image, the ids of the text.

        Raises:
            ConversationError: no turn, an empty question or answer, or SEG_MARKER in a question.
            ConversationTooLong: the first turn does not fit. By the release's rules, which cut tokens and keep turns:
                not every group does.
        """
        _check_turns(turns)
        if self.text_rules == RELEASE_RULES:
            return self._encode_as_release(turns, with_image)
        writer = self._new_writer()
        group_turns: list[int] = []
        for index, (question, answer) in enumerate(turns):
            start = len(writer.ids)
            self._add_question(writer, question, index, with_image)
            self._add_answer(writer, answer)
            if self._positions(writer) > self.model_max_length:
                if index == 0:
                    raise ConversationTooLong(self._too_long(writer))
                del writer.ids[start:], writer.labels[start:]
                break
            group_turns.extend([index] * answer.count(SEG_MARKER))
        else:
            index = len(turns)
        return EncodedConversation(
            torch.from_numpy(np.array(writer.ids, dtype=np.int64)),  # several times as fast as torch.tensor
            torch.from_numpy(np.array(writer.labels, dtype=np.int64)),
            group_turns,
            kept_turns=index,
            dropped_turns=len(turns) - index,
        )

    def encode_prompt(self, turns: list[tuple[str, str | None]]) -> torch.Tensor:
        """Ids (T,) up to where the last answer, given as None, begins; `encode_conversation` begins with the same ids.

        Raises:
            ConversationError: as above, or any answer but the last is None, or the last is not.
            ConversationTooLong: the prompt alone takes more than model_max_length positions.
        """
        *answered, (question, answer) = turns if turns else [("", "")]
        if answer is not None:
            raise ConversationError(f"the last answer of a prompt is {answer!r}: give None, for the model to answer")
        _check_turns([*answered, (question, "answer to come")])
        if self.text_rules == RELEASE_RULES:
            return torch.tensor(self._legacy.ids_with_image(self._release_text(turns), self._image_token_id))
        writer = self._new_writer()
        for index, (earlier_question, earlier_answer) in enumerate(answered):
            self._add_question(writer, earlier_question, index)
            self._add_answer(writer, str(earlier_answer))
        self._add_question(writer, question, len(answered))
        if self._positions(writer) > self.model_max_length:
            raise ConversationTooLong(self._too_long(writer))
        return torch.tensor(writer.ids, dtype=torch.long)

    def _release_text(self, turns: Sequence[tuple[str, str | None]], with_image: bool = True) -> str:
        """The conversation as the release writes it: the image before the first question, groups by their tokens'
        names. Names of tokens that the words hold are left out, as by our own rules.
        """
        group = " ".join(seg_token_names(self.num_scales, self.tokens_per_scale))
        written = [
            (self._words(question), None if answer is None else self._words(answer).replace(SEG_MARKER, group))
            for question, answer in turns
        ]
        if with_image:
            first, answer = written[0]
            written[0] = (f"{IMAGE_TOKEN}\n{first}", answer)
        text = self._format.write(written, self.tokenizer.bos_token, self.tokenizer.eos_token)
        return wrap_image_tokens(text) if self.use_mm_start_end else text

    def _words(self, text: str) -> str:
        for name in (*self._reserved, *self.tokenizer.all_special_tokens):
            text = text.replace(name, "")
        return text.strip()

    def _encode_as_release(self, turns: list[tuple[str, str]], with_image: bool) -> EncodedConversation:
        encoded = encode_sequences(
            [self._release_text(turns, with_image)],
            self._legacy,
            self._separator,
            end=self.tokenizer.eos_token,
            image_id=self._image_token_id,
            longest=self.model_max_length - (self.num_image_tokens - 1 if with_image else 0),
        )
        ids, labels = encoded.input_ids[0], encoded.labels[0]
        group_turns = [index for index, (_, answer) in enumerate(turns) for _ in range(answer.count(SEG_MARKER))]
        tokens = int(torch.isin(ids, torch.tensor(self._seg_token_ids)).sum())
        if tokens != len(group_turns) * len(self._seg_token_ids):
            raise ConversationTooLong(
                f"cut to the {len(ids)} tokens that model_max_length {self.model_max_length} leaves beside the "
                f"image, the conversation keeps {tokens} seg tokens for {len(group_turns)} targets: shorten the text "
                "or raise model_max_length"
            )
        return EncodedConversation(ids, labels, group_turns, kept_turns=len(turns), dropped_turns=0)

    def encode_question(self, question: Question) -> torch.Tensor:
        """Ids (T,) of a user's question, or of turns of which the last is to be answered.

        Raises:
            PromptError: see `check_user_text`. ConversationError, ConversationTooLong: see `encode_prompt`.
        """
        turns: list[tuple[str, str | None]] = [(question, None)] if isinstance(question, str) else list(question)
        for text, _ in turns:
            self.check_user_text(text)
        return self.encode_prompt(turns)

    def check_user_text(self, text: str) -> None:
        """Raise PromptError when a user's text is empty, no valid Unicode, or holds a token that only the processor
        may write.
        """
        if not text.strip():
            raise PromptError("the prompt is empty: write a question about the image")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PromptError("the prompt holds half a letter (a lone surrogate): leave it out")
        special = self.tokenizer.all_special_tokens
        names = [SEG_MARKER, *_reserved_names(self.num_scales, self.tokens_per_scale), *special]
        found = [name for name in dict.fromkeys(names) if name.strip() and name in text]
        if found:
            raise PromptError(f"the prompt holds the reserved token(s) {', '.join(found)}: leave them out")

    def decode_answer(self, ids: list[int] | torch.Tensor) -> DecodedAnswer:
        """Read an answer back; ids from the first end token on are ignored. For a group only membership counts."""
        answer = [int(token) for token in ids]
        if self.end_token_id in answer:
            answer = answer[: answer.index(self.end_token_id)]
        starts, broken = whole_groups(answer, self._seg_token_ids)
        pieces: list[str] = []
        position = 0
        for start in starts:
            pieces += [self._decode_words(answer[position:start]), SEG_MARKER]
            position = start + len(self._seg_token_ids)
        pieces.append(self._decode_words(answer[position:]))
        marked_text = tidy_text(" ".join(pieces))
        return DecodedAnswer(
            remove_seg_markers(marked_text), marked_text, phrases_before_groups(marked_text), len(starts), broken
        )

    def conversation_pieces(self, encoded: EncodedConversation) -> list[tuple[str, bool]]:
        """The conversation as the model reads it, in pieces of text, each with whether it is learned."""
        pieces: list[tuple[str, bool]] = []
        ids, learned = encoded.input_ids.tolist(), (encoded.labels != IGNORE_TOKEN).tolist()
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or learned[end] != learned[start]:
                pieces.append((self._decode(ids[start:end]), learned[start]))
                start = end
        return pieces

    def _new_writer(self) -> _Writer:
        return _Writer(self._encoder, self._implies_space, self._reserved_ids)

    def _add_question(self, writer: _Writer, question: str, index: int, with_image: bool = True) -> None:
        scaffold = self._format
        if scaffold.bos_at_turns or (index == 0 and scaffold.bos_at_start):
            writer.add_ids([self._bos_token_id])
        writer.add_text(scaffold.between if index else scaffold.opening, scaffold=True)
        if index == 0 and with_image:
            image = [self._image_token_id]
            writer.add_ids([self._image_start_id, *image, self._image_end_id] if self.use_mm_start_end else image)
        writer.add_text(question.strip())
        writer.add_text(scaffold.asking, scaffold=True)

    def _add_answer(self, writer: _Writer, answer: str) -> None:
        first, *others = answer.strip().split(SEG_MARKER)
        end = self._format.answer_end
        writer.add_text(first + (end if not others else ""), labelled=True, keep_end=bool(end and not others))
        for number, words in enumerate(others, start=1):
            writer.add_ids(self._seg_token_ids, labelled=True)
            is_last = bool(end and words and number == len(others))
            writer.add_text(words + (end if is_last else ""), labelled=True, keep_end=is_last)
        writer.add_ids([self.end_token_id], labelled=True)

    def _positions(self, writer: _Writer) -> int:
        return len(writer.ids) + (self.num_image_tokens - 1) * writer.ids.count(self._image_token_id)

    def _too_long(self, writer: _Writer) -> str:
        shown = self.num_image_tokens * writer.ids.count(self._image_token_id)
        return (
            f"the conversation takes {self._positions(writer)} positions, {shown} of them for the image,"
            f" and model_max_length is {self.model_max_length}: shorten the text or raise model_max_length"
        )

    def _decode_words(self, ids: list[int]) -> str:
        return self._decode([token for token in ids if token not in self._reserved_ids])

    def _decode(self, ids: list[int]) -> str:
        pieces = getattr(self.tokenizer, "sp_model", None)
        if pieces is not None and all(token < pieces.get_piece_size() for token in ids):
            # The slow tokenizer's own decoding writes the bytes of rare letters as <0xC3><0xA9>.
            return pieces.decode(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check_turns(turns: list[tuple[str, str]]) -> None:
    if not turns:
        raise ConversationError("the conversation has no turn: give at least one question and its answer")
    for index, (question, answer) in enumerate(turns):
        if answer is None or not question.strip() or not answer.strip():
            raise ConversationError(
                f"turn {index} is {question!r}, {answer!r}: neither question nor answer may be empty"
            )
        if SEG_MARKER in question:
            raise ConversationError(f"the question {question!r} holds {SEG_MARKER}: only answers may, take it out")


def check_groups(processor: PixelLMProcessor) -> None:
    """Make sure that this tokenizer keeps seg groups whole: write a probe conversation and read it back.

    Raises:
        ProcessorError: naming what came out differently.
    """
    answer = "The red circle {seg}, the blue square {seg} and two more: {seg} {seg}.".replace("{seg}", SEG_MARKER)
    turns = [("Which shapes are there?", answer), ("And which of them is green?", answer)]
    writer = processor._new_writer()
    answers = []
    for index, (question, text) in enumerate(turns):
        processor._add_question(writer, question, index)
        start = len(writer.ids)
        processor._add_answer(writer, text)
        answers.append(writer.ids[start:])
    group, end = processor.seg_token_ids, processor.end_token_id
    if len({*group, processor.image_token_id, end}) != len(group) + 2:
        raise _broken("two of its tokens share an id")
    if writer.ids.count(processor.image_token_id) != 1:
        raise _broken(f"a conversation holds {writer.ids.count(processor.image_token_id)} image placeholders, not 1")
    expected = answer.count(SEG_MARKER)
    for ids in answers:
        starts, broken = whole_groups(ids, group)
        if len(starts) != expected or broken or any(ids[at : at + len(group)] != group for at in starts):
            raise _broken(f"{expected} groups came out as {len(starts)} whole and {broken} broken ones")
        if ids[-1] != end or ids.count(end) != 1:
            raise _broken("an answer does not end with the one end token it should hold")
        decoded = processor.decode_answer(ids)
        # A tokenizer may fold case or lose words it does not know; the groups must stay where they were all the same.
        known = processor.tokenizer.unk_token_id not in ids
        if decoded.num_groups != expected or (known and _letters(decoded.marked_text) != _letters(answer)):
            raise _broken(f"{answer!r} was read back as {decoded.marked_text!r}")


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _broken(what: str) -> ProcessorError:
    return ProcessorError(f"the tokenizer does not keep seg groups whole ({what}): use another base or conversation")
