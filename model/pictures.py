"""Opening pictures of every kind and turning them into the square a vision tower sees."""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .geometry import resized_shape

PIXEL_MAX = int(np.iinfo(np.uint8).max)
DEEP_PIXEL_MAX = int(np.iinfo(np.uint16).max)
CHANNELS = 3

# What a decoder raises on a file that is not what its name or header says.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class PictureError(ValueError):
    """A picture cannot be opened; the message is one sentence that names it."""

    user_message = True


@dataclass(frozen=True)
class Picture:
    """A picture as the vision tower sees it.

    pixel_values: (3, P, P) float32, normalised, the picture in the top left corner.
    resized_size: (height, width) of the picture inside the square. original_size: its own (height, width).
    """

    pixel_values: torch.Tensor
    resized_size: tuple[int, int]
    original_size: tuple[int, int]


def open_picture(source: Any) -> np.ndarray:
    """Open a picture.

    Args:
        source: a path, the bytes of a file, a PIL picture, an array (H, W), (H, W, 1 | 3 | 4) or a tensor, which may
            also be (1 | 3 | 4, H, W). Numbers are uint8, uint16 (0..65535) or float (0..1).

    Returns:
        (H, W, 3) uint8 RGB. EXIF rotation is applied, transparency is laid on white, 16-bit values are scaled to 8
        bits, of an animation the first frame is taken.

    Raises:
        PictureError: missing, not a picture, damaged, empty, too large to be opened safely, or of a kind not listed.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the array")
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source.detach().cpu().numpy()), "the tensor")
    if isinstance(source, Image.Image):
        return _from_pil(source, "the picture")
    if isinstance(source, (bytes, bytearray)):
        return _from_file(io.BytesIO(source), f"the picture ({len(source)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        return _from_file(source, f"the picture {os.fspath(source)!r}")
    raise PictureError(
        f"cannot open a picture from a {type(source).__name__}: give a path, bytes, a PIL picture, an array or a tensor"
    )


def _from_file(source: Any, name: str) -> np.ndarray:
    try:
        with _open_lazily(source) as picture:
            return _from_pil(picture, name)
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f"{name} does not exist: check the path") from error
    except Image.DecompressionBombError as error:  # over twice the limit PIL itself refuses, without telling the sides
        raise PictureError(
            f"{name} claims more than twice the {Image.MAX_IMAGE_PIXELS} pixels that are opened safely: scale it down "
            "first"
        ) from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name} cannot be read ({reason}): give an undamaged picture file") from error


def _open_lazily(source: Any) -> Image.Image:
    with warnings.catch_warnings():
        # PIL warns of pictures that are refused below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


def _from_pil(picture: Image.Image, name: str) -> np.ndarray:
    width, height = picture.size
    limit = Image.MAX_IMAGE_PIXELS
    # Only the header has been read so far: a file of some kilobytes may claim billions of pixels.
    if limit is not None and width * height > limit:
        raise PictureError(
            f"{name} claims {width}x{height} pixels, more than the {limit} that are opened safely: scale it down first"
        )
    if width < 1 or height < 1:
        raise PictureError(f"{name} is empty ({width}x{height} pixels): give a picture of at least one pixel")
    try:
        return np.array(_to_rgb(ImageOps.exif_transpose(picture), name))
    except PictureError:
        raise
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name} cannot be read ({reason}): give an undamaged picture file") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "F":
        raise PictureError(f"{name} holds floating point pixels of unknown range: save it with 8 or 16 bits per pixel")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # PIL would clip these to 8 bits, which shows almost every 16-bit picture as white.
        values = np.array(picture).astype(np.int64)
        if values.min() < 0 or values.max() > DEEP_PIXEL_MAX:
            raise PictureError(f"{name} has values outside 0..{DEEP_PIXEL_MAX}: save it with 8 or 16 bits per pixel")
        return Image.fromarray(_to_eight_bits(values)).convert("RGB")
    if picture.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (PIXEL_MAX,) * 4)
        return Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.int64) * PIXEL_MAX + DEEP_PIXEL_MAX // 2) // DEEP_PIXEL_MAX).astype(np.uint8)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Where both readings of a shape are possible, channels come first: so are tensors of pictures usually made."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    return array


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise PictureError(f"{name} has shape {shape}: a picture is (H, W) or (H, W, channels) with 1, 3 or 4 channels")
    if array.size == 0:
        raise PictureError(f"{name} has shape {shape}: give a picture of at least one pixel")
    if array.dtype == np.uint16:
        array = _to_eight_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PictureError(f"{name} holds floating point values outside 0..1: scale it to 0..1 or give uint8")
        array = np.rint(array * PIXEL_MAX).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise PictureError(f"{name} holds {array.dtype} values: give uint8, uint16 or floats in 0..1")
    if array.shape[-1] == 1:
        return np.repeat(array, CHANNELS, axis=-1)
    if array.shape[-1] == 4:
        return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), name))
    return np.ascontiguousarray(array)


def resize_longest_side(array: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, longest side `side`: PIL's antialiased bilinear filter (golden fact P1)."""
    height, width = resized_shape(array.shape[0], array.shape[1], side)
    if (height, width) == array.shape[:2]:
        return array
    return np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def encode_picture(
    array: np.ndarray, side: int, mean: list[float], std: list[float], *, pad_before_normalize: bool
) -> Picture:
    """Resize, normalise and pad a picture on the right and at the bottom.

    Args:
        array: (H, W, 3) uint8 RGB, as `open_picture` returns it.
        side: side P of the square, pixels.
        mean, std: three numbers each, in units of 0..255.
        pad_before_normalize: True pads with black, then normalises; False (release) normalises, then pads with zeros,
            which is the mean colour.
    """
    if array.ndim != 3 or array.shape[-1] != CHANNELS or array.dtype != np.uint8 or array.size == 0:
        raise PictureError(f"the array has shape {array.shape} and type {array.dtype}: open it with open_picture first")
    resized = resize_longest_side(array, side)
    height, width = resized.shape[:2]
    pixels = torch.from_numpy(resized.transpose(2, 0, 1).copy()).float()
    mean_C11 = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    std_C11 = torch.tensor(std, dtype=torch.float32)[:, None, None]
    square = torch.zeros(CHANNELS, side, side)
    if pad_before_normalize:
        square[:, :height, :width] = pixels
        square = (square - mean_C11) / std_C11
    else:
        square[:, :height, :width] = (pixels - mean_C11) / std_C11
    return Picture(square, (height, width), (int(array.shape[0]), int(array.shape[1])))
