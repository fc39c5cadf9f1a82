"""One's own pictures with annotations.json in COCO's form, as annotation tools write it.

An annotation may say in "sentences" how people ask for it (texts, or objects with "sent"). Where none does, things are
asked for by their category, and everything of a category in a picture is one target.
"""

from collections.abc import Sequence
from typing import Any

from utils.data.coco_json import (
    category_name,
    index_annotations,
    index_categories,
    index_pictures,
    is_crowd,
    note_odd_box,
)
from utils.data.custom.layout import COCO_FILE, CUSTOM, PICTURES
from utils.data.files import DataRoot, digest, expect, field, parse_json, read_bytes
from utils.data.masks import CocoMask, UnionMask, coco_mask
from utils.data.phrase_reader import Asked, PhraseReader
from utils.data.reader import ReaderOptions
from utils.data.samples import SEG_MARKER, Target
from utils.data.templates import target_name


class CustomCocoReader(PhraseReader):
    """custom/NAME/SPLIT/annotations.json over custom/NAME/SPLIT/images."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(f"{CUSTOM}|{name}", split, options)
        self._root = root
        self._folder = root.folder(CUSTOM, name, split, PICTURES)
        self.source = path = root.file(CUSTOM, name, split, COCO_FILE)
        content = read_bytes(path)
        self.fingerprint = digest(content)
        annotated = parse_json(content, path)
        self._listed = index_pictures(annotated, path, self.skipped)
        annotations = index_annotations(annotated, path, self.skipped, self._listed)
        unlisted = sum(record["image_id"] not in self._listed for record in annotated["annotations"])
        if unlisted:
            self.skipped["annotation of a picture that is not listed"] += unlisted
        spoken = any(record.get("sentences") for record in annotations.values())
        self._names = {} if spoken else index_categories(annotated, path)
        by_picture: dict[int, list[dict[str, Any]]] = {number: [] for number in self._listed}
        for record in annotations.values():
            by_picture[record["image_id"]].append(record)
        gather = self._by_sentence if spoken else self._by_category
        asked = {number: gather(records) for number, records in by_picture.items()}
        self._about = [(number, phrases) for number, phrases in asked.items() if phrases]
        if len(self._about) < len(asked):
            self.skipped["picture without a usable annotation"] += len(asked) - len(self._about)
        self._refuse_if_empty(self._about, path)

    def __len__(self) -> int:
        return len(self._about)

    def picture(self, index: int) -> str:
        return f"{self._folder}/{self._listed[self._about[index][0]].file_name}"

    def _asked(self, index: int) -> Sequence[Asked]:
        return self._about[index][1]

    def _located(self, index: int) -> tuple[str, str]:
        number = self._about[index][0]
        return self._root.picture(self._folder, self._listed[number].file_name, self.source), str(number)

    def _by_sentence(self, records: list[dict[str, Any]]) -> list[Asked]:
        asked = []
        for record in records:
            where = f"annotation {record['id']} of {self.source}"
            source = self._mask(record, where)
            if source is None:
                continue
            if is_crowd(record):
                self.skipped["annotation of a crowd"] += 1
                continue
            phrases = [self._phrase(told, where) for told in expect(record.get("sentences") or [], list, where)]
            if not any(phrases):
                self.skipped["annotation without a usable sentence"] += 1
            asked += [Asked(phrase, (Target(phrase, source),)) for phrase in phrases if phrase]
        return asked

    def _phrase(self, told: Any, where: str) -> str:
        text = field(told, "sent", str, f"a sentence of {where}") if isinstance(told, dict) else told
        phrase = target_name(expect(text, str, f"a sentence of {where}"))
        return "" if SEG_MARKER in phrase else phrase

    def _by_category(self, records: list[dict[str, Any]]) -> list[Asked]:
        things: dict[str, list[CocoMask]] = {}
        crowds: dict[str, list[CocoMask]] = {}
        for record in records:
            where = f"annotation {record['id']} of {self.source}"
            name = target_name(category_name(record, self._names, where))
            source = self._mask(record, where)
            if source is not None and SEG_MARKER not in name:
                (crowds if is_crowd(record) else things).setdefault(name, []).append(source)
        return [
            Asked(name, (Target(name, UnionMask(tuple(sources), tuple(crowds.get(name, ())))),))
            for name, sources in things.items()
        ]

    def _mask(self, record: dict[str, Any], where: str) -> CocoMask | None:
        listed = self._listed[record["image_id"]]
        note_odd_box(record, self.noted)
        source = coco_mask(field(record, "segmentation", object, where), listed.height, listed.width, where)
        if source is None:
            self.skipped["annotation without a polygon that has an inside"] += 1
        return source
