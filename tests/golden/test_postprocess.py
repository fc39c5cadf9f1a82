"""Golden group `postprocess`: low-resolution logits to the image's own size."""

import pytest
import torch

from model.geometry import restore_masks
from tests.golden import vectors

GROUP = "postprocess"
CASES = vectors.case_names(GROUP)
ZERO_TARGETS = "zero_targets_output_shape"


def tolerance(stored: torch.Tensor) -> dict[str, float]:
    """A half-precision record was rounded once, after both resizes in float32; ours stays in float32."""
    rounding = 0.0 if stored.dtype == torch.float32 else torch.finfo(stored.dtype).eps / 2
    return {"atol": vectors.MASK_ATOL, "rtol": rounding}


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(GROUP, CASES, [*((case,) for case in CASES), (ZERO_TARGETS,)])


@pytest.mark.parametrize("case", CASES)
def test_postprocess(case: str) -> None:
    with vectors.read_case(GROUP, case, case) as golden:
        facts = golden.facts
        masks = restore_masks(golden.tensor("in.low_res")[:, 0], facts["input_size_hw"], facts["original_size_hw"])
        golden.same("size", list(masks.shape[1:]), facts["original_size_hw"])
        stride = facts["output_stride_stored"]
        stored = golden.tensor("out.masks")
        golden.close("out.masks", vectors.thin_out(masks, 1, stride)[:, None], **tolerance(stored))


def test_no_targets() -> None:
    *_, height, width = expected = vectors.read_json(GROUP)[ZERO_TARGETS]
    low_res = next(tensor for name, tensor in vectors.read_tensors(GROUP).items() if name.endswith(".in.low_res"))
    masks = restore_masks(low_res[:0, 0], (height, width), (height, width))
    assert list(masks[:, None].shape) == expected
