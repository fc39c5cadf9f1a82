"""One's own images with annotations.json in COCO's form, as annotation tools write it.

An annotation may say in "sentences" how people ask for it (texts, or objects with "sent"). Where none does, things are
asked for by their category, and everything of a category in an image is one target.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from model.structures import SEG_MARKER
from utils.data.files import DataRoot, parse_json, read_bytes, require, require_field
from utils.data.masks import PlainMask, make_union, parse_coco_mask
from utils.data.readers.base import ReaderOptions
from utils.data.readers.coco_json import (
    CocoImage,
    category_name,
    index_annotations,
    index_categories,
    index_images,
    is_crowd,
    note_odd_box,
)
from utils.data.readers.custom.layout import COCO_FILE, CUSTOM, IMAGES
from utils.data.readers.phrase_reader import PhraseReader, RequestedPhrase
from utils.data.samples import Target
from utils.data.templates import target_name

_RECORDS = 1
"""Layout of the index."""

_PlainRegions = tuple[tuple[PlainMask, ...], tuple[PlainMask, ...]]
"""What belongs to a target, and what cannot be told apart."""
_Record = tuple[str, int, tuple[_PlainRegions, ...], tuple[tuple[str, int], ...]]
"""File and number of an image, its targets, phrases with the place of the target that each asks for."""


class CustomCocoReader(PhraseReader):
    """custom/NAME/SPLIT/annotations.json over custom/NAME/SPLIT/images."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(f"{CUSTOM}|{name}", split, options)
        self._root = root
        self._folder = root.folder(CUSTOM, name, split, IMAGES)
        self.source = path = root.file(CUSTOM, name, split, COCO_FILE)
        self._images: Sequence[_Record] = self._index(root, [path], self._parse, _RECORDS)
        self._refuse_if_empty(self._images, path)

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return f"{self._folder}/{self._images[index][0]}"

    def _requested_phrases(self, index: int) -> Sequence[RequestedPhrase]:
        _, _, targets, asked = self._images[index]
        masks = [make_union(*regions) for regions in targets]
        return [RequestedPhrase(phrase, (Target(phrase, masks[place]),)) for phrase, place in asked]

    def _locate(self, index: int) -> tuple[str, str]:
        file_name, number, _, _ = self._images[index]
        return self._root.image_path(self._folder, file_name, self.source), str(number)

    def _parse(self) -> Iterator[_Record]:
        path = self.source
        annotated = parse_json(read_bytes(path), path)
        listed = index_images(annotated, path, self.skipped)
        annotations = index_annotations(annotated, path, self.skipped, listed)
        unlisted = sum(record["image_id"] not in listed for record in annotated["annotations"])
        if unlisted:
            self.skipped["annotation of an image that is not listed"] += unlisted
        spoken = any(record.get("sentences") for record in annotations.values())
        names = {} if spoken else index_categories(annotated, path)
        by_image: dict[int, list[dict[str, Any]]] = {number: [] for number in listed}
        for record in annotations.values():
            by_image[record["image_id"]].append(record)
        for number, records in by_image.items():
            image = listed[number]
            found = self._by_sentence(records, image) if spoken else self._by_category(records, image, names)
            if found:
                phrases = tuple((phrase, place) for place, (said, _) in enumerate(found) for phrase in said)
                yield image.file_name, number, tuple(regions for _, regions in found), phrases
            else:
                self.skipped["image without a usable annotation"] += 1

    def _by_sentence(self, records: list[dict[str, Any]], image: CocoImage) -> list[tuple[list[str], _PlainRegions]]:
        """The phrases for each target, and what it is."""
        asked: list[tuple[list[str], _PlainRegions]] = []
        for record in records:
            where = f"annotation {record['id']} of {self.source}"
            source = self._mask(record, image, where)
            if source is None:
                continue
            if is_crowd(record):
                self.skipped["annotation of a crowd"] += 1
                continue
            phrases = [self._phrase(told, where) for told in require(record.get("sentences") or [], list, where)]
            if any(phrases):
                asked.append((list(filter(None, phrases)), ((source,), ())))
            else:
                self.skipped["annotation without a usable sentence"] += 1
        return asked

    def _phrase(self, told: Any, where: str) -> str:
        text = require_field(told, "sent", str, f"a sentence of {where}") if isinstance(told, dict) else told
        phrase = target_name(require(text, str, f"a sentence of {where}"))
        return "" if SEG_MARKER in phrase else phrase

    def _by_category(
        self, records: list[dict[str, Any]], image: CocoImage, names: dict[int, str]
    ) -> list[tuple[list[str], _PlainRegions]]:
        """The phrase for each target, and what it is."""
        things: dict[str, list[PlainMask]] = {}
        crowds: dict[str, list[PlainMask]] = {}
        for record in records:
            where = f"annotation {record['id']} of {self.source}"
            name = target_name(category_name(record, names, where))
            source = self._mask(record, image, where)
            if source is not None and SEG_MARKER not in name:
                (crowds if is_crowd(record) else things).setdefault(name, []).append(source)
        return [([name], (tuple(sources), tuple(crowds.get(name, ())))) for name, sources in things.items()]

    def _mask(self, record: dict[str, Any], image: CocoImage, where: str) -> PlainMask | None:
        note_odd_box(record, self.noted)
        source = parse_coco_mask(require_field(record, "segmentation", object, where), image.height, image.width, where)
        if source is None:
            self.skipped["annotation without a polygon that has an inside"] += 1
            return None
        return source.to_plain()
