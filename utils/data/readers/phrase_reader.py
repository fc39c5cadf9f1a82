"""What readers of phrases have in common: a phrase asks for one thing, for several, or for nothing that is there."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.readers.base import Reader, sample_items
from utils.data.samples import Conversation, Sample, Target
from utils.data.templates import pick_phrasing


@dataclass(frozen=True, slots=True)
class RequestedPhrase:
    """A phrase about an image and the targets it refers to."""

    phrase: str
    targets: tuple[Target, ...]


class PhraseReader(Reader):
    """Images about which phrases ask; a question may join phrases for one thing each."""

    @abstractmethod
    def _requested_phrases(self, index: int) -> Sequence[RequestedPhrase]:
        """What is asked about image `index`: at least one phrase."""

    @abstractmethod
    def _locate(self, index: int) -> tuple[str, str]:
        """(path, name) of image `index`; the name is unique within the split."""

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        options = self.options
        most = options.num_classes_per_sample * options.num_classes_per_question
        waiting = sample_items(rng, self._requested_phrases(index), most)[::-1]
        conversations: list[Conversation] = []
        while waiting and len(conversations) < options.num_classes_per_sample:
            together = [waiting.pop()]
            if options.num_classes_per_question > 1 and len(together[0].targets) == 1:
                wanted = int(rng.integers(1, options.num_classes_per_question + 1))
                while waiting and len(together) < wanted and _can_join(waiting[-1], together):
                    together.append(waiting.pop())
            conversations.append(self._conversation(together, rng))
        return self._sample(index, conversations)

    def read_all(self, index: int, rng: np.random.Generator) -> Sample:
        return self._sample(index, [self._conversation([asked], rng) for asked in self._requested_phrases(index)])

    def _conversation(self, together: list[RequestedPhrase], rng: np.random.Generator) -> Conversation:
        phrasing = pick_phrasing(rng, self.options.use_expand_question_list)
        targets = tuple(target for asked in together for target in asked.targets)
        return (phrasing.turn([asked.phrase for asked in together], targets),)

    def _sample(self, index: int, conversations: list[Conversation]) -> Sample:
        path, name = self._locate(index)
        return Sample(path, tuple(conversations), self.name, f"{self.name}/{self.split}/{name}")


def _can_join(candidate: RequestedPhrase, together: list[RequestedPhrase]) -> bool:
    """Whether a question that asks for `together` may ask for `candidate` too: another thing, and just one."""
    return len(candidate.targets) == 1 and all(
        candidate.targets[0].decode is not asked.targets[0].decode and candidate.phrase != asked.phrase
        for asked in together
    )
