"""The forward pass in every shape: scales, tokens, pools, images, conversations, no target, text only."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from demo.tiny import make_tiny
from tests.unit.tiny_batches import NONE, ONE, THREE, TWO, make_batch, total_loss
from tests.unit.tiny_pixellm import SHAPE, TEXTS, make_model
from utils.checkpoints.builder import BuiltModel, TrainingRecipe, choose_trainable

LONG = [("what is there?", "Nothing at all, neither here nor there, nor anywhere else in the image. " * 3)]


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    """A model with 2 scales x 3 tokens, 4 x 4 patches and image tokens. Tests leave it as it is."""
    return make_model()


def run(built: BuiltModel, batch: dict[str, Any]) -> Any:
    with torch.no_grad():
        return built.model(**batch)


SIZES = [(1, 1, 1), (1, 3, 2), (2, 3, 4), (3, 1, 1), (3, 3, 2)]


@pytest.mark.parametrize(("scales", "tokens", "pool"), SIZES)
def test_any_number_of_scales_tokens_and_pools(scales: int, tokens: int, pool: int) -> None:
    shape = replace(
        SHAPE,
        num_scales=scales,
        tokens_per_scale=tokens,
        image_token_pool=pool,
        vision_feature_layers=tuple(range(-2, -2 - scales, -1)),
    )
    built = make_tiny(TEXTS, shape, seed=0)
    trained = choose_trainable(built.model, TrainingRecipe(lora_dropout=0))
    batch = make_batch(built.processor, [(0, TWO), (1, THREE), (1, NONE)], [(30, 50), (17, 9)])
    output = built.model.train()(**batch)
    side = 4 * 2**scales
    assert [masks.shape for masks in output.low_res_mask_logits] == [(2, side, side), (3, side, side)]
    assert [masks.shape for masks in output.mask_logits] == [(2, 30, 50), (3, 17, 9)]
    assert output.embeddings.shape == (5, scales, SHAPE.embedding_dim)
    text = (batch["input_ids"].shape[1] - 1) + (4 // pool) ** 2
    assert output.last_hidden_state.shape[:2] == output.labels.shape == output.attention_mask.shape == (3, text)
    losses = output.losses
    assert all(torch.isfinite(term.sum) for term in losses.values())
    assert losses["bce"].count == losses["dice"].count == 5
    total_loss(built.model, losses).backward()
    untouched = [name for name in trained if built.model.get_parameter(name).grad is None]
    assert not untouched


def test_positions_of_a_image_are_pooled_patches_and_hold_no_label(built: BuiltModel) -> None:
    """An image twice as wide as high leaves the lower half of its square empty, and masked."""
    batch = make_batch(built.processor, [(0, ONE)], [(20, 40)])
    rows = built.model.merge_multimodal_embeddings(
        batch["input_ids"],
        batch["attention_mask"],
        built.model.encode_images(batch["pixel_values"], batch["resized_sizes"]),
        batch["image_index"],
        batch["labels"],
    )
    start = batch["input_ids"][0].tolist().index(built.processor.image_token_id)
    image = slice(start, start + 16)
    assert rows.ids[0, image].tolist() == [built.processor.image_token_id] * 16
    assert rows.attention_mask[0, image].tolist() == [True] * 8 + [False] * 8
    assert bool(rows.attention_mask[0, start + 16 :].all()) and bool((rows.labels[0, image] == -100).all())
    assert torch.equal(rows.ids[0, start + 16 :], batch["input_ids"][0, start + 1 :])
    assert torch.equal(rows.labels[0, start + 16 :], batch["labels"][0, start + 1 :])


def test_padding_of_the_square_is_not_seen(built: BuiltModel) -> None:
    batch = make_batch(built.processor, [(0, NONE)], [(20, 40)])
    seen = run(built, batch)
    batch["pixel_values"]["vision_tower"][:, :, 16:] = 7.0
    same = run(built, batch)
    attended = seen.attention_mask
    assert torch.equal(seen.last_hidden_state[attended], same.last_hidden_state[attended])
    batch["pixel_values"]["vision_tower"][:, :, 15] = 7.0
    assert not torch.equal(seen.last_hidden_state[attended], run(built, batch).last_hidden_state[attended])


def test_a_batch_gives_what_its_conversations_give_alone(built: BuiltModel) -> None:
    """Images of different sizes, several conversations about one, some without a target."""
    conversations = [(0, TWO), (0, NONE), (0, ONE), (1, NONE), (2, THREE), (2, ONE)]
    sizes = [(20, 40), (32, 32), (50, 10)]
    together = run(built, make_batch(built.processor, conversations, sizes))
    # The noise of an image follows from seed plus number, so image p alone is image 0 of seed p.
    masks: list[list[torch.Tensor]] = [[], [], []]
    losses = 0.0
    for row, (image, turns) in enumerate(conversations):
        alone = run(built, make_batch(built.processor, [(0, turns)], [sizes[image]], seed=image))
        length = int(alone.attention_mask.shape[1])
        states = together.last_hidden_state[row, :length][alone.attention_mask[0]]
        assert torch.allclose(states, alone.last_hidden_state[alone.attention_mask], atol=1e-5)
        masks[image].append(alone.mask_logits[0])
        losses += alone.losses["ce"].sum.item()
    for own, expected in zip(together.mask_logits, masks, strict=True):
        assert torch.allclose(own, torch.cat(expected), atol=1e-4)
    assert together.losses["ce"].sum.item() == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 60)], [(60, 1)], [(1, 1), (40, 30), (1, 1)]])
def test_images_of_one_pixel_or_one_line(built: BuiltModel, sizes: list[tuple[int, int]]) -> None:
    batch = make_batch(built.processor, [(number, TWO) for number in range(len(sizes))], sizes)
    output = run(built, batch)
    assert [tuple(masks.shape) for masks in output.mask_logits] == [(2, *size) for size in sizes]
    assert all(bool(torch.isfinite(masks).all()) for masks in output.mask_logits)
    assert all(torch.isfinite(term.sum) for term in output.losses.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_only_rows_among_images(attention: str) -> None:
    """A row without an image is what the language model alone makes of it, and changes nothing for the others."""
    built = make_model()
    built.model.set_attn_implementation(attention)
    # The longest row of ids has no image, so that it ends before the others once theirs have grown.
    rows = [(0, TWO), (0, LONG), (1, NONE), (1, ONE)]
    mixed = make_batch(built.processor, rows, [(20, 40), (24, 24)], text_only=[1, 2])
    assert bool(mixed["attention_mask"][1].all())
    output = run(built, mixed)
    for row in (1, 2):
        ids = mixed["input_ids"][row][mixed["attention_mask"][row]]
        assert built.processor.image_token_id not in ids
        with torch.no_grad():
            states = built.model.language_model.get_decoder()(input_ids=ids[None]).last_hidden_state
        assert torch.allclose(output.last_hidden_state[row, : len(ids)], states[0], atol=1e-5)
        assert not bool(output.attention_mask[row, len(ids) :].any())
        assert bool((output.labels[row, len(ids) :] == -100).all())
    without = run(built, make_batch(built.processor, [(0, TWO), (1, ONE)], [(20, 40), (24, 24)]))
    for own, expected in zip(output.mask_logits, without.mask_logits, strict=True):
        assert torch.allclose(own, expected, atol=1e-4)


def test_a_batch_of_text_only(built: BuiltModel) -> None:
    output = run(built, make_batch(built.processor, [(0, NONE), (1, NONE)], [(20, 40), (24, 24)], text_only=[0, 1]))
    assert [masks.shape for masks in output.mask_logits] == [(0, 20, 40), (0, 24, 24)]
    assert output.losses["ce"].count > 0 and output.losses["bce"].count == 0 and output.losses["dice"].sum == 0


@pytest.mark.parametrize("text_only", [(), (0, 1)])
def test_without_any_target_mask_parts_get_gradients_of_zero(text_only: tuple[int, ...]) -> None:
    """Otherwise a rank whose batch has no target would leave the others waiting."""
    built = make_model()
    trained = choose_trainable(built.model, TrainingRecipe(lora_dropout=0))
    batch = make_batch(built.processor, [(0, NONE), (1, NONE)], [(20, 40), (24, 24)], text_only=text_only)
    output = built.model.train()(**batch)
    assert output.losses["bce"].sum == output.losses["dice"].sum == output.losses["bce"].count == 0
    total_loss(built.model, output.losses).backward()
    parts = [name for name in trained if name.startswith(("mask_projector.", "codebook.", "pixel_decoder."))]
    gradients = [built.model.get_parameter(name).grad for name in parts]
    assert parts and all(gradient is not None and not gradient.any() for gradient in gradients)
    assert bool(built.model.get_output_embeddings().weight.grad.any())
    assert all(built.model.get_parameter(name).grad is not None for name in trained)


def test_labels_and_masks_may_be_left_out(built: BuiltModel) -> None:
    batch = make_batch(built.processor, [(0, TWO)], [(20, 40)])
    full = run(built, batch)
    labels, masks = batch.pop("labels"), batch.pop("masks")
    bare = run(built, batch)
    assert bare.losses is None and bare.labels is None and torch.equal(bare.mask_logits[0], full.mask_logits[0])
    assert set(run(built, {**batch, "labels": labels}).losses) == {"ce"}
    assert set(run(built, {**batch, "masks": masks}).losses) == {"bce", "dice"}


def test_what_does_not_belong_together_is_refused(built: BuiltModel) -> None:
    batch = make_batch(built.processor, [(0, TWO)], [(20, 40)])
    wrong = [batch["masks"][0][:1]]
    with pytest.raises(ValueError, match="every group needs one mask"):
        built.model(**{**batch, "masks": wrong})
    with pytest.raises(ValueError, match="every group needs one mask"):
        built.model(**{**batch, "masks": [batch["masks"][0].transpose(1, 2)]})
    ids = batch["input_ids"].clone()
    ids[0, ids[0] == built.processor.seg_token_ids[-1]] = built.processor.end_token_id
    with pytest.raises(ValueError, match="not whole groups of 6 adjacent tokens"):
        built.model(**{**batch, "input_ids": ids})
    ids = batch["input_ids"].clone()
    ids[0, -1] = built.processor.image_token_id
    with pytest.raises(ValueError, match="more than one <image>"):
        built.model(**{**batch, "input_ids": ids})
