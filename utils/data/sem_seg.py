"""Semantic segmentation: a label map per picture, one class of it asked for by name.

Layout of ade20k (ADEChallengeData2016): ade20k/{images,annotations}/<training|validation>.
"""

import os

import numpy as np

from utils.data.ade20k_classes import ADE20K_CLASSES
from utils.data.errors import DataError
from utils.data.files import DataRoot, digest, list_pictures, read_label_map
from utils.data.masks import LabelMask
from utils.data.reader import Reader, ReaderOptions, draw
from utils.data.samples import Conversation, Sample, Target
from utils.data.templates import pick_phrasing, target_name

SEM_SEG_SETS = ("ade20k",)

_SPLIT_FOLDERS = {"train": "training", "val": "validation"}
_OTHER = 0
_LABEL_VALUES = 256


class Ade20kReader(Reader):
    """ADEChallengeData2016. Label 0, "other", is no class and takes no part in losses; label n is class n − 1."""

    def __init__(self, name: str, root: DataRoot, split: str, options: ReaderOptions) -> None:
        super().__init__(name, split, options)
        if split not in _SPLIT_FOLDERS:
            raise DataError(f"{name} has no split {split!r}; it has {', '.join(_SPLIT_FOLDERS)}: name one of these")
        self._root = root
        self._pictures = root.folder(name, "images", _SPLIT_FOLDERS[split])
        self._labels = root.folder(name, "annotations", _SPLIT_FOLDERS[split])
        names = list_pictures(self._pictures)
        labelled = set(list_pictures(self._labels))
        self._names = [picture for picture in names if _label_file(picture) in labelled]
        self.skipped["picture without a label map"] += len(names) - len(self._names)
        self.fingerprint = digest("\n".join(self._names).encode())
        self._refuse_if_empty(self._names, self._pictures)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        labels, present = self._label_map(index)
        options = self.options
        waiting = draw(rng, present, options.num_classes_per_sample * options.num_classes_per_question)[::-1]
        conversations: list[Conversation] = []
        while waiting and len(conversations) < options.num_classes_per_sample:
            wanted = int(rng.integers(1, options.num_classes_per_question + 1))
            together = [waiting.pop() for _ in range(min(wanted, len(waiting)))]
            conversations.append(self._conversation(labels, together, rng))
        return self._sample(index, conversations or [self._about_an_absent_class(rng)])

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        labels, present = self._label_map(index)
        conversations = [self._conversation(labels, [label], rng) for label in present]
        return self._sample(index, conversations or [self._about_an_absent_class(rng)])

    def _label_map(self, index: int) -> tuple[np.ndarray, list[int]]:
        """The label map and the labels of the classes that occur in it."""
        path = self._root.picture(self._labels, _label_file(self._names[index]), self._labels)
        labels = read_label_map(path)
        counts = np.bincount(labels.ravel(), minlength=_LABEL_VALUES)
        present = [int(label) for label in np.flatnonzero(counts) if label != _OTHER]
        if present and present[-1] > len(ADE20K_CLASSES):
            raise DataError(
                f"{path} holds label {present[-1]}; expected 0 to {len(ADE20K_CLASSES)}: use ADEChallengeData2016, "
                f"not the "
                "full ADE20K release"
            )
        return labels, present

    def _conversation(self, labels: np.ndarray, together: list[int], rng: np.random.Generator) -> Conversation:
        names = [target_name(ADE20K_CLASSES[label - 1]) for label in together]
        targets = tuple(
            Target(name, LabelMask(labels, label, _OTHER)) for name, label in zip(names, together, strict=True)
        )
        return (pick_phrasing(rng, self.options.use_expand_question_list).turn(names, targets),)

    def _about_an_absent_class(self, rng: np.random.Generator) -> Conversation:
        """For a picture all of whose pixels are "other": there any class is absent."""
        name = target_name(ADE20K_CLASSES[rng.integers(len(ADE20K_CLASSES))])
        return (pick_phrasing(rng, self.options.use_expand_question_list).turn([name], ()),)

    def _sample(self, index: int, conversations: list[Conversation]) -> Sample:
        name = self._names[index]
        path = self._root.picture(self._pictures, name, self._pictures)
        return Sample(path, tuple(conversations), self.name, f"{self.name}/{self.split}/{os.path.splitext(name)[0]}")


def _label_file(picture: str) -> str:
    return os.path.splitext(picture)[0] + ".png"
