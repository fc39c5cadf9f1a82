"""An answer as one page: its text with every named thing in its colour, the image, the overlay, the targets."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from .answer_text import tidy_text
from .answers import Answer
from .overlay import draw_overlay, target_colour, text_colour, to_printable
from .structures import SEG_MARKER

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #111; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 46%; }
img { max-width: 100%; height: auto; }
figcaption { color: #666; }
mark { padding: 0 .25em; border-radius: .2em; }
td, th { padding: .15em .8em .15em 0; text-align: left; }
"""


def coloured_parts(marked_text: str, phrases: list[str]) -> list[tuple[str, int | None]]:
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
    said = "".join(_coloured(text, number) for text, number in coloured_parts(answer.marked_text, answer.phrases))
    rows = zip(answer.phrases, answer.boxes, answer.areas, answer.scores, strict=True)
    targets = "".join(
        f"<tr><td>{_coloured(phrase or '(unnamed)', number)}</td><td>{list(box)}</td><td>{area}</td>"
        f"<td>{score:.3f}</td></tr>"
        for number, (phrase, box, area, score) in enumerate(rows)
    )
    head = "<tr><th>target</th><th>box</th><th>pixels</th><th>score</th></tr>"
    overlay = draw_overlay(image, answer.masks, answer.phrases)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Answer</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        + (f"<p><b>{_text(question)}</b></p>\n" if question else "")
        + f"<p>{said}</p>\n{_figure(image, 'image')}{_figure(overlay, 'answer')}\n"
        + (f"<table>{head}{targets}</table>\n" if targets else "")
        + "</body></html>\n"
    )


def _text(text: str) -> str:
    spaced = ("&#32;" if text[:1].isspace() else "", "&#32;" if text[-1:].isspace() else "")
    return spaced[0] + escape(to_printable(tidy_text(text))) + spaced[1]


def _coloured(text: str, number: int | None) -> str:
    if number is None:
        return _text(text)
    back, front = target_colour(number), text_colour(target_colour(number))
    return f'<mark style="background: rgb{back}; color: rgb{front}">{_text(text)}</mark>'


def _figure(image: np.ndarray, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
