"""Images prepared for their square sooner than exactly, for training runs that ask for it (`--fast_resize`)."""

import math
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from model.geometry import resized_shape
from model.image_processing_pixellm import DECODER_ERRORS, ImageError, PreparedImage, open_image, prepare_image

DETAIL = 2
"""How many times the side that is needed a JPEG decoded in less detail still has, at least."""

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def prepare_image_fast(source: Any, side: int) -> PreparedImage:
    """`prepare_image`, but JPEG files far larger than needed are decoded in less detail, and torch's filter resizes,
    whose values may be off by 1.

    Args:
        source: what `open_image` takes. side: side P of the square, pixels.

    Raises:
        ImageError: as `open_image`.
    """
    if not isinstance(source, (str, os.PathLike)):
        array = open_image(source)
        return _resize(array, side, array.shape[:2])
    try:
        with Image.open(source) as image:
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
                width, height = height, width
            if image.format == "JPEG" and max(width, height) >= 2 * DETAIL * side:
                shrinking = DETAIL * side / max(width, height)
                image.draft("RGB", (math.ceil(image.width * shrinking), math.ceil(image.height * shrinking)))
            return _resize(open_image(image), side, (height, width))
    except (ImageError, *DECODER_ERRORS):
        return prepare_image(source, side)  # which says what is wrong with the file


def _resize(array: np.ndarray, side: int, original_size: tuple[int, ...]) -> PreparedImage:
    original_height, original_width = original_size
    height, width = resized_shape(original_height, original_width, side)
    # The view is known as channels last, for which torch is fastest.
    pixels_1CHW = torch.from_numpy(array)[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(pixels_1CHW, (height, width), mode="bilinear", antialias=True)
    return PreparedImage(resized_1CHW[0].permute(1, 2, 0).numpy(), side, (original_height, original_width))
