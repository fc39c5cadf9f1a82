"""Masks as text: the compressed run lengths of COCO."""

from collections.abc import Sequence

import numpy as np


def encode_masks(masks: np.ndarray) -> list[str]:
    """bool (P, H, W) -> the `counts` of each mask's compressed COCO run lengths; their `size` is [H, W]."""
    from pycocotools import mask as coco_rle

    return [coco_rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii") for mask in masks]


def decode_masks(counts: Sequence[str], size: Sequence[int]) -> np.ndarray:
    """`encode_masks` undone: bool (P, H, W)."""
    from pycocotools import mask as coco_rle

    height, width = size
    masks = [coco_rle.decode({"size": [height, width], "counts": text.encode("ascii")}) for text in counts]
    return np.array(masks, dtype=bool).reshape(len(masks), height, width)
