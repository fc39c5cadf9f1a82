"""Reading an answer's text: where its groups stand and which words name them.

A marked text is an answer in which every target is written SEG_MARKER. It is tidy when there is one space between the
marker and the words around it, and none before closing or after opening punctuation.
"""

import re
from dataclasses import dataclass

from .structures import SEG_MARKER

_CLOSING = re.escape(".,;:!?)]}")
_AFTER_MARK = rf"(?=[{_CLOSING}]+(?:\s|$|{re.escape(SEG_MARKER)}))"
_SPACE_BEFORE_CLOSING = re.compile(rf"[ \t]+{_AFTER_MARK}")
_SPACE_AFTER_OPENING = re.compile(r"(?<=[(\[])[ \t]+")
_SPACES = re.compile(r"[ \t]{2,}")
_COMMA_BEFORE_FULL_STOP = re.compile(r"[,;:]\s*(?=[.!?](?:\s|$))")

# A mark ends a phrase only where a space follows: not in 3.5 or 10:30.
_PHRASE_BREAK = re.compile(r"[.!?;:,]+(?:\s+|$)|\n+")
# Words that lead to a name without being part of it: connectives, and a pronoun with its verb. A bare "that" stays: it
# may belong to the name, and a name with a word too many is still found by its end.
_LEAD = re.compile(
    r"^(?:and|or|also|then|plus|as well as|sure|yes"
    r"|(?:it|this|that|here|there|they|these|those)(?:['’](?:s|re)|\s+(?:is|are)))(?:\s+|$)",
    re.IGNORECASE,
)
_TRAIL = re.compile(r"\s+(?:is|are)$", re.IGNORECASE)
_WRAPPING = " \t\"'“”‘’([{"


@dataclass(frozen=True)
class DecodedAnswer:
    """An answer read back from ids.

    text: the words alone. marked_text: every whole group written SEG_MARKER. phrases: the words that name each group.
    num_groups: whole groups. num_broken: runs of seg tokens whose length is not a multiple of the group size; of such a
    run the whole groups at its beginning count, as in the model.
    """

    text: str
    marked_text: str
    phrases: list[str]
    num_groups: int
    num_broken: int


def tidy_text(text: str) -> str:
    """Join the pieces of a decoded text the way it would have been written."""
    text = _SPACES.sub(" ", text)
    text = _SPACE_BEFORE_CLOSING.sub("", text)
    return _SPACE_AFTER_OPENING.sub("", text).strip()


def remove_seg_markers(marked_text: str) -> str:
    """The words of a marked text alone."""
    words = tidy_text(marked_text.replace(SEG_MARKER, " "))
    return _COMMA_BEFORE_FULL_STOP.sub("", words)


def phrases_before_groups(marked_text: str) -> list[str]:
    """The words that name each group, in order: "" where a group follows another without words between them.

    A phrase reaches back to the previous group or to the last sentence or list mark with words after it, without a
    leading connective ("and", "also", ...), a leading "it is", "here are", ... and a trailing "is" or "are". It may
    begin too early ("a dog and the red circle"), but it ends with the name.
    """
    return [_last_phrase(words) for words in marked_text.split(SEG_MARKER)[:-1]]


def _last_phrase(words: str) -> str:
    for part in reversed(_PHRASE_BREAK.split(words)):
        phrase = part.strip(_WRAPPING)
        while (shorter := _LEAD.sub("", phrase).strip(_WRAPPING)) != phrase:
            phrase = shorter
        phrase = _TRAIL.sub("", phrase)
        if phrase:
            return phrase
    return ""
