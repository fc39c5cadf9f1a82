"""Batches for `PixelLMForCausalLM.forward`: true conversations about images and masks of noise."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from model.structures import IGNORE_LABEL, IGNORE_TOKEN
from tests.unit.tiny_pixellm import noise

Turns = list[tuple[str, str]]

ONE: Turns = [("the red circle", "Sure, the red circle {seg}.")]
TWO: Turns = [("which shapes?", "The blue square {seg} and the green star {seg}."), ("and now?", "There is none.")]
THREE: Turns = [("all of them", "A {seg}, b {seg}."), ("one more", "It is the big triangle {seg}.")]
NONE: Turns = [("what is there?", "Nothing at all is to be seen there, as far as one can tell.")]


def make_batch(
    processor: Any,
    conversations: Sequence[tuple[int, Turns]],
    sizes: Sequence[tuple[int, int]],
    *,
    text_only: Collection[int] = (),
    ignored: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `forward`.

    conversations: (image, turns), ordered by image. sizes: (height, width) of each image. text_only: numbers of
    the rows that lose their image. ignored: share of pixels labelled 255.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [processor.encode_image(noise(*size, seed=seed + number)) for number, size in enumerate(sizes)]
    ids, labels, questions = [], [], []
    counts = [0] * len(sizes)
    for row, (image, turns) in enumerate(conversations):
        encoded = processor.encode_conversation(turns)
        keep = torch.ones_like(encoded.input_ids).bool()
        if row in text_only:
            keep = encoded.input_ids != processor.image_token_id
        ids.append(encoded.input_ids[keep])
        labels.append(encoded.labels[keep])
        counts[image] += len(encoded.group_turns)
        questions += [10 * row + turn for turn in encoded.group_turns]
    masks = [
        torch.randint(0, 2, (count, *size), dtype=torch.uint8, generator=generator)
        for count, size in zip(counts, sizes, strict=True)
    ]
    for image_masks in masks:
        hidden = torch.rand(image_masks.shape, generator=generator) < ignored
        image_masks[hidden] = IGNORE_LABEL
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True).bool(),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_TOKEN),
        "pixel_values": {"vision_tower": torch.stack([image.pixel_values for image in images])},
        "resized_sizes": torch.tensor([image.resized_size for image in images]),
        "original_sizes": torch.tensor([image.original_size for image in images]),
        "image_index": torch.tensor([image for image, _ in conversations]),
        "masks": masks,
        "target_questions": torch.tensor(questions, dtype=torch.long),
    }


def total_loss(model: Any, losses: Any) -> torch.Tensor:
    """What a step of this one batch would descend on."""
    weights = model.loss_weights
    return torch.stack([weights[name] * term.sum / term.count.clamp(min=1) for name, term in losses.items()]).sum()
