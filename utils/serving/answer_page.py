"""An answer as one page: its text with every named thing in its colour, the image, the overlay, the targets."""

import numpy as np

from model.answer_text import tidy_text
from model.answers import Answer
from model.overlay import draw_overlay, target_colour, to_printable
from model.structures import SEG_MARKER
from utils.drawing.pages import Article, Figure, Paragraph, Piece, Section, embed_image, render_page

COLUMNS = ("target", "box", "pixels", "score")


def split_phrases(marked_text: str, phrases: list[str]) -> list[tuple[str, int | None]]:
    """A marked text in pieces: words, and the phrases that name targets with the target's number.

    phrases: as in `Answer`. A target whose phrase does not stand before its marker is not seen in the pieces.
    """
    parts: list[tuple[str, int | None]] = []
    *before, rest = marked_text.split(SEG_MARKER)
    skipped = len(phrases) - len(before)  # targets of the question, by the release's rule
    for number, words in enumerate(before, start=max(0, skipped)):
        phrase = phrases[number] if number < len(phrases) else ""
        place = words.rfind(phrase) if phrase else -1
        if place < 0:
            parts.append((words, None))
            continue
        parts += [(words[:place], None), (phrase, number), (words[place + len(phrase) :], None)]
    return [part for part in [*parts, (rest, None)] if part[0]]


def answer_page(image: np.ndarray, answer: Answer, question: str = "") -> str:
    """A whole HTML page without anything outside it: no script, the images inside.

    image: uint8 RGB (H, W, 3), the one asked about. Whatever question and answer hold is shown as text.
    """
    parts = split_phrases(answer.marked_text, answer.phrases)
    text = Paragraph([_make_piece(part, number) for part, number in parts])
    targets = zip(answer.phrases, answer.boxes, answer.areas, answer.scores, strict=True)
    rows = [
        (_make_piece(phrase or "(unnamed)", number), Piece(str(list(box))), Piece(str(area)), Piece(f"{score:.3f}"))
        for number, (phrase, box, area, score) in enumerate(targets)
    ]
    overlay = draw_overlay(image, answer.masks, answer.phrases)
    figures = [Figure("image", embed_image(image)), Figure("answer", embed_image(overlay))]
    asked = [Paragraph.plain(to_printable(question), "Q")] if question else []
    article = Article(before=[*asked, text], figures=figures, columns=COLUMNS, rows=rows)
    return render_page("Answer", [Section([article])])


def _make_piece(text: str, number: int | None) -> Piece:
    """One line of text in the colour of its target; blanks at its ends stay, so that words stay apart."""
    before, after = " " if text[:1].isspace() else "", " " if text[-1:].isspace() else ""
    return Piece(f"{before}{to_printable(tidy_text(text))}{after}", None if number is None else target_colour(number))
