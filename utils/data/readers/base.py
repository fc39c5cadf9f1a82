"""What every data set reader is, and the settings readers share."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from model.structures import CLASSES_PER_SAMPLE
from utils.data.errors import DataError
from utils.data.files import DataRoot
from utils.data.index import ParseNotes, RecordIndex, open_index
from utils.data.samples import Sample

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """Settings of all readers; the names are those of the command line.

    num_classes_per_sample: most conversations taken from one image.
    num_classes_per_question: most classes or descriptions one question asks for: one, as in validation; training asks
    for more.
    use_expand_question_list: draw questions from the longer list of phrasings.
    explanatory: share of text-only answers among ReasonSeg's images that have an explanation; negative: no
    explanations. exclude_val: leave out of referring training every image that a val or test split of any referring
    set uses. index_dir: where indexes of annotations are kept; empty: see `open_index`. check_index: take an index only
    if the contents of its files are those it was made of.
    """

    num_classes_per_sample: int = CLASSES_PER_SAMPLE
    num_classes_per_question: int = 1
    use_expand_question_list: bool = False
    explanatory: float = 0.1
    exclude_val: bool = False
    index_dir: str = ""
    check_index: bool = False

    def __post_init__(self) -> None:
        for name in ("num_classes_per_sample", "num_classes_per_question"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name} is {getattr(self, name)}; expected 1 or more")
        if self.explanatory > 1:
            raise DataError(
                f"--explanatory is {self.explanatory}; expected a share up to 1, or a negative number for none"
            )


class Reader(ABC):
    """One split of one data set, indexed by image when it is made; each file is parsed once.

    name, split: which data set and split; source: its main annotation file, or the folder of annotations; skipped: what
    was left out, noted: what is odd and does no harm, both counted by cause; facts: what else parsing found, plain
    values; fingerprint: changes when the annotation files do. Readers are picklable and read only.
    """

    def __init__(self, name: str, split: str, options: ReaderOptions) -> None:
        self.name = name
        self.split = split
        self.options = options
        self.source = ""
        self.skipped: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}
        self.fingerprint = ""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """Image `index` with up to `num_classes_per_sample` of its conversations, drawn by `rng`. DataError if it
        cannot.
        """

    @abstractmethod
    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        """Image `index` with every question about it as a conversation of its own; `rng` draws the phrasing only."""

    def image_path(self, index: int) -> str:
        """Where the image `index` should be, as the annotations say, or NO_IMAGE; nothing is looked up on disk."""
        return self.read_all(index, np.random.default_rng(0)).image_path

    def _index(
        self, root: DataRoot, sources: Sequence[str], parse: Callable[[], Iterable[Any]], layout: int, variant: str = ""
    ) -> RecordIndex:
        """The records of the annotation files `sources`, as `parse` yields them, from their index where there is one.

        skipped, noted, facts and the fingerprint are those of the index afterwards; `parse` fills in the first three.
        layout: a number that changes whenever the records do. variant: what else than name and split says what is in.
        """

        def counted(gathered: ParseNotes) -> Iterable[Any]:
            self.skipped, self.noted, self.facts = gathered.skipped, gathered.noted, gathered.facts
            return parse()

        index = open_index(
            "-".join(filter(None, (self.name, variant, self.split))),
            f"{type(self).__name__} {layout}",
            root.path,
            self.options.index_dir,
            sources,
            counted,
            thorough=self.options.check_index,
        )
        gathered = index.gathered
        self.skipped, self.noted, self.facts = gathered.skipped, gathered.noted, gathered.facts
        self.fingerprint = index.fingerprint
        return index

    def _refuse_if_empty(self, found: Sequence, source: str) -> None:
        """DataError, with the causes, when nothing usable was found in `source`."""
        if not found:
            causes = ", ".join(f"{count} × {cause}" for cause, count in self.skipped.items()) or "it is empty"
            raise DataError(
                f"{source} holds nothing usable for {self.name}, split {self.split!r} ({causes}): check the files",
                cause="nothing usable",
            )


def sample_items(rng: np.random.Generator, items: Sequence[Item], most: int) -> list[Item]:
    """Up to `most` different items in random order."""
    if len(items) == 1:
        return [items[0]]
    return [items[index] for index in rng.permutation(len(items))[:most]]
