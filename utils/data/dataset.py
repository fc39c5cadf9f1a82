"""Samples into tensors, in an order that depends on neither ranks nor workers."""

import gc
import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.bad_samples import BAD_SAMPLES, BadSample, as_bad_sample
from utils.data.collate import Batch, EncodedRow, Example, Normalise, collated, parcel
from utils.data.errors import DataError
from utils.data.masks import CocoMask, Window, WindowedMasks, windows_of
from utils.data.mixture import Mixture
from utils.data.passing import Corner, SharedSlots, make_slots
from utils.data.samples import NO_IMAGE, Conversation, Sample, Target

TOGETHER = 16
"""Samples that a worker makes and sends at once, in whole batches: what is done for several in a row costs half."""

_STAND_INS = 8
"""Most samples tried in place of one that cannot be used."""
_STAND_IN_STEP = 7919
"""How far on in the mixture the next of them is."""


class EncodedImage(Protocol):
    """An image that fits into the square of `side` pixels that the model takes: resized (h, w, 3) uint8, for its top
    left corner; original_size (height, width).
    """

    resized: np.ndarray
    side: int
    original_size: tuple[int, int]


class EncodedConversation(Protocol):
    """A conversation as the model takes it; `group_turns` names the turn of every seg group that was kept."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    group_turns: list[int]
    kept_turns: int
    dropped_turns: int


class Processor(Protocol):
    """What is needed of the processor that is handed in."""

    @property
    def pixel_statistics(self) -> Normalise: ...

    def prepare_image(self, source: Any, fast: bool) -> EncodedImage: ...

    def encode_conversation(self, turns: list[tuple[str, str]], with_image: bool) -> EncodedConversation: ...


class TrainingDataset(Dataset):
    """Example i is a function of the mixture and i alone.

    processor: opens and encodes images and conversations. length: how many examples a run may ask for.
    too_long_errors: what the processor raises when not even the first turn of a conversation fits; such conversations
    are left out. strict: raise DataError at the first sample that cannot be read. fast_resize: have images prepared
    faster, not quite by the book.

    A sample that loses all its conversations or cannot be read is replaced by another, which follows from i as well.
    Example.info tells i as "number", and what was lost: the counts dropped_turns, dropped_targets,
    dropped_conversations and replaced_samples, and under BAD_SAMPLES why samples could not be read. DataError when none
    of nine can be used.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Processor,
        length: int,
        too_long_errors: tuple[type[Exception], ...] = (),
        strict: bool = False,
        fast_resize: bool = False,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.length = length
        self.too_long_errors = too_long_errors
        self.strict = strict
        self.fast_resize = fast_resize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Example:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Example]:
        """Examples, all of them a stage further at a time: their words, their images, their masks.

        An image takes the processor's caches for itself: the words of a sample cost twice as much after one as after
        other words.
        """
        makings = [self._making(number) for number in numbers]
        examples: list[Example | None] = [None] * len(makings)
        while None in examples:
            examples = [example or next(making) for example, making in zip(examples, makings, strict=True)]
        return examples  # type: ignore[return-value]

    def _making(self, i: int) -> Iterator[Example | None]:
        """None after every stage but the last, then example i."""
        lost: Counter[str] = Counter()
        bad: list[BadSample] = []
        for attempt in range(_STAND_INS + 1):
            example = yield from self._readable(i + attempt * _STAND_IN_STEP, lost, bad)
            if example is not None:
                example.info |= {"number": i, "replaced_samples": attempt, BAD_SAMPLES: bad}
                yield example
        why = (
            f"for the last: {bad[-1].message}"
            if bad
            else "none has a conversation that fits into the model's text length: raise --model_max_length"
        )
        raise DataError(f"{_STAND_INS + 1} samples in a row, from number {i} on, cannot be used; {why}")

    def _readable(self, number: int, lost: Counter[str], bad: list[BadSample]) -> Generator[None, None, Example | None]:
        """Sample `number`, or None where it cannot be used: too long (see `lost`) or unreadable (added to `bad`)."""
        try:
            sample = self.mixture[number]
            encoded = self._encode_conversations(sample, lost)
            if not encoded:
                return None
            yield
            source = _NOTHING_TO_SEE if sample.image_path == NO_IMAGE else sample.image_path
            image = self.processor.prepare_image(source, fast=self.fast_resize)
            yield
            return self._example(sample, encoded, image, lost)
        except Exception as error:
            reason = as_bad_sample(error)
            if reason is None:
                raise
            if self.strict:
                raise DataError(reason.message, reason.cause) from error
            bad.append(reason)
            return None

    def _encode_conversations(
        self, sample: Sample, lost: Counter[str]
    ) -> list[tuple[Conversation, EncodedConversation]]:
        encoded = []
        for conversation in sample.conversations:
            turns = [(turn.question, turn.answer) for turn in conversation]
            try:
                tokens = self.processor.encode_conversation(turns, with_image=sample.image_path != NO_IMAGE)
                encoded.append((conversation, tokens))
            except self.too_long_errors:
                lost["dropped_conversations"] += 1
                lost["dropped_turns"] += len(conversation)
                lost["dropped_targets"] += sum(len(turn.targets) for turn in conversation)
        return encoded

    def _example(
        self,
        sample: Sample,
        encoded: list[tuple[Conversation, EncodedConversation]],
        image: EncodedImage,
        lost: Counter[str],
    ) -> Example:
        rows, targets = [], []
        for conversation, tokens in encoded:
            kept = conversation[: tokens.kept_turns]
            target_turns = [number for number, turn in enumerate(kept) for _ in turn.targets]
            if target_turns != list(tokens.group_turns):
                raise RuntimeError(
                    f"the processor made seg groups for turns {list(tokens.group_turns)} of {sample.sample_id}, whose "
                    f"targets belong to turns {target_turns}; they must be the same"
                )
            rows.append(EncodedRow(tokens.input_ids, tokens.labels, target_turns))
            targets += [target for turn in kept for target in turn.targets]
            lost["dropped_turns"] += len(conversation) - len(kept)
            lost["dropped_targets"] += sum(len(turn.targets) for turn in conversation[tokens.kept_turns :])
        info = {
            "sample_id": sample.sample_id,
            "dataset": sample.dataset,
            "image_path": sample.image_path,
            "kinds": [turn.kind for conversation, tokens in encoded for turn in conversation[: tokens.kept_turns]],
            **{name: lost[name] for name in _LOSSES},
        }
        masks = decode_masks(targets, image.original_size, sample)
        height, width = image.resized.shape[:2]
        pixels, sizes = Corner(image.resized, image.side), ((height, width), image.original_size)
        return Example(pixels, *sizes, rows, masks, info, self.processor.pixel_statistics)


_NOTHING_TO_SEE = np.zeros((1, 1, 3), dtype=np.uint8)
"""A black pixel in place of no image: every row of a batch belongs to one, but rows in words alone have no place to
see it.
"""

_LOSSES = ("dropped_turns", "dropped_targets", "dropped_conversations")


def decode_masks(targets: list[Target], size: tuple[int, int], sample: Sample) -> WindowedMasks:
    """The masks in an image of `size` (height, width). DataError when one has another size than the image, or no
    pixel.
    """
    of_coco = {n: target.decode for n, target in enumerate(targets) if isinstance(target.decode, CocoMask)}
    fitting = {n: source for n, source in of_coco.items() if (source.height, source.width) == size}
    # Most masks by far: no copy of them, nor a search for pixels.
    windows = dict(zip(fitting, windows_of([*fitting.values()]), strict=True))
    decoded = [windows[n] if n in windows else _decoded(target, size, sample) for n, target in enumerate(targets)]
    return WindowedMasks(size, [_with_pixels(*pair, sample) for pair in zip(decoded, targets, strict=True)])


def _decoded(target: Target, size: tuple[int, int], sample: Sample) -> Window | None:
    mask = target.decode()
    _check_size(mask, size, target, sample)
    return Window(0, 0, mask) if (mask == 1).any() else None


def _with_pixels(window: Window | None, target: Target, sample: Sample) -> Window:
    if window is None:
        raise DataError(
            f"the mask of {target.name!r} in {sample.sample_id} has no pixel in its image {sample.image_path}: "
            f"take it out of the annotations",
            cause="target without a pixel",
        )
    return window


def _check_size(mask: np.ndarray, size: tuple[int, int], target: Target, sample: Sample) -> None:
    if mask.shape != size:
        raise DataError(
            f"the mask of {target.name!r} in {sample.sample_id} has {mask.shape[0]}×{mask.shape[1]} pixels, its "
            f"image {sample.image_path} {size[0]}×{size[1]}: the annotations belong to another "
            f"edition of the image",
            cause="mask of another size than its image",
        )


class RankBatches(Sampler[list[int]]):
    """The samples of one rank, a list per micro batch.

    Micro batch m of rank r of R holds samples (m·R + r)·B … (m·R + r)·B + B − 1, so that all ranks together walk
    through 0, 1, 2, … however many they are. `first` and `stop` count samples over all ranks and must be multiples of
    R·B.
    """

    def __init__(self, rank: int, world_size: int, batch_size: int, stop: int, first: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks")
        together = world_size * batch_size
        if first % together or stop % together:
            raise ValueError(f"samples {first} to {stop} do not part into batches of {world_size} ranks × {batch_size}")
        self._starts = range(first + rank * batch_size, stop, together)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self._batch_size)) for start in self._starts)


class Joined(Sampler[list[int]]):
    """The samples of `together` micro batches at a time, of fewer at the end."""

    def __init__(self, batches: RankBatches, together: int) -> None:
        self._batches = batches
        self._together = together

    def __len__(self) -> int:
        return math.ceil(len(self._batches) / self._together)

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self._batches)
        while chosen := list(islice(batches, self._together)):
            yield [number for batch in chosen for number in batch]


class Loader:
    """The micro batches of a rank, in order, each time it is asked. Workers, where there are any, stay."""

    def __init__(self, several: DataLoader, length: int) -> None:
        self._several = several
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for batches in self._several:
            yield from batches


def build_loader(
    dataset: TrainingDataset,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    pad_token_id: int,
    workers: int,
    first: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Batches of this rank from sample `first` to the end of the dataset; `batch_size` is that of one rank.

    `first` and the dataset's length are multiples of world_size · batch_size. The order does not depend on `workers`,
    and the process's random numbers are not drawn from: a resumed run must find them as a straight one does. What a
    worker cannot make is raised before the batches that it would have made together with it.
    """
    if workers:
        _end_workers_at_exit()
    batches = RankBatches(rank, world_size, batch_size, stop=len(dataset), first=first)
    several = DataLoader(
        dataset,
        batch_sampler=Joined(batches, max(1, TOGETHER // batch_size) if workers else 1),
        collate_fn=partial(parcel if workers else collated, batch_size=batch_size, pad_token_id=pad_token_id),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_begin_worker, slots=make_slots(workers)),
        generator=torch.Generator(),
    )
    return Loader(several, len(batches))


@cache
def _end_workers_at_exit() -> None:
    """Workers leave signals to the run, also the one that multiprocessing sends at exit before it waits for them."""
    Finalize(None, _kill_daemons, exitpriority=0)


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _begin_worker(worker: int, slots: Sequence[SharedSlots | None]) -> None:
    """Leave signals of launchers and terminals, which workers get too, to the run: their batches are needed to finish
    the step. Send batches through the worker's `slots`, where it has any.
    """
    if slots and (own := slots[worker]) is not None:
        own.send_through()
    gc.freeze()  # what the run has made before: looking through it takes time, and makes copies of its pages
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
