"""A language model quantised to 8 or 4 bits: which layers, and the library that does it."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

# The rest is small beside the language model, and masks are drawn from what it computes.
UNQUANTIZED = ("language_model.lm_head", "vision_tower", "projector", "mask_projector", "codebook", "pixel_decoder")


def quantization_config(bits: int, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """How bitsandbytes quantises the linear layers of the language model, on a CPU or on CUDA.

    Args:
        bits: 8 (LLM.int8) or 4 (NF4). dtype: what 4-bit layers compute in; None for float32.

    Raises:
        ValueError: another number of bits. ImportError: bitsandbytes is not installed.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights can be quantised to 8 or 4 bits, found {bits}")
    require_bitsandbytes(bits)
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=list(UNQUANTIZED),
        bnb_4bit_compute_dtype=dtype or torch.float32,
        bnb_4bit_quant_type="nf4",
    )


def require_bitsandbytes(bits: int) -> None:
    """ImportError, with what to do, where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"weights in {bits} bits need the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or load the model in its own precision"
        )
