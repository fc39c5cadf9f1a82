"""Golden group `forward_train`: the training forward and every gradient, with and without targets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from model.build.released_checkpoints import name_from_pixellm
from model.modeling_pixellm import TOWER_KEY, PixelLMForCausalLM, PixelLMOutput
from tests.golden import kinks, recipe, released_model, vectors

GROUP = "forward_train"
CASES = vectors.case_names(GROUP, "cases")
LOSS_NAMES = {"ce_loss": "ce", "mask_bce_loss": "bce", "mask_dice_loss": "dice"}
FUSED = "out.fused_low_res_mask_every2nd_pixel"
UNREGISTERED = "<unregistered> "


def test_every_entry_belongs_to_a_case() -> None:
    vectors.assert_all_in_cases(
        GROUP, CASES, [("seed",), ("loss_weights",), ("float32_vs_float64",), *(("cases", case) for case in CASES)]
    )


def test_loss_weights_are_our_defaults() -> None:
    assert released_model.build().loss_weights == vectors.read_json(GROUP)["loss_weights"]


def test_recorded_rounding_is_far_below_the_tolerances() -> None:
    """The set also tells how far the reference itself moved between float32 and float64."""
    facts = vectors.read_json(GROUP)
    noise = dict(facts["float32_vs_float64"])
    for name, difference in noise.pop("loss_abs_diff").items():
        assert difference < vectors.LOSS_RTOL / 10 * max(case["outputs"][name] for case in facts["cases"].values()), (
            name
        )
    assert max(noise.pop("pred_masks_max_abs_diff")) < vectors.MASK_ATOL / 10
    assert all(difference < vectors.HIDDEN_ATOL / 10 for difference in noise.values()), noise


@pytest.fixture
def model() -> Iterator[PixelLMForCausalLM]:
    """The released model in train mode, its fusion constants watched as the release watches them; put back after."""
    model = released_model.build().train()
    constants = (model.codebook.token_weights, model.pixel_decoder.scale_weights)
    for constant in constants:
        constant.requires_grad_(True)
    yield model
    model.zero_grad(set_to_none=True)
    for constant in constants:
        constant.requires_grad_(False)
        constant.grad = None
    model.eval()


@pytest.mark.parametrize("case", CASES)
def test_forward_train(case: str, model: PixelLMForCausalLM) -> None:
    with vectors.read_case(GROUP, case, "cases", case) as golden:
        counts = [sum(rows) for rows in golden.facts["target_counts_per_conversation"]]
        with kinks.watch() as near:
            output = run(golden, model)
        compare_rows(golden, output)
        compare_masks(golden, output, counts)
        compare_losses(golden, weighted_losses(model, output))
        compare_gradients(golden, model, output, near)


def run(golden: vectors.Reading, model: PixelLMForCausalLM) -> PixelLMOutput:
    """Our forward on the recorded inputs."""
    facts = golden.facts
    seed = vectors.read_json(GROUP)["seed"]
    resized = facts["clip_resize_hw"]
    pixels = recipe.make_pixels(seed, facts["images_clip_recipe"].read_all(), resized)
    counts = facts["target_counts_per_conversation"]
    golden.same("rows of each picture", golden.tensor("in.offset").diff().tolist(), [len(rows) for rows in counts])
    per_row = torch.tensor([count for rows in counts for count in rows])
    return model(
        input_ids=released_model.input_ids(golden.tensor("in.input_ids")),
        attention_mask=golden.tensor("in.attention_masks"),
        pixel_values={TOWER_KEY: pixels},
        resized_sizes=torch.tensor(resized),
        original_sizes=torch.tensor(facts["original_hw"]),
        image_index=torch.repeat_interleave(torch.tensor([len(rows) for rows in counts])),
        labels=golden.tensor("in.labels"),
        masks=golden.per_picture("in.masks"),
        target_questions=torch.repeat_interleave(per_row),
    )


def compare_rows(golden: vectors.Reading, output: PixelLMOutput) -> None:
    """What became of the text rows when the picture's placeholder grew."""
    golden.close("out.expanded_attention_mask", output.attention_mask)
    golden.close("out.expanded_labels", output.labels)
    if "out.last_hidden_state" in golden:
        golden.close("out.last_hidden_state", output.last_hidden_state, atol=vectors.HIDDEN_ATOL)


def compare_masks(golden: vectors.Reading, output: PixelLMOutput, counts: list[int]) -> None:
    """Embeddings and masks, picture by picture."""
    _, stride = vectors.strides(FUSED)
    for picture, embeddings in enumerate(output.embeddings.split(counts)):
        golden.close(f"out.pred_embeddings.{picture}", embeddings, atol=vectors.HIDDEN_ATOL)
        golden.close(f"out.pred_masks.{picture}", output.mask_logits[picture], atol=vectors.MASK_ATOL)
        if f"{FUSED}.{picture}" in golden:
            fused = vectors.thin_out(output.low_res_mask_logits[picture][:, None], 1, stride)
            golden.close(f"{FUSED}.{picture}", fused, atol=vectors.MASK_ATOL)


def weighted_losses(model: PixelLMForCausalLM, output: PixelLMOutput) -> dict[str, torch.Tensor]:
    """The release's losses by its names: each weighted and divided by its count."""
    losses = {
        name: model.loss_weights[ours] * output.losses[ours].sum / output.losses[ours].count.clamp(min=1)
        for name, ours in LOSS_NAMES.items()
    }
    losses["mask_loss"] = losses["mask_bce_loss"] + losses["mask_dice_loss"]
    losses["loss"] = losses["ce_loss"] + losses["mask_loss"]
    return losses


def compare_losses(golden: vectors.Reading, losses: dict[str, torch.Tensor]) -> None:
    recorded = golden.facts["outputs"]
    for name in recorded:
        golden.number(name, losses[name], recorded[name], rtol=vectors.LOSS_RTOL)


@dataclass(frozen=True)
class Gradient:
    """A recorded number about a gradient, and ours; None where no gradient arrives."""

    label: str
    found: float | None
    recorded: float | None
    atol: float

    @property
    def fits(self) -> bool:
        if self.recorded is None:
            return self.found is None
        if self.found is None:
            # Mask tokens whose masks nobody asks for are not even decoded here; in the release their gradient is zero.
            return self.recorded == 0
        return abs(self.found - self.recorded) <= self.atol + vectors.GRADIENT_RTOL * abs(self.recorded)


def compare_gradients(
    golden: vectors.Reading, model: PixelLMForCausalLM, output: PixelLMOutput, near: list[kinks.Kink]
) -> None:
    """Every recorded gradient. Where some do not fit, ReLU inputs next to zero may lie on their other side."""
    recorded = golden.facts["grad_norms"].read_all()
    names = {name_from_pixellm(name) for name in recorded if not name.startswith(UNREGISTERED)}
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    golden.same("parameters without a recorded gradient", sorted(ours - names), [])
    best = gradients(model, output, recorded)
    for flipped in kinks.choices(near):
        if all(gradient.fits for gradient in best):
            break
        with kinks.watch(flipped):
            other = gradients(model, run(golden, model), recorded)
        best = min(best, other, key=lambda attempt: sum(not gradient.fits for gradient in attempt))
    for gradient in best:
        if gradient.found is None or gradient.recorded is None:
            golden.check(gradient.fits, f"{gradient.label}: found {gradient.found}, expected {gradient.recorded}")
        else:
            golden.number(
                gradient.label, gradient.found, gradient.recorded, atol=gradient.atol, rtol=vectors.GRADIENT_RTOL
            )


def gradients(model: PixelLMForCausalLM, output: PixelLMOutput, recorded: dict[str, Any]) -> list[Gradient]:
    """Backward through the total loss, then every recorded number beside ours."""
    model.zero_grad(set_to_none=True)
    fusion = {"multiseg_scalar": model.codebook.token_weights, "multiscale_scalar": model.pixel_decoder.scale_weights}
    for constant in fusion.values():
        constant.grad = None
    weighted_losses(model, output)["loss"].backward()
    parameters = dict(model.named_parameters())
    compared = []
    for published, value in recorded.items():
        label = f"gradient of {published}"
        if published.startswith(UNREGISTERED):
            compared += fusion_gradients(label, fusion[published.removeprefix(UNREGISTERED)], value)
            continue
        name = name_from_pixellm(published)
        gradient = None if name is None else parameters[name].grad
        found = None if gradient is None else float(gradient.norm())
        compared.append(Gradient(label, found, value, vectors.GRADIENT_ATOL))
    return compared


def fusion_gradients(label: str, constant: torch.Tensor, recorded: list[float | None]) -> list[Gradient]:
    """The release's fusion scalars: one per token, shared by all scales, in a list that is too long (fact M1); or one
    per scale. They are signed sums, so that the largest of them tells the rounding of all.
    """
    shared = None if constant.grad is None else constant.grad.reshape(-1, constant.shape[-1]).sum(0).tolist()
    found = [None] * len(recorded) if shared is None else [*shared, *[None] * (len(recorded) - len(shared))]
    atol = vectors.GRADIENT_ATOL + vectors.GRADIENT_RTOL * max(abs(value) for value in recorded if value is not None)
    return [
        Gradient(f"{label}[{index}]", ours, theirs, atol)
        for index, (ours, theirs) in enumerate(zip(found, recorded, strict=True))
    ]
