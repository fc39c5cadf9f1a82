"""LoRA that a checkpoint of others still carries: added to its weights when they are read."""

import json
from pathlib import Path

import torch

from model.structures import LORA_ALPHA
from utils.checkpoints.folders import BuildError
from utils.checkpoints.tensor_files import StoredTensor, StoredTensors

ADAPTER_CONFIG = "adapter_config.json"
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def merge_stored_lora(place: str, tensors: StoredTensors, lora_alpha: float) -> tuple[StoredTensors, int]:
    """Tensors with the LoRA among them added when they are read, and to how many layers. BuildError for half a pair."""
    layers = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    plain = {
        name.replace(".base_layer.", "."): stored
        for name, stored in tensors.items()
        if not name.endswith((LORA_A, LORA_B))
    }
    for layer in layers:
        name = f"{layer}.weight"
        if name not in plain or layer + LORA_B not in tensors:
            absent = name if name not in plain else layer + LORA_B
            raise BuildError(f"{place}: tensor {absent!r} is missing, to which {layer + LORA_A!r} belongs")
        low, high = tensors[layer + LORA_A], tensors[layer + LORA_B]
        plain[name] = _add_lora(plain[name], low, high, lora_alpha / low.shape[0])
    return plain, len(layers)


def _add_lora(base: StoredTensor, low: StoredTensor, high: StoredTensor, scale: float) -> StoredTensor:
    def add(weight: torch.Tensor) -> torch.Tensor:
        change = scale * (high.read().float() @ low.read().float())
        return (weight.float() + change).to(weight.dtype)

    return base.change(base.shape, add)


def read_lora_alpha(folder: Path) -> float:
    """The alpha of the LoRA in a folder: what PEFT wrote beside it, else the release's."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError):
        return LORA_ALPHA
    return float(found)
