"""Opening images of every kind and turning them into the square a vision tower takes, pixel for pixel as PIL does."""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .geometry import resized_shape
from .structures import PixelLMError

PIXEL_MAX = int(np.iinfo(np.uint8).max)
DEEP_PIXEL_MAX = int(np.iinfo(np.uint16).max)
CHANNELS = 3
UPRIGHT = 1  # EXIF orientation of an image that needs no turning

# What a decoder raises on a file that is not what its name or header says.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageError(PixelLMError):
    """An image cannot be opened; the message names it."""


@dataclass(frozen=True)
class PixelStatistics:
    """From pixels of 0..255 to the numbers a vision tower takes, on whatever device the pixels are.

    mean, std: of each channel, in units of 0..255. pad_before_normalize: True takes what is beside the image for
    black pixels, False (release) makes it zero, which is the mean colour.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad_before_normalize: bool

    def __call__(self, pixels_B3PP: torch.Tensor, resized_sizes_B2: torch.Tensor) -> torch.Tensor:
        """(B, 3, P, P) uint8, black beside the images, whose sizes are `resized_sizes_B2` -> (B, 3, P, P) float32."""
        device = pixels_B3PP.device
        mean_C11 = torch.tensor(self.mean, dtype=torch.float32, device=device)[:, None, None]
        std_C11 = torch.tensor(self.std, dtype=torch.float32, device=device)[:, None, None]
        normalised = (pixels_B3PP.contiguous().float() - mean_C11) / std_C11
        if self.pad_before_normalize:
            return normalised
        places = torch.arange(pixels_B3PP.shape[-1], device=device)
        rows_BP, columns_BP = (places < side_B[:, None] for side_B in resized_sizes_B2.to(device).unbind(-1))
        return normalised.masked_fill_(~(rows_BP[:, None, :, None] & columns_BP[:, None, None, :]), 0.0)


@dataclass(frozen=True)
class PreparedImage:
    """An image that fits into its square, not yet normalised.

    resized: (height, width, 3) uint8, for the top left corner of a black square of `side` pixels. original_size: the
    image's own (height, width).
    """

    resized: np.ndarray
    side: int
    original_size: tuple[int, int]

    @property
    def resized_size(self) -> tuple[int, int]:
        """(height, width) of the image inside the square."""
        height, width = self.resized.shape[:2]
        return height, width

    @property
    def pixels(self) -> torch.Tensor:
        """(3, P, P) uint8: the square, made anew. Channels are last in its memory."""
        height, width = self.resized_size
        square_PPC = np.zeros((self.side, self.side, CHANNELS), dtype=np.uint8)
        square_PPC[:height, :width] = self.resized
        return torch.from_numpy(square_PPC).permute(2, 0, 1)


@dataclass(frozen=True)
class EncodedImage:
    """An image as the vision tower sees it.

    pixel_values: (3, P, P) float32, normalised, the image in the top left corner.
    resized_size: (height, width) of the image inside the square. original_size: its own (height, width).
    """

    pixel_values: torch.Tensor
    resized_size: tuple[int, int]
    original_size: tuple[int, int]


def open_image(source: Any) -> np.ndarray:
    """Open an image.

    Args:
        source: a path, the bytes of a file, a PIL image, an array (H, W), (H, W, 1 | 3 | 4) or a tensor, which may
            also be (1 | 3 | 4, H, W). Numbers are uint8, uint16 (0..65535) or float (0..1).

    Returns:
        (H, W, 3) uint8 RGB. EXIF rotation is applied, transparency is laid on white, 16-bit values are scaled to 8
        bits, of an animation the first frame is taken.

    Raises:
        ImageError: missing, not an image, damaged, empty, too large to be opened safely, or of a kind not listed.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, "the array")
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source.detach().cpu().numpy()), "the tensor")
    return np.array(_open_rgb(source))


def _open_rgb(source: Any) -> Image.Image:
    """What `open_image` opens, arrays and tensors aside, as a PIL image of mode RGB."""
    if isinstance(source, Image.Image):
        return _from_pil(source, "the image")
    if isinstance(source, (bytes, bytearray)):
        return _from_file(io.BytesIO(source), f"the image ({len(source)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        return _from_file(source, f"the image {os.fspath(source)!r}")
    raise ImageError(
        f"cannot open an image from a {type(source).__name__}: give a path, bytes, a PIL image, an array or a tensor"
    )


def _from_file(source: Any, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # PIL warns of images that are refused below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        with image:
            return _from_pil(image, name)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist: check the path") from error
    except Image.DecompressionBombError as error:  # over twice the limit PIL itself refuses, without telling the sides
        raise ImageError(
            f"{name} claims more than twice the {Image.MAX_IMAGE_PIXELS} pixels that are opened safely: scale it down "
            "first"
        ) from error
    except DECODER_ERRORS as error:
        raise _unreadable(name, error) from error


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    # Only the header has been read so far: a file of some kilobytes may claim billions of pixels.
    if limit is not None and width * height > limit:
        raise ImageError(
            f"{name} claims {width}x{height} pixels, more than the {limit} that are opened safely: scale it down first"
        )
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width}x{height} pixels): give an image of at least one pixel")
    try:
        if image.getexif().get(ExifTags.Base.Orientation, UPRIGHT) != UPRIGHT:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, name)
    except ImageError:
        raise
    except DECODER_ERRORS as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: BaseException) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} cannot be read ({reason}): give an undamaged image file")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating point pixels of unknown range: save it with 8 or 16 bits per pixel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would clip these to 8 bits, which shows almost every 16-bit image as white.
        values = np.array(image).astype(np.int64)
        if values.min() < 0 or values.max() > DEEP_PIXEL_MAX:
            raise ImageError(f"{name} has values outside 0..{DEEP_PIXEL_MAX}: save it with 8 or 16 bits per pixel")
        return Image.fromarray(_to_eight_bits(values)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (PIXEL_MAX,) * 4)
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.int64) * PIXEL_MAX + DEEP_PIXEL_MAX // 2) // DEEP_PIXEL_MAX).astype(np.uint8)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Where both readings of a shape are possible, channels come first: so are tensors of images usually made."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    return array


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise ImageError(f"{name} has shape {shape}: an image is (H, W) or (H, W, channels) with 1, 3 or 4 channels")
    if array.size == 0:
        raise ImageError(f"{name} has shape {shape}: give an image of at least one pixel")
    if array.dtype == np.uint16:
        array = _to_eight_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ImageError(f"{name} holds floating point values outside 0..1: scale it to 0..1 or give uint8")
        array = np.rint(array * PIXEL_MAX).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f"{name} holds {array.dtype} values: give uint8, uint16 or floats in 0..1")
    if array.shape[-1] == 1:
        return np.repeat(array, CHANNELS, axis=-1)
    if array.shape[-1] == 4:
        return np.array(_to_rgb(Image.fromarray(np.ascontiguousarray(array)), name))
    return np.ascontiguousarray(array)


def prepare_image(source: Any, side: int) -> PreparedImage:
    """Open an image and resize it by PIL's antialiased bilinear filter (docs/facts.md, P1), so that it fits its square.

    Args:
        source: what `open_image` takes. side: side P of the square, pixels.

    Raises:
        ImageError: as `open_image`.
    """
    is_array = isinstance(source, (np.ndarray, torch.Tensor))
    image = Image.fromarray(open_image(source)) if is_array else _open_rgb(source)
    height, width = resized_shape(image.height, image.width, side)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return PreparedImage(np.asarray(resized), side, (image.height, image.width))


def encode_image(
    array: np.ndarray, side: int, mean: list[float], std: list[float], *, pad_before_normalize: bool
) -> EncodedImage:
    """Resize, normalise and pad an image on the right and at the bottom.

    Args:
        array: (H, W, 3) uint8 RGB, as `open_image` returns it.
        side: side P of the square, pixels.
        mean, std: three numbers each, in units of 0..255.
        pad_before_normalize: True pads with black, then normalises; False (release) normalises, then pads with zeros,
            which is the mean colour.
    """
    if array.ndim != 3 or array.shape[-1] != CHANNELS or array.dtype != np.uint8 or array.size == 0:
        raise ImageError(f"the array has shape {array.shape} and type {array.dtype}: open it with open_image first")
    prepared = prepare_image(array, side)
    normalise = PixelStatistics(tuple(mean), tuple(std), pad_before_normalize)
    pixel_values = normalise(prepared.pixels[None], torch.tensor([prepared.resized_size]))[0]
    return EncodedImage(pixel_values, prepared.resized_size, prepared.original_size)
