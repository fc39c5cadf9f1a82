"""LLaVA's instruction data: conversations of several turns in words, without masks; some are about no picture.

Layouts: llava_dataset/llava_instruct_150k.json over coco/train2017; llava_dataset/llava_v1_5_mix665k.json over
coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images and vg/{VG_100K,VG_100K_2}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, digest, expect, field, parse_json, read_bytes
from utils.data.messages import exchanges
from utils.data.presence import Mention, Part, file_part, folder_part
from utils.data.reader import Reader, ReaderOptions, draw
from utils.data.samples import NO_PICTURE, SEG_MARKER, TEXT, Conversation, Sample, Turn

_COCO = "coco/train2017"
_MIXED = ("gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


@dataclass(frozen=True, slots=True)
class _Layout:
    """The folders that names of pictures begin with, and what stands before names that have none."""

    folders: tuple[str, ...] = (_COCO,)
    before: str = ""


_LAYOUTS: Mapping[str, _Layout] = {
    "llava_instruct_150k": _Layout(before=f"{_COCO}/"),
    "llava_v1_5_mix665k": _Layout((_COCO, *_MIXED)),
}

VQA_SETS = tuple(_LAYOUTS)


@dataclass(frozen=True, slots=True)
class _Item:
    """Conversations about one picture, or one about none: then `folder` and `name` are empty."""

    sample_id: str
    conversations: list[Conversation]
    folder: str = ""
    name: str = ""


class VqaReader(Reader):
    """LLaVA JSON, grouped by picture; every record is one conversation, one without a picture an item of its own. There
    is one split, "train".
    """

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        _check_split(name, split)
        self._path = root.file("llava_dataset", f"{name}.json")
        self.source = self._path
        content = read_bytes(self._path)
        self.fingerprint = digest(content)
        self._root, self._layout = root, _LAYOUTS[name]
        self._items: list[_Item] = []
        pictures: dict[str, list[Conversation]] = {}
        for number, record in enumerate(expect(parse_json(content, self._path), list, self._path)):
            self._add(record, number, pictures)
        self._refuse_if_empty(self._items, self._path)

    def __len__(self) -> int:
        return len(self._items)

    def picture(self, index: int) -> str:
        item = self._items[index]
        return f"{item.folder}/{item.name}" if item.name else NO_PICTURE

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        item = self._items[index]
        return self._sample(item, draw(rng, item.conversations, self.options.num_classes_per_sample))

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        item = self._items[index]
        return self._sample(item, item.conversations)

    def _sample(self, item: _Item, conversations: list[Conversation]) -> Sample:
        path = self._root.picture(item.folder, item.name, self._path) if item.name else NO_PICTURE
        return Sample(path, tuple(conversations), self.name, f"{self.name}/{self.split}/{item.sample_id}")

    def _add(self, record: Any, number: int, pictures: dict[str, list[Conversation]]) -> None:
        """Put a record's conversation to its picture, whose list is in `pictures` once it was seen."""
        where = f"record {number} of {self._path}"
        messages = field(record, "conversations", list, where)
        image = field(record, "image", str, where) if "image" in record else None
        conversation = self._conversation(messages, where)
        if not conversation:
            return
        if image is None:
            self._items.append(_Item(f"words-{number}", [conversation]))
        elif image in pictures:
            pictures[image].append(conversation)
        else:
            folder, name = self._root.placed((), self._layout.folders, self._layout.before + image, self._path)
            pictures[image] = [conversation]
            self._items.append(_Item(image, pictures[image], folder, name))

    def _conversation(self, messages: list[Any], where: str) -> Conversation:
        """The turns, or none where they cannot be used (counted)."""
        pairs = exchanges(messages, where, self.skipped)
        if any(SEG_MARKER in text for pair in pairs for text in pair):
            self.skipped["conversation with a marker"] += 1
            return ()
        return tuple(Turn(asked, told, (), TEXT) for asked, told in pairs)


def needed_parts(name: str, split: str) -> tuple[Part, ...]:
    """What the data set `name` is made of."""
    _check_split(name, split)
    layout, records = _LAYOUTS[name], file_part(f"llava_dataset/{name}.json")
    named = {folder: '"image"' if layout.before else f'"{folder}/' for folder in layout.folders}
    return records, *(folder_part(folder, mention=Mention(records, text)) for folder, text in named.items())


def _check_split(name: str, split: str) -> None:
    if split != "train":
        raise DataError(f"{name} has no split {split!r}; it has train only: name that", NO_SUCH_SPLIT)
