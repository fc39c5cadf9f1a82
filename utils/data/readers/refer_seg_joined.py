"""Several referring phrases in one question, as the release's prefix `multi` asks them: "multirefcoco|unc|val"."""

import numpy as np

from utils.data.files import DataRoot
from utils.data.readers.base import ReaderOptions
from utils.data.readers.refer_seg import REFER_SETS, ReferSegReader
from utils.data.samples import Conversation, Sample

PREFIX = "multi"

_TOGETHER = (6, 5, 4)
"""How many phrases an image's questions join, taking turns: the release's numbers."""


class JoinedPhrasesReader(ReferSegReader):
    """One split of a referring set; an image's phrases are asked for together, in their order, 6, 5, 4, 6 … of them.

    Phrases about one object stay apart targets, as in the release. Phrases without a target are left out (counted).
    """

    def __init__(
        self, name: str, root: DataRoot, split: str, options: ReaderOptions, split_by: str | None = None
    ) -> None:
        super().__init__(name, root, split, options, split_by)
        kept = []
        for file_name, number, masks, asked in self._images:
            with_targets = tuple((said, targets) for said, targets in asked if targets)
            if without := len(asked) - len(with_targets):
                self.skipped["phrase without a target, among several in a question"] += without
            if with_targets:
                kept.append((file_name, number, masks, with_targets))
        self._images = kept
        self._refuse_if_empty(self._images, self.source)
        self.name = f"{PREFIX}{name}"

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        waiting = list(self._requested_phrases(index))
        conversations: list[Conversation] = []
        while waiting:
            most = _TOGETHER[len(conversations) % len(_TOGETHER)]
            conversations.append(self._conversation(waiting[:most], rng))
            waiting = waiting[most:]
        return self._sample(index, conversations)


def without_prefix(name: str) -> str | None:
    """The referring set that "multirefcoco" joins the phrases of; None of any other name."""
    base = name.removeprefix(PREFIX)
    return base if base != name and base in REFER_SETS else None
