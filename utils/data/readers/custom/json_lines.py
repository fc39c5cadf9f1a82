"""One's own conversations: annotations.jsonl, a line each.

{"image": "a.jpg", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "… {seg} …"}],
"masks": […]}. Each {seg} stands for the next of the masks: polygons [[x0, y0, x1, y1, …], …], run lengths
{"size": [height, width], "counts": …}, or the name of a file below the split's folder, in which whatever is not black
belongs to the target.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.structures import SEG_MARKER
from utils.data.errors import DataError
from utils.data.files import DataRoot, image_size, parse_json, read_bytes, require, require_field
from utils.data.masks import parse_coco_mask
from utils.data.readers.base import Reader, ReaderOptions, sample_items
from utils.data.readers.custom.layout import CUSTOM, IMAGES, LINES_FILE, mask_file
from utils.data.readers.custom.mask_files import FileMask
from utils.data.samples import FEWER_MARKERS, MORE_MARKERS, TEXT, Conversation, Sample, Target, Turn, kind_by_count
from utils.data.templates import names_before_markers
from utils.data.text import parse_turns

_RECORDS = 1
"""Layout of the index."""

_Line = tuple[str, tuple[tuple[str, str], ...], list[Any]]
"""Where it stands, its questions and answers, and its masks as written."""


class JsonLinesReader(Reader):
    """custom/NAME/SPLIT/annotations.jsonl over custom/NAME/SPLIT/images, grouped by image.

    Lines are read when the reader is made; masks, which need the size of their image, when the image is.
    """

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(f"{CUSTOM}|{name}", split, options)
        self._root = root
        self._home = root.folder(CUSTOM, name, split)
        self._folder = root.folder(CUSTOM, name, split, IMAGES)
        self.source = path = root.file(CUSTOM, name, split, LINES_FILE)
        self._images: Sequence[tuple[str, list[_Line]]] = self._index(root, [path], self._parse, _RECORDS)
        self._refuse_if_empty(self._images, path)

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return f"{self._folder}/{self._images[index][0]}"

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        name, lines = self._images[index]
        return self._sample(name, sample_items(rng, lines, self.options.num_classes_per_sample))

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        return self._sample(*self._images[index])

    def _parse(self) -> Iterator[tuple[str, list[_Line]]]:
        images: dict[str, list[_Line]] = {}
        for number, line in enumerate(read_bytes(self.source).splitlines(), start=1):
            if line.strip():
                where = f"line {number} of {self.source}"
                self._add(parse_json(line, where), where, images)
        yield from images.items()

    def _add(self, record: Any, where: str, images: dict[str, list[_Line]]) -> None:
        image = require_field(record, "image", str, where)
        masks = require(record.get("masks") or [], list, f"'masks' of {where}")
        for mask in masks:
            if not isinstance(mask, str | list | dict):
                raise DataError(
                    f"a mask of {where} is {mask!r}; expected polygons, run lengths or the name of a file: correct it",
                    cause="malformed segmentation",
                )
        pairs = parse_turns(require_field(record, "conversations", list, where), where, self.skipped)
        if not pairs:
            return
        if any(SEG_MARKER in question for question, _ in pairs):
            self.skipped[f"conversation with {SEG_MARKER} in a question"] += 1
            return
        markers = sum(answer.count(SEG_MARKER) for _, answer in pairs)
        if markers != len(masks):
            self.skipped[MORE_MARKERS if markers > len(masks) else FEWER_MARKERS] += 1
            return
        images.setdefault(image, []).append((where, tuple(pairs), masks))

    def _sample(self, name: str, lines: list[_Line]) -> Sample:
        path = self._root.image_path(self._folder, name, self.source)
        size = image_size(path)
        conversations = tuple(self._conversation(line, size) for line in lines)
        return Sample(path, conversations, self.name, f"{self.name}/{self.split}/{name}")

    def _conversation(self, line: _Line, size: tuple[int, int]) -> Conversation:
        where, pairs, written = line
        masks = iter(written)
        return tuple(self._turn(question, answer, masks, size, where) for question, answer in pairs)

    def _turn(self, question: str, answer: str, masks: Iterator[Any], size: tuple[int, int], where: str) -> Turn:
        targets = tuple(self._target(name, next(masks), size, where) for name in names_before_markers(answer))
        return Turn(question, answer, targets, kind_by_count(len(targets)) if targets else TEXT)

    def _target(self, name: str, mask: Any, size: tuple[int, int], where: str) -> Target:
        if isinstance(mask, str):
            return Target(name, FileMask(mask_file(self._root, self._home, mask, where)))
        flat = isinstance(mask, list) and bool(mask) and not isinstance(mask[0], list | dict)
        source = parse_coco_mask([mask] if flat else mask, *size, f"the mask of {name!r} in {where}")
        if source is None:
            raise DataError(
                f"the mask of {name!r} in {where} has no polygon with an inside: give three points or more",
                cause="mask without a polygon that has an inside",
            )
        return Target(name, source)
