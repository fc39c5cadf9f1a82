"""The data sets that can be read, by name. A new data set is a new reader and a line here."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.readers import multi_reason_seg, reason_seg, refer_seg, vqa
from utils.data.readers.base import Reader, ReaderOptions
from utils.data.readers.custom import layout as custom_layout
from utils.data.readers.custom.coco import CustomCocoReader
from utils.data.readers.custom.json_lines import JsonLinesReader
from utils.data.readers.custom.layout import COCO_FILE, CUSTOM, LINES_FILE, MASKS, find_form
from utils.data.readers.custom.mask_files import mask_folder_reader
from utils.data.readers.multi_reason_seg import MultiReasonSegReader
from utils.data.readers.reason_seg import ReasonSegReader
from utils.data.readers.refer_seg import REFER_SETS, ReferSegReader
from utils.data.readers.refer_seg_joined import JoinedPhrasesReader, without_prefix
from utils.data.readers.sem_seg import label_maps
from utils.data.readers.sem_seg import parts as part_sets
from utils.data.readers.sem_seg.label_maps import LABEL_MAP_SETS, LabelMapReader
from utils.data.readers.sem_seg.parts import PART_SETS, PartReader
from utils.data.readers.vqa import VQA_SETS, VqaReader
from utils.data.required_files import RequiredPath
from utils.data.samples import Sample

JOIN = "||"
"""Parts the names in a flag that takes several."""

MUSE, REASON_SEG = "MultiReasonSeg", "ReasonSeg"

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "sem_seg": (*LABEL_MAP_SETS, *PART_SETS),
    "refer_seg": tuple(REFER_SETS),
    "vqa": VQA_SETS,
    "multi_reason_seg": (MUSE,),
    "reason_seg": (REASON_SEG,),
    CUSTOM: (f"{CUSTOM}|NAME",),
}

CUSTOM_FORMS: Mapping[str, Callable[[str, DataRoot, str, ReaderOptions], Reader]] = {
    COCO_FILE: CustomCocoReader,
    LINES_FILE: JsonLinesReader,
    MASKS: mask_folder_reader,
}
"""The file or folder beside images/ that tells a form of annotations, and what makes its reader."""

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
    """The training readers of one family of --dataset; see `training_sets`."""
    return [build_reader(name, root, split, options) for name, split in training_sets(family, names)]


def training_sets(family: str, names: str) -> list[tuple[str, str]]:
    """(data set, split) of all that a family of --dataset trains on; `names` is the value of its own flag, joined by
    JOIN.

    ReasonSeg carries its splits in its name: "ReasonSeg|train|val". MUSE has no flag: `names` is not read. Of custom,
    `names` are folders below custom/. DataError for a family or a name without a reader.
    """
    if family not in FAMILIES:
        raise DataError(f"--dataset names {family!r}; expected {', '.join(FAMILIES)}, joined by {JOIN!r}")
    if family == "multi_reason_seg":
        return [(MUSE, "train")]
    flag = f"--{family}_data"
    asked = _split_names(names, flag)
    if family == CUSTOM:
        return [(f"{CUSTOM}|{name}", "train") for name in asked]
    for name in asked:
        if name.split("|")[0] not in FAMILIES[family]:
            raise DataError(_no_reader(name, flag, FAMILIES[family]))
    if family == "reason_seg":
        return [(REASON_SEG, name.partition("|")[2] or "train") for name in asked]
    return [(name, "train") for name in asked]


def required_files_of(name: str, split: str) -> tuple[RequiredPath, ...]:
    """The files and folders that `build_reader` needs for `name` and `split`. DataError for what has no reader."""
    base, _, edition = name.partition("|")
    if base in REFER_SETS:
        return refer_seg.required_files(base, edition or None)
    if (joined := without_prefix(base)) is not None:
        return refer_seg.required_files(joined, edition or None)
    if base in LABEL_MAP_SETS:
        return label_maps.required_files(base, split, edition or None)
    if name in PART_SETS:
        return part_sets.required_files(name, split)
    if name in VQA_SETS:
        return vqa.required_files(name, split)
    if name == MUSE:
        return multi_reason_seg.required_files(split)
    if name == REASON_SEG:
        return reason_seg.required_files(name, split)
    if base == CUSTOM:
        return custom_layout.required_files(edition, split)
    raise DataError(_unknown(name))


class EvalReader:
    """Held-out samples in a fixed order and wording: every question about an image is a conversation of one turn."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        """Number of images."""
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


def build_eval_reader(
    spec: str, root: str | os.PathLike[str], options: ReaderOptions | None = None, index_dir: str = ""
) -> EvalReader:
    """The samples of --val_dataset: "refcoco|unc|val", "refcocog|google|val", "ReasonSeg|val",
    "MultiReasonSeg|test_less", "ade20k|val", "multirefcoco|unc|val" (several phrases in a question) …, several
    joined by JOIN. DataError in one sentence when one of them cannot be read.
    """
    data_root, chosen = DataRoot(root), options or ReaderOptions(index_dir=index_dir)
    return EvalReader([_build(name, data_root, split, chosen) for name, split in evaluation_sets(spec)])


def evaluation_sets(spec: str) -> list[tuple[str, str]]:
    """(data set, split) of all that --val_dataset names. DataError for a name without a split."""
    found = []
    for name in _split_names(spec, "--val_dataset"):
        base, _, split = name.rpartition("|")
        if not base:
            raise DataError(f"{name!r} in --val_dataset names no split; expected DATASET|SPLIT, such as ReasonSeg|val")
        found.append((base, split))
    return found


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
    if (joined := without_prefix(base)) is not None:
        return JoinedPhrasesReader(joined, root, split, options, edition or None)
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
    if base == CUSTOM:
        return CUSTOM_FORMS[find_form(root, edition, split, tuple(CUSTOM_FORMS))](edition, root, split, options)
    raise DataError(_unknown(name))


def _unknown(name: str) -> str:
    return _no_reader(name, "the data set", tuple(known for family in FAMILIES.values() for known in family))


def _no_reader(name: str, named_in: str, supported: tuple[str, ...]) -> str:
    return f"there is no reader for {name!r} ({named_in}); supported are {', '.join(supported)}: leave it out"


def _split_names(names: str, flag: str) -> list[str]:
    """The names between JOINs. DataError when one is empty."""
    parts = [part.strip() for part in names.split(JOIN)]
    if not all(parts):
        raise DataError(f"{flag} is {names!r}; expected names joined by {JOIN!r}")
    return parts
