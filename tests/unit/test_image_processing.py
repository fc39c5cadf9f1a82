"""Every kind of image is opened; the square a tower sees is exact."""

import importlib.util
import io
import struct
import sys
import zlib
from fractions import Fraction
from math import floor, lcm

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from transformers.dynamic_module_utils import get_imports

from model import image_processing_pixellm as images
from model.image_processing_pixellm import (
    ImageError,
    PixelStatistics,
    _quickly_decoded,
    encode_image,
    open_image,
    prepare_image,
)

RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def _file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_every_source_gives_the_same_image(tmp_path):
    path = tmp_path / "an image.png"
    path.write_bytes(_file(Image.fromarray(RGB)))
    sources = [path, str(path), path.read_bytes(), Image.fromarray(RGB), RGB, torch.from_numpy(RGB)]
    sources += [
        torch.from_numpy(RGB).permute(2, 0, 1),
        RGB / 255,
        torch.from_numpy(RGB) / 255,
        RGB.astype(np.uint16) * 257,
    ]
    for source in sources:
        opened = open_image(source)
        assert opened.dtype == np.uint8
        np.testing.assert_array_equal(opened, RGB)


def test_grey_and_deep_images():
    grey = np.array([[0, 100, 255]], dtype=np.uint8)
    deep = np.array([[0, 25700, 65535]], dtype=np.uint16)  # 257 per step of 8 bits: 0, 100, 255
    expected = np.repeat(grey[..., None], 3, axis=-1)
    sources = [grey, grey[..., None], _file(Image.fromarray(grey)), deep, _file(Image.fromarray(deep))]
    sources += [
        _file(Image.fromarray(deep), "TIFF"),
        Image.fromarray(deep.astype(np.int32)),
        Image.fromarray(grey).convert("LA"),
    ]
    for source in sources:
        np.testing.assert_array_equal(open_image(source), expected)
    black_and_white = open_image(_file(Image.fromarray(grey > 128)))
    np.testing.assert_array_equal(black_and_white[0, :, 0], [0, 0, 255])


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    # Opaque as it is; clear is white; black at 51 / 255 = 0.2 leaves 0.8 * 255 = 204 of the white.
    expected = [[10, 20, 30], [255, 255, 255], [204, 204, 204]]
    for source in (rgba, Image.fromarray(rgba), _file(Image.fromarray(rgba))):
        np.testing.assert_array_equal(open_image(source)[0], expected)


def test_palettes():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(open_image(_file(palette))[0], [[200, 0, 0], [0, 0, 200]])
    clear = open_image(_file(palette, transparency=1))
    np.testing.assert_array_equal(clear[0], [[200, 0, 0], [255, 255, 255]])


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: turn by 90 degrees clockwise to see it upright
    stored = _file(Image.fromarray(RGB), exif=exif)
    np.testing.assert_array_equal(open_image(stored), np.rot90(RGB, k=-1))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    opened = open_image(_file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(opened, np.full((2, 2, 3), (255, 0, 0)))


def _png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "side", [10_000, 60_000]
)  # PIL warns about the first and refuses the second; both are refused here
def test_decompression_bombs_are_refused(side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_that_claims(side, side))
    with pytest.raises(ImageError, match=r"bomb\.png.*pixels"):
        open_image(path)


def test_unreadable_images_are_named(tmp_path):
    good = _file(Image.effect_noise((64, 64), 50))
    damaged = {"empty.png": b"", "text.png": b"hello", "cut.png": good[: len(good) // 2], "cut.jpg": b"\xff\xd8\xff"}
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name}.*cannot be read") as raised:
            open_image(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(ImageError, match=r"gone\.png' does not exist"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(tmp_path)  # a folder
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("a\0b.png")


@pytest.mark.parametrize(
    "source",
    [
        None,
        3,
        [[1, 2]],
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 3, 3), np.uint8),
        np.zeros((2, 2, 2, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((2, 2), np.int64),
        np.full((2, 2), 1.5),
        np.full((2, 2), -0.1),
        np.full((2, 2), np.nan),
        np.array([["a"]]),
        Image.new("F", (2, 2)),
        Image.new("RGB", (0, 2)),
        Image.fromarray(np.array([[-1]], dtype=np.int32)),
        Image.fromarray(np.array([[65536]], dtype=np.int32)),
    ],
)
def test_what_is_no_image(source):
    with pytest.raises(ImageError):
        open_image(source)


MEAN, STD = [100.0, 50.0, 0.0], [10.0, 20.0, 50.0]


def test_square_is_padded_after_normalisation():
    array = np.full((1, 2, 3), 150, np.uint8)
    image = encode_image(array, 4, MEAN, STD, pad_before_normalize=False)
    assert image.pixel_values.shape == (3, 4, 4) and image.pixel_values.dtype == torch.float32
    assert image.resized_size == (2, 4) and image.original_size == (1, 2)
    # (150 - 100) / 10 = 5, (150 - 50) / 20 = 5, (150 - 0) / 50 = 3; zeros below row 2.
    expected = torch.tensor([5.0, 5.0, 3.0])
    assert torch.equal(image.pixel_values[:, :2], expected[:, None, None].expand(3, 2, 4))
    assert image.pixel_values[:, 2:].abs().max() == 0


def test_square_is_padded_before_normalisation():
    array = np.full((2, 1, 3), 150, np.uint8)
    image = encode_image(array, 4, MEAN, STD, pad_before_normalize=True)
    assert image.resized_size == (4, 2)
    assert torch.equal(image.pixel_values[:, 0, 0], torch.tensor([5.0, 5.0, 3.0]))
    # Black: (0 - 100) / 10 = -10, (0 - 50) / 20 = -2.5, 0 / 50 = 0, right of column 2.
    assert torch.equal(image.pixel_values[:, 3, 2], torch.tensor([-10.0, -2.5, 0.0]))


def test_one_pixel_fills_the_square():
    image = encode_image(np.full((1, 1, 3), 7, np.uint8), 4, [0.0] * 3, [1.0] * 3, pad_before_normalize=False)
    assert image.resized_size == (4, 4) and image.original_size == (1, 1)
    assert torch.equal(image.pixel_values, torch.full((3, 4, 4), 7.0))


def test_longest_side_shapes():
    cases = {
        (480, 640): (336, 448),
        (640, 480): (448, 336),
        (427, 640): (299, 448),  # 427 * 0.7 = 298.9
        (333, 500): (298, 448),  # 333 * 0.896 = 298.368
        (449, 448): (448, 447),  # 448 * 448 / 449 = 447.002
        (1000, 3): (448, 1),  # 3 * 0.448 = 1.344
        (1, 1000): (1, 448),  # 0.448: the release gives 0 and fails
    }
    for (height, width), expected in cases.items():
        assert prepare_image(np.zeros((height, width, 3), np.uint8), 448).resized_size == expected


def test_a_image_of_the_right_size_is_not_touched():
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 3), dtype=np.uint8)
    for fast in (False, True):
        prepared = prepare_image(array, 8, fast=fast)
        np.testing.assert_array_equal(prepared.pixels[:, :3].permute(1, 2, 0), array)
        assert prepared.pixels[:, 3:].max() == 0


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_only_opened_images_are_encoded(array):
    with pytest.raises(ImageError, match="open it with open_image"):
        encode_image(array, 4, MEAN, STD, pad_before_normalize=False)


def grainy(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Large shapes with edges and grain, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.NEAREST)
    return np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 1)), 0, 255).astype(np.uint8)


def by_the_book(array: np.ndarray, side: int) -> np.ndarray:
    """What PIL makes of an image, (height, width, 3)."""
    height, width = prepare_image(array, side).resized_size
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def prepared_pixels(source: np.ndarray | str, side: int, fast: bool = False) -> np.ndarray:
    prepared = prepare_image(source, side, fast=fast)
    height, width = prepared.resized_size
    assert not prepared.pixels[:, height:].any() and not prepared.pixels[:, :, width:].any()
    return prepared.pixels[:, :height, :width].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "size",
    [
        (480, 640),
        (640, 480),
        (640, 640),
        (427, 640),
        (640, 428),
        (672, 896),
        (896, 300),
        (896, 448),
        (640, 100),
        (100, 640),
        (333, 500),
        (100, 90),
    ],
)
@pytest.mark.parametrize("look", ["grainy", "noise", "black and white"])
def test_images_of_every_size_are_resized_as_pil_does_it(size, look):
    """Black and white noise is nearly always as near to the middle between two bytes as can be."""
    rng = np.random.default_rng(0)
    array = grainy(*size) if look == "grainy" else rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    if look == "black and white":
        array = np.where(array < 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(prepared_pixels(array, 448), by_the_book(array, 448))


def assert_nearly_by_the_book(found: np.ndarray, expected: np.ndarray) -> None:
    """At most one value in a thousand is off, by 1, and only at the edges: there alone torch's weights fall short."""
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1 and (off > 0).mean() <= 0.001 and not off[1:-1, 1:-1].any()


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (640, 640), (672, 896), (427, 640), (333, 500), (896, 300)])
@pytest.mark.parametrize("look", ["grainy", "noise"])
def test_fast_resizing_is_off_at_the_edges_only(size, look):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    array = grainy(*size) if look == "grainy" else noise
    found = prepared_pixels(array, 448, fast=True)
    assert_nearly_by_the_book(found, by_the_book(array, 448))
    if size not in ((480, 640), (640, 480), (640, 640)):
        np.testing.assert_array_equal(found, by_the_book(array, 448), "only tenths both ways are resized otherwise")


@pytest.mark.parametrize("factor", [images._TENTHS, images._HALVES])
def test_no_sum_of_the_quick_filter_is_told_wrong_by_its_15_bits(factor):
    """The proof beside `_TENTHS`, in whole numbers."""
    before, after = 40 * factor.numerator, 40 * factor.denominator
    for place in range(after):
        centre, reach = (place + Fraction(1, 2)) * factor, factor
        first, last = (
            max(0, floor(centre - reach + Fraction(1, 2))),
            min(before, floor(centre + reach + Fraction(1, 2))),
        )
        weights = [1 - abs(pixel + Fraction(1, 2) - centre) / reach for pixel in range(first, last)]
        weights = [weight / sum(weights) for weight in weights if weight > 0]
        common = lcm(*(weight.denominator for weight in weights))
        if common in (2, 8):
            assert all((weight * 2**15).denominator == 1 for weight in weights)
        elif common % 2:
            assert 255 * len(weights) * Fraction(1, 2**16) < Fraction(1, 2 * common)
        else:
            assert factor == images._TENTHS and place in (0, after - 1)
            assert sorted(map(float, weights)) == sorted(images._END_WEIGHTS)


@pytest.fixture
def checked_anew():
    """What is checked once in every process is checked in this test, and again after it."""
    checks = (images._filters_agree, images._quick_decoder)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


@pytest.mark.usefixtures("checked_anew")
def test_other_filters_and_decoders_are_left_alone(tmp_path, monkeypatch):
    """Where a library gives other numbers than PIL, PIL does it."""
    array = grainy(480, 640)
    path = tmp_path / "image.jpg"
    Image.fromarray(array).save(path)
    expected = prepared_pixels(str(path), 448)
    images._filters_agree.cache_clear()
    images._quick_decoder.cache_clear()
    calls = []

    def halved(name, work):
        def call(*args, **kwargs):
            calls.append(name)
            return work(*args, **kwargs) // 2

        return call

    monkeypatch.setattr(F, "interpolate", halved("filter", F.interpolate))
    for name in ("_decoded_by_simplejpeg", "_decoded_by_opencv"):
        monkeypatch.setattr(images, name, halved(name, getattr(images, name)))
    for _ in range(2):
        np.testing.assert_array_equal(prepared_pixels(str(path), 448), expected)
    decoders = ["_decoded_by_opencv"] if images.simplejpeg is None else DECODERS
    assert set(calls) == {"filter", *decoders} and len(calls) <= 5, "asked once, and not again"


DECODERS = ["_decoded_by_simplejpeg", "_decoded_by_opencv"]


@pytest.mark.usefixtures("checked_anew")
@pytest.mark.parametrize(
    ("absent", "agreeing", "expected"), [(True, DECODERS, 1), (False, DECODERS, 0), (False, DECODERS[1:], 1)]
)
def test_the_quickest_decoder_that_agrees_is_taken(monkeypatch, absent, agreeing, expected):
    """simplejpeg is not looked for where it is not installed, such as beside an exported model."""
    monkeypatch.setattr(images, "simplejpeg", None if absent else object())
    monkeypatch.setattr(images, "_agrees_with_pil", lambda decode: decode.__name__ in agreeing)
    assert images._quick_decoder() is getattr(images, DECODERS[expected])


def test_the_file_loads_without_simplejpeg(monkeypatch):
    """Exported models hold it, and transformers loads them with no more than they name."""
    assert "simplejpeg" not in get_imports(images.__file__)
    spec = importlib.util.spec_from_file_location("model.images_alone", images.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, spec.name, alone)
    spec.loader.exec_module(alone)
    assert alone._quick_decoder() is alone._decoded_by_opencv


@pytest.fixture(params=DECODERS)
def decode(request):
    if request.param == DECODERS[0] and images.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return getattr(images, request.param)


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(61, 83), (480, 640), (1, 1)])
def test_decoders_give_the_pixels_of_pil(decode, kind, progressive, size):
    image = Image.fromarray(grainy(*size))
    content = _file(image, "JPEG", quality=88, subsampling=kind, progressive=progressive)
    np.testing.assert_array_equal(decode(content), open_image(content))


@pytest.mark.skipif(images.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_are_left_to_pil(progressive):
    """Or give what PIL gives, where neither notices: one byte is another, or the end is lost or followed by more."""
    whole = _file(Image.fromarray(grainy(61, 83)), "JPEG", quality=90, progressive=progressive)
    kept = []
    for place, value in np.random.default_rng(0).integers((20, 0), (len(whole) - 2, 256), (200, 2)).tolist():
        kept.append(images._decoded_by_simplejpeg(flawed := whole[:place] + bytes([value]) + whole[place + 1 :]))
        if kept[-1] is not None:
            np.testing.assert_array_equal(kept[-1], open_image(flawed))
    assert 0 < sum(one is None for one in kept) < len(kept)
    for part in (2, 300, len(whole) // 2, len(whole) - 30):
        assert images._decoded_by_simplejpeg(whole[:part] + b"\xff\xd9") is None


def test_photographs_are_prepared_as_pil_does_it(realdata):
    photographs = sorted((realdata / "dataset").rglob("*.jpg"))
    assert photographs
    for path in photographs:
        with Image.open(path) as opened:
            array = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        np.testing.assert_array_equal(prepared_pixels(str(path), 448), by_the_book(array, 448), str(path))
        assert_nearly_by_the_book(prepared_pixels(str(path), 448, fast=True), by_the_book(array, 448))


@pytest.mark.parametrize(
    ("mode", "options"),
    [(mode, {"subsampling": kind}) for mode in ("RGB", "L", "CMYK") for kind in ("4:4:4", "4:2:2", "4:2:0")]
    + [("RGB", {"progressive": True}), ("RGB", {"restart_marker_blocks": 2}), ("RGB", {"optimize": True, "quality": 1})]
    + [("RGB", {"keep_rgb": True}), ("YCbCr", {}), ("RGB", {"icc_profile": b"x" * 400})],
)
@pytest.mark.parametrize("size", [(61, 83), (16, 16), (1, 1), (7, 130)])
def test_a_jpeg_decoded_quickly_has_the_same_pixels(tmp_path, mode, options, size):
    path = tmp_path / "image.jpg"
    Image.fromarray(grainy(*size)).convert(mode).save(path, **{"quality": 90, **options})
    opened = open_image(path)
    assert (_quickly_decoded(path) is not None) == (mode in ("RGB", "YCbCr"))
    if mode in ("RGB", "YCbCr"):
        for source in (path, str(path), path.read_bytes()):
            np.testing.assert_array_equal(_quickly_decoded(source), opened)
    exact, fast = (prepare_image(path, 64, fast=fast) for fast in (False, True))
    assert torch.equal(exact.pixels, fast.pixels) and exact.original_size == fast.original_size == size
    np.testing.assert_array_equal(prepared_pixels(str(path), 64), by_the_book(opened, 64))


def test_the_size_of_a_plain_jpeg_is_read_off_its_header():
    array = grainy(61, 83)
    plain = [_file(Image.fromarray(array), "JPEG", **more) for more in ({}, {"comment": b"x" * 300})]
    plain += [_file(Image.fromarray(array), "JPEG", **{more: True}) for more in ("progressive", "optimize")]
    for content in plain:
        assert images._size_of_plain_jpeg(content) == images._size_of_upright_jpeg(content) == (83, 61)
    exif = Image.Exif()
    exif[0x0112] = 6
    others = [_file(Image.fromarray(array), "JPEG", **more) for more in ({"exif": exif}, {"icc_profile": b"x" * 9})]
    others += [_file(Image.fromarray(array).convert(mode), "JPEG") for mode in ("L", "CMYK")]
    for content in (*others, plain[0][:40], b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\0\xff\xd9", b""):
        assert images._size_of_plain_jpeg(content) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_left_to_pil(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(grainy(61, 83))
    image.save(tmp_path / "image.jpg", exif=exif)
    assert (_quickly_decoded(tmp_path / "image.jpg") is not None) == (orientation == 1)
    turned = open_image(tmp_path / "image.jpg")
    np.testing.assert_array_equal(prepared_pixels(str(tmp_path / "image.jpg"), 64), by_the_book(turned, 64))


def test_a_broken_jpeg_is_refused_the_quick_way_too(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(grainy(61, 83)).save(path)
    content = path.read_bytes()
    for damaged in (content[:-40], content[: len(content) // 2] + b"\xff\xd9", content[:2] + content[-2:], b""):
        path.write_bytes(damaged)
        for fast in (False, True):
            try:
                found = prepare_image(path, 64, fast=fast)
            except ImageError as error:
                assert "image.jpg" in str(error)
            else:  # what PIL opens in spite of its damage is opened both ways
                assert damaged.endswith(b"\xff\xd9") and torch.equal(found.pixels, prepare_image(path, 64).pixels)
    with pytest.raises(ImageError, match="does not exist"):
        prepare_image(tmp_path / "none.jpg", 64, fast=True)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_far_larger_jpeg_is_decoded_in_less_detail_when_asked(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(grainy(900, 1201)).filter(ImageFilter.GaussianBlur(3))
    image.save(tmp_path / "large.jpg", quality=95, exif=exif)
    exact, fast = (prepare_image(tmp_path / "large.jpg", 64, fast=fast) for fast in (False, True))
    assert exact.original_size == fast.original_size == ((900, 1201) if orientation == 1 else (1201, 900))
    assert exact.resized_size == fast.resized_size
    off = (exact.pixels.int() - fast.pixels.int()).abs().float()
    assert off.mean() < 3 and off.max() > 1, "close, but not the same: less detail was looked at"
    near, whole = (prepare_image(tmp_path / "large.jpg", 448, fast=fast) for fast in (True, False))
    assert torch.equal(near.pixels, whole.pixels), "three times what is needed is not far larger"


@pytest.mark.parametrize("pad_before_normalize", [False, True])
def test_a_batch_is_normalised_as_its_images_are(pad_before_normalize):
    arrays = [grainy(20, 30), grainy(30, 11, 1), grainy(16, 16, 2)]
    prepared = [prepare_image(array, 16) for array in arrays]
    sizes = torch.tensor([one.resized_size for one in prepared])
    statistics = PixelStatistics(tuple(MEAN), tuple(STD), pad_before_normalize)
    together = statistics(torch.stack([one.pixels for one in prepared]), sizes)
    assert together.dtype == torch.float32 and together.is_contiguous()
    for array, found in zip(arrays, together, strict=True):
        alone = encode_image(array, 16, MEAN, STD, pad_before_normalize=pad_before_normalize)
        assert torch.equal(found, alone.pixel_values)


def test_images_are_resized_as_pil_does_it(tmp_path):
    array = grainy(75, 100)
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(array).resize((64, 48), Image.Resampling.BILINEAR))
    for source in (array, tmp_path / "a.png", Image.fromarray(array), (tmp_path / "a.png").read_bytes()):
        prepared = prepare_image(source, 64)
        np.testing.assert_array_equal(prepared.pixels[:, :48].permute(1, 2, 0), expected)
        assert prepared.resized_size == (48, 64) and prepared.original_size == (75, 100)
