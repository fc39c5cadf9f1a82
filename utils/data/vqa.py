"""LLaVA's instruction data: conversations of several turns in words, without masks; some are about no picture.

Layouts: llava_dataset/llava_instruct_150k.json over coco/train2017; llava_dataset/llava_v1_5_mix665k.json over
coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images and vg/{VG_100K,VG_100K_2}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.data.errors import DataError
from utils.data.files import DataRoot, digest, expect, field, parse_json, read_bytes
from utils.data.reader import Reader, ReaderOptions, draw
from utils.data.samples import NO_PICTURE, SEG_MARKER, TEXT, Conversation, Sample, Turn

_COCO = "coco/train2017"
_MIXED = ("gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")

_IMAGE_MARKER = "<image>"
_ROLES = ("human", "gpt")


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
        if split != "train":
            raise DataError(f"{name} has no split {split!r}; it has train only: name that")
        self._path = root.file("llava_dataset", f"{name}.json")
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
        """The turns, or none where roles do not alternate or words are missing (counted)."""
        roles = tuple(field(message, "from", str, f"a message of {where}") for message in messages)
        texts = [_words(field(message, "value", str, f"a message of {where}")) for message in messages]
        if not roles or roles != _ROLES * (len(roles) // 2):
            self.skipped["conversation that does not alternate between human and gpt"] += 1
            return ()
        if not all(texts) or any(SEG_MARKER in text for text in texts):
            self.skipped["conversation with an empty message or a marker"] += 1
            return ()
        return tuple(Turn(asked, told, (), TEXT) for asked, told in zip(texts[::2], texts[1::2], strict=True))


def _words(text: str) -> str:
    """Without the place of the picture, which the processor decides."""
    return text.replace(_IMAGE_MARKER, "").strip()
