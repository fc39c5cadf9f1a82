"""index.html: answers beside their images and truths, best, worst, at random and by cause of failure; and
compare.html: what changed from one run to another.

One file without scripts, links to other places or files beside it: it opens from a disk. Words of questions and answers
are shown as they are and never become markup. All is drawn from lines of samples.jsonl and the images they name.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from utils.data.samples import KINDS, TEXT
from utils.evaluation.mask_codes import decoded
from utils.evaluation.records import CAUSES, iou_of

PAGE, COMPARISON = "index.html", "compare.html"
PER_SECTION = 8

SIDE = 280
"""Longest side in pixels of an image on the page."""

# A page stays below this many bytes; its answers share them.
_PAGE_BYTES = 19_000_000
_MOST_BYTES, _FEWEST_BYTES = 30_000, 2_000
_IMAGES, _TEXTS = 3, 4
_MOST_LETTERS = 600
_LETTERS_OF_A_QUOTATION_MARK = 6
_QUALITIES = (80, 60, 40, 25)

Line = Mapping[str, Any]
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
h1, h2 {{ overflow-wrap: anywhere }}
figure {{ margin: 0 }} figcaption, .note {{ color: #666; font-size: 85% }}
img {{ max-width: 100%; height: auto }}
p {{ margin: .3em 0; overflow-wrap: anywhere; white-space: pre-wrap }}
</style></head><body>
<h1>{title}</h1>
"""


class ByKind:
    """Keeps some answers of every kind for gallery.png, one about an image."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._kept: dict[str, list[Line]] = {kind: [] for kind in KINDS if kind != TEXT}

    def add(self, line: Line) -> None:
        """Take in one scored question."""
        if line["kind"] == TEXT:
            return
        kept, path = self._kept[line["kind"]], line["image_path"]
        if len(kept) < self._wanted and all(path != other["image_path"] for other in kept):
            kept.append(line)

    def chosen(self) -> list[Line]:
        """At most the wanted number, the kinds taking turns."""
        longest = max(len(kept) for kept in self._kept.values())
        turns = [kept[place] for place in range(longest) for kept in self._kept.values() if place < len(kept)]
        return turns[: self._wanted]


@dataclass
class Chosen:
    """Keeps some answers of a run: the best and worst of those with targets, some at random, some by cause of failure,
    and some in words alone.

    per_section: how many of each. The same run keeps the same ones.
    """

    per_section: int = PER_SECTION
    _seen: int = 0
    _best: list[tuple[float, int, Line]] = field(default_factory=list)
    _worst: list[tuple[float, int, Line]] = field(default_factory=list)
    _drawn: list[Line] = field(default_factory=list)
    _failed: dict[str, list[Line]] = field(default_factory=lambda: {cause: [] for cause in CAUSES})
    _said: list[Line] = field(default_factory=list)
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, line: Line) -> None:
        """Take in one scored question."""
        most = self.per_section
        if line["kind"] == TEXT:
            if len(self._said) < most and line["answer"] is not None:
                self._said.append(line)
            return
        iou = iou_of(line)
        if line["names"]:
            self._best = _first([*self._best, (-iou, self._seen, line)], most)
        self._worst = _first([*self._worst, (iou, self._seen, line)], most)
        # Every question so far has the same chance to be among those kept.
        if len(self._drawn) < most:
            self._drawn.append(line)
        elif (place := int(self._rng.integers(self._seen + 1))) < most:
            self._drawn[place] = line
        for cause in line["causes"]:
            if len(self._failed[cause]) < most:
                self._failed[cause].append(line)
        self._seen += 1

    def sections(self) -> dict[str, list[Line]]:
        """The kept answers by the title of their section; empty ones are left out."""
        found = {
            "best": [line for *_, line in self._best],
            "worst": [line for *_, line in self._worst],
            "at random": list(self._drawn),
            **{f"cause: {cause}": list(kept) for cause, kept in self._failed.items()},
            "in words alone": list(self._said),
        }
        return {title: kept for title, kept in found.items() if kept}


def _first(kept: list[tuple[float, int, Line]], most: int) -> list[tuple[float, int, Line]]:
    return sorted(kept, key=lambda one: one[:2])[:most]


def write_page(path: Path, title: str, sections: dict[str, list[Line]], draw: Draw, open_image: Open) -> None:
    """Write the page. An answer that several sections hold is drawn in the first and linked from the others.

    draw: (image uint8 (H, W, 3), bool masks (Q, H, W), phrases) -> an image with its masks. open_image: by path.
    """
    places: dict[tuple[str, str], str] = {}
    articles = {(line["dataset"], line["id"]) for lines in sections.values() for line in lines}
    images_of = _Images(draw, open_image, _bytes_of_image(len(articles)))
    with path.open("w", encoding="utf-8") as page:
        page.write(_HEAD.format(title=escape(title)))
        links = [
            f'<a href="#s{number}">{escape(name)}</a> ({len(sections[name])})' for number, name in _order(sections)
        ]
        page.write(f"<p>{' · '.join(links)}</p>\n")
        for number, name in _order(sections):
            page.write(f'<h2 id="s{number}">{escape(name)}</h2>\n')
            for line in sections[name]:
                key = (line["dataset"], line["id"])
                if key in places:
                    text = f"{_cut(line['question'])} (shown above)"
                    page.write(f'<p><a href="#{places[key]}">{escape(text)}</a></p>\n')
                else:
                    places[key] = f"a{len(places)}"
                    page.write(_article(line, places[key], images_of))
        page.write("</body></html>\n")


def write_comparison(path: Path, title: str, pairs: Sequence[tuple[Line, Line]], draw: Draw, open_image: Open) -> None:
    """Write a page of pairs of lines, (A, B) of the same question; see `write_page`."""
    images_of = _Images(draw, open_image, _bytes_of_image(len(pairs)))
    with path.open("w", encoding="utf-8") as page:
        page.write(_HEAD.format(title=escape(title)))
        for number, (first, second) in enumerate(pairs):
            images = {"truth": _true(first), "A": _predicted(first), "B": _predicted(second)}
            shown = images_of.figures(first["image_path"], images)
            note = f"IoU {iou_of(first):.3f} → {iou_of(second):.3f} ({iou_of(second) - iou_of(first):+.3f})"
            page.write(
                f'<article id="a{number}">{_said("Q", first["question"])}<div class="row">{shown}</div>'
                f"{_said('A', first['answer'])}{_said('B', second['answer'])}{_said('True', first['true_answer'])}"
                f'<p class="note">{escape(note)} · {escape(first["id"])}</p></article>\n'
            )
        page.write("</body></html>\n")


def _order(sections: dict[str, list[Line]]) -> list[tuple[int, str]]:
    return list(enumerate(sections))


Masks = tuple[np.ndarray | None, Sequence[str]]


def _true(line: Line) -> Masks:
    return decoded(line["true_masks"], line["size"]), line["names"]


def _predicted(line: Line) -> Masks:
    return decoded(line["masks"], line["size"]), line["phrases"]


def _article(line: Line, place: str, images_of: "_Images") -> str:
    of_text = line["kind"] == TEXT
    images: dict[str, Masks] = {"image": (None, ())}
    if not of_text:
        images |= {"truth": _true(line), "prediction": _predicted(line)}
    shown = images_of.figures(line["image_path"], images)
    note = f"{line['kind']}, {line['protocol']}" + ("" if of_text else f", IoU {iou_of(line):.3f}")
    if why := line.get("causes"):
        note += f", {', '.join(why)}"
    return (
        f'<article id="{place}">{_said("Q", line["question"])}<div class="row">{shown}</div>'
        f"{_said('A', line['answer'])}{_said('True', line['true_answer'])}"
        f'<p class="note">{escape(note)} · {escape(line["id"])}</p></article>\n'
    )


def _said(name: str, text: str) -> str:
    return f"<p><b>{name}</b> {escape(_cut(text))}</p>"


@dataclass(frozen=True)
class _Images:
    """Draws images into a page, each of at most `most_bytes`."""

    draw: Draw
    open_image: Open
    most_bytes: int

    def figures(self, path: str, images: Mapping[str, Masks]) -> str:
        """Images side by side, by their captions; masks None: the image alone."""
        image = self.open_image(path)
        shown = {
            name: _small(image, None)[0] if masks is None else self.draw(*_small(image, masks), names)
            for name, (masks, names) in images.items()
        }
        sources = {name: _embedded(one, self.most_bytes) for name, one in shown.items()}
        return "".join(
            f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'
            for name, source in sources.items()
        )


def _bytes_of_image(articles: int) -> int:
    """As many bytes as each of an article's images may have beside texts that are all quotation marks."""
    texts = _TEXTS * _MOST_LETTERS * _LETTERS_OF_A_QUOTATION_MARK
    characters = (_PAGE_BYTES / max(articles, 1) - texts) / _IMAGES
    return int(min(max(characters * 3 / 4, _FEWEST_BYTES), _MOST_BYTES))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _small(image: np.ndarray, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Image and masks (none for None) with a longest side of at most SIDE."""
    height, width = image.shape[:2]
    if masks is None:
        masks = np.zeros((0, height, width), dtype=bool)
    scale = SIDE / max(height, width)
    if scale >= 1:
        return image, masks
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    parts = [cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    return small, np.array(parts, dtype=bool).reshape(len(masks), size[1], size[0])


def _embedded(image: np.ndarray, most_bytes: int) -> str:
    """The image as a data address of a JPEG of at most `most_bytes`: coarser, then smaller, until it fits."""
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    while True:
        for quality in _QUALITIES:
            written = io.BytesIO()
            small.save(written, "JPEG", quality=quality)
            if written.tell() <= most_bytes or max(small.size) == 1:
                return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode("ascii")
        small = small.resize((max(1, small.width // 2), max(1, small.height // 2)))
