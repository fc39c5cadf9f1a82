"""The data sets of --val_dataset under names that tell them apart."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from utils.cli.errors import UserError
from utils.data.readers.base import Reader
from utils.data.readers.registry import EvalReader, build_eval_reader, evaluation_sets
from utils.data.samples import Sample


class ScoredSets:
    """All samples of `spec` in order. `labels`: a name per reader, which its samples carry: that of the data set where
    it is asked for once, with its edition and split, as given, where several times.

    UserError where a set is named twice; DataError as `build_eval_reader`.
    """

    def __init__(self, spec: str, root: str) -> None:
        asked = ["|".join(pair) for pair in evaluation_sets(spec)]
        twice = [name for name, count in Counter(asked).items() if count > 1]
        if twice:
            raise UserError(f"--val_dataset names {twice[0]} twice: name it once")
        self._reader: EvalReader = build_eval_reader(spec, root)
        count = Counter(reader.name for reader in self.readers)
        self.labels = [
            reader.name if count[reader.name] == 1 else name for reader, name in zip(self.readers, asked, strict=True)
        ]

    @property
    def readers(self) -> list[Reader]:
        """One per data set, in the order they are named."""
        return self._reader.readers

    def __iter__(self) -> Iterator[Sample]:
        index = 0
        for reader, label in zip(self.readers, self.labels, strict=True):
            for _ in range(len(reader)):
                yield replace(self._reader[index], dataset=label)
                index += 1
