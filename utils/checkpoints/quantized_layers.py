"""Training on a language model whose frozen layers are quantised to 8 or 4 bits (QLoRA).

They come from the base's folder at every start, rounded the same way each time, and never change; so they are no part
of a state dict. Checkpoints hold what trains, and merging takes the layers from the base again, unrounded.
"""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from model.modeling_pixellm import PixelLMForCausalLM
from model.quantization import require_bitsandbytes
from utils.checkpoints.folders import BuildError


def quantize_frozen(model: PixelLMForCausalLM, bits: int, dtype: torch.dtype, device: torch.device) -> int:
    """Quantise every linear layer of the language model, but not its head, to 8 (LLM.int8) or 4 bits (NF4) on `device`.

    To be called before LoRA is put on. Each weight is sent to the device by itself.

    Args:
        dtype: what 4-bit layers compute in.

    Returns:
        How many layers there are.

    Raises:
        BuildError: bitsandbytes is not installed.
    """
    try:
        require_bitsandbytes(bits)
    except ImportError as error:
        raise BuildError(str(error)) from error
    decoder = model.language_model.get_decoder()
    layers = [(name, part) for name, part in decoder.named_modules() if isinstance(part, nn.Linear)]
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, _quantize_layer(layer, bits, dtype, device))
    # By this peft knows how to put LoRA on such layers.
    setattr(decoder, f"is_loaded_in_{bits}bit", True)
    return len(layers)


def _quantize_layer(layer: nn.Linear, bits: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    library: Any = import_module("bitsandbytes").nn
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    with torch.device("meta"):
        if bits == 4:
            quantized = library.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        else:
            quantized = library.Linear8bitLt(*shape, has_fp16_weights=False)
    if bits == 4:
        weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
    else:
        # These are rounded only on their way from a CPU.
        weight = library.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    quantized.weight = weight.to(device)
    if layer.bias is not None:
        quantized.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    quantized.__class__ = type(type(quantized).__name__, (_NotInStateDict, type(quantized)), {})
    return quantized


class _NotInStateDict:
    """A module that no state dict holds, nor gives anything to."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing is saved."""

    def _load_from_state_dict(self, *_: Any) -> None:
        """Nothing is loaded."""
