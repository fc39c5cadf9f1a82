"""Examples of single images into one Batch, whose fields are the names of the model's forward arguments.

Axes: B images, C conversations, T tokens, Q targets, P side of the square image, H W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from model.processing_pixellm import EncodedConversation
from model.structures import IGNORE_LABEL, IGNORE_TOKEN, TOWER_KEY

Normalise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(images (B, 3, P, P) uint8, their sizes in the square (B, 2)) -> (B, 3, P, P) float32, on the same device."""


@dataclass(slots=True)
class Example:
    """One image with its conversations, ready to be put into a batch.

    pixel_values: (3, P, P) uint8, to be normalised by `normalise`, or float32, where that is None
    resized_size, original_size: (height, width) after resizing and of the image itself
    masks: (Q, H, W) uint8 of 0, 1 and 255, in the order of the conversations' targets
    info: what people and logs want to know
    """

    pixel_values: torch.Tensor
    resized_size: tuple[int, int]
    original_size: tuple[int, int]
    conversations: list[EncodedConversation]
    masks: torch.Tensor
    info: dict[str, Any]
    normalise: Normalise | None = None


@dataclass(slots=True)
class Batch:
    """Conversations are right-padded and ordered by image; targets by image, conversation, and place in the text.

    input_ids (C, T) long; attention_mask (C, T) bool; labels (C, T) long, IGNORE_TOKEN outside answers
    pixel_values: (B, 3, P, P) by tower, float32, or uint8 as long as `normalise` is there to be used
    resized_sizes, original_sizes (B, 2) long, height first
    image_index (C,) long, never falling: the image of each conversation
    masks: for each image (Q_b, H_b, W_b) uint8 of 0, 1 and 255
    target_questions (Q,) long: the question (conversation and turn) of each target, a number unique in the batch
    info, normalise: one dictionary per image, and what is to be done to pixel_values: no arguments of forward

    Bytes are a quarter of what has to be sent to a device, which normalises them.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: dict[str, torch.Tensor]
    resized_sizes: torch.Tensor
    original_sizes: torch.Tensor
    image_index: torch.Tensor
    masks: list[torch.Tensor]
    target_questions: torch.Tensor
    info: list[dict[str, Any]] = field(default_factory=list)
    normalise: Normalise | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """A copy on `device`, its images normalised; `dtype`, if given, is that of the images only."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))._normalise_images()
        if dtype is not None:
            moved.pixel_values = {key: value.to(dtype) for key, value in moved.pixel_values.items()}
        return moved

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, as DataLoader asks for it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def as_kwargs(self) -> dict[str, Any]:
        """The arguments of forward, images normalised."""
        return self._normalise_images()._arguments()

    def counted(self) -> dict[str, Any]:
        """The arguments of forward that losses are counted from; images stay as they are."""
        return {"labels": self.labels, "masks": self.masks}

    def __reduce__(self) -> tuple[Any, ...]:
        """What workers send: a shared file for every tensor takes longer than a message with the bytes of all."""
        arguments = self._map(_to_array)._arguments()
        arguments["pixel_values"] = {key: _to_array(value.movedim(1, -1)) for key, value in self.pixel_values.items()}
        arguments["masks"] = [_pack_masks(masks.numpy()) for masks in self.masks]
        return _unpack_batch, (arguments, self.info, self.normalise)

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ARGUMENTS}

    def _normalise_images(self) -> "Batch":
        if self.normalise is None:
            return self
        pixels = {key: self.normalise(value, self.resized_sizes) for key, value in self.pixel_values.items()}
        return replace(self, pixel_values=pixels, normalise=None)

    def _map(self, change: Callable[[torch.Tensor], Any]) -> "Batch":
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


def _unpack_batch(arguments: dict[str, Any], info: list[dict[str, Any]], normalise: Normalise | None) -> Batch:
    pixels = {key: _to_tensor(value).movedim(-1, 1) for key, value in arguments.pop("pixel_values").items()}
    masks = [_unpack_masks(*packed) for packed in arguments.pop("masks")]
    tensors = {name: _to_tensor(value) for name, value in arguments.items()}
    return Batch(**tensors, pixel_values=pixels, masks=masks, info=info, normalise=normalise)


def _to_array(tensor: torch.Tensor) -> np.ndarray | torch.Tensor:
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()  # numpy has no such type


def _to_tensor(value: np.ndarray | torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)


def _pack_masks(masks: np.ndarray) -> tuple[tuple[int, ...], np.ndarray, np.ndarray | None]:
    """Shape of masks of 0, 1 and 255, a bit per pixel for what is not 0, and one for what is 255, if anything is."""
    has_ignored = masks.size > 0 and masks.max() == IGNORE_LABEL
    return masks.shape, np.packbits(masks), np.packbits(masks == IGNORE_LABEL) if has_ignored else None


def _unpack_masks(shape: tuple[int, ...], bits: np.ndarray, ignored_bits: np.ndarray | None) -> torch.Tensor:
    masks = np.unpackbits(bits, count=math.prod(shape)).reshape(shape)
    if ignored_bits is not None:
        masks[np.unpackbits(ignored_bits, count=masks.size).reshape(shape) == 1] = IGNORE_LABEL
    return torch.from_numpy(masks)


def collate(examples: list[Example], pad_token_id: int = 0) -> Batch:
    """One Batch of at least one example, each with at least one conversation; `pad_token_id` fills short ones,
    unlabelled.
    """
    conversations = [conversation for example in examples for conversation in example.conversations]
    lengths = torch.tensor([conversation.input_ids.shape[0] for conversation in conversations])
    input_ids = pad_sequence([one.input_ids for one in conversations], batch_first=True, padding_value=pad_token_id)
    pixels = torch.stack([example.pixel_values.movedim(0, -1) for example in examples]).movedim(-1, 1)
    image_index = [b for b, example in enumerate(examples) for _ in example.conversations]
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None],
        labels=pad_sequence([one.labels for one in conversations], batch_first=True, padding_value=IGNORE_TOKEN),
        pixel_values={TOWER_KEY: pixels},  # channels last in memory, as images come
        resized_sizes=torch.tensor([example.resized_size for example in examples], dtype=torch.long),
        original_sizes=torch.tensor([example.original_size for example in examples], dtype=torch.long),
        image_index=torch.tensor(image_index, dtype=torch.long),
        masks=[example.masks for example in examples],
        target_questions=_number_questions(conversations),
        info=[example.info for example in examples],
        normalise=examples[0].normalise,
    )


def _number_questions(conversations: list[EncodedConversation]) -> torch.Tensor:
    """(Q,) long: targets of the same conversation and turn share a number, others do not; numbers rise from 0."""
    numbers: dict[tuple[int, int], int] = {}
    questions = [
        numbers.setdefault((number, turn), len(numbers))
        for number, conversation in enumerate(conversations)
        for turn in conversation.group_turns
    ]
    return torch.tensor(questions, dtype=torch.long)
