"""The release's way from a conversation's text to token ids and labels, id for id (docs/facts.md, C).

A processor goes it where its `text_rules` is "release". Our own way gives the same ids and labels wherever all of a
conversation fits; the release cuts a long one anywhere, and it reads its image where the text has it.

Axes: C conversations, T tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .conversation_formats import IMAGE_END_TOKEN, IMAGE_START_TOKEN, IMAGE_TOKEN, ConversationFormatError
from .structures import IGNORE_TOKEN, LLAVA_LLAMA_2, LLAVA_V1, PixelLMError

# What ends the part of a round that is not learned. The release asks "is it llava_v1, or is chatml a true value?", and
# so takes the second kind never: with "<s>ASSISTANT: " its llava_llama_2 cannot be labelled at all (fact C1).
_SEPARATORS = {LLAVA_V1: " ASSISTANT: ", LLAVA_LLAMA_2: "[/INST] "}
_SEPARATORS_AS_WRITTEN = {LLAVA_V1: " ASSISTANT: ", LLAVA_LLAMA_2: "<s>ASSISTANT: "}

# Of an instruction's own tokens, those that the count of its labels leaves out: the beginning token, and the space that
# the answer's first word takes over (fact C3).
_NOT_COUNTED = 2


class ReleaseTextError(PixelLMError):
    """A text cannot be treated as the release treats it."""


def answer_separator(conversation_format: str, *, as_written: bool = False) -> str:
    """The text after which a round is learned.

    Args:
        conversation_format: "llava_v1" or "llava_llama_2"; ConversationFormatError for others.
        as_written: what the release's code takes instead of what it means (fact C1).
    """
    table = _SEPARATORS_AS_WRITTEN if as_written else _SEPARATORS
    if conversation_format not in table:
        raise ConversationFormatError(
            f"the release knows no labels for the conversation format {conversation_format!r}: "
            f"choose one of {', '.join(table)}"
        )
    return table[conversation_format]


def wrap_image_tokens(text: str) -> str:
    """Every image's placeholder between its start and end tokens (fact C5)."""
    return text.replace(IMAGE_TOKEN, f"{IMAGE_START_TOKEN}{IMAGE_TOKEN}{IMAGE_END_TOKEN}")


class LegacyTokenizer:
    """What the slow Llama tokenizer of the release's time makes of a text, by any Llama tokenizer of today.

    Every stretch between special tokens is a text of its own, with a space put before it; the tokens that PixelLM
    added take the blanks around them away.

    Args:
        tokenizer: one that `PixelLMProcessor.prepare_tokenizer` went through. added: names of the tokens that it added.

    Raises:
        ReleaseTextError: no Llama tokenizer.
    """

    def __init__(self, tokenizer: Any, added: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        own = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
        if None in own or len(set(own)) != len(own):
            raise ReleaseTextError(
                f"the release's texts need a Llama tokenizer, whose beginning, end and unknown tokens differ; found "
                f"{own}: choose other text_rules"
            )
        self._added = set(added)
        self._special = re.compile("(" + "|".join(re.escape(name) for name in [*own, *added]) + ")")
        # Some of today's tokenizers put the space only where none is.
        plain, spaced = (self._encode(text) for text in ("x", " x"))
        self._space = " " if plain == spaced else ""

    def ids(self, text: str) -> list[int]:
        """The beginning token, then the text."""
        pieces = self._special.split(text)  # texts at even places, special tokens between them
        ids = [self._tokenizer.bos_token_id]
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(piece))
                continue
            if place and pieces[place - 1] in self._added:
                piece = piece.lstrip()
            if place + 1 < len(pieces) and pieces[place + 1] in self._added:
                piece = piece.rstrip()
            if piece:
                ids += self._encode(self._space + piece)
        return ids

    def ids_with_image(self, text: str, image_id: int) -> list[int]:
        """The same, with `image_id` for every placeholder; the parts around it are tokenised apart."""
        first, *others = (self.ids(part) for part in text.split(IMAGE_TOKEN))
        for part in others:
            first += [image_id, *part[1:]]
        return first

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)


@dataclass(frozen=True)
class ReleaseSequences:
    """input_ids (C, T) long, labels (C, T) long with -100 where nothing is learned, attention_mask (C, T) bool."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor


def encode_sequences(
    texts: Sequence[str],
    tokenizer: LegacyTokenizer,
    separator: str,
    *,
    end: str,
    image_id: int,
    padding_id: int = 0,
    longest: int | None = None,
) -> ReleaseSequences:
    """Conversations about any images as one batch.

    From the first text without an end token on, every label is the sequence's own id, padding included (fact C2).

    Args:
        texts: C conversations, written out whole, markers around their placeholders.
        separator: see `answer_separator`. end: the end token's name. image_id: stands for an image.
        longest: sequences are cut there (fact C4), answers, groups and all; None for never.

    Raises:
        ReleaseTextError: a round does not hold the separator once.
    """
    sequences = [tokenizer.ids_with_image(text, image_id) for text in texts]
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([sequence + [padding_id] * (width - len(sequence)) for sequence in sequences], dtype=torch.long)
    labels = ids.clone()
    for sequence, text in zip(labels, texts, strict=True):
        if end not in text:
            break
        _ignore_questions(sequence, text, tokenizer, separator, end, image_id)
    mask = ids != padding_id
    return ReleaseSequences(ids[:, :longest], labels[:, :longest], mask[:, :longest])


def _ignore_questions(
    labels: torch.Tensor, text: str, tokenizer: LegacyTokenizer, separator: str, end: str, image_id: int
) -> None:
    """Walk over the rounds by the lengths they have alone (fact C3)."""
    labels[0] = IGNORE_TOKEN
    start = 1
    for round_text in filter(None, text.split(end)):
        asked, *answered = round_text.split(separator)
        if len(answered) != 1:
            raise ReleaseTextError(
                f"the release cannot label {round_text[:60]!r} …: its separator {separator!r} makes "
                f"{len(answered) + 1} part(s) of it, not 2; choose other text_rules"
            )
        instruction = len(tokenizer.ids_with_image(asked + separator, image_id)) - _NOT_COUNTED
        labels[start : start + instruction] = IGNORE_TOKEN
        start += len(tokenizer.ids_with_image(round_text, image_id))
    labels[start:] = IGNORE_TOKEN
