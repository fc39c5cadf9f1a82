"""A model of random weights and a batch, to measure what a training step costs; not for use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.modeling_pixellm import PixelLMForCausalLM
from tools.bench.baselines import SHAPES, Shape, measured_model, training_batch
from utils.checkpoints.builder import TrainingRecipe, choose_trainable
from utils.checkpoints.quantized_layers import quantize_frozen

TRAINED_SHAPES = {
    "7b": Shape(4096, 32, 32, 11008, 32000, 1024, 24, 256, 2048),
    "tiny": SHAPES["smoke"],
}
# As the 7B recipe has it: so many conversations about an image, and tokens of text in each.
CONVERSATIONS, LENGTH = 3, 80


def model_to_train(
    shape: Shape, device: torch.device, checkpointing: bool, bits: int | None = None
) -> tuple[PixelLMForCausalLM, list[str]]:
    """A model with LoRA in training mode, made on `device` in bfloat16, and the names of what trains.

    bits: the frozen layers of the language model are held in so many, 4 or 8; None in bfloat16.
    """
    with torch.device(device), default_dtype(torch.bfloat16):
        model = measured_model(shape)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    if bits is not None:
        quantize_frozen(model, bits, torch.bfloat16, device)
    trained = choose_trainable(model, TrainingRecipe())
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train(), trained


def batch_to_train(model: PixelLMForCausalLM, images: int) -> dict[str, Any]:
    """Arguments of `forward`: so many images with CONVERSATIONS each, a target in every one."""
    one, rows = training_batch(model, CONVERSATIONS, LENGTH), CONVERSATIONS * images
    repeated = {name: one[name].repeat(images, 1) for name in ("input_ids", "attention_mask", "labels")}
    sizes = {name: one[name].repeat(images, 1) for name in ("resized_sizes", "original_sizes")}
    return {
        **repeated,
        **sizes,
        "pixel_values": {name: pixels.repeat(images, 1, 1, 1) for name, pixels in one["pixel_values"].items()},
        "image_index": torch.arange(images).repeat_interleave(CONVERSATIONS),
        "masks": one["masks"] * images,
        "target_questions": torch.arange(rows),
    }


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of this type inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
