"""Semantic segmentation by annotations in COCO's form: things and their parts, each with its own outline.

Layouts: vlpart/pascal_part/{train,val}.json over vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages,
vlpart/paco/annotations/paco_lvis_v1_{train,val}.json over coco/{train2017,val2017}, and
vlpart/partimagenet/{train,val}.json (or …_format.json, as VLPart writes it) over vlpart/partimagenet/{train,val}.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.structures import SEG_MARKER
from utils.data.errors import NO_SUCH_SPLIT, DataError
from utils.data.files import DataRoot, parse_json, read_bytes, require, require_field
from utils.data.masks import PlainMask, make_union, parse_coco_mask
from utils.data.readers.base import ReaderOptions
from utils.data.readers.coco_json import (
    CocoImage,
    category_name,
    index_categories,
    index_images,
    is_crowd,
    note_odd_box,
)
from utils.data.readers.sem_seg.class_reader import ClassReader
from utils.data.readers.sem_seg.part_names import paco_names, partimagenet_names, pascal_part_names
from utils.data.required_files import RequiredPath, required_file, required_folder
from utils.data.samples import Target

_PASCAL = ("vlpart", "pascal_part")
_VOC_IMAGES = "VOCdevkit/VOC2010/JPEGImages"
_PARTIMAGENET = ("vlpart", "partimagenet")
_COCO_FOLDERS = ("train2017", "val2017")
_SPLITS = ("train", "val")
_PARTIAL = "not_exhaustive_category_ids"

_RECORDS = 1
"""Layout of the index."""
_NAMES = "names"
"""The fact that lists all classes."""

_Record = tuple[str, int, tuple[tuple[str, tuple[PlainMask, ...], tuple[PlainMask, ...]], ...]]
"""File and number of an image; of each class its name, what belongs to it, what cannot be told apart."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of one data set: its annotation files by split ("{}"), the first that is there; folders of images, one of which
    must be; what its categories are called; and (root, split, file name, annotation file) -> (folder, name in it) of an
    image.
    """

    files: tuple[str, ...]
    images: tuple[str, ...]
    names: Callable[[Mapping[int, str]], dict[int, str]]
    place: Callable[[DataRoot, str, str, str], tuple[str, str]]


@dataclass(slots=True)
class _Regions:
    """Of one class in one image: what belongs to it, and what cannot be told apart."""

    sources: list[PlainMask] = field(default_factory=list)
    crowds: list[PlainMask] = field(default_factory=list)


@dataclass(slots=True)
class _Image:
    listed: CocoImage
    classes: dict[str, _Regions] = field(default_factory=dict)


class PartReader(ClassReader):
    """One split of a data set of parts. Everything of a class in an image is one target: the union of its
    annotations; crowd regions have IGNORE_LABEL.

    Annotation ids and boxes are not read.
    """

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        annotations, _ = required_files(name, split)
        path = root.file(*(annotations.find(root.path) or annotations.paths[0]).split("/"))
        self.source = self._path = path
        self._root = root
        self._images: Sequence[_Record] = self._index(root, [path], self._parse, _RECORDS)
        self._refuse_if_empty(self._images, path)

    def __len__(self) -> int:
        return len(self._images)

    def image_path(self, index: int) -> str:
        return os.path.join(*self._placed(self._images[index][0]))

    def _class_names(self) -> Sequence[str]:
        return self.facts[_NAMES]

    def _locate(self, index: int) -> tuple[str, str]:
        file_name, number, _ = self._images[index]
        return self._root.image_path(*self._placed(file_name), self._path), str(number)

    def _targets(self, index: int) -> Sequence[Target]:
        return [Target(name, make_union(sources, crowds)) for name, sources, crowds in self._images[index][-1]]

    def _placed(self, file_name: str) -> tuple[str, str]:
        return _LAYOUTS[self.name].place(self._root, self.split, file_name, self._path)

    def _parse(self) -> Iterator[_Record]:
        path = self._path
        annotated = parse_json(read_bytes(path), path)
        names = _LAYOUTS[self.name].names(index_categories(annotated, path))
        self.facts[_NAMES] = sorted(set(names.values()))
        listed = index_images(annotated, path, self.skipped)
        for one in listed.values():
            self._placed(one.file_name)  # refuses names that lie elsewhere
        images = {number: _Image(one) for number, one in listed.items()}
        for annotation in require_field(annotated, "annotations", list, path):
            self._add(annotation, images, names)
        for image in images.values():
            self._settle(image, names)
        without = sum(not image.classes for image in images.values())
        if without:
            self.skipped["image without a usable annotation"] += without
        for image in images.values():
            classes = ((name, tuple(one.sources), tuple(one.crowds)) for name, one in image.classes.items())
            if image.classes:
                yield image.listed.file_name, image.listed.number, tuple(classes)

    def _add(self, annotation: Any, images: Mapping[int, _Image], names: dict[int, str]) -> None:
        image = images.get(require_field(annotation, "image_id", int, f"an annotation of {self._path}"))
        if image is None:
            self.skipped["annotation of an image that is not listed"] += 1
            return
        where = f"annotation {annotation.get('id')} of {self._path}"
        name = category_name(annotation, names, where)
        note_odd_box(annotation, self.noted)
        segmentation = require_field(annotation, "segmentation", object, where)
        source = parse_coco_mask(segmentation, image.listed.height, image.listed.width, where)
        if source is None:
            self.skipped["annotation without a polygon that has an inside"] += 1
            return
        regions = image.classes.setdefault(name, _Regions())
        (regions.crowds if is_crowd(annotation) else regions.sources).append(source.to_plain())

    def _settle(self, image: _Image, names: dict[int, str]) -> None:
        """Take out the classes that cannot be asked for, such as those LVIS says it did not mark everywhere."""
        where = f"'{_PARTIAL}' of image {image.listed.number} of {self._path}"
        numbers = require(image.listed.record.get(_PARTIAL) or [], list, where)
        partial = {names.get(require(number, int, f"a number in {where}")) for number in numbers}
        for name, regions in list(image.classes.items()):
            if not regions.sources:
                self.skipped["class of an image with a crowd region only"] += 1
            elif name in partial:
                self.skipped["class of an image that is not annotated exhaustively"] += 1
            elif SEG_MARKER in name:
                self.skipped["class whose name holds a marker"] += 1
            else:
                continue
            del image.classes[name]


def required_files(name: str, split: str) -> tuple[RequiredPath, RequiredPath]:
    """What the data set `name` is made of: its annotations and its images."""
    if split not in _SPLITS:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(_SPLITS)}: name one of these", NO_SUCH_SPLIT)
    layout = _LAYOUTS[name]
    return (
        required_file(*(pattern.format(split) for pattern in layout.files)),
        required_folder(*(pattern.format(split) for pattern in layout.images)),
    )


def _pascal_place(root: DataRoot, split: str, name: str, named_by: str) -> tuple[str, str]:
    return root.resolve_folder(_PASCAL, (_VOC_IMAGES,), f"{_VOC_IMAGES}/{name}", named_by)


def _paco_place(root: DataRoot, split: str, name: str, named_by: str) -> tuple[str, str]:
    """PACO names images "train2017/NAME.jpg" below coco/."""
    return root.resolve_folder(("coco",), _COCO_FOLDERS, name, named_by)


def _partimagenet_place(root: DataRoot, split: str, name: str, named_by: str) -> tuple[str, str]:
    """Images lie in a folder per ImageNet class, with which their names begin ("n01440764_1.JPEG"), or all in one."""
    folder, name = root.resolve_folder(_PARTIMAGENET, (split,), f"{split}/{name}", named_by)
    in_class = f"{name.partition('_')[0]}/{name}"
    flat = "/" in name or not os.path.exists(os.path.join(folder, in_class))
    return folder, name if flat else in_class


_LAYOUTS = {
    "pascal_part": _Layout(
        ("vlpart/pascal_part/{}.json",),
        (f"vlpart/pascal_part/{_VOC_IMAGES}",),
        pascal_part_names,
        _pascal_place,
    ),
    "paco_lvis": _Layout(
        ("vlpart/paco/annotations/paco_lvis_v1_{}.json",),
        tuple(f"coco/{folder}" for folder in _COCO_FOLDERS),
        paco_names,
        _paco_place,
    ),
    "partimagenet": _Layout(
        ("vlpart/partimagenet/{}_format.json", "vlpart/partimagenet/{}.json"),
        ("vlpart/partimagenet/{}",),
        partimagenet_names,
        _partimagenet_place,
    ),
}

PART_SETS = tuple(_LAYOUTS)
