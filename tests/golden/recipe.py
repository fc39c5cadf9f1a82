"""Weights and pixels of the golden set, made from integers alone: nothing large is stored.

Element i of a tensor is a 64-bit mix (SplitMix64's finaliser) of the CRC-32 of "seed/name" and i, brought to [-1, 1).
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

GOLDEN_RATIO = 0x9E3779B97F4A7C15
MIX_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
KEPT_BITS = 24  # of 64: as many as a float32 holds exactly


def unit_values(seed: int, name: str, count: int) -> np.ndarray:
    """(count,) float64 in [-1, 1): the recipe's u for elements 0 … count - 1."""
    key = zlib.crc32(f"{seed}/{name}".encode())
    start = ((key << 32) + GOLDEN_RATIO) % (1 << 64)
    z = np.arange(count, dtype=np.uint64)
    z += np.uint64(start)  # unsigned integers wrap around, as the recipe asks
    for shift, factor in MIX_ROUNDS:
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(LAST_SHIFT)
    z >>= np.uint64(64 - KEPT_BITS)
    return z.astype(np.float64) / (1 << (KEPT_BITS - 1)) - 1


def make_tensor(seed: int, name: str, shape: Sequence[int], center: float, scale: float) -> torch.Tensor:
    """The float32 tensor `name`: center + scale * u, computed in float64."""
    values = center + scale * unit_values(seed, name, int(np.prod(shape, dtype=np.int64)))
    return torch.from_numpy(values.astype(np.float32).reshape(tuple(shape)))


def make_tensors(seed: int, entries: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a `model_tensors`, `clip_tensors` or `lora_tensors` table."""
    return {
        name: make_tensor(seed, name, entry["shape"], entry["center"], entry["scale"])
        for name, entry in entries.items()
    }


def make_pixels(seed: int, entry: Mapping[str, Any], resized_sizes: Iterable[Sequence[int]]) -> torch.Tensor:
    """(B, 3, P, P) pixels of a pixel recipe: everything outside each image's (height, width) is zero."""
    pixels = make_tensor(seed, entry["name"], entry["shape"], entry["center"], entry["scale"])
    for image, (height, width) in zip(pixels, resized_sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return pixels
