"""Every kind of image is opened; the square a tower sees is exact."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from model.image_processing_pixellm import (
    ImageError,
    PixelStatistics,
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
    prepared = prepare_image(array, 8)
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


def prepared_pixels(source: np.ndarray | str, side: int) -> np.ndarray:
    prepared = prepare_image(source, side)
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


def test_photographs_are_prepared_as_pil_does_it(realdata):
    photographs = sorted((realdata / "dataset").rglob("*.jpg"))
    assert photographs
    for path in photographs:
        with Image.open(path) as opened:
            array = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        np.testing.assert_array_equal(prepared_pixels(str(path), 448), by_the_book(array, 448), str(path))


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
