"""From pieces of text to token ids, exactly as the tokenizer does it, without its bookkeeping around each piece."""

from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

_REMEMBERED = 64


class PieceEncoder:
    """Encodes pieces of a conversation, none of which gets a beginning or an end.

    A tokenizer with a core in Rust is asked there, which takes a quarter of the time; others by their own `encode`. The
    few texts of a conversation format are remembered.

    Args:
        tokenizer: as `PixelLMProcessor` has it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        plain = isinstance(tokenizer, PreTrainedTokenizerFast) and (
            type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        )
        self._core = tokenizer._tokenizer if plain else None
        self._remembered = lru_cache(maxsize=_REMEMBERED)(self._scaffold)

    def words(self, text: str) -> list[int]:
        """Ids of words that people wrote: names of special tokens in them are words like any other."""
        return self._ids(text, split_special_tokens=True)

    def scaffold(self, text: str) -> list[int]:
        """Ids of a text that the conversation format puts around words; it may hold special tokens."""
        return list(self._remembered(text))

    def _scaffold(self, text: str) -> tuple[int, ...]:
        return tuple(self._ids(text, split_special_tokens=False))

    def _ids(self, text: str, split_special_tokens: bool) -> list[int]:
        core = self._core
        if core is None:
            return self._tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
            )
        # What the tokenizer's own `encode` sets before every call, too.
        core.encode_special_tokens = split_special_tokens
        if core.truncation is not None:
            core.no_truncation()
        if core.padding is not None:
            core.no_padding()
        return core.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokenizer": self._tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_tokenizer"])  # type: ignore[misc]
