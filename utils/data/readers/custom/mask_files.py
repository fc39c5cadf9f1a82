"""One's own images with masks as PNGs, in two forms.

masks/classes.json {"1": "cat", "2": "sofa"} with masks/IMAGE.png: each pixel holds the number of its class, 0 is
background, 255 counts neither for nor against. Without classes.json masks/IMAGE/THE_NAME.png: one file per target,
whose name says what it is; whatever is not black belongs to it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.structures import IGNORE_LABEL, SEG_MARKER
from utils.data.errors import EMPTY_CLASS_LIST, DataError
from utils.data.files import (
    OTHER_EDITION,
    DataRoot,
    hash_bytes,
    list_images,
    parse_json,
    read_binary_mask,
    read_bytes,
    read_label_map,
    require,
)
from utils.data.masks import LabelMask
from utils.data.readers.base import ReaderOptions
from utils.data.readers.custom.layout import CUSTOM, IMAGES, MASKS, mask_file
from utils.data.readers.phrase_reader import PhraseReader, RequestedPhrase
from utils.data.samples import Target
from utils.data.templates import target_name

CLASSES = "classes.json"
_BACKGROUND = 0


@dataclass(frozen=True, slots=True)
class FileMask:
    """A mask in a file of its own: 1 where the image in it is not black."""

    path: str

    def __call__(self) -> np.ndarray:
        return read_binary_mask(self.path)


class MaskFolderReader(PhraseReader):
    """What both forms share: the images of custom/NAME/SPLIT/images that have something in …/masks."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(f"{CUSTOM}|{name}", split, options)
        self._root = root
        self._folder = root.folder(CUSTOM, name, split, IMAGES)
        self._masks = self.source = root.folder(CUSTOM, name, split, MASKS)
        self._images: list[str] = []

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return f"{self._folder}/{self._images[index]}"

    def _locate(self, index: int) -> tuple[str, str]:
        name = self._images[index]
        return self._root.image_path(self._folder, name, self._folder), _stem(name)

    def _settle(self, named: set[str], fingerprint: bytes) -> None:
        """Keep the images whose name, less its ending, is in `named`; count what has no partner."""
        there = list_images(self._folder)
        self._images = [image for image in there if _stem(image) in named]
        without = {
            "image without a mask": len(there) - len(self._images),
            "mask without an image": len(named - {_stem(image) for image in there}),
        }
        self.skipped.update({cause: count for cause, count in without.items() if count})
        self.fingerprint = hash_bytes("\n".join(self._images).encode() + b"\0" + fingerprint)
        self._refuse_if_empty(self._images, self._masks)


class ClassMaskReader(MaskFolderReader):
    """One class number per pixel. An image that shows no class is asked for one that is absent."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, root, split, options)
        self.source = os.path.join(self._masks, CLASSES)
        content = read_bytes(self.source)
        self._names = _class_names(parse_json(content, self.source), self.source)
        labels = [file for file in list_images(self._masks) if file.endswith(".png")]
        self._settle({_stem(file) for file in labels}, content)

    def _requested_phrases(self, index: int) -> Sequence[RequestedPhrase]:
        path = mask_file(self._root, self._masks, f"{_stem(self._images[index])}.png", self._masks)
        labels = read_label_map(path)
        present = [int(value) for value in np.unique(labels) if value not in (_BACKGROUND, IGNORE_LABEL)]
        unknown = [value for value in present if value not in self._names]
        if unknown:
            raise DataError(
                f"{path} holds label {unknown[-1]}, which {self.source} does not name: name it, or make it "
                f"{_BACKGROUND} (background) or {IGNORE_LABEL} (left out)",
                cause=OTHER_EDITION,
            )
        shown = dict.fromkeys(self._names[value] for value in present)
        if not shown:
            absent = sorted(set(self._names.values()))
            return [RequestedPhrase(absent[index % len(absent)], ())]
        return [RequestedPhrase(name, (Target(name, self._mask(labels, name)),)) for name in shown]

    def _mask(self, labels: np.ndarray, name: str) -> LabelMask:
        """All values of one name as one class, number 1."""
        values = [value for value, other in self._names.items() if other == name]
        merged = np.isin(labels, values).astype(np.uint8)
        merged[labels == IGNORE_LABEL] = IGNORE_LABEL
        return LabelMask(merged, 1, IGNORE_LABEL)


class TargetMaskReader(MaskFolderReader):
    """One file per target."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, root, split, options)
        with os.scandir(self._masks) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir())
        self._files: dict[str, list[str]] = {}
        for folder in folders:
            files = list_images(os.path.join(self._masks, folder))
            self._files[folder] = [file for file in files if _spoken(file)]
            if len(self._files[folder]) < len(files):
                self.skipped["mask whose name says nothing"] += len(files) - len(self._files[folder])
        named = {folder for folder, files in self._files.items() if files}
        self._settle(
            named, "\n".join(f"{folder}/{file}" for folder in folders for file in self._files[folder]).encode()
        )

    def _requested_phrases(self, index: int) -> Sequence[RequestedPhrase]:
        folder = _stem(self._images[index])
        asked = []
        for file in self._files[folder]:
            path = mask_file(self._root, self._masks, f"{folder}/{file}", self._masks)
            asked.append(RequestedPhrase(_spoken(file), (Target(_spoken(file), FileMask(path)),)))
        return asked


def mask_folder_reader(name: str, root: DataRoot, split: str, options: ReaderOptions) -> MaskFolderReader:
    """The reader of the form that custom/NAME/SPLIT/masks has."""
    kind = ClassMaskReader if root.has(CUSTOM, name, split, MASKS, CLASSES) else TargetMaskReader
    return kind(name, root, split, options)


def _class_names(content: object, path: str) -> dict[int, str]:
    names = {}
    for key, name in require(content, dict, path).items():
        said = target_name(require(name, str, f"class {key} of {path}"))
        if not (key.isascii() and key.isdigit() and _BACKGROUND < int(key) < IGNORE_LABEL) or not said:
            raise DataError(
                f"{path} calls class {key!r} {name!r}; expected numbers from 1 to {IGNORE_LABEL - 1} with a name each: "
                f"correct the file"
            )
        names[int(key)] = said
    if not names:
        raise DataError(f"{path} names no class; expected at least one: add it", EMPTY_CLASS_LIST)
    return names


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _spoken(file: str) -> str:
    """What a mask's file name says: "red_cup.png" is the red cup; empty where it cannot be said."""
    name = target_name(_stem(file).replace("_", " "))
    return "" if SEG_MARKER in name else name
