"""What a model that knows nothing is taught with: words of patches, talk about scenes, questions with names of targets.

The processor that makes tensors of them is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from demo.scenes.conversations import make_conversation
from demo.scenes.drawing import Scene, draw_scene
from demo.scenes.patches import patch_words
from demo.scenes.words import named_shape
from model.structures import TOWER_KEY
from utils.data.collate import collate
from utils.data.dataset import TrainingDataset
from utils.data.errors import DataError

_TURNS, _BATCH = 3, 16


def draw_patch_targets(
    scenes: Sequence[Scene], processor: Any, size: int, rank: int, ranks: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches: this rank's `size` images of each step, drawn again rather than read, as (size, 3, P, P)
    pixel values, and (size, 12, patches) their `patch_words`."""
    order = np.random.default_rng(0)
    while True:
        chosen = [scenes[i] for i in order.integers(len(scenes), size=(ranks, size))[rank]]
        yield _images(chosen, processor)[0], label_patches(chosen, processor.patch_size)


def label_patches(scenes: Sequence[Scene], patch: int) -> torch.Tensor:
    """(scenes, 12, patches) `patch_words` of patches of `patch` pixels."""
    return torch.from_numpy(np.stack([patch_words(scene, patch) for scene in scenes]))


def encode_conversations(scenes: Sequence[Scene], processor: Any, rng: random.Random) -> dict[str, torch.Tensor | dict]:
    """Arguments of forward: one conversation in words about each scene."""
    talks = [make_conversation(scene, rng, _TURNS) for scene in scenes]
    encoded = [processor.encode_conversation(talk).input_ids for talk in talks]
    pixels, sizes = _images(scenes, processor)
    return {
        "input_ids": pad_sequence(encoded, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in encoded], batch_first=True),
        "pixel_values": {TOWER_KEY: pixels},
        "resized_sizes": sizes,
        "image_index": torch.arange(len(scenes)),
    }


def read_mask_targets(dataset: TrainingDataset, count: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Arguments of forward for the first `count` samples, in batches, with the "colour form" of every target.

    DataError for a target without one.
    """
    for first in range(0, count, _BATCH):
        numbers = range(first, min(first + _BATCH, count))
        turns = [turn for i in numbers for conversation in dataset.mixture[i].conversations for turn in conversation]
        targets = [target.name for turn in turns for target in turn.targets]
        names = [named_shape(name) for name in targets]
        if None in names:
            unnamed = targets[names.index(None)]
            raise DataError(f"the target {unnamed!r} has no colour and form: expected scenes of demo/make_scenes.py")
        yield collate([dataset[i] for i in numbers]).as_kwargs(), [name for name in names if name]


def _images(scenes: Sequence[Scene], processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(scenes, 3, P, P) pixel values and (scenes, 2) sizes after resizing."""
    images = [processor.encode_image(draw_scene(scene)) for scene in scenes]
    return torch.stack([p.pixel_values for p in images]), torch.tensor([p.resized_size for p in images])
