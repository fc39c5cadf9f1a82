"""Which data sets the flags of a run ask for, and which of their files are not there."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

from utils.cli.config import DataConfig
from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.readers.base import ReaderOptions
from utils.data.readers.registry import JOIN, evaluation_sets, required_files_of, training_sets
from utils.data.required_files import MissingPath, find_missing, missing_sentence, missing_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RequestedSet:
    """A data set by its name and split, and whether it is trained on or scored on."""

    name: str
    split: str
    is_training: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.split})"


def reader_options(data: DataConfig, *, check_index: bool = False) -> ReaderOptions:
    """What the flags tell every reader; `check_index`: see `ReaderOptions`."""
    return ReaderOptions(
        num_classes_per_sample=data.num_classes_per_sample,
        num_classes_per_question=data.num_classes_per_question,
        use_expand_question_list=data.use_expand_question_list,
        explanatory=data.explanatory,
        exclude_val=data.exclude_val,
        index_dir=data.index_dir,
        check_index=check_index,
    )


def requested_families(data: DataConfig) -> list[tuple[str, str]]:
    """(family, value of the family's own flag) for every family of --dataset; MUSE has no flag of its own."""
    names = {
        "sem_seg": data.sem_seg_data,
        "refer_seg": data.refer_seg_data,
        "vqa": data.vqa_data,
        "reason_seg": data.reason_seg_data,
        "custom": data.custom_data,
    }
    return [(family.strip(), names.get(family.strip(), "")) for family in data.dataset.split(JOIN)]


def requested_for_training(data: DataConfig) -> list[RequestedSet]:
    """What is trained on, each set once. DataError for a name that has no reader."""
    found = [pair for family, names in requested_families(data) for pair in training_sets(family, names)]
    return [RequestedSet(name, split, True) for name, split in dict.fromkeys(found)]


def requested_for_evaluation(val_dataset: str) -> list[RequestedSet]:
    """What --val_dataset names, each set once; nothing for an empty value. DataError for a name without a split."""
    found = evaluation_sets(val_dataset) if val_dataset.strip() else []
    return [RequestedSet(name, split, False) for name, split in dict.fromkeys(found)]


def find_missing_files(requested: Iterable[RequestedSet], root: str | os.PathLike[str]) -> list[MissingPath]:
    """All parts of the data sets that are not below the data root, in order. DataError where there is no root."""
    path = DataRoot(root).path
    return [
        missing for one in requested for missing in find_missing(path, str(one), required_files_of(one.name, one.split))
    ]


def require_files(requested: Iterable[RequestedSet], root: str | os.PathLike[str]) -> None:
    """DataError when parts of the data sets are not below the data root; a table names all of them."""
    missing = find_missing_files(requested, root)
    if missing:
        if len(missing) > 1:
            logger.warning(f"missing in {root}:\n{missing_table(missing)}")
        raise DataError(missing_sentence(missing), cause="missing file")
