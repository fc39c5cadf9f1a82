"""Images that training and evaluation share: recognised by their number or path, and by their content."""

import os
import re
from collections.abc import Iterable, Sequence

from utils.data.check.report import Leak, SetReport
from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.readers.base import ReaderOptions
from utils.data.readers.custom.layout import CUSTOM
from utils.data.readers.multi_reason_seg import MUSE_SPLITS
from utils.data.readers.refer_seg import REFER_SETS, images_by_split
from utils.data.readers.registry import MUSE, REASON_SEG, build_reader
from utils.data.requested_sets import RequestedSet

_COCO_FOLDERS = ("train2014", "val2014", "train2017", "val2017")
_NUMBER = re.compile(r"(?:COCO_)?(?:[a-z]+\d{4}_)?0*(\d+)")
_TRAINING = "train"
_OTHER_SPLITS = {MUSE: MUSE_SPLITS[1:], REASON_SEG: ("val", "test")}


def image_key(path: str) -> str:
    """What an image is recognised by. The images of COCO have one number in all its editions: train2014's
    COCO_train2014_000000000009.jpg is train2017's 000000000009.jpg.
    """
    folder, name = os.path.split(path)
    number = _NUMBER.fullmatch(os.path.splitext(name)[0])
    if number and os.path.basename(folder) in _COCO_FOLDERS:
        return _coco_key(int(number[1]))
    return os.path.normpath(path)


def find_leaks(reports: Sequence[SetReport], root: str, index_dir: str = "") -> list[Leak]:
    """What every training set shares with every evaluation split that was asked for or that lies in the root."""
    training = [report for report in reports if report.is_training]
    asked = [report for report in reports if not report.is_training]
    elsewhere = _other_evaluation_images(training, {str(report) for report in asked}, root, index_dir)
    found = []
    for report in training:
        known = [(str(other), other.keys) for other in asked] + elsewhere
        for name, keys in known:
            found += _leak(report, name, "image id", report.keys & keys)
        for other in asked:
            same = report.contents.keys() & other.contents.keys()
            found += _leak(report, str(other), "content", [report.contents[content] for content in same])
    return found


def _leak(report: SetReport, evaluation: str, by: str, shared: Iterable[str]) -> list[Leak]:
    names = sorted(shared)
    return [Leak(str(report), evaluation, by, len(names), names[0])] if names else []


def _other_evaluation_images(
    training: Sequence[SetReport], asked: set[str], root: str, index_dir: str
) -> list[tuple[str, set[str]]]:
    """(data set and split, images) of the evaluation splits in the root that were not asked for."""
    try:
        data_root = DataRoot(root)
    except DataError:
        return []
    found = _referring_images(data_root)
    for name in dict.fromkeys([*_OTHER_SPLITS, *(report.name for report in training)]):
        for split in _OTHER_SPLITS.get(name, ("val",)):
            one = RequestedSet(name, split, False)
            if name.partition("|")[0] not in REFER_SETS and str(one) not in asked:
                found.append((str(one), _images_of(one, root, index_dir)))
    return [(name, keys) for name, keys in found if name not in asked and keys]


def _referring_images(root: DataRoot) -> list[tuple[str, set[str]]]:
    """Of the val and test splits of all referring sets over COCO: their refs alone name the images by number."""
    found = []
    for name, layout in REFER_SETS.items():
        for split_by in layout.split_by if layout.images[-1] in _COCO_FOLDERS else ():
            try:
                splits = images_by_split(root, name, split_by)
            except DataError:
                continue  # whoever asks for the set is told what is wrong with it
            label = name if split_by == layout.split_by[0] else f"{name}|{split_by}"
            found += [
                (f"{label} ({split})", {_coco_key(number) for number in numbers})
                for split, numbers in splits.items()
                if split != _TRAINING
            ]
    return found


def _images_of(requested: RequestedSet, root: str, index_dir: str) -> set[str]:
    if requested.name.startswith(CUSTOM) and not os.path.isdir(
        os.path.join(root, *requested.name.split("|"), requested.split)
    ):
        return set()
    try:
        reader = build_reader(requested.name, root, requested.split, ReaderOptions(index_dir=index_dir))
    except DataError:
        return set()  # not there, or not readable: nobody asked for it
    return {image_key(path) for path in map(reader.image_path, range(len(reader))) if path}


def _coco_key(number: int) -> str:
    return f"COCO {number}"
