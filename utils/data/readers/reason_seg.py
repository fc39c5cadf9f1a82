"""ReasonSeg: a question that needs thought, one target made of polygons.

Layout: reason_seg/ReasonSeg/{train,val,test}/NAME.jpg with NAME.json beside it, explanatory/train.json.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.structures import SEG_MARKER
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import (
    DataRoot,
    hash_bytes,
    image_size,
    list_images,
    parse_json,
    read_bytes,
    require,
    require_field,
)
from utils.data.masks import PaintedMask, parse_points
from utils.data.readers.base import Reader, ReaderOptions, sample_items
from utils.data.required_files import RequiredPath, required_folder
from utils.data.samples import REASONING, TEXT, Conversation, Sample, Target, Turn
from utils.data.templates import (
    REGION_ASKED_FOR,
    add_reason_request,
    named_answer,
    pick_phrasing,
    reasoning_question,
    target_name,
)

logger = logging.getLogger(__name__)

_FOLDER = ("reason_seg", "ReasonSeg")
_EXPLANATIONS = ("explanatory", "train.json")
_ENCODINGS = ("utf-8-sig", "cp1252")
_FLAG, _IGNORE = "flag", "ignore"
_POINTS_OF_A_TRIANGLE = 3


@dataclass(frozen=True, slots=True)
class _Image:
    folder: str
    file_name: str
    texts: tuple[str, ...]
    is_sentence: bool
    polygons: tuple[np.ndarray, ...]
    ignored: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Explanation:
    question: str
    answer: str


class ReasonSegReader(Reader):
    """ReasonSeg; `split` may join several: "train|val". Polygons labelled "ignore" give IGNORE_LABEL, "flag"
    nothing.
    """

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        self._root = root
        self.source = os.path.join(root.path, *_FOLDER, split.replace("|", "+"))
        self._images: list[_Image] = []
        contents = []
        for part in _split_parts(name, split):
            folder = root.folder(*_FOLDER, part)
            for file_name in list_images(folder):
                path = root.resolve_inside(folder, os.path.splitext(file_name)[0] + ".json", folder, "the file")
                if not os.path.isfile(path):
                    self.skipped["image without a json file"] += 1
                    continue
                content = read_bytes(path)
                contents.append(content)
                image = self._image(folder, file_name, parse_json(content, path, _ENCODINGS), path)
                if not image.texts:
                    self.skipped["image without a usable question"] += 1
                elif all(image.ignored):
                    self.skipped["image without a polygon of the target"] += 1
                else:
                    self._images.append(image)
        self.fingerprint = hash_bytes(b"\0".join(contents))
        self._refuse_if_empty(self._images, os.path.join(root.path, *_FOLDER, split))
        self._explanations: dict[str, list[_Explanation]] = {}
        if options.explanatory >= 0 and "train" in _split_parts(name, split):
            self._explanations = self._read_explanations()

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return os.path.join(self._images[index].folder, self._images[index].file_name)

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        image = self._images[index]
        texts = sample_items(rng, image.texts, self.options.num_classes_per_sample)
        target = self._target(image)
        explanations = self._explanations.get(image.file_name)
        if explanations is None:
            return self._sample(image, [self._conversation(image, target, text, rng) for text in texts])
        explained = explanations[rng.integers(len(explanations))]
        conversations = [self._explained(image, target, text, explained, rng) for text in texts]
        return self._sample(image, conversations)

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        image = self._images[index]
        target = self._target(image)
        return self._sample(image, [self._conversation(image, target, text, rng) for text in image.texts])

    def _conversation(self, image: _Image, target: PaintedMask, text: str, rng: np.random.Generator) -> Conversation:
        more = self.options.use_expand_question_list
        if image.is_sentence:
            named = Target(REGION_ASKED_FOR, target)
            return (Turn(reasoning_question(rng, text, more), named_answer([named.name]), (named,), REASONING),)
        named = Target(target_name(text), target)
        phrasing = pick_phrasing(rng, more)
        return (Turn(phrasing.question([named.name]), phrasing.answer([named.name]), (named,), REASONING),)

    def _explained(
        self, image: _Image, target: PaintedMask, text: str, explained: _Explanation, rng: np.random.Generator
    ) -> Conversation:
        """Words only for a share `explanatory`, otherwise a mask or a mask and words, one as often as the other."""
        if rng.random() < self.options.explanatory:
            return (Turn(explained.question, explained.answer, (), TEXT),)
        (turn,) = self._conversation(image, target, text, rng)
        if rng.random() < 0.5:
            return (turn,)
        answer = f"{turn.answer} {explained.answer}"
        return (Turn(add_reason_request(rng, turn.question), answer, turn.targets, REASONING),)

    def _target(self, image: _Image) -> PaintedMask:
        height, width = image_size(self._path(image))
        return PaintedMask(height, width, image.polygons, image.ignored)

    def _path(self, image: _Image) -> str:
        return self._root.image_path(image.folder, image.file_name, image.folder)

    def _sample(self, image: _Image, conversations: list[Conversation]) -> Sample:
        number = f"{os.path.basename(image.folder)}/{os.path.splitext(image.file_name)[0]}"
        return Sample(self._path(image), tuple(conversations), self.name, f"{self.name}/{number}")

    def _image(self, folder: str, file_name: str, record: Any, path: str) -> _Image:
        texts = [require(text, str, f"a text of {path}").strip() for text in require_field(record, "text", list, path)]
        polygons, ignored = [], []
        for shape in require_field(record, "shapes", list, path):
            where = f"a shape of {path}"
            label = require_field(shape, "label", str, where).lower()
            points = parse_points(require_field(shape, "points", list, where), where)
            if label == _FLAG:
                continue
            if len(points) < _POINTS_OF_A_TRIANGLE:
                self.skipped["polygon of fewer than three points"] += 1
                continue
            polygons.append(points)
            ignored.append(_IGNORE in label)
        usable = tuple(text for text in texts if text and SEG_MARKER not in text)
        is_sentence = require_field(record, "is_sentence", bool, path)
        return _Image(folder, file_name, usable, is_sentence, tuple(polygons), tuple(ignored))

    def _read_explanations(self) -> dict[str, list[_Explanation]]:
        """Explanations by image; none, with a warning, where the file is not there."""
        path = os.path.join(self._root.path, *_FOLDER, *_EXPLANATIONS)
        if not os.path.isfile(path):
            logger.warning("%s is missing: ReasonSeg is read without explanations (--explanatory has no effect)", path)
            return {}
        explanations: dict[str, list[_Explanation]] = {}
        for record in require(parse_json(read_bytes(path), path, _ENCODINGS), list, path):
            where = f"an explanation of {path}"
            question, answer, image = (require_field(record, key, str, where) for key in ("query", "outputs", "image"))
            if SEG_MARKER in question + answer:
                raise DataError(f"{where} holds {SEG_MARKER}, which explanations do not: correct the file")
            explanations.setdefault(image, []).append(_Explanation(question, answer))
        return explanations


def required_files(name: str, split: str) -> tuple[RequiredPath, ...]:
    """What `split`, which may join several, is made of; explanations may be absent."""
    return tuple(required_folder("/".join((*_FOLDER, part))) for part in _split_parts(name, split))


def _split_parts(name: str, split: str) -> list[str]:
    parts = split.split("|")
    if _EXPLANATIONS[0] in parts:
        raise DataError(
            f"{name} has no split {_EXPLANATIONS[0]!r}: its explanations belong to images of train; ask for "
            f"{name}|train and set --explanatory",
            cause=NO_SUCH_SPLIT,
        )
    return parts
