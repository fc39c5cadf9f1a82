"""Images prepared fast are those prepared exactly, values off by 1 here and there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from model.image_processing_pixellm import ImageError, prepare_image
from utils.data.fast_images import prepare_image_fast


def grainy(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Large shapes with edges and grain, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.NEAREST)
    return np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 1)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (640, 640), (427, 640), (333, 500), (896, 300), (1, 1)])
@pytest.mark.parametrize("kind", ["array", "jpg", "png"])
def test_fast_values_are_off_by_one_at_most(size: tuple[int, int], kind: str, tmp_path: Path) -> None:
    source: np.ndarray | Path = grainy(*size)
    if kind != "array":
        Image.fromarray(grainy(*size)).save(tmp_path / f"image.{kind}")
        source = tmp_path / f"image.{kind}"
    exact, fast = prepare_image(source, 448), prepare_image_fast(source, 448)
    assert exact.original_size == fast.original_size == size and exact.resized_size == fast.resized_size
    assert (exact.pixels.int() - fast.pixels.int()).abs().max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_far_larger_jpeg_is_decoded_in_less_detail(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(grainy(900, 1201)).filter(ImageFilter.GaussianBlur(3))
    image.save(tmp_path / "large.jpg", quality=95, exif=exif)
    exact, fast = prepare_image(tmp_path / "large.jpg", 64), prepare_image_fast(tmp_path / "large.jpg", 64)
    assert exact.original_size == fast.original_size == ((900, 1201) if orientation == 1 else (1201, 900))
    assert exact.resized_size == fast.resized_size
    off = (exact.pixels.int() - fast.pixels.int()).abs().float()
    assert off.mean() < 3 and off.max() > 1, "close, but not the same: less detail was looked at"
    near, whole = prepare_image_fast(tmp_path / "large.jpg", 448), prepare_image(tmp_path / "large.jpg", 448)
    assert (near.pixels.int() - whole.pixels.int()).abs().max() <= 1, "three times what is needed is not far larger"


def test_a_broken_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(grainy(61, 83)).save(path)
    content = path.read_bytes()
    for damaged in (content[:-40], content[:2] + content[-2:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match=r"image\.jpg"):
            prepare_image_fast(path, 64)
    with pytest.raises(ImageError, match="does not exist"):
        prepare_image_fast(tmp_path / "none.jpg", 64)


def test_grey_and_transparent_images_are_opened_as_exactly(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "CMYK", "P"):
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        Image.fromarray(grainy(30, 40)).convert(mode).save(path)
        exact, fast = prepare_image(path, 40), prepare_image_fast(path, 40)
        assert torch.equal(exact.pixels, fast.pixels), mode
