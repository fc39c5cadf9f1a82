"""A page per data set: images with their masks, and conversations with what is learned in another colour."""

import base64
import html
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from utils.data.check.examine import OpenImage, named_trouble
from utils.data.check.survey import spread
from utils.data.readers.base import Reader
from utils.data.samples import NO_IMAGE, Conversation, Sample

Overlay = Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray]
"""(image (H, W, 3), masks (Q, H, W) bool, names) -> image (h, w, 3)."""

Rendered = Callable[[Conversation, bool], Sequence[tuple[str, bool]]]
"""(conversation, whether it is about an image) -> its text in pieces, each with whether it is learned."""

_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto;background:#fff;color:#222}img{max-width:100%}"
    ".said{white-space:pre-wrap;color:#777}.learned{color:#b34700;font-weight:bold}section{margin-bottom:3em}"
)


def as_written(conversation: Conversation, with_image: bool) -> list[tuple[str, bool]]:
    """The conversation in plain words, for when no model says how it writes it."""
    pieces = []
    for turn in conversation:
        pieces += [(f"Q: {turn.question}\nA: ", False), (f"{turn.answer}\n", True)]
    return pieces


def page(title: str, reader: Reader, count: int, open_image: OpenImage, overlay: Overlay, rendered: Rendered) -> str:
    """HTML with `count` samples as training draws them; one that cannot be read says why."""
    cards = [_card(reader, index, open_image, overlay, rendered) for index in spread(len(reader), count) if len(reader)]
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    legend = 'what is <span class="learned">learned</span> stands out from the prompt'
    return f"{head}<h1>{html.escape(title)}</h1><p>{legend}</p>{''.join(cards)}\n"


def _card(reader: Reader, index: int, open_image: OpenImage, overlay: Overlay, rendered: Rendered) -> str:
    try:
        sample = reader.read(index, np.random.default_rng(index))
        parts = [f"<h2>{html.escape(sample.sample_id)}</h2>"]
        for conversation in sample.conversations:
            parts.append(_image(sample, conversation, open_image, overlay))
            parts.append(_text(rendered(conversation, sample.image_path != NO_IMAGE)))
    except Exception as error:
        reason = named_trouble(error)
        if reason is None:
            raise
        parts = [f"<p>{html.escape(': '.join(reason))}</p>"]
    return f"<section>{''.join(parts)}</section>"


def _image(sample: Sample, conversation: Conversation, open_image: OpenImage, overlay: Overlay) -> str:
    if sample.image_path == NO_IMAGE:
        return ""
    image = open_image(sample.image_path)
    targets = [target for turn in conversation for target in turn.targets]
    masks = [target.decode() == 1 for target in targets]
    stacked = np.array(masks, dtype=bool).reshape(len(masks), *image.shape[:2])
    stream = io.BytesIO()
    Image.fromarray(overlay(image, stacked, [target.name for target in targets])).save(stream, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _text(pieces: Sequence[tuple[str, bool]]) -> str:
    marked = [
        f'<span class="learned">{html.escape(text)}</span>' if learned else html.escape(text)
        for text, learned in pieces
    ]
    return f'<p class="said">{"".join(marked)}</p>'
