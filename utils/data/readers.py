"""The data sets that can be read, by name. A new data set is a new reader and a line here."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.multi_reason_seg import MultiReasonSegReader
from utils.data.reader import Reader, ReaderOptions
from utils.data.reason_seg import ReasonSegReader
from utils.data.refer_seg import REFER_SETS, ReferSegReader
from utils.data.samples import Sample
from utils.data.sem_seg.label_maps import LABEL_MAP_SETS, LabelMapReader
from utils.data.sem_seg.parts import PART_SETS, PartReader
from utils.data.vqa import VQA_SETS, VqaReader

JOIN = "||"
"""Parts the names in a flag that takes several."""

MUSE, REASON_SEG = "MultiReasonSeg", "ReasonSeg"

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "sem_seg": (*LABEL_MAP_SETS, *PART_SETS),
    "refer_seg": tuple(REFER_SETS),
    "vqa": VQA_SETS,
    "multi_reason_seg": (MUSE,),
    "reason_seg": (REASON_SEG,),
}

_EVALUATION_SEED = 20231204


def build_reader(name: str, root: str | os.PathLike[str], split: str, options: ReaderOptions | None = None) -> Reader:
    """The reader of split `split` of the data set `name` below the data root.

    A referring set may say how it is split, Mapillary which edition it is: "refcocog|google", "mapillary|v1.2".
    DataError in one sentence for a name without a reader, and for anything missing or malformed on disk.
    """
    return _build(name, DataRoot(root), split, options or ReaderOptions())


def build_training_readers(
    family: str, names: str, root: str | os.PathLike[str], options: ReaderOptions
) -> list[Reader]:
    """The training readers of one family of --dataset; `names` is the value of its own flag, joined by JOIN.

    ReasonSeg carries its splits in its name: "ReasonSeg|train|val". MUSE has no flag: `names` is not read.
    """
    if family not in FAMILIES:
        raise DataError(f"--dataset names {family!r}; expected {', '.join(FAMILIES)}, joined by {JOIN!r}")
    if family == "multi_reason_seg":
        return [build_reader(MUSE, root, "train", options)]
    flag = f"--{family}_data"
    asked = _parted(names, flag)
    for name in asked:
        if name.split("|")[0] not in FAMILIES[family]:
            raise DataError(_no_reader(name, flag, FAMILIES[family]))
    if family == "reason_seg":
        return [build_reader(REASON_SEG, root, name.partition("|")[2] or "train", options) for name in asked]
    return [build_reader(name, root, "train", options) for name in asked]


class EvalReader:
    """Held-out samples in a fixed order and wording: every question about a picture is a conversation of one turn."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        """Number of pictures."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, the same at every call."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        reader = self.readers[which]
        rng = np.random.default_rng((_EVALUATION_SEED, index))
        return reader.read_all(index - int(self._ends[which]) + len(reader), rng)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def build_eval_reader(spec: str, root: str | os.PathLike[str], options: ReaderOptions | None = None) -> EvalReader:
    """The samples of --val_dataset: "refcoco|unc|val", "refcocog|google|val", "ReasonSeg|val",
    "MultiReasonSeg|test_less", "ade20k|val" …, several joined by JOIN. DataError in one sentence when one of them
    cannot be read.
    """
    data_root = DataRoot(root)
    readers = []
    for name in _parted(spec, "--val_dataset"):
        base, _, split = name.rpartition("|")
        if not base:
            raise DataError(f"{name!r} in --val_dataset names no split; expected DATASET|SPLIT, such as ReasonSeg|val")
        readers.append(_build(base, data_root, split, options or ReaderOptions()))
    return EvalReader(readers)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no garbage; looking for it all the time takes longer than the parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _build(name: str, root: DataRoot, split: str, options: ReaderOptions) -> Reader:
    with _no_garbage_collection():
        return _new_reader(name, root, split, options)


def _new_reader(name: str, root: DataRoot, split: str, options: ReaderOptions) -> Reader:
    base, _, edition = name.partition("|")
    if base in REFER_SETS:
        return ReferSegReader(base, root, split, options, edition or None)
    if base in LABEL_MAP_SETS:
        return LabelMapReader(base, root, split, options, edition or None)
    if name in PART_SETS:
        return PartReader(name, root, split, options)
    if name in VQA_SETS:
        return VqaReader(name, root, split, options)
    if name == MUSE:
        return MultiReasonSegReader(name, root, split, options)
    if name == REASON_SEG:
        return ReasonSegReader(name, root, split, options)
    raise DataError(_no_reader(name, "the data set", tuple(known for family in FAMILIES.values() for known in family)))


def _no_reader(name: str, named_in: str, supported: tuple[str, ...]) -> str:
    return f"there is no reader for {name!r} ({named_in}); supported are {', '.join(supported)}: leave it out"


def _parted(names: str, flag: str) -> list[str]:
    """The names between JOINs. DataError when one is empty."""
    parts = [part.strip() for part in names.split(JOIN)]
    if not all(parts):
        raise DataError(f"{flag} is {names!r}; expected names joined by {JOIN!r}")
    return parts
