"""Golden group `preprocess`: an image file to the square that the vision tower sees."""

import re

import numpy as np
import pytest
from PIL import Image

from model.geometry import resized_shape
from model.image_processing_pixellm import encode_image, open_image, prepare_image
from tests.golden import vectors
from utils.checkpoints.layouts.published_names import RELEASE_IMAGE_MEAN, RELEASE_IMAGE_STD

GROUP = "preprocess"
IMAGES = vectors.case_names(GROUP, "images")
COMMON = ("target_edge", "mean", "std", "longest_side_shapes")
SUM_RTOL = 1e-6  # of the sum of absolute values: rounding of single numbers averages out


def test_every_entry_belongs_to_a_case() -> None:
    cases = [image.removesuffix(".png") for image in IMAGES]
    vectors.assert_all_in_cases(GROUP, cases, [*((name,) for name in COMMON), *(("images", image) for image in IMAGES)])


def test_statistics_are_the_ones_we_load_a_release_with() -> None:
    facts = vectors.read_json(GROUP)
    assert (list(RELEASE_IMAGE_MEAN), list(RELEASE_IMAGE_STD)) == (facts["mean"], facts["std"])


@pytest.mark.parametrize("file", IMAGES)
def test_preprocess(file: str) -> None:
    common = vectors.read_json(GROUP)
    with vectors.read_case(GROUP, file.removesuffix(".png"), "images", file) as golden:
        facts = golden.facts
        array = open_image(vectors.folder() / file)
        expected_resized = np.array(Image.open(vectors.folder() / facts["resized_uint8_file"]))
        prepared = prepare_image(vectors.folder() / file, common["target_edge"])
        height, width = prepared.resized_size
        resized = prepared.pixels[:, :height, :width].permute(1, 2, 0).numpy()
        golden.same("resized shape", resized.shape, expected_resized.shape)
        golden.check(np.array_equal(resized, expected_resized), "the resized image differs")

        image = encode_image(array, common["target_edge"], common["mean"], common["std"], pad_before_normalize=False)
        golden.same("size", list(image.original_size), facts["size_hw"])
        golden.same("resized size", list(image.resized_size), facts["clip_resize_hw"])
        for name in golden.names(r"^clip_tensor"):
            thinned = vectors.thin_out(image.pixel_values, *vectors.strides(name))
            golden.close(name, thinned, atol=vectors.PIXEL_ATOL)
        values, size = image.pixel_values.double(), facts["clip_tensor_abs_sum_float64"]
        golden.number("sum", values.sum(), facts["clip_tensor_sum_float64"], atol=SUM_RTOL * size)
        golden.number("sum of absolute values", values.abs().sum(), size, rtol=SUM_RTOL)
        for key in facts:
            other_side = re.fullmatch(r"resize_for_(\d+)_hw", key)
            if other_side:
                golden.same(key, list(resized_shape(*array.shape[:2], int(other_side.group(1)))), facts[key])


def test_shapes_of_the_longest_side() -> None:
    """As in the release, save that a side which it lets vanish is one pixel here."""
    table = vectors.read_json(GROUP)["longest_side_shapes"]
    assert table
    for size, shapes in table.items():
        height, width = map(int, size.split("x"))
        for side, expected in shapes.items():
            assert resized_shape(height, width, int(side)) == tuple(max(1, length) for length in expected), (size, side)
