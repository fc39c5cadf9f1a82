"""What all readers of classes have in common: an image's classes are drawn and asked for by name."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from utils.data.readers.base import Reader, sample_items
from utils.data.samples import Conversation, Sample, Target
from utils.data.templates import pick_phrasing, target_name


class ClassReader(Reader):
    """Images whose classes are asked for by name; everything of a class in an image is one target."""

    @abstractmethod
    def _targets(self, index: int) -> Sequence[Target]:
        """The classes that image `index` shows, named without an article; empty where it shows none."""

    @abstractmethod
    def _locate(self, index: int) -> tuple[str, str]:
        """(path, name) of image `index`; the name is unique within the split."""

    @abstractmethod
    def _class_names(self) -> Sequence[str]:
        """All classes of the data set."""

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        options = self.options
        most = options.num_classes_per_sample * options.num_classes_per_question
        waiting = sample_items(rng, self._targets(index), most)[::-1]
        conversations: list[Conversation] = []
        while waiting and len(conversations) < options.num_classes_per_sample:
            wanted = int(rng.integers(1, options.num_classes_per_question + 1))
            together = [waiting.pop() for _ in range(min(wanted, len(waiting)))]
            conversations.append(self._conversation(together, rng))
        return self._sample(index, conversations or [self._ask_absent_class(rng)])

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        conversations = [self._conversation([target], rng) for target in self._targets(index)]
        return self._sample(index, conversations or [self._ask_absent_class(rng)])

    def _conversation(self, together: list[Target], rng: np.random.Generator) -> Conversation:
        named = tuple(Target(target_name(target.name), target.decode) for target in together)
        phrasing = pick_phrasing(rng, self.options.use_expand_question_list)
        return (phrasing.turn([target.name for target in named], named),)

    def _ask_absent_class(self, rng: np.random.Generator) -> Conversation:
        """For an image that shows no class: there any class is absent."""
        names = self._class_names()
        name = target_name(names[int(rng.integers(len(names)))])
        return (pick_phrasing(rng, self.options.use_expand_question_list).turn([name], ()),)

    def _sample(self, index: int, conversations: list[Conversation]) -> Sample:
        path, name = self._locate(index)
        return Sample(path, tuple(conversations), self.name, f"{self.name}/{self.split}/{name}")
