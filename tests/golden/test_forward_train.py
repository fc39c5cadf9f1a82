"""Golden group `forward_train`: the training forward and every gradient, with and without targets."""

import pytest

from model.modeling_pixellm import PixelLMOutput
from tests.golden import kinks, released_model, training, vectors
from utils.checkpoints.layouts.published_names import name_from_pixellm

GROUP = "forward_train"
CASES = vectors.case_names(GROUP, "cases")
FUSED = "out.fused_low_res_mask_every2nd_pixel"


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(
        GROUP, CASES, [("seed",), ("loss_weights",), ("float32_vs_float64",), *(("cases", case) for case in CASES)]
    )


def test_loss_weights_are_our_defaults() -> None:
    assert released_model.build().loss_weights == vectors.read_json(GROUP)["loss_weights"]


def test_recorded_rounding_is_below_the_tolerances() -> None:
    """The set also tells how far the reference itself moved between float32 and float64."""
    facts = vectors.read_json(GROUP)
    noise = dict(facts["float32_vs_float64"])
    for name, difference in noise.pop("loss_abs_diff").items():
        assert difference < vectors.LOSS_RTOL * max(case["outputs"][name] for case in facts["cases"].values()), name
    assert max(noise.pop("pred_masks_max_abs_diff")) < vectors.MASK_ATOL
    assert all(difference < vectors.HIDDEN_ATOL for difference in noise.values()), noise


@pytest.mark.parametrize("case", CASES)
def test_forward_train(case: str) -> None:
    model, seed = released_model.build(), vectors.read_json(GROUP)["seed"]
    with training.watched_constants(model), vectors.read_case(GROUP, case, "cases", case) as golden:
        counts = [sum(rows) for rows in golden.facts["target_counts_per_conversation"]]
        with kinks.watch() as near:
            output = training.run(golden, model, seed)
        compare_rows(golden, output)
        compare_masks(golden, output, counts)
        training.compare_losses(golden, training.weighted_losses(model, output))
        training.compare_gradients(
            golden, model, lambda: training.run(golden, model, seed), output, near, name_from_pixellm
        )


def compare_rows(golden: vectors.Reading, output: PixelLMOutput) -> None:
    """What became of the text rows when the image's placeholder grew."""
    golden.close("out.expanded_attention_mask", output.attention_mask)
    golden.close("out.expanded_labels", output.labels)
    if "out.last_hidden_state" in golden:
        golden.close("out.last_hidden_state", output.last_hidden_state, atol=vectors.HIDDEN_ATOL)


def compare_masks(golden: vectors.Reading, output: PixelLMOutput, counts: list[int]) -> None:
    """Embeddings and masks, image by image."""
    _, stride = vectors.strides(FUSED)
    for image, embeddings in enumerate(output.embeddings.split(counts)):
        golden.close(f"out.pred_embeddings.{image}", embeddings, atol=vectors.HIDDEN_ATOL)
        golden.close(f"out.pred_masks.{image}", output.mask_logits[image], atol=vectors.MASK_ATOL)
        if f"{FUSED}.{image}" in golden:
            fused = vectors.thin_out(output.low_res_mask_logits[image][:, None], 1, stride)
            golden.close(f"{FUSED}.{image}", fused, atol=vectors.MASK_ATOL)
