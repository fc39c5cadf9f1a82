"""A PixelLM of a few thousand random weights, made in no time, and a way to make it say what a test wants."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from demo.tiny import TinyShape, make_tiny
from model.answers import Answer
from utils.checkpoints.builder import BuiltModel

TEXTS = (
    "where is the red circle? it is the red circle.",
    "which shapes are there? the blue square and the green star.",
)
SHAPE = TinyShape(
    image_size=32,
    patch_size=8,
    vision_width=16,
    vision_layers=4,
    width=16,
    layers=2,
    num_heads=2,
    text_num_heads=2,
    text_head_dim=8,
    mlp_width=24,
    vocab_size=300,
    embedding_dim=16,
    decoder_num_heads=2,
    decoder_mlp_dim=16,
    model_max_length=256,
)


def make_model(seed: int = 0) -> BuiltModel:
    """A tiny model with random weights and the processor that belongs to it."""
    return make_tiny(TEXTS, SHAPE, seed)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image (H, W, 3) uint8 of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers say and draw the same; their scores may differ in the last digits."""
    return (
        (one.text, one.marked_text, one.phrases, one.boxes, one.areas, one.num_broken)
        == (other.text, other.marked_text, other.phrases, other.boxes, other.areas, other.num_broken)
        and np.array_equal(one.masks, other.masks)
        and np.allclose(one.scores, other.scores, atol=1e-5)
    )


@contextmanager
def saying(built: BuiltModel, answers: Sequence[str]) -> Iterator[None]:
    """Inside, the language model chooses the tokens of `answers` ("{seg}" for a group), prompt by prompt of a batch,
    at every call anew, whatever it sees; masks still come from the model's own states."""
    with saying_ids([answer_ids(built.processor, answer) for answer in answers]):
        yield


@contextmanager
def saying_ids(rows: Sequence[Sequence[int]]) -> Iterator[None]:
    """The same with token ids; of a row that is read beyond its end the last is said again."""

    def choose(model: Any, states: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        logits = states.new_zeros((len(states), model.get_output_embeddings().weight.shape[0]))
        for number, (prompt, place) in enumerate(places):
            logits[number, rows[prompt][min(place, len(rows[prompt]) - 1)]] = 1.0
        return logits

    with patch("model.generation.compute_logits", choose):
        yield


def answer_ids(processor: Any, answer: str) -> list[int]:
    """The tokens of an answer ("{seg}" for a group), its end token included."""
    encoded = processor.encode_conversation([("?", answer)])
    return encoded.input_ids[encoded.labels != -100].tolist()
