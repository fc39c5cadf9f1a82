"""Examples of single images into one Batch, whose fields are the names of the model's forward arguments.

Axes: B images, C conversations, T tokens, Q targets, P side of the square image, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from model.structures import IGNORE_TOKEN, TOWER_KEY
from utils.data.masks import Window, WindowedMasks
from utils.data.passing import Corner, Squares, received, sent

Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(images (B, 3, P, P) uint8, their sizes in the square (B, 2)) -> (B, 3, P, P) float32, on the same device."""


@dataclass(slots=True)
class EncodedRow:
    """One conversation: input_ids (T,) and labels (T,) long; target_turns: for each of its targets, in order, its
    turn.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    target_turns: list[int]


@dataclass(slots=True)
class Example:
    """One image with its conversations, ready to be put into a batch.

    pixel_values (3, P, P) uint8, to be normalised by `normalise`, or float32, where that is None; of an opened image
    the corner of its square; sizes (height, width) after resizing and of the image itself; masks, in the order of the
    rows' targets, in their windows or drawn: (Q, H, W) uint8 of 0, 1 and 255; info: what people and logs want to know.
    """

    pixel_values: torch.Tensor | Corner
    resized_size: tuple[int, int]
    original_size: tuple[int, int]
    rows: list[EncodedRow]
    masks: WindowedMasks | torch.Tensor
    info: dict[str, Any]
    normalise: Normalise | None = None


@dataclass(slots=True)
class Batch:
    """Rows are right-padded and ordered by image; targets by image, row, and place in the text.

    input_ids (C, T) long; attention_mask (C, T) bool; labels (C, T) long, IGNORE_TOKEN outside answers
    pixel_values: (B, 3, P, P) by tower, float32, or uint8 as long as `normalise` is there to be used
    resized_sizes, original_sizes (B, 2) long, height first
    image_index (C,) long, never falling: the image of each row
    masks: for each image (Q_b, H_b, W_b) uint8 of 0, 1 and 255
    target_questions (Q,) long: the question (row and turn) each target belongs to, a number unique in the batch
    info, normalise: one dictionary per image, and what is to be done to pixel_values: no arguments of forward

    Bytes are a quarter of what has to be sent to a device, and a device normalises them in no time.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: dict[str, Any]
    resized_sizes: torch.Tensor
    original_sizes: torch.Tensor
    image_index: torch.Tensor
    masks: list[Any]
    target_questions: torch.Tensor
    info: list[dict[str, Any]] = field(default_factory=list)
    normalise: Normalise | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """A copy on `device`, its images normalised; `dtype`, if given, is that of the images only."""
        moved = self._mapped(lambda tensor: tensor.to(device, non_blocking=True))._normalised()
        if dtype is not None:
            moved.pixel_values = {key: value.to(dtype) for key, value in moved.pixel_values.items()}
        return moved

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, as DataLoader asks for it."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def as_kwargs(self) -> dict[str, Any]:
        """The arguments of forward, images normalised."""
        return self._normalised()._arguments()

    def counted(self) -> dict[str, Any]:
        """The arguments of forward that losses are counted from; images stay as they are."""
        return {"labels": self.labels, "masks": self.masks}

    def __reduce__(self) -> tuple[Any, ...]:
        return _only, (Parcel([self]),)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def _normalised(self) -> "Batch":
        if self.normalise is None:
            return self
        pixels = {key: self.normalise(value, self.resized_sizes) for key, value in self.pixel_values.items()}
        return replace(self, pixel_values=pixels, normalise=None)

    def _mapped(self, change: Any) -> "Batch":
        changed: dict[str, Any] = {}
        for name, value in self._arguments().items():
            if isinstance(value, dict):
                changed[name] = {key: change(tensor) for key, tensor in value.items()}
            elif isinstance(value, list):
                changed[name] = [change(tensor) for tensor in value]
            else:
                changed[name] = change(value)
        return replace(self, **changed)


_ARGUMENTS = tuple(entry.name for entry in fields(Batch) if entry.name not in ("info", "normalise"))


class Parcel:
    """Batches on their way, which may hold squares and masks as their examples do. What arrives, once, is the list of
    the batches in whole.

    They are written where they can be received at once: the thread that sends, on another core maybe, would have to
    fetch them from this one.
    """

    def __init__(self, batches: list[Batch]) -> None:
        arguments = [batch._arguments() for batch in batches]
        for one in arguments:
            one["masks"] = [_whole(masks) if isinstance(masks, torch.Tensor) else masks for masks in one["masks"]]
        self._content = sent(arguments)
        self._rest = [(batch.info, batch.normalise) for batch in batches]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self._content, self._rest)


def _unpacked(content: tuple[Any, ...], rest: list[tuple[list[dict[str, Any]], Normalise | None]]) -> list[Batch]:
    return [
        Batch(**arguments, info=info, normalise=normalise)
        for arguments, (info, normalise) in zip(received(*content), rest, strict=True)
    ]


def _only(batches: list[Batch]) -> Batch:
    (batch,) = batches
    return batch


def _whole(masks: torch.Tensor) -> WindowedMasks:
    """The windows of masks (Q, H, W) uint8 that are drawn already."""
    height, width = masks.shape[1:]
    return WindowedMasks((height, width), [Window(0, 0, mask) for mask in masks.numpy()])


def collate(examples: list[Example], pad_token_id: int = 0) -> Batch:
    """One Batch of at least one example, each with at least one row; `pad_token_id` fills short rows, unlabelled."""
    batch = _joined(examples, pad_token_id)
    pixels = {key: _drawn(images) for key, images in batch.pixel_values.items()}
    return replace(batch, pixel_values=pixels, masks=[_drawn(masks) for masks in batch.masks])


def _drawn(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value.drawn()


def collated(examples: list[Example], batch_size: int, pad_token_id: int = 0) -> list[Batch]:
    """Batches of `batch_size` examples each."""
    return [collate(some, pad_token_id) for some in _parted(examples, batch_size)]


def parcel(examples: list[Example], batch_size: int, pad_token_id: int = 0) -> Parcel:
    """What arrives as the batches that `collated` makes of the same, and is to be sent."""
    return Parcel([_joined(some, pad_token_id) for some in _parted(examples, batch_size)])


def _parted(examples: list[Example], batch_size: int) -> list[list[Example]]:
    return [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]


def _joined(examples: list[Example], pad_token_id: int) -> Batch:
    """The batch of the examples, with squares and masks as they have them."""
    rows = [row for example in examples for row in example.rows]
    lengths = torch.tensor([row.input_ids.shape[0] for row in rows])
    input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=pad_token_id)
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None],
        labels=pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORE_TOKEN),
        pixel_values={TOWER_KEY: _together([example.pixel_values for example in examples])},
        resized_sizes=torch.tensor([example.resized_size for example in examples], dtype=torch.long),
        original_sizes=torch.tensor([example.original_size for example in examples], dtype=torch.long),
        image_index=torch.tensor([b for b, example in enumerate(examples) for _ in example.rows], dtype=torch.long),
        masks=[example.masks for example in examples],
        target_questions=_numbered_questions(rows),
        info=[example.info for example in examples],
        normalise=examples[0].normalise,
    )


def _together(images: list[Any]) -> Any:
    """Squares of corners, or (B, 3, P, P) of (3, P, P)."""
    return Squares(images) if isinstance(images[0], Corner) else torch.stack(images)


def _numbered_questions(rows: list[EncodedRow]) -> torch.Tensor:
    """(Q,) long: targets of the same row and turn share a number, others do not; numbers rise from 0."""
    numbers: dict[tuple[int, int], int] = {}
    questions = [
        numbers.setdefault((row_number, turn), len(numbers))
        for row_number, row in enumerate(rows)
        for turn in row.target_turns
    ]
    return torch.tensor(questions, dtype=torch.long)
