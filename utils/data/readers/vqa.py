"""LLaVA's instruction data: conversations of several turns in words, without masks; some are about no image.

Layouts: llava_dataset/llava_instruct_150k.json over coco/train2017; llava_dataset/llava_v1_5_mix665k.json over
coco/train2017, gqa/images, ocr_vqa/images, textvqa/train_images and vg/{VG_100K,VG_100K_2}.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.structures import SEG_MARKER
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, require_field
from utils.data.readers.base import Reader, ReaderOptions, sample_items
from utils.data.readers.json_stream import iterate_json_list
from utils.data.required_files import RequiredIf, RequiredPath, required_file, required_folder
from utils.data.samples import NO_IMAGE, TEXT, Sample, Turn
from utils.data.text import parse_turns

_COCO = "coco/train2017"
_MIXED = ("gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")


@dataclass(frozen=True, slots=True)
class _Layout:
    """The folders that names of images begin with, and what stands before names that have none."""

    folders: tuple[str, ...] = (_COCO,)
    before: str = ""


_LAYOUTS: Mapping[str, _Layout] = {
    "llava_instruct_150k": _Layout(before=f"{_COCO}/"),
    "llava_v1_5_mix665k": _Layout((_COCO, *_MIXED)),
}

VQA_SETS = tuple(_LAYOUTS)


_RECORDS = 1
"""Layout of the index."""

_PlainConversation = tuple[tuple[str, str], ...]
"""Questions and answers."""
_Record = tuple[str, str, tuple[_PlainConversation, ...]]
"""What the sample is called, its image's path below the data root or NO_IMAGE, conversations about it."""


class VqaReader(Reader):
    """LLaVA JSON, grouped by image; every record is one conversation, one without an image an item of its own. There
    is one split, "train".
    """

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        _check_split(name, split)
        self._path = root.file("llava_dataset", f"{name}.json")
        self.source = self._path
        self._root, self._layout = root, _LAYOUTS[name]
        self._items: Sequence[_Record] = self._index(root, [self._path], self._parse, _RECORDS)
        self._refuse_if_empty(self._items, self._path)

    def __len__(self) -> int:
        return len(self._items)

    def image_path(self, index: int) -> str:
        _, name, _ = self._items[index]
        return "/".join(self._placed(name)) if name else NO_IMAGE

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        sample_id, name, conversations = self._items[index]
        return self._sample(sample_id, name, sample_items(rng, conversations, self.options.num_classes_per_sample))

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        return self._sample(*self._items[index])

    def _sample(self, sample_id: str, name: str, conversations: Sequence[_PlainConversation]) -> Sample:
        path = self._root.image_path(*self._placed(name), self._path) if name else NO_IMAGE
        told = tuple(tuple(Turn(asked, said, (), TEXT) for asked, said in pairs) for pairs in conversations)
        return Sample(path, told, self.name, f"{self.name}/{self.split}/{sample_id}")

    def _placed(self, name: str) -> tuple[str, str]:
        return self._root.resolve_folder((), self._layout.folders, name, self._path)

    def _parse(self) -> Iterator[_Record]:
        items: dict[str, tuple[str, list[_PlainConversation]]] = {}
        for number, record in enumerate(iterate_json_list(self._path)):
            self._add(record, number, items)
        for sample_id, (name, conversations) in items.items():
            yield sample_id, name, tuple(conversations)

    def _add(self, record: Any, number: int, items: dict[str, tuple[str, list[_PlainConversation]]]) -> None:
        """Put a record's conversation to its image, whose item has the image's name."""
        where = f"record {number} of {self._path}"
        messages = require_field(record, "conversations", list, where)
        image = require_field(record, "image", str, where) if "image" in record else None
        conversation = self._conversation(messages, where)
        if not conversation:
            return
        if image is None:
            items[f"words-{number}"] = (NO_IMAGE, [conversation])
        elif image in items:
            items[image][1].append(conversation)
        else:
            name = self._layout.before + image
            self._placed(name)  # refuses names that begin otherwise
            items[image] = (name, [conversation])

    def _conversation(self, messages: list[Any], where: str) -> _PlainConversation:
        """The turns, or none where they cannot be used (counted)."""
        pairs = parse_turns(messages, where, self.skipped)
        if any(SEG_MARKER in text for pair in pairs for text in pair):
            self.skipped["conversation with a marker"] += 1
            return ()
        return tuple(pairs)


def required_files(name: str, split: str) -> tuple[RequiredPath, ...]:
    """What the data set `name` is made of."""
    _check_split(name, split)
    layout, records = _LAYOUTS[name], required_file(f"llava_dataset/{name}.json")
    named = {folder: '"image"' if layout.before else f'"{folder}/' for folder in layout.folders}
    return records, *(required_folder(folder, mention=RequiredIf(records, text)) for folder, text in named.items())


def _check_split(name: str, split: str) -> None:
    if split != "train":
        raise DataError(f"{name} has no split {split!r}; it has train only: name that", NO_SUCH_SPLIT)
