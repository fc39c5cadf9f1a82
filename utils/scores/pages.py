"""index.html: answers beside their pictures and truths, best, worst, at random and by cause of failure.

One file without scripts, links to other places or files beside it: it opens from a disk. Words of questions and answers
are shown as they are and never become markup.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.data.samples import KINDS
from utils.evaluation import Scored
from utils.scores.lines import CAUSES, causes

PAGE = "index.html"
PER_SECTION = 8

SIDE = 280
"""Longest side in pixels of a picture on the page."""

# Three pictures of this many bytes are 26,000 characters: 500 answers with their words, all of them quotation marks
# that take six letters, stay under 20 MB.
_MOST_BYTES = 6_500
_MOST_LETTERS = 600
_QUALITIES = (80, 60, 40, 25)

Draw = Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray]
Open = Callable[[str], np.ndarray]

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em auto; max-width: 62em; padding: 0 1em; color: #111; background: #fff }}
article {{ border-top: 1px solid #ccc; padding: .6em 0 }}
.row {{ display: flex; gap: .5em; flex-wrap: wrap }}
figure {{ margin: 0 }} figcaption, .note {{ color: #666; font-size: 85% }}
img {{ max-width: 100%; height: auto }}
p {{ margin: .3em 0; overflow-wrap: anywhere; white-space: pre-wrap }}
</style></head><body>
<h1>{title}</h1>
"""


class ByKind:
    """Keeps some answers of every kind for gallery.png, one about a picture."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._kept: dict[str, list[Scored]] = {kind: [] for kind in KINDS}

    def add(self, scored: Scored) -> None:
        """Take in one scored question."""
        kept, path = self._kept[scored.question.turn.kind], scored.question.image_path
        if len(kept) < self._wanted and all(path != other.question.image_path for other in kept):
            kept.append(scored)

    def chosen(self) -> list[Scored]:
        """At most the wanted number, the kinds taking turns."""
        longest = max(len(kept) for kept in self._kept.values())
        turns = [kept[place] for place in range(longest) for kept in self._kept.values() if place < len(kept)]
        return turns[: self._wanted]


@dataclass
class Chosen:
    """Keeps some answers of a run: the best and worst of those with targets, some at random, and some by cause.

    per_section: how many of each. The same run keeps the same ones.
    """

    per_section: int = PER_SECTION
    _seen: int = 0
    _best: list[tuple[float, int, Scored]] = field(default_factory=list)
    _worst: list[tuple[float, int, Scored]] = field(default_factory=list)
    _drawn: list[Scored] = field(default_factory=list)
    _failed: dict[str, list[Scored]] = field(default_factory=lambda: {cause: [] for cause in CAUSES})
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, scored: Scored) -> None:
        """Take in one scored question."""
        iou, most = scored.shown.iou, self.per_section
        if scored.question.turn.targets:
            self._best = _first([*self._best, (-iou, self._seen, scored)], most)
        self._worst = _first([*self._worst, (iou, self._seen, scored)], most)
        # Every question so far has the same chance to be among those kept.
        if len(self._drawn) < most:
            self._drawn.append(scored)
        elif (place := int(self._rng.integers(self._seen + 1))) < most:
            self._drawn[place] = scored
        for cause in causes(scored):
            if len(self._failed[cause]) < most:
                self._failed[cause].append(scored)
        self._seen += 1

    def sections(self) -> dict[str, list[Scored]]:
        """The kept answers by title; titles without any are left out."""
        found = {
            "best": [scored for *_, scored in self._best],
            "worst": [scored for *_, scored in self._worst],
            "at random": list(self._drawn),
            **{f"cause: {cause}": list(kept) for cause, kept in self._failed.items()},
        }
        return {title: kept for title, kept in found.items() if kept}


def _first(kept: list[tuple[float, int, Scored]], most: int) -> list[tuple[float, int, Scored]]:
    return sorted(kept, key=lambda one: one[:2])[:most]


def write_page(path: Path, title: str, sections: dict[str, list[Scored]], draw: Draw, open_picture: Open) -> None:
    """Write the page. An answer that several sections hold is drawn in the first and linked from the others.

    draw: (picture uint8 (H, W, 3), bool masks (Q, H, W), phrases) -> a picture with its masks. open_picture: by path.
    """
    places: dict[tuple[str, int], str] = {}
    with path.open("w", encoding="utf-8") as page:
        page.write(_HEAD.format(title=escape(title)))
        links = [
            f'<a href="#s{number}">{escape(name)}</a> ({len(sections[name])})' for number, name in _order(sections)
        ]
        page.write(f"<p>{' · '.join(links)}</p>\n")
        for number, name in _order(sections):
            page.write(f'<h2 id="s{number}">{escape(name)}</h2>\n')
            for scored in sections[name]:
                key = (scored.question.sample_id, scored.question.number)
                if key in places:
                    text = f"{_cut(scored.question.turn.question)} (shown above)"
                    page.write(f'<p><a href="#{places[key]}">{escape(text)}</a></p>\n')
                else:
                    places[key] = f"a{len(places)}"
                    page.write(_article(scored, places[key], draw, open_picture))
        page.write("</body></html>\n")


def _order(sections: dict[str, list[Scored]]) -> list[tuple[int, str]]:
    return list(enumerate(sections))


def _article(scored: Scored, place: str, draw: Draw, open_picture: Open) -> str:
    turn, answer = scored.question.turn, scored.answer
    picture = open_picture(scored.question.image_path)
    names = [target.name for target in turn.targets]
    pictures = {
        "picture": _small(picture, answer.masks[:0])[0],
        "truth": draw(*_small(picture, scored.truths == 1), names),
        "prediction": draw(*_small(picture, answer.masks), answer.phrases),
    }
    figures = "".join(
        f'<figure><img alt="{name}" src="{_embedded(shown)}"><figcaption>{name}</figcaption></figure>'
        for name, shown in pictures.items()
    )
    note = f"{turn.kind}, {scored.protocol}, IoU {scored.shown.iou:.3f}"
    if why := causes(scored):
        note += f", {', '.join(why)}"
    return (
        f'<article id="{place}"><p><b>Q</b> {escape(_cut(turn.question))}</p><div class="row">{figures}</div>'
        f"<p><b>A</b> {escape(_cut(answer.marked_text))}</p><p><b>True</b> {escape(_cut(turn.answer))}</p>"
        f'<p class="note">{escape(note)} · {escape(scored.question.sample_id)}</p></article>\n'
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _small(picture: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture and masks with a longest side of at most SIDE."""
    height, width = picture.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return picture, masks
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    parts = [cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    return small, np.array(parts, dtype=bool).reshape(len(masks), size[1], size[0])


def _embedded(picture: np.ndarray) -> str:
    """The picture as a data address of a JPEG of at most _MOST_BYTES: coarser, then smaller, until it fits."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    while True:
        for quality in _QUALITIES:
            written = io.BytesIO()
            image.save(written, "JPEG", quality=quality)
            if written.tell() <= _MOST_BYTES or max(image.size) == 1:
                return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode("ascii")
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
