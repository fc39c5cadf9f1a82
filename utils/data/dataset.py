"""Samples into tensors, in an order that depends on neither ranks nor workers."""

import gc
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from model.processing_pixellm import ConversationTooLong, EncodedConversation, PixelLMProcessor
from utils.data.bad_samples import BAD_SAMPLES, BadSample, as_bad_sample
from utils.data.collate import Batch, Example, collate
from utils.data.errors import DataError
from utils.data.fast_images import prepare_image_fast
from utils.data.mixture import Mixture
from utils.data.samples import NO_IMAGE, Conversation, Sample, Target

_REPLACEMENTS = 8
"""Most samples tried in place of one that cannot be used."""
_REPLACEMENT_STEP = 7919
"""How far on in the mixture the next of them is."""

_BLACK_PIXEL = np.zeros((1, 1, 3), dtype=np.uint8)
"""In place of no image: every conversation of a batch belongs to one, but words alone have no place to see it."""

_LOSSES = ("dropped_turns", "dropped_targets", "dropped_conversations")


class TrainingDataset(Dataset):
    """Example i is a function of the mixture and i alone.

    processor: opens and encodes images and conversations. length: how many examples a run may ask for. strict: raise
    DataError at the first sample that cannot be read. fast_resize: prepare images faster, values off by 1
    here and there; see `fast_images`.

    A sample of which no conversation fits into the processor's text length, or that cannot be read, is replaced by
    another, which follows from i as well. Example.info tells i as "number", and what was lost: the counts
    dropped_turns, dropped_targets, dropped_conversations and replaced_samples, and under BAD_SAMPLES why samples could
    not be read. DataError when none of nine can be used.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: PixelLMProcessor,
        length: int,
        strict: bool = False,
        fast_resize: bool = False,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.length = length
        self.strict = strict
        self.fast_resize = fast_resize

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Example:
        lost: Counter[str] = Counter()
        bad: list[BadSample] = []
        for attempt in range(_REPLACEMENTS + 1):
            example = self._try_sample(i + attempt * _REPLACEMENT_STEP, lost, bad)
            if example is not None:
                example.info |= {"number": i, "replaced_samples": attempt, BAD_SAMPLES: bad}
                return example
        why = (
            f"for the last: {bad[-1].message}"
            if bad
            else "none has a conversation that fits into the model's text length: raise --model_max_length"
        )
        raise DataError(f"{_REPLACEMENTS + 1} samples in a row, from number {i} on, cannot be used; {why}")

    def _try_sample(self, number: int, lost: Counter[str], bad: list[BadSample]) -> Example | None:
        """Sample `number`, or None where it cannot be used: too long (see `lost`) or unreadable (added to `bad`)."""
        try:
            sample = self.mixture[number]
            encoded = self._encode_conversations(sample, lost)
            return self._make_example(sample, encoded, lost) if encoded else None
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
            except ConversationTooLong:
                lost["dropped_conversations"] += 1
                lost["dropped_turns"] += len(conversation)
                lost["dropped_targets"] += sum(len(turn.targets) for turn in conversation)
        return encoded

    def _make_example(
        self, sample: Sample, encoded: list[tuple[Conversation, EncodedConversation]], lost: Counter[str]
    ) -> Example:
        targets: list[Target] = []
        for conversation, tokens in encoded:
            kept = conversation[: tokens.kept_turns]
            target_turns = [number for number, turn in enumerate(kept) for _ in turn.targets]
            if target_turns != tokens.group_turns:
                raise RuntimeError(
                    f"the processor made seg groups for turns {tokens.group_turns} of {sample.sample_id}, whose "
                    f"targets belong to turns {target_turns}; they must be the same"
                )
            targets += [target for turn in kept for target in turn.targets]
            lost["dropped_turns"] += len(conversation) - len(kept)
            lost["dropped_targets"] += sum(len(turn.targets) for turn in conversation[tokens.kept_turns :])
        source = _BLACK_PIXEL if sample.image_path == NO_IMAGE else sample.image_path
        if self.fast_resize:
            image = prepare_image_fast(source, self.processor.image_size)
        else:
            image = self.processor.prepare_image(source)
        info = {
            "sample_id": sample.sample_id,
            "dataset": sample.dataset,
            "image_path": sample.image_path,
            "kinds": [turn.kind for conversation, tokens in encoded for turn in conversation[: tokens.kept_turns]],
            **{name: lost[name] for name in _LOSSES},
        }
        return Example(
            pixel_values=image.pixels,
            resized_size=image.resized_size,
            original_size=image.original_size,
            conversations=[tokens for _, tokens in encoded],
            masks=decode_masks(targets, image.original_size, sample),
            info=info,
            normalise=self.processor.pixel_statistics,
        )


def decode_masks(targets: list[Target], size: tuple[int, int], sample: Sample) -> torch.Tensor:
    """The masks (Q, H, W) uint8 in an image of `size` (height, width). DataError when one has another size than the
    image, or no pixel.
    """
    masks = np.empty((len(targets), *size), dtype=np.uint8)
    for place, target in enumerate(targets):
        mask = target.decode()
        if mask.shape != size:
            raise DataError(
                f"the mask of {target.name!r} in {sample.sample_id} has {mask.shape[0]}×{mask.shape[1]} pixels, its "
                f"image {sample.image_path} {size[0]}×{size[1]}: the annotations belong to another "
                f"edition of the image",
                cause="mask of another size than its image",
            )
        if not (mask == 1).any():
            raise DataError(
                f"the mask of {target.name!r} in {sample.sample_id} has no pixel in its image {sample.image_path}: "
                f"take it out of the annotations",
                cause="target without a pixel",
            )
        masks[place] = mask
    return torch.from_numpy(masks)


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
) -> DataLoader[Batch]:
    """Batches of this rank from sample `first` to the end of the dataset; `batch_size` is that of one rank.

    `first` and the dataset's length are multiples of world_size · batch_size. The order does not depend on `workers`,
    and the process's random numbers are not drawn from: a resumed run must find them as a straight one does.
    """
    if workers:
        _end_workers_at_exit()
    return DataLoader(
        dataset,
        batch_sampler=RankBatches(rank, world_size, batch_size, stop=len(dataset), first=first),
        collate_fn=partial(collate, pad_token_id=pad_token_id),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


@cache
def _end_workers_at_exit() -> None:
    """Workers leave signals to the run, also the one that multiprocessing sends at exit before it waits for them."""
    Finalize(None, _kill_daemons, exitpriority=0)


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _begin_worker(worker: int) -> None:
    """Leave signals of launchers and terminals, which workers get too, to the run: their batches are needed to finish
    the step.
    """
    gc.freeze()  # collecting what the run has made before would copy its pages into every worker
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
