"""Where the mask parts of a tiny base start: in one space with the words that patches and answers are about."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from demo.mask_start import start_masks_at_words
from demo.tiny import make_tiny
from tests.unit.tiny_batches import make_batch
from tests.unit.tiny_pixellm import SHAPE
from utils.checkpoints.builder import BuildError, BuiltModel

COLOURS, FORMS = ("red", "blue", "green"), ("circle", "square", "star")
NAMES = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
ROWS = [(image, [("where?", f"It is the {name} {{seg}}.")]) for image in (0, 1) for name in NAMES]


@pytest.fixture(scope="module")
def started() -> tuple[BuiltModel, dict[str, Any], float]:
    """The model, the batch its mask parts were started on (every name for each of two images), and what was read."""
    torch.manual_seed(0)
    words = "It is the " + " ".join([*COLOURS, *FORMS])
    shape = replace(SHAPE, width=128, text_num_heads=4, text_head_dim=32, embedding_dim=16, vocab_size=400)
    built = make_tiny([words, words], shape, seed=0, names=(*COLOURS, *FORMS))
    batch = make_batch(built.processor, ROWS, [(20, 40), (24, 24)])
    with patch("demo.mask_start.READING_STEPS", 400):
        read = start_masks_at_words(built, [(batch, NAMES * 2)] * 5)
    return built, batch, read


def test_the_codebook_reads_the_words_that_name_a_target(started: tuple[BuiltModel, dict[str, Any], float]) -> None:
    """Two names are the nearer, the more words they share."""
    built, batch, read = started
    assert 0.6 < read <= 1.0, read
    with torch.no_grad():
        embeddings = built.model(**batch).embeddings[: len(NAMES), 0]
    distances = torch.cdist(embeddings, embeddings)
    shared = torch.tensor([[len(set(a.split()) & set(b.split())) for b in NAMES] for a in NAMES])
    assert distances[shared == 2].max() < 1e-3, "a name and itself"
    assert distances[shared == 1].mean() < 0.9 * distances[shared == 0].mean()


def test_maps_start_as_the_image_tokens(started: tuple[BuiltModel, dict[str, Any], float]) -> None:
    built, batch, _ = started
    model = built.model
    with torch.no_grad():
        images = model.encode_images(batch["pixel_values"], batch["resized_sizes"])
        coarsest = model.feature_maps(images)[0].flatten(2).transpose(1, 2)
    assert torch.equal(coarsest[..., :-2], images.image_tokens[..., :-2])
    assert not coarsest[..., -2:].any(), "the mark that tells images from words is nothing to see"


def test_patches_look_at_the_token_that_is_like_them(started: tuple[BuiltModel, dict[str, Any], float]) -> None:
    """Query and key of the attentions between patches and tokens are one projection, so like meets like."""
    attention = started[0].model.pixel_decoder.transformers[0].layers[0].cross_attn_image_to_token
    states = torch.eye(16)
    scores = attention.q_proj(states) @ attention.k_proj(states).T
    assert torch.allclose(scores, scores.T, atol=1e-6) and bool((scores.diagonal() > 0).all())


def test_a_name_of_unknown_words_is_refused(started: tuple[BuiltModel, dict[str, Any], float]) -> None:
    built, batch, _ = started
    with pytest.raises(BuildError, match=r"the word 'xylophone' takes \d+ tokens"):
        start_masks_at_words(built, [(batch, ["red xylophone"] * len(ROWS))])
