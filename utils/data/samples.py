"""What a reader gives: one image, conversations about it, and a lazily decoded mask for every target they name."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from model.structures import SEG_MARKER

MORE_MARKERS = f"answer with more {SEG_MARKER} than masks"
FEWER_MARKERS = f"answer with fewer {SEG_MARKER} than masks"
"""Why an answer is left out whose text and masks disagree."""

DIRECT, SEVERAL, REASONING, NO_TARGET, TEXT = "direct", "several", "reasoning", "no_target", "text"
NO_IMAGE = ""
"""Path of the image that a conversation in words alone is about."""

KINDS = (DIRECT, SEVERAL, REASONING, NO_TARGET, TEXT)


@dataclass(frozen=True, slots=True)
class Target:
    """A thing to segment.

    name: the words that stand right before its marker in an answer that names it.
    decode: picklable, gives its mask (H, W) uint8 of 0, 1 and IGNORE_LABEL at the image's own size.
    """

    name: str
    decode: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer; `answer` holds SEG_MARKER once per target. `kind` is one of KINDS."""

    question: str
    answer: str
    targets: tuple[Target, ...]
    kind: str

    def __post_init__(self) -> None:
        markers = self.answer.count(SEG_MARKER)
        if markers != len(self.targets):
            raise ValueError(f"the answer {self.answer!r} marks {markers} targets, but {len(self.targets)} are given")
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a kind of turn; expected one of {', '.join(KINDS)}")


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and at least one conversation about it.

    image_path: NO_IMAGE where the conversations are in words alone; then no turn has targets. dataset: name of the
    data set; sample_id: unique within a run, says which image of which split it is.
    """

    image_path: str
    conversations: tuple[Conversation, ...]
    dataset: str
    sample_id: str

    def __post_init__(self) -> None:
        turns = (turn for conversation in self.conversations for turn in conversation)
        if self.image_path == NO_IMAGE and any(turn.targets for turn in turns):
            raise ValueError(f"{self.sample_id} has targets but no image")


def kind_by_count(num_targets: int) -> str:
    """The kind of a turn that asks for things by name."""
    return NO_TARGET if num_targets == 0 else DIRECT if num_targets == 1 else SEVERAL
