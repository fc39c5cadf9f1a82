"""index.html: answers beside their images and truths, best, worst, at random and by cause of failure; and
compare.html: what changed from one run to another. All is drawn from lines of samples.jsonl and the images they name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.answer_text import remove_seg_markers
from model.image_processing_pixellm import open_image
from model.overlay import draw_overlay
from utils.data.samples import KINDS, TEXT
from utils.drawing.galleries import GalleryItem, draw_gallery
from utils.drawing.pages import Article, Figure, Paragraph, Section, embed_image, render_page
from utils.evaluation.records import CAUSES, shown_iou
from utils.evaluation.run_lengths import decode_masks

PAGE, COMPARISON = "index.html", "compare.html"
PER_SECTION = 8

SIDE = 280
"""Longest side in pixels of an image on the page."""
LONGEST_TEXT = 600

Line = Mapping[str, Any]
Masks = tuple[np.ndarray | None, Sequence[str]]
"""Masks of an image with their phrases; None for the image alone."""


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
        iou = shown_iou(line)
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


def write_page(path: Path, title: str, sections: Mapping[str, Sequence[Line]]) -> None:
    """Write the page. An answer that several sections hold is drawn in the first and linked from the others."""
    anchors: dict[tuple[str, str], str] = {}
    shown = []
    for name, lines in sections.items():
        articles = []
        for line in lines:
            key = (line["dataset"], line["id"])
            if key in anchors:
                articles.append(Article(title=_shorten(line["question"]), shown_at=anchors[key]))
            else:
                anchors[key] = f"a{len(anchors)}"
                articles.append(_make_article(line, anchors[key]))
        shown.append(Section(articles, name))
    path.write_text(render_page(title, shown), encoding="utf-8")


def write_comparison(path: Path, title: str, pairs: Sequence[tuple[Line, Line]]) -> None:
    """Write a page of pairs of lines, (A, B) of the same question; see `write_page`."""
    articles = []
    for first, second in pairs:
        change = f"IoU {shown_iou(first):.3f} → {shown_iou(second):.3f} ({shown_iou(second) - shown_iou(first):+.3f})"
        images = {"truth": _true_masks(first), "A": _predicted_masks(first), "B": _predicted_masks(second)}
        articles.append(
            Article(
                before=[_make_paragraph("Q", first["question"])],
                figures=_draw_figures(first["image_path"], images),
                after=[
                    _make_paragraph("A", first["answer"]),
                    _make_paragraph("B", second["answer"]),
                    _make_paragraph("True", first["true_answer"]),
                ],
                note=f"{change} · {first['id']}",
            )
        )
    path.write_text(render_page(title, [Section(articles)]), encoding="utf-8")


def draw_answers(lines: Sequence[Line]) -> np.ndarray:
    """Scored questions on one sheet, uint8 RGB."""
    return draw_gallery(
        [
            GalleryItem(
                question=line["question"],
                image=open_image(line["image_path"]),
                true_masks=decode_masks(line["true_masks"], line["size"]),
                true_names=line["names"],
                answer=remove_seg_markers(line["answer"]),
                masks=decode_masks(line["masks"], line["size"]),
                phrases=line["phrases"],
                note=f"{line['kind']}, {line['protocol']}, IoU {shown_iou(line):.2f}",
            )
            for line in lines
        ]
    )


def _make_article(line: Line, anchor: str) -> Article:
    in_words = line["kind"] == TEXT
    images: dict[str, Masks] = {"image": (None, ())}
    if not in_words:
        images |= {"truth": _true_masks(line), "prediction": _predicted_masks(line)}
    note = f"{line['kind']}, {line['protocol']}" + ("" if in_words else f", IoU {shown_iou(line):.3f}")
    if causes := line.get("causes"):
        note += f", {', '.join(causes)}"
    return Article(
        before=[_make_paragraph("Q", line["question"])],
        figures=_draw_figures(line["image_path"], images),
        after=[_make_paragraph("A", line["answer"]), _make_paragraph("True", line["true_answer"])],
        note=f"{note} · {line['id']}",
        anchor=anchor,
    )


def _make_paragraph(label: str, text: str) -> Paragraph:
    return Paragraph.plain(_shorten(text), label)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _true_masks(line: Line) -> Masks:
    return decode_masks(line["true_masks"], line["size"]), line["names"]


def _predicted_masks(line: Line) -> Masks:
    return decode_masks(line["masks"], line["size"]), line["phrases"]


def _draw_figures(path: str, images: Mapping[str, Masks]) -> list[Figure]:
    """Images side by side, by their captions."""
    image, figures = open_image(path), []
    for name, (masks, phrases) in images.items():
        shown = np.zeros((0, *image.shape[:2]), dtype=bool) if masks is None else masks
        drawn = draw_overlay(*_shrink(image, shown), phrases, min_side=SIDE)
        figures.append(Figure(name, embed_image(drawn, SIDE, "JPEG")))
    return figures


def _shrink(image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and masks with a longest side of at most SIDE, so that labels are drawn at the size they are shown in."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return image, masks
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    parts = [cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    return small, np.array(parts, dtype=bool).reshape(len(masks), size[1], size[0])
