"""Semantic segmentation by label maps: a PNG beside each image holds the number of a class for every pixel.

Layouts: ade20k/{images,annotations}/{training,validation} (ADEChallengeData2016), cocostuff/{train2017,val2017}/*.png
over coco/{train2017,val2017}, mapillary/config_<version>.json with mapillary/{training,validation}/images and
…/<version>/labels; Mapillary's first edition has config.json and …/labels instead.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.structures import IGNORE_LABEL
from utils.data.errors import EMPTY_CLASS_LIST, NO_SUCH_SPLIT, DataError
from utils.data.files import (
    OTHER_EDITION,
    DataRoot,
    hash_bytes,
    list_images,
    parse_json,
    read_bytes,
    read_label_map,
    require,
    require_field,
)
from utils.data.masks import LabelMask
from utils.data.readers.base import ReaderOptions
from utils.data.readers.sem_seg.class_reader import ClassReader
from utils.data.readers.sem_seg.label_map_classes import ADE20K_CLASSES, COCO_STUFF_CLASSES
from utils.data.required_files import RequiredPath, required_file, required_folder
from utils.data.samples import Target

_LABEL_VALUES = 256
_IGNORED = ""
"""Stands for a class in a list of names: its pixels take part in no loss."""

_OTHER_FOLDERS = {"train": "training", "val": "validation"}
_COCO_FOLDERS = {"train": "train2017", "val": "val2017"}
_MAPILLARY = "mapillary"
_FOLDERS = {"ade20k": _OTHER_FOLDERS, "cocostuff": _COCO_FOLDERS, _MAPILLARY: _OTHER_FOLDERS}
"""What each data set calls its splits on the disk."""
_PARTS = {"ade20k": ("ade20k/images/{}", "ade20k/annotations/{}"), "cocostuff": ("coco/{}", "cocostuff/{}")}
"""Folders of images and of label maps, by the split's own name."""
# By version: the file of classes and the folder of labels below that of the split, the first that is there.
_MAPILLARY_LAYOUTS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "v2.0": (("config_v2.0.json", ("v2.0", "labels")),),
    "v1.2": (("config_v1.2.json", ("v1.2", "labels")), ("config.json", ("labels",))),
}


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the maps lie, and what their labels mean.

    names: of each label, the class or _IGNORED. other: pixels of this label are ignored too. hint: what to do about
    labels beyond. source: content of a file of classes, for the fingerprint.
    """

    images: str
    labels: str
    names: tuple[str, ...]
    hint: str
    other: int = IGNORE_LABEL
    source: bytes = b""


class LabelMapReader(ClassReader):
    """One split of a data set of label maps. `version` chooses among editions of Mapillary.

    Labels of one name are one class. Pixels without a class have IGNORE_LABEL in every mask.
    """

    def __init__(
        self, name: str, root: DataRoot, split: str, options: ReaderOptions, version: str | None = None
    ) -> None:
        super().__init__(name, split, options)
        if version is not None and name != _MAPILLARY:
            raise DataError(f"{name} has no editions such as {version!r}; name it without one")
        layout = _mapillary(root, split, version) if name == _MAPILLARY else _LAYOUTS[name](root, split)
        self._root, self._layout = root, layout
        self.source = layout.labels
        names = list_images(layout.images)
        labelled = set(list_images(layout.labels))
        self._names = [image for image in names if _label_file(image) in labelled]
        without = {
            "image without a label map": len(names) - len(self._names),
            "label map without an image": len(labelled) - len({_label_file(image) for image in self._names}),
        }
        self.skipped.update({cause: count for cause, count in without.items() if count})
        self.fingerprint = hash_bytes("\n".join(self._names).encode() + b"\0" + layout.source)
        self._refuse_if_empty(self._names, layout.images)
        self._classes = list(dict.fromkeys(name for name in layout.names if name != _IGNORED))
        self._class_of = _classes_of_labels(layout, self._classes)

    def __len__(self) -> int:
        return len(self._names)

    def image_path(self, index: int) -> str:
        return os.path.join(self._layout.images, self._names[index])

    def _class_names(self) -> Sequence[str]:
        return self._classes

    def _locate(self, index: int) -> tuple[str, str]:
        name = self._names[index]
        return self._root.image_path(self._layout.images, name, self._layout.images), os.path.splitext(name)[0]

    def _targets(self, index: int) -> Sequence[Target]:
        layout = self._layout
        path = self._root.image_path(layout.labels, _label_file(self._names[index]), layout.labels)
        labels = read_label_map(path)
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=_LABEL_VALUES))
        unknown = [int(label) for label in present if label >= len(layout.names) and label != layout.other]
        if unknown:
            raise DataError(
                f"{path} holds label {unknown[-1]}; expected 0 to {len(layout.names) - 1}: {layout.hint}",
                cause=OTHER_EDITION,
            )
        classes = self._class_of[labels]
        shown = dict.fromkeys(int(self._class_of[label]) for label in present)
        return [
            Target(self._classes[number], LabelMask(classes, number, IGNORE_LABEL))
            for number in shown
            if number != IGNORE_LABEL
        ]


def _classes_of_labels(layout: _Layout, classes: Sequence[str]) -> np.ndarray:
    """(256,) uint8: the number of each label's class, IGNORE_LABEL for labels without one."""
    numbers = {name: number for number, name in enumerate(classes)}
    table = np.full(_LABEL_VALUES, IGNORE_LABEL, dtype=np.uint8)
    for label, name in enumerate(layout.names):
        if name != _IGNORED and label != layout.other:
            table[label] = numbers[name]
    return table


def _ade20k(root: DataRoot, split: str) -> _Layout:
    """Label 0, "other", is no class; label n is class n − 1."""
    folder = _folder_of("ade20k", split, _FOLDERS["ade20k"])
    images, labels = (root.folder(*pattern.format(folder).split("/")) for pattern in _PARTS["ade20k"])
    return _Layout(
        images,
        labels,
        (_IGNORED, *ADE20K_CLASSES),
        "use ADEChallengeData2016, not the full ADE20K release",
        other=0,
    )


def _cocostuff(root: DataRoot, split: str) -> _Layout:
    """255 is unlabelled. Classes with a dash in their names are the rest of something ("wall-other") or a second name
    of a thing ("door-stuff"): nobody asks for them, and no answer is wrong there.
    """
    folder = _folder_of("cocostuff", split, _FOLDERS["cocostuff"])
    images, labels = (root.folder(*pattern.format(folder).split("/")) for pattern in _PARTS["cocostuff"])
    return _Layout(
        images,
        labels,
        tuple(_IGNORED if "-" in name else name for name in COCO_STUFF_CLASSES),
        "use the PNGs of stuffthingmaps_trainval2017.zip",
    )


def _mapillary(root: DataRoot, split: str, version: str | None) -> _Layout:
    """`version` of Mapillary Vistas, without it the newest that is there."""
    candidates = _mapillary_editions(version)
    folder = _folder_of(_MAPILLARY, split, _FOLDERS[_MAPILLARY])
    config, labels = next((found for found in candidates if root.has(_MAPILLARY, found[0])), candidates[0])
    path = root.file(_MAPILLARY, config)
    content = read_bytes(path)
    return _Layout(
        root.folder(_MAPILLARY, folder, "images"),
        root.folder(_MAPILLARY, folder, *labels),
        _mapillary_names(parse_json(content, path), path),
        f"{path} is of another edition than the labels, take both from one",
        source=content,
    )


def required_files(name: str, split: str, version: str | None = None) -> tuple[RequiredPath, ...]:
    """What the data set `name` is made of; of Mapillary the edition `version`, or any."""
    if name != _MAPILLARY:
        folder = _folder_of(name, split, _FOLDERS[name])
        return tuple(required_folder(pattern.format(folder)) for pattern in _PARTS[name])
    folder = _folder_of(name, split, _FOLDERS[name])
    editions = _mapillary_editions(version)
    labels = ["/".join((name, folder, *below)) for _, below in editions]
    configs = [f"{name}/{config}" for config, _ in editions]
    return required_file(*configs), required_folder(f"{name}/{folder}/images"), required_folder(*labels)


def _mapillary_editions(version: str | None) -> list[tuple[str, tuple[str, ...]]]:
    if version is not None and version not in _MAPILLARY_LAYOUTS:
        raise DataError(f"{_MAPILLARY} has the editions {', '.join(_MAPILLARY_LAYOUTS)}, not {version!r}: name one")
    asked = [version] if version else list(_MAPILLARY_LAYOUTS)
    return [edition for name in asked for edition in _MAPILLARY_LAYOUTS[name]]


def _mapillary_names(config: Any, path: str) -> tuple[str, ...]:
    """The name of every label of a Mapillary config, in the order of the labels."""
    names = []
    for number, record in enumerate(require_field(config, "labels", list, path)):
        where = f"label {number} of {path}"
        kind, readable = (require_field(record, key, str, where) for key in ("name", "readable"))
        counts = require(record.get("evaluate", True), bool, f"'evaluate' of {where}")
        vague = kind.startswith("void--") or kind.endswith("--ambiguous")
        names.append(_spoken(readable) if counts and not vague else _IGNORED)
    if not any(names) or len(names) >= _LABEL_VALUES:
        raise DataError(
            f"{path} lists {len(names)} labels; expected up to 255, some of them classes: fetch it again",
            cause=OTHER_EDITION if any(names) else EMPTY_CLASS_LIST,
        )
    return tuple(names)


def _spoken(readable: str) -> str:
    """A Mapillary class in the words one asks with.

    >>> _spoken("Lane Marking - Dashed Line"), _spoken("Traffic Sign (Back)")
    ('dashed line lane marking', 'traffic sign back')
    """
    plain = readable.lower().replace("(", " ").replace(")", " ")
    return " ".join(" ".join(reversed(plain.split(" - "))).split())


def _folder_of(name: str, split: str, folders: Mapping[str, str]) -> str:
    if split not in folders:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(folders)}: name one of these", NO_SUCH_SPLIT)
    return folders[split]


def _label_file(image: str) -> str:
    return os.path.splitext(image)[0] + ".png"


_LAYOUTS: Mapping[str, Callable[[DataRoot, str], _Layout]] = {"ade20k": _ade20k, "cocostuff": _cocostuff}

LABEL_MAP_SETS = (*_LAYOUTS, _MAPILLARY)
