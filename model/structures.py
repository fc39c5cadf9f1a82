"""Constants and small types that all parts share, each with its one home here."""

from collections.abc import Sequence

import torch

IGNORE_TOKEN = -100
"""Label of a token that is not learned."""

IGNORE_LABEL = 255
"""Value of a pixel in a mask that counts neither for nor against it."""

SEG_MARKER = "{seg}"
"""Stands in an answer for every target: the model writes a seg group there."""

TOWER_KEY = "vision_tower"
"""Key of the vision tower's images in `pixel_values`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that commands take."""

EAGER, SDPA, FLASH_ATTENTION = "eager", "sdpa", "flash_attention_2"
ATTENTIONS = (EAGER, SDPA, FLASH_ATTENTION)
"""Attention implementations, as transformers names them."""

LLAVA_V1, LLAVA_LLAMA_2, CHAT_TEMPLATE = "llava_v1", "llava_llama_2", "chat_template"
CONVERSATION_FORMATS = (LLAVA_V1, LLAVA_LLAMA_2, CHAT_TEMPLATE)
"""What may stand around questions and answers; see `conversation_formats`."""

# How training starts unless told otherwise: the paper's recipe.
LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGET_MODULES = 8, 16, 0.05, "q_proj,v_proj"
ADAM_BETAS, WEIGHT_DECAY, GRADIENT_CLIP = (0.9, 0.95), 0.0, 1.0

CLASSES_PER_SAMPLE, CLASSES_PER_QUESTION = 3, 3
"""Most questions about an image of a training sample, and most targets that one of them asks for. The training
commands of the release give 3 for both; validation and readers used alone ask for one target at a time.
"""

Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

Question = str | Sequence[tuple[str, str | None]]
"""A question, or turns (question, answer) of which the last is to be answered: its answer is None."""


class PixelLMError(ValueError):
    """Something the person at the keyboard can put right.

    The message is one sentence: what was found, what was expected, what to do.
    """
