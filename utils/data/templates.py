"""The words of questions and answers. Templates know words and nothing of files.

A phrasing ties an answer to its question: who reads the question knows how the answer will begin, so that what is
left to learn is whether the thing is there, not which of several sentences was drawn. In answers the words that name
a target stand between a punctuation mark and its marker.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from model.structures import SEG_MARKER
from utils.data.samples import Target, Turn, kind_by_count

Drawn = TypeVar("Drawn")

_ASKED = "<asked>"
_NAMED = "<named>"


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A way of asking for things, of naming them, and of saying that there are none."""

    asking: str
    found: str
    absent: str

    def question(self, asked: Sequence[str]) -> str:
        """The question for `asked`, one or several things."""
        return _capitalise(self.asking.replace(_ASKED, join_names(asked)))

    def answer(self, names: Sequence[str]) -> str:
        """The answer that names `names`, each followed by SEG_MARKER; the number of several comes first, so that who
        lists them knows how far the list goes.
        """
        number = f"{number_word(len(names))}: " if len(names) > 1 else ""
        return _capitalise(self.found.replace(_NAMED, number + mark_names(names)))

    def denial(self, asked: Sequence[str]) -> str:
        """The answer when nothing in the image is what was asked for."""
        return _capitalise(self.absent.replace(_ASKED, join_names(asked)))

    def turn(self, asked: Sequence[str], targets: tuple[Target, ...]) -> Turn:
        """A turn that asks for `asked` and names every target, or says that there are none."""
        answer = self.answer([target.name for target in targets]) if targets else self.denial(asked)
        return Turn(self.question(asked), answer, targets, kind_by_count(len(targets)))


_PHRASINGS = (
    Phrasing("Please segment <asked>.", "Sure, <named>.", "Sorry, nothing here matches <asked>."),
    Phrasing("Where in this picture can I see <asked>?", "Here, <named>.", "Nowhere, nothing matches <asked>."),
    Phrasing("Can you find <asked>?", "Yes, <named>.", "No, I see no match for <asked>."),
    Phrasing("Show me <asked>.", "<named>.", "There is no match for <asked>."),
    Phrasing("Mark <asked> with a mask.", "Marked, <named>.", "Nothing to mark, as nothing matches <asked>."),
    Phrasing("Which pixels belong to <asked>?", "These, <named>.", "None, as nothing matches <asked>."),
    Phrasing("Give me a mask of <asked>.", "As asked, <named>.", "There is nothing like <asked> in this picture."),
    Phrasing("I am looking for <asked>.", "Found, <named>.", "Not found, no match for <asked>."),
)

_ALL_PHRASINGS = (
    *_PHRASINGS,
    Phrasing("Outline <asked> for me.", "Outlined, <named>.", "Nothing to outline, no match for <asked>."),
    Phrasing("Could you point out <asked>?", "Gladly, <named>.", "I cannot, as nothing matches <asked>."),
    Phrasing("Cut out <asked>, please.", "Cut out, <named>.", "Nothing to cut out, no match for <asked>."),
    Phrasing("What part of the image shows <asked>?", "This part, <named>.", "No part shows <asked>."),
    Phrasing("Separate <asked> from the rest.", "Separated, <named>.", "Nothing to separate, no match for <asked>."),
    Phrasing("Do you see <asked>? If so, mask it.", "I do, <named>.", "I do not see <asked>."),
    Phrasing("Highlight <asked>.", "Highlighted, <named>.", "Nothing to highlight, no match for <asked>."),
    Phrasing("Help me locate <asked> in the photo.", "Located, <named>.", "I could not locate <asked>."),
    Phrasing("In this image, select <asked>.", "Selected, <named>.", "Nothing selected, no match for <asked>."),
    Phrasing("Draw the region of <asked>.", "Drawn, <named>.", "Nothing drawn, no match for <asked>."),
    Phrasing("I need the exact shape of <asked>.", "There you go, <named>.", "I am sorry, nothing matches <asked>."),
    Phrasing("Look for <asked> and segment what you find.", "I found it, <named>.", "I found nothing like <asked>."),
    Phrasing("Trace <asked>.", "Traced, <named>.", "Nothing to trace, no match for <asked>."),
    Phrasing("Tell me which area is covered by <asked>.", "This area, <named>.", "No area is covered by <asked>."),
    Phrasing("Would you mask <asked>?", "Of course, <named>.", "I would, but nothing matches <asked>."),
    Phrasing("Pick out <asked>.", "Picked out, <named>.", "Nothing to pick out, no match for <asked>."),
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_REASONING_REQUESTS = (
    "Answer with a mask.",
    "Please show it with a mask.",
    "Segment the answer.",
    "Mark the answer in the picture.",
)
_ALL_REQUESTS = (
    *_REASONING_REQUESTS,
    "Outline what answers this.",
    "Point to it with a segmentation mask.",
    "Give the answer as a region of the image.",
    "Which pixels are meant?",
)
_REASONS_TOO = ("Explain your answer.", "Tell me why.", "Give the reason as well.", "Add a short explanation.")

REGION_ASKED_FOR = "the region asked for"
"""Names the target of a question that describes without naming."""

# Phrases that begin with one of these take no further article.
_BEGINS_WITHOUT_ARTICLE = frozenset(
    {
        *("the", "a", "an", "this", "that", "these", "those", "all", "both", "every", "each", "any", "some", "no"),
        *("either", "neither", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        *("my", "his", "her", "its", "their", "our", "your", "who", "what", "which", "where"),
        *("in", "on", "at", "under", "behind", "beside", "between", "near", "next", "to", "of", "with"),
        *("someone", "something", "everything", "everyone", "anything"),
    }
)
_CLAUSE_ENDS = re.compile("[,.;:!?]")
_LIST_PUNCTUATION = str.maketrans(dict.fromkeys(",;:", " "))


def pick_phrasing(rng: np.random.Generator, more: bool) -> Phrasing:
    """One of the phrasings; `more` draws from a list three times as long."""
    return _draw(rng, _ALL_PHRASINGS if more else _PHRASINGS)


def reasoning_question(rng: np.random.Generator, question: str, more: bool) -> str:
    """A question that is a sentence of its own, followed by the request for a mask."""
    request = _draw(rng, _ALL_REQUESTS if more else _REASONING_REQUESTS)
    return f"{_end_sentence(question)} {request}"


def add_reason_request(rng: np.random.Generator, question: str) -> str:
    """The question, followed by the request for an explanation."""
    return f"{question} {_draw(rng, _REASONS_TOO)}"


def named_answer(names: Sequence[str]) -> str:
    """The plain answer that names `names`, each followed by SEG_MARKER."""
    return _capitalise(f"{mark_names(names)}.")


def no_match_answer() -> str:
    """The answer to a question of any form that nothing in the image answers."""
    return "Nothing in this picture fits."


def target_name(phrase: str) -> str:
    """A description as it stands before a marker: with an article, and without the punctuation that ends or parts
    lists.

    >>> target_name("cup on the wall, second row.")
    'the cup on the wall second row'
    """
    words = phrase.translate(_LIST_PUNCTUATION).split()
    text = " ".join(words).rstrip(".?! ")
    if not text or words[0].lower() in _BEGINS_WITHOUT_ARTICLE:
        return text
    return f"the {text}"


def names_before_markers(answer: str) -> list[str]:
    """The words before each SEG_MARKER, back to the last punctuation or marker.

    >>> names_before_markers("Use the cup {seg}, and the blue tray {seg}.")
    ['Use the cup', 'the blue tray']
    """
    before = answer.split(SEG_MARKER)[:-1]
    return [_CLAUSE_ENDS.split(words)[-1].strip().removeprefix("and ") for words in before]


def join_names(things: Sequence[str]) -> str:
    """'a', 'a and b', 'a and b and c'.

    With one word between all of them, an answer decides item by item whether more follows; "a, b and c" would have to
    know how many there are before it says the second.
    """
    return " and ".join(things)


def mark_names(names: Sequence[str]) -> str:
    """The list of `names`, each followed by SEG_MARKER."""
    return join_names([f"{name} {SEG_MARKER}" for name in names])


def number_word(number: int) -> str:
    """ "zero" to "ten", then digits."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def _draw(rng: np.random.Generator, choices: Sequence[Drawn]) -> Drawn:
    return choices[int(rng.integers(len(choices)))]


def _end_sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else text + "."


def _capitalise(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]
