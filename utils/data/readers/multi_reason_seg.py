"""MUSE: questions that need thought and whose answers name several targets.

Layout: muse/muse_{train,val,test_less,test_many}.json over
refer_seg/images/mscoco/images/{train2014,train2017,val2017}. The release reads its file from the data root itself
(muse_train.json): that is read too where there is none in muse/.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from model.structures import SEG_MARKER
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, require, require_field
from utils.data.masks import PlainMask, mask_from_plain, parse_coco_mask
from utils.data.readers.base import Reader, ReaderOptions, sample_items
from utils.data.readers.coco_json import note_odd_box
from utils.data.readers.json_stream import iterate_json_list
from utils.data.required_files import RequiredIf, RequiredPath, required_file, required_folder
from utils.data.samples import FEWER_MARKERS, MORE_MARKERS, NO_TARGET, REASONING, Conversation, Sample, Target, Turn
from utils.data.templates import named_answer, no_match_answer, target_name

MUSE_SPLITS = ("train", "val", "test_less", "test_many")

_IMAGES = ("refer_seg", "images", "mscoco", "images")
_URL_FOLDERS = ("train2014", "train2017", "val2017")


_RECORDS = 1
"""Layout of the index."""

_PlainTurn = tuple[str, str, tuple[tuple[str, PlainMask], ...], str]
"""Question, answer, name and mask of each target, kind."""
_Record = tuple[str, str, str, tuple[_PlainTurn, ...]]
"""Folder and file of the image, what it is called, its questions."""


class MultiReasonSegReader(Reader):
    """One split of MUSE; a record is an image, and each of its questions a conversation of one turn."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        _check_split(split)
        self._root = root
        file = f"muse_{split}.json"
        self._path = root.file(file) if root.has(file) and not root.has("muse", file) else root.file("muse", file)
        self.source = self._path
        self._images: Sequence[_Record] = self._index(root, [self._path], self._parse, _RECORDS)
        self._refuse_if_empty(self._images, self._path)

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        folder, file_name, _, _ = self._images[index]
        return os.path.join(self._root.path, *_IMAGES, folder, file_name)

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        record = self._images[index]
        return self._sample(record, sample_items(rng, record[-1], self.options.num_classes_per_sample))

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        record = self._images[index]
        return self._sample(record, record[-1])

    def _sample(self, record: _Record, turns: Sequence[_PlainTurn]) -> Sample:
        folder, file_name, record_id, _ = record
        path = self._root.image_path(self._root.folder(*_IMAGES, folder), file_name, self._path)
        conversations = tuple(_conversation(turn) for turn in turns)
        return Sample(path, conversations, self.name, f"{self.name}/{self.split}/{record_id}")

    def _parse(self) -> Iterator[_Record]:
        for number, record in enumerate(iterate_json_list(self._path)):
            image = self._image(record, f"record {number} of {self._path}", number)
            if image is not None:
                yield image

    def _image(self, record: Any, where: str, number: int) -> _Record | None:
        """The record's questions, or None when it has no usable one (counted)."""
        if not require(record, dict, where).get("questions"):
            self.skipped["record without questions"] += 1
            return None
        questions = require_field(record, "questions", list, where)
        answers = require_field(record, "answers", list, where)
        texts = require(record.get("text_answers") or [None] * len(questions), list, f"'text_answers' of {where}")
        if not len(questions) == len(answers) == len(texts):
            self.skipped["record with unequal numbers of questions and answers"] += 1
            return None
        size = (require_field(record, "height", int, where), require_field(record, "width", int, where))
        turns = []
        for asked, instances, text in zip(questions, answers, texts, strict=True):
            turn = self._turn(asked, instances, text, size, where)
            if turn is not None:
                turns.append(turn)
        folder, file_name = _where_the_image_is(record, where)
        record_id = f"{number}-{record.get('id', record.get('image_id', file_name))}"
        return (folder, file_name, record_id, tuple(turns)) if turns else None

    def _turn(self, asked: Any, instances: Any, text: Any, size: tuple[int, int], where: str) -> _PlainTurn | None:
        question = require(asked, str, f"a question of {where}").strip()
        if not question or SEG_MARKER in question:
            self.skipped["question that is empty or holds a marker"] += 1
            return None
        if text is not None and not isinstance(text, str):
            require(text, str, f"a text answer of {where}")
        targets = self._targets(require(instances, list, f"an answer of {where}"), size, where)
        if targets is None:
            return None
        markers = text.count(SEG_MARKER) if text else len(targets)
        if markers != len(targets):
            self.skipped[MORE_MARKERS if markers > len(targets) else FEWER_MARKERS] += 1
            return None
        if not targets:
            return question, text or no_match_answer(), (), NO_TARGET
        return question, text or named_answer([name for name, _ in targets]), targets, REASONING

    def _targets(
        self, instances: list[Any], size: tuple[int, int], where: str
    ) -> tuple[tuple[str, PlainMask], ...] | None:
        """The targets of one answer, or None when one of them cannot be used (counted)."""
        targets = []
        for instance in instances:
            spot = f"an instance of {where}"
            note_odd_box(instance, self.noted)
            source = parse_coco_mask(require_field(instance, "segmentation", object, spot), *size, spot)
            if source is None or instance.get("iscrowd"):
                self.skipped["question with a target that is a crowd or has no inside"] += 1
                return None
            name = instance.get("rephrased_name") or require_field(instance, "category_name", str, spot)
            said = target_name(require(name, str, f"the name of {spot}")) or "the target"
            targets.append((said, source.to_plain()))
        return tuple(targets)


def _conversation(turn: _PlainTurn) -> Conversation:
    question, answer, targets, kind = turn
    return (Turn(question, answer, tuple(Target(name, mask_from_plain(mask)) for name, mask in targets), kind),)


def required_files(split: str) -> tuple[RequiredPath, ...]:
    """What the split `split` is made of. Which of the folders of images it takes, its records say."""
    _check_split(split)
    records = required_file(f"muse/muse_{split}.json", f"muse_{split}.json")
    told_by = {"train2014": '"file_name"', "train2017": "/train2017/", "val2017": "/val2017/"}
    folders = [
        required_folder(
            "/".join((*_IMAGES, folder)), mention=RequiredIf(records, told_by[folder], folder == "train2017")
        )
        for folder in _URL_FOLDERS
    ]
    return records, *folders


def _check_split(split: str) -> None:
    if split not in MUSE_SPLITS:
        raise DataError(
            f"MUSE has no split {split!r}; it has {', '.join(MUSE_SPLITS)}: name one of these", NO_SUCH_SPLIT
        )


def _where_the_image_is(record: dict[str, Any], where: str) -> tuple[str, str]:
    """(folder below the COCO images, file name) from `file_name`, which is of train2014, or from `coco_url`."""
    if record.get("file_name"):
        return "train2014", require_field(record, "file_name", str, where)
    parts = urlsplit(require_field(record, "coco_url", str, where)).path.split("/")
    if len(parts) < 2 or parts[-2] not in _URL_FOLDERS:
        raise DataError(
            f"'coco_url' of {where} is {record['coco_url']!r}; expected …/{{{','.join(_URL_FOLDERS)}}}/NAME.jpg: "
            f"correct it"
        )
    return parts[-2], parts[-1]
