"""A long list in a JSON file, an item at a time: a gigabyte of annotations need not be in memory at once."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from utils.data.errors import DataError
from utils.data.files import parse_json, read_bytes, require

_PIECE = 8 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def iterate_json_list(path: str) -> Iterator[Any]:
    """The items of the list that the file holds, UTF-8 with or without a byte order mark.

    DataError, as of `parse_json`, at the first place that is no JSON, and where the file holds no list.
    """
    try:
        yield from _Text(path).items()
    except (_NotAsExpected, json.JSONDecodeError, RecursionError, UnicodeDecodeError, OSError) as error:
        # What is wrong, and in which line, the whole file tells.
        require(parse_json(read_bytes(path), path), list, path)
        raise DataError(f"{path} was changed while it was read; wait until it is complete, and start again") from error


class _NotAsExpected(ValueError):
    """The text is no list of JSON values."""


class _Text:
    """A window on a file's text that moves on as items are taken from it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._text = ""
        self._at = 0
        self._is_complete = False

    def items(self) -> Iterator[Any]:
        scan = json.JSONDecoder().raw_decode
        with open(self._path, "rb") as stream:
            decoder = codecs.getincrementaldecoder("utf-8-sig")()

            def read_on() -> None:
                """Drop what was taken; read more."""
                piece = stream.read(max(_PIECE, len(self._text) - self._at))
                self._is_complete = not piece
                self._text = self._text[self._at :] + decoder.decode(piece, final=self._is_complete)
                self._at = 0

            def sign() -> str:
                """The next sign that is no space, or nothing at the end of the file; it is not taken."""
                while True:
                    self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
                    if self._at < len(self._text) or self._is_complete:
                        return self._text[self._at : self._at + 1]
                    read_on()

            def item() -> Any:
                while True:
                    try:
                        value, end = scan(self._text, self._at)
                    except (json.JSONDecodeError, RecursionError):
                        if self._is_complete:
                            raise
                    else:
                        if end < len(self._text) or self._is_complete:  # else it may go on in the next piece
                            self._at = end
                            return value
                    read_on()

            def take(expected: str) -> str:
                found = sign()
                if not found or found not in expected:
                    raise _NotAsExpected(f"{found!r} instead of one of {expected!r}")
                self._at += 1
                return found

            take("[")
            if sign() == "]":
                take("]")
            else:
                following = ","
                while following == ",":
                    sign()
                    yield item()
                    following = take(",]")
            if sign():
                raise _NotAsExpected("more after the list")
