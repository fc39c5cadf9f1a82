"""Opening images of every kind and turning them into the square a vision tower sees."""

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from .geometry import resized_shape
from .structures import PixelLMError

try:  # transformers refuses exported models whose files import, outside of such lines, what is not installed
    import simplejpeg
except ImportError:
    simplejpeg = None

PIXEL_MAX = int(np.iinfo(np.uint8).max)
DEEP_PIXEL_MAX = int(np.iinfo(np.uint16).max)
CHANNELS = 3

_UPRIGHT, _SIDEWAYS = 1, (5, 6, 7, 8)
"""Values of EXIF's orientation."""

_TENTHS, _HALVES = Fraction(10, 7), Fraction(2)
"""Factors of shrinking, such as from 640 by 480 to 448 by 336 pixels, at which torch's filter for bytes, several times
as fast as PIL's, gives the same numbers though its weights have 15 bits and PIL's 22.

In both, weights are whole numbers over a small N. Is N odd, no sum is half-way between two bytes, and none is so near
to that, at most 1 / 2N, that 15 bits tell it wrong: N is 27, 29 or 31 at tenths, and 7 at the ends of halves. Is N 2 or
8, as elsewhere, the weights are exact, and both filters round up. The first and the last pixel at tenths have N = 26.
"""

_QUICK = (_TENTHS, _HALVES)

_TALL = 2
"""Images of more than so many times their width PIL resizes downwards first, since version 13."""

_END_WEIGHTS = (17 / 26, 9 / 26)
"""Of PIL's first pixel at tenths: of the first and the second before."""

_WEIGHT_BITS = 22
"""Of PIL's weights."""

_DETAIL = 2
"""How many times the side that is needed a JPEG decoded in less detail still has, at least."""

_JPEG_BEGINS, _JPEG_ENDS = b"\xff\xd8", b"\xff\xd9"

_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers before the size of an image: baseline, extended, progressive."""

_JPEG_HARMLESS = (0xE0, 0xDB, 0xC4, 0xDD, 0xFE)
"""Markers of what does not change how an image is shown: JFIF, tables, the restart interval, comments."""

# What a decoder raises on a file that is not what its name or header says.
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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
    return np.array(_rgb_image(source)[0])


def _rgb_image(source: Any, needed: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """What `open_image` opens, arrays aside, as a PIL image of mode RGB, and its size (height, width).

    needed: that a longest side of so many pixels is enough; JPEG files are then decoded in less detail.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, "the image")
    if isinstance(source, (bytes, bytearray)):
        return _from_file(io.BytesIO(source), f"the image ({len(source)} bytes)", needed)
    if isinstance(source, (str, os.PathLike)):
        return _from_file(source, f"the image {os.fspath(source)!r}", needed)
    raise ImageError(
        f"cannot open an image from a {type(source).__name__}: give a path, bytes, a PIL image, an array or a tensor"
    )


def _from_file(source: Any, name: str, needed: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    try:
        with _open_lazily(source) as image:
            return _from_pil(image, name, needed)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist: check the path") from error
    except Image.DecompressionBombError as error:  # over twice the limit PIL itself refuses, without telling the sides
        raise ImageError(
            f"{name} claims more than twice the {Image.MAX_IMAGE_PIXELS} pixels that are opened safely: scale it down "
            "first"
        ) from error
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read ({reason}): give an undamaged image file") from error


def _open_lazily(source: Any) -> Image.Image:
    with warnings.catch_warnings():
        # PIL warns of images that are refused below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source)


def _from_pil(image: Image.Image, name: str, needed: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
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
        orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
        if needed is not None and image.format == "JPEG" and max(width, height) >= 2 * _DETAIL * needed:
            shrinking = _DETAIL * needed / max(width, height)
            image.draft("RGB", (math.ceil(width * shrinking), math.ceil(height * shrinking)))
        if orientation != _UPRIGHT:
            image = ImageOps.exif_transpose(image)
        size = (width, height) if orientation in _SIDEWAYS else (height, width)
        return _to_rgb(image, name), size
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be read ({reason}): give an undamaged image file") from error


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
        return image
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


def prepare_image(source: Any, side: int, *, fast: bool = False) -> PreparedImage:
    """Open an image and resize it by PIL's antialiased bilinear filter (golden fact P1), so that it fits its square.

    Args:
        source: what `open_image` takes.
        side: side P of the square, pixels.
        fast: decode JPEG files of far more pixels than are needed in less detail, and leave values at the edges off by
            1 here and there, at most one in a thousand of all, where that saves time.

    Raises:
        ImageError: as `open_image`.
    """
    image, (whole_height, whole_width) = _opened(source, side if fast else None)
    height, width = resized_shape(whole_height, whole_width, side)
    return PreparedImage(_resized(image, height, width, fast), side, (whole_height, whole_width))


def _opened(source: Any, needed: int | None) -> tuple[np.ndarray | Image.Image, tuple[int, ...]]:
    """(H, W, 3) uint8 or an image of mode RGB, and its own (height, width), which may be more where a longest side of
    `needed` pixels is enough."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        array = open_image(source)
        return array, array.shape[:2]
    quick = _quickly_decoded(source, needed)
    return (quick, quick.shape[:2]) if quick is not None else _rgb_image(source, needed)


def _quickly_decoded(source: Any, needed: int | None = None) -> np.ndarray | None:
    """(H, W, 3) uint8 of a whole, upright JPEG of three colours that needs all its detail: the pixels that PIL gives, a
    copy sooner. None for anything else, broken files included, of which PIL then says what is wrong.
    """
    decode = _quick_decoder()
    if decode is None or not isinstance(source, (str, os.PathLike, bytes)):
        return None
    try:
        content = source if isinstance(source, bytes) else _read(source)
        if not (content.startswith(_JPEG_BEGINS) and content.endswith(_JPEG_ENDS)):
            return None
        size = _size_of_plain_jpeg(content) or _size_of_upright_jpeg(content)
    except _DECODER_ERRORS:
        return None
    if size is None or math.prod(size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    less_is_enough = needed is not None and max(size) >= 2 * _DETAIL * needed
    return None if less_is_enough else decode(content)


def _read(path: str | os.PathLike) -> bytes:
    with open(path, "rb", buffering=0) as stream:
        return stream.readall()


def _size_of_plain_jpeg(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three colours, 8 bits each, that has nothing beside its image but JFIF's own
    header and comments, as most photographs in data sets; None for others. PIL takes ten times as long to tell.
    """
    place = len(_JPEG_BEGINS)
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker in _JPEG_FRAMES:
            precision, height, width, colours = struct.unpack_from(">BHHB", content, place + 4)
            return (width, height) if precision == 8 and colours == CHANNELS and width * height else None
        if marker not in _JPEG_HARMLESS:
            return None
        place += 2 + length
    return None


def _size_of_upright_jpeg(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three colours, as PIL tells it; None for others."""
    with _open_lazily(io.BytesIO(content)) as header:
        upright = header.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) == _UPRIGHT
        return header.size if header.format == "JPEG" and header.mode == "RGB" and upright else None


def _decoded_by_simplejpeg(content: bytes) -> np.ndarray | None:
    try:
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:  # of damage that other decoders may put up with, too
        return None


def _decoded_by_opencv(content: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


@cache
def _quick_decoder() -> Callable[[bytes], np.ndarray | None] | None:
    """The quickest decoder at hand that gives the same pixels as PIL's."""
    quickest_first = [_decoded_by_opencv] if simplejpeg is None else [_decoded_by_simplejpeg, _decoded_by_opencv]
    return next(filter(_agrees_with_pil, quickest_first), None)


def _agrees_with_pil(decode: Callable[[bytes], np.ndarray | None]) -> bool:
    """Whether `decode` and PIL came with decoders that give the same pixels, which is usual but not promised."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, CHANNELS), dtype=np.uint8))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        stream = io.BytesIO()
        noise.save(stream, "JPEG", quality=90, subsampling=subsampling)
        decoded = decode(stream.getvalue())
        if decoded is None or not np.array_equal(decoded, np.asarray(Image.open(stream))):
            return False
    return True


def _resized(image: np.ndarray | Image.Image, height: int, width: int, fast: bool = False) -> np.ndarray:
    """(height, width, 3) uint8 of (H, W, 3) uint8 or an image of mode RGB: what PIL gives; if `fast`, save for a few
    values at the edges, which may be off by 1.
    """
    before = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    quick = [_quick_factor(*lengths) is not None for lengths in zip(before, (height, width), strict=True)]
    if any(quick) and before[0] <= _TALL * before[1] and _filters_agree():
        if fast and all(quick):
            return _filtered(np.require(image, requirements="W"), height, width)
        return np.asarray(_resized_along(_resized_along(image, width, axis=1), height, axis=0))
    return np.asarray(_resized_by_pil(image, height, width))


def _filtered(pixels_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 of (H, W, 3) uint8, by torch's filter."""
    # The view is known as channels last, for which torch is fastest.
    pixels_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    resized_1CHW = F.interpolate(pixels_1CHW, (height, width), mode="bilinear", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _resized_by_pil(image: np.ndarray | Image.Image, height: int, width: int) -> Image.Image:
    whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return whole.resize((width, height), Image.Resampling.BILINEAR)


def _quick_factor(before: int, after: int) -> Fraction | None:
    """By how much a length shrinks, where torch's filter does that as PIL does."""
    return next((factor for factor in _QUICK if before * factor.denominator == after * factor.numerator), None)


def _resized_along(image: np.ndarray | Image.Image, length: int, axis: int) -> np.ndarray | Image.Image:
    """The image, (H, W, 3) uint8 or of mode RGB, whose `axis` (0 downwards, 1 across) gets `length` pixels."""
    shape = [image.height, image.width] if isinstance(image, Image.Image) else list(image.shape[:2])
    before, shape[axis] = shape[axis], length
    factor = _quick_factor(before, length)
    if factor is not None:
        return _quickly_resized(np.require(image, requirements="W"), axis, factor)
    return _resized_by_pil(image, *shape) if before != length else image


def _quickly_resized(pixels_HWC: np.ndarray, axis: int, factor: Fraction) -> np.ndarray:
    """(H, W, 3) uint8 whose `axis` is shrunk by tenths or halves, by torch's filter."""
    shape = [*pixels_HWC.shape[:2]]
    shape[axis] = int(shape[axis] / factor)
    resized_HWC = _filtered(pixels_HWC, *shape)
    if factor == _TENTHS:
        before, after = pixels_HWC.swapaxes(0, axis), resized_HWC.swapaxes(0, axis)
        after[[0, -1]] = _end_pixels(before[[0, -1]], before[[1, -2]])
    return resized_HWC


def _end_pixels(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: what PIL makes of the two pixels at an end of every row or column."""
    first, second = (int(weight * (1 << _WEIGHT_BITS) + 0.5) for weight in _END_WEIGHTS)
    half = 1 << (_WEIGHT_BITS - 1)
    return ((outer.astype(np.int32) * first + inner.astype(np.int32) * second + half) >> _WEIGHT_BITS).astype(np.uint8)


@cache
def _filters_agree() -> bool:
    """Whether torch's filter has as many bits on this processor as it should, and this PIL resizes along rows first."""
    noise = np.random.default_rng(0).integers(0, 256, (_TALL * 20, 20, CHANNELS), dtype=np.uint8)
    for factor in _QUICK:
        height, width = (int(length / factor) for length in noise.shape[:2])
        found = _resized_along(_resized_along(noise, width, axis=1), height, axis=0)
        if not np.array_equal(np.asarray(found), np.asarray(_resized_by_pil(noise, height, width))):
            return False
    return True


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
