"""Every HTML page we write, from one template: sections of articles, each words, images and perhaps a table.

A page is one file without scripts or links to other places. What words hold is shown as text and never becomes markup.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from model.overlay import Colour, text_colour

TEMPLATE = Path(__file__).with_name("page.html.j2")
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Piece:
    """Some text. colour: of a marker behind it. style: "learned" or "prompt", of training text."""

    text: str
    colour: Colour | None = None
    style: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Pieces of text, with a label in front where there is one."""

    pieces: Sequence[Piece]
    label: str = ""

    @classmethod
    def plain(cls, text: str, label: str = "") -> "Paragraph":
        """One piece of plain text."""
        return cls((Piece(text),), label)


@dataclass(frozen=True)
class Figure:
    """An image on the page. source: a data address, see `embed_image`."""

    caption: str
    source: str


@dataclass(frozen=True)
class Article:
    """Words, images beside each other, words, a table. shown_at: the anchor of the same article further up, to which
    the page then only links, by its title."""

    before: Sequence[Paragraph] = ()
    figures: Sequence[Figure] = ()
    after: Sequence[Paragraph] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Piece]] = ()
    note: str = ""
    anchor: str = ""
    title: str = ""
    shown_at: str = ""


@dataclass(frozen=True)
class Section:
    """Articles under a title; without one they just follow."""

    articles: Sequence[Article]
    title: str = ""


def render_page(title: str, sections: Sequence[Section], intro: Paragraph | None = None) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["text_colour"] = text_colour
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, intro=intro) + "\n"


def embed_image(image: np.ndarray, longest_side: int | None = None, kind: str = "PNG") -> str:
    """An image uint8 (H, W, 3) as a data address, at most `longest_side` pixels long. kind: "PNG" or "JPEG"."""
    shown, buffer = Image.fromarray(image), io.BytesIO()
    if longest_side is not None:
        shown.thumbnail((longest_side, longest_side))
    shown.save(buffer, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
